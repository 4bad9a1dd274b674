# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import timeit
from dataclasses import replace

import pytest

from bucketprobe.catalog import LIMITS
from bucketprobe.model import EVIDENCE, LABELS, OPERATIONS, Attribution, Request
from bucketprobe.sinks.attribution import AttributionSink

ARTIFACT = ("write", "read", "metadata", "list")


def request(**fields) -> Request:
    base = Request(id="r", conn="c", pid=1, wall_ns=0, start_ns=5, end_ns=9, operation="write", outcome="complete", status=201)
    return replace(base, **fields)


def test_all_is_there_from_the_start() -> None:
    sink = AttributionSink()
    assert sink.labelled == dict.fromkeys(LABELS, 0)
    assert sink.evidence == dict.fromkeys(EVIDENCE, 0)
    assert sink.limited_by == dict.fromkeys(LIMITS, 0) == {"client": 0, "server": 0, "storage": 0, "unknown": 0}


def test_requests_by_label_evidence_and_limit() -> None:
    sink = AttributionSink()
    sink.observe(request(attribution=Attribution("exact", ("path", "bytes")), limited_by="client"))
    sink.observe(request(attribution=Attribution("exact", ("thread",)), limited_by="client"))
    sink.observe(request(operation="read", attribution=Attribution("shared", ("path", "order")), limited_by="storage"))
    sink.observe(request())
    assert sink.labelled == {"exact": 2, "inferred": 0, "shared": 1, "unattributed": 1}
    assert {name: count for name, count in sink.evidence.items() if count} == {"path": 2, "bytes": 1, "thread": 1, "order": 1}
    assert sink.limited_by == {"client": 2, "server": 0, "storage": 1, "unknown": 1}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_requests_on_artifacts_count_and_each_counts_once(operation) -> None:
    sink = AttributionSink()
    sink.observe(request(operation=operation, attribution=Attribution("inferred", ("window",)), limited_by="server"))
    seen = int(operation in ARTIFACT)
    assert sum(sink.labelled.values()) == sink.labelled["inferred"] == seen
    assert sum(sink.limited_by.values()) == sink.limited_by["server"] == seen
    assert sum(sink.evidence.values()) == sink.evidence["window"] == seen


def test_an_evidence_that_the_table_does_not_know_is_shown_and_not_hidden() -> None:
    sink = AttributionSink()
    sink.observe(request(attribution=Attribution("inferred", ("hunch",))))
    assert sink.evidence["hunch"] == 1


def test_observing_is_cheap() -> None:
    sink = AttributionSink()
    one = request(attribution=Attribution("exact", ("path", "bytes", "fingerprint")), limited_by="storage")
    best = min(timeit.repeat(lambda: sink.observe(one), number=2000, repeat=5)) / 2000
    # Some 0.3 us where this was written.
    assert best < 10e-6

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import fields, replace

import pytest

from bucketprobe.catalog import DigestHealth
from bucketprobe.model import DIGEST_SOURCES, OPERATIONS, Digest, Request
from bucketprobe.sinks.integrity import IntegritySink


def request(digest: Digest, **others) -> Request:
    base = Request(id="r", conn="c", pid=1, wall_ns=0, start_ns=5, end_ns=9, operation="write", outcome="complete", status=201)
    return replace(base, digest=digest, **others)


def test_all_is_there_from_the_start() -> None:
    sink = IntegritySink()
    assert sink.requests == dict.fromkeys(DIGEST_SOURCES, 0)
    assert sink.compared == {"match": 0, "mismatch": 0, "unknown": 0}
    assert sink.mismatches == {"computed": 0, "answer": 0}
    assert sink.accepted == 0


def test_its_counts_are_fields_of_the_agents_health() -> None:
    assert set(IntegritySink.__slots__) <= {field.name for field in fields(DigestHealth)}


def test_requests_by_source_result_and_who_said_mismatch() -> None:
    sink = IntegritySink()
    sink.observe(request(Digest("exact", 2.0, 1000, 5, "sha256:aa", "sha256:aa", "thread", "match")))
    sink.observe(request(Digest("gap", 5.0, 1000, 5, "sha256:aa", "sha256:bb", "thread", "mismatch", "computed")))
    sink.observe(request(Digest(declared="sha256:aa", mismatch="answer"), status=400))
    sink.observe(request(Digest("gap", 5.0, 1000)))
    assert {name: number for name, number in sink.requests.items() if number} == {"exact": 1, "gap": 2, "none": 1}
    assert sink.compared == {"match": 1, "mismatch": 1, "unknown": 1}, "one that declares nothing is not compared"
    assert sink.mismatches == {"computed": 1, "answer": 1}
    assert sink.accepted == 1, "the 201 although the digests differ"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_requests_on_artifacts_count(operation) -> None:
    sink = IntegritySink()
    sink.observe(request(Digest("gap", declared="sha256:aa", mismatch="answer"), operation=operation))
    counted = int(operation in ("write", "read", "metadata", "list"))
    assert (sink.requests["gap"], sink.compared["unknown"], sink.mismatches["answer"]) == (counted,) * 3

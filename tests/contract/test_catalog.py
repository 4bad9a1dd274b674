# SPDX-License-Identifier: Apache-2.0
"""The catalog against what is served: every row appears with its tags and from the start, and nothing appears that is no row."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bucketprobe.abi import Stat
from bucketprobe.catalog import CATALOG, HEALTH, LOSSES, DigestHealth, HealthSnapshot, Metric
from bucketprobe.config import FileClasses, StorageSpec
from bucketprobe.exporters.jsonl import CAUSES
from bucketprobe.exporters.prometheus import PrometheusText
from bucketprobe.model import DIGEST_SOURCES, EVIDENCE, OPERATIONS, OUTCOMES, Attribution, Digest, Request
from bucketprobe.sinks.attribution import AttributionSink
from bucketprobe.sinks.integrity import IntegritySink
from bucketprobe.sinks.metrics import MetricsSink
from bucketprobe.tracker import Tracker

TAGS = {"environment": "test", "region": "here", "node_id": "n1", "bucket_service_version": "1"}
NOW = HealthSnapshot(
    capabilities={"effective": 0}, accept_queue=0, ring_bytes=65_536, cpu_seconds=1.0, rss_bytes=1, version="1", python="3", kernel="6"
)

DIGEST = DigestHealth(budgets={"time": 0.002, "total": 0.004}, prices={"update": 2e-6}, target_cpu=1.0)


def requests() -> list[Request]:
    """One of every operation, outcome and source of a digest's time."""
    return [
        Request(
            id="r", conn="c", pid=1, wall_ns=0, start_ns=0, end_ns=10**7, operation=operation, outcome=outcome, status=200, bytes_in=5,
            phases={"queue": 10, "runqueue": 20, "other": 10**7 - 30}, queue_stages={"accept": 4, "read": 6},
            attribution=Attribution("inferred", EVIDENCE), limited_by="server",
            digest=Digest(source, 5.0, 10**6, 5, "sha256:aa", "sha256:bb", "thread", "mismatch", "computed", ("match", "mismatch")),
        )
        for operation in OPERATIONS
        for outcome in OUTCOMES
        for source in DIGEST_SOURCES
    ]  # fmt: skip


def served(observed: list[Request]) -> dict[str, dict[str, set[frozenset[tuple[str, str]]]]]:
    """Of each family by its Prometheus name: its type, and its series' labels (without a bucket's bound)."""
    sink, sureness, digests = MetricsSink(TAGS), AttributionSink(), IntegritySink()
    for request in observed:
        sink.observe(request)
        sureness.observe(request)
        digests.observe(request)
    digest = replace(DIGEST, requests=digests.requests, compared=digests.compared, mismatches=digests.mismatches)
    now = replace(NOW, labelled=sureness.labelled, evidence=sureness.evidence, limited_by=sureness.limited_by, digest=digest)
    text = b"".join(PrometheusText(sink.collect, lambda: now).chunks()).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    found: dict[str, dict[str, set[frozenset[tuple[str, str]]]]] = {name: {kind: set()} for name, kind in kinds.items()}
    for family in text_string_to_metric_families(text):
        [name] = [name for name in (family.name, f"{family.name}_total") if name in found]
        labels = {frozenset((key, value) for key, value in sample.labels.items() if key != "le") for sample in family.samples}
        found[name] = {kinds[name]: labels}
    return found


@pytest.fixture(scope="module")
def busy() -> dict[str, dict[str, set[frozenset[tuple[str, str]]]]]:
    return served(requests())


@pytest.fixture(scope="module")
def fresh() -> dict[str, dict[str, set[frozenset[tuple[str, str]]]]]:
    return served([])


def test_what_is_served_is_the_catalog(busy) -> None:
    assert set(busy) == {metric.prometheus_name for metric in CATALOG} | {row.name for row in HEALTH}


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_each_row_is_served_with_its_kind_and_its_tags(busy, metric: Metric) -> None:
    [(kind, series)] = busy[metric.prometheus_name].items()
    assert kind == metric.kind
    assert series
    for labels in series:
        assert {name for name, _ in labels} == {*metric.tags, *TAGS}
        assert set(TAGS.items()) <= labels


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_series_whose_values_are_known_are_there_from_the_start(fresh, metric: Metric) -> None:
    [series] = fresh[metric.prometheus_name].values()
    own = {tuple(dict(labels)[tag] for tag in metric.tags) for labels in series}
    assert own == (set(metric.closed) or ({()} if not metric.tags else set()))


@pytest.mark.parametrize("row", HEALTH, ids=lambda row: row.name)
def test_each_row_about_the_agent_is_served(busy, row) -> None:
    [(kind, series)] = busy[row.name].items()
    assert kind == row.kind
    assert series
    assert all({name for name, _ in labels} == set(row.labels) for labels in series)


def test_what_the_sink_counts_adds_no_series_to_those_from_the_start(busy, fresh) -> None:
    """An alert on a label, an evidence or a limit must not wait for its first request."""
    agent = ("requests_labelled", "evidence", "limited", "digest_requests", "digest_compared", "digest_mismatches")
    service = ("bucket_integrity_digest_mismatch_count_total", "bucket_integrity_post_storage_verify_count_total")
    for name in (*(f"bucketprobe_{each}_total" for each in agent), *service):
        assert busy[name] == fresh[name]


def test_names_follow_the_proposals_form() -> None:
    for metric in CATALOG:
        assert re.fullmatch(r"bucket(\.[a-z][a-z_]*){3}", metric.name), metric.name
        assert metric.name.rpartition(".")[2] in ("count", "duration", "size", "gauge")


def test_every_loss_that_is_counted_somewhere_starts_at_zero(fresh) -> None:
    """A counter that first appears with its first loss is one that no alert sees."""
    tracker = Tracker(FileClasses(StorageSpec()), int, lambda tgid, fd: None, lambda tgid: None, lambda request: None)
    counted = (
        {("kernel", stat.name.lower()) for stat in Stat if stat >= Stat.RING_HEAD}
        | {("jsonl", cause) for cause in CAUSES}
        | {("tracker", cause) for cause in tracker.lost}
        | {("decode", "undecodable")}
    )
    assert set(LOSSES) == counted
    [series] = fresh["bucketprobe_lost_total"].values()
    assert {(dict(labels)["stage"], dict(labels)["cause"]) for labels in series} == counted

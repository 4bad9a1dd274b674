# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from bucketprobe.abi import Kind, Stat
from bucketprobe.catalog import CATALOG, HEALTH, LOSSES, DigestHealth, HealthSnapshot, Metric, catalog_table, health_table
from bucketprobe.exporters.jsonl import CAUSES
from bucketprobe.model import DIGEST_SOURCES, EVIDENCE, GAPS, LABELS, OUTCOMES, PHASES, Share

DURATION = (0.1, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000)
SIZE = (1024, 65536, 1048576, 16777216, 104857600, 268435456, 1073741824, 5368709120)

PUBLISHED = {
    "bucket.artifact.write.count": "bucket_artifact_write_count_total",
    "bucket.artifact.write.duration": "bucket_artifact_write_duration_milliseconds",
    "bucket.artifact.write.size": "bucket_artifact_write_size_bytes",
    "bucket.artifact.read.count": "bucket_artifact_read_count_total",
    "bucket.artifact.read.duration": "bucket_artifact_read_duration_milliseconds",
    "bucket.artifact.phase.duration": "bucket_artifact_phase_duration_milliseconds",
    "bucket.integrity.digest.duration": "bucket_integrity_digest_duration_milliseconds",
    "bucket.integrity.digest.size": "bucket_integrity_digest_size_bytes",
    "bucket.integrity.digest_mismatch.count": "bucket_integrity_digest_mismatch_count_total",
    "bucket.integrity.post_storage_verify.count": "bucket_integrity_post_storage_verify_count_total",
    "bucket.performance.queue_delay.duration": "bucket_performance_queue_delay_duration_milliseconds",
    "bucket.storage.backlog_size.gauge": "bucket_storage_backlog_size_gauge",
}


def test_names_are_the_published_ones() -> None:
    assert {metric.name: metric.prometheus_name for metric in CATALOG} == PUBLISHED


def test_a_unit_that_the_name_has_is_not_appended_again() -> None:
    assert Metric("bucket.storage.used_bytes.gauge", "gauge", "bytes", (), "h").prometheus_name == "bucket_storage_used_bytes_gauge"


def test_buckets() -> None:
    for metric in CATALOG:
        expected = {"duration": DURATION, "size": SIZE}.get(metric.name.rpartition(".")[2], ())
        assert metric.buckets == expected
        assert list(metric.buckets) == sorted(metric.buckets)
        assert (metric.kind == "histogram") == bool(metric.buckets)


def test_closed_series_fit_their_tags_and_invent_no_status() -> None:
    for metric in CATALOG:
        assert all(len(values) == len(metric.tags) for values in metric.closed)
        assert len(set(metric.closed)) == len(metric.closed)
        assert not (metric.closed and "status" in metric.tags)


def test_phases_start_for_each_artifact_operation() -> None:
    phases = next(metric for metric in CATALOG if metric.name == "bucket.artifact.phase.duration")
    assert set(phases.closed) == {(operation, phase) for operation in ("write", "read", "metadata", "list") for phase in PHASES}


@pytest.mark.parametrize("row", HEALTH, ids=lambda row: row.name)
def test_health_rows(row) -> None:
    assert re.fullmatch(r"bucketprobe_[a-z_]+", row.name)
    assert row.name.endswith("_total") == (row.kind == "counter")
    assert row.help.endswith(".")
    for values, value in row.read(HealthSnapshot()).items():
        assert len(values) == len(row.labels)
        assert value == (1 if row.name == "bucketprobe_build_info" else 0)


def _health(name: str, now: HealthSnapshot):
    return dict(next(row for row in HEALTH if row.name == name).read(now))


def test_closed_counters_start_at_zero() -> None:
    now = HealthSnapshot(finished={"complete": 2}, lost={("kernel", "ring_end"): 3}, events={"head": 4})
    assert _health("bucketprobe_requests_finished_total", now) == dict.fromkeys(((o,) for o in OUTCOMES), 0) | {("complete",): 2}
    assert _health("bucketprobe_lost_total", now) == dict.fromkeys(LOSSES, 0) | {("kernel", "ring_end"): 3}
    assert _health("bucketprobe_events_total", now) == {(k.name.lower(),): 0 for k in Kind} | {("head",): 4}


def test_attribution_starts_at_zero() -> None:
    now = HealthSnapshot(labelled={"shared": 2}, evidence={"path": 3}, limited_by={"client": 4})
    assert _health("bucketprobe_requests_labelled_total", now) == {(label,): 0 for label in LABELS} | {("shared",): 2}
    assert _health("bucketprobe_evidence_total", now) == {(name,): 0 for name in EVIDENCE} | {("path",): 3}
    assert _health("bucketprobe_limited_total", now) == {("client",): 4, ("server",): 0, ("storage",): 0, ("unknown",): 0}


def test_digests_start_at_zero() -> None:
    now = HealthSnapshot(
        digest=DigestHealth(
            requests={"gap": 5}, compared={"match": 4}, mismatches={"answer": 1}, accepted=1, unattributed=2,
            cost={"value": 0.5}, attached={"time": 3}, windows=7,
        )
    )  # fmt: skip
    assert _health("bucketprobe_digest_requests_total", now) == {(source,): 0 for source in DIGEST_SOURCES} | {("gap",): 5}
    assert _health("bucketprobe_digest_compared_total", now) == {("match",): 4, ("mismatch",): 0, ("unknown",): 0}
    assert _health("bucketprobe_digest_mismatches_total", now) == {("computed",): 0, ("answer",): 1}
    assert _health("bucketprobe_digest_cost_seconds_total", now) == {("time",): 0, ("value",): 0.5}
    assert _health("bucketprobe_digest_attached", now) == {("time",): 3, ("value",): 0}
    assert _health("bucketprobe_digest_mismatches_accepted_total", now) == {(): 1}
    assert _health("bucketprobe_digest_unattributed_total", now) == {(): 2}
    assert _health("bucketprobe_digest_windows_total", now) == {(): 7}


def test_what_limits_and_prices_digests_is_there_once_it_is_known() -> None:
    """A budget of 0 allows nothing; none at all is no series, or an alert on cost over budget would fire for who asked for no limit."""
    known = DigestHealth(budgets={"time": 0.0, "total": 0.004}, prices={"update": 2e-6, "final": 3.5e-6}, target_cpu=12.5)
    expected = {
        "bucketprobe_digest_budget_ratio": {("time",): 0.0, ("total",): 0.004},
        "bucketprobe_digest_hit_seconds": {("update",): 2e-6, ("final",): 3.5e-6},
        "bucketprobe_target_cpu_seconds_total": {(): 12.5},
    }
    for name, values in expected.items():
        assert _health(name, HealthSnapshot(digest=known)) == values
        assert _health(name, HealthSnapshot()) == {}


def test_attributed_work_by_label_and_kind() -> None:
    work = {("exact", "storage"): Share(1 << 20, 2_500_000_000), ("unattributed", "metadata"): Share(7, 1)}
    zeros = {(label, kind): 0 for label in LABELS for kind in ("storage", "metadata")}
    now = HealthSnapshot(attributed=work)
    assert _health("bucketprobe_attributed_bytes_total", now) == zeros | {("exact", "storage"): 1 << 20, ("unattributed", "metadata"): 7}
    seconds = zeros | {("exact", "storage"): 2.5, ("unattributed", "metadata"): 1e-9}
    assert _health("bucketprobe_attributed_seconds_total", now) == seconds


def test_a_gap_is_one_that_a_target_has_or_that_bytes_went_through() -> None:
    bytes_ = {("unseen", "write"): 30, ("unseen", "read"): 12, ("tls", "read"): 0}
    now = HealthSnapshot(gap_bytes=bytes_, coverage_gaps=("io_uring",))
    assert now.gaps == {"io_uring": 0, "unseen": 42}
    assert _health("bucketprobe_coverage_gap", now) == {("io_uring",): 1, ("mmap",): 0, ("tls",): 0, ("unseen",): 1}
    zeros = {(reason, way): 0 for reason in GAPS for way in ("write", "read")}
    assert _health("bucketprobe_coverage_gap_bytes_total", now) == zeros | bytes_
    assert HealthSnapshot().gaps == {}


def test_losses_are_those_that_are_counted() -> None:
    assert {cause for stage, cause in LOSSES if stage == "jsonl"} == set(CAUSES)
    assert {cause for stage, cause in LOSSES if stage == "kernel"} == {s.name.lower() for s in Stat if s.value >= Stat.RING_HEAD.value}
    assert len(set(LOSSES)) == len(LOSSES)


def test_what_is_not_known_has_no_value() -> None:
    now = HealthSnapshot(in_flight=3)
    assert now.backlog is None
    for name in ("capabilities", "ring_bytes", "process_cpu_seconds_total", "process_resident_memory_bytes"):
        assert _health(f"bucketprobe_{name}", now) == {}
    assert HealthSnapshot(in_flight=3, accept_queue=4).backlog == 7


def test_tables_are_markdown_with_a_row_for_each_metric() -> None:
    for table, count, columns in ((catalog_table(), len(CATALOG), 6), (health_table(), len(HEALTH), 4)):
        lines = table.splitlines()
        assert len(lines) == count + 2
        assert {line.count("|") for line in lines} == {columns + 1}
    assert "| `bucket.artifact.read.count` | `bucket_artifact_read_count_total` | counter |  | `cache`, `status` |" in catalog_table()

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from bucketprobe.catalog import CATALOG, HEALTH, Family, HealthSnapshot, Metric, Point
from bucketprobe.exporters.prometheus import PrometheusText
from bucketprobe.model import Request, Share
from bucketprobe.sinks.metrics import MetricsSink

MS = 1_000_000
HEALTH_NOW = HealthSnapshot(
    begun=5,
    finished={"complete": 3},
    in_flight=2,
    records=3,
    lost={("kernel", "ring_end"): 1, ("tracker", "late"): 2},
    labelled={"exact": 2, "inferred": 1},
    attributed={("exact", "storage"): Share(4096, 1_500_000)},
    gap_bytes={("unseen", "write"): 77},
    coverage_gaps=("io_uring",),
    capabilities={"effective": 0, "ambient": 0},
    accept_queue=4,
    cpu_seconds=1.25,
    rss_bytes=27_000_000,
    version="1.2.3",
)


def text_of(sink: MetricsSink, health: HealthSnapshot = HEALTH_NOW) -> str:
    return b"".join(PrometheusText(sink.collect, lambda: health).chunks()).decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, "a series twice"
            found[key] = sample.value
    return found


@pytest.fixture
def sink() -> MetricsSink:
    sink = MetricsSink({"node_id": 'a"b\\c\nd', "region": "eu-west-1"})
    for number in range(100):
        sink.observe(
            Request(
                id="r", conn="c", pid=1, wall_ns=0, start_ns=0, end_ns=number * 400 * MS, operation=("write", "read")[number % 2],
                outcome="complete", status=200 + number % 7, bytes_in=number * 1_000_000, phases={"queue": number, "other": MS},
            )
        )  # fmt: skip
    return sink


def test_the_whole_exposition_keeps_the_formats_rules(sink) -> None:
    text = text_of(sink)
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        if family.type == "histogram":
            _check_histogram(family)
    names = set(re.findall(r"^# TYPE (\S+) ", text, re.M))
    assert names == {m.prometheus_name for m in CATALOG} | {row.name for row in HEALTH}
    assert re.findall(r"^# HELP (\S+) \S", text, re.M) == re.findall(r"^# TYPE (\S+) ", text, re.M)


def _check_histogram(family) -> None:
    series: dict[tuple[tuple[str, str], ...], dict[str, object]] = {}
    for sample in family.samples:
        labels = dict(sample.labels)
        bound = labels.pop("le", None)
        one = series.setdefault(tuple(sorted(labels.items())), {"buckets": []})
        if sample.name.endswith("_bucket"):
            one["buckets"].append((float(bound), sample.value))
        else:
            one[sample.name.removeprefix(family.name)] = sample.value
    assert series
    for one in series.values():
        bounds, values = zip(*one["buckets"], strict=True)
        assert bounds[-1] == math.inf
        assert list(bounds) == sorted(set(bounds))
        assert list(values) == sorted(values)
        assert values[-1] == one["_count"]
        assert "_sum" in one


def test_values_come_through(sink) -> None:
    found = samples(text_of(sink))
    own = (("node_id", 'a"b\\c\nd'), ("region", "eu-west-1"))

    def value(name: str, **labels: str) -> float:
        return found[name, tuple(sorted((*own, *labels.items())))]

    assert value("bucket_artifact_write_count_total", status="200", bucket_type="unknown") == 8
    assert value("bucket_artifact_read_duration_milliseconds_count", cache="unknown") == 50
    assert value("bucket_artifact_read_duration_milliseconds_sum", cache="unknown") == sum(range(1, 100, 2)) * 400
    assert value("bucket_artifact_read_duration_milliseconds_bucket", cache="unknown", le="2500.0") == 3
    assert value("bucket_artifact_write_size_bytes_bucket", bucket_type="unknown", le="5368709120.0") == 50
    assert value("bucket_artifact_phase_duration_milliseconds_bucket", operation="write", phase="other", le="1.0") == 50
    assert value("bucket_storage_backlog_size_gauge") == 6


def test_the_agents_own_metrics(sink) -> None:
    text = text_of(sink)
    found = samples(text)
    assert found["bucketprobe_requests_begun_total", ()] == 5
    assert found["bucketprobe_requests_finished_total", (("outcome", "complete"),)] == 3
    assert found["bucketprobe_requests_finished_total", (("outcome", "unobserved"),)] == 0
    assert found["bucketprobe_lost_total", (("cause", "ring_end"), ("stage", "kernel"))] == 1
    assert found["bucketprobe_lost_total", (("cause", "ring_head"), ("stage", "kernel"))] == 0
    # A loss that the table does not know is a defect, but not one to hide.
    assert found["bucketprobe_lost_total", (("cause", "late"), ("stage", "tracker"))] == 2
    assert found["bucketprobe_capabilities", (("set", "effective"),)] == 0
    assert found["bucketprobe_process_cpu_seconds_total", ()] == 1.25
    assert 'bucketprobe_build_info{kernel="' in text
    assert 'version="1.2.3"' in text
    assert ("bucketprobe_ring_bytes", ()) not in found
    assert not [name for name, labels in found if name.startswith("bucketprobe") and "node_id" in dict(labels)]


def test_how_sure_the_agent_is(sink) -> None:
    found = samples(text_of(sink))
    assert found["bucketprobe_requests_labelled_total", (("label", "inferred"),)] == 1
    assert found["bucketprobe_requests_labelled_total", (("label", "shared"),)] == 0
    assert found["bucketprobe_attributed_bytes_total", (("kind", "storage"), ("label", "exact"))] == 4096
    assert found["bucketprobe_attributed_seconds_total", (("kind", "storage"), ("label", "exact"))] == 0.0015
    assert found["bucketprobe_attributed_seconds_total", (("kind", "metadata"), ("label", "unattributed"))] == 0
    assert found["bucketprobe_coverage_gap", (("reason", "io_uring"),)] == 1
    assert found["bucketprobe_coverage_gap", (("reason", "mmap"),)] == 0
    assert found["bucketprobe_coverage_gap_bytes_total", (("direction", "write"), ("reason", "unseen"))] == 77
    assert found["bucketprobe_limited_total", (("limited_by", "unknown"),)] == 0


def test_the_global_registry_is_left_alone(sink) -> None:
    before = set(REGISTRY._names_to_collectors)
    text = text_of(sink)
    assert set(REGISTRY._names_to_collectors) == before
    assert "python_info" not in text


def test_scraping_twice_says_the_same_and_chunks_are_small(sink) -> None:
    exporter = PrometheusText(sink.collect, lambda: HEALTH_NOW)
    chunks = list(exporter.chunks())
    assert chunks == list(exporter.chunks())
    assert len(chunks) >= 3
    assert all(chunk.endswith(b"\n") for chunk in chunks)
    assert all(chunk.count(b"_sum") <= 32 for chunk in chunks)


def test_one_snapshot_for_each_scrape(sink) -> None:
    calls = []

    def health() -> HealthSnapshot:
        calls.append(1)
        return HEALTH_NOW

    list(PrometheusText(sink.collect, health).chunks())
    assert len(calls) == 1


@given(st.text(), st.text())
def test_any_text_survives_as_label_value(first: str, second: str) -> None:
    metric = Metric("bucket.x.count", "counter", "", ("a", "b"), 'a "help" with \\ and\nnewline')
    family = Family(metric, iter([Point((("a", first), ("b", second)), (), 1.5)]))
    text = b"".join(PrometheusText(lambda _: [family], lambda: HEALTH_NOW).chunks()).decode()
    # The format's lines end in \n alone; the parser's own splitting is on it too.
    family = next(f for f in text_string_to_metric_families(text) if f.name == "bucket_x_count")
    clean = [value.encode("utf-8", "replace").decode() for value in (first, second)]
    assert [(s.labels["a"], s.labels["b"], s.value) for s in family.samples] == [(*clean, 1.5)]
    assert family.documentation == metric.help

# SPDX-License-Identifier: Apache-2.0
"""The Prometheus text format, version 0.0.4.

The service's series are written here, a few at a time: prometheus_client's renderer takes twenty times the CPU and, at
2000 series, 30 MB at its peak. The agent's own few go through a registry of its own, never the global one.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from bucketprobe.catalog import HEALTH, Family, HealthMetric, HealthSnapshot, Point

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SERIES_PER_CHUNK = 32


class PrometheusText:
    """One scrape is one pass over `chunks`.

    `collect` gives the service's families for a snapshot of the agent's health, `health` that snapshot; both are called
    once for each scrape, in the thread that scrapes.
    """

    def __init__(self, collect: Callable[[HealthSnapshot], Iterable[Family]], health: Callable[[], HealthSnapshot]) -> None:
        self._collect = collect
        self._health = health

    def chunks(self) -> Iterator[bytes]:
        """The exposition in pieces of whole lines, UTF-8. Raises what the two callables raise."""
        now = self._health()
        yield _health_text(now)
        yield from _encoded(_blocks(self._collect(now)))


class HealthCollector(Collector):
    """The agent's own metrics for a prometheus_client registry; `health` is called once for each collection."""

    def __init__(self, health: Callable[[], HealthSnapshot]) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        now = self._health()
        for row in HEALTH:
            yield _health_family(row, now)


def _health_family(row: HealthMetric, now: HealthSnapshot) -> Metric:
    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(row.name, row.help, labels=row.labels)
    for values, value in row.read(now).items():
        family.add_metric(values, value)
    return family


def _health_text(now: HealthSnapshot) -> bytes:
    # A registry for each scrape, so that both halves of it show the same snapshot whichever thread asks.
    registry = CollectorRegistry()
    registry.register(HealthCollector(lambda: now))
    return generate_latest(registry)


def _encoded(blocks: Iterator[str]) -> Iterator[bytes]:
    pending: list[str] = []
    for block in blocks:
        pending.append(block)
        if len(pending) == _SERIES_PER_CHUNK:
            yield "".join(pending).encode("utf-8", "replace")
            pending.clear()
    if pending:
        yield "".join(pending).encode("utf-8", "replace")


def _blocks(families: Iterable[Family]) -> Iterator[str]:
    """The text of each family's head and of each series."""
    for metric, points in families:
        name = metric.prometheus_name
        yield f"# HELP {name} {_escape_help(metric.help)}\n# TYPE {name} {metric.kind}\n"
        if metric.kind == "histogram":
            # "5.0" and not "5": Prometheus 3 writes bounds so, and the series is then the same under 2 and 3.
            bounds = [*(repr(float(bound)) for bound in metric.buckets), "+Inf"]
            yield from (_histogram(name, bounds, point) for point in points)
        else:
            yield from (f"{name}{_braced(_labels(point))} {point.total!r}\n" for point in points)


def _histogram(name: str, bounds: list[str], point: Point) -> str:
    labels = _labels(point)
    prefix = f'{name}_bucket{{{labels}{"," if labels else ""}le="'
    cumulative = list(accumulate(point.counts))
    lines = [f'{prefix}{bound}"}} {count}\n' for bound, count in zip(bounds, cumulative, strict=True)]
    braced = _braced(labels)
    lines.append(f"{name}_sum{braced} {point.total!r}\n{name}_count{braced} {cumulative[-1]}\n")
    return "".join(lines)


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _labels(point: Point) -> str:
    return ",".join(f'{name}="{_escape_value(value)}"' for name, value in point.tags)


def _escape_value(text: str) -> str:
    return _escape_help(text).replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")

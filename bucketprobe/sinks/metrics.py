# SPDX-License-Identifier: Apache-2.0
"""Finished requests become series: counts, and histograms of durations and sizes.

Values are kept as they were measured (integer ns and bytes) and turned into the metric's unit when they are read, so sums
stay exact and a value on a bucket's bound is in that bucket. A plain list and a bisection cost a fifth of what
prometheus_client's histogram does, and this runs for every request.

One thread observes, another may collect. Neither locks: copies of a list and of a dict's items are atomic under the
interpreter's lock, and a histogram's count is the sum of one copy of its buckets, so it never contradicts them. Its sum
may be one observation apart from them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping

from bucketprobe.catalog import (
    ARTIFACT_OPERATIONS,
    BACKLOG,
    CATALOG,
    DIGEST_DURATION,
    DIGEST_MISMATCH,
    DIGEST_SIZE,
    OVERFLOW,
    PHASE_DURATION,
    POST_STORAGE_VERIFY,
    QUEUE_DELAY,
    RAW_PER_UNIT,
    READ_COUNT,
    READ_DURATION,
    UNKNOWN,
    WRITE_COUNT,
    WRITE_DURATION,
    WRITE_SIZE,
    Family,
    HealthSnapshot,
    Metric,
    Point,
)
from bucketprobe.errors import UsageError
from bucketprobe.model import Digest, Request


class _Cell:
    """One series. A counter only adds to `total`."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1) if bounds else []
        self.total = 0

    def observe(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class _Budget:
    """How many series may still be made, over all metrics: one budget, because the caps of single labels multiply."""

    __slots__ = ("left", "overflowed")

    def __init__(self, left: int) -> None:
        self.left = left
        self.overflowed = 0


class _Series:
    """The series of one metric, by the values of its own tags."""

    __slots__ = ("bounds", "budget", "cells", "metric", "scale")

    def __init__(self, metric: Metric, budget: _Budget) -> None:
        self.metric = metric
        self.budget = budget
        self.scale = RAW_PER_UNIT[metric.unit]
        self.bounds = tuple(round(bound * self.scale) for bound in metric.buckets)
        self.cells: dict[tuple[str, ...], _Cell] = {}
        for values in metric.closed:
            self.at(*values)

    def at(self, *values: str) -> _Cell:
        return self.cells.get(values) or self._make(values)

    def _make(self, values: tuple[str, ...]) -> _Cell:
        if self.budget.left > 0:
            self.budget.left -= 1
        else:
            self.budget.overflowed += 1
            values = (OVERFLOW,) * len(values)
        return self.cells.setdefault(values, _Cell(self.bounds))

    def points(self, standard: tuple[tuple[str, str], ...]) -> Iterator[Point]:
        for values, cell in list(self.cells.items()):
            own = tuple(zip(self.metric.tags, values, strict=True))
            yield Point(own + standard, tuple(cell.counts), cell.total / self.scale)


class MetricsSink:
    """Every `bucket.*` metric, fed by `observe` and read by `collect`. `tags` are the standard tags, on every series.

    `max_series` bounds the series of counters and histograms together; past it an observation goes to its metric's
    `__other__` series, which the bound does not count (there is at most one for each metric), and `overflowed` grows.
    """

    def __init__(self, tags: Mapping[str, str], max_series: int = 300) -> None:
        """Raises UsageError where `max_series` has no room for the series that exist from the start."""
        least = sum(len(metric.closed) for metric in CATALOG)
        if max_series < least:
            raise UsageError(f"A budget of {max_series} metric series is too small; allow at least {least}.")
        self._standard = tuple(tags.items())
        self._budget = budget = _Budget(max_series)
        self._write_count = _Series(WRITE_COUNT, budget)
        self._write_duration = _Series(WRITE_DURATION, budget)
        self._write_size = _Series(WRITE_SIZE, budget)
        self._read_count = _Series(READ_COUNT, budget)
        self._read_duration = _Series(READ_DURATION, budget)
        self._phase_duration = _Series(PHASE_DURATION, budget)
        self._digest_duration = _Series(DIGEST_DURATION, budget)
        self._digest_size = _Series(DIGEST_SIZE, budget)
        self._digest_mismatch = _Series(DIGEST_MISMATCH, budget)
        self._post_storage_verify = _Series(POST_STORAGE_VERIFY, budget)
        self._queue_delay = _Series(QUEUE_DELAY, budget)

    @property
    def overflowed(self) -> int:
        """Observations that went to an `__other__` series."""
        return self._budget.overflowed

    def observe(self, request: Request) -> None:
        """Count one finished request. Where its end was not seen (`unobserved`) it has no duration, hence no times."""
        operation = request.operation
        if operation not in ARTIFACT_OPERATIONS:
            return
        timed = request.outcome != "unobserved"
        if operation == "write":
            self._observe_write(request, timed)
        elif operation == "read":
            self._observe_read(request, timed)
        if timed:
            self._observe_phases(request)
        self._observe_digest(request.digest)

    def _observe_write(self, request: Request, timed: bool) -> None:
        self._write_count.at(_status(request), UNKNOWN).total += 1
        if timed:
            self._write_duration.at(UNKNOWN).observe(request.duration_ns)
        if request.bytes_in is not None:
            self._write_size.at(UNKNOWN).observe(request.bytes_in)

    def _observe_read(self, request: Request, timed: bool) -> None:
        self._read_count.at(UNKNOWN, _status(request)).total += 1
        if timed:
            self._read_duration.at(UNKNOWN).observe(request.duration_ns)

    def _observe_phases(self, request: Request) -> None:
        for phase, ns in request.phases.items():
            self._phase_duration.at(request.operation, phase).observe(ns)
        for stage, ns in request.queue_stages.items():
            self._queue_delay.at(stage).observe(ns)
        runqueue = request.phases.get("runqueue")
        if runqueue is not None:
            self._queue_delay.at("runqueue").observe(runqueue)

    def _observe_digest(self, digest: Digest) -> None:
        # What was hashed was hashed, whether or not the request's end was seen.
        if digest.source != "none":
            if digest.ns is not None:
                self._digest_duration.at().observe(digest.ns)
            if digest.bytes is not None:
                self._digest_size.at().observe(digest.bytes)
        if digest.mismatch is not None:
            self._digest_mismatch.at().total += 1
        for result in digest.verified:
            self._post_storage_verify.at(result).total += 1

    def collect(self, health: HealthSnapshot) -> Iterator[Family]:
        """Every family in the catalog's order; the backlog is the snapshot's, and has no series where it is not known."""
        for series in (
            self._write_count,
            self._write_duration,
            self._write_size,
            self._read_count,
            self._read_duration,
            self._phase_duration,
            self._digest_duration,
            self._digest_size,
            self._digest_mismatch,
            self._post_storage_verify,
            self._queue_delay,
        ):
            yield Family(series.metric, series.points(self._standard))
        yield Family(BACKLOG, self._backlog(health))

    def _backlog(self, health: HealthSnapshot) -> Iterator[Point]:
        if health.backlog is not None:
            yield Point(self._standard, (), health.backlog)


def _status(request: Request) -> str:
    return UNKNOWN if request.status is None else str(request.status)

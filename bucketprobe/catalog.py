# SPDX-License-Identifier: Apache-2.0
"""The one table of what is measured. A metric is one row; names, the README's table and the exporters follow from it.

Two tables: CATALOG, what is known about the observed service (`bucket.*`, by the proposal's names), and HEALTH, what is
known about the agent itself (`bucketprobe_*`). Only what is implemented is listed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from bucketprobe import __version__
from bucketprobe.abi import Kind as EventKind
from bucketprobe.abi import Stat
from bucketprobe.model import (
    DIGEST_RESULTS,
    DIGEST_SOURCES,
    EVIDENCE,
    GAPS,
    LABELS,
    OUTCOMES,
    PHASES,
    TRACKER_LOSSES,
    Limit,
    MismatchSource,
    Share,
)

Kind = Literal["counter", "histogram", "gauge"]

#: The value of a tag that nothing observed has decided.
UNKNOWN = "unknown"
#: The value of every own tag of the series that takes what is past the budget of series.
OVERFLOW = "__other__"

#: The operations on artifacts. Other traffic of the same server (health checks, unknown heads) is in no `bucket.*` metric.
ARTIFACT_OPERATIONS = ("write", "read", "metadata", "list")

#: The proposal's buckets, and those that its own alerts and the fast half of the traffic need. Milliseconds.
DURATION_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000)
#: 1 KiB, 64 KiB, 1 MiB, 16 MiB, 100 MiB, 256 MiB, 1 GiB, 5 GiB. Bytes.
SIZE_BUCKETS = (1 << 10, 64 << 10, 1 << 20, 16 << 20, 100 << 20, 256 << 20, 1 << 30, 5 << 30)

#: How many of what the agent measures (ns, bytes, things) make one of the unit.
RAW_PER_UNIT: Mapping[str, int] = {"milliseconds": 1_000_000, "bytes": 1, "": 1}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `buckets` are upper bounds, inclusive, in `unit`; `closed` are the values of `tags` that exist from the start, at zero."""

    name: str
    kind: Kind
    unit: str
    tags: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    closed: tuple[tuple[str, ...], ...] = ()

    @property
    def prometheus_name(self) -> str:
        """OpenTelemetry's translation: dots to `_`, the unit appended unless the name has it already, a counter's `_total`."""
        name = self.name.replace(".", "_")
        if self.unit and self.unit not in name.split("_"):
            name += f"_{self.unit}"
        return f"{name}_total" if self.kind == "counter" else name


WRITE_COUNT = Metric(
    "bucket.artifact.write.count",
    "counter",
    "",
    ("status", "bucket_type"),
    "Finished artifact writes by final status; unknown where no response was seen.",
)
WRITE_DURATION = Metric(
    "bucket.artifact.write.duration",
    "histogram",
    "milliseconds",
    ("bucket_type",),
    "Time of an artifact write, from its first byte being readable to the last byte of its response; without those whose end was not seen.",
    DURATION_BUCKETS,
    ((UNKNOWN,),),
)
WRITE_SIZE = Metric(
    "bucket.artifact.write.size",
    "histogram",
    "bytes",
    ("bucket_type",),
    "Bytes of the entity body that the server received in an artifact write.",
    SIZE_BUCKETS,
    ((UNKNOWN,),),
)
READ_COUNT = Metric(
    "bucket.artifact.read.count",
    "counter",
    "",
    ("cache", "status"),
    "Finished artifact reads by final status; unknown where no response was seen.",
)
READ_DURATION = Metric(
    "bucket.artifact.read.duration",
    "histogram",
    "milliseconds",
    ("cache",),
    "Time of an artifact read, from its first byte being readable to the last byte of its response; without those whose end was not seen.",
    DURATION_BUCKETS,
    ((UNKNOWN,),),
)
PHASE_DURATION = Metric(
    "bucket.artifact.phase.duration",
    "histogram",
    "milliseconds",
    ("operation", "phase"),
    "Time that a request spent in one phase, for each phase that it had; the phases of a request do not overlap and sum to its duration.",
    DURATION_BUCKETS,
    tuple((operation, phase) for operation in ARTIFACT_OPERATIONS for phase in PHASES),
)
DIGEST_DURATION = Metric(
    "bucket.integrity.digest.duration",
    "histogram",
    "milliseconds",
    (),
    "CPU time of a request's hashing, measured or estimated, for each request where it is known; the record says how, and how exactly.",
    DURATION_BUCKETS,
    ((),),
)
DIGEST_SIZE = Metric(
    "bucket.integrity.digest.size",
    "histogram",
    "bytes",
    (),
    "Bytes hashed for a request, of its body and of what was read back, where the time of its hashing is known.",
    SIZE_BUCKETS,
    ((),),
)
DIGEST_MISMATCH = Metric(
    "bucket.integrity.digest_mismatch.count",
    "counter",
    "",
    (),
    "Requests whose body has another digest than declared, by the digest that the service computed, else by its answer.",
    closed=((),),
)
POST_STORAGE_VERIFY = Metric(
    "bucket.integrity.post_storage_verify.count",
    "counter",
    "",
    ("result",),
    "Digests over bytes that were read back from storage, by whether each is the declared one (or, with none declared, the body's).",
    closed=tuple((result,) for result in DIGEST_RESULTS),
)
QUEUE_DELAY = Metric(
    "bucket.performance.queue_delay.duration",
    "histogram",
    "milliseconds",
    ("stage",),
    "Time that a request waited before the server read it (accept, read) and for a CPU (runqueue).",
    DURATION_BUCKETS,
    (("accept",), ("read",), ("runqueue",)),
)
BACKLOG = Metric(
    "bucket.storage.backlog_size.gauge",
    "gauge",
    "",
    (),
    "Requests begun and not yet ended, plus connections in the accept queue.",
)

#: In the order of the exposition and of the README.
CATALOG = (
    WRITE_COUNT,
    WRITE_DURATION,
    WRITE_SIZE,
    READ_COUNT,
    READ_DURATION,
    PHASE_DURATION,
    DIGEST_DURATION,
    DIGEST_SIZE,
    DIGEST_MISMATCH,
    POST_STORAGE_VERIFY,
    QUEUE_DELAY,
    BACKLOG,
)


class Point(NamedTuple):
    """One series at one moment. `counts` are a histogram's observations by bucket, not cumulative, the last one past every
    bound (empty for the other kinds); `total` is a histogram's sum, or the value, in the metric's unit."""

    tags: tuple[tuple[str, str], ...]
    counts: tuple[int, ...]
    total: float


class Family(NamedTuple):
    """A metric and its series: what a sink hands to an exporter. `points` may be read once."""

    metric: Metric
    points: Iterator[Point]


#: Capability sets, by their names in /proc/PID/status.
CAPABILITY_SET_NAMES = {
    "CapEff": "effective",
    "CapPrm": "permitted",
    "CapInh": "inheritable",
    "CapBnd": "bounding",
    "CapAmb": "ambient",
}
CAPABILITY_SETS = tuple(CAPABILITY_SET_NAMES.values())

#: What can be lost, as (stage, cause): closed, so that each is there from the start, at zero. The causes of stage `jsonl`
#: are those of exporters/jsonl.py.
LOSSES: tuple[tuple[str, str], ...] = (
    *(("kernel", stat.name.lower()) for stat in Stat if stat >= Stat.RING_HEAD),
    ("decode", "undecodable"),
    *(("tracker", cause) for cause in TRACKER_LOSSES),
    ("jsonl", "backlog"),
    ("jsonl", "no_space"),
    ("jsonl", "io_error"),
    ("jsonl", "closed"),
    ("jsonl", "unencodable"),
)

#: What may have taken most of a request's time; `unknown` where its end was not seen or its waiting is not known.
LIMITS = (*get_args(Limit), UNKNOWN)

#: The files whose work is tied to requests, by what they hold.
WORK_KINDS = ("storage", "metadata")
#: The labels of file work, by the files it is on.
WORK = tuple((label, kind) for label in LABELS for kind in WORK_KINDS)

#: Bodies of which no file work was seen, by why and by which way they went.
GAP_BYTES = tuple((reason, direction) for reason in GAPS for direction in ("write", "read"))

#: Kinds of events, as they come from the ring.
EVENT_KINDS = tuple(kind.name.lower() for kind in EventKind)


#: What the probes on digests are for: the time of each call, or the value of each digest.
DIGEST_PARTS = ("time", "value")
#: What came of comparing a digest with the declared one; `unknown` where none was seen.
COMPARED = (*DIGEST_RESULTS, UNKNOWN)
#: What may say that a digest does not fit.
MISMATCH_SOURCES = get_args(MismatchSource)


@dataclass(frozen=True, slots=True)
class DigestHealth:
    """What the agent says of digests at one moment: whose time and value it knows, and what knowing them costs.

    `requests`: finished requests on artifacts by `DIGEST_SOURCES`; `compared`: those that declare a digest, by `COMPARED`;
    `mismatches`: those that do not fit, by `MISMATCH_SOURCES`; `accepted`: those of them that were answered with success;
    `unattributed`: digests seen that were tied to no request.
    `budgets`: by `time` and `total`, as a ratio of the targets' CPU; empty where there is none. `cost`: CPU seconds that the probes took
    from the targets, by `DIGEST_PARTS`, as hits counted at the price measured; `prices`: that price by probe, in seconds.
    `target_cpu`: CPU seconds of the targets while they were observed, None where it is not known. `attached`: target processes
    that have probes on them now, by `DIGEST_PARTS`. `windows`: how often they were attached.
    """

    requests: Mapping[str, int] = field(default_factory=dict)
    compared: Mapping[str, int] = field(default_factory=dict)
    mismatches: Mapping[str, int] = field(default_factory=dict)
    accepted: int = 0
    unattributed: int = 0
    budgets: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    target_cpu: float | None = None
    attached: Mapping[str, int] = field(default_factory=dict)
    windows: int = 0


@dataclass(slots=True)
class HealthSnapshot:
    """What the agent says of itself at one moment. The counts only grow; `None` and missing keys mean that it is not known."""

    begun: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    records: int = 0
    lost: Mapping[tuple[str, str], int] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)
    series_overflow: int = 0
    #: Finished requests on artifacts: by label, by each evidence that decided part of their file work, and by what limited them.
    labelled: Mapping[str, int] = field(default_factory=dict)
    evidence: Mapping[str, int] = field(default_factory=dict)
    limited_by: Mapping[str, int] = field(default_factory=dict)
    #: File work by (label, kind of `WORK_KINDS`); `unattributed` is what was tied to no request.
    attributed: Mapping[tuple[str, str], Share] = field(default_factory=dict)
    #: Body bytes of finished requests for which no file work was seen, by (reason of `GAPS`, "write" or "read").
    gap_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    #: Reasons of `GAPS` that a target was seen to have, whether or not a request went that way.
    coverage_gaps: Collection[str] = ()
    digest: DigestHealth = DigestHealth()
    capabilities: Mapping[str, int] = field(default_factory=dict)
    target_processes: int = 0
    targets_up: int = 0
    #: Connections waiting in the targets' accept queues.
    accept_queue: int | None = None
    #: Size of the ring buffer between kernel and agent, in bytes.
    ring_bytes: int | None = None
    #: CPU time of the agent's process, user and system, in seconds.
    cpu_seconds: float | None = None
    rss_bytes: int | None = None
    version: str = __version__
    python: str = field(default_factory=lambda: sys.version.split()[0])
    kernel: str = field(default_factory=lambda: os.uname().release)

    @property
    def backlog(self) -> int | None:
        """Requests in flight and connections not yet accepted, where the latter are known."""
        return None if self.accept_queue is None else self.in_flight + self.accept_queue

    @property
    def gaps(self) -> dict[str, int]:
        """The coverage gaps that there are, with the bytes of both directions that went through them."""
        counted = [(reason, size) for (reason, _), size in dict(self.gap_bytes).items() if size]
        found = {*self.coverage_gaps, *(reason for reason, _ in counted)}
        return {reason: sum(size for each, size in counted if each == reason) for reason in GAPS if reason in found}


Values = Mapping[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class HealthMetric:
    """One row about the agent: `read` gives the value for each combination of `labels`."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    read: Callable[[HealthSnapshot], Values]


def _one(value: float | None) -> Values:
    return {} if value is None else {(): value}


def _by_name(counts: Mapping[str, float]) -> Values:
    return {(name,): count for name, count in dict(counts).items()}


def _from_zero(names: Collection[str], counts: Mapping[str, float]) -> Values:
    return _by_name(dict.fromkeys(names, 0) | dict(counts))


def _work(now: HealthSnapshot, value: Callable[[Share], float]) -> Values:
    found = {key: value(share) for key, share in dict(now.attributed).items()}
    return {(label, kind): number for (label, kind), number in (dict.fromkeys(WORK, 0.0) | found).items()}


HEALTH = (
    HealthMetric(
        "bucketprobe_build_info",
        "gauge",
        ("version", "python", "kernel"),
        "Always 1; the labels say what runs.",
        lambda now: {(now.version, now.python, now.kernel): 1},
    ),
    HealthMetric(
        "bucketprobe_capabilities",
        "gauge",
        ("set",),
        "Capabilities that the agent's process holds, by set; 0 each once it serves.",
        lambda now: _by_name(now.capabilities),
    ),
    HealthMetric("bucketprobe_requests_begun_total", "counter", (), "Requests whose head was complete.", lambda now: _one(now.begun)),
    HealthMetric(
        "bucketprobe_requests_finished_total",
        "counter",
        ("outcome",),
        "Requests that ended, by how they ended.",
        lambda now: _from_zero(OUTCOMES, now.finished),
    ),
    HealthMetric("bucketprobe_requests_in_flight", "gauge", (), "Requests begun and not yet ended.", lambda now: _one(now.in_flight)),
    HealthMetric("bucketprobe_records_total", "counter", (), "Request records assembled in user space.", lambda now: _one(now.records)),
    HealthMetric(
        "bucketprobe_requests_labelled_total",
        "counter",
        ("label",),
        "Finished requests on artifacts, by the weakest label of their file work.",
        lambda now: _from_zero(LABELS, now.labelled),
    ),
    HealthMetric(
        "bucketprobe_evidence_total",
        "counter",
        ("evidence",),
        "Finished requests on artifacts in which this evidence decided part of the file work; one may count in several.",
        lambda now: _from_zero(EVIDENCE, now.evidence),
    ),
    HealthMetric(
        "bucketprobe_attributed_bytes_total",
        "counter",
        ("label", "kind"),
        "Bytes that file calls moved on storage and on metadata, by label; unattributed is what was tied to no request.",
        lambda now: _work(now, lambda share: share.bytes),
    ),
    HealthMetric(
        "bucketprobe_attributed_seconds_total",
        "counter",
        ("label", "kind"),
        "Time in file calls on storage and on metadata, by label; unattributed is what was tied to no request.",
        lambda now: _work(now, lambda share: share.ns / 1e9),
    ),
    HealthMetric(
        "bucketprobe_coverage_gap",
        "gauge",
        ("reason",),
        "1 where a target does, or its bytes show, what the probes cannot see.",
        lambda now: _by_name({reason: int(reason in now.gaps) for reason in GAPS}),
    ),
    HealthMetric(
        "bucketprobe_coverage_gap_bytes_total",
        "counter",
        ("reason", "direction"),
        "Body bytes of successful requests for which no file work was seen, by why: received by writes, sent by reads.",
        lambda now: {(reason, way): size for (reason, way), size in (dict.fromkeys(GAP_BYTES, 0) | dict(now.gap_bytes)).items()},
    ),
    HealthMetric(
        "bucketprobe_limited_total",
        "counter",
        ("limited_by",),
        "Finished requests on artifacts, by what took most of their time.",
        lambda now: _from_zero(LIMITS, now.limited_by),
    ),
    HealthMetric(
        "bucketprobe_digest_requests_total",
        "counter",
        ("source",),
        "Finished requests on artifacts, by where the time of their hashing comes from; none where it is not known.",
        lambda now: _from_zero(DIGEST_SOURCES, now.digest.requests),
    ),
    HealthMetric(
        "bucketprobe_digest_compared_total",
        "counter",
        ("result",),
        "Finished requests on artifacts that declare a digest, by whether the computed one agrees; unknown where that was not seen.",
        lambda now: _from_zero(COMPARED, now.digest.compared),
    ),
    HealthMetric(
        "bucketprobe_digest_mismatches_total",
        "counter",
        ("source",),
        "Finished requests on artifacts whose digest does not fit, by what said so: the computed digest or the service's answer.",
        lambda now: _from_zero(MISMATCH_SOURCES, now.digest.mismatches),
    ),
    HealthMetric(
        "bucketprobe_digest_mismatches_accepted_total",
        "counter",
        (),
        "Finished requests on artifacts that were answered with success although the digest does not fit.",
        lambda now: _one(now.digest.accepted),
    ),
    HealthMetric(
        "bucketprobe_digest_unattributed_total",
        "counter",
        (),
        "Digests seen that were tied to no request.",
        lambda now: _one(now.digest.unattributed),
    ),
    HealthMetric(
        "bucketprobe_digest_budget_ratio",
        "gauge",
        ("part",),
        "Share of the targets' CPU that the probes on digests may take: for their time, and in total; absent where there is no limit.",
        lambda now: _by_name(now.digest.budgets),
    ),
    HealthMetric(
        "bucketprobe_digest_cost_seconds_total",
        "counter",
        ("part",),
        "CPU time that the probes on digests took from the targets: hits counted, at the price measured for one.",
        lambda now: _from_zero(DIGEST_PARTS, now.digest.cost),
    ),
    HealthMetric(
        "bucketprobe_digest_hit_seconds",
        "gauge",
        ("probe",),
        "CPU time that one hit of a probe on digests takes from a target: measured on this host at the start, or else assumed high.",
        lambda now: _by_name(now.digest.prices),
    ),
    HealthMetric(
        "bucketprobe_digest_attached",
        "gauge",
        ("part",),
        "Target processes that have probes on digests attached now.",
        lambda now: _from_zero(DIGEST_PARTS, now.digest.attached),
    ),
    HealthMetric(
        "bucketprobe_digest_windows_total",
        "counter",
        (),
        "Times that probes on digests were attached to a target.",
        lambda now: _one(now.digest.windows),
    ),
    HealthMetric(
        "bucketprobe_target_cpu_seconds_total",
        "counter",
        (),
        "CPU time of the targets while they were observed, user and system.",
        lambda now: _one(now.digest.target_cpu),
    ),
    HealthMetric(
        "bucketprobe_lost_total",
        "counter",
        ("stage", "cause"),
        "What was lost, by where and why.",
        lambda now: {(stage, cause): count for (stage, cause), count in (dict.fromkeys(LOSSES, 0) | dict(now.lost)).items()},
    ),
    HealthMetric(
        "bucketprobe_events_total",
        "counter",
        ("kind",),
        "Events read from the ring buffer.",
        lambda now: _from_zero(EVENT_KINDS, now.events),
    ),
    HealthMetric(
        "bucketprobe_series_overflow_total",
        "counter",
        (),
        "Observations that went to an overflow series because the budget of series was spent.",
        lambda now: _one(now.series_overflow),
    ),
    HealthMetric("bucketprobe_target_processes", "gauge", (), "Processes that are being observed.", lambda now: _one(now.target_processes)),
    HealthMetric("bucketprobe_targets_up", "gauge", (), "Targets with at least one process.", lambda now: _one(now.targets_up)),
    HealthMetric(
        "bucketprobe_ring_bytes", "gauge", (), "Size of the ring buffer between kernel and agent.", lambda now: _one(now.ring_bytes)
    ),
    HealthMetric(
        "bucketprobe_process_cpu_seconds_total",
        "counter",
        (),
        "CPU time of the agent's process, user and system.",
        lambda now: _one(now.cpu_seconds),
    ),
    HealthMetric(
        "bucketprobe_process_resident_memory_bytes",
        "gauge",
        (),
        "Resident memory of the agent's process.",
        lambda now: _one(now.rss_bytes),
    ),
)


def catalog_table() -> str:
    """The README's table of CATALOG, as Markdown."""
    rows: list[tuple[str, ...]] = [
        (f"`{metric.name}`", f"`{metric.prometheus_name}`", metric.kind, metric.unit, _names(metric.tags), metric.help)
        for metric in CATALOG
    ]
    return _markdown(("catalog name", "Prometheus name", "kind", "unit", "tags of its own", "meaning"), rows)


def health_table() -> str:
    """The README's table of HEALTH, as Markdown."""
    rows: list[tuple[str, ...]] = [(f"`{metric.name}`", metric.kind, _names(metric.labels), metric.help) for metric in HEALTH]
    return _markdown(("Prometheus name", "kind", "labels", "meaning"), rows)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

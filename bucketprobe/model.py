# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: what one finished request is. Times are integers in nanoseconds.

`start_ns` and `end_ns` are CLOCK_MONOTONIC (bpf_ktime_get_ns reads the same clock); `time` is the wall clock.
The meaning of each phase is in docs/phases.md, which follows the design's metric catalog.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

#: Where two phases happen at once, the wall time goes to the one that is named first. `other` is the remainder.
PHASES = (
    "storage_sync",
    "storage_write",
    "storage_read",
    "metadata",
    "digest",
    "network_receive",
    "network_send",
    "runqueue",
    "queue",
    "other",
)

#: The order in which a person reads them: the order in which they tend to happen.
PHASES_AS_THEY_HAPPEN = (
    "queue",
    "network_receive",
    "digest",
    "storage_write",
    "storage_sync",
    "storage_read",
    "metadata",
    "network_send",
    "runqueue",
    "other",
)

Outcome = Literal["complete", "client_closed", "server_closed", "unobserved"]
OUTCOMES: tuple[Outcome, ...] = ("complete", "client_closed", "server_closed", "unobserved")

#: Why the agent's tracker may have to do without something: see tracker.py.
TRACKER_LOSSES = (
    "evicted",
    "partial_head",
    "malformed_head",
    "late_file",
    "no_head",
    "unnamed_path",
    "evicted_file",
    "evicted_untied",
    "evicted_work",
)

Label = Literal["exact", "inferred", "shared", "unattributed"]
LABELS: tuple[Label, ...] = ("exact", "inferred", "shared", "unattributed")

#: What ties file work to a request, the strongest first. docs/attribution.md has the meaning of each.
EVIDENCE = (
    "same_call",  # one system call moved bytes between the file and the request's socket (sendfile)
    "thread",  # the thread that did it served only this request then
    "goroutine",  # Go's g
    "context",  # CPython's task context
    "descriptor",  # the file had been the request's all the time
    "last_socket",  # the socket that the thread used last
    "path",  # the request's artifact, version or digest, or its URL's path, in the file's path
    "bytes",  # as many bytes as the request's body, after them and before the response
    "fingerprint",  # the same first bytes, by a keyed hash
    "token",  # the request's digest or names in a small write
    "continuity",  # the thread's work just before was this request's
    "window",  # no other request was in flight
    "order",  # the oldest of several that fit: a guess, and shared
)

#: Why file work may be out of sight. See docs/attribution.md.
GAPS = ("io_uring", "mmap", "tls", "unseen")
Limit = Literal["client", "server", "storage"]

#: What a request did, from its route: an artifact written or read, its metadata or its list of versions read.
#: `other` is any other HTTP request, `unknown` one whose head was not seen.
Operation = Literal["write", "read", "metadata", "list", "other", "unknown"]
OPERATIONS: tuple[Operation, ...] = ("write", "read", "metadata", "list", "other", "unknown")


@dataclass(slots=True)
class FileWork:
    """File system calls of one kind of file, counted; bytes are those the calls returned."""

    opens: int = 0
    write_calls: int = 0
    write_bytes: int = 0
    read_calls: int = 0
    read_bytes: int = 0
    syncs: int = 0
    renames: int = 0

    def record(self) -> dict[str, int]:
        return {
            "opens": self.opens,
            "write_calls": self.write_calls,
            "write_bytes": self.write_bytes,
            "read_calls": self.read_calls,
            "read_bytes": self.read_bytes,
            "syncs": self.syncs,
            "renames": self.renames,
        }


@dataclass(slots=True)
class Share:
    """File work on storage and metadata that carries one label: bytes written and read, and time in the calls, ns."""

    bytes: int = 0
    ns: int = 0


@dataclass(slots=True)
class Attribution:
    """How file work was tied to the request.

    `label`: the weakest of all its file work; what is weaker than exact may be another's. `evidence`: what decided, the names
    of `EVIDENCE`. `candidates`: where work is shared, the ids of all requests whose it may be, this one among them.
    `by_label`: how much of the work carries which label. `unattributed_bytes`: bytes of storage work in any target process,
    within the request's life, that could be tied to no request at all. It is what this request may own without being shown
    as its own: 0 says that nothing was left over.
    """

    label: Label
    evidence: tuple[str, ...] = ()
    unattributed_bytes: int = 0
    candidates: tuple[str, ...] = ()
    by_label: Mapping[Label, Share] = field(default_factory=dict)


#: Where a digest's time comes from. exact: each call was timed; gap: the time between reading a piece and writing it, less what
#: else happens there; model: bytes, at the rate that was measured; sample: samples of the CPU; none: it is not known.
DigestSource = Literal["exact", "gap", "model", "sample", "none"]
DIGEST_SOURCES: tuple[DigestSource, ...] = ("exact", "gap", "model", "sample", "none")
DigestResult = Literal["match", "mismatch"]
DIGEST_RESULTS: tuple[DigestResult, ...] = ("match", "mismatch")
#: What says that an upload's bytes are not those that the client declared: the digest that the server computed, or its answer.
MismatchSource = Literal["computed", "answer"]


@dataclass(slots=True)
class Digest:
    """What was seen of a request's hashing. See docs/digests.md.

    `ns`: on-CPU time in the hash function, and `error_pct`: by how much it may be off, in per cent; both None where `source` is
    none. `bytes`: hashed, of the body and of what was read back; None where that was not seen. `declared`, `computed`:
    "ALGORITHM:HEX", of the body; `evidence`: what tied the computed one to this request. `result`: whether the two agree, None where
    either is not known. `mismatch`: what said that they do not. `verified`: of each digest over bytes read back from storage,
    whether it is the declared one.
    """

    source: DigestSource = "none"
    error_pct: float | None = None
    ns: int | None = None
    bytes: int | None = None
    declared: str | None = None
    computed: str | None = None
    evidence: str | None = None
    result: DigestResult | None = None
    mismatch: MismatchSource | None = None
    verified: tuple[DigestResult, ...] = ()

    def record(self) -> dict[str, object]:
        return {
            "source": self.source,
            "error_pct": self.error_pct,
            "ms": _milliseconds(self.ns),
            "bytes": self.bytes,
            "bytes_per_second": round(self.bytes * 1e9 / self.ns) if self.bytes and self.ns else None,
            "declared": self.declared,
            "computed": self.computed,
            "evidence": self.evidence,
            "result": self.result,
            "mismatch_source": self.mismatch,
            "post_storage_verify": list(self.verified),
        }


@dataclass(slots=True)
class Request:
    """One finished HTTP request. Fields that were not seen are None, never a guess.

    `phases` do not overlap and sum to the duration; `phase_totals` are each phase's own time and may overlap. Both in
    ns, with only the phases that occurred (a missing one was not seen or took no time). `queue_stages`: the `queue`
    phase by stage (`accept`, `read`), in ns.

    `client_wait_ns`: how long the request was not there whole and its socket was empty: the client had not sent yet.
    `server_wait_ns`: how long bytes of it lay unread while no read was under way. `limited_by`: which of the two ends, or the
    storage, took most of its time. All three None where the kernel does not tell when bytes come.
    `coverage_gaps`: why file work of this request may not have been seen, from `GAPS`.
    """

    id: str
    conn: str
    pid: int
    wall_ns: int
    start_ns: int
    end_ns: int
    operation: Operation
    outcome: Outcome
    method: str | None = None
    route: str | None = None
    bucket_id: str | None = None
    artifact_id: str | None = None
    version: str | None = None
    request_id: str | None = None
    status: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    phases: Mapping[str, int] = field(default_factory=dict)
    phase_totals: Mapping[str, int] = field(default_factory=dict)
    queue_stages: Mapping[str, int] = field(default_factory=dict)
    files: FileWork = field(default_factory=FileWork)
    metadata_files: FileWork = field(default_factory=FileWork)
    other_files: FileWork = field(default_factory=FileWork)
    attribution: Attribution = field(default_factory=lambda: Attribution("unattributed"))
    digest: Digest = field(default_factory=Digest)
    client_wait_ns: int | None = None
    server_wait_ns: int | None = None
    limited_by: Limit | None = None
    coverage_gaps: tuple[str, ...] = ()
    #: Events about this request that the ring had no room for: its counts are lower bounds where this is not 0.
    lost_events: int = 0

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    def record(self) -> dict[str, object]:
        """The JSON record: the contract's fields, durations in milliseconds with nanosecond digits."""
        return {
            "id": self.id,
            "conn": self.conn,
            "pid": self.pid,
            "time": wall_text(self.wall_ns),
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "operation": self.operation,
            "method": self.method,
            "route": self.route,
            "bucket_id": self.bucket_id,
            "artifact_id": self.artifact_id,
            "version": self.version,
            "request_id": self.request_id,
            "status": self.status,
            "outcome": self.outcome,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "duration_ms": self.duration_ns / 1e6,
            "phases": {name: ns / 1e6 for name, ns in self.phases.items()},
            "phase_totals": {name: ns / 1e6 for name, ns in self.phase_totals.items()},
            "queue_stages": {name: ns / 1e6 for name, ns in self.queue_stages.items()},
            "client_wait_ms": _milliseconds(self.client_wait_ns),
            "server_wait_ms": _milliseconds(self.server_wait_ns),
            "limited_by": self.limited_by,
            "files": self.files.record(),
            "metadata_files": self.metadata_files.record(),
            "other_files": self.other_files.record(),
            "attribution": {
                "label": self.attribution.label,
                "evidence": list(self.attribution.evidence),
                "unattributed_bytes": self.attribution.unattributed_bytes,
                "candidates": list(self.attribution.candidates),
                "by_label": {
                    label: {"bytes": share.bytes, "ms": share.ns / 1e6} for label, share in self.attribution.by_label.items()
                },
            },
            "digest": self.digest.record(),
            "coverage_gaps": list(self.coverage_gaps),
            "lost_events": self.lost_events,
        }


def _milliseconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e6


def wall_text(wall_ns: int) -> str:
    """Wall-clock nanoseconds since the epoch as RFC 3339 in UTC with microseconds."""
    seconds, nanoseconds = divmod(wall_ns, 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{nanoseconds // 1000:06d}Z"

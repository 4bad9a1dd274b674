# SPDX-License-Identifier: Apache-2.0
"""The timing breakdown on demand: asked for over the agent's control socket, summed up, and drawn for a terminal.

Three parts, in this order: `summarise` and the renderers, which are pure; `ControlServer`, which the agent's loop
drives and which never blocks; `capture` and `status`, the client's side.

The protocol is one JSON object a line. The client sends one: `{"capture": {"duration": seconds, "min_ms": ms}}` or
`{"status": {}}`. The answer to the first is a record (`Request.record()`) for each request that finished, then
`{"end": {...}}`; to the second one object; to anything else `{"error": text}`. Then the agent closes.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import socket
import stat
import struct
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import orjson

from bucketprobe.errors import AgentBusy, BucketprobeError, EnvironmentLack, UsageError
from bucketprobe.model import DIGEST_SOURCES, LABELS, OPERATIONS, PHASES_AS_THEY_HAPPEN, Request

Record = dict[str, Any]

SOCKET_NAME = "control.sock"
LOCK_NAME = "agent.lock"
MAX_DURATION_S = 3600
#: What waits for one client, in bytes; a record that does not fit is dropped and counted.
MAX_BUFFER = 1 << 20
MAX_REQUEST = 1024
MAX_CLIENTS = 8
#: How long a client may take to ask, and to read the end of its answer.
GRACE_S = 5.0
#: What one capture keeps on the client's side; the rest is counted.
MAX_RECORDS = 100_000

#: Requests whose digest does not fit that a summary keeps whole; the others are counted.
MAX_MISMATCHED = 20

#: The phases that are absent, and not 0, where file work was not seen.
_FILE_PHASES = ("storage_write", "storage_sync", "storage_read", "metadata")


class NoAgent(BucketprobeError):
    """No agent answers on this host: the command line may start one."""


# --- What a capture says -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Spread:
    """How long a phase, or the whole request, took over all requests of an operation; milliseconds.

    `requests` counts those in which it occurred; it is 0 ms in the others, and the percentiles (nearest rank: the
    smallest value that at least p percent of the requests do not exceed) include them. `share`: of the summed duration.
    A request whose file work may not have been seen is no 0 ms in a phase of file work: there it is left out. So is one whose time of
    hashing is not known in the phase digest.
    """

    requests: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    total_ms: float
    share: float


@dataclass(slots=True)
class WorkShare:
    """How much of all file work that was tied to requests carries one label; the shares of all labels add up to 1."""

    bytes: int = 0
    ms: float = 0.0
    share_of_bytes: float = 0.0
    share_of_ms: float = 0.0


@dataclass(slots=True)
class Hashing:
    """How fast an operation's bytes were hashed, over the requests in which that is known.

    `sources`: those requests by where the time comes from (`model.DIGEST_SOURCES`); `ms`: their CPU time of hashing together, `bytes`
    and `bytes_per_second` over those of them whose bytes are known too. `error_pct`: by how much `ms` may be off, in per cent.
    """

    sources: dict[str, int]
    ms: float
    error_pct: float
    bytes: int
    bytes_per_second: int | None


@dataclass(slots=True)
class Digests:
    """What the captured requests say of integrity; each is a number of requests, `verified` of digests.

    `compared`: requests that declare a digest, by how the computed one compares (`match`, `mismatch`, or `unknown` where it was not seen);
    `mismatches`: those whose digest does not fit, by what said so (`computed`, `answer`); `accepted`: those of them that were
    answered with success all the same; `verified`: digests over bytes read back from storage, by whether they are the declared one.
    `mismatched`: the records of requests with any mismatch, at most `MAX_MISMATCHED`: those that were answered with success first,
    since nobody else knows of them.
    """

    compared: dict[str, int]
    mismatches: dict[str, int]
    accepted: int
    verified: dict[str, int]
    mismatched: list[Record]


@dataclass(slots=True)
class OperationSummary:
    """`phases` in `PHASES_AS_THEY_HAPPEN` order, only those that occurred; their shares add up to 1. `limited_by`: requests.

    `hashing` is None where no time of hashing is known.
    """

    requests: int
    limited_by: dict[str, int]
    duration: Spread
    phases: dict[str, Spread]
    hashing: Hashing | None


@dataclass(slots=True)
class Summary:
    """What `summarise` found. The keys of `statuses` are codes as text, or `unknown`; `slowest` holds whole records.

    `limited_by`: requests by client, server, storage or `unknown`, as in each operation; `work`: their file work by label;
    `coverage_gaps`: requests by each reason why their file work may not have been seen.
    """

    requests: int
    operations: dict[str, OperationSummary]
    statuses: dict[str, int]
    outcomes: dict[str, int]
    limited_by: dict[str, int]
    labels: dict[str, int]
    work: dict[str, WorkShare]
    coverage_gaps: dict[str, int]
    digests: Digests
    lost_events: int
    slowest: list[Record]


def summarise(records: Iterable[Record], slowest: int = 3) -> Summary:
    """Sum up records of `Request.record()`'s form; keeps 8 bytes a request and phase, and the `slowest` records whole.

    What an agent of an earlier version does not say (waiting, gaps, the split of file work, digests) is unknown or left out.
    """
    times: dict[str, dict[str, array[float]]] = {}
    unseen: Counter[tuple[str, str]] = Counter()
    limits: dict[str, Counter[str]] = {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "outcome", "label", "gap")}
    work: dict[str, WorkShare] = {}
    hashing: dict[str, _HashingSum] = {}
    integrity = _IntegritySum()
    lost_events = 0
    heap: list[tuple[float, int, Record]] = []
    for number, record in enumerate(records):
        duration = record["duration_ms"]
        of_operation = times.setdefault(record["operation"], {"": array("d")})
        of_operation[""].append(duration)
        for phase, ms in record["phases"].items():
            of_operation.setdefault(phase, array("d")).append(ms)
        gaps = record.get("coverage_gaps", ())
        if gaps:
            unseen.update((record["operation"], phase) for phase in _FILE_PHASES if phase not in record["phases"])
        counts["status"]["unknown" if record["status"] is None else str(record["status"])] += 1
        counts["outcome"][record["outcome"]] += 1
        limits.setdefault(record["operation"], Counter())[record.get("limited_by") or "unknown"] += 1
        counts["label"][record["attribution"]["label"]] += 1
        counts["gap"].update(gaps)
        _add_work(work, record)
        digest = record.get("digest")
        if digest:
            hashing.setdefault(record["operation"], _HashingSum()).add(digest)
            integrity.add(record, digest)
            if digest["source"] == "none" and "digest" not in record["phases"]:
                unseen[record["operation"], "digest"] += 1
        lost_events += record["lost_events"]
        heapq.heappush(heap, (duration, -number, record))
        if len(heap) > slowest:
            heapq.heappop(heap)
    return Summary(
        requests=counts["outcome"].total(),
        operations={
            name: _operation(name, times[name], limits[name], unseen, hashing.get(name, _HashingSum()))
            for name in OPERATIONS
            if name in times
        },
        statuses=dict(sorted(counts["status"].items())),
        outcomes=dict(counts["outcome"].most_common()),
        limited_by=dict(sum(limits.values(), Counter()).most_common()),
        labels=dict(counts["label"].most_common()),
        work=_shares(work),
        coverage_gaps=dict(counts["gap"].most_common()),
        digests=integrity.summary(),
        lost_events=lost_events,
        slowest=[record for _, _, record in sorted(heap, key=lambda entry: entry[:2], reverse=True)],
    )


def _add_work(work: dict[str, WorkShare], record: Record) -> None:
    for label, share in record["attribution"].get("by_label", {}).items():
        total = work.setdefault(label, WorkShare())
        total.bytes += share["bytes"]
        total.ms += share["ms"]


def _shares(work: dict[str, WorkShare]) -> dict[str, WorkShare]:
    all_bytes = sum(share.bytes for share in work.values())
    all_ms = sum(share.ms for share in work.values())
    for share in work.values():
        share.share_of_bytes = share.bytes / all_bytes if all_bytes else 0.0
        share.share_of_ms = share.ms / all_ms if all_ms else 0.0
    return {label: work[label] for label in LABELS if label in work}


@dataclass(slots=True)
class _HashingSum:
    sources: Counter[str] = field(default_factory=Counter)
    ms: float = 0.0
    #: Sum of milliseconds by which the times may be off.
    off_ms: float = 0.0
    bytes: int = 0
    ms_of_bytes: float = 0.0

    def add(self, digest: Record) -> None:
        ms = digest["ms"]
        if ms is None:
            return
        self.sources[digest["source"]] += 1
        self.ms += ms
        self.off_ms += ms * (digest["error_pct"] or 0.0) / 100
        if digest["bytes"]:
            self.bytes += digest["bytes"]
            self.ms_of_bytes += ms

    def summary(self) -> Hashing | None:
        if not self.sources:
            return None
        # Estimates from one calibration are off in the same direction: their errors add up, and do not cancel.
        error_pct = self.off_ms / self.ms * 100 if self.ms else 0.0
        rate = round(self.bytes / self.ms_of_bytes * 1000) if self.ms_of_bytes else None
        sources: dict[str, int] = {name: self.sources[name] for name in DIGEST_SOURCES if name in self.sources}
        return Hashing(sources, self.ms, error_pct, self.bytes, rate)


@dataclass(slots=True)
class _IntegritySum:
    compared: Counter[str] = field(default_factory=Counter)
    mismatches: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    verified: Counter[str] = field(default_factory=Counter)
    #: Requests with a mismatch, by whether they were answered with success.
    mismatched: dict[bool, list[Record]] = field(default_factory=lambda: {True: [], False: []})

    def add(self, record: Record, digest: Record) -> None:
        if digest["declared"] is not None:
            self.compared[digest["result"] or "unknown"] += 1
        source, verified = digest["mismatch_source"], digest["post_storage_verify"]
        self.verified.update(verified)
        if source is not None:
            self.mismatches[source] += 1
            self.accepted += _succeeded(record)
        if source is not None or "mismatch" in verified:
            kept = self.mismatched[_succeeded(record)]
            if len(kept) < MAX_MISMATCHED:
                kept.append(record)

    def summary(self) -> Digests:
        return Digests(
            compared=dict(self.compared.most_common()),
            mismatches=dict(self.mismatches.most_common()),
            accepted=self.accepted,
            verified=dict(self.verified.most_common()),
            mismatched=(self.mismatched[True] + self.mismatched[False])[:MAX_MISMATCHED],
        )


def _succeeded(record: Record) -> bool:
    return record["status"] is not None and 200 <= record["status"] < 300


def _operation(
    name: str,
    times: Mapping[str, array[float]],
    limits: Counter[str],
    unseen: Mapping[tuple[str, str], int],
    hashing: _HashingSum,
) -> OperationSummary:
    requests = len(times[""])
    total = sum(times[""])
    phases = {phase: _spread(times[phase], requests - unseen[name, phase], total) for phase in PHASES_AS_THEY_HAPPEN if phase in times}
    return OperationSummary(requests, dict(limits.most_common()), _spread(times[""], requests, total), phases, hashing.summary())


def _spread(values: array[float], requests: int, all_ms: float) -> Spread:
    ordered = sorted(values)
    absent = requests - len(ordered)

    def percentile(percent: int) -> float:
        rank = -(-percent * requests // 100)
        return ordered[rank - absent - 1] if rank > absent else 0.0

    total = sum(ordered)
    return Spread(len(ordered), percentile(50), percentile(95), percentile(99), total, total / all_ms if all_ms else 0.0)


# --- How a terminal shows it -------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What an output can show: colour, its width in columns, and other characters than ASCII."""

    color: bool
    width: int
    unicode: bool


def look_of(stream: TextIO, environ: Mapping[str, str]) -> Look:
    """What this output can show; colour only on a terminal and without NO_COLOR (https://no-color.org)."""
    terminal = stream.isatty()
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        width = 0
    unicode = (stream.encoding or "").lower().replace("-", "") == "utf8"
    return Look(terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb", width or 100, unicode)


def render_json(summary: Summary) -> str:
    """The summary as one JSON object; times are milliseconds, shares 0 to 1."""
    return orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode()


def render_table(summary: Summary, color: bool, width: int, unicode: bool = True) -> str:
    """The counts, then for each operation a table of its phases. Ends with a newline, as `render_slowest` does."""
    look = Look(color, width, unicode)
    lines = [_bold(_count(summary.requests, "request"), look)]
    for title, numbers in (
        ("operation", {name: each.requests for name, each in summary.operations.items()}),
        ("status", summary.statuses),
        ("outcome", summary.outcomes),
        ("limited by", summary.limited_by),
        ("attribution", summary.labels),
    ):
        if numbers:
            lines.append(_counts(title, numbers))
    if summary.work:
        lines.append(f"  {'file work':<12} " + ", ".join(_work_share(label, share) for label, share in summary.work.items()))
    lines += _integrity(summary.digests, look)
    for reason, number in summary.coverage_gaps.items():
        lines.append(f"  warning: {_plain(_gap_words(reason))} ({_count(number, 'request')})")
    if summary.lost_events:
        lines.append(f"  {_count(summary.lost_events, 'event')} lost: the counts of some requests are lower bounds")
    for name, operation in summary.operations.items():
        lines += ["", _bold(f"{name}, {_count(operation.requests, 'request')}", look)]
        if operation.limited_by.keys() != {"unknown"}:
            lines.append(_counts("limited by", operation.limited_by))
        if operation.hashing:
            lines.append(f"  {'hashing':<12} {_plain(_hashing(operation.hashing, look))}")
        lines += _operation_table(operation, look)
    if summary.operations:
        lines += ["", "Percentiles are nearest-rank over all requests of the operation; a phase that one did not have is 0 ms in it."]
        if summary.coverage_gaps:
            lines.append("Requests with such a warning are left out of the storage and metadata phases that they lack.")
        if any(_hashing_unknown(operation) for operation in summary.operations.values()):
            lines.append("Requests whose time of hashing is not known are left out of the phase digest.")
    return "\n".join(lines) + "\n"


def _integrity(digests: Digests, look: Look) -> list[str]:
    """Whether digests fit; nothing where no request declares or verifies one."""
    lines = []
    if digests.compared:
        lines.append(_counts("digests", {_COMPARED_WORDS.get(name, name): number for name, number in digests.compared.items()}))
    if digests.verified:
        lines.append(_counts("read back", digests.verified))
    if digests.mismatches:
        said = ", ".join(f"by {_MISMATCH_WORDS.get(source, source)}: {number}" for source, number in digests.mismatches.items())
        accepted = f"; answered with success all the same: {digests.accepted}" if digests.accepted else ""
        lines.append(_alarm(f"  DIGEST MISMATCH in {_count(sum(digests.mismatches.values()), 'request')} ({said}{accepted})", look))
    if digests.verified.get("mismatch"):
        lines.append(_alarm(f"  STORED BYTES DIFFER: {digests.verified['mismatch']} of the digests over what was read back", look))
    lines += [f"    {_plain(_mismatched(record))}" for record in digests.mismatched[:_MISMATCHED_SHOWN]]
    if len(digests.mismatched) > _MISMATCHED_SHOWN:
        lines.append("    and more: see the records, or this capture as JSON")
    return lines


_MISMATCHED_SHOWN = 5

_COMPARED_WORDS = {"unknown": "not compared"}

#: By name in model.MismatchSource.
_MISMATCH_WORDS = {"computed": "the computed digest", "answer": "the service's answer"}


def _mismatched(record: Record) -> str:
    status = "unknown" if record["status"] is None else record["status"]
    accepted = " although it does not fit" if record["digest"]["mismatch_source"] and _succeeded(record) else ""
    names = ", ".join(f"{key} {record[name]}" for key, name in _NAMES if record[name] is not None)
    return f"{record['time']}  {record['operation']}  status {status}{accepted}  id {record['id']}" + (f"  ({names})" if names else "")


def _hashing_unknown(operation: OperationSummary) -> bool:
    """Whether the operation has the phase digest, and requests of which the time of hashing is not known."""
    known = sum(operation.hashing.sources.values()) if operation.hashing else 0
    return "digest" in operation.phases and known < operation.requests


def _hashing(hashing: Hashing, look: Look) -> str:
    requests = sum(hashing.sources.values())
    rate = f" at {_rate(hashing.bytes_per_second)}" if hashing.bytes_per_second else ""
    sources = ", ".join(f"{source}: {number}" for source, number in hashing.sources.items())
    known = f"{hashing.ms / requests:.3f} ms of CPU a request {_within(hashing.error_pct, look)}{rate}"
    return f"{known}; known of {_count(requests, 'request')} ({sources})"


_COLUMNS = f"  {'phase':<15} {'requests':>8} {'p50 ms':>11} {'p95 ms':>11} {'p99 ms':>11} {'share':>8}"


def _counts(title: str, numbers: Mapping[str, int]) -> str:
    return f"  {title:<12} " + ", ".join(f"{_plain(name)}: {number}" for name, number in numbers.items())


def _work_share(label: str, share: WorkShare) -> str:
    return f"{label}: {share.share_of_ms * 100:.1f} % of time and {share.share_of_bytes * 100:.1f} % of bytes"


def _operation_table(operation: OperationSummary, look: Look) -> list[str]:
    room = min(look.width - len(_COLUMNS) - 2, 40)
    lines = [_COLUMNS]
    for name, spread in [*operation.phases.items(), ("whole request", operation.duration)]:
        figures = f"{spread.p50_ms:11.3f} {spread.p95_ms:11.3f} {spread.p99_ms:11.3f} {spread.share * 100:6.1f} %"
        bar = _bar(0, spread.share, room, look) if name in operation.phases else ""
        lines.append(f"  {name:<15} {spread.requests:>8} {figures}  {bar}".rstrip())
    return lines


_LEGEND = """A bar's length is the phase's share of the request. Phases are sums: the bars are laid end to end in their usual
order, and do not show when each one ran."""


def render_slowest(summary: Summary, color: bool, width: int, unicode: bool = True) -> str:
    """A stepped bar for each phase of the slowest requests, slowest first; empty where there was no request."""
    look = Look(color, width, unicode)
    if not summary.slowest:
        return ""
    lines = [_bold(f"The slowest {len(summary.slowest)} of {_count(summary.requests, 'request')}", look)]
    for number, record in enumerate(summary.slowest, 1):
        lines += ["", *_heading(number, record, look), *_steps(record, look)]
    return "\n".join([*lines, "", _LEGEND]) + "\n"


def _heading(number: int, record: Record, look: Look) -> list[str]:
    status = "status unknown" if record["status"] is None else f"status {record['status']}"
    route = record["route"] or "no route of the contract"
    names = ", ".join(f"{key} {record[name]}" for key, name in _NAMES if record[name] is not None)
    lines = [
        f"{number}. {record['operation']}  {status}  {record['outcome']}  {record['duration_ms']:.3f} ms",
        f"   {record['method'] or 'method unknown'} {route}" + (f"  ({names})" if names else ""),
        f"   in {_size(record['bytes_in'])}, out {_size(record['bytes_out'])}  {record['time']}  id {record['id']}",
        f"   {_waiting(record)}",
        *_file_work(record["id"], record["attribution"]),
        *_digest(record.get("digest"), look),
        *(f"   warning: {_gap_words(reason)}" for reason in record.get("coverage_gaps", ())),
    ]
    if record["lost_events"]:
        lines.append(f"   {_count(record['lost_events'], 'event')} of it lost: its figures are lower bounds")
    first, *others = map(_plain, lines)
    return [_bold(first, look), *others, *(_alarm(_plain(line), look) for line in _alarms(record))]


def _waiting(record: Record) -> str:
    waits = ((end, record.get(f"{end}_wait_ms")) for end in ("client", "server"))
    shown = ", ".join(f"{end} wait unknown" if ms is None else f"{end} wait {ms:.3f} ms" for end, ms in waits)
    return f"{shown}; limited by: {record.get('limited_by') or 'unknown'}"


def _file_work(own: str, attribution: Record) -> Iterator[str]:
    """How the request's file work was tied to it: the label and why, its split where there is more than one, and who else."""
    why = "; ".join(_EVIDENCE_WORDS.get(name, name) for name in attribution["evidence"])
    yield f"   file work: {attribution['label']}" + (f", by {why}" if why else "")
    by_label = attribution.get("by_label", {})
    if len(by_label) > 1:
        parts = (f"{label} {_size(share['bytes'])} in {share['ms']:.3f} ms" for label, share in by_label.items())
        yield f"     of it {', '.join(parts)}"
    others = [each for each in attribution.get("candidates", []) if each != own]
    if others:
        more = f" and {len(others) - _CANDIDATES_SHOWN} more" if len(others) > _CANDIDATES_SHOWN else ""
        yield f"     shared with {_count(len(others), 'request')}: {', '.join(others[:_CANDIDATES_SHOWN])}{more}"
    if attribution["unattributed_bytes"]:
        yield f"     {_size(attribution['unattributed_bytes'])} meanwhile tied to no request"


def _digest(digest: Record | None, look: Look) -> Iterator[str]:
    """What hashing cost the request and whether its digest fits; nothing where neither is known."""
    if digest is None:
        return
    known = []
    if digest["ms"] is not None:
        within = "" if digest["error_pct"] is None else f" {_within(digest['error_pct'], look)}"
        known.append(f"{digest['ms']:.3f} ms of CPU{within}, {_SOURCE_WORDS.get(digest['source'], digest['source'])}")
        if digest["bytes"] is not None:
            rate = f" at {_rate(digest['bytes_per_second'])}" if digest["bytes_per_second"] else ""
            known.append(f"{_size(digest['bytes'])}{rate}")
    if digest["result"] == "match":
        known.append("matches the declared one")
    elif known and digest["declared"] is not None and digest["result"] is None:
        known.append("not compared with the declared one")
    if digest["post_storage_verify"]:
        known.append("read back: " + ", ".join(digest["post_storage_verify"]))
    if known:
        yield f"   digest: {'; '.join(known)}"


#: By name in model.DIGEST_SOURCES.
_SOURCE_WORDS = {
    "exact": "each call measured",
    "gap": "from the time between reading and writing",
    "model": "from its bytes",
    "sample": "from samples of the CPU",
    "none": "not known how",
}


def _alarms(record: Record) -> Iterator[str]:
    """What is wrong with the request's bytes, in words that stand out without colour."""
    digest = record.get("digest") or {}
    source = digest.get("mismatch_source")
    if source is not None:
        accepted = ", and the service answered with success" if _succeeded(record) else ""
        yield f"   DIGEST MISMATCH, by {_MISMATCH_WORDS.get(source, source)}{accepted}"
        yield f"     declared {digest['declared'] or 'unknown'}"
        yield f"     computed {digest['computed'] or 'not seen'}"
    if "mismatch" in digest.get("post_storage_verify", ()):
        yield "   STORED BYTES DIFFER: what was read back from storage has another digest"


_CANDIDATES_SHOWN = 4

#: By name in model.EVIDENCE; docs/attribution.md says more.
_EVIDENCE_WORDS = {
    "same_call": "one call between file and socket",
    "thread": "its thread, which served it alone",
    "goroutine": "its goroutine",
    "context": "its Python task",
    "descriptor": "its file from open to close",
    "last_socket": "the thread's last socket",
    "path": "names in the path",
    "bytes": "as many bytes as its body",
    "fingerprint": "its body's first bytes",
    "token": "names in what was written",
    "continuity": "the thread's work just before",
    "window": "no other request in flight",
    "order": "the order of the requests (a guess)",
}

#: By reason in model.GAPS.
_GAP_WORDS = {
    "io_uring": "file work by io_uring is not seen: storage time and file counts may lack it",
    "mmap": "file work through mapped memory (mmap) is not seen: storage time and file counts may lack it",
    "tls": "what goes through TLS is not seen: bytes are counted encrypted, and requests may be missing",
    "unseen": "no file work was seen for the body: it may be in memory only, or be written by another process",
}


def _gap_words(reason: str) -> str:
    return _GAP_WORDS.get(reason, f"file work may not be seen: {reason}")


_NAMES = (("bucket", "bucket_id"), ("artifact", "artifact_id"), ("version", "version"), ("request id", "request_id"))


def _steps(record: Record, look: Look) -> Iterator[str]:
    duration = record["duration_ms"]
    room = max(look.width - 46, 10)
    start = 0.0
    for name in PHASES_AS_THEY_HAPPEN:
        ms = record["phases"].get(name)
        if ms is None:
            continue
        share = ms / duration if duration else 0.0
        yield f"     {name:<15} {ms:11.3f} ms {share * 100:6.1f} %  {_bar(start, share, room, look)}"
        start += share


def _bar(start: float, share: float, room: int, look: Look) -> str:
    """A bar from `start`, both as parts of 1 over `room` columns; at least one column long, so that it can be seen."""
    if room < 8 or share <= 0:
        return ""
    first = min(round(start * room), room - 1)
    length = max(1, min(round((start + share) * room), room) - first)
    bar = ("█" if look.unicode else "#") * length
    return " " * first + (f"\x1b[36m{bar}\x1b[0m" if look.color else bar)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    amount = float(size)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"


def _within(error_pct: float, look: Look) -> str:
    return f"{'±' if look.unicode else '+-'}{error_pct:.1f} %"


def _alarm(text: str, look: Look) -> str:
    return f"\x1b[31m{text}\x1b[0m" if look.color else text


def _bold(text: str, look: Look) -> str:
    return f"\x1b[1m{text}\x1b[0m" if look.color else text


def _plain(text: str) -> str:
    """Text that cannot steer a terminal, even where a record came from elsewhere than the agent."""
    return "".join(each if each.isprintable() else "?" for each in text)


# --- The agent's side of the control socket ----------------------------------------------------------------------


@dataclass(slots=True)
class Listener:
    """The listening control socket, and the lock that makes this the host's one agent while it is open."""

    socket: socket.socket
    path: Path
    lock: int

    def close(self) -> None:
        """Remove the socket and give up the lock."""
        with suppress(OSError):
            self.path.unlink()
        self.socket.close()
        os.close(self.lock)


def open_listener(run_dir: Path, uid: int) -> Listener:
    """Take the host's one agent's place: create `run_dir`, lock it, and listen on its control socket.

    To be called before privileges are dropped; the directory and the socket then belong to `uid`, so that the agent may
    remove the socket at its end. A dead agent's socket is replaced. The lock is held until `Listener.close`, or until
    the last process that inherited it by a fork is gone. Raises `AgentBusy` where an agent runs, `EnvironmentLack`
    where the directory cannot be used.
    """
    try:
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = run_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), uid):
            raise EnvironmentLack(f"{run_dir} is no directory of this user: remove it, or set another run directory.")
        if found.st_uid != uid:
            if set(os.listdir(run_dir)) - {SOCKET_NAME, LOCK_NAME}:
                raise EnvironmentLack(f"{run_dir} holds other files and would be given to uid {uid}: set a run directory of its own.")
            os.chown(run_dir, uid, -1)
        lock = _lock(run_dir / LOCK_NAME)
        try:
            return Listener(_listen(run_dir / SOCKET_NAME, uid), run_dir / SOCKET_NAME, lock)
        except OSError:
            os.close(lock)
            raise
    except OSError as error:
        raise EnvironmentLack(f"{run_dir} cannot hold the control socket ({error}): run as root, or set another run directory.") from error


def _lock(path: Path) -> int:
    # The directory belongs to the unprivileged agent, whose links root must not follow.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        raise AgentBusy(f"An agent already runs on this host (pid {pid or 'unknown'}): stop it first, or ask it for a capture.") from None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _listen(path: Path, uid: int) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
        os.chown(path, uid, -1, follow_symlinks=False)
        listener.listen(MAX_CLIENTS)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


@dataclass(slots=True)
class _Client:
    socket: socket.socket
    deadline: float | None
    asked: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)
    answered: bool = False


@dataclass(slots=True)
class _Capture:
    client: _Client
    ends: float
    min_ns: float
    lost_before: Mapping[str, int]
    seen: int = 0
    sent: int = 0
    faster: int = 0
    dropped: int = 0


class ControlServer:
    """The control socket, for a loop that must not block.

    It keeps an epoll instance of its own: the loop watches `fileno()` for input, calls `on_readable` when there is any,
    `offer` for each finished request, and `on_timer` at least once a second; it need not know of clients. `now` is
    seconds of a monotonic clock. `status` gives the answer to a status request; `lost` the agent's loss counters.
    """

    def __init__(
        self,
        listener: socket.socket,
        status: Callable[[], Mapping[str, object]],
        lost: Callable[[], Mapping[str, int]],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._status = status
        self._lost = lost
        self._clients: dict[int, _Client] = {}
        self._capture: _Capture | None = None
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def offer(self, request: Request) -> None:
        """A request has finished: it goes to the capture that runs, if one does and wants it."""
        capture = self._capture
        if capture is None:
            return
        capture.seen += 1
        if request.duration_ns < capture.min_ns:
            capture.faster += 1
            return
        line = orjson.dumps(request.record(), option=orjson.OPT_APPEND_NEWLINE)
        answer = capture.client.answer
        if len(answer) + len(line) > MAX_BUFFER:
            capture.dropped += 1
            return
        capture.sent += 1
        if not answer:
            self._epoll.modify(capture.client.socket, select.EPOLLOUT)
        answer += line

    def on_readable(self, now: float) -> None:
        """Serve whoever is waiting: new clients, requests, and room in a client's socket."""
        for descriptor, events in self._epoll.poll(0):
            client = self._clients.get(descriptor)
            if client is None:
                self._accept(now)
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._drop(client)
            elif events & select.EPOLLIN:
                self._receive(client, now)
            else:
                self._send(client)

    def on_timer(self, now: float) -> None:
        """End the capture whose time is over, and leave clients that take too long."""
        if self._capture is not None and now >= self._capture.ends:
            self._end(self._capture, now)
        for client in list(self._clients.values()):
            if client.deadline is not None and now >= client.deadline:
                self._drop(client)

    def close(self) -> None:
        """End the capture, as far as its client takes it now, and leave all clients. The listener stays its owner's."""
        if self._capture is not None:
            self._end(self._capture, 0)
        for client in list(self._clients.values()):
            self._drop(client)
        self._epoll.close()

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            refusal = f"{MAX_CLIENTS} clients are being served: try again."
        elif (uid := _peer_uid(connection)) not in (0, os.geteuid()):
            refusal = f"uid {uid} may not ask the agent: run as root."
        else:
            self._clients[connection.fileno()] = _Client(connection, now + GRACE_S)
            self._epoll.register(connection, select.EPOLLIN)
            return
        with connection, suppress(OSError):
            connection.send(_error(refusal))

    def _receive(self, client: _Client, now: float) -> None:
        try:
            data = client.socket.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        client.asked += data
        line, newline, _ = client.asked.partition(b"\n")
        if newline:
            self._answer(client, bytes(line), now)
        elif len(client.asked) >= MAX_REQUEST:
            self._finish(client, _error(f"A request is one line of at most {MAX_REQUEST} bytes."))

    def _answer(self, client: _Client, line: bytes, now: float) -> None:
        try:
            asked = orjson.loads(line)
        except orjson.JSONDecodeError:
            asked = None
        match asked:
            case {"status": {}}:
                self._finish(client, orjson.dumps(self._status(), option=orjson.OPT_APPEND_NEWLINE))
            case {"capture": {"duration": duration, "min_ms": min_ms}}:
                wrong = _wrong_limits(duration, min_ms)
                if wrong is None and self._capture is not None:
                    wrong = f"Another capture runs for {max(0, self._capture.ends - now):.0f} more seconds: try again then."
                if wrong is not None:
                    self._finish(client, _error(wrong))
                    return
                client.deadline = None
                self._capture = _Capture(client, now + duration, min_ms * 1e6, dict(self._lost()))
                # From here on only its end matters, which is reported unasked: what else it sends stays unread.
                self._epoll.modify(client.socket, 0)
            case _:
                self._finish(client, _error('The request is {"capture": {"duration": seconds, "min_ms": ms}} or {"status": {}}.'))

    def _end(self, capture: _Capture, now: float) -> None:
        self._capture = None
        counts = {"seen": capture.seen, "sent": capture.sent, "faster": capture.faster, "dropped": capture.dropped}
        lost = {name: value - capture.lost_before.get(name, 0) for name, value in self._lost().items()}
        capture.client.deadline = now + GRACE_S
        self._finish(capture.client, orjson.dumps({"end": {**counts, "lost": lost}}, option=orjson.OPT_APPEND_NEWLINE))

    def _finish(self, client: _Client, line: bytes) -> None:
        client.answer += line
        client.answered = True
        self._epoll.modify(client.socket, select.EPOLLOUT)
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            sent = client.socket.send(client.answer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        del client.answer[:sent]
        if client.answer:
            return
        if client.answered:
            self._drop(client)
        else:
            self._epoll.modify(client.socket, 0)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._epoll.unregister(client.socket)
        client.socket.close()
        if self._capture is not None and self._capture.client is client:
            self._capture = None


def _wrong_limits(duration: object, min_ms: object) -> str | None:
    """What is wrong with a capture's limits, as a sentence."""
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration <= MAX_DURATION_S:
        return f"A capture lasts more than 0 and at most {MAX_DURATION_S} seconds."
    if isinstance(min_ms, bool) or not isinstance(min_ms, int | float) or not 0 <= min_ms < float("inf"):
        return "The least duration to show is a number of milliseconds, 0 or more."
    return None


def _error(text: str) -> bytes:
    return orjson.dumps({"error": text}, option=orjson.OPT_APPEND_NEWLINE)


def _peer_uid(connection: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


# --- The client's side -------------------------------------------------------------------------------------------

_TICK_S = 0.2


def capture(run_dir: Path, duration: float, min_ms: float, progress: TextIO | None = None) -> tuple[list[Record], Record | None]:
    """The records of the requests that finish in the next `duration` seconds and took at least `min_ms`.

    The second value is the agent's account: `seen` = `sent` + `faster` + `dropped` requests, what it `lost` itself, and
    `beyond_limit`, records received past `MAX_RECORDS` and not kept. It is None where the capture ended early: the agent
    went away, or the user pressed Ctrl-C. `progress` shows how far it is, where it is a terminal. Raises `UsageError`
    for limits out of range, `NoAgent` where none runs, `BucketprobeError` where the agent refuses.
    """
    wrong = _wrong_limits(duration, min_ms)
    if wrong is not None:
        raise UsageError(wrong)
    records: list[Record] = []
    beyond_limit = 0
    started = time.monotonic()
    with _Progress(progress, duration) as shown, _connect(run_dir) as connection:
        _ask(connection, {"capture": {"duration": duration, "min_ms": min_ms}})
        # Ctrl-C ends the capture, not the command: what came so far is shown.
        with suppress(KeyboardInterrupt):
            for message in _messages(connection, duration + 2 * GRACE_S):
                shown.update(time.monotonic() - started, len(records) + beyond_limit)
                if message is None:
                    continue
                if "end" in message:
                    return records, {**message["end"], "beyond_limit": beyond_limit}
                if len(records) < MAX_RECORDS:
                    records.append(message)
                else:
                    beyond_limit += 1
    return records, None


def status(run_dir: Path) -> Record:
    """What the running agent says of itself. Raises `NoAgent` where none runs or it does not answer."""
    with _connect(run_dir) as connection:
        _ask(connection, {"status": {}})
        for message in _messages(connection, GRACE_S):
            if message is not None:
                return message
    raise NoAgent(f"The agent did not answer within {GRACE_S:.0f} seconds: see its log, or restart it.")


def _connect(run_dir: Path) -> socket.socket:
    path = run_dir / SOCKET_NAME
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except PermissionError as error:
        connection.close()
        raise EnvironmentLack(f"{path} may not be opened by this user: run as root.") from error
    except OSError as error:
        connection.close()
        raise NoAgent(f"No agent listens on {path}: start one first, or name the service (--port) to have one meanwhile.") from error
    return connection


def _ask(connection: socket.socket, question: Mapping[str, object]) -> None:
    # An agent that refuses the connection has sent why and closed before it reads.
    with suppress(BrokenPipeError):
        connection.sendall(orjson.dumps(question, option=orjson.OPT_APPEND_NEWLINE))


def _messages(connection: socket.socket, timeout: float) -> Iterator[Record | None]:
    """The agent's lines until it closes or `timeout` seconds passed; None at least every `_TICK_S` seconds."""
    connection.settimeout(_TICK_S)
    deadline = time.monotonic() + timeout
    rest = b""
    while time.monotonic() < deadline:
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            yield None
            continue
        except ConnectionResetError:
            return
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            message = orjson.loads(line)
            if "error" in message:
                raise BucketprobeError(message["error"])
            yield message
        yield None


class _Progress:
    """One line on a terminal, rewritten; nothing elsewhere."""

    def __init__(self, stream: TextIO | None, duration: float) -> None:
        self._stream = stream if stream is not None and stream.isatty() else None
        self._duration = duration
        self._next = 0.0

    def __enter__(self) -> _Progress:
        return self

    def update(self, elapsed: float, requests: int) -> None:
        if self._stream is not None and elapsed >= self._next:
            self._next = elapsed + _TICK_S
            self._stream.write(f"\rcapturing: {min(elapsed, self._duration):.0f} of {self._duration:g} s, {requests} requests ")
            self._stream.flush()

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

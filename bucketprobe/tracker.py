# SPDX-License-Identifier: Apache-2.0
"""Events to requests. Pure: events in, finished requests out; the clock, the file classes and the sink are given.

The kernel has framed the messages and summed the work; here heads are read, files are told apart by their paths, and the sums
become phases. Everything kept is bounded: what is pushed out is counted.
"""

from __future__ import annotations

import os.path
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from bucketprobe import abi, http1, route
from bucketprobe.model import OUTCOMES, PHASES, TRACKER_LOSSES, Attribution, FileWork, Request

FileClass = Literal["storage", "metadata", "other"]

AT_FDCWD = -100
O_DSYNC = 0o10000
#: How many requests' heads may be incomplete at once: more come from a scanner or an attack than from clients.
MAX_PARTIAL_HEADS = 256
#: What may be kept of unfinished requests, open files and directories.
MAX_REQUESTS = 4_096
MAX_GENERATIONS = 8_192
MAX_UNTIED = 512
#: How long an aborted request waits for its thread to finish the file work that it had begun, ns.
GRACE_NS = 500_000_000

_SYNC_FLAG, _KIND = abi.RequestFlag, abi.Kind


class Classes(Protocol):
    def classify(self, path: str) -> FileClass: ...


@dataclass(slots=True)
class _Work:
    """What was seen of one unfinished request, besides its sums in the kernel."""

    request_head: bytes = b""
    response_head: bytes = b""
    storage: FileWork = field(default_factory=FileWork)
    metadata: FileWork = field(default_factory=FileWork)
    other: FileWork = field(default_factory=FileWork)
    write_ns: int = 0
    sync_ns: int = 0
    read_ns: int = 0
    metadata_ns: int = 0
    touched: bool = False

    def files(self, kind: FileClass) -> FileWork:
        return self.storage if kind == "storage" else self.metadata if kind == "metadata" else self.other


@dataclass(slots=True, frozen=True)
class _Generation:
    kind: FileClass
    writes_sync: bool  # O_SYNC or O_DSYNC: a write is a sync
    path: str | None


_UNKNOWN = _Generation("other", False, None)


class Tracker:
    """Puts events together. Call `feed` for each, in the ring's order, and `tick` now and then.

    `wall_ns(monotonic_ns)` gives the wall clock of a kernel stamp; `path_of(tgid, fd)` the path and flags of a file that was
    open before the agent looked; `cwd_of(tgid)` the directory of a process of which nothing was told yet. Counters: `records`,
    and by cause `lost`.
    """

    def __init__(
        self,
        classes: Classes,
        wall_ns: Callable[[int], int],
        path_of: Callable[[int, int], tuple[str, int] | None],
        cwd_of: Callable[[int], str | None],
        sink: Callable[[Request], None],
    ) -> None:
        self._classes = classes
        self._wall_ns = wall_ns
        self._path_of = path_of
        self._cwd_of = cwd_of
        self._sink = sink
        self._requests: OrderedDict[int, _Work] = OrderedDict()
        self._partial: OrderedDict[int, bytes] = OrderedDict()
        self._generations: OrderedDict[int, _Generation] = OrderedDict()
        self._cwd: dict[int, str | None] = {}
        self._untied: deque[tuple[int, int, int, int]] = deque(maxlen=MAX_UNTIED)
        self._aborted: deque[Any] = deque()
        self.records = 0
        self.lost = dict.fromkeys(TRACKER_LOSSES, 0)
        self._handlers: dict[int, Callable[[Any], None]] = {
            _KIND.HEAD: self._head,
            _KIND.END: self._end,
            _KIND.OPEN: self._open,
            _KIND.FILE: self._file,
            _KIND.PATH: self._path,
            _KIND.UNKNOWN_FD: self._unknown_fd,
        }

    def feed(self, event: Any) -> None:
        """Takes one decoded event; those of processes are not for it."""
        handler = self._handlers.get(event.kind)
        if handler:
            handler(event)

    def tick(self, now_ns: int) -> None:
        """Lets aborted requests go whose grace is over."""
        while self._aborted and now_ns - self._aborted[0].ts > GRACE_NS:
            self._finish(self._aborted.popleft())

    def flush(self) -> None:
        """Lets all aborted requests go: no more events will come."""
        while self._aborted:
            self._finish(self._aborted.popleft())

    def learn_file(self, gen: int, path: str, flags: int) -> None:
        """A file generation whose path was found in /proc."""
        self._keep(gen, _Generation(self._classes.classify(path), bool(flags & O_DSYNC), path))

    def learn_cwd(self, tgid: int, path: str) -> None:
        """A target's working directory, against which it names files."""
        self._cwd[tgid] = path

    def inherit(self, tgid: int, parent: int) -> None:
        """A process was forked: it names files as its parent did."""
        self._cwd[tgid] = self._cwd_at(parent)

    def forget_process(self, tgid: int) -> None:
        """A process ended; its number may be another's next."""
        self._cwd.pop(tgid, None)

    def _cwd_at(self, tgid: int) -> str | None:
        if tgid not in self._cwd:
            self._cwd[tgid] = self._cwd_of(tgid)
        return self._cwd[tgid]

    def _keep(self, gen: int, generation: _Generation) -> None:
        self._generations[gen] = generation
        while len(self._generations) > MAX_GENERATIONS:
            self._generations.popitem(last=False)
            self.lost["evicted_file"] += 1

    def _work(self, rid: int) -> _Work:
        work = self._requests.get(rid)
        if work is None:
            work = self._requests[rid] = _Work()
            while len(self._requests) > MAX_REQUESTS:
                self._requests.popitem(last=False)
                self.lost["evicted"] += 1
        return work

    def _resolve(self, tgid: int, dirfd: int, dirgen: int, raw: bytes) -> str:
        path = raw.decode("utf-8", "surrogateescape")
        if path.startswith("/"):
            return os.path.normpath(path) if "/." in path or "//" in path else path
        base = self._cwd_at(tgid) if dirfd == AT_FDCWD else self._generations.get(dirgen, _UNKNOWN).path
        if base is None:
            self.lost["unnamed_path"] += 1
            return path
        return os.path.normpath(os.path.join(base, path))

    def _head(self, event: Any) -> None:
        piece = event.data[: event.n]
        if event.what == abi.Direction.RESPONSE:
            self._work(event.rid).response_head += piece
            return
        # A request begins when its head is complete; of one that never does, no end will tell.
        head = self._partial.pop(event.rid, b"") + piece
        if event.last:
            self._work(event.rid).request_head = head
            return
        self._partial[event.rid] = head
        if len(self._partial) > MAX_PARTIAL_HEADS:
            self._partial.popitem(last=False)
            self.lost["partial_head"] += 1

    def _open(self, event: Any) -> None:
        path = self._resolve(event.tgid, event.dirfd, event.dirgen, event.data[: event.n])
        kind = self._classes.classify(path)
        self._keep(event.gen, _Generation(kind, bool(event.flags & O_DSYNC), path))
        if event.rid:
            work = self._work(event.rid)
            work.files(kind).opens += 1
            work.touched = True
            self._charge(work, kind, event.ns)

    @staticmethod
    def _charge(work: _Work, kind: FileClass, ns: int) -> None:
        if kind == "storage":
            work.write_ns += ns
        elif kind == "metadata":
            work.metadata_ns += ns

    def _file(self, event: Any) -> None:
        generation = self._generations.get(event.gen, _UNKNOWN)
        if event.what:  # its last descriptor is closed
            self._generations.pop(event.gen, None)
        work = self._requests.get(event.rid) if event.rid else None
        if work is None:
            if event.rid:
                self.lost["late_file"] += 1
            size = event.write_bytes + event.read_bytes
            if generation.kind == "storage" and size:
                if len(self._untied) == MAX_UNTIED:
                    self.lost["evicted_untied"] += 1
                self._untied.append((event.tgid, event.first_ns, event.last_ns, size))
            return
        work.touched = True
        files = work.files(generation.kind)
        files.write_calls += event.write_calls
        files.write_bytes += event.write_bytes
        files.read_calls += event.read_calls
        files.read_bytes += event.read_bytes
        files.syncs += event.syncs
        if generation.kind == "storage":
            if generation.writes_sync:
                work.sync_ns += event.write_ns
            else:
                work.write_ns += event.write_ns
            work.write_ns += event.other_ns
            work.sync_ns += event.sync_ns
            work.read_ns += event.read_ns
        elif generation.kind == "metadata":
            work.metadata_ns += event.write_ns + event.read_ns + event.sync_ns + event.other_ns

    def _path(self, event: Any) -> None:
        first = self._resolve(event.tgid, event.dirfd, event.dirgen, event.data[: event.n])
        if event.what == abi.PathCall.CHDIR:
            self._cwd[event.tgid] = first if first.startswith("/") else None
            return
        kind = self._classes.classify(first)
        if event.n2:
            second = self._resolve(event.tgid, event.dirfd2, event.dirgen2, event.data[event.n : event.n + event.n2])
            to = self._classes.classify(second)
            kind = to if to != "other" else kind
        work = self._requests.get(event.rid) if event.rid else None
        if work is None:
            return
        work.touched = True
        if event.what == abi.PathCall.RENAME:
            work.files(kind).renames += 1
        self._charge(work, kind, event.ns)

    def _unknown_fd(self, event: Any) -> None:
        found = self._path_of(event.tgid, event.fd)
        if found:
            self.learn_file(event.gen, *found)

    def _end(self, event: Any) -> None:
        if event.what in (abi.EndOutcome.CLIENT_CLOSED, abi.EndOutcome.SERVER_CLOSED):
            self._aborted.append(event)
            if len(self._aborted) > MAX_REQUESTS:
                self._finish(self._aborted.popleft())
        else:
            self._finish(event)

    def _finish(self, event: Any) -> None:
        work = self._requests.pop(event.rid, None)
        head: http1.RequestHead | None = None
        if work is None or not work.request_head:
            self.lost["no_head"] += 1
            work = work or _Work()
        else:
            try:
                head = http1.parse_request(work.request_head)
            except http1.Malformed:
                self.lost["malformed_head"] += 1
        found = (
            route.classify(head.method, head.path, head.query, head.headers.get("x-artifact-version")) if head else route.Route("unknown")
        )
        start, end = event.start_ns, max(event.end_ns, event.start_ns)
        tied = not event.flags & abi.RequestFlag.INTERLEAVED
        totals = _totals(event, work, tied)
        nothing = FileWork()
        request = Request(
            id=f"{event.rid:016x}",
            conn=f"{event.conn:016x}",
            pid=event.tgid,
            wall_ns=self._wall_ns(start),
            start_ns=start,
            end_ns=end,
            operation=found.operation,
            outcome=OUTCOMES[event.what],
            method=head.method if head else None,
            route=found.template,
            bucket_id=found.bucket_id,
            artifact_id=found.artifact_id,
            version=found.version,
            request_id=_request_id(head, work.response_head),
            status=event.status or None,
            bytes_in=event.bytes_in if event.framed else None,
            bytes_out=event.bytes_out,
            phases=_partition(totals, end - start),
            phase_totals=totals,
            queue_stages=_queue_stages(event),
            files=work.storage if tied else nothing,
            metadata_files=work.metadata if tied else nothing,
            other_files=work.other if tied else nothing,
            attribution=self._attribution(event, work, start, end),
            lost_events=event.lost,
        )
        self.records += 1
        self._sink(request)

    def _attribution(self, event: Any, work: _Work, start: int, end: int) -> Attribution:
        untied = sum(size for tgid, first, last, size in self._untied if tgid == event.tgid and first < end and last > start)
        if event.flags & abi.RequestFlag.INTERLEAVED:
            # Its thread had another request at the same time: which of the two a call served, the thread does not tell.
            own = work.storage.write_bytes + work.storage.read_bytes
            return Attribution("unattributed", (), untied + own)
        if not work.touched and untied:
            return Attribution("unattributed", (), untied)
        # Another thread may have done file work for it, or events about it were lost: what is shown is right, and may not be all.
        whole = not event.flags & abi.RequestFlag.MOVED and not event.lost
        return Attribution("exact" if whole else "inferred", ("thread",), untied)


def _request_id(head: http1.RequestHead | None, response_head: bytes) -> str | None:
    """The client's X-Request-ID, or else the one that the server made up and answered with."""
    given = head.headers.get("x-request-id") if head else None
    if given or b"x-request-id" not in response_head.lower():
        return given
    try:
        return http1.parse_response(response_head).headers.get("x-request-id")
    except http1.Malformed:
        return None


def _totals(event: Any, work: _Work, tied: bool) -> dict[str, int]:
    """Each phase's own time, ns; only those that occurred."""
    totals = {
        "queue": max(0, event.first_read_ns - event.start_ns) if event.flags & abi.RequestFlag.QUEUE_SEEN else 0,
        "network_receive": event.recv_ns + event.wait_rx_ns,
        "network_send": event.send_ns + event.wait_tx_ns,
        "runqueue": event.runqueue_ns,
    }
    if tied:
        totals |= {
            "storage_sync": work.sync_ns,
            "storage_write": work.write_ns,
            "storage_read": work.read_ns,
            "metadata": work.metadata_ns,
        }
    return {name: ns for name, ns in totals.items() if ns > 0}


def _partition(totals: dict[str, int], duration: int) -> dict[str, int]:
    """Phases that do not overlap and sum to the duration.

    On one thread the totals are times of calls one after the other and fit by themselves. Where threads overlapped they may not:
    then the higher in the order of `PHASES` keeps its time.
    """
    left = duration
    phases = {}
    for name in PHASES:
        ns = min(totals.get(name, 0), left)
        if ns > 0:
            phases[name] = ns
            left -= ns
    phases["other"] = left
    return phases


def _queue_stages(event: Any) -> dict[str, int]:
    if not event.flags & abi.RequestFlag.QUEUE_SEEN:
        return {}
    stages = {"read": max(0, event.first_read_ns - max(event.start_ns, event.accept_ns if event.accept_ns < event.first_read_ns else 0))}
    if event.established_ns and event.start_ns == event.established_ns and event.accept_ns > event.established_ns:
        stages["accept"] = event.accept_ns - event.established_ns
    return stages

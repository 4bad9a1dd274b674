# SPDX-License-Identifier: Apache-2.0
"""Events to requests. Pure: events in, finished requests out; the clock, the file classes and the sink are given.

The kernel has framed the messages and summed the work; here heads are read, files are told apart by their paths, and the sums
become phases. Where a thread worked for one request alone, a record is ready with the response. Else it is held back for a moment:
files are closed, and other requests end, and only then resolve.py decides whose work was whose. Everything kept is bounded: what
is pushed out is counted.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from bucketprobe import abi, http1, integrity, route
from bucketprobe.hashtime import Gaps, HashTime, Timed
from bucketprobe.model import (
    EVIDENCE,
    LABELS,
    OUTCOMES,
    PHASES,
    TRACKER_LOSSES,
    Attribution,
    Digest,
    FileWork,
    Label,
    Limit,
    Request,
    Share,
)
from bucketprobe.resolve import Decision, File, FileClass, Live, Names, Process, Unit

AT_FDCWD = -100
O_ACCMODE = 0o3
O_DSYNC = 0o10000
O_TMPFILE = 0o20000000 | os.O_DIRECTORY
PROT_WRITE, MAP_SHARED = 2, 1
#: How many requests' heads may be incomplete at once: more come from a scanner or an attack than from clients.
MAX_PARTIAL_HEADS = 256
#: What may be kept of unfinished requests, open files and directories, and of file work that nobody has yet.
MAX_REQUESTS = 4_096
MAX_GENERATIONS = 8_192
MAX_NAMES = 1_024
MAX_HELD = 1_024
MAX_PENDING = 16_384
MAX_UNTIED = 512
#: Programs whose hashing is known.
MAX_FAMILIES = 64
#: How long a request is held back after its end: until its files are closed, and those of its time have ended or gone on. An aborted
#: one waits as long for its thread to finish the file work that it had begun.
HOLD_NS = 500_000_000
#: How many of them are let go between two looks into the ring.
RELEASED_AT_ONCE = 64
#: How long after a loss nothing is certain that rests on knowing all requests.
BLIND_NS = 10_000_000_000
#: File work that nobody could be given for so long is nobody's.
PENDING_NS = 30_000_000_000
#: Sums that a thread sends at once lie no further apart than this: they are of one go.
FLUSH_NS = 100_000
_SUCCESS = frozenset((200, 201, 204, 206))
#: Where Bucket v1's clients say which digest a body has.
DECLARED = ("header:X-Artifact-Digest", "query:digest")
#: Without one of these it answers 400 whatever the body is.
_REQUIRED = ("x-artifact-version", "x-uploaded-by", "x-provenance-source")

_DIGEST = re.compile("[0-9a-f]{64}")

_ALONE, _MANY = abi.FileFlag.ALONE, abi.FileFlag.MANY
#: What is not added to a file's pending work.
_APART = abi.FileFlag.SAME_CALL | _ALONE | _MANY
_KIND = abi.Kind


class Classes(Protocol):
    def classify(self, path: str) -> FileClass: ...


@dataclass(slots=True)
class _Request:
    """What was seen of one unfinished request, besides its sums in the kernel."""

    live: Live
    head: http1.RequestHead | None = None
    route: route.Route = field(default_factory=lambda: route.Route("unknown"))
    malformed: bool = False
    response_head: bytes = b""
    lost_files: int = 0
    end: Any = None


_NAMELESS = Names(None, None, None, "")
_UNKNOWN = File("other")


class Tracker:
    """Puts events together. Call `feed` for each, in the ring's order, and `tick` now and then.

    `wall_ns(monotonic_ns)` gives the wall clock of a kernel stamp; `path_of(tgid, fd)` the path and flags of a file that was
    open before the agent looked; `cwd_of(tgid)` the directory of a process of which nothing was told yet. Counters: `records`;
    by cause `lost`; by (label, kind of file) `attributed`; by kind `unattributed`, what is nobody's; by (reason, direction)
    `gap_bytes`, bytes of bodies for which no file work was seen. `declared`: see config.DigestSpec.
    """

    def __init__(
        self,
        classes: Classes,
        wall_ns: Callable[[int], int],
        path_of: Callable[[int, int], tuple[str, int] | None],
        cwd_of: Callable[[int], str | None],
        sink: Callable[[Request], None],
        declared: Sequence[str] = DECLARED,
    ) -> None:
        self._classes = classes
        self._declared = declared
        self._headers = http1.REQUEST_HEADERS | _named(declared, "header")
        self._parameters = http1.PARAMETERS | _named(declared, "query")
        self._response_headers = http1.RESPONSE_HEADERS | _named(declared, "response")
        self._asks_response = any(place.startswith("response:") for place in declared)
        self._wall_ns = wall_ns
        self._path_of = path_of
        self._cwd_of = cwd_of
        self._sink = sink
        #: Of tokens: see abi.TokensEvent.
        self.secret = 1
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._partial: OrderedDict[int, bytes] = OrderedDict()
        self._files: OrderedDict[int, File] = OrderedDict()
        self._by_path: OrderedDict[str, File] = OrderedDict()
        self._by_fd: OrderedDict[tuple[int, int], File] = OrderedDict()
        self._processes: dict[int, Process] = {}
        self._tokens: OrderedDict[tuple[int, int], list[int]] = OrderedDict()
        self._flushed: dict[int, tuple[int, list[int]]] = {}
        self._cwd: dict[int, str | None] = {}
        self._untied: deque[tuple[int, int, int]] = deque(maxlen=MAX_UNTIED)
        self._held: deque[_Request] = deque()
        self.due = False
        self._reviewed_ns = 0
        self._lost_evidence = 0
        self._blind_until_ns = 0
        #: The stamp of the last event.
        self.latest_ns = 0
        self.records = 0
        self._digests_gone = 0
        self._families: dict[str, HashTime] = {}  # how long the processes take that run the same
        self.lost = dict.fromkeys(TRACKER_LOSSES, 0)
        self.attributed: dict[tuple[str, str], Share] = {}
        self.unattributed: dict[str, Share] = {}
        self.gap_bytes: dict[tuple[str, str], int] = {}
        self._handlers: dict[int, Callable[[Any], None]] = {
            _KIND.HEAD: self._head,
            _KIND.END: self._end,
            _KIND.OPEN: self._open,
            _KIND.FILE: self._file,
            _KIND.PATH: self._path,
            _KIND.UNKNOWN_FD: self._unknown_fd,
            _KIND.TOKENS: self._token,
            _KIND.BODY: self._body,
            _KIND.MAP: self._map,
            _KIND.DIGEST: self._digest,
        }

    def feed(self, event: Any) -> None:
        """Takes one decoded event; those of processes are not for it."""
        handler = self._handlers.get(event.kind)
        if handler:
            self.latest_ns = event.ts
            handler(event)

    def tick(self, now_ns: int) -> None:
        """Lets requests go that were held back long enough. `now_ns`: up to when all events were fed.

        Not too many at once: the ring fills meanwhile. `due` says that there are more.
        """
        for _ in range(RELEASED_AT_ONCE):
            self.due = bool(self._held) and now_ns - self._held[0].end.ts > HOLD_NS
            if not self.due:
                break
            self._finish(self._held.popleft())
        if now_ns - self._reviewed_ns > PENDING_NS / 10:
            self._reviewed_ns = now_ns
            for process in self._processes.values():
                process.digests.expire(now_ns - PENDING_NS)
                for unit in process.pending:
                    if now_ns - max(unit.first_ns, unit.last_ns) > PENDING_NS and not process.concerns(unit):
                        self._give_up(process, unit)

    def flush(self) -> None:
        """Lets all requests go that ended: no more events will come."""
        while self._held:
            self._finish(self._held.popleft())

    def learn_file(self, gen: int, path: str, flags: int) -> None:
        """A file generation whose path was found in /proc: many requests may use it, as far as anybody knows."""
        file = self._named(path, flags)
        file.many = True
        self._keep(gen, file)

    def learn_cwd(self, tgid: int, path: str) -> None:
        """A target's working directory, against which it names files."""
        self._cwd[tgid] = path

    def learn_runtime(self, tgid: int, kind: int) -> None:
        """What runs in a target (abi.Runtime)."""
        if kind:
            self._process(tgid).runs("context" if kind == abi.Runtime.CPYTHON else "goroutine")

    def learn_uring(self, tgid: int) -> None:
        """A target has an io_uring ring: file work may go through it unseen."""
        self._process(tgid).uring = True

    def learn_hasher(self, tgid: int, hasher: integrity.Hasher) -> None:
        """What hashes in a target was found."""
        digests = self._process(tgid).digests
        digests.hasher = hasher
        digests.proven = hasher.proven
        digests.time = self._families.setdefault(hasher.family, digests.time)
        if len(self._families) > MAX_FAMILIES:
            self._families.pop(next(iter(self._families)))

    def learn_hashing(self, tgid: int, nbytes: int, ns: int, from_ns: int, until_ns: int) -> None:
        """A target's calls of its hash function took so long, between these two stamps."""
        process = self._processes.get(tgid)
        if process:
            process.digests.time.measured(nbytes, ns, from_ns, until_ns)

    def learn_probing(self, tgid: int, part: str, *, on: bool, at_ns: int) -> None:
        """The values of a target's digests are seen from then on, or not any more; or its calls are timed (`part`: value or time)."""
        process = self._processes.get(tgid)
        if process:
            process.digests.probing(part, on, at_ns)

    def unattributed_digests(self) -> int:
        """Digests that were no request's."""
        return self._digests_gone + sum(process.digests.unattributed for process in list(self._processes.values()))

    def inherit(self, tgid: int, parent: int) -> None:
        """A process was forked: it names files as its parent did, and runs the same."""
        self._cwd[tgid] = self._cwd_at(parent)
        old, new = self._process(parent), self._process(tgid)
        new.uring, new.mapped = old.uring, old.mapped
        new.runs(old.key_name)

    def forget_process(self, tgid: int) -> None:
        """A process ended; its number may be another's next."""
        self._cwd.pop(tgid, None)
        process = self._processes.get(tgid)
        if process:
            process.ended = True
            self._bury(tgid, process)

    def _bury(self, tgid: int, process: Process) -> None:
        """A process that ended is forgotten with its last request."""
        if process.ended and not process.lives:
            for unit in process.pending:
                self._give_up(process, unit)
            process.digests.expire(self.latest_ns + 1)
            self._digests_gone += process.digests.unattributed
            del self._processes[tgid]

    def _process(self, tgid: int) -> Process:
        process = self._processes.get(tgid)
        if process is None:
            process = self._processes[tgid] = Process(self.secret)
        return process

    def _cwd_at(self, tgid: int) -> str | None:
        if tgid not in self._cwd:
            self._cwd[tgid] = self._cwd_of(tgid)
        return self._cwd[tgid]

    def _named(self, path: str, flags: int) -> File:
        return File(self._classes.classify(path), bool(flags & O_DSYNC), path, (path,))

    def _keep(self, gen: int, file: File) -> None:
        self._files[gen] = file
        while len(self._files) > MAX_GENERATIONS:
            self._files.popitem(last=False)
            self.lost["evicted_file"] += 1

    def _request(self, rid: int, tgid: int) -> _Request:
        request = self._requests.get(rid)
        if request is None:
            # Its head was lost, or is being lost: what else is seen of it still counts.
            request = self._requests[rid] = _Request(Live(rid, tgid, 0, _NAMELESS, True))
            while len(self._requests) > MAX_REQUESTS:
                _, old = self._requests.popitem(last=False)
                self._process(old.live.tgid).leave(old.live)
                self.lost["evicted"] += 1
        return request

    def _resolve(self, tgid: int, dirfd: int, dirgen: int, raw: bytes) -> str:
        path = raw.decode("utf-8", "surrogateescape")
        if path.startswith("/"):
            return os.path.normpath(path) if "/." in path or "//" in path else path
        base = self._cwd_at(tgid) if dirfd == AT_FDCWD else self._files.get(dirgen, _UNKNOWN).path
        if base is None:
            self.lost["unnamed_path"] += 1
            return path
        return os.path.normpath(os.path.join(base, path))

    # --- requests ------------------------------------------------------------------------------------------------

    def _head(self, event: Any) -> None:
        piece = event.data[: event.n]
        if event.what == abi.Direction.RESPONSE:
            self._response_head(event, piece)
            return
        # A request begins when its head is complete; of one that never does, no end will tell.
        head = self._partial.pop(event.rid, b"") + piece
        if event.last:
            self._begin(event, head)
            return
        self._partial[event.rid] = head
        if len(self._partial) > MAX_PARTIAL_HEADS:
            self._partial.popitem(last=False)
            self.lost["partial_head"] += 1

    def _begin(self, event: Any, text: bytes) -> None:
        request = self._request(event.rid, event.tgid)
        live = request.live
        live.tgid, live.begun_ns, live.reader, live.read_key = event.tgid, event.ts, event.tid, event.key
        request.lost_files = event.lost_files
        self._hear_of_losses(event)
        if text:
            try:
                head = request.head = http1.parse_request(text, self._headers, self._parameters)
            except http1.Malformed:
                request.malformed = True
            else:
                request.route = route.classify(head.method, head.path, head.query, head.headers.get("x-artifact-version"))
                live.names = _names(head, request.route)
                live.declared = integrity.declared(self._declared, head, None)
                live.writes = head.method not in ("GET", "HEAD", "OPTIONS")
                if not ("transfer-encoding" in head.headers or head.headers.get("content-length", "0") != "0"):
                    live.received_ns, live.size = event.ts, 0
        self._process(event.tgid).enter(live)

    def _response_head(self, event: Any, piece: bytes) -> None:
        if 0 < event.status < 200:
            return  # 100 Continue is no answer
        request = self._request(event.rid, event.tgid)
        if not request.live.answered_ns:
            self._process(request.live.tgid).answers(request.live, event.tid, event.key, event.ts)
        request.response_head += piece

    def _body(self, event: Any) -> None:
        live = self._request(event.rid, event.tgid).live
        live.received_ns, live.size, live.print, live.printed = event.ts, event.bytes, event.print, _known(event.printed)

    def _end(self, event: Any) -> None:
        request = self._request(event.rid, event.tgid)
        request.end = event
        self._hear_of_losses(event)
        live = request.live
        live.ended_ns = max(event.end_ns, event.start_ns)
        live.received_ns, live.answered_ns = event.received_ns, event.answered_ns or live.answered_ns
        live.size, live.print, live.printed = event.bytes_in, event.print_in, _known(event.printed_in)
        live.sent, live.print_out, live.printed_out = event.bytes_out, event.print_out, _known(event.printed_out)
        live.alone = not event.flags & (abi.RequestFlag.INTERLEAVED | abi.RequestFlag.MOVED)
        process = self._process(live.tgid)
        process.ends(live)
        if process.pending:
            self._give(process.claim(live))
        process.digests.claim(live, (), process.key_name, (), last=False)
        aborted = event.what in (abi.EndOutcome.CLIENT_CLOSED, abi.EndOutcome.SERVER_CLOSED)
        if aborted or process.awaits(live) or process.digests.awaits(live):
            self._held.append(request)
            if len(self._held) > MAX_HELD:
                self._finish(self._held.popleft())
        else:
            self._finish(request)

    def _hear_of_losses(self, event: Any) -> None:
        """Where evidence was lost, a request may be in flight of which nothing is known, so that no other is the only one that fits."""
        if event.lost_files != self._lost_evidence:
            self._lost_evidence = event.lost_files
            self._blind_until_ns = event.ts + BLIND_NS

    # --- file work -----------------------------------------------------------------------------------------------

    def _open(self, event: Any) -> None:
        path = self._resolve(event.tgid, event.dirfd, event.dirgen, event.data[: event.n])
        file = self._named(path, event.flags)
        file.many = bool(event.flags & O_ACCMODE) and not event.flags & (os.O_EXCL | os.O_TRUNC | O_TMPFILE ^ os.O_DIRECTORY)
        file.writable = bool(event.flags & O_ACCMODE)
        self._keep(event.gen, file)
        if event.flags & O_TMPFILE == O_TMPFILE:
            _remember(self._by_fd, (event.tgid, event.fd), file)  # its name will come by way of its descriptor
        if event.flags & O_ACCMODE:
            _remember(self._by_path, path, file)
        # A directory that is opened to be listed costs time, but is no file that anybody wrote or read.
        opens = int(not event.flags & os.O_DIRECTORY or event.flags & O_TMPFILE == O_TMPFILE)
        opening = Unit(event.tgid, file, event.ts - event.ns, event.tid, event.key, event.rid, FileWork(opens=opens), event.ns)
        if event.what:
            opening.last_ns = event.ts
            self._own(event.rid, opening)
            return
        file.opener_key = event.key
        if file.many:
            opening.data_ns = opening.last_ns = event.ts  # it is done in one go, and so to be decided by itself
        else:
            file.unit = opening
        self._wait(opening)

    def _file(self, event: Any) -> None:
        file = self._files.get(event.gen)
        if file is None:
            file = File("other")
            self._keep(event.gen, file)
        if event.what:  # its last descriptor is closed
            self._files.pop(event.gen, None)
            file.closed = True
        if event.flags & abi.FileFlag.DRAINED:
            file.drained = True
        if event.what and file.owner > 0 and not file.unit and not event.flags & _APART and not (event.data_ns or event.syncs):
            self._closed_late(event, file)
            return
        alone = event.flags & _ALONE and file.own and file.own.rid == event.rid
        unit = file.own if alone else self._unit(event, file)
        assert unit is not None
        work = unit.work
        work.write_calls += event.write_calls
        work.write_bytes += event.write_bytes
        work.read_calls += event.read_calls
        work.read_bytes += event.read_bytes
        work.syncs += event.syncs
        if file.writes_sync:
            unit.sync_ns += event.write_ns
        else:
            unit.write_ns += event.write_ns
        unit.write_ns += event.other_ns
        unit.sync_ns += event.sync_ns
        unit.read_ns += event.read_ns
        unit.last_ns = max(unit.last_ns, event.last_ns)
        unit.data_ns = max(unit.data_ns, event.data_ns)
        if event.flags & abi.FileFlag.TIDS or event.tid != unit.tid:
            unit.threads = 2
        if event.flags & abi.FileFlag.KEYS or event.key != unit.key:
            unit.key = 0
        if event.flags & abi.FileFlag.RIDS or event.rid != unit.rid:
            unit.mixed = True
        if _known(event.printed) and not unit.printed:
            unit.print, unit.printed = event.print, event.printed
        if event.flags & abi.FileFlag.SAME_CALL:
            self._own(event.rid, unit, "same_call")
        elif event.flags & _ALONE:
            if not alone:
                self._own(event.rid, unit)
        elif file.closed or event.flags & _MANY:
            process = self._process(unit.tgid)
            if not process.concerns(unit):
                self._give_up(process, unit)

    def _unit(self, event: Any, file: File) -> Unit:
        """To which piece of work this belongs: a new one, or what is known of a file of one request."""
        flags = event.flags
        apart = flags & _APART
        if file.unit and not apart:
            unit = file.unit
            if not unit.last_ns:
                # So far it was only opened: who works on it is who counts.
                unit.tid, unit.key, unit.rid = event.tid, event.key, event.rid
            return unit
        unit = Unit(event.tgid, file, event.first_ns, event.tid, event.key, event.rid)
        unit.tokens = self._tokens.pop((event.gen, event.tid), [])
        if flags & _MANY:
            file.many = True
        if flags & _MANY and not flags & _ALONE:
            # What a thread sends in one go, it did in one go: one row is in the database's log and its index.
            before = self._flushed.get(event.tid)
            if before and event.ts - before[0] < FLUSH_NS:
                before[1].extend(unit.tokens)
                unit.tokens = before[1]
            self._flushed[event.tid] = event.ts, unit.tokens
            if len(self._flushed) > MAX_REQUESTS:
                self._flushed.clear()
        if not flags & (abi.FileFlag.SAME_CALL | _ALONE):
            if not apart:
                file.unit = unit
            self._wait(unit)
        return unit

    def _closed_late(self, event: Any, file: File) -> None:
        """The close of a file that was one request's, which may be over and gone: it took time, and says nothing new."""
        closing = Unit(event.tgid, file, event.first_ns, event.tid, write_ns=event.other_ns)
        request = self._requests.get(file.owner)
        if request:
            request.live.take(closing, "exact", "descriptor")
        else:
            self._nobodys(closing)

    def _own(self, rid: int, unit: Unit, evidence: str = "thread") -> None:
        """The kernel saw it: this work is that request's."""
        request = self._requests.get(rid)
        if request is None:
            self.lost["late_file"] += 1
            self._nobodys(unit)
            return
        request.live.take(unit, "exact", evidence)
        if evidence == "thread":
            unit.file.own = unit

    def _wait(self, unit: Unit) -> None:
        # Of other files only those count that may become storage yet, by another name.
        if unit.file.kind == "other" and (unit.file.many or not unit.file.writable):
            return
        process = self._process(unit.tgid)
        process.pending.add(unit)
        if len(process.pending) > MAX_PENDING:
            self.lost["evicted_work"] += 1
            self._give_up(process, process.pending.oldest())

    def _give_up(self, process: Process, unit: Unit) -> None:
        process.pending.discard(unit)
        if unit.file.unit is unit:
            unit.file.unit = None
        self._nobodys(unit)

    def _nobodys(self, unit: Unit) -> None:
        """Work that no request gets."""
        kind = unit.file.kind
        if kind == "other":
            return
        share = self.unattributed.setdefault(kind, Share())
        share.bytes += unit.bytes
        share.ns += unit.ns
        if kind == "storage" and unit.bytes:
            if len(self._untied) == MAX_UNTIED:
                self.lost["evicted_untied"] += 1
            self._untied.append((unit.first_ns, unit.until_ns, unit.bytes))

    def _token(self, event: Any) -> None:
        pieces = int.from_bytes(event.data[: event.n], "little")
        file = self._files.get(event.gen)
        if file and file.unit and not file.many:
            file.unit.tokens.append(pieces)
        else:
            _remember(self._tokens, (event.gen, event.tid), [*self._tokens.get((event.gen, event.tid), ()), pieces])

    def _path(self, event: Any) -> None:
        first = self._resolve(event.tgid, event.dirfd, event.dirgen, event.data[: event.n])
        if event.what == abi.PathCall.CHDIR:
            self._cwd[event.tgid] = first if first.startswith("/") else None
            return
        second = ""
        if event.n2:
            second = self._resolve(event.tgid, event.dirfd2, event.dirgen2, event.data[event.n : event.n + event.n2])
        known = self._moved(event, first, second) if second else self._by_path.get(first)
        if event.what == abi.PathCall.UNLINK:
            self._by_path.pop(first, None)
        alone = event.file_flags & _ALONE
        unit = (known.own if alone else known.unit) if known else None
        if unit and (not alone or unit.rid == event.rid):
            unit.write_ns += event.ns
            unit.last_ns = max(unit.last_ns, event.ts)
        else:
            file = known or self._touched(first, second)
            unit = Unit(event.tgid, file, event.ts - event.ns, event.tid, event.key, event.rid, write_ns=event.ns, last_ns=event.ts)
            unit.data_ns = event.ts
            if alone:
                self._own(event.rid, unit)
            else:
                self._wait(unit)
        if event.what == abi.PathCall.RENAME:
            unit.work.renames += 1

    def _moved(self, event: Any, first: str, second: str) -> File | None:
        """The file that got another name by this call, if it is known: by its name, or by its descriptor (O_TMPFILE and linkat)."""
        if not event.n:
            file = self._files.get(event.dirgen)
        elif first.startswith("/proc/"):
            parts = first.split("/")
            number = parts[-1] if len(parts) == 5 and parts[3] == "fd" else ""
            file = self._by_fd.get((event.tgid, int(number))) if number.isdecimal() else None
        else:
            file = self._by_path.get(first)
            if file and event.what == abi.PathCall.RENAME:
                del self._by_path[first]
        if file is None:
            return None
        file.path = second
        file.names = (*file.names[-1:], second)
        kind = self._classes.classify(second)
        if kind != "other":
            file.kind = kind
        if not file.closed:
            _remember(self._by_path, second, file)
        return file

    def _touched(self, first: str, second: str) -> File:
        """A file of which only the name is known."""
        kind = self._classes.classify(first)
        if second:
            to = self._classes.classify(second)
            kind = to if to != "other" else kind
        return File(kind, path=second or first, names=(first, second) if second else (first,), closed=True)

    def _unknown_fd(self, event: Any) -> None:
        found = self._path_of(event.tgid, event.fd)
        if found:
            self.learn_file(event.gen, *found)

    def _map(self, event: Any) -> None:
        file = self._files.get(event.gen)
        if file and file.kind == "storage":
            self._process(event.tgid).mapped = True

    def _digest(self, event: Any) -> None:
        name = integrity.ALGORITHMS.get(event.algorithm)
        if not name:
            return
        process = self._process(event.tgid)
        files = tuple(file for gen in {event.wrote, event.read} - {0} if (file := self._files.get(gen)))
        timed = _timed(event, process.digests)
        value = f"{name}:{event.data[: event.n].hex()}"
        seen = integrity.Seen(value, event.bytes, event.ts, event.tid, event.key, event.rid, event.ran_ns, files, timed)
        if process.digests.repeats(seen):
            return
        if event.what:
            request = self._requests.get(event.rid)
            if request:
                seen.evidence = "thread"
                request.live.digests.append(seen)
                return
        process.digests.wait(seen)

    # --- records -------------------------------------------------------------------------------------------------

    def _give(self, decisions: Iterable[tuple[Unit, Decision]]) -> None:
        for unit, decision in decisions:
            owners = decision.owners
            if unit.file.kind == "other" and decision.label != "exact":
                continue  # nobody asks whose it is
            if not owners:
                self._nobodys(unit)
            label = decision.label
            if label == "exact" and unit.first_ns < self._blind_until_ns:
                label = "inferred"
            for place, owner in enumerate(owners):
                part = unit if len(owners) == 1 else unit.share(len(owners), place)
                owner.take(part, label, decision.evidence)
            if label in ("inferred", "shared"):
                for other in decision.candidates:
                    other.doubts[unit.file.kind] = max(label, other.doubts.get(unit.file.kind, label), key=LABELS.index)
                    if label == "shared":
                        other.candidates.update(candidate.rid for candidate in decision.candidates)

    def _finish(self, request: _Request) -> None:
        event, live, head, found = request.end, request.live, request.head, request.route
        process = self._process(live.tgid)
        for piece, others in process.review(live):
            piece.label = "shared"
            for other in (live, *others):
                other.candidates.update(each.rid for each in (live, *others))
                other.doubts["storage"] = "shared"
        if process.pending:
            self._give(process.settle(live))
        digest = self._digest_of(request, process)
        self._requests.pop(event.rid, None)
        process.leave(live)
        self._bury(live.tgid, process)
        if head is None:
            self.lost["malformed_head" if request.malformed else "no_head"] += 1
        start, end = event.start_ns, max(event.end_ns, event.start_ns)
        works = {kind: FileWork() for kind in ("storage", "metadata", "other")}
        for piece in live.pieces:
            _add(works[piece.unit.file.kind], piece.unit.work)
            piece.unit.file.own = None  # else the two would keep each other until the garbage collector comes
        lost = max(event.lost, self._lost_evidence - request.lost_files if request.head else 0)
        untied = sum(size for first, last, size in self._untied if first < end and last > start)
        totals = _totals(event, live, digest.ns or 0)
        phases = _partition(totals, end - start)
        timed = bool(event.flags & abi.RequestFlag.QUEUE_SEEN)
        result = Request(
            id=_id(event.rid),
            conn=_id(event.conn),
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
            request_id=_request_id(head, request.response_head),
            status=event.status or None,
            bytes_in=event.bytes_in if event.framed else None,
            bytes_out=event.bytes_out,
            phases=phases,
            phase_totals=totals,
            queue_stages=_queue_stages(event),
            files=works["storage"],
            metadata_files=works["metadata"],
            other_files=works["other"],
            attribution=self._attribution(request, untied, lost),
            client_wait_ns=event.client_ns if timed else None,
            server_wait_ns=event.server_ns if timed else None,
            limited_by=_limit(event, phases) if timed else None,
            digest=digest,
            lost_events=lost,
        )
        if not untied and not lost and result.attribution.label == "exact":
            self._cover(process, result)
        self.records += 1
        self._sink(result)

    def _digest_of(self, request: _Request, process: Process) -> Digest:
        event, live, head = request.end, request.live, request.head
        if head and self._asks_response and not live.declared:
            live.declared = integrity.declared(self._declared, head, _response(request.response_head, self._response_headers))
        of_storage = [piece.unit for piece in live.pieces if piece.unit.file.kind == "storage" and piece.unit.work.read_bytes]
        read_back = [(unit.work.read_bytes, unit.until_ns if live.writes else unit.first_ns) for unit in of_storage]
        process.digests.claim(live, process.others(live), process.key_name, read_back, last=True)
        # 400 has other reasons, too; they are ruled out as far as the head tells.
        well_formed = head and all(head.headers.get(name) for name in _REQUIRED) and request.route.version
        answered = event.status == 400 and request.route.operation == "write" and well_formed and live.declared and live.received_ns
        seen = integrity.OfThread(Gaps(event.gap_ns, event.gap_bytes, event.gaps), event.hash_ns, event.hash_calls)
        return integrity.report(
            process.digests, live, request.route.operation, event.bytes_out, seen, read_back, answered_mismatch=bool(answered and live.size)
        )

    @staticmethod
    def _lacks_body(live: Live, request: _Request) -> bool:
        """Whether bytes of an artifact came or went, and no file of it was written or read as far as is known."""
        works = [piece.unit.work for piece in live.pieces if piece.unit.file.kind == "storage"]
        if live.writes:
            return bool(live.size) and not any(work.write_bytes for work in works)
        reads = request.route.operation == "read" and request.end.status in _SUCCESS
        return reads and bool(live.sent) and not any(work.read_bytes for work in works)

    def _attribution(self, request: _Request, untied: int, lost: int) -> Attribution:
        live = request.live
        by_label: dict[Label, Share] = {}
        evidence = set()
        for piece in live.pieces:
            unit, kind = piece.unit, piece.unit.file.kind
            if kind == "other":
                continue
            evidence.add(piece.evidence)
            label = "inferred" if lost and piece.label == "exact" else piece.label
            for share in (by_label.setdefault(label, Share()), self.attributed.setdefault((label, kind), Share())):
                share.bytes += unit.bytes
                share.ns += unit.ns
        label = max(by_label, key=LABELS.index, default=self._label_of_nothing(live, lost))
        if untied and not live.has("storage"):
            label = "unattributed"
        else:
            doubts = [doubt for kind, doubt in live.doubts.items() if kind != "other" and not live.has(kind)]
            label = max([label, *doubts], key=LABELS.index)
            if label == "exact" and self._lacks_body(live, request) and (live.left or self._process(live.tgid).unsure_during(live)):
                label = "inferred"  # of what somebody wrote or read meanwhile some may be its own
        names = tuple(name for name in EVIDENCE if name in evidence)
        candidates = tuple(_id(rid) for rid in sorted(live.candidates)) if label == "shared" else ()
        return Attribution(label, names or (("thread",) if live.alone else ()), untied, candidates, by_label)

    @staticmethod
    def _label_of_nothing(live: Live, lost: int) -> Label:
        """Of a request that did no file work, as far as was seen: nothing is exact, unless some of it got lost."""
        return "inferred" if lost else "exact"

    def _cover(self, process: Process, request: Request) -> None:
        """Bytes that came or went and for which no file work was seen: out of sight, not free.

        Other files count where they are enough for it: that is where all are, when no storage root is named.
        """
        files, others = request.files, request.other_files
        if request.status not in _SUCCESS:
            return
        # 200 to a Bucket's write says that the same was there already: nothing to write.
        writes = request.operation == "write" and request.status == 201
        writes = writes or (request.operation == "other" and request.method == "PUT")
        size_in, size_out = request.bytes_in or 0, request.bytes_out or 0
        if writes and not files.write_bytes and others.write_bytes < size_in:
            self._gap(process, request, "write", size_in)
        elif request.operation == "read" and not files.read_bytes and others.read_bytes < size_out:
            self._gap(process, request, "read", size_out)

    def _gap(self, process: Process, request: Request, direction: str, size: int) -> None:
        reason = "io_uring" if process.uring else "mmap" if process.mapped else "unseen"
        request.coverage_gaps = (reason,)
        # To open a file and to give it a size is not to write it.
        phase = f"storage_{direction}"
        hidden = request.phases.get(phase, 0)
        if hidden:
            phases = {name: ns for name, ns in request.phases.items() if name != phase}
            request.phases = phases | {"other": phases.get("other", 0) + hidden}
            request.phase_totals = {name: ns for name, ns in request.phase_totals.items() if name != phase}
        request.attribution.label = "unattributed"
        self.gap_bytes[reason, direction] = self.gap_bytes.get((reason, direction), 0) + size


def _remember(where: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    where[key] = value
    where.move_to_end(key)
    if len(where) > MAX_NAMES:
        where.popitem(last=False)


def _timed(event: Any, digests: integrity.Digests) -> Timed | None:
    """The time of a digest's calls, if all of them were timed.

    Go's are summed by goroutine, which may have hashed a little of something else besides, and are of whole blocks, with the padding.
    """
    nbytes, share = event.bytes, 1.0
    if event.timed_bytes < nbytes and digests.continues(event.tid, nbytes - event.timed_bytes):
        nbytes = event.timed_bytes
    elif event.timed_bytes != nbytes:
        padded = ((nbytes + 8) // 64 + 1) * 64
        if not padded <= event.timed_bytes <= 1.01 * padded:
            return None
        share = padded / event.timed_bytes
    return Timed(share * (event.ns + event.calls * digests.hasher.outside_ns), nbytes, event.calls) if event.calls else None


def _known(printed: int) -> int:
    """How many bytes a fingerprint is of; 0 where there is none."""
    return 0 if printed == abi.PRINT_UNKNOWN else printed


def _id(number: int) -> str:
    return f"{number:016x}"


def _names(head: http1.RequestHead, found: route.Route) -> Names:
    digest = (head.headers.get("x-artifact-digest") or head.query.get("digest") or "").lower().removeprefix("sha256:")
    known = _DIGEST.fullmatch(digest)
    return Names(found.artifact_id, found.version, digest if known else None, unquote(head.path))


def _add(total: FileWork, work: FileWork) -> None:
    total.opens += work.opens
    total.write_calls += work.write_calls
    total.write_bytes += work.write_bytes
    total.read_calls += work.read_calls
    total.read_bytes += work.read_bytes
    total.syncs += work.syncs
    total.renames += work.renames


def _request_id(head: http1.RequestHead | None, response_head: bytes) -> str | None:
    """The client's X-Request-ID, or else the one that the server made up and answered with."""
    given = head.headers.get("x-request-id") if head else None
    if given or b"x-request-id" not in response_head.lower():
        return given
    response = _response(response_head, http1.RESPONSE_HEADERS)
    return response.headers.get("x-request-id") if response else None


def _response(head: bytes, headers: Mapping[bytes, str]) -> http1.ResponseHead | None:
    try:
        return http1.parse_response(head, headers)
    except http1.Malformed:
        return None


def _named(declared: Sequence[str], where: str) -> dict[bytes, str]:
    """The names that are to be kept besides: headers are compared in lower case, parameters as they are."""
    names = [place.partition(":")[2] for place in declared if place.startswith(where + ":")]
    names = names if where == "query" else [name.lower() for name in names]
    return {name.encode(): name for name in names}


def _totals(event: Any, live: Live, hashing_ns: int) -> dict[str, int]:
    """Each phase's own time, ns; only those that occurred."""
    receive = event.recv_ns + event.wait_rx_ns
    totals = dict.fromkeys(("storage_sync", "storage_write", "storage_read", "metadata"), 0)
    meanwhile = hashing_ns  # and file work while its body was still coming: the client was not waited for then
    for piece in live.pieces:
        unit = piece.unit
        if unit.file.kind == "storage":
            totals["storage_sync"] += unit.sync_ns
            totals["storage_write"] += unit.write_ns
            totals["storage_read"] += unit.read_ns
        elif unit.file.kind == "metadata":
            totals["metadata"] += unit.ns
        if unit.first_ns < event.received_ns:
            meanwhile += unit.write_ns + unit.read_ns
    if event.flags & abi.RequestFlag.INTERLEAVED:
        receive += max(0, event.client_out_ns - meanwhile)
    totals |= {
        "digest": hashing_ns,
        "queue": max(0, event.first_read_ns - event.start_ns) if event.flags & abi.RequestFlag.QUEUE_SEEN else 0,
        "network_receive": receive,
        "network_send": event.send_ns + event.wait_tx_ns,
        "runqueue": event.runqueue_ns,
    }
    return {name: ns for name, ns in totals.items() if ns > 0}


def _limit(event: Any, phases: dict[str, int]) -> Limit | None:
    """Which took most of its time: the client, the storage, or the server with all the rest."""
    duration = event.end_ns - event.start_ns
    if duration <= 0:
        return None
    storage = sum(phases.get(name, 0) for name in ("storage_sync", "storage_write", "storage_read", "metadata"))
    client = min(duration, event.client_ns + phases.get("network_send", 0))
    took: dict[Limit, int] = {"client": client, "storage": storage, "server": max(0, duration - client - storage)}
    return max(took, key=lambda name: took[name])


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

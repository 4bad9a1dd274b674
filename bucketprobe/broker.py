# SPDX-License-Identifier: Apache-2.0
"""The privileged half: loads and attaches the probes, finds the targets, names their files. Run as `python -m bucketprobe.broker FD`.

It lives as long as the agent does: the probes hang on its descriptors, so whichever of the two ends, all is detached. It reads
no byte that a client of the service sent; it answers only its agent, over the socket that it was started with.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from bucketprobe import abi, bpf, program, runtimes, target, wire
from bucketprobe.config import Settings
from bucketprobe.errors import BucketprobeError
from bucketprobe.hashing import Hashing
from bucketprobe.stats import read_stats

#: How often the targets are looked for again: while there is none, and otherwise.
SEARCH_SECONDS, REVIEW_SECONDS = 1.0, 30.0
#: How often a target is asked what runs in it, and how many times, before it counts as nothing of note.
SETTLE_SECONDS, SETTLE_TRIES = 1.0, 120
#: How long that may take: some milliseconds, and a tenth of a second for the largest.
LAYOUT_SECONDS = 2.0
#: How long descriptors of processes that are gone may stay in the map.
SWEEP_SECONDS = 10.0
#: What a file takes in a message besides its path, at most, in bytes.
FILE_BYTES = 64

#: Generations that the broker gives have this bit; the kernel's, made from its clock, never reach it.
_GENERATION = 1 << 63


#: Generation, descriptor, path, flags.
OpenFile = tuple[int, int, str, int]


class Broker:
    """Holds the probes for one agent. Raises BucketprobeError where they cannot be attached."""

    def __init__(self, settings: Settings, agent: socket.socket) -> None:
        self._settings = settings
        self._agent = agent
        self._known: dict[int, int | None] = {}  # tgid -> start time
        self._gone: set[int] = set()
        self._unsettled: dict[int, tuple[int | None, int]] = {}  # tgid -> start time, how often to look again what runs in it
        self._generations = 0
        # Of fingerprints: odd, so that multiplying by it loses nothing. The agent needs them to look names up; nobody else does.
        self._secret = {place: secrets.randbits(64) | 1 for place in (abi.Config.SECRET, abi.Config.SECRET_2)}
        programs = program.compiled(settings.cache_dir, self._log)
        offsets = program.kernel_offsets(settings.cache_dir, self._log)
        sizes = {"events": settings.ring_bytes, "conns": settings.max_connections}
        self._probes = program.load(programs, offsets, sizes)
        self._maps = self._probes.maps
        rows = next(m for m in abi.MAPS if m.name == "targets").entries
        self._targets = mmap.mmap(self._maps["targets"], rows * 64)
        self._set_config(abi.Config.HEAD_BYTES, settings.head_bytes)
        for place in (abi.Config.SECRET, abi.Config.SECRET_2):
            self._set_config(place, self._secret[place])
        self._set_config(abi.Config.WATCH_EXEC, int(settings.target.asks_on_exec))
        for port in settings.target.ports:
            self._serve(port, abi.Port.CONFIGURED)
        self._hashing: Hashing | None = None
        if settings.digest.mode != "off":
            self._hashing = Hashing(settings.digest, settings.user, self._maps, self._probes.uprobes, self._tell)
            self._hashing.start()

    def run(self) -> None:
        """Serves the agent until it is gone."""
        try:
            self._serve_agent()
        finally:
            if self._hashing:
                self._hashing.detach()  # all at once; the end of the process would close one after the other

    def _serve_agent(self) -> None:
        self._search()
        wire.send(
            self._agent,
            {
                "op": "ready",
                "missing": self._probes.missing,
                "ring_bytes": self._settings.ring_bytes,
                "secret": self._secret[abi.Config.SECRET],
            },
            (self._maps["events"], self._maps["stats"]),
        )
        poll = select.poll()
        poll.register(self._agent, select.POLLIN)
        search_at = sweep_at = settle_at = 0.0
        while True:
            if poll.poll(1000):
                received = wire.receive(self._agent)
                if received is None:
                    return
                self._answer(received[0])
            now = time.monotonic()
            if now >= search_at:
                self._search()
                search_at = now + (REVIEW_SECONDS if self._known else SEARCH_SECONDS)
            if self._unsettled and now >= settle_at:
                for tgid in list(self._unsettled):
                    self._settle(tgid)
                settle_at = now + SETTLE_SECONDS
            if self._gone and now >= sweep_at:
                self._sweep()
                sweep_at = now + SWEEP_SECONDS

    def _tell(self, message: wire.Message) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever reads for the agent sees that it is gone
            wire.send(self._agent, message)

    def _log(self, text: str) -> None:
        wire.send(self._agent, {"op": "log", "text": text})

    def _set_config(self, place: abi.Config, value: int) -> None:
        bpf.map_update(self._maps["config"], struct.pack("=I", place), struct.pack("=Q", value))

    def _serve(self, port: int, bit: abi.Port) -> None:
        key = struct.pack("=I", port)
        before = bpf.map_lookup(self._maps["ports"], key, 4)
        value = (struct.unpack("=I", before)[0] if before else 0) | bit
        bpf.map_update(self._maps["ports"], key, struct.pack("=I", value))

    def _answer(self, message: wire.Message) -> None:
        tgid = int(message.get("tgid", 0))
        match message["op"]:
            case "exec":
                self._executed(tgid)
            case "process":
                self._add(tgid, message["why"])
            case "fork":
                if self._targets[tgid] == 1:  # what ran in its parent is not known, either
                    self._unsettled[tgid] = target.start_time(tgid), SETTLE_TRIES
                if self._hashing:
                    self._hashing.watch(tgid)
            case "gone":
                self._gone.add(tgid)
                self._known.pop(tgid, None)
                if self._hashing:
                    self._hashing.forget(tgid)
            case "cwd":
                wire.send(self._agent, {"op": "cwd", "found": target.cwd(tgid)})
            case "path":
                wire.send(self._agent, {"op": "path", "found": self._path(tgid, int(message["fd"]))})
            case "reopen":
                self._reopen()
            case "detach":
                self._probes.detach()
                if self._hashing:
                    self._hashing.detach()
                wire.send(self._agent, {"op": "detach"})
            case "stats":
                wire.send(self._agent, {"op": "stats", "values": read_stats(self._maps["stats"])})

    def _search(self) -> None:
        for found in target.find(self._settings.target):
            if found.tgid not in (os.getpid(), os.getppid()) and self._known.get(found.tgid, -1) != found.start_time_ticks:
                self._add(found.tgid, found.why)

    def _executed(self, tgid: int) -> None:
        """A process runs another program: it may be a target now, and one that was is still."""
        why = target.matches(self._settings.target, tgid) or ("ran another program" if tgid in self._known else None)
        if why:
            self._add(tgid, why)

    def _add(self, tgid: int, why: str) -> None:
        """Makes a process a target, its open files known first."""
        if tgid in (os.getpid(), os.getppid()):
            return
        start = target.start_time(tgid)
        if start is None:
            return
        self._gone.discard(tgid)
        self._known[tgid] = start
        files = list(self._open_files(tgid))
        # The names go first: the kernel speaks of a generation as soon as it is in the map.
        wire.send(self._agent, {"op": "process", "tgid": tgid, "why": why, "cwd": target.cwd(tgid)})
        if target.has_uring(tgid):
            wire.send(self._agent, {"op": "uring", "tgid": tgid})
        for batch in _batches(files):
            wire.send(self._agent, {"op": "files", "tgid": tgid, "files": batch})
        for gen, fd, _, _ in files:
            value = bytes(abi.FdEntry(object=gen, kind=abi.FileKind.FILE, many=abi.FileUse.MANY))
            with suppress(OSError):  # the kernel met it first, or has no room: it then asks by itself, or counts it
                bpf.map_update(self._maps["fds"], struct.pack("=Q", tgid << 32 | fd), value, bpf.NOEXIST)
        self._targets[tgid] = 1
        self._unsettled[tgid] = start, SETTLE_TRIES
        self._settle(tgid)
        if self._hashing:
            self._hashing.watch(tgid)

    def _settle(self, tgid: int) -> None:
        """Finds out what runs in a target. A process that has only just begun may not show it yet, so it is asked again."""
        start, tries = self._unsettled.pop(tgid)
        if start is None or target.start_time(tgid) != start:
            return
        found = _layout(tgid)
        if found is None:
            self._log(f"pid {tgid} does not let its memory be read: its tasks are not told apart")
            return
        if found.kind is runtimes.Kind.NONE:
            if tries:
                self._unsettled[tgid] = start, tries - 1
            return
        if found.member:
            entry = bytes(abi.LayoutEntry(found.slot, found.member))
            bpf.map_update(self._maps["layouts"], struct.pack("=I", tgid), entry)
        self._targets[tgid] = 1 | found.kind << 1
        wire.send(self._agent, {"op": "runtime", "tgid": tgid, "kind": int(found.kind), "detail": found.detail})

    def _open_files(self, tgid: int) -> Iterator[OpenFile]:
        """A process's open files and directories: (generation, fd, path, flags). Ports that it listens on are noted."""
        for opened in target.open_files(tgid):
            if opened.state == "LISTEN" and opened.local_port:
                self._serve(opened.local_port, abi.Port.SERVED)
            if opened.path is not None and opened.kind in ("file", "dir"):
                self._generations += 1
                yield _GENERATION | self._generations, opened.fd, opened.path, opened.flags

    @staticmethod
    def _path(tgid: int, fd: int) -> tuple[str, int] | None:
        try:
            path = os.readlink(f"/proc/{tgid}/fd/{fd}")
            with open(f"/proc/{tgid}/fdinfo/{fd}", encoding="ascii") as info:
                flags = next((int(line.split()[1], 8) for line in info if line.startswith("flags:")), 0)
        except (OSError, ValueError):
            return None
        return (path, flags) if path.startswith("/") else None

    def _reopen(self) -> None:
        from bucketprobe.exporters.jsonl import open_records

        assert self._settings.records is not None
        try:
            fd = open_records(self._settings.records)
        except BucketprobeError as error:
            self._log(str(error))
            return
        wire.send(self._agent, {"op": "records"}, (fd,))
        os.close(fd)

    def _sweep(self) -> None:
        """Forgets the descriptors of processes that are gone; a number that lives again is another process's."""
        gone = {tgid for tgid in self._gone if target.start_time(tgid) is None}
        for tgid in gone:
            self._targets[tgid] = 0
        self._gone.clear()
        entries = next(m for m in abi.MAPS if m.name == "fds").entries
        for key in list(bpf.map_keys(self._maps["fds"], 8, entries)):
            if struct.unpack("=Q", key)[0] >> 32 in gone:
                bpf.map_delete(self._maps["fds"], key)


def _layout(tgid: int) -> runtimes.Layout | None:
    """What runs in a process; None where it makes whoever reads its memory wait (userfaultfd(2) can), which must not be us."""
    found: list[runtimes.Layout] = []
    asker = threading.Thread(target=lambda: found.append(runtimes.layout(tgid)), daemon=True)
    asker.start()
    asker.join(LAYOUT_SECONDS)
    return found[0] if found else None


def _batches(files: list[OpenFile]) -> Iterator[list[OpenFile]]:
    """As many files for each message as fit it, whatever their paths are made of: JSON takes up to six bytes for one of theirs."""
    batch: list[OpenFile] = []
    room = 0
    for file in files:
        size = FILE_BYTES + 6 * len(os.fsencode(file[2]))
        if size > room:
            if batch:
                yield batch
            batch, room = [], wire.MAX_MESSAGE - FILE_BYTES
        batch.append(file)
        room -= size
    if batch:
        yield batch


def main() -> int:
    """Talks over the descriptor given as the only argument: first come the settings, then the agent's questions."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the agent, whose end is ours
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    agent = socket.socket(fileno=int(sys.argv[1]))
    received = wire.receive(agent)
    if received is None:
        return 1
    try:
        Broker(Settings.from_dict(received[0]), agent).run()
    except BucketprobeError as error:
        wire.send(agent, {"op": "failed", "text": str(error), "exit_code": error.exit_code})
        return error.exit_code
    except (BrokenPipeError, ConnectionResetError):
        pass  # the agent is gone, and with us go the probes
    return 0


if __name__ == "__main__":
    sys.exit(main())

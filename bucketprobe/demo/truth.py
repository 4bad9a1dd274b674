# SPDX-License-Identifier: Apache-2.0
"""What the reference Bucket writes down about each request: the truth that an observer is checked against.

One JSON line per request. All times are CLOCK_MONOTONIC in ns.

    request_id, method, target_path, status, outcome    null where the request did not get that far
    pid, tid                                            who sent the answer's last byte
    bytes_in, bytes_out                                 of the bodies
    accept_ns, begin_ns, end_ns                         the connection's accept, the read of the first byte, the last send
    steps           per step: the application's time around its calls, their bytes and their number
    files           the system calls on data files and temporary files that succeeded
    metadata_files  the same for JSON sidecars; null where the metadata is in SQLite, whose calls are its own

and, as more fields, what a server that is built upon this one has noted.

The steps are digest, receive, send; open, close, storage_write, storage_sync, storage_read, mkdir, rename, unlink on data
files, temporary files and their folders; and metadata, which is all of these calls on sidecars and their folders, or all
that SQLite does. A folder that is opened to be listed is timed and not counted.

A step's time is taken by the thread that makes the call, just before and just after it. So it includes the wait for a CPU
and for Python's interpreter lock after the call; the way to a thread pool and back is not in it. What an event loop awaits
(`receive`, `send`, and `storage_read` of a sendfile) lasts from the first attempt until the task goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


@dataclass(slots=True)
class FileWork:
    """System calls that succeeded, under the names that a bucketprobe record uses. A read at the end of a file is one."""

    opens: int = 0
    write_calls: int = 0
    write_bytes: int = 0
    read_calls: int = 0
    read_bytes: int = 0
    syncs: int = 0
    renames: int = 0


class Trace:
    """Time, bytes and calls of each step of one request. Each lap runs from the last mark or lap until now.

    Threads may take turns in it, but only one at a time may measure; `add` alone may come in between.
    """

    __slots__ = ("_last_ns", "metadata_files", "notes", "steps")

    def __init__(self) -> None:
        self._last_ns = 0
        self.steps: dict[str, list[int]] = {}
        self.metadata_files = FileWork()
        self.notes: dict[str, object] = {}

    def mark(self) -> None:
        self._last_ns = time.monotonic_ns()

    def lap(self, step: str, size: int = 0, calls: int = 1) -> None:
        now = time.monotonic_ns()
        self.add(step, now - self._last_ns, size, calls)
        self._last_ns = now

    def add(self, step: str, ns: int, size: int, calls: int = 1) -> None:
        total = self.steps.setdefault(step, [0, 0, 0])
        total[0] += ns
        total[1] += size
        total[2] += calls

    def timed(self, step: str, call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Make one call as one lap. Where it raises there is none: only calls that succeed are counted."""
        self.mark()
        result = call(*arguments)
        self.lap(step)
        return result

    def files(self) -> FileWork:
        """The calls on data and temporary files."""
        none = [0, 0, 0]
        writes, reads = self.steps.get("storage_write", none), self.steps.get("storage_read", none)
        return FileWork(
            opens=self.steps.get("open", none)[2],
            write_calls=writes[2],
            write_bytes=writes[1],
            read_calls=reads[2],
            read_bytes=reads[1],
            syncs=self.steps.get("storage_sync", none)[2],
            renames=self.steps.get("rename", none)[2],
        )


class NoTrace(Trace):
    """Measures no time, for a server without a truth file."""

    def mark(self) -> None:
        pass

    def lap(self, step: str, size: int = 0, calls: int = 1) -> None:
        pass

    def add(self, step: str, ns: int, size: int, calls: int = 1) -> None:
        pass


class TruthLog:
    """Appends one JSON line per request. One write(2) with O_APPEND each, so that processes can share the file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, record: dict[str, object]) -> None:
        os.write(self._fd, json.dumps(record).encode() + b"\n")

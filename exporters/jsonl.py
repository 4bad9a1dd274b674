# SPDX-License-Identifier: Apache-2.0
"""Finished requests as JSON lines, to a file or to standard output.

Whoever reads the output sees whole lines. What could not be written stays in a bounded buffer and is tried again; past
the buffer, records are counted as lost, by cause. Nothing here raises once the output is open.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable
from contextlib import suppress

import orjson

from bucketprobe.errors import UsageError
from bucketprobe.model import Request

#: Why a record was lost: the reader is too slow; the disk (or quota) is full; the write failed otherwise; the reader is
#: gone, or the agent ended first; the record holds text that is not Unicode.
CAUSES = ("backlog", "no_space", "io_error", "closed", "unencodable")

#: Bytes of records that wait for an output that does not take them.
MAX_BUFFER = 1 << 20

#: How long a failed output is left alone, and how long `close` waits for a slow reader, in seconds.
_RETRY_SECONDS = 1.0
_CLOSE_SECONDS = 1.0

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READER_GONE = (errno.EPIPE, errno.ECONNRESET)


def open_records(path: str) -> int:
    """A file descriptor to append records to `path`, or to standard output for `-`. The caller owns it.

    The file is made with mode 0640 where there is none. A symbolic link is refused, since this runs with privileges that
    whoever planted the link may lack. Raises UsageError.
    """
    try:
        if path == "-":
            return _own_stdout()
        # O_NONBLOCK for a FIFO: opening it would wait for a reader, and writing to it for a slow one.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, 0o640)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        remedy = "name a file in an existing folder, or - for standard output"
        raise UsageError(f"Cannot write records to {path} ({reason}); {remedy}.") from error
    _end_torn_line(fd)
    return fd


def _own_stdout() -> int:
    """Standard output, where possible with file status flags of our own: those of a pipe or terminal are shared with
    whoever else has it, who would not expect O_NONBLOCK."""
    mode = os.fstat(1).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with suppress(OSError):
            return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(1)


def _end_torn_line(fd: int) -> None:
    """A crash of the host may have cut the last line short; the next record must not be glued to it."""
    size = os.fstat(fd).st_size
    if not size:
        return
    with suppress(OSError):
        # By way of /proc, so that it is the same file whatever happened to its name.
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            last = os.pread(reader, 1, size - 1)
        finally:
            os.close(reader)
        if last != b"\n":
            os.write(fd, b"\n")


class JsonLines:
    """Writes to `fd`, which it owns from then on; `name` is what messages call it. For one thread.

    `written` counts records whose line is wholly out, `lost` the others by cause (CAUSES); the rest is in the buffer.
    `log` gets one sentence when writing starts to fail, and one when it works again. `clock`: monotonic seconds.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        log: Callable[[str], None],
        max_buffer: int = MAX_BUFFER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._log = log
        self._max_buffer = max_buffer
        self._clock = clock
        self._buffer = bytearray()
        #: Bytes of the buffer's first line that are out already; the whole line stays in the buffer until its end is out.
        self._out = 0
        #: The cause (one of CAUSES) that records are lost by while the output fails, else empty.
        self._trouble = ""
        self._lost_before_trouble = 0
        self._retry_at = 0.0
        self.ended = False
        self.written = 0
        self.lost = dict.fromkeys(CAUSES, 0)
        self._adopt(fd)

    def _adopt(self, fd: int) -> None:
        self._fd = fd
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._poll = select.poll()
        if not self._regular:
            self._poll.register(fd, select.POLLOUT)

    @property
    def pending(self) -> int:
        """Records in the buffer."""
        return self._buffer.count(b"\n")

    def write(self, request: Request) -> None:
        """Take one record; it is out after a `flush`, which this calls only when the buffer is full."""
        if self.ended:
            self.lost["closed"] += 1
            return
        try:
            line = orjson.dumps(request.record(), option=orjson.OPT_APPEND_NEWLINE)
        except TypeError:
            self.lost["unencodable"] += 1
            return
        if len(self._buffer) + len(line) > self._max_buffer:
            self.flush()
        if self.ended:
            self.lost["closed"] += 1
        elif len(self._buffer) + len(line) > self._max_buffer:
            self.lost[self._trouble or "backlog"] += 1
        else:
            self._buffer += line

    def flush(self) -> None:
        """Write what the output takes without waiting. After a failure, not before a second has passed."""
        if self._buffer and not (self._trouble and self._clock() < self._retry_at):
            self._drain(wait_ms=0)

    def reopen(self, fd: int) -> None:
        """Go on in `fd` (log rotation; it is owned from then on). What the old output still takes goes there first."""
        self._drain(wait_ms=0)
        os.close(self._fd)
        self._adopt(fd)
        self._out = 0
        self.ended = False
        self._retry_at = 0.0

    def close(self) -> None:
        """Write what is left, waiting at most a second for a slow reader; the rest is lost. No use after this."""
        self._drain(wait_ms=int(_CLOSE_SECONDS * 1000))
        self._give_up(self._trouble or "closed")
        os.close(self._fd)

    def _drain(self, wait_ms: int) -> None:
        deadline = self._clock() + wait_ms / 1000
        try:
            while self._buffer:
                left_ms = max(0, round((deadline - self._clock()) * 1000))
                if not self._regular and not self._poll.poll(left_ms):
                    return
                self._put()
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(error)
            return
        if self._trouble:
            self._log(f"Records go to {self._name} again; {sum(self.lost.values()) - self._lost_before_trouble} were lost meanwhile.")
            self._trouble = ""

    def _put(self) -> None:
        """One write, and the accounts of it."""
        with memoryview(self._buffer) as view:
            self._out += os.write(self._fd, view[self._out : self._piece_end()])
        whole = self._buffer.rfind(b"\n", 0, self._out) + 1
        self.written += self._buffer.count(b"\n", 0, whole)
        del self._buffer[:whole]
        self._out -= whole

    def _piece_end(self) -> int:
        """Where the next write ends. A pipe that polls as writable takes PIPE_BUF bytes, all or none: by whole lines, so that
        the agent's end leaves none torn, except one that is longer than that."""
        if self._regular:
            return len(self._buffer)
        limit = self._out + select.PIPE_BUF
        return self._buffer.rfind(b"\n", self._out, limit) + 1 or limit

    def _failed(self, error: OSError) -> None:
        if error.errno in _READER_GONE:
            self._log(f"The reader of {self._name} is gone; no more records are written there, the agent goes on.")
            self._give_up("closed")
            return
        if self._regular and self._out:
            self._take_back()
        if not self._trouble:
            self._lost_before_trouble = sum(self.lost.values())
            self._log(f"Cannot write records to {self._name} ({error.strerror}); the latest are kept and tried again each second.")
        self._trouble = "no_space" if error.errno in _NO_SPACE else "io_error"
        self._retry_at = self._clock() + _RETRY_SECONDS

    def _take_back(self) -> None:
        """Cut a torn line off the file again. Where that is refused (an append-only file), its rest is written next."""
        with suppress(OSError):
            size = os.fstat(self._fd).st_size
            if size >= self._out:
                os.ftruncate(self._fd, size - self._out)
            # A shell's `>` does not append: without this the next line would leave a hole.
            os.lseek(self._fd, 0, os.SEEK_END)
            self._out = 0

    def _give_up(self, cause: str) -> None:
        self.lost[cause] += self.pending
        self._buffer.clear()
        self._out = 0
        self._trouble = ""
        self.ended = True

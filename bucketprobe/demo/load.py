# SPDX-License-Identifier: Apache-2.0
"""Real clients of a Bucket v1 server: uploads, reads and the mistakes that clients make, over keep-alive connections.

    python -m bucketprobe.demo.load --port 8080 --connections 32 --requests 10000 --log client.jsonl

Each connection has a thread, and each thread what it stored, its own random numbers and so, for a given seed, its own
fixed sequence of requests. The first request of a thread is always an upload, so that there is something to read.

With `--log FILE` each request becomes one JSON line. Its times are CLOCK_MONOTONIC in ns, the clock that a server and a
kernel on the same host use, too: `connect_ns` and `connected_ns` before and after connect(2) for the first request of a
connection; `send_ns` and `sent_ns` before and after the call that sends the head (and, in one piece with it, a short body);
`done_ns` after the answer's last byte was read. Two are the kernel's own, null where it gave none: `tx_ns` when the last byte
of that first call left for the network device, `rx_ns` when the segment with the answer's last byte came from it. curl does
not tell its own times, so a request of kind `curl_…` has only `connect_ns`, which is the start of curl, and `done_ns`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bucketprobe.errors import BucketprobeError, UsageError

BLOCK = 1 << 20
STEP = 1 << 16
KEY_BYTES = 16
SMALL = 1 << 15  # with its head in one segment of the loopback device (65,483 bytes), so that one stamp tells all
RECEIVE = 1 << 18
TIMEOUT_S = 60
PACE_S = 0.005
PACES = 4
REPORT_S = 0.5
OFFSET_TRIES = 5

#: include/uapi/asm-generic/socket.h and linux/net_tstamp.h; the socket module has none of them.
SO_TIMESTAMPING = 37
SO_RCVBUFFORCE = 33
STAMP_SENT = 1 << 1
STAMP_RECEIVED = 1 << 3
REPORT_STAMPS = 1 << 4
STAMP_WITHOUT_DATA = 1 << 11
STAMPS = struct.Struct("6l")  # struct scm_timestamping: three timespecs, the first is the kernel's
STAMP_ROOM = socket.CMSG_SPACE(STAMPS.size)
QUEUE_ROOM = STAMP_ROOM + socket.CMSG_SPACE(64)  # and a sock_extended_err with an address
LOG_LINES = 64
STORED_LIMIT = 1000
VERSIONS_EACH = 4
BUCKETS = ("production", "staging", "user-1", "user-2", "user-3", "user-4", "user-5", "user-6")

#: What is asked, and how often in a hundred.
WRITES = {"put": 90, "put_again": 4, "put_conflict": 3, "put_bad_digest": 3}
READS = {"get": 80, "get_missing": 5, "get_mismatch": 5, "metadata": 5, "versions": 5}
#: How an upload is sent.
MANNERS = {"plain": 83, "chunked": 10, "expect": 5, "paced": 2}

Progress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to do. It ends after `requests` or `seconds`, whichever comes first; sizes are log-uniform, in bytes.

    `curl_every`: each so many-th request of a thread is made by a curl process. `rate`: requests per second of all
    connections together at most. `log`: the file that gets a line per request, appended.

    `same_head`: how many bytes all artifacts have in common at their beginning; where they are many or none is asked for, it
    costs a digest over the whole artifact. None: artifacts beyond 64 KiB have their whole steps in common, shorter ones nothing.
    `paced_share`: which share of the uploads, whatever their size, is sent in parts with pauses. None: few, and small ones.
    `receive_buffer`: how many bytes of an answer the kernel takes before the client reads them; without a limit for root alone.
    """

    port: int
    host: str = "127.0.0.1"
    connections: int = 32
    processes: int = 1
    requests: int | None = None
    seconds: float | None = None
    put_share: float = 0.7
    min_bytes: int = 1024
    max_bytes: int = 8 << 20
    seed: int = 1
    curl_every: int | None = None
    rate: float | None = None
    same_head: int | None = None
    paced_share: float | None = None
    receive_buffer: int | None = None
    log: Path | None = None


@dataclass(slots=True)
class LoadResult:
    """What came of it. `bytes_in` and `bytes_out` are entity bytes as the server sees them; latencies are in ms.

    `unexpected`: answers with another status than the contract has for the request; `corrupt`: reads whose bytes did not
    have their digest; `errors`: requests without an answer.
    """

    requests: int
    errors: int
    unexpected: int
    corrupt: int
    by_status: dict[tuple[str, int | None], int]
    by_kind: dict[str, int]
    bytes_in: int
    bytes_out: int
    elapsed_s: float
    requests_per_s: float
    bytes_per_s: float
    latency_ms: dict[str, float]

    @property
    def clean(self) -> bool:
        return not (self.errors or self.unexpected or self.corrupt)

    def record(self) -> dict[str, object]:
        """As JSON has it: the keys of `by_status` become `PUT 201`."""
        return {**asdict(self), "by_status": {status_text(key): count for key, count in sorted(self.by_status.items(), key=str)}}


def status_text(key: tuple[str, int | None]) -> str:
    return f"{key[0]} {'no answer' if key[1] is None else key[1]}"


# --- bytes that are cheap to make and to digest ---


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of an artifact, as a recipe: whole steps of the block, a key, and the block's beginning again."""

    size: int
    key: bytes
    digest: str


class Block:
    """One random block, repeated; its SHA-256 is known after each 64 KiB, so that only an artifact's end is ever hashed.

    The key that makes contents differ therefore comes after the last whole step, and not first, unless `same_head` says after
    how many bytes it comes.
    """

    def __init__(self, seed: int, max_bytes: int, same_head: int | None = None) -> None:
        self._same_head = same_head
        self._view = memoryview(random.Random(seed).randbytes(BLOCK))
        state = hashlib.sha256()
        self._states = [state.copy()]
        for step in range(max_bytes // STEP):
            start = step * STEP % BLOCK
            state.update(self._view[start : start + STEP])
            self._states.append(state.copy())

    def content(self, size: int, key: bytes) -> Content:
        """`key`: 16 bytes; an artifact shorter than that gets only their beginning."""
        head = self._head(size)
        known = head // STEP if head % STEP == 0 else 0
        state = self._states[known].copy()
        for piece in self._end(size, head, key) if known else self._pieces(size, head, key):
            state.update(piece)
        return Content(size, key, f"sha256:{state.hexdigest()}")

    def pieces(self, content: Content) -> Iterator[bytes | memoryview]:
        yield from self._pieces(content.size, self._head(content.size), content.key)

    def _head(self, size: int) -> int:
        """How many bytes come before the key."""
        return steps_of(size) * STEP if self._same_head is None else min(size, self._same_head)

    def _pieces(self, size: int, head: int, key: bytes) -> Iterator[bytes | memoryview]:
        yield from self._repeated(head)
        yield from self._end(size, head, key)

    def _end(self, size: int, head: int, key: bytes) -> Iterator[bytes | memoryview]:
        yield key[: size - head]
        yield from self._repeated(size - head - KEY_BYTES)

    def _repeated(self, size: int) -> Iterator[memoryview]:
        while size > 0:
            piece = self._view[: min(size, BLOCK)]
            size -= len(piece)
            yield piece


def steps_of(size: int) -> int:
    return max(0, size - KEY_BYTES) // STEP


# --- what to ask ---


@dataclass(frozen=True, slots=True)
class Stored:
    """A version that the server acknowledged."""

    path: str
    version: str
    content: Content


@dataclass(frozen=True, slots=True)
class Plan:
    """One request to make. `digest`: what the answer's bytes must have, where they are an artifact's."""

    kind: str
    method: str
    target: str
    expected_status: int
    headers: tuple[tuple[str, str], ...] = ()
    content: Content | None = None
    manner: str = "plain"
    digest: str | None = None
    stores: Stored | None = None


class Planner:
    """Decides what one thread asks next."""

    def __init__(self, options: LoadOptions, block: Block, name: str, seed: str) -> None:
        self._options = options
        self._block = block
        self._name = name
        self._random = random.Random(seed)
        self._uploads = 0
        self._stored: list[Stored] = []

    def next(self) -> Plan:
        if not self._stored:
            return self._put("put")
        if self._random.random() < self._options.put_share:
            return self._put(self._choose(WRITES))
        return self._get(self._choose(READS), self._random.choice(self._stored))

    def stored(self, stored: Stored) -> None:
        """The server acknowledged it; from now on it may be read. Only so many are kept in mind."""
        if len(self._stored) < STORED_LIMIT:
            self._stored.append(stored)
        else:
            self._stored[self._random.randrange(STORED_LIMIT)] = stored

    def _put(self, kind: str) -> Plan:
        if kind == "put_again":
            stored = self._random.choice(self._stored)
            return self._upload(kind, stored.path, stored.version, stored.content, 200)
        if kind == "put_conflict":
            stored = self._random.choice(self._stored)
            content = self._content()
            same = content.digest == stored.content.digest
            return self._upload(kind, stored.path, stored.version, content, 200 if same else 409)
        number, part = divmod(self._uploads, VERSIONS_EACH)
        self._uploads += 1
        path, version = f"/v1/{BUCKETS[number % len(BUCKETS)]}/a-{self._name}-{number}", f"1.{part}.0"
        content = self._content()
        return self._upload(kind, path, version, content, 400 if kind == "put_bad_digest" else 201)

    def _upload(self, kind: str, path: str, version: str, content: Content, expected: int) -> Plan:
        digest = content.digest if expected != 400 else "sha256:" + content.digest[:6:-1]
        headers = (
            ("X-Artifact-Version", version),
            ("X-Artifact-Digest", digest),
            ("X-Uploaded-By", "bucketprobe-load"),
            ("X-Provenance-Source", f"load/{self._name}"),
            ("Content-Type", "application/octet-stream"),
        )
        manner = self._choose(MANNERS)
        if manner == "paced" and content.size > SMALL:
            manner = "plain"
        if self._options.paced_share is not None and self._random.random() < self._options.paced_share:
            manner = "paced"
        stores = Stored(path, version, content) if expected == 201 else None
        return Plan(kind, "PUT", path, expected, headers, content, manner, stores=stores)

    def _get(self, kind: str, stored: Stored) -> Plan:
        target = f"{stored.path}?version={stored.version}"
        if kind == "get_missing":
            return Plan(kind, "GET", f"{stored.path}?version=0.0.0-none", 404)
        if kind == "get_mismatch":
            return Plan(kind, "GET", f"{target}&digest=sha256:{'0' * 64}", 412)
        if kind == "metadata":
            return Plan(kind, "GET", f"{target}&metadata_only=true", 200)
        if kind == "versions":
            return Plan(kind, "GET", f"{stored.path}/versions", 200)
        return Plan(kind, "GET", target, 200, digest=stored.content.digest)

    def _content(self) -> Content:
        low, high = self._options.min_bytes, self._options.max_bytes
        size = round(math.exp(self._random.uniform(math.log(low), math.log(high))))
        return self._block.content(min(high, max(low, size)), self._random.randbytes(KEY_BYTES))

    def _choose(self, shares: dict[str, int]) -> str:
        return self._random.choices(list(shares), list(shares.values()))[0]


# --- how to ask ---


@dataclass(slots=True)
class Outcome:
    """What became of one request; the fields are the log's. Times in ns, bytes of the entities."""

    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    connect_ns: int | None = None
    connected_ns: int | None = None
    send_ns: int | None = None
    sent_ns: int | None = None
    tx_ns: int | None = None
    rx_ns: int | None = None
    done_ns: int = 0
    error: str | None = None


def wall_offset_ns() -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC: the tightest of a few readings."""
    readings = []
    for _ in range(OFFSET_TRIES):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


class Client:
    """One keep-alive connection, opened again where it was closed.

    Where there is a log, the kernel stamps what goes and comes (SO_TIMESTAMPING), in wall time. It and CLOCK_MONOTONIC are
    slewed alike, so that their difference, measured with each connection, stays until somebody sets the wall clock.
    """

    def __init__(self, options: LoadOptions, block: Block) -> None:
        self._address = (options.host, options.port)
        self._block = block
        self._stamps = options.log is not None
        self._receive_buffer = options.receive_buffer
        self._offset_ns = 0
        self._rx_ns: int | None = None
        self._sock: socket.socket | None = None
        self._buffer = bytearray(RECEIVE)
        self._view = memoryview(self._buffer)
        self._filled = 0

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def exchange(self, plan: Plan, request_id: str) -> Outcome:
        """Make one request. Never raises for what the server or the network does."""
        outcome = Outcome()
        try:
            head = request_head(plan, f"{self._address[0]}:{self._address[1]}", request_id)
            if plan.content is not None and plan.content.size <= SMALL and plan.manner == "plain":
                # Joined here, before the clock is read, for one small send.
                head += b"".join(self._block.pieces(plan.content))
            sock = self._connect(outcome)
            self._filled = 0
            keep = self._talk(sock, plan, head, outcome)
        except (OSError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            keep = False
        outcome.done_ns = time.monotonic_ns()
        if not keep:
            self.close()
        return outcome

    def _connect(self, outcome: Outcome) -> socket.socket:
        if self._sock is None:
            self._sock = socket.socket()
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # In the kernel rather than by settimeout(), which would cost a poll(2) before each call.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", TIMEOUT_S, 0))
            if self._receive_buffer is not None:
                self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE if os.geteuid() == 0 else socket.SO_RCVBUF, self._receive_buffer)
            if self._stamps:
                self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, STAMP_RECEIVED | REPORT_STAMPS | STAMP_WITHOUT_DATA)
                self._offset_ns = wall_offset_ns()
            outcome.connect_ns = time.monotonic_ns()
            self._sock.connect(self._address)
            outcome.connected_ns = time.monotonic_ns()
        return self._sock

    def _talk(self, sock: socket.socket, plan: Plan, head: bytes, outcome: Outcome) -> bool:
        """Send, and read the answer. True: the connection can be used again. Raises OSError, ValueError."""
        outcome.send_ns = time.monotonic_ns()
        if plan.manner == "expect":
            self._send_head(sock, head, outcome)
            status, headers = self._answer_head(sock)
            if status != 100:
                return self._finish(sock, plan, status, headers, outcome)
            head = b""
        unsent: OSError | None = None
        try:
            self._send(sock, plan, head, outcome)
        except (BrokenPipeError, ConnectionResetError) as error:
            unsent = error  # it may have answered before it stopped reading
        try:
            status, headers = self._answer_head(sock)
        except OSError as error:
            raise unsent or error from error
        return self._finish(sock, plan, status, headers, outcome) and unsent is None

    def _send(self, sock: socket.socket, plan: Plan, head: bytes, outcome: Outcome) -> None:
        content = plan.content
        if head:
            self._send_head(sock, head, outcome)
        if content is None:
            return
        if plan.manner == "paced":
            self._send_paced(sock, content, outcome)
        elif plan.manner == "chunked":
            for piece in filter(len, self._block.pieces(content)):
                sock.sendall(b"%x\r\n" % len(piece), socket.MSG_MORE)
                sock.sendall(piece, socket.MSG_MORE)
                sock.sendall(b"\r\n", socket.MSG_MORE)
                outcome.bytes_in += len(piece)
            sock.sendall(b"0\r\n\r\n")
        elif content.size <= SMALL and plan.manner == "plain":
            outcome.bytes_in = content.size  # it went with the head
        else:
            for piece in self._block.pieces(content):
                sock.sendall(piece)
                outcome.bytes_in += len(piece)

    def _send_head(self, sock: socket.socket, head: bytes, outcome: Outcome) -> None:
        # Not held back by MSG_MORE until the body follows: the server can read it between `send_ns` and `sent_ns`.
        if self._stamps:
            head = head[sock.sendmsg([head], [(socket.SOL_SOCKET, SO_TIMESTAMPING, struct.pack("I", STAMP_SENT))]) :]
        else:
            head = head[sock.send(head) :]
        outcome.sent_ns = time.monotonic_ns()
        sock.sendall(head)

    def _send_paced(self, sock: socket.socket, content: Content, outcome: Outcome) -> None:
        data = b"".join(self._block.pieces(content))
        step = -(-len(data) // PACES)
        for start in range(0, len(data), step):
            time.sleep(PACE_S)
            part = data[start : start + step]
            sock.sendall(part)
            outcome.bytes_in += len(part)

    def _answer_head(self, sock: socket.socket) -> tuple[int, dict[bytes, bytes]]:
        """The status and the headers; what was received behind them moves to the buffer's start."""
        while (end := self._buffer.find(b"\r\n\r\n", 0, self._filled)) < 0:
            size = self._receive(sock, self._view[self._filled :])
            if not size:
                raise ConnectionResetError("the server closed the connection without an answer")
            self._filled += size
        status_line, *lines = bytes(self._view[:end]).split(b"\r\n")
        rest = bytes(self._view[end + 4 : self._filled])
        self._view[: len(rest)] = rest
        self._filled = len(rest)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        return int(status_line.partition(b" ")[2][:3]), headers

    def _receive(self, sock: socket.socket, into: memoryview) -> int:
        """recv(2), noting when the last of what it brings had arrived. Returns the number of bytes."""
        if not self._stamps:
            return sock.recv_into(into)
        size, ancillary, _, _ = sock.recvmsg_into([into], STAMP_ROOM)
        self._rx_ns = self._stamp(ancillary)
        return size

    def _sent_stamp(self, sock: socket.socket) -> int | None:
        """When the first call's bytes left: the one stamp that was asked for, out of the socket's queue of errors and stamps."""
        try:
            return self._stamp(sock.recvmsg(0, QUEUE_ROOM, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)[1])
        except BlockingIOError:
            return None

    def _stamp(self, ancillary: list[tuple[int, int, bytes]]) -> int | None:
        """The kernel's stamp as CLOCK_MONOTONIC, in ns."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPING):
                seconds, nanoseconds, *_ = STAMPS.unpack(data)
                return int(seconds * 1_000_000_000 + nanoseconds - self._offset_ns)
        return None

    def _finish(self, sock: socket.socket, plan: Plan, status: int, headers: dict[bytes, bytes], outcome: Outcome) -> bool:
        """Read the answer's body. True: the connection can be used again."""
        outcome.status = status
        length = int(headers.get(b"content-length", b""))
        checks = plan.digest is not None and status == 200
        hashed = hashlib.sha256()
        size = min(self._filled, length)
        while True:
            if checks:
                hashed.update(self._view[:size])
            outcome.bytes_out += size
            if outcome.bytes_out == length:
                break
            size = self._receive(sock, self._view[: length - outcome.bytes_out])
            if not size:
                raise ConnectionResetError("the server closed the connection within an answer")
        if self._stamps:
            outcome.rx_ns = self._rx_ns
            outcome.tx_ns = self._sent_stamp(sock)
        if checks and f"sha256:{hashed.hexdigest()}" != plan.digest:
            outcome.error = CORRUPT
        return headers.get(b"connection", b"").lower() != b"close"


CORRUPT = "the bytes received do not have the artifact's digest"


def request_head(plan: Plan, host: str, request_id: str) -> bytes:
    lines = [f"{plan.method} {plan.target} HTTP/1.1", f"Host: {host}", f"X-Request-ID: {request_id}"]
    lines += [f"{name}: {value}" for name, value in plan.headers]
    if plan.content is not None:
        lines.append("Transfer-Encoding: chunked" if plan.manner == "chunked" else f"Content-Length: {plan.content.size}")
    if plan.manner == "expect":
        lines.append("Expect: 100-continue")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def curl(options: LoadOptions, block: Block, folder: Path, plan: Plan, request_id: str) -> Outcome:
    """Make one request by a curl process, with files in `folder`."""
    source, target = folder / "upload", folder / "download"
    target.unlink(missing_ok=True)
    command = ["curl", "-sS", "--globoff", "-o", str(target), "-w", "%{http_code} %{size_upload} %{size_download}"]
    for name, value in (*plan.headers, ("X-Request-ID", request_id)):
        command += ["-H", f"{name}: {value}"]
    if plan.content is not None:
        source.write_bytes(b"".join(block.pieces(plan.content)))
        command += ["-T", str(source)]
    outcome = Outcome(connect_ns=time.monotonic_ns())
    done = subprocess.run([*command, f"http://{options.host}:{options.port}{plan.target}"], capture_output=True, text=True, check=False)
    outcome.done_ns = time.monotonic_ns()
    if done.returncode:
        outcome.error = done.stderr.strip() or f"curl ended with {done.returncode}"
        return outcome
    outcome.status, outcome.bytes_in, outcome.bytes_out = (int(word) for word in done.stdout.split())
    if plan.digest is not None and outcome.status == 200:
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        outcome.error = None if f"sha256:{digest}" == plan.digest else CORRUPT
    return outcome


# --- who asks ---


@dataclass(slots=True)
class Tally:
    """Sums over requests. `latencies`: ns from the first byte sent to the last one received; `span`: begin and end in ns."""

    requests: int = 0
    by_status: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    unexpected: int = 0
    corrupt: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    latencies: array[int] = field(default_factory=lambda: array("Q"))
    span: tuple[int, int] = (0, 0)

    def add(self, plan: Plan, kind: str, outcome: Outcome) -> None:
        self.requests += 1
        self.by_status[plan.method, outcome.status] += 1
        self.by_kind[kind] += 1
        self.bytes_in += outcome.bytes_in
        self.bytes_out += outcome.bytes_out
        if outcome.status is None or outcome.error not in (None, CORRUPT):
            self.errors += 1
            return
        self.corrupt += outcome.error == CORRUPT
        self.unexpected += outcome.status != plan.expected_status
        if outcome.send_ns is not None:
            self.latencies.append(outcome.done_ns - outcome.send_ns)

    def merge(self, other: Tally) -> None:
        self.requests += other.requests
        self.by_status += other.by_status
        self.by_kind += other.by_kind
        self.errors += other.errors
        self.unexpected += other.unexpected
        self.corrupt += other.corrupt
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.latencies.extend(other.latencies)
        self.span = (min(self.span[0], other.span[0]), max(self.span[1], other.span[1])) if self.span[0] else other.span


class Log:
    """Appends lines to a file that threads and processes share, many at a time."""

    def __init__(self, path: Path | None) -> None:
        self._lines: list[bytes] = []
        self._fd = -1
        if path is not None:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise UsageError(f"cannot write the log {path}: {error.strerror}; change --log") from error

    def write(self, record: dict[str, object]) -> None:
        if self._fd >= 0:
            self._lines.append(json.dumps(record).encode() + b"\n")
            if len(self._lines) >= LOG_LINES:
                self._flush()

    def close(self) -> None:
        if self._fd >= 0:
            self._flush()
            os.close(self._fd)

    def _flush(self) -> None:
        # One write(2) with O_APPEND, so that others' lines do not come in between.
        os.write(self._fd, b"".join(self._lines))
        self._lines.clear()


class Team:
    """The threads of one process. They share the block, the count of requests begun, and the wish to stop."""

    def __init__(self, options: LoadOptions, run_id: str, process: int) -> None:
        self._options = options
        self._run_id = run_id
        self._process = process
        self._block = Block(options.seed, options.max_bytes, options.same_head)
        self._limit = math.inf if options.requests is None else share(options.requests, options.processes, process)
        self._begun = itertools.count()
        self._stop = threading.Event()
        self._tallies: list[Tally] = []

    def run(self, report: Callable[[int], None]) -> Tally:
        """Work until done, telling `report` every half second how many requests are done. Returns the sums."""
        count = share(self._options.connections, self._options.processes, self._process)
        self._tallies = [Tally() for _ in range(count)]
        begin_ns = time.monotonic_ns()
        with ThreadPoolExecutor(count) as pool:
            pending = {pool.submit(self._work, index) for index in range(count)}
            try:
                while pending:
                    done, pending = futures_wait(pending, REPORT_S)
                    for future in done:
                        future.result()
                    report(sum(tally.requests for tally in self._tallies))
            finally:
                self._stop.set()
        total = Tally()
        for tally in self._tallies:
            total.merge(tally)
        total.span = (begin_ns, time.monotonic_ns())
        return total

    def _work(self, index: int) -> None:
        name = f"{self._run_id}-{self._process}-{index}"
        planner = Planner(self._options, self._block, name, f"{self._options.seed}/{self._process}/{index}")
        client, log = Client(self._options, self._block), Log(self._options.log)
        with contextlib.closing(client), contextlib.closing(log), tempfile.TemporaryDirectory(prefix="load-") as folder:
            for number in self._turns(index):
                plan = planner.next()
                request_id = f"{name}-{number}"
                kind = plan.kind
                if self._options.curl_every is not None and (number + 1) % self._options.curl_every == 0:
                    kind = f"curl_{plan.kind}"
                    outcome = curl(self._options, self._block, Path(folder), plan, request_id)
                else:
                    outcome = client.exchange(plan, request_id)
                if plan.stores is not None and outcome.status == 201:
                    planner.stored(plan.stores)
                self._tallies[index].add(plan, kind, outcome)
                log.write(log_record(request_id, plan, kind, outcome))
                if outcome.status is None:
                    self._stop.wait(PACE_S)

    def _turns(self, index: int) -> Iterator[int]:
        """The numbers of this thread's requests, each when it is due."""
        options = self._options
        begin = time.monotonic()
        end = math.inf if options.seconds is None else begin + options.seconds
        interval = options.connections / options.rate if options.rate else 0.0
        due = begin + interval * (index * options.processes + self._process) / options.connections
        for number in itertools.count():
            if interval:
                self._stop.wait(max(0.0, min(due, end) - time.monotonic()))
                due += interval
            if self._stop.is_set() or time.monotonic() >= end or next(self._begun) >= self._limit:
                return
            yield number


def share(total: int, parts: int, index: int) -> int:
    """How many of `total` the part number `index` gets."""
    return total // parts + (index < total % parts)


def log_record(request_id: str, plan: Plan, kind: str, outcome: Outcome) -> dict[str, object]:
    return {
        "request_id": request_id,
        "method": plan.method,
        "target": plan.target,
        "kind": kind,
        "expected_status": plan.expected_status,
        **asdict(outcome),
    }


def run(options: LoadOptions, progress: Progress | None = None) -> LoadResult:
    """Do it, and tell `progress` about every half second how many requests are done after how many seconds.

    Raises UsageError where the options cannot be carried out, BucketprobeError where a load process dies.
    """
    check(options)
    begin = time.monotonic()
    run_id = os.urandom(4).hex()

    def report(done: int) -> None:
        if progress is not None:
            progress(done, time.monotonic() - begin)

    if options.processes == 1:
        return result(Team(options, run_id, 0).run(report))
    return result(run_processes(options, run_id, report))


def check(options: LoadOptions) -> None:
    if options.requests is None and options.seconds is None:
        raise UsageError("the load has no end; give a number of requests or of seconds")
    if not 1 <= options.min_bytes <= options.max_bytes:
        raise UsageError("the smallest size must be at least 1 byte and at most the largest; change --min-bytes or --max-bytes")
    if options.same_head is not None and not 0 <= options.same_head <= options.max_bytes:
        raise UsageError("artifacts cannot have more bytes in common than the largest has; change --same-head")
    if not 1 <= options.processes <= options.connections:
        raise UsageError("there must be at least one process, and a connection for each; change --processes or --connections")
    if options.curl_every is not None and shutil.which("curl") is None:
        raise UsageError("curl is not installed; install it or leave out --curl-every")
    Log(options.log).close()
    try:
        socket.create_connection((options.host, options.port), timeout=5).close()
    except OSError as error:
        raise UsageError(f"no server answers on {options.host}:{options.port} ({error}); start one or change --port") from error


def run_processes(options: LoadOptions, run_id: str, report: Callable[[int], None]) -> Tally:
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    for index in range(options.processes):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=run_team, args=(options, run_id, index, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    done = dict.fromkeys(pipes, 0)
    total = Tally()
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError as error:
                raise BucketprobeError("a load process died; run again with fewer --connections or --processes") from error
            if isinstance(message, Tally):
                total.merge(message)
                pipes.remove(pipe)
            else:
                done[pipe] = message
                report(sum(done.values()))
    for process in processes:
        process.join()
    return total


def run_team(options: LoadOptions, run_id: str, index: int, pipe: Connection) -> None:
    """One load process: sends the count of its requests every half second, and at the end its sums."""
    pipe.send(Team(options, run_id, index).run(pipe.send))


def result(tally: Tally) -> LoadResult:
    elapsed_s = (tally.span[1] - tally.span[0]) / 1e9
    latencies = sorted(tally.latencies)
    return LoadResult(
        requests=tally.requests,
        errors=tally.errors,
        unexpected=tally.unexpected,
        corrupt=tally.corrupt,
        by_status=dict(tally.by_status),
        by_kind=dict(tally.by_kind),
        bytes_in=tally.bytes_in,
        bytes_out=tally.bytes_out,
        elapsed_s=elapsed_s,
        requests_per_s=tally.requests / elapsed_s,
        bytes_per_s=(tally.bytes_in + tally.bytes_out) / elapsed_s,
        latency_ms={f"p{share}": quantile(latencies, share / 100) / 1e6 for share in (50, 90, 99, 100)},
    )


def quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of all do not exceed; 0 for none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


# --- the command ---


def table(outcome: LoadResult) -> str:
    rows = [
        ("requests", f"{outcome.requests:,}"),
        ("time", f"{outcome.elapsed_s:.2f} s"),
        ("rate", f"{outcome.requests_per_s:,.0f} /s"),
        ("sent", f"{outcome.bytes_in / 1e6:,.1f} MB"),
        ("received", f"{outcome.bytes_out / 1e6:,.1f} MB"),
        ("throughput", f"{outcome.bytes_per_s / 1e6:,.1f} MB/s"),
        *((f"latency {'max' if name == 'p100' else name}", f"{value:,.3f} ms") for name, value in outcome.latency_ms.items()),
        *((status_text(key), f"{count:,}") for key, count in sorted(outcome.by_status.items(), key=str)),
        ("without an answer", f"{outcome.errors:,}"),
        ("unexpected status", f"{outcome.unexpected:,}"),
        ("corrupt", f"{outcome.corrupt:,}"),
    ]
    return "\n".join(f"{name:<18} {value:>16}" for name, value in rows)


def parse_options(arguments: Sequence[str] | None) -> tuple[LoadOptions, bool]:
    parser = argparse.ArgumentParser(
        prog="python -m bucketprobe.demo.load",
        description="Real clients for a Bucket v1 server. Example: python -m bucketprobe.demo.load --port 8080 --seconds 10",
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    parser.add_argument("--connections", type=int, default=32, metavar="N", help="keep-alive connections (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share them out to N processes (default %(default)s)")
    parser.add_argument("--requests", type=int, metavar="N", help="end after N requests (10000, unless --seconds is given)")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after S seconds")
    parser.add_argument("--put-share", type=float, default=0.7, metavar="P", help="share of uploads, 0 to 1 (default %(default)s)")
    parser.add_argument("--min-bytes", type=int, default=1024, metavar="N", help="smallest artifact (default %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=8 << 20, metavar="N", help="largest artifact (default %(default)s)")
    parser.add_argument("--fixed-bytes", type=int, metavar="N", help="size of every artifact, instead of the two above")
    parser.add_argument("--seed", type=int, default=1, help="of sizes, kinds and bytes (default %(default)s)")
    parser.add_argument("--curl-every", type=int, metavar="K", help="make each K-th request of a connection by a curl process")
    parser.add_argument("--rate", type=float, metavar="R", help="requests per second at most")
    parser.add_argument("--same-head", type=int, metavar="N", help="all artifacts begin with the same N bytes, and then differ")
    parser.add_argument("--paced-share", type=float, metavar="P", help="share of uploads sent in parts with pauses, 0 to 1")
    parser.add_argument("--receive-buffer", type=int, metavar="N", help="bytes of an answer that may wait to be read (root: any number)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append one JSON line per request")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    values = vars(parser.parse_args(arguments))
    as_json, fixed = values.pop("json"), values.pop("fixed_bytes")
    if fixed is not None:
        values["min_bytes"] = values["max_bytes"] = fixed
    if values["requests"] is None and values["seconds"] is None:
        values["requests"] = 10_000
    return LoadOptions(**values), as_json


def show_progress(done: int, seconds: float) -> None:
    print(f"\r{done:,} requests, {seconds:.0f} s", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every answer was the expected one; 1: some were not; 2: the call was wrong; 130: interrupted."""
    options, as_json = parse_options(arguments)
    progress = show_progress if sys.stderr.isatty() else None
    try:
        outcome = run(options, progress)
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        if progress is not None:
            print(file=sys.stderr)
    print(json.dumps(outcome.record()) if as_json else table(outcome))
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())

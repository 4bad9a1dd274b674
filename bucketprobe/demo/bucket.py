# SPDX-License-Identifier: Apache-2.0
"""A reference Bucket v1 server with the standard library alone: something real to observe, and the truth to check against.

    python -m bucketprobe.demo.bucket --port 8080 --root /tmp/bucket --model threads

Under the root: `tmp/` holds uploads in progress, `data/BUCKET/ARTIFACT/VERSION` the bytes, `meta/` the metadata (JSON
sidecars `BUCKET/ARTIFACT/VERSION.json` or one SQLite database `index.db`), `locks/` the lock files of the commits.

`threads` serves each connection in a thread of its own. `prefork` has worker processes that share one listening socket;
each serves one connection at a time, to its end, so that there should be at least as many workers as connections.

With `--truth FILE` the server writes down what each request did, as it saw it: one JSON line per request. Its times are
CLOCK_MONOTONIC in ns; in the `threads` model they include the wait for Python's interpreter lock after each call.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import struct
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

from bucketprobe.errors import BucketprobeError, UsageError

HEAD_LIMIT = 16384
LINE_LIMIT = 1024
IDLE_S = 75
LINGER_S = 2.0
GRACE_S = 3.0
BACKLOG = 512
LOCK_STRIPES = 1024
NAME_LIMIT = 200
RESPAWN_DELAY_S = 0.1
PR_SET_PDEATHSIG = 1

REASONS = {
    200: "OK",
    201: "Created",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Content Too Large",
    500: "Internal Server Error",
}

REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?")
IDENTIFIER = re.compile(r"[A-Za-z0-9._-]{1,255}")
VERSION = re.compile(r'[^/\\:*?"<>|]{1,100}')
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

#: Headers whose value decides something here; two different ones in a request would leave open which of them counts.
SINGLE_HEADERS = frozenset(
    (
        "content-length",
        "content-type",
        "host",
        "transfer-encoding",
        "x-artifact-digest",
        "x-artifact-version",
        "x-provenance-source",
        "x-request-id",
        "x-uploaded-by",
    )
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve. `max_bytes`: the largest artifact; `chunk_size`: bytes per read of a socket or file at most."""

    root: Path
    port: int
    host: str = "127.0.0.1"
    model: str = "threads"
    workers: int = 32
    metadata: str = "json"
    verify: bool = False
    sendfile: bool = False
    max_bytes: int = 5 << 30
    chunk_size: int = 65536
    truth: Path | None = None


class Disconnected(Exception):
    """The client went away, or stayed silent for too long, in the middle of a request."""


class Problem(Exception):
    """A request that gets an error answer. `details` goes into the answer's body."""

    def __init__(self, status: int, code: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details


# --- what was measured -------------------------------------------------------------------------------------------


class Trace:
    """Time, bytes and calls of each step of one request. Each lap runs from the last mark or lap until now."""

    __slots__ = ("_last_ns", "steps")

    def __init__(self) -> None:
        self._last_ns = 0
        self.steps: dict[str, list[int]] = {}

    def mark(self) -> None:
        self._last_ns = time.monotonic_ns()

    def lap(self, step: str, size: int = 0) -> None:
        now = time.monotonic_ns()
        self.add(step, now - self._last_ns, size)
        self._last_ns = now

    def add(self, step: str, ns: int, size: int) -> None:
        total = self.steps.get(step)
        if total is None:
            self.steps[step] = [ns, size, 1]
        else:
            total[0] += ns
            total[1] += size
            total[2] += 1

    def files(self) -> dict[str, int]:
        """The calls on data and temporary files, under the names that a bucketprobe record uses."""
        none = [0, 0, 0]
        writes, reads = self.steps.get("storage_write", none), self.steps.get("storage_read", none)
        return {
            "opens": self.steps.get("open", none)[2],
            "write_calls": writes[2],
            "write_bytes": writes[1],
            "read_calls": reads[2],
            "read_bytes": reads[1],
            "syncs": self.steps.get("storage_sync", none)[2],
            "renames": self.steps.get("rename", none)[2],
        }


class NoTrace(Trace):
    """Measures nothing, for a server without a truth file."""

    def mark(self) -> None:
        pass

    def lap(self, step: str, size: int = 0) -> None:
        pass

    def add(self, step: str, ns: int, size: int) -> None:
        pass


class TruthLog:
    """Appends one JSON line per request. One write(2) with O_APPEND each, so that processes can share the file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, record: dict[str, object]) -> None:
        os.write(self._fd, json.dumps(record).encode() + b"\n")


# --- HTTP --------------------------------------------------------------------------------------------------------


class Wire:
    """One connection's bytes, buffered. `recv_ns` is the clock after the latest read, `sent` counts since `begin`.

    What is buffered when a request begins came with the latest read, because nothing is read beyond what a request
    needed; so `begin_ns` is right for pipelined requests, too.
    """

    def __init__(self, sock: socket.socket, chunk_size: int, new_trace: Callable[[], Trace]) -> None:
        self._sock = sock
        self._chunk_size = chunk_size
        self._new_trace = new_trace
        self._buffer = bytearray(max(chunk_size, HEAD_LIMIT))
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self.recv_ns = 0
        self.begin_ns = 0
        self.sent = 0
        self.trace = new_trace()

    @property
    def buffered(self) -> int:
        return self._end - self._start

    def begin(self) -> bool:
        """Wait for the first byte of the next request. False: none came before the client closed or fell silent."""
        self.trace = self._new_trace()
        self.sent = 0
        if not self.buffered:
            try:
                size = self._receive()
            except Disconnected:
                return False
            self.trace.add("receive", 0, size)
        self.begin_ns = self.recv_ns
        return True

    def head(self) -> bytes:
        """The bytes up to the next empty line, without it. Raises Problem, Disconnected."""
        return self._until(b"\r\n\r\n", HEAD_LIMIT)

    def line(self) -> bytes:
        """The bytes up to the next CRLF, without it. Raises Problem, Disconnected."""
        return self._until(b"\r\n", LINE_LIMIT)

    def take(self, limit: int) -> memoryview:
        """At least one and at most `limit` bytes, valid until the next call. Raises Disconnected."""
        if not self.buffered:
            self._fill()
        stop = min(self._end, self._start + limit)
        part = self._view[self._start : stop]
        self._start = stop
        return part

    def send(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Send all of it. Raises Disconnected."""
        view = memoryview(data)
        while view:
            self.trace.mark()
            try:
                size = self._sock.send(view, flags)
            except OSError as error:
                raise Disconnected from error
            self.trace.lap("send", size)
            self.sent += size
            view = view[size:]

    def send_file(self, fd: int, size: int) -> None:
        """Send `size` bytes from the start of a file by sendfile(2). Raises Disconnected.

        The time counts as reading, which comes before sending where both happen in one call.
        """
        offset = 0
        while offset < size:
            self.trace.mark()
            try:
                count = os.sendfile(self._sock.fileno(), fd, offset, size - offset)
            except OSError as error:
                raise Disconnected from error
            if not count:
                raise Disconnected
            self.trace.lap("storage_read", count)
            self.sent += count
            offset += count

    def linger(self) -> None:
        """Let a client that still sends read the answer: close(2) with unread data would reset the connection."""
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            set_timeouts(self._sock, 1)
            while time.monotonic() < deadline and self._sock.recv_into(self._buffer):
                pass

    def _until(self, end: bytes, limit: int) -> bytes:
        while (found := self._buffer.find(end, self._start, self._end)) < 0:
            if self.buffered >= limit:
                raise malformed("a line or the head is too long")
            self._fill()
        data = bytes(self._view[self._start : found])
        self._start = found + len(end)
        return data

    def _fill(self) -> None:
        self.trace.mark()
        size = self._receive()
        self.trace.lap("receive", size)

    def _receive(self) -> int:
        if self._start:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        room = min(self._chunk_size, len(self._buffer) - self._end)
        try:
            size = self._sock.recv_into(self._view[self._end :], room)
        except OSError as error:
            raise Disconnected from error
        self.recv_ns = time.monotonic_ns()
        if not size:
            raise Disconnected
        self._end += size
        return size


class Body:
    """The entity of one request, read from the wire while it is iterated. `length` None means chunked."""

    def __init__(self, wire: Wire, length: int | None) -> None:
        self._wire = wire
        self.length = length
        self.received = 0
        self.finished = length == 0

    def parts(self) -> Iterator[memoryview]:
        """The entity in pieces, each valid until the next one. Raises Problem, Disconnected."""
        if self.length is None:
            yield from self._chunks()
        else:
            yield from self._span(self.length)
        self.finished = True

    def arrived(self) -> int:
        """Entity bytes that came out of the socket, read by the request or not; of an unread chunked body, those read."""
        if self.finished or self.length is None:
            return self.received
        return self.received + min(self._wire.buffered, self.length - self.received)

    def _span(self, length: int) -> Iterator[memoryview]:
        while length:
            part = self._wire.take(length)
            length -= len(part)
            self.received += len(part)
            yield part

    def _chunks(self) -> Iterator[memoryview]:
        while size := self._chunk_size():
            yield from self._span(size)
            if self._wire.line():
                raise malformed("a chunk is longer than its size says")
        while self._wire.line():
            pass  # a trailer field, of which none means anything here

    def _chunk_size(self) -> int:
        match = CHUNK_LINE.fullmatch(self._wire.line())
        if match is None:
            raise malformed("a chunk has no size")
        return int(match[1], 16)


@dataclass(slots=True)
class Request:
    """One request's head, and its body still to be read."""

    method: str
    path: str
    query: str
    minor: int
    headers: dict[str, str]
    body: Body

    @property
    def keep_alive(self) -> bool:
        tokens = {token.strip().lower() for token in self.headers.get("connection", "").split(",")}
        return "close" not in tokens and (self.minor == 1 or "keep-alive" in tokens)

    @property
    def waits_for_continue(self) -> bool:
        return self.minor == 1 and self.headers.get("expect", "").lower() == "100-continue"


@dataclass(slots=True)
class Response:
    """An answer: a short body, or a file of `size` bytes, which is open as `fd` if it is to be sent."""

    status: int
    body: bytes = b""
    fd: int | None = None
    size: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.size or len(self.body)


def json_response(status: int, document: object, **headers: str) -> Response:
    return Response(status, json.dumps(document).encode(), headers={"Content-Type": "application/json", **headers})


def problem_response(problem: Problem) -> Response:
    error = {"code": problem.code, "message": problem.message, "details": problem.details}
    response = json_response(problem.status, {"error": error})
    if problem.status == 405:
        response.headers["Allow"] = str(problem.details["allow"])
    return response


def malformed(why: str) -> Problem:
    return Problem(400, "malformed_request", f"The request is malformed: {why}.")


def read_request(wire: Wire) -> Request:
    """Read and check one head. Raises Problem (400), Disconnected."""
    # RFC 9112 section 2.2: an empty line before the request line should be ignored.
    lines = wire.head().removeprefix(b"\r\n").split(b"\r\n")
    match = REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise malformed("it does not start with a method, a target and HTTP/1.0 or HTTP/1.1")
    headers = parse_headers(lines[1:])
    minor = int(match[3])
    if minor == 1 and "host" not in headers:
        raise malformed("the Host header is missing")
    path, _, query = strip_authority(match[2].decode()).partition("?")
    return Request(match[1].decode(), path, query, minor, headers, Body(wire, body_length(headers, minor)))


def strip_authority(target: str) -> str:
    """A target in origin form. The absolute form is for proxies, but RFC 9112 section 3.2.2 has servers accept it."""
    if not target.startswith(("http://", "https://")):
        return target
    try:
        parts = urlsplit(target)
    except ValueError as error:
        raise malformed("its target is not a URL") from error
    return f"{parts.path}?{parts.query}"


def parse_headers(lines: Sequence[bytes]) -> dict[str, str]:
    """Header fields by lower-case name; values as UTF-8, with other bytes kept as surrogates. Raises Problem (400)."""
    headers: dict[str, str] = {}
    for line in lines:
        match = HEADER_LINE.fullmatch(line)
        if match is None:
            raise malformed("a header line is not of the form `name: value`")
        name = match[1].decode().lower()
        value = match[2].decode(errors="surrogateescape")
        if name in headers:
            if name in SINGLE_HEADERS:
                raise malformed(f"the header {name} is there twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def body_length(headers: dict[str, str], minor: int) -> int | None:
    """Bytes of the body; None: chunked. Raises Problem (400)."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        # RFC 9112 section 6.3: both headers together are how requests are smuggled past a proxy.
        if length is not None or minor == 0 or coding.lower() != "chunked":
            raise malformed("the only Transfer-Encoding is chunked, in HTTP/1.1, without Content-Length")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise malformed("Content-Length is not a number of bytes")
    return int(length)


# --- the contract's fields ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Artifact:
    """The metadata document of one stored version."""

    bucket_id: str
    artifact_id: str
    version: str
    digest: str
    size_bytes: int
    created_at: str
    uploaded_by: str
    provenance_source: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names: an artifact, or with `versions` the list of its versions."""

    bucket_id: str
    artifact_id: str
    versions: bool


def parse_path(path: str) -> Target:
    """Raises Problem: 404 for an unknown route, 400 for an identity that the contract does not allow."""
    segments = path.split("/")
    versions = len(segments) == 5 and segments[4] == "versions"
    if segments[:2] != ["", "v1"] or not (len(segments) == 4 or versions) or "" in segments[2:]:
        raise Problem(404, "unknown_route", "There is no such route.", path=path)
    return Target(identifier("bucket_id", segments[2]), identifier("artifact_id", segments[3]), versions)


def identifier(name: str, segment: str) -> str:
    value = unquote_to_bytes(segment).decode(errors="surrogateescape")
    if not IDENTIFIER.fullmatch(value):
        raise Problem(400, "invalid_identity", f"{name} must be 1-255 characters out of letters, digits, '-', '_' and '.'.", field=name)
    return value


def check_version(value: str) -> str:
    if not VERSION.fullmatch(value) or not is_unicode(value):
        raise Problem(400, "invalid_identity", 'version must be 1-100 characters, none of / \\ : * ? " < > |.', field="version")
    return value


def check_digest(value: str) -> str:
    """The digest in lower case. Raises Problem (400)."""
    lower = value.lower()
    if not DIGEST.fullmatch(lower):
        raise Problem(400, "invalid_identity", "digest must be 'sha256:' and 64 hex digits.", field="digest")
    return lower


def check_origin(name: str, value: str) -> str:
    if not 1 <= len(value) <= 500 or not is_unicode(value):
        raise Problem(400, "invalid_identity", f"{name} must be 1-500 characters.", field=name)
    return value


def is_unicode(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def parse_query(query: str) -> dict[str, str]:
    """Raises Problem (400) where a name occurs twice or the text is not UTF-8."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise malformed("its query is not UTF-8") from error
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise malformed("a query parameter is there twice")
    return parameters


# --- storage -----------------------------------------------------------------------------------------------------


class Metadata(Protocol):
    """Where the metadata documents are. A document that is there makes its version exist."""

    def get(self, bucket_id: str, artifact_id: str, version: str) -> Artifact | None: ...

    def put(self, artifact: Artifact) -> None: ...

    def versions(self, bucket_id: str, artifact_id: str) -> list[Artifact]: ...


def file_name(text: str) -> str:
    """A file name of at most 200 bytes, different for each text, and the text itself where that is safe.

    Escapes begin with '%', which itself is escaped. A name that would be too long becomes '%%' and a SHA-256, which
    no escaped text can begin with.
    """
    name = "%2E" * len(text) if text in (".", "..") else quote(text, safe=" !#$&'()+,;=@[]^`{}")
    return name if len(name) <= NAME_LIMIT else "%%" + hashlib.sha256(text.encode()).hexdigest()


def folder_of(root: Path, bucket_id: str, artifact_id: str) -> str:
    """The folder of an artifact. The two identifiers are safe as they are, but for the names that the kernel gives a meaning."""
    names = ["%2E" * len(name) if name in (".", "..") else name for name in (bucket_id, artifact_id)]
    return f"{root}/{names[0]}/{names[1]}"


class JsonMetadata:
    """A JSON file beside each artifact, written under another name and renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, bucket_id: str, artifact_id: str, version: str) -> Artifact | None:
        return self._load(f"{folder_of(self._root, bucket_id, artifact_id)}/{file_name(version)}.json")

    def put(self, artifact: Artifact) -> None:
        folder = folder_of(self._root, artifact.bucket_id, artifact.artifact_id)
        os.makedirs(folder, exist_ok=True)
        path = f"{folder}/{file_name(artifact.version)}.json"
        # The commit's lock leaves one writer per version, so that the temporary name needs no more than its suffix.
        with open(path + ".tmp", "wb", buffering=0) as file:
            file.write(json.dumps(asdict(artifact)).encode())
        os.rename(path + ".tmp", path)

    def versions(self, bucket_id: str, artifact_id: str) -> list[Artifact]:
        folder = folder_of(self._root, bucket_id, artifact_id)
        try:
            names = [name for name in os.listdir(folder) if name.endswith(".json")]
        except FileNotFoundError:
            return []
        found = [self._load(f"{folder}/{name}") for name in names]
        return sorted((artifact for artifact in found if artifact), key=lambda artifact: artifact.created_at)

    @staticmethod
    def _load(path: str) -> Artifact | None:
        try:
            with open(path, "rb", buffering=0) as file:
                return Artifact(**json.loads(file.read()))
        except FileNotFoundError:
            return None


class SqliteMetadata:
    """One SQLite database in WAL mode, with a connection for each thread that uses it."""

    def __init__(self, root: Path) -> None:
        self._path = root / "index.db"
        self._local = threading.local()
        # A connection must not be carried over a fork, so this one is closed again.
        with contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS artifact (bucket_id TEXT, artifact_id TEXT, version TEXT, digest TEXT,"
                " size_bytes INTEGER, created_at TEXT, uploaded_by TEXT, provenance_source TEXT,"
                " PRIMARY KEY (bucket_id, artifact_id, version)) WITHOUT ROWID"
            )

    def get(self, bucket_id: str, artifact_id: str, version: str) -> Artifact | None:
        query = "SELECT * FROM artifact WHERE bucket_id = ? AND artifact_id = ? AND version = ?"
        row = self._connection().execute(query, (bucket_id, artifact_id, version)).fetchone()
        return Artifact(*row) if row else None

    def put(self, artifact: Artifact) -> None:
        self._connection().execute("INSERT INTO artifact VALUES (?, ?, ?, ?, ?, ?, ?, ?)", tuple(asdict(artifact).values()))

    def versions(self, bucket_id: str, artifact_id: str) -> list[Artifact]:
        query = "SELECT * FROM artifact WHERE bucket_id = ? AND artifact_id = ? ORDER BY created_at"
        return [Artifact(*row) for row in self._connection().execute(query, (bucket_id, artifact_id))]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._path, timeout=10, isolation_level=None)
            connection.execute("PRAGMA synchronous=NORMAL")
            self._local.connection = connection
        return connection


class Upload:
    """A temporary file that is gone afterwards, unless it was moved away."""

    def __init__(self, folder: Path, trace: Trace) -> None:
        self.path = f"{folder}/{os.getpid()}-{secrets.token_hex(8)}.part"
        self._trace = trace
        trace.mark()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        trace.lap("open")
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._fd)
        if self.path:
            os.unlink(self.path)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, part: memoryview) -> None:
        self._trace.mark()
        self._hash.update(part)
        self._trace.lap("digest", len(part))
        self.size += len(part)
        while part:
            written = os.write(self._fd, part)
            self._trace.lap("storage_write", written)
            part = part[written:]

    def sync(self) -> None:
        self._trace.mark()
        os.fsync(self._fd)
        self._trace.lap("storage_sync")

    def move(self, path: str) -> None:
        self._trace.mark()
        os.rename(self.path, path)
        self._trace.lap("rename")
        self.path = ""


class Store:
    """Artifacts on a file system. Safe for many threads and processes on the same root."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._data, self._tmp, self._locks = (options.root / name for name in ("data", "tmp", "locks"))
        meta = options.root / "meta"
        for folder in (self._data, self._tmp, self._locks, meta):
            folder.mkdir(parents=True, exist_ok=True)
        self.metadata: Metadata = SqliteMetadata(meta) if options.metadata == "sqlite" else JsonMetadata(meta)

    def upload(self, trace: Trace) -> Upload:
        return Upload(self._tmp, trace)

    def commit(self, upload: Upload, artifact: Artifact, trace: Trace) -> tuple[bool, Artifact]:
        """Make a finished upload exist, once. Returns (created, what exists now). Raises Problem (409, 500).

        A version exists from the moment its metadata does. Until then its file belongs to a server that died on the way,
        and may be replaced; so the rename is blind, and the lock makes look-up, rename and metadata one step.
        """
        with self._lock(artifact):
            trace.mark()
            existing = self.metadata.get(artifact.bucket_id, artifact.artifact_id, artifact.version)
            trace.lap("metadata")
            if existing is not None:
                if existing.digest == artifact.digest:
                    return False, existing
                message = "The version exists with other content."
                raise Problem(409, "version_conflict", message, version=artifact.version, digest=existing.digest)
            path = self._path(artifact)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            upload.move(path)
            if self._options.verify:
                self.verify(path, artifact.digest, trace)
            trace.mark()
            self.metadata.put(artifact)
            trace.lap("metadata")
        return True, artifact

    def verify(self, path: str, digest: str, trace: Trace) -> None:
        """Read a stored file back and compare its digest; a file that differs is removed. Raises Problem (500)."""
        hashed = hashlib.sha256()
        trace.mark()
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        trace.lap("open")
        try:
            for part in read_parts(fd, os.fstat(fd).st_size, self._options.chunk_size, trace):
                hashed.update(part)
                trace.lap("digest", len(part))
        finally:
            os.close(fd)
        if f"sha256:{hashed.hexdigest()}" != digest:
            os.unlink(path)
            raise Problem(500, "post_storage_mismatch", "The stored bytes differ from those that were received.", digest=digest)

    def open(self, artifact: Artifact, trace: Trace) -> int:
        """Open an artifact's bytes for reading and return the file descriptor. Raises Problem (500), OSError."""
        trace.mark()
        fd = os.open(self._path(artifact), os.O_RDONLY | os.O_CLOEXEC)
        trace.lap("open")
        if os.fstat(fd).st_size != artifact.size_bytes:
            os.close(fd)
            raise Problem(500, "storage_error", "The stored file does not have the size that its metadata says.")
        return fd

    def _path(self, artifact: Artifact) -> str:
        return f"{folder_of(self._data, artifact.bucket_id, artifact.artifact_id)}/{file_name(artifact.version)}"

    @contextlib.contextmanager
    def _lock(self, artifact: Artifact) -> Iterator[None]:
        # flock(2) belongs to the open file description: it excludes threads and processes alike, and ends with either.
        key = f"{artifact.bucket_id}/{artifact.artifact_id}/{artifact.version}"
        stripe = zlib.crc32(key.encode()) % LOCK_STRIPES
        fd = os.open(f"{self._locks}/{stripe}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def read_parts(fd: int, size: int, chunk_size: int, trace: Trace) -> Iterator[bytes]:
    """`size` bytes of a file in chunks. Raises Problem (500) where it ends before."""
    while size:
        trace.mark()
        part = os.read(fd, min(chunk_size, size))
        trace.lap("storage_read", len(part))
        if not part:
            raise Problem(500, "storage_error", "The stored file ended early.")
        size -= len(part)
        yield part


# --- the calls ---------------------------------------------------------------------------------------------------


class Service:
    """The contract's calls over a store. Each raises Problem for an error answer."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    def answer(self, request: Request, wire: Wire) -> Response:
        """Serve one request whose head was read. Raises Problem, Disconnected."""
        target = parse_path(request.path)
        if request.method == "PUT" and not target.versions:
            return self._put(request, target, wire)
        if request.method not in ("GET", "HEAD"):
            allow = "GET, HEAD" if target.versions else "GET, HEAD, PUT"
            raise Problem(405, "method_not_allowed", f"This route has {allow} only.", allow=allow)
        if target.versions:
            return self._versions(target, wire.trace)
        return self._get(request, target, wire.trace)

    def _put(self, request: Request, target: Target, wire: Wire) -> Response:
        declared = self._declared(request, target)
        if request.waits_for_continue and not wire.buffered:
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            wire.sent = 0
        with self._store.upload(wire.trace) as upload:
            for part in request.body.parts():
                upload.write(part)
                self._check_size(upload.size)
            if not upload.size:
                raise empty()
            wire.trace.mark()
            digest = upload.digest
            wire.trace.lap("digest")
            if digest != declared.digest:
                message = "The bytes do not have the digest that X-Artifact-Digest declares."
                raise Problem(400, "digest_mismatch", message, declared=declared.digest, computed=digest)
            upload.sync()
            artifact = Artifact(**{**asdict(declared), "size_bytes": upload.size, "created_at": wall_time()})
            created, stored = self._store.commit(upload, artifact, wire.trace)
        return json_response(201 if created else 200, asdict(stored))

    def _declared(self, request: Request, target: Target) -> Artifact:
        """What the head of an upload declares, checked as far as it goes."""
        headers = request.headers
        for name in ("X-Artifact-Version", "X-Artifact-Digest", "X-Uploaded-By", "X-Provenance-Source", "Content-Type"):
            if not headers.get(name.lower()):
                raise Problem(400, "missing_header", f"The header {name} is missing.", header=name)
        if headers["content-type"].partition(";")[0].strip().lower() != "application/octet-stream":
            raise Problem(400, "invalid_header", "Content-Type must be application/octet-stream.", header="Content-Type")
        declared = Artifact(
            bucket_id=target.bucket_id,
            artifact_id=target.artifact_id,
            version=check_version(headers["x-artifact-version"]),
            digest=check_digest(headers["x-artifact-digest"]),
            size_bytes=0,
            created_at="",
            uploaded_by=check_origin("uploaded_by", headers["x-uploaded-by"]),
            provenance_source=check_origin("provenance_source", headers["x-provenance-source"]),
        )
        if request.body.length is not None:
            self._check_size(request.body.length)
            if not request.body.length:
                raise empty()
        return declared

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise Problem(413, "size_limit_exceeded", "The artifact is larger than this store allows.", limit_bytes=self._max_bytes)

    def _get(self, request: Request, target: Target, trace: Trace) -> Response:
        query = parse_query(request.query)
        if "version" not in query:
            raise Problem(400, "missing_parameter", "The query parameter version is missing.", parameter="version")
        version = check_version(query["version"])
        wanted = check_digest(query["digest"]) if "digest" in query else None
        choice = query.get("metadata_only", "false").lower()
        if choice not in ("true", "false"):
            raise Problem(400, "invalid_parameter", "metadata_only must be true or false.", parameter="metadata_only")
        trace.mark()
        artifact = self._store.metadata.get(target.bucket_id, target.artifact_id, version)
        trace.lap("metadata")
        if artifact is None:
            raise Problem(404, "not_found", "There is no such version of this artifact.", version=version)
        if wanted not in (None, artifact.digest):
            message = "The stored artifact has another digest."
            raise Problem(412, "digest_precondition_failed", message, requested=wanted, stored=artifact.digest)
        if choice == "true":
            return json_response(200, asdict(artifact))
        headers = {"Content-Type": "application/octet-stream", "X-Artifact-Digest": artifact.digest}
        fd = None if request.method == "HEAD" else self._store.open(artifact, trace)
        return Response(200, fd=fd, size=artifact.size_bytes, headers=headers)

    def _versions(self, target: Target, trace: Trace) -> Response:
        trace.mark()
        found = self._store.metadata.versions(target.bucket_id, target.artifact_id)
        trace.lap("metadata")
        names = ("version", "digest", "size_bytes", "created_at")
        return json_response(200, {"versions": [{name: getattr(artifact, name) for name in names} for artifact in found]})


def empty() -> Problem:
    return Problem(400, "empty_artifact", "An artifact has at least one byte.")


def wall_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# --- connections -------------------------------------------------------------------------------------------------


class Conversation:
    """The requests of one connection, one after the other."""

    def __init__(self, sock: socket.socket, accept_ns: int, options: Options, service: Service, truth: TruthLog | None) -> None:
        self._options = options
        self._service = service
        self._truth = truth
        self._accept_ns = accept_ns
        self._wire = Wire(sock, options.chunk_size, NoTrace if truth is None else Trace)

    def run(self) -> None:
        """Serve until either side has had enough."""
        while self._wire.begin() and self._exchange():
            pass

    def _exchange(self) -> bool:
        """Serve one request. True: another may follow on this connection."""
        wire = self._wire
        request: Request | None = None
        response: Response | None = None
        head = b""
        try:
            try:
                request = read_request(wire)
                response = self._answer(request)
            except Problem as problem:
                response = problem_response(problem)
            keep = request is not None and request.keep_alive and request.body.finished
            head = render_head(response, request, keep)
            self._send(head, response, with_body=request is None or request.method != "HEAD")
            end_ns, outcome = time.monotonic_ns(), "complete"
        except Disconnected:
            end_ns, outcome = time.monotonic_ns(), "client_closed"
            keep = False
        finally:
            if response is not None and response.fd is not None:
                os.close(response.fd)
        if self._truth is not None:
            seen = self._seen(request, response, max(0, wire.sent - len(head)))
            self._truth.write({**seen, "end_ns": end_ns, "outcome": outcome})
        if outcome == "complete" and not (request is not None and request.body.finished):
            wire.linger()
        return keep

    def _answer(self, request: Request) -> Response:
        try:
            return self._service.answer(request, self._wire)
        except (OSError, sqlite3.Error) as error:
            raise Problem(500, "storage_error", f"The storage failed: {error}.") from error

    def _send(self, head: bytes, response: Response, *, with_body: bool) -> None:
        if response.fd is None:
            self._wire.send(head + response.body if with_body else head)
            return
        self._wire.send(head, socket.MSG_MORE)
        if self._options.sendfile:
            self._wire.send_file(response.fd, response.size)
            return
        try:
            for part in read_parts(response.fd, response.size, self._options.chunk_size, self._wire.trace):
                self._wire.send(part)
        except (OSError, Problem) as error:
            # The head is out: all that is left to tell the client is to close before the promised length.
            raise Disconnected from error

    def _seen(self, request: Request | None, response: Response | None, bytes_out: int) -> dict[str, object]:
        """What the truth file gets, but for how and when the request ended."""
        wire = self._wire
        return {
            "request_id": request.headers.get("x-request-id") if request else None,
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "method": request.method if request else None,
            "target_path": request.path if request else None,
            "status": response.status if response and wire.sent else None,
            "bytes_in": request.body.arrived() if request else 0,
            "bytes_out": bytes_out,
            "begin_ns": wire.begin_ns,
            "accept_ns": self._accept_ns,
            "steps": [{"step": step, "ns": ns, "bytes": size, "calls": calls} for step, (ns, size, calls) in wire.trace.steps.items()],
            "files": wire.trace.files(),
        }


def render_head(response: Response, request: Request | None, keep: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {response.status} {REASONS[response.status]}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Length: {response.length}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    if request is not None and "x-request-id" in request.headers:
        lines.append(f"X-Request-ID: {request.headers['x-request-id']}")
    if not keep:
        lines.append("Connection: close")
    elif request is not None and request.minor == 0:
        lines.append("Connection: keep-alive")
    return ("\r\n".join(lines) + "\r\n\r\n").encode(errors="surrogateescape")


def set_timeouts(sock: socket.socket, seconds: int) -> None:
    # In the kernel rather than by settimeout(), which would cost a poll(2) before each call.
    value = struct.pack("ll", seconds, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


class Connections:
    """The open connections of one process, so that they can be ended from another thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._stopping = False

    def add(self, sock: socket.socket) -> bool:
        """False: too late, nothing is served any more."""
        with self._changed:
            if not self._stopping:
                self._open.add(sock)
            return not self._stopping

    def remove(self, sock: socket.socket) -> None:
        with self._changed:
            self._open.discard(sock)
            sock.close()
            self._changed.notify_all()

    def stop(self) -> None:
        """End idle connections and uploads at once and downloads after a grace time; return when all are closed."""
        with self._changed:
            self._stopping = True
            for how in (socket.SHUT_RD, socket.SHUT_RDWR):
                for sock in self._open:
                    with contextlib.suppress(OSError):
                        sock.shutdown(how)
                self._changed.wait_for(lambda: not self._open, GRACE_S)


# --- processes ---------------------------------------------------------------------------------------------------


class Server:
    """A listening socket and those who serve its connections."""

    def __init__(self, options: Options, listener: socket.socket) -> None:
        self._options = options
        self._listener = listener
        self._truth = TruthLog(options.truth) if options.truth else None
        self._service = Service(Store(options), options.max_bytes)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, which the caller has blocked."""
        if self._options.model == "prefork":
            self._supervise()
        else:
            self._serve(own_threads=True)

    def _serve(self, *, own_threads: bool) -> None:
        """Serve in this process: connections in threads of their own, or one at a time.

        A thread accepts, while the main thread waits for the signal: a signal that comes just before a system call blocks
        would not interrupt it, but shutting the sockets down always ends the wait.
        """
        connections = Connections()
        threading.Thread(target=self._accept, args=(connections, own_threads), daemon=True).start()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        connections.stop()

    def _accept(self, connections: Connections, own_threads: bool) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                print(f"accept failed: {error}", file=sys.stderr)
                time.sleep(RESPAWN_DELAY_S)
                continue
            accept_ns = time.monotonic_ns()
            if not connections.add(sock):
                sock.close()
                return
            if not own_threads:
                self._converse(connections, sock, accept_ns)
                continue
            try:
                threading.Thread(target=self._converse, args=(connections, sock, accept_ns), daemon=True).start()
            except RuntimeError as error:
                print(f"connection refused: {error}", file=sys.stderr)
                connections.remove(sock)

    def _converse(self, connections: Connections, sock: socket.socket, accept_ns: int) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            set_timeouts(sock, IDLE_S)
            Conversation(sock, accept_ns, self._options, self._service, self._truth).run()
        except Exception:
            # A fault of this server must not end a worker; the connection closes without an answer.
            traceback.print_exc()
        finally:
            connections.remove(sock)

    def _supervise(self) -> None:
        """Keep the workers running until the signal, then end them."""
        awaited = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        workers = {self._fork() for _ in range(self._options.workers)}
        while signal.sigwait(awaited) == signal.SIGCHLD:
            dead = reap(workers)
            if dead:
                time.sleep(RESPAWN_DELAY_S)
            workers |= {self._fork() for _ in range(dead)}
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 2 * GRACE_S + 1
        while workers and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
            reap(workers)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _fork(self) -> int:
        master = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
            if os.getppid() == master:  # or it died before the line above
                self._serve(own_threads=False)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)


def reap(workers: set[int]) -> int:
    """Take the dead out of `workers` and return how many they were."""
    dead = {pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]}
    workers -= dead
    return len(dead)


def serve(options: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raises UsageError where the address or a path cannot be used."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        listener = socket.create_server((options.host, options.port), backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {options.host}:{options.port}: {error}; choose another --port or --host") from error
    with listener:
        try:
            server = Server(options, listener)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"cannot use the storage root or the truth file: {error}; choose another --root or --truth") from error
        port = listener.getsockname()[1]
        print(f"listening on http://{options.host}:{port} ({options.model}, pid {os.getpid()})", file=sys.stderr, flush=True)
        server.run()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m bucketprobe.demo.bucket",
        description="A reference Bucket v1 server. Example: python -m bucketprobe.demo.bucket --port 8080 --root /tmp/bucket",
    )
    parser.add_argument("--port", type=int, required=True, help="TCP port; 0 takes a free one and prints it")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="storage root; created where it is missing")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--model", choices=("threads", "prefork"), default="threads", help="who serves (default %(default)s)")
    parser.add_argument("--workers", type=positive, default=32, metavar="N", help="prefork: worker processes (default %(default)s)")
    parser.add_argument("--metadata", choices=("json", "sqlite"), default="json", help="where metadata goes (default %(default)s)")
    parser.add_argument("--verify", action="store_true", help="read each artifact back after storing it")
    parser.add_argument("--sendfile", action="store_true", help="send artifacts by sendfile(2)")
    parser.add_argument("--max-bytes", type=positive, default=5 << 30, metavar="N", help="largest artifact (default %(default)s)")
    parser.add_argument("--chunk-size", type=positive, default=65536, metavar="N", help="bytes per read (default %(default)s)")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="append one JSON line per request: what it did, and when")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        serve(parse_options(arguments))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 as the reference Bucket speaks it: a connection's bytes, requests out of them, and answers.

How bytes come and go differs from model to model, and each has its own kind of `Wire`; the rest is the same for all.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import parse_qsl, urlsplit

from bucketprobe.demo.truth import Trace

HEAD_LIMIT = 16384
LINE_LIMIT = 1024
IDLE_S = 75
LINGER_S = 2.0
LINGER_SILENCE_S = 1

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


class Wire(ABC):
    """One connection's bytes, buffered. `recv_ns` is the clock after the latest read, `sent` counts since `begin`.

    `fill`: pieces of a body are whole chunks, but for the last one; else as much as there is.
    """

    def __init__(self, sock: socket.socket, chunk_size: int, new_trace: Callable[[], Trace], *, fill: bool = False) -> None:
        self._sock = sock
        self._chunk_size = chunk_size
        self._least = chunk_size if fill else 1
        self._new_trace = new_trace
        self._buffer = bytearray(max(chunk_size, HEAD_LIMIT))
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self.recv_ns = 0
        self.begin_ns = 0
        self.sent = 0
        self.trace = new_trace()

    @abstractmethod
    async def _receive(self) -> None:
        """Wait until there is more in the buffer, which has room. Raises Disconnected."""

    @abstractmethod
    async def _transfer(self, call: Callable[..., int], *arguments: object) -> int:
        """Send by this call as much as it takes, at least a byte. Raises OSError, Disconnected."""

    @abstractmethod
    async def linger(self) -> None:
        """Let a client that still sends read the answer: close(2) with unread data would reset the connection."""

    @property
    def buffered(self) -> int:
        return self._end - self._start

    async def begin(self) -> bool:
        """Wait for the first byte of the next request. False: none came before the client closed or fell silent."""
        self.trace = self._new_trace()
        self.sent = 0
        if not self.buffered:
            try:
                await self._receive()
            except Disconnected:
                return False
        self.begin_ns = self._first_byte_ns()
        return True

    async def head(self) -> bytes:
        """The bytes up to the next empty line, without it. Raises Problem, Disconnected."""
        return await self._until(b"\r\n\r\n", HEAD_LIMIT)

    async def line(self) -> bytes:
        """The bytes up to the next CRLF, without it. Raises Problem, Disconnected."""
        return await self._until(b"\r\n", LINE_LIMIT)

    async def take(self, limit: int) -> memoryview:
        """At least one and at most `limit` bytes, valid until the next call. Raises Disconnected."""
        while self.buffered < min(limit, self._least):
            await self._fill()
        stop = min(self._end, self._start + limit)
        part = self._view[self._start : stop]
        self._start = stop
        return part

    async def send(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Send all of it. Raises Disconnected."""
        view = memoryview(data)
        while view:
            self.trace.mark()
            try:
                size = await self._transfer(self._sock.send, view, flags)
            except OSError as error:
                raise Disconnected from error
            self.trace.lap("send", size)
            self.sent += size
            view = view[size:]

    async def send_file(self, fd: int, size: int) -> None:
        """Send `size` bytes from the start of a file by sendfile(2). Raises Disconnected.

        The time counts as reading, which comes before sending where both happen in one call.
        """
        offset = 0
        while offset < size:
            self.trace.mark()
            try:
                count = await self._transfer(os.sendfile, self._sock.fileno(), fd, offset, size - offset)
            except OSError as error:
                raise Disconnected from error
            self.trace.lap("storage_read", count)
            if not count:
                raise Disconnected
            self.sent += count
            offset += count

    async def _until(self, end: bytes, limit: int) -> bytes:
        while (found := self._buffer.find(end, self._start, self._end)) < 0:
            if self.buffered >= limit:
                raise malformed("a line or the head is too long")
            await self._fill()
        data = bytes(self._view[self._start : found])
        self._start = found + len(end)
        return data

    async def _fill(self) -> None:
        self.trace.mark()
        await self._receive()
        self.trace.lap("receive", calls=0)  # which the one who read has counted

    def _first_byte_ns(self) -> int:
        """When the first byte in the buffer was read: in the latest read, where nothing is read beyond what a request needs."""
        return self.recv_ns

    def _make_room(self) -> memoryview:
        """Where the next bytes go: at most a chunk."""
        if self._start:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end : self._end + self._chunk_size]

    def _arrived(self, size: int) -> None:
        """The read is over that put so many bytes there."""
        self.recv_ns = time.monotonic_ns()
        self._end += size


class Body:
    """The entity of one request, read from the wire piece by piece. `length` None means chunked."""

    def __init__(self, wire: Wire, length: int | None) -> None:
        self._wire = wire
        self._left = length or 0  # of the body, or of the chunk
        self._chunk_begun = False
        self.length = length
        self.received = 0
        self.finished = length == 0

    async def next(self) -> memoryview | None:
        """The next piece, valid until the one after it; None at the end. Raises Problem, Disconnected."""
        if not self._left and self.length is None and not self.finished:
            await self._next_chunk()
        if not self._left:
            self.finished = True
            return None
        part = await self._wire.take(self._left)
        self._left -= len(part)
        self.received += len(part)
        return part

    def arrived(self) -> int:
        """Entity bytes that came out of the socket, read by the request or not; of an unread chunked body, those read."""
        if self.finished or self.length is None:
            return self.received
        return self.received + min(self._wire.buffered, self.length - self.received)

    async def _next_chunk(self) -> None:
        """Go to the next chunk, or past the trailer."""
        if self._chunk_begun and await self._wire.line():
            raise malformed("a chunk is longer than its size says")
        match = CHUNK_LINE.fullmatch(await self._wire.line())
        if match is None:
            raise malformed("a chunk has no size")
        self._left, self._chunk_begun = int(match[1], 16), True
        while not self._left and await self._wire.line():
            pass  # a trailer field, of which none means anything here


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


async def read_request(wire: Wire) -> Request:
    """Read and check one head. Raises Problem (400), Disconnected."""
    # RFC 9112 section 2.2: an empty line before the request line should be ignored.
    lines = (await wire.head()).removeprefix(b"\r\n").split(b"\r\n")
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

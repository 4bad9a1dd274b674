# SPDX-License-Identifier: Apache-2.0
"""The contract's calls over a store, and the requests of a connection, as every model of the reference Bucket serves them."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote_to_bytes

from bucketprobe.demo.hands import Hands
from bucketprobe.demo.messages import (
    Disconnected,
    Problem,
    Request,
    Response,
    Wire,
    json_response,
    parse_query,
    problem_response,
    read_request,
    render_head,
)
from bucketprobe.demo.store import Artifact, Store, close_file, read_part
from bucketprobe.demo.truth import NoTrace, Trace, TruthLog

#: How long a download may go on after the signal to stop, and after how long what failed in the server is tried again.
GRACE_S = 3.0
RETRY_S = 0.1

IDENTIFIER = re.compile(r"[A-Za-z0-9._-]{1,255}")
VERSION = re.compile(r'[^/\\:*?"<>|]{1,100}')
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve. `max_bytes`: the largest artifact; `chunk_size`: bytes per read of a socket or file at most; `fill`: whole
    chunks of an upload are hashed and written at a time, and not what each read brings."""

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
    fill: bool = False
    truth: Path | None = None


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


class Parts(Protocol):
    """The entity of an upload."""

    async def next(self) -> memoryview | None:
        """The next piece, valid until the one after it; None at the end. Raises Problem, Disconnected."""
        ...


class Service:
    """The contract's calls over a store. Each raises Problem for an error answer."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def answer(self, request: Request, wire: Wire) -> Response:
        """Serve one request whose head was read. Raises Problem, Disconnected."""
        target = parse_path(request.path)
        if request.method == "PUT" and not target.versions:
            declared = self._declared(request, target)
            if request.waits_for_continue and not wire.buffered:
                await wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                wire.sent = 0
            return await self._put(declared, request.body, wire.trace)
        if request.method not in ("GET", "HEAD"):
            allow = "GET, HEAD" if target.versions else "GET, HEAD, PUT"
            raise Problem(405, "method_not_allowed", f"This route has {allow} only.", allow=allow)
        if target.versions:
            return await self._versions(target, wire.trace)
        return await self._get(request, target, wire.trace)

    async def _put(self, declared: Artifact, body: Parts, trace: Trace) -> Response:
        async with self._store.upload(trace) as upload:
            while (part := await body.next()) is not None:
                await upload.write(part)
                self._check_size(upload.size)
            if not upload.size:
                raise empty()
            trace.mark()
            digest = upload.digest
            trace.lap("digest")
            if digest != declared.digest:
                message = "The bytes do not have the digest that X-Artifact-Digest declares."
                raise Problem(400, "digest_mismatch", message, declared=declared.digest, computed=digest)
            await upload.sync()
            artifact = replace(declared, size_bytes=upload.size, created_at=wall_time())
            created, stored = await self._store.commit(upload, artifact, trace)
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

    async def _get(self, request: Request, target: Target, trace: Trace) -> Response:
        query = parse_query(request.query)
        if "version" not in query:
            raise Problem(400, "missing_parameter", "The query parameter version is missing.", parameter="version")
        version = check_version(query["version"])
        wanted = check_digest(query["digest"]) if "digest" in query else None
        choice = query.get("metadata_only", "false").lower()
        if choice not in ("true", "false"):
            raise Problem(400, "invalid_parameter", "metadata_only must be true or false.", parameter="metadata_only")
        artifact = await self._store.find(target.bucket_id, target.artifact_id, version, trace)
        if artifact is None:
            raise Problem(404, "not_found", "There is no such version of this artifact.", version=version)
        if wanted not in (None, artifact.digest):
            message = "The stored artifact has another digest."
            raise Problem(412, "digest_precondition_failed", message, requested=wanted, stored=artifact.digest)
        if choice == "true":
            return json_response(200, asdict(artifact))
        headers = {"Content-Type": "application/octet-stream", "X-Artifact-Digest": artifact.digest}
        fd = None if request.method == "HEAD" else await self._store.open(artifact, trace)
        return Response(200, fd=fd, size=artifact.size_bytes, headers=headers)

    async def _versions(self, target: Target, trace: Trace) -> Response:
        found = await self._store.versions(target.bucket_id, target.artifact_id, trace)
        names = ("version", "digest", "size_bytes", "created_at")
        return json_response(200, {"versions": [{name: getattr(artifact, name) for name in names} for artifact in found]})


def empty() -> Problem:
    return Problem(400, "empty_artifact", "An artifact has at least one byte.")


def wall_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True, slots=True)
class Site:
    """What all connections of a process have in common. `hands` do what is left to do with files after the service's answer."""

    options: Options
    service: Service
    hands: Hands
    truth: TruthLog | None
    trace: Callable[[], Trace] = Trace

    def new_trace(self) -> Trace:
        return NoTrace() if self.truth is None else self.trace()


class Conversation:
    """The requests of one connection, one after the other."""

    def __init__(self, wire: Wire, accept_ns: int, site: Site) -> None:
        self._wire = wire
        self._accept_ns = accept_ns
        self._site = site

    async def run(self) -> None:
        """Serve until either side has had enough."""
        while await self._wire.begin() and await self._turn():
            pass

    async def _turn(self) -> bool:
        """Have one request served, in whatever the model has for it. True: another may follow on this connection."""
        return await self._exchange()

    async def _exchange(self) -> bool:
        """Serve one request. True: another may follow on this connection."""
        wire = self._wire
        request: Request | None = None
        response: Response | None = None
        head = b""
        try:
            try:
                request = await read_request(wire)
                response = await self._answer(request)
            except Problem as problem:
                response = problem_response(problem)
            keep = request is not None and request.keep_alive and request.body.finished
            head = render_head(response, request, keep)
            await self._send(head, response, with_body=request is None or request.method != "HEAD")
            end_ns, outcome = time.monotonic_ns(), "complete"
        except Disconnected:
            end_ns, outcome = time.monotonic_ns(), "client_closed"
            keep = False
        finally:
            if response is not None and response.fd is not None:
                await self._site.hands.do(close_file, response.fd, wire.trace)
        if self._site.truth is not None:
            seen = self._seen(request, response, max(0, wire.sent - len(head)))
            self._site.truth.write({**seen, "end_ns": end_ns, "outcome": outcome})
        if outcome == "complete" and not (request is not None and request.body.finished):
            await wire.linger()
        return keep

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._site.service.answer(request, self._wire)
        except (OSError, sqlite3.Error) as error:
            raise Problem(500, "storage_error", f"The storage failed: {error}.") from error

    async def _send(self, head: bytes, response: Response, *, with_body: bool) -> None:
        if response.fd is None:
            await self._wire.send(head + response.body if with_body else head)
            return
        await self._wire.send(head, socket.MSG_MORE)
        if self._site.options.sendfile:
            await self._wire.send_file(response.fd, response.size)
            return
        left = response.size
        try:
            while left:
                limit = min(left, self._site.options.chunk_size)
                part = await self._site.hands.do(read_part, response.fd, limit, self._wire.trace)
                left -= len(part)
                await self._wire.send(part)
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
            "files": asdict(wire.trace.files()),
            "metadata_files": None if self._site.options.metadata == "sqlite" else asdict(wire.trace.metadata_files),
            **wire.trace.notes,
        }

# SPDX-License-Identifier: Apache-2.0
"""A Bucket that gives nothing away: one event loop, files named by random UUIDs, metadata in memory and in an opaque index.

    python tests/truth/adversarial_server.py --root /var/tmp/adversary --truth truth.jsonl --mode pool

Neither a path nor a byte in a file tells whose a file is. `data/UUID` has an artifact's bytes from its first byte on, so that
there is no rename either; `meta/index` gets 32 random bytes for each version stored, through a descriptor that is open from the
start. What the bytes mean only this process knows: it forgets all when it ends.

`--mode block`: file calls in the coroutines, on the loop's thread. `pool`: each file call in a pool of threads. `sync`: the body
is received whole on the loop's thread, and all file calls of the request are made in a row by one thread of the pool.

The truth has a line per request as servers.py describes it. `end_ns` is when the answer's last byte had gone to the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

CHUNK = 65536
HEAD_LIMIT = 16384
THREADS = 8
INDEX_ENTRY = 32
COUNTERS = ("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames")
REASONS = {200: "OK", 201: "Created", 400: "Bad Request", 404: "Not Found", 409: "Conflict", 412: "Precondition Failed"}

Key = tuple[str, str, str]
#: Makes a file call where the mode has it made.
Caller = Callable[..., Any]


@dataclass(slots=True)
class Truth:
    """What one request did. `call` makes a file call and counts it where it belongs."""

    begin_ns: int
    accept_ns: int
    method: str = ""
    target_path: str = ""
    request_id: str | None = None
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    steps: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    metadata_files: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def call(self, step: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begin_ns = time.monotonic_ns()
        result = function(*arguments)
        ns = time.monotonic_ns() - begin_ns
        size = len(result) if step == "storage_read" else result if step in ("storage_write", "metadata") else 0
        total = self.steps.setdefault(step, [0, 0, 0])
        for index, value in enumerate((ns, size, 1)):
            total[index] += value
        self._count(step, size)
        return result

    def line(self, outcome: str, end_ns: int) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "method": self.method,
            "target_path": self.target_path,
            "status": self.status,
            "outcome": outcome,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "begin_ns": self.begin_ns,
            "accept_ns": self.accept_ns,
            "end_ns": end_ns,
            "steps": [{"step": step, "ns": ns, "bytes": size, "calls": calls} for step, (ns, size, calls) in self.steps.items()],
            "files": self.files,
            "metadata_files": self.metadata_files,
        }

    def _count(self, step: str, size: int) -> None:
        if step == "open":
            self.files["opens"] += 1
        elif step == "storage_sync":
            self.files["syncs"] += 1
        elif step in ("storage_write", "storage_read"):
            name = step.removeprefix("storage_")
            self.files[f"{name}_calls"] += 1
            self.files[f"{name}_bytes"] += size
        elif step == "metadata":
            self.metadata_files["write_calls"] += 1
            self.metadata_files["write_bytes"] += size


@dataclass(frozen=True, slots=True)
class Stored:
    name: str
    size: int
    digest: str


class Store:
    """Artifacts under random names. What is where only `known` tells."""

    def __init__(self, root: Path) -> None:
        self._data = root / "data"
        self._data.mkdir(parents=True, exist_ok=True)
        (root / "meta").mkdir(exist_ok=True)
        self._index = os.open(root / "meta" / "index", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.known: dict[Key, Stored] = {}

    def create(self, truth: Truth) -> tuple[str, int]:
        name = str(uuid.uuid4())
        return name, truth.call("open", os.open, self._data / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def open(self, truth: Truth, stored: Stored) -> int:
        fd: int = truth.call("open", os.open, self._data / stored.name, os.O_RDONLY | os.O_CLOEXEC)
        return fd

    @staticmethod
    def write(truth: Truth, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[truth.call("storage_write", os.write, fd, view) :]

    @staticmethod
    def sync(truth: Truth, fd: int) -> None:
        truth.call("storage_sync", os.fsync, fd)

    @staticmethod
    def read(truth: Truth, fd: int, limit: int) -> bytes:
        data: bytes = truth.call("storage_read", os.read, fd, limit)
        return data

    def end(self, truth: Truth, name: str, fd: int, keep: bool) -> None:
        """Close an upload, and note it in the index or throw it away."""
        truth.call("close", os.close, fd)
        if keep:
            truth.call("metadata", os.write, self._index, os.urandom(INDEX_ENTRY))
        else:
            truth.call("unlink", os.unlink, self._data / name)

    @staticmethod
    def close(truth: Truth, fd: int) -> None:
        truth.call("close", os.close, fd)


class Problem(Exception):
    """A request that gets an error answer."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.document = {"error": {"code": code, "message": f"{code}.", "details": {}}}


class Bucket:
    """Serves connections. `calls`: who makes the file calls, the loop's thread or those of a pool."""

    def __init__(self, root: Path, log: Path, mode: str) -> None:
        self._store = Store(root)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._whole = mode == "sync"
        self._pool = None if mode == "block" else ThreadPoolExecutor(THREADS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        accept_ns = time.monotonic_ns()
        # Without a buffer of its own, drain() returns when the kernel has all.
        writer.transport.set_write_buffer_limits(high=0)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while head := await self._head(reader):
                truth = Truth(time.monotonic_ns(), accept_ns)
                outcome = "client_closed"
                try:
                    await self._exchange(truth, head, reader, writer)
                    outcome = "complete"
                finally:
                    line = truth.line(outcome, time.monotonic_ns())
                    os.write(self._log, json.dumps(line).encode() + b"\n")
        writer.close()

    @staticmethod
    async def _head(reader: asyncio.StreamReader) -> bytes:
        """The next request's head; nothing where the client has closed."""
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""

    async def _exchange(self, truth: Truth, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        truth.method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        truth.request_id = headers.get("x-request-id")
        url = urlsplit(target)
        truth.target_path = url.path
        _, _, bucket_id, artifact_id, *rest = url.path.split("/")
        try:
            if truth.method == "PUT":
                if "expect" in headers:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                key = (bucket_id, artifact_id, headers["x-artifact-version"])
                status, document = await self._put(truth, key, headers, reader)
                await self._answer(truth, writer, status, document)
            elif rest == ["versions"]:
                await self._answer(truth, writer, 200, {"versions": self._versions(bucket_id, artifact_id)})
            else:
                await self._get(truth, bucket_id, artifact_id, dict(parse_qsl(url.query)), writer)
        except Problem as problem:
            await self._answer(truth, writer, problem.status, problem.document)

    # --- uploads ---

    async def _put(self, truth: Truth, key: Key, headers: dict[str, str], reader: asyncio.StreamReader) -> tuple[int, Any]:
        """Receive an upload and keep it, unless it is there. Raises Problem."""
        digest = headers["x-artifact-digest"]
        if self._whole:
            data = bytearray()
            async for part in parts(headers, reader, truth):
                data += part
            return await self._call(self._put_whole, truth, key, digest, bytes(data))
        hashed = hashlib.sha256()
        name, fd = await self._call(self._store.create, truth)
        async for part in parts(headers, reader, truth):
            hashed.update(part)
            await self._call(self._store.write, truth, fd, part)
        stored, status = Stored(name, truth.bytes_in, f"sha256:{hashed.hexdigest()}"), 0
        try:
            status = self._judge(key, digest, stored)
            await self._call(self._store.sync, truth, fd)
        finally:
            await self._call(self._store.end, truth, name, fd, status == 201)
        return self._kept(status, key, stored)

    def _put_whole(self, truth: Truth, key: Key, digest: str, data: bytes) -> tuple[int, Any]:
        """The file work of an upload in a row, on one thread. Raises Problem."""
        name, fd = self._store.create(truth)
        self._store.write(truth, fd, data)
        stored, status = Stored(name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}"), 0
        try:
            status = self._judge(key, digest, stored)
            self._store.sync(truth, fd)
        finally:
            self._store.end(truth, name, fd, status == 201)
        return self._kept(status, key, stored)

    def _kept(self, status: int, key: Key, stored: Stored) -> tuple[int, Any]:
        """The status, and the document of what is there now."""
        return status, document_of(key, self._store.known.setdefault(key, stored))

    def _judge(self, key: Key, digest: str, stored: Stored) -> int:
        """201 for what is new, 200 for what is there. Raises Problem."""
        if digest != stored.digest:
            raise Problem(400, "digest_mismatch")
        existing = self._store.known.get(key)
        if existing is None:
            return 201
        if existing.digest != stored.digest:
            raise Problem(409, "version_conflict")
        return 200

    # --- reads ---

    async def _get(self, truth: Truth, bucket_id: str, artifact_id: str, query: dict[str, str], writer: asyncio.StreamWriter) -> None:
        key = (bucket_id, artifact_id, query["version"])
        stored = self._store.known.get(key)
        if stored is None:
            raise Problem(404, "not_found")
        if query.get("digest", stored.digest) != stored.digest:
            raise Problem(412, "digest_precondition_failed")
        if query.get("metadata_only") == "true":
            await self._answer(truth, writer, 200, document_of(key, stored))
            return
        fd = await self._call(self._store.open, truth, stored)
        try:
            writer.write(response_head(200, stored.size, truth.request_id))
            truth.status = 200
            rest = stored.size
            while rest:
                part = await self._call(self._store.read, truth, fd, min(rest, CHUNK))
                rest -= len(part)
                writer.write(part)
                await writer.drain()
                truth.bytes_out += len(part)
        finally:
            await self._call(self._store.close, truth, fd)

    def _versions(self, bucket_id: str, artifact_id: str) -> list[Any]:
        return [document_of(key, stored) for key, stored in list(self._store.known.items()) if key[:2] == (bucket_id, artifact_id)]

    async def _answer(self, truth: Truth, writer: asyncio.StreamWriter, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        writer.write(response_head(status, len(body), truth.request_id) + body)
        await writer.drain()
        truth.status, truth.bytes_out = status, len(body)

    async def _call(self, function: Caller, *arguments: Any) -> Any:
        if self._pool is None:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


async def parts(headers: dict[str, str], reader: asyncio.StreamReader, truth: Truth) -> Any:
    """The entity in pieces as they come."""
    if headers.get("transfer-encoding") == "chunked":
        while rest := int(await reader.readuntil(b"\r\n"), 16):
            async for part in exactly(rest, reader, truth):
                yield part
            await reader.readexactly(2)
        await reader.readexactly(2)
        return
    async for part in exactly(int(headers["content-length"]), reader, truth):
        yield part


async def exactly(size: int, reader: asyncio.StreamReader, truth: Truth) -> Any:
    while size:
        part = await reader.read(min(size, CHUNK))
        if not part:
            raise ConnectionResetError
        size -= len(part)
        truth.bytes_in += len(part)
        yield part


def document_of(key: Key, stored: Stored) -> dict[str, Any]:
    return {"bucket_id": key[0], "artifact_id": key[1], "version": key[2], "digest": stored.digest, "size_bytes": stored.size}


def response_head(status: int, length: int, request_id: str | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", f"Content-Length: {length}"]
    if request_id is not None:
        lines.append(f"X-Request-ID: {request_id}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def run(root: Path, log: Path, mode: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    server = await asyncio.start_server(Bucket(root, log, mode).serve, "127.0.0.1", 0, limit=HEAD_LIMIT, backlog=512)
    port = server.sockets[0].getsockname()[1]
    print(f"listening on http://127.0.0.1:{port} ({mode}, pid {os.getpid()})", file=sys.stderr, flush=True)
    await ended.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A Bucket whose files give nothing away.")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="where everything is; made where it is missing")
    parser.add_argument("--truth", type=Path, required=True, metavar="FILE", help="append one JSON line per request")
    parser.add_argument("--mode", choices=("block", "pool", "sync"), default="block", help="where file calls are made [%(default)s]")
    options = parser.parse_args(arguments)
    asyncio.run(run(options.root, options.truth, options.mode))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What the two Python servers share: Bucket v1's store on files, with every call that matters counted and timed."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

CHUNK = 65536
COUNTERS = ("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames")
DATA_STEPS = {
    "open": "open",
    "write": "storage_write",
    "sync": "storage_sync",
    "read": "storage_read",
    "close": "close",
    **{call: call for call in ("mkdir", "rename", "unlink")},
}
META_STEPS = dict.fromkeys((*DATA_STEPS, "list"), "metadata")

Document = dict[str, Any]
Result = TypeVar("Result")


class Problem(Exception):
    """A request that gets an error answer."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.body = json.dumps({"error": {"code": code, "message": f"{code}.", "details": {}}}).encode()


def stopwatch(call: Callable[..., Result], *arguments: object) -> tuple[Result, int, int]:
    """What the call returns; its wall time and the thread's CPU time in it in ns, with the cost of taking them."""
    cpu_ns = time.thread_time_ns()
    begin_ns = time.monotonic_ns()
    result = call(*arguments)
    end_ns = time.monotonic_ns()
    return result, end_ns - begin_ns, time.thread_time_ns() - cpu_ns


def empty_call() -> tuple[int, int]:
    """Median wall time and CPU time of an update with no bytes, as the stopwatch has them: what is taken away from every other."""
    hashed = hashlib.sha256()
    seen = [stopwatch(hashed.update, b"")[1:] for _ in range(2000)]
    return round(statistics.median(wall for wall, _ in seen)), round(statistics.median(cpu for _, cpu in seen))


EMPTY_WALL_NS, EMPTY_CPU_NS = empty_call()


class Work:
    """What one request did. `data` and `metadata` make its calls on files."""

    def __init__(self, request_id: str | None, method: str, path: str) -> None:
        self.steps: dict[str, list[int]] = {}
        self.data = Calls(self.steps, DATA_STEPS)
        self.metadata = Calls(self.steps, META_STEPS)
        self.bytes_in = 0
        self.bytes_out = 0
        self.computed: str | None = None
        self._head = {"request_id": request_id, "method": method, "target_path": path, "begin_ns": time.monotonic_ns()}

    def hashing(self, size: int, call: Callable[..., Result], *arguments: object) -> Result:
        """Make one call that hashes so many bytes, as the steps `digest` (wall time) and `digest_cpu` (the thread's CPU time)."""
        result, wall_ns, cpu_ns = stopwatch(call, *arguments)
        for name, ns in (("digest", wall_ns - EMPTY_WALL_NS), ("digest_cpu", cpu_ns - EMPTY_CPU_NS)):
            step = self.steps.setdefault(name, [0, 0, 0])
            step[0] += max(0, ns)
            step[1] += size
            step[2] += 1
        return result

    def line(self, status: int | None, outcome: str = "complete") -> Document:
        """Its line of truth."""
        return {
            **self._head,
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "status": status,
            "outcome": outcome,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            # Both belong to the library: it accepts, and it may still hold what it was given to send.
            "accept_ns": None,
            "end_ns": None,
            "steps": [{"step": step, "ns": ns, "bytes": size, "calls": calls} for step, (ns, size, calls) in self.steps.items()],
            "files": self.data.counts,
            "metadata_files": self.metadata.counts,
            "computed": self.computed,
        }


class Calls:
    """System calls on one kind of files and their folders. Counts those that succeed, and adds up the time of all."""

    def __init__(self, steps: dict[str, list[int]], names: Mapping[str, str]) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self._steps = steps
        self._names = names

    def create(self, path: str) -> int:
        return self._open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def open(self, path: str) -> int:
        return self._open(path, os.O_RDONLY)

    def write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            size = self._timed("write", os.write, fd, view)
            self._count("write", size)
            view = view[size:]

    def read(self, fd: int, limit: int) -> bytes:
        data = self._timed("read", os.read, fd, limit)
        self._count("read", len(data))
        return data

    def sync(self, fd: int) -> None:
        self._timed("sync", os.fsync, fd)
        self.counts["syncs"] += 1

    def close(self, fd: int) -> None:
        self._timed("close", os.close, fd)

    def make_folder(self, path: str) -> None:
        self._timed("mkdir", lambda: os.makedirs(path, exist_ok=True))

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing where there is none. That it is opened for this is not counted: it is no file."""
        try:
            return self._timed("list", os.listdir, folder)
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        self._timed("unlink", os.unlink, path)

    def rename(self, source: str, target: str) -> None:
        self._timed("rename", os.rename, source, target)
        self.counts["renames"] += 1

    def _open(self, path: str, flags: int) -> int:
        fd = self._timed("open", os.open, path, flags, 0o644)
        self.counts["opens"] += 1
        return fd

    def _count(self, what: str, size: int) -> None:
        self.counts[f"{what}_calls"] += 1
        self.counts[f"{what}_bytes"] += size
        self._steps[self._names[what]][1] += size

    def _timed(self, what: str, function: Callable[..., Result], *arguments: object) -> Result:
        step = self._steps.setdefault(self._names[what], [0, 0, 0])
        begin_ns = time.monotonic_ns()
        try:
            return function(*arguments)
        finally:
            step[0] += time.monotonic_ns() - begin_ns
            step[2] += 1


class TruthLog:
    """Appends one line per request, each by one write(2)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: Document) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")


class Upload:
    """One PUT: its declared metadata, its temporary file, and its end. Raises Problem where a header is missing."""

    def __init__(self, store: Store, work: Work, artifact: tuple[str, str], headers: Mapping[str, str]) -> None:
        names = ("x-artifact-version", "x-artifact-digest", "x-uploaded-by", "x-provenance-source")
        if any(not headers.get(name) for name in names):
            raise Problem(400, "missing_header")
        version, digest, uploaded_by, source = (headers[name] for name in names)
        self._document: Document = {
            "bucket_id": artifact[0],
            "artifact_id": artifact[1],
            "version": version,
            "digest": digest.lower(),
            "size_bytes": 0,
            "created_at": "",
            "uploaded_by": uploaded_by,
            "provenance_source": source,
        }
        self._store = store
        self._work = work
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._path = f"{store.root}/tmp/{uuid.uuid4()}"
        self._fd = work.data.create(self._path)

    def write(self, data: bytes) -> None:
        self._work.bytes_in += len(data)
        if self._store.chunk is None:
            self._keep(data)
            return
        self._pending += data
        while len(self._pending) >= self._store.chunk:
            self._keep(bytes(self._pending[: self._store.chunk]))
            del self._pending[: self._store.chunk]

    def finish(self) -> tuple[int, Document]:
        """Store it, unless it is there. Returns the status and the document that exists. Raises Problem."""
        if self._pending:
            self._keep(bytes(self._pending))
        self._work.computed = f"sha256:{self._work.hashing(0, self._hash.hexdigest)}"
        if self._document["digest"] != self._work.computed:
            raise Problem(400, "digest_mismatch")
        self._work.data.sync(self._fd)
        key = (self._document["bucket_id"], self._document["artifact_id"], self._document["version"])
        existing = self._store.find(self._work, *key)
        if existing is not None:
            if existing["digest"] != self._document["digest"]:
                raise Problem(409, "version_conflict")
            return 200, existing
        self._document |= {"size_bytes": self._work.bytes_in, "created_at": datetime.now(UTC).isoformat()}
        self._store.keep(self._work, self._path, self._document)
        return 201, self._document

    def _keep(self, data: bytes) -> None:
        self._work.hashing(len(data), self._hash.update, data)
        self._work.data.write(self._fd, data)

    def close(self) -> None:
        """The temporary file is gone afterwards, unless it was moved away."""
        self._work.data.close(self._fd)
        if os.path.exists(self._path):
            self._work.data.remove(self._path)


class Store:
    """Artifacts on files under one root. `chunk`: how many bytes of an upload are hashed and written at a time; None: as they come."""

    def __init__(self, root: Path, chunk: int | None = None) -> None:
        self.root = root
        self.chunk = chunk

    def find(self, work: Work, bucket_id: str, artifact_id: str, version: str) -> Document | None:
        return self._load(work, self._sidecar(bucket_id, artifact_id, version))

    def keep(self, work: Work, source: str, document: Document) -> None:
        """Move a finished upload to its place, and write its metadata."""
        key = (document["bucket_id"], document["artifact_id"], document["version"])
        for calls, path in ((work.data, self.data_path(*key)), (work.metadata, self._sidecar(*key))):
            calls.make_folder(os.path.dirname(path))
        work.data.rename(source, self.data_path(*key))
        temporary = f"{self.root}/meta/{uuid.uuid4()}.tmp"
        fd = work.metadata.create(temporary)
        try:
            work.metadata.write(fd, json.dumps(document).encode())
            work.metadata.sync(fd)
        finally:
            work.metadata.close(fd)
        work.metadata.rename(temporary, self._sidecar(*key))

    def get(self, work: Work, artifact: tuple[str, str], query: str) -> tuple[Document, bool]:
        """The document that a query asks for, and whether it wants the bytes. Raises Problem."""
        wanted = dict(parse_qsl(query))
        document = self.find(work, *artifact, wanted.get("version", ""))
        if document is None:
            raise Problem(404, "not_found")
        if "digest" in wanted and wanted["digest"].lower() != document["digest"]:
            raise Problem(412, "digest_precondition_failed")
        return document, wanted.get("metadata_only") != "true"

    def versions(self, work: Work, bucket_id: str, artifact_id: str) -> list[Document]:
        folder = f"{self.root}/meta/{bucket_id}/{artifact_id}"
        found = [self._load(work, f"{folder}/{name}") for name in work.metadata.names(folder)]
        names = ("version", "digest", "size_bytes", "created_at")
        return [{name: document[name] for name in names} for document in found if document]

    def parts(self, work: Work, document: Document) -> Iterator[bytes]:
        """The bytes of an artifact; no read(2) more than it takes."""
        fd = work.data.open(self.data_path(document["bucket_id"], document["artifact_id"], document["version"]))
        try:
            rest = document["size_bytes"]
            while rest and (part := work.data.read(fd, min(rest, CHUNK))):
                rest -= len(part)
                yield part
        finally:
            work.data.close(fd)

    def data_path(self, bucket_id: str, artifact_id: str, version: str) -> str:
        return f"{self.root}/data/{bucket_id}/{artifact_id}/{version}"

    def _sidecar(self, bucket_id: str, artifact_id: str, version: str) -> str:
        return f"{self.root}/meta/{bucket_id}/{artifact_id}/{version}.json"

    @staticmethod
    def _load(work: Work, path: str) -> Document | None:
        try:
            fd = work.metadata.open(path)
        except FileNotFoundError:
            return None
        try:
            document: Document = json.loads(work.metadata.read(fd, CHUNK))
        finally:
            work.metadata.close(fd)
        return document


def parse_path(path: str) -> tuple[tuple[str, str], bool]:
    """Bucket and artifact, and whether its versions are asked for. Raises Problem (404)."""
    match path.split("/"):
        case ["", "v1", bucket_id, artifact_id]:
            return (bucket_id, artifact_id), False
        case ["", "v1", bucket_id, artifact_id, "versions"]:
            return (bucket_id, artifact_id), True
        case _:
            raise Problem(404, "unknown_route")


def say_listening(port: int, name: str) -> None:
    """The line by which the one who started it knows the port, as the reference Bucket prints it."""
    print(f"listening on http://127.0.0.1:{port} ({name}, pid {os.getpid()})", file=sys.stderr, flush=True)

# SPDX-License-Identifier: Apache-2.0
"""Where the reference Bucket keeps artifacts and their metadata.

Under the root: `tmp/` holds uploads in progress, `data/BUCKET/ARTIFACT/VERSION` the bytes, `meta/` the metadata (JSON
sidecars `BUCKET/ARTIFACT/VERSION.json` or one SQLite database `index.db`), `locks/` the lock files of the commits.

Each file operation is one call that goes through the `Hands` of the server's model.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import zlib
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from bucketprobe.demo.hands import Hands
from bucketprobe.demo.messages import Problem
from bucketprobe.demo.truth import FileWork, Trace

LOCK_STRIPES = 1024
NAME_LIMIT = 200
SIDECAR_READ = 8192


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


class Metadata(Protocol):
    """Where the metadata documents are. A document that is there makes its version exist.

    `work` counts the system calls on files, where each document is one.
    """

    def get(self, bucket_id: str, artifact_id: str, version: str, work: FileWork) -> Artifact | None: ...

    def put(self, artifact: Artifact, work: FileWork) -> None: ...

    def versions(self, bucket_id: str, artifact_id: str, work: FileWork) -> list[Artifact]: ...


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

    def get(self, bucket_id: str, artifact_id: str, version: str, work: FileWork) -> Artifact | None:
        return self._load(f"{folder_of(self._root, bucket_id, artifact_id)}/{file_name(version)}.json", work)

    def put(self, artifact: Artifact, work: FileWork) -> None:
        folder = folder_of(self._root, artifact.bucket_id, artifact.artifact_id)
        os.makedirs(folder, exist_ok=True)
        path = f"{folder}/{file_name(artifact.version)}.json"
        # The commit's lock leaves one writer per version, so that the temporary name needs no more than its suffix.
        with open(path + ".tmp", "wb", buffering=0) as file:
            work.opens += 1
            work.write_bytes += file.write(json.dumps(asdict(artifact)).encode())
            work.write_calls += 1
        os.rename(path + ".tmp", path)
        work.renames += 1

    def versions(self, bucket_id: str, artifact_id: str, work: FileWork) -> list[Artifact]:
        folder = folder_of(self._root, bucket_id, artifact_id)
        try:
            names = [name for name in os.listdir(folder) if name.endswith(".json")]
        except FileNotFoundError:
            return []
        found = [self._load(f"{folder}/{name}", work) for name in names]
        return sorted((artifact for artifact in found if artifact), key=lambda artifact: artifact.created_at)

    @staticmethod
    def _load(path: str, work: FileWork) -> Artifact | None:
        text = b""
        try:
            with open(path, "rb", buffering=0) as file:
                work.opens += 1
                # Each is one system call, the one that finds the end included; a read of all would not tell how many it made.
                while part := file.read(SIDECAR_READ):
                    text += part
                    work.read_calls += 1
        except FileNotFoundError:
            return None
        work.read_calls += 1
        work.read_bytes += len(text)
        return Artifact(**json.loads(text))


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

    def get(self, bucket_id: str, artifact_id: str, version: str, work: FileWork) -> Artifact | None:
        query = "SELECT * FROM artifact WHERE bucket_id = ? AND artifact_id = ? AND version = ?"
        row = self._connection().execute(query, (bucket_id, artifact_id, version)).fetchone()
        return Artifact(*row) if row else None

    def put(self, artifact: Artifact, work: FileWork) -> None:
        self._connection().execute("INSERT INTO artifact VALUES (?, ?, ?, ?, ?, ?, ?, ?)", tuple(asdict(artifact).values()))

    def versions(self, bucket_id: str, artifact_id: str, work: FileWork) -> list[Artifact]:
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

    def __init__(self, folder: Path, hands: Hands, trace: Trace) -> None:
        self.path = f"{folder}/{os.getpid()}-{secrets.token_hex(8)}.part"
        self._hands = hands
        self._trace = trace
        self._fd = -1
        self._hash = hashlib.sha256()
        self.size = 0

    async def __aenter__(self) -> Upload:
        self._fd = await self._hands.do(self._open)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._hands.do(close_file, self._fd, self._trace)
        if self.path:
            await self._hands.do(remove_file, self.path, self._trace)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    async def write(self, part: memoryview) -> None:
        self._trace.mark()
        self._hash.update(part)
        self._trace.lap("digest", len(part))
        self.size += len(part)
        while part:
            written = await self._hands.do(self._write, part)
            part = part[written:]

    async def sync(self) -> None:
        await self._hands.do(self._sync)

    async def move(self, path: str) -> None:
        await self._hands.do(self._rename, path)
        self.path = ""

    def _open(self) -> int:
        return self._trace.timed("open", os.open, self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def _write(self, part: memoryview) -> int:
        self._trace.mark()
        written = os.write(self._fd, part)
        self._trace.lap("storage_write", written)
        return written

    def _sync(self) -> None:
        self._trace.timed("storage_sync", os.fsync, self._fd)

    def _rename(self, path: str) -> None:
        self._trace.timed("rename", os.rename, self.path, path)


class Store:
    """Artifacts on a file system. Safe for many threads and processes on the same root.

    `metadata`: json or sqlite; `verify`: read each artifact back; `chunk_size`: bytes per read of it at most.
    """

    def __init__(self, root: Path, hands: Hands, *, metadata: str, verify: bool, chunk_size: int) -> None:
        self._hands = hands
        self._verifies = verify
        self._chunk_size = chunk_size
        self._data, self._tmp, self._locks = (root / name for name in ("data", "tmp", "locks"))
        meta = root / "meta"
        for folder in (self._data, self._tmp, self._locks, meta):
            folder.mkdir(parents=True, exist_ok=True)
        self._metadata: Metadata = SqliteMetadata(meta) if metadata == "sqlite" else JsonMetadata(meta)

    def upload(self, trace: Trace) -> Upload:
        return Upload(self._tmp, self._hands, trace)

    async def find(self, bucket_id: str, artifact_id: str, version: str, trace: Trace) -> Artifact | None:
        """What exists of this version."""

        def find() -> Artifact | None:
            trace.mark()
            found = self._metadata.get(bucket_id, artifact_id, version, trace.metadata_files)
            trace.lap("metadata")
            return found

        return await self._hands.do(find)

    async def versions(self, bucket_id: str, artifact_id: str, trace: Trace) -> list[Artifact]:
        """All that exist of this artifact, the oldest first."""

        def find() -> list[Artifact]:
            trace.mark()
            found = self._metadata.versions(bucket_id, artifact_id, trace.metadata_files)
            trace.lap("metadata")
            return found

        return await self._hands.do(find)

    async def commit(self, upload: Upload, artifact: Artifact, trace: Trace) -> tuple[bool, Artifact]:
        """Make a finished upload exist, once. Returns (created, what exists now). Raises Problem (409, 500).

        A version exists from the moment its metadata does. Until then its file belongs to a server that died on the way,
        and may be replaced; so the rename is blind, and the lock makes look-up, rename and metadata one step.
        """
        async with self._lock(artifact):
            existing = await self.find(artifact.bucket_id, artifact.artifact_id, artifact.version, trace)
            if existing is not None:
                if existing.digest == artifact.digest:
                    return False, existing
                message = "The version exists with other content."
                raise Problem(409, "version_conflict", message, version=artifact.version, digest=existing.digest)
            path = self._path(artifact)
            await self._hands.do(make_folder, os.path.dirname(path), trace)
            await upload.move(path)
            if self._verifies:
                await self.verify(path, artifact.digest, trace)
            await self._hands.do(self._publish, artifact, trace)
        return True, artifact

    async def verify(self, path: str, digest: str, trace: Trace) -> None:
        """Read a stored file back and compare its digest; a file that differs is removed. Raises Problem (500)."""
        hashed = hashlib.sha256()
        fd, left = await self._hands.do(open_to_read, path, trace)
        try:
            while left:
                part = await self._hands.do(read_part, fd, min(left, self._chunk_size), trace)
                left -= len(part)
                trace.mark()
                hashed.update(part)
                trace.lap("digest", len(part))
        finally:
            await self._hands.do(close_file, fd, trace)
        if f"sha256:{hashed.hexdigest()}" != digest:
            await self._hands.do(remove_file, path, trace)
            raise Problem(500, "post_storage_mismatch", "The stored bytes differ from those that were received.", digest=digest)

    async def open(self, artifact: Artifact, trace: Trace) -> int:
        """Open an artifact's bytes for reading and return the file descriptor. Raises Problem (500), OSError."""
        fd, size = await self._hands.do(open_to_read, self._path(artifact), trace)
        if size != artifact.size_bytes:
            await self._hands.do(close_file, fd, trace)
            raise Problem(500, "storage_error", "The stored file does not have the size that its metadata says.")
        return fd

    def _publish(self, artifact: Artifact, trace: Trace) -> None:
        trace.mark()
        self._metadata.put(artifact, trace.metadata_files)
        trace.lap("metadata")

    def _path(self, artifact: Artifact) -> str:
        return f"{folder_of(self._data, artifact.bucket_id, artifact.artifact_id)}/{file_name(artifact.version)}"

    @contextlib.asynccontextmanager
    async def _lock(self, artifact: Artifact) -> AsyncIterator[None]:
        # flock(2) belongs to the open file description: it excludes threads and processes alike, and ends with either.
        key = f"{artifact.bucket_id}/{artifact.artifact_id}/{artifact.version}"
        stripe = zlib.crc32(key.encode()) % LOCK_STRIPES
        async with self._hands.turn(stripe):
            fd = await self._hands.do(open_lock, f"{self._locks}/{stripe}")
            try:
                await self._hands.do(fcntl.flock, fd, fcntl.LOCK_EX)
                yield
            finally:
                await self._hands.do(os.close, fd)


def make_folder(path: str, trace: Trace) -> None:
    trace.mark()
    os.makedirs(path, exist_ok=True)
    trace.lap("mkdir")


def remove_file(path: str, trace: Trace) -> None:
    trace.timed("unlink", os.unlink, path)


def close_file(fd: int, trace: Trace) -> None:
    trace.timed("close", os.close, fd)


def open_lock(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def open_to_read(path: str, trace: Trace) -> tuple[int, int]:
    """The file descriptor, and the size."""
    fd = trace.timed("open", os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    return fd, os.fstat(fd).st_size


def read_part(fd: int, limit: int, trace: Trace) -> bytes:
    """The next bytes of a file. Raises Problem (500) at its end."""
    trace.mark()
    part = os.read(fd, limit)
    trace.lap("storage_read", len(part))
    if not part:
        raise Problem(500, "storage_error", "The stored file ended early.")
    return part

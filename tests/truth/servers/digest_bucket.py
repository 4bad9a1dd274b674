# SPDX-License-Identifier: Apache-2.0
"""The reference Bucket, which here knows the truth about its digests, and errs where its client asks it to.

digest_bucket.py --watch FILE [--manner MANNER] [--verify-reads], and the options of python -m bucketprobe.demo.bucket, with --truth

FILE is timed_update.c as built (servers.py does).

MANNER is how an upload is hashed:

    inline     each piece before it is written, by the thread that writes it or that runs the event loop (default)
    pool       each piece before it is written, in the model's pool of threads
    whole      the body is received whole, and hashed by one call before any of it is written
    read-back  the pieces are written first, and what is hashed is what the file then holds (model threads only)
    more       as inline, and other things, too: the SHA-256 of a token, the MD5 of the body, an ETag over the answer

--verify-reads: a GET with `digest=` reads and hashes the file before it is answered.

Two headers of a request: with `X-Test-Hide: 1` an upload whose digest is not the declared one is stored and answered with 201
all the same; with `X-Test-Corrupt-Stored: 1` one byte of the stored file is changed, after it was written and renamed, and before
it is read back, where --verify has it read back.

A line of the truth has two steps for the SHA-256 of artifacts, be it of the body or of what is read back: `digest` by the wall
clock, and `digest_cpu` by the CPU time of the thread (CLOCK_THREAD_CPUTIME_ID), with which an observer of on-CPU time has to agree; and
`digest_other` and `digest_other_cpu` likewise for all other hashing. Both are what the thread spent in the call, with whatever an
observer's probes cost it there; only the clocks' own cost, measured at the start, is taken away. They are read in C around libcrypto's
function alone, on the state within hashlib's own object: clocks that Python reads would hold the way back to its interpreter lock, too,
which where threads contend for it doubled the CPU time of 16 KiB. The clocks and ctypes cost the server some 2 us for each update,
between reading a piece and writing it; an update by hashlib itself costs 0.2 us there.
Fields: `computed`, the digest of an upload as this server found it; `verified`, `match` or `mismatch` for each digest of what was
read back; neither is there where there was none.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bucketprobe.demo import bucket, messages, service
from bucketprobe.demo import store as stores
from bucketprobe.demo.hands import Hands, Here
from bucketprobe.demo.loops import Pool, Received, WorkerService
from bucketprobe.demo.truth import Trace, TruthLog
from bucketprobe.errors import BucketprobeError, UsageError

#: Of libcrypto's state in hashlib's objects: a pointer behind the head of every object.
CONTEXT_OFFSET = object.__basicsize__
TRIES = 2000
OTHER = "digest_other"
MANNERS = ("inline", "pool", "whole", "read-back", "more")


Buffer = bytes | bytearray | memoryview


class Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class Watch:
    """timed_update.c, for the hashes of hashlib. Raises UsageError where these are not as CPython's are with OpenSSL 3."""

    def __init__(self, library: Path) -> None:
        self._timed = ctypes.CDLL(str(library)).timed_update
        self._timed.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._update = ctypes.cast(ctypes.CDLL("libcrypto.so.3").EVP_DigestUpdate, ctypes.c_void_p)
        self._check()
        empty = [self._take(hashlib.sha256(), b"") for _ in range(TRIES)]
        self._wall_cost, self._cpu_cost = (round(statistics.median(times)) for times in zip(*empty, strict=True))

    def update(self, hashed: Hash, data: Buffer) -> tuple[int, int]:
        """Wall time and CPU time that it took, in ns, without the cost of the clocks."""
        wall_ns, cpu_ns = self._take(hashed, data)
        return max(0, wall_ns - self._wall_cost), max(0, cpu_ns - self._cpu_cost)

    def _take(self, hashed: Hash, data: Buffer) -> tuple[int, int]:
        # A piece that cannot be written to is a whole object of bytes, of which ctypes takes the address itself.
        whole = data.obj if isinstance(data, memoryview) and data.readonly else data
        address = whole if isinstance(whole, bytes) else ctypes.addressof(ctypes.c_char.from_buffer(whole))
        taken = (ctypes.c_int64 * 2)()
        context = ctypes.c_void_p.from_address(id(hashed) + CONTEXT_OFFSET)
        if self._timed(self._update, context, address, len(data), taken) != 1:
            raise RuntimeError("EVP_DigestUpdate failed")
        return taken[0], taken[1]

    def _check(self) -> None:
        hashed, text = hashlib.sha256(), b"known bytes"
        self._take(hashed, text)
        if hashed.hexdigest() != hashlib.sha256(text).hexdigest():
            raise UsageError("hashlib does not keep its state as expected; run this with CPython 3.11 and OpenSSL 3")


class DigestTrace(Trace):
    """And what the client asked to go wrong. `pretended`: the digest that a hiding server says it computed."""

    __slots__ = ("_watch", "corrupts", "pretended")

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self.corrupts = False
        self.pretended: str | None = None

    def hashing(self, hashed: Hash, part: Buffer, step: str = "digest") -> None:
        """Give some bytes to a hash: by default those of an artifact to its SHA-256."""
        wall_ns, cpu_ns = self._watch.update(hashed, part)
        self.add(step, wall_ns, len(part))
        self.add(f"{step}_cpu", cpu_ns, len(part))

    def hashing_more(self, text: bytes) -> str:
        """The SHA-256 of something else."""
        hashed = hashlib.sha256()
        self.hashing(hashed, text, OTHER)
        return hashed.hexdigest()

    def note_verified(self, matches: bool) -> None:
        self.notes["verified"] = [*self.notes.get("verified", []), "match" if matches else "mismatch"]  # type: ignore[misc]


class DigestUpload(stores.Upload):
    """Hashes in its manner."""

    def __init__(self, folder: Path, hands: Hands, trace: DigestTrace, manner: str, chunk_size: int) -> None:
        super().__init__(folder, hands, trace)
        self._told = trace
        self._manner = manner
        self._chunk_size = chunk_size
        self._md5 = hashlib.md5(usedforsecurity=False)

    async def write(self, part: memoryview) -> None:
        if self._manner == "pool":
            await self._hands.do(self._told.hashing, self._hash, part)
        elif self._manner != "read-back":
            self._told.hashing(self._hash, part)
        if self._manner == "more":
            self._told.hashing(self._md5, part, OTHER)
        self.size += len(part)
        while part:
            part = part[await self._hands.do(self._write, part) :]

    @property
    def digest(self) -> str:
        if self._manner == "read-back":
            self._read_back()
        if self._manner == "more":
            self._md5.hexdigest()
        computed = f"sha256:{self._hash.hexdigest()}"
        self._told.notes["computed"] = computed
        self._told.mark()  # the caller measures this, too: it shall find nothing
        return self._told.pretended or computed

    def _read_back(self) -> None:
        fd, left = stores.open_to_read(self.path, self._told)
        while left:
            part = stores.read_part(fd, min(left, self._chunk_size), self._told)
            left -= len(part)
            self._told.hashing(self._hash, part)
        stores.close_file(fd, self._told)


class DigestStore(stores.Store):
    """Uploads in their manner, and files that are read back with a watch in hand."""

    def __init__(self, root: Path, hands: Hands, *, manner: str, **options: Any) -> None:
        super().__init__(root, hands, **options)
        self._manner = manner

    def upload(self, trace: Trace) -> stores.Upload:
        assert isinstance(trace, DigestTrace)
        return DigestUpload(self._tmp, self._hands, trace, self._manner, self._chunk_size)

    async def verify(self, path: str, digest: str, trace: Trace) -> None:
        assert isinstance(trace, DigestTrace)
        if trace.corrupts:
            await self._hands.do(corrupt, path)
        fd, size = await self._hands.do(stores.open_to_read, path, trace)
        try:
            matches = await self.read_back(fd, size, trace) == digest
        finally:
            await self._hands.do(stores.close_file, fd, trace)
        trace.note_verified(matches)
        if not matches:
            await self._hands.do(stores.remove_file, path, trace)
            raise stored_differently(digest)

    async def read_back(self, fd: int, size: int, trace: DigestTrace) -> str:
        """The digest of an open file of so many bytes, from its start."""
        hashed = hashlib.sha256()
        left = size
        while left:
            part = await self._hands.do(stores.read_part, fd, min(left, self._chunk_size), trace)
            left -= len(part)
            if self._manner == "pool":
                await self._hands.do(trace.hashing, hashed, part)
            else:
                trace.hashing(hashed, part)
        os.lseek(fd, 0, os.SEEK_SET)
        return f"sha256:{hashed.hexdigest()}"


def corrupt(path: str) -> None:
    """Flip a bit of the byte in the middle, through a descriptor of its own that no trace counts."""
    fd = os.open(path, os.O_RDWR)
    try:
        middle = os.fstat(fd).st_size // 2
        os.pwrite(fd, bytes([os.pread(fd, 1, middle)[0] ^ 1]), middle)
    finally:
        os.close(fd)


def stored_differently(digest: str) -> messages.Problem:
    return messages.Problem(500, "post_storage_mismatch", "The stored bytes differ from those that were received.", digest=digest)


class DigestService(service.Service):
    """Does as the request's headers and its own options have it."""

    def __init__(self, stored: DigestStore, options: argparse.Namespace, max_bytes: int, *more: Any) -> None:
        super().__init__(stored, max_bytes, *more)
        self._stored = stored
        self._manner = options.manner
        self._verifies_reads = options.verify_reads

    async def answer(self, request: messages.Request, wire: messages.Wire) -> messages.Response:
        trace = wire.trace
        assert isinstance(trace, DigestTrace)
        trace.corrupts = "x-test-corrupt-stored" in request.headers
        if "x-test-hide" in request.headers:
            trace.pretended = request.headers["x-artifact-digest"].lower()
        if self._manner != "more":
            return await super().answer(request, wire)
        trace.hashing_more(f"token of {wire.sent}".encode())
        response = await super().answer(request, wire)
        response.headers["ETag"] = f'"{trace.hashing_more(response.body[:200])}"'
        return response

    async def _put(self, declared: stores.Artifact, body: service.Parts, trace: Trace) -> messages.Response:
        if self._manner != "whole":
            return await super()._put(declared, body, trace)
        data = bytearray()
        while (part := await body.next()) is not None:
            data += part
        return await super()._put(declared, Received(bytes(data)), trace)

    async def _get(self, request: messages.Request, target: service.Target, trace: Trace) -> messages.Response:
        response = await super()._get(request, target, trace)
        wanted = messages.parse_query(request.query).get("digest")
        if not self._verifies_reads or wanted is None or response.fd is None:
            return response
        assert isinstance(trace, DigestTrace)
        matches = await self._stored.read_back(response.fd, response.size, trace) == wanted.lower()
        trace.note_verified(matches)
        if not matches:
            os.close(response.fd)
            raise stored_differently(wanted)
        return response


class DigestWorkerService(DigestService, WorkerService):
    """Each call in a worker thread, after the body was received; the file of a read is read back by the loop's thread."""


def open_site(digest: argparse.Namespace, options: service.Options) -> service.Site:
    """Raises OSError, sqlite3.Error where a path cannot be used."""
    assert options.truth is not None, "its truth is all that it is for"
    hands: Hands = Pool(options.workers) if options.model in ("asyncio-pool", "asyncio-sync") else Here()
    in_worker = options.model == "asyncio-sync"
    stored = DigestStore(
        options.root,
        Here() if in_worker else hands,
        manner=digest.manner,
        metadata=options.metadata,
        verify=options.verify,
        chunk_size=options.chunk_size,
    )
    if in_worker:
        served: DigestService = DigestWorkerService(stored, digest, options.max_bytes, hands)
    else:
        served = DigestService(stored, digest, options.max_bytes)
    return service.Site(options, served, hands, TruthLog(options.truth), partial(DigestTrace, Watch(digest.watch)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="digest_bucket.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--watch", type=Path, required=True)
    parser.add_argument("--manner", choices=MANNERS, default="inline")
    parser.add_argument("--verify-reads", action="store_true")
    digest, rest = parser.parse_known_args(arguments)
    try:
        bucket.serve(bucket.parse_options(rest), partial(open_site, digest))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

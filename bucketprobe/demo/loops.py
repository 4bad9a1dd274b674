# SPDX-License-Identifier: Apache-2.0
"""The reference Bucket on an event loop: non-blocking sockets, a task for each request, a thread pool for whoever wants one.

As under uvicorn, the loop reads a connection's bytes as they come, in a callback and not in the task of the request; the
task goes on in a later turn of the loop. It sends by itself, and waits only where the socket takes no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import TypeVar, TypeVarTuple

from bucketprobe.demo.hands import Hands, complete
from bucketprobe.demo.messages import IDLE_S, LINGER_S, LINGER_SILENCE_S, Disconnected, Request, Response, Wire
from bucketprobe.demo.service import GRACE_S, RETRY_S, Conversation, Parts, Service, Site, Target
from bucketprobe.demo.store import LOCK_STRIPES, Artifact, Store
from bucketprobe.demo.truth import Trace

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


# --- file calls --------------------------------------------------------------------------------------------------


class Pool:
    """Each call in a thread of a pool, whichever is free."""

    def __init__(self, size: int) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="pool")
        self._locks = [asyncio.Lock() for _ in range(LOCK_STRIPES)]

    async def do(self, call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def turn(self, number: int) -> AbstractAsyncContextManager[object]:
        # Else as many requests as there are threads could wait for the file lock of one that needs a thread to go on.
        return self._locks[number]


class Received:
    """The entity of an upload, whole."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def next(self) -> memoryview | None:
        data, self._data = self._data, b""
        return memoryview(data) if data else None


class WorkerService(Service):
    """Each call of the contract in one go in a worker thread, after the body was received; the store must not need the loop."""

    def __init__(self, store: Store, max_bytes: int, pool: Hands) -> None:
        super().__init__(store, max_bytes)
        self._pool = pool

    async def _put(self, declared: Artifact, body: Parts, trace: Trace) -> Response:
        data = bytearray()
        while (part := await body.next()) is not None:
            data += part
            self._check_size(len(data))
        return await self._pool.do(complete, super()._put(declared, Received(bytes(data)), trace))

    async def _get(self, request: Request, target: Target, trace: Trace) -> Response:
        return await self._pool.do(complete, super()._get(request, target, trace))

    async def _versions(self, target: Target, trace: Trace) -> Response:
        return await self._pool.do(complete, super()._versions(target, trace))


# --- connections -------------------------------------------------------------------------------------------------


class LoopWire(Wire):
    """A connection on an event loop, which reads ahead until the buffer is full. To be closed by `close`."""

    def __init__(self, sock: socket.socket, chunk_size: int, new_trace: Callable[[], Trace], *, fill: bool = False) -> None:
        super().__init__(sock, chunk_size, new_trace, fill=fill)
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # who waits for bytes
        self._patience_s: float = IDLE_S
        self._reading = False
        self._ended = False
        self._total = 0
        self._reads: deque[tuple[int, int]] = deque()  # of which something is in the buffer: bytes of all reads up to it, and its ns
        self._new_bytes = self._new_reads = 0  # that are in no trace yet

    async def begin(self) -> bool:
        begun = await super().begin()
        self._note_reads()
        return begun

    async def take(self, limit: int) -> memoryview:
        part = memoryview(bytes(await super().take(limit)))  # a copy, since reading goes on meanwhile
        self._note_reads()
        self._read_on()
        return part

    async def linger(self) -> None:
        deadline = time.monotonic() + LINGER_S
        self._patience_s = LINGER_SILENCE_S
        with contextlib.suppress(OSError, Disconnected):
            self._sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self._start = self._end
                await self._receive()

    def close(self) -> None:
        self._pause()
        self._sock.close()

    async def _receive(self) -> None:
        before = self._total
        self._read_on()
        if not self._ended:
            self._reader = self._loop.create_future()
            await self._wait(self._reader)
        if self._total == before:
            raise Disconnected
        self._note_reads()

    async def _transfer(self, call: Callable[..., int], *arguments: object) -> int:
        while True:
            try:
                return call(*arguments)
            except BlockingIOError:
                await self._writable()

    def _first_byte_ns(self) -> int:
        return next(ns for total, ns in self._reads if total > self._total - self.buffered)

    def _arrived(self, size: int) -> None:
        while self._reads and self._reads[0][0] <= self._total - self.buffered:
            self._reads.popleft()
        super()._arrived(size)
        self._total += size
        self._reads.append((self._total, self.recv_ns))
        self._new_bytes += size
        self._new_reads += 1

    def _note_reads(self) -> None:
        """What was read since the last time belongs to the request that takes something now."""
        if self._new_reads:
            self.trace.add("receive", 0, self._new_bytes, self._new_reads)
            self._new_bytes = self._new_reads = 0

    def _read_on(self) -> None:
        if not self._reading and not self._ended:
            self._reading = True
            self._loop.add_reader(self._sock, self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def _readable(self) -> None:
        room = self._make_room()
        try:
            size = self._sock.recv_into(room)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if size:
            self._arrived(size)
        else:
            self._ended = True
        if self._ended or self.buffered == len(self._buffer):
            self._pause()
        if self._reader is not None:
            fulfil(self._reader)

    async def _writable(self) -> None:
        writer = self._loop.create_future()
        self._loop.add_writer(self._sock, fulfil, writer)
        try:
            await self._wait(writer)
        finally:
            self._loop.remove_writer(self._sock)

    async def _wait(self, future: asyncio.Future[None]) -> None:
        """As long as a client may be silent. Raises Disconnected."""
        try:
            async with asyncio.timeout(self._patience_s):
                await future
        except TimeoutError as error:
            raise Disconnected from error


def fulfil(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class TaskConversation(Conversation):
    """Each request in a task of its own."""

    async def _turn(self) -> bool:
        return await asyncio.create_task(self._exchange())


class LoopServer:
    """A listening socket and the event loop that serves its connections."""

    def __init__(self, listener: socket.socket, site: Site) -> None:
        self._listener = listener
        self._site = site
        self._open: dict[asyncio.Task[None], socket.socket] = {}

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, which the caller has blocked."""
        self._listener.setblocking(False)
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        loop.add_reader(self._listener, self._accept)
        await stop.wait()
        loop.remove_reader(self._listener)
        await self._stop()

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            print(f"accept failed: {error}", file=sys.stderr)
            loop.remove_reader(self._listener)
            loop.call_later(RETRY_S, loop.add_reader, self._listener, self._accept)
            return
        accept_ns = time.monotonic_ns()
        task = loop.create_task(self._converse(sock, accept_ns))
        self._open[task] = sock
        task.add_done_callback(self._open.pop)

    async def _converse(self, sock: socket.socket, accept_ns: int) -> None:
        sock.setblocking(False)
        options = self._site.options
        wire = LoopWire(sock, options.chunk_size, self._site.new_trace, fill=options.fill)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await TaskConversation(wire, accept_ns, self._site).run()
        except Exception:
            # A fault of this server must not end it; the connection closes without an answer.
            traceback.print_exc()
        finally:
            wire.close()

    async def _stop(self) -> None:
        """End idle connections and uploads at once and downloads after a grace time; return when all are closed."""
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            for sock in self._open.values():
                with contextlib.suppress(OSError):
                    sock.shutdown(how)
            if self._open:
                await asyncio.wait(self._open, timeout=GRACE_S)

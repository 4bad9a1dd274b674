# SPDX-License-Identifier: Apache-2.0
"""A reference Bucket v1 server with the standard library alone: something real to observe, and the truth to check against.

    python -m bucketprobe.demo.bucket --port 8080 --root /tmp/bucket --model threads

All models serve the same contract from the same store (`store.py`) and differ in who does what:

    threads       a thread for each connection
    prefork       worker processes that share one listening socket; each serves one connection at a time, to its end, so
                  that there should be at least as many workers as connections
    asyncio       one event loop in one thread, a task for each request, and file calls that block it
    asyncio-pool  the same loop, but each file call is made in a thread pool: those of one file wander over threads
    asyncio-sync  the loop receives a body whole, then one worker thread does the whole request; of what it answers, each
                  chunk of a file is read in the pool, and the loop sends

With `--truth FILE` the server writes down what each request did, as it saw it: see `truth.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import sqlite3
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from bucketprobe.demo.hands import Hands, Here, complete
from bucketprobe.demo.loops import LoopServer, Pool, WorkerService
from bucketprobe.demo.messages import IDLE_S, LINGER_S, LINGER_SILENCE_S, Disconnected, Wire
from bucketprobe.demo.service import GRACE_S, RETRY_S, Conversation, Options, Service, Site
from bucketprobe.demo.store import Store
from bucketprobe.demo.truth import TruthLog
from bucketprobe.errors import BucketprobeError, UsageError

BACKLOG = 512
PR_SET_PDEATHSIG = 1
MODELS = ("threads", "prefork", "asyncio", "asyncio-pool", "asyncio-sync")


# --- connections -------------------------------------------------------------------------------------------------


class SocketWire(Wire):
    """A connection whose calls block. Nothing is read beyond what a request needed."""

    async def linger(self) -> None:
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            set_timeouts(self._sock, LINGER_SILENCE_S)
            while time.monotonic() < deadline and self._sock.recv_into(self._buffer):
                pass

    async def _receive(self) -> None:
        room = self._make_room()
        try:
            size = self._sock.recv_into(room)
        except OSError as error:
            raise Disconnected from error
        self._arrived(size)
        if not size:
            raise Disconnected
        self.trace.add("receive", 0, size)

    async def _transfer(self, call: Callable[..., int], *arguments: object) -> int:
        return call(*arguments)


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


class BlockingServer:
    """A listening socket and the threads or processes that serve its connections."""

    def __init__(self, listener: socket.socket, site: Site) -> None:
        self._listener = listener
        self._site = site
        self._options = site.options

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
                time.sleep(RETRY_S)
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
            wire = SocketWire(sock, self._options.chunk_size, self._site.new_trace, fill=self._options.fill)
            complete(Conversation(wire, accept_ns, self._site).run())
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
                time.sleep(RETRY_S)
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


def open_site(options: Options) -> Site:
    """Raises OSError, sqlite3.Error where a path cannot be used."""
    hands: Hands = Pool(options.workers) if options.model in ("asyncio-pool", "asyncio-sync") else Here()
    # An endpoint in a worker thread makes its file calls right there; only what is read for the answer afterwards is left.
    in_worker = options.model == "asyncio-sync"
    store = Store(
        options.root,
        Here() if in_worker else hands,
        metadata=options.metadata,
        verify=options.verify,
        chunk_size=options.chunk_size,
    )
    service = WorkerService(store, options.max_bytes, hands) if in_worker else Service(store, options.max_bytes)
    return Site(options, service, hands, TruthLog(options.truth) if options.truth else None)


def serve(options: Options, opened: Callable[[Options], Site] = open_site) -> None:
    """Serve until SIGTERM or SIGINT what `opened` makes of the options. Raises UsageError where the address or a path cannot be used."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        listener = socket.create_server((options.host, options.port), backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {options.host}:{options.port}: {error}; choose another --port or --host") from error
    with listener:
        try:
            site = opened(options)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"cannot use the storage root or the truth file: {error}; choose another --root or --truth") from error
        port = listener.getsockname()[1]
        print(f"listening on http://{options.host}:{port} ({options.model}, pid {os.getpid()})", file=sys.stderr, flush=True)
        if options.model.startswith("asyncio"):
            LoopServer(listener, site).run()
        else:
            BlockingServer(listener, site).run()


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
    parser.add_argument("--model", choices=MODELS, default="threads", help="who serves (default %(default)s)")
    workers = "prefork: processes; asyncio-pool, asyncio-sync: threads of the pool (default %(default)s)"
    parser.add_argument("--workers", type=positive, default=32, metavar="N", help=workers)
    parser.add_argument("--metadata", choices=("json", "sqlite"), default="json", help="where metadata goes (default %(default)s)")
    parser.add_argument("--verify", action="store_true", help="read each artifact back after storing it")
    parser.add_argument("--sendfile", action="store_true", help="send artifacts by sendfile(2)")
    parser.add_argument("--max-bytes", type=positive, default=5 << 30, metavar="N", help="largest artifact (default %(default)s)")
    parser.add_argument("--chunk-size", type=positive, default=65536, metavar="N", help="bytes per read (default %(default)s)")
    parser.add_argument("--fill", action="store_true", help="hash and write whole chunks of an upload, and not what each read brings")
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

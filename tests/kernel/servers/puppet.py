# SPDX-License-Identifier: Apache-2.0
"""A server whose every call, and the thread that makes it, comes from outside: any server model, one step at a time.

    puppet.py PORT BASE [tasks]

Standard input brings a line of JSON for each step: {"number", "thread", "call", "arguments"}. Threads are made when they are first
named, and each takes its steps in turn; standard output tells {"number", "result", "error"} when a step is done. THREAD@TASK makes the
step in the context of a task, as asyncio has one for each, and THREAD@=TASK in a copy of it, as asyncio.to_thread does; with `tasks` it
is such a program from its start. Connections and files have names, too; paths are below BASE, flags those of open(2).

    accept C | take C [PIECE] (a whole request) | recv C N | send C TEXT | shut C | secure C (a request and answer by TLS)
    open F PATH FLAGS | close F | fsync F | save F C [START END PIECE] (of the body) | save_all F [C...] (the bodies, in one write)
    relay F C PIECE (read and send until the file's end) | sleep SECONDS | wake (a byte to a socket of its own)
    rename OLD NEW [FLAGS] (renameat2) | link F PATH (linkat of /proc/self/fd) | link_empty F PATH (linkat with AT_EMPTY_PATH)
    map_save F C (ftruncate, and the body by memory) | map_send F C | ring_save PATH C (all of it by io_uring)
    ask PATH ID [PORT] (an HTTP request as a client; result: the answer's body)
"""

from __future__ import annotations

import contextvars
import ctypes
import json
import mmap
import os
import queue
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = -100, 0x400, 0x1000
SYS_RENAMEAT2, SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 316, 425, 426
#: TLS without a certificate.
ANONYMOUS = "AECDH-AES256-SHA:@SECLEVEL=0"

Step = dict[str, Any]


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Ring:
    """An io_uring for one operation at a time. See linux/io_uring.h for the numbers: of words in the parameters, and of operations."""

    FSYNC, OPENAT, CLOSE, WRITE = 3, 18, 19, 23

    def __init__(self) -> None:
        parameters = (ctypes.c_uint32 * 30)()
        self.fd = LIBC.syscall(SYS_IO_URING_SETUP, 4, ctypes.byref(parameters))
        checked(self.fd)
        self.submitted, self.completed = parameters[10:17], parameters[20:26]  # head, tail, mask, ..., array; ..., entries
        size = max(self.submitted[6] + 4 * parameters[0], self.completed[5] + 16 * parameters[1])
        self.rings = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        self.entries = mmap.mmap(self.fd, 64 * parameters[0], mmap.MAP_SHARED, offset=0x10000000)

    def word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.rings, at)[0])

    def do(self, operation: int, fd: int, data: bytes = b"", length: int = 0, flags: int = 0) -> int:
        memory = ctypes.create_string_buffer(data)
        address = ctypes.addressof(memory) if data else 0
        struct.pack_into("<BBHiQQIIQ", self.entries, 0, operation, 0, 0, fd, 0, address, length, flags, 0)
        tail = self.word(self.submitted[1])
        struct.pack_into("<I", self.rings, self.submitted[6] + 4 * (tail & self.word(self.submitted[2])), 0)
        struct.pack_into("<I", self.rings, self.submitted[1], tail + 1)
        checked(LIBC.syscall(SYS_IO_URING_ENTER, self.fd, 1, 1, 1, None, 0))  # submits one and waits for one
        head = self.word(self.completed[0])
        at = self.completed[5] + 16 * (head & self.word(self.completed[2]))
        result: int = struct.unpack_from("<i", self.rings, at + 8)[0]
        struct.pack_into("<I", self.rings, self.completed[0], head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


class Puppet:
    def __init__(self, port: int, base: str) -> None:
        self.port = port
        self.base = base
        self.listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.connections: dict[str, socket.socket] = {}
        self.bodies: dict[str, bytes] = {}
        self.files: dict[str, int] = {}
        self.alarm, self.bell = socket.socketpair()
        self.tasks: dict[str, contextvars.Context] = {}
        self.threads: dict[str, queue.SimpleQueue[Step]] = {}
        self.done: queue.SimpleQueue[Step] = queue.SimpleQueue()

    def serve(self) -> None:
        threading.Thread(target=self.tell, daemon=True).start()
        for line in sys.stdin:
            step: Step = json.loads(line)
            name = step["thread"].partition("@")[0]
            if name not in self.threads:
                self.threads[name] = queue.SimpleQueue()
                threading.Thread(target=self.work, args=(self.threads[name],), daemon=True).start()
            self.threads[name].put(step)

    def work(self, steps: queue.SimpleQueue[Step]) -> None:
        while True:
            step = steps.get()
            done: Step = {"number": step["number"], "result": None, "error": None}
            try:
                done["result"] = self.run(step, getattr(self, "do_" + step["call"]))
            except Exception as trouble:  # whatever it was, it must not end the thread, but the test
                done["error"] = repr(trouble)
            self.done.put(done)

    def run(self, step: Step, call: Callable[..., object]) -> object:
        task = step["thread"].partition("@")[2]
        if not task:
            return call(*step["arguments"])
        context = self.tasks.setdefault(task.removeprefix("="), contextvars.Context())
        if task.startswith("="):
            context = context.copy()
        return context.run(call, *step["arguments"])

    def tell(self) -> None:
        """A thread of its own: what another thread writes, be it to a pipe, may tell an observer that a piece of its work is done."""
        while True:
            print(json.dumps(self.done.get()), flush=True)

    def path(self, name: str) -> str:
        return os.path.join(self.base, name)

    # connections

    def do_accept(self, name: str) -> None:
        connection, _ = self.listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections[name] = connection

    def do_take(self, name: str, piece: int = 65536) -> int:
        connection, data = self.connections[name], b""
        while b"\r\n\r\n" not in data:
            data += self.more(connection, piece)
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
        length = int(fields.get("content-length", "0"))
        while len(body) < length:
            body += self.more(connection, min(piece, length - len(body)))
        self.bodies[name] = body
        return len(body)

    @staticmethod
    def more(connection: socket.socket, count: int) -> bytes:
        data = connection.recv(count)
        if not data:
            raise EOFError("the client left")
        return data

    def do_recv(self, name: str, count: int) -> int:
        """So many bytes of a body, or of a head that nobody needs to understand."""
        data = b""
        while len(data) < count:
            data += self.more(self.connections[name], count - len(data))
        self.bodies[name] = data
        return len(data)

    def do_send(self, name: str, text: str) -> None:
        self.connections[name].sendall(text.encode("latin-1"))

    def do_shut(self, name: str) -> None:
        self.connections.pop(name).close()

    def do_secure(self, name: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(ANONYMOUS)
        with context.wrap_socket(self.connections[name], server_side=True) as secured:
            secured.recv(65536)
            secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")

    # files

    def do_open(self, name: str, path: str, flags: int) -> None:
        self.files[name] = os.open(self.path(path), flags, 0o644)

    def do_close(self, name: str) -> None:
        os.close(self.files.pop(name))

    def do_fsync(self, name: str) -> None:
        os.fsync(self.files[name])

    def do_save(self, name: str, body: str, start: int = 0, end: int | None = None, piece: int = 1 << 20) -> int:
        data = self.bodies[body][start:end]
        return sum(os.write(self.files[name], data[at : at + piece]) for at in range(0, len(data), piece))

    def do_save_all(self, name: str, bodies: list[str]) -> int:
        return os.write(self.files[name], b"".join(self.bodies[body] for body in bodies))

    def do_relay(self, name: str, connection: str, piece: int) -> int:
        total = 0
        while data := os.read(self.files[name], piece):
            self.connections[connection].sendall(data)
            total += len(data)
        return total

    def do_rename(self, old: str, new: str, flags: int = 0) -> None:
        names = self.path(old).encode(), self.path(new).encode()
        checked(LIBC.syscall(ctypes.c_long(SYS_RENAMEAT2), AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(flags)))

    def do_link(self, name: str, path: str) -> None:
        source = f"/proc/self/fd/{self.files[name]}".encode()
        checked(LIBC.linkat(AT_FDCWD, source, AT_FDCWD, self.path(path).encode(), AT_SYMLINK_FOLLOW))

    def do_link_empty(self, name: str, path: str) -> None:
        checked(LIBC.linkat(self.files[name], b"", AT_FDCWD, self.path(path).encode(), AT_EMPTY_PATH))

    def do_map_save(self, name: str, body: str) -> None:
        data = self.bodies[body]
        os.ftruncate(self.files[name], len(data))
        with mmap.mmap(self.files[name], len(data), mmap.MAP_SHARED) as memory:
            memory[:] = data

    def do_map_send(self, name: str, connection: str) -> None:
        with mmap.mmap(self.files[name], 0, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            self.connections[connection].sendall(memory)

    def do_ring_save(self, path: str, body: str) -> int:
        ring, data = Ring(), self.bodies[body]
        fd = ring.do(Ring.OPENAT, AT_FDCWD, self.path(path).encode() + b"\0", 0o644, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        count = ring.do(Ring.WRITE, fd, data, len(data))
        ring.do(Ring.FSYNC, fd)
        ring.do(Ring.CLOSE, fd)
        return count

    # all else

    def do_wake(self) -> None:
        self.alarm.send(b"!")
        self.bell.recv(1)

    def do_sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def do_ask(self, path: str, request_id: str, port: int = 0) -> str:
        with socket.create_connection(("127.0.0.1", port or self.port)) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: other\r\nX-Request-ID: {request_id}\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while more := client.recv(65536):
                data += more
        return data.partition(b"\r\n\r\n")[2].decode("latin-1")


def main() -> None:
    puppet = Puppet(int(sys.argv[1]), sys.argv[2])
    print("listening", flush=True)
    if sys.argv[3:] == ["tasks"]:
        contextvars.Context().run(puppet.serve)
    else:
        puppet.serve()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server in the models in which services run.

    service.py PORT BASE [MODEL [OPTION...]]

MODEL: `threads` (one per connection), `fork` (a process per connection), `swap` (the same, but the parent has closed its log, and
opened another file by that number, before the child begins), `prefork` (three processes accept). OPTION `relative`:
the service works in BASE/storage and names files relative to it; `ipv6`: it listens there, for IPv4 as well.

    PUT /store/NAME       body to BASE/storage/NAME (open, write of at most 64 KiB at a time, fsync), 201
    GET /store/NAME       the file, 200
    PUT /log              body appended to BASE/storage/service.log, which was opened at the start, 200
    PUT /cycle/N          N times: body to a fresh file under storage, the same number then a socket and a file elsewhere; all closed, 200
    PUT /files/N          N times: body to a file under storage (open, write, close), 200
    GET /self             what it answers itself when it asks, as a client of its own, for /pid, 200
    GET /pid              the process id, 200
    GET /exec             200; then it becomes a fresh program that keeps the listening socket
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time


def main() -> None:
    port, base = int(sys.argv[1]), sys.argv[2]
    model = sys.argv[3] if len(sys.argv) > 3 else "threads"
    root = os.path.join(base, "storage")
    if "relative" in sys.argv[4:]:
        os.chdir(root)
        root = "."
    inherited = os.environ.get("LISTENER")
    if inherited:
        listener = socket.socket(fileno=int(inherited))
    elif "ipv6" in sys.argv[4:]:
        listener = socket.create_server(("::", port), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("127.0.0.1", port), backlog=512)
    service = Service(listener, root, base)
    print("listening", flush=True)
    if model == "prefork":
        for _ in range(2):
            if os.fork() == 0:
                break
    service.serve(model)


class Service:
    def __init__(self, listener: socket.socket, root: str, base: str) -> None:
        self.listener = listener
        self.root = root
        self.base = base
        self.log = os.open(os.path.join(root, "service.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def serve(self, model: str) -> None:
        if model in ("fork", "swap"):
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = self.listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if model in ("fork", "swap"):
                ready, go = os.pipe()
                if os.fork() == 0:
                    os.read(ready, 1)
                    self.talk(connection)
                    os._exit(0)
                if model == "swap":
                    self.swap_log()
                os.write(go, b"!")
                os.close(ready)
                os.close(go)
                connection.close()
            else:
                threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection: socket.socket) -> None:
        pending = b""
        try:
            while True:
                while b"\r\n\r\n" not in pending:
                    more = connection.recv(65536)
                    if not more:
                        return
                    pending += more
                head, _, pending = pending.partition(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                fields = dict(line.lower().split(": ", 1) for line in lines[1:])
                length = int(fields.get("content-length", "0"))
                while len(pending) < length:
                    more = connection.recv(65536)
                    if not more:
                        return
                    pending += more
                body, pending = pending[:length], pending[length:]
                status, answer = self.answer(method, path, body)
                connection.sendall(f"HTTP/1.1 {status} Done\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
                if path == "/exec":
                    self.become()
        except ConnectionError:
            pass
        finally:
            connection.close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        _, what, *rest = path.split("/")
        if what == "pid":
            return 200, str(os.getpid()).encode()
        if what == "self":
            with socket.create_connection(("127.0.0.1", self.listener.getsockname()[1])) as inner:
                inner.sendall(b"GET /pid HTTP/1.1\r\nX-Request-ID: inner\r\n\r\n")
                return 200, inner.recv(4096).rpartition(b"\n")[2]
        if what == "log":
            os.write(self.log, body)
            return 200, b"logged"
        if what == "files":
            for i in range(int(rest[0])):
                fd = os.open(os.path.join(self.root, f"file-{i}"), os.O_WRONLY | os.O_CREAT, 0o644)
                os.write(fd, body)
                os.close(fd)
            return 200, b"filed"
        if what == "cycle":
            for i in range(int(rest[0])):
                self.cycle(i, body)
            return 200, b"cycled"
        if what == "store" and method == "PUT":
            self.write(os.path.join(self.root, rest[0]), body)
            return 201, b"stored"
        if what == "store":
            fd = os.open(os.path.join(self.root, rest[0]), os.O_RDONLY)
            data = b""
            while more := os.read(fd, 65536):
                data += more
            os.close(fd)
            return 200, data
        return (200, b"") if what == "exec" else (404, b"what?")

    def write(self, path: str, body: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for at in range(0, len(body), 65536):
            os.write(fd, body[at : at + 65536])
        os.fsync(fd)
        os.close(fd)

    def cycle(self, number: int, body: bytes) -> None:
        """One descriptor number is, in turn, a stored file, one end of a socket, a file elsewhere, a pipe."""
        path = f"{self.base}/storage/cycle-{threading.get_ident()}-{number % 4}"
        self.write(path, body)
        near, far = socket.socketpair()
        near.send(body)
        far.recv(len(body))
        near.close()
        far.close()
        self.write(f"{self.base}/elsewhere/cycle-{threading.get_ident()}", b"elsewhere" + body)
        out, into = os.pipe()
        os.write(into, b"pipe")
        os.read(out, 4)
        os.close(out)
        os.close(into)

    def swap_log(self) -> None:
        """The log's number is another file's for some time, in this process only."""
        number = self.log
        os.close(number)
        decoy = os.open(os.path.join(self.base, "elsewhere", "decoy"), os.O_WRONLY | os.O_CREAT, 0o644)
        assert decoy == number
        os.write(decoy, b"decoy")
        threading.Thread(target=self.swap_back, args=(decoy,)).start()

    def swap_back(self, decoy: int) -> None:
        time.sleep(0.1)
        os.close(decoy)
        self.log = os.open(os.path.join(self.root, "service.log"), os.O_WRONLY | os.O_APPEND)

    def become(self) -> None:
        os.set_inheritable(self.listener.fileno(), True)
        os.environ["LISTENER"] = str(self.listener.fileno())
        os.execv(sys.executable, [sys.executable, "-I", "-S", *sys.argv])


if __name__ == "__main__":
    main()

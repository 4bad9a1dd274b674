# SPDX-License-Identifier: Apache-2.0
"""A server without a mind: standard input brings, a line of JSON each, the steps for each next connection.

    scripted.py PORT BASE

A script's end is told on standard output, as {"received": bytes, "reads": how many reads brought them, "error": text or null}. Bytes are
latin-1 text. Steps, each a list:

    recv N | read N | recvfrom N | recvmsg [N..] | readv [N..]     one such call
    peek N | peekmsg N                                            the same with MSG_PEEK
    need TOTAL PIECE [CALL]    read pieces of at most PIECE bytes until TOTAL have come (with CALL: one of the above)
    drain                      read until the end
    send T [PIECE [PAUSE]] | write T | writev [T..] | sendmsg [T..] fill N [PIECE]
    sendfile PATH N            as many calls as it needs
    duplicate [back]           a duplicate takes the place of the descriptor, which is closed; with `back` on its number again
    append PATH T              a write to a file that stays open from one script to the next
    shutdown | close | reset | kill | sleep S | await (a line on standard input)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any


class Conversation:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = 0
        self.reads = 0

    def _got(self, count: int) -> int:
        self.received += count
        self.reads += count > 0
        return count

    def recv(self, count: int) -> int:
        return self._got(len(self.connection.recv(count)))

    def read(self, count: int) -> int:
        return self._got(len(os.read(self.connection.fileno(), count)))

    def recvfrom(self, count: int) -> int:
        return self._got(len(self.connection.recvfrom(count)[0]))

    def recvmsg(self, sizes: list[int]) -> int:
        return self._got(self.connection.recvmsg_into([bytearray(size) for size in sizes])[0])

    def readv(self, sizes: list[int]) -> int:
        return self._got(os.readv(self.connection.fileno(), [bytearray(size) for size in sizes]))

    def peek(self, count: int) -> None:
        self.connection.recv(count, socket.MSG_PEEK)

    def peekmsg(self, count: int) -> None:
        self.connection.recvmsg(count, 0, socket.MSG_PEEK)

    def need(self, total: int, piece: int, call: str = "recv") -> None:
        end = self.received + total
        while self.received < end:
            size = min(piece, end - self.received)
            sizes = [size // 3, size - size // 3] if call in ("recvmsg", "readv") else size
            if not getattr(self, call)(sizes):
                raise EOFError(f"the client ended {end - self.received} bytes early")

    def drain(self) -> None:
        while self.recv(65536):
            pass

    def send(self, text: str, piece: int = 0, pause: float = 0.0) -> None:
        data = text.encode("latin-1")
        for at in range(0, len(data), piece or len(data)):
            self.connection.sendall(data[at : at + (piece or len(data))])
            time.sleep(pause)

    def write(self, text: str) -> None:
        data = text.encode("latin-1")
        while data:
            data = data[os.write(self.connection.fileno(), data) :]

    def writev(self, texts: list[str]) -> None:
        pieces = [text.encode("latin-1") for text in texts]
        assert os.writev(self.connection.fileno(), pieces) == sum(map(len, pieces))

    def sendmsg(self, texts: list[str]) -> None:
        pieces = [text.encode("latin-1") for text in texts]
        assert self.connection.sendmsg(pieces) == sum(map(len, pieces))

    def fill(self, count: int, piece: int = 65536) -> None:
        for at in range(0, count, piece):
            self.connection.sendall(bytes(min(piece, count - at)))

    def sendfile(self, path: str, count: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        at = 0
        while at < count:
            at += os.sendfile(self.connection.fileno(), fd, at, count - at)
        os.close(fd)

    def duplicate(self, back: str = "") -> None:
        first = self.connection.detach()
        other = os.dup(first)
        if back:
            os.dup2(other, first)
            os.close(other)
            other = first
        else:
            os.close(first)
        self.connection = socket.socket(fileno=other)

    def append(self, path: str, text: str) -> None:
        if path not in appended:
            appended[path] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(appended[path], text.encode("latin-1"))

    def shutdown(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.connection.close()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self) -> None:
        sys.stdin.readline()


appended: dict[str, int] = {}


def main() -> None:
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    print("listening", flush=True)
    for line in iter(sys.stdin.readline, ""):
        steps: list[list[Any]] = json.loads(line)
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk = Conversation(connection)
        error = None
        try:
            for name, *arguments in steps:
                getattr(talk, {"await": "wait"}.get(name, name))(*arguments)
        except (OSError, EOFError) as trouble:
            error = str(trouble)
        talk.connection.close()
        print(json.dumps({"received": talk.received, "reads": talk.reads, "error": error}), flush=True)


if __name__ == "__main__":
    main()

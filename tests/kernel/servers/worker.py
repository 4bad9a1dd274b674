# SPDX-License-Identifier: Apache-2.0
"""Makes, for one request, exactly the system calls that its path names, and no other on files.

    worker.py PORT BASE

`/do/CALL/N/PLACE` does CALL N times. PLACE is the folder below BASE in which it works; where it is `metadata`, that is `storage`,
and the names end in `.meta`. `/prepare/CALL/N/PLACE` comes first and makes what the calls need. The answer is JSON:
{"bytes": the sum of what the calls returned}. `/net/RECEIVE/SEND/PLACE` uses these calls for the exchange itself: the body is read,
and as many bytes are sent back, by them. One thread for each connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import sys
import threading
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
SYS_OPEN, SYS_RENAMEAT2, SYS_CLOSE_RANGE, SYS_OPENAT2, SYS_CREAT, SYS_PREADV2, SYS_PWRITEV2 = 2, 316, 436, 437, 85, 327, 328
#: Lengths of the pieces that the I/O calls move in turn; none is a power of two.
PIECES = (1, 333, 4097, 70_001)


def system_call(number: int, *arguments: object) -> int:
    result: int = LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Work:
    """One connection's work in one place. `a`, `b` and `directory` stay open from its first request on."""

    def __init__(self, folder: str, suffix: str, thread: int) -> None:
        self.folder = folder
        self.suffix = suffix
        self.thread = thread
        self.a = os.open(self.name(f"a-{thread}"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.b = os.open(self.name(f"b-{thread}"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.mkdir(self.name(f"d-{thread}"))
        self.directory = os.open(self.name(f"d-{thread}"), os.O_RDONLY | os.O_DIRECTORY)
        self.fresh = 0
        self.turned = False

    def name(self, stem: str) -> str:
        return f"{self.folder}/{stem}{self.suffix}"

    def new_name(self) -> str:
        self.fresh += 1
        return self.name(f"new-{threading.get_ident()}-{self.fresh}")

    def do(self, call: str, times: int) -> int:
        one: Callable[[int], int | None] = getattr(self, "do_" + call)
        return sum(one(i) or 0 for i in range(times))

    # opens

    def do_open(self, _: int) -> None:
        os.close(system_call(SYS_OPEN, self.new_name().encode(), os.O_CREAT | os.O_WRONLY, 0o644))

    def do_creat(self, _: int) -> None:
        os.close(system_call(SYS_CREAT, self.new_name().encode(), 0o644))

    def do_openat(self, _: int) -> None:
        os.close(os.open(self.new_name(), os.O_CREAT | os.O_WRONLY))

    def do_openat_directory(self, i: int) -> None:
        os.close(os.open(f"in-{i}{self.suffix}", os.O_CREAT | os.O_WRONLY, dir_fd=self.directory))

    def do_openat2(self, _: int) -> None:
        how = (ctypes.c_uint64 * 3)(os.O_CREAT | os.O_WRONLY, 0o644, 0)
        os.close(system_call(SYS_OPENAT2, AT_FDCWD, self.new_name().encode(), ctypes.byref(how), ctypes.sizeof(how)))

    def do_open_fails(self, i: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.open(self.name(f"no-such-folder/{i}"), os.O_RDONLY)

    # writes

    def do_write(self, i: int) -> int:
        return os.write(self.a, bytes(PIECES[i % 4]))

    def do_pwrite(self, i: int) -> int:
        return os.pwrite(self.a, bytes(PIECES[i % 4]), 100)

    def do_writev(self, i: int) -> int:
        return os.writev(self.a, [bytes(PIECES[i % 4]), b"and", bytes(7)])

    def do_pwritev(self, i: int) -> int:
        return os.pwritev(self.a, [bytes(PIECES[i % 4]), b"and"], 5)

    def do_pwritev2(self, i: int) -> int:
        return os.pwritev(self.a, [bytes(PIECES[i % 4])], 5, os.RWF_DSYNC)

    def do_write_fails(self, _: int) -> None:
        with contextlib.suppress(OSError):
            os.write(self.directory, b"a directory")

    # reads

    def do_read(self, i: int) -> int:
        return len(os.read(self.a, PIECES[i % 4]))

    def do_pread(self, i: int) -> int:
        return len(os.pread(self.a, PIECES[i % 4], 100))

    def do_readv(self, i: int) -> int:
        return os.readv(self.a, [bytearray(PIECES[i % 4]), bytearray(3)])

    def do_preadv(self, i: int) -> int:
        return os.preadv(self.a, [bytearray(PIECES[i % 4]), bytearray(3)], 5)

    def do_preadv2(self, i: int) -> int:
        return os.preadv(self.a, [bytearray(PIECES[i % 4])], 5, os.RWF_HIPRI)

    def do_read_end(self, _: int) -> int:
        return len(os.pread(self.a, 100, 10_000_000_000))

    # copies

    def do_copy_file_range(self, i: int) -> int:
        return os.copy_file_range(self.a, self.b, PIECES[i % 4], 0, 0)

    def do_sendfile(self, i: int) -> int:
        return os.sendfile(self.b, self.a, 0, PIECES[i % 4])

    def do_splice(self, i: int) -> int:
        """A file into a pipe and from there into another file: two calls."""
        out, into = os.pipe()
        moved = os.splice(self.a, into, PIECES[i % 4], 0)
        assert os.splice(out, self.b, moved) == moved
        os.close(out)
        os.close(into)
        return moved

    # durability and size

    def do_fsync(self, _: int) -> None:
        os.fsync(self.a)

    def do_fdatasync(self, _: int) -> None:
        os.fdatasync(self.a)

    def do_sync_file_range(self, _: int) -> None:
        assert LIBC.sync_file_range(self.a, ctypes.c_int64(0), ctypes.c_int64(0), 2) == 0

    def do_fsync_directory(self, _: int) -> None:
        os.fsync(self.directory)

    def do_ftruncate(self, i: int) -> None:
        os.ftruncate(self.b, 1000 + i)

    def do_posix_fallocate(self, i: int) -> None:
        os.posix_fallocate(self.b, 0, 4096 * (i + 1))

    def do_truncate(self, i: int) -> None:
        os.truncate(self.existing("t"), i)

    # names

    def existing(self, stem: str) -> str:
        return self.name(f"{stem}-{self.thread}")

    def do_rename(self, _: int) -> None:
        source, target = self.existing("r"), self.existing("s")
        os.rename(*((source, target) if self.turn() else (target, source)))

    def do_renameat(self, _: int) -> None:
        source, target = f"r{self.suffix}", f"s{self.suffix}"
        source, target = (source, target) if self.turn() else (target, source)
        os.rename(source, target, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def turn(self) -> bool:
        self.turned = not self.turned
        return self.turned

    def do_renameat2(self, i: int) -> None:
        """Exchanges two names."""
        system_call(SYS_RENAMEAT2, AT_FDCWD, self.existing("x").encode(), AT_FDCWD, self.existing("y").encode(), 2)

    def do_link(self, _: int) -> None:
        os.link(self.existing("x"), self.new_name())

    def do_unlink(self, i: int) -> None:
        os.unlink(self.name(f"u-{self.thread}-{i}"))

    def do_mkdir(self, _: int) -> None:
        os.mkdir(self.new_name())

    # duplicates: one write through each of the two descriptors

    def both(self, copy: Callable[[int], int], copy_first: bool) -> int:
        fd = os.open(self.existing("x"), os.O_WRONLY)
        other = copy(fd)
        first, second = (other, fd) if copy_first else (fd, other)
        moved = os.write(first, b"first")
        os.close(first)
        moved += os.write(second, b"and second")
        os.close(second)
        return moved

    def do_dup(self, i: int) -> int:
        return self.both(os.dup, i % 2 == 0)

    def do_dup2(self, i: int) -> int:
        return self.both(lambda fd: os.dup2(fd, 200 + i), i % 2 == 0)

    def do_dup3(self, i: int) -> int:
        return self.both(lambda fd: os.dup2(fd, 300 + i, False), i % 2 == 0)

    def do_fcntl_dup(self, i: int) -> int:
        return self.both(lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD, 400), i % 2 == 0)

    def do_fcntl_dup_cloexec(self, i: int) -> int:
        return self.both(lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 500), i % 2 == 0)

    def do_dup2_over(self, _: int) -> int:
        """The duplicate takes the number of another open file, which so is closed."""
        fd, over = os.open(self.existing("x"), os.O_WRONLY), os.open(self.existing("y"), os.O_WRONLY)
        moved = os.write(over, b"to y")
        os.dup2(fd, over)
        os.close(fd)
        moved += os.write(over, b"to x by y's number")
        os.close(over)
        return moved

    def do_close_range(self, _: int) -> int:
        """Closed by range; the number is then a pipe's."""
        fd = os.open(self.existing("x"), os.O_WRONLY)
        moved = os.write(fd, b"stored")
        system_call(SYS_CLOSE_RANGE, fd, fd, 0)
        out, into = os.pipe()
        assert out == fd
        os.write(into, b"piped")
        os.read(out, 5)
        os.close(out)
        os.close(into)
        return moved

    # directories: the same number is one in turn under the storage root and elsewhere

    def files_in(self, directory: int, name: str) -> int:
        fd = os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        moved = os.write(fd, b"relative")
        os.close(fd)
        return moved

    def do_directories(self, i: int) -> int:
        """Two opens in the folder and two elsewhere, two writes each; how a directory is opened alternates."""
        moved = 0
        for folder in (self.folder, f"{self.folder}/../elsewhere") * 2:
            directory = os.open(folder, os.O_RDONLY | (os.O_DIRECTORY if i % 2 else 0))
            moved += self.files_in(directory, f"relative{self.suffix}")
            os.close(directory)
        return moved // 2

    def do_directory_duplicates(self, _: int) -> int:
        moved = 0
        for folder in (self.folder, f"{self.folder}/../elsewhere") * 2:
            directory = os.open(folder, os.O_RDONLY)
            duplicate = os.dup(directory)
            os.close(directory)
            moved += self.files_in(duplicate, f"relative{self.suffix}")
            os.close(duplicate)
        return moved // 2

    def prepare(self, call: str, times: int) -> None:
        """What the calls find; another request does this."""
        self.turned = False
        os.ftruncate(self.a, 0)
        os.ftruncate(self.a, 10_000_000)
        for stem in ("x", "y", "t", "r"):
            self.touch(self.existing(stem))
        for i in range(times):
            self.touch(self.name(f"u-{self.thread}-{i}"))
        os.close(os.open(f"r{self.suffix}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=self.directory))
        os.lseek(self.a, 0, os.SEEK_SET)
        os.lseek(self.b, 0, os.SEEK_SET)

    @staticmethod
    def touch(path: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


class Exchange:
    """The calls on the socket, by name."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.fd = connection.fileno()

    def receive(self, call: str, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.once(call, min(count - len(data), 997))
            assert more
            data += more
        return data

    def once(self, call: str, count: int) -> bytes:
        halves = [bytearray(count // 2), bytearray(count - count // 2)]
        self.connection.recv(1, socket.MSG_PEEK)
        match call:
            case "read":
                return os.read(self.fd, count)
            case "recvfrom":
                return self.connection.recvfrom(count)[0]
            case "recvmsg":
                self.connection.recvmsg(count, 0, socket.MSG_PEEK)
                return b"".join(halves)[: self.connection.recvmsg_into(halves)[0]]
            case "readv":
                return b"".join(halves)[: os.readv(self.fd, halves)]
            case _:
                return self.connection.recv(count)

    def send(self, call: str, data: bytes, file: int) -> None:
        at = 0
        while at < len(data):
            piece = data[at : at + 1009]
            match call:
                case "write":
                    at += os.write(self.fd, piece)
                case "writev":
                    at += os.writev(self.fd, [piece[:100], piece[100:]])
                case "sendmsg":
                    at += self.connection.sendmsg([piece[:100], piece[100:]])
                case "sendfile":
                    at += os.sendfile(self.fd, file, at, len(piece))
                case "splice":
                    out, into = os.pipe()
                    moved = os.splice(file, into, len(piece), at)
                    at += os.splice(out, self.fd, moved)
                    os.close(out)
                    os.close(into)
                case _:
                    at += self.connection.send(piece)


def serve(connection: socket.socket, base: str) -> None:
    work: dict[str, Work] = {}
    exchange = Exchange(connection)
    while True:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = connection.recv(1)
            if not byte:
                return
            head += byte
        _, path, _ = head.split(b"\r\n")[0].decode().split(" ")
        length = next((int(line.split(b": ")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0)
        _, what, call, argument, *place = path.split("/")
        if what == "net":
            file = work[place[0]].a if place else -1
            answer = exchange.receive(call, length).replace(b"i", b"\0")
            exchange.send("send", f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n".encode(), -1)
            exchange.send(argument, answer, file)
            continue
        if place[0] not in work:
            folder, suffix = ("storage", ".meta") if place[0] == "metadata" else (place[0], "")
            work[place[0]] = Work(f"{base}/{folder}", suffix, threading.get_ident())
        if what == "prepare":
            work[place[0]].prepare(call, int(argument))
        moved = work[place[0]].do(call, int(argument)) if what == "do" else 0
        body = json.dumps({"bytes": moved}).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def main() -> None:
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection, sys.argv[2]), daemon=True).start()


if __name__ == "__main__":
    main()

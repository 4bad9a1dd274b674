# SPDX-License-Identifier: Apache-2.0
"""What kernel and user space both know: events, statistics, maps. Owned here; `probes/include/abi.h` is rendered from it.

The header carries a static assertion for the size and every offset, so that neither side can drift. Kinds and statistics are
append-only: a recorded stream names them by number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

U8, U16, U32, U64, S32 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32

#: The longest path and head piece that one event carries, in bytes.
PATH_BYTES = 1024
HEAD_BYTES = 256
#: How many bytes of a body, and of what is first written to or read from a file, a fingerprint covers.
PRINT_BYTES = 32
#: In the place of how many bytes it covers: it is not known.
PRINT_UNKNOWN = 255
#: Of a small write: how many bytes are looked at, how long the pieces are, and how many bits the set of them has.
TOKEN_BYTES = 512
TOKEN_WINDOW = 6
TOKEN_BITS = 4096
#: The longest digest, in bytes: SHA-512's.
DIGEST_BYTES = 64
#: The longest write that may hold a request's names besides, in bytes: a database's page.
TOKEN_WRITE = 4096


class Kind(IntEnum):
    """The first byte of every event."""

    HEAD = 1
    END = 2
    OPEN = 3
    FILE = 4
    PATH = 5
    PROCESS = 6
    UNKNOWN_FD = 7
    TOKENS = 8
    BODY = 9
    MAP = 10
    DIGEST = 11


class Direction(IntEnum):
    REQUEST = 0
    RESPONSE = 1


class EndOutcome(IntEnum):
    """How a request ended. The model's names, in the model's order."""

    COMPLETE = 0
    CLIENT_CLOSED = 1
    SERVER_CLOSED = 2
    UNOBSERVED = 3


class RequestFlag(IntEnum):
    """Bits of EndEvent.flags."""

    INTERLEAVED = 1  # its thread served another unfinished request meanwhile
    MOVED = 2  # more than one thread used its socket
    OLD = 4  # the connection is older than the agent
    PIPELINED = 8  # its head came before the previous response had ended
    QUEUE_SEEN = 16  # the moment at which it became readable is known


class FileUse(IntEnum):
    """Whose a file may be, by how it was opened."""

    ONE = 0  # one request's: made or emptied by this open
    MANY = 1  # many requests': a database, a log, whatever was open before the agent looked
    READ = 2  # one request's, unless it stays open for longer than a minute


class FileFlag(IntEnum):
    """Bits of FileEvent.flags."""

    RIDS = 1  # later calls came while their thread had used another request's socket last, or had answered one since
    TIDS = 2  # more than one thread called
    SAME_CALL = 4  # bytes went from the file to the request's socket in one call: h.rid is sure
    MANY = 8  # a file that many requests may use: what one thread did in one go
    CONTINUES = 16  # sums of this file were sent before: no fingerprint
    KEYS = 64  # later calls were of another task
    DRAINED = 128  # a read found the end: nothing more is to come, though the close may be late
    ALONE = 32  # the thread received h.rid, and had no other unfinished request


class PathCall(IntEnum):
    RENAME = 1
    LINK = 2
    UNLINK = 3
    MKDIR = 4
    CHDIR = 5
    TRUNCATE = 6


class ProcessChange(IntEnum):
    LISTEN = 1
    FORK = 2
    EXEC = 3
    EXIT = 4
    URING = 5


class Runtime(IntEnum):
    """What runs in a process, and so where the key of its current task lies; runtimes.py finds out."""

    NONE = 0
    GO = 1
    GO_CGO = 2
    CPYTHON = 3


class FileKind(IntEnum):
    """What a file descriptor is."""

    UNKNOWN = 0
    FILE = 1
    SOCKET = 2
    OTHER = 3


class Stat(IntEnum):
    """Counters kept in the kernel. Those from RING_HEAD on count losses, where they happen."""

    BEGUN = 0
    COMPLETE = 1
    CLIENT_CLOSED = 2
    SERVER_CLOSED = 3
    UNOBSERVED = 4
    CONNECTIONS = 5
    CONNECTIONS_CLOSED = 6
    CONNECTIONS_OLD = 7
    INTERIM_RESPONSES = 8
    UPGRADES = 9
    ACCEPTED = 10
    QUEUED = 11
    DEQUEUED = 12
    URING = 13
    RING_HEAD = 16
    RING_END = 17
    RING_FILE = 18
    RING_PROCESS = 19
    MAP_CONNECTIONS = 20
    MAP_THREADS = 21
    MAP_FILES = 22
    MAP_FDS = 23
    HEAD_UNREADABLE = 24
    HEAD_MALFORMED = 25
    HEAD_INCOMPLETE = 26
    CHUNK_MALFORMED = 27
    CHUNK_TOO_MANY = 28
    PIPELINE_FULL = 29
    UNSOLICITED = 30
    CALL_UNSUPPORTED = 31
    VECTOR_TOO_LONG = 32
    FD_UNRESOLVED = 33
    CONNECTION_REPLACED = 34
    PATH_CUT = 35
    TLS = 36
    RING_TOKENS = 37
    RING_BODY = 38
    RING_DIGEST = 39


class Header(ctypes.Structure):
    """Begins every event. `rid` is the request's number, 0 where there is none; `ts` is CLOCK_MONOTONIC in ns."""

    _fields_ = (("kind", U8), ("what", U8), ("n", U16), ("tgid", U32), ("ts", U64), ("rid", U64))


class HeadEvent(ctypes.Structure):
    """A piece of a head, `n` bytes of which follow; `what` is the Direction, `last` says that the head ends with it. `tid` and `key`
    are the thread and the task that received or sent it; a key is 0 where none is known."""

    _fields_ = (
        ("h", Header),
        ("conn", U64),
        ("key", U64),
        ("tid", U32),
        ("last", U32),
        ("status", U32),
        ("lost_files", U32),
    )


class EndEvent(ctypes.Structure):
    """A request ended (`what` is the EndOutcome). Times are ns since boot or durations in ns; 0 where it did not happen.

    `client_ns`: the socket was empty and the request not yet whole; of that, `client_out_ns` outside of reads. `server_ns`: its
    bytes lay unread, with no read under way. `print_*`: keyed hashes of the first bytes of the bodies, `printed_*` of how many.
    `gap_ns`: on-CPU time of its own thread between reading `gap_bytes` and whatever it read or wrote next, in `gaps` pieces.
    `hash_ns`: of that thread in `hash_calls` calls of a hash function, while those are timed.
    """

    _fields_ = (
        ("h", Header),
        ("conn", U64),
        ("start_ns", U64),
        ("end_ns", U64),
        ("established_ns", U64),
        ("accept_ns", U64),
        ("first_read_ns", U64),
        ("bytes_in", U64),
        ("bytes_out", U64),
        ("recv_ns", U64),
        ("send_ns", U64),
        ("wait_rx_ns", U64),
        ("wait_tx_ns", U64),
        ("runqueue_ns", U64),
        ("received_ns", U64),
        ("answered_ns", U64),
        ("client_ns", U64),
        ("client_out_ns", U64),
        ("server_ns", U64),
        ("print_in", U64),
        ("print_out", U64),
        ("key", U64),
        ("gap_ns", U64),
        ("gap_bytes", U64),
        ("hash_ns", U64),
        ("printed_in", U32),
        ("printed_out", U32),
        ("sequence", U32),
        ("tid", U32),
        ("recv_calls", U32),
        ("send_calls", U32),
        ("status", U32),
        ("flags", U32),
        ("lost", U32),
        ("framed", U32),
        ("lost_files", U32),
        ("gaps", U32),
        ("hash_calls", U32),
        ("pad", U32),
    )


class OpenEvent(ctypes.Structure):
    """A file was opened as `fd` (`what`: FileFlag.ALONE or 0); from now on it is generation `gen`. `n` bytes of path follow, relative
    to `dirgen` unless `dirfd` is AT_FDCWD."""

    _fields_ = (
        ("h", Header),
        ("gen", U64),
        ("ns", U64),
        ("key", U64),
        ("dirgen", U64),
        ("tid", U32),
        ("fd", S32),
        ("flags", U32),
        ("dirfd", S32),
    )


class FileEvent(ctypes.Structure):
    """Work on one generation of a file, summed over calls; durations in ns. `what`: its last descriptor is closed.

    `rid`: the request whose socket the first call's thread had used last, or 0. `first_ns`: the first call's entry, `last_ns`: the
    exit of the last but close, `data_ns`: of the last that moved bytes. `print`: of the first `printed` bytes written, or else read.
    """

    _fields_ = (
        ("h", Header),
        ("gen", U64),
        ("write_bytes", U64),
        ("read_bytes", U64),
        ("write_ns", U64),
        ("read_ns", U64),
        ("sync_ns", U64),
        ("other_ns", U64),
        ("first_ns", U64),
        ("last_ns", U64),
        ("data_ns", U64),
        ("key", U64),
        ("print", U64),
        ("printed", U32),
        ("flags", U32),
        ("tid", U32),
        ("write_calls", U32),
        ("read_calls", U32),
        ("syncs", U32),
        ("others", U32),
        ("pad", U32),
    )


class PathEvent(ctypes.Structure):
    """A call on paths (`what` is the PathCall, `file_flags` FileFlag.ALONE or 0). `n` bytes of the first path follow, then `n2` of
    the second; relative ones are so to a directory's generation, or to the working directory where its descriptor is AT_FDCWD.
    fchdir has no path but that."""

    _fields_ = (
        ("h", Header),
        ("ns", U64),
        ("key", U64),
        ("dirgen", U64),
        ("dirgen2", U64),
        ("tid", U32),
        ("n2", U32),
        ("dirfd", S32),
        ("dirfd2", S32),
        ("file_flags", U32),
        ("pad", U32),
    )


class ProcessEvent(ctypes.Structure):
    """A process changed (`what` is the ProcessChange); `other` is the parent or the port."""

    _fields_ = (("h", Header), ("other", U32), ("pad", U32))


class UnknownFdEvent(ctypes.Structure):
    """A file descriptor that was open before the agent looked was used; it is now generation `gen`."""

    _fields_ = (("h", Header), ("gen", U64), ("fd", S32), ("pad", U32))


class TokensEvent(ctypes.Structure):
    """What a small write may say of a request, without its text: a set of keyed hashes, TOKEN_BITS bits, of all its pieces of
    TOKEN_WINDOW bytes follows. Whether a name is in it can be asked; what else is in it cannot be told."""

    _fields_ = (("h", Header), ("gen", U64), ("key", U64), ("tid", U32), ("size", U32))


class BodyEvent(ctypes.Structure):
    """A request's body was received whole; `print` is of its first `printed` bytes."""

    _fields_ = (("h", Header), ("print", U64), ("bytes", U64), ("printed", U32), ("pad", U32))


class MapEvent(ctypes.Structure):
    """A file was mapped into memory, with mmap(2)'s `prot` and `flags`: what is done with it from there is not seen."""

    _fields_ = (("h", Header), ("gen", U64), ("size", U64), ("prot", U32), ("flags", U32))


class DigestEvent(ctypes.Structure):
    """A digest over `bytes` was finished (`what`: FileFlag.ALONE or 0); `n` bytes of its value follow. `algorithm` is OpenSSL's NID.

    `ns`: on-CPU time in the hash function for the last `timed_bytes` of it, in `calls` calls, with the probes' own time in it; 0
    while calls are not timed. Where a hash is finished more than once, they are those since the time before. `read`, `wrote`: the
    generations of the files that the thread had read from (0: a socket) and written to last. `ran_ns`: how long the thread had been
    on a CPU, from a start of its own.
    """

    _fields_ = (
        ("h", Header),
        ("bytes", U64),
        ("ns", U64),
        ("timed_bytes", U64),
        ("key", U64),
        ("read", U64),
        ("wrote", U64),
        ("ran_ns", U64),
        ("tid", U32),
        ("calls", U32),
        ("algorithm", U32),
        ("pad", U32),
    )


EVENTS: dict[Kind, type[ctypes.Structure]] = {
    Kind.HEAD: HeadEvent,
    Kind.END: EndEvent,
    Kind.OPEN: OpenEvent,
    Kind.FILE: FileEvent,
    Kind.PATH: PathEvent,
    Kind.PROCESS: ProcessEvent,
    Kind.UNKNOWN_FD: UnknownFdEvent,
    Kind.TOKENS: TokensEvent,
    Kind.BODY: BodyEvent,
    Kind.MAP: MapEvent,
    Kind.DIGEST: DigestEvent,
}


class FdEntry(ctypes.Structure):
    """A value of the `fds` map. `object`: a socket's address or a file's generation; `kind`: the FileKind; `not_served`: a socket
    that is no connection of the service; `shared`: other descriptors name the same file; `many`: a FileUse."""

    _fields_ = (("object", U64), ("kind", U32), ("not_served", U8), ("shared", U8), ("many", U8), ("pad", U8))


class LayoutEntry(ctypes.Structure):
    """A value of the `layouts` map, by tgid: where the key of the current task lies (see runtimes.py)."""

    _fields_ = (("slot", U32), ("member", U32))


class HashingEntry(ctypes.Structure):
    """A value of the `hashing` map, by tgid: sums over one process's digests, with the probes' own time in `ns`.

    `value`, `bytes_hashed` and `algorithm` are the last digest's: only a self-test's process has its value kept.
    """

    _fields_ = (
        ("calls", U64),
        ("bytes", U64),
        ("ns", U64),
        ("copies", U64),
        ("digests", U64),
        ("bytes_hashed", U64),
        ("algorithm", U32),
        ("keeps", U32),
        ("value", U8 * DIGEST_BYTES),
    )


@dataclass(frozen=True, slots=True)
class Map:
    """A BPF map. `value` and `key` are C types whose sizes the compiled object reports, or numbers of bytes."""

    name: str
    type: int
    key: int
    value: str | int
    entries: int
    flags: int = 0


HASH, ARRAY, PROG_ARRAY, PERCPU_ARRAY, LRU_HASH, RINGBUF = 1, 2, 3, 6, 9, 27
#: A map that user space may map into memory, and so write a byte of at a time.
MMAPABLE = 1 << 10

#: A map's number in the compiled program is MAP_BASE plus its place here; the loader puts the descriptor in its stead.
MAP_BASE = 1000
MAPS: tuple[Map, ...] = (
    Map("events", RINGBUF, 0, 0, 1_048_576),
    Map("stats", PERCPU_ARRAY, 4, 8, 64),
    Map("handlers", PROG_ARRAY, 4, 4, 32),
    Map("calls", ARRAY, 4, 4, 512),
    Map("targets", ARRAY, 4, 64, 65_536, MMAPABLE),
    Map("config", ARRAY, 4, 8, 16),
    Map("layouts", HASH, 4, 8, 1_024),
    Map("ports", HASH, 4, 4, 256),
    Map("threads", HASH, 4, "struct thread", 16_384),
    Map("conns", HASH, 8, "struct conn", 4_096),
    Map("fds", HASH, 8, ctypes.sizeof(FdEntry), 65_536),
    Map("work", HASH, 16, "struct work", 16_384),
    Map("scratch", PERCPU_ARRAY, 4, "struct scratch", 1),
    Map("hashing", HASH, 4, ctypes.sizeof(HashingEntry), 1_024),
    Map("hashes", LRU_HASH, 16, "struct hash", 8_192),
)


class Port(IntEnum):
    """Bits of the values of the `ports` map."""

    CONFIGURED = 1  # whoever listens on it is a target
    SERVED = 2  # a target listens on it


class Config(IntEnum):
    """Places in the `config` map."""

    HEAD_BYTES = 0
    WATCH_EXEC = 1
    SECRET = 2  # of fingerprints and tokens: an odd random number, and another
    SECRET_2 = 3
    LOST_FILES = 4  # written by the kernel: events about file work that were lost


class Handler(IntEnum):
    """Places in the `handlers` map: what a finished system call is handed to. Also the values of the `calls` map.

    Those up to ON_DESCRIPTOR take a descriptor first, which is resolved before them.
    """

    NONE = 0
    RECEIVE = 1
    SEND = 2
    SYNC = 3
    CHANGE = 4
    DUP = 5
    ON_DESCRIPTOR = 5
    TRANSFER = 6
    ACCEPT = 7
    OPEN = 8
    CLOSE = 9
    PATH = 10
    WAIT = 11
    FILE = 12
    FRAME = 13
    CHUNK = 14
    FINISH = 15
    TOKENS = 16
    BODY = 17
    MAP = 18
    URING = 19
    PRINT = 20


#: x86_64 system call numbers (arch/x86/entry/syscalls/syscall_64.tbl) by the handler that takes them.
CALLS: dict[Handler, dict[str, int]] = {
    Handler.RECEIVE: {
        "read": 0, "pread64": 17, "readv": 19, "recvfrom": 45, "recvmsg": 47, "preadv": 295, "preadv2": 327, "recvmmsg": 299,
    },
    Handler.SEND: {
        "write": 1, "pwrite64": 18, "writev": 20, "sendto": 44, "sendmsg": 46, "pwritev": 296, "pwritev2": 328, "sendmmsg": 307,
    },
    Handler.TRANSFER: {"sendfile": 40, "splice": 275, "copy_file_range": 326},
    Handler.ACCEPT: {"accept": 43, "accept4": 288},
    Handler.OPEN: {"open": 2, "creat": 85, "openat": 257, "openat2": 437},
    Handler.CLOSE: {"close": 3, "close_range": 436},
    Handler.SYNC: {"fsync": 74, "fdatasync": 75, "sync_file_range": 277},
    Handler.CHANGE: {"ftruncate": 77, "fallocate": 285},
    Handler.PATH: {
        "rename": 82, "renameat": 264, "renameat2": 316, "link": 86, "linkat": 265, "unlink": 87, "unlinkat": 263, "rmdir": 84,
        "mkdir": 83, "mkdirat": 258, "chdir": 80, "fchdir": 81, "truncate": 76,
    },
    Handler.DUP: {"dup": 32, "dup2": 33, "dup3": 292, "fcntl": 72},
    Handler.MAP: {"mmap": 9},
    Handler.URING: {"io_uring_setup": 425, "io_uring_enter": 426},
    Handler.WAIT: {
        "poll": 7, "select": 23, "epoll_wait": 232, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "epoll_pwait2": 441,
    },
}  # fmt: skip

#: Kernel structure members whose offsets the loader takes from the running kernel's BTF: macro -> (struct, member path).
OFFSETS: dict[str, tuple[str, str]] = {
    "OFF_TASK_FILES": ("task_struct", "files"),
    "OFF_TASK_TGID": ("task_struct", "tgid"),
    "OFF_TASK_SIGNAL": ("task_struct", "signal"),
    "OFF_SIGNAL_LIVE": ("signal_struct", "live"),
    "OFF_TASK_RUN_DELAY": ("task_struct", "sched_info.run_delay"),
    "OFF_FILES_FDT": ("files_struct", "fdt"),
    "OFF_FDT_MAX": ("fdtable", "max_fds"),
    "OFF_FDT_FD": ("fdtable", "fd"),
    "OFF_FILE_INODE": ("file", "f_inode"),
    "OFF_FILE_PRIVATE": ("file", "private_data"),
    "OFF_INODE_MODE": ("inode", "i_mode"),
    "OFF_SOCKET_SK": ("socket", "sk"),
    "OFF_SOCK_NUM": ("sock", "__sk_common.skc_num"),
    "OFF_SOCK_FAMILY": ("sock", "__sk_common.skc_family"),
    "OFF_SOCK_STATE": ("sock", "__sk_common.skc_state"),
    "OFF_TASK_FSBASE": ("task_struct", "thread.fsbase"),
    "OFF_TASK_EXEC_START": ("task_struct", "se.exec_start"),
    "OFF_TASK_SLEEPS": ("task_struct", "nvcsw"),
    "OFF_TASK_RUNTIME": ("task_struct", "se.sum_exec_runtime"),
    "OFF_TCP_RCV_NXT": ("tcp_sock", "rcv_nxt"),
    "OFF_TCP_COPIED": ("tcp_sock", "copied_seq"),
    "OFF_SKB_CB": ("sk_buff", "cb"),
}

_C_NAMES: dict[type, str] = {U8: "__u8", U16: "__u16", U32: "__u32", U64: "__u64", S32: "__s32"}


def fields(structure: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """Names and ctypes of a structure's members, in order."""
    return [(field[0], field[1]) for field in structure._fields_]


def _struct_name(structure: type[ctypes.Structure]) -> str:
    return "bp_" + "".join("_" + c.lower() if c.isupper() else c for c in structure.__name__).lstrip("_")


def _render_struct(structure: type[ctypes.Structure]) -> Iterator[str]:
    name = _struct_name(structure)
    yield f"struct {name} {{"
    for field, ctype in fields(structure):
        length = getattr(ctype, "_length_", 0)
        element = ctype._type_ if length else ctype
        yield f"\t{_C_NAMES.get(element) or 'struct ' + _struct_name(element)} {field}{f'[{length}]' if length else ''};"
    yield "};"
    yield f'_Static_assert(sizeof(struct {name}) == {ctypes.sizeof(structure)}, "{name}");'
    for field, _ in fields(structure):
        offset = getattr(structure, field).offset
        yield f'_Static_assert(__builtin_offsetof(struct {name}, {field}) == {offset}, "{name}.{field}");'


def render_header() -> str:
    """The text of `probes/include/abi.h`."""
    lines = [
        "/* SPDX-License-Identifier: GPL-2.0 */",
        "/* Rendered from bucketprobe/abi.py by `python -m bucketprobe.abi`; do not edit. */",
        "#ifndef BUCKETPROBE_ABI_H",
        "#define BUCKETPROBE_ABI_H",
        "",
        f"#define PATH_BYTES {PATH_BYTES}",
        f"#define HEAD_BYTES {HEAD_BYTES}",
        f"#define PRINT_BYTES {PRINT_BYTES}",
        f"#define PRINT_UNKNOWN {PRINT_UNKNOWN}",
        f"#define TOKEN_BYTES {TOKEN_BYTES}",
        f"#define TOKEN_WINDOW {TOKEN_WINDOW}",
        f"#define TOKEN_BITS {TOKEN_BITS}",
        f"#define TOKEN_WRITE {TOKEN_WRITE}",
        f"#define DIGEST_BYTES {DIGEST_BYTES}",
        "",
    ]
    prefixes: dict[type[IntEnum], str] = {
        Kind: "EV", Direction: "DIR", EndOutcome: "END", RequestFlag: "RF", FileUse: "USE", FileFlag: "FF", PathCall: "PC",
        ProcessChange: "PR",
        Runtime: "RT", FileKind: "FD", Stat: "ST", Port: "PORT", Config: "CFG", Handler: "H",
    }  # fmt: skip
    for enum, prefix in prefixes.items():
        lines.append(f"enum {{ /* {enum.__name__} */")
        lines += [f"\t{prefix}_{name} = {member.value}," for name, member in enum.__members__.items()]
        lines += ["};", ""]
    lines.append("enum { /* maps */")
    lines += [f"\tMAP_{m.name.upper()} = {MAP_BASE + i}," for i, m in enumerate(MAPS)]
    lines += ["};", ""]
    lines += [f"#define NR_{name} {nr}" for calls in CALLS.values() for name, nr in calls.items()]
    lines.append("")
    structures: list[type[ctypes.Structure]] = [Header, *EVENTS.values(), FdEntry, LayoutEntry, HashingEntry]
    for structure in structures:
        lines += [*_render_struct(structure), ""]
    lines.append("#endif")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys
    from importlib.resources import files

    target = files("bucketprobe.probes").joinpath("include/abi.h")
    sys.stdout.write(f"{target}\n")
    with open(str(target), "w", encoding="ascii") as out:
        out.write(render_header())

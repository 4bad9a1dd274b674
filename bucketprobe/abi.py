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


class Kind(IntEnum):
    """The first byte of every event."""

    HEAD = 1
    END = 2
    OPEN = 3
    FILE = 4
    PATH = 5
    PROCESS = 6
    UNKNOWN_FD = 7


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


class Header(ctypes.Structure):
    """Begins every event. `rid` is the request's number, 0 where there is none; `ts` is CLOCK_MONOTONIC in ns."""

    _fields_ = (("kind", U8), ("what", U8), ("n", U16), ("tgid", U32), ("ts", U64), ("rid", U64))


class HeadEvent(ctypes.Structure):
    """A piece of a head, `n` bytes of which follow; `what` is the Direction, `last` says that the head ends with it."""

    _fields_ = (("h", Header), ("conn", U64), ("last", U32), ("status", U32))


class EndEvent(ctypes.Structure):
    """A request ended (`what` is the EndOutcome). Times are ns since boot or durations in ns."""

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
        ("sequence", U32),
        ("tid", U32),
        ("recv_calls", U32),
        ("send_calls", U32),
        ("status", U32),
        ("flags", U32),
        ("lost", U32),
        ("framed", U32),
    )


class OpenEvent(ctypes.Structure):
    """A file was opened as `fd`; from now on it is generation `gen`. `n` bytes of path follow, relative to `dirgen` unless
    `dirfd` is AT_FDCWD."""

    _fields_ = (("h", Header), ("gen", U64), ("ns", U64), ("tid", U32), ("fd", S32), ("flags", U32), ("dirfd", S32), ("dirgen", U64))


class FileEvent(ctypes.Structure):
    """Work on one generation of a file for one request (`rid`, or 0), summed over its calls; durations in ns. `what`: its end."""

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
        ("write_calls", U32),
        ("read_calls", U32),
        ("syncs", U32),
        ("others", U32),
    )


class PathEvent(ctypes.Structure):
    """A call on paths (`what` is the PathCall). `n` bytes of the first path follow, then `n2` of the second; relative ones are so
    to a directory's generation, or to the working directory where its descriptor is AT_FDCWD. fchdir has no path but that."""

    _fields_ = (("h", Header), ("ns", U64), ("tid", U32), ("n2", U32), ("dirfd", S32), ("dirfd2", S32), ("dirgen", U64), ("dirgen2", U64))


class ProcessEvent(ctypes.Structure):
    """A process changed (`what` is the ProcessChange); `other` is the parent or the port."""

    _fields_ = (("h", Header), ("other", U32), ("pad", U32))


class UnknownFdEvent(ctypes.Structure):
    """A file descriptor that was open before the agent looked was used; it is now generation `gen`."""

    _fields_ = (("h", Header), ("gen", U64), ("fd", S32), ("pad", U32))


EVENTS: dict[Kind, type[ctypes.Structure]] = {
    Kind.HEAD: HeadEvent,
    Kind.END: EndEvent,
    Kind.OPEN: OpenEvent,
    Kind.FILE: FileEvent,
    Kind.PATH: PathEvent,
    Kind.PROCESS: ProcessEvent,
    Kind.UNKNOWN_FD: UnknownFdEvent,
}


@dataclass(frozen=True, slots=True)
class Map:
    """A BPF map. `value` and `key` are C types whose sizes the compiled object reports, or numbers of bytes."""

    name: str
    type: int
    key: int
    value: str | int
    entries: int
    flags: int = 0


HASH, ARRAY, PROG_ARRAY, PERCPU_ARRAY, RINGBUF = 1, 2, 3, 6, 27
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
    Map("ports", HASH, 4, 4, 256),
    Map("threads", HASH, 4, "struct thread", 16_384),
    Map("conns", HASH, 8, "struct conn", 4_096),
    Map("fds", HASH, 8, "struct fd", 65_536),
    Map("work", HASH, 16, "struct work", 16_384),
    Map("scratch", PERCPU_ARRAY, 4, "struct scratch", 1),
)


class Port(IntEnum):
    """Bits of the values of the `ports` map."""

    CONFIGURED = 1  # whoever listens on it is a target
    SERVED = 2  # a target listens on it


class Config(IntEnum):
    """Places in the `config` map."""

    HEAD_BYTES = 0
    WATCH_EXEC = 1


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
    "OFF_TCP_RCV_NXT": ("tcp_sock", "rcv_nxt"),
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
        yield f"\t{_C_NAMES.get(ctype) or 'struct ' + _struct_name(ctype)} {field};"
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
        "",
    ]
    prefixes: dict[type[IntEnum], str] = {
        Kind: "EV", Direction: "DIR", EndOutcome: "END", RequestFlag: "RF", PathCall: "PC", ProcessChange: "PR",
        FileKind: "FD", Stat: "ST", Port: "PORT", Config: "CFG", Handler: "H",
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
    structures: list[type[ctypes.Structure]] = [Header, *EVENTS.values()]
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

# SPDX-License-Identifier: Apache-2.0
"""bpf(2), by ctypes: the one module that speaks to the kernel's BPF. Needs no library and no BCC.

Attribute layouts are those of `union bpf_attr` in include/uapi/linux/bpf.h; every call may raise OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import struct
from collections.abc import Iterator
from contextlib import suppress

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_libc = ctypes.CDLL(None, use_errno=True)

(_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD) = range(6)
_RAW_TRACEPOINT_OPEN = 17
_LOOKUP_BATCH = 24

_LINK_CREATE = 28

PROG_TYPE_KPROBE, PROG_TYPE_RAW_TRACEPOINT = 2, 17
#: enum bpf_attach_type: a program for many uprobes at once (Linux 6.6)
TRACE_UPROBE_MULTI = 48
_UPROBE_MULTI_RETURN = 1
ANY, NOEXIST = 0, 1


def _bpf(command: int, attribute: bytes) -> int:
    buffer = ctypes.create_string_buffer(attribute.ljust(128, b"\0"), 128)
    result: int = _libc.syscall(_SYS_BPF[platform.machine()], command, buffer, 128)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def raise_memlock_limit() -> None:
    """Linux before 5.11 charges maps to RLIMIT_MEMLOCK, whose default is too small; later ones do not ask."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def map_create(kind: int, key: int, value: int, entries: int, flags: int = 0, name: str = "") -> int:
    """Creates a map and returns its descriptor (close on exec). Sizes in bytes."""
    return _bpf(_MAP_CREATE, struct.pack("=IIIIIII16s", kind, key, value, entries, flags, 0, 0, name.encode()[:15]))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value of one key, or None where there is none. `value_size` counts all CPUs' values of a per-CPU map."""
    k = ctypes.create_string_buffer(key, len(key))
    v = ctypes.create_string_buffer(value_size)
    try:
        _bpf(_LOOKUP, struct.pack("=IIQQQ", fd, 0, _address(k), _address(v), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return v.raw


def map_update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Sets the value of one key."""
    k = ctypes.create_string_buffer(key, len(key))
    v = ctypes.create_string_buffer(value, len(value))
    _bpf(_UPDATE, struct.pack("=IIQQQ", fd, 0, _address(k), _address(v), flags))


def map_delete(fd: int, key: bytes) -> bool:
    """Removes one key; False where it was not there."""
    k = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_DELETE, struct.pack("=IIQQQ", fd, 0, _address(k), 0, 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_keys(fd: int, key_size: int, limit: int) -> Iterator[bytes]:
    """The keys of a map, at most `limit`; a map that changes meanwhile may show one twice or not at all."""
    following = ctypes.create_string_buffer(key_size)
    key: ctypes.Array[ctypes.c_char] | None = None
    for _ in range(limit):
        try:
            _bpf(_NEXT_KEY, struct.pack("=IIQQQ", fd, 0, _address(key) if key is not None else 0, _address(following), 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        yield following.raw
        key = ctypes.create_string_buffer(following.raw, key_size)


def array_values(fd: int, entries: int, value_size: int) -> bytes:
    """All values of an array map in one call (kernel 5.6; per-CPU arrays 5.13, one by one before)."""
    values = ctypes.create_string_buffer(entries * value_size)
    keys = ctypes.create_string_buffer(entries * 4)
    token = ctypes.create_string_buffer(8)
    attribute = struct.pack("=QQQQIIQQ", 0, _address(token), _address(keys), _address(values), entries, fd, 0, 0)
    try:
        _bpf(_LOOKUP_BATCH, attribute)
    except OSError as error:
        if error.errno == errno.ENOENT:  # the end was reached, all values are there
            return values.raw
        if error.errno not in (errno.EINVAL, errno.ENOTSUPP if hasattr(errno, "ENOTSUPP") else 524):
            raise
        return b"".join(map_lookup(fd, struct.pack("=I", i), value_size) or bytes(value_size) for i in range(entries))
    return values.raw


_LOG_STATS = 4
_LOG_BYTES = 65_536


def program_load(code: bytes, name: str, kind: int = PROG_TYPE_RAW_TRACEPOINT, attach_type: int = 0) -> int:
    """Loads a program and returns its descriptor. `attach_type`: what it is expected to be attached as, where its type does not say.

    Raises OSError; where the verifier refused, its `strerror` ends in the reason.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attribute = struct.pack(
            "=IIQQIIQII16sII",
            kind,
            len(code) // 8,
            _address(instructions),
            _address(licence),
            _LOG_STATS if log else 0,
            _LOG_BYTES if log else 0,
            _address(log) if log else 0,
            0,
            0,
            name.encode()[:15],
            0,
            attach_type,
        )
        return _bpf(_PROG_LOAD, attribute)

    try:
        return load(None)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return load(log)
    except OSError as error:
        reason = " / ".join(log.value.decode(errors="replace").split("\n")[:2])
        raise OSError(error.errno, f"{error.strerror}: {name}: {reason}") from None


def raw_tracepoint_open(name: str, program: int) -> int:
    """Attaches a program to a raw tracepoint; it stays attached while the returned descriptor is open."""
    text = ctypes.create_string_buffer(name.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QII", _address(text), program, 0))


def uprobe_multi_open(program: int, path: str, offsets: list[int], tgid: int, *, returns: bool) -> int:
    """Attaches a program to places in a file, as one process runs it, while the returned descriptor is open (Linux 6.6)."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    places = (ctypes.c_uint64 * len(offsets))(*offsets)
    flags = _UPROBE_MULTI_RETURN if returns else 0
    head = struct.pack("=IIII", program, 0, TRACE_UPROBE_MULTI, 0)
    return _bpf(_LINK_CREATE, head + struct.pack("=QQQQIII", _address(name), ctypes.addressof(places), 0, 0, len(offsets), flags, tgid))


def has_uprobe_multi() -> bool:
    """Whether `uprobe_multi_open` works here, and for all threads of a process.

    Asked as libbpf does: "/" is no file to attach to, EBADF, unless the process is looked at first, as it is since links keep to
    processes (commit 46ba0e49b642, Linux 6.10 and stable ones); before, they kept to the one thread. That a program loads says
    nothing: kernels before 6.6 do not look at what it is expected to be attached as.
    """
    nothing = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit
    refused = []
    try:
        program = program_load(nothing, "nothing", PROG_TYPE_KPROBE, TRACE_UPROBE_MULTI)
    except OSError:
        return False
    for tgid in (0, 0xFFFFFFFF):
        try:
            os.close(uprobe_multi_open(program, "/", [0], tgid, returns=False))
        except OSError as error:
            refused.append(error.errno)
    os.close(program)
    return refused == [errno.EBADF, errno.EINVAL]


_SYS_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_ATTRIBUTE_BYTES = 112
_PERF_CLOSE_ON_EXEC = 8
_PERF_SET_BPF, _PERF_ENABLE = 0x40042408, 0x2400
_UPROBE_SOURCE = "/sys/bus/event_source/devices/uprobe"


def uprobe_open(program: int, path: str, offset: int, tgid: int, *, returns: bool) -> int:
    """The same for one place by way of perf_event_open(2), as Linux had it before (4.17); nothing is left in `uprobe_events`.

    A descriptor takes about 0.1 s to close. Raises FileNotFoundError where the kernel has no uprobes.
    """
    with open(f"{_UPROBE_SOURCE}/type", encoding="ascii") as file:
        kind = int(file.read())
    with open(f"{_UPROBE_SOURCE}/format/retprobe", encoding="ascii") as file:
        bit = int(file.read().removeprefix("config:"))
    name = ctypes.create_string_buffer(os.fsencode(path))
    attribute = struct.pack("=IIQQQQQIIQQ", kind, _PERF_ATTRIBUTE_BYTES, returns << bit, 0, 0, 0, 0, 0, 0, _address(name), offset)
    buffer = ctypes.create_string_buffer(attribute.ljust(_PERF_ATTRIBUTE_BYTES, b"\0"), _PERF_ATTRIBUTE_BYTES)
    fd: int = _libc.syscall(_SYS_PERF_EVENT_OPEN[platform.machine()], buffer, tgid, -1, -1, _PERF_CLOSE_ON_EXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        fcntl.ioctl(fd, _PERF_SET_BPF, program)
        fcntl.ioctl(fd, _PERF_ENABLE, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def possible_cpus() -> int:
    """How many values a look-up in a per-CPU map returns (/sys/devices/system/cpu/possible)."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        return max(int(part.split("-")[-1]) for part in file.read().split(",")) + 1


class Ring:
    """The consumer of a BPF ring buffer (kernel/bpf/ringbuf.c): two pages of positions, then the data, mapped twice.

    Relies on x86's ordering between a record's header and its payload.
    """

    _BUSY, _DISCARD, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self.fd = fd
        self.size = size
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._data = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        # One store of eight bytes: struct.pack_into zeroes the place first, and a kernel that reads the zero sees a full ring.
        self._consumed = memoryview(self._consumer).cast("Q")
        self._position: int = self._consumed[0]

    def backlog(self) -> int:
        """Bytes that wait to be read."""
        produced: int = struct.unpack_from("=Q", self._data, 0)[0]
        return produced - self._position

    def read(self, limit: int = 4096) -> list[bytes]:
        """Up to `limit` records, in the order in which they were reserved; their room is given back."""
        page, mask, data = mmap.PAGESIZE, self.size - 1, self._data
        position = self._position
        produced: int = struct.unpack_from("=Q", data, 0)[0]
        records: list[bytes] = []
        while position < produced and len(records) < limit:
            at = page + (position & mask)
            header: int = struct.unpack_from("=I", data, at)[0]
            if header & self._BUSY:
                break
            length = header & self._LENGTH
            if not header & self._DISCARD:
                records.append(data[at + 8 : at + 8 + length])
            position += (length + 15) & ~7
        self._position = position
        self._consumed[0] = position
        return records

    def close(self) -> None:
        self._consumed.release()
        self._consumer.close()
        self._data.close()

# SPDX-License-Identifier: Apache-2.0
"""bpf(2), by ctypes: the one module that speaks to the kernel's BPF. Needs no library and no BCC.

Attribute layouts are those of `union bpf_attr` in include/uapi/linux/bpf.h; every call may raise OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import errno
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

PROG_TYPE_RAW_TRACEPOINT = 17
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


def program_load(code: bytes, name: str) -> int:
    """Loads a raw tracepoint program and returns its descriptor.

    Raises OSError; where the verifier refused, its `strerror` ends in the reason.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attribute = struct.pack(
            "=IIQQIIQII16s",
            PROG_TYPE_RAW_TRACEPOINT,
            len(code) // 8,
            _address(instructions),
            _address(licence),
            _LOG_STATS if log else 0,
            _LOG_BYTES if log else 0,
            _address(log) if log else 0,
            0,
            0,
            name.encode()[:15],
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

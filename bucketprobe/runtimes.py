# SPDX-License-Identifier: Apache-2.0
"""Which language runtime a process is, and where the kernel finds what it runs right now: a goroutine, a task's context.

Nothing is taken from a table of versions. The places are found in the process's own binary and memory and checked there, and
where the check fails the answer is "none": a wrong place would give work to the wrong request. Only reads, only of /proc, all of
them bounded; a process that ends, or whose memory is arranged to mislead, gets "none" too. x86-64 only.

The kernel side, with `fsbase` the thread's FS base:

    GO        the goroutine is in register R14 at every system call (register ABI, since Go 1.17)
    GO_CGO    g = *(fsbase - 8); m = *(g + slot); the goroutine is *(m + member), in C code too, which uses R14 for itself
    CPYTHON   the thread's state is *(fsbase + slot), its context *(state + member); no other way holds while the GIL is released
"""

from __future__ import annotations

import array
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from bucketprobe import elf

PROC = "/proc"


class Kind(IntEnum):
    """What the kernel program is to do for a key."""

    NONE = 0
    GO = 1
    GO_CGO = 2
    CPYTHON = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """The kind, its two offsets in bytes, and one line for people."""

    kind: Kind
    slot: int = 0
    member: int = 0
    detail: str = ""


#: What may be read of one process's memory or executable, in bytes, where each read counts as elf.READ_COST more. A large Go
#: program's table of functions takes the most; a process that leads nowhere costs a tenth of a second.
_BUDGET = 64 << 20
_MAPS_BYTES = 4 << 20

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_PHDR, _PT_TLS = 1, 2, 3, 6, 7
_DT_STRTAB, _DT_SYMTAB, _DT_GNU_HASH = 5, 6, 0x6FFFFEF5
_AT_PHDR, _AT_PHNUM = 3, 5


def layout(tgid: int, *, proc: str = PROC) -> Layout:
    """What runs in this process, and where its execution key lies. Raises nothing: what cannot be told is Kind.NONE.

    It may be asked again: a Python process has no task context to find the place by before its event loop runs.
    """
    directory = f"{proc}/{tgid}"
    try:
        with elf.Bytes(f"{directory}/mem", _BUDGET) as memory, elf.Bytes(f"{directory}/exe", _BUDGET) as file:
            image = _executable(directory, memory)
            return _go(file, memory, image) or _cpython(directory, memory, image)
    except elf.Unreadable as error:
        return Layout(Kind.NONE, detail=str(error))
    except OSError as error:
        return Layout(Kind.NONE, detail=f"cannot be read ({error.strerror})")


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    address: int
    size: int


class _Image:
    """One ELF object as it lies in memory: its program headers and its dynamic symbols."""

    def __init__(self, memory: elf.Bytes, headers_at: int, count: int, base: int | None) -> None:
        self._memory = memory
        raw = memory.read(headers_at, 56 * min(count, 64))
        self.segments = [_Segment(kind, address, size) for kind, _, _, address, _, _, size, _ in struct.iter_unpack("<IIQQQQQQ", raw)]
        if base is None:
            self.bias = next((headers_at - each.address for each in self.segments if each.kind == _PT_PHDR), 0)
        else:
            self.bias = base - next((each.address & ~0xFFF for each in self.segments if each.kind == _PT_LOAD), 0)

    def segment(self, kind: int) -> _Segment | None:
        return next((each for each in self.segments if each.kind == kind), None)

    def symbol(self, name: bytes) -> tuple[int, int] | None:
        """Address and size of an exported symbol, by the table that the dynamic linker uses (DT_GNU_HASH)."""
        dynamic = self.segment(_PT_DYNAMIC)
        if not dynamic:
            return None
        memory = self._memory
        raw = memory.read(self.bias + dynamic.address, min(dynamic.size, 4096) & ~15)
        entries = dict(struct.iter_unpack("<QQ", raw))
        # glibc turns these into addresses in place, other linkers do not.
        places = [entries[tag] for tag in (_DT_GNU_HASH, _DT_SYMTAB, _DT_STRTAB) if tag in entries]
        if len(places) < 3:
            return None
        table, symbols, strings = (place if place >= self.bias else place + self.bias for place in places)
        buckets, first, bloom_words, _ = struct.unpack("<4I", memory.read(table, 16))
        if not buckets:
            return None
        wanted = _gnu_hash(name)
        bucket_at = table + 16 + 8 * bloom_words
        index = int.from_bytes(memory.read(bucket_at + 4 * (wanted % buckets), 4), "little")
        chain_at = bucket_at + 4 * buckets
        for at in range(index, index + 256) if index >= first else ():
            value = int.from_bytes(memory.read(chain_at + 4 * (at - first), 4), "little")
            if value | 1 == wanted | 1:
                name_at, _, _, _, address, size = struct.unpack("<IBBHQQ", memory.read(symbols + 24 * at, 24))
                if memory.upto(strings + name_at, len(name) + 1) == name + b"\0":
                    return self.bias + address, size
            if value & 1:
                break
        return None


def _gnu_hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = value * 33 + byte & 0xFFFFFFFF
    return value


def _executable(directory: str, memory: elf.Bytes) -> _Image:
    """By the auxiliary vector: right whatever became of the file, and in every mount namespace."""
    with open(f"{directory}/auxv", "rb") as file:
        raw = file.read(4096)
    vector = dict(struct.iter_unpack("<QQ", raw[: len(raw) & ~15]))
    if not vector.get(_AT_PHDR) or not vector.get(_AT_PHNUM):
        raise elf.Unreadable("not a 64-bit process")
    return _Image(memory, vector[_AT_PHDR], vector[_AT_PHNUM], None)


# --- Go ---

_BUILD_INFO = b"\xff Go buildinf:"
#: A function of runtime/cgo; among the function names of every program that has C code in it.
_CGO_NAME = re.compile(rb"\0crosscall2\0")
#: The head of runtime.systemstack, which is written in assembly: with g in AX it loads BX = g.m and compares g with m.gsignal,
#: with m.g0 (the first member) and with m.curg. So the binary itself says where g.m and m.curg are, stripped or not.
_SYSTEMSTACK = re.compile(
    rb"\x48\x8b\x58(.)"  # MOVQ g_m(AX), BX
    rb"\x48\x3b\x43."  # CMPQ AX, m_gsignal(BX)
    rb"(?:\x74.|\x0f\x84.{4})"  # JEQ noswitch
    rb"\x48\x8b\x13"  # MOVQ m_g0(BX), DX
    rb"\x48\x39\xd0"  # CMPQ AX, DX
    rb"(?:\x74.|\x0f\x84.{4})"  # JEQ noswitch
    rb"\x48\x3b\x83(.{4})"  # CMPQ AX, m_curg(BX)
    rb"(?:\x75|\x0f\x85)",  # JNE bad
    re.DOTALL,
)


def _go(file: elf.Bytes, memory: elf.Bytes, image: _Image) -> Layout | None:
    """None if this is no Go program."""
    sections = {each.name: each for each in elf.sections(file)}
    info = sections.get(b".go.buildinfo")
    if not info:
        return None
    text = _go_version(memory, image.bias + info.address)
    numbers = re.match(r"(?:devel )?(go1\.(\d+)[\w.-]*)", text)
    if not numbers:
        return Layout(Kind.NONE, detail="Go of an unknown version")
    version = numbers[1]
    if int(numbers[2]) < 17 or "noregabi" in text:
        return Layout(Kind.NONE, detail=f"{version}, built without the register ABI that Go 1.17 brought")
    names = sections.get(b".gopclntab")
    if not image.segment(_PT_INTERP) and names and not file.search(_CGO_NAME, names.offset, names.size):
        return Layout(Kind.GO, detail=f"{version}, goroutine in R14")
    tls = image.segment(_PT_TLS)
    if not tls or tls.size != 8:
        # Only as the one thread-local variable of the executable is g known to lie right below the FS base.
        return Layout(Kind.NONE, detail=f"{version}, linked with C code that has thread-local variables of its own")
    section = sections.get(b".text")
    code = file.search(_SYSTEMSTACK, section.offset, section.size) if section else None
    if not code:
        return Layout(Kind.NONE, detail=f"{version}, which may run C code, and whose runtime.systemstack has an unknown form")
    slot, member = code[1][0], int.from_bytes(code[2], "little")
    return Layout(Kind.GO_CGO, slot, member, f"{version}, which may run C code: g.m at +{slot}, m.curg at +{member}")


def _go_version(memory: elf.Bytes, address: int) -> str:
    """From the build information that the linker put in (Go's debug/buildinfo): "go1.22.3"."""
    head = memory.read(address, 33)
    if not head.startswith(_BUILD_INFO):
        raise elf.Unreadable("Go without its build information")
    if head[15] & 2:  # since Go 1.18 the text follows, its length before it; until then there was the address of a string
        at, size = address + 33, head[32]
    else:
        string = int.from_bytes(head[16:24], "little")
        at, size = memory.word(string), memory.word(string + 8)
    return memory.upto(at, min(size, 127)).decode("ascii", "replace")


# --- CPython ---

#: `specific_1stblock` of glibc's struct pthread; an element is a sequence number and the value.
_SPECIFIC, _SPECIFIC_STEP = 0x310, 16
#: What is looked for stands in the first few KiB of _PyRuntime; behind it come the objects made at compile time.
_RUNTIME_BYTES = 64 << 10
_STATE_BYTES = 1024
_MAX_STATES = 512
#: Py_tss_t that is initialised: 1, and the key; the first block has 32 of them.
_TSS_KEY = re.compile(rb"(?=\x01\0\0\0([\0-\x1f])\0\0\0)")
_LIBRARY = re.compile(rb"^([0-9a-f]+)-[0-9a-f]+ r[-w][-x][ps] 0+ \S+ \d+ +/.*/libpython3[^/\n]*\.so[^/\n]*$", re.MULTILINE)


def _cpython(directory: str, memory: elf.Bytes, executable: _Image) -> Layout:
    for image in _images(directory, memory, executable):
        runtime = image.symbol(b"_PyRuntime")
        context_type = image.symbol(b"PyContext_Type")
        if runtime and context_type:
            return _context_place(memory, runtime, context_type[0], _python_version(memory, image))
    return Layout(Kind.NONE, detail="no runtime whose tasks are known")


def _images(directory: str, memory: elf.Bytes, executable: _Image) -> Iterator[_Image]:
    """The executable, then each library that is named as CPython's."""
    yield executable
    with open(f"{directory}/maps", "rb") as file:
        maps = file.read(_MAPS_BYTES)
    for line in _LIBRARY.finditer(maps):
        base = int(line[1], 16)
        head = memory.upto(base, 64)
        if len(head) == 64 and head[:6] == b"\x7fELF\x02\x01":
            headers_at, count = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<H", head, 56)[0]
            yield _Image(memory, base + headers_at, count, base)


def _python_version(memory: elf.Bytes, image: _Image) -> str:
    found = image.symbol(b"Py_Version")
    if not found:
        return "CPython before 3.11"
    major, minor = memory.read(found[0], 4)[:1:-1]
    return f"CPython {major}.{minor}"


def _context_place(memory: elf.Bytes, runtime: tuple[int, int], context_type: int, version: str) -> Layout:
    """Where a thread keeps its state, and the state its context."""
    raw = memory.read(runtime[0], min(runtime[1], _RUNTIME_BYTES) & ~7)
    keys = {found[1][0] for found in _TSS_KEY.finditer(raw) if found.start() % 4 == 0}
    # The main thread is named by its struct pthread, which is where its FS base points.
    threads = [word for word in set(array.array("Q", raw)) if word and word % 64 == 0 and _is_thread(memory, word)]
    slots: dict[int, dict[int, bytes]] = {}
    for thread in threads:
        for slot in (_SPECIFIC + _SPECIFIC_STEP * key + 8 for key in keys):
            if slot not in slots and (states := _states(memory, thread, slot)):
                slots[slot] = states
    if not slots:
        return Layout(Kind.NONE, detail=f"{version}: its thread states were not found")
    # A library may keep thread states too (pybind11 does), of some threads, under a key that is higher: the interpreter took its
    # own before there was any state to be kept.
    for slot in sorted(slots, key=lambda each: (-len(slots[each]), each)):
        members = _context_members(memory, slots[slot], context_type)
        if len(members) == 1:
            detail = f"{version}, context at +{members[0]} of the thread state, slot {slot:#x}"
            return Layout(Kind.CPYTHON, slot, members[0], detail)
    return Layout(Kind.NONE, detail=f"{version}: no task context in use")


def _is_thread(memory: elf.Bytes, address: int) -> bool:
    """glibc's struct pthread names itself twice: `tcb` and `self`."""
    raw = memory.upto(address, 24)
    return len(raw) == 24 and raw[:8] == raw[16:] == address.to_bytes(8, "little")


def _states(memory: elf.Bytes, thread: int, slot: int) -> dict[int, bytes]:
    """By address, each state in the list of this thread's that names a thread which has it in its slot."""
    first = memory.word(thread + slot)
    raw = memory.upto(first, 512)
    # PyThreadState begins with `prev`, `next` and `interp`; its place for the thread is found by this thread's.
    at = next((at for at in range(24, len(raw) - 7, 8) if raw[at : at + 8] == thread.to_bytes(8, "little")), None)
    if at is None:
        return {}
    found: dict[int, bytes] = {}
    seen: set[int] = set()
    waiting = [first]
    while waiting and len(seen) < _MAX_STATES:
        state = waiting.pop()
        if not state or state in seen:
            continue
        seen.add(state)
        raw = memory.upto(state, _STATE_BYTES)
        owner = int.from_bytes(raw[at : at + 8], "little")
        if owner and _is_thread(memory, owner) and memory.word(owner + slot) == state:
            found[state] = raw
            waiting += struct.unpack_from("<QQ", raw)
    return found


def _context_members(memory: elf.Bytes, states: dict[int, bytes], context_type: int) -> list[int]:
    """Offsets at which the states have `context`, `context_ver` and `id` one after the other, as they do from CPython 3.7 on.

    The context may be missing in some; the version counts from 1, and the number, from 1 too, is each state's own.
    """
    places = sorted(states)
    # Behind one state often lies the next, whose context must not be taken for that of the first.
    size = min([_STATE_BYTES, *(after - before for before, after in pairwise(places)), *map(len, states.values())])
    members = []
    for member in range(24, size - 23, 8):
        rows = [struct.unpack_from("<QQQ", raw, member) for raw in states.values()]
        counted = all(0 < version < 1 << 48 and 0 < number < 1 << 32 for _, version, number in rows)
        if counted and len({number for _, _, number in rows}) == len(rows):
            contexts = (context for context, _, _ in rows if context)
            if any(memory.word(context + 8) == context_type for context in contexts):
                members.append(member)
    return members

# SPDX-License-Identifier: Apache-2.0
"""What is made of processes that are strange or mean harm: an answer always, after bounded work, and never a place that was not checked."""

from __future__ import annotations

import contextvars
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe import runtimes
from bucketprobe.runtimes import Kind, Layout

TGID = 4711
BUILD_INFO, TEXT, NAMES, HEADERS, FUNCTIONS = 0x1000, 0x3000, 0x4000, 0x5000, 0x100000
PT_DYNAMIC, PT_INTERP, PT_PHDR, PT_TLS = 2, 3, 6, 7
#: How runtime.systemstack begins, with g.m at +48 and m.curg at +192.
SYSTEMSTACK = bytes.fromhex("488b5830 483b4350 745b 488b13 4839d0 7453 483b83c0000000 7552")


class Process:
    """A folder like /proc/PID. `memory` and `executable` are files, so that any address may be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / str(TGID)
        self.path.mkdir()
        for name in ("mem", "exe", "auxv", "maps"):
            (self.path / name).touch()

    def put(self, name: str, address: int, data: bytes) -> None:
        with open(self.path / name, "r+b") as file:
            file.seek(address)
            file.write(data)

    def layout(self) -> Layout:
        return runtimes.layout(TGID, proc=str(self.folder))


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


def header(machine: int = 62, ident: bytes = b"\x7fELF\x02\x01\x01", sections: int = 6) -> bytes:
    head = ident.ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, HEADERS, 0, 64, 56, 1, 64, sections, 1)
    assert len(head) == 64
    return head


Segments = tuple[tuple[int, int], ...]


def go(process: Process, version: bytes = b"go1.22.3", names: bytes = b"\0main.main\0", segments: Segments = ()) -> Process:
    """A Go program: sections with their names, build information in memory, table of functions and code in the file."""
    labels = [b"", b".shstrtab", b".go.buildinfo", b".gopclntab", b".text", b".bss"]
    places = [(0, 0), (NAMES, 256), (BUILD_INFO, 256), (FUNCTIONS, len(names)), (TEXT, 256), (0, 0)]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", b"\0".join(labels).index(label), 1, 0, at, at, size, 0, 0, 1, 0)
        for label, (at, size) in zip(labels, places, strict=True)
    )
    process.put("exe", 0, header())
    process.put("exe", NAMES, b"\0".join(labels) + b"\0")
    process.put("exe", HEADERS, table)
    process.put("exe", FUNCTIONS, names)
    process.put("exe", TEXT, b"\x90" * 77 + SYSTEMSTACK + b"\xcc" * 77)
    process.put("mem", BUILD_INFO, b"\xff Go buildinf:\x08\x02".ljust(32, b"\0") + bytes([len(version)]) + version + bytes(64))
    all_segments = ((PT_PHDR, 64), *segments)
    process.put("mem", 64, b"".join(struct.pack("<IIQQQQQQ", kind, 4, 0, 64, 64, size, size, 8) for kind, size in all_segments))
    process.put("auxv", 0, struct.pack("<6Q", 3, 64, 5, len(all_segments), 0, 0))
    return process


def test_pure_go(process: Process) -> None:
    assert go(process).layout() == Layout(Kind.GO, detail="go1.22.3, goroutine in R14")


@pytest.mark.parametrize("names", [b"\0main.main\0crosscall2\0", b"\0" * (1 << 20) + b"crosscall2\0"], ids=["near", "across pieces"])
def test_go_with_c(process: Process, names: bytes) -> None:
    found = go(process, names=names, segments=((PT_TLS, 8),)).layout()
    assert (found.kind, found.slot, found.member) == (Kind.GO_CGO, 48, 192)


def test_go_linked_dynamically_may_run_c(process: Process) -> None:
    assert go(process, segments=((PT_TLS, 8), (PT_INTERP, 28))).layout().kind == Kind.GO_CGO


def test_go_whose_g_lies_elsewhere_in_the_thread_is_unknown(process: Process) -> None:
    assert go(process, names=b"\0crosscall2\0", segments=((PT_TLS, 0x78),)).layout().kind == Kind.NONE


def test_go_with_c_and_other_code_is_unknown(process: Process) -> None:
    go(process, segments=((PT_TLS, 8), (PT_INTERP, 28))).put("exe", TEXT, bytes(256))
    assert process.layout().kind == Kind.NONE


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        (b"go1.17", Kind.GO),
        (b"go1.16.15", Kind.NONE),
        (b"go1.17 X:noregabi", Kind.NONE),
        (b"devel go1.28-0123456 Mon Nov 23", Kind.GO),
        (b"go2", Kind.NONE),
        (b"", Kind.NONE),
        (b"\xff\xfe", Kind.NONE),
    ],
)
def test_the_register_is_trusted_from_go_1_17_on(process: Process, version: bytes, kind: Kind) -> None:
    assert go(process, version=version).layout().kind == kind


def test_the_build_information_of_go_1_17_points_to_the_version(process: Process) -> None:
    go(process).put("mem", BUILD_INFO, b"\xff Go buildinf:\x08\x00" + struct.pack("<QQ", 0x8000, 0))
    process.put("mem", 0x8000, struct.pack("<QQ", 0x9000, 8))
    process.put("mem", 0x9000, b"go1.17.9" + bytes(64))
    assert process.layout() == Layout(Kind.GO, detail="go1.17.9, goroutine in R14")


def test_build_information_that_is_not_in_memory_is_not_believed(process: Process) -> None:
    go(process).put("mem", BUILD_INFO, bytes(64))
    assert process.layout().kind == Kind.NONE


def test_this_process_says_where_its_context_is() -> None:
    context = contextvars.copy_context()
    found = context.run(runtimes.layout, os.getpid())
    assert found.kind == Kind.CPYTHON
    assert f"slot {found.slot:#x}" in found.detail


def test_a_process_that_does_not_exist(tmp_path: Path) -> None:
    assert runtimes.layout(TGID, proc=str(tmp_path)).kind == Kind.NONE


def test_a_process_of_which_all_is_empty(process: Process) -> None:
    assert process.layout() == Layout(Kind.NONE, detail="not a 64-bit process")


@pytest.mark.parametrize(
    "head",
    [
        header()[:40],
        header(machine=183),
        header(ident=b"\x7fELF\x01\x01\x01"),  # 32 bit
        header(ident=b"\x7fELF\x02\x02\x01"),  # big-endian
        b"#!/bin/sh\n".ljust(64),
    ],
    ids=["truncated", "other machine", "32 bit", "big-endian", "script"],
)
def test_an_executable_of_another_kind(process: Process, head: bytes) -> None:
    go(process)
    (process.path / "exe").write_bytes(head)
    assert process.layout() == Layout(Kind.NONE, detail="not a 64-bit x86 program")


@contextmanager
def reads_counted() -> Iterator[list[int]]:
    """[reads, bytes] of what is read from memory and executable."""
    count = [0, 0]
    pread = os.pread

    def counting(fd: int, size: int, address: int) -> bytes:
        data = pread(fd, size, address)
        count[0] += 1
        count[1] += len(data)
        return data

    with mock.patch.object(os, "pread", counting):
        yield count


def test_sizes_that_lead_through_all_of_a_huge_file(process: Process) -> None:
    go(process, segments=((PT_TLS, 8), (PT_INTERP, 28)))
    huge = struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, 1 << 30, (1 << 64) - 1, 0, 0, 1, 0)
    raw = (process.path / "exe").read_bytes()[HEADERS:FUNCTIONS]
    for index in (3, 4):
        process.put("exe", HEADERS + 64 * index, raw[64 * index : 64 * index + 4] + huge[4:])
    os.truncate(process.path / "exe", 1 << 40)
    with reads_counted() as count:
        assert process.layout() == Layout(Kind.NONE, detail="too large to be examined")
    assert count[0] < 10_000
    assert count[1] < 128 << 20


def python_image(process: Process, runtime: bytes, size: int, chain: bytes, buckets: int = 1) -> None:
    """A program that exports _PyRuntime and PyContext_Type, by a hash table with the given chain."""
    process.put("exe", 0, header(sections=0))
    base, dynamic, table, symbols, strings, at = 0x10000, 0x10400, 0x11000, 0x12000, 0x13000, 0x20000
    segments = ((PT_PHDR, base, 0), (PT_DYNAMIC, dynamic, 64))
    process.put("mem", base, b"".join(struct.pack("<IIQQQQQQ", kind, 4, 0, place, place, 0, size, 8) for kind, place, size in segments))
    process.put("auxv", 0, struct.pack("<6Q", 3, base, 5, 2, 0, 0))
    process.put("mem", dynamic, struct.pack("<8Q", 0x6FFFFEF5, table, 6, symbols, 5, strings, 0, 0))
    process.put("mem", table, struct.pack("<4I", buckets, 1, 0, 0) + struct.pack("<I", 1) + chain)
    process.put("mem", symbols + 24, struct.pack("<IBBHQQ", 1, 0, 0, 0, at, size) + struct.pack("<IBBHQQ", 12, 0, 0, 0, at - 8, 8))
    process.put("mem", strings, b"\0_PyRuntime\0PyContext_Type\0")
    process.put("mem", at, runtime)


def gnu_hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = (value * 33 + byte) % (1 << 32)
    return value


CHAIN = struct.pack("<II", gnu_hash(b"_PyRuntime") & ~1, gnu_hash(b"PyContext_Type") | 1)


def synthetic_python(process: Process, number: int = 1, context_type: int = 0x20000 - 8) -> Process:
    """One thread, key 3, its state with the context at +200."""
    thread, state, context = 0x40000, 0x50000, 0x60000
    python_image(process, struct.pack("<QII", thread, 1, 3) + bytes(240), 256, CHAIN)
    process.put("mem", thread, struct.pack("<QQQ", thread, 0, thread))
    process.put("mem", thread + 0x310 + 3 * 16 + 8, struct.pack("<Q", state))
    body = bytearray(2048)
    struct.pack_into("<Q", body, 152, thread)
    struct.pack_into("<QQQ", body, 200, context, 7, number)
    process.put("mem", state, bytes(body))
    process.put("mem", context, struct.pack("<QQ", 1, context_type) + bytes(64))
    return process


def test_a_python_by_its_memory_alone(process: Process) -> None:
    found = synthetic_python(process).layout()
    assert found == Layout(Kind.CPYTHON, 0x348, 200, "CPython before 3.11, context at +200 of the thread state, slot 0x348")


def test_a_pointer_to_another_object_is_no_context(process: Process) -> None:
    assert "no task context" in synthetic_python(process, context_type=0x1234).layout().detail


def test_a_state_without_its_number_is_none(process: Process) -> None:
    assert synthetic_python(process, number=0).layout().kind == Kind.NONE


def test_a_ring_of_states_without_end(process: Process) -> None:
    """Each state is a thread's own and points to the next, for as long as memory lasts."""
    thread, step = 0x100000, 0x2000
    count = 5000
    python_image(process, struct.pack("<QII", thread, 1, 0) + bytes(240), 256, CHAIN)
    memory = bytearray(step * (count + 1))
    for index in range(count):
        at = thread + step * index
        state = at + 0x800
        struct.pack_into("<QQQ", memory, step * index, at, 0, at)
        struct.pack_into("<Q", memory, step * index + 0x318, state)
        struct.pack_into("<QQQQ", memory, step * index + 0x800, state + step, state + 2 * step, 0, at)
    process.put("mem", thread, bytes(memory))
    with reads_counted() as counted:
        assert process.layout().kind == Kind.NONE
    assert counted[0] < 5000


def test_memory_in_which_everything_looks_like_a_thread(process: Process) -> None:
    """Thousands of words that name threads, each with a state under each of the keys."""
    first, count = 0x100000, 8000
    keys = b"".join(struct.pack("<II", 1, key) for key in range(32))
    threads = [first + 0x1000 * index for index in range(count)]
    runtime = keys + struct.pack(f"<{count}Q", *threads)
    python_image(process, runtime, len(runtime), CHAIN)
    memory = bytearray(0x1000 * count)
    for index, thread in enumerate(threads):
        struct.pack_into("<QQQ", memory, 0x1000 * index, thread, 0, thread)
        for key in range(32):
            struct.pack_into("<Q", memory, 0x1000 * index + 0x318 + 16 * key, thread + 0x800)
    process.put("mem", first, bytes(memory))
    with reads_counted() as counted:
        assert process.layout().kind == Kind.NONE
    assert counted[0] < 20_000


@pytest.mark.parametrize("buckets", [0, (1 << 32) - 1])
@pytest.mark.parametrize("size", [0, 7, (1 << 64) - 1])
@pytest.mark.parametrize("chain", [bytes(65536), CHAIN[:4] * 4096, b"", CHAIN], ids=["zeros", "no end", "none", "right"])
def test_symbol_tables_with_crafted_sizes(process: Process, size: int, buckets: int, chain: bytes) -> None:
    python_image(process, bytes(4096), size, chain, buckets)
    with reads_counted() as counted:
        assert process.layout().kind == Kind.NONE
    assert counted[0] < 5000


def test_a_map_with_libraries_without_end(process: Process) -> None:
    process.put("exe", 0, header(sections=0))
    go_memory = struct.pack("<IIQQQQQQ", 6, 4, 0, 64, 64, 0, 0, 8)
    process.put("mem", 64, go_memory)
    process.put("auxv", 0, struct.pack("<6Q", 3, 64, 5, 1, 0, 0))
    line = b"7f0000000000-7f0000001000 r--p 00000000 fe:00 26933                      /x/libpython3" + b"/libpython3" * 200 + b".so"
    process.put("maps", 0, b"\n".join([line] * 20_000))
    with reads_counted() as counted:
        assert process.layout().kind == Kind.NONE
    assert counted[0] < 20_000


@given(exe=st.binary(max_size=4096), mem=st.binary(max_size=4096), auxv=st.binary(max_size=256), maps=st.binary(max_size=256))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, exe: bytes, mem: bytes, auxv: bytes, maps: bytes) -> None:
    process = Process(tmp_path_factory.mktemp("proc"))
    for name, data in (("exe", exe), ("mem", mem), ("auxv", auxv), ("maps", maps)):
        process.put(name, 0, data)
    assert process.layout().kind == Kind.NONE


def disturbed(source: random.Random, rate: float) -> mock._patch[object]:
    """Reads that now and then give other bytes, fewer, or none: memory that changes under the hand, or was made to mislead."""
    pread = os.pread

    def fake(fd: int, size: int, address: int) -> bytes:
        data = pread(fd, size, address)
        if not data or source.random() >= rate:
            return data
        match source.randrange(5):
            case 0:
                raise OSError(5, "Input/output error")
            case 1:
                return data[: source.randrange(len(data))]
            case 2:
                return source.randbytes(min(len(data), 65536))
            case 3:
                return bytes([source.choice((0, 0xFF))]) * len(data)
        changed = bytearray(data)
        at = source.randrange(len(data))
        changed[at : at + 8] = source.choice((bytes(8), b"\xff" * 8, source.randbytes(8)))[: len(data) - at]
        return bytes(changed)

    return mock.patch.object(os, "pread", fake)


@given(source=st.randoms(use_true_random=False), rate=st.sampled_from([0.02, 0.1, 0.5]))
def test_a_disturbed_go_program(tmp_path_factory: pytest.TempPathFactory, source: random.Random, rate: float) -> None:
    process = go(Process(tmp_path_factory.mktemp("proc")), names=b"\0crosscall2\0", segments=((PT_TLS, 8), (PT_INTERP, 28)))
    with disturbed(source, rate):
        assert process.layout().kind in (Kind.NONE, Kind.GO, Kind.GO_CGO)


@given(source=st.randoms(use_true_random=False), rate=st.sampled_from([0.02, 0.1, 0.5]))
def test_a_disturbed_python(source: random.Random, rate: float) -> None:
    """This very process; what is found in spite of the noise is nothing that noise made."""
    true = contextvars.copy_context().run(runtimes.layout, os.getpid())
    with disturbed(source, rate):
        found = contextvars.copy_context().run(runtimes.layout, os.getpid())
    assert found.kind in (Kind.NONE, Kind.CPYTHON)
    if found.kind == Kind.CPYTHON:
        assert (found.slot, found.member) == (true.slot, true.member)

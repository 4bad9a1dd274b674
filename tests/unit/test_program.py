# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bucketprobe import abi, bpf, btf, program
from bucketprobe.errors import EnvironmentLack
from bucketprobe.providers import Site

MAPS = {spec.name: 40 + i for i, spec in enumerate(abi.MAPS)}
OFFSETS = {name: 7000 + i for i, name in enumerate(abi.OFFSETS)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the probes are, compiled once for all tests here."""
    folder = tmp_path_factory.mktemp("cache")
    program.compiled(str(folder), lambda text: None)
    return folder


@pytest.fixture(scope="module")
def programs(cache: Path) -> dict[str, bytes]:
    return program.compiled(str(cache), pytest.fail)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SYSTEM_PYTHON", "/nonexistent/python3")


def cached_file(folder: Path, kind: str) -> Path:
    [path] = folder.glob(f"{kind}-*.json")
    return path


def instructions(code: bytes) -> Iterator[tuple[int, int, int]]:
    """Opcode, source register and immediate of each instruction; a 64-bit constant is one."""
    at = 0
    while at < len(code):
        opcode, registers, _, immediate = struct.unpack_from("<BBhi", code, at)
        yield opcode, registers >> 4, immediate
        at += 16 if opcode == 0x18 else 8


# --- The text ----------------------------------------------------------------------------------------------------


def test_the_text_does_not_depend_on_the_hash_seed() -> None:
    """It is the key of the cache, and every start would compile anew."""
    code = "from bucketprobe import program; print(program.compose(), end='')"
    texts = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout.decode()
        for seed in ("0", "1", "2")
    }
    assert texts == {program.compose()}


def test_the_text_has_everything_once_and_includes_nothing() -> None:
    text = program.compose()
    assert '#include "' not in text
    for guard in ("ABI", "HTTP1", "PROBE"):
        assert text.count(f"#define BUCKETPROBE_{guard}_H") == 1
    for name in ("sys_enter", "sock_state", "on_open", "process_fork", *program.UPROBES):
        assert text.count(f"int {name}(") == 1
    assert all(f"#define {name} " in text for name in abi.OFFSETS)


# --- The cache ---------------------------------------------------------------------------------------------------


def test_every_program_that_is_attached_or_called_is_compiled(programs: dict[str, bytes]) -> None:
    attached = {*program.REQUIRED_TRACEPOINTS.values(), *program.OPTIONAL_TRACEPOINTS.values()}
    attached |= {name for _, name in program.STAND_INS.values()}
    # A sync or a change of a file is on_file's; the descriptor decides, and nothing else than a file takes them.
    others = set(abi.Handler) - {abi.Handler.NONE, abi.Handler.SYNC, abi.Handler.CHANGE}
    handlers = {f"on_{handler.name.lower()}" for handler in others}
    sizes = {f"size_{spec.value.split()[-1]}" for spec in abi.MAPS if isinstance(spec.value, str)}
    assert set(programs) == attached | handlers | sizes | set(program.UPROBES)


def test_a_second_start_needs_no_compiler(cache: Path, programs: dict[str, bytes], log: list[str], no_compiler: None) -> None:
    assert program.compiled(str(cache), log.append) == programs
    assert log == []


def test_a_text_that_changed_is_compiled(cache: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = program.compose()
    monkeypatch.setattr(program, "compose", lambda *parts: text + "\n")
    with pytest.raises(EnvironmentLack, match="cannot be run"):
        program.compiled(str(cache), lambda line: None)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'{"programs": []}', b'{"programs": {}}', b'{"programs": {"a": 1}}'])
def test_a_cache_that_holds_something_else_is_as_none(
    tmp_path: Path, cache: Path, log: list[str], no_compiler: None, content: bytes
) -> None:
    digest = hashlib.sha256(content).hexdigest().encode()
    (tmp_path / cached_file(cache, "probes").name).write_bytes(digest + b"\n" + content)
    with pytest.raises(EnvironmentLack, match="cannot be run"):
        program.compiled(str(tmp_path), log.append)
    assert log == ["compiling the probes (the first start only)"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"\xff\xfe",
        lambda whole: whole[:1000],
        lambda whole: whole[:-2],
        lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        lambda whole: whole.partition(b"\n")[2],
    ],
)
def test_a_cache_that_is_damaged_is_as_none(tmp_path: Path, cache: Path, no_compiler: None, damage: Callable[[bytes], bytes]) -> None:
    """Wrong bytecode would be refused by the kernel at every start, and nothing would mend it."""
    whole = cached_file(cache, "probes")
    (tmp_path / whole.name).write_bytes(damage(whole.read_bytes()))
    with pytest.raises(EnvironmentLack, match="cannot be run"):
        program.compiled(str(tmp_path), lambda line: None)


def test_a_damaged_cache_is_mended(tmp_path: Path, cache: Path, programs: dict[str, bytes], log: list[str]) -> None:
    whole = cached_file(cache, "probes")
    path = tmp_path / whole.name
    path.write_bytes(whole.read_bytes()[:1000])
    assert program.compiled(str(tmp_path), log.append) == programs
    assert program.compiled(str(tmp_path), pytest.fail) == programs
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_nobody_else_may_write_the_cache(cache: Path) -> None:
    """What is in it is loaded into the kernel."""
    assert not stat.S_IMODE(cached_file(cache, "probes").stat().st_mode) & 0o022


def test_a_cache_that_cannot_be_written_is_only_said(tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(btf, "offsets", lambda wanted: dict(OFFSETS))
    assert program.kernel_offsets(str(file / "cache"), log.append) == OFFSETS
    [line] = log
    assert f"{file}/cache cannot be written (Not a directory)" in line
    assert "cache_dir" in line


def test_offsets_are_read_once_per_kernel(tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def offsets(wanted: object) -> dict[str, int]:
        calls.append(wanted)
        return dict(OFFSETS)

    monkeypatch.setattr(btf, "offsets", offsets)
    for _ in range(2):
        assert program.kernel_offsets(str(tmp_path), log.append) == OFFSETS
    assert len(calls) == 1
    cached_file(tmp_path, "offsets").write_text('["x"]')
    assert program.kernel_offsets(str(tmp_path), log.append) == OFFSETS
    this = os.uname()
    monkeypatch.setattr(os, "uname", lambda: (*this[:2], "9.9.9", *this[3:]))
    program.kernel_offsets(str(tmp_path), log.append)
    assert len(calls) == 3
    assert log == []


# --- What is missing ---------------------------------------------------------------------------------------------


def python_that(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(program, "SYSTEM_PYTHON", str(path))


def refusal(tmp_path: Path) -> str:
    with pytest.raises(EnvironmentLack) as error:
        program.compiled(str(tmp_path / "cache"), lambda line: None)
    return str(error.value)


def test_without_bcc_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that(tmp_path, "echo \"ModuleNotFoundError: No module named 'bcc'\" >&2; exit 1", monkeypatch)
    text = refusal(tmp_path)
    assert "apt-get install python3-bpfcc" in text
    assert "\n" not in text


def test_this_python_has_no_bcc_and_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence that is looked for is Python's own."""
    monkeypatch.setattr(program, "SYSTEM_PYTHON", sys.executable)
    assert "apt-get install python3-bpfcc" in refusal(tmp_path)


def test_without_the_systems_python_the_package_is_named(tmp_path: Path, no_compiler: None) -> None:
    text = refusal(tmp_path)
    assert "/nonexistent/python3 cannot be run (No such file or directory)" in text
    assert "apt-get install python3-bpfcc" in text


def test_a_compiler_that_fails_is_quoted_by_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that(tmp_path, "printf 'Traceback\\n  many lines\\nError: last words\\n' >&2; exit 1", monkeypatch)
    text = refusal(tmp_path)
    assert "(Error: last words)" in text
    assert "python3-bpfcc" in text
    assert "many lines" not in text


@pytest.mark.parametrize("answer", ["", "junk", "[]", '{"programs": {"a": "?"}}'])
def test_an_answer_of_the_compiler_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    python_that(tmp_path, f"printf %s '{answer}'", monkeypatch)
    assert "python3-bpfcc" in refusal(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(program, "COMPILE_SECONDS", 0.2)
    assert "took over 0.2 s" in refusal(tmp_path)


def test_a_failed_start_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that(tmp_path, "exit 1", monkeypatch)
    refusal(tmp_path)
    assert not (tmp_path / "cache").exists()


# --- Relocation --------------------------------------------------------------------------------------------------


def test_every_mark_is_replaced(programs: dict[str, bytes]) -> None:
    offsets_met: set[int] = set()
    maps_met: set[int] = set()
    for name, code in programs.items():
        ready = program.relocated(code, MAPS, OFFSETS)
        assert len(ready) == len(code)
        for before, after in zip(instructions(code), instructions(ready), strict=True):
            opcode, source, immediate = after
            assert immediate & 0xFFFF0000 != 0x5EED0000, name
            if opcode == 0x18 and source == 1:
                assert immediate in MAPS.values(), name
                maps_met.add(immediate)
            elif before != after:
                offsets_met.add(immediate)
    assert offsets_met == set(OFFSETS.values())
    assert maps_met == set(MAPS.values())


def test_nothing_but_marks_is_replaced() -> None:
    def instruction(opcode: int, registers: int, immediate: int) -> bytes:
        return struct.pack("<BBhi", opcode, registers, 0, immediate)

    marks = abi.MAP_BASE + 2
    code = b"".join(
        (
            instruction(0xB7, 1, 0x5EED0001),
            instruction(0xB7, 1, 0x5EED0000 + len(OFFSETS)),
            instruction(0xB4, 1, 0x5EED0001),
            instruction(0x18, 0x11, marks) + instruction(0, 0, 0),
            instruction(0x18, 0x01, marks) + instruction(0xB7, 0, 0x5EED0001),  # the upper half of a constant is no instruction
            instruction(0x95, 0, 0),
        )
    )
    expected = b"".join(
        (
            instruction(0xB7, 1, 7001),
            instruction(0xB7, 1, 0x5EED0000 + len(OFFSETS)),
            instruction(0xB4, 1, 0x5EED0001),
            instruction(0x18, 0x11, 42) + instruction(0, 0, 0),
            instruction(0x18, 0x01, marks) + instruction(0xB7, 0, 0x5EED0001),
            instruction(0x95, 0, 0),
        )
    )
    assert program.relocated(code, MAPS, OFFSETS) == expected


def test_sizes_come_from_the_compiled_structures(programs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, tuple[int, ...]] = {}

    def create(kind: int, key: int, value: int, entries: int, flags: int, name: str) -> int:
        made[name] = (kind, key, value, entries, flags)
        return len(made)

    monkeypatch.setattr(program.bpf, "map_create", create)
    assert program.create_maps(programs, {"events": 65_536}) == {spec.name: i + 1 for i, spec in enumerate(abi.MAPS)}
    assert made["events"] == (abi.RINGBUF, 0, 0, 65_536, 0)
    assert made["work"] == (abi.HASH, 16, 128, 16_384, 0)  # struct work: twelve numbers of 64 bits, eight of 32
    assert made["fds"][:3] == (abi.HASH, 8, ctypes.sizeof(abi.FdEntry))
    assert made["layouts"][:3] == (abi.HASH, 4, ctypes.sizeof(abi.LayoutEntry))
    assert made["hashing"][:3] == (abi.HASH, 4, ctypes.sizeof(abi.HashingEntry))
    assert made["hashes"][0] == abi.LRU_HASH, "a digest that is never finished leaves by itself"
    assert made["conns"][2] % 8 == 0


# --- The kernel --------------------------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.kernel
def test_loading_attaches_all_and_closing_leaves_nothing(cache: Path, programs: dict[str, bytes]) -> None:
    before = open_descriptors()
    offsets = program.kernel_offsets(str(cache), pytest.fail)
    loaded = program.load(programs, offsets, {"events": 32_768})
    assert set(loaded.links) | set(loaded.missing) == {*program.REQUIRED_TRACEPOINTS, *program.OPTIONAL_TRACEPOINTS}
    assert set(loaded.links) >= set(program.REQUIRED_TRACEPOINTS)
    assert set(loaded.maps) == set(MAPS)
    assert set(loaded.uprobes) == set(program.UPROBES)
    assert len(loaded.programs) == len([name for name in programs if not name.startswith("size_")]) - len(program.UPROBES)
    loaded.detach()
    assert loaded.links == {}
    loaded.close()
    loaded.close()
    assert open_descriptors() == before


@pytest.mark.kernel
@pytest.mark.parametrize("broken", ["sys_enter", "on_frame"])
def test_a_refusal_is_one_sentence_and_leaves_nothing(cache: Path, programs: dict[str, bytes], broken: str) -> None:
    before = open_descriptors()
    offsets = program.kernel_offsets(str(cache), pytest.fail)
    only_exit = struct.pack("<BBhi", 0x95, 0, 0, 0)
    with pytest.raises(EnvironmentLack, match="The kernel refused the probes"):
        program.load({**programs, broken: only_exit}, offsets, {})
    assert open_descriptors() == before


@pytest.mark.kernel
def test_a_tracepoint_that_may_be_missing_is_only_noted(cache: Path, programs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "OPTIONAL_TRACEPOINTS", {"no_such_tracepoint": "sock_ready"})
    loaded = program.load(programs, program.kernel_offsets(str(cache), pytest.fail), {})
    assert loaded.missing == ["no_such_tracepoint"]
    loaded.close()


@pytest.mark.kernel
def test_a_tracepoint_that_must_be_there_is_named(cache: Path, programs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    offsets = program.kernel_offsets(str(cache), pytest.fail)
    monkeypatch.setattr(program, "REQUIRED_TRACEPOINTS", {"no_such_tracepoint": "sock_state"})
    with pytest.raises(EnvironmentLack, match=r"no tracepoint no_such_tracepoint: run Linux 5\.8 or later"):
        program.load(programs, offsets, {})
    assert open_descriptors() == before


# --- Uprobes -----------------------------------------------------------------------------------------------------

UPDATE = (Site("digest_update", 16, returns=False, emulated=True), Site("digest_updated", 16, returns=True, emulated=True))
BLOCKS = (Site("go_begin", 32, returns=False, emulated=True), Site("go_begin", 64, returns=False, emulated=True))


class FakeKernel:
    """Programs and links that are only noted; each has a descriptor, which must be closed. `refuses`: what of all that fails, by its
    number in the order in which it is asked for; `knows_multi`: whether many places may be in one link."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses: set[int] = set()
        self.knows_multi = True
        self.asked: list[tuple[object, ...]] = []
        self.loaded: dict[int, tuple[str, int, int]] = {}
        monkeypatch.setattr(program.bpf, "has_uprobe_multi", lambda: self.knows_multi)
        monkeypatch.setattr(program.bpf, "program_load", self._load)
        monkeypatch.setattr(program.bpf, "uprobe_multi_open", self._multi)
        monkeypatch.setattr(program.bpf, "uprobe_open", self._single)

    def _made(self, *what: object) -> int:
        self.asked.append(what)
        if len(self.asked) in self.refuses:
            raise OSError(errno.ESRCH, "No such process")
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _load(self, code: bytes, name: str, kind: int = 0, attach_type: int = 0) -> int:
        if attach_type == bpf.TRACE_UPROBE_MULTI and not self.knows_multi:
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = self._made("load", name)
        self.loaded[fd] = (name, kind, attach_type)
        return fd

    def _multi(self, fd: int, path: str, offsets: list[int], tgid: int, *, returns: bool) -> int:
        return self._made(self.loaded[fd][0], path, tuple(offsets), tgid, returns)

    def _single(self, fd: int, path: str, offset: int, tgid: int, *, returns: bool) -> int:
        return self._made(self.loaded[fd][0], path, offset, tgid, returns)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    before = open_descriptors()
    yield FakeKernel(monkeypatch)
    assert open_descriptors() == before, "descriptors were left"


CODES = dict.fromkeys(("digest_update", "digest_updated", "go_begin"), b"")


@pytest.mark.parametrize(("knows", "attach_type"), [(True, bpf.TRACE_UPROBE_MULTI), (False, 0)])
def test_uprobes_are_loaded_for_one_link_where_the_kernel_has_it(fake: FakeKernel, knows: bool, attach_type: int) -> None:
    fake.knows_multi = knows
    uprobes = program.Uprobes(CODES)
    assert uprobes.multi is knows
    assert list(fake.loaded.values()) == [(name, bpf.PROG_TYPE_KPROBE, attach_type) for name in CODES]
    uprobes.close()


def test_the_way_that_is_asked_for_is_taken_or_refused(fake: FakeKernel) -> None:
    fake.knows_multi = False
    with pytest.raises(OSError, match="Invalid argument"):
        program.Uprobes(CODES, multi=True)
    uprobes = program.Uprobes(CODES, multi=False)
    assert not uprobes.multi
    uprobes.close()


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_programs_that_cannot_all_be_loaded_leave_none(fake: FakeKernel, knows: bool, place: int) -> None:
    fake.knows_multi = knows
    fake.refuses = {place}
    with pytest.raises(OSError, match="No such process"):
        program.Uprobes(CODES)


def test_all_places_of_a_program_are_one_link(fake: FakeKernel) -> None:
    uprobes = program.Uprobes(CODES)
    opened = uprobes.attach("/lib/c.so", (*UPDATE, *BLOCKS), 7)
    assert sorted(fake.asked[len(CODES) :]) == [
        ("digest_update", "/lib/c.so", (16,), 7, False),
        ("digest_updated", "/lib/c.so", (16,), 7, True),
        ("go_begin", "/lib/c.so", (32, 64), 7, False),
    ]
    assert len(set(opened)) == 3
    for fd in opened:
        os.close(fd)
    uprobes.close()


def test_without_one_link_for_all_each_place_is_its_own(fake: FakeKernel) -> None:
    uprobes = program.Uprobes(CODES, multi=False)
    opened = uprobes.attach("/lib/c.so", (*UPDATE, *BLOCKS), 7)
    assert sorted(fake.asked[len(CODES) :]) == [
        ("digest_update", "/lib/c.so", 16, 7, False),
        ("digest_updated", "/lib/c.so", 16, 7, True),
        ("go_begin", "/lib/c.so", 32, 7, False),
        ("go_begin", "/lib/c.so", 64, 7, False),
    ]
    for fd in opened:
        os.close(fd)
    uprobes.close()


@pytest.mark.parametrize(("multi", "links"), [(True, 3), (False, 4)])
def test_uprobes_are_attached_all_or_none(fake: FakeKernel, multi: bool, links: int) -> None:
    """Half of a pair measures nonsense. Whatever is refused, nothing is left: see the fixture."""
    uprobes = program.Uprobes(CODES, multi=multi)
    for place in range(1, links + 1):
        before = open_descriptors()
        fake.refuses = {len(fake.asked) + place}
        with pytest.raises(OSError, match="No such process") as error:
            uprobes.attach("/lib/c.so", (*UPDATE, *BLOCKS), 7)
        assert error.value.errno == errno.ESRCH
        assert open_descriptors() == before, f"the link before number {place} is left"
    uprobes.close()


def test_closing_uprobes_twice_is_no_harm(fake: FakeKernel) -> None:
    uprobes = program.Uprobes(CODES)
    uprobes.close()
    uprobes.close()


@pytest.mark.kernel
@pytest.mark.parametrize("multi", [True, False])
def test_the_kernel_takes_all_uprobes_and_refuses_a_process_that_is_gone(cache: Path, programs: dict[str, bytes], multi: bool) -> None:
    before = open_descriptors()
    loaded = program.load(programs, program.kernel_offsets(str(cache), pytest.fail), {"events": 32_768})
    uprobes = program.Uprobes(loaded.uprobes, multi=multi)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(OSError, match=r".+") as error:
        uprobes.attach(sys.executable, UPDATE, gone.pid)
    assert error.value.errno == errno.ESRCH
    uprobes.close()
    loaded.close()
    assert open_descriptors() == before

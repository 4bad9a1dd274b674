# SPDX-License-Identifier: Apache-2.0
"""The boundary to the kernel: the committed header is the rendered one, and the programs call nothing that could change a process."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bucketprobe import abi, program

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "probes" / "include" / "abi.h"

TYPES = """
typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned int __u32; typedef int __s32;
typedef unsigned long long __u64;
"""

#: Helpers that only look, and write to nothing but our maps and our ring (include/uapi/linux/bpf.h).
HELPERS = {
    1: "map_lookup_elem",
    2: "map_update_elem",
    3: "map_delete_elem",
    5: "ktime_get_ns",
    8: "get_smp_processor_id",
    12: "tail_call",
    14: "get_current_pid_tgid",
    35: "get_current_task",
    112: "probe_read_user",
    113: "probe_read_kernel",
    114: "probe_read_user_str",
    130: "ringbuf_output",
    134: "ringbuf_query",
}
#: What an observer must never do to those whom it observes.
FORBIDDEN = {36: "probe_write_user", 58: "override_return", 109: "send_signal", 117: "send_signal_thread"}

CALL, LOAD_64 = 0x85, 0x18


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return program.compiled(str(tmp_path_factory.mktemp("cache")), lambda text: None)


def calls(code: bytes) -> Iterator[tuple[int, int]]:
    """Of each call: 0 for a helper, another number for what else may be called, and the number of whom."""
    at = 0
    while at < len(code):
        opcode, registers, _, immediate = struct.unpack_from("<BBhi", code, at)
        if opcode == CALL:
            yield registers >> 4, immediate
        at += 16 if opcode == LOAD_64 else 8


def test_the_committed_header_is_the_rendered_one() -> None:
    """`python -m bucketprobe.abi` writes it."""
    assert HEADER.read_text("ascii") == abi.render_header()


def test_rendering_writes_the_committed_header(tmp_path: Path) -> None:
    before = HEADER.read_bytes()
    done = subprocess.run([sys.executable, "-m", "bucketprobe.abi"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert os.path.samefile(done.stdout.strip(), HEADER)
    assert HEADER.read_bytes() == before


def compiler(text: str) -> subprocess.CompletedProcess[str]:
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wpadded", "-fsyntax-only", f"-I{HEADER.parent}", "-x", "c", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_a_c_compiler_sees_the_same_layout() -> None:
    """The header asserts every size and offset; -Wpadded says that there are no holes."""
    done = compiler(TYPES + '#include "abi.h"\nint main(void) { struct bp_end_event e; return sizeof(e) == 0; }\n')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_layout_that_differs_is_noticed() -> None:
    """Guards the test before: with types of another size the assertions must fail."""
    done = compiler(TYPES.replace("unsigned short __u16", "unsigned int __u16") + '#include "abi.h"\n')
    assert done.returncode != 0
    assert 'static assertion failed: "bp_header"' in done.stderr


def test_kinds_are_unique_and_no_kind_is_zero() -> None:
    """What was never written, a zeroed record, is no event."""
    assert len(abi.Kind.__members__) == len({int(kind) for kind in abi.Kind})
    assert 0 not in set(abi.Kind)
    assert max(abi.Kind) < 256


def test_every_program_calls_only_helpers_that_look(programs: dict[str, bytes]) -> None:
    called = {(name, kind, number) for name, code in programs.items() for kind, number in calls(code)}
    assert {number for _, _, number in called} == set(HELPERS), "the list is no longer than it need be"
    assert not [(name, number) for name, kind, number in called if kind or number not in HELPERS]
    assert not set(HELPERS) & set(FORBIDDEN)


def test_calls_are_found() -> None:
    """Guards the test before: a call after a 64-bit constant, and none inside one."""

    def instruction(opcode: int, registers: int, immediate: int) -> bytes:
        return struct.pack("<BBhi", opcode, registers, 0, immediate)

    code = instruction(LOAD_64, 0x11, 5) + instruction(CALL, 0, 36) + instruction(CALL, 0, 109) + instruction(CALL, 0x10, 1)
    assert list(calls(code)) == [(0, 109), (1, 1)]


@pytest.mark.kernel
def test_every_program_loads_and_attaches_on_this_kernel(programs: dict[str, bytes], tmp_path: Path) -> None:
    loaded = program.load(programs, program.kernel_offsets(str(tmp_path), pytest.fail), {})
    try:
        program.Uprobes(loaded.uprobes).close()
        assert len(loaded.programs) + len(loaded.uprobes) == sum(not name.startswith("size_") for name in programs)
        assert loaded.missing == []
    finally:
        loaded.close()

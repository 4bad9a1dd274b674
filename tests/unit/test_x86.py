# SPDX-License-Identifier: Apache-2.0
"""The lengths of instructions, against binutils on real code; and that what is not known is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bucketprobe import x86
from bucketprobe.x86 import RAX, RCX, RDI, RDX, RSI, RSP, Kind

#: Compiled C, C++ with all that a JavaScript engine needs, and a language's own compiler.
PROGRAMS = ("/usr/bin/gcc", "node", "go")
INSTRUCTIONS = 60_000
REGISTERS = {
    name: number
    for number, names in enumerate(
        [
            *("rax eax ax al ah", "rcx ecx cx cl ch", "rdx edx dx dl dh", "rbx ebx bx bl bh"),
            *("rsp esp sp spl", "rbp ebp bp bpl", "rsi esi si sil", "rdi edi di dil"),
            *(f"r{number} r{number}d r{number}w r{number}b" for number in range(8, 16)),
        ]
    )
    for name in names.split()
}
#: Which have their last operand only to read it, or several results. Of all others it is what they write.
ONLY_READ = re.compile(r"cmp|test|push|bt |bt[lqw] |j|call|nop|mul|imul +%\w+$|i?div|not|neg|prefetch")


def listed(program: str) -> Iterator[tuple[bytes, str]]:
    """Bytes and text of each instruction, as objdump has them."""
    path = shutil.which(program)
    assert path, f"{program} is needed"
    with subprocess.Popen(["objdump", "-dw", "-j", ".text", path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if found := re.match(r" *[0-9a-f]+:\t((?:[0-9a-f]{2} )+) *\t(.*)", line):
                yield bytes.fromhex(found[1]), found[2].split("#")[0].split(" <")[0].strip()
        process.kill()


def flow(text: str) -> Kind | None:
    """What objdump's text says of the flow, as far as it says it without doubt."""
    name, _, operand = text.partition(" ")
    operand = operand.strip()
    if name == "push" and operand.startswith("%"):
        return Kind.PUSH
    if name == "call":
        return Kind.CALL
    if name == "jmp":
        return Kind.END if operand.startswith("*") else Kind.JMP
    if name.startswith("j"):
        return Kind.JCC
    return Kind.END if name in ("ret", "ud2", "int3") else Kind.OTHER


@pytest.mark.parametrize("program", PROGRAMS)
def test_real_code(program: str) -> None:
    known = total = 0
    for raw, text in islice(listed(program), INSTRUCTIONS):
        total += 1
        found = x86.decode(raw + b"\x90" * 16, 0)
        if found is None:
            continue
        known += 1
        assert (found.length, found.kind) == (len(raw), flow(text)), text
        assert found.emulated == (found.target is not None or found.kind is Kind.PUSH), text
        last = re.search(r"%(\w+)$", text)
        if last and last[1] in REGISTERS and not ONLY_READ.match(text):
            assert REGISTERS[last[1]] in found.writes, text
        if found.kind is Kind.CALL:
            assert RAX in found.writes
    assert total > 10_000
    assert known > 0.99 * total


@pytest.mark.parametrize(
    ("code", "kind", "target", "emulated"),
    [
        ("55", Kind.PUSH, None, True),
        ("4157", Kind.PUSH, None, True),
        ("4855", Kind.PUSH, None, False),  # the kernel knows the prefix 41 only
        ("f355", Kind.PUSH, None, False),
        ("7410", Kind.JCC, 0x12, True),
        ("0f84fcffffff", Kind.JCC, 2, True),
        ("eb80", Kind.JMP, -126, True),
        ("e900010000", Kind.JMP, 0x105, True),
        ("e8ffffffff", Kind.CALL, 4, True),
        ("ff15aabbccdd", Kind.CALL, None, False),
        ("ffd0", Kind.CALL, None, False),
        ("ff25aabbccdd", Kind.END, None, False),
        ("ff35aabbccdd", Kind.OTHER, None, False),
        ("6a01", Kind.OTHER, None, False),
        ("c3", Kind.END, None, False),
        ("90", Kind.OTHER, None, False),
    ],
)
def test_flow(code: str, kind: Kind, target: int | None, emulated: bool) -> None:
    found = x86.decode(bytes.fromhex(code), 0)
    assert found
    assert (found.kind, found.target, found.emulated, found.length) == (kind, target, emulated, len(code) // 2)


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("4885d2", set()),  # test rdx, rdx
        ("4839d6", set()),  # cmp rsi, rdx
        ("4883fa40", set()),  # cmp rdx, 64
        ("4883c240", {RDX}),  # add rdx, 64
        ("4889fb", {3}),  # mov rbx, rdi
        ("4889df", {RDI}),  # mov rdi, rbx
        ("4989f8", {8}),  # mov r8, rdi
        ("488d4c2408", {RCX}),  # lea rcx, [rsp+8]
        ("4889442408", set()),  # mov [rsp+8], rax
        ("4883ec08", {RSP}),  # sub rsp, 8
        ("55", {RSP}),
        ("5f", {RSP, RDI}),
        ("b601", {RSI, RDX}),  # mov dh, 1: RDX's second byte, and in another coding RSI's first
        ("48f7e2", {RAX, RDX}),  # mul rdx
        ("f3a4", {RCX, RSI, RDI}),  # rep movsb
        ("660f6fff", set()),  # movdqa xmm7, xmm7: not RDI
        ("0f38cbf9", set()),  # sha256rnds2 xmm7, xmm1
        ("66480f7ef8", {RAX}),  # movq rax, xmm7
        ("0fb6c2", {RAX}),
        ("480fcf", {RDI}),  # bswap rdi
        ("c5f96fff", set()),  # vmovdqa xmm7, xmm7
    ],
)
def test_what_is_written(code: str, writes: set[int]) -> None:
    found = x86.decode(bytes.fromhex(code), 0)
    assert found
    assert found.length == len(code) // 2
    assert writes <= found.writes
    # More than that is said only where a byte register may be meant, and of multiplication.
    assert len(found.writes - writes) <= (1 if code in ("48f7e2", "66480f7ef8") else 0)


@pytest.mark.parametrize(
    "code",
    [
        "62f17c48100a",  # EVEX
        "66e900000000",  # on which processors differ
        "4874004890",
        "2e7400",
        "ff28",  # far jump
        "cb",  # far return
        "cd80",  # int
        "9a00000000",
        "8f00",
        "d9c0",  # x87
        "67 8b00",
        "48",
        "f0f0f0f0f0f0f0f0f0f0f0f0f0f0f08300 00",  # longer than instructions may be
        "",
    ],
)
def test_what_is_not_known(code: str) -> None:
    assert x86.decode(bytes.fromhex(code), 0) is None


@pytest.mark.parametrize(
    "code", ["0f1f840000000000", "48b81122334455667788", "0f84fcffffff", "4881ec88000000", "c4e2f9f7c1", "660f3a0ffe08"]
)
def test_an_instruction_that_is_cut_off_is_none(code: str) -> None:
    whole = bytes.fromhex(code)
    for size in range(len(whole)):
        assert x86.decode(whole[:size], 0) is None
    found = x86.decode(whole, 0)
    assert found
    assert found.end == len(whole)


@given(code=st.binary(max_size=32), at=st.integers(0, 40))
@example(code=b"\x66" * 20, at=0)
def test_any_bytes(code: bytes, at: int) -> None:
    found = x86.decode(code, at)
    if found:
        assert found.at == at
        assert 0 < found.length <= 15
        assert found.end <= len(code)
        # What comes behind it changes nothing.
        assert x86.decode(code[: found.end], at) == found
        if found.emulated:
            assert found.kind in (Kind.PUSH, Kind.JCC, Kind.JMP, Kind.CALL)
            assert code[at] not in (0x66, 0xF2, 0xF3)
        if found.plain:
            assert found.kind is Kind.OTHER
            assert found.target is None

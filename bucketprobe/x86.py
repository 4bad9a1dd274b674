# SPDX-License-Identifier: Apache-2.0
"""How long an x86-64 instruction is, whether the kernel emulates it under a probe, and which registers it may change.

Not a disassembler: it knows what compilers put into ordinary functions, and answers None for all else, which ends every search
for a place to probe. `writes` errs on the safe side: a register in it may be changed, one that is not in it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

RAX, RCX, RDX, RSP, RBP, RSI, RDI = 0, 1, 2, 4, 5, 6, 7
_ALL = frozenset(range(16))
_LONGEST = 15


class Kind(Enum):
    """How the flow goes on: only that of JCC, and that of OTHER and PUSH, may reach the next instruction at once."""

    PUSH = "push"
    JCC = "jcc"
    JMP = "jmp"
    CALL = "call"
    END = "end"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Instruction:
    """`at` and `target` (of relative jumps and calls, else None) are offsets in the bytes that were given."""

    at: int
    length: int
    kind: Kind
    writes: frozenset[int]
    target: int | None
    #: It compares registers, copies between them or does nothing: neither memory nor the stack is touched.
    plain: bool
    #: It names memory by its distance from itself.
    relative: bool
    emulated: bool

    @property
    def end(self) -> int:
        return self.at + self.length


#: By opcode: what follows it, and what it writes, as "form/writes".
#: Form: m ModRM; b 8 bit; w 16 bit; z 16 or 32 bit; q 32 or 64 bit; d, D a relative target of 8 or 32 bit.
#: Writes: r, e the ModRM register and operand; o the register in the opcode; a, x, s RAX, RDX, RSP; i string operation; * unknown.
_ONE: dict[int, str] = {}
_TWO: dict[int, str] = {}


def _fill(table: dict[int, str], rows: dict[str, str]) -> None:
    for opcodes, form in rows.items():
        for part in opcodes.split():
            first, _, last = part.partition("-")
            table |= dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), form)


for _base in range(0, 0x38, 8):
    # add, or, adc, sbb, and, sub, xor, in their six forms.
    _ONE |= dict(zip(range(_base, _base + 6), ("m/e", "m/e", "m/r", "m/r", "b/a", "z/a"), strict=True))
_fill(
    _ONE,
    {
        "38-3b 84-85": "m/",  # cmp, test
        "3c a8": "b/",
        "3d a9": "z/",
        "50-57": "/s",
        "58-5f": "/so",
        "63 8a-8b 8d": "m/r",
        "68": "z/s",
        "69": "mz/r",
        "6a": "b/s",
        "6b": "mb/r",
        "70-7f": "d/",
        "80 83 c0-c1": "mb/e",
        "81 c7": "mz/e",
        "86-87": "m/re",
        "88-89 d0-d3": "m/e",
        "90-97": "/ao",
        "98-99": "/ax",
        "a4-a5 aa-ab": "/i",
        "b0-b7": "b/o",
        "b8-bf": "q/o",
        "c2": "w/s",
        "c3": "/s",
        "c6": "mb/e",
        "c9": "/s*",
        "cc": "/",
        "e8": "D/*",
        "e9": "D/",
        "eb": "d/",
        "f6-f7": "m/eax",  # the immediate value of test is added by hand
        "fe-ff": "m/e",
    },
)
_fill(
    _TWO,
    {
        "05": "/*",
        "0b": "/",
        "0d 10-17 18-1f 28-2b 2e-2f 51-6f 74-76 7c-7d 7f d0-d6 d8-fe": "m/",
        "2c-2d 50 d7": "m/r",
        "40-4f af b6-b8 bc-bf": "m/r",
        "70-73": "mb/",
        "77": "/",
        "7e": "m/e",
        "80-8f": "D/",
        "90-9f": "m/e",
        "a2": "/*",
        "a3": "m/",
        "a4 ac ba": "mb/e",
        "a5 ab ad b3 bb": "m/e",
        "ae c7": "m/*",
        "b0-b1 c0-c1": "m/rea",
        "c2 c6": "mb/",
        "c3": "m/",
        "c4": "mb/",
        "c5": "mb/r",
        "c8-cf": "/o",
    },
)

#: By table (0 is VEX): those that write registers of one byte.
_BYTES = (
    frozenset[int](),
    frozenset((*range(0, 0x38, 2), 0x80, 0x86, 0x88, 0x8A, *range(0xB0, 0xB8), 0xC0, 0xC6, 0xD0, 0xD2, 0xF6, 0xFE)),
    frozenset((*range(0x90, 0xA0), 0xB0, 0xC0)),
)
#: Of those with 0F 3A: pextrb and its like, which write a general-purpose register.
_EXTRACTS = range(0x14, 0x18)
_PREFIXES = frozenset((0x2E, 0x3E, 0x64, 0x65, 0x66, 0xF0, 0xF2, 0xF3))
_ENDBR64 = b"\xf3\x0f\x1e\xfa"


def decode(code: bytes, at: int) -> Instruction | None:
    """The instruction that begins at offset `at`, or None where it is not known or not there as a whole."""
    return _Reader(code, at).instruction()


class _Unknown(Exception):
    pass


class _Reader:
    def __init__(self, code: bytes, at: int) -> None:
        self._code = code
        self._start = self._at = at
        self._prefixes: set[int] = set()
        self._rex = 0
        self._reg = self._operand = -1
        self._opcode = 0
        self._relative = False

    def instruction(self) -> Instruction | None:
        try:
            return self._decode()
        except (_Unknown, IndexError):
            return None

    def _byte(self) -> int:
        value = self._code[self._at]
        self._at += 1
        return value

    def _decode(self) -> Instruction:
        byte = self._byte()
        while byte in _PREFIXES:
            self._prefixes.add(byte)
            byte = self._byte()
        if byte & 0xF0 == 0x40:
            self._rex = byte
            byte = self._byte()
        if byte in (0xC4, 0xC5):
            form, table = self._vector(byte), 0
        elif byte == 0x0F:
            form, table = self._two_bytes(self._byte()), 2
        else:
            self._opcode = byte
            form, table = _ONE.get(byte, ""), 1
        if not form:
            raise _Unknown
        return self._rest(form, table)

    def _two_bytes(self, opcode: int) -> str:
        if opcode == 0x38:
            self._opcode = self._byte()
            return "m/" if self._opcode < 0xF0 else "m/r"
        if opcode == 0x3A:
            self._opcode = self._byte()
            return "mb/e" if self._opcode in _EXTRACTS else "mb/"
        self._opcode = opcode
        return _TWO.get(opcode, "")

    def _vector(self, first: int) -> str:
        """VEX. Of its general-purpose instructions, which are few, it is not known what they write."""
        if self._prefixes or self._rex:
            raise _Unknown
        byte = self._byte()
        # R, X and B are there inverted.
        self._rex = 0x40 | (~byte >> 5 & 4)
        space = 1
        if first == 0xC4:
            self._rex = 0x40 | (~byte >> 5 & 7)
            space = byte & 31
            byte = self._byte()
        self._opcode = self._byte()
        if space == 1:
            form = _TWO.get(self._opcode, "")
            if not form or self._opcode in range(0x80, 0xA0):
                raise _Unknown
            return form
        if space == 2:
            return "m/" if self._opcode < 0xF0 else "m/*"
        if space == 3:
            return "mb/*" if self._opcode >= 0xF0 else "mb/e" if self._opcode in _EXTRACTS else "mb/"
        raise _Unknown

    def _rest(self, form: str, table: int) -> Instruction:
        follows, _, writes = form.partition("/")
        target = None
        narrow = 0x66 in self._prefixes
        modrm = -1
        for each in follows:
            match each:
                case "m":
                    modrm = self._modrm()
                case "b":
                    self._skip(1)
                case "w":
                    self._skip(2)
                case "z":
                    self._skip(2 if narrow else 4)
                case "q":
                    self._skip(8 if self._rex & 8 else 2 if narrow else 4)
                case "d" | "D":
                    # With a prefix, processors differ in what it is, and the kernel refuses some.
                    if self._prefixes or self._rex:
                        raise _Unknown
                    target = self._distance(1 if each == "d" else 4)
        extension = modrm >> 3 & 7
        if table == 1 and self._opcode in (0xF6, 0xF7) and extension < 2:
            self._skip(1 if self._opcode == 0xF6 else 2 if narrow else 4)
            writes = ""
        if table == 1 and self._opcode in (0x80, 0x81, 0x83) and extension == 7:
            writes = ""
        kind = self._kind(table, extension)
        if kind is Kind.CALL or (table == 1 and self._opcode == 0xFF and extension > 1):
            writes = "*"
        length = self._at - self._start
        if length > _LONGEST or self._at > len(self._code):
            raise _Unknown
        plain = self._plain(table, modrm)
        emulated = target is not None or (kind is Kind.PUSH and self._short_push(length))
        return Instruction(self._start, length, kind, self._written(table, writes), target, plain, self._relative, emulated)

    def _skip(self, size: int) -> None:
        self._at += size

    def _distance(self, size: int) -> int:
        raw = self._code[self._at : self._at + size]
        if len(raw) != size:
            raise _Unknown
        self._at += size
        return self._at + int.from_bytes(raw, "little", signed=True)

    def _modrm(self) -> int:
        byte = self._byte()
        mode, operand = byte >> 6, byte & 7
        self._reg = byte >> 3 & 7 | (self._rex & 4) << 1
        if mode == 3:
            self._operand = operand | (self._rex & 1) << 3
            return byte
        if operand == 4:
            base = self._byte() & 7
            self._skip(4 if mode == 0 and base == 5 else 0)
        elif mode == 0 and operand == 5:
            self._relative = True
            self._skip(4)
        self._skip((0, 1, 4)[mode])
        return byte

    def _kind(self, table: int, extension: int) -> Kind:
        opcode = self._opcode
        if table == 2:
            return Kind.JCC if 0x80 <= opcode <= 0x8F else Kind.END if opcode == 0x0B else Kind.OTHER
        if table != 1:
            return Kind.OTHER
        if opcode == 0xFF and extension > 1:
            # 3, 5 and 7 are far, or no instruction at all.
            if extension not in (2, 4, 6):
                raise _Unknown
            return {2: Kind.CALL, 4: Kind.END}.get(extension, Kind.OTHER)
        if 0x50 <= opcode <= 0x57:
            return Kind.PUSH
        if 0x70 <= opcode <= 0x7F:
            return Kind.JCC
        kinds = {0xE8: Kind.CALL, 0xE9: Kind.JMP, 0xEB: Kind.JMP, 0xC2: Kind.END, 0xC3: Kind.END, 0xCC: Kind.END}
        return kinds.get(opcode, Kind.OTHER)

    def _short_push(self, length: int) -> bool:
        """As push_setup_xol_ops() in the kernel's arch/x86/kernel/uprobes.c wants it."""
        return length == 1 or (length == 2 and self._rex == 0x41)

    def _plain(self, table: int, modrm: int) -> bool:
        if self._code[self._start : self._at] == _ENDBR64:
            return True
        if table == 2:
            return self._opcode == 0x1F
        if table != 1:
            return False
        if self._opcode == 0x90:
            return not self._rex
        registers = modrm >> 6 == 3
        return registers and self._opcode in (*range(0x30, 0x34), *range(0x38, 0x3C), *range(0x84, 0x86), *range(0x88, 0x8C))

    def _written(self, table: int, writes: str) -> frozenset[int]:
        found: set[int] = set()
        for each in writes:
            match each:
                case "r":
                    found.add(self._reg)
                case "e" if self._operand >= 0:
                    found.add(self._operand)
                case "o":
                    found.add(self._opcode & 7 | (self._rex & 1) << 3)
                case "a":
                    found.add(RAX)
                case "x":
                    found.add(RDX)
                case "s":
                    found.add(RSP)
                case "i":
                    found |= {RCX, RSI, RDI}
                case "*":
                    return _ALL
        if not self._rex and self._opcode in _BYTES[table]:
            # 4 to 7 are AH to BH there, the second bytes of the first four.
            found |= {each & 3 for each in found if 4 <= each <= 7}
        return frozenset(found)

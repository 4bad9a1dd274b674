# SPDX-License-Identifier: Apache-2.0
"""Where a process computes SHA-256, and at which instructions of that code probes see each digest's value and each call's time.

Found per file in the process's executable mappings, whatever they are called and wherever they lie: by the names of their
functions, or, where no file has any, by the processor's own instructions for SHA-256. A site is given only where the code before
it was understood: an unknown one would break the target, or measure something else. x86-64 only.

A probe costs ten times less on an instruction that the kernel emulates (push, and relative jumps and calls) than on others, so
the first of these is taken before which neither the stack pointer nor an argument changed.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bucketprobe import elf, gotable, x86
from bucketprobe.x86 import RAX, RDI, RDX, RSI, RSP, Kind

PROC = "/proc"

_MAPS_BYTES = 4 << 20
#: What may be read of one file, in bytes: the symbols or the code of the largest programs that there are.
_BUDGET = 128 << 20
_MAX_FILES = 1024
_CACHED = 4096
_ENTRY_BYTES = 64

#: Stack pointer and the first three arguments of C functions: what the programs at a function's entry read.
_C_ENTRY = frozenset((RSP, RDI, RSI, RDX))


@dataclass(frozen=True, slots=True)
class Site:
    """Where a BPF program is attached.

    `offset`: in the file, in bytes, as uprobes take it. `returns`: it runs when the function returns whose frame this
    instruction is in. `emulated`: the kernel emulates the instruction (about 1 µs) rather than stepping through it (about 10).
    """

    program: str
    offset: int
    returns: bool
    emulated: bool


@dataclass(frozen=True, slots=True)
class Provider:
    """One file with code for SHA-256.

    `kind`: openssl, hacl, go or sha-ni. `path`: leads the kernel to this very file, deleted or in another mount namespace, as
    long as the process lives and keeps the mapping. `library`: for people, as the target's mounts show it. `inode`: device and
    inode. `value`, `time`: what tells each digest's value and each call's time; empty where nothing does. `detail`: one line.
    """

    kind: str
    path: str
    library: str
    inode: tuple[int, int]
    value: tuple[Site, ...]
    time: tuple[Site, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A provider, but for where its file is."""

    kind: str
    value: tuple[Site, ...]
    time: tuple[Site, ...]
    detail: str


#: Device, inode, time of the last change in ns, and size.
_Key = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A regular file that the process may execute; the key changes when the file does."""

    path: str
    library: str
    key: _Key


_Search = Callable[["_Code"], tuple[_Found, ...]]


def providers(tgid: int, *, proc: str = PROC) -> list[Provider]:
    """What this process computes SHA-256 with. Raises nothing: a process that is gone or may not be read has none.

    Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, without which /proc/PID/map_files leads nowhere.
    """
    return Finder(proc=proc).find(tgid)


class Finder:
    """Remembers what files hold, so that many processes of one program cost one search. For one thread at a time."""

    def __init__(self, *, proc: str = PROC) -> None:
        self._proc = proc
        self._known: dict[tuple[_Search, _Key], tuple[_Found, ...]] = {}

    def find(self, tgid: int) -> list[Provider]:
        """What this process computes SHA-256 with, the executable's own first. Raises nothing."""
        files = list(_mapped(f"{self._proc}/{tgid}"))
        found = self._in(files, _named)
        return found if any(each.time for each in found) else found + self._in(files, _unnamed)

    def _in(self, files: list[_Mapped], search: _Search) -> list[Provider]:
        return [
            Provider(each.kind, file.path, file.library, file.key[:2], each.value, each.time, each.detail)
            for file in files
            for each in self._found(file, search)
        ]

    def _found(self, file: _Mapped, search: _Search) -> tuple[_Found, ...]:
        key = (search, file.key)
        if key not in self._known:
            found = _examine(file, search)
            if found is None:
                return ()
            if len(self._known) >= _CACHED:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        return self._known[key]


# --- the process's files ---

#: Address range, offset, device, inode and path of a mapping that may be executed.
_MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ..x. [0-9a-f]+ (\S+) ([1-9]\d*) +(/.*)$", re.MULTILINE)


def _mapped(directory: str) -> Iterator[_Mapped]:
    """Each file once, the executable first."""
    try:
        with open(f"{directory}/maps", "rb") as file:
            maps = file.read(_MAPS_BYTES)
    except OSError:
        return
    own = _key(f"{directory}/exe")
    first: dict[tuple[bytes, bytes], re.Match[bytes]] = {}
    for line in _MAPPING.finditer(maps):
        first.setdefault((line[3], line[4]), line)
    found = []
    for line in list(first.values())[:_MAX_FILES]:
        path = f"{directory}/map_files/{int(line[1], 16):x}-{int(line[2], 16):x}"
        key = _key(path)
        if key:
            # The link to the executable does not change with its mappings.
            path = f"{directory}/exe" if key == own else path
            found.append(_Mapped(path, os.fsdecode(line[5]), key))
    yield from sorted(found, key=lambda each: each.key != own)


def _key(path: str) -> _Key | None:
    """Of a regular file: reading from a device that is mapped could change something."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return _identity(info) if stat.S_ISREG(info.st_mode) else None


def _identity(info: os.stat_result) -> _Key:
    return info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size


def _examine(file: _Mapped, search: _Search) -> tuple[_Found, ...] | None:
    """None where it has become another file, whose sites must not be remembered as this one's."""
    try:
        with elf.Bytes(file.path, _BUDGET) as raw:
            if _identity(os.fstat(raw.fileno())) != file.key:
                return None
            return search(_Code(raw))
    except OSError:
        return None
    except elf.Unreadable:
        return ()


# --- one file ---


class _Code:
    """An ELF file: its sections, and the bytes of its functions."""

    def __init__(self, file: elf.Bytes) -> None:
        self.file = file
        self.segments = elf.code(file)
        self.sections = elf.sections(file)

    def offset(self, address: int) -> int | None:
        """In the file, of something executable."""
        for each in self.segments:
            if each.address <= address < each.address + each.size:
                return each.offset + address - each.address
        return None

    def bytes(self, address: int, size: int) -> bytes:
        """Executable ones; fewer at the segment's end, none outside."""
        for each in self.segments:
            if each.address <= address < each.address + each.size:
                return self.file.upto(each.offset + address - each.address, min(size, each.address + each.size - address))
        return b""

    def site(self, program: str, function: elf.Function | None, *, returns: bool = False) -> Site | None:
        """At a C function's entry, where the stack pointer and the arguments are still the caller's."""
        offset = self.offset(function.address) if function else None
        if function is None or offset is None:
            return None
        code = self.bytes(function.address, min(function.size or _ENTRY_BYTES, _ENTRY_BYTES))
        first = instruction = x86.decode(code, 0)
        while instruction and not instruction.emulated and instruction.plain and not instruction.writes & _C_ENTRY:
            instruction = x86.decode(code, instruction.end)
        if instruction and instruction.emulated:
            return Site(program, offset + instruction.at, returns, True)
        ordinary = first and first.kind in (Kind.OTHER, Kind.PUSH) and not first.relative
        return Site(program, offset, returns, False) if ordinary else None


def _all(*wanted: Site | None) -> tuple[Site, ...]:
    """All of them, or none where one is missing: half of a pair tells nothing."""
    there = tuple(each for each in wanted if each)
    return there if len(there) == len(wanted) else ()


def _named(code: _Code) -> tuple[_Found, ...]:
    return tuple(found for search in (_openssl, _hacl, _go) if (found := search(code)))


def _lack(value: tuple[Site, ...], time: tuple[Site, ...]) -> str:
    lack = [what for what, found in (("values", value), ("times", time)) if not found]
    return f": its code has an unknown form, so no {' and no '.join(lack)}" if lack else ""


# --- OpenSSL, in a library or linked into a program ---

_UPDATE, _FINAL, _COPY = b"EVP_DigestUpdate", b"EVP_DigestFinal_ex", b"EVP_MD_CTX_copy_ex"
#: Returns a constant, such as 0x300000f0 for 3.0.15.
_VERSION = b"OpenSSL_version_num"
#: Names that only a relative of OpenSSL has, whose contexts are arranged in another way.
_RELATIVES = {b"awslc_version_string": "AWS-LC", b"BORINGSSL_self_test": "BoringSSL"}
_RETURN_CONSTANT = re.compile(rb"(?:\xf3\x0f\x1e\xfa)?\xb8(.{4})\xc3", re.DOTALL)  # endbr64; mov n, eax; ret


def _openssl(code: _Code) -> _Found | None:
    names = elf.functions(code.file, code.sections, (_UPDATE, _FINAL, _COPY, _VERSION, *_RELATIVES))
    update, final = names.get(_UPDATE), names.get(_FINAL)
    if not update:
        return None
    time = _all(
        code.site("digest_update", update),
        code.site("digest_updated", update, returns=True),
        code.site("digest_copied", names.get(_COPY)),
    )
    value = _all(code.site("digest_final", final), code.site("digest_finished", final, returns=True))
    version, known = _openssl_version(code, names)
    if not known:
        return _Found("openssl", (), time, f"{version}: the arrangement of its contexts is not known, so no values")
    return _Found("openssl", value, time, version + _lack(value, time))


def _openssl_version(code: _Code, names: dict[bytes, elf.Function]) -> tuple[str, bool]:
    """For people, and whether it is OpenSSL 3. BoringSSL and LibreSSL call themselves 1.1.1 and 2.0.0 here."""
    relative = next((each for name, each in _RELATIVES.items() if name in names), None)
    if relative:
        return relative, False
    function = names.get(_VERSION)
    found = _RETURN_CONSTANT.match(code.bytes(function.address, 16)) if function else None
    if not found:
        return "OpenSSL of an unknown version", False
    number = int.from_bytes(found[1], "little")
    # From 3 on the patch level has 8 bits where there was a letter before.
    major, minor, patch = number >> 28, number >> 20 & 0xFF, number >> (4 if number >> 28 > 2 else 12) & 0xFF
    return f"OpenSSL {major}.{minor}.{patch}", major == 3


# --- HACL*, which CPython has in itself since 3.12 for builds without OpenSSL ---

_HACL = re.compile(rb"\w*Hacl_(?:Streaming|Hash)_SHA2_(update|finish|digest)_256")


def _hacl(code: _Code) -> _Found | None:
    names = elf.matching(code.file, code.sections, b"Hacl_", _HACL)
    roles = {match[1]: function for name, function in names.items() if (match := _HACL.fullmatch(name))}
    update, final = roles.get(b"update"), roles.get(b"digest", roles.get(b"finish"))
    if not update and not final:
        return None
    time = _all(code.site("digest_update", update), code.site("digest_updated", update, returns=True))
    value = _all(code.site("hacl_final", final), code.site("digest_finished", final, returns=True))
    return _Found("hacl", value, time, "CPython's HACL*" + _lack(value, time))


# --- Go. Return probes would break it, since its stacks move: entry probes only. ---

_GO_NAME = re.compile(
    rb"\0crypto/(?:internal/fips140/(?:v[\w.-]+/)?)?sha256\.(?:\(\*[dD]igest\)\.(?:Write|checkSum|Sum)|block\w*|Sum256)(?=\0)"
)
#: The check of a goroutine's stack that functions begin with where arguments are in registers, as they are since Go 1.17.
_STACK_CHECK = re.compile(rb"(?:\x4c\x8d\x64\x24.)?[\x49\x4d]\x3b\x66\x10(?:\x76|\x0f\x86)", re.DOTALL)  # lea -n(sp), r12; cmp 16(r14); jbe
#: Which follows each call of a function that takes its arguments on the stack: X15 is zero in all others.
_AFTER_STACK_CALL = b"\x45\x0f\x57\xff"  # xorps xmm15, xmm15
_LEA_RAX = re.compile(rb"\x48\x8d(?:\x44\x24(.)|\x84\x24(.{4}))", re.DOTALL)  # lea n(rsp), rax
_TEST_STACK = re.compile(rb"\x80(?:\x7c\x24(.)|\xbc\x24(.{4}))\0", re.DOTALL)  # cmpb $0, n(rsp)
_LOAD_LENGTH = re.compile(rb"\x48\x8b[\x40\x48\x50\x58\x60\x68\x70\x78]\x68")  # mov 104(rax), any
#: Of the digest's bytes: h[8] uint32, x[64] byte, nx int, len uint64, is224 bool.
_IS_224 = 112
#: How far into .text Go's own may begin, where C's start-up code comes before it, and on what that is aligned.
_TEXT_SEARCH, _TEXT_ALIGNED = 64 << 10, 16
_MAX_FUNCTION = 16 << 10


class _GoFunctions:
    """Those of the package sha256, with the text beginning at a given address."""

    def __init__(self, code: _Code, ranges: dict[bytes, gotable.Range], base: int) -> None:
        self.code = code
        self.address = {name.rsplit(b".", 1)[1]: base + each.start for name, each in ranges.items()}
        self.blocks = {address for name, address in self.address.items() if name.startswith(b"block")}
        self._size = {name.rsplit(b".", 1)[1]: min(max(each.end - each.start, 0), _MAX_FUNCTION) for name, each in ranges.items()}

    def instructions(self, name: bytes) -> tuple[bytes, list[x86.Instruction]]:
        """The function's bytes and what they mean; nothing where one of them is not known."""
        if name not in self.address:
            return b"", []
        raw = self.code.bytes(self.address[name], self._size[name])
        found: list[x86.Instruction] = []
        while not found or found[-1].end < len(raw):
            each = x86.decode(raw, found[-1].end if found else 0)
            if not each:
                return raw, []
            found.append(each)
        return raw, found

    def site(self, program: str, name: bytes, at: x86.Instruction) -> Site | None:
        offset = self.code.offset(self.address[name] + at.at)
        return Site(program, offset, False, True) if offset is not None else None


def _go(code: _Code) -> _Found | None:
    info = next((each for each in code.sections if each.name == b".go.buildinfo"), None)
    if not info:
        return None
    table = gotable.table(code.file, code.sections)
    ranges = table.find(_GO_NAME) if table else {}
    if not table or not any(name.endswith(b".Write") for name in ranges):
        return None
    version = _go_version(code.file, info)
    for base in _go_bases(code, table, ranges):
        functions = _GoFunctions(code, ranges, base)
        time, value = _go_time(functions), _go_value(functions)
        if time or value:
            return _Found("go", value, time, version + (_lack(value, time) or _go_lack(functions)))
    return _Found("go", (), (), version + _lack((), ()))


def _go_lack(functions: _GoFunctions) -> str:
    address, (_, instructions) = functions.address, functions.instructions(b"Sum256")
    own = any(each.kind is Kind.CALL and each.target == address[b"checkSum"] - address[b"Sum256"] for each in instructions)
    return ", no values of sha256.Sum256, only of hashes that are written to" if own else ""


def _go_version(file: elf.Bytes, info: elf.Section) -> str:
    head = file.upto(info.offset, 160)
    if len(head) < 33 or not head[15] & 2:
        return "Go before 1.18"
    return "Go " + head[33 : 33 + min(head[32], 100)].decode("ascii", "replace").removeprefix("go")


def _go_bases(code: _Code, table: gotable.Table, ranges: dict[bytes, gotable.Range]) -> Iterator[int]:
    """Where the text may begin, what the table's entries count from."""
    if table.absolute or table.text_start:
        yield table.text_start
        return
    text = next((each for each in code.sections if each.name == b".text"), None)
    write = next((each for name, each in ranges.items() if name.endswith(b").Write")), None)
    if text and write:
        window = code.bytes(text.address + write.start, _TEXT_SEARCH)
        for at in range(0, len(window), _TEXT_ALIGNED):
            if _STACK_CHECK.match(window, at):
                yield text.address + at


def _go_time(functions: _GoFunctions) -> tuple[Site, ...]:
    """Around each call of the code that hashes whole blocks."""
    sites: list[Site | None] = []
    raw, instructions = functions.instructions(b"Write")
    targets = {address - functions.address[b"Write"] for address in functions.blocks}
    for index, each in enumerate(instructions):
        if each.kind is Kind.CALL and each.target in targets:
            end = _next_branch(instructions[index + 1 :])
            if not end:
                return ()
            on_stack = raw.startswith(_AFTER_STACK_CALL, each.end)
            sites.append(functions.site("go_begin_stack" if on_stack else "go_begin", b"Write", each))
            sites.append(functions.site("go_end", b"Write", end))
    return _all(*sites)


def _next_branch(instructions: list[x86.Instruction]) -> x86.Instruction | None:
    """The first that is emulated, if it is always reached, on the same stack, and no other function runs before it."""
    for each in instructions:
        if each.kind in (Kind.JCC, Kind.JMP) and each.emulated:
            return each
        if each.kind is not Kind.OTHER or RSP in each.writes:
            return None
    return None


def _go_value(functions: _GoFunctions) -> tuple[Site, ...]:
    return _all(_go_check(functions), _go_sum(functions))


def _go_check(functions: _GoFunctions) -> Site | None:
    """In checkSum, while RAX is still the digest, if that keeps its length where it is expected."""
    raw, instructions = functions.instructions(b"checkSum")
    if not _STACK_CHECK.match(raw):
        return None
    branch = next((each for each in instructions if each.kind is Kind.JCC), None)
    for each in instructions:
        if _LOAD_LENGTH.fullmatch(raw, each.at, each.end):
            return functions.site("go_check", b"checkSum", branch) if branch else None
        if RAX in each.writes:
            break
    return None


def _go_sum(functions: _GoFunctions) -> Site | None:
    """In Sum, where it looks whether the digest, a copy on its stack, is a SHA-224: what checkSum returned is at RSP then."""
    raw, instructions = functions.instructions(b"Sum")
    target = functions.address.get(b"checkSum", 0) - functions.address.get(b"Sum", 0)
    copy = None
    for index, each in enumerate(instructions):
        if lea := _LEA_RAX.fullmatch(raw, each.at, each.end):
            copy = _displacement(lea)
        elif each.kind is Kind.CALL and each.target == target:
            rest = instructions[index + 1 :]
            branch = _next_branch(rest)
            test = rest[rest.index(branch) - 1] if branch else each
            tested = _TEST_STACK.fullmatch(raw, test.at, test.end)
            if copy is None or branch is None or branch.kind is not Kind.JCC or not tested or _displacement(tested) != copy + _IS_224:
                return None
            return functions.site("go_sum", b"Sum", branch)
        elif RAX in each.writes:
            copy = None
    return None


def _displacement(found: re.Match[bytes]) -> int:
    return int.from_bytes(found[1] or found[2], "little", signed=True)


# --- the processor's own instructions, in functions without a name ---

#: sha256rnds2 between registers does two of a block's 64 rounds.
_ROUNDS = b"\x0f\x38\xcb"
#: Two blocks at a time, or along with a cipher (aesenc and the like), is what TLS libraries do for records: with other arguments.
_FEWEST, _MOST = 16, 48
_CIPHER = re.compile(rb"\x0f\x38[\xdc-\xdf]")
_NEAR = 400
_MAX_UNWIND = 16 << 20
_MAX_CLUSTERS = 64


def _unnamed(code: _Code) -> tuple[_Found, ...]:
    # A return probe would break a Go program, and a file without sections cannot be told from one.
    if not code.sections or any(each.name == b".go.buildinfo" for each in code.sections):
        return ()
    clusters = _clusters(code)
    if not clusters:
        return ()
    sites = [site for function in _unwound(code, clusters) for site in _block_sites(code, function)]
    detail = "SHA-256 instructions in a function without a name"
    return (_Found("sha-ni", (), tuple(sites), detail if sites else f"{detail}, whose entry is not known, so no times"),)


def _clusters(code: _Code) -> list[int]:
    """The address of the first of each group of instructions that may be one function's, in order."""
    found: list[int] = []
    for segment in code.segments:
        first = last = -_NEAR
        count = 0
        for place in _rounds(code, segment):
            if place - last >= _NEAR:
                first, count = place, 0
            last = place
            count += 1
            if count == _FEWEST:
                found.append(first)
    return sorted(found)[:_MAX_CLUSTERS]


def _rounds(code: _Code, segment: elf.Segment) -> Iterator[int]:
    """The address of each such instruction, ascending."""
    last = -1
    for at, piece in code.file.pieces(segment.offset, segment.size, len(_ROUNDS)):
        start = at - segment.offset + segment.address
        for place in elf.places(piece, _ROUNDS):
            # Pieces overlap.
            if start + place > last and piece[place + 3 : place + 4] >= b"\xc0":
                last = start + place
                yield last


def _unwound(code: _Code, addresses: list[int]) -> list[elf.Function]:
    """The functions in which these addresses lie, by what is there for exceptions and survives `strip`.

    Only where the entries have the usual encoding: begin relative to itself, and size, of 32 bits each.
    """
    section = next((each for each in code.sections if each.name == b".eh_frame"), None)
    if not section or section.size > _MAX_UNWIND:
        return []
    raw = code.file.upto(section.offset, section.size)
    found: dict[int, int] = {}
    at = 0
    while at + 16 <= len(raw):
        length, common, begin, size = struct.unpack_from("<IIiI", raw, at)
        if not 12 <= length < len(raw):
            break
        if common:
            start = section.address + at + 8 + begin
            index = bisect_left(addresses, start)
            if index < len(addresses) and addresses[index] < start + size:
                found[start] = size
        at += 4 + length
    return [elf.Function(start, size) for start, size in found.items()]


def _block_sites(code: _Code, function: elf.Function) -> tuple[Site, ...]:
    """At the first emulated instruction, which each call executes, if it comes before the rounds and with stack and arguments intact."""
    raw = code.bytes(function.address, min(function.size, _MAX_FUNCTION))
    offset, first = code.offset(function.address), raw.find(_ROUNDS)
    if offset is None or not _FEWEST <= raw.count(_ROUNDS) <= _MOST or _CIPHER.search(raw):
        return ()
    before: list[x86.Instruction] = []
    while not before or before[-1].end < first:
        instruction = x86.decode(raw, before[-1].end if before else 0)
        # What calls others is more than the function that hashes blocks.
        if not instruction or instruction.kind is Kind.CALL:
            return ()
        before.append(instruction)
    site = next((each for each in before if each.emulated or each.kind is not Kind.OTHER or each.writes & _C_ENTRY), None)
    if not site or not site.emulated:
        return ()
    place = offset + site.at
    return Site("block_begin", place, False, True), Site("digest_updated", place, True, True)

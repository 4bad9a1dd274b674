# SPDX-License-Identifier: Apache-2.0
"""64-bit x86 ELF files, read a little at a time: what somebody else's executable or library may be asked without keeping any of it.

Nothing in such a file is believed: each read is bounded, all reads together have a budget, and whatever does not fit together
raises Unreadable. Addresses are those that the file asks for, offsets count from its beginning; both are in bytes.
"""

from __future__ import annotations

import os
import re
import struct
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

READ_COST = 4 << 10
CHUNK = 1 << 20

_HEAD = 64
_EM_X86_64 = 62
_PT_LOAD, _PF_X = 1, 1
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_STT_FUNC = 2
_SYMBOL = struct.Struct("<IBBHQQ")
_NAME = re.compile(rb"[^\0]+")
#: More places than that of the few names that are asked for are there to mislead.
_MAX_NAMES = 256
_MAX_SECTIONS = 1024
_MAX_SEGMENTS = 64


class Unreadable(Exception):
    """It is not what it looked like, or cannot be read any more; the text says which."""


class Bytes:
    """A file or a process's memory: whole reads, and not more of them than `budget` bytes, where each counts as READ_COST more."""

    def __init__(self, path: str, budget: int) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._left = budget

    def __enter__(self) -> Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def upto(self, address: int, size: int) -> bytes:
        """As much of it as there is; nothing where nothing is mapped."""
        self._left -= size + READ_COST
        if self._left < 0:
            raise Unreadable("too large to be examined")
        try:
            return os.pread(self._fd, size, address)
        except (OSError, OverflowError):
            return b""

    def read(self, address: int, size: int) -> bytes:
        data = self.upto(address, size)
        if len(data) != size:
            raise Unreadable("its memory or executable cannot be read")
        return data

    def word(self, address: int) -> int:
        """The 64-bit word there; 0 where nothing is mapped."""
        data = self.upto(address, 8)
        return int.from_bytes(data, "little") if len(data) == 8 else 0

    def pieces(self, start: int, size: int, overlap: int) -> Iterator[tuple[int, bytes]]:
        """The address and bytes of each piece, which reaches `overlap` bytes into the next; so the agent stays small."""
        for address in range(start, start + size, CHUNK):
            piece = self.upto(address, min(CHUNK + overlap, start + size - address))
            if not piece:
                return
            yield address, piece

    def search(self, pattern: re.Pattern[bytes], start: int, size: int, overlap: int = 128) -> re.Match[bytes] | None:
        """The first match, none of which is longer than `overlap`."""
        return next((found for _, piece in self.pieces(start, size, overlap) if (found := pattern.search(piece))), None)


@dataclass(frozen=True, slots=True)
class Section:
    """`kind` and `link` as in the ELF specification's sh_type and sh_link."""

    name: bytes
    kind: int
    address: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the file that is mapped executable; `size` is what of it lies in the file."""

    address: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Function:
    """By its symbol; `size` 0 where the symbol does not tell it."""

    address: int
    size: int


def sections(file: Bytes) -> list[Section]:
    """In their order, with the empty first; `strip` leaves them in. Raises Unreadable for what is no x86-64 ELF file."""
    head = _head(file)
    (table_at,) = struct.unpack_from("<Q", head, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", head, 58)
    if entry_size != 64 or names_index >= count:
        return []
    raw = file.upto(table_at, 64 * min(count, _MAX_SECTIONS))
    headers = list(struct.iter_unpack("<IIQQQQIIQQ", raw[: len(raw) & ~63]))
    if names_index >= len(headers):
        return []
    names = file.upto(headers[names_index][4], min(headers[names_index][5], 1 << 16))
    return [
        Section(names[name:].split(b"\0", 1)[0], kind, address, offset, size, link)
        for name, kind, _, address, offset, size, link, *_ in headers
    ]


def code(file: Bytes) -> list[Segment]:
    """The executable segments. Raises Unreadable for what is no x86-64 ELF file."""
    head = _head(file)
    (table_at,) = struct.unpack_from("<Q", head, 32)
    entry_size, count = struct.unpack_from("<HH", head, 54)
    if entry_size != 56:
        return []
    raw = file.upto(table_at, 56 * min(count, _MAX_SEGMENTS))
    rows = struct.iter_unpack("<IIQQQQQQ", raw[: len(raw) // 56 * 56])
    return [Segment(address, offset, size) for kind, flags, offset, address, _, size, _, _ in rows if kind == _PT_LOAD and flags & _PF_X]


def functions(file: Bytes, tables: list[Section], names: Collection[bytes]) -> dict[bytes, Function]:
    """Those of `names` that the file defines, exported or not. The exported one counts where a name occurs twice.

    Linear through both tables rather than by hash: other linkers write other hashes, and private names are in none.
    """
    found: dict[bytes, Function] = {}
    for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
        for table in tables:
            if table.kind == kind and table.link < len(tables) and len(found) < len(names):
                strings = tables[table.link]
                wanted = dict(islice(_name_offsets(file, strings, set(names) - found.keys()), _MAX_NAMES))
                if wanted:
                    found |= _defined(file, table, wanted)
    return found


def matching(file: Bytes, tables: list[Section], hint: bytes, pattern: re.Pattern[bytes]) -> dict[bytes, Function]:
    """Functions in the private symbol table whose name, at most 128 bytes and with `hint` in it, matches the pattern as a whole."""
    found: dict[bytes, Function] = {}
    for table in tables:
        if table.kind == _SHT_SYMTAB and table.link < len(tables):
            strings = tables[table.link]
            wanted = dict(islice(_matching_offsets(file, strings, hint, pattern), _MAX_NAMES))
            if wanted:
                found |= _defined(file, table, wanted)
    return found


def places(data: bytes, wanted: bytes) -> Iterator[int]:
    """Each offset at which it stands."""
    place = data.find(wanted)
    while place >= 0:
        yield place
        place = data.find(wanted, place + 1)


def _head(file: Bytes) -> bytes:
    head = file.upto(0, _HEAD)
    if len(head) != _HEAD or head[:6] != b"\x7fELF\x02\x01" or int.from_bytes(head[18:20], "little") != _EM_X86_64:
        raise Unreadable("not a 64-bit x86 program")
    return head


def _name_offsets(file: Bytes, strings: Section, names: set[bytes]) -> Iterator[tuple[int, bytes]]:
    """Where in the table each name stands. A linker lets a name be the end of a longer one, so what is before it does not matter."""
    longest = max(map(len, names)) + 1
    for at, piece in file.pieces(strings.offset, strings.size, longest):
        for name in names:
            yield from ((at + place - strings.offset, name) for place in places(piece, name + b"\0"))


def _matching_offsets(file: Bytes, strings: Section, hint: bytes, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
    for at, piece in file.pieces(strings.offset, strings.size, 256):
        names = _NAME.finditer(piece) if hint in piece else ()
        yield from ((at + each.start() - strings.offset, each[0]) for each in names if pattern.fullmatch(each[0]))


def _defined(file: Bytes, table: Section, wanted: dict[int, bytes]) -> dict[bytes, Function]:
    found: dict[bytes, Function] = {}
    step = CHUNK // _SYMBOL.size * _SYMBOL.size
    for start in range(0, table.size, step):
        piece = file.upto(table.offset + start, min(step, table.size - start))
        piece = piece[: len(piece) // _SYMBOL.size * _SYMBOL.size]
        if not piece:
            break
        # Only the names' column becomes numbers: a table may have hundreds of thousands of rows.
        for row, name_at in enumerate(array("I", piece)[:: _SYMBOL.size // 4]):
            if name_at in wanted:
                _, info, _, section, address, size = _SYMBOL.unpack_from(piece, row * _SYMBOL.size)
                if info & 15 == _STT_FUNC and section and address:
                    found.setdefault(wanted[name_at], Function(address, size))
    return found

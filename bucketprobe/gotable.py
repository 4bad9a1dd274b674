# SPDX-License-Identifier: Apache-2.0
"""Where a Go program's functions lie, by the table that Go's runtime itself uses (.gopclntab): it is there in stripped programs too.

The layout is that of Go's debug/gosym: each entry of a sorted table pairs a function's entry with the place of its record, and the
record holds the entry once more and the place of the name. So a name that was found leads to its record, and the table confirms it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from bucketprobe import elf

#: What the table begins with, by Go version: 1.16 and 1.17; 1.18 and 1.19; 1.20 and later.
_GO_1_16, _GO_1_18, _GO_1_20 = 0xFFFFFFFA, 0xFFFFFFF0, 0xFFFFFFF1
#: Two zeros, instructions that may begin anywhere, pointers of 8 bytes.
_MAGIC = re.compile(rb"[\xfa\xf0\xf1]\xff\xff\xff\0\0\x01\x08")
_HEADER = 72
_NAME_BYTES = 128
#: More are there to mislead.
_MAX_NAMES = 64


@dataclass(frozen=True, slots=True)
class Range:
    """A function, from `start` up to where the next one begins: bytes from the text's start, or addresses (Table.absolute)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Table:
    """`text_start`: as the file gives it, 0 where the linker left it out. Places are offsets in the file."""

    file: elf.Bytes
    absolute: bool
    text_start: int
    count: int
    names: int
    functions: int
    end: int

    def find(self, pattern: re.Pattern[bytes]) -> dict[bytes, Range]:
        """Functions whose name, at most 127 bytes, the pattern matches.

        The pattern begins with the zero before the name, and only looks for the one behind it, which is also the next name's.
        """
        found: dict[bytes, Range] = {}
        wanted = dict(islice(self._names(pattern), _MAX_NAMES))
        width = 8 if self.absolute else 4
        for at, piece in self.file.pieces(self.functions, self.end - self.functions, 16) if wanted else ():
            for name_at, name in wanted.items():
                for place in elf.places(piece, name_at.to_bytes(4, "little")):
                    confirmed = self._confirmed(at + place - width, width)
                    if confirmed:
                        found[name] = confirmed
        return found

    def _names(self, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
        for at, piece in self.file.pieces(self.names, self.functions - self.names, _NAME_BYTES):
            yield from ((at + each.start() + 1 - self.names, each[0][1:]) for each in pattern.finditer(piece))

    def _confirmed(self, record: int, width: int) -> Range | None:
        """The function whose record is at this offset, if the table says so too."""
        entry = int.from_bytes(self.file.upto(record, width), "little")
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            if self._row(middle, width)[0] < entry:
                low = middle + 1
            else:
                high = middle
        # The row after the last function is its end.
        if low < self.count and self._row(low, width) == (entry, record - self.functions):
            return Range(entry, self._row(low + 1, width)[0])
        return None

    def _row(self, index: int, width: int) -> tuple[int, int]:
        raw = self.file.read(self.functions + 2 * width * index, 2 * width)
        return int.from_bytes(raw[:width], "little"), int.from_bytes(raw[width:], "little")


def table(file: elf.Bytes, sections: list[elf.Section]) -> Table | None:
    """The program's table, or None where there is none whose layout is known."""
    for section in sections:
        if section.name.endswith(b".gopclntab"):
            return _table(file, section.offset, section.offset + section.size)
    # Other linkers put it among the data that they relocate.
    for section in sections:
        if section.name == b".data.rel.ro":
            for at, piece in file.pieces(section.offset, section.size, _HEADER):
                for match in _MAGIC.finditer(piece):
                    if found := _table(file, at + match.start(), section.offset + section.size):
                        return found
    return None


def _table(file: elf.Bytes, start: int, end: int) -> Table | None:
    head = file.upto(start, _HEADER)
    if len(head) != _HEADER or not _MAGIC.match(head):
        return None
    (magic,) = struct.unpack_from("<I", head)
    if magic == _GO_1_16:
        count, _, names, _, _, _, functions = struct.unpack_from("<7Q", head, 8)
        text_start = 0
    else:
        count, _, text_start, names, _, _, _, functions = struct.unpack_from("<8Q", head, 8)
    if not 0 < names < functions < end - start:
        return None
    return Table(file, magic == _GO_1_16, text_start, count, start + names, start + functions, end)

# SPDX-License-Identifier: Apache-2.0
"""Where members lie in the running kernel's structures, from its own BTF (Documentation/bpf/btf.rst).

No header of any kernel is consulted: one of another build would give wrong offsets silently.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Mapping
from pathlib import Path

from bucketprobe.errors import EnvironmentLack

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = 1, 3, 4, 5, 6, 13, 14, 15, 17, 19


class Btf:
    """The structures of one BTF blob. Raises EnvironmentLack for anything that is no little-endian BTF."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 24 or struct.unpack_from("<H", data)[0] != 0xEB9F:
            raise EnvironmentLack("The kernel's BTF cannot be read: run a kernel that was built with CONFIG_DEBUG_INFO_BTF.")
        header, type_at, type_size, string_at, string_size = struct.unpack_from("<IIIII", data, 4)
        self._strings = data[header + string_at : header + string_at + string_size]
        self._words = array.array("I")
        self._words.frombytes(data[header + type_at : header + type_at + type_size])
        self._places = [0]  # by type id; 0 is void
        self._walk()

    def _walk(self) -> None:
        words, place, end = self._words, 0, len(self._words)
        append = self._places.append
        while place < end:
            append(place)
            info = words[place + 1]
            kind = info >> 24 & 31
            if kind in (_STRUCT, _UNION, _DATASEC, _ENUM64):
                place += 3 + 3 * (info & 0xFFFF)
            elif kind in (_ENUM, _PROTO):
                place += 3 + 2 * (info & 0xFFFF)
            elif kind == _ARRAY:
                place += 6
            elif kind in (_INT, _VAR, _DECL_TAG):
                place += 4
            else:
                place += 3

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def has_string(self, text: str) -> bool:
        """Whether any type or member has exactly this name."""
        return f"\0{text}\0".encode() in self._strings

    def _find(self, name: str) -> int:
        words = self._words
        for place in self._places[1:]:
            if words[place + 1] >> 24 & 31 == _STRUCT and words[place + 1] & 0xFFFF and self._name(words[place]) == name:
                return place
        raise EnvironmentLack(f"The kernel's BTF has no struct {name}: this kernel cannot be observed; please report its release.")

    def _member(self, place: int, name: str) -> tuple[int, int] | None:
        """Byte offset and type place of a member, looked for in anonymous members too."""
        words = self._words
        info = words[place + 1]
        for i in range(info & 0xFFFF):
            name_at, type_id, bits = words[place + 3 + 3 * i : place + 6 + 3 * i]
            if info >> 31:
                bits &= 0xFFFFFF
            inner = self._resolve(type_id)
            if name_at:
                if self._name(name_at) == name:
                    return bits // 8, inner
            elif words[inner + 1] >> 24 & 31 in (_STRUCT, _UNION):
                found = self._member(inner, name)
                if found:
                    return bits // 8 + found[0], found[1]
        return None

    def _resolve(self, type_id: int) -> int:
        """The place of a type, with typedef, const and volatile taken off."""
        words = self._words
        while words[self._places[type_id] + 1] >> 24 & 31 in (8, 9, 10, 11):
            type_id = words[self._places[type_id] + 2]
        return self._places[type_id]

    def offset(self, structure: str, path: str) -> int:
        """Byte offset of a member (`a.b` for one of a member). Raises EnvironmentLack where there is none."""
        place, total = self._find(structure), 0
        for name in path.split("."):
            found = self._member(place, name)
            if not found:
                raise EnvironmentLack(f"The kernel's struct {structure} has no member {path}: please report this kernel's release.")
            total += found[0]
            place = found[1]
        return total


def offsets(wanted: Mapping[str, tuple[str, str]], path: Path = VMLINUX) -> dict[str, int]:
    """Byte offsets of the wanted members: name -> (struct, member path). Raises EnvironmentLack."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EnvironmentLack(
            f"{path} cannot be read ({error.strerror}): run a kernel that was built with CONFIG_DEBUG_INFO_BTF=y."
        ) from None
    btf = Btf(data)
    return {name: btf.offset(structure, member) for name, (structure, member) in wanted.items()}

# SPDX-License-Identifier: Apache-2.0
"""Bytes from the ring to events. The layout is abi's; a record of another length or kind is refused, never read past its end."""

from __future__ import annotations

import ctypes
from collections import namedtuple
from collections.abc import Iterator
from struct import Struct
from typing import Any

from bucketprobe import abi

_FORMATS: dict[type, str] = {abi.U8: "B", abi.U16: "H", abi.U32: "I", abi.U64: "Q", abi.S32: "i"}


class Undecodable(ValueError):
    """A record that is none of abi's events. Counted, not shown to people."""


def _fields(structure: type[ctypes.Structure]) -> Iterator[tuple[str, str]]:
    for name, ctype in abi.fields(structure):
        if issubclass(ctype, ctypes.Structure):
            yield from _fields(ctype)
        else:
            yield name, _FORMATS[ctype]


def _decoder(kind: abi.Kind) -> tuple[Struct, Any]:
    structure = abi.EVENTS[kind]
    names, formats = zip(*_fields(structure), strict=True)
    layout = Struct("=" + "".join(formats))
    if layout.size != ctypes.sizeof(structure):
        raise AssertionError(f"{structure.__name__} has implied padding")
    return layout, namedtuple(structure.__name__, (*names, "data"))


_DECODERS = {int(kind): _decoder(kind) for kind in abi.Kind}


def decode(record: bytes) -> Any:
    """The event of one record: a named tuple of its structure's fields (the header's first) and `data`, the bytes that follow.

    Raises Undecodable.
    """
    decoder = _DECODERS.get(record[0]) if record else None
    if decoder is None:
        raise Undecodable(f"kind {record[:1].hex()}")
    layout, make = decoder
    if len(record) < layout.size:
        raise Undecodable(f"{make.__name__} of {len(record)} bytes")
    return make(*layout.unpack_from(record), record[layout.size :])

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import abi, decode

BITS = {abi.U8: 8, abi.U16: 16, abi.U32: 32, abi.U64: 64}


def fields(structure) -> list[tuple[str, type]]:
    """Names and types, the header's first."""
    out = []
    for name, ctype in structure._fields_:
        out += fields(ctype) if issubclass(ctype, ctypes.Structure) else [(name, ctype)]
    return out


def values(kind: abi.Kind) -> st.SearchStrategy[dict[str, int]]:
    def number(ctype: type) -> st.SearchStrategy[int]:
        return st.integers(-(1 << 31), (1 << 31) - 1) if ctype is abi.S32 else st.integers(0, (1 << BITS[ctype]) - 1)

    drawn = {name: number(ctype) for name, ctype in fields(abi.EVENTS[kind])}
    return st.fixed_dictionaries(drawn | {"kind": st.just(int(kind))})


def encode(kind: abi.Kind, given_values: dict[str, int]) -> bytes:
    event = abi.EVENTS[kind]()
    for name, value in given_values.items():
        setattr(event.h if hasattr(event.h, name) else event, name, value)
    return bytes(event)


@pytest.mark.parametrize("kind", abi.Kind)
def test_every_kind_round_trips(kind: abi.Kind) -> None:
    @settings(deadline=None)
    @given(values(kind), st.binary(max_size=600))
    def check(drawn: dict[str, int], data: bytes) -> None:
        event = decode.decode(encode(kind, drawn) + data)
        assert event._asdict() == drawn | {"data": data}
        assert event._fields == (*(name for name, _ in fields(abi.EVENTS[kind])), "data")

    check()


@pytest.mark.parametrize("kind", abi.Kind)
def test_a_record_that_is_too_short_is_refused(kind: abi.Kind) -> None:
    whole = encode(kind, {"kind": int(kind)})
    for length in range(1, len(whole)):
        with pytest.raises(decode.Undecodable):
            decode.decode(whole[:length])


@pytest.mark.parametrize("record", [b"", b"\0" * 200, b"\xff" * 200, bytes([max(abi.Kind) + 1]) * 200])
def test_a_record_of_no_known_kind_is_refused(record: bytes) -> None:
    with pytest.raises(decode.Undecodable):
        decode.decode(record)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(abi.Kind))
def test_any_bytes_are_an_event_or_refused(record: bytes, kind: abi.Kind) -> None:
    for each in (record, bytes([kind]) + record):
        with suppress(decode.Undecodable):
            event = decode.decode(each)
            assert each.endswith(event.data)
            assert len(each) - len(event.data) == ctypes.sizeof(abi.EVENTS[event.kind])

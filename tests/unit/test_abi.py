# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import re
from enum import IntEnum

import pytest

from bucketprobe import abi, integrity, resolve, runtimes
from bucketprobe.model import OUTCOMES

ENTRIES = {spec.name: spec.entries for spec in abi.MAPS}
ENTRY_TYPES = {"fds": abi.FdEntry, "layouts": abi.LayoutEntry, "hashing": abi.HashingEntry}
STRUCTURES = [abi.Header, *abi.EVENTS.values(), *ENTRY_TYPES.values()]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.__name__)
def test_structures_have_no_holes_and_align_to_eight_bytes(structure) -> None:
    """A hole would carry bytes of the kernel's stack to user space, and a decoder that does not know of it would slip."""
    end = 0
    for name, _ in structure._fields_:
        assert getattr(structure, name).offset == end
        end += getattr(structure, name).size
    assert end == ctypes.sizeof(structure)
    assert end % 8 == 0


def test_every_event_begins_with_the_header() -> None:
    assert set(abi.EVENTS) == set(abi.Kind)
    assert all(structure._fields_[0] == ("h", abi.Header) for structure in abi.EVENTS.values())


def test_a_captured_piece_fits_its_length_field() -> None:
    largest = (1 << 8 * abi.Header.n.size) - 1
    assert max(abi.HEAD_BYTES, abi.PATH_BYTES) <= largest


def test_outcomes_are_the_models_in_its_order() -> None:
    assert [outcome.name.lower() for outcome in abi.EndOutcome] == list(OUTCOMES)


def test_counters_of_outcomes_follow_the_outcomes() -> None:
    """The kernel counts an end at COMPLETE plus its outcome."""
    assert [abi.Stat(abi.Stat.COMPLETE + outcome).name for outcome in abi.EndOutcome] == [outcome.name for outcome in abi.EndOutcome]


def test_places_fit_their_maps() -> None:
    assert max(abi.Stat) < ENTRIES["stats"]
    assert max(abi.Handler) < ENTRIES["handlers"]
    assert max(abi.Config) < ENTRIES["config"]
    assert max(number for calls in abi.CALLS.values() for number in calls.values()) < ENTRIES["calls"]


def test_a_call_has_one_handler() -> None:
    names = [name for calls in abi.CALLS.values() for name in calls]
    numbers = [number for calls in abi.CALLS.values() for number in calls.values()]
    assert len(set(names)) == len(names) == len(set(numbers))
    assert abi.Handler.NONE not in abi.CALLS


def test_map_names_are_such_that_the_kernel_takes_them_whole() -> None:
    assert len(set(ENTRIES)) == len(abi.MAPS)
    assert all(re.fullmatch(r"[a-z]{1,15}", name) for name in ENTRIES)


@pytest.mark.parametrize("flags", [abi.RequestFlag, abi.FileFlag])
def test_flags_are_single_bits(flags: type[IntEnum]) -> None:
    assert all(int(flag).bit_count() == 1 for flag in flags)
    assert len(flags.__members__) == len({int(flag) for flag in flags})


def test_what_says_that_work_is_one_requests_fits_every_field_that_says_it() -> None:
    """Of an open it is in a field of one byte."""
    assert abi.FileFlag.ALONE.bit_length() <= 8 * abi.Header.what.size


@pytest.mark.parametrize("name", ENTRY_TYPES)
def test_values_of_maps_that_both_sides_write_have_their_maps_size(name: str) -> None:
    [spec] = [spec for spec in abi.MAPS if spec.name == name]
    assert spec.value == ctypes.sizeof(ENTRY_TYPES[name])


def test_runtimes_have_the_numbers_that_the_kernel_goes_by() -> None:
    assert {kind.name: kind.value for kind in runtimes.Kind} == {kind.name: kind.value for kind in abi.Runtime}


def test_a_targets_byte_holds_its_runtime() -> None:
    """One bit says that it is one, the rest what runs in it."""
    assert 1 | max(abi.Runtime) << 1 < 1 << 8


def test_sets_of_pieces_are_the_same_on_both_sides() -> None:
    assert (resolve.TOKEN_WINDOW, resolve.TOKEN_BITS) == (abi.TOKEN_WINDOW, abi.TOKEN_BITS)
    assert abi.TOKEN_BITS == 1 << 12  # the kernel takes the upper 12 bits of a hash of 64
    assert (abi.TOKEN_BITS // 8).bit_length() <= 8 * abi.Header.n.size


def test_losses_are_counted_behind_what_is_no_loss() -> None:
    assert all(stat >= abi.Stat.RING_HEAD for stat in abi.Stat if stat.name.startswith(("RING_", "MAP_")))
    assert {abi.Stat.URING, abi.Stat.BEGUN} <= {stat for stat in abi.Stat if stat < abi.Stat.RING_HEAD}


def test_the_header_names_every_place_once() -> None:
    text = abi.render_header()
    names = re.findall(r"^\t([A-Z]+_[A-Z0-9_]+) = -?\d+,$", text, re.M) + re.findall(r"^#define (\w+) ", text, re.M)
    assert len(set(names)) == len(names)
    prefixes = {"EV", "DIR", "END", "RF", "FF", "PC", "PR", "RT", "FD", "ST", "PORT", "CFG", "H", "USE", "MAP", "NR"}
    assert prefixes == {name.split("_")[0] for name in names} - {"PATH", "HEAD", "PRINT", "TOKEN", "DIGEST"}
    assert text.count("_Static_assert(sizeof(struct ") == len(STRUCTURES)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.__name__)
def test_the_header_has_every_member_with_its_offset(structure) -> None:
    text = abi.render_header()
    for field, _ in abi.fields(structure):
        offset = getattr(structure, field).offset
        assert re.search(rf"_Static_assert\(__builtin_offsetof\(struct (\w+), {field}\) == {offset}, \"\1\.{field}\"\);", text)


def test_map_values_that_both_sides_write_are_in_the_header() -> None:
    text = abi.render_header()
    for name, members in (
        ("bp_fd_entry", "object kind not_served shared many pad"),
        ("bp_layout_entry", "slot member"),
        ("bp_hashing_entry", f"calls bytes ns copies digests bytes_hashed algorithm keeps value[{abi.DIGEST_BYTES}]"),
    ):
        [body] = re.findall(rf"struct {name} {{\n(.*?)\n}};", text, re.S)
        assert re.findall(r"(\w+(?:\[\d+\])?);", body) == members.split()


def test_the_longest_digest_that_is_known_fits() -> None:
    assert max(integrity.SIZES.values()) == abi.DIGEST_BYTES
    assert set(integrity.ALGORITHMS.values()) == set(integrity.SIZES)

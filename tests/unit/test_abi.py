# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import re

import pytest

from bucketprobe import abi
from bucketprobe.model import OUTCOMES

ENTRIES = {spec.name: spec.entries for spec in abi.MAPS}
STRUCTURES = [abi.Header, *abi.EVENTS.values()]


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


def test_request_flags_are_single_bits() -> None:
    assert all(flag.bit_count() == 1 for flag in abi.RequestFlag)
    assert len({int(flag) for flag in abi.RequestFlag}) == len(abi.RequestFlag)


def test_the_header_names_every_place_once() -> None:
    text = abi.render_header()
    names = re.findall(r"^\t([A-Z]+_[A-Z0-9_]+) = -?\d+,$", text, re.M) + re.findall(r"^#define (\w+) ", text, re.M)
    assert len(set(names)) == len(names)
    prefixes = {"EV", "DIR", "END", "RF", "PC", "PR", "FD", "ST", "PORT", "CFG", "H", "MAP", "NR"}
    assert prefixes == {name.split("_")[0] for name in names} - {"PATH", "HEAD"}
    assert text.count("_Static_assert(sizeof(struct ") == len(STRUCTURES)

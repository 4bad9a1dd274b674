# SPDX-License-Identifier: Apache-2.0
"""Offsets from BTF: a small blob made here, and the running kernel's."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bucketprobe import abi, btf
from bucketprobe.errors import EnvironmentLack

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST = range(1, 11)
FUNC, PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)


class Blob:
    """Builds BTF; types are numbered from 1 in the order in which they are added."""

    def __init__(self) -> None:
        self._strings = b"\0"
        self._types = b""
        self._count = 0

    def _text(self, text: str) -> int:
        if not text:
            return 0
        self._strings += text.encode() + b"\0"
        return len(self._strings) - len(text) - 1

    def add(self, kind: int, name: str = "", size_or_type: int = 0, extra: bytes = b"", entries: int = 0, flag: bool = False) -> int:
        info = int(flag) << 31 | kind << 24 | entries
        self._types += struct.pack("<III", self._text(name), info, size_or_type) + extra
        self._count += 1
        return self._count

    def structure(self, name: str, members: list[tuple[str, int, int]], kind: int = STRUCT, flag: bool = False) -> int:
        """Members as (name, type, byte offset); with `flag`, the offset's upper byte is a bit field's width."""
        packed = b"".join(struct.pack("<III", self._text(member), type_id, offset * 8 | flag << 24) for member, type_id, offset in members)
        return self.add(kind, name, 64, packed, len(members), flag)

    def bytes(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self._types), len(self._types), len(self._strings))
        return header + self._types + self._strings


def example() -> Blob:
    """Every kind of type once before the structures, so that walking past each is needed to find them."""
    blob = Blob()
    integer = blob.add(INT, "int", 4, struct.pack("<I", 32))
    blob.add(PTR, "", integer)
    blob.add(ARRAY, "", 0, struct.pack("<III", integer, integer, 4))
    blob.add(ENUM, "color", 4, struct.pack("<Ii", 0, 1) * 2, 2)
    blob.add(FWD, "later")
    blob.add(PROTO, "", integer, struct.pack("<II", 0, integer) * 3, 3)
    blob.add(FUNC, "f", 6)
    blob.add(VAR, "v", integer, struct.pack("<I", 1))
    blob.add(DATASEC, ".data", 8, struct.pack("<III", 8, 0, 8), 1)
    blob.add(FLOAT, "double", 8)
    blob.add(DECL_TAG, "tag", integer, struct.pack("<i", -1))
    blob.add(TYPE_TAG, "user", integer)
    blob.add(ENUM64, "wide", 8, struct.pack("<III", 0, 1, 0) * 2, 2)
    blob.structure("empty", [])
    common = blob.structure("sock_common", [("skc_family", integer, 16), ("skc_num", integer, 14)])
    alias = blob.add(TYPEDEF, "common_t", common)
    constant = blob.add(CONST, "", alias)
    changing = blob.add(VOLATILE, "", constant)
    inner = blob.structure("", [("deep", integer, 4), ("other", integer, 8)])
    union = blob.structure("", [("", inner, 0), ("flat", integer, 0)], UNION)
    blob.structure("sock", [("first", integer, 0), ("__sk_common", changing, 8), ("", union, 32), ("last", integer, 48)])
    blob.structure("bits", [("a", integer, 0), ("b", integer, 4)], flag=True)
    blob.structure("sock", [("shadow", integer, 0)])
    return blob


@pytest.fixture(scope="module")
def parsed() -> btf.Btf:
    return btf.Btf(example().bytes())


@pytest.mark.parametrize(
    ("structure", "path", "offset"),
    [
        ("sock", "first", 0),
        ("sock", "last", 48),
        ("sock", "__sk_common", 8),
        ("sock", "__sk_common.skc_num", 8 + 14),
        ("sock", "__sk_common.skc_family", 8 + 16),
        ("sock", "deep", 32 + 4),
        ("sock", "other", 32 + 8),
        ("sock", "flat", 32),
        ("sock_common", "skc_num", 14),
        ("bits", "b", 4),
    ],
)
def test_offsets(parsed: btf.Btf, structure: str, path: str, offset: int) -> None:
    assert parsed.offset(structure, path) == offset


@pytest.mark.parametrize("structure", ["nothing", "soc", "empty", "later", "color", "common_t"])
def test_what_is_no_struct_with_members_is_named(parsed: btf.Btf, structure: str) -> None:
    with pytest.raises(EnvironmentLack, match=f"no struct {structure}:"):
        parsed.offset(structure, "x")


@pytest.mark.parametrize("path", ["nothing", "las", "__sk_common.nothing", "nothing.skc_num"])
def test_a_member_that_is_missing_is_named(parsed: btf.Btf, path: str) -> None:
    with pytest.raises(EnvironmentLack, match=rf"struct sock has no member {path}:"):
        parsed.offset("sock", path)


def test_whether_a_name_exists(parsed: btf.Btf) -> None:
    assert parsed.has_string("skc_num")
    assert parsed.has_string("wide")
    assert not parsed.has_string("skc_nu")
    assert not parsed.has_string("kc_num")


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb", b"\xeb\x9f" + bytes(30), b"\x7fELF" + bytes(60)])
def test_what_is_no_btf_says_which_kernel_to_run(data: bytes) -> None:
    with pytest.raises(EnvironmentLack, match="CONFIG_DEBUG_INFO_BTF"):
        btf.Btf(data)


def test_a_kernel_without_btf_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLack, match=r"cannot be read \(No such file or directory\).*CONFIG_DEBUG_INFO_BTF"):
        btf.offsets({"X": ("a", "b")}, tmp_path / "vmlinux")


def test_several_offsets_at_once(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(example().bytes())
    wanted = {"OFF_A": ("sock", "last"), "OFF_B": ("sock", "__sk_common.skc_num")}
    assert btf.offsets(wanted, tmp_path / "vmlinux") == {"OFF_A": 48, "OFF_B": 22}


@pytest.mark.kernel
def test_the_running_kernels_offsets_are_plausible() -> None:
    more = {"OFF_TASK_PID": ("task_struct", "pid"), "OFF_SOCK_DPORT": ("sock", "__sk_common.skc_dport")}
    found = btf.offsets(abi.OFFSETS | more)
    assert found.keys() == abi.OFFSETS.keys() | more.keys()
    assert all(0 <= offset < 16384 for offset in found.values())
    # What the kernel's own headers fix: struct sock begins with sock_common, whose pairs of addresses and ports come first.
    assert found["OFF_SOCK_DPORT"] == 12
    assert found["OFF_SOCK_NUM"] == 14
    assert found["OFF_SOCK_FAMILY"] == 16
    assert found["OFF_SOCK_STATE"] == 18
    assert found["OFF_TASK_TGID"] == found["OFF_TASK_PID"] + 4
    assert found["OFF_FDT_MAX"] == 0
    assert found["OFF_FDT_FD"] == 8
    assert found["OFF_INODE_MODE"] == 0

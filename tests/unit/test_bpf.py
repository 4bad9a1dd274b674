# SPDX-License-Identifier: Apache-2.0
"""The ring's consumer against memory that is laid out as the kernel does; the rest against the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import abi, bpf

PAGE = mmap.PAGESIZE
BUSY, DISCARD = 1 << 31, 1 << 30

# --- The ring ----------------------------------------------------------------------------------------------------


class FakeRing:
    """A file with the layout of kernel/bpf/ringbuf.c: consumer's page, producer's page, the data, the data once more."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * size)
        self._memory = mmap.mmap(self.fd, 2 * PAGE + 2 * size)
        self.produced = 0

    @property
    def consumed(self) -> int:
        return int(struct.unpack_from("=Q", self._memory, 0)[0])

    def write(self, record: bytes, flags: int = 0) -> bool:
        """False where there is no room."""
        block = struct.pack("=II", len(record) | flags, 0) + record
        block += bytes(-len(block) % 8)
        if self.produced + len(block) - self.consumed > self.size:
            return False
        for offset, byte in enumerate(block):
            at = (self.produced + offset) % self.size
            self._memory[2 * PAGE + at] = self._memory[2 * PAGE + self.size + at] = byte
        self.produced += len(block)
        struct.pack_into("=Q", self._memory, PAGE, self.produced)
        return True

    def mark(self, position: int, flags: int, length: int) -> None:
        """Changes the header of the record that begins at `position`."""
        for copy in (0, self.size):
            struct.pack_into("=I", self._memory, 2 * PAGE + copy + position % self.size, length | flags)

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


@pytest.fixture
def fake() -> Iterator[FakeRing]:
    ring = FakeRing(PAGE)
    yield ring
    ring.close()


def test_records_come_in_order_and_their_room_is_given_back(fake: FakeRing) -> None:
    ring = bpf.Ring(fake.fd, fake.size)
    records = [b"a", b"", b"eight888", b"x" * 100]
    assert all(fake.write(record) for record in records)
    assert ring.backlog() == fake.produced
    assert ring.read() == records
    assert ring.read() == []
    assert ring.backlog() == 0
    assert fake.consumed == fake.produced
    ring.close()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=700), max_size=60), st.lists(st.integers(1, 10), min_size=1, max_size=5))
def test_any_records_come_whole_across_the_end_of_the_ring(records: list[bytes], limits: list[int]) -> None:
    fake = FakeRing(PAGE)
    ring = bpf.Ring(fake.fd, fake.size)
    read: list[bytes] = []
    turn = 0
    for record in records:
        while not fake.write(record):
            read += ring.read(limits[turn % len(limits)])
            turn += 1
    while more := ring.read(3):
        read += more
    assert read == records
    ring.close()
    fake.close()


def test_a_limit_leaves_the_rest(fake: FakeRing) -> None:
    ring = bpf.Ring(fake.fd, fake.size)
    for number in range(5):
        fake.write(bytes([number]))
    assert ring.read(2) == [b"\0", b"\1"]
    assert ring.backlog() == 3 * 16
    assert ring.read(2) == [b"\2", b"\3"]
    assert ring.read(2) == [b"\4"]
    ring.close()


def test_a_record_that_is_still_being_written_holds_those_behind_it(fake: FakeRing) -> None:
    ring = bpf.Ring(fake.fd, fake.size)
    fake.write(b"first")
    position = fake.produced
    fake.write(b"busy", BUSY)
    fake.write(b"last")
    assert ring.read() == [b"first"]
    assert ring.read() == []
    fake.mark(position, 0, 4)
    assert ring.read() == [b"busy", b"last"]
    ring.close()


def test_a_discarded_record_is_passed_over(fake: FakeRing) -> None:
    ring = bpf.Ring(fake.fd, fake.size)
    fake.write(b"first")
    fake.write(b"gone", DISCARD)
    fake.write(b"last")
    assert ring.read() == [b"first", b"last"]
    assert ring.backlog() == 0
    ring.close()


def test_a_consumer_goes_on_where_the_one_before_stopped(fake: FakeRing) -> None:
    before = bpf.Ring(fake.fd, fake.size)
    fake.write(b"one")
    fake.write(b"two")
    assert before.read(1) == [b"one"]
    before.close()
    after = bpf.Ring(fake.fd, fake.size)
    assert after.read() == [b"two"]
    after.close()


# --- The kernel --------------------------------------------------------------------------------------------------

#: r0 = 0; exit
NOTHING = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)


def number(value: int) -> bytes:
    return struct.pack("=I", value)


@pytest.fixture
def make_map() -> Iterator[Callable[..., int]]:
    made: list[int] = []

    def make(kind: int, key: int, value: int, entries: int, flags: int = 0) -> int:
        made.append(bpf.map_create(kind, key, value, entries, flags, "test"))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.mark.kernel
def test_a_hash_map(make_map: Callable[..., int]) -> None:
    fd = make_map(abi.HASH, 4, 8, 3)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert bpf.map_lookup(fd, number(1), 8) is None
    bpf.map_update(fd, number(1), b"11111111")
    bpf.map_update(fd, number(2), b"22222222", bpf.NOEXIST)
    bpf.map_update(fd, number(1), b"one-----")
    assert bpf.map_lookup(fd, number(1), 8) == b"one-----"
    assert sorted(bpf.map_keys(fd, 4, 100)) == [number(1), number(2)]
    assert len(list(bpf.map_keys(fd, 4, 1))) == 1
    assert bpf.map_delete(fd, number(1)) is True
    assert bpf.map_delete(fd, number(1)) is False
    assert list(bpf.map_keys(fd, 4, 100)) == [number(2)]


@pytest.mark.kernel
def test_an_empty_map_has_no_keys(make_map: Callable[..., int]) -> None:
    assert list(bpf.map_keys(make_map(abi.HASH, 8, 4, 10), 8, 100)) == []


@pytest.mark.kernel
def test_what_a_map_refuses_has_the_kernels_errno(make_map: Callable[..., int]) -> None:
    fd = make_map(abi.HASH, 4, 4, 1)
    bpf.map_update(fd, number(1), number(1))
    with pytest.raises(FileExistsError):
        bpf.map_update(fd, number(1), number(2), bpf.NOEXIST)
    with pytest.raises(OSError, match=r".+") as full:
        bpf.map_update(fd, number(2), number(2))
    assert full.value.errno == errno.E2BIG
    with pytest.raises(OSError, match=r".+") as closed:
        bpf.map_lookup(1 << 20, number(1), 4)
    assert closed.value.errno == errno.EBADF
    with pytest.raises(OSError, match=r".+") as nonsense:
        bpf.map_create(abi.HASH, 0, 0, 0)
    assert nonsense.value.errno == errno.EINVAL


@pytest.mark.kernel
def test_all_values_of_an_array(make_map: Callable[..., int]) -> None:
    fd = make_map(abi.ARRAY, 4, 8, 16)
    bpf.map_update(fd, number(3), b"33333333")
    bpf.map_update(fd, number(15), b"last----")
    assert bpf.array_values(fd, 16, 8) == bytes(24) + b"33333333" + bytes(88) + b"last----"


@pytest.mark.kernel
def test_all_values_of_an_array_for_each_cpu(make_map: Callable[..., int]) -> None:
    cpus = bpf.possible_cpus()
    fd = make_map(abi.PERCPU_ARRAY, 4, 8, 4)
    value = b"".join(struct.pack("=Q", cpu + 1) for cpu in range(cpus))
    bpf.map_update(fd, number(2), value)
    assert bpf.array_values(fd, 4, 8 * cpus) == bytes(16 * cpus) + value + bytes(8 * cpus)


@pytest.mark.kernel
@pytest.mark.parametrize("refusal", [errno.EINVAL, 524])
def test_all_values_one_by_one_where_the_kernel_knows_no_batch(
    make_map: Callable[..., int], monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    fd = make_map(abi.ARRAY, 4, 8, 3)
    bpf.map_update(fd, number(1), b"11111111")
    real = bpf._bpf

    def refuse(command: int, attribute: bytes) -> int:
        if command == bpf._LOOKUP_BATCH:
            raise OSError(refusal, "no such thing")
        return real(command, attribute)

    monkeypatch.setattr(bpf, "_bpf", refuse)
    assert bpf.array_values(fd, 3, 8) == bytes(8) + b"11111111" + bytes(8)


@pytest.mark.kernel
def test_a_refusal_to_look_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the agent can ask its broker."""

    def refuse(command: int, attribute: bytes) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(bpf, "_bpf", refuse)
    with pytest.raises(PermissionError):
        bpf.array_values(3, 3, 8)


@pytest.mark.kernel
def test_a_program_loads_and_attaches_while_it_is_held() -> None:
    program = bpf.program_load(NOTHING, "a_name_that_is_longer_than_fifteen")
    link = bpf.raw_tracepoint_open("sched_process_exit", program)
    with open(f"/proc/self/fdinfo/{link}", encoding="ascii") as info:
        assert "tp_name:\tsched_process_exit" in info.read()
    for fd in (link, program):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fd)


@pytest.mark.kernel
def test_a_program_that_the_verifier_refuses_says_why() -> None:
    with pytest.raises(OSError, match="R0 !read_ok"):
        bpf.program_load(NOTHING[8:], "no_result")


@pytest.mark.kernel
def test_what_a_program_is_for_is_told_to_the_kernel() -> None:
    program = bpf.program_load(NOTHING, "test", bpf.PROG_TYPE_KPROBE)
    with open(f"/proc/self/fdinfo/{program}", encoding="ascii") as info:
        assert f"prog_type:\t{bpf.PROG_TYPE_KPROBE}\n" in info.read()
    with pytest.raises(OSError, match=r".+") as error:
        bpf.raw_tracepoint_open("sched_process_exit", program)
    assert error.value.errno == errno.EINVAL
    os.close(program)


def test_how_a_program_will_be_attached_is_in_the_kernels_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """union bpf_attr: prog_type at 0, prog_name at 48, expected_attach_type at 68."""
    given_attributes: list[bytes] = []
    monkeypatch.setattr(bpf, "_bpf", lambda command, attribute: given_attributes.append(attribute) or 5)
    assert bpf.program_load(NOTHING, "name", bpf.PROG_TYPE_KPROBE, bpf.TRACE_UPROBE_MULTI) == 5
    assert bpf.program_load(NOTHING, "name") == 5
    multi, plain = given_attributes
    assert [struct.unpack_from("=I", multi, at)[0] for at in (0, 4, 68)] == [bpf.PROG_TYPE_KPROBE, 2, bpf.TRACE_UPROBE_MULTI]
    assert [struct.unpack_from("=I", plain, at)[0] for at in (0, 68)] == [bpf.PROG_TYPE_RAW_TRACEPOINT, 0]
    assert multi[48:64] == b"name".ljust(16, b"\0")


@pytest.mark.parametrize(
    ("answers", "has"),
    [
        ((errno.EBADF, errno.EINVAL), True),
        ((errno.EBADF, errno.EBADF), False),  # it looks at the file first: links keep to one thread there
        ((errno.EINVAL, errno.EINVAL), False),  # it knows no such link
        ((errno.ESRCH, errno.EINVAL), False),
    ],
)
def test_whether_one_link_can_have_many_places_is_told_by_what_the_kernel_refuses(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[int, int], has: bool
) -> None:
    left = list(answers)
    program = os.open(os.devnull, os.O_RDONLY)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(left.pop(0), "no")

    monkeypatch.setattr(bpf, "program_load", lambda *_: program)
    monkeypatch.setattr(bpf, "uprobe_multi_open", refuse)
    assert bpf.has_uprobe_multi() is has
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(program)


def test_a_kernel_that_refuses_the_program_has_no_such_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(bpf, "program_load", refuse)
    assert bpf.has_uprobe_multi() is False


@pytest.mark.kernel
@pytest.mark.parametrize("multi", [True, False])
def test_a_uprobe_of_a_process_that_is_gone_or_a_file_that_is_none_is_refused(multi: bool) -> None:
    if multi and not bpf.has_uprobe_multi():
        pytest.skip("this kernel has no links with many places")
    program = bpf.program_load(NOTHING, "test", bpf.PROG_TYPE_KPROBE, bpf.TRACE_UPROBE_MULTI if multi else 0)

    def attach(path: str, tgid: int) -> int:
        if multi:
            return bpf.uprobe_multi_open(program, path, [0], tgid, returns=False)
        return bpf.uprobe_open(program, path, 0, tgid, returns=False)

    before = len(os.listdir("/proc/self/fd"))
    for path, tgid in (("/bin/true", 4_000_001), ("/nonexistent/file", os.getpid())):
        with pytest.raises(OSError, match=r".+") as error:
            attach(path, tgid)
        assert error.value.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(program)


@pytest.mark.kernel
def test_a_tracepoint_that_does_not_exist() -> None:
    program = bpf.program_load(NOTHING, "test")
    with pytest.raises(FileNotFoundError):
        bpf.raw_tracepoint_open("no_such_tracepoint", program)
    os.close(program)


@pytest.mark.kernel
def test_records_of_a_real_program_come_through_a_real_ring(make_map: Callable[..., int]) -> None:
    """For each process that ends: r0 = ring_output(ring, &its eight bytes on the stack, 8, 0)."""
    size = PAGE
    ring_fd = make_map(abi.RINGBUF, 0, 0, size)

    def instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
        return struct.pack("<BBhi", opcode, src << 4 | dst, offset, immediate)

    code = b"".join(
        (
            instruction(0x7A, 10, 0, -8, 0x1234),  # *(u64 *)(fp - 8) = 0x1234
            instruction(0x18, 1, 1, 0, ring_fd) + instruction(0),  # r1 = the map
            instruction(0xBF, 2, 10),
            instruction(0x07, 2, 0, 0, -8),  # r2 = fp - 8
            instruction(0xB7, 3, 0, 0, 8),
            instruction(0xB7, 4, 0, 0, 0),
            instruction(0x85, 0, 0, 0, 130),
            instruction(0xB7),
            instruction(0x95),
        )
    )
    program = bpf.program_load(code, "test")
    link = bpf.raw_tracepoint_open("sched_process_exit", program)
    ring = bpf.Ring(ring_fd, size)
    count = 0
    for _ in range(400):  # the ring holds 256 of them: it is gone through more than once
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        records = ring.read()
        assert set(records) <= {struct.pack("=Q", 0x1234)}
        count += len(records)
    assert count >= 400
    ring.close()
    os.close(link)
    os.close(program)


def test_the_number_of_cpus() -> None:
    assert bpf.possible_cpus() >= (os.cpu_count() or 1)

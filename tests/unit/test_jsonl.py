# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import pty
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe.errors import UsageError
from bucketprobe.exporters.jsonl import CAUSES, JsonLines, open_records
from bucketprobe.model import Request


def request(number: int, route: str = "/v1/{bucket_id}/{artifact_id}") -> Request:
    return Request(id=f"r{number}", conn="c", pid=1, wall_ns=0, start_ns=0, end_ns=5, operation="write", outcome="complete", route=route)


LINE = len(orjson.dumps(request(1000).record())) + 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def numbers(data: bytes) -> list[int]:
    """The records' numbers; fails for a torn line."""
    assert not data or data.endswith(b"\n")
    return [int(orjson.loads(line)["id"][1:]) for line in data.splitlines()]


class Output:
    """A JsonLines and what it said."""

    def __init__(self, fd: int, **arguments) -> None:
        self.told: list[str] = []
        self.clock = Clock()
        self.lines = JsonLines(fd, "the file", self.told.append, clock=self.clock, **arguments)
        self.given = 0

    def give(self, count: int, **fields: str) -> None:
        for _ in range(count):
            self.lines.write(request(self.given, **fields))
            self.given += 1

    def accounts_hold(self) -> bool:
        return self.given == self.lines.written + sum(self.lines.lost.values()) + self.lines.pending


def test_records_are_lines_in_order(tmp_path) -> None:
    path = tmp_path / "records"
    out = Output(open_records(str(path)))
    out.give(3)
    assert path.read_bytes() == b""
    out.lines.flush()
    out.give(2)
    out.lines.close()
    assert numbers(path.read_bytes()) == [0, 1, 2, 3, 4]
    assert orjson.loads(path.read_bytes().splitlines()[0]) == request(0).record()
    assert (out.lines.written, out.lines.lost, out.told) == (5, dict.fromkeys(CAUSES, 0), [])


def test_the_file_is_appended_to_and_private(tmp_path) -> None:
    path = tmp_path / "records"
    for _ in range(2):
        out = Output(open_records(str(path)))
        out.give(1)
        out.lines.close()
    assert numbers(path.read_bytes()) == [0, 0]
    assert path.stat().st_mode & 0o777 == 0o640 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_line_torn_by_a_crash_is_ended_first(tmp_path) -> None:
    path = tmp_path / "records"
    path.write_bytes(b'{"id":"r')
    out = Output(open_records(str(path)))
    out.give(1)
    out.lines.close()
    assert path.read_bytes().startswith(b'{"id":"r\n{')
    assert numbers(path.read_bytes().split(b"\n", 1)[1]) == [0]


def test_what_cannot_be_opened_is_one_sentence(tmp_path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("link", "symbolic link"), ("no/file", "No such file"), (".", "directory"), ("fifo", "No such device")):
        with pytest.raises(UsageError, match=f"{reason}.*standard output"):
            open_records(str(tmp_path / name))


def test_a_full_buffer_is_flushed_early_on_a_file_that_takes_it(tmp_path) -> None:
    out = Output(open_records(str(tmp_path / "records")), max_buffer=3 * LINE)
    out.give(20)
    out.lines.close()
    assert out.lines.written == 20


def test_a_record_that_is_not_unicode_is_counted(tmp_path) -> None:
    out = Output(open_records(str(tmp_path / "records")))
    out.give(1, route="\udcff")
    out.give(1)
    out.lines.close()
    assert out.lines.lost["unencodable"] == 1
    assert numbers((tmp_path / "records").read_bytes()) == [1]


# --- full disk ---------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "bucketprobe-test", folder], check=True)
    yield folder
    # Lazily, so that a test that fails with the file open leaves no mount behind.
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("how", ["path", "shell redirection"])
def test_a_full_disk(small_disk, how) -> None:
    path, filler = small_disk / "records", small_disk / "filler"
    filler.write_bytes(b"x" * 30_000)
    fd = open_records(str(path)) if how == "path" else os.open(path, os.O_WRONLY | os.O_CREAT)
    out = Output(fd, max_buffer=20 * LINE)
    for _ in range(40):
        out.give(5)
        out.lines.flush()
    fitted = numbers(path.read_bytes())
    assert fitted == list(range(out.lines.written))
    assert 0 < out.lines.written < 200
    assert out.lines.lost["no_space"] > 0
    assert out.accounts_hold()
    assert len(out.told) == 1
    assert "No space left on device" in out.told[0]

    out.clock.now += 2
    out.lines.flush()  # still full: nothing torn, nothing said
    assert numbers(path.read_bytes()) == fitted
    assert len(out.told) == 1

    filler.unlink()
    out.lines.flush()  # before the second is over
    assert numbers(path.read_bytes()) == fitted
    out.clock.now += 2
    out.lines.flush()
    out.give(1)
    out.lines.close()
    after = numbers(path.read_bytes())
    assert after[: len(fitted)] == fitted
    assert after == sorted(set(after))
    assert after[-1] == 200
    assert len(after) == out.lines.written == out.given - out.lines.lost["no_space"]
    assert out.told[1:] == [f"Records go to the file again; {out.lines.lost['no_space']} were lost meanwhile."]


def test_ending_on_a_full_disk_leaves_whole_lines_and_true_counts(small_disk) -> None:
    path = small_disk / "records"
    out = Output(open_records(str(path)))
    out.give(300)
    out.lines.close()
    assert numbers(path.read_bytes()) == list(range(out.lines.written))
    assert out.lines.written + out.lines.lost["no_space"] == 300
    assert out.lines.lost["no_space"] > 0


def test_starting_on_a_full_disk(small_disk) -> None:
    (small_disk / "filler").write_bytes(b"x" * 65_536)
    out = Output(open_records(str(small_disk / "records")))
    out.give(2)
    out.lines.flush()
    assert (out.lines.written, out.lines.pending, len(out.told)) == (0, 2, 1)
    (small_disk / "filler").unlink()
    out.lines.close()
    assert numbers((small_disk / "records").read_bytes()) == [0, 1]
    assert out.told[1] == "Records go to the file again; 0 were lost meanwhile."


def test_where_cutting_is_refused_the_line_is_finished_later(small_disk, monkeypatch) -> None:
    path, filler = small_disk / "records", small_disk / "filler"
    filler.write_bytes(b"x" * 30_000)

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "ftruncate", refuse)
    out = Output(open_records(str(path)))
    fit = 60_000 // LINE  # without the filler
    out.give(fit)
    out.lines.flush()
    assert 0 < out.lines.written < fit
    assert not path.read_bytes().endswith(b"\n")
    filler.unlink()
    out.clock.now += 2
    out.lines.flush()
    assert numbers(path.read_bytes()) == list(range(fit))
    assert out.lines.written == fit
    out.lines.close()


def test_rotation_takes_a_line_that_was_torn_whole_to_the_new_file(small_disk, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: os.close(-1))  # raises OSError
    out = Output(open_records(str(small_disk / "records")))
    out.give(200)
    out.lines.flush()
    before = out.lines.written
    out.lines.reopen(open_records(str(tmp_path / "new")))
    out.lines.close()
    assert numbers((tmp_path / "new").read_bytes()) == list(range(before, 200))
    assert out.lines.written == 200


# --- other failures ----------------------------------------------------------


def test_an_io_error_is_told_once_and_outlived(tmp_path, monkeypatch) -> None:
    out = Output(open_records(str(tmp_path / "records")), max_buffer=5 * LINE)

    def fail(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        for _ in range(10):
            out.give(1)
            out.lines.flush()
            out.clock.now += 1.5
    assert out.lines.lost["io_error"] > 0
    assert out.accounts_hold()
    assert len(out.told) == 1
    assert "Input/output error" in out.told[0]
    out.lines.flush()
    assert numbers((tmp_path / "records").read_bytes()) == list(range(out.lines.written))
    assert len(out.told) == 2


@given(st.lists(st.integers(1, 3 * LINE) | st.sampled_from([errno.ENOSPC, errno.EIO]).map(lambda number: -number), max_size=40))
def test_short_writes_and_failures_in_any_order(steps: list[int]) -> None:
    """Whatever a file's writes do, what is in the file after each flush is whole lines, each record once, in order."""
    fd = os.memfd_create("records", 0)
    seen = os.dup(fd)
    out = Output(fd, max_buffer=4 * LINE)
    plan = iter(steps)
    real = os.write

    def write(fd: int, data: bytes) -> int:
        step = next(plan, 1 << 30)
        if step < 0:
            raise OSError(-step, "planned")
        return real(fd, bytes(data[:step]))

    os.write = write
    try:
        for _ in range(12):
            out.give(2)
            out.lines.flush()
            out.clock.now += 1
            written = numbers(os.pread(seen, 1 << 20, 0))
            assert len(written) == out.lines.written
            assert written == sorted(set(written))
            assert out.accounts_hold()
        out.lines.close()
    finally:
        os.write = real
    assert out.lines.pending == 0
    assert len(numbers(os.pread(seen, 1 << 20, 0))) == out.lines.written
    os.close(seen)


def test_rotation(tmp_path) -> None:
    path = tmp_path / "records"
    out = Output(open_records(str(path)))
    out.give(2)
    path.rename(tmp_path / "old")
    out.give(1)
    out.lines.reopen(open_records(str(path)))
    out.give(2)
    out.lines.close()
    assert numbers((tmp_path / "old").read_bytes()) == [0, 1, 2]
    assert numbers(path.read_bytes()) == [3, 4]


def test_descriptors_are_closed(tmp_path) -> None:
    before = os.listdir("/proc/self/fd")
    out = Output(open_records(str(tmp_path / "a")))
    out.lines.reopen(open_records(str(tmp_path / "b")))
    out.lines.close()
    assert os.listdir("/proc/self/fd") == before


# --- pipes -------------------------------------------------------------------


def test_a_slow_reader_blocks_nothing_and_costs_whole_records() -> None:
    reader, writer = os.pipe()
    out = Output(writer, max_buffer=50 * LINE)
    begun = time.monotonic()
    for _ in range(100):
        out.give(10)
        out.lines.flush()
    assert time.monotonic() - begun < 5
    assert out.lines.lost["backlog"] > 0
    assert out.accounts_hold()
    assert out.told == []
    pieces: list[bytes] = []
    thread = threading.Thread(target=lambda: pieces.extend(iter(lambda: os.read(reader, 65536), b"")))
    thread.start()
    time.sleep(0.1)
    out.lines.close()
    thread.join()
    os.close(reader)
    assert len(numbers(b"".join(pieces))) == out.lines.written
    assert out.lines.lost["backlog"] + out.lines.lost["closed"] + out.lines.written == 1000


def test_ending_with_a_stuck_reader_tears_no_line() -> None:
    reader, writer = os.pipe()
    out = Output(writer)
    out.lines._clock = time.monotonic
    out.give(300)
    begun = time.monotonic()
    out.lines.close()
    assert 0.5 < time.monotonic() - begun < 5
    data = os.read(reader, 1 << 20)
    os.close(reader)
    assert len(numbers(data)) == out.lines.written
    assert out.lines.written + out.lines.lost["closed"] == 300


def test_a_line_longer_than_a_pipes_atomic_write() -> None:
    reader, writer = os.pipe()
    out = Output(writer)
    for _ in range(3):
        out.give(1, route="x" * 10_000)
        out.give(1)
    out.lines.close()
    with open(reader, "rb") as pipe:
        assert numbers(pipe.read()) == list(range(6))


@pytest.mark.parametrize("make", [os.pipe, lambda: tuple(end.detach() for end in socket.socketpair())], ids=["pipe", "socket"])
def test_a_reader_that_is_gone_ends_the_exporter_only(make, tmp_path) -> None:
    reader, writer = make()
    out = Output(writer)
    os.close(reader)
    out.give(3)
    out.lines.flush()
    out.give(2)
    out.lines.flush()
    assert out.lines.ended
    assert out.lines.lost["closed"] == 5
    assert len(out.told) == 1
    assert "agent goes on" in out.told[0]
    out.lines.reopen(open_records(str(tmp_path / "records")))
    out.give(1)
    out.lines.close()
    assert numbers((tmp_path / "records").read_bytes()) == [5]


STDOUT = textwrap.dedent(
    """
    import os, sys
    from bucketprobe.exporters.jsonl import JsonLines, open_records
    from bucketprobe.model import Request
    out = JsonLines(open_records("-"), "standard output", lambda text: print(text, file=sys.stderr))
    for number in range(int(sys.argv[1])):
        out.write(Request(id=f"r{number}", conn="c", pid=1, wall_ns=0, start_ns=0, end_ns=5, operation="write", outcome="complete"))
        out.flush()
    out.close()
    print(os.get_blocking(1), out.written, sum(out.lost.values()), file=sys.stderr)
    """
)


def run(stdout: int, count: int = 100) -> str:
    command = [sys.executable, "-c", STDOUT, str(count)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=True).stderr


def test_stdout_as_pipe_file_and_device(tmp_path) -> None:
    reader, writer = os.pipe()
    assert run(writer, 20) == "True 20 0\n"
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert numbers(pipe.read()) == list(range(20))
    with open(tmp_path / "out", "wb") as out:
        out.write(b'{"id":"r7"}\n')
        out.flush()
        assert run(out.fileno()) == "True 100 0\n"
    assert numbers((tmp_path / "out").read_bytes()) == [7, *range(100)]
    assert run(subprocess.DEVNULL) == "True 100 0\n"


def test_stdout_as_a_terminal_nobody_reads() -> None:
    primary, secondary = pty.openpty()
    told = run(secondary, 3000).split()
    assert told[0] == "True"
    assert int(told[1]) + int(told[2]) == 3000
    assert int(told[2]) > 0
    os.close(primary)
    os.close(secondary)


def test_a_full_device_is_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        told = run(full.fileno(), 5).splitlines()
    assert told[0].startswith("Cannot write records to standard output (No space left on device)")
    assert told[1] == "True 0 5"

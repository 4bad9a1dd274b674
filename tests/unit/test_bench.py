# SPDX-License-Identifier: Apache-2.0
"""The bench's statistics, its table and JSON, and how it reads /proc. Nothing is measured here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).parents[1] / "bench"


def module(name: str) -> ModuleType:
    """A file of the bench, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


figures = module("figures")
host = module("host")

numbers = st.floats(0.001, 1e9)


# --- statistics ---


def test_a_figure_is_the_median_with_its_extremes() -> None:
    figure = figures.Figure("x", "s", (3.0, 1.0, 2.0, 10.0))
    assert (figure.median, figure.low, figure.high) == (2.5, 1.0, 10.0)


@pytest.mark.parametrize(("goal", "reached"), [(None, None), (2.0, True), (1.9, False)])
def test_the_median_decides_whether_a_goal_is_reached(goal: float | None, reached: bool | None) -> None:
    assert figures.Figure("x", "s", (1.0, 2.0, 9.0), goal).reached is reached


def test_each_pair_is_compared_with_itself() -> None:
    # The host becomes twice as slow for the second pair; the means of both arms would say something else.
    pairs = [(100.0, 90.0), (50.0, 45.0)]
    assert figures.ratios(pairs) == [0.9, 0.9]
    assert figures.differences(pairs) == [-10.0, -5.0]


@given(st.lists(st.tuples(numbers, numbers), min_size=1))
def test_ratios_and_differences_agree_on_who_is_larger(pairs: list[tuple[float, float]]) -> None:
    for ratio, difference in zip(figures.ratios(pairs), figures.differences(pairs), strict=True):
        assert (ratio > 1) == (difference > 0) or ratio == 1


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_the_order_alternates_and_each_pair_has_both(pairs: int) -> None:
    orders = list(figures.alternate(pairs))
    assert len(orders) == pairs
    assert all(set(order) == {False, True} for order in orders)
    assert all(before[1] == after[0] for before, after in pairwise(orders))


# --- table and JSON ---


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.9534, "0.953"), (-0.5, "-0.500"), (12.345, "12.35"), (-123.45, "-123.5"), (1927.17, "1,927"), (9.9999, "10.000")],
)
def test_numbers_are_as_exact_as_the_bench_is(value: float, text: str) -> None:
    assert figures.number_text(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(100, "100 B"), (1000, "1000 B"), (8192, "8 KiB"), (1 << 20, "1 MiB"), (1 << 30, "1 GiB"), (1536, "1536 B")]
)
def test_sizes_are_exact(size: int, text: str) -> None:
    assert figures.size_text(size) == text


def two_parts() -> list[Any]:
    ready = figures.Part("ready", "five times")
    ready.add("cold", "s", [0.6, 1.1, 0.9], 0.7)
    ready.add("a rather long name", "ms", [1234.5])
    return [ready, figures.Part("cpu", error="no gcc"), figures.Part("syscalls", pairs=9, disturbed=2)]


def test_the_table_lines_up() -> None:
    lines = figures.table(two_parts()).splitlines()
    header, cold, once = lines[0], lines[3], lines[4]
    assert lines[2] == "ready: five times"
    assert cold.split() == ["cold", "0.900", "0.600", "1.100", "3", "s", "<=", "0.7:", "missed"]
    assert once.split() == ["a", "rather", "long", "name", "1,234", "1", "ms"]
    median = header.index("median") + len("median")
    assert cold[:median].endswith("0.900")
    assert once[:median].endswith("1,234")
    assert cold.index(" s ") + 1 == once.index(" ms") + 1 == header.index("unit")
    assert cold.index("<=") == header.index("goal")


def test_the_table_says_what_failed_and_what_was_disturbed() -> None:
    text = figures.table(two_parts())
    assert "  failed: no gcc\n" in text
    assert "(2 of 9 pairs: another program traced" in text


def test_the_document_is_json_with_every_sample() -> None:
    read = json.loads(json.dumps(figures.document(two_parts(), {"kernel": "6.1", "revision": None})))
    assert read["host"] == {"kernel": "6.1", "revision": None}
    assert list(read["parts"]) == ["ready", "cpu", "syscalls"]
    assert read["parts"]["cpu"]["error"] == "no gcc"
    assert read["parts"]["ready"]["figures"][0] == {
        "name": "cold",
        "unit": "s",
        "median": 0.9,
        "min": 0.6,
        "max": 1.1,
        "n": 3,
        "samples": [0.6, 1.1, 0.9],
        "goal": 0.7,
        "reached": False,
    }


# --- the host ---


def test_memory_is_read_in_bytes() -> None:
    text = "Name:\tpython\nVmHWM:\t   30012 kB\nVmRSS:\t   29000 kB\nThreads:\t2\n"
    assert host.kilobytes(text, ("VmRSS", "VmHWM")) == [29_696_000, 30_732_288]
    with pytest.raises(KeyError):
        host.kilobytes(text, ("Pss",))


def test_the_cpu_is_named_or_unknown() -> None:
    assert host.cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"
    assert host.cpu_model("processor\t: 0\nBogoMIPS\t: 100\n") == "unknown"


@pytest.mark.parametrize(("path", "kind"), [("/dev/shm/a", "tmpfs"), ("/dev/shmoo", "devtmpfs"), ("/home", "ext4"), ("/", "ext4")])
def test_the_innermost_mount_holds_a_path(path: str, kind: str) -> None:
    mounts = "/dev/vda / ext4 rw 0 0\nnone /dev devtmpfs rw 0 0\nnone /dev/shm tmpfs rw 0 0\n"
    assert host.file_system(Path(path), mounts) == kind


def test_a_later_mount_covers_an_earlier_one() -> None:
    assert host.file_system(Path("/a/b"), "x / overlay rw 0 0\ny / ext4 rw 0 0\n") == "ext4"


def test_the_cpu_clock_of_another_process_counts_what_it_does() -> None:
    code = "import sys\nsum(range(3_000_000))\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        busy = host.cpu_ns(process.pid)
        time.sleep(0.2)
        idle = host.cpu_ns(process.pid) - busy
        process.stdin.close()
    assert busy > 5_000_000
    assert idle < busy / 2


def test_own_cpu_clock_is_process_time() -> None:
    before = time.process_time_ns()
    assert before <= host.cpu_ns(os.getpid()) <= time.process_time_ns()


def test_the_cpu_clock_of_no_process_is_an_error() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(OSError, match="Invalid argument"):
        host.cpu_ns(process.pid)


def add_link(proc: Path, pid: int, fd: int, points_to: str, tracepoint: str | None) -> None:
    for name in ("fd", "fdinfo"):
        (proc / str(pid) / name).mkdir(parents=True, exist_ok=True)
    (proc / str(pid) / "fd" / str(fd)).symlink_to(points_to)
    named = f"tp_name:\t{tracepoint}\n" if tracepoint else ""
    (proc / str(pid) / "fdinfo" / str(fd)).write_text(f"pos:\t0\nlink_type:\traw_tracepoint\nlink_id:\t4\n{named}")


def test_tracers_of_every_system_call_are_found(tmp_path: Path) -> None:
    add_link(tmp_path, 10, 3, "anon_inode:bpf_link", "sched_process_exec")
    add_link(tmp_path, 11, 3, "anon_inode:bpf_link", "sched_process_exec")
    add_link(tmp_path, 11, 4, "anon_inode:bpf_link", "sys_enter")
    add_link(tmp_path, 12, 5, "anon_inode:bpf_link", "sys_exit")
    add_link(tmp_path, 13, 5, "/tmp/sys_enter", "sys_enter")
    add_link(tmp_path, 14, 5, "anon_inode:bpf_link", None)
    (tmp_path / "15").mkdir()
    (tmp_path / "self").mkdir()
    assert host.system_call_tracers(tmp_path) == {11, 12}


def test_git_of_no_repository_is_none(tmp_path: Path) -> None:
    assert host.git(tmp_path, "rev-parse", "HEAD") is None


# --- the call ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "ready,speed"], "--only has no part 'speed': choose from syscalls, ready, memory, cpu, throughput."),
        (["--store", "/nowhere"], "--store /nowhere cannot be used (No such file or directory): name an existing folder."),
    ],
)
def test_a_wrong_call_gets_one_sentence(arguments: list[str], sentence: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH / "bench.py"), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"bench: {sentence}\n")

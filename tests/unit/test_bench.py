# SPDX-License-Identifier: Apache-2.0
"""The bench's statistics, its tables and JSON, how it reads /proc and /metrics, and how it plays a recording.

Nothing that is measured here counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import abi
from bucketprobe.config import StorageSpec
from bucketprobe.errors import BucketprobeError
from bucketprobe.resolve import File, Live, Names, Process, Unit

BENCH = Path(__file__).parents[1] / "bench"


def module(name: str) -> ModuleType:
    """A file of the bench, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    sys.path.insert(0, str(BENCH))  # its scripts import each other
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(BENCH))
    return loaded


figures = module("figures")
digest = module("digest")
host = module("host")
readme_table = module("readme_table")
replay = module("replay")
resolver = module("resolver")
rig = module("rig")
uploads = module("uploads")

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


#: What two servers spend and do besides what is measured: the second is a tenth dearer.
FIRST, SECOND = (100.0, 10.0), (110.0, 10.0)


def test_what_two_servers_differ_by_cancels_out_when_they_change_places() -> None:
    def dearer(spent: tuple[float, float]) -> tuple[float, float]:
        return 1.02 * spent[0], spent[1]

    stages = [[(FIRST, dearer(SECOND))] * 3, [(SECOND, dearer(FIRST))] * 3]
    assert figures.relative(stages) == pytest.approx(1.02)
    assert figures.relative(stages[:1]) == pytest.approx(1.02 * 1.1)
    assert digest.crossed(stages) == pytest.approx([1.02] * 3)


def test_what_comes_seldom_counts_in_full() -> None:
    pairs = [((10.0, 1.0), (10.0, 1.0))] * 9 + [((10.0, 1.0), (20.0, 1.0))]
    assert figures.relative([pairs]) == pytest.approx(1.1)


def test_a_long_round_counts_by_its_work() -> None:
    assert figures.relative([[((10.0, 1.0), (10.0, 1.0)), ((90.0, 9.0), (180.0, 9.0))]]) == pytest.approx(1.9)


costs = st.tuples(st.floats(1, 100), st.floats(1, 100))


@settings(max_examples=10)
@given(st.lists(st.lists(st.tuples(costs, costs), min_size=2, max_size=5), min_size=1, max_size=2))
def test_an_interval_is_around_nothing_that_was_not_seen(stages: list[list[tuple[Any, Any]]]) -> None:
    _, low, high = figures.relative_interval(stages)
    costs_per_work = [cost / work for pairs in stages for pair in pairs for cost, work in pair]
    assert low <= high
    assert min(costs_per_work) / max(costs_per_work) <= low * 1.0001
    assert high <= max(costs_per_work) / min(costs_per_work) * 1.0001
    assert figures.relative_interval(stages) == figures.relative_interval(stages)


def test_an_interval_gets_narrower_with_more_pairs_and_covers_what_is_true() -> None:
    draw = random.Random(7)

    def stage(pairs: int) -> list[tuple[Any, Any]]:
        return [((draw.gauss(100, 3), 1.0), (draw.gauss(101, 3), 1.0)) for _ in range(pairs)]

    (_, few_low, few_high), (_, low, high) = (figures.relative_interval([stage(pairs), stage(pairs)]) for pairs in (5, 80))
    assert high - low < few_high - few_low
    covered = 0
    for _ in range(20):
        _, below, above = figures.relative_interval([stage(15), stage(15)])
        covered += below <= 1.01 <= above
    assert covered >= 15  # of 19 that are expected


def test_equal_costs_have_no_spread() -> None:
    assert figures.relative_interval([[(FIRST, FIRST)] * 4]) == (1.0, 1.0, 1.0)


def test_the_largest_share_of_any_stretch_is_found() -> None:
    readings = [(0.0, 0.0, 0.0), (1.0, 0.1, 1.0), (2.0, 0.6, 2.0), (3.0, 0.6, 3.0), (4.0, 0.6, 8.0)]
    assert figures.largest_share(readings, 1.0) == pytest.approx(0.5)
    assert figures.largest_share(readings, 2.0) == pytest.approx(0.3)
    assert figures.largest_share(readings, 3.5) == pytest.approx(0.6 / 8)


def test_a_stretch_in_which_nothing_was_used_has_no_share() -> None:
    assert figures.largest_share([(0.0, 0.0, 0.0), (1.0, 0.1, 1.0), (9.0, 0.1, 1.0)], 1.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="empty"):
        figures.largest_share([(0.0, 0.0, 0.0), (1.0, 0.1, 1.0)], 2.0)


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


def test_an_estimate_stands_for_the_median_and_decides_on_the_goal() -> None:
    part = figures.Part("digest")
    part.add("64 KiB: added", "%", [0.0, 0.1, 5.0], 0.5, (1.5, -0.2, 3.25))
    (figure,) = part.figures
    assert (figure.median, figure.value, figure.reached) == (0.1, 1.5, False)
    assert figures.table([part]).splitlines()[-1].split()[3:6] == ["1.500", "-0.200", "3.250"]
    record = figure.record()
    assert (record["median"], record["estimate"], record["low_95"], record["high_95"]) == (0.1, 1.5, -0.2, 3.25)


# --- the README's tables ---


def results() -> dict[str, Any]:
    cpu = figures.Part("cpu", "at a steady rate")
    cpu.add("agent", "ms per 1,000 requests", [90.0, 110.0], 105.0)
    models = figures.Part("resolver", "by model")
    resolver.add_live(models, "threads", [RUN, RUN], [RUN, RUN])
    resolver.add_live(models, "go", [RUN | {"cpu_us": 300.0}, RUN | {"cpu_us": 100.0}], [RUN, RUN])
    resolver.add_replay(models, "go", 1966.4, [replay.Cost(10.0, 60.0, 30.0)])
    about = {"date": "2026-11-23T00:00:00Z", "kernel": "6.1", "cpus": 2}
    made: dict[str, Any] = json.loads(json.dumps(figures.document([cpu, models], about)))
    return made


KINDS = {kind.name: 0.0 for kind in abi.Kind}
KINDS |= {"HEAD": 2.0, "END": 1.0}
RUN = {**KINDS, "events": 3.0, "cpu_us": 200.0, "rate": 900.0, "recorded_pct": 100.0, "lost": 0.0}


def test_server_models_have_a_table_of_their_own() -> None:
    lines = readme_table.table(results()).splitlines()
    assert lines[2] == "| cpu: agent | 100.0 | 90.00 .. 110.0 | ms per 1,000 requests | ≤ 105 |"
    columns, _, threads, go = (line.split(" | ") for line in lines[4:8])
    assert len(columns) == len(threads) == len(go) == 1 + len(readme_table.TABLES["resolver"][1])
    cells = dict(zip(columns, go, strict=True))
    assert cells["agent CPU, µs"] == "200.0 (100.0 .. 300.0)"
    assert cells["relative to threads"] == "1.000 (0.500 .. 1.500)"
    assert cells["bytes of events"] == "1,966"
    assert cells["resolving, % of the three"] == "30.00"
    assert threads[columns.index("relative to threads")] == ""
    assert not any("threads: " in line for line in lines)
    assert {"cpu: at a steady rate.", "resolver: by model."} <= set(lines)


def test_the_readme_is_also_written_without_the_models() -> None:
    found = results()
    del found["parts"]["resolver"]
    assert "per request" not in readme_table.table(found).replace("1,000 requests", "")


def test_every_column_is_a_figure_of_the_models() -> None:
    figures_there = {figure["name"].partition(": ")[2] for figure in results()["parts"]["resolver"]["figures"]}
    assert set(readme_table.TABLES["resolver"][1]) <= figures_there
    assert {"events, head", "events, end"} <= figures_there
    assert "events, open" not in figures_there


def rounds(*cpu_us: float) -> list[Any]:
    """Pairs of rounds of half a second: 1,000 uploads without looking at digests, and with."""
    off = digest.Round(1000, 0.5, 500_000_000)
    return [(off, digest.Round(1000, 0.5, round(each * 1e6))) for each in cpu_us]


def test_digests_have_a_table_of_their_own() -> None:
    part = figures.Part("digest", "in turns")
    part.add("price of a hit, update", "us", [1.2])
    case = digest.CASES[1]
    digest.add(part, case, digest.Compared([rounds(501, 502), rounds(503, 504)], rounds(550), {"auto": [0.003, 0.004], "always": [0.1]}))
    found = json.loads(json.dumps(figures.document([part], {"date": "2026-11-23T00:00:00Z", "kernel": "6.1", "cpus": 2})))
    lines = readme_table.table(found).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| digests looked at"))
    columns, _, row, after = (line.split(" | ") for line in lines[head : head + 4])
    cells = dict(zip(columns, row, strict=True))
    assert cells["| digests looked at, in uploads of"] == "| pieces of 64 KiB"
    assert cells["server CPU added, %"].startswith("0.500 (")
    assert cells["uploads/s lost, %"] == "0.000 (0.000 .. 0.000)"
    assert cells["first goal, %"] == f"≤ {case.goal:g}"
    assert cells["server CPU added by the agent's account, %"] == "0.350 (0.300 .. 0.400)"
    assert cells["always: server CPU added, %"] == "10.00 (10.00 .. 10.00)"
    assert cells["server CPU per upload, off, µs |"] == "500.0 |"
    assert after == [""]
    assert set(readme_table.TABLES["digest"][1]) - {readme_table.GOAL} <= {
        figure["name"].partition(": ")[2] for figure in found["parts"]["digest"]["figures"]
    }


# --- what looking at digests costs by the agent's own account ---


def account(time_s: float, value_s: float, cpu_s: float) -> Any:
    return digest.Accounts({"time": time_s, "value": value_s}, cpu_s)


def test_an_account_is_relative_to_what_the_servers_used() -> None:
    assert account(0.5, 0.25, 110.0).since(account(0.1, 0.05, 10.0)).share == pytest.approx(0.006)
    with pytest.raises(BucketprobeError, match="does not tell"):
        _ = account(0.5, 0.25, 10.0).since(account(0.1, 0.05, 10.0)).share


def test_grants_are_spent_one_by_one() -> None:
    grants = {name: digest.WORKERS * digest.GRANT_NS[name] / 1e9 for name in digest.PARTS}
    dear = account(0.1, 0.1, 1.0)
    assert digest.are_spent(account(grants["time"] + 0.01, grants["value"] + 0.01, 1.0), dear)
    assert not digest.are_spent(account(grants["time"] + 0.01, grants["value"] / 2, 1.0), dear)
    assert not digest.are_spent(account(grants["time"] / 2, grants["value"] + 0.01, 1.0), dear)
    # what was paid in besides must be gone, too
    assert not digest.are_spent(account(grants["time"], grants["value"], 1000.0), dear)


def test_a_grant_that_hits_do_not_use_up_is_not_waited_for() -> None:
    cheap = account(digest.SHARES["time"] / 2, digest.SHARES["value"] / 2, 1.0)
    assert digest.are_spent(cheap, cheap)


def test_servers_and_clients_share_no_cpu_where_there_are_two() -> None:
    servers, others = digest.cpus()
    allowed = os.sched_getaffinity(0)
    assert servers | others == allowed
    assert servers.isdisjoint(others) == (len(allowed) > 1)


def test_what_is_started_runs_on_the_cpus_that_it_is_given(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    some = {min(before)}
    made = rig.Rig(tmp_path, tmp_path, rig.QUICK, print)
    with made.started(["cat"], tmp_path / "log", stdin=subprocess.PIPE, cpus=some) as process:
        assert os.sched_getaffinity(process.pid) == some
    assert os.sched_getaffinity(0) == before


def test_uploads_are_made_and_checked(tmp_path: Path) -> None:
    made = rig.Rig(tmp_path, tmp_path, rig.QUICK, print)
    with made.bucket("prefork", "--chunk-size", "1024", "--fill", workers=2) as bucket:
        clients = uploads.Uploads(bucket.port, 5000, 2)
        closed = clients.run(0.5)
        stored = [path for path in bucket.root.glob("data/**/*") if path.is_file()]
        assert closed.uploads >= 2
        assert 0 < closed.rate <= closed.uploads / 0.5
        assert [path.stat().st_size for path in stored] == [5000] * closed.uploads
        paced = clients.run(0.5, rate=20.0)
        assert 2 <= paced.uploads <= 10
        before = bucket.cpu_ns()
        assert clients.run(0.1).uploads > 0
        assert bucket.cpu_ns() > before
    with pytest.raises(BucketprobeError, match="was answered with None"):
        clients.run(0.1)


# --- the agent's own account ---


def test_samples_keep_their_labels() -> None:
    text = '# HELP a is\n# TYPE a counter\na_total{kind="x y"} 3\nb 1.5e-3\n'
    assert rig.samples(text) == {'a_total{kind="x y"}': 3.0, "b": 0.0015}


def test_counters_become_figures_per_request() -> None:
    none = {f'bucketprobe_events_total{{kind="{kind.name.lower()}"}}': 0.0 for kind in abi.Kind}
    before = none | {"bucketprobe_process_cpu_seconds_total": 0.5, "bucketprobe_records_total": 0.0}
    before |= {'bucketprobe_events_total{kind="head"}': 5.0, 'bucketprobe_lost_total{cause="a",stage="b"}': 1.0}
    after = before | {"bucketprobe_process_cpu_seconds_total": 0.7, "bucketprobe_records_total": 990.0}
    after |= {'bucketprobe_events_total{kind="head"}': 3005.0, 'bucketprobe_events_total{kind="end"}': 1000.0}
    after |= {'bucketprobe_lost_total{cause="a",stage="b"}': 4.0, 'bucketprobe_lost_total{cause="new",stage="b"}': 2.0}
    found = resolver.per_request(before, after, 1000)
    assert (found["HEAD"], found["END"], found["OPEN"], found["events"]) == (3.0, 1.0, 0.0, 4.0)
    assert found["cpu_us"] == pytest.approx(200.0)
    assert (found["recorded_pct"], found["lost"]) == (99.0, 5.0)


def test_a_server_that_cannot_run_here_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def started(name: str, folder: Path) -> Iterator[str]:
        if name == "go":
            raise resolver.servers.CannotStart("the command go is missing")
        assert folder.is_dir()
        yield name

    monkeypatch.setattr(resolver.servers, "started", started)
    said: list[str] = []
    with ExitStack() as stack:
        running = resolver.started(rig.Rig(tmp_path, tmp_path, rig.QUICK, said.append), stack)
    assert list(running) == ["threads", "asyncio", "asyncio-pool"]
    assert said == ["resolver: without go: the command go is missing"]
    assert "without go, which this host cannot run" in resolver.note(500, ["go"])
    assert "without" not in resolver.note(500, [])


# --- the recording and how it is played ---

TGID, MS = 100, 1_000_000
PUT = b"PUT /v1/bucket/artifact HTTP/1.1\r\nHost: h\r\n\r\n"


def event(kind: abi.Kind, data: bytes = b"", **values: int) -> bytes:
    """As it comes from the ring; what is not given is 0, but for the process."""
    made = abi.EVENTS[kind]()
    for name, value in ({"kind": kind, "tgid": TGID, "n": len(data)} | values).items():
        setattr(made.h if hasattr(made.h, name) else made, name, value)
    return bytes(made) + data


def recording(requests: int) -> Any:
    """So many uploads after each other on an event loop, each with a file of its own."""
    records = []
    for i in range(1, requests + 1):
        at, path = i * 10 * MS, b"/srv/bucket/%d" % i
        records += [
            event(abi.Kind.HEAD, PUT, rid=i, ts=at, last=1),
            event(abi.Kind.OPEN, path, gen=i, ts=at + 2, ns=1, flags=os.O_WRONLY | os.O_TRUNC),
            event(abi.Kind.FILE, gen=i, what=1, ts=at + 4, first_ns=at + 3, data_ns=at + 4, last_ns=at + 4, write_calls=1, write_bytes=9),
            event(abi.Kind.END, rid=i, ts=at + 5, start_ns=at, end_ns=at + 5, status=201),
        ]
    messages = [
        {"op": "process", "tgid": TGID, "why": "", "cwd": "/srv"},
        {"op": "runtime", "tgid": TGID, "kind": int(abi.Runtime.CPYTHON), "detail": ""},
        {"op": "files", "tgid": TGID, "files": [[1 << 63, 3, "/srv/bucket/index.db", os.O_RDWR]]},
        {"op": "log", "text": "something else"},
    ]
    return replay.Recording(records, messages, 1, StorageSpec(("/srv/bucket",)), requests)


def test_a_recording_is_played_to_its_end() -> None:
    costs = replay.costs(recording(20), 3)
    assert len(costs) == 3
    for cost in costs:
        assert cost.decoding > 0
        assert cost.decoding + cost.tracking + cost.resolving > 0
    assert recording(2).bytes_per_request == sum(map(len, recording(1).records))


def test_what_resolving_takes_is_a_part_of_the_three() -> None:
    assert replay.Cost(10.0, 60.0, 30.0).resolving_pct == 30.0


def test_a_recording_that_lacks_a_request_is_no_measure() -> None:
    whole = recording(3)
    short = replay.Recording(whole.records[:-1], whole.messages, whole.secret, whole.storage, whole.requests)
    with pytest.raises(BucketprobeError, match="3 requests were recorded and 2 found"):
        replay.play_seconds(short)


def test_the_resolver_is_asked_only_where_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    decide = Process.decide

    def spy(self: Process, unit: Unit) -> Any:
        asked.append(unit)
        return decide(self, unit)

    monkeypatch.setattr(Process, "decide", spy)
    replay.play_seconds(recording(3), replay.Undecided)
    assert not asked
    replay.play_seconds(recording(3))
    assert [unit.work.write_bytes for unit in asked] == [9, 9, 9]


def test_undecided_work_goes_to_whoever_ends_first() -> None:
    process = replay.Undecided()
    nameless = Names(None, None, None, "")
    first, second = (Live(rid, TGID, begun, nameless, True) for rid, begun in ((1, 10), (2, 20)))
    units = [Unit(TGID, File("storage", closed=closed), at) for closed, at in ((True, 5), (True, 15), (False, 16), (True, 25))]
    for live in (first, second):
        process.enter(live)
    for unit in units:
        process.pending.add(unit)
    first.ended_ns = 30
    given_to_first = list(process.settle(first))
    assert [unit.first_ns for unit, _ in given_to_first] == [15, 25]
    assert all(list(decision.owners) == [first] for _, decision in given_to_first)
    assert {unit.first_ns for unit in process.pending} == {5, 16}


def test_nothing_is_left_out_under_a_name_that_the_resolver_does_not_have() -> None:
    ours = {name for name in vars(replay.Undecided) if not name.startswith("__")}
    assert ours <= set(vars(Process))
    assert {"settle", "awaits", "review"} <= ours


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
        (
            ["--only", "ready,speed"],
            "--only has no part 'speed': choose from syscalls, ready, memory, cpu, resolver, throughput, digest, budget.",
        ),
        (["--store", "/nowhere"], "--store /nowhere cannot be used (No such file or directory): name an existing folder."),
    ],
)
def test_a_wrong_call_gets_one_sentence(arguments: list[str], sentence: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH / "bench.py"), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"bench: {sentence}\n")

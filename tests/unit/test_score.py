# SPDX-License-Identifier: Apache-2.0
"""The score against records whose faults are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe.errors import UsageError
from bucketprobe.model import Attribution, FileWork, Request

SOURCE = Path(__file__).parents[1] / "truth" / "score.py"
spec = importlib.util.spec_from_file_location("score", SOURCE)
assert spec is not None
assert spec.loader is not None
score = importlib.util.module_from_spec(spec)
sys.modules["score"] = score  # dataclasses look their module up
spec.loader.exec_module(score)

NONE = {"opens": 0, "write_calls": 0, "write_bytes": 0, "read_calls": 0, "read_bytes": 0, "syncs": 0, "renames": 0}
PUT_FILES = {**NONE, "opens": 1, "write_calls": 2, "write_bytes": 1000, "syncs": 1, "renames": 1}
GET_FILES = {**NONE, "opens": 1, "read_calls": 1, "read_bytes": 400}
PUT_METADATA = {**NONE, "opens": 1, "write_calls": 1, "write_bytes": 300, "renames": 1}
GET_METADATA = {**NONE, "opens": 1, "read_calls": 2, "read_bytes": 300}


def truth_line(request_id: str | None, method: str, end_ns: int, files: dict[str, int]) -> dict[str, Any]:
    put = method == "PUT"
    steps = (
        {"open": 1_000_000, "storage_write": 2_000_000, "storage_sync": 4_000_000, "rename": 1_000_000, "metadata": 600_000}
        if put
        else {"storage_read": 500_000, "metadata": 200_000}
    )
    return {
        "request_id": request_id,
        "method": method,
        "status": 201 if put else 200,
        "outcome": "complete",
        "bytes_in": files["write_bytes"],
        "bytes_out": 50 if put else files["read_bytes"],
        "accept_ns": 1_800_000,
        "end_ns": end_ns,
        "steps": [{"step": step, "ns": ns, "bytes": 0, "calls": 1} for step, ns in steps.items()],
        "files": files,
        "metadata_files": PUT_METADATA if put else GET_METADATA,
    }


def client_line(line: dict[str, Any], tx_ns: int, connect_ns: int | None) -> dict[str, Any]:
    """A client whose kernel stamped; the server's own clock was the first to see the end."""
    return {
        **{name: line[name] for name in ("request_id", "status", "bytes_in", "bytes_out")},
        "connect_ns": connect_ns,
        "connected_ns": None if connect_ns is None else connect_ns + 200_000,
        "send_ns": tx_ns - 10_000,
        "tx_ns": tx_ns,
        "sent_ns": tx_ns + 10_000,
        "rx_ns": line["end_ns"] + 5_000,
        "done_ns": line["end_ns"] + 50_000,
    }


def record_of(line: dict[str, Any], start_ns: int) -> dict[str, Any]:
    """What an agent without fault would report, made by the model itself."""
    sums: dict[str, int] = {}
    for step in line["steps"]:
        phase = {"open": "storage_write", "rename": "storage_write"}.get(step["step"], step["step"])
        sums[phase] = sums.get(phase, 0) + step["ns"]
    phases = {**sums, "other": line["end_ns"] - start_ns - sum(sums.values())}
    request = Request(
        id="1",
        conn="1",
        pid=1,
        wall_ns=0,
        start_ns=start_ns,
        end_ns=line["end_ns"],
        operation="write",
        outcome=line["outcome"],
        method=line["method"],
        request_id=line["request_id"],
        status=line["status"],
        bytes_in=line["bytes_in"],
        bytes_out=line["bytes_out"],
        phases=phases,
        phase_totals=phases,
        files=FileWork(**line["files"]),
        metadata_files=FileWork(**line["metadata_files"]),
        attribution=Attribution("exact"),
    )
    record = json.loads(json.dumps(request.record()))
    assert isinstance(record, dict)
    return record


@pytest.fixture(name="world")
def fixture_world() -> tuple[list[Any], list[Any], list[Any]]:
    """An upload, first on its connection, and a read; an agent without fault."""
    truth = [
        truth_line("a", "PUT", 101_000_000, PUT_FILES),
        truth_line("b", "GET", 211_000_000, GET_FILES),
    ]
    client = [client_line(truth[0], 1_500_000, 900_000), client_line(truth[1], 201_000_000, None)]
    return [record_of(truth[0], 1_000_000), record_of(truth[1], 201_000_000)], truth, client


def test_no_fault(world: Any) -> None:
    result = score.score(*world)
    assert (result["requests"], result["found_once"], result["durations"]) == (2, 2, 2)
    assert (result["write_bytes"], result["write_right_pct"], result["read_bytes"], result["read_right_pct"]) == (1000, 100, 400, 100)
    assert result["label_exact_pct"] == 100
    assert result["storage_write_true_ms"] == 4
    assert result["metadata_time_ms"] == pytest.approx(0.8)
    for phase in ("storage_write", "storage_sync", "storage_read", "metadata"):
        assert result[f"{phase}_ratio"] == pytest.approx(1)
    for kind in ("write", "read", "write_time", "read_time", "metadata_time"):
        assert result[f"{kind}_right_pct"] == result[f"{kind}_right_exact_pct"] == 100
    assert (result["exact_bytes"], result["exact_ms"]) == (1000 + 400 + 300 + 300, pytest.approx(8 + 0.5 + 0.8))
    faults = [
        name
        for name in result
        if name.endswith(("_wrong", "_wrong_pct", "_wrong_bytes", "_wrong_ms", "_unattributed_pct", "_unattributed_bytes"))
        or name in ("missing", "duplicated", "invented", "client_disagrees", "exact_but_wrong", "with_lost_events")
        or "_error_" in name
    ]
    assert len(faults) >= 30
    assert {name: result[name] for name in faults} == pytest.approx(dict.fromkeys(faults, 0), abs=1e-12)
    assert (result["true_starts_uncertain"], result["true_start_window_us_max"], result["true_times_not_from_kernel"]) == (1, 600, 0)
    assert score.shortfalls(result) == []
    assert score.shortfalls(result, score.EXACT_GOALS, score.FLOORS) == []
    assert score.examples(world[0], world[1], 5) == []


def errors_us(world: Any) -> tuple[float, float, float]:
    result = score.score(*world)
    return result["start_error_us_max"], result["end_error_us_max"], result["duration_error_us_max"]


def test_an_error_of_a_duration_is_relative_to_the_truth(world: Any) -> None:
    world[0][1]["start_ns"] -= 100_000
    result = score.score(*world)
    assert (result["duration_error_p50"], result["duration_error_max"]) == (0, pytest.approx(0.01))
    assert errors_us(world) == (100, 0, 100)


@pytest.mark.parametrize(("start_ns", "error_us"), [(850_000, 50), (900_000, 0), (1_100_000, 0), (1_150_000, 50), (1_480_000, 20)])
def test_a_first_request_begins_with_the_connection_or_when_it_was_sent(world: Any, start_ns: int, error_us: int) -> None:
    world[0][0]["start_ns"] = start_ns
    assert errors_us(world) == (error_us, 0, error_us)


def test_a_first_request_that_was_sent_after_the_accept_began_then(world: Any) -> None:
    records, truth, _ = world
    truth[0]["accept_ns"] = 1_400_000
    assert errors_us(world) == (500, 0, 500)
    records[0]["start_ns"] = 1_500_000
    assert errors_us(world) == (0, 0, 0)
    assert score.score(*world)["true_starts_uncertain"] == 0


def test_a_server_that_does_not_stamp_leaves_the_client_s_stamps(world: Any) -> None:
    records, truth, _ = world
    for line in truth:
        line.update(accept_ns=None, end_ns=None)
    for record, late_ns in zip(records, (5_000, 5_000), strict=True):
        record["end_ns"] += late_ns
    assert errors_us(world) == (0, 0, 0)
    records[0]["start_ns"] = 1_500_000
    assert errors_us(world) == (0, 0, 0)
    result = score.score(*world)
    assert (result["true_starts_uncertain"], result["true_ends_told_by_arrival"]) == (1, 2)


@pytest.mark.parametrize(
    ("late", "by"), [({"rx_ns", "done_ns"}, "server"), ({"end_ns", "done_ns"}, "arrival"), ({"end_ns", "rx_ns"}, "client")]
)
def test_the_end_is_the_earliest_of_three_stamps(world: Any, late: set[str], by: str) -> None:
    records, truth, client = world
    for line, seen in zip(truth, client, strict=True):
        true_ns = line["end_ns"]
        stamps = {name: true_ns + (10_000_000 if name in late else 0) for name in ("end_ns", "rx_ns", "done_ns")}
        line["end_ns"], seen["done_ns"] = stamps["end_ns"], stamps["done_ns"]
        seen["rx_ns"] = None if by == "client" else min(stamps["rx_ns"], stamps["done_ns"])
    assert errors_us(world)[1] == 0
    assert score.score(*world)[f"true_ends_told_by_{by}"] == 2
    records[1]["end_ns"] -= 30_000
    assert errors_us(world)[1] == 30
    assert score.score(*world)["end_too_late_us_max"] == 0
    records[1]["end_ns"] += 50_000
    assert score.score(*world)["end_too_late_us_max"] == 20


@pytest.mark.parametrize("change", [{"tx_ns": None}, {"rx_ns": None}, {"tx_ns": 200_989_000}, {"rx_ns": 211_050_001}])
def test_without_credible_stamps_the_start_is_a_window(world: Any, change: dict[str, int | None]) -> None:
    records, _, client = world
    client[1].update(change)
    for start_ns, error_us in ((200_990_000, 0), (201_010_000, 0), (201_015_000, 5), (200_970_000, 20)):
        records[1]["start_ns"] = start_ns
        assert errors_us(world)[0] == error_us
    result = score.score(*world)
    assert (result["true_times_not_from_kernel"], result["true_starts_uncertain"]) == (1, 2)


def test_what_the_client_did_not_time_is_left_out(world: Any) -> None:
    records, truth, client = world
    assert score.score(records, truth, client[:1])["durations"] == 1
    client[1].update(dict.fromkeys(("send_ns", "sent_ns", "tx_ns", "rx_ns")))
    assert score.score(records, truth, client)["durations"] == 1


def test_goals_that_are_missed_are_named(world: Any) -> None:
    records, truth, client = world
    records[0]["status"] = 500
    records[1]["start_ns"] -= 600_000
    assert score.shortfalls(score.score(records, truth, client)) == [
        "status wrong: 1, and at most 0 is promised",
        "duration error p99: 6.000 %, and at most 5.000 % is promised",
        "phase sum error max: 5.660 %, and at most 0.100 % is promised",
    ]
    assert len(score.shortfalls(score.score([], [], []))) == 3


def test_floors_that_are_missed_are_named(world: Any) -> None:
    records, truth, client = world
    records[0]["files"]["write_bytes"] = 980
    records[0]["attribution"]["label"] = "inferred"
    scores = score.score(records, truth, client)
    assert score.shortfalls(scores, score.EXACT_GOALS, score.FLOORS) == ["write right pct: 98.000 %, and at least 99.000 % is promised"]
    assert score.shortfalls(scores) == ["write unattributed bytes: 20 B, and at most 0 B is promised"]
    assert len(score.shortfalls(score.score([], [], []), {}, score.FLOORS)) == 3


def test_a_missing_record(world: Any) -> None:
    records, truth, client = world
    result = score.score(records[1:], truth, client)
    assert (result["found_once"], result["missing"]) == (1, 1)
    assert (result["write_right_pct"], result["write_unattributed_pct"], result["write_wrong_pct"]) == (0, 100, 0)


def test_a_record_twice(world: Any) -> None:
    records, truth, client = world
    result = score.score([*records, deepcopy(records[0])], truth, client)
    assert (result["found_once"], result["duplicated"], result["invented"]) == (1, 1, 0)
    assert (result["write_right_pct"], result["write_wrong_pct"]) == (100, 100)


def test_an_invented_record(world: Any) -> None:
    records, truth, client = world
    stray = {**deepcopy(records[1]), "request_id": "z"}
    result = score.score([*records, stray], truth, client)
    assert (result["found_once"], result["invented"], result["read_wrong_bytes"]) == (2, 1, 400)


def test_requests_without_an_id_are_only_counted(world: Any) -> None:
    records, truth, client = world
    nameless = {**deepcopy(records[1]), "request_id": None}
    result = score.score([*records, nameless], [*truth, {**truth[1], "request_id": None}], client)
    assert (result["nameless_requests"], result["nameless_records"], result["invented"], result["read_wrong_bytes"]) == (1, 1, 0, 0)
    assert score.score([*records, nameless], truth, client)["invented"] == 1


def test_bytes_on_the_wrong_request(world: Any) -> None:
    records, truth, client = world
    records[0]["files"]["write_bytes"] = 700
    records[1]["files"]["write_bytes"] = 200
    result = score.score(records, truth, client)
    assert (result["write_right_pct"], result["write_wrong_pct"], result["write_unattributed_pct"]) == (70, 20, 30)
    assert (result["files_wrong"], result["files_write_bytes_wrong"], result["files_syncs_wrong"]) == (2, 2, 0)
    assert result["exact_but_wrong"] == 2
    records[1]["attribution"]["label"] = "inferred"
    result = score.score(records, truth, client)
    assert (result["exact_but_wrong"], result["label_exact_pct"], result["label_inferred_pct"]) == (1, 50, 50)


@pytest.mark.parametrize("counter", sorted(NONE))
def test_each_counter_counts(world: Any, counter: str) -> None:
    records, truth, client = world
    records[0]["files"][counter] += 1
    result = score.score(records, truth, client)
    assert (result["files_wrong"], result[f"files_{counter}_wrong"], result["exact_but_wrong"]) == (1, 1, 1)


@pytest.mark.parametrize("counter", sorted(NONE))
def test_each_counter_of_metadata_counts(world: Any, counter: str) -> None:
    records, truth, client = world
    records[0]["metadata_files"][counter] += 1
    result = score.score(records, truth, client)
    assert (result["files_wrong"], result[f"metadata_files_{counter}_wrong"], result["exact_but_wrong"]) == (1, 1, 1)
    assert result[f"files_{counter}_wrong"] == 0


def test_what_the_server_cannot_know_is_not_compared(world: Any) -> None:
    records, truth, client = world
    truth[0].update(metadata_files=None, bytes_in=None, files={**PUT_FILES, "opens": None, "write_bytes": None})
    records[0]["metadata_files"]["opens"] += 7
    records[0]["files"]["opens"] += 7
    records[0]["files"]["write_bytes"] += 7
    records[0]["bytes_in"] += 7
    client[0]["bytes_in"] += 7
    result = score.score(records, truth, client)
    assert (result["files_wrong"], result["bytes_in_wrong"], result["client_disagrees"]) == (0, 0, 0)
    assert (result["write_bytes"], result["write_right_pct"], result["write_time_right_pct"]) == (0, None, 100)
    records[0]["files"]["syncs"] += 1
    assert score.score(records, truth, client)["files_wrong"] == 1


def test_a_time_that_the_server_did_not_take_is_no_bound(world: Any) -> None:
    records, truth, client = world
    for line in truth:
        line["steps"] = []
    result = score.score(records, truth, client)
    assert (result["exact_but_wrong"], result["write_time_right_pct"], result["storage_write_ratio"]) == (0, 100, None)
    records[1]["phase_totals"]["storage_sync"] = 0.6
    # It says that it did not sync at all.
    assert score.score(records, truth, client)["exact_wrong_ms"] == pytest.approx(0.6 - 0.5)


def test_a_time_beyond_the_server_s_own_is_wrong(world: Any) -> None:
    records, truth, client = world
    totals = records[0]["phase_totals"]
    totals["storage_sync"] += 4 * 0.05 + 0.49
    result = score.score(records, truth, client)
    assert (result["exact_but_wrong"], result["exact_wrong_ms"]) == (0, 0)
    totals["storage_sync"] += 0.12
    result = score.score(records, truth, client)
    assert (result["exact_but_wrong"], result["exact_wrong_ms"]) == (1, pytest.approx(0.11))
    (example,) = score.examples(records, truth, 1)
    assert (example["label"], example["record"], example["truth"]) == ("exact", records[0], truth[0])
    assert example["differs"] == ["storage_sync: 4.810 ms, and the server itself saw 4.000 ms"]


def test_the_time_of_another_request_s_calls_is_wrong_there_and_missing_here(world: Any) -> None:
    """The read has the sync of the upload."""
    records, truth, client = world
    for record, sign in zip(records, (-1, 1), strict=True):
        record["files"]["syncs"] += sign
        record["phase_totals"]["storage_sync"] = record["phase_totals"].get("storage_sync", 0.0) + sign * 4
        record["attribution"]["label"] = "shared"
    result = score.score(records, truth, client)
    assert (result["write_time_ms"], result["write_time_wrong_ms"], result["write_time_unattributed_ms"]) == pytest.approx((8, 4, 4))
    assert (result["write_time_wrong_shared_pct"], result["write_time_wrong_pct"]) == pytest.approx((50, 50))
    assert (result["shared_but_wrong"], result["exact_but_wrong"], result["exact_wrong_ms"]) == (2, 0, 0)
    assert result["metadata_time_right_pct"] == 100


#: recorded ms, the server's ms, calls, sizes (each: recorded, true), and right, wrong, unattributed ms.
PLACES = {
    "all": (4.0, 5.0, [(2, 2), (1, 1)], [(100, 100)], (4, 0, 0)),
    "nothing": (0.0, 0.0, [(0, 0)], [(0, 0)], (0, 0, 0)),
    "half is missing": (2.0, 5.0, [(1, 2), (1, 2)], [(50, 100)], (2, 0, 2.5)),
    "all is missing": (0.0, 5.0, [(0, 2)], [(0, 100)], (0, 0, 5)),
    "half is another's": (4.0, 5.0, [(2, 1), (2, 1)], [(100, 50)], (2, 2, 0)),
    "all is another's": (4.0, 0.0, [(2, 0)], [(100, 0)], (0, 4, 0)),
    "one for another": (4.0, 5.0, [(2, 1), (0, 1)], [], (2, 2, 2.5)),
    "other bytes by as many calls": (4.0, 5.0, [(2, 2)], [(100, 40)], (1.6, 2.4, 0)),
    "bytes are missing from as many calls": (4.0, 5.0, [(2, 2)], [(40, 100)], (4, 0, 3)),
    "longer than the server's": (11.0, 10.0, [(2, 2)], [], (11, 0, 0)),
    "too much longer than the server's": (13.0, 10.0, [(2, 2)], [], (11, 2, 0)),
    "too long, and half is another's": (13.0, 10.0, [(2, 1)], [], (5.5, 7.5, 0)),
    "no counters": (4.0, 5.0, [], [], (4, 0, 0)),
    "no counters, too long": (13.0, 10.0, [], [], (11, 2, 0)),
    "no counters, nothing recorded": (0.0, 5.0, [], [], (0, 0, 5)),
    "no time": (4.0, None, [(2, 1)], [], (2, 2, 0)),
    "no time, a call is missing": (4.0, None, [(1, 2)], [], (4, 0, 4)),
    "no time, all is missing": (0.0, None, [(0, 2)], [], (0, 0, 0)),
    "neither": (4.0, None, [], [], (4, 0, 0)),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_time_belongs(name: str) -> None:
    *given, expected = PLACES[name]
    placed = score.place_time(*given)
    assert (placed.right, placed.wrong, placed.unattributed) == pytest.approx(expected)


@given(st.floats(0, 1e6), st.none() | st.floats(0, 1e6), *[st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4)] * 2)
def test_all_recorded_time_is_right_or_wrong(recorded: float, true: float | None, calls: Any, sizes: Any) -> None:
    placed = score.place_time(recorded, true, calls, sizes)
    assert placed.right + placed.wrong == pytest.approx(recorded)
    assert min(placed.right, placed.wrong, placed.unattributed) >= 0
    assert true is None or placed.unattributed <= true


def test_what_is_wrong_is_put_down_to_the_weakest_label_first(world: Any) -> None:
    records, truth, client = world
    by_label = {"exact": {"bytes": 700, "ms": 4.0}, "inferred": {"bytes": 500, "ms": 3.0}, "shared": {"bytes": 100, "ms": 2.0}}
    records[0]["attribution"].update(label="shared", by_label=by_label)
    del records[1]
    for excess, wrong in ((0, (0, 0, 0)), (80, (80, 0, 0)), (600, (100, 500, 0)), (630, (100, 500, 30))):
        records[0]["files"]["write_bytes"] = 1000 + excess
        result = score.score(records, truth, client)
        assert tuple(result[f"{label}_wrong_bytes"] for label in ("shared", "inferred", "exact")) == wrong
    assert (result["exact_bytes"], result["inferred_bytes"], result["shared_bytes"]) == (700, 500, 100)
    assert result["exact_wrong_bytes_pct"] == pytest.approx(30 / 7)
    assert result["exact_ms"] == 4


def test_of_mixed_labels_only_time_beyond_the_server_s_is_certainly_wrong(world: Any) -> None:
    """Two syncs, of which the server made one: the long one or the short one?"""
    records, truth, client = world
    records[0]["files"]["syncs"] = 2
    records[0]["phase_totals"]["storage_sync"] = 4.2
    assert score.score(records, truth, client)["exact_wrong_ms"] == pytest.approx(2.1)
    by_label = {"exact": {"bytes": 1300, "ms": 8.6}, "shared": {"bytes": 0, "ms": 0.2}}
    records[0]["attribution"].update(label="shared", by_label=by_label)
    result = score.score(records, truth, client)
    assert (result["exact_wrong_ms"], result["shared_wrong_ms"], result["write_time_wrong_ms"]) == (0, 0, pytest.approx(2.1))
    records[0]["phase_totals"]["storage_sync"] = 4 + 0.2 + 0.5 + 0.3
    result = score.score(records, truth, client)
    assert (result["shared_wrong_ms"], result["exact_wrong_ms"]) == (pytest.approx(0.2), pytest.approx(0.1))


def test_bytes_by_label(world: Any) -> None:
    records, truth, client = world
    records[0]["files"]["write_bytes"] = 700
    records[0]["attribution"]["label"] = "inferred"
    records[1]["files"]["write_bytes"] = 200
    records[1]["attribution"]["label"] = "shared"
    result = score.score(records, truth, client)
    shares = {name: result[f"write_{name}_pct"] for name in ("right_inferred", "wrong_shared", "unattributed_inferred", "right_exact")}
    assert shares == {"right_inferred": 70, "wrong_shared": 20, "unattributed_inferred": 30, "right_exact": 0}
    assert (result["inferred_but_wrong"], result["shared_but_wrong"], result["exact_but_wrong"]) == (1, 1, 0)
    assert (result["inferred_wrong_bytes"], result["shared_wrong_bytes"]) == (0, 200)


def test_examples_are_so_many_of_each_label(world: Any) -> None:
    records, truth, _ = world
    for record in records:
        record["files"]["renames"] += 1
    assert [example["differs"] for example in score.examples(records, truth, 5)] == [
        ["files.renames: 2, truly 1"],
        ["files.renames: 1, truly 0"],
    ]
    assert len(score.examples(records, truth, 1)) == 1
    records[0]["attribution"]["label"] = "shared"
    assert len(score.examples(records, truth, 1)) == 2


@pytest.mark.parametrize("name", ["status", "method", "outcome", "bytes_in", "bytes_out"])
def test_each_field_counts(world: Any, name: str) -> None:
    records, truth, client = world
    records[0][name] = None
    assert score.score(records, truth, client)[f"{name}_wrong"] == 1


def test_a_client_that_saw_something_else(world: Any) -> None:
    records, truth, client = world
    client[1]["bytes_out"] -= 1
    assert score.score(records, truth, client)["client_disagrees"] == 1


def test_phases_that_do_not_sum_up(world: Any) -> None:
    records, truth, client = world
    records[0]["phases"]["other"] += 1.0
    assert score.score(records, truth, client)["phase_sum_error_max"] == pytest.approx(0.01)


def test_time_in_the_wrong_phase(world: Any) -> None:
    records, truth, client = world
    records[0]["phase_totals"]["storage_sync"] *= 1.5
    assert score.score(records, truth, client)["storage_sync_ratio"] == pytest.approx(1.5)


def test_an_id_twice_in_the_truth(world: Any) -> None:
    records, truth, client = world
    with pytest.raises(UsageError, match="request a twice"):
        score.score(records, [*truth, truth[0]], client)


def test_nothing_at_all_has_a_table() -> None:
    result = score.score([], [], [])
    assert result["write_right_pct"] is None
    assert " -" in score.table(result)


def test_the_table_has_units_and_lines_up(world: Any) -> None:
    lines = score.table(score.score(*world)).splitlines()
    assert len({len(line) for line in lines}) == 1
    text = {line[:-16].strip(): line[-16:].strip() for line in lines}
    assert text["write right pct"] == "100.000 %"
    assert text["write bytes"] == "1,000 B"
    assert text["storage sync true ms"] == "4.0 ms"
    assert text["duration error max"] == "0.000 %"
    assert text["true start window us max"] == "600.0 µs"
    assert text["duration error us max"] == "0.0 µs"


def test_the_command(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = []
    for name, lines in zip(("records", "truth", "client"), world, strict=True):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments += [f"--{name}", str(path)]
    assert score.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert "found once" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == score.score(*world)
    (tmp_path / "truth").write_text('{}\n{"half')
    assert score.main(arguments) == 2
    assert f"{tmp_path}/truth:2: not a JSON line" in capsys.readouterr().err
    (tmp_path / "truth").unlink()
    assert score.main(arguments) == 2
    assert "check the path" in capsys.readouterr().err

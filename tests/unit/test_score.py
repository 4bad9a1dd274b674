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


def truth_line(request_id: str | None, method: str, end_ns: int, files: dict[str, int]) -> dict[str, Any]:
    put = method == "PUT"
    steps = (
        {"open": 1_000_000, "storage_write": 2_000_000, "storage_sync": 4_000_000, "rename": 1_000_000}
        if put
        else {"storage_read": 500_000}
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
    for phase in ("storage_write", "storage_sync", "storage_read"):
        assert result[f"{phase}_ratio"] == pytest.approx(1)
    faults = [
        name
        for name in result
        if name.endswith(("_wrong", "_wrong_pct", "_wrong_bytes", "_unattributed_pct", "_unattributed_bytes"))
        or name in ("missing", "duplicated", "invented", "client_disagrees", "exact_but_wrong", "with_lost_events")
        or "_error_" in name
    ]
    assert len(faults) >= 30
    assert {name: result[name] for name in faults} == pytest.approx(dict.fromkeys(faults, 0), abs=1e-12)
    assert (result["true_starts_uncertain"], result["true_start_window_us_max"], result["true_times_not_from_kernel"]) == (1, 600, 0)
    assert score.shortfalls(result) == []


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

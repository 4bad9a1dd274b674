# SPDX-License-Identifier: Apache-2.0
"""The scoring of digests, on records and truths that are made up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bucketprobe.errors import UsageError
from bucketprobe.model import Digest

spec = importlib.util.spec_from_file_location("digest_score", Path(__file__).parents[1] / "truth" / "digest_score.py")
assert spec is not None
assert spec.loader is not None
digest_score = importlib.util.module_from_spec(spec)
sys.modules["digest_score"] = digest_score
spec.loader.exec_module(digest_score)

Line = dict[str, Any]
HEX = f"sha256:{'ab' * 32}"
OTHER = f"sha256:{'cd' * 32}"


def record(name: str, operation: str = "write", **digest: Any) -> Line:
    """A record, of which only what is scored is there; its digest as the model writes it."""
    values = {"source": "exact", "error_pct": 5.0, "ns": 1_000_000, "bytes": 1 << 20, "computed": HEX, "result": "match"}
    seen = Digest(**{**values, **digest})
    return {"request_id": name, "operation": operation, "phases": {"digest": (seen.ns or 0) / 1e6}, "digest": seen.record()}


def line(name: str, cpu_ns: int | None = 1_000_000, size: int = 1 << 20, **more: Any) -> Line:
    steps = [{"step": "digest", "ns": 3_000_000, "bytes": size, "calls": 4}]
    if cpu_ns is not None:
        steps.append({"step": "digest_cpu", "ns": cpu_ns, "bytes": size, "calls": 4})
    return {"request_id": name, "steps": steps, "computed": HEX, **more}


def test_sums_and_errors_are_by_operation_and_source() -> None:
    records = [
        record("a", ns=1_040_000),
        record("b", source="gap", ns=880_000, error_pct=10.0),
        record("c", source="none", ns=None, error_pct=None),
        record("d", "read", ns=2_000_000),
    ]
    found = digest_score.score(records, [line("a"), line("b"), line("c"), line("d")])
    write = found["time"]["write"]
    assert (write["requests"], write["recorded_ms"], write["true_ms"]) == (3, pytest.approx(1.92), pytest.approx(2.0))
    assert write["ratio"] == pytest.approx(0.96)
    assert write["known_pct"] == pytest.approx(200 / 3)
    assert write["by_source"].keys() == {"exact", "gap", "none"}
    assert write["by_source"]["exact"]["error_pct_p50"] == pytest.approx(4.0)
    assert write["by_source"]["exact"]["admitted_pct"] == 100
    assert write["by_source"]["gap"]["error_pct_p95"] == pytest.approx(12.0)
    assert write["by_source"]["gap"]["admitted_pct"] == 0
    assert write["by_source"]["none"]["ratio"] is None
    assert found["time"]["read"]["ratio"] == pytest.approx(2.0)
    assert found["phase_ratio"] == pytest.approx(1.0)


def test_only_cpu_time_is_compared() -> None:
    found = digest_score.score([record("a"), record("b")], [line("a"), line("b", cpu_ns=None)])
    assert found["time"]["write"]["requests"] == 1
    assert found["time_not_known"] == 1


def test_all_that_was_hashed_for_a_request_counts() -> None:
    more = line("a", cpu_ns=1_000_000, size=1000)
    more["steps"] += [{"step": name, "ns": 500_000, "bytes": 24, "calls": 1} for name in ("digest_other", "digest_other_cpu")]
    found = digest_score.score([record("a", ns=3_000_000, bytes=1024)], [more])
    assert found["time"]["write"]["ratio"] == pytest.approx(2)
    assert found["bytes"] == {"right": 1, "wrong": 0, "not_told": 0}


def test_requests_without_a_digest_are_no_part_of_it() -> None:
    plain = {"request_id": "b", "steps": [], "computed": None}
    found = digest_score.score([record("a"), record("b", source="none", ns=None, computed=None)], [line("a"), plain])
    assert (found["requests"], found["hashed"], found["time"]["write"]["requests"]) == (2, 1, 1)
    assert found["values"]["invented"] == 0


def test_a_request_without_a_record_is_missing() -> None:
    found = digest_score.score([record("a")], [line("a"), line("b")])
    assert found["missing"] == 1
    assert found["values"] == {**found["values"], "uploads": 2, "right": 1, "not_found": 1, "right_pct": 50}


def test_values_are_right_wrong_not_found_or_invented() -> None:
    records = [record("a"), record("b", computed=OTHER), record("c", computed=None), record("d", "read")]
    truth = [line("a"), line("b"), line("c"), line("d", computed=None)]
    values = digest_score.score(records, truth)["values"]
    assert (values["right"], values["wrong"], values["not_found"], values["invented"]) == (1, 1, 1, 1)
    assert values["wrong_ids"] == ["b"]
    missed = digest_score.value_shortfalls({"values": values})
    assert missed == ["digest values: 1 of 3 are right, 1 are wrong", "digest values: 1 wrong, 1 of requests that are no uploads"]
    assert digest_score.value_shortfalls({"values": values}, least_right_pct=30) == missed[1:]


def test_bytes_are_right_wrong_or_not_told() -> None:
    records = [record("a"), record("b", bytes=5), record("c", bytes=None)]
    assert digest_score.score(records, [line("a"), line("b"), line("c")])["bytes"] == {"right": 1, "wrong": 1, "not_told": 1}


def test_a_truth_with_a_name_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="request a twice"):
        digest_score.score([], [line("a"), line("a")])


def test_goals_of_time() -> None:
    records = [record("a", ns=1_040_000), record("b", source="none", ns=None)]
    found = digest_score.score(records, [line("a"), line("b")])
    assert digest_score.time_shortfalls(found, most_off_pct=5, least_known_pct=50) == []
    off, unknown = digest_score.time_shortfalls(found, most_off_pct=3, least_known_pct=90)
    assert off == "write: digest time is 104.0 % of the truth, and within 3 % is promised"
    assert unknown == "write: digest time is known of 50.0 % of requests, and of 90 % is promised"
    assert digest_score.time_shortfalls({"time": {}}, 5, 90) == ["no digest time could be compared"]


def test_a_time_of_which_nothing_is_known_reaches_no_goal() -> None:
    found = digest_score.score([record("a", source="none", ns=None)], [line("a")])
    assert len(digest_score.time_shortfalls(found, 5, 90)) == 2


def mismatch(name: str, source: str) -> Line:
    return record(name, mismatch=source, result="mismatch" if source == "computed" else None)


def test_every_mismatch_is_told_and_a_hidden_one_by_what_was_computed() -> None:
    records = [record("a"), mismatch("b", "answer"), mismatch("c", "computed")]
    found = digest_score.mismatch_scores(records, ["b", "c"], ["c"])
    assert found["by_source"] == {"answer": 1, "computed": 1}
    assert (found["told"], found["hidden_told"], found["hidden_told_by_answer"]) == (2, 1, 0)
    assert digest_score.mismatch_shortfalls(found, counted=2) == []


@pytest.mark.parametrize(
    ("records", "counted", "told"),
    [
        ([mismatch("b", "answer")], 2, "mismatches: 1 not told, 0 told of requests without"),
        ([mismatch(name, "computed") for name in "abc"], 2, "mismatches: 0 not told, 1 told of requests without"),
        ([mismatch("b", "computed"), mismatch("c", "answer")], 2, "mismatches: 1 hidden ones are said to come from the answer"),
        ([mismatch("b", "computed"), mismatch("c", "computed")], 3, "mismatches: the metric counts 3 of 2"),
    ],
)
def test_what_is_wrong_with_mismatches_is_said(records: list[Line], counted: int, told: str) -> None:
    found = digest_score.mismatch_scores(records, ["b", "c"], ["c"])
    assert digest_score.mismatch_shortfalls(found, counted) == [told]


def test_what_was_read_back_is_compared_request_by_request() -> None:
    truth = [line("a", verified=["match"]), line("b", verified=["mismatch"]), line("c")]
    right = [record("a", verified=("match",)), record("b", verified=("mismatch",)), record("c")]
    found = digest_score.score(right, truth)
    assert found["verified"]["true"] == {"match": 1, "mismatch": 1}
    assert digest_score.verify_shortfalls(found, {"match": 1, "mismatch": 1}) == []
    assert len(digest_score.verify_shortfalls(found, {"match": 2, "mismatch": 0})) == 1
    exchanged = [record("a", verified=("mismatch",)), record("b", verified=("match",)), record("c")]
    found = digest_score.score(exchanged, truth)
    assert found["verified"]["differing_ids"] == ["a", "b"]
    assert digest_score.verify_shortfalls(found, {"match": 1, "mismatch": 1}) == ["read back: 2 records do not say what the server found"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lines in (("records", [record("a", ns=1_100_000)]), ("truth", [line("a")])):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in lines))
    options = ["--records", f"{tmp_path / 'records'}", "--truth", f"{tmp_path / 'truth'}"]
    assert digest_score.main(options) == 0
    assert "values of 1 uploads: 1 right, 0 wrong" in capsys.readouterr().out
    assert digest_score.main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["write"]["ratio"] == pytest.approx(1.1)
    assert digest_score.main(["--records", f"{tmp_path / 'none'}", *options[2:]]) == 2
    assert "cannot be read as JSON lines" in capsys.readouterr().err

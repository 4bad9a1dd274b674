# SPDX-License-Identifier: Apache-2.0
"""The demonstration, whole: it agrees with its clients, says so where it does not, and leaves nothing, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bucketprobe import capture
from bucketprobe.demo import __main__ as demo
from bucketprobe.demo import check, load
from bucketprobe.model import Digest

MARK = "BUCKETPROBE_TEST_DEMO"


class Stage:
    """Runs demonstrations whose files and processes can be told from others'."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        # A folder that the unprivileged agent may search, as it may /var/tmp.
        for each in (folder, *folder.parents[:2]):
            each.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bucketprobe.demo", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(self.folder), MARK: self.mark, **environment},
        )  # fmt: skip

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, error = process.communicate(timeout=200)
        return process.returncode, out, error

    def left(self) -> list[str]:
        """What is still there: files, and processes that inherited our mark. Zombies of others' making do not count."""
        found = [str(path) for path in self.folder.rglob("*")]
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.kernel
@pytest.mark.parametrize("model", ["threads", "prefork"])
def test_every_number_agrees_and_nothing_is_left(stage: Stage, model: str) -> None:
    code, out, error = stage.run("--seconds", "3", "--model", model)
    assert code == 0, out + error
    assert "Every number agrees." in out
    assert not re.search(r"  MISMATCH$", out, re.MULTILINE)
    assert "what the agent says that it lost: nothing" in out
    for part in ("bucket.artifact.write.count by status", "write, ", "storage_sync", "The slowest 3 of", "MiB", "by curl", "curl -s http"):
        assert part in out
    assert "\x1b" not in out + error, "no colour where there is no terminal"
    assert stage.left() == []


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_leaves_nothing(stage: Stage, number: signal.Signals) -> None:
    process = stage.start("--seconds", "60")
    assert process.stderr is not None
    for line in process.stderr:
        if "clients for 60 s" in line:
            break
    assert stage.left(), "or the test looks in the wrong place"
    time.sleep(0.5)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert out == ""
    assert stage.left() == []


@pytest.mark.kernel
def test_one_that_fails_half_way_says_why_and_leaves_nothing(stage: Stage) -> None:
    """No curl: found out when the Bucket and the agent already run."""
    code, out, error = stage.run("--seconds", "3", PATH="/nonexistent")
    assert code == 2
    assert error.splitlines()[-1].startswith("demo: curl is not installed")
    assert out == ""
    assert stage.left() == []


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "soon"], ["--model", "fibers"]])
def test_a_wrong_call_is_refused_before_anything_starts(stage: Stage, arguments: list[str]) -> None:
    code, out, error = stage.run(*arguments)
    assert (code, out) == (2, "")
    assert "usage:" in error
    assert stage.left() == []


def test_a_folder_that_cannot_be_used_is_named(stage: Stage) -> None:
    code, _, error = stage.run(TMPDIR=f"{stage.folder}/nowhere")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert f"{stage.folder}/nowhere" in error
    assert "TMPDIR" in error


# --- what it says where the numbers differ ---


def client_line(number: int, method: str, status: int | None, bytes_in: int, bytes_out: int, kind: str) -> dict[str, Any]:
    return {"request_id": f"r-{number}", "method": method, "kind": kind, "status": status, "bytes_in": bytes_in, "bytes_out": bytes_out}


CLIENT = [
    client_line(0, "PUT", 201, 5000, 300, "put"),
    client_line(1, "PUT", 409, 700, 150, "curl_put_conflict"),
    client_line(2, "GET", 200, 0, 5000, "get"),
    client_line(3, "GET", 200, 0, 210, "curl_metadata"),
    client_line(4, "GET", 200, 0, 90, "versions"),
]

OPERATIONS = ("write", "write", "read", "metadata", "list")

METRICS = """\
# TYPE bucket_artifact_write_count_total counter
bucket_artifact_write_count_total{status="201",bucket_type="unknown",node_id="n"} 1
bucket_artifact_write_count_total{status="409",bucket_type="unknown",node_id="n"} 1
# TYPE bucket_artifact_read_count_total counter
bucket_artifact_read_count_total{cache="unknown",status="200"} 1
# TYPE bucket_artifact_write_size_bytes histogram
bucket_artifact_write_size_bytes_bucket{bucket_type="unknown",le="1024.0"} 1
bucket_artifact_write_size_bytes_bucket{bucket_type="unknown",le="65536.0"} 2
bucket_artifact_write_size_bytes_bucket{bucket_type="unknown",le="+Inf"} 2
bucket_artifact_write_size_bytes_count{bucket_type="unknown"} 2
bucket_artifact_write_size_bytes_sum{bucket_type="unknown"} 5700
# TYPE bucketprobe_requests_begun_total counter
bucketprobe_requests_begun_total 5
# TYPE bucketprobe_requests_finished_total counter
bucketprobe_requests_finished_total{outcome="complete"} 5
bucketprobe_requests_finished_total{outcome="client_closed"} 0
# TYPE bucketprobe_lost_total counter
bucketprobe_lost_total{stage="kernel",cause="ring_head"} 0
"""


def record(line: dict[str, Any], operation: str) -> dict[str, Any]:
    attribution = {"label": "exact", "evidence": ["thread"], "unattributed_bytes": 0}
    names = dict.fromkeys(("route", "bucket_id", "artifact_id", "version"))
    return {
        **line, **names, "operation": operation, "outcome": "complete", "duration_ms": 2.0, "phases": {"other": 2.0},
        "attribution": attribution, "digest": Digest().record(), "lost_events": 0, "time": "2026-11-23T00:00:00.000000Z", "id": "1",
    }  # fmt: skip


def findings(client: list[check.Line]) -> demo.Findings:
    result = load.LoadResult(len(client), 0, 0, 0, {}, {"put": 4, "curl_put": 1}, 0, 0, 2.0, 2.5, 100.0, {"p50": 1.0, "p99": 2.0})
    records = [record(line, operation) for line, operation in zip(CLIENT, OPERATIONS, strict=True)]
    end = {"seen": 5, "sent": 5, "faster": 0, "dropped": 0, "lost": {}}
    return demo.Findings(demo.Options(3.0, "threads"), result, METRICS, records, end, client, records, {"agent": demo.Usage(0.1, 1 << 20)})


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """The command's exit code and output for what a demonstration would have found."""

    def judge(found: demo.Findings) -> tuple[int, str]:
        monkeypatch.setattr(demo, "demonstrate", lambda options, progress: found)
        return demo.main([]), capsys.readouterr().out

    before = {number: signal.getsignal(number) for number in demo.SIGNALS}
    yield judge
    for number, handler in before.items():
        signal.signal(number, handler)


def wrong(rows: list[check.Row]) -> set[str]:
    return {row.what for row in rows if not row.agrees}


def compared(client: list[check.Line], metrics: str = METRICS, records: list[check.Line] | None = None) -> set[str]:
    return wrong(check.compare(client, check.Scrape(metrics), findings([]).records if records is None else records))


def test_equal_counts_agree(judged: Any) -> None:
    code, out = judged(findings(list(CLIENT)))
    assert code == 0
    assert "Every number agrees." in out


@pytest.mark.parametrize(
    ("lie", "rows"),
    [
        ({"status": 200}, {"write, 200", "write, 201", "the same by their IDs"}),
        ({"status": None}, {"write, 201", "write, unknown", "answered in full", "the same by their IDs"}),
        ({"bytes_in": 5001}, {"bytes in", "bytes in, of writes", "the same by their IDs"}),
        ({"bytes_out": 299}, {"bytes out", "the same by their IDs"}),
        ({"request_id": "r-1"}, {"the same by their IDs"}),
        ({"method": "GET", "kind": "get"}, {"write, 201", "read, 201", "bytes in, of writes", "the same by their IDs"}),
    ],
)
def test_a_client_that_counted_otherwise_is_a_mismatch(judged: Any, lie: dict[str, Any], rows: set[str]) -> None:
    client = [{**CLIENT[0], **lie}, *CLIENT[1:]]
    assert compared(client) == rows
    code, out = judged(findings(client))
    assert code == 1
    assert out.count("MISMATCH") == len(rows) + 1


def test_a_request_that_only_the_client_counted_is_a_mismatch() -> None:
    more = client_line(9, "GET", 200, 0, 0, "get")
    assert compared([*CLIENT, more]) == {
        "read, 200", "requests begun", "requests finished", "answered in full", "the same by their IDs",
    }  # fmt: skip


def test_a_record_too_many_is_a_mismatch() -> None:
    records = findings([]).records
    assert compared(CLIENT, records=[*records, records[2]]) == {
        "read, 200", "requests finished", "answered in full", "the same by their IDs", "bytes out",
    }  # fmt: skip


def test_swapped_answers_are_a_mismatch_though_every_sum_agrees() -> None:
    records = [dict(line) for line in findings([]).records]
    records[3]["bytes_out"], records[4]["bytes_out"] = records[4]["bytes_out"], records[3]["bytes_out"]
    assert compared(CLIENT, records=list(records)) == {"the same by their IDs"}


def test_metrics_that_differ_from_both_are_a_mismatch() -> None:
    assert compared(CLIENT, METRICS.replace("begun_total 5", "begun_total 6")) == {"requests begun"}
    assert compared(CLIENT, METRICS.replace('status="409",bucket_type="unknown",node_id="n"} 1', 'status="409"} 2')) == {"write, 409"}
    assert compared(CLIENT, METRICS.replace("5700", "5699")) == {"bytes in, of writes"}


def test_losses_are_named(judged: Any) -> None:
    lossy = findings(list(CLIENT))
    lossy.metrics = METRICS.replace('ring_head"} 0', 'ring_head"} 3')
    code, out = judged(lossy)
    assert code == 0, "a loss that no number shows is told, and is no contradiction"
    assert "what the agent says that it lost: kernel.ring_head 3" in out


def test_a_service_that_failed_its_clients_fails(judged: Any) -> None:
    bad = findings(list(CLIENT))
    bad.result = replace(bad.result, corrupt=1)
    code, out = judged(bad)
    assert code == 1
    assert "1 corrupt" in out


def test_colour_only_paints(judged: Any) -> None:
    rows = check.compare(CLIENT, check.Scrape(METRICS), findings([]).records)
    painted = demo.report(findings(list(CLIENT)), rows, capture.Look(True, 80, True))
    plain = demo.report(findings(list(CLIENT)), rows, capture.Look(False, 80, True))
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[32m", "\x1b[36m"):
        assert code in painted
        painted = painted.replace(code, "")
    assert painted == plain


def test_its_own_tables_fit_80_columns() -> None:
    rows = check.compare(CLIENT, check.Scrape(METRICS), findings([]).records)
    look = capture.Look(False, 80, True)
    found = findings(list(CLIENT))
    scrape = check.Scrape(METRICS)
    texts = (demo.metrics_table(scrape), demo.cost_table(found), demo.comparison(found, rows, scrape, look))
    assert max(len(line) for text in texts for line in text.splitlines()) < 80


def test_quantiles_are_prometheus_own() -> None:
    histogram = check.Histogram(((1.0, 10.0), (2.0, 30.0), (float("inf"), 40.0)), 0.0)
    assert histogram.count == 40
    assert histogram.quantile(0.5) == pytest.approx(1.5)
    assert histogram.quantile(0.125) == pytest.approx(0.5)
    assert histogram.quantile(0.9) == 2.0, "beyond the last bound it is the last bound"
    assert check.Histogram((), 0.0).quantile(0.5) is None

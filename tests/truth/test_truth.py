# SPDX-License-Identifier: Apache-2.0
"""The agent against servers that write down what they did and clients that write down what they saw.

Each run starts its own server, agent and load, prints its figures, and keeps them in `out/truth/NAME.json`, from which
`readme_table.py` makes the README's table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPORTS = HERE.parents[1] / "out" / "truth"
spec = importlib.util.spec_from_file_location("score", HERE / "score.py")
assert spec is not None
assert spec.loader is not None
score = importlib.util.module_from_spec(spec)
sys.modules["score"] = score
spec.loader.exec_module(score)

#: The load of the promise. Several client processes, so that clients wait less for Python's interpreter lock.
LOAD = {"connections": 32, "processes": 4, "requests": 10_000, "seed": 1, "put_share": 0.7, "min_bytes": 1024, "max_bytes": 8 << 20}
START_S = 60
STOP_S = 30
RECORDS_S = 10
PRINTED = (
    "requests",
    "found_once",
    *score.GOALS,
    "with_lost_events",
    *(f"{name}_us_{point}" for name in ("duration_error", "start_error", "end_error", "end_too_late") for point in ("p50", "p99", "max")),
    "true_starts_uncertain",
    "true_start_window_us_p50",
    "true_start_window_us_p99",
    "true_times_not_from_kernel",
)

pytestmark = pytest.mark.kernel


@pytest.fixture(name="folder")
def fixture_folder() -> Iterator[Path]:
    """An empty folder on a disk, where fsync(2) takes its time: /tmp may be in memory. The store in it is some gigabytes."""
    with tempfile.TemporaryDirectory(prefix="bucketprobe-truth-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module", name="cache")
def fixture_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@contextmanager
def running(arguments: list[str], log: Path, ready: str) -> Iterator[str]:
    """A process for the time, from when its standard error, which goes to `log`, has a line with `ready`: that line."""
    with log.open("wb") as output, subprocess.Popen(arguments, stderr=output) as process:
        try:
            yield await_line(process, log, ready)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def await_line(process: subprocess.Popen[bytes], log: Path, words: str) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines(keepends=True):
            if words in line and line.endswith("\n"):
                return line
        time.sleep(0.02)
    pytest.fail(f"no line with {words!r} came from {process.args!r}: {log.read_text()}")


def observe(folder: Path, cache: Path, model: str, load: dict[str, Any]) -> tuple[Path, Path, Path]:
    """Run the load against a server under an agent. Returns the files of the records, of the server and of the clients."""
    root, records, truth, client = (folder / name for name in ("root", "records.jsonl", "truth.jsonl", "client.jsonl"))
    module = [sys.executable, "-m"]
    server = [*module, "bucketprobe.demo.bucket", "--port", "0", "--root", f"{root}", "--model", model, "--truth", f"{truth}"]
    with running(server, folder / "server.log", "listening on") as line:
        port = line.split(":")[2].split()[0]
        agent = [f"{Path(sys.executable).parent}/bucketprobe", "run", "--port", port, "--listen", "127.0.0.1:0", "--records", f"{records}"]
        agent += ["--storage-root", f"{root}/data", "--storage-root", f"{root}/tmp", "--metadata", f"{root}/meta/**"]
        agent += ["--run-dir", f"{folder}/run", "--cache-dir", f"{cache}"]
        with running(agent, folder / "agent.log", "ready:"):
            options = [word for name, value in load.items() for word in (f"--{name.replace('_', '-')}", str(value))]
            clients = [*module, "bucketprobe.demo.load", "--port", port, "--log", f"{client}", *options]
            done = subprocess.run(clients, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            deadline = time.monotonic() + RECORDS_S
            while records.read_bytes().count(b"\n") < load["requests"] and time.monotonic() < deadline:
                time.sleep(0.1)
    print((folder / "agent.log").read_text())
    return records, truth, client


def environment() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], name: str, model: str, **changes: Any) -> dict[str, Any]:
    """One run: its scores, printed and kept as a report."""
    load = {**LOAD, **changes}
    scores: dict[str, Any] = score.score(*map(score.read_lines, observe(folder, cache, model, load)))
    report = {"model": model, "load": load, "environment": environment(), "goals": score.GOALS, "scores": scores}
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    with capsys.disabled():
        print(f"\n\n{name}\n{score.table({key: scores[key] for key in PRINTED})}")
    assert scores["requests"] == scores["found_once"] == scores["durations"] == load["requests"]
    # A truth that is itself a guess proves nothing.
    assert scores["true_times_not_from_kernel"] <= 0.01 * load["requests"]
    assert scores["true_starts_uncertain"] <= 0.01 * load["requests"] + load["connections"]
    return scores


@pytest.mark.parametrize("model", ["threads", "prefork"])
def test_the_promise(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert score.shortfalls(measure(folder, cache, capsys, model, model)) == []


@pytest.mark.parametrize("model", ["threads", "prefork"])
def test_other_requests(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert score.shortfalls(measure(folder, cache, capsys, f"{model}-seed-2", model, requests=1500, seed=2)) == []


def test_one_connection(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody waits for anybody, so that only the agent can err. Many requests take 0.2 ms here: the time counts, not its share."""
    scores = measure(folder, cache, capsys, "threads-alone", "threads", requests=500, connections=1, processes=1)
    assert [line for line in score.shortfalls(scores) if not line.startswith("duration error p99")] == []
    assert scores["duration_error_us_p50"] <= 50
    assert scores["duration_error_us_p99"] <= 250

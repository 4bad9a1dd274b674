# SPDX-License-Identifier: Apache-2.0
"""The accuracy matrix: the agent against servers of every model, each of which writes down what it did. Run as root.

    .venv/bin/python tests/truth/matrix.py
    .venv/bin/python tests/truth/matrix.py --only go,nginx --requests 600 --keep /var/tmp/kept

Each run starts its own server, agent and load. Three parts: every server; every server with another seed, and with bodies that
do not differ at their beginning; and an adversary, whose bodies are all alike and whose files tell nothing.

Progress goes to standard error, a row for each run to standard output, its numbers and examples of what was wrong to
out/truth/NAME.json, and all numbers to out/truth/matrix.json, from which `readme_table.py` makes the README's table.

Exit code: 0 all goals were reached, 1 one was not or a run failed, 2 wrong call, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import readme_table
import score
import servers

from bucketprobe.errors import BucketprobeError, UsageError

HERE = Path(__file__).resolve().parent
REPORTS = HERE.parents[1] / "out" / "truth"
AGENT = Path(sys.executable).with_name("bucketprobe")
READY = "ready: metrics on http://"
STOP_S = 30
#: How long records may come after the load's end, in seconds.
RECORDS_S = 10
EXAMPLES = 5
#: How much of each line of a failure is shown.
WORDS = 400

#: Servers in the order of the table, by the names that they have there.
SERVERS = {
    "threads": "threads",
    "prefork": "prefork",
    "waitress": "waitress",
    "asyncio": "asyncio",
    "uvloop": "uvicorn-uvloop",
    "asyncio-pool": "asyncio-pool",
    "asyncio-sync": "asyncio-sync",
    "node-stream": "node-stream",
    "node-buffer": "node-buffer",
    "go": "go",
    "go-writer": "go-writer",
    "nginx": "nginx",
}
#: One thread serves one request at a time, so that nothing may be wrong at all.
THREAD_PER_REQUEST = ("threads", "prefork")
ADVERSARY_MODES = ("block", "pool", "sync")

#: Several client processes, so that clients wait less for Python's interpreter lock. Every fourth upload is slow. Answers never wait
#: for the client: where the server does not tell when it had sent the last byte, its arrival does.
LOAD: Mapping[str, Any] = {
    "connections": 32,
    "processes": 4,
    "requests": 10_000,
    "seed": 1,
    "put_share": 0.7,
    "min_bytes": 1024,
    "max_bytes": 1 << 20,
    "paced_share": 0.25,
    "receive_buffer": 8 << 20,
}
#: Each body has a beginning of its own; those of the other seed above 64 KiB have it in common.
DIFFERENT = {**LOAD, "same_head": 0}
OTHER_SEED = {**LOAD, "requests": 2_000, "seed": 2}
ADVERSE = {**LOAD, "requests": 2_000, "min_bytes": 1 << 20, "same_head": 4096}

#: What an adversary's clients may trust: what is exact is right, and so is what is inferred; the rest is shared or unattributed.
ADVERSE_GOALS = {**score.EXACT_GOALS, "inferred_wrong_bytes": 0, "inferred_wrong_ms": 0}

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run. `part`: which of the three; `most` and `least`: what is promised of its numbers."""

    name: str
    part: str
    server: str
    load: Mapping[str, Any]
    most: Mapping[str, float] = field(default_factory=lambda: score.EXACT_GOALS)
    least: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """What came of one run: the agent's records, the server's lines and the clients'; what the agent says that it lost."""

    records: list[Line]
    truth: list[Line]
    client: list[Line]
    lost: dict[str, int]


class RunFailed(Exception):
    """A run that gave no numbers. The text says why."""


def adversary(mode: str) -> Callable[[servers.Place], list[str]]:
    def command(place: servers.Place) -> list[str]:
        program = [sys.executable, str(HERE / "adversarial_server.py")]
        return [*program, "--root", f"{place.root}", "--truth", f"{place.truth}", "--mode", mode]

    return command


for _mode in ADVERSARY_MODES:
    servers.SERVERS[f"adversary-{_mode}"] = servers.Server(adversary(_mode), f"Files that tell nothing, under asyncio ({_mode}).")


def goals(server: str) -> dict[str, Mapping[str, float]]:
    """What is promised of a server that is no adversary."""
    most = score.GOALS if server in THREAD_PER_REQUEST else score.EXACT_GOALS
    without = () if servers.SERVERS[server].has_metadata else ("metadata_time_right_pct",)
    return {"most": most, "least": {name: floor for name, floor in score.FLOORS.items() if name not in without}}


def every_server(load: Mapping[str, Any] = DIFFERENT) -> list[Run]:
    return [Run(name, "every server", server, load, **goals(server)) for name, server in SERVERS.items()]


def other_seed(load: Mapping[str, Any] = OTHER_SEED) -> list[Run]:
    return [Run(f"{name}-seed-2", "other seed", server, load, **goals(server)) for name, server in SERVERS.items()]


def adversaries(load: Mapping[str, Any] = ADVERSE) -> list[Run]:
    return [Run(f"adversary-{mode}", "adversary", f"adversary-{mode}", load, ADVERSE_GOALS) for mode in ADVERSARY_MODES]


# --- one run ---


def observe(run: Run, folder: Path, cache: Path, *options: str) -> Observed:
    """Put the load on the server under an agent. `options`: more of the agent's. Raises RunFailed."""
    records, client = folder / "records.jsonl", folder / "client.jsonl"
    try:
        with (
            servers.started(run.server, folder, cache=cache / "servers") as server,
            agent(server, folder, cache, records, options) as metrics,
        ):
            put_load(server, run.load, client)
            await_records(records, run.load["requests"])
            lost = losses(metrics)
        return Observed(score.read_lines(records), server.truth(), score.read_lines(client), lost)
    except (servers.CannotStart, BucketprobeError) as error:
        raise RunFailed(f"{error}") from error


@contextmanager
def agent(server: servers.Running, folder: Path, cache: Path, records: Path, options: Sequence[str]) -> Iterator[str]:
    """An agent that observes the server for the time: where its metrics are."""
    command = [str(AGENT), "run", "--port", f"{server.port}", "--listen", "127.0.0.1:0", "--records", str(records)]
    command += ["--run-dir", str(folder / "run"), "--cache-dir", str(cache / "probes"), *options]
    for name, values in (("--storage-root", server.storage_roots), ("--metadata", server.metadata)):
        command += [word for value in values for word in (name, str(value))]
    log = folder / "agent.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=output)
    try:
        line = servers.await_line(process, log, READY)
        yield "http://" + line.partition(READY)[2].split()[0]
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def put_load(server: servers.Running, load: Mapping[str, Any], log: Path) -> None:
    command = [*server.load, "--port", f"{server.port}", "--log", f"{log}"]
    command += [word for name, value in load.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last_words = server.log_path.read_text(errors="replace")[-2000:]
        raise RunFailed(f"the load ended with {done.returncode}: {done.stdout}{done.stderr}{last_words}")


def await_records(records: Path, count: int) -> None:
    deadline = time.monotonic() + RECORDS_S
    while records.read_bytes().count(b"\n") < count and time.monotonic() < deadline:
        time.sleep(0.1)


def losses(metrics: str) -> dict[str, int]:
    """What the agent counts as lost, by stage and cause."""
    with urllib.request.urlopen(metrics, timeout=STOP_S) as answer:
        text = answer.read().decode()
    found = re.findall(r'^bucketprobe_lost_total\{cause="(\w+)",stage="(\w+)"\} (\S+)', text, re.MULTILINE)
    return {f"{stage}.{cause}": int(float(value)) for cause, stage, value in found if float(value)}


def report(run: Run, seen: Observed) -> dict[str, Any]:
    """The run's numbers, and which goals it missed."""
    scores = score.score(seen.records, seen.truth, seen.client)
    return {
        "name": run.name,
        "part": run.part,
        "server": run.server,
        "load": dict(run.load),
        "goals": {"most": dict(run.most), "least": dict(run.least)},
        "missed": score.shortfalls(scores, run.most, run.least) + doubts(run, scores),
        "lost": seen.lost,
        "environment": environment(),
        "scores": scores,
    }


def doubts(run: Run, scores: Mapping[str, Any]) -> list[str]:
    """Why the truth is itself a guess, and so proves nothing."""
    few = 0.01 * run.load["requests"]
    found = []
    if scores["requests"] != run.load["requests"]:
        found.append(f"the server wrote down {scores['requests']:,} of {run.load['requests']:,} requests")
    if scores["true_times_not_from_kernel"] > few:
        found.append(f"{scores['true_times_not_from_kernel']:,} true times are not the kernel's")
    if scores["true_starts_uncertain"] > few + run.load["connections"]:
        found.append(f"{scores['true_starts_uncertain']:,} true starts are uncertain")
    return found


def environment() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure(run: Run, folder: Path, cache: Path, *options: str) -> dict[str, Any]:
    """One run, kept as out/truth/NAME.json with examples of what was wrong. Raises RunFailed."""
    seen = observe(run, folder, cache, *options)
    found = report(run, seen)
    REPORTS.mkdir(parents=True, exist_ok=True)
    examples = score.examples(seen.records, seen.truth, EXAMPLES)
    (REPORTS / f"{run.name}.json").write_text(json.dumps({**found, "examples": examples}, indent=2) + "\n")
    return found


# --- all runs ---


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="matrix.py",
        description="Compare the agent's records with servers that know the truth (as root).",
        epilog="Example: .venv/bin/python tests/truth/matrix.py --only go,nginx --requests 600",
    )
    parser.add_argument("--only", metavar="NAMES", help="some runs, with commas between; a name may end in '*'")
    parser.add_argument("--requests", type=int, metavar="N", help="of each run, instead of 10,000 or 2,000")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep records, truth, client log and the logs of each run in DIR/NAME")
    parser.add_argument("--list", action="store_true", help="print the names of all runs")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Run]:
    """Raises UsageError."""
    runs = [*every_server(), *other_seed(), *adversaries()]
    if options.only:
        wanted = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in options.only.split(",")]
        runs = [run for run in runs if any(name.fullmatch(run.name) for name in wanted)]
        if not runs:
            raise UsageError(f"no run is called {options.only}; see --list")
    if options.requests:
        runs = [Run(run.name, run.part, run.server, {**run.load, "requests": options.requests}, run.most, run.least) for run in runs]
    return runs


@contextmanager
def folder_for(run: Run, keep: Path | None) -> Iterator[Path]:
    """An empty folder on a disk, where fsync(2) takes its time: /tmp may be in memory. The store in it is some gigabytes."""
    with tempfile.TemporaryDirectory(prefix="bucketprobe-truth-", dir="/var/tmp") as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            if keep is not None:
                (keep / run.name).mkdir(parents=True, exist_ok=True)
                for path in (*folder.glob("*.jsonl"), *folder.glob("*.log")):
                    shutil.copy(path, keep / run.name)


def progress(text: str) -> None:
    """A line that is rewritten, on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def brief(text: str) -> str:
    """The first and the last line of what a program said, which tell most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0][:WORDS]} ... {lines[-1][:WORDS]}"


def run_all(runs: Sequence[Run], keep: Path | None, cache: Path) -> list[dict[str, Any]]:
    """Each run's report, or for one that failed its name and why, printed as it goes."""
    reports: list[dict[str, Any]] = []
    part = ""
    for number, run in enumerate(runs, 1):
        if run.part != part:
            part = run.part
            print(f"\n{part}: {run.load['requests']:,} requests each\n{readme_table.text_header()}", flush=True)
        progress(f"{number} of {len(runs)}: {run.name} ...")
        begin = time.monotonic()
        try:
            with folder_for(run, keep) as folder:
                reports.append(measure(run, folder, cache))
        except RunFailed as failure:
            reports.append({"name": run.name, "part": run.part, "server": run.server, "missed": [brief(f"{failure}")]})
        progress("")
        row = readme_table.text_row(reports[-1]) if "scores" in reports[-1] else f"{run.name:<16} failed"
        print(f"{row}  {time.monotonic() - begin:3.0f} s", flush=True)
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        runs = chosen(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.list:
        print("\n".join(run.name for run in runs))
        return 0
    if os.geteuid():
        print("error: only root may load probes; run this as root", file=sys.stderr)
        return 2
    # Probes and servers are built once for all runs.
    with tempfile.TemporaryDirectory(prefix="bucketprobe-truth-cache-", dir="/var/tmp") as cache:
        try:
            reports = run_all(runs, options.keep, Path(cache))
        except KeyboardInterrupt:
            return 130
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / "matrix.json").write_text(json.dumps({"environment": environment(), "runs": reports}, indent=2) + "\n")
    missed = [f"{found['name']}: {line}" for found in reports for line in found["missed"]]
    print(f"\n{len(missed)} goals missed:\n  " + "\n  ".join(missed) if missed else "\nall goals were reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

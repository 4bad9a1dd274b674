# SPDX-License-Identifier: Apache-2.0
"""The accuracy of digests: the agent against servers that know how long they hashed, and what came of it. Run as root.

    .venv/bin/python tests/truth/digests.py
    .venv/bin/python tests/truth/digests.py --only 'threads-*,go-64K' --seconds 8 --keep /var/tmp/kept

Each run starts its own server, agent and load. Five parts, of which the runs of COMMON are made unless --only or --all says otherwise:

    time       each server with pieces of each size: uploads in a closed loop; the sums of digest time, and the values
    manners    other ways to hash, with pieces of 64 KiB: in a pool of threads, the whole body at once, only what was read back,
               and among digests of other things
    corrupt    uploads of which a few have another digest than declared; some of these the server hides, and answers 201
    stored     uploads that are read back after they were stored, one of them changed in between
    reads      reads with a digest, for which the server hashes the file before it answers

Values and mismatches are promised while every digest is looked at, so in mode always. No value may be wrong and no mismatch uncounted; a
few values may be unknown where no key tells whose they are (`values_pct`). Times are promised in the first part, in both modes (runs in
mode auto have names that end in -auto).

Progress goes to standard error, tables to standard output, the numbers of each run to out/truth/digests/NAME.json.

Exit code: 0 all goals were reached, 1 one was not or a run failed, 2 wrong call, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import digest_score
import matrix
import servers

from bucketprobe.demo import load as loads
from bucketprobe.demo.check import Scrape
from bucketprobe.errors import BucketprobeError, UsageError

REPORTS = matrix.REPORTS / "digests"
MISMATCHES = "bucket_integrity_digest_mismatch_count_total"
VERIFIED = "bucket_integrity_post_storage_verify_count_total"
ATTACHED = "bucketprobe_digest_attached"
#: How long after its start the agent may attach, and when nothing more is to come, in seconds.
ATTACHED_S, STEADY_S = 10, 1
#: How long the metrics may follow the records, in seconds.
METRICS_S = 5
KIB = 1024
CHUNKS = {"16K": 16 * KIB, "64K": 64 * KIB, "256K": 256 * KIB, "1M": 1024 * KIB}
#: Uploads have at least so many pieces.
PIECES = 4
LEAST_BYTES = 1 << 20
REQUESTS = 1000
CORRUPTED, HIDDEN = 7, 3
#: Of the second kind of uploads: half of them alike in size, so that size does not tell whose a digest is.
SIZES = (256 * KIB, 16 * KIB, 256 * KIB, 100_003, 256 * KIB, 64 * KIB, 256 * KIB, 1 << 20)
HIDE, CORRUPT_STORED = ("X-Test-Hide", "1"), ("X-Test-Corrupt-Stored", "1")

#: The agent's, and how the names of the runs end.
MODES = ("auto", "always")
SUFFIX = {"auto": "-auto", "always": ""}
#: Digest time may be off by so much, in per cent; on CPython whose threads serve one request each, with pieces from 64 KiB on, by less.
OFF_PCT, OFF_SYNC_PCT = 5.0, 3.0
#: Of how many of the requests it is to be known.
KNOWN_PCT = 90.0
#: Of how many uploads the value is to be known where those of one size that are in flight together are told apart by nothing.
WITHOUT_KEY_PCT = 99.0

Line = Mapping[str, Any]
Client = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A server in one of its variants. `command`: of its options; `chunk`: the options for a size of the pieces; `sync`: CPython, where a
    thread serves one request at a time; `values_pct`: of how many uploads the value is to be known in mode always, where no key of the
    service tells whose digest it is."""

    command: Callable[..., Callable[[servers.Place], list[str]]]
    chunk: Callable[[int], list[str]]
    programs: Mapping[str, str] = field(default_factory=dict)
    connections: int = 4
    workers: int | None = None
    sync: bool = False
    values_pct: float = 100.0

    def server(self, chunk: int | None, *options: str) -> servers.Server:
        sized = [] if chunk is None else self.chunk(chunk)
        return servers.Server(self.command(*sized, *options), "", programs=self.programs)


def python(model: str, *options: str, **more: Any) -> Case:
    """The reference Bucket."""
    return Case(
        lambda *sized: servers.digest_bucket(model, *sized, *options),
        lambda chunk: ["--chunk-size", f"{chunk}", "--fill"],
        **more,
    )


def node(mode: str) -> Case:
    return Case(
        lambda *sized: servers.digest_node(mode, *sized),
        lambda chunk: [f"--chunk={chunk}"],
        {"node": "nodejs"},
        values_pct=WITHOUT_KEY_PCT,
    )


def golang(*options: str) -> Case:
    return Case(lambda *sized: servers.go(*sized, *options), lambda chunk: ["-chunk", f"{chunk}"], {"go": "golang-go"})


CASES: Mapping[str, Case] = {
    "threads": python("threads", sync=True),
    "threads-alone": python("threads", connections=1, sync=True),
    "prefork": python("prefork", workers=4, sync=True),
    "asyncio": python("asyncio"),
    "asyncio-pool": python("asyncio-pool"),
    "node": node("stream"),
    "go": golang(),
}
#: With pieces of 64 KiB.
MANNERS: Mapping[str, Case] = {
    "threads-whole": python("threads", "--manner", "whole", connections=1),
    "threads-read-back": python("threads", "--manner", "read-back", connections=1),
    "threads-more": python("threads", "--manner", "more", connections=1),
    "asyncio-hash-pool": python("asyncio-pool", "--manner", "pool"),
    "asyncio-sync": python("asyncio-sync", values_pct=WITHOUT_KEY_PCT),
    "node-buffer": node("buffer"),
    "go-writer": golang("-writer"),
}
#: Those under which mismatches and what is read back are promised to be seen.
INTEGRITY = ("threads", "asyncio", "asyncio-pool", "node", "go")
#: What is run unless it is said otherwise, in some eight minutes: sizes differ where windows and models have to cope with them.
COMMON = (
    *(f"{name}-{size}-auto" for name in ("threads", "prefork", "asyncio", "node", "go") for size in CHUNKS),
    *(f"{name}-64K" for name in ("threads", "prefork", "asyncio", "node", "go", *MANNERS)),
    *(f"{name}-{part}" for part in ("corrupt", "stored", "reads") for name in ("threads", "asyncio-pool", "node", "go")),
)
#: Threads here contend, as they do anywhere; only values count.
INTEGRITY_CONNECTIONS = 8


@dataclass(frozen=True)
class Run:
    """One run. `chunk`: bytes of a piece, None: as the server has it; `most_off_pct`: what is promised of the sums of time; `mode`: the
    agent's."""

    name: str
    part: str
    case: Case
    chunk: int | None = None
    most_off_pct: float | None = None
    mode: str = "always"


@dataclass(frozen=True)
class Seen:
    """What came of a run: the agent's records and metrics, the server's lines, the clients'."""

    records: list[Line]
    truth: list[Line]
    client: list[Line]
    scrape: Scrape


@dataclass(frozen=True)
class Options:
    seconds: float = 5.0
    requests: int = REQUESTS
    keep: Path | None = None


class RunFailed(Exception):
    """A run that gave no numbers. The text says why."""


def all_runs(chunks: Sequence[str] = tuple(CHUNKS)) -> list[Run]:
    timed = [
        Run(name + SUFFIX[mode], "time", case, CHUNKS[size], promised(case, size), mode)
        for server, case in CASES.items()
        for size in chunks
        for name in (f"{server}-{size}",)
        for mode in MODES
    ]
    manners = [Run(f"{name}-64K", "manners", case, CHUNKS["64K"]) for name, case in MANNERS.items()]
    others = [Run(f"{name}-{part}", part, CASES[name]) for part in ("corrupt", "stored", "reads") for name in INTEGRITY]
    return [*timed, *manners, *others]


def promised(case: Case, size: str) -> float:
    return OFF_SYNC_PCT if case.sync and CHUNKS[size] >= CHUNKS["64K"] else OFF_PCT


# --- one run ---


def observe(run: Run, folder: Path, cache: Path, options: Options) -> Seen:
    """Put the run's load on its server under an agent. Raises RunFailed."""
    records, log = folder / "records.jsonl", folder / "client.jsonl"
    switches = {"stored": ["--verify"], "reads": ["--verify-reads"]}.get(run.part, [])
    try:
        with (
            servers.started(run.name, folder, server=run.case.server(run.chunk, *switches), workers=run.case.workers) as server,
            matrix.agent(server, folder, cache, records, ["--digest", run.mode]) as metrics,
        ):
            await_probes(metrics)
            if run.part in ("time", "manners"):
                matrix.put_load(server, closed_loop(run, options), log)
            else:
                talk(server.port, plans_of(run.part, options.requests), log)
            client = servers.read_lines(log)
            matrix.await_records(records, len(client))
            scrape = settled(metrics, len(client))
        asked = {line["request_id"] for line in client}
        return Seen(servers.read_lines(records), [line for line in server.truth() if line["request_id"] in asked], client, scrape)
    except (servers.CannotStart, matrix.RunFailed, BucketprobeError) as error:
        raise RunFailed(f"{error}") from error


def await_probes(metrics: str) -> None:
    """Until the probes on digests are attached, and to no more processes since a while; or for a time, since the mode may want none."""
    deadline = time.monotonic() + ATTACHED_S
    seen: Mapping[tuple[str, ...], float] = {}
    since = time.monotonic()
    while time.monotonic() < min(deadline, since + STEADY_S) or (not any(seen.values()) and time.monotonic() < deadline):
        now = scraped(metrics).by("part", name=ATTACHED)
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)


def scraped(metrics: str) -> Scrape:
    with urllib.request.urlopen(metrics, timeout=METRICS_S) as answer:
        return Scrape(answer.read().decode())


def closed_loop(run: Run, options: Options) -> dict[str, Any]:
    """The options of the load: uploads alone, each connection's next when the one before was answered."""
    size = max(LEAST_BYTES, PIECES * (run.chunk or 0))
    return {"connections": run.case.connections, "seconds": options.seconds, "put_share": 1, "fixed_bytes": size, "seed": 1}


def settled(metrics: str, count: int) -> Scrape:
    """The metrics, as soon as so many requests are in them, or after a time."""
    deadline = time.monotonic() + METRICS_S
    while True:
        scrape = scraped(metrics)
        counted = sum(scrape.total(f"bucket_artifact_{name}_count_total") for name in ("write", "read"))
        if counted >= count or time.monotonic() > deadline:
            return scrape
        time.sleep(0.1)


# --- the load of the other parts: requests that are known one by one ---


def plans_of(part: str, count: int) -> list[loads.Plan]:
    """All requests of a part, in their order; those that err are spread over them."""
    block = loads.Block(1, max(SIZES), same_head=0)
    contents = [block.content(SIZES[i % len(SIZES)], i.to_bytes(loads.KEY_BYTES, "big")) for i in range(count)]
    if part == "reads":
        half = contents[: count // 2]
        return [upload(i, content) for i, content in enumerate(half)] + [read(i, content) for i, content in enumerate(half)]
    if part == "stored":
        chosen = {count // 2}
        return [upload(i, content, CORRUPT_STORED, status=500) if i in chosen else upload(i, content) for i, content in enumerate(contents)]
    wrong = [(2 * n + 1) * count // (2 * CORRUPTED) for n in range(CORRUPTED)]
    hidden = set(wrong[1 : 1 + HIDDEN])
    return [
        upload(i, content) if i not in wrong
        else upload(i, content, HIDE, wrong=True) if i in hidden
        else upload(i, content, status=400, wrong=True)
        for i, content in enumerate(contents)
    ]  # fmt: skip


def upload(index: int, content: loads.Content, *more: tuple[str, str], status: int = 201, wrong: bool = False) -> loads.Plan:
    """`wrong`: it declares another digest than it has."""
    path = f"/v1/user-{index % 7}/d-{index}"
    declared = "sha256:" + content.digest[:6:-1] if wrong else content.digest
    headers = (
        ("X-Artifact-Version", "1.0"),
        ("X-Artifact-Digest", declared),
        ("X-Uploaded-By", "digests"),
        ("X-Provenance-Source", "digests"),
        ("Content-Type", "application/octet-stream"),
        *more,
    )
    hidden = "_hidden" if HIDE in more else ""
    return loads.Plan(f"put_wrong{hidden}" if wrong else "put", "PUT", path, status, headers, content)


def read(index: int, content: loads.Content) -> loads.Plan:
    target = f"/v1/user-{index % 7}/d-{index}?version=1.0&digest={content.digest}"
    return loads.Plan("get_verified", "GET", target, 200, digest=content.digest)


def talk(port: int, plans: Sequence[loads.Plan], log: Path) -> None:
    """Make all requests on a few connections, uploads before reads. Raises RunFailed where an answer is not the expected one."""
    options = loads.LoadOptions(port, connections=INTEGRITY_CONNECTIONS, log=log)
    block = loads.Block(1, max(SIZES), same_head=0)
    for method in ("PUT", "GET"):
        numbered = [(number, plan) for number, plan in enumerate(plans) if plan.method == method]

        def work(index: int, some: Sequence[tuple[int, loads.Plan]] = numbered) -> None:
            client, lines = loads.Client(options, block), loads.Log(log)
            for number, plan in some[index::INTEGRITY_CONNECTIONS]:
                outcome = client.exchange(plan, f"digests-{number}")
                lines.write(loads.log_record(f"digests-{number}", plan, plan.kind, outcome))
                if outcome.status != plan.expected_status:
                    raise RunFailed(f"{plan.kind} got {outcome.status} ({outcome.error}), and {plan.expected_status} is expected")
            client.close()
            lines.close()

        with ThreadPoolExecutor(INTEGRITY_CONNECTIONS) as pool:
            list(pool.map(work, range(INTEGRITY_CONNECTIONS)))


# --- what is made of it ---


def report(run: Run, seen: Seen) -> dict[str, Any]:
    """The run's numbers, and which goals it missed."""
    found = digest_score.score(seen.records, seen.truth)
    wrong = [line["request_id"] for line in seen.client if line["kind"].startswith(("put_wrong", "put_bad_digest"))]
    hidden = [line["request_id"] for line in seen.client if line["kind"] == "put_wrong_hidden"]
    mismatches = digest_score.mismatch_scores(seen.records, wrong, hidden)
    counted = {"mismatches": seen.scrape.total(MISMATCHES), "verified": verified_by_result(seen.scrape)}
    missed = [f"{found['missing']:,} requests have no record"] if found["missing"] else []
    if run.most_off_pct is not None:
        missed += digest_score.time_shortfalls(found, run.most_off_pct, KNOWN_PCT)
    if run.mode == "always":
        missed += digest_score.value_shortfalls(found, run.case.values_pct)
        missed += digest_score.mismatch_shortfalls(mismatches, counted["mismatches"])
        missed += digest_score.verify_shortfalls(found, counted["verified"]) if run.part in ("stored", "reads") else []
    return {
        "name": run.name,
        "part": run.part,
        "chunk": run.chunk,
        "mode": run.mode,
        "missed": missed,
        "scores": found,
        "mismatches": mismatches,
        "metrics": counted,
        "environment": matrix.environment(),
    }


def verified_by_result(scrape: Scrape) -> dict[str, float]:
    return {result: count for (result,), count in scrape.by("result", name=VERIFIED).items()}


def text(found: Mapping[str, Any]) -> str:
    mismatches = found["mismatches"]
    lines = [f"--- {found['name']} ({found['mode']})", digest_score.table(found["scores"])]
    lines.append(
        f"mismatches: {mismatches['told']} of {mismatches['declared_wrong']} told ({mismatches['hidden_told']} of {mismatches['hidden']}"
        f" hidden), {len(mismatches['invented_ids'])} invented, {mismatches['by_source']}; metrics {found['metrics']}"
    )
    return "\n".join([*lines, *(f"MISSED {line}" for line in found["missed"])])


def measure(run: Run, folder: Path, cache: Path, options: Options) -> dict[str, Any]:
    """One run, kept as out/truth/digests/NAME.json. Raises RunFailed."""
    found = report(run, observe(run, folder, cache, options))
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / f"{run.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


# --- all runs ---


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="digests.py",
        description="Compare digests in the agent's records with servers that know the truth (as root).",
        epilog="Example: .venv/bin/python tests/truth/digests.py --only 'threads-*' --chunks 64K,1M --seconds 8",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--only", metavar="NAMES", help="some runs, with commas between; a name may end in '*'")
    choice.add_argument("--all", action="store_true", help="all runs, not only the common ones")
    parser.add_argument("--chunks", metavar="SIZES", default=",".join(CHUNKS), help="sizes of the pieces (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of load in each run (default %(default)s)")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help="of each run without a time (default %(default)s)")
    parser.add_argument("--digest", choices=MODES, metavar="MODE", help="only the runs in this mode of the agent: auto or always")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep records, truth, client log and the logs of each run in DIR/NAME")
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and make none")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Run]:
    """Raises UsageError."""
    sizes = options.chunks.split(",")
    if unknown := set(sizes) - CHUNKS.keys():
        raise UsageError(f"there is no size {', '.join(sorted(unknown))}; choose from {', '.join(CHUNKS)}")
    runs = [run for run in all_runs(sizes) if options.digest in (None, run.mode)]
    if options.only:
        wanted = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in options.only.split(",")]
        runs = [run for run in runs if any(name.fullmatch(run.name) for name in wanted)]
    elif not options.all:
        runs = [run for run in runs if run.name in COMMON]
    if not runs:
        raise UsageError("no run is chosen by that; see --all --list")
    return runs


@contextmanager
def kept(run: Run, keep: Path | None) -> Iterator[Path]:
    with matrix.folder_for(matrix.Run(run.name, run.part, "", {}), keep) as folder:
        yield folder


def run_all(runs: Sequence[Run], cache: Path, options: Options) -> list[dict[str, Any]]:
    """Each run's report, or for one that failed its name and why, printed as it goes."""
    reports: list[dict[str, Any]] = []
    for number, run in enumerate(runs, 1):
        matrix.progress(f"{number} of {len(runs)}: {run.name} ...")
        try:
            with kept(run, options.keep) as folder:
                reports.append(measure(run, folder, cache, options))
        except RunFailed as failure:
            reports.append({"name": run.name, "part": run.part, "missed": [matrix.brief(f"{failure}")]})
        matrix.progress("")
        print(text(reports[-1]) if "scores" in reports[-1] else f"--- {run.name} failed: {reports[-1]['missed'][0]}", flush=True)
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    values = parse(arguments)
    try:
        runs = chosen(values)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if values.list:
        print("\n".join(run.name for run in runs))
        return 0
    if os.geteuid():
        print("error: only root may load probes; run this as root", file=sys.stderr)
        return 2
    # Probes are compiled once for all runs.
    with tempfile.TemporaryDirectory(prefix="bucketprobe-truth-cache-", dir="/var/tmp") as cache:
        try:
            reports = run_all(runs, Path(cache), Options(values.seconds, values.requests, values.keep))
        except KeyboardInterrupt:
            return 130
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / "digests.json").write_text(json.dumps({"environment": matrix.environment(), "runs": reports}, indent=2) + "\n")
    missed = [f"{found['name']}: {line}" for found in reports for line in found["missed"]]
    print(f"\n{len(missed)} goals missed:\n  " + "\n  ".join(missed) if missed else "\nall goals were reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Digests: the servers that know the truth about them, and the agent against these.

A part of the runs of digests.py, with fewer requests. What is promised of times is held there; here they may be off by more, since a
short run on a busy machine has few windows of calibration. No value may be wrong and no mismatch miscounted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the runner is a script, beside which its parts are
try:
    import digests
    import servers
finally:
    sys.path.remove(str(HERE))

OFF_PCT = 12.0
FEW = 100
SHORT = digests.Options(seconds=3, requests=140)
RUNS = {run.name: run for run in digests.all_runs(("64K",))}

Line = dict[str, Any]


@pytest.fixture(name="folder")
def fixture_folder() -> Iterator[Path]:
    """An empty folder on a disk, where fsync(2) takes its time: /tmp may be in memory."""
    with TemporaryDirectory(prefix="bucketprobe-digests-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module", name="cache")
def fixture_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where probes are compiled, once for all."""
    return tmp_path_factory.mktemp("cache")


# --- the servers alone ---


def serve(case: digests.Case, part: str, folder: Path, *options: str) -> tuple[dict[str, Line], dict[str, Line]]:
    """The requests of a part against a server: the clients' log and its truth, by request ID."""
    log = folder / "client.jsonl"
    server = case.server(digests.CHUNKS["64K"], *options)
    with servers.started("digests", folder, server=server, workers=case.workers) as running:
        digests.talk(running.port, digests.plans_of(part, FEW), log)
    client = {line["request_id"]: line for line in servers.read_lines(log)}
    truth = {line["request_id"]: line for line in running.truth()}
    assert client.keys() == truth.keys()
    assert len(client) == FEW
    return client, truth


def digest_of(line: Line, step: str = "digest_cpu") -> Line:
    return {one["step"]: one for one in line["steps"]}[step]


@pytest.mark.parametrize("name", [*digests.CASES, *digests.MANNERS])
def test_a_server_tells_what_it_hashed_and_hides_what_it_is_asked_to(name: str, folder: Path) -> None:
    client, truth = serve({**digests.CASES, **digests.MANNERS}[name], "corrupt", folder)
    declared = {name: plan.headers[1][1] for name, plan in named(digests.plans_of("corrupt", FEW))}
    for request_id, seen in client.items():
        line = truth[request_id]
        assert (line["computed"] != declared[request_id]) == seen["kind"].startswith("put_wrong"), line
        assert digest_of(line)["bytes"] == digest_of(line, "digest")["bytes"] == seen["bytes_in"]
        assert digest_of(line)["ns"] > 0
    wrong = Counter((seen["kind"], seen["status"]) for seen in client.values() if seen["kind"] != "put")
    assert wrong == {("put_wrong", 400): digests.CORRUPTED - digests.HIDDEN, ("put_wrong_hidden", 201): digests.HIDDEN}


def named(plans: list[Any]) -> list[tuple[str, Any]]:
    return [(f"digests-{number}", plan) for number, plan in enumerate(plans)]


@pytest.mark.parametrize("name", ["threads", "asyncio-pool", "node", "go"])
def test_a_server_reads_back_and_finds_the_one_file_that_was_changed(name: str, folder: Path) -> None:
    client, truth = serve(digests.CASES[name], "stored", folder, "--verify")
    for request_id, seen in client.items():
        line = truth[request_id]
        assert line["verified"] == (["mismatch"] if seen["status"] == 500 else ["match"])
        assert digest_of(line)["bytes"] == 2 * seen["bytes_in"]
    assert Counter(seen["status"] for seen in client.values()) == {201: FEW - 1, 500: 1}


@pytest.mark.parametrize("name", ["threads", "node", "go"])
def test_a_server_hashes_what_it_answers(name: str, folder: Path) -> None:
    client, truth = serve(digests.CASES[name], "reads", folder, "--verify-reads")
    reads = [line for line in client.values() if line["method"] == "GET"]
    assert len(reads) == FEW // 2
    for seen in reads:
        line = truth[seen["request_id"]]
        assert line["verified"] == ["match"]
        assert digest_of(line)["bytes"] == seen["bytes_out"]


def test_pieces_are_as_long_as_asked(folder: Path) -> None:
    """The last one apart, the file's size in pieces; a server that takes what comes makes more of them."""
    client, truth = serve(digests.CASES["threads"], "corrupt", folder)
    size = digests.CHUNKS["64K"]
    assert all(digest_of(truth[name])["calls"] == -(-seen["bytes_in"] // size) for name, seen in client.items())


# --- the agent ---


@pytest.fixture(name="missed")
def fixture_missed(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that makes a run and says which goals it missed."""

    def measure(run: digests.Run) -> list[str]:
        report = digests.measure(run, folder, cache, SHORT)
        with capsys.disabled():
            print(f"\n{digests.text(report)}")
        print((folder / "agent.log").read_text())
        missed: list[str] = report["missed"]
        return missed

    return measure


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["threads", "node", "go"])
def test_time_and_value(missed: Any, name: str) -> None:
    assert missed(replace(RUNS[f"{name}-64K"], most_off_pct=OFF_PCT)) == []


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["threads", "asyncio-pool", "node", "go"])
def test_every_corrupted_upload_is_counted_and_no_other(missed: Any, name: str) -> None:
    assert missed(RUNS[f"{name}-corrupt"]) == []


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["threads", "node"])
def test_a_file_that_was_changed_in_storage_is_counted_once(missed: Any, name: str) -> None:
    assert missed(RUNS[f"{name}-stored"]) == []

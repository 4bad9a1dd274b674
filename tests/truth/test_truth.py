# SPDX-License-Identifier: Apache-2.0
"""The agent against servers that write down what they did and clients that write down what they saw.

A part of the matrix of `make truth`, with fewer requests. Each run starts its own server, agent and load, prints its row, and
keeps its numbers and examples of what was wrong in `out/truth/NAME.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the matrix is a script, beside which its parts are
try:
    import matrix
    import readme_table
    import score
    import servers
finally:
    sys.path.remove(str(HERE))

REQUESTS = 600
#: Servers that differ most in what tells whose file work is.
FEW = ("asyncio", "asyncio-pool", "node-buffer", "go")
#: Bodies as large as they come, and answers that clients hold up: these servers tell themselves when the last byte was sent.
LARGE = {**matrix.LOAD, "max_bytes": 8 << 20, "requests": 3_000, "receive_buffer": 1 << 16}

pytestmark = pytest.mark.kernel


@pytest.fixture(name="folder")
def fixture_folder() -> Iterator[Path]:
    """An empty folder on a disk, where fsync(2) takes its time: /tmp may be in memory."""
    with TemporaryDirectory(prefix="bucketprobe-truth-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module", name="cache")
def fixture_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where probes and servers are built, once for all."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(name="missed")
def fixture_missed(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that makes a run and says which goals it missed."""

    def measure(run: matrix.Run) -> list[str]:
        report = matrix.measure(run, folder, cache)
        with capsys.disabled():
            print(f"\n{readme_table.text_header()}\n{readme_table.text_row(report)}")
        print((folder / "agent.log").read_text())
        print(score.table(report["scores"]))
        missed: list[str] = report["missed"]
        return missed

    return measure


def run(server: str, load: Mapping[str, Any], name: str) -> matrix.Run:
    return matrix.Run(name, "test", server, load, **matrix.goals(server))


@pytest.mark.parametrize("server", matrix.THREAD_PER_REQUEST)
def test_the_promise(missed: Any, server: str) -> None:
    assert missed(run(server, LARGE, f"{server}-large")) == []


@pytest.mark.parametrize("server", [name for name in servers.SERVERS if not name.startswith("adversary-")])
def test_every_server(missed: Any, server: str) -> None:
    assert missed(run(server, {**matrix.DIFFERENT, "requests": REQUESTS}, f"{server}-short")) == []


@pytest.mark.parametrize("server", FEW)
def test_other_requests(missed: Any, server: str) -> None:
    assert missed(run(server, {**matrix.OTHER_SEED, "requests": REQUESTS}, f"{server}-short-seed-2")) == []


@pytest.mark.parametrize("run", matrix.adversaries({**matrix.ADVERSE, "requests": 300}), ids=lambda run: run.name)
def test_an_adversary_gets_no_false_promise(missed: Any, run: matrix.Run) -> None:
    assert missed(run) == []


def test_one_connection(folder: Path, cache: Path) -> None:
    """Nobody waits for anybody, so that only the agent can err. Many requests take 0.2 ms here: the time counts, not its share."""
    load = {**LARGE, "requests": 500, "connections": 1, "processes": 1, "paced_share": 0}
    alone = run("threads", load, "threads-alone")
    report = matrix.measure(alone, folder, cache)
    assert [line for line in report["missed"] if not line.startswith("duration error p99")] == []
    assert report["scores"]["duration_error_us_p50"] <= 50
    assert report["scores"]["duration_error_us_p99"] <= 250

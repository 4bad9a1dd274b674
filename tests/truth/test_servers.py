# SPDX-License-Identifier: Apache-2.0
"""The servers that know the truth: that they answer as the load expects, and that what they write down is true.

What a line says is held against the clients' log and against the files that are there afterwards.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("servers", HERE / "servers.py")
assert spec is not None
assert spec.loader is not None
servers = importlib.util.module_from_spec(spec)
sys.modules["servers"] = servers
spec.loader.exec_module(servers)

#: Above waitress's 512 KiB and many of the other limits of buffers; enough requests for every kind to occur.
LOAD = ("--connections", "4", "--requests", "250", "--max-bytes", "1500000")
KINDS = {"put", "put_again", "put_conflict", "put_bad_digest", "get", "get_missing", "get_mismatch", "metadata", "versions"}
DAV_KINDS = {"put", "put_again", "get", "get_missing"}

Line = dict[str, Any]


@pytest.fixture(name="folder")
def fixture_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bucketprobe-servers-", dir="/var/tmp") as name:
        yield Path(name)


def run(name: str, folder: Path, *options: str) -> tuple[Any, list[Line], dict[str, Line]]:
    """The load against a server: how that ran, the clients' log, and by request ID the server's truth."""
    log = folder / "client.jsonl"
    try:
        with servers.started(name, folder) as running:
            command = [*running.load, "--port", str(running.port), "--log", str(log), *LOAD, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    except servers.CannotStart as error:
        pytest.fail(str(error), pytrace=False)
    assert done.returncode == 0, done.stdout + done.stderr + running.log_path.read_text()
    truth = running.truth()
    by_id = {line["request_id"]: line for line in truth}
    assert len(by_id) == len(truth)
    return running, servers.read_lines(log), by_id


@pytest.mark.parametrize("name", servers.SERVERS)
def test_what_it_writes_down_is_true(name: str, folder: Path) -> None:
    running, log, truth = run(name, folder)
    assert {line["request_id"] for line in log} == truth.keys()
    assert {line["kind"] for line in log} == (DAV_KINDS if name == "nginx" else KINDS)
    for seen in log:
        line = truth[seen["request_id"]]
        check_wire(seen, line)
        check_times(seen, line)
        check_files(running.root, seen, line)
    assert list((running.root / "tmp").iterdir()) == []
    assert list((running.root / "meta").glob("*.tmp")) == []


def check_wire(seen: Line, line: Line) -> None:
    for name in ("method", "status", "bytes_in", "bytes_out"):
        assert line[name] == seen[name], (name, seen, line)
    assert line["target_path"] == urlsplit(seen["target"]).path
    assert line["outcome"] == "complete"


def check_times(seen: Line, line: Line) -> None:
    """What is known of them is in order with the client's clock, which is the same."""
    moments = [seen["send_ns"], line["begin_ns"], line["end_ns"]]
    known = [moment for moment in moments if moment is not None]
    assert known == sorted(known), (seen, line)
    assert line["accept_ns"] is None or line["accept_ns"] <= seen["done_ns"]
    assert line["begin_ns"] is None or line["begin_ns"] <= seen["done_ns"]
    assert all(step["ns"] >= 0 and step["calls"] > 0 for step in line["steps"])


def check_files(root: Path, seen: Line, line: Line) -> None:
    files = line["files"]
    assert files.keys() == set(servers.COUNTERS)
    stored = seen["status"] == 201
    assert files["renames"] == (stored or seen["status"] == 204)
    if stored:
        assert files["write_bytes"] == data_file(root, seen, line).stat().st_size == seen["bytes_in"]
        assert files["opens"] == 1
    elif seen["kind"] == "get":
        assert files["read_bytes"] == seen["bytes_out"]
        assert files["opens"] == 1
    steps = {step["step"]: step for step in line["steps"]}
    for step, counter in (("storage_write", "write_bytes"), ("storage_read", "read_bytes")):
        assert step not in steps or steps[step]["bytes"] == files[counter]
    if steps:
        check_steps(seen, line, steps)
    sidecars = line.get("metadata_files")
    if stored and sidecars and sidecars["renames"]:
        sidecar = root / "meta" / data_file(root, seen, line).relative_to(root / "data")
        assert sidecars["write_bytes"] == sidecar.with_name(f"{sidecar.name}.json").stat().st_size


def check_steps(seen: Line, line: Line, steps: dict[str, Line]) -> None:
    """Each kind of call that it made was timed, and none is there that it did not make."""
    if seen["status"] == 201:
        assert {"open", "close", "storage_write", "storage_sync", "mkdir", "rename", "metadata"} <= steps.keys()
    if seen["kind"] in ("put_bad_digest", "put_conflict", "put_again") and line["files"]["opens"]:
        assert {"open", "close", "storage_write", "unlink"} <= steps.keys()
        assert not {"mkdir", "rename"} & steps.keys()
    if seen["kind"] in ("metadata", "versions", "get_missing", "get_mismatch"):
        assert steps.keys() - {"receive", "send", "digest"} == {"metadata"}


def data_file(root: Path, seen: Line, line: Line) -> Path:
    """Of a new version: the artifacts' names are unique, and a run makes some four versions of each."""
    folder = root / "data" / line["target_path"].removeprefix("/v1/")
    sizes = {path.stat().st_size: path for path in folder.iterdir()}
    assert seen["bytes_in"] in sizes
    return sizes[seen["bytes_in"]]


def test_the_plain_load_in_processes(folder: Path) -> None:
    _, log, truth = run("nginx", folder, "--processes", "2")
    assert len(log) == len(truth) == 250


def test_a_program_that_is_missing_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    told = r"node-stream needs the command node; run \.ci/setup test, or install Debian's nodejs"
    with pytest.raises(servers.CannotStart, match=told), servers.started("node-stream", folder):
        pass


def test_a_server_that_ends_at_once_tells_why(folder: Path) -> None:
    (folder / "truth.jsonl").mkdir()
    with pytest.raises(servers.CannotStart, match=r"truth\.jsonl"), servers.started("uvicorn-asyncio", folder):
        pass

# SPDX-License-Identifier: Apache-2.0
"""The load against the demo server, and against servers that misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe.demo.load import STEP, Block, Client, LoadOptions, LoadResult, Outcome, Planner, main, quantile, run, share
from bucketprobe.errors import UsageError

BLOCK = Block(1, 40 * STEP)


@pytest.fixture(scope="module", name="server")
def fixture_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of a demo server, and its truth file."""
    root = tmp_path_factory.mktemp("root")
    truth = root / "truth.jsonl"
    command = [sys.executable, "-m", "bucketprobe.demo.bucket", "--port", "0", "--root", str(root), "--truth", str(truth)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield int(process.stderr.readline().split(":")[2].split()[0]), truth
        finally:
            process.terminate()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_kinds_get_what_they_expect_and_server_and_client_agree(server: tuple[int, Path], tmp_path: Path) -> None:
    port, truth_path = server
    log = tmp_path / "client.jsonl"
    options = LoadOptions(port, connections=6, requests=600, min_bytes=1, max_bytes=200_000, curl_every=40, log=log)
    told: list[tuple[int, float]] = []
    before = time.monotonic_ns()
    outcome = run(options, lambda done, seconds: told.append((done, seconds)))
    after = time.monotonic_ns()
    assert outcome.clean, outcome
    assert outcome.requests == 600
    assert told[-1][0] == 600
    kinds = {kind.removeprefix("curl_") for kind in outcome.by_kind}
    assert kinds == {"put", "put_again", "put_conflict", "put_bad_digest", "get", "get_missing", "get_mismatch", "metadata", "versions"}
    assert {status for _, status in outcome.by_status} == {200, 201, 400, 404, 409, 412}

    lines = read_lines(log)
    assert len({line["request_id"] for line in lines}) == 600
    by_curl = [line for line in lines if line["kind"].startswith("curl_")]
    assert len(by_curl) == sum(count for kind, count in outcome.by_kind.items() if kind.startswith("curl_")) > 5
    assert all(line[name] is None for line in by_curl for name in ("connected_ns", "send_ns", "sent_ns", "tx_ns", "rx_ns"))
    by_socket = [line for line in lines if line not in by_curl]
    assert all(before < line["send_ns"] < line["sent_ns"] < line["done_ns"] < after for line in by_socket)
    stamped = [line for line in by_socket if line["tx_ns"] is not None and line["rx_ns"] is not None]
    # The kernel switches stamps on a moment after they were asked for.
    assert len(stamped) > 0.9 * len(by_socket)
    assert all(line["send_ns"] < line["tx_ns"] < line["rx_ns"] < line["done_ns"] for line in stamped)
    first = [line for line in by_socket if line["connect_ns"] is not None]
    assert len(first) == 6
    assert all(line["connect_ns"] < line["connected_ns"] < line["send_ns"] for line in first)

    truth = {line["request_id"]: line for line in read_lines(truth_path)}
    for line in lines:
        seen = truth[line["request_id"]]
        assert [seen[name] for name in ("method", "status", "bytes_in", "bytes_out")] == [
            line[name] for name in ("method", "status", "bytes_in", "bytes_out")
        ]
        assert line["status"] == line["expected_status"]
        assert line["error"] is None
        assert line["send_ns"] is None or line["send_ns"] < seen["begin_ns"] < line["done_ns"]
    assert outcome.bytes_in == sum(line["bytes_in"] for line in lines)
    assert outcome.bytes_out == sum(line["bytes_out"] for line in lines)


def test_processes_share_the_work(server: tuple[int, Path], tmp_path: Path) -> None:
    log = tmp_path / "client.jsonl"
    outcome = run(LoadOptions(server[0], connections=5, processes=2, requests=101, max_bytes=5000, log=log))
    assert outcome.clean
    assert outcome.requests == 101
    lines = read_lines(log)
    assert len({line["request_id"] for line in lines}) == 101
    assert len({line["request_id"].rpartition("-")[0] for line in lines}) == 5
    assert len({line["request_id"].split("-")[1] for line in lines}) == 2


def test_it_ends_after_the_seconds_and_keeps_to_the_rate(server: tuple[int, Path]) -> None:
    outcome = run(LoadOptions(server[0], connections=4, seconds=1.0, rate=50, max_bytes=2000))
    assert outcome.clean
    assert 30 <= outcome.requests <= 51
    assert 0.9 < outcome.elapsed_s < 3


def test_the_command_prints_json_and_a_table(server: tuple[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--port", str(server[0]), "--connections", "2", "--requests", "20", "--put-share", "1", "--fixed-bytes", "4096"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["requests"] == 20
    assert record["bytes_in"] == 20 * 4096
    assert sum(record["by_status"].values()) == 20
    assert record["latency_ms"]["p50"] <= record["latency_ms"]["p100"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requests": None}, "no end"),
        ({"min_bytes": 0}, "--min-bytes"),
        ({"min_bytes": 10, "max_bytes": 9}, "--max-bytes"),
        ({"same_head": 9 << 20}, "--same-head"),
        ({"processes": 0}, "--processes"),
        ({"processes": 3, "connections": 2}, "--connections"),
        ({"log": Path("/proc/nothing/log")}, "change --log"),
        ({"port": 1}, "no server answers on 127.0.0.1:1"),
    ],
)
def test_options_that_cannot_be_carried_out(server: tuple[int, Path], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(LoadOptions(**{"port": server[0], "requests": 1, **changes}))


# --- servers that misbehave ---


def against(answer: Callable[[socket.socket, bytes], None], requests: int, **changes: Any) -> LoadResult:
    """Load a server that gets each connection's bytes, up to what one recv(2) brings, and answers as told."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    while data := sock.recv(1 << 20):
                        answer(sock, data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        options = LoadOptions(listener.getsockname()[1], connections=1, requests=requests, max_bytes=2000, **changes)
        try:
            return run(options)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_other_bytes_than_were_stored_are_corrupt() -> None:
    def answer(sock: socket.socket, data: bytes) -> None:
        status = b"201 Created" if data.startswith(b"PUT") else b"200 OK"
        sock.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 5\r\n\r\nwrong")

    outcome = against(answer, 60, put_share=0.0)
    assert outcome.requests == 60
    assert outcome.corrupt == outcome.by_kind["get"] > 30
    assert outcome.unexpected == outcome.by_kind["get_missing"] + outcome.by_kind["get_mismatch"] > 0
    assert outcome.errors == 0


def test_a_connection_that_closes_is_an_error_and_opened_again() -> None:
    def answer(sock: socket.socket, data: bytes) -> None:
        sock.shutdown(socket.SHUT_RDWR)

    outcome = against(answer, 5)
    assert (outcome.requests, outcome.errors, outcome.unexpected) == (5, 5, 0)
    assert outcome.by_status == {("PUT", None): 5}
    assert not outcome.clean


def test_an_answer_cut_short_is_an_error() -> None:
    def answer(sock: socket.socket, data: bytes) -> None:
        sock.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 50\r\n\r\nshort")
        sock.shutdown(socket.SHUT_RDWR)

    assert against(answer, 3).errors == 3


@pytest.mark.parametrize("late", ["answer", "body"])
def test_the_stamps_are_those_of_the_kernel(tmp_path: Path, late: str) -> None:
    """A server that dawdles before its answer, or before the last bytes of it."""
    sent: list[int] = []

    def answer(sock: socket.socket, data: bytes) -> None:
        if late == "body":
            sock.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\n123")
        time.sleep(0.05)
        sent.append(time.monotonic_ns())
        sock.sendall(b"45" if late == "body" else b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    log = tmp_path / "client.jsonl"
    against(answer, 8, put_share=0.0, log=log)
    lines = [line for line in read_lines(log) if line["tx_ns"] is not None and line["rx_ns"] is not None]
    assert len(lines) > 4
    for line in lines:
        assert line["send_ns"] < line["tx_ns"] < line["sent_ns"] + 5_000_000
        assert min(abs(line["rx_ns"] - ns) for ns in sent) < 20_000_000
        assert line["rx_ns"] > line["tx_ns"] + 50_000_000


def test_the_kernel_takes_as_much_of_an_answer_as_it_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(LoadOptions(listener.getsockname()[1], receive_buffer=1 << 16), BLOCK)
        with contextlib.closing(client):
            ours = client._connect(Outcome())
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 << 16, "socket(7): the kernel doubles it"


def test_nonsense_is_an_error() -> None:
    def answer(sock: socket.socket, data: bytes) -> None:
        sock.sendall(b"nonsense\r\n\r\n")
        sock.shutdown(socket.SHUT_RDWR)

    assert against(answer, 3).errors == 3


# --- the parts ---


@settings(deadline=None, max_examples=50)
@given(st.one_of(st.integers(1, 100), st.integers(1, 40 * STEP), st.integers(STEP - 1, STEP + 20)), st.binary(min_size=16, max_size=16))
def test_a_content_has_its_size_and_its_digest(size: int, key: bytes) -> None:
    content = BLOCK.content(size, key)
    data = b"".join(BLOCK.pieces(content))
    assert len(data) == size
    assert content.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert key[:size] in data


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40 * STEP), st.integers(0, 3 * STEP) | st.sampled_from((0, 1, STEP, 2 * STEP)), st.binary(min_size=16, max_size=16))
def test_contents_have_so_many_bytes_in_common_and_then_differ(size: int, same: int, key: bytes) -> None:
    block = Block(1, 40 * STEP, same)
    content = block.content(size, key)
    data = b"".join(block.pieces(content))
    assert len(data) == size
    assert content.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert data[same : same + 16] == key[: max(0, size - same)]
    other = b"".join(block.pieces(block.content(40 * STEP, bytes(16))))
    assert data[:same] == other[: min(same, size)]


def test_a_share_of_the_uploads_is_paced_whatever_their_size() -> None:
    def paced(**changes: Any) -> list[int]:
        planner = Planner(LoadOptions(port=1, max_bytes=40 * STEP, put_share=1, **changes), BLOCK, "name", "seed")
        plans = [planner.next() for _ in range(1000)]
        return [plan.content.size for plan in plans if plan.content and plan.manner == "paced"]

    assert max(paced()) <= 1 << 15
    assert 200 < len(paced(paced_share=0.25)) < 320
    assert max(paced(paced_share=0.25)) > 1 << 20
    assert len(paced(paced_share=1)) == 1000


def test_contents_differ_by_key() -> None:
    assert BLOCK.content(3 * STEP, bytes(16)).digest != BLOCK.content(3 * STEP, bytes(15) + b"1").digest


def test_a_seed_fixes_the_requests() -> None:
    def plans(seed: str) -> list[tuple[str, str]]:
        planner = Planner(LoadOptions(port=1, max_bytes=40 * STEP), BLOCK, "name", seed)
        made = []
        for _ in range(200):
            plan = planner.next()
            made.append((plan.kind, plan.content.digest if plan.content else plan.target))
            if plan.stores:
                planner.stored(plan.stores)
        return made

    assert plans("a") == plans("a") != plans("b")


def test_sizes_are_log_uniform_and_within_their_limits() -> None:
    planner = Planner(LoadOptions(port=1, min_bytes=1024, max_bytes=1 << 20, put_share=1), BLOCK, "name", "seed")
    sizes = sorted(plan.content.size for plan in (planner.next() for _ in range(2000)) if plan.content)
    assert sizes[0] >= 1024
    assert sizes[-1] <= 1 << 20
    assert 24_000 < sizes[1000] < 44_000, "the median is the geometric mean, 32 KiB"


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_shares_sum_up(total: int, parts: int) -> None:
    shares = [share(total, parts, index) for index in range(parts)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def test_quantiles() -> None:
    assert [quantile(range(1, 101), share) for share in (0, 0.5, 0.99, 1)] == [1, 50, 99, 100]
    assert quantile([], 0.5) == 0

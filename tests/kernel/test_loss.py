# SPDX-License-Identifier: Apache-2.0
"""What is lost is counted, and the sums are right: under overload, with a small ring, and with more connections than there is room for."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Agent, Client, Service, await_that, free_port, request

StartAgent = Callable[..., Agent]


def check_identities(ledger: Counter[str], begun: int) -> None:
    """Nobody's requests are in flight any more, and `begun` is what the clients count."""
    assert ledger["begun"] == begun
    assert ledger["in_flight"] == 0
    assert ledger["begun"] == ledger["complete"] + ledger["client_closed"] + ledger["server_closed"] + ledger["unobserved"]
    assert ledger["finished"] == ledger["records"] + ledger["kernel.ring_end"]


def hammer(port: int, clients: int, requests: int, name: str) -> None:
    """Small requests as fast as they go, pipelined six at a time."""
    answer = b"HTTP/1.1 404 Done\r\nContent-Length: 5\r\n\r\nwhat?"

    def run(number: int) -> None:
        with Client(port) as client:
            for i in range(requests // 6):
                client.send(b"".join(request("GET", "/nothing", f"{name}-{number}-{i}-{j}") for j in range(6)))
                client.expect(answer * 6)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("how", ["stopped", "running"])
def test_ring_of_32_kib_under_overload(start_agent: StartAgent, base: Path, how: str) -> None:
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), "--storage-root", str(base / "storage"), "--ring-bytes", "32768")
        if how == "stopped":
            agent.process.send_signal(signal.SIGSTOP)
        hammer(port, 4, 900, "flood")
        agent.process.send_signal(signal.SIGCONT)
        ledger = agent.settled()
        check_identities(ledger, 3600)
        assert ledger["complete"] == 3600
        if how == "stopped":
            assert ledger["kernel.ring_end"] > 3000
            assert ledger["kernel.ring_head"] > 3000
        # What came through the gaps is right, or says that it is not whole.
        for record in agent.records():
            assert (record["status"], record["outcome"], record["bytes_in"], record["bytes_out"]) == (404, "complete", 0, 5)
            assert record["request_id"] or record["lost_events"]
        # And it recovers: the next ones are seen whole.
        with agent.exactly(12) as records:
            hammer(port, 2, 6, "after")
        assert all(record["request_id"] and not record["lost_events"] for record in records)
        agent.close()
        check_account(agent.log(), ledger, 12)


def check_account(log: str, ledger: Counter[str], more: int) -> None:
    """The last line of the log accounts for all."""
    last = log.rstrip().splitlines()[-1]
    assert f"{ledger['begun'] + more} requests begun, {ledger['complete'] + more} complete" in last
    assert f"0 in flight; {ledger['records'] + more} records" in last


def test_lost_file_events_are_said_in_the_record(start_agent: StartAgent, base: Path) -> None:
    """A record whose file events found no room says so, and never shows more than there was."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), "--storage-root", str(base / "storage"), "--ring-bytes", "32768")
        with Client(port) as client:
            for i in range(400):
                if i % 50 == 0:
                    agent.process.send_signal(signal.SIGCONT if i % 100 else signal.SIGSTOP)
                assert client.ask(request("PUT", "/files/5", f"files-{i}", body=b"x" * 10)) == (200, b"filed")
        agent.process.send_signal(signal.SIGCONT)
        ledger = agent.settled()
        check_identities(ledger, 400)
        assert ledger["kernel.ring_file"] > 0
        whole = 0
        for record in agent.records():
            opens, calls, size = (record["files"][name] for name in ("opens", "write_calls", "write_bytes"))
            assert opens <= 5
            assert calls <= 5
            assert size <= 50
            whole += (opens, calls, size) == (5, 5, 50)
            assert (opens, calls, size) == (5, 5, 50) or record["lost_events"], record
        assert whole > 100


def test_more_connections_than_there_is_room_for(start_agent: StartAgent, base: Path) -> None:
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), "--storage-root", str(base / "storage"), "--max-connections", "64")
        clients = [Client(port) for _ in range(200)]
        for round_ in range(3):
            for i, client in enumerate(clients):
                assert client.ask(request("PUT", f"/store/c{i}", f"crowd-{round_}-{i}", body=b"c" * (i + 1))) == (201, b"stored")
        ledger = agent.settled()
        check_identities(ledger, ledger["begun"])
        # The kernel's table may hold a few more than it was asked to.
        followed, left = divmod(ledger["begun"], 3)
        assert left == 0
        assert 64 <= followed <= 64 + 16
        assert ledger["kernel.map_connections"] >= 200 - followed
        assert ledger["records"] == ledger["begun"]
        for record in agent.records():
            size = int(record["request_id"].rpartition("-")[2]) + 1
            assert (record["status"], record["outcome"]) == (201, "complete")
            assert record["bytes_in"] == record["files"]["write_bytes"] == size
        for client in clients:
            client.close()
        # There is room again.
        await_that("the connections are forgotten", lambda: follows_again(agent, port))


def follows_again(agent: Agent, port: int) -> bool:
    before = agent.ledger()["begun"]
    with Client(port) as client:
        client.ask(request("GET", "/pid"))
    return agent.ledger()["begun"] == before + 1


def test_half_heads_do_not_pile_up(start_agent: StartAgent, base: Path) -> None:
    """Clients that send most of a head and go away leave nothing behind."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port))
        half = request("GET", "/", None, "Cookie: " + "c" * 6000)[:-2]
        before = agent.metrics()["bucketprobe_process_resident_memory_bytes"]
        for _ in range(1500):
            with Client(port) as client:
                client.send(half)
        ledger = agent.settled()
        assert ledger["begun"] == 0
        assert ledger["kernel.head_incomplete"] == 1500
        assert ledger["tracker.evicted"] == 0
        assert agent.metrics()["bucketprobe_process_resident_memory_bytes"] - before < 3_000_000
        with agent.exactly(1), Client(port) as client:
            client.ask(request("GET", "/pid", "after"))


def test_records_survive_a_slow_agent(start_agent: StartAgent, base: Path) -> None:
    """Stopped for half a second at a time, with the usual ring: everything is still there."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), "--storage-root", str(base / "storage"))
        for round_ in range(3):
            agent.process.send_signal(signal.SIGSTOP)
            hammer(port, 2, 120, f"round-{round_}")
            time.sleep(0.3)
            agent.process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        ledger = agent.settled()
        check_identities(ledger, 720)
        assert ledger["records"] == 720
        assert agent.duplicates() == []

# SPDX-License-Identifier: Apache-2.0
"""Exact counts: a server makes an odd prime number of each call for one request, and the record says exactly that number.

Each runs in the storage root, on files of the metadata pattern, and elsewhere: the numbers go to the one kind of files, and to no other.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator

import pytest
from harness import Agent, Client, Record, Worker, request

PRIMES = (23, 7, 13)
KINDS = {"storage": "files", "metadata": "metadata_files", "elsewhere": "other_files"}
ZERO = {"opens": 0, "write_calls": 0, "write_bytes": 0, "read_calls": 0, "read_bytes": 0, "syncs": 0, "renames": 0}

#: What one call adds, by the worker's name for it. `write` and `read`: the calls among which are counted what it returned.
CALLS: dict[str, dict[str, int]] = {
    **dict.fromkeys(("open", "creat", "openat", "openat_directory", "openat2"), {"opens": 1}),
    **dict.fromkeys(("write", "pwrite", "writev", "pwritev", "pwritev2"), {"write_calls": 1}),
    **dict.fromkeys(("read", "pread", "readv", "preadv", "preadv2", "read_end"), {"read_calls": 1}),
    **dict.fromkeys(("copy_file_range", "sendfile", "splice"), {"read_calls": 1, "write_calls": 1}),
    **dict.fromkeys(("fsync", "fdatasync", "sync_file_range", "fsync_directory"), {"syncs": 1}),
    **dict.fromkeys(("rename", "renameat", "renameat2"), {"renames": 1}),
    **dict.fromkeys(("ftruncate", "posix_fallocate", "truncate", "link", "unlink", "mkdir", "open_fails", "write_fails"), {}),
    **dict.fromkeys(("dup", "dup2", "dup3", "fcntl_dup", "fcntl_dup_cloexec"), {"opens": 1, "write_calls": 2}),
    "dup2_over": {"opens": 2, "write_calls": 2},
    "close_range": {"opens": 1, "write_calls": 1},
}


@pytest.fixture(scope="module")
def client(worker: Worker) -> Iterator[Client]:
    with Client(worker.port) as connection:
        yield connection


_numbers = itertools.count()


def ask(agent: Agent, client: Client, path: str, body: bytes = b"") -> tuple[Record, bytes]:
    """The record and the answer of one request."""
    request_id = f"count-{next(_numbers)}"
    status, answer = client.ask(request("POST", path, request_id, body=body))
    assert status == 200
    return agent.find(request_id), answer


def do(agent: Agent, client: Client, call: str, times: int, place: str) -> tuple[Record, int]:
    ask(agent, client, f"/prepare/{call}/{times}/{place}")
    record, answer = ask(agent, client, f"/do/{call}/{times}/{place}")
    return record, json.loads(answer)["bytes"]


@pytest.mark.parametrize("place", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_calls_on_files(agent: Agent, client: Client, call: str, place: str) -> None:
    times = PRIMES[len(call) % len(PRIMES)]
    record, moved = do(agent, client, call, times, place)
    expected = {**ZERO, **{name: count * times for name, count in CALLS[call].items()}}
    if expected["write_calls"]:
        expected["write_bytes"] = moved
    if expected["read_calls"]:
        expected["read_bytes"] = moved
    found = {kind: record[kind] for kind in KINDS.values()}
    assert found == {kind: expected if kind == KINDS[place] else ZERO for kind in KINDS.values()}
    assert (record["attribution"], record["lost_events"]) == ({"label": "exact", "evidence": ["thread"], "unattributed_bytes": 0}, 0)


PHASES = {
    **dict.fromkeys(("open", "write", "pwritev", "ftruncate", "posix_fallocate", "rename", "link", "unlink", "mkdir", "truncate"), "storage_write"),
    **dict.fromkeys(("read", "preadv"), "storage_read"),
    **dict.fromkeys(("fsync", "fdatasync", "sync_file_range"), "storage_sync"),
}


@pytest.mark.parametrize("call", PHASES)
def test_time_on_files_is_its_phase(agent: Agent, client: Client, call: str) -> None:
    """Also of calls that are not counted. Metadata files give their own phase, others none."""
    files = {"storage_write", "storage_read", "storage_sync", "metadata"}
    for place, phases in (("storage", {PHASES[call]}), ("metadata", {"metadata"}), ("elsewhere", set())):
        record, _ = do(agent, client, call, 7, place)
        assert set(record["phase_totals"]) & files - ({"storage_write"} if call in ("read", "preadv") else set()) == phases


def test_writes_to_a_synchronous_file_are_syncs_by_time_only(agent: Agent, client: Client) -> None:
    record, moved = do(agent, client, "pwritev2", 13, "storage")
    assert (record["files"]["write_calls"], record["files"]["write_bytes"], record["files"]["syncs"]) == (13, moved, 0)


@pytest.mark.parametrize("send", ["send", "write", "writev", "sendmsg", "sendfile", "splice"])
@pytest.mark.parametrize("receive", ["recv", "read", "recvfrom", "recvmsg", "readv"])
def test_calls_on_sockets(agent: Agent, client: Client, receive: str, send: str) -> None:
    ask(agent, client, "/prepare/none/0/storage")
    record, answer = ask(agent, client, f"/net/{receive}/{send}/storage", body=b"i" * 23_007)
    assert answer == bytes(23_007)
    assert (record["bytes_in"], record["bytes_out"], record["status"], record["outcome"]) == (23_007, 23_007, 200, "complete")
    reads = 23 if send in ("sendfile", "splice") else 0
    assert record["files"] == {**ZERO, "read_calls": reads, "read_bytes": 23_007 if reads else 0}
    assert record["other_files"] == ZERO


def test_all_at_once(agent: Agent, worker: Worker) -> None:
    """Several threads, each with another call and number: no call is counted on another request."""
    calls = [("write", 31), ("pread", 37), ("openat", 41), ("fsync", 11), ("rename", 43), ("dup", 29), ("copy_file_range", 17), ("splice", 19)]
    results: dict[str, tuple[Record, int]] = {}

    def run(call: str, times: int) -> None:
        with worker.connect() as own:
            ask_until(own, call, times)

    def ask_until(own: Client, call: str, times: int) -> None:
        for place in KINDS:
            own.ask(request("POST", f"/prepare/{call}/{times}/{place}", f"all-prepare-{call}-{place}"))
            for i in range(5):
                status, answer = own.ask(request("POST", f"/do/{call}/{times}/{place}", f"all-{call}-{place}-{i}"))
                assert status == 200
                results[f"all-{call}-{place}-{i}"] = ({"call": call, "times": times, "place": place}, json.loads(answer)["bytes"])

    threads = [threading.Thread(target=run, args=one) for one in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(calls) * 3 * 5
    for request_id, (asked, moved) in results.items():
        expected = {**ZERO, **{name: count * asked["times"] for name, count in CALLS[asked["call"]].items()}}
        for name in ("write", "read"):
            expected[f"{name}_bytes"] = moved if expected[f"{name}_calls"] else 0
        record = agent.find(request_id)
        found = {kind: record[kind] for kind in KINDS.values()}
        assert found == {kind: expected if kind == KINDS[asked["place"]] else ZERO for kind in KINDS.values()}, request_id



# SPDX-License-Identifier: Apache-2.0
"""Exact counts: a server makes an odd prime number of each call for one request, and the record says exactly that number.

Each runs in the storage root, on files of the metadata pattern, and elsewhere: the numbers go to the one kind of files, and to no other.
The requests are made before the first test; each test looks at one call.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from harness import Agent, Client, Record, Worker, request

PRIMES = (23, 7, 13)
#: Where the worker works, and the field of a record that is about the files there.
KINDS = {"storage": "files", "metadata": "metadata_files", "elsewhere": "other_files"}
ZERO = {"opens": 0, "write_calls": 0, "write_bytes": 0, "read_calls": 0, "read_bytes": 0, "syncs": 0, "renames": 0}

#: What one call adds, and the worker's names of such calls.
_ADDS: tuple[tuple[dict[str, int], str], ...] = (
    ({"opens": 1}, "open creat openat openat_directory openat2"),
    ({"write_calls": 1}, "write pwrite writev pwritev pwritev2"),
    ({"read_calls": 1}, "read pread readv preadv preadv2 read_end"),
    ({"read_calls": 1, "write_calls": 1}, "copy_file_range sendfile splice"),
    ({"syncs": 1}, "fsync fdatasync sync_file_range fsync_directory"),
    ({"renames": 1}, "rename renameat renameat2"),
    ({}, "ftruncate posix_fallocate truncate link unlink mkdir open_fails write_fails"),
    ({"opens": 1, "write_calls": 2}, "dup dup2 dup3 fcntl_dup fcntl_dup_cloexec"),
    ({"opens": 2, "write_calls": 2}, "dup2_over"),
    ({"opens": 1, "write_calls": 1}, "close_range"),
)
CALLS = {name: added for added, names in _ADDS for name in names.split()}

#: The one phase to which a call's time goes, in the storage root.
PHASES = {
    **dict.fromkeys(("open", "write", "pwritev", "ftruncate", "posix_fallocate", "rename", "link", "unlink", "mkdir"), "storage_write"),
    **dict.fromkeys(("read", "preadv"), "storage_read"),
    **dict.fromkeys(("fsync", "fdatasync", "sync_file_range"), "storage_sync"),
}
FILE_PHASES = {"storage_write", "storage_read", "storage_sync", "metadata"}

RECEIVES = ("recv", "read", "recvfrom", "recvmsg", "readv")
SENDS = ("send", "write", "writev", "sendmsg", "sendfile", "splice")
BODY = 23_007


@dataclass(frozen=True)
class Done:
    """A request that was answered: what the server said that its calls returned, in bytes, or the answer itself."""

    agent: Agent
    request_id: str
    call: str
    times: int
    place: str
    answer: bytes

    @property
    def record(self) -> Record:
        return self.agent.find(self.request_id)

    def check(self) -> None:
        moved = json.loads(self.answer)["bytes"]
        expected = {**ZERO, **{name: count * self.times for name, count in CALLS[self.call].items()}}
        for name in ("write", "read"):
            expected[f"{name}_bytes"] = moved if expected[f"{name}_calls"] else 0
        record = self.record
        found = {kind: record[kind] for kind in KINDS.values()}
        assert found == {kind: expected if kind == KINDS[self.place] else ZERO for kind in KINDS.values()}
        spent = sum(record["phase_totals"].get(name, 0) for name in FILE_PHASES)  # of other files nobody asks whose they are
        share = {"bytes": expected["write_bytes"] + expected["read_bytes"], "ms": pytest.approx(spent)}
        told = {"label": "exact", "evidence": ["thread"], "unattributed_bytes": 0, "candidates": []}
        assert record["attribution"] == told | {"by_label": {"exact": share} if spent else {}}
        assert record["lost_events"] == 0


class Asker:
    """One connection, on which requests are made one after the other."""

    def __init__(self, agent: Agent, client: Client, name: str) -> None:
        self.agent = agent
        self.client = client
        self.name = name
        self.count = 0

    def ask(self, path: str, body: bytes = b"") -> tuple[str, bytes]:
        """The request's ID and its answer."""
        self.count += 1
        request_id = f"{self.name}-{self.count}"
        status, answer = self.client.ask(request("POST", path, request_id, body=body))
        assert status == 200
        return request_id, answer

    def do(self, call: str, times: int, place: str) -> Done:
        self.ask(f"/prepare/{call}/{times}/{place}")
        return Done(self.agent, *self._named(f"/do/{call}/{times}/{place}", call, times, place))

    def _named(self, path: str, call: str, times: int, place: str) -> tuple[str, str, int, str, bytes]:
        request_id, answer = self.ask(path)
        return request_id, call, times, place, answer


@pytest.fixture(scope="module")
def asker(agent: Agent, worker: Worker) -> Iterator[Asker]:
    with Client(worker.port) as connection:
        yield Asker(agent, connection, "count")


@pytest.fixture(scope="module")
def done(asker: Asker) -> dict[tuple[str, str], Done]:
    """Each call at each place."""
    for place in KINDS:
        asker.do("write", 1, place)
    return {(call, place): asker.do(call, PRIMES[len(call) % len(PRIMES)], place) for call in CALLS for place in KINDS}


@pytest.fixture(scope="module")
def exchanged(asker: Asker) -> dict[tuple[str, str], tuple[str, bytes]]:
    """Each way to receive with each way to send: request ID and answer."""
    asker.ask("/prepare/none/0/storage")
    return {(receive, send): asker.ask(f"/net/{receive}/{send}/storage", b"i" * BODY) for receive in RECEIVES for send in SENDS}


@pytest.mark.parametrize("place", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_calls_on_files(done: dict[tuple[str, str], Done], call: str, place: str) -> None:
    done[call, place].check()


@pytest.mark.parametrize("call", ["directories", "directory_duplicates"])
def test_names_relative_to_directories_whose_number_is_used_again(asker: Asker, call: str) -> None:
    result = asker.do(call, 13, "storage")
    moved = json.loads(result.answer)["bytes"]
    record = result.record
    expected = {**ZERO, "opens": 13 * 2, "write_calls": 13 * 2, "write_bytes": moved}
    assert (record["files"], record["other_files"], record["metadata_files"]) == (expected, expected, ZERO)


@pytest.mark.parametrize("call", PHASES)
def test_time_on_files_is_its_phase(done: dict[tuple[str, str], Done], call: str) -> None:
    """Also of calls that are not counted. Metadata files have a phase of their own, other files none."""
    found = {place: FILE_PHASES & set(done[call, place].record["phase_totals"]) for place in KINDS}
    # What is opened is closed as well, which is storage_write for a file there.
    assert found == {"storage": {PHASES[call]}, "metadata": {"metadata"}, "elsewhere": set()}


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("receive", RECEIVES)
def test_calls_on_sockets(agent: Agent, exchanged: dict[tuple[str, str], tuple[str, bytes]], receive: str, send: str) -> None:
    request_id, answer = exchanged[receive, send]
    assert answer == bytes(BODY)
    record = agent.find(request_id)
    assert (record["bytes_in"], record["bytes_out"], record["status"], record["outcome"]) == (BODY, BODY, 200, "complete")
    from_file = send in ("sendfile", "splice")
    assert record["files"] == {**ZERO, "read_calls": 23 if from_file else 0, "read_bytes": BODY if from_file else 0}
    assert record["other_files"] == ZERO


def test_all_at_once(agent: Agent, worker: Worker) -> None:
    """Several threads, each with another call and number: no call is counted on another request."""
    calls = {"write": 31, "pread": 37, "openat": 41, "fsync": 11, "rename": 43, "dup": 29, "copy_file_range": 17, "splice": 19}
    results: list[Done] = []

    def run(call: str, times: int) -> None:
        with Client(worker.port) as connection:
            own = Asker(agent, connection, f"all-{call}")
            results.extend(own.do(call, times, place) for place in KINDS for _ in range(5))

    threads = [threading.Thread(target=run, args=one) for one in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(calls) * len(KINDS) * 5
    for result in results:
        result.check()

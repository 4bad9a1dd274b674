# SPDX-License-Identifier: Apache-2.0
"""What makes attribution wrong without being noticed, each trap on the real kernel with a server that falls into it.

Most servers here are a puppet, which makes each call in the thread that the test names: an event loop is one thread with several
requests in flight, a pool is threads that take turns. Requests that could be mixed up differ in how many calls write their data,
so that a record tells whose file it shows. Where a program is the trap (nginx, waitress, Go), the server is a real one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import random
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Agent, Client, Puppet, Record, await_that, free_port, request, response

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("truth_servers", HERE.parent / "truth" / "servers.py")
assert spec is not None
assert spec.loader is not None
truth_servers = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = truth_servers
spec.loader.exec_module(truth_servers)

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
RENAME_NOREPLACE = 1
KIB = 1024
#: Pieces in which a body is written, so that the number of calls is its length in these.
PIECE = 1_000
MODELS = ("threads", "loop", "tasks")
#: Who may be right about whose it is, and does not claim to know it.
HUMBLE = {"shared", "unattributed"}

NewId = Callable[[], str]
#: Which worker does a step of the upload of this number.
Choice = Callable[[random.Random, int], str]


# --- the stage: servers, an agent that observes all of them, and requests in flight ------------------------------------


@dataclass(frozen=True)
class World:
    """One agent for all tests here, and what it observes. `early`: its file was open before the agent was there."""

    base: Path
    agent: Agent
    puppet_port: int
    early: Puppet
    real: dict[str, Any]

    def metric(self, name: str, **labels: str) -> float:
        inner = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
        return self.agent.metrics()[f"{name}{{{inner}}}"]

    def gap_bytes(self, reason: str, direction: str) -> float:
        return self.metric("bucketprobe_coverage_gap_bytes_total", reason=reason, direction=direction)

    @contextmanager
    def exactly(self, count: int) -> Iterator[list[Record]]:
        """As the agent's; what was held back of requests before is not counted."""
        await_that("no record is held back", self._quiet)
        with self.agent.exactly(count) as records:
            yield records

    def _quiet(self) -> bool:
        ledger = self.agent.ledger()
        return not ledger["in_flight"] and ledger["records"] == ledger["finished"]

    def untied(self) -> float:
        return self.metric("bucketprobe_attributed_bytes_total", kind="storage", label="unattributed")


@pytest.fixture(scope="module")
def world(cache_dir: Path) -> Iterator[World]:
    """On a disk, where a sync takes its time: the usual temporary folder may be in memory."""
    with tempfile.TemporaryDirectory(prefix="bucketprobe-traps-", dir="/var/tmp", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        base = Path(name)
        base.chmod(0o755)
        for folder in ("storage/data/b", "elsewhere"):
            (base / folder).mkdir(parents=True)
        real = {}
        for server in ("nginx", "waitress", "go", "asyncio"):
            (base / server).mkdir()
            real[server] = stack.enter_context(truth_servers.started(server, base / server))
        early = stack.enter_context(Puppet(free_port(), base))
        early.do("main", "open", "shared", "storage/early.log", APPEND)
        port = free_port()
        named = [("--port", port), ("--port", early.port), ("--storage-root", base / "storage")]
        for running in real.values():
            named.append(("--port", running.port))
            named += [("--storage-root", root) for root in running.storage_roots]
            named += [("--metadata", pattern) for pattern in running.metadata]
        options = [str(word) for option in named for word in option]
        agent = Agent(base / "agent", cache_dir, *options, ready=False)
        try:
            for pid in (early.pid, *(running.pid for running in real.values())):
                agent.await_target(pid)
            yield World(base, agent, port, early, real)
        finally:
            agent.close()
        assert agent.duplicates() == []


class Stage:
    """A puppet, and the requests that it serves."""

    def __init__(self, world: World, puppet: Puppet, unique_id: NewId) -> None:
        self.world = world
        self.agent = world.agent
        self.puppet = puppet
        self.unique_id = unique_id
        self.clients: list[Client] = []

    def connect(self, thread: str) -> tuple[str, Client]:
        """A connection, and by which name the puppet knows it."""
        name = f"connection-{len(self.clients)}"
        waiting = self.puppet.start(listening(thread), "accept", name)
        client = self.puppet.connect()
        self.clients.append(client)
        self.puppet.result(waiting)
        return name, client

    def take(self, thread: str, method: str = "PUT", body: bytes = b"", artifact: str | None = None) -> Flight:
        """A request on a connection of its own, which this thread has received whole."""
        flight = self.send(thread, method, body, artifact)
        flight.do(listening(thread), "take", flight.name)
        return flight

    def send(self, accepting: str, method: str = "PUT", body: bytes = b"", artifact: str | None = None) -> Flight:
        """A request that was sent, and of which nothing was read."""
        name, client = self.connect(accepting)
        artifact = artifact or f"a-{uuid.uuid4()}"
        target = f"/v1/b/{artifact}" + ("" if method == "PUT" else "?version=1.0")
        fields = ["X-Artifact-Version: 1.0"] if method == "PUT" else []
        request_id = self.unique_id()
        client.send(request(method, target, request_id, *fields, body=body))
        return Flight(self, name, client, artifact, request_id, body)

    def take_several(self, reader: str | Callable[[int], str], bodies: Sequence[bytes]) -> list[Flight]:
        """PUTs that are all in flight at once, each received by its thread."""
        return [self.take(reader if isinstance(reader, str) else reader(i), body=body) for i, body in enumerate(bodies)]


@dataclass(eq=False)
class Flight:
    """One request in flight. Its file has the request's ID as its name among the puppet's files."""

    stage: Stage
    name: str
    client: Client
    artifact: str
    request_id: str
    body: bytes

    def do(self, thread: str, call: str, *arguments: Any) -> Any:
        return self.stage.puppet.do(thread, call, *arguments)

    @property
    def final(self) -> str:
        """Where a store would keep it."""
        (self.stage.world.base / "storage/data/b" / self.artifact).mkdir(exist_ok=True)
        return f"storage/data/b/{self.artifact}/1.0"

    def store(self, thread: str, target: str | None = None) -> None:
        """A temporary file that tells nothing, written in pieces, synced, closed and given its name."""
        temporary = f"storage/{uuid.uuid4()}"
        self.do(thread, "open", self.request_id, temporary, CREATE)
        self.do(thread, "save", self.request_id, self.name, 0, None, PIECE)
        self.do(thread, "fsync", self.request_id)
        self.do(thread, "close", self.request_id)
        if target:
            self.do(thread, "rename", temporary, target)

    def answer(self, thread: str, status: int = 201, body: bytes = b"") -> None:
        self.do(thread, "send", self.name, response(status, body).decode("latin-1"))
        self.client.expect(response(status, body))

    @property
    def record(self) -> Record:
        return self.stage.agent.find(self.request_id)

    @property
    def calls(self) -> int:
        """By how many calls its body is written, if it is written in pieces."""
        return -(-len(self.body) // PIECE)


@pytest.fixture
def stage(world: World, unique_id: NewId, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A process of its own for each test: what the agent learns of one must not help it in the next."""
    tasks = "model" in request.fixturenames and request.getfixturevalue("model") == "tasks"
    with Puppet(world.puppet_port, world.base, *(["tasks"] if tasks else [])) as puppet:
        world.agent.await_target(puppet.pid)
        if tasks:
            await_that("it is known for tasks", lambda: f"pid {puppet.pid}: " in world.agent.log())
        on_it = Stage(world, puppet, unique_id)
        yield on_it
        for client in on_it.clients:
            client.close()


def content(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def reader_of(model: str) -> Callable[[int], str]:
    """The thread that receives and answers a request; in the model `tasks`, the task which does it, on the loop's thread."""
    return lambda i: {"threads": f"thread-{i}", "loop": "loop", "tasks": f"loop@task-{i}"}[model]


def working(thread: str, worker: str) -> str:
    """The thread itself, or one of a pool, which for a task works in a copy of its context."""
    if worker == "loop":
        return thread
    return f"{worker}@={thread.partition('@')[2]}" if "@" in thread else worker


def listening(thread: str) -> str:
    """Who reads for a task: the loop, in a context that is not the task's."""
    return f"{thread.partition('@')[0]}@server" if "@" in thread else thread


def written(record: Record) -> tuple[int, int]:
    return record["files"]["write_bytes"], record["files"]["write_calls"]


def told(record: Record) -> str:
    """What a failure is to show of it."""
    passed = {"conn", "pid", "time", "route", "bucket_id", "phase_totals", "queue_stages"}
    return json.dumps({name: value for name, value in record.items() if name not in passed})


def says(record: Record) -> str:
    label: str = record["attribution"]["label"]
    return label


def check_written(flight: Flight, label: str = "exact") -> None:
    """Its own file and no other's; how sure that is."""
    record = flight.record
    assert written(record) == (len(flight.body), flight.calls), told(record)
    assert says(record) == label, told(record)


def check_honest(flights: Sequence[Flight]) -> None:
    """Each either has what was its own, or says that it may be another's and names all whose it may be."""
    by_calls = {flight.calls: flight for flight in flights}
    assert len(by_calls) == len(flights)
    for flight in flights:
        record = flight.record
        right = written(record) == (len(flight.body), flight.calls)
        assert right or says(record) in HUMBLE, told(record)
        if says(record) != "shared":
            continue
        assert record["id"] in record["attribution"]["candidates"], told(record)
        shown = by_calls.get(record["files"]["write_calls"])
        assert shown is None or shown.record["id"] in record["attribution"]["candidates"], told(record)


def check_sum(stage: Stage, flights: Sequence[Flight], before: float, total: int) -> None:
    """Nothing that was written is lost or shown twice."""
    shown = sum(flight.record["files"]["write_bytes"] for flight in flights)
    assert shown + stage.world.untied() - before == total


# --- real servers ------------------------------------------------------------------------------------------------------


def bucket_put(artifact: str, request_id: str, body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    fields = ["X-Artifact-Version: 1.0", f"X-Artifact-Digest: sha256:{digest}", "X-Uploaded-By: test", "X-Provenance-Source: test"]
    fields.append("Content-Type: application/octet-stream")
    return request("PUT", f"/v1/b/{artifact}", request_id, *fields, body=body)


def upload_to(running: Any, bodies: Sequence[bytes], unique_id: NewId) -> dict[str, bytes]:
    """Uploads on connections of their own, each half sent before any is complete: bodies by request ID."""
    uploads = {unique_id(): body for body in bodies}
    with ExitStack() as stack:
        rests = []
        for request_id, body in uploads.items():
            data = bucket_put(f"{running.name}-{uuid.uuid4()}", request_id, body)
            client = stack.enter_context(Client(running.port))
            client.send(data[: len(data) // 2])
            rests.append((client, data[len(data) // 2 :]))
        for client, rest in rests:
            assert client.ask(rest)[0] == 201
    return uploads


def check_exact_bytes(record: Record, size: int) -> None:
    """Of the store's data. A folder that is made by whoever is first may be anybody's."""
    attribution = record["attribution"]
    assert attribution["by_label"]["exact"]["bytes"] >= size, told(record)
    assert sum(share["bytes"] for label, share in attribution["by_label"].items() if label != "exact") == 0, told(record)
    assert attribution["unattributed_bytes"] == 0, told(record)


def test_nginx_closes_its_file_after_the_answer(world: World, unique_id: NewId) -> None:
    bodies = [content(n * 40_001, n) for n in range(1, 7)]
    for request_id, body in upload_to(world.real["nginx"], bodies, unique_id).items():
        record = world.agent.find(request_id)
        files = record["files"]
        assert (files["write_bytes"], files["opens"], files["renames"]) == (len(body), 1, 1), told(record)
        check_exact_bytes(record, len(body))
        assert (record["status"], record["coverage_gaps"]) == (201, []), told(record)


def test_waitress_spools_through_a_nameless_file(world: World, unique_id: NewId) -> None:
    """Bodies above 512 KiB are written twice and read once. Only one of these writes is the store's."""
    bodies = [content((600 + n) * KIB, n) for n in range(4)]
    for request_id, body in upload_to(world.real["waitress"], bodies, unique_id).items():
        record = world.agent.find(request_id)
        files = record["files"]
        assert (files["write_bytes"], files["read_bytes"], files["opens"]) == (len(body), 0, 1), told(record)
        assert record["other_files"]["write_bytes"] in (0, len(body)), told(record)
        check_exact_bytes(record, len(body))


def test_go_reads_the_first_byte_of_the_next_request(world: World, unique_id: NewId) -> None:
    """While a handler runs Go reads one byte ahead: the next request's `P`, whose rest comes by another read."""
    running = world.real["go"]
    sizes = [12 << 20, 70_001, 333]
    bodies = [content(size, size) for size in sizes]
    puts = [bucket_put(f"go-{i}-{uuid.uuid4()}", unique_id(), body) for i, body in enumerate(bodies)]
    with world.exactly(6) as records, Client(running.port) as client:
        for i, (put, body) in enumerate(zip(puts, bodies, strict=True)):
            target = put.split(b" ")[1].decode() + "?version=1.0"
            if not i:
                assert client.ask(put)[0] == 201
            client.send(request("GET", target, unique_id()))
            # More than fits between them: the first answer is still being sent when the next request comes.
            head = client.receive(1)
            if i < 2:
                client.send(puts[i + 1])
            while not head.endswith(b"\r\n\r\n"):
                head += client.receive(1)
            assert client.receive(len(body)) == body
            if i < 2:
                assert client.ask(b"")[0] == 201
    found = [(record["method"], record["status"], record["files"]["write_bytes"], record["files"]["read_bytes"]) for record in records]
    assert found == [row for size in sizes for row in (("PUT", 201, size, 0), ("GET", 200, 0, size))]
    for record, size in zip(records, (size for size in sizes for _ in "PG"), strict=True):
        check_exact_bytes(record, size)
    assert [record["bytes_in"] for record in records[::2]] == sizes
    assert [record["bytes_out"] for record in records[1::2]] == sizes


def slow_upload(client: Client, data: bytes) -> float:
    """Sends in pieces; how long the client left the server without bytes, in ms: from after its first piece until before its last."""
    pieces = 6
    size = len(data) // pieces + 1
    client.send(data[:size])
    begin = time.monotonic()
    for at in range(size, len(data), size):
        time.sleep(0.08)
        end = time.monotonic()
        client.send(data[at : at + size])
    return (end - begin) * 1000


def test_a_slow_uploader_limits_asyncio(world: World, unique_id: NewId) -> None:
    request_id = unique_id()
    with Client(world.real["asyncio"].port) as client:
        slept = slow_upload(client, bucket_put(f"slow-{uuid.uuid4()}", request_id, content(60_001)))
        assert client.ask(b"")[0] == 201
    check_slow_client(world.agent.find(request_id), slept)


def check_slow_client(record: Record, slept: float) -> None:
    assert record["limited_by"] == "client", told(record)
    assert 0.7 * slept < record["client_wait_ms"] < slept + 250, (slept, told(record))
    assert record["server_wait_ms"] < slept / 2, told(record)


# --- who waited for whom -----------------------------------------------------------------------------------------------


def test_a_slow_uploader_limits_a_thread(stage: Stage) -> None:
    name, client = stage.connect("thread")
    waiting = stage.puppet.start("thread", "take", name)
    body, request_id = content(60_001), stage.unique_id()
    slept = slow_upload(client, request("PUT", "/v1/b/slow", request_id, "X-Artifact-Version: 1.0", body=body))
    stage.puppet.result(waiting)
    flight = Flight(stage, name, client, "slow", request_id, body)
    flight.store("thread")
    flight.answer("thread")
    check_slow_client(flight.record, slept)
    check_written(flight)


@pytest.mark.parametrize("model", MODELS)
def test_a_server_that_is_late_to_read(stage: Stage, model: str) -> None:
    """All of the request is there; the thread sleeps first. In the loop another request is in flight meanwhile."""
    other = stage.take(reader_of(model)(1), body=content(5_000)) if model != "threads" else None
    thread = reader_of(model)(0)
    flight = stage.send(thread, body=content(7_000))
    begin = time.monotonic()
    flight.do(thread, "sleep", 0.3)
    slept = (time.monotonic() - begin) * 1000
    flight.do(listening(thread), "take", flight.name)
    flight.answer(thread)
    if other:
        other.answer(reader_of(model)(1))
    record = flight.record
    assert record["limited_by"] == "server", told(record)
    assert 270 < record["server_wait_ms"] < slept + 250, (slept, told(record))
    assert record["client_wait_ms"] < 150, told(record)


def test_a_disk_that_must_be_waited_for(stage: Stage) -> None:
    """Some hundred writes, each of which waits for the disk."""
    flight = stage.take("thread", body=content(400_000))
    flight.do("thread", "open", "synced", f"storage/{uuid.uuid4()}", CREATE | os.O_SYNC)
    flight.do("thread", "save", "synced", flight.name, 0, None, PIECE)
    flight.answer("thread")
    record = flight.record
    assert record["limited_by"] == "storage", told(record)
    assert record["phases"]["storage_sync"] > record["duration_ms"] / 3, told(record)


# --- heads, bodies and their ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_an_interim_answer_is_no_answer(stage: Stage, model: str) -> None:
    """The body comes, and is written, after `100 Continue`. In the loop, with as many bytes in flight for another one."""
    reader = reader_of(model)
    flights = []
    for i in range(2):
        name, client = stage.connect(reader(i))
        body, request_id = bytes(7_000 + i * PIECE), stage.unique_id()
        artifact = f"a-{uuid.uuid4()}"
        data = request("PUT", f"/v1/b/{artifact}", request_id, "X-Artifact-Version: 1.0", "Expect: 100-continue", body=body)
        client.send(data[: -len(body)])
        stage.puppet.do(listening(reader(i)), "recv", name, len(data) - len(body))
        flights.append(Flight(stage, name, client, artifact, request_id, body))
    for i, flight in enumerate(flights):
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        flight.do(reader(i), "send", flight.name, interim.decode())
        flight.client.expect(interim)
    for i, flight in enumerate(flights):
        flight.client.send(flight.body)
        flight.do(listening(reader(i)), "recv", flight.name, len(flight.body))
    for i, flight in enumerate(flights):
        flight.store(reader(i), flight.final)
        flight.answer(reader(i))
    for flight in flights:
        check_written(flight)
        record = flight.record
        assert (record["status"], record["bytes_in"], record["bytes_out"]) == (201, len(flight.body), 0)


@pytest.mark.parametrize("model", MODELS)
def test_the_read_that_finds_the_end_comes_after_the_answer(stage: Stage, model: str) -> None:
    reader = reader_of(model)
    kept = stage.take_several(reader, [content(n * 10_000, n) for n in (2, 3)])
    for i, flight in enumerate(kept):
        flight.store(reader(i), flight.final)
        flight.answer(reader(i))
    gets = [stage.take(reader(i), "GET", artifact=flight.artifact) for i, flight in enumerate(kept)]
    for i, (get, put) in enumerate(zip(gets, kept, strict=True)):
        get.do(reader(i), "open", get.request_id, put.final, os.O_RDONLY)
        get.do(reader(i), "send", get.name, f"HTTP/1.1 200 OK\r\nContent-Length: {len(put.body)}\r\n\r\n")
        # Its last read is behind the last byte of the answer, in the time of whoever is next.
        assert get.do(reader(i), "relay", get.request_id, get.name, PIECE) == len(put.body)
        get.do(reader(i), "close", get.request_id)
    after = stage.take(reader(0), "GET")
    after.answer(reader(0), 404)
    for get, put in zip(gets, kept, strict=True):
        record = get.record
        assert record["files"]["read_bytes"] == record["bytes_out"] == len(put.body), told(record)
        assert (record["status"], says(record)) == (200, "exact"), told(record)
    assert (after.record["files"]["read_calls"], says(after.record)) == (0, "exact"), told(after.record)


# --- files that many requests use --------------------------------------------------------------------------------------


@pytest.fixture
def early(world: World, unique_id: NewId) -> Stage:
    return Stage(world, world.early, unique_id)


def test_a_file_that_was_open_before_the_agent_came(early: Stage) -> None:
    flights = early.take_several(reader_of("threads"), [content(n * PIECE, n) for n in range(1, 7)])
    for i, flight in enumerate(flights):
        flight.do(f"thread-{i}", "save", "shared", flight.name, 0, None, PIECE)
        flight.answer(f"thread-{i}")
    for flight in flights:
        check_written(flight)
        assert flight.record["files"]["opens"] == 0


def test_a_file_that_was_open_before_the_agent_came_in_a_pool(early: Stage) -> None:
    before = early.world.untied()
    flights = early.take_several("loop", [content(n * PIECE, n) for n in range(1, 7)])
    for i, flight in enumerate(flights):
        flight.do(f"pool-{i % 2}", "save", "shared", flight.name, 0, None, PIECE)
    for flight in flights:
        flight.answer("loop")
    check_honest(flights)
    check_sum(early, flights, before, sum(len(flight.body) for flight in flights))


def test_appends_of_threads_to_one_data_file(stage: Stage) -> None:
    stage.puppet.do("main", "open", "log", "storage/threads.log", APPEND)
    flights = stage.take_several(reader_of("threads"), [content(n * PIECE, n) for n in (5, 2, 9, 3)])
    for piece in range(9):  # in turns
        for i, flight in enumerate(flights):
            if piece < flight.calls:
                flight.do(f"thread-{i}", "save", "log", flight.name, piece * PIECE, (piece + 1) * PIECE)
    for i, flight in enumerate(flights):
        flight.answer(f"thread-{i}")
    for flight in flights:
        check_written(flight)


@pytest.mark.parametrize("model", MODELS)
def test_appends_of_a_slow_upload_to_one_data_file(stage: Stage, model: str) -> None:
    """Each of them so long after the last that it is a piece of work of its own, and more of them than a thread has places for."""
    before = stage.world.untied()
    stage.puppet.do("main", "open", "log", f"storage/slow-{model}.log", APPEND)
    reader = reader_of(model)
    flights = stage.take_several(reader, [content(n * PIECE, n) for n in (20, 17)])
    for piece in range(20):
        for i, flight in enumerate(flights):
            if piece < flight.calls:
                flight.do(reader(i), "save", "log", flight.name, piece * PIECE, (piece + 1) * PIECE)
        stage.puppet.do("main", "sleep", 0.025)
    for i, flight in enumerate(flights):
        flight.answer(reader(i))
    check_honest(flights)
    check_sum(stage, flights, before, sum(len(flight.body) for flight in flights))


@pytest.mark.parametrize("wakes", [True, False], ids=["wakes", "silent"])
@pytest.mark.parametrize("model", ["loop", "tasks"])
def test_appends_of_a_pool_to_one_data_file(stage: Stage, model: str, wakes: bool) -> None:
    """`wakes`: the pool's thread tells the loop by a socket that it is done, as asyncio's do; else by memory, as other pools' do."""
    before = stage.world.untied()
    stage.puppet.do("main", "open", "log", "storage/pool.log", APPEND)
    reader = reader_of(model)
    flights = stage.take_several(reader, [content(n * PIECE, n) for n in (5, 2, 9, 3)])
    for piece in range(9):
        for i, flight in enumerate(flights):
            if piece < flight.calls:
                worker = working(reader(i), f"pool-{(i + piece) % 3}")
                flight.do(worker, "save", "log", flight.name, piece * PIECE, (piece + 1) * PIECE)
                if wakes:
                    flight.do(worker, "wake")
    for i, flight in enumerate(flights):
        flight.answer(reader(i))
    check_honest(flights)
    check_sum(stage, flights, before, sum(len(flight.body) for flight in flights))


@pytest.mark.parametrize("committer", ["thread-4", "thread-1"], ids=["a thread of its own", "one of those that wait"])
def test_one_write_and_one_sync_for_several(stage: Stage, committer: str) -> None:
    """Group commit: the work is everybody's by its nature, and no single one's."""
    before = stage.world.untied()
    stage.puppet.do("main", "open", "log", "storage/group.log", APPEND)
    flights = stage.take_several(reader_of("threads"), [content(n * PIECE, n) for n in (5, 2, 9)])
    stage.puppet.do(committer, "save_all", "log", [flight.name for flight in flights])
    stage.puppet.do(committer, "fsync", "log")
    for i, flight in enumerate(flights):
        flight.answer(f"thread-{i}")
    ids = {flight.record["id"] for flight in flights}
    for flight in flights:
        record = flight.record
        assert says(record) in HUMBLE, told(record)
        assert says(record) != "shared" or set(record["attribution"]["candidates"]) == ids, told(record)
    assert sum(flight.record["files"]["syncs"] for flight in flights) <= 1
    check_sum(stage, flights, before, sum(len(flight.body) for flight in flights))


# --- files that get their name late ------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["link", "link_empty"])
@pytest.mark.parametrize("folder", ["storage", "elsewhere"])
@pytest.mark.parametrize("model", MODELS)
def test_nameless_files_that_are_linked(stage: Stage, model: str, folder: str, link: str) -> None:
    """O_TMPFILE and linkat: the name that it gets says what kind of file it was all the time. Bodies are alike."""
    reader = reader_of(model)
    flights = stage.take_several(reader, [bytes(n * PIECE) for n in (3, 4)])
    for i, flight in enumerate(flights):
        flight.do(reader(i), "open", flight.request_id, folder, os.O_WRONLY | os.O_TMPFILE)
    for i, flight in enumerate(flights):
        flight.do(reader(i), "save", flight.request_id, flight.name, 0, None, PIECE)
    for i, flight in enumerate(flights):
        flight.do(reader(i), link, flight.request_id, flight.final)
        flight.do(reader(i), "close", flight.request_id)
    for i, flight in enumerate(flights):
        flight.answer(reader(i))
    for flight in flights:
        check_written(flight)
        record = flight.record
        assert record["files"]["opens"] == 1
        assert record["other_files"]["write_bytes"] == 0


@pytest.mark.parametrize("model", ["loop", "tasks"])
def test_renamed_files_of_equal_uploads(stage: Stage, model: str) -> None:
    """An event loop that moves files, named by chance, with bodies of one length and the same bytes: only the last name tells."""
    reader = reader_of(model)
    flights = stage.take_several(reader, [bytes(12_000)] * 5)
    order = random.Random(8).sample(range(5), 5)
    names = [uuid.uuid4() for _ in flights]
    for i in order:
        flights[i].do(reader(i), "open", f"file-{i}", f"storage/{names[i]}", CREATE)
    # The file's own number of calls shows which one a record has.
    pieces = {i: 12_000 // (i + 2) for i in order}
    for i in reversed(order):
        flights[i].do(reader(i), "save", f"file-{i}", flights[i].name, 0, None, pieces[i])
    for i in order:
        flights[i].do(reader(i), "fsync", f"file-{i}")
        flights[i].do(reader(i), "close", f"file-{i}")
    for i in order:
        flights[i].do(reader(i), "rename", f"storage/{names[i]}", flights[i].final, RENAME_NOREPLACE)
    for i in random.Random(9).sample(range(5), 5):
        flights[i].answer(reader(i))
    for i, flight in enumerate(flights):
        record = flight.record
        assert written(record) == (12_000, -(-12_000 // pieces[i])), told(record)
        assert (says(record), record["files"]["renames"], record["files"]["syncs"]) == ("exact", 1, 1), told(record)
        assert "path" in record["attribution"]["evidence"], told(record)


# --- what has no calls -------------------------------------------------------------------------------------------------


def test_an_answer_from_mapped_memory(stage: Stage) -> None:
    body = content(30_000)
    put = stage.take("thread", body=body)
    put.store("thread", put.final)
    put.answer("thread")
    before = stage.world.gap_bytes("mmap", "read")
    get = stage.take("thread", "GET", artifact=put.artifact)
    get.do("thread", "open", "mapped", put.final, os.O_RDWR)
    get.do("thread", "send", get.name, f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n")
    get.do("thread", "map_send", "mapped", get.name)
    get.do("thread", "close", "mapped")
    record = get.record
    assert (record["bytes_out"], record["files"]["read_bytes"]) == (len(body), 0)
    assert record["coverage_gaps"] == ["mmap"], told(record)
    assert "storage_read" not in record["phases"], told(record)
    assert stage.world.gap_bytes("mmap", "read") - before == len(body)
    assert stage.world.metric("bucketprobe_coverage_gap", reason="mmap") == 1
    assert put.record["coverage_gaps"] == []


def test_an_upload_that_is_written_by_memory(stage: Stage) -> None:
    flight = stage.take("thread", body=content(30_000))
    before = stage.world.gap_bytes("mmap", "write")
    flight.do("thread", "open", "mapped", flight.final, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    flight.do("thread", "map_save", "mapped", flight.name)
    flight.do("thread", "fsync", "mapped")
    flight.do("thread", "close", "mapped")
    flight.answer("thread")
    record = flight.record
    assert (record["status"], record["files"]["write_bytes"], record["files"]["syncs"]) == (201, 0, 1)
    assert record["coverage_gaps"] == ["mmap"], told(record)
    assert "storage_write" not in record["phases"], told(record)
    assert stage.world.gap_bytes("mmap", "write") - before == len(flight.body)


def test_an_upload_that_goes_through_a_ring(stage: Stage) -> None:
    before = stage.world.gap_bytes("io_uring", "write")
    flight = stage.take("thread", body=content(30_002, 2))
    assert flight.do("thread", "ring_save", flight.final, flight.name) == len(flight.body)
    flight.answer("thread")
    assert (stage.world.base / flight.final).read_bytes() == flight.body
    record = flight.record
    assert (record["status"], record["bytes_in"], record["files"]["write_bytes"]) == (201, len(flight.body), 0)
    assert record["coverage_gaps"] == ["io_uring"], told(record)
    assert not {"storage_write", "storage_sync"} & set(record["phases"]), told(record)
    assert stage.world.gap_bytes("io_uring", "write") - before == len(flight.body)
    assert stage.world.metric("bucketprobe_coverage_gap", reason="io_uring") == 1


def test_a_store_in_memory(stage: Stage) -> None:
    body = content(30_001)
    before = {way: stage.world.gap_bytes("unseen", way) for way in ("write", "read")}
    put = stage.take("thread", body=body)
    put.answer("thread")
    get = stage.take("thread", "GET", artifact=put.artifact)
    get.answer("thread", 200, body)
    for flight in (put, get):
        assert flight.record["coverage_gaps"] == ["unseen"], told(flight.record)
        assert not {"storage_write", "storage_read"} & set(flight.record["phases"])
    assert {way: stage.world.gap_bytes("unseen", way) - before[way] for way in before} == {"write": len(body), "read": len(body)}
    assert stage.world.metric("bucketprobe_coverage_gap", reason="unseen") == 1


def test_tls_makes_no_requests(stage: Stage) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
    with stage.world.exactly(0):
        name, client = stage.connect("thread")
        serving = stage.puppet.start("thread", "secure", name)
        with context.wrap_socket(client.socket) as secured:
            secured.sendall(request("GET", "/v1/b/secret?version=1.0", stage.unique_id()))
            assert secured.recv(65536).endswith(b"secret")
        stage.puppet.result(serving)
    assert stage.world.metric("bucketprobe_coverage_gap", reason="tls") == 1


# --- clients and servers in one process --------------------------------------------------------------------------------


def test_a_server_that_asks_itself(stage: Stage) -> None:
    """The request's handler makes another to its own port: two requests, and each has its own file."""
    inner_id = stage.unique_id()
    with stage.world.exactly(2):
        outer = stage.take("outer", body=content(4 * PIECE, 1))
        asking = stage.puppet.start("outer", "ask", "/inner", inner_id)
        stage.puppet.do("inner", "accept", "inner")
        stage.puppet.do("inner", "take", "inner")
        stage.puppet.do("inner", "open", "inner", f"storage/{uuid.uuid4()}", CREATE)
        stage.puppet.do("inner", "save", "inner", outer.name, 0, PIECE)
        stage.puppet.do("inner", "send", "inner", response(200, b"inner answer", "Connection: close").decode())
        stage.puppet.do("inner", "shut", "inner")
        assert stage.puppet.result(asking) == "inner answer"
        outer.store("outer")
        outer.answer("outer")
    check_written(outer)
    assert (outer.record["method"], outer.record["status"], outer.record["bytes_out"]) == ("PUT", 201, 0)
    inner = stage.agent.find(inner_id)
    assert (inner["method"], inner["status"], inner["bytes_in"], inner["bytes_out"]) == ("GET", 200, 0, len(b"inner answer"))
    assert (written(inner), says(inner)) == ((PIECE, 1), "exact")


@pytest.mark.parametrize("model", MODELS)
def test_a_server_that_asks_another(stage: Stage, model: str) -> None:
    """What goes out is no request of the service, and its answer no response of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(response(500, b"another's answer"))

        thread = threading.Thread(target=serve)
        thread.start()
        with stage.world.exactly(2):
            reader = reader_of(model)
            flights = stage.take_several(reader, [content(n * PIECE, n) for n in (4, 6)])
            port = listener.getsockname()[1]
            answer = flights[0].do(reader(0), "ask", "/v1/b/elsewhere?version=1.0", "outgoing", port)
            assert answer == "another's answer"
            for i, flight in enumerate(flights):
                flight.store(reader(i), flight.final)
                flight.answer(reader(i))
        thread.join(PATIENCE)
    for flight in flights:
        check_written(flight)
        assert (flight.record["status"], flight.record["bytes_out"]) == (201, 0)


# --- threads that receive, threads that write --------------------------------------------------------------------------


@pytest.mark.parametrize("answering", ["receiver", "writer"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_one_thread_receives_and_another_writes(stage: Stage, named: bool, answering: str) -> None:
    """The writer does the receivers' work in turn, and may answer for them."""
    flights = stage.take_several(lambda i: f"receiver-{i}", [content(n * PIECE, n) for n in (3, 7, 4, 6)])
    for i in (2, 0, 3, 1):
        flight = flights[i]
        flight.store("writer", flight.final if named else None)
        flight.answer("writer" if answering == "writer" else f"receiver-{i}")
    for flight in flights:
        record = flight.record
        assert written(record) == (len(flight.body), flight.calls), told(record)
        assert record["files"]["syncs"] == 1, told(record)
        assert says(record) in ("exact", "inferred"), told(record)


@pytest.mark.parametrize("receiver", ["helper", "receiver"])
def test_a_thread_that_helps_another_in_the_middle_of_its_answer(stage: Stage, receiver: str) -> None:
    """It has sent the head of one answer, then writes for another request, then sends the rest."""
    first = stage.take(receiver, body=content(3 * PIECE, 3))
    second = stage.take("other", body=content(5 * PIECE, 5))
    first.store("helper")
    head, rest = response(200, b"the rest").split(b"the rest")[0].decode(), "the rest"
    first.do("helper", "send", first.name, head)
    second.store("helper", second.final)
    first.do("helper", "send", first.name, rest)
    first.client.expect((head + rest).encode())
    second.answer("other")
    for flight in (first, second):
        record = flight.record
        assert written(record) == (len(flight.body), flight.calls) or says(record) in HUMBLE, told(record)


# --- an adversary ------------------------------------------------------------------------------------------------------


class Adversary:
    """Uploads of one length and the same bytes, in files that are named by chance; how many calls wrote a file is its truth."""

    def __init__(self, stage: Stage, model: str, seed: int, count: int) -> None:
        self.random = random.Random(seed)
        self.stage = stage
        self.reader = reader_of(model)
        self.flights = stage.take_several(self.reader, [bytes(9_000)] * count)
        self.calls = {i: i + 2 for i in range(count)}

    def run(self, choose: Choice) -> None:
        """Each upload's steps in order, those of all of them mixed, each by the worker that is chosen for it."""
        steps = {i: self.steps(i) for i in self.calls}
        while steps:
            i = self.random.choice(sorted(steps))
            step = next(steps[i], None)
            if step is None:
                del steps[i]
            else:
                self.stage.puppet.do(working(self.reader(i), choose(self.random, i)), *step)
        for i in self.random.sample(sorted(self.calls), len(self.calls)):
            self.flights[i].answer(self.reader(i))

    def steps(self, i: int) -> Iterator[tuple[Any, ...]]:
        name, file, path = self.flights[i].name, f"{self.flights[i].request_id}", f"storage/{uuid.uuid4()}"
        edges = [9_000 * k // self.calls[i] for k in range(self.calls[i] + 1)]
        yield "open", file, path, CREATE
        for start, end in itertools.pairwise(edges):
            yield "save", file, name, start, end
        yield "fsync", file
        yield "close", file
        yield "rename", path, f"storage/data/{uuid.uuid4()}"

    def check(self) -> Counter[str]:
        """Nothing is exact and wrong, and what is shared has the right one among its candidates. How many carry which label."""
        ids = {self.calls[i]: flight.record["id"] for i, flight in enumerate(self.flights)}
        for i, flight in enumerate(self.flights):
            record = flight.record
            right = written(record) == (9_000, self.calls[i])
            assert right or says(record) in HUMBLE, told(record)
            if says(record) == "shared":
                candidates = record["attribution"]["candidates"]
                assert record["id"] in candidates, told(record)
                assert ids.get(record["files"]["write_calls"], record["id"]) in candidates, told(record)
        return Counter(says(flight.record) for flight in self.flights)


def any_of(*names: str) -> Choice:
    return lambda chance, _: chance.choice(names)


def in_turn(*names: str) -> Choice:
    return lambda _, i: names[i % len(names)]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("model", ["loop", "tasks"])
def test_equal_uploads_in_a_pool(stage: Stage, model: str, seed: int) -> None:
    before = stage.world.untied()
    adversary = Adversary(stage, model, seed, 8)
    adversary.run(any_of("pool-0", "pool-1", "pool-2"))
    labels = adversary.check()
    assert labels["shared"] + labels["unattributed"] > 0
    check_sum(stage, adversary.flights, before, 8 * 9_000)


@pytest.mark.parametrize("model", ["loop", "tasks"])
@pytest.mark.parametrize(
    ("calm", "storm"),
    [
        (in_turn("loop"), in_turn("loop")),
        (in_turn("loop"), any_of("pool-0", "pool-1")),
        (in_turn("pool-0", "pool-1", "pool-2"), in_turn("pool-0", "pool-1", "pool-2")),
        (in_turn("pool-0", "pool-1", "pool-2"), any_of("pool-0", "pool-1", "pool-2")),
    ],
    ids=["loop", "loop then pool", "pool", "pool then per call"],
)
def test_trust_that_was_earned_in_calm_weather(stage: Stage, model: str, calm: Choice, storm: Choice) -> None:
    """A server that at first does each request's work as it comes, and later has several that look all the same."""
    reader = reader_of(model)
    chance = random.Random(1)
    idle = stage.take(reader(99), body=bytes(9_000))  # so that the thread is never one request's alone
    for i in range(30):
        flight = stage.take(reader(i), body=content((i + 1) * PIECE, i))
        flight.store(working(reader(i), calm(chance, i)), flight.final)
        flight.answer(reader(i))
    check_written(flight)
    adversary = Adversary(stage, model, 3, 6)
    adversary.run(storm)
    adversary.check()
    idle.answer(reader(99))

# SPDX-License-Identifier: Apache-2.0
"""Which processes are observed, through restart, fork and exec, and what becomes of the service when the agent comes and goes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from harness import Agent, Client, Record, Server, Service, alive, await_that, free_port, process_ended, request

NewId = Callable[[], str]
StartAgent = Callable[..., Agent]

PUT_FILES = {"opens": 1, "write_calls": 1, "syncs": 1, "read_calls": 0, "read_bytes": 0, "renames": 0}
NO_FILES = {"opens": 0, "write_calls": 0, "write_bytes": 0, "syncs": 0, "read_calls": 0, "read_bytes": 0, "renames": 0}


def put(client: Client, request_id: str, body: bytes, path: str = "/store/thing") -> None:
    status, answer = client.ask(request("PUT", path, request_id, body=body))
    assert (status, answer) in ((201, b"stored"), (200, b"logged"), (200, b"cycled"))


def check_put(record: Record, body: bytes) -> None:
    assert (record["status"], record["outcome"], record["bytes_in"], record["bytes_out"]) == (201, "complete", len(body), 6)
    assert record["files"] == {**PUT_FILES, "write_bytes": len(body)}
    assert record["attribution"]["label"] == "exact"


class Traffic:
    """Clients that store and read back, each byte compared, until stopped."""

    def __init__(self, port: int, clients: int = 4, pause: float = 0.002) -> None:
        self.port = port
        self.pause = pause
        self.finished = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_more(self, count: int) -> None:
        """Until so many more requests are answered."""
        enough = self.finished + count
        await_that("the service goes on", lambda: self.finished >= enough)

    def _run(self, number: int) -> None:
        try:
            with Client(self.port) as client:
                for i in range(1_000_000):
                    if self._stop.is_set():
                        return
                    body = os.urandom(64) * (1 + i % 97)
                    path = f"/store/traffic-{number}"
                    stored = client.ask(request("PUT", path, f"put-{number}-{i}", body=body))
                    read = client.ask(request("GET", path, f"get-{number}-{i}"))
                    assert stored == (201, b"stored")
                    assert read == (200, body)
                    with self._lock:
                        self.finished += 2
                    time.sleep(self.pause)
        except (OSError, AssertionError) as error:
            self.errors.append(repr(error))


def for_storage(base: Path) -> tuple[str, ...]:
    return ("--storage-root", str(base / "storage"))


# Restart


@pytest.mark.parametrize("naming", ["absolute", "relative"])
def test_restart_on_the_same_port_loses_nothing(start_agent: StartAgent, base: Path, unique_id: NewId, naming: str) -> None:
    port = free_port()
    (base / "storage").mkdir()
    agent = start_agent("--port", str(port), *for_storage(base), ready=False)
    for round_ in range(4):
        with Service(port, base, "threads", naming), agent.exactly(20) as records:
            for i in range(10):
                with Client(port) as client:
                    put(client, unique_id(), b"r" * (1 + i + round_))
                    put(client, unique_id(), b"r" * (1 + i + round_))
        for i, record in enumerate(records):
            check_put(record, b"r" * (1 + i // 2 + round_))
        assert len({record["pid"] for record in records}) == 1
    await_that("the agent sees that nothing runs", lambda: not agent.targets_up())
    assert agent.get("/readyz")[0] == 503
    assert "the target is gone" in agent.log()


# Children


@pytest.mark.parametrize("naming", ["absolute", "relative"])
@pytest.mark.parametrize("model", ["fork", "prefork"])
@pytest.mark.parametrize("order", ["agent first", "service first"])
def test_children(start_agent: StartAgent, base: Path, unique_id: NewId, model: str, naming: str, order: str) -> None:
    port = free_port()
    (base / "storage").mkdir()
    options = ("--port", str(port), *for_storage(base))
    first = start_agent(*options, ready=False) if order == "agent first" else None
    with Service(port, base, model, naming) as parent:
        agent = first or start_agent(*options)
        pids = set()
        with agent.exactly(60) as records:
            for i in range(20):
                with Client(port) as client:
                    for j in range(2):
                        put(client, unique_id(), b"k" * (100 * i + j + 1), f"/store/child-{i}")
                    pids.add(int(client.ask(request("GET", "/pid", unique_id()))[1]))
        for i, record in enumerate(records):
            if i % 3 < 2:
                check_put(record, b"k" * (100 * (i // 3) + i % 3 + 1))
            else:
                assert record["files"] == NO_FILES
        assert {record["pid"] for record in records} == pids
        if model == "fork":
            assert parent.pid not in pids


def test_file_of_the_parent_used_by_the_child(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """Opened before the fork, and before the agent: the child's writes are the parent's file's."""
    port = free_port()
    with Service(port, base, "fork"):
        agent = start_agent("--port", str(port), *for_storage(base))
        with agent.exactly(12) as records:
            for i in range(12):
                with Client(port) as client:
                    put(client, unique_id(), b"l" * (i + 1), "/log")
        for i, record in enumerate(records):
            assert record["files"] == {**NO_FILES, "write_calls": 1, "write_bytes": i + 1}


def test_number_of_a_file_means_another_one_in_the_child(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """After the fork the parent closes the file, and opens another one elsewhere by the same number: the child's writes go to the first."""
    port = free_port()
    with Service(port, base, "swap"):
        agent = start_agent("--port", str(port), *for_storage(base))
        with agent.exactly(5) as records:
            for i in range(5):
                with Client(port) as client:
                    put(client, unique_id(), b"l" * (i + 1), "/log")
                time.sleep(0.2)
        for i, record in enumerate(records):
            assert (record["files"], record["other_files"]) == ({**NO_FILES, "write_calls": 1, "write_bytes": i + 1}, NO_FILES)


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("model", ["threading", "forking"])
def test_servers_of_the_standard_library(start_agent: StartAgent, base: Path, unique_id: NewId, model: str, version: str) -> None:
    port = free_port()
    (base / "storage").mkdir()
    agent = start_agent("--port", str(port), *for_storage(base), ready=False)
    with Server("standard.py", port, base, model, version), agent.exactly(20) as records:
        for i in range(10):
            body = b"s" * (1 + i * 7001)
            put_it, get_it = request("PUT", f"/s{i}", unique_id(), body=body), request("GET", f"/s{i}", unique_id(), "Connection: close")
            if version == "HTTP/1.1":
                with Client(port) as client:
                    assert client.ask(put_it) == (201, b"stored")
                    assert client.ask(get_it) == (200, body)
                continue
            for data, answer in ((put_it, b"stored"), (get_it, body)):
                with Client(port) as client:
                    client.send(data)
                    assert client.receive_all().endswith(b"\r\n\r\n" + answer)
    for i, record in enumerate(records):
        size = 1 + (i // 2) * 7001
        stored, read = (0, size) if i % 2 else (size, 0)
        assert (record["status"], record["outcome"]) == (200 if i % 2 else 201, "complete")
        assert (record["bytes_in"], record["bytes_out"]) == (stored, read or 6)
        assert (record["files"]["write_bytes"], record["files"]["read_bytes"], record["files"]["opens"]) == (stored, read, 1)


# Exec


def test_exec_that_keeps_the_listening_socket(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    port = free_port()
    with Service(port, base) as running:
        agent = start_agent("--port", str(port), *for_storage(base))
        for _ in range(3):
            with agent.exactly(2), Client(port) as client:
                put(client, unique_id(), b"before")
                assert client.ask(request("GET", "/exec", unique_id())) == (200, b"")
            assert running.process.stdout
            assert running.process.stdout.readline() == "listening\n"
            with agent.exactly(7) as records:
                for _ in range(3):
                    with Client(port) as client:
                        put(client, unique_id(), b"after")
                        put(client, unique_id(), b"cycle", "/cycle/5")
                with Client(port) as client:
                    put(client, unique_id(), b"log", "/log")
            for record in records[:6:2]:
                check_put(record, b"after")
            for record in records[1:6:2]:
                check_cycle(record, 5, 5)
            assert records[6]["files"] == {**NO_FILES, "write_calls": 1, "write_bytes": 3}
            assert {record["pid"] for record in records} == {running.pid}


# Descriptors


def check_cycle(record: Record, times: int, size: int) -> None:
    per_file = {"opens": times, "write_calls": times, "syncs": times, "read_calls": 0, "read_bytes": 0, "renames": 0}
    assert record["files"] == {**per_file, "write_bytes": times * size}
    assert record["other_files"] == {**per_file, "write_bytes": times * (size + 9)}


def test_descriptor_numbers_used_again(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """One number is a stored file, a socket, another file and a pipe in turn, on several threads: nothing is credited wrongly."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), *for_storage(base))
        with Client(port) as client:
            put(client, unique_id(), b"warm", "/cycle/1")
        agent.find("test_descriptor_numbers_used_again-0")

        def run(number: int) -> None:
            with Client(port) as client:
                for i in range(15):
                    put(client, f"cycle-{number}-{i}", b"d" * (i + 1), "/cycle/7")

        with agent.exactly(60) as records:
            threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for record in records:
            check_cycle(record, 7, int(record["request_id"].split("-")[2]) + 1)


def test_file_opened_before_the_agent(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    port = free_port()
    with Service(port, base), Client(port) as early:
        put(early, unique_id(), b"before the agent", "/log")
        agent = start_agent("--port", str(port), *for_storage(base))
        with agent.exactly(13) as records, Client(port) as late:
            for i in range(13):
                put(early if i % 2 else late, unique_id(), b"l" * (i + 1), "/log")
        for i, record in enumerate(records):
            assert record["files"] == {**NO_FILES, "write_calls": 1, "write_bytes": i + 1}


@pytest.mark.parametrize("model", ["threads", "fork"])
def test_connections_older_than_the_agent(start_agent: StartAgent, base: Path, unique_id: NewId, model: str) -> None:
    """Eight idle keep-alive connections whose threads are blocked in recv: the first request after the attach is found whole."""
    port = free_port()
    with Service(port, base, model):
        clients = [Client(port) for _ in range(8)]
        for client in clients[:4]:
            put(client, unique_id(), b"before the agent")
        time.sleep(0.2)
        agent = start_agent("--port", str(port), *for_storage(base))
        ids = [unique_id() for _ in range(16)]
        with agent.exactly(16) as records:
            for i, client in enumerate(clients):
                body = b"o" * (1000 * i + 1)
                data = request("PUT", f"/store/old-{i}", ids[i], body=body)
                client.send(data[:40])
                time.sleep(0.002)
                assert client.ask(data[40:]) == (201, b"stored")
            for i, client in enumerate(clients):
                assert client.ask(request("GET", f"/store/old-{i}", ids[8 + i]))[0] == 200
        for i, record in enumerate(records):
            size = 1000 * (i % 8) + 1
            assert record["request_id"] == ids[i]
            assert (record["status"], record["outcome"]) == (201 if i < 8 else 200, "complete")
            assert (record["bytes_in"], record["bytes_out"]) == ((size, 6) if i < 8 else (0, size))
            if i < 8:
                assert record["files"]["write_bytes"] == size
            else:
                assert (record["files"]["read_bytes"], record["files"]["read_calls"]) == (size, 2)
        assert agent.ledger()["kernel.unsolicited"] == 0
        for client in clients:
            client.close()


def test_connection_met_in_the_middle_of_an_upload(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """The rest of the body is no request, whatever it looks like, and is shown nowhere; the next request is found."""
    port = free_port()
    with Service(port, base), Client(port) as client:
        inside = request("PUT", "/store/inside", "a-body-that-looks-like-a-request")
        data = request("PUT", "/store/met", unique_id(), body=b"CANARY" * 1000 + inside[:-4] * 20)
        # A read that begins with such a line cannot be told from a request.
        assert not any(data.startswith(b"PUT", at) for at in range(3000, len(data), 1000))
        client.send(data[:3000])
        time.sleep(0.2)
        agent = start_agent("--port", str(port), *for_storage(base))
        with agent.exactly(1) as records:
            for at in range(3000, len(data), 1000):
                client.send(data[at : at + 1000])
                time.sleep(0.002)
            client.receive(len(b"HTTP/1.1 201 Done\r\nContent-Length: 6\r\n\r\nstored"))
            put(client, unique_id(), b"next")
        check_put(records[0], b"next")
        assert "CANARY" not in agent.records_path.read_text() + agent.log() + agent.get("/metrics")[1]


def test_old_connection_whose_first_line_comes_in_pieces(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """What comes before the line is whole is not kept: it may be a body. The numbers are right all the same."""
    port = free_port()
    with Service(port, base), Client(port) as client:
        put(client, unique_id(), b"before")
        time.sleep(0.1)
        agent = start_agent("--port", str(port), *for_storage(base))
        data = request("PUT", "/store/thing", unique_id(), body=b"pieces")
        with agent.exactly(1) as records:
            client.send(data[:9])
            time.sleep(0.05)
            assert client.ask(data[9:])[0] == 201
        check_put(records[0], b"pieces")


# Kinds of target


def test_target_by_pid(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    port, other_port = free_port(), free_port()
    with Service(port, base) as wanted, Service(other_port, base):
        agent = start_agent("--pid", str(wanted.pid), *for_storage(base))
        with agent.exactly(1) as records, Client(port) as client, Client(other_port) as other:
            put(other, unique_id(), b"not observed")
            put(client, unique_id(), b"observed")
        check_put(records[0], b"observed")
        wanted.kill()
        await_that("the agent sees that it is gone", lambda: f"pid {wanted.pid} ended" in agent.log())
        assert agent.get("/readyz")[0] == 503


@pytest.mark.parametrize("form", ["path", "name", "symlink"])
@pytest.mark.parametrize("order", ["agent first", "service first"])
def test_target_by_executable(start_agent: StartAgent, base: Path, unique_id: NewId, form: str, order: str) -> None:
    program = base / "bucketd"
    shutil.copy(os.path.realpath("/usr/bin/python3"), program)
    (base / "link").symlink_to(program)
    exe = {"path": str(program), "name": "bucketd", "symlink": str(base / "link")}[form]
    port, other_port = free_port(), free_port()
    (base / "storage").mkdir()
    first = start_agent("--exe", exe, *for_storage(base), ready=False) if order == "agent first" else None
    with Service(port, base, executable=str(program)) as wanted, Service(other_port, base):
        agent = first or start_agent("--exe", exe, *for_storage(base))
        agent.await_target(wanted.pid)
        with agent.exactly(2) as records, Client(port) as client, Client(other_port) as other:
            put(other, unique_id(), b"not observed")
            put(client, unique_id(), b"observed")
            put(client, unique_id(), b"observed")
        check_put(records[0], b"observed")
        check_put(records[1], b"observed")


def cgroup_mounts() -> list[Path]:
    """A version 2 hierarchy and a version 1 hierarchy, what there is of them."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found: dict[str, Path] = {}
    for _, where, kind, *_ in mounts:
        if kind in ("cgroup", "cgroup2") and where.rpartition("/")[2] not in ("systemd", "cpuset"):
            found.setdefault(kind, Path(where))
    return list(found.values())


@pytest.mark.parametrize("form", ["absolute", "below the mount", "component"])
@pytest.mark.parametrize("mount", cgroup_mounts(), ids=str)
def test_target_by_cgroup(start_agent: StartAgent, base: Path, unique_id: NewId, mount: Path, form: str) -> None:
    group = mount / f"bucketprobe-test-{os.getpid()}"
    group.mkdir()
    try:
        wanted = {"absolute": str(group), "below the mount": f"/{group.name}", "component": group.name}[form]
        port, other_port = free_port(), free_port()
        with Service(port, base) as running, Service(other_port, base):
            (group / "cgroup.procs").write_text(str(running.pid))
            agent = start_agent("--cgroup", wanted, *for_storage(base))
            with agent.exactly(1) as records, Client(port) as client, Client(other_port) as other:
                put(other, unique_id(), b"not observed")
                put(client, unique_id(), b"observed")
            check_put(records[0], b"observed")
    finally:
        await_that("the control group is empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_two_targets(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    ports = [free_port(), free_port()]
    with Service(ports[0], base) as one:
        agent = start_agent("--port", str(ports[0]), "--port", str(ports[1]), *for_storage(base))
        with Service(ports[1], base) as two:
            with agent.exactly(10) as records, Client(ports[0]) as first, Client(ports[1]) as second:
                for _ in range(5):
                    put(first, unique_id(), b"first")
                    put(second, unique_id(), b"second!")
            for i, record in enumerate(records):
                check_put(record, b"second!" if i % 2 else b"first")
                assert record["pid"] == (two.pid if i % 2 else one.pid)
        await_that("the second target is gone", lambda: agent.target_pids() == {one.pid})
        with agent.exactly(1), Client(ports[0]) as first:
            put(first, unique_id(), b"still")


def test_ipv6_and_ipv4_on_one_listener(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    port = free_port()
    with Service(port, base, "threads", "ipv6"), Client(port, "::1") as old:
        put(old, unique_id(), b"before")
        agent = start_agent("--port", str(port), *for_storage(base))
        with agent.exactly(3) as records, Client(port, "::1") as six, Client(port) as four:
            for client in (old, six, four):
                put(client, unique_id(), b"version")
        for record in records:
            check_put(record, b"version")


def test_service_that_is_its_own_client(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """Its outgoing connections are no requests to it; the one that it makes to itself is one request, not two."""
    port = free_port()
    with Service(port, base) as running:
        agent = start_agent("--port", str(port), *for_storage(base))
        answer = str(running.pid).encode()
        with agent.exactly(2) as records, Client(port) as client:
            assert client.ask(request("GET", "/self", outer := unique_id())) == (200, answer)
        assert [record["request_id"] for record in records] == [outer, "inner"]
        for record in records:
            assert (record["status"], record["outcome"], record["bytes_in"], record["bytes_out"]) == (200, "complete", 0, len(answer))
            assert record["attribution"]["label"] == "exact"


# The agent comes and goes


def await_records(agent: Agent, count: int) -> None:
    await_that(f"{count} records", lambda: agent.ledger()["records"] >= count)


def bpf_objects(pid: int) -> set[str]:
    """The ids of the BPF programs and links that a process holds, from its fdinfo."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").glob("*"):
        try:
            text = info.read_text()
        except OSError:
            continue
        found |= set(re.findall(r"^((?:prog|link)_id:\s*\d+)$", text, re.MULTILINE))
    return found


def all_bpf_objects() -> set[str]:
    return {found for folder in Path("/proc").iterdir() if folder.name.isdigit() for found in bpf_objects(int(folder.name))}


@pytest.mark.parametrize("victim", ["agent", "broker"])
def test_killed_and_started_again(start_agent: StartAgent, base: Path, victim: str) -> None:
    """The service and its clients do not notice, and nothing stays attached."""
    port = free_port()
    with Service(port, base) as running, Traffic(port) as traffic:
        for _ in range(3):
            agent = start_agent("--port", str(port), *for_storage(base))
            await_records(agent, 50)
            [broker] = agent.broker_pids()
            attached = bpf_objects(broker)
            assert len([name for name in attached if name.startswith("link")]) >= 6
            os.kill(agent.pid if victim == "agent" else broker, signal.SIGKILL)
            killed = time.monotonic()
            await_that("the broker is gone", partial(process_ended, broker), 1)
            await_that("nothing is attached", lambda: not attached & all_bpf_objects(), 1)  # noqa: B023  (called at once)
            assert time.monotonic() - killed < 1
            assert agent.process.wait(5) == (-signal.SIGKILL if victim == "agent" else 1)
            if victim == "broker":
                assert "The broker ended, and with it the probes: start bucketprobe again." in agent.log()
            traffic.await_more(20)
        traffic.stop()
        assert traffic.errors == []
        assert traffic.finished > 200
        assert running.process.poll() is None


def test_stopped_for_two_seconds_under_load(start_agent: StartAgent, base: Path) -> None:
    """The service does not wait for the agent, and what is counted in the kernel is exact."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), *for_storage(base))
        with Traffic(port, pause=0) as traffic:
            await_records(agent, 50)
            agent.process.send_signal(signal.SIGSTOP)
            before, started = traffic.finished, time.monotonic()
            time.sleep(2)
            rate = (traffic.finished - before) / (time.monotonic() - started)
            agent.process.send_signal(signal.SIGCONT)
            time.sleep(0.2)
        assert traffic.errors == []
        assert rate > 100
        ledger = agent.settled()
        assert ledger["begun"] == ledger["complete"] == traffic.finished
        assert ledger["finished"] == ledger["records"] + ledger["kernel.ring_end"]


def test_starts_and_ends_under_load(start_agent: StartAgent, base: Path) -> None:
    """Requests that are under way while the probes are attached give no false record."""
    port = free_port()
    with Service(port, base), Traffic(port, pause=0) as traffic:
        for _ in range(3):
            agent = start_agent("--port", str(port), *for_storage(base))
            await_records(agent, 100)
            ledger = agent.ledger()
            assert agent.stop() == 0
            assert ledger["finished"] == ledger["complete"]
            for record in agent.records():
                assert record["request_id"]
                assert record["status"] == (201 if record["request_id"].startswith("put") else 200)
                assert record["method"] == record["request_id"][:3].upper()
        assert traffic.errors == []


def test_other_processes_are_not_observed(start_agent: StartAgent, base: Path, unique_id: NewId) -> None:
    """Traffic between others, on other ports, and the target's own outgoing connections give nothing."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), *for_storage(base))
        with agent.exactly(0):
            subprocess.run(["cat", "/etc/passwd"], check=True, stdout=subprocess.DEVNULL)
            with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
                far, _ = listener.accept()
                near.sendall(request("GET", "/", "not-ours"))
                far.recv(4096)
                far.close()
        assert alive(agent.pid)

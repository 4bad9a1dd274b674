# SPDX-License-Identifier: Apache-2.0
"""What can be wrong around the agent: one clear sentence with the remedy, the right exit code, no traceback, and no count lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import COMMAND, PATIENCE, Agent, Client, Service, alive, await_that, children_of, free_port, process_ended, request

StartAgent = Callable[..., Agent]

PRIVATE_MOUNTS = ("unshare", "--mount", "sh", "-c")


def refused(code: int, *words: str, options: tuple[str, ...], base: Path, cache: Path, prefix: tuple[str, ...] = ()) -> None:
    """`bucketprobe run` ends by itself with this exit code and one sentence, which holds these words."""
    command = [*prefix, *COMMAND, "run", "--listen", "127.0.0.1:0", "--run-dir", str(base / "run"), "--cache-dir", str(cache), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if "compiling" not in line and "no --storage-root" not in line]
    last = sentences[-1]
    for word in words:
        assert word in last, done.stderr
    assert done.returncode == code, done.stderr
    assert len([line for line in sentences if "runs as nobody" not in line]) == 1, done.stderr
    assert done.stdout == ""


# The configuration


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[target]\nport = [80]\n", ("agent.toml:2", "port", "did you mean ports?")),
        ("[target]\nports = [80]\n\n[agents]\n", ("agent.toml:4", "agents", "did you mean agent?")),
        ("[target]\nports = [0]\n", ("agent.toml:2", "1 to 65535")),
        ("[target]\nports = 80\n", ("agent.toml:2", "a list of TCP ports")),
        ("[target\n", ("agent.toml:1", "not valid TOML")),
        ("[agent]\nring_bytes = 40000\n", ("agent.toml:2", "power of two")),
        ("listen = '127.0.0.1:1'\n", ("agent.toml", "listen")),
    ],
)
def test_configuration_that_cannot_be_used(base: Path, cache_dir: Path, text: str, words: tuple[str, ...]) -> None:
    config = base / "agent.toml"
    config.write_text(text)
    refused(2, *words, options=("--config", str(config)), base=base, cache=cache_dir)


def test_configuration_that_cannot_be_read(base: Path, cache_dir: Path) -> None:
    refused(2, "missing.toml", "No such file", options=("--config", str(base / "missing.toml")), base=base, cache=cache_dir)
    refused(2, "Is a directory", options=("--config", str(base)), base=base, cache=cache_dir)
    (base / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused(2, "binary.toml", "UTF-8", options=("--config", str(base / "binary.toml")), base=base, cache=cache_dir)


def test_nothing_to_observe(base: Path, cache_dir: Path) -> None:
    refused(2, "--port", "--pid", options=(), base=base, cache=cache_dir)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--records", "{base}/no/such/folder/r.jsonl"), ("no/such/folder", "existing folder")),
        (("--records", "{base}/link"), ("symbolic link",)),
        (("--records", "{base}"), ("Cannot write records",)),
        (("--user", "no-such-user"), ("no-such-user", "--user")),
        (("--user", "root"), ("root", "privileged", "--user")),
        (("--listen", "127.0.0.1"), ("--listen", "HOST:PORT")),
        (("--listen", "192.0.2.1:80"), ("192.0.2.1:80", "--listen")),
        (("--run-dir", "{base}/file"), ("file", "run directory")),
        (("--run-dir", "{base}"), ("other files", "run directory")),
    ],
)
def test_option_that_cannot_be_used(base: Path, cache_dir: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    (base / "file").write_text("")
    (base / "link").symlink_to(base / "file")
    refused(2, *words, options=("--port", "1", *(option.format(base=base) for option in options)), base=base, cache=cache_dir)


def test_metrics_port_in_use(base: Path, cache_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(2, address, "Address already in use", "--listen", options=("--port", "1", "--listen", address), base=base, cache=cache_dir)


# The target


def test_port_on_which_nobody_listens_yet(start_agent: StartAgent, base: Path) -> None:
    port = free_port()
    agent = start_agent("--port", str(port), "--storage-root", str(base / "storage"), ready=False)
    assert f"waits for a target (port {port}): nothing runs there yet" in agent.log()
    status, why = agent.get("/readyz")
    assert (status, f"port {port}" in why) == (503, True)
    assert agent.get("/healthz")[0] == 200
    with Service(port, base), agent.exactly(1), Client(port) as client:
        client.ask(request("PUT", "/store/first", "first", body=b"1"))
        await_that("it is ready", lambda: agent.get("/readyz")[0] == 200)
    assert agent.find("first")["files"]["write_bytes"] == 1


def test_pid_that_does_not_exist(base: Path, cache_dir: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    refused(2, f"pid {gone.pid}", "--port", options=("--pid", str(gone.pid)), base=base, cache=cache_dir)


def test_pid_that_dies(start_agent: StartAgent, base: Path) -> None:
    port = free_port()
    with Service(port, base) as service:
        agent = start_agent("--pid", str(service.pid))
        with agent.exactly(1), Client(port) as client:
            client.ask(request("GET", "/pid", "only"))
        service.kill()
        await_that("the agent says so", lambda: f"pid {service.pid} ended" in agent.log())
        assert agent.get("/readyz")[0] == 503
        assert agent.ledger()["complete"] == 1
        assert agent.find("only")["status"] == 200


# The host


def test_without_privileges(base: Path, cache_dir: Path) -> None:
    unprivileged = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    refused(2, "run as root", prefix=unprivileged, options=("--port", "1"), base=base, cache=cache_dir)


@pytest.mark.parametrize("missing", ["bpf", "perfmon", "sys_ptrace", "setpcap"])
def test_without_one_capability(base: Path, cache_dir: Path, missing: str) -> None:
    without = f"-{missing}" + (",-sys_admin" if missing in ("bpf", "perfmon") else "")
    prefix = ("setpriv", "--bounding-set", without)
    refused(2, f"CAP_{missing.upper()}", "run as root", prefix=prefix, options=("--port", "1"), base=base, cache=cache_dir)


def test_second_agent(start_agent: StartAgent, base: Path, cache_dir: Path) -> None:
    first = start_agent("--port", "1", ready=False)
    refused(3, f"pid {first.pid}", "stop it first", options=("--port", "1", "--run-dir", str(first.run_dir)), base=base, cache=cache_dir)
    assert first.get("/healthz")[0] == 200
    first.stop()
    start_agent("--port", "1", ready=False, run_dir=first.run_dir)


def test_agent_after_one_that_was_killed(start_agent: StartAgent) -> None:
    """Its lock and its socket are in the way of nobody."""
    first = start_agent("--port", "1", ready=False)
    first.process.kill()
    first.process.wait()
    start_agent("--port", "1", ready=False, run_dir=first.run_dir)


def test_without_tracefs(start_agent: StartAgent, base: Path) -> None:
    """It needs none."""
    port = free_port()
    away = "for d in /sys/kernel/debug/tracing /sys/kernel/tracing; do ! mountpoint -q $d || umount $d; done; "
    prefix = (*PRIVATE_MOUNTS, away + 'test ! -e /sys/kernel/tracing/events && exec "$@"', "sh")
    with Service(port, base):
        agent = start_agent("--port", str(port), prefix=prefix)
        with agent.exactly(1), Client(port) as client:
            client.ask(request("GET", "/pid", "without-tracefs"))


def hidden(path: str) -> tuple[str, ...]:
    """What makes a command see an empty thing there."""
    empty = "/dev/null" if os.path.isfile(path) else "$(mktemp -d)"
    return (*PRIVATE_MOUNTS, f'mount --bind {empty} {path} && exec "$@"', "sh")


def bcc_folder() -> str:
    """Where the system's Python has its packages, BCC among them."""
    command = ["/usr/bin/python3", "-I", "-c", "import bcc; print(*bcc.__path__)"]
    return str(Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).parent)


def test_without_bcc(start_agent: StartAgent, base: Path) -> None:
    """It is needed to compile, once."""
    refused(2, "apt-get install python3-bpfcc", prefix=hidden(bcc_folder()), options=("--port", "1"), base=base, cache=base / "empty")
    start_agent("--port", "1", ready=False, prefix=hidden(bcc_folder()))


def test_without_the_kernels_type_information(base: Path) -> None:
    refused(2, "BTF", prefix=hidden("/sys/kernel/btf/vmlinux"), options=("--port", "1"), base=base, cache=base / "empty")


def test_cache_that_cannot_be_written(base: Path) -> None:
    """It says so, and works."""
    agent = Agent(base / "agent", Path("/dev/null/cache"), "--port", "1", ready=False)
    assert "/dev/null/cache cannot be written" in agent.log()
    agent.close()


@pytest.mark.parametrize("content", ["", '{"programs": {"sys_enter": "AAAA"}}'])
def test_cache_that_is_damaged(base: Path, cache_dir: Path, content: str) -> None:
    """It is made anew."""
    damaged = base / "cache"
    shutil.copytree(cache_dir, damaged)
    stored = list(damaged.iterdir())
    assert stored
    for file in stored:
        file.write_text(content)
    agent = Agent(base / "agent", damaged, "--port", "1", ready=False)
    agent.close()


# The records


@contextmanager
def load_records(port: int, count: int, name: str) -> Iterator[None]:
    with Client(port) as client:
        for i in range(count):
            client.ask(request("GET", "/nothing", f"{name}-{i}"))
        yield


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of JSON, each."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def test_full_disk_under_the_records(start_agent: StartAgent, base: Path) -> None:
    port = free_port()
    disk = base / "disk"
    disk.mkdir()
    prefix = (*PRIVATE_MOUNTS, f'mount -t tmpfs -o size=96k none {disk} && exec "$@"', "sh")
    with Service(port, base):
        agent = start_agent("--port", str(port), "--records", str(disk / "r.jsonl"), records=None, prefix=prefix)
        inside = Path(f"/proc/{agent.pid}/root{disk}/r.jsonl")
        with load_records(port, 110, "full"):
            await_that("it says so", lambda: "No space left on device" in agent.log())
        agent.settled()
        kept = lines(inside)
        assert 50 < len(kept) < 110
        assert agent.log().count("No space left") == 1
        assert agent.get("/healthz")[0] == 200
        os.truncate(inside, 0)
        await_that("it goes on", lambda: "again" in agent.log())
        ledger = agent.settled()
        assert ledger["records"] == ledger["complete"] == 110
        assert ledger["jsonl.no_space"] == 0
        assert [record["request_id"] for record in kept + lines(inside)] == [f"full-{i}" for i in range(110)]


def test_disk_that_stays_full(start_agent: StartAgent, base: Path) -> None:
    """What the agent keeps meanwhile is bounded; the rest is counted."""
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port), "--records", "/dev/full", records=None)
        with load_records(port, 1700, "full"):
            ledger = agent.settled()
        assert ledger["records"] == ledger["complete"] == 1700
        assert ledger["jsonl.no_space"] > 0
        assert agent.log().count("No space left") == 1
        assert agent.stop() == 0


def test_reader_of_the_records_goes_away(base: Path, cache_dir: Path) -> None:
    port = free_port()
    listen = free_port()
    command = [*COMMAND, "run", "--port", str(port), "--records", "-", "--listen", f"127.0.0.1:{listen}"]
    command += ["--run-dir", str(base / "run"), "--cache-dir", str(cache_dir)]
    with Service(port, base), subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        log = [process.stderr.readline()]
        while "ready:" not in log[-1]:
            log.append(process.stderr.readline())
        with load_records(port, 3, "read"):
            read = [json.loads(process.stdout.readline())["request_id"] for _ in range(3)]
        assert read == ["read-0", "read-1", "read-2"]
        process.stdout.close()
        with load_records(port, 3, "unread"):
            assert "is gone" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(PATIENCE) == 0
        assert "6 requests begun, 6 complete" in rest
        assert "Traceback" not in rest


def test_reader_of_the_log_goes_away(base: Path, cache_dir: Path) -> None:
    """The agent goes on without a log."""
    port, listen = free_port(), free_port()
    records = base / "records.jsonl"
    command = [*COMMAND, "run", "--port", str(port), "--records", str(records), "--listen", f"127.0.0.1:{listen}"]
    command += ["--run-dir", str(base / "run"), "--cache-dir", str(cache_dir)]
    with Service(port, base) as service, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "ready:" not in process.stderr.readline():
            pass
        process.stderr.close()
        service.kill()
        time.sleep(0.3)
        with Service(port, base), load_records(port, 3, "unlogged"):
            await_that("records come", lambda: records.stat().st_size and len(lines(records)) == 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


# Clients of the agent


def test_clients_that_leave_metrics_half_way(start_agent: StartAgent) -> None:
    agent = start_agent("--port", "1", ready=False)
    for take in (0, 1, 100, 5000):
        for _ in range(8):
            reader = socket.create_connection(("127.0.0.1", agent.listen), timeout=PATIENCE)
            reader.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            if take:
                reader.recv(take)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reader.close()
    long_field = b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 100_000
    for junk in (b"\x00" * 1000 + b"\r\n\r\n", b"GET\r\n\r\n", long_field, b"POST / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", agent.listen), timeout=PATIENCE) as reader, suppress(ConnectionError):
            reader.sendall(junk)
            reader.recv(1000)
    assert agent.get("/metrics")[0] == 200
    assert len(agent.log().splitlines()) < 10


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_end_it(start_agent: StartAgent, base: Path, number: signal.Signals) -> None:
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port))
        with load_records(port, 7, "end"):
            pass
        brokers = agent.broker_pids()
        assert agent.stop(number) == 0
        assert [record["request_id"] for record in agent.records()] == [f"end-{i}" for i in range(7)]
        account = "7 requests begun, 7 complete, 0 client_closed, 0 server_closed, 0 unobserved, 0 in flight; 7 records"
        assert f"stopped: {account}" in agent.log()
        assert all(process_ended(pid) for pid in brokers)
        assert not (agent.run_dir / "control.sock").exists()


def test_interrupt_from_a_terminal(base: Path, cache_dir: Path) -> None:
    """Ctrl-C goes to the whole group: agent and broker."""
    command = [*COMMAND, "run", "--port", "1", "--listen", "127.0.0.1:0", "--run-dir", str(base / "run"), "--cache-dir", str(cache_dir)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr
    while "ready:" not in process.stderr.readline():
        pass
    brokers = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(PATIENCE) == 0
    assert "stopped: 0 requests begun" in rest
    assert "Traceback" not in rest
    assert all(process_ended(pid) for pid in brokers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_while_it_starts(base: Path, cache_dir: Path, number: signal.Signals) -> None:
    """At any moment: no traceback, and nothing left behind. (The interpreter's own start is not ours to guard from SIGINT.)"""
    for delay_ms in range(0, 400, 50):
        command = [*COMMAND, "run", "--port", "1", "--listen", "127.0.0.1:0", "--run-dir", str(base / "run"), "--cache-dir", str(cache_dir)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if number == signal.SIGINT:
            await_that("there is a broker", partial(children_of, process.pid))
        time.sleep(delay_ms / 1000)
        brokers = children_of(process.pid)
        process.send_signal(number)
        if number == signal.SIGHUP:
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in log, (delay_ms, log)
        assert process.returncode in (0, 128 + number, -number), (delay_ms, log)
        for pid in brokers:
            await_that("the broker ends", partial(process_ended, pid), 3)


def test_hangup_opens_the_records_again(start_agent: StartAgent, base: Path) -> None:
    port = free_port()
    with Service(port, base):
        agent = start_agent("--port", str(port))
        with load_records(port, 5, "old"):
            agent.find("old-4")
        rotated = agent.records_path.with_suffix(".1")
        agent.records_path.rename(rotated)
        agent.process.send_signal(signal.SIGHUP)
        await_that("it is opened again", lambda: agent.records_path.exists() and "opened again" in agent.log())
        with load_records(port, 5, "new"):
            await_that("records come", lambda: len(lines(agent.records_path)) == 5 if agent.records_path.stat().st_size else 0)
        assert [record["request_id"] for record in lines(rotated)] == [f"old-{i}" for i in range(5)]
        assert [record["request_id"] for record in lines(agent.records_path)] == [f"new-{i}" for i in range(5)]
        assert agent.records_path.stat().st_mode & 0o777 == 0o640
        agent.records_path.unlink()
        agent.records_path.symlink_to(base / "elsewhere" / "stolen")
        agent.process.send_signal(signal.SIGHUP)
        await_that("it refuses", lambda: "symbolic link" in agent.log())
        with load_records(port, 1, "still"):
            await_that("it goes on", lambda: agent.ledger()["records"] == 11)
        assert not (base / "elsewhere" / "stolen").exists()


def test_hangup_without_records(start_agent: StartAgent) -> None:
    agent = start_agent("--port", "1", ready=False, records=None)
    agent.process.send_signal(signal.SIGHUP)
    await_that("it says so", lambda: "no records file" in agent.log())
    assert alive(agent.pid)


# What the agent may still do


def test_the_agent_holds_nothing(start_agent: StartAgent) -> None:
    """No capability, no privilege to gain, no uid to go back to, on any of its threads; no memory of its to be read."""
    agent = start_agent("--port", "1", ready=False)
    for task in Path(f"/proc/{agent.pid}/task").iterdir():
        status = dict(re.findall(r"^(\w+):[ \t]*(.*)$", (task / "status").read_text(), re.MULTILINE))
        assert [status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == ["0" * 16] * 5
        assert status["Uid"].split() == ["65534"] * 4
        assert (status["NoNewPrivs"], status["Groups"]) == ("1", "")
    assert Path(f"/proc/{agent.pid}/mem").stat().st_uid == 0
    assert "bcc" not in Path(f"/proc/{agent.pid}/maps").read_text()
    samples = agent.metrics()
    assert {value for name, value in samples.items() if name.startswith("bucketprobe_capabilities")} == {0}

# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: an agent and servers as processes of their own, and a client that decides each byte and each send."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bucketprobe import capture

HERE = Path(__file__).parent
SERVERS = HERE / "servers"
COMMAND = (str(Path(sys.executable).with_name("bucketprobe")),)

#: How long anything may take that takes milliseconds on an idle machine, in seconds.
PATIENCE = 10.0

Record = dict[str, Any]
Step = Sequence[Any]


def await_that(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `condition`; fails where there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """A TCP port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Agent:
    """`bucketprobe run` in a folder of its own. `ready`: return only when it observes a target, else when it is attached."""

    def __init__(
        self,
        base: Path,
        cache_dir: Path,
        *options: str,
        records: str | None = "records.jsonl",
        ready: bool = True,
        attached: bool = True,
        prefix: Sequence[str] = (),
        run_dir: Path | None = None,
    ) -> None:
        base.mkdir(parents=True, exist_ok=True)
        self.listen = free_port()
        self._records_path = base / records if records else None
        self.log_path = base / "agent.log"
        self.run_dir = run_dir or base / "run"
        self._offset = 0
        self._records: list[Record] = []
        command = [*prefix, *COMMAND, "run", "--listen", f"127.0.0.1:{self.listen}", "--run-dir", str(self.run_dir)]
        command += ["--cache-dir", str(cache_dir), *options]
        if self._records_path:
            command += ["--records", str(self.records_path)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if attached or ready:
            try:
                await_that("the agent is ready", lambda: "ready:" in self.log() or self.process.poll() is not None, 60)
                assert self.process.poll() is None, self.log()
                if ready:
                    await_that("a target is found", self.targets_up)
            except BaseException:
                self.process.kill()
                self.process.wait()
                raise

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def records_path(self) -> Path:
        assert self._records_path
        return self._records_path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def broker_pids(self) -> list[int]:
        return children_of(self.pid)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page of the agent's."""
        connection = http.client.HTTPConnection("127.0.0.1", self.listen, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels as written."""
        lines = (line for line in self.get("/metrics")[1].splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def ledger(self) -> Counter[str]:
        """What /metrics says of requests and losses, by short names; a loss is `stage.cause`."""
        found: Counter[str] = Counter()
        for name, value in self.metrics().items():
            labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
            if name == "bucketprobe_requests_begun_total":
                found["begun"] = int(value)
            elif name == "bucketprobe_requests_in_flight":
                found["in_flight"] = int(value)
            elif name == "bucketprobe_records_total":
                found["records"] = int(value)
            elif name.startswith("bucketprobe_requests_finished_total"):
                found[labels["outcome"]] = int(value)
                found["finished"] += int(value)
            elif name.startswith("bucketprobe_lost_total"):
                found[f"{labels['stage']}.{labels['cause']}"] = int(value)
        return found

    def settled(self) -> Counter[str]:
        """The ledger, once nothing in it has moved for a second, the longest that anything is held back."""
        last, since = self.ledger(), time.monotonic()
        deadline = since + PATIENCE
        while time.monotonic() - since < 1:
            assert time.monotonic() < deadline, last
            time.sleep(0.1)
            now = self.ledger()
            if now != last:
                last, since = now, time.monotonic()
        return last

    def targets_up(self) -> bool:
        return self.metrics()["bucketprobe_targets_up"] > 0

    def await_target(self, pid: int) -> None:
        """Until the process is a target: the kernel follows it already when the agent hears of it."""
        await_that(f"pid {pid} is a target", lambda: pid in self.target_pids())

    def target_pids(self) -> set[int]:
        """From the control socket, as `bucketprobe capture` asks it."""
        status: dict[str, Any] = dict(capture.status(self.run_dir))
        return {int(pid) for pid in status["processes"]}

    def records(self) -> list[Record]:
        """All records so far, in the order in which they were written."""
        with suppress(FileNotFoundError), self.records_path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
            whole = text.rfind(b"\n") + 1
            self._offset += whole
            self._records += map(json.loads, text[:whole].splitlines())
        return self._records

    def duplicates(self) -> list[str]:
        """Request IDs of which there is more than one record."""
        counts = Counter(record["request_id"] for record in self.records() if record["request_id"])
        return [request_id for request_id, count in counts.items() if count > 1]

    def find(self, request_id: str, seconds: float = PATIENCE) -> Record:
        """The one record of a request, waited for."""

        def look() -> Record | None:
            return next((record for record in self.records() if record["request_id"] == request_id), None)

        record: Record = await_that(f"a record of {request_id}", look, seconds)
        return record

    @contextmanager
    def exactly(self, count: int, seconds: float = PATIENCE) -> Iterator[list[Record]]:
        """Exactly so many requests begin, end and get a record inside the block; the list then holds the records by start."""
        before, known = self.ledger(), len(self.records())
        found: list[Record] = []
        yield found

        def done() -> bool:
            now = self.ledger()
            return not now["in_flight"] and now["records"] - before["records"] >= count and len(self.records()) - known >= count

        if not count:
            time.sleep(0.2)
        with suppress(AssertionError):
            await_that(f"{count} records", done, seconds)
        now = self.ledger()
        found += sorted(self.records()[known:], key=lambda record: int(record["start_ns"]))
        changes = {name: value - before[name] for name, value in now.items() if value != before[name]}
        assert now["begun"] - before["begun"] == count, changes
        assert now["finished"] - before["finished"] == count, changes
        assert len(found) == count, changes

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """Ends it, if it still runs, and checks that it ends well. Its log never holds a traceback."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                assert self.stop() == 0, self.log()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        assert "Traceback" not in self.log(), self.log()


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def process_ended(pid: int) -> bool:
    """Whether the process is gone, or only its parent has not yet asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Server:
    """A server of servers/ that listens when the constructor returns."""

    def __init__(self, program: str, port: int, base: Path, *options: str, executable: str = sys.executable) -> None:
        self.port = port
        self.base = base
        command = [executable, "-I", "-S", str(SERVERS / program), str(port), str(base), *options]
        # A session of its own: `kill` then reaches its children as well.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "listening\n"

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        assert self.process.stdin
        assert self.process.stdout
        with suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()

    def connect(self) -> Client:
        return Client(self.port)


class Scripted(Server):
    """Does on each connection what it is told: see servers/scripted.py for the steps."""

    def __init__(self, port: int, base: Path) -> None:
        super().__init__("scripted.py", port, base)
        self._running = False

    @property
    def idle(self) -> bool:
        """Whether it can take another script. Waits for the end of the last one; False if that killed the server."""
        if self._running and not self.process.stdout.closed:  # type: ignore[union-attr]
            try:
                self.result()
            except ValueError:
                return False
        return self.process.poll() is None

    def script(self, *steps: Step) -> Client:
        """Gives the steps for the next connection, and that connection."""
        assert self.process.stdin
        assert self.idle
        self._running = True
        self.process.stdin.write(json.dumps(steps) + "\n")
        return self.connect()

    def go(self) -> None:
        """Lets a script go on that is at its step `await`."""
        assert self.process.stdin
        self.process.stdin.write("\n")

    def result(self) -> dict[str, Any]:
        """Waits for the script's end: `received` bytes, `reads` and `error`."""
        assert self.process.stdout
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        self._running = False
        return answer


class Worker(Server):
    """Makes the system calls that a request's path names: see servers/worker.py."""

    def __init__(self, port: int, base: Path) -> None:
        super().__init__("worker.py", port, base)


class Puppet(Server):
    """Makes each call in the thread that it is told to: see servers/puppet.py for the calls."""

    def __init__(self, port: int, base: Path, *options: str) -> None:
        super().__init__("puppet.py", port, base, *options)
        self._number = 0
        self._done: dict[int, dict[str, Any]] = {}

    def start(self, thread: str, call: str, *arguments: Any) -> int:
        """Gives a thread its next call and returns at once, with the call's number."""
        assert self.process.stdin
        self._number += 1
        step = {"number": self._number, "thread": thread, "call": call, "arguments": arguments}
        self.process.stdin.write(json.dumps(step) + "\n")
        return self._number

    def result(self, number: int) -> Any:
        """What the call came to, waited for."""
        assert self.process.stdout
        while number not in self._done:
            done = json.loads(self.process.stdout.readline())
            self._done[done["number"]] = done
        assert self._done[number]["error"] is None, self._done[number]
        return self._done[number]["result"]

    def do(self, thread: str, call: str, *arguments: Any) -> Any:
        """One call of a thread, from its begin to its end."""
        return self.result(self.start(thread, call, *arguments))


class Service(Server):
    """A service in one of the models in which services run: see servers/service.py."""

    def __init__(self, port: int, base: Path, *options: str, executable: str = sys.executable) -> None:
        for name in ("storage", "elsewhere"):
            (base / name).mkdir(exist_ok=True)
        super().__init__("service.py", port, base, *options, executable=executable)


class Client:
    """A client's end of a connection."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes, piece: int = 0, pause: float = 0.0) -> None:
        """All at once, or in pieces with a pause after each."""
        for at in range(0, len(data), piece or len(data) or 1):
            self.socket.sendall(data[at : at + (piece or len(data))])
            if pause:
                time.sleep(pause)

    def receive(self, count: int) -> bytes:
        """So many bytes, or those up to the end."""
        data = b""
        while len(data) < count and (more := self.socket.recv(min(count - len(data), 1 << 20))):
            data += more
        return data

    def ask(self, data: bytes) -> tuple[int, bytes]:
        """Sends a request and reads its answer, which has a length: status and body."""
        self.send(data)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            more = self.receive(1)
            assert more, head
            head += more
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length, head
        body = self.receive(int(length[1]))
        assert len(body) == int(length[1])
        return int(head.split(b" ")[1]), body

    def receive_all(self) -> bytes:
        return self.receive(1 << 40)

    def expect(self, data: bytes) -> None:
        """These bytes come next."""
        found = self.receive(len(data))
        assert found == data, (found[:200], data[:200])

    def expect_end(self) -> None:
        assert self.socket.recv(1) == b""

    def finish(self) -> None:
        """No more bytes from here; the answer may still come."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Breaks the connection off: the peer gets a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def request(method: str, path: str, request_id: str | None = None, *fields: str, body: bytes = b"", version: str = "HTTP/1.1") -> bytes:
    """A request with its length, where it has a body."""
    lines = [f"{method} {path} {version}", "Host: bucket", *fields]
    if request_id is not None:
        lines.append(f"X-Request-ID: {request_id}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def response(status: int, body: bytes = b"", *fields: str, reason: str = " Reason", version: str = "HTTP/1.1") -> bytes:
    """A response with its length."""
    lines = [f"{version} {status}{reason}", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(parts: Sequence[bytes], extension: str = "", trailers: Sequence[str] = (), upper: bool = False) -> bytes:
    """A chunked body of these chunks."""
    out = b""
    for part in parts:
        size = f"{len(part):X}" if upper else f"{len(part):x}"
        out += f"{size}{extension}\r\n".encode() + part + b"\r\n"
    return out + f"0{extension}\r\n".encode() + "".join(f"{line}\r\n" for line in trailers).encode() + b"\r\n"


def text(data: bytes) -> str:
    """Bytes as a script carries them."""
    return data.decode("latin-1")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""Starts what is measured, servers, loads and agents, and ends all of it again, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from figures import Part, alternate
from host import cpu_ns, system_call_tracers

from bucketprobe import capture
from bucketprobe.errors import BucketprobeError

#: How long an agent may take to be ready, a cold compile on a slow host included.
READY_SECONDS = 120.0
END_SECONDS = 15.0
#: The agent looks at its ring at least every 100 ms.
DRAIN_SECONDS = 0.3
CONNECTIONS = 8

T = TypeVar("T")
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. Times in seconds."""

    cases: tuple[tuple[str, int], ...]
    arm_s: float
    throughput_pairs: int
    cpu_runs: int
    cpu_s: float
    memory_requests: tuple[int, ...]
    cold_starts: int
    cached_starts: int
    syscall_pairs: int
    resolver_runs: int
    resolver_requests: int
    digest_pairs: int
    digest_round_s: float
    digest_always_pairs: int
    budget_phase_s: float


SIZES = (8 << 10, 64 << 10, 1 << 20)
FULL = Plan(
    cases=tuple((model, size) for model in ("threads", "prefork") for size in SIZES),
    arm_s=3.0,
    throughput_pairs=5,
    cpu_runs=2,
    cpu_s=6.0,
    memory_requests=(1_000, 9_000, 10_000),
    cold_starts=5,
    cached_starts=10,
    syscall_pairs=9,
    resolver_runs=3,
    resolver_requests=2_000,
    digest_pairs=10,
    digest_round_s=0.5,
    digest_always_pairs=3,
    budget_phase_s=15.0,
)
QUICK = Plan(
    cases=(("threads", 8 << 10), ("prefork", 64 << 10)),
    arm_s=2.0,
    throughput_pairs=2,
    cpu_runs=1,
    cpu_s=3.0,
    memory_requests=(500, 2_000, 2_500),
    cold_starts=2,
    cached_starts=4,
    syscall_pairs=3,
    resolver_runs=1,
    resolver_requests=500,
    digest_pairs=3,
    digest_round_s=0.4,
    digest_always_pairs=2,
    budget_phase_s=6.0,
)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A running reference server on `port`, with its artifacts below `root`."""

    port: int
    root: Path
    _pid: int

    def cpu_ns(self) -> int:
        """Of the server and its workers so far."""
        workers = psutil.Process(self._pid).children(recursive=True)
        return cpu_ns(self._pid) + sum(cpu_ns(worker.pid) for worker in workers)

    def clear(self) -> None:
        """Removes the artifacts, as many fit into a tmpfs. Only while nothing is asked of the server, which makes folders anew."""
        subprocess.run(["rm", "-rf", *map(str, (*self.root.glob("data/*"), *self.root.glob("meta/*")))], check=True)


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent. `ready_s`: from its exec until /readyz answered 200."""

    pid: int
    broker_pid: int
    listen_port: int
    run_dir: Path
    ready_s: float

    def cpu_ns(self) -> tuple[int, int]:
        """Of the agent and of its broker so far."""
        return cpu_ns(self.pid), cpu_ns(self.broker_pid)

    def status(self) -> dict[str, Any]:
        return dict(capture.status(self.run_dir))

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels as written. Raises BucketprobeError where nobody answers."""
        status, text = http_get(self.listen_port, "/metrics")
        if status != 200:
            raise BucketprobeError("The agent does not answer any more: run the bench again.")
        return samples(text)


@dataclass
class Rig:
    """Where the bench works. `room` holds logs, caches and run folders, `store` what servers keep; both are removed by the caller.

    `patience_s`: how long it may still wait and measure again, all in all, because of others on the host that trace system calls.
    """

    room: Path
    store: Path
    plan: Plan
    progress: Progress
    patience_s: float = 30.0
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    @property
    def cache(self) -> Path:
        """The compiled probes for all agents but those whose cold start is measured."""
        return self.room / "cache"

    def fresh(self, name: str) -> Path:
        """A path that nothing has used yet."""
        return self.room / f"{name}-{next(self._numbers)}"

    @contextmanager
    def started(
        self,
        command: Sequence[str],
        log: Path,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        cpus: Collection[int] | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process in a group of its own, so that a Ctrl-C reaches only the bench, which then ends all in order.

        `cpus`: those that it and its children run on; None: ours.
        """
        with log.open("ab") as out, on_cpus(cpus or os.sched_getaffinity(0)):
            process = subprocess.Popen(
                command, stdin=stdin, stdout=out if stdout is None else stdout, stderr=out, process_group=0, env=environment()
            )
        try:
            yield process
        finally:
            end(process)

    @contextmanager
    def bucket(self, model: str, *options: str, workers: int = CONNECTIONS, cpus: Collection[int] | None = None) -> Iterator[Bucket]:
        """A reference server. `options`: more of its command line."""
        root, log = self.store / f"bucket-{next(self._numbers)}", self.fresh("bucket.log")
        command = [sys.executable, "-m", "bucketprobe.demo.bucket", "--port", "0", "--root", str(root), "--model", model]
        with self.started([*command, "--workers", str(workers), *options], log, cpus=cpus) as process:
            port = int(self._announced(process, log, r"listening on http://127\.0\.0\.1:(\d+)"))
            yield Bucket(port, root, process.pid)
        subprocess.run(["rm", "-rf", str(root)], check=True)

    @staticmethod
    def _announced(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and process.poll() is None:
            found = re.search(pattern, log.read_text(errors="replace"))
            if found:
                return found[1]
            time.sleep(0.02)
        raise BucketprobeError(f"The reference Bucket did not start: {last_lines(log)}")

    @contextmanager
    def agent(self, target: Sequence[str], *, cache: Path | None = None, records: bool = True) -> Iterator[Agent]:
        """An agent, ready. It writes records to the store, as in everyday use, unless told otherwise. Raises BucketprobeError."""
        log, run_dir, port = self.fresh("agent.log"), self.fresh("run"), free_port()
        command = [
            str(Path(sys.executable).with_name("bucketprobe")), "run", *target, "--listen", f"127.0.0.1:{port}",
            "--run-dir", str(run_dir), "--cache-dir", str(cache or self.cache),
        ]  # fmt: skip
        record_file = self.store / f"{run_dir.name}.jsonl"
        if records:
            command += ["--records", str(record_file)]
        begin = time.monotonic()
        with self.started(command, log) as process:
            while http_get(port, "/readyz")[0] != 200:
                if process.poll() is not None or time.monotonic() - begin > READY_SECONDS:
                    raise BucketprobeError(f"The agent was not ready: {last_lines(log)}")
                time.sleep(0.001)
            ready_s = time.monotonic() - begin
            (broker,) = psutil.Process(process.pid).children()
            yield Agent(process.pid, broker.pid, port, run_dir, ready_s)
        record_file.unlink(missing_ok=True)

    def load(self, port: int, size: int | None = None, *, connections: int = CONNECTIONS, **options: float) -> dict[str, Any]:
        """Runs the load generator to its end; the result as it prints it. `size`: of every artifact, in bytes.

        Raises BucketprobeError where an answer was wrong.
        """
        command = [sys.executable, "-m", "bucketprobe.demo.load", "--port", str(port), "--json"]
        command += ["--connections", str(connections), "--processes", "2"]
        if size is not None:
            options["fixed_bytes"] = size
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        log = self.fresh("load.log")
        with self.started(command, log, stdout=subprocess.PIPE) as process:
            out, _ = process.communicate(timeout=options.get("seconds", 0) + 120)
        if process.returncode:
            raise BucketprobeError(f"The load met wrong answers or none: {out.decode()[:500]} {last_lines(log)}")
        result: dict[str, Any] = json.loads(out)
        return result

    def pairs(self, part: Part, name: str, count: int, target: Sequence[str], work: Callable[[Agent | None], T]) -> list[tuple[T, T]]:
        """What `work` finds (without an agent, with one), `count` times, interleaved. `name` is for the progress display.

        A pair in which others traced system calls is measured again, while patience lasts: they slow everything down, and while
        they do the first step of what the agent costs has been paid already. What stays disturbed is counted in the part.
        """
        clean: list[tuple[T, T]] = []
        disturbed: list[tuple[T, T]] = []
        for order in alternate(2 * count):
            enough = len(clean) + len(disturbed) >= count
            if len(clean) == count or (enough and self.patience_s <= 0):
                break
            begin = time.monotonic()
            found: dict[bool, T] = {}
            quiet = True
            for on in order:
                again = f" ({len(disturbed)} disturbed by others so far)" if disturbed else ""
                self.progress(f"{part.name}: {name}pair {len(clean) + 1} of {count}, agent {'on' if on else 'off'}{again}")
                found[on], undisturbed = self._arm(on, target, work)
                quiet &= undisturbed
            (clean if quiet else disturbed).append((found[False], found[True]))
            if enough:
                self.patience_s -= time.monotonic() - begin
        used = (clean + disturbed)[:count]
        part.pairs += len(used)
        part.disturbed += len(used) - len(clean)
        return used

    def _arm(self, on: bool, target: Sequence[str], work: Callable[[Agent | None], T]) -> tuple[T, bool]:
        self._await_quiet()
        if not on:
            value = work(None)
            return value, not system_call_tracers()
        with self.agent(target) as agent:
            value = work(agent)
            return value, system_call_tracers() <= {agent.broker_pid}

    def _await_quiet(self) -> None:
        begin = time.monotonic()
        while system_call_tracers() and time.monotonic() - begin < self.patience_s:
            time.sleep(0.2)
        self.patience_s -= time.monotonic() - begin


@contextmanager
def on_cpus(cpus: Collection[int]) -> Iterator[None]:
    """This thread, and whatever it starts meanwhile, run on these CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks it to end, and makes it and whatever is left of its group end where it does not."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def environment() -> dict[str, str]:
    """Ours, but bytecode is written: how fast a command starts must not depend on what was compiled before."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def http_get(port: int, path: str) -> tuple[int | None, str]:
    """Status and text of what the agent answers to a GET; None and nothing where nobody answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b""
            while data := connection.recv(1 << 16):
                answer += data
    except OSError:
        return None, ""
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), body.decode()) if head.startswith(b"HTTP/1.") else (None, "")


def samples(text: str) -> dict[str, float]:
    """The samples of Prometheus text by name and labels as written."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def last_lines(log: Path) -> str:
    """The end of a log, in one line."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:]) or "it said nothing"

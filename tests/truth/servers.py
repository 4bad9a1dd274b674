# SPDX-License-Identifier: Apache-2.0
"""Servers that know the truth: small stores in many runtimes, each of which writes down what it did for each request.

    with started("go", folder) as running:
        ...  # put load on 127.0.0.1:running.port by running.load, a command without its options
    for line in running.truth(): ...

By hand, until Ctrl-C:

    python tests/truth/servers.py go --folder /var/tmp/go

All of them keep Bucket v1's calls, statuses and this layout under `running.root`, but for nginx, which is a plain WebDAV
store under the same paths and has no metadata:

    tmp/UUID                            an upload in progress
    data/BUCKET/ARTIFACT/VERSION        the bytes
    meta/BUCKET/ARTIFACT/VERSION.json   the metadata, written as meta/UUID.tmp, synced and renamed

None of them has a lock for two uploads of one version at a time: the load does not do that.

A line of truth is a JSON object per request:

    request_id, method, target_path, status     as on the wire
    pid, tid                                    where known, else null
    outcome                                     `complete`, or `client_closed` where the client left in the middle
    bytes_in, bytes_out                         bytes of the two bodies
    begin_ns                                    when the program got to see the request
    accept_ns                                   after accept(2) of the connection; null where the program cannot know
    end_ns                                      at a moment after the answer's last byte went to the kernel; null where unknown
    steps                                       {step, ns, bytes, calls} for open, close, storage_write, storage_sync,
                                                storage_read, mkdir, rename, unlink on data and temporary files and their
                                                folders, and for metadata, which is all of that on sidecars: time as the
                                                program saw it, of calls that fail, too
    files, metadata_files                       calls that succeeded, and their bytes, on data and temporary files and on
                                                sidecars, in bucketprobe's words; null where the program cannot know.
                                                A folder that is opened to be listed is not a file, but its time counts

and of the SHA-256 of artifacts, by those that hash:

    steps: digest                               wall time in the calls of the hash, and the bytes that were given to it
    steps: digest_cpu                           CPU time of the thread in the same calls, an observer's probes included, where known
    steps: digest_other, digest_other_cpu       the same of other hashing
    computed                                    "sha256:HEX", the digest of an upload as the program found it; null where it hashed none
    verified                                    "match" or "mismatch" for each digest of what was read back from storage

All `_ns` are CLOCK_MONOTONIC. A step that the program did not time is not there. What else to know of a server is in its
`notes`. The models of the reference Bucket are here, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "servers"
CACHE = HERE.parents[1] / "out" / "servers"
START_S = 60
STOP_S = 30
COUNTERS = ("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames")

Line = dict[str, Any]


class CannotStart(Exception):
    """A server that this host cannot run. The text is one sentence that names the remedy."""


@dataclass(frozen=True)
class Place:
    """Where one server runs. `workers`: processes (nginx) or threads, for those that let themselves be told."""

    folder: Path
    cache: Path
    port: int
    workers: int | None

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def truth(self) -> Path:
        return self.folder / "truth.jsonl"


@dataclass(frozen=True)
class Server:
    """How to start one. `programs`: commands that must be there, with the Debian package that has each."""

    command: Callable[[Place], list[str]]
    notes: str
    programs: Mapping[str, str] | None = None
    load: tuple[str, ...] = (sys.executable, "-m", "bucketprobe.demo.load")
    ready: str = "listening on"
    stop: signal.Signals = signal.SIGTERM
    read_truth: Callable[[Path], list[Line]] | None = None
    has_metadata: bool = True


@dataclass(frozen=True)
class Running:
    """A server that answers. `pid`: of its first process; `load`: the command that makes requests as it expects them."""

    name: str
    server: Server
    port: int
    pid: int
    root: Path
    storage_roots: list[Path]
    metadata: list[str]
    load: list[str]
    notes: str
    truth_path: Path
    log_path: Path

    def truth(self) -> list[Line]:
        """The lines so far. All are there only after the server was stopped, which is when `started` was left."""
        return (self.server.read_truth or read_lines)(self.truth_path)


@contextmanager
def started(
    name: str,
    folder: Path,
    *,
    server: Server | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A server for the time, which keeps all that it writes in `folder`: the one that `SERVERS` has by this name, or the one given.

    `cache`: where built programs are kept for the next time, out/servers unless given; `environment`: variables for the
    server, beside those that are set. Raises CannotStart.
    """
    server = server or SERVERS[name]
    for program, package in (server.programs or {}).items():
        if shutil.which(program) is None:
            raise CannotStart(f"the server {name} needs the command {program}; run .ci/setup test, or install Debian's {package}")
    place = Place(folder.resolve(), (cache or CACHE).resolve(), free_port(), workers)
    for part in (place.cache, place.root / "data", place.root / "tmp", place.root / "meta"):
        part.mkdir(parents=True, exist_ok=True)
    command = server.command(place)
    log = place.folder / "server.log"
    with log.open("wb") as output:
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=output, cwd=HERE.parents[1], env=variables)
    try:
        line = await_line(process, log, server.ready)
        yield Running(
            name=name,
            server=server,
            port=int(line.split("http://", 1)[1].split(":")[1].split()[0]) if "http://" in line else place.port,
            pid=process.pid,
            root=place.root,
            storage_roots=[place.root / "data", place.root / "tmp"],
            metadata=[f"{place.root}/meta/**"] if server.has_metadata else [],
            load=list(server.load),
            notes=server.notes,
            truth_path=place.truth,
            log_path=log,
        )
    finally:
        process.send_signal(server.stop)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_line(process: subprocess.Popen[bytes], log: Path, words: str) -> str:
    """The first whole line of the log with these words. Raises CannotStart where the process ends or is silent instead."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            if words in line and line.endswith("\n"):
                return line
        if ended:
            break
        time.sleep(0.02)
    raise CannotStart(f"{process.args!r} did not say {words!r} but: {log.read_text(errors='replace').strip() or 'nothing'}")


def free_port() -> int:
    """A TCP port on which nobody listens now: nginx alone cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a JSON-lines file; none where it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


# --- how each is started ---


def bucket(model: str) -> Callable[[Place], list[str]]:
    """The reference Bucket."""

    def command(place: Place) -> list[str]:
        module = [sys.executable, "-m", "bucketprobe.demo.bucket", "--port", "0", "--root", f"{place.root}"]
        workers = [] if place.workers is None else ["--workers", f"{place.workers}"]
        return [*module, "--model", model, "--truth", f"{place.truth}", *workers]

    return command


def build_library(source: Path, place: Place) -> Path:
    """Build a small library of the servers into the cache, unless it is there. Raises CannotStart."""
    library = place.cache / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=place.cache) as work:
            built = Path(work, library.name)
            try:
                done = subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", built, source], capture_output=True, text=True, check=False)
            except FileNotFoundError:
                raise CannotStart(f"{source.name} needs gcc; run .ci/setup, or install Debian's gcc and libc6-dev") from None
            if done.returncode:
                raise CannotStart(f"{source.name} cannot be built, which needs gcc and libc6-dev: {done.stderr.strip()}")
            built.rename(library)
    return library


def digest_bucket(model: str, *options: str) -> Callable[[Place], list[str]]:
    """The reference Bucket, as digest_bucket.py has it."""

    def command(place: Place) -> list[str]:
        watch = build_library(SOURCES / "timed_update.c", place)
        program = [sys.executable, f"{SOURCES}/digest_bucket.py", "--port", "0", "--root", f"{place.root}", "--truth", f"{place.truth}"]
        workers = [] if place.workers is None else ["--workers", f"{place.workers}"]
        return [*program, "--model", model, "--watch", f"{watch}", *workers, *options]

    return command


def digest_node(mode: str, *options: str) -> Callable[[Place], list[str]]:
    """Node, with a clock of its thread's CPU time."""

    def command(place: Place) -> list[str]:
        clock = build_library(SOURCES / "thread_clock.c", place)
        return node(mode, f"--clock={clock}", *options)(place)

    return command


def nginx(place: Place) -> list[str]:
    """nginx with a configuration, a prefix and logs of its own."""
    values = {
        "FOLDER": place.folder,
        "ROOT": place.root,
        "PORT": place.port,
        "WORKERS": place.workers or 1,
        # As root it would give its workers to a user who cannot write here; else it may not choose.
        "USER": "user root;" if os.geteuid() == 0 else "",
    }
    text = (SOURCES / "nginx.conf").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", f"{value}")
    configuration = place.folder / "nginx.conf"
    configuration.write_text(text)
    return ["nginx", "-p", f"{place.folder}", "-c", f"{configuration}", "-e", "stderr", "-g", "error_log stderr notice;"]


def nginx_truth(path: Path) -> list[Line]:
    """nginx's own access log as lines of truth."""
    return [nginx_line(seen) for seen in read_lines(path)]


def nginx_line(seen: Line) -> Line:
    status, sent = int(seen["status"]), int(seen["body_bytes_sent"])
    stored = seen["method"] == "PUT" and status in (201, 204)
    read = seen["method"] == "GET" and status == 200
    received = int(seen["content_length"] or 0)
    files: dict[str, int | None] = dict.fromkeys(COUNTERS, 0)
    if stored:
        files.update(opens=1, write_calls=None, write_bytes=received, renames=1)
    if read:
        files.update(opens=1, read_calls=None, read_bytes=sent)
    return {
        "request_id": seen["request_id"] or None,
        "pid": int(seen["pid"]),
        "tid": int(seen["pid"]),
        "method": seen["method"],
        "target_path": seen["target_path"],
        "status": status,
        "outcome": "complete" if seen["request_completion"] == "OK" else "client_closed",
        "bytes_in": received,
        # It counts a `100 Continue` as part of the body, and has no body for what it stored.
        "bytes_out": 0 if stored else sent,
        "begin_ns": None,
        "accept_ns": None,
        "end_ns": None,
        "steps": [],
        "files": files,
        "metadata_files": dict.fromkeys(COUNTERS, 0),
        "request_body_file": seen["request_body_file"] or None,
    }


def uvicorn(loop: str, *options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return [sys.executable, f"{SOURCES}/uvicorn_app.py", loop, f"{place.root}", f"{place.truth}", *options]

    return command


def go(*options: str) -> Callable[[Place], list[str]]:
    """The Go server, built into the cache where its source has changed since. Raises CannotStart."""

    def command(place: Place) -> list[str]:
        source = SOURCES / "go"
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(source.iterdir()))).hexdigest()[:16]
        program = place.cache / f"bucket-go-{digest}"
        if not program.exists():
            build_go(source, program)
        return [f"{program}", "-root", f"{place.root}", "-truth", f"{place.truth}", *options]

    return command


def build_go(source: Path, program: Path) -> None:
    """Build with the standard library alone and no network. Raises CannotStart."""
    with tempfile.TemporaryDirectory(dir=program.parent) as work:
        switches = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOCACHE": f"{work}/cache"}
        build = ["go", "build", "-trimpath", "-o", f"{work}/{program.name}", "."]
        done = subprocess.run(build, cwd=source, env={**os.environ, **switches}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotStart(f"the Go server cannot be built, which needs Go 1.19 or later: {done.stderr.strip()}")
        Path(work, program.name).rename(program)


def node(mode: str, *options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return ["node", f"{SOURCES}/node_bucket.js", mode, f"{place.root}", f"{place.truth}", *options]

    return command


def waitress(place: Place) -> list[str]:
    return [sys.executable, f"{SOURCES}/waitress_app.py", f"{place.workers or 8}", f"{place.root}", f"{place.truth}"]


SERVERS: dict[str, Server] = {
    "threads": Server(bucket("threads"), "The reference Bucket: one thread for each connection."),
    "prefork": Server(bucket("prefork"), "The reference Bucket: worker processes, each with one connection at a time."),
    "asyncio": Server(bucket("asyncio"), "The reference Bucket: one thread, blocking file calls in the coroutines."),
    "asyncio-pool": Server(bucket("asyncio-pool"), "The reference Bucket: an event loop, each file call in a thread pool."),
    "asyncio-sync": Server(bucket("asyncio-sync"), "The reference Bucket: an event loop, each endpoint in a worker thread."),
    "waitress": Server(
        waitress,
        "The main thread receives whole requests, those above 512 KiB into a nameless file in the temporary folder, and 8 threads (or"
        " `workers`) serve them; begin_ns is when one of these began. The spooling is in no line's counts.",
    ),
    "uvicorn-asyncio": Server(uvicorn("asyncio"), "One asyncio loop and httptools; blocking file calls in the coroutines."),
    "uvicorn-uvloop": Server(uvicorn("uvloop"), "One libuv loop and httptools; blocking file calls in the coroutines."),
    "node-stream": Server(
        node("stream"),
        "One event loop, file calls in libuv's threads: each step lasts from the call to its callback, and includes the wait for a"
        " thread and for the loop. PUT is req.pipe(createWriteStream); a GET ends with a read(2) that finds nothing.",
        programs={"node": "nodejs"},
    ),
    "node-buffer": Server(
        node("buffer"),
        "As node-stream, but a PUT's body is collected, checked and then written by FileHandle.writeFile; the number of its calls is"
        " not known, and an upload with a wrong digest makes no file at all.",
        programs={"node": "nodejs"},
    ),
    "go": Server(
        go(),
        "A goroutine per connection. GET is http.ServeContent: 512 bytes by read(2), the rest by sendfile(2), neither timed nor counted.",
        programs={"go": "golang-go"},
    ),
    "go-writer": Server(
        go("-writer"),
        "As go, but a PUT's body is written by another goroutine than the one that reads it, opens, syncs and renames.",
        programs={"go": "golang-go"},
    ),
    "nginx": Server(
        nginx,
        "One event loop. Times, the number of write and read calls, and whether sendfile(2) was used it does not tell. A PUT's temporary"
        " file is closed after the answer; it is synced never. `workers`: processes, 1 unless given.",
        programs={"nginx": "nginx"},
        load=(sys.executable, str(HERE / "dav_load.py")),
        ready="start worker process ",
        stop=signal.SIGQUIT,
        read_truth=nginx_truth,
        has_metadata=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run one of the servers that know the truth, until Ctrl-C.")
    parser.add_argument("name", choices=SERVERS)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where it keeps everything")
    parser.add_argument("--workers", type=int, metavar="N", help="processes or threads")
    values = parser.parse_args(arguments)
    try:
        with started(values.name, values.folder, workers=values.workers) as running:
            print(f"{running.name} listens on http://127.0.0.1:{running.port}, pid {running.pid}, root {running.root}", flush=True)
            print(f"load: {' '.join(running.load)} --port {running.port}", flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except CannotStart as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Blocked, so that sigwait() gets them; the server then is stopped in its own way.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The broker by its messages: as its agent would talk to it. Most of it needs the kernel, and says so."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bucketprobe import abi, bpf, broker, link, program, runtimes, stats, target, wire
from bucketprobe.config import DigestSpec, Settings, StorageSpec, TargetSpec
from bucketprobe.errors import BucketprobeError, EnvironmentLack

SECONDS = 20.0
HOLD_OPEN = """
import os, sys
files = [open(path, "a") for path in sys.argv[1:] if not os.path.isdir(path)]
folders = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in sys.argv[1:] if os.path.isdir(path)]
print(*(file.fileno() for file in files), *folders, flush=True)
sys.stdin.read()
"""


class Holder:
    """A process that holds these files open, and does nothing."""

    def __init__(self, cwd: Path, *paths: Path) -> None:
        command = [sys.executable, "-c", HOLD_OPEN, *map(str, paths)]
        self.process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        self.fds = dict(zip(map(str, paths), map(int, self.process.stdout.readline().split()), strict=True))

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate("")


class Talk:
    """The agent's end of a broker's socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.settimeout(SECONDS)
        self.heard: list[wire.Message] = []

    def until(self, op: str) -> tuple[wire.Message, list[int]]:
        """The next message of this kind; those before it are in `heard`."""
        while True:
            received = wire.receive(self.end)
            assert received is not None, f"the broker ended: {self.heard}"
            if received[0]["op"] == op:
                return received
            self.heard.append(received[0])

    def ask(self, **message: Any) -> wire.Message:
        wire.send(self.end, message)
        return self.until(message["op"])[0]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def start(cache_dir: str) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Talk]]]:
    """Starts real brokers; each must end by itself, well, when its agent is gone."""
    started: list[tuple[subprocess.Popen[str], Talk]] = []

    def begin(**settings: Any) -> tuple[subprocess.Popen[str], Talk]:
        ours, theirs = wire.pair()
        command = [sys.executable, "-I", "-m", "bucketprobe.broker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
        theirs.close()
        wire.send(ours, Settings(cache_dir=cache_dir, **settings).as_dict())
        started.append((process, Talk(ours)))
        return started[-1]

    yield begin
    for process, talk in started:
        talk.end.close()
        _, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, errors) == (0, "")


# --- On the kernel -----------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_what_a_target_held_open_is_told_before_the_broker_is_ready(start, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with Holder(tmp_path, tmp_path / "data", tmp_path / "sub") as holder:
        _, talk = start(target=TargetSpec(pids=(holder.pid,)), ring_bytes=32_768)
        ready, descriptors = talk.until("ready")
        assert ready.pop("secret") % 2 == 1
        assert ready == {"op": "ready", "missing": [], "ring_bytes": 32_768}
        [found] = [message for message in talk.heard if message["op"] == "process"]
        assert (found["tgid"], found["cwd"]) == (holder.pid, str(tmp_path))
        files = {path: (gen, fd, flags) for message in talk.heard if message["op"] == "files" for gen, fd, path, flags in message["files"]}
        gen, fd, flags = files[str(tmp_path / "data")]
        assert gen > 1 << 63
        assert fd == holder.fds[str(tmp_path / "data")]
        assert flags & os.O_ACCMODE == os.O_WRONLY
        assert flags & os.O_APPEND
        of_folder = files[str(tmp_path / "sub")]
        assert of_folder[1] == holder.fds[str(tmp_path / "sub")]
        assert len({found[0] for found in files.values()}) == len(files)

        events, counters = descriptors
        bpf.Ring(events, 32_768).close()
        assert stats.read_stats(counters)[abi.Stat.BEGUN] == 0
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.kernel
def test_questions_are_answered(start, tmp_path: Path) -> None:
    with Holder(tmp_path, tmp_path / "data") as holder:
        _, talk = start(target=TargetSpec(ports=(1,)))
        talk.until("ready")
        assert not any(message["op"] == "process" for message in talk.heard)

        fd = holder.fds[str(tmp_path / "data")]
        found = talk.ask(op="path", tgid=holder.pid, fd=fd)["found"]
        assert found[0] == str(tmp_path / "data")
        assert found[1] & os.O_ACCMODE == os.O_WRONLY
        for tgid, number in ((holder.pid, 0), (holder.pid, 999), (1 << 22, 0)):
            assert talk.ask(op="path", tgid=tgid, fd=number) == {"op": "path", "found": None}

        assert len(talk.ask(op="stats")["values"]) > max(abi.Stat)

        wire.send(talk.end, {"op": "process", "tgid": holder.pid, "why": "child of 7"})
        assert talk.until("process")[0] == {"op": "process", "tgid": holder.pid, "why": "child of 7", "cwd": str(tmp_path)}
        wire.send(talk.end, {"op": "process", "tgid": 1 << 22, "why": "nobody"})
        talk.until("files")
        talk.heard.clear()
        assert talk.ask(op="detach") == {"op": "detach"}
        of_digests = {"log", "hasher", "hashed", "probing", "digests"}
        assert {message["op"] for message in talk.heard} <= {"runtime", *of_digests}, "of the one that is nobody nothing is said"


@pytest.mark.kernel
def test_neither_the_broker_nor_its_agent_becomes_a_target(start) -> None:
    process, talk = start(target=TargetSpec(ports=(1,)))
    talk.until("ready")
    for pid in (os.getpid(), process.pid):
        wire.send(talk.end, {"op": "process", "tgid": pid, "why": "itself"})
    talk.ask(op="stats")
    assert not any(message["op"] == "process" for message in talk.heard)


@pytest.mark.kernel
def test_a_process_that_ran_another_program_is_looked_at_again(start, tmp_path: Path) -> None:
    with Holder(tmp_path, tmp_path / "data") as holder:
        _, talk = start(target=TargetSpec(exes=(Path(sys.executable).resolve().name,)))
        talk.until("ready")
        talk.heard.clear()
        wire.send(talk.end, {"op": "exec", "tgid": holder.pid})
        assert talk.until("process")[0]["tgid"] == holder.pid
        assert talk.until("files")[0]["files"]


@pytest.mark.kernel
def test_records_are_opened_again_by_name(start, tmp_path: Path) -> None:
    path = tmp_path / "records"
    _, talk = start(target=TargetSpec(ports=(1,)), records=str(path))
    talk.until("ready")
    wire.send(talk.end, {"op": "reopen"})
    _, [fd] = talk.until("records")
    os.write(fd, b"x")
    os.close(fd)
    assert path.read_bytes() == b"x"


@pytest.mark.kernel
def test_records_that_cannot_be_opened_again_are_a_line_of_the_log(start, tmp_path: Path) -> None:
    _, talk = start(target=TargetSpec(ports=(1,)), records=str(tmp_path / "missing" / "records"))
    talk.until("ready")
    wire.send(talk.end, {"op": "reopen"})
    assert str(tmp_path / "missing" / "records") in talk.until("log")[0]["text"]
    talk.ask(op="stats")


@pytest.mark.kernel
def test_many_files_with_long_names_fit_their_messages(start, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*("\u00e4" * 120 for _ in range(5)))
    folder.mkdir(parents=True)
    paths = [folder / f"{number}" for number in range(150)]
    with Holder(tmp_path, *paths) as holder:
        _, talk = start(target=TargetSpec(pids=(holder.pid,)))
        talk.until("ready")
        told = {path for message in talk.heard if message["op"] == "files" for _, _, path, _ in message["files"]}
        assert set(map(str, paths)) <= told


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminals_signals_are_for_the_agent(start, number: int) -> None:
    process, talk = start(target=TargetSpec(ports=(1,)))
    talk.until("ready")
    process.send_signal(number)
    talk.ask(op="stats")


@pytest.mark.kernel
def test_the_probes_go_with_the_agent(start) -> None:
    process, talk = start(target=TargetSpec(ports=(1,)))
    talk.until("ready")
    talk.end.close()
    process.wait(SECONDS)
    assert process.returncode == 0


# --- What it tells of a target, without a kernel -----------------------------------------------------------------


class Host:
    """The broker's surroundings: maps that only note what is written, and processes that are what a test says they are.

    `starts`: start time by tgid; `rings`: who has an io_uring ring; `runs`: by tgid what each look at it finds, the last for ever.
    `hashing`: what the part that follows digests was told.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
        self._settings = settings
        self.hashing: list[tuple[Any, ...]] = []
        self.starts: dict[int, int] = {}
        self.rings: set[int] = set()
        self.runs: dict[int, list[runtimes.Layout]] = {}
        self.looks: list[int] = []
        self.written: list[tuple[str, bytes, bytes]] = []
        self._maps = {spec.name: os.memfd_create(spec.name) for spec in abi.MAPS}
        os.ftruncate(self._maps["targets"], 64 * next(spec for spec in abi.MAPS if spec.name == "targets").entries)
        self._names = {fd: name for name, fd in self._maps.items()}
        detach = partial(self.hashing.append, ("probes", "detach"))
        probes = SimpleNamespace(maps=self._maps, missing=[], uprobes={"digest_update": b"code"}, detach=detach)
        for module, name, stand_in in (
            (program, "compiled", lambda *_: {}),
            (program, "kernel_offsets", lambda *_: {}),
            (program, "load", lambda *_: probes),
            (bpf, "map_update", self._update),
            (bpf, "map_lookup", lambda *_: None),
            (bpf, "map_keys", lambda *_: iter(())),
            (stats, "read_stats", lambda _: []),
            (broker, "read_stats", lambda _: []),
            (target, "find", lambda _: []),
            (target, "start_time", self.starts.get),
            (target, "open_files", lambda _: [target.OpenFile(4, "file", "/srv/a", os.O_RDONLY, 0)]),
            (target, "cwd", lambda _: "/srv"),
            (target, "has_uring", self.rings.__contains__),
            (target, "matches", lambda *_: None),
            (runtimes, "layout", self._layout),
            (broker, "Hashing", self._follow),
            (broker, "SETTLE_SECONDS", 0.0),  # each turn of the loop is due
        ):
            monkeypatch.setattr(module, name, stand_in)
        self._ours, theirs = wire.pair()
        self.talk = Talk(self._ours)
        self._thread = threading.Thread(target=self._run, args=(theirs,), daemon=True)

    def _follow(self, *arguments: Any) -> SimpleNamespace:
        self.follow_arguments = arguments

        def noted(name: str) -> Callable[..., None]:
            return lambda *values: self.hashing.append((name, *values))

        return SimpleNamespace(start=noted("start"), watch=noted("watch"), forget=noted("forget"), detach=noted("detach"))

    def _update(self, fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
        self.written.append((self._names[fd], key, value))

    def _layout(self, tgid: int) -> runtimes.Layout:
        self.looks.append(tgid)
        found = self.runs.get(tgid, [NOTHING])
        return found.pop(0) if len(found) > 1 else found[0]

    def _run(self, end: socket.socket) -> None:
        with end:
            broker.Broker(self._settings, end).run()

    def start(self) -> wire.Message:
        """The message that says that all is attached."""
        self._thread.start()
        ready, descriptors = self.talk.until("ready")
        for descriptor in descriptors:
            os.close(descriptor)
        return ready

    def say(self, **message: Any) -> list[wire.Message]:
        """Sends a message; all that the broker said until it had dealt with it."""
        self.talk.heard.clear()
        wire.send(self._ours, message)
        return self.turn()

    def turn(self) -> list[wire.Message]:
        """Lets the broker's loop go round; what it said. The second answer comes after all that followed the first."""
        for _ in range(2):
            self.talk.ask(op="cwd", tgid=0)
        return self.talk.heard

    def of(self, name: str) -> list[tuple[bytes, bytes]]:
        return [(key, value) for where, key, value in self.written if where == name]

    def target(self, tgid: int) -> int:
        return os.pread(self._maps["targets"], 1, tgid)[0]

    def close(self) -> None:
        self._ours.close()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        for fd in self._maps.values():
            os.close(fd)


NOTHING = runtimes.Layout(runtimes.Kind.NONE)
GO = runtimes.Layout(runtimes.Kind.GO, detail="Go 1.22")
CPYTHON = runtimes.Layout(runtimes.Kind.CPYTHON, 1234, 56, "CPython 3.11")
PID = 4_000_001  # beyond what this kernel gives, and so nobody's


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Iterator[Host]:
    made = Host(monkeypatch, settings)
    made.starts[PID] = 77
    yield made
    made.close()


def test_the_hashes_have_odd_secrets_of_which_the_agent_gets_the_one_that_it_needs(host: Host) -> None:
    told = host.start()["secret"]
    config = {struct.unpack("=I", key)[0]: struct.unpack("=Q", value)[0] for key, value in host.of("config")}
    assert told == config[abi.Config.SECRET]
    assert told % 2 == config[abi.Config.SECRET_2] % 2 == 1
    assert told != config[abi.Config.SECRET_2]


@pytest.mark.parametrize("rings", [True, False])
def test_a_target_with_a_ring_is_named(host: Host, rings: bool) -> None:
    host.rings |= {PID} if rings else set()
    host.start()
    told = host.say(op="process", tgid=PID, why="asked for")
    assert [message["op"] for message in told][:1] == ["process"]
    assert [message["tgid"] for message in told if message["op"] == "uring"] == ([PID] if rings else [])


@pytest.mark.parametrize("found", [GO, CPYTHON], ids=lambda found: found.kind.name)
def test_what_runs_in_a_target_is_told_to_the_agent_and_to_the_kernel(host: Host, found: runtimes.Layout) -> None:
    host.runs[PID] = [found]
    host.start()
    told = host.say(op="process", tgid=PID, why="asked for")
    [message] = [message for message in told if message["op"] == "runtime"]
    assert message == {"op": "runtime", "tgid": PID, "kind": found.kind, "detail": found.detail}
    assert host.target(PID) == 1 | found.kind << 1
    layout = (struct.pack("=I", PID), struct.pack("=II", found.slot, found.member))
    assert host.of("layouts") == ([layout] if found.member else [])
    host.turn()
    assert host.looks == [PID], "what is known is not asked again"


def test_files_that_were_open_before_may_be_many_requests(host: Host) -> None:
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    [(key, value)] = host.of("fds")
    entry = abi.FdEntry.from_buffer_copy(value)
    assert struct.unpack("=Q", key)[0] == PID << 32 | 4
    assert (entry.kind, entry.many, entry.shared, entry.not_served) == (abi.FileKind.FILE, abi.FileUse.MANY, 0, 0)


def test_a_process_that_does_not_show_what_runs_in_it_yet_is_asked_again(host: Host) -> None:
    host.runs[PID] = [NOTHING, NOTHING, CPYTHON]
    host.start()
    told = host.say(op="process", tgid=PID, why="asked for")
    while not any(message["op"] == "runtime" for message in told):
        told = host.turn()
    host.turn()
    assert host.target(PID) == 1 | abi.Runtime.CPYTHON << 1
    assert host.looks == [PID] * 3


def test_a_process_that_does_not_let_its_memory_be_read_is_not_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(broker, "LAYOUT_SECONDS", 0.05)
    monkeypatch.setattr(broker.runtimes, "layout", lambda _tgid: never.wait())
    host.start()
    told = host.say(op="process", tgid=PID, why="asked for") + host.turn()
    assert any("does not let its memory be read" in message.get("text", "") for message in told)
    assert host.target(PID) == 1
    never.set()


def test_a_process_in_which_nothing_of_note_runs_is_not_asked_for_ever(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "SETTLE_TRIES", 3)
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    for _ in range(5):
        host.turn()
    assert len(host.looks) == 1 + 3
    assert host.target(PID) == 1


def test_how_often_it_is_asked_goes_by_time_and_not_by_how_much_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "SETTLE_SECONDS", 3600.0)
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    for _ in range(20):
        host.turn()
    assert len(host.looks) <= 2, "as it became a target, and the first turn"


@pytest.mark.parametrize("start", [None, 78], ids=["gone", "another"])
def test_a_process_that_is_no_longer_the_same_is_not_asked(host: Host, start: int | None) -> None:
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    assert host.looks
    if start is None:
        del host.starts[PID]
    else:
        host.starts[PID] = start
    host.turn()  # a look may have been under way
    host.looks.clear()
    told = host.turn()
    assert host.looks == []
    assert not any(message["op"] == "runtime" for message in told)


def test_a_child_is_asked_what_runs_in_it_where_its_parent_had_not_told(host: Host) -> None:
    child = PID + 1
    host.starts[child] = 90
    host.runs = {PID: [NOTHING], child: [CPYTHON]}
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    os.pwrite(host._maps["targets"], b"\1", child)  # as the kernel does at a fork
    wire.send(host.talk.end, {"op": "fork", "tgid": child})
    assert host.talk.until("runtime")[0]["tgid"] == child


@pytest.mark.parametrize("value", [0, 1 | abi.Runtime.GO << 1])
def test_a_child_that_is_no_target_or_runs_what_its_parent_does_is_not_asked(host: Host, value: int) -> None:
    child = PID + 1
    host.starts[child] = 90
    host.start()
    os.pwrite(host._maps["targets"], bytes([value]), child)
    host.say(op="fork", tgid=child)
    assert host.looks == []


def test_a_target_that_ran_another_program_is_looked_at_again(host: Host) -> None:
    host.runs[PID] = [GO, CPYTHON]
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    told = host.say(op="exec", tgid=PID)
    assert [message["kind"] for message in told if message["op"] == "runtime"] == [abi.Runtime.CPYTHON]
    assert host.target(PID) == 1 | abi.Runtime.CPYTHON << 1


# --- Whose digests are followed ----------------------------------------------------------------------------------


def test_the_digests_of_targets_are_followed_from_the_beginning_to_the_end(host: Host) -> None:
    child = PID + 1
    host.starts[child] = 90
    host.start()
    spec, user, maps, codes, _ = host.follow_arguments
    assert (spec, user, codes) == (Settings().digest, Settings().user, {"digest_update": b"code"})
    assert maps["hashing"] > 0
    assert host.hashing == [("start",)]
    host.say(op="process", tgid=PID, why="asked for")
    host.say(op="fork", tgid=child)
    host.say(op="gone", tgid=child)
    assert host.hashing[1:] == [("watch", PID), ("watch", child), ("forget", child)]


def test_a_target_that_runs_another_program_is_followed_anew(host: Host) -> None:
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    host.say(op="exec", tgid=PID)
    assert host.hashing == [("start",), ("watch", PID), ("watch", PID)]


def test_a_program_that_is_no_target_is_not_followed(host: Host) -> None:
    host.start()
    host.say(op="exec", tgid=PID)
    host.say(op="process", tgid=PID + 1, why="gone by now")
    assert host.hashing == [("start",)]


def test_the_probes_of_digests_come_off_with_the_others(host: Host) -> None:
    host.start()
    host.say(op="detach")
    assert sorted(host.hashing[1:]) == [("detach",), ("probes", "detach")]


def test_what_is_seen_of_digests_reaches_the_agent_and_an_agent_that_is_gone_is_no_error(host: Host) -> None:
    host.start()
    tell = host.follow_arguments[-1]
    tell({"op": "hashed", "tgid": PID, "calls": 1})
    assert host.talk.until("hashed")[0] == {"op": "hashed", "tgid": PID, "calls": 1}
    host.talk.end.shutdown(socket.SHUT_RDWR)
    tell({"op": "hashed", "tgid": PID, "calls": 2})


@pytest.mark.parametrize("settings", [Settings(digest=DigestSpec(mode="off"))])
def test_nobodys_digests_are_followed_where_that_is_off(host: Host) -> None:
    host.start()
    host.say(op="process", tgid=PID, why="asked for")
    host.say(op="fork", tgid=PID)
    host.say(op="gone", tgid=PID)
    host.say(op="detach")
    assert host.hashing == [("probes", "detach")]


# --- What keeps it from attaching --------------------------------------------------------------------------------


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[wire.Message | None], tuple[int, list[wire.Message]]]]:
    """Runs broker.main in this process; what it returns and what it told the agent."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}

    def run(settings: wire.Message | None) -> tuple[int, list[wire.Message]]:
        ours, theirs = wire.pair()
        if settings is not None:
            wire.send(ours, settings)
        else:
            ours.shutdown(socket.SHUT_WR)
        monkeypatch.setattr(sys, "argv", ["broker", str(theirs.detach())])
        code = broker.main()
        told = []
        while select.select([ours], [], [], 0)[0] and (received := wire.receive(ours)):
            told.append(received[0])
        ours.close()
        return code, told

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_lack_is_told_with_its_exit_code(run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object) -> None:
        raise EnvironmentLack("BCC is missing: install it.")

    monkeypatch.setattr(program, "compiled", lack)
    assert run_main(Settings().as_dict()) == (2, [{"op": "failed", "text": "BCC is missing: install it.", "exit_code": 2}])


def test_settings_that_nobody_could_have_given_are_refused(run_main) -> None:
    code, [told] = run_main({"agent": {"ring_bytes": 5}})
    assert code == told["exit_code"] == 2
    assert "ring_bytes" in told["text"]


def test_an_agent_that_is_gone_at_once(run_main) -> None:
    assert run_main(None) == (1, [])


def test_an_agent_that_goes_meanwhile(run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(program, "compiled", gone)
    assert run_main(Settings().as_dict()) == (0, [])


# --- Sums --------------------------------------------------------------------------------------------------------


def test_counters_are_summed_over_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = next(spec for spec in abi.MAPS if spec.name == "stats").entries
    monkeypatch.setattr(bpf, "possible_cpus", lambda: 3)
    values = struct.pack(f"={3 * entries}Q", *range(3 * entries))
    monkeypatch.setattr(bpf, "array_values", lambda fd, count, size: values if (fd, count, size) == (9, entries, 24) else b"")
    assert stats.read_stats(9)[:3] == [0 + 1 + 2, 3 + 4 + 5, 6 + 7 + 8]
    assert len(stats.read_stats(9)) == entries


# --- The agent's end ---------------------------------------------------------------------------------------------


class FakeBroker:
    """Stands in the place of the process that a BrokerLink starts: a thread on the other end, which calls `serve` once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, serve: Callable[[socket.socket, wire.Message], None]) -> None:
        self.pid = 1
        self._serve = serve
        self._thread: threading.Thread | None = None
        monkeypatch.setattr(link.subprocess, "Popen", self._popen)

    def _popen(self, command: list[str], pass_fds: list[int], **_: object) -> FakeBroker:
        end = socket.socket(fileno=os.dup(pass_fds[0]))
        self._thread = threading.Thread(target=self._run, args=(end,), daemon=True)
        self._thread.start()
        return self

    def _run(self, end: socket.socket) -> None:
        with end:
            received = wire.receive(end)
            assert received is not None
            self._serve(end, received[0])

    def terminate(self) -> None:
        """The agent may not send signals once it has given up its privileges."""
        raise PermissionError

    def wait(self, timeout: float) -> None:
        assert self._thread is not None
        self._thread.join(timeout)


SETTINGS = Settings(target=TargetSpec(ports=(8080,)), storage=StorageSpec(roots=("/srv",)))


def test_the_settings_go_first_and_messages_before_ready_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[wire.Message] = []

    def serve(end: socket.socket, settings: wire.Message) -> None:
        got.append(settings)
        wire.send(end, {"op": "process", "tgid": 1})
        wire.send(end, {"op": "ready"})
        wire.receive(end)

    FakeBroker(monkeypatch, serve)
    agent = link.BrokerLink(SETTINGS)
    assert agent.await_ready() == ({"op": "ready"}, [])
    assert Settings.from_dict(json.loads(json.dumps(got[0]))) == SETTINGS
    first, *rest = agent.messages()
    assert (first, rest) == (({"op": "process", "tgid": 1}, []), [])
    agent.close()


def test_a_broker_that_ends_while_the_agent_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBroker(monkeypatch, lambda end, _: wire.send(end, {"op": "ready"}))
    agent = link.BrokerLink(SETTINGS)
    agent.await_ready()
    agent.close()
    agent = link.BrokerLink(SETTINGS)
    agent.await_ready()
    select.select([agent.socket], [], [], SECONDS)
    with pytest.raises(BucketprobeError, match="The broker ended"):
        agent.messages()
    agent.close()


@pytest.mark.parametrize("code", [1, 2, 3])
def test_what_the_broker_failed_of_is_the_agents_error(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    FakeBroker(monkeypatch, lambda end, _: wire.send(end, {"op": "failed", "text": "No.", "exit_code": code}))
    agent = link.BrokerLink(SETTINGS)
    with pytest.raises(BucketprobeError, match=r"No\.") as error:
        agent.await_ready()
    assert error.value.exit_code == code
    agent.close()


def test_a_broker_that_just_ends_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBroker(monkeypatch, lambda end, _: None)
    agent = link.BrokerLink(SETTINGS)
    with pytest.raises(BucketprobeError, match="bucketprobe doctor"):
        agent.await_ready()
    agent.close()


def test_an_answer_is_found_among_other_messages_which_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(end: socket.socket, _: wire.Message) -> None:
        received = wire.receive(end)
        assert received is not None
        wire.send(end, {"op": "log", "text": "between"})
        wire.send(end, {"op": "path", "found": None, "asked": received[0]["fd"]})
        wire.receive(end)

    FakeBroker(monkeypatch, serve)
    agent = link.BrokerLink(SETTINGS)
    assert agent.ask({"op": "path", "fd": 5})["asked"] == 5
    assert agent.messages() == [({"op": "log", "text": "between"}, [])]
    agent.close()


def test_a_burst_of_messages_does_not_make_each_wait_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that forks and forks: each news makes the broker answer, while the agent does not read yet."""
    count = 5000

    def serve(end: socket.socket, _: wire.Message) -> None:
        for _ in range(count):
            if wire.receive(end) is None:
                return
            wire.send(end, {"op": "process", "tgid": 1, "why": "child of 7", "cwd": "/"})
        wire.receive(end)

    FakeBroker(monkeypatch, serve)
    agent = link.BrokerLink(SETTINGS)
    heard: list[tuple[wire.Message, list[int]]] = []

    def talk() -> None:
        for number in range(count):
            agent.tell({"op": "process", "tgid": number, "why": "child of 7"})
        while len(heard) < count:
            heard.extend(agent.messages())

    talker = threading.Thread(target=talk, daemon=True)
    talker.start()
    talker.join(SECONDS)
    stuck = talker.is_alive()
    if stuck:
        agent.socket.shutdown(socket.SHUT_RDWR)
        talker.join(1)
    agent.close()
    assert not stuck, "the agent waits to send, and its broker does, too"
    assert len(heard) == count


def test_an_answer_reaches_whoever_asked_while_the_loop_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape asks from a thread of its own; the loop, which hears the same socket, must not take its answers."""
    count = 300

    def serve(end: socket.socket, _: wire.Message) -> None:
        while (received := wire.receive(end)) is not None:
            wire.send(end, {"op": "log", "text": "in between"})
            wire.send(end, {"op": received[0]["op"], "values": []})

    FakeBroker(monkeypatch, serve)
    agent = link.BrokerLink(SETTINGS)
    answers: list[str] = []

    def scrape() -> None:
        answers.extend(agent.ask({"op": "stats"})["op"] for _ in range(count))

    heard: list[str] = []
    scraper = threading.Thread(target=scrape, daemon=True)
    scraper.start()
    ends = time.monotonic() + SECONDS
    while scraper.is_alive() and time.monotonic() < ends:
        heard += [message["op"] for message, _ in agent.messages()]
    stuck = scraper.is_alive()
    if stuck:
        agent.socket.shutdown(socket.SHUT_RDWR)
        scraper.join(1)
    agent.close()
    assert not stuck, "the loop took an answer"
    assert answers == ["stats"] * count
    assert "stats" not in heard

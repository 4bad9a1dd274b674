# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bucketprobe import bpf, capture, doctor, privileges, program
from bucketprobe.config import DigestSpec, Settings, StorageSpec, TargetSpec
from bucketprobe.doctor import Check, Host, Report
from bucketprobe.errors import EnvironmentLack

ALL_CAPS = (1 << len(privileges.CAPABILITIES)) - 1
BTF_NAMES = [f"btf_trace_{name}" for name in (*program.REQUIRED_TRACEPOINTS, "sk_data_ready", "tcp_receive_reset")]
BTF_NAMES += ["run_delay", "bpf_uprobe_multi_link"]


class Fake:
    """A host of files on which everything is well, until a test breaks it."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        (self.proc / "self" / "ns").mkdir(parents=True)
        (self.proc / "sys" / "kernel").mkdir(parents=True)
        (self.proc / "net").mkdir()
        (self.sys / "kernel" / "btf").mkdir(parents=True)
        (self.sys / "kernel" / "security").mkdir(parents=True)
        (self.proc / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
        (self.proc / "self" / "mounts").write_text("proc /proc proc rw 0 0\ntracefs /sys/kernel/tracing tracefs rw 0 0\n")
        (self.proc / "self" / "schedstat").write_text("10 20 3\n")
        (self.proc / "sys" / "kernel" / "unprivileged_bpf_disabled").write_text("2\n")
        self.caps(ALL_CAPS)
        self.btf(*BTF_NAMES)
        self.lockdown("none [integrity] confidentiality\n")
        self.settings = Settings(run_dir=str(root / "run"), cache_dir=str(root / "cache"))
        self.answer: Callable[[list[str]], tuple[int, str]] = lambda command: (0, "0.26.0")
        self.machine = "x86_64"
        self.release = "6.18.44"
        self.agent: dict[str, Any] | None = None

    def caps(self, mask: int) -> None:
        (self.proc / "self" / "status").write_text("".join(f"{name}:\t{mask:016x}\n" for name in privileges.CAPABILITY_SETS))

    def btf(self, *names: str) -> None:
        (self.sys / "kernel" / "btf" / "vmlinux").write_bytes(b"\0" + b"".join(name.encode() + b"\0" for name in names))

    def lockdown(self, text: str) -> None:
        (self.sys / "kernel" / "security" / "lockdown").write_text(text)

    def run(self) -> Report:
        host = Host(str(self.proc), str(self.sys), self.machine, self.release, self.answer, lambda run_dir: self.agent)
        return doctor.run(self.settings, host)

    def check(self, name: str) -> Check:
        return next(check for check in self.run().checks if check.name == name)

    def process(self, tgid: int, maps: str = "", links: tuple[str, ...] = ()) -> None:
        folder = self.proc / str(tgid)
        (folder / "fd").mkdir(parents=True)
        (folder / "stat").write_text(f"{tgid} (store) S 1 " + "0 " * 15 + "1 0 100 0\n")
        (folder / "comm").write_text("store\n")
        (folder / "maps").write_text(maps)
        for fd, link in enumerate(links):
            (folder / "fd" / str(fd)).symlink_to(link)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(bpf, "map_create", lambda *arguments: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(bpf, "program_load", lambda *arguments: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(doctor, "_try_as_agent", lambda settings: 0)
    return Fake(tmp_path)


def test_a_host_that_has_all(fake: Fake) -> None:
    report = fake.run()
    assert [check.name for check in report.checks if check.status != "ok"] == []
    assert report.exit_code == 0
    assert not any(check.cost or check.remedy for check in report.checks)


def expect(check: Check, status: str, *words: str) -> None:
    assert check.status == status
    assert check.cost
    assert check.remedy
    for word in words:
        assert word in f"{check.found} {check.cost} {check.remedy}"


def test_another_architecture_ends_the_report(fake: Fake) -> None:
    fake.machine = "riscv64"
    report = fake.run()
    assert [check.name for check in report.checks] == ["kernel", "architecture"]
    expect(report.checks[1], "missing", "riscv64", "x86_64")
    assert report.exit_code == 2


def test_a_containers_pid_namespace(fake: Fake) -> None:
    (fake.proc / "self" / "ns" / "pid").unlink()
    (fake.proc / "self" / "ns" / "pid").symlink_to("pid:[4026532000]")
    expect(fake.check("pid namespace"), "missing", "--pid=host")


def test_capabilities(fake: Fake) -> None:
    fake.caps(ALL_CAPS & ~(1 << privileges.CAPABILITIES.index("CAP_SYS_PTRACE")))
    expect(fake.check("capabilities"), "missing", "without CAP_SYS_PTRACE", "run as root")


@pytest.mark.parametrize(("call", "names"), [("map_create", ("bpf(2)", "ring buffer")), ("program_load", ("programs",))])
def test_what_the_kernel_refuses(fake: Fake, monkeypatch: pytest.MonkeyPatch, call: str, names: tuple[str, ...]) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(bpf, call, refuse)
    for name in names:
        expect(fake.check(name), "missing", "refused: Invalid argument")
    assert fake.run().exit_code == 2


def test_the_remedy_of_eperm_is_root_unless_one_is_root(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(bpf, "program_load", refuse)
    monkeypatch.setattr(doctor, "_is_root", lambda: False)
    assert fake.check("programs").remedy == doctor.AS_ROOT
    monkeypatch.setattr(doctor, "_is_root", lambda: True)
    assert "lockdown" in fake.check("programs").remedy


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        ("[none] integrity confidentiality", "ok", "none"),
        ("none integrity [confidentiality]", "missing", "confidentiality"),
    ],
)
def test_lockdown(fake: Fake, text: str, status: str, found: str) -> None:
    fake.lockdown(text)
    check = fake.check("lockdown")
    assert (check.status, check.found) == (status, found)


def test_lockdown_that_is_not_shown(fake: Fake) -> None:
    (fake.sys / "kernel" / "security" / "lockdown").unlink()
    assert fake.check("lockdown").status == "ok"


def test_an_agent_that_may_not_read(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_try_as_agent", lambda settings: errno.EPERM)
    expect(fake.check("unprivileged reads"), "missing", "Operation not permitted", "unprivileged_bpf_disabled=2")
    monkeypatch.setattr(doctor, "_try_as_agent", lambda settings: doctor._NO_LOOK_UPS)
    expect(fake.check("unprivileged reads"), "reduced", "but no maps", "asks the broker", "5.19")


def test_without_btf(fake: Fake) -> None:
    (fake.sys / "kernel" / "btf" / "vmlinux").unlink()
    report = fake.run()
    lacking = {check.name for check in report.checks if check.status == "missing"}
    assert lacking == {"kernel BTF", "tracepoints"}
    assert fake.check("digests").status == "reduced"


def test_a_required_tracepoint(fake: Fake) -> None:
    fake.btf(*(name for name in BTF_NAMES if name != "btf_trace_sys_exit"), "btf_trace_sys_exit_more")
    expect(fake.check("tracepoints"), "missing", "without sys_exit")


@pytest.mark.parametrize("name", ["sk_data_ready", "tcp_receive_reset"])
def test_an_optional_tracepoint(fake: Fake, name: str) -> None:
    fake.btf(*(entry for entry in BTF_NAMES if not entry.endswith(name)))
    expect(fake.check(name), "reduced", "not in this kernel")
    assert fake.run().exit_code == 1


def test_each_optional_probe_has_its_cost() -> None:
    assert doctor.OPTIONAL_TRACEPOINTS.keys() == program.OPTIONAL_TRACEPOINTS.keys()


def test_no_tracefs(fake: Fake) -> None:
    (fake.proc / "self" / "mounts").write_text("proc /proc proc rw 0 0\n")
    expect(fake.check("tracefs"), "reduced", "mount -t tracefs tracefs /sys/kernel/tracing")


@pytest.mark.parametrize("text", ["0 0 0\n", ""])
def test_no_run_delay(fake: Fake, text: str) -> None:
    (fake.proc / "self" / "schedstat").write_text(text)
    expect(fake.check("run delay"), "reduced", "runqueue")


def test_digests_by_what_uprobes_there_are(fake: Fake) -> None:
    assert "uprobe_multi" in fake.check("digests").found
    fake.btf(*(name for name in BTF_NAMES if name != "bpf_uprobe_multi_link"))
    expect(fake.check("digests"), "reduced", "no uprobes", "digests are off", "requests are still observed", "CONFIG_UPROBES")
    assert fake.run().exit_code == 1, "nothing else fails"
    device = fake.sys / "bus" / "event_source" / "devices" / "uprobe"
    device.mkdir(parents=True)
    (device / "type").write_text("8\n")
    assert (fake.check("digests").status, fake.check("digests").cost) == ("ok", "")
    assert "perf uprobes stand in" in fake.check("digests").found


def test_digests_that_nobody_wants_need_nothing(fake: Fake) -> None:
    fake.btf(*(name for name in BTF_NAMES if name != "bpf_uprobe_multi_link"))
    fake.release = "6.12.1"
    fake.settings = replace(fake.settings, digest=DigestSpec(mode="off"))
    assert fake.check("digests").found.startswith("off by the settings")
    assert "return probes" not in {check.name for check in fake.run().checks}


@pytest.mark.parametrize(
    ("release", "said"),
    [("6.10.14", False), ("6.11.0-rc1", True), ("6.12.38+deb13-amd64", True), ("6.13", True), ("6.14.0", False), ("?", False)],
)
def test_kernels_on_which_a_return_probe_may_kill(fake: Fake, release: str, said: bool) -> None:
    fake.release = release
    found = {check.name: check for check in fake.run().checks}
    assert ("return probes" in found) == said
    if said:
        assert found["return probes"].status == "ok"
        assert found["return probes"].found.endswith("a process that has a seccomp filter: such a target gets none")


def test_a_target_with_a_seccomp_filter_on_such_a_kernel(fake: Fake) -> None:
    fake.release = "6.12.1"
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5, 6)))
    fake.process(5)
    fake.process(6)
    (fake.proc / "5" / "status").write_text("Name:\tstore\nSeccomp:\t0\n")
    (fake.proc / "6" / "status").write_text("Name:\tstore\nSeccomp:\t2\nSeccomp_filters:\t1\n")
    expect(fake.check("return probes"), "reduced", "a seccomp filter: store[6] gets none", "not seen", "6.14")
    assert "store[5]" not in fake.check("return probes").found
    fake.release = "6.18.44"
    assert "return probes" not in {check.name for check in fake.run().checks}


def test_a_target_with_a_shadow_stack_on_an_older_kernel(fake: Fake) -> None:
    fake.release = "6.8.0-40-generic"
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5,)))
    fake.process(5)
    (fake.proc / "5" / "status").write_text("Seccomp:\t2\nx86_Thread_features:\tshstk wrss\nx86_Thread_features_locked:\t\n")
    expect(fake.check("return probes"), "reduced", "a shadow stack: store[5] gets none")
    (fake.proc / "5" / "status").write_text("Seccomp:\t2\nx86_Thread_features:\t\n")
    assert "return probes" not in {check.name for check in fake.run().checks}


def no_python(command: list[str]) -> tuple[int, str]:
    raise FileNotFoundError(command[0])


def hangs(command: list[str]) -> tuple[int, str]:
    raise subprocess.TimeoutExpired(command, 30)


@pytest.mark.parametrize("answer", [lambda command: (1, ""), no_python, hangs])
def test_no_bcc(fake: Fake, monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], tuple[int, str]]) -> None:
    def not_cached(cache_dir: str, log: object) -> dict[str, bytes]:
        raise EnvironmentLack("BCC is missing")

    fake.answer = answer
    monkeypatch.setattr(program, "compiled", not_cached)
    expect(fake.check("BCC"), "missing", "apt-get install python3-bpfcc")
    monkeypatch.setattr(program, "compiled", lambda cache_dir, log: {"sys_exit": b""})
    expect(fake.check("BCC"), "reduced", "cached", "apt-get install python3-bpfcc")


def test_directories(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake.check("run directory").found == f"{tmp_path}/run (to be created in {tmp_path})"
    (tmp_path / "run").touch()
    expect(fake.check("run directory"), "missing", "is not a directory", "--run-dir")
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    assert fake.check("run directory").found == f"{tmp_path}/run"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    expect(fake.check("run directory"), "missing", "not writable", "--run-dir")
    expect(fake.check("cache directory"), "reduced", "not writable", "--cache-dir")


def test_a_user_that_does_not_exist(fake: Fake) -> None:
    fake.settings = replace(fake.settings, user="no-such-user")
    expect(fake.check("user"), "missing", "there is no user 'no-such-user'", "--user")


def test_no_target_and_no_root_are_no_lines(fake: Fake) -> None:
    assert not {"target", "storage roots"} & {check.name for check in fake.run().checks}


def checks_of(settings: Settings, *names: str) -> list[Check]:
    """The checks of this host by these names, in their order; those that were not made are left out."""
    found = {check.name: check for check in doctor.run(settings).checks}
    return [found[name] for name in names if name in found]


def test_the_target(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = Settings(target=TargetSpec(ports=(port,)), storage=StorageSpec(roots=(str(tmp_path),)))
        target_, storage = checks_of(settings, "target", "storage roots")
        assert target_.status == "ok"
        assert f"[{os.getpid()}] (port {port})" in target_.found
        assert storage.status == "ok"
        both = replace(settings, target=TargetSpec(ports=(port,), pids=(os.getppid(),)))
        assert checks_of(both, "target")[0].status == "ok"
    expect(checks_of(settings, "target")[0], "reduced", "no process fits", "waits")
    expect(checks_of(both, "target")[0], "reduced", f"none listens on {port}")


def test_storage_roots(fake: Fake, tmp_path: Path) -> None:
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5,)))
    expect(fake.check("storage roots"), "reduced", "none given", "--storage-root")
    fake.settings = replace(fake.settings, storage=StorageSpec(roots=("/no/such/root",)))
    expect(fake.check("storage roots"), "reduced", "no directory /no/such/root")
    # A container's root, seen through its process.
    (fake.proc / "5" / "root" / "no" / "such" / "root").mkdir(parents=True)
    (fake.proc / "5" / "stat").write_text("5 (x) S 1 " + "0 " * 15 + "1 0 100 0\n")
    assert fake.check("storage roots").status == "ok"


GAP_LINES = ("io_uring", "shared mappings", "TLS", "bodies on disk")


def test_without_a_target_and_an_agent_nothing_is_said_of_gaps(fake: Fake) -> None:
    assert not set(GAP_LINES) & {check.name for check in fake.run().checks}
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5,)), storage=StorageSpec(roots=("/srv/b",)))
    assert not set(GAP_LINES) & {check.name for check in fake.run().checks}, "the target does not run"


def test_an_io_uring_ring(fake: Fake) -> None:
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5, 6)))
    fake.process(5, links=("/dev/null", "anon_inode:[eventpoll]", "socket:[12]"))
    fake.process(6, links=("anon_inode:[io_uring]",))
    expect(fake.check("io_uring"), "reduced", "store[6] has an io_uring ring: file work through it is not seen", "epoll alone")
    assert "store[5]" not in fake.check("io_uring").found
    assert "of bodies" not in fake.check("io_uring").found
    fake.agent = {"coverage_gaps": {"io_uring": 3 << 20}}
    assert fake.check("io_uring").found.endswith("; so far 3,145,728 bytes of bodies without file work")
    assert fake.run().exit_code == 1, "something less is seen; nothing fails"
    (fake.proc / "6" / "fd" / "0").unlink()
    assert (fake.check("io_uring").status, fake.check("io_uring").cost) == ("ok", "")


def line(permissions: str, path: str) -> str:
    return f"7f966d95a000-7f966d95b000 {permissions} 00000000 fe:00 2146455                    {path}\n"


@pytest.mark.parametrize(
    ("lines", "status", "found"),
    [
        ([line("rw-s", "/srv/b/data file.mdb")], "reduced", "store[5] has mapped /srv/b/data file.mdb to write to it"),
        ([line("-w-s", "/srv/b/x (deleted)"), line("rw-s", "/srv/b/x (deleted)")], "reduced", "mapped /srv/b/x (deleted) to"),
        ([line("rw-s", "/var/meta/index.db")], "reduced", "/var/meta/index.db"),
        ([line("rw-s", "/srv/b/i.db-shm")], "ok", "only SQLite's -shm"),
        ([line("r--s", "/srv/b/x"), line("rw-p", "/srv/b/x"), line("rw-s", "/srv/bb/x"), line("rw-s", "")], "ok", "no target has mapped"),
    ],
)
def test_shared_mappings(fake: Fake, lines: list[str], status: str, found: str) -> None:
    storage = StorageSpec(roots=("/srv/b",), metadata=("/var/meta/*.db",))
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5,)), storage=storage)
    fake.process(5, maps="".join(lines))
    check = fake.check("shared mappings")
    assert check.status == status
    assert found in check.found
    if status == "reduced":
        expect(check, "reduced", "is not seen", "by file calls")


def test_several_that_map_are_all_named(fake: Fake) -> None:
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5, 6)), storage=StorageSpec(roots=("/srv/b",)))
    for tgid in (5, 6):
        fake.process(tgid, maps=line("rw-s", "/srv/b/a"))
    assert fake.check("shared mappings").found == "store[5] has mapped /srv/b/a to write to it; store[6] too"


def test_targets_that_may_not_be_looked_into(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5,)), storage=StorageSpec(roots=("/srv/b",)))
    fake.process(5)

    def refuse(process: str) -> list[str]:
        raise PermissionError(errno.EACCES, process)

    monkeypatch.setattr(doctor, "_rings", refuse)
    monkeypatch.setattr(doctor, "_mapped", refuse)
    for name in ("io_uring", "shared mappings"):
        expect(fake.check(name), "reduced", "not known: store[5] may not be looked into", "run as root")


def test_a_target_that_ends_meanwhile_is_no_error(fake: Fake) -> None:
    fake.settings = replace(fake.settings, target=TargetSpec(pids=(5,)), storage=StorageSpec(roots=("/srv/b",)))
    fake.process(5)
    (fake.proc / "5" / "maps").unlink()
    (fake.proc / "5" / "fd").rmdir()
    assert fake.check("io_uring").status == fake.check("shared mappings").status == "ok"


def test_what_the_running_agent_has_seen(fake: Fake) -> None:
    fake.agent = {"processes": {}, "coverage_gaps": {}}
    assert (fake.check("TLS").status, fake.check("bodies on disk").status) == ("ok", "ok")
    fake.agent = {"processes": {}, "coverage_gaps": {"tls": 0, "unseen": 4096}}
    expect(fake.check("TLS"), "reduced", "seen it", "the requests in it are not seen", "on a port without it")
    expect(fake.check("bodies on disk"), "reduced", "without any file work, 4,096 bytes so far", "absent", "--storage-root")
    fake.agent = {"processes": {}}
    assert not set(GAP_LINES) & {check.name for check in fake.run().checks}, "an agent that does not know of gaps has not seen none"


def test_without_settings_the_running_agents_targets_are_looked_at(fake: Fake) -> None:
    fake.process(5, links=("anon_inode:[io_uring]",))
    fake.agent = {"processes": {"5": "port 80", "77": "gone"}, "coverage_gaps": {}}
    expect(fake.check("io_uring"), "reduced", "store[5]")


MIXED = Report(
    (
        Check("kernel", "ok", "6.1"),
        Check("a longer name", "reduced", "half", "some sight", "do this " * 20),
        Check("bpf(2)", "missing", "evil\x1b[2J\nname", "all", "run as root"),
    )
)


def test_the_table_lines_up_and_lets_no_control_character_through() -> None:
    text = doctor.render_table(MIXED, color=False)
    lines = text.splitlines()
    column = lines[0].index("FOUND")
    assert lines[1][column:] == "6.1"
    assert lines[2][column:] == "half"
    assert lines[3] == " " * column + "cost:   some sight"
    assert lines[4].startswith(" " * column + "remedy: do this")
    assert lines[5].startswith(" " * (column + 8) + "do this") or lines[5].startswith(" " * (column + 8) + "this")
    assert max(map(len, lines)) <= column + 84
    assert lines[-1] == "bucketprobe cannot work here: 1 of 3 checks are missing something."
    assert "\x1b" not in text


def test_colour_only_repeats_the_words() -> None:
    plain, coloured = doctor.render_table(MIXED, False), doctor.render_table(MIXED, True)
    assert coloured != plain
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


@pytest.mark.parametrize(("count", "code", "verdict"), [(1, 0, "can work here: 1 of 1"), (2, 1, "sees less: 1 of 2"), (3, 2, "cannot")])
def test_exit_codes(count: int, code: int, verdict: str) -> None:
    report = Report(MIXED.checks[:count])
    assert report.exit_code == code
    assert verdict in report.verdict
    assert json.loads(json.dumps(report.as_dict()))["exit_code"] == code


# From here on, this host.


def test_an_agent_that_answers_is_asked(tmp_path: Path) -> None:
    assert doctor._ask_agent(str(tmp_path)) is None
    listener = capture.open_listener(tmp_path / "run", os.geteuid())
    server = capture.ControlServer(listener.socket, lambda: {"coverage_gaps": {"tls": 7}}, dict)
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            if select.select([server], [], [], 0.01)[0]:
                server.on_readable(time.monotonic())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        [tls] = checks_of(Settings(run_dir=str(tmp_path / "run")), "TLS")
    finally:
        done.set()
        thread.join()
        server.close()
        listener.close()
    expect(tls, "reduced", "7 bytes so far")


MAPPED = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    held = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
sys.stdin.read()
"""

PLAIN = """
import sys
print("ready", flush=True)
sys.stdin.read()
"""

RING = """
import ctypes, os, sys
ring = ctypes.CDLL(None, use_errno=True).syscall(425, 4, ctypes.create_string_buffer(120))  # io_uring_setup
print("ready" if ring >= 0 else os.strerror(ctypes.get_errno()), flush=True)
sys.stdin.read()
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[tuple[int, str]]:
    """A process that runs `code`, until the block ends: its id, and the first line that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        yield child.pid, child.stdout.readline().strip()


def test_a_process_that_has_mapped_a_file_of_the_store(tmp_path: Path) -> None:
    root = tmp_path / "with space"
    root.mkdir()
    (root / "data").write_bytes(bytes(4096))
    with process(MAPPED, str(root / "data")) as (pid, _):
        settings = Settings(target=TargetSpec(pids=(pid,)), storage=StorageSpec(roots=(str(root),)))
        [mappings] = checks_of(settings, "shared mappings")
        expect(mappings, "reduced", f"[{pid}] has mapped {root}/data to write to it")
        elsewhere = replace(settings, storage=StorageSpec(roots=(str(tmp_path / "other"),)))
        assert checks_of(elsewhere, "shared mappings")[0].status == "ok"


def test_a_process_that_has_a_ring() -> None:
    with process(RING) as (pid, said), process(PLAIN) as (without, _):
        if said != "ready":
            assert said in (os.strerror(errno.ENOSYS), os.strerror(errno.EPERM)), said
            pytest.skip(f"this kernel has no io_uring, or has it switched off: {said}")
        [ring] = checks_of(Settings(target=TargetSpec(pids=(pid, without))), "io_uring")
        expect(ring, "reduced", f"[{pid}] has an io_uring ring: file work through it is not seen")
        assert f"[{without}]" not in ring.found
        assert checks_of(Settings(target=TargetSpec(pids=(without,))), "io_uring")[0].status == "ok"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to try bpf(2)")

RUN = """
import json, os, sys
from bucketprobe import doctor
from bucketprobe.config import Settings
user = int(sys.argv[1])
if user:
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
fds = len(os.listdir("/proc/self/fd"))
report = doctor.run(Settings())
assert len(os.listdir("/proc/self/fd")) == fds
print(json.dumps(report.as_dict()))
"""


def this_host(user: int) -> dict[str, dict[str, str]]:
    done = subprocess.run([sys.executable, "-c", RUN, str(user)], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@needs_root
def test_as_root_the_kernel_is_really_asked() -> None:
    checks = this_host(0)
    for name in ("capabilities", "bpf(2)", "ring buffer", "programs", "unprivileged reads", "kernel BTF", "tracepoints"):
        assert checks[name]["status"] == "ok", checks[name]


@needs_root
def test_without_privilege_each_lack_names_its_remedy() -> None:
    checks = this_host(65534)
    for name in ("capabilities", "bpf(2)", "ring buffer", "programs", "unprivileged reads"):
        assert checks[name]["status"] == "missing", checks[name]
        assert "run as root (sudo)" in checks[name]["remedy"]
    for name in ("kernel BTF", "tracepoints", "user"):
        assert checks[name]["status"] == "ok", checks[name]


@needs_root
def test_the_kernel_refuses_the_same_program_with_a_helper_that_is_none() -> None:
    code = doctor._reads_memory()
    bad = code.replace((113).to_bytes(4, "little"), (65_000).to_bytes(4, "little"))
    assert bad != code
    with pytest.raises(OSError, match="Invalid argument"):
        bpf.program_load(bad, "doctor")

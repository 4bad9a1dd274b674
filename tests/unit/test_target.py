# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe import abi, target
from bucketprobe.config import TargetSpec
from bucketprobe.target import Found, OpenFile

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def tcp_line(local: int, remote: int, state: int, inode: int) -> str:
    between = "00000000:00000000 00:00000000 00000000     0        0"
    return f"   0: 0100007F:{local:04X} 0100007F:{remote:04X} {state:02X} {between} {inode} 1 0 100\n"


class Proc:
    """A /proc made of files."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.path = root
        self.net(root / "net")
        (root / "self" / "ns").mkdir(parents=True)
        (root / "self" / "ns" / "net").symlink_to("net:[1]")

    def net(self, directory: Path, tcp: str = "", tcp6: str = "") -> None:
        directory.mkdir(exist_ok=True)
        (directory / "tcp").write_text(HEADER + tcp)
        (directory / "tcp6").write_text(HEADER + tcp6)

    def add(
        self,
        tgid: int,
        *,
        comm: str = "x",
        ppid: int = 0,
        start: int = 100,
        state: str = "S",
        threads: int = 1,
        exe: str | None = None,
        cgroup: str = "0::/\n",
        netns: int = 1,
        fds: dict[int, str] | None = None,
    ) -> Path:
        base = self.path / str(tgid)
        for name in ("fd", "fdinfo", "ns", "task"):
            (base / name).mkdir(parents=True)
        (base / "stat").write_text(f"{tgid} ({comm}) {state} {ppid} " + "0 " * 15 + f"{threads} 0 {start} 0 0\n")
        (base / "cgroup").write_text(cgroup)
        (base / "ns" / "net").symlink_to(f"net:[{netns}]")
        if exe:
            (base / "exe").symlink_to(exe)
        for fd, link in (fds or {}).items():
            (base / "fd" / str(fd)).symlink_to(link)
            (base / "fdinfo" / str(fd)).write_text("pos:\t7\nflags:\t0100001\nmnt_id:\t1\nino:\t3\n")
        self.net(base / "net")
        return base

    def find(self, spec: TargetSpec) -> dict[int, str]:
        return {found.tgid: found.why for found in target.find(spec, proc=self.root)}


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_by_pid_with_what_identifies_it(proc: Proc) -> None:
    proc.add(5, comm="a) (b c", start=777)
    proc.add(6)
    assert target.find(TargetSpec(pids=(5,)), proc=proc.root) == [Found(5, 777, "a) (b c", "pid 5")]


@given(st.binary(min_size=1, max_size=15), st.integers(1, 2**60))
def test_any_comm_is_parsed(comm: bytes, start: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        os.mkdir(f"{directory}/9")
        Path(f"{directory}/9/stat").write_bytes(b"9 (" + comm + b") S 1 " + b"0 " * 15 + b"1 0 %d 0\n" % start)
        assert target.start_time(9, proc=directory) == start


def test_by_port_all_that_share_the_socket_in_every_namespace(proc: Proc) -> None:
    listening = tcp_line(8080, 0, 10, 50) + tcp_line(9999, 0, 10, 51)
    proc.net(proc.path / "net", tcp=listening)
    proc.add(10, fds={3: "socket:[50]"})
    proc.add(11, fds={4: "pipe:[50]", 5: "socket:[50]"})
    proc.add(12, fds={3: "socket:[51]"})
    base = proc.add(20, netns=2, fds={3: "socket:[60]"})
    proc.net(base / "net", tcp6=tcp_line(8080, 0, 10, 60))
    # Another namespace's 8080 is not the host's: the inode decides, not the number.
    proc.add(30, netns=3, fds={3: "socket:[61]"})
    assert proc.find(TargetSpec(ports=(8080,))) == {10: "port 8080", 11: "port 8080", 20: "port 8080"}


def test_a_namespace_is_read_once(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    for tgid in range(100, 110):
        proc.add(tgid, netns=1 if tgid < 105 else 2)
    read: list[str] = []
    original: Callable[..., Iterator[target._TcpSocket]] = target._tcp_sockets

    def counted(directory: str, *, listening: bool = False) -> Iterator[target._TcpSocket]:
        read.append(directory)
        return original(directory, listening=listening)

    monkeypatch.setattr(target, "_tcp_sockets", counted)
    proc.find(TargetSpec(ports=(1,)))
    assert read[0] == f"{proc.root}/net"
    assert len(read) == 2


def test_a_connection_from_the_port_does_not_make_a_target(proc: Proc) -> None:
    proc.net(proc.path / "net", tcp=tcp_line(8080, 1234, 1, 50))
    proc.add(10, fds={3: "socket:[50]"})
    assert proc.find(TargetSpec(ports=(8080,))) == {}


def test_socket_activation_does_not_make_the_whole_host_a_target(proc: Proc) -> None:
    proc.net(proc.path / "net", tcp=tcp_line(8080, 0, 10, 50))
    proc.add(1, comm="systemd", exe="/usr/lib/systemd/systemd", fds={40: "socket:[50]"})
    proc.add(2, ppid=1)
    proc.add(3, ppid=1, exe="/usr/bin/bucketd", fds={3: "socket:[50]"})
    proc.add(4, ppid=3)
    assert proc.find(TargetSpec(ports=(8080,))) == {3: "port 8080", 4: "child of 3"}


def test_descendants_to_any_depth(proc: Proc) -> None:
    proc.add(5)
    proc.add(4, ppid=5)
    proc.add(90, ppid=4)
    proc.add(91, ppid=1)
    assert proc.find(TargetSpec(pids=(5,))) == {5: "pid 5", 4: "child of 5", 90: "child of 4"}


def test_processes_that_ended_are_no_targets(proc: Proc) -> None:
    proc.add(5, state="Z")
    proc.add(6, state="Z", threads=3)
    (proc.path / "7").mkdir()
    assert proc.find(TargetSpec(pids=(5, 6, 7))) == {6: "pid 6"}


@pytest.mark.parametrize(
    ("exe", "wanted", "fits"),
    [
        ("/usr/bin/bucketd", "bucketd", True),
        ("/usr/bin/bucketd", "/usr/bin/bucketd", True),
        ("/usr/bin/bucketd (deleted)", "/usr/bin/bucketd", True),
        ("/usr/bin/bucketd", "bucket", False),
        ("/usr/bin/bucketd", "/usr/local/bin/bucketd", False),
        (None, "bucketd", False),
    ],
)
def test_by_exe(proc: Proc, exe: str | None, wanted: str, fits: bool) -> None:
    proc.add(5, exe=exe)
    spec = TargetSpec(exes=("other", wanted))
    assert proc.find(spec) == ({5: f"exe {wanted}"} if fits else {})
    assert target.matches(spec, 5, proc=proc.root) == (f"exe {wanted}" if fits else None)


def test_an_exe_given_by_symlink(proc: Proc, tmp_path: Path) -> None:
    real = tmp_path / "bucketd-1.4"
    real.touch()
    (tmp_path / "bucketd").symlink_to(real)
    proc.add(5, exe=str(real))
    wanted = str(tmp_path / "bucketd")
    assert proc.find(TargetSpec(exes=(wanted,))) == {5: f"exe {wanted}"}


V1 = "9:name=systemd:/system.slice/bucket.service\n4:cpu,cpuacct:/a:b/c\n0::/kube/pod1/x\n"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (TargetSpec(units=("bucket",)), "unit bucket"),
        (TargetSpec(units=("bucket.service",)), "unit bucket.service"),
        (TargetSpec(units=("system.slice",)), "unit system.slice"),
        (TargetSpec(units=("buck",)), None),
        (TargetSpec(cgroups=("/kube/pod1",)), "cgroup /kube/pod1"),
        (TargetSpec(cgroups=("/kube/pod1/x",)), "cgroup /kube/pod1/x"),
        (TargetSpec(cgroups=("/kube/pod",)), None),
        (TargetSpec(cgroups=("/pod1",)), None),
        (TargetSpec(cgroups=("pod1",)), "cgroup pod1"),
        (TargetSpec(cgroups=("pod1/x",)), "cgroup pod1/x"),
        (TargetSpec(cgroups=("od1",)), None),
        (TargetSpec(cgroups=("/a:b",)), "cgroup /a:b"),
        (TargetSpec(cgroups=("/sys/fs/cgroup/kube",)), "cgroup /sys/fs/cgroup/kube"),
        (TargetSpec(cgroups=("/sys/fs/cgroup/unified/kube",)), "cgroup /sys/fs/cgroup/unified/kube"),
        (TargetSpec(cgroups=("/sys/fs/cgroup/cpuacct/a:b",)), "cgroup /sys/fs/cgroup/cpuacct/a:b"),
        (TargetSpec(cgroups=("/sys/fs/cgroup/systemd/system.slice",)), "cgroup /sys/fs/cgroup/systemd/system.slice"),
        (TargetSpec(cgroups=("/sys/fs/cgroup/memory/a:b",)), None),
    ],
)
def test_by_unit_and_cgroup(proc: Proc, spec: TargetSpec, why: str | None) -> None:
    proc.add(5, cgroup=V1)
    assert proc.find(spec) == ({5: why} if why else {})
    assert target.matches(spec, 5, proc=proc.root) == why


def test_a_process_that_inherited_the_listener_matches_after_exec(proc: Proc) -> None:
    for tgid, fds in ((5, {3: "socket:[50]"}), (6, {3: "socket:[51]"}), (7, {})):
        base = proc.add(tgid, fds=fds)
        proc.net(base / "net", tcp=tcp_line(8080, 0, 10, 50))
    spec = TargetSpec(ports=(8080,))
    assert [target.matches(spec, tgid, proc=proc.root) for tgid in (5, 6, 7, 8)] == ["port 8080", None, None, None]


def test_open_files(proc: Proc, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    fds = {
        0: "/dev/null",
        1: "pipe:[9]",
        2: str(tmp_path / "data"),
        3: str(tmp_path),
        4: "socket:[50]",
        5: "socket:[51]",
        6: "socket:[52]",
        7: "anon_inode:[eventpoll]",
        8: "/memfd:x (deleted)",
        10: "/srv/gone (deleted)",
    }
    base = proc.add(5, fds=fds)
    proc.net(base / "net", tcp=tcp_line(8080, 4321, 1, 50), tcp6=tcp_line(8080, 0, 10, 51))
    flags = os.O_WRONLY | 0o100000
    assert target.open_files(5, proc=proc.root) == [
        OpenFile(0, "other", "/dev/null", flags, 7),
        OpenFile(1, "pipe", None, flags, 7),
        OpenFile(2, "file", fds[2], flags, 7),
        OpenFile(3, "dir", fds[3], flags, 7),
        OpenFile(4, "socket", None, flags, 7, 50, 8080, 4321, "ESTABLISHED"),
        OpenFile(5, "socket", None, flags, 7, 51, 8080, 0, "LISTEN"),
        OpenFile(6, "socket", None, flags, 7, 52),
        OpenFile(7, "other", None, flags, 7),
        OpenFile(8, "other", "/memfd:x (deleted)", flags, 7),
        OpenFile(10, "other", "/srv/gone (deleted)", flags, 7),
    ]


def test_what_is_not_there_is_left_out(proc: Proc) -> None:
    base = proc.add(5, fds={3: "/dev/null", 4: "/dev/null"})
    (base / "fdinfo" / "3").unlink()
    assert [file.fd for file in target.open_files(5, proc=proc.root)] == [4]
    assert target.open_files(99, proc=proc.root) == []
    assert target.threads(99, proc=proc.root) == []
    assert target.cwd(99, proc=proc.root) is None
    assert target.start_time(99, proc=proc.root) is None


@pytest.mark.parametrize(
    ("link", "has"),
    [("anon_inode:[io_uring]", True), ("anon_inode:[eventpoll]", False), ("/srv/io_uring", False), ("socket:[7]", False)],
)
def test_a_ring_is_known_by_its_descriptor(proc: Proc, link: str, has: bool) -> None:
    proc.add(5, fds={3: "/srv/a", 9: link})
    assert target.has_uring(5, proc=proc.root) is has


def test_a_process_that_is_gone_has_no_ring(proc: Proc) -> None:
    assert target.has_uring(99, proc=proc.root) is False


def test_a_real_ring() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(abi.CALLS[abi.Handler.URING]["io_uring_setup"], 1, ctypes.create_string_buffer(120))
    if ring < 0:
        why = ctypes.get_errno()
        assert why in (errno.ENOSYS, errno.EPERM), os.strerror(why)
        pytest.skip(f"this kernel has no io_uring, or has it switched off: {os.strerror(why)}")
    assert target.has_uring(os.getpid())
    os.close(ring)
    assert not target.has_uring(os.getpid())


def test_the_states_are_in_the_kernels_order() -> None:
    assert target.TCP_STATES[1] == "ESTABLISHED"
    assert target.TCP_STATES[8] == "CLOSE_WAIT"
    assert target.TCP_STATES[target._LISTEN] == "LISTEN"


# From here on, the real /proc.

SERVER = """
import os, socket, sys, threading, time
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
child = os.fork()
if not child:
    time.sleep(60)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
data = open(sys.argv[1], "ab")
print(port, child, flush=True)
time.sleep(60)
"""


class Server:
    def __init__(self, directory: Path, *wrapper: str) -> None:
        self.data = directory / "data"
        self.data.write_text("12345")
        command = [*wrapper, sys.executable, "-c", SERVER, str(self.data)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory)
        assert self.process.stdout is not None
        self.port, self.child = map(int, self.process.stdout.readline().split())
        self.tgid = self.process.pid

    def stop(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


def test_a_real_server_and_the_child_that_shares_its_socket(server: Server, tmp_path: Path) -> None:
    found = {found.tgid: found for found in target.find(TargetSpec(ports=(server.port,)))}
    assert {tgid: item.why for tgid, item in found.items()} == dict.fromkeys((server.tgid, server.child), f"port {server.port}")
    assert found[server.tgid].start_time_ticks == target.start_time(server.tgid)
    assert found[server.tgid].comm.startswith("python")
    assert target.cwd(server.tgid) == str(tmp_path)
    assert server.tgid in target.threads(server.tgid)
    assert len(target.threads(server.tgid)) == 2
    assert target.matches(TargetSpec(ports=(server.port,)), server.child) == f"port {server.port}"
    assert target.matches(TargetSpec(exes=(sys.executable,)), server.tgid) == f"exe {sys.executable}"


def test_a_real_servers_open_files(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        files = target.open_files(server.tgid)
    (listener,) = [file for file in files if file.state == "LISTEN"]
    assert (listener.kind, listener.local_port, listener.path) == ("socket", server.port, None)
    (data,) = [file for file in files if file.path == str(server.data)]
    assert (data.kind, data.pos) == ("file", 5)
    assert data.flags & os.O_APPEND
    assert data.flags & os.O_ACCMODE == os.O_WRONLY
    server.data.unlink()
    (data,) = [file for file in target.open_files(server.tgid) if file.fd == data.fd]
    assert (data.kind, data.path) == ("file", f"{server.data} (deleted)")


def test_the_search_survives_processes_that_end_meanwhile() -> None:
    churn = subprocess.Popen(["sh", "-c", "while :; do /bin/true; done"])
    try:
        for _ in range(50):
            assert os.getpid() in {found.tgid for found in target.find(TargetSpec(ports=(1,), pids=(os.getpid(),), units=("none",)))}
    finally:
        churn.kill()
        churn.wait()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare(1)")
def test_a_listener_in_another_network_namespace(tmp_path: Path) -> None:
    up = "import fcntl,os,socket,struct,sys; s=socket.socket(); fcntl.ioctl(s,0x8914,struct.pack('16sh14x',b'lo',1|64)); s.close(); "
    run = up + "os.execv(sys.argv[1], sys.argv[1:])"
    server = Server(tmp_path, "unshare", "--net", sys.executable, "-c", run)
    try:
        assert os.readlink(f"/proc/{server.tgid}/ns/net") != os.readlink("/proc/self/ns/net")
        assert {found.tgid for found in target.find(TargetSpec(ports=(server.port,)))} >= {server.tgid, server.child}
        states = {file.state for file in target.open_files(server.tgid)}
        assert "LISTEN" in states
    finally:
        server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_without_privilege_others_files_are_left_out_and_nothing_is_raised(server: Server) -> None:
    code = (
        "import os, sys; from bucketprobe import target; from bucketprobe.config import TargetSpec;"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534);"
        "port, tgid = int(sys.argv[1]), int(sys.argv[2]);"
        "print(target.find(TargetSpec(ports=(port,))), target.open_files(tgid), target.start_time(tgid) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(server.port), str(server.tgid)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[] [] True\n", "")

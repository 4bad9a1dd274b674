# SPDX-License-Identifier: Apache-2.0
"""Which processes are targets, and what they hold open: read from /proc by the broker, as root.

Plain reads rather than psutil: one pass serves every kind of selection, and the root of /proc is an argument (`proc`)
everywhere, so that tests bring their own. A process that ends, or may not be read, while it is looked at is left out: every
function copes with that and raises nothing for it. tgid: the kernel's process id as seen in this /proc; tid: a thread's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bucketprobe.config import DELETED, TargetSpec

PROC = "/proc"
CGROUP_MOUNT = "/sys/fs/cgroup"

FileKind = Literal["file", "dir", "socket", "pipe", "other"]

#: By number, from include/net/tcp_states.h.
TCP_STATES = (
    "?",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
)
_LISTEN = 10


@dataclass(frozen=True, slots=True)
class Found:
    """A target. `start_time_ticks` (clock ticks since boot) tells it from a later process with the same tgid."""

    tgid: int
    start_time_ticks: int
    comm: str
    why: str


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One file descriptor. `path` is the kernel's text, with " (deleted)" on an unlinked file, as the target's mounts show it.

    `flags`: as open(2) takes them. `pos`: offset in bytes. `state`, one of TCP_STATES, and the ports: of TCP sockets only.
    """

    fd: int
    kind: FileKind
    path: str | None
    flags: int
    pos: int
    socket_inode: int | None = None
    local_port: int | None = None
    remote_port: int | None = None
    state: str | None = None


@dataclass(frozen=True, slots=True)
class _Stat:
    comm: str
    state: str
    ppid: int
    threads: int
    start_time_ticks: int

    @property
    def gone(self) -> bool:
        # A zombie whose other threads still run is a live process; an empty one was already reported as exited.
        return self.state in "ZX" and self.threads < 2


@dataclass(frozen=True, slots=True)
class _TcpSocket:
    inode: int
    local_port: int
    remote_port: int
    state: int


def find(spec: TargetSpec, *, proc: str = PROC) -> list[Found]:
    """All targets that run now, by tgid; the reason of the first kind that fits, in the order of TargetSpec's fields."""
    stats = {tgid: found for tgid in _numbers(proc) if (found := _stat(proc, tgid)) and not found.gone}
    listeners = _listening_inodes(_namespaces(stats, proc), set(spec.ports)) if spec.ports else {}
    why = {tgid: reason for tgid in stats if (reason := _reason(spec, tgid, listeners, proc))}
    _add_descendants(why, stats)
    return [Found(tgid, stats[tgid].start_time_ticks, stats[tgid].comm, why[tgid]) for tgid in sorted(why)]


def matches(spec: TargetSpec, tgid: int, *, proc: str = PROC) -> str | None:
    """Why this process itself is a target (not whether its parent is one), or None."""
    found = _stat(proc, tgid)
    if found is None or found.gone:
        return None
    listeners = _listening_inodes([f"{proc}/{tgid}/net"], set(spec.ports)) if spec.ports and _socket_inodes(proc, tgid) else {}
    return _reason(spec, tgid, listeners, proc)


def open_files(tgid: int, *, proc: str = PROC) -> list[OpenFile]:
    """What the process holds open, by fd."""
    sockets: dict[int, _TcpSocket] | None = None
    files = []
    for fd in sorted(_numbers(f"{proc}/{tgid}/fd")):
        link = _link(f"{proc}/{tgid}/fd/{fd}")
        info = _read(f"{proc}/{tgid}/fdinfo/{fd}")
        if link is None or info is None:
            continue
        pos, flags = _pos_and_flags(info)
        inode = _socket_inode(link)
        if inode is None:
            path = link if link.startswith("/") else None
            files.append(OpenFile(fd, _kind(f"{proc}/{tgid}/fd/{fd}", link, flags), path, flags, pos))
            continue
        if sockets is None:
            sockets = {socket.inode: socket for socket in _tcp_sockets(f"{proc}/{tgid}/net")}
        tcp = sockets.get(inode)
        if tcp:
            files.append(
                OpenFile(fd, "socket", None, flags, pos, inode, tcp.local_port, tcp.remote_port, _state_name(tcp.state)),
            )
        else:
            files.append(OpenFile(fd, "socket", None, flags, pos, inode))
    return files


def cwd(tgid: int, *, proc: str = PROC) -> str | None:
    """Working directory, None if it cannot be read."""
    return _link(f"{proc}/{tgid}/cwd")


def threads(tgid: int, *, proc: str = PROC) -> list[int]:
    """The tids of the process, itself included; empty if it is gone."""
    return sorted(_numbers(f"{proc}/{tgid}/task"))


def start_time(tgid: int, *, proc: str = PROC) -> int | None:
    """When the process started, in clock ticks since boot, None if it is gone."""
    found = _stat(proc, tgid)
    return found.start_time_ticks if found else None


def _reason(spec: TargetSpec, tgid: int, listeners: dict[int, int], proc: str) -> str | None:
    if listeners and (port := _listening_on(tgid, listeners, proc)):
        return f"port {port}"
    if tgid in spec.pids:
        return f"pid {tgid}"
    if spec.exes and (exe := _exe_match(spec.exes, tgid, proc)):
        return f"exe {exe}"
    if spec.units or spec.cgroups:
        return _cgroup_reason(spec, tgid, proc)
    return None


def _add_descendants(why: dict[int, str], stats: dict[int, _Stat]) -> None:
    children: dict[int, list[int]] = {}
    for tgid, found in stats.items():
        children.setdefault(found.ppid, []).append(tgid)
    waiting = list(why)
    while waiting:
        parent = waiting.pop()
        for child in children.get(parent, ()):
            if child not in why:
                why[child] = f"child of {parent}"
                waiting.append(child)


def _listening_on(tgid: int, listeners: dict[int, int], proc: str) -> int | None:
    for inode in _socket_inodes(proc, tgid):
        if inode in listeners:
            # systemd holds the sockets of every socket-activated unit and serves none of them; as a target, it would make
            # its children, which is every process, targets too.
            exe = _link(f"{proc}/{tgid}/exe")
            return None if exe and os.path.basename(exe) == "systemd" else listeners[inode]
    return None


def _exe_match(exes: tuple[str, ...], tgid: int, proc: str) -> str | None:
    exe = _link(f"{proc}/{tgid}/exe")
    if exe is None:
        return None
    exe = exe.removesuffix(DELETED)
    for wanted in exes:
        if exe in (wanted, os.path.realpath(wanted)) if "/" in wanted else os.path.basename(exe) == wanted:
            return wanted
    return None


def _cgroup_reason(spec: TargetSpec, tgid: int, proc: str) -> str | None:
    text = _read(f"{proc}/{tgid}/cgroup")
    for line in os.fsdecode(text or b"").splitlines():
        _, controllers, path = line.split(":", 2)
        parts = path.split("/")
        for unit in spec.units:
            if unit in parts or unit + ".service" in parts:
                return f"unit {unit}"
        for cgroup in spec.cgroups:
            if _in_cgroup(cgroup, controllers, path):
                return f"cgroup {cgroup}"
    return None


def _in_cgroup(wanted: str, controllers: str, path: str) -> bool:
    """Whether `path`, of the hierarchy of these controllers, is the wanted group or below it."""
    if not wanted.startswith("/"):
        return f"/{wanted}/" in path + "/"
    forms = [path]
    if wanted.startswith(CGROUP_MOUNT + "/"):
        # Version 1 mounts each hierarchy under its controllers' name, systemd's hybrid layout version 2 as `unified`.
        hierarchy = controllers.removeprefix("name=") or "unified"
        forms = [CGROUP_MOUNT + path, *(f"{CGROUP_MOUNT}/{name}{path}" for name in {hierarchy, *hierarchy.split(",")})]
    return any((form.rstrip("/") + "/").startswith(wanted + "/") for form in forms)


def _namespaces(stats: Iterable[int], proc: str) -> list[str]:
    """One `net` directory per network namespace that a process lives in, our own first."""
    seen = {_link(f"{proc}/self/ns/net")}
    directories = [f"{proc}/net"]
    for tgid in stats:
        namespace = _link(f"{proc}/{tgid}/ns/net")
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            directories.append(f"{proc}/{tgid}/net")
    return directories


def _listening_inodes(directories: Iterable[str], ports: set[int]) -> dict[int, int]:
    found = {}
    for directory in directories:
        for socket in _tcp_sockets(directory, listening=True):
            if socket.local_port in ports:
                found[socket.inode] = socket.local_port
    return found


def _tcp_sockets(directory: str, *, listening: bool = False) -> Iterator[_TcpSocket]:
    for name in ("tcp", "tcp6"):
        try:
            with open(f"{directory}/{name}", encoding="ascii") as file:
                next(file, None)
                for line in file:
                    socket = _tcp_socket(line)
                    # The kernel lists all listeners before anything else (tcp_get_idx in net/ipv4/tcp_ipv4.c), and a busy
                    # store may have very many other sockets.
                    if listening and socket.state != _LISTEN:
                        break
                    yield socket
        except OSError:
            continue


def _tcp_socket(line: str) -> _TcpSocket:
    fields = line.split()
    return _TcpSocket(int(fields[9]), int(fields[1].rpartition(":")[2], 16), int(fields[2].rpartition(":")[2], 16), int(fields[3], 16))


def _state_name(state: int) -> str:
    return TCP_STATES[state] if state < len(TCP_STATES) else "?"


def _socket_inodes(proc: str, tgid: int) -> list[int]:
    links = (_link(f"{proc}/{tgid}/fd/{fd}") for fd in _numbers(f"{proc}/{tgid}/fd"))
    return [inode for link in links if link and (inode := _socket_inode(link)) is not None]


def _socket_inode(link: str) -> int | None:
    return int(link[8:-1]) if link.startswith("socket:[") else None


def has_uring(tgid: int, *, proc: str = PROC) -> bool:
    """Whether a process has an io_uring ring, through which it may do file work that makes no system calls of its own."""
    return any(_link(f"{proc}/{tgid}/fd/{fd}") == "anon_inode:[io_uring]" for fd in _numbers(f"{proc}/{tgid}/fd"))


def _kind(path: str, link: str, flags: int) -> FileKind:
    if link.startswith("pipe:"):
        return "pipe"
    if not link.startswith("/") or link.startswith("/memfd:"):
        return "other"
    if flags & os.O_DIRECTORY:
        return "dir"
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "other"
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "file" if stat.S_ISREG(mode) else "dir" if stat.S_ISDIR(mode) else "other"


def _pos_and_flags(info: bytes) -> tuple[int, int]:
    values = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    return int(values.get(b"pos", b"0")), int(values.get(b"flags", b"0"), 8)


def _stat(proc: str, tgid: int) -> _Stat | None:
    text = _read(f"{proc}/{tgid}/stat")
    if not text:
        return None
    # comm may itself hold spaces and parentheses; after its last one, field 3 (state) is the first: proc_pid_stat(5).
    end = text.rindex(b")")
    fields = text[end + 2 :].split()
    comm = text[text.index(b"(") + 1 : end].decode("utf-8", "replace")
    return _Stat(comm, fields[0].decode("ascii"), int(fields[1]), int(fields[17]), int(fields[19]))


def _numbers(directory: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except OSError:
        return []


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return None

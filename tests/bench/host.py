# SPDX-License-Identifier: Apache-2.0
"""What the host says of itself and of processes, from /proc and git."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

#: Raw tracepoints that every system call of the host goes through.
SYSCALL_TRACEPOINTS = {"sys_enter", "sys_exit"}


def describe(root: Path) -> dict[str, object]:
    """The host and the tree at `root` that is measured."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "revision": git(root, "rev-parse", "HEAD"),
        "changed_files": len((git(root, "status", "--porcelain") or "").splitlines()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git or no repository."""
    with suppress(OSError):
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def cpu_model(cpuinfo: str) -> str:
    """From the text of /proc/cpuinfo; `unknown` where it names none, as on some ARM machines."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown"


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds an absolute path, from the text of /proc/mounts."""
    found = {}
    for line in mounts.splitlines():
        _, mounted_at, kind, *_ = line.split()
        if path.is_relative_to(mounted_at):
            found[mounted_at] = kind
    return found[max(found, key=len)]


def kilobytes(text: str, names: Iterable[str]) -> list[int]:
    """Values of `Name:   123 kB` lines, such as /proc/PID/status and smaps_rollup have, in bytes. Raises KeyError."""
    values = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            values[name] = int(value.split()[0]) * 1024
    return [values[name] for name in names]


def cpu_ns(pid: int) -> int:
    """CPU time of all threads that the process has or had, in ns. Raises OSError where it is gone.

    The kernel has a CPU clock for each process (clock_getcpuclockid(3) computes its number so): unlike /proc/PID/stat it is
    exact to the nanosecond, and unlike /proc/PID/schedstat it counts every thread.
    """
    return time.clock_gettime_ns(~pid << 3 | 2)


def system_call_tracers(proc: Path = Path("/proc")) -> set[int]:
    """The processes that hold a raw tracepoint on every system call: an agent, or another program of its kind."""
    found = set()
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):
            for fd in (process / "fd").iterdir():
                with suppress(OSError):
                    if "bpf_link" in os.readlink(fd) and _tracepoint(process / "fdinfo" / fd.name) in SYSCALL_TRACEPOINTS:
                        found.add(int(process.name))
                        break
    return found


def _tracepoint(fdinfo: Path) -> str | None:
    for line in fdinfo.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "tp_name":
            return value.strip()
    return None

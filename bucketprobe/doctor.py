# SPDX-License-Identifier: Apache-2.0
"""What this host has and lacks for bucketprobe, found by trying rather than by version numbers.

A lack is `reduced` (the agent works, and `cost` says what it does not see) or `missing` (the agent cannot work). Nothing is
changed on the host: what is created to try it (maps, a program that is never attached, a child process) is gone afterwards.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import struct
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bucketprobe import bpf, capture, privileges, program, target
from bucketprobe.config import DELETED, FileClasses, Settings
from bucketprobe.errors import BucketprobeError

Status = Literal["ok", "reduced", "missing"]

#: What it costs not to have a tracepoint, and the remedy.
OPTIONAL_TRACEPOINTS = {
    "sk_data_ready": (
        "the wait between readable and read is not seen: requests begin at their first read",
        "use a kernel that has it (about 6.2 or later)",
    ),
    "tcp_receive_reset": (
        "a reset by the client is told from a close by the server less surely",
        "use a kernel that has it",
    ),
}

#: From the first on and before the second, a return probe makes its process call uretprobe(2), for which a seccomp filter that does not
#: know it may end the process. Since then filters are not asked: "seccomp: passthrough uretprobe systemcall without filtering".
#: Before the first, return probes do not know of shadow stacks.
URETPROBE_CALL = ((6, 11), (6, 14))

AS_ROOT = "run as root (sudo)"
NEWER_KERNEL = "use Linux 5.8 or later"

# include/uapi/linux/bpf.h
_MAP_TYPE_ARRAY = 2
_MAP_TYPE_RINGBUF = 27
_PROBE_READ_USER = 112
_PROBE_READ_KERNEL = 113

# PROC_PID_INIT_INO in include/linux/proc_ns.h
_FIRST_PID_NAMESPACE = "pid:[4026531836]"

#: Exit code of the child whose look-up into a map was refused, though not the ring; no errno is so large.
_NO_LOOK_UPS = 200

_WIDTH = 84
_COLOURS = {"ok": "\x1b[32m", "reduced": "\x1b[33m", "missing": "\x1b[31m"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was `found`; where that is a lack, what it costs and what remedies it (else both are empty)."""

    name: str
    status: Status
    found: str
    cost: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks, in the order in which they are read."""

    checks: tuple[Check, ...]

    def count(self, status: Status) -> int:
        return sum(check.status == status for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0: all is there; 1: the agent works and sees less; 2: it cannot work."""
        return 2 if self.count("missing") else 1 if self.count("reduced") else 0

    @property
    def verdict(self) -> str:
        total = len(self.checks)
        return (
            f"bucketprobe can work here: {total} of {total} checks are ok.",
            f"bucketprobe can work here and sees less: {self.count('reduced')} of {total} checks are reduced.",
            f"bucketprobe cannot work here: {self.count('missing')} of {total} checks are missing something.",
        )[self.exit_code]

    def as_dict(self) -> dict[str, object]:
        """As JSON carries it."""
        return {"exit_code": self.exit_code, "verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout.strip()


def _ask_agent(run_dir: str) -> Mapping[str, Any] | None:
    try:
        return capture.status(Path(run_dir))
    except BucketprobeError:
        return None


@dataclass(frozen=True, slots=True)
class Host:
    """The host as the checks see it, for tests to replace.

    `run` executes a command and gives its exit code and output; `ask` gives what the agent with this run directory says of
    itself, None where none answers.
    """

    proc: str = "/proc"
    sys: str = "/sys"
    machine: str = field(default_factory=platform.machine)
    release: str = field(default_factory=platform.release)
    run: Callable[[list[str]], tuple[int, str]] = _run
    ask: Callable[[str], Mapping[str, Any] | None] = _ask_agent

    def text(self, path: str) -> str | None:
        """A small file's text, None if it cannot be read."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read().strip()
        except OSError:
            return None


@dataclass(frozen=True, slots=True)
class _Subject:
    settings: Settings
    host: Host
    #: The kernel's BTF; empty if there is none.
    btf: bytes
    #: What the running agent says of itself, None if there is none to ask.
    agent: Mapping[str, Any] | None
    #: The processes that the settings name.
    found: tuple[target.Found, ...]

    def live(self) -> Iterator[tuple[int, str]]:
        """Each target that runs now, by id and name; where the settings name none, those of the running agent."""
        if not self.settings.target.empty:
            yield from ((item.tgid, item.comm) for item in self.found)
        elif self.agent is not None:
            for tgid in self.agent.get("processes", {}):
                comm = self.host.text(f"{self.host.proc}/{tgid}/comm")
                if comm is not None:
                    yield int(tgid), comm


def run(settings: Settings, host: Host | None = None) -> Report:
    """Makes every check. Needs no privilege; without it, most checks report that it is missing."""
    bpf.raise_memlock_limit()
    host = host or Host()
    found = () if settings.target.empty else tuple(target.find(settings.target, proc=host.proc))
    subject = _Subject(settings, host, _btf(host), host.ask(settings.run_dir), found)
    about_host = (_kernel(subject), _architecture(subject))
    if about_host[-1].status != "ok":
        # Not even the number of bpf(2) is known there.
        return Report(about_host)
    return Report(about_host + tuple(check for make in CHECKS if (check := make(subject))))


def render_table(report: Report, color: bool) -> str:
    """The report for a terminal, without a final newline. Colour only repeats what the words say."""
    width = max(len(check.name) for check in report.checks)
    lines = [f"{'STATUS':9}{'CHECK':{width + 2}}FOUND"]
    for check in report.checks:
        status = f"{check.status:9}"
        if color:
            status = f"{_COLOURS[check.status]}{status}\x1b[0m"
        found = _wrapped(check.found, "")
        lines.append(f"{status}{check.name:{width + 2}}{found[0]}")
        more = found[1:] + (_wrapped(check.cost, "cost:   ") + _wrapped(check.remedy, "remedy: ") if check.status != "ok" else [])
        lines += [" " * (width + 11) + line for line in more]
    return "\n".join([*lines, "", report.verdict])


def _wrapped(text: str, title: str) -> list[str]:
    # A process may have given itself a name that holds control characters.
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return textwrap.wrap(title + printable, _WIDTH, subsequent_indent=" " * len(title), break_on_hyphens=False) or [""]


def _btf(host: Host) -> bytes:
    try:
        with open(f"{host.sys}/kernel/btf/vmlinux", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _kernel(subject: _Subject) -> Check:
    return Check("kernel", "ok", subject.host.release)


def _architecture(subject: _Subject) -> Check:
    machine = subject.host.machine
    if machine == "x86_64":
        return Check("architecture", "ok", machine)
    return Check("architecture", "missing", machine, "the agent cannot work", "use an x86_64 host; others are not yet supported")


def _pid_namespace(subject: _Subject) -> Check:
    try:
        namespace = os.readlink(f"{subject.host.proc}/self/ns/pid")
    except OSError as error:
        return Check("pid namespace", "missing", f"{error.strerror}", "targets cannot be found", "mount /proc")
    if namespace == _FIRST_PID_NAMESPACE:
        return Check("pid namespace", "ok", "the host's")
    cost = "the kernel names processes by the host's ids, so targets would be taken for others"
    return Check(
        "pid namespace", "missing", f"a container's ({namespace})", cost, "run on the host, or with its pid namespace (--pid=host)"
    )


def _capabilities(subject: _Subject) -> Check:
    lacking = privileges.missing_for_broker(f"{subject.host.proc}/self/status")
    if not lacking:
        return Check("capabilities", "ok", "all that the broker needs")
    return Check("capabilities", "missing", f"without {', '.join(lacking)}", "nothing can be attached or found", AS_ROOT)


def _bpf_call(subject: _Subject) -> Check:
    cost = "no program can be loaded"
    return _map_check("bpf(2)", _MAP_TYPE_ARRAY, 4, 8, 1, "an array map was created", cost, "use a kernel with CONFIG_BPF_SYSCALL")


def _ring(subject: _Subject) -> Check:
    size = subject.settings.ring_bytes
    found = f"one of {size} bytes was created"
    return _map_check("ring buffer", _MAP_TYPE_RINGBUF, 0, 0, size, found, "no event reaches the agent", NEWER_KERNEL)


def _map_check(name: str, kind: int, key: int, value: int, entries: int, found: str, cost: str, remedy: str) -> Check:
    try:
        os.close(bpf.map_create(kind, key, value, entries))
    except OSError as error:
        return _refused(name, error, cost, remedy)
    return Check(name, "ok", found)


def _refused(name: str, error: OSError, cost: str, remedy: str) -> Check:
    refusal = f"refused: {error.strerror}"
    return Check(name, "missing", refusal, cost, AS_ROOT if error.errno == errno.EPERM and not _is_root() else remedy)


def _is_root() -> bool:
    return not privileges.missing_for_broker()


def _program(subject: _Subject) -> Check:
    try:
        os.close(bpf.program_load(_reads_memory(), "doctor"))
    except OSError as error:
        remedy = f"boot without lockdown=confidentiality, and {NEWER_KERNEL}"
        return _refused("programs", error, "no request can be seen", remedy)
    return Check("programs", "ok", "one that reads user and kernel memory was loaded")


def _reads_memory() -> bytes:
    """A raw tracepoint program that copies 8 bytes onto its stack by each of the two helpers that the probes need."""

    def instruction(code: int, registers: int, offset: int, immediate: int) -> bytes:
        return struct.pack("=BBhi", code, registers, offset, immediate)

    def read(helper: int) -> bytes:
        return b"".join(
            (
                instruction(0xBF, 0xA1, 0, 0),  # r1 = r10
                instruction(0x07, 0x01, 0, -8),  # r1 += -8
                instruction(0xB7, 0x02, 0, 8),  # r2 = 8
                instruction(0xB7, 0x03, 0, 0),  # r3 = 0
                instruction(0x85, 0x00, 0, helper),  # call
            )
        )

    end = instruction(0xB7, 0x00, 0, 0) + instruction(0x95, 0x00, 0, 0)  # return 0
    return read(_PROBE_READ_USER) + read(_PROBE_READ_KERNEL) + end


def _lockdown(subject: _Subject) -> Check:
    text = subject.host.text(f"{subject.host.sys}/kernel/security/lockdown")
    if text is None:
        return Check("lockdown", "ok", "not shown by this kernel; what it would forbid is tried under `programs`")
    mode = text.partition("[")[2].partition("]")[0] or text
    if mode == "confidentiality":
        return Check("lockdown", "missing", mode, "programs may not read memory, so no request can be seen", "boot with lockdown=integrity")
    return Check("lockdown", "ok", mode)


def _unprivileged_reads(subject: _Subject) -> Check:
    name = "unprivileged reads"
    setting = subject.host.text(f"{subject.host.proc}/sys/kernel/unprivileged_bpf_disabled")
    stated = f"(kernel.unprivileged_bpf_disabled={setting or 'not shown'})"
    cost = "the agent, which keeps no privilege, cannot read counters and events"
    try:
        refusal = _try_as_agent(subject.settings)
    except BucketprobeError as error:
        return Check(name, "missing", f"not tried: {error}", cost, "remedy that first")
    except OSError as error:
        return _refused(name, error, cost, NEWER_KERNEL)
    if not refusal:
        return Check(name, "ok", f"the agent's user reads maps and the ring {stated}")
    if refusal == _NO_LOOK_UPS:
        found = f"the agent's user reads the ring, but no maps {stated}"
        return Check(name, "reduced", found, "each scrape asks the broker for the counters", "use Linux 5.19 or later")
    return Check(name, "missing", f"refused: {os.strerror(refusal)} {stated}", cost, NEWER_KERNEL)


def _try_as_agent(settings: Settings) -> int:
    """Reads a ring and a map in a child that has dropped everything, as the agent does; the errno, 0, or _NO_LOOK_UPS."""
    privileges.unprivileged_ids(settings.user)
    descriptors: list[int] = []
    try:
        descriptors.append(bpf.map_create(_MAP_TYPE_ARRAY, 4, 8, 1))
        descriptors.append(bpf.map_create(_MAP_TYPE_RINGBUF, 0, 0, settings.ring_bytes))
        child = os.fork()
        if child == 0:
            _child(settings, *descriptors)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _child(settings: Settings, array: int, ring: int) -> None:
    result = errno.EPERM
    try:
        privileges.drop_all(settings.user)
        bpf.Ring(ring, settings.ring_bytes).read()
        try:
            bpf.map_lookup(array, bytes(4), 8)
            result = 0
        except PermissionError:
            result = _NO_LOOK_UPS
    except OSError as error:
        result = error.errno or errno.EIO
    finally:
        # Not sys.exit: the parent's exit handlers are not the child's to run.
        os._exit(result)


def _kernel_btf(subject: _Subject) -> Check:
    if subject.btf:
        return Check("kernel BTF", "ok", f"{len(subject.btf)} bytes in {subject.host.sys}/kernel/btf/vmlinux")
    cost = "offsets of kernel fields and names of tracepoints are unknown"
    return Check("kernel BTF", "missing", "not there", cost, "use a kernel with CONFIG_DEBUG_INFO_BTF, as distributions build it")


def _tracefs(subject: _Subject) -> Check:
    mounts = [line.split() for line in (subject.host.text(f"{subject.host.proc}/self/mounts") or "").splitlines()]
    places = [fields[1] for fields in mounts if len(fields) > 2 and fields[2] == "tracefs"]
    if places:
        return Check("tracefs", "ok", f"mounted at {places[0]}")
    cost = "tracepoints are checked by the kernel's BTF alone"
    return Check("tracefs", "reduced", "not mounted", cost, "mount -t tracefs tracefs /sys/kernel/tracing")


def _has_tracepoint(subject: _Subject, name: str) -> bool:
    # Each tracepoint that BPF can use has such a typedef: include/trace/bpf_probe.h.
    return f"\0btf_trace_{name}\0".encode() in subject.btf


def _tracepoints(subject: _Subject) -> Check:
    lacking = [name for name in program.REQUIRED_TRACEPOINTS if not _has_tracepoint(subject, name)]
    if not lacking:
        return Check("tracepoints", "ok", f"all {len(program.REQUIRED_TRACEPOINTS)} that are required")
    found = f"without {', '.join(lacking)}"
    remedy = "use a kernel with CONFIG_HAVE_SYSCALL_TRACEPOINTS, CONFIG_INET and CONFIG_DEBUG_INFO_BTF"
    return Check("tracepoints", "missing", found, "requests or their processes cannot be followed", remedy)


def _optional_tracepoint(name: str) -> Callable[[_Subject], Check]:
    def check(subject: _Subject) -> Check:
        if _has_tracepoint(subject, name):
            return Check(name, "ok", "there")
        stand_in = program.STAND_INS.get(name)
        if stand_in and _has_tracepoint(subject, stand_in[0]):
            return Check(name, "ok", f"not in this kernel; {stand_in[0]} stands in for it")
        return Check(name, "reduced", "not in this kernel", *OPTIONAL_TRACEPOINTS[name])

    return check


def _run_delay(subject: _Subject) -> Check:
    fields = (subject.host.text(f"{subject.host.proc}/self/schedstat") or "").split()
    # Its last field counts how often the process was given a CPU: this one was at least once if the kernel counts at all.
    if len(fields) == 3 and fields[2] != "0" and b"\0run_delay\0" in subject.btf:
        return Check("run delay", "ok", "the kernel counts the wait for a CPU")
    remedy = "use a kernel with CONFIG_SCHEDSTATS, as distributions build it"
    return Check("run delay", "reduced", "not counted by this kernel", "the runqueue phase is absent, its time is in `other`", remedy)


def _digests(subject: _Subject) -> Check:
    name = "digests"
    if subject.settings.digest.mode == "off":
        return Check(name, "ok", "off by the settings: no probe is attached for them")
    if b"\0bpf_uprobe_multi_link\0" in subject.btf:
        return Check(name, "ok", "uprobe_multi: the probes on a process are attached and removed in one step")
    if subject.host.text(f"{subject.host.sys}/bus/event_source/devices/uprobe/type") is not None:
        return Check(name, "ok", "no uprobe_multi in this kernel (6.6 or later); perf uprobes stand in for it, one by one and more slowly")
    cost = "digests are off: their time is in `other`, and their values are not compared; requests are still observed"
    return Check(name, "reduced", "this kernel has no uprobes", cost, "use a kernel with CONFIG_UPROBES, as distributions build it")


def _return_probes(subject: _Subject) -> Check | None:
    if subject.settings.digest.mode == "off":
        return None
    name, version = "return probes", _version(subject.host.release)
    refused, _ = _seen_at(subject, lambda process: _dangers(process, version))
    if refused:
        found = f"on this kernel one may end a process that has {refused[0][1][0]}: {_some([who for who, _ in refused])} gets none"
        cost = "digests there are not seen, but for those that entry probes alone tell (Go's)"
        return Check(name, "reduced", found, cost, "use Linux 6.14 or later")
    first, fixed = URETPROBE_CALL
    if not first <= version < fixed:
        return None
    return Check(name, "ok", "on this kernel (6.11 to 6.13) one may end a process that has a seccomp filter: such a target gets none")


def _dangers(process: str, version: tuple[int, int]) -> list[str]:
    """Why return probes might end the process: proc_pid_status(5)."""
    with open(f"{process}/status", encoding="utf-8", errors="replace") as file:
        status = {name: value.split() for name, _, value in (line.partition(":") for line in file)}
    first, fixed = URETPROBE_CALL
    if first <= version < fixed and status.get("Seccomp", ["0"]) != ["0"]:
        return ["a seccomp filter"]
    return ["a shadow stack"] if version < first and "shstk" in status.get("x86_Thread_features", []) else []


def _version(release: str) -> tuple[int, int]:
    """Major and minor number of a kernel's release; zeros where it has another form."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _bcc(subject: _Subject) -> Check:
    try:
        code, version = subject.host.run([program.SYSTEM_PYTHON, "-I", "-c", "import bcc; print(bcc.__version__)"])
    except (OSError, subprocess.SubprocessError):
        code, version = 1, ""
    if code == 0:
        return Check("BCC", "ok", f"{version} under {program.SYSTEM_PYTHON}")
    found = f"{program.SYSTEM_PYTHON} cannot import bcc"
    remedy = "apt-get install python3-bpfcc"
    try:
        # Without BCC this can only come from the cache.
        program.compiled(subject.settings.cache_dir, lambda message: None)
    except BucketprobeError:
        return Check("BCC", "missing", found, "the probes cannot be compiled", remedy)
    return Check("BCC", "reduced", f"{found}, but the probes are cached", "another version of bucketprobe could not start", remedy)


def _run_dir(subject: _Subject) -> Check:
    return _directory("run directory", subject.settings.run_dir, "missing", "the agent cannot start", "--run-dir")


def _cache_dir(subject: _Subject) -> Check:
    return _directory("cache directory", subject.settings.cache_dir, "reduced", "each start compiles the probes again", "--cache-dir")


def _directory(name: str, path: str, lack: Status, cost: str, option: str) -> Check:
    nearest = path
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    state = path if nearest == path else f"{path} (to be created in {nearest})"
    if os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return Check(name, "ok", state)
    why = "not writable" if os.path.isdir(nearest) else f"{nearest} is not a directory"
    return Check(name, lack, f"{state}: {why}", cost, f"{AS_ROOT}, or name another with {option}")


def _user(subject: _Subject) -> Check:
    user = subject.settings.user
    try:
        uid, gid = privileges.unprivileged_ids(user)
    except BucketprobeError as error:
        return Check(
            "user", "missing", str(error).partition(";")[0], "the agent refuses to run with privileges", "name another with --user"
        )
    return Check("user", "ok", f"{user} (uid {uid}, gid {gid})")


def _target(subject: _Subject) -> Check | None:
    spec = subject.settings.target
    if spec.empty:
        return None
    found = subject.found
    if not found:
        seen = "no process fits now" if _is_root() else "no process fits of those that this user may look at"
        return Check("target", "reduced", seen, "nothing is seen until one does", "start the service; the agent waits")
    shown = ", ".join(f"{item.comm}[{item.tgid}] ({item.why})" for item in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    silent = [port for port in spec.ports if not any(item.why == f"port {port}" for item in found)]
    if silent:
        ports = ", ".join(map(str, silent))
        cost = "nothing is seen there until one does"
        return Check("target", "reduced", f"{shown}{more}; none listens on {ports}", cost, "start the service; the agent waits")
    return Check("target", "ok", shown + more)


def _storage(subject: _Subject) -> Check | None:
    settings, proc = subject.settings, subject.host.proc
    if settings.target.empty and not settings.storage.roots:
        return None
    if not settings.storage.roots:
        cost = "file work is counted as `other`, and the storage phases stay empty"
        return Check("storage roots", "reduced", "none given", cost, "name the store's directories with --storage-root")
    # A target in a container has its own view of the file system.
    views = ["", *(f"{proc}/{item.tgid}/root" for item in subject.found)]
    lacking = [root for root in settings.storage.roots if not any(os.path.isdir(view + root) for view in views)]
    if not lacking:
        return Check("storage roots", "ok", ", ".join(settings.storage.roots))
    found = f"no directory {', '.join(lacking)}"
    return Check("storage roots", "reduced", found, "file work elsewhere is not counted as storage", "correct --storage-root, or create it")


# What no probe sees, at the targets that run now: docs/attribution.md.


def _seen_at(subject: _Subject, look: Callable[[str], list[str]]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """What `look` finds in /proc of each live target, by the target's name; and the targets that may not be looked into."""
    seen, closed = [], []
    for tgid, comm in subject.live():
        try:
            things = look(f"{subject.host.proc}/{tgid}")
        except PermissionError:
            closed.append(f"{comm}[{tgid}]")
        except OSError:
            continue  # it has ended meanwhile
        else:
            if things:
                seen.append((f"{comm}[{tgid}]", things))
    return seen, closed


def _gaps(subject: _Subject) -> Mapping[str, int] | None:
    """The bytes that the running agent counts by each gap that it has seen; None where there is no agent to ask."""
    return None if subject.agent is None else subject.agent.get("coverage_gaps")


def _rings(process: str) -> list[str]:
    links = []
    for fd in os.listdir(f"{process}/fd"):
        try:
            links.append(os.readlink(f"{process}/fd/{fd}"))
        except FileNotFoundError:
            continue  # closed since it was listed
    return [link for link in links if link == "anon_inode:[io_uring]"]


def _io_uring(subject: _Subject) -> Check | None:
    if not any(subject.live()):
        return None
    name = "io_uring"
    cost = "storage time and file counts lack that work; an event loop that uses its ring for epoll alone (uvloop) loses nothing"
    seen, closed = _seen_at(subject, _rings)
    if seen:
        bodies = (_gaps(subject) or {}).get(name)
        counted = f"; so far {bodies:,} bytes of bodies without file work" if bodies else ""
        found = f"{_some([who for who, _ in seen])} has an io_uring ring: file work through it is not seen{counted}"
        remedy = "have the service use plain file calls where it lets one choose (libuv: UV_USE_IO_URING=0)"
        return Check(name, "reduced", found, cost, remedy)
    return _not_looked_into(name, closed, cost) or Check(name, "ok", "no target has a ring")


def _mappings(subject: _Subject) -> Check | None:
    storage = subject.settings.storage
    if not (storage.roots or storage.metadata) or not any(subject.live()):
        return None
    name, classes = "shared mappings", FileClasses(storage)
    cost = "what is written through the mapping is not seen: storage time and file counts lack it"
    seen, closed = _seen_at(subject, lambda process: [path for path in _mapped(process) if classes.classify(path) != "other"])
    # The index of SQLite's log: what is stored goes to the log and the database by write.
    telling = [(who, [path for path in paths if not path.removesuffix(DELETED).endswith("-shm")]) for who, paths in seen]
    telling = [(who, paths) for who, paths in telling if paths]
    if telling:
        who, paths = telling[0]
        more = f"; {_some([each for each, _ in telling[1:]])} too" if telling[1:] else ""
        found = f"{who} has mapped {_some(paths)} to write to it{more}"
        remedy = "have the store write by file calls where it lets one choose (LMDB: without MDB_WRITEMAP)"
        return Check(name, "reduced", found, cost, remedy)
    none = "only SQLite's -shm, which holds nothing that is stored" if seen else "no target has mapped a file of the store to write to it"
    return _not_looked_into(name, closed, cost) or Check(name, "ok", none)


def _mapped(process: str) -> list[str]:
    """The files that the process has mapped shared and writable: proc_pid_maps(5)."""
    with open(f"{process}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        lines = [line.rstrip("\n").split(maxsplit=5) for line in maps]
    return list(dict.fromkeys(fields[5] for fields in lines if len(fields) == 6 and fields[1][1] == "w" and fields[1][3] == "s"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _not_looked_into(name: str, closed: list[str], cost: str) -> Check | None:
    found = f"not known: {_some(closed)} may not be looked into by this user"
    return Check(name, "reduced", found, f"where it is so, {cost}", AS_ROOT) if closed else None


def _tls(subject: _Subject) -> Check | None:
    gaps = _gaps(subject)
    if gaps is None:
        return None
    if "tls" not in gaps:
        return Check("TLS", "ok", "the running agent has seen none")
    found = f"the running agent has seen it{_so_far(gaps['tls'])}"
    cost = "heads and lengths are encrypted: the requests in it are not seen"
    return Check("TLS", "reduced", found, cost, "observe the service behind what ends TLS, on a port without it")


def _unseen(subject: _Subject) -> Check | None:
    name, gaps = "bodies on disk", _gaps(subject)
    if gaps is None:
        return None
    if "unseen" not in gaps:
        return Check(name, "ok", "the running agent has seen none without file work")
    found = f"the running agent has seen bodies without any file work{_so_far(gaps['unseen'])}"
    cost = "their storage phases are absent: they are in memory only, or are written or read where no probe looks"
    remedy = "name every directory of the store with --storage-root, and the process that writes there as a target"
    return Check(name, "reduced", found, cost, remedy)


def _so_far(size: int) -> str:
    return f", {size:,} bytes so far" if size else ""


CHECKS: tuple[Callable[[_Subject], Check | None], ...] = (
    _pid_namespace,
    _capabilities,
    _bpf_call,
    _ring,
    _program,
    _lockdown,
    _unprivileged_reads,
    _kernel_btf,
    _tracefs,
    _tracepoints,
    *map(_optional_tracepoint, OPTIONAL_TRACEPOINTS),
    _run_delay,
    _digests,
    _return_probes,
    _bcc,
    _run_dir,
    _cache_dir,
    _user,
    _target,
    _storage,
    _io_uring,
    _mappings,
    _tls,
    _unseen,
)

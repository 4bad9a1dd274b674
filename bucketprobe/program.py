# SPDX-License-Identifier: Apache-2.0
"""From C text to attached probes: compose, compile once (cached), fill in this kernel's offsets and maps, load, attach.

The cached object holds no address and no descriptor, so it serves every kernel: map numbers and member offsets are immediates
that are replaced at load.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from bucketprobe import abi, bpf, btf
from bucketprobe.errors import EnvironmentLack
from bucketprobe.providers import Site

SYSTEM_PYTHON = "/usr/bin/python3"
#: The probes' texts by compilation unit: two are compiled at once, in half the time of one.
UNITS = (("socket", "digest"), ("syscall", "process", "file"))
PARTS = tuple(part for unit in UNITS for part in unit)

#: Raw tracepoint -> program. The second group may be missing: the agent then says what it cannot see.
REQUIRED_TRACEPOINTS = {
    "sched_process_fork": "process_fork",
    "sched_process_exec": "process_exec",
    "sched_process_exit": "process_exit",
    "inet_sock_set_state": "sock_state",
    "sys_exit": "sys_exit",
    "sys_enter": "sys_enter",
}
OPTIONAL_TRACEPOINTS = {"sk_data_ready": "sock_ready", "tcp_receive_reset": "sock_reset"}
#: What tells the same where an optional one is missing.
STAND_INS = {"sk_data_ready": ("tcp_probe", "sock_segment")}

#: What is attached to places in binaries, and loaded only when such a place is found.
UPROBES = (
    "digest_update",
    "digest_updated",
    "digest_copied",
    "digest_final",
    "digest_finished",
    "hacl_final",
    "block_begin",
    "go_begin",
    "go_begin_stack",
    "go_end",
    "go_check",
    "go_sum",
)

_OFFSET_MARK = 0x5EED0000
_MOVE_IMMEDIATE, _LOAD_IMMEDIATE_64, _PSEUDO_MAP_FD = 0xB7, 0x18, 1
_EXIT = 0x95

#: How long one compiler may take: about half a second, and ten times that on a slow host.
COMPILE_SECONDS = 120

Log = Callable[[str], None]


def compose(parts: Iterable[str] = PARTS) -> str:
    """The C text of some probes, or of all. Local includes are put in once each: the compiler sees no file system."""
    room = files("bucketprobe.probes")
    seen: set[str] = set()

    def inline(name: str) -> Iterable[str]:
        for line in room.joinpath(name).read_text("ascii").splitlines():
            include = re.match(r'#include "(.*)"', line)
            if not include:
                yield line
            elif include[1] not in seen:
                seen.add(include[1])
                yield from inline("include/" + include[1])

    lines = []
    for i, name in enumerate(abi.OFFSETS):
        value = f'({{ __u64 offset; asm volatile("%0 = {_OFFSET_MARK + i:#x}" : "=r"(offset)); offset; }})'
        lines.append(f"#define {name} {value}")
    for part in parts:
        lines += inline(f"{part}.bpf.c")
    return "\n".join(lines) + "\n"


def _programs(text: bytes) -> dict[str, bytes]:
    return {name: base64.b64decode(code, validate=True) for name, code in json.loads(text)["programs"].items()}


def _cached(path: Path) -> dict[str, bytes] | None:
    """The programs of a cache file: its first line is the digest of the rest. None where it is absent or damaged."""
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
        return _programs(text) if digest.decode() == hashlib.sha256(text).hexdigest() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _replace(path: Path, text: str, log: Log) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="ascii") as out:
            out.write(text)
        os.replace(out.name, path)
    except OSError as error:
        log(f"The cache {path.parent} cannot be written ({error.strerror}): the next start compiles again; set cache_dir.")


def compiled(cache_dir: str, log: Log) -> dict[str, bytes]:
    """The programs' bytecode by name, compiled only where the cache has none of this text. Raises EnvironmentLack."""
    key = hashlib.sha256(f"{platform.machine()}\n{compose()}".encode()).hexdigest()[:24]
    path = Path(cache_dir, f"probes-{key}.json")
    cached = _cached(path)
    if cached:
        return cached
    log("compiling the probes (the first start only)")
    with tempfile.TemporaryDirectory(prefix="bucketprobe-") as folder:
        compilers = [_Compiler(compose(unit), Path(folder, unit[0])) for unit in UNITS]
        try:
            encoded = {name: code for compiler in compilers for name, code in compiler.result().items()}
        finally:
            for compiler in compilers:
                compiler.end()
    text = json.dumps({"programs": encoded}).encode()
    _replace(path, f"{hashlib.sha256(text).hexdigest()}\n{text.decode()}", log)
    return _programs(text)


class _Compiler:
    """One run of the loader. Raises EnvironmentLack where it cannot be started, and from `result` where it fails."""

    def __init__(self, text: str, folder: Path) -> None:
        folder.mkdir()
        source = folder / "text.c"
        source.write_text(text, encoding="ascii")
        command = [SYSTEM_PYTHON, "-I", str(files("bucketprobe").joinpath("loader.py")), str(folder)]
        try:
            with source.open("rb") as stdin:
                self._process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise EnvironmentLack(f"{SYSTEM_PYTHON} cannot be run ({error.strerror}): apt-get install python3-bpfcc.") from None

    def result(self) -> dict[str, str]:
        """Bytecode in base64 by program name."""
        try:
            out, err = self._process.communicate(timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise EnvironmentLack(f"Compiling took over {COMPILE_SECONDS} s: try again when the host is less busy.") from None
        if self._process.returncode:
            raise EnvironmentLack(_why(err.decode(errors="replace").strip(), self._process.returncode))
        try:
            programs: dict[str, str] = json.loads(out)["programs"]
            _programs(out)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EnvironmentLack(f"The compiler's answer cannot be read: is {SYSTEM_PYTHON}'s bcc Debian's python3-bpfcc?") from None
        return programs

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _why(trouble: str, code: int) -> str:
    """The sentence for what a compiler said last."""
    if "No module named 'bcc'" in trouble:
        return "BCC is missing: apt-get install python3-bpfcc (the package named bcc on PyPI is another project)."
    lines = [line for line in trouble.splitlines() if "error:" in line] or trouble.splitlines()[-1:]
    reason = lines[0].strip() if lines else f"the compiler ended with {code}"
    return f"The probes could not be compiled ({reason}): install Debian's python3-bpfcc, 0.26 or later."


def kernel_offsets(cache_dir: str, log: Log) -> dict[str, int]:
    """Member offsets of the running kernel, read from its BTF once per kernel. Raises EnvironmentLack."""
    kernel = "\n".join((*os.uname()[2:], *(f"{k}={v}" for k, v in abi.OFFSETS.items())))
    path = Path(cache_dir, f"offsets-{hashlib.sha256(kernel.encode()).hexdigest()[:24]}.json")
    try:
        stored: dict[str, int] = json.loads(path.read_bytes())
        if stored.keys() == abi.OFFSETS.keys():
            return stored
    except (OSError, ValueError, AttributeError):
        pass
    found = btf.offsets(abi.OFFSETS)
    _replace(path, json.dumps(found), log)
    return found


def _returned(code: bytes) -> int:
    """The constant that a program `r0 = N; exit` returns."""
    opcode, _, _, value = struct.unpack_from("<BBhi", code)
    if opcode not in (0xB7, 0xB4) or code[8] != _EXIT:
        raise ValueError("not a constant function")
    return int(value)


def relocated(code: bytes, maps: Mapping[str, int], offsets: Mapping[str, int]) -> bytes:
    """The bytecode with this process's map descriptors and this kernel's offsets in the place of their marks."""
    out = bytearray(code)
    names = [m.name for m in abi.MAPS]
    values = [offsets[name] for name in abi.OFFSETS]
    at = 0
    while at < len(out):
        opcode, registers, _, immediate = struct.unpack_from("<BBhi", out, at)
        if opcode == _LOAD_IMMEDIATE_64:
            if registers >> 4 == _PSEUDO_MAP_FD:
                struct.pack_into("<i", out, at + 4, maps[names[immediate - abi.MAP_BASE]])
            at += 16
            continue
        if opcode == _MOVE_IMMEDIATE and _OFFSET_MARK <= immediate < _OFFSET_MARK + len(values):
            struct.pack_into("<i", out, at + 4, values[immediate - _OFFSET_MARK])
        at += 8
    return bytes(out)


@dataclass
class Loaded:
    """Attached probes. Closing the descriptors (or the end of the process that holds them) detaches them all."""

    maps: dict[str, int] = field(default_factory=dict)
    programs: list[int] = field(default_factory=list)
    uprobes: dict[str, bytes] = field(default_factory=dict)  # not loaded yet: see Uprobes
    links: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def attach(self, tracepoint: str, program: int) -> bool:
        """False where the kernel has no such tracepoint. Raises OSError."""
        try:
            self.links[tracepoint] = bpf.raw_tracepoint_open(tracepoint, program)
        except FileNotFoundError:
            return False
        return True

    def detach(self) -> None:
        """No more events: what the maps hold is final."""
        for fd in self.links.values():
            os.close(fd)
        self.links.clear()

    def close(self) -> None:
        for fd in (*self.links.values(), *self.programs, *self.maps.values()):
            os.close(fd)
        self.links.clear()
        self.programs.clear()
        self.maps.clear()


def create_maps(programs: Mapping[str, bytes], sizes: Mapping[str, int]) -> dict[str, int]:
    """Creates every map; `sizes` gives other numbers of entries by map name."""
    made = {}
    for spec in abi.MAPS:
        value = _returned(programs[f"size_{spec.value.split()[-1]}"]) if isinstance(spec.value, str) else spec.value
        made[spec.name] = bpf.map_create(spec.type, spec.key, value, sizes.get(spec.name, spec.entries), spec.flags, spec.name)
    return made


def _load_programs(codes: Mapping[str, bytes]) -> dict[str, int]:
    """Loads programs, the largest first and two at a time: the verifier's time is most of a cached start. Raises OSError."""
    waiting = sorted(codes.items(), key=lambda item: len(item[1]))
    loaded: dict[str, int] = {}
    failed: list[OSError] = []

    def work() -> None:
        while waiting and not failed:
            name, code = waiting.pop()
            try:
                loaded[name] = bpf.program_load(code, name)
            except OSError as error:
                failed.append(error)

    helper = threading.Thread(target=work)
    helper.start()
    work()
    helper.join()
    if failed:
        for fd in loaded.values():
            os.close(fd)
        raise failed[0]
    return loaded


def load(programs: Mapping[str, bytes], offsets: Mapping[str, int], sizes: Mapping[str, int]) -> Loaded:
    """Creates the maps and loads and attaches every probe; sys_enter last, when all it needs is there.

    Raises EnvironmentLack where the kernel refuses.
    """
    loaded = Loaded()
    bpf.raise_memlock_limit()
    try:
        loaded.maps = create_maps(programs, sizes)
        ready = {name: relocated(code, loaded.maps, offsets) for name, code in programs.items() if not name.startswith("size_")}
        loaded.uprobes = {name: ready.pop(name) for name in UPROBES}
        descriptors = _load_programs(ready)
        loaded.programs += descriptors.values()
        for handler in abi.Handler:
            fd = descriptors.get(f"on_{handler.name.lower()}")
            if fd is not None:
                bpf.map_update(loaded.maps["handlers"], struct.pack("=I", handler), struct.pack("=I", fd))
        for handler, calls in abi.CALLS.items():
            for number in calls.values():
                bpf.map_update(loaded.maps["calls"], struct.pack("=I", number), struct.pack("=I", handler))
        for tracepoint, name in {**OPTIONAL_TRACEPOINTS, **REQUIRED_TRACEPOINTS}.items():
            if loaded.attach(tracepoint, descriptors[name]):
                continue
            if tracepoint in REQUIRED_TRACEPOINTS:
                raise EnvironmentLack(f"This kernel has no tracepoint {tracepoint}: run Linux 5.8 or later.")
            stand_in = STAND_INS.get(tracepoint)
            if not stand_in or not loaded.attach(stand_in[0], descriptors[stand_in[1]]):
                loaded.missing.append(tracepoint)
    except OSError as error:
        loaded.close()
        remedy = "run as root, with CAP_BPF and CAP_PERFMON" if error.errno == errno.EPERM else "run `bucketprobe doctor`"
        raise EnvironmentLack(f"The kernel refused the probes ({error.strerror}): {remedy}.") from None
    except BaseException:
        loaded.close()
        raise
    return loaded


class Uprobes:
    """Attaches programs to places in binaries, one process at a time; a descriptor detaches when it is closed.

    `multi`: all places of a program in one link, which comes and goes in some 10 to 30 ms (Linux 6.10, and stable ones from 6.6);
    else each is a perf event, which takes 0.1 s to close. Raises OSError where the kernel refuses the programs.
    """

    def __init__(self, codes: Mapping[str, bytes], *, multi: bool | None = None) -> None:
        self.multi = bpf.has_uprobe_multi() if multi is None else multi
        self._programs = self._load(codes)

    def _load(self, codes: Mapping[str, bytes]) -> dict[str, int]:
        attach_type = bpf.TRACE_UPROBE_MULTI if self.multi else 0
        loaded: dict[str, int] = {}
        try:
            for name, code in codes.items():
                loaded[name] = bpf.program_load(code, name, bpf.PROG_TYPE_KPROBE, attach_type)
        except OSError:
            for fd in loaded.values():
                os.close(fd)
            raise
        return loaded

    def attach(self, path: str, sites: Iterable[Site], tgid: int) -> list[int]:
        """All or nothing: descriptors. Raises OSError (ESRCH and ENOENT: the process is gone, or does not map the file any more)."""
        by_program: dict[tuple[str, bool], list[int]] = {}
        for site in sites:
            by_program.setdefault((site.program, site.returns), []).append(site.offset)
        opened: list[int] = []
        try:
            for (name, returns), offsets in by_program.items():
                program = self._programs[name]
                if self.multi:
                    opened.append(bpf.uprobe_multi_open(program, path, offsets, tgid, returns=returns))
                else:
                    for offset in offsets:  # one by one: those before one that fails must be closed, too
                        opened.append(bpf.uprobe_open(program, path, offset, tgid, returns=returns))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return opened

    def close(self) -> None:
        for fd in self._programs.values():
            os.close(fd)
        self._programs = {}

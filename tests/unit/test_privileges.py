# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bucketprobe import privileges
from bucketprobe.errors import BucketprobeError, EnvironmentLack

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have something to drop")

CLEAN = """Name:\tpython
Uid:\t65534\t65534\t65534\t65534
Gid:\t65534\t65534\t65534\t65534
Groups:\t
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
CapAmb:\t0000000000000000
NoNewPrivs:\t1
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "status"
    path.write_text(text)
    return str(path)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_a_clean_status_passes(tmp_path: Path) -> None:
    privileges.verify(65534, 65534, write(tmp_path, CLEAN))


@pytest.mark.parametrize("name", privileges.CAPABILITY_SETS)
@pytest.mark.parametrize("bit", [0, 21, 39, 45])
def test_any_bit_that_remains_is_refused_and_named(tmp_path: Path, name: str, bit: int) -> None:
    status = write(tmp_path, CLEAN.replace(f"{name}:\t{0:016x}", f"{name}:\t{1 << bit:016x}"))
    with pytest.raises(BucketprobeError, match=f"refuses to run on.*{name} {privileges.names(1 << bit)[0]}"):
        privileges.verify(65534, 65534, status)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Uid:\t65534\t65534\t65534\t65534", "Uid:\t65534\t65534\t0\t65534", "Uid"),
        ("Gid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t0", "Gid"),
        ("Groups:\t", "Groups:\t0 27", "groups 0 27"),
        ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "gain privileges by exec"),
    ],
)
def test_other_remains_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(BucketprobeError, match=words):
        privileges.verify(65534, 65534, write(tmp_path, CLEAN.replace(old, new)))


def test_the_capability_table() -> None:
    assert privileges.CAPABILITIES.index("CAP_SYS_ADMIN") == 21
    assert privileges.CAPABILITIES.index("CAP_PERFMON") == 38
    assert privileges.CAPABILITIES.index("CAP_BPF") == 39
    assert privileges.names(0) == []
    assert privileges.names(1 << 2 | 1 << 39 | 1 << 60) == ["CAP_DAC_READ_SEARCH", "CAP_BPF", "CAP_60"]


def test_this_process_has_five_sets() -> None:
    assert tuple(privileges.current()) == privileges.CAPABILITY_SETS


def effective(*held: str) -> str:
    mask = sum(1 << privileges.CAPABILITIES.index(name) for name in held)
    return CLEAN.replace(f"CapEff:\t{0:016x}", f"CapEff:\t{mask:016x}")


REST = ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        (("CAP_BPF", "CAP_PERFMON", *REST), []),
        (("CAP_SYS_ADMIN", *REST), []),
        (("CAP_BPF", *REST), ["CAP_PERFMON"]),
        (("CAP_SYS_ADMIN", *REST[1:]), ["CAP_SYS_PTRACE"]),
        ((), ["CAP_BPF", "CAP_PERFMON", *REST]),
    ],
)
def test_what_the_broker_needs(tmp_path: Path, held: tuple[str, ...], missing: list[str]) -> None:
    status = write(tmp_path, effective(*held))
    assert privileges.missing_for_broker(status) == missing
    if missing:
        with pytest.raises(EnvironmentLack, match=f"^{', '.join(missing)} missing; run as root"):
            privileges.require_root_caps(status)
    else:
        privileges.require_root_caps(status)


def test_a_user_that_cannot_be_used() -> None:
    for user in ("no-such-user", "", "nul\0"):
        with pytest.raises(EnvironmentLack, match="--user"):
            privileges.unprivileged_ids(user)
    with pytest.raises(EnvironmentLack, match="root is privileged"):
        privileges.unprivileged_ids("root")


DROP = """
import ctypes, os, sys
from bucketprobe import privileges
os.setgroups([0, 27])
dropped = privileges.drop_all("nobody")
def refused(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return True
    return False
print(dropped.uid, dropped.gid, sum(privileges.current().values()), os.getgroups(), os.getresuid(), os.getresgid())
print(refused(open, sys.argv[1]), refused(open, sys.argv[2]), end=" ")
print(refused(os.setresuid, 0, 0, 0), refused(os.setgroups, [0]), refused(os.kill, 1, 0))
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))
"""


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user may enter; those of pytest are root's alone."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@needs_root
def test_after_the_drop_nothing_is_left_and_nothing_comes_back(reachable: Path) -> None:
    for name, mode in (("secret", 0o600), ("public", 0o644)):
        (reachable / name).touch()
        (reachable / name).chmod(mode)
    done = python(DROP, str(reachable / "secret"), str(reachable / "public"))
    assert done.stderr == ""
    first, second, third = done.stdout.splitlines()
    gid = privileges.unprivileged_ids("nobody")[1]
    assert first == f"65534 {gid} 0 [] (65534, 65534, 65534) ({gid}, {gid}, {gid})"
    assert second == "True False True True True"
    assert third == "0 1"  # not dumpable, no new privileges


@needs_root
def test_capabilities_that_a_change_of_uid_would_keep_are_dropped_too() -> None:
    code = (
        "import ctypes; from bucketprobe import privileges\n"
        "assert ctypes.CDLL(None).prctl(28, 4, 0, 0, 0) == 0  # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP\n"
        "privileges.drop_all('nobody'); print(sum(privileges.current().values()))"
    )
    assert python(code).stdout == "0\n"


SETUID = """
import os, sys
from bucketprobe import privileges
privileges.drop_all("nobody") if sys.argv[2] == "drop" else os.setresuid(65534, 65534, 65534)
os.execv(sys.argv[1], ["grep", "-E", "^(Uid|CapPrm)", "/proc/self/status"])
"""


@needs_root
def test_a_setuid_root_program_gives_nothing_back(reachable: Path) -> None:
    if os.statvfs(reachable).f_flag & os.ST_NOSUID:
        pytest.skip("temporary files are on a nosuid mount")
    program = reachable / "grep"
    shutil.copyfile("/usr/bin/grep", program)
    program.chmod(0o4755)
    assert python(SETUID, str(program), "uid only").stdout.startswith("Uid:\t65534\t0\t0\t0\n")
    assert python(SETUID, str(program), "drop").stdout == "Uid:\t65534\t65534\t65534\t65534\nCapPrm:\t0000000000000000\n"


@needs_root
def test_a_second_thread_is_refused_before_anything_is_dropped() -> None:
    code = (
        "import os, threading; from bucketprobe import privileges; from bucketprobe.errors import BucketprobeError\n"
        "stop = threading.Event(); threading.Thread(target=stop.wait).start()\n"
        "try:\n    privileges.drop_all('nobody')\n"
        "except BucketprobeError as error:\n    print(os.getuid(), 'first thread' in str(error))\n"
        "stop.set()"
    )
    assert python(code).stdout == "0 True\n"


@needs_root
def test_without_the_right_to_drop_it_says_so() -> None:
    code = (
        "import os; from bucketprobe import privileges; from bucketprobe.errors import BucketprobeError\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "try:\n    privileges.drop_all('nobody')\n"
        "except BucketprobeError as error:\n    print(error)\n"
    )
    assert "could not be dropped (Operation not permitted); start the agent as root" in python(code).stdout

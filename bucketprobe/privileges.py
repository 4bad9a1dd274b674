# SPDX-License-Identifier: Apache-2.0
"""Giving up every privilege, for good, and proving it; and naming those that the broker needs.

The order of `drop_all` matters: the bounding set can only be emptied while CAP_SETPCAP is held, groups and uids only be
changed while CAP_SETGID and CAP_SETUID are, and no_new_privs comes last since it needs nothing. See capabilities(7), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import struct
from dataclasses import dataclass

from bucketprobe.errors import BucketprobeError, EnvironmentLack

STATUS = "/proc/self/status"
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

#: By number, from include/uapi/linux/capability.h.
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)

#: Read /proc of other users' processes, and drop what is left afterwards.
_ALWAYS_NEEDED = ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")

# include/uapi/linux/prctl.h and capability.h
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522


@dataclass(frozen=True, slots=True)
class Dropped:
    """Whom the process has become."""

    user: str
    uid: int
    gid: int


def drop_all(user: str) -> Dropped:
    """Become `user` without any capability, irrevocably, and check that it is so.

    The calls work on one thread, so the process must have only one. Raises EnvironmentLack if `user` does not exist or is
    privileged, BucketprobeError if something could not be dropped; the process must then end, as it may be half-way.
    """
    uid, gid = unprivileged_ids(user)
    if len(os.listdir("/proc/self/task")) != 1:
        raise BucketprobeError("privileges can only be dropped before the first thread starts; this is a fault of bucketprobe, report it")
    try:
        _drop(uid, gid)
    except OSError as error:
        raise BucketprobeError(f"privileges could not be dropped ({error.strerror}); start the agent as root (sudo)") from None
    verify(uid, gid)
    return Dropped(user, uid, gid)


def unprivileged_ids(user: str) -> tuple[int, int]:
    """uid and gid of `user`. Raises EnvironmentLack if there is no such user, or if it is root or in root's group."""
    try:
        entry = pwd.getpwnam(user)
    except (KeyError, ValueError):
        raise EnvironmentLack(f"there is no user {user!a}; name an existing unprivileged one with --user") from None
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise EnvironmentLack(f"user {user} is privileged (uid {entry.pw_uid}, gid {entry.pw_gid}); name another one with --user")
    return entry.pw_uid, entry.pw_gid


def verify(uid: int, gid: int, status: str = STATUS) -> None:
    """Raise BucketprobeError unless the status file shows that nothing is left and that nothing can be gained."""
    fields = _fields(status)
    left = [f"{name} {', '.join(names(mask))}" for name, mask in current(status).items() if mask]
    left += [f"{name} {fields[name]}" for name, wanted in (("Uid", uid), ("Gid", gid)) if fields[name].split() != [str(wanted)] * 4]
    if fields["Groups"]:
        left.append(f"groups {fields['Groups']}")
    if fields["NoNewPrivs"] != "1":
        left.append("the ability to gain privileges by exec")
    if left:
        raise BucketprobeError(
            f"the agent refuses to run on with privileges left: {'; '.join(left)}; start it as root (sudo), or report it"
        )


def current(status: str = STATUS) -> dict[str, int]:
    """The five capability sets of the process as bit masks, by their names in CAPABILITY_SETS."""
    fields = _fields(status)
    return {name: int(fields[name], 16) for name in CAPABILITY_SETS}


def names(mask: int) -> list[str]:
    """The capabilities in a mask; one that is too new for the table is shown by its number."""
    bits = [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
    return [CAPABILITIES[bit] if bit < len(CAPABILITIES) else f"CAP_{bit}" for bit in bits]


def missing_for_broker(status: str = STATUS) -> list[str]:
    """The capabilities that the broker needs and the process does not have in effect."""
    held = set(names(current(status)["CapEff"]))
    # Before Linux 5.8 there was CAP_SYS_ADMIN only, which still implies the two.
    for_bpf = () if "CAP_SYS_ADMIN" in held else ("CAP_BPF", "CAP_PERFMON")
    return [name for name in (*for_bpf, *_ALWAYS_NEEDED) if name not in held]


def require_root_caps(status: str = STATUS) -> None:
    """Raise EnvironmentLack naming what `missing_for_broker` finds."""
    missing = missing_for_broker(status)
    if missing:
        raise EnvironmentLack(f"{', '.join(missing)} missing; run as root (sudo)")


def _drop(uid: int, gid: int) -> None:
    _prctl(_PR_SET_KEEPCAPS, 0)
    os.setgroups([])
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _capset_empty()
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # No core file and no ptrace by a process of the same user: the agent's memory holds parts of requests.
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, argument: int) -> None:
    zero = ctypes.c_ulong(0)
    _called(_libc().prctl(option, ctypes.c_ulong(argument), zero, zero, zero))


def _capset_empty() -> None:
    # Version 3 takes two (effective, permitted, inheritable), for the lower and the upper 32 bits.
    _called(_libc().capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)))


def _called(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _fields(status: str) -> dict[str, str]:
    with open(status, encoding="utf-8", errors="replace") as file:
        pairs = (line.partition(":") for line in file)
        return {name: value.strip() for name, _, value in pairs}

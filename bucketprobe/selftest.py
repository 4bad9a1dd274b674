# SPDX-License-Identifier: Apache-2.0
"""Whether the probes read a library's digests right, and what a hit costs: tried on a process of our own before any other's.

The process loads the library that is to be tried, having given up every privilege first: a library may come from a container,
and runs code as soon as it is loaded. It hashes what it is told to while the parent attaches and detaches the probes, and
compares. Run as `python -m bucketprobe.selftest FD USER`; it is told what to do in lines on its standard input.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import secrets
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bucketprobe import abi, bpf, privileges
from bucketprobe.digests import Prices
from bucketprobe.providers import Provider, Site

#: By the names that the library knows them by.
ALGORITHMS = {"MD5": "md5", "SHA1": "sha1", "SHA256": "sha256", "SHA384": "sha384", "SHA512": "sha512"}
#: Calls of one round, and rounds before the probes are put on, while they are on, and after.
CALLS, ROUNDS = 300, 5
#: No hit costs less, ns: two switches into the kernel and back.
LEAST_NS = 300.0
#: Bytes that are moved between two calls.
DISTURBANCE = 1 << 17
#: How long the process may run, CPU time in s.
CPU_SECONDS = 20

Attach = Callable[[Provider, Sequence[Site], int], list[int]]
Detach = Callable[[list[int]], None]


class Failed(Exception):
    """The library could not be tried; the text says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`wrong`: algorithms whose digest or number of bytes was not read right."""

    wrong: tuple[str, ...]


class Subject:
    """The process that hashes. Raises Failed from every method where it does not answer."""

    def __init__(self, path: str, user: str) -> None:
        library = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            command = [sys.executable, "-I", "-m", "bucketprobe.selftest", str(library), user]
            self._process = subprocess.Popen(
                command, pass_fds=[library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        finally:
            os.close(library)
        self.tgid = self._process.pid
        try:
            self._answer()
        except Failed:
            self.close()
            raise

    def does(self, what: str, count: int = 1, argument: str = "-") -> int:
        """CPU time that it took, ns."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{what} {count} {argument}\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed("it ended") from None
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Failed("it cannot be loaded, or ended while it hashed")
        return line.strip()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def prove(subject: Subject, provider: Provider, sums: int, attach: Attach, detach: Detach) -> Outcome:
    """Hashes bytes of which the digests are known. `sums`: descriptor of the `hashing` map. Raises Failed, OSError."""
    key = struct.pack("=I", subject.tgid)
    bpf.map_update(sums, key, bytes(abi.HashingEntry(keeps=1)))
    attached = attach(provider, (*provider.value, *provider.time), subject.tgid)
    wrong = []
    try:
        for number, (name, ours) in enumerate(ALGORITHMS.items()):
            data = secrets.token_bytes(100 + 61 * number)
            subject.does("digest", 3, f"{name}:{data.hex()}")
            entry = abi.HashingEntry.from_buffer_copy(bpf.map_lookup(sums, key, ctypes.sizeof(abi.HashingEntry)) or bytes(512))
            expected = hashlib.new(ours, data * 3, usedforsecurity=False).digest()
            right = bytes(entry.value)[: len(expected)] == expected and entry.bytes_hashed == 3 * len(data)
            if not right or entry.calls != 3 * (number + 1):
                wrong.append(ours)
    finally:
        detach(attached)
        bpf.map_delete(sums, key)
    return Outcome(tuple(wrong))


def prices(subject: Subject, provider: Provider, sums: int, attach: Attach, detach: Detach) -> Prices:
    """What a hit costs here: the same calls with the probes on and off. Raises Failed, OSError."""
    key = struct.pack("=I", subject.tgid)
    bpf.map_update(sums, key, bytes(abi.HashingEntry()))
    pair = tuple(site for site in provider.time if site.program != "digest_copied")
    entry = tuple(site for site in provider.time if site.program == "digest_copied")

    def price(what: str, sites: Sequence[Site]) -> float:
        off = [subject.does(what, CALLS) for _ in range(ROUNDS)]
        attached = attach(provider, sites, subject.tgid)
        try:
            on = [subject.does(what, CALLS) for _ in range(ROUNDS)]
        finally:
            detach(attached)
        off += [subject.does(what, CALLS) for _ in range(ROUNDS)]
        return max(0.0, (median(on) - median(off)) / CALLS)

    try:
        paired = price("update", pair)
        found = bpf.map_lookup(sums, key, ctypes.sizeof(abi.HashingEntry))
        inside = abi.HashingEntry.from_buffer_copy(found or bytes(512))
        final = price("digests", provider.value)
        single = price("copy", entry)
    finally:
        bpf.map_delete(sums, key)
    # On a busy host a difference may come out too small: nothing is for nothing.
    single = max(single, LEAST_NS)
    paired = max(paired, single)
    return Prices(single, paired, max(final, paired), max(Prices().step, paired), inside.ns / max(1, inside.calls), measured=True)


# --- the process that hashes ---


def main(descriptor: int, user: str) -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    privileges.drop_all(user)
    library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    library.EVP_MD_CTX_new.restype = library.EVP_get_digestbyname.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.EVP_MD_CTX_new())
    sha256 = ctypes.c_void_p(library.EVP_get_digestbyname(b"SHA256"))
    value = ctypes.create_string_buffer(64)
    if not context or not sha256:
        return 1

    here, there = (ctypes.create_string_buffer(DISTURBANCE) for _ in range(2))
    zeroes = os.open("/dev/zero", os.O_RDONLY)

    def disturb() -> None:
        """What a server does between two calls: it reads, and it moves bytes, so that a hit finds the caches as it would there."""
        os.read(zeroes, DISTURBANCE // 4)
        ctypes.memmove(here, there, DISTURBANCE)

    def digest(count: int, argument: str) -> None:
        name, _, text = argument.partition(":")
        data = bytes.fromhex(text)
        kind = ctypes.c_void_p(library.EVP_get_digestbyname(name.encode()))
        library.EVP_DigestInit_ex(context, kind, None)
        for _ in range(count):
            library.EVP_DigestUpdate(context, data, ctypes.c_size_t(len(data)))
        library.EVP_DigestFinal_ex(context, value, None)

    def digests(count: int, _: str) -> None:
        for _i in range(count):
            disturb()
            library.EVP_DigestInit_ex(context, sha256, None)
            library.EVP_DigestFinal_ex(context, value, None)

    def update(count: int, _: str) -> None:
        for _i in range(count):
            disturb()
            library.EVP_DigestUpdate(None, None, ctypes.c_size_t(0))  # returns at once

    def copy(count: int, _: str) -> None:
        for _i in range(count):
            disturb()
            library.EVP_MD_CTX_copy_ex(None, None)

    does = {"digest": digest, "digests": digests, "update": update, "copy": copy}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        what, count, argument = line.split()
        start = time.thread_time_ns()
        does[what](int(count), argument)
        sys.stdout.write(f"{time.thread_time_ns() - start}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))

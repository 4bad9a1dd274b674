# SPDX-License-Identifier: Apache-2.0
"""The broker's part of digests: finds what hashes in each target, tries the probes on it, and puts them on and off (digests.py).

A thread of its own, because a link takes some 10 ms to be made and up to 0.1 s to be taken away, for which nobody else has to wait.
Every probe hangs on a descriptor of this process, whose end, however it comes, detaches them all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import re
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bucketprobe import abi, bpf, program, selftest, target
from bucketprobe.config import DigestSpec
from bucketprobe.digests import PARTS, Kernel, Part, Prices, Sums, Watched
from bucketprobe.providers import Finder, Provider, Site

#: When a process is asked again what hashes in it: it may load a library only when it first needs one.
AGAIN_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
#: How many processes are followed: each takes links, and a look at its accounts four times a second.
MAX_PROCESSES = 256
#: Of how many processes that run the same the calls are timed at once: what they tell holds for the others.
TIMED_AT_ONCE = 8
#: How often the costs are told.
TELL_SECONDS = 1.0

#: How long detaching may take: it is one grace period of the kernel, most of the time.
DETACH_SECONDS = 3.0

Tell = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class _Process:
    start_ticks: int
    tries: int = 0
    look_at: float = 0.0
    step_ns: int = 0
    watched: Watched | None = None


class Hashing(threading.Thread):
    """Follows the digests of the targets that it is told of. Errors end what they concern, with a word to the log; none ends the agent."""

    def __init__(self, spec: DigestSpec, user: str, maps: Mapping[str, int], codes: Mapping[str, bytes], tell: Tell) -> None:
        super().__init__(name="digests", daemon=True)
        self._spec = spec
        self._user = user
        self._sums = maps["hashing"]
        self._codes = codes
        self._tell = tell
        self._asked: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._processes: dict[int, _Process] = {}
        self._finder = Finder()
        self._uprobes: program.Uprobes | None = None
        self._refused = False
        self._full = False
        self._prices = Prices()
        self._proven: dict[tuple[int, int], str] = {}  # what is wrong with a library, by inode; "": nothing
        self._named: set[str] = set()  # families of which the log knows
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._windows = 0
        self._cpu_ns = 0
        self._told_at = 0.0

    def watch(self, tgid: int) -> None:
        """A process is a target, or runs another program."""
        self._asked.put(("watch", tgid))

    def forget(self, tgid: int) -> None:
        self._asked.put(("forget", tgid))

    def detach(self) -> None:
        """All probes go, for good; waits for that, but not for long."""
        self._asked.put(("end", 0))
        self.join(DETACH_SECONDS)

    def run(self) -> None:
        # Most targets have the same library as this process: when the first is found, it has been tried.
        for provider in self._finder.find(os.getpid()):
            self._is_right(provider)
        while True:
            wait = max(0.0, self._next_at() - time.monotonic())
            with suppress(queue.Empty):
                what, tgid = self._asked.get(timeout=min(wait, TELL_SECONDS))
                if what == "end":
                    break
                if what == "watch":
                    self._take_up(tgid)
                else:
                    self._drop(tgid)
            now = time.monotonic()
            for tgid, process in list(self._processes.items()):
                try:
                    self._attend(tgid, process, now)
                except Exception as error:  # whatever is wrong with one process must not end the others' digests
                    self._log(f"pid {tgid}: its digests are not looked at any more ({error!r}); report this")
                    self._processes.pop(tgid, None)
                    if process.watched:
                        _close(process.watched.descriptors)
            if now - self._told_at >= TELL_SECONDS:
                self._told_at = now
                self._tell_costs()
        _close([fd for process in self._processes.values() if process.watched for fd in process.watched.descriptors])

    def _take_up(self, tgid: int) -> None:
        start_ticks = target.start_time(tgid)
        known = self._processes.get(tgid)
        if known and known.start_ticks == start_ticks:
            known.tries, known.look_at = 0, 0.0  # it may run something else: then what is attached goes
            return
        self._drop(tgid)
        if start_ticks is None:
            return
        if len(self._processes) < MAX_PROCESSES:
            self._processes[tgid] = _Process(start_ticks)
        elif not self._full:
            self._full = True
            self._log(f"the digests of {MAX_PROCESSES} processes are looked at, and of no more")

    def _attend(self, tgid: int, process: _Process, now: float) -> None:
        if now >= process.look_at:
            self._look(tgid, process, now)
        if process.watched and time.monotonic_ns() >= process.step_ns:
            self._step(tgid, process, process.watched)

    def _next_at(self) -> float:
        times = [process.look_at for process in self._processes.values()]
        times += [process.step_ns / 1e9 for process in self._processes.values() if process.watched]
        return min(times, default=time.monotonic() + TELL_SECONDS)

    def _drop(self, tgid: int) -> None:
        process = self._processes.pop(tgid, None)
        if process and process.watched:
            self._end(tgid, process.watched)

    def _end(self, tgid: int, watched: Watched) -> None:
        watched.stop(time.monotonic_ns())
        for part in PARTS:
            self._spent[part] += watched.accounts[part].spent_ns
        self._windows += watched.windows
        self._cpu_ns += watched.cpu_spent_ns
        bpf.map_delete(self._sums, struct.pack("=I", tgid))

    def _look(self, tgid: int, process: _Process, now: float) -> None:
        """Finds what hashes in a process, where that is not known yet, or has changed."""
        process.look_at = now + AGAIN_SECONDS[min(process.tries, len(AGAIN_SECONDS) - 1)]
        process.tries += 1
        if target.start_time(tgid) != process.start_ticks:
            self._drop(tgid)
            return
        found = self._finder.find(tgid)
        before = process.watched.found if process.watched else []
        if not found or {each.inode for each in found} == {each.inode for each in before}:
            return
        if process.watched:
            self._end(tgid, process.watched)
            process.watched = None
        usable = [self._allowed(provider, tgid) for provider in found if self._is_right(provider)]
        if not usable or not self._ready(usable[0]):
            return
        if not self._prices.measured:
            self._log("what a probe costs could not be measured here: the most that is known is assumed, and little is probed")
        bpf.map_update(self._sums, struct.pack("=I", tgid), bytes(abi.HashingEntry()))
        family = " ".join(f"{device}:{inode}" for device, inode in sorted(each.inode for each in found))
        process.watched = Watched(tgid, usable, self._prices, self._shares(), _Links(self), self._tell, partial(self._may_time, family))
        process.watched.family = family
        process.watched.found = found
        process.step_ns = 0
        self._tell(
            {
                "op": "hasher",
                "tgid": tgid,
                "proven": all(self._proven.get(each.inode) == "" for each in usable if each.value),
                "outside_ns": process.watched.outside_ns,
                "valued": any(each.value for each in usable),
                "family": family,
            }
        )
        if family not in self._named:
            self._named.add(family)
            self._log(f"pid {tgid}: digests by " + ", ".join(f"{each.kind} in {each.library} ({each.detail})" for each in usable))

    def _may_time(self, family: str) -> bool:
        if self._spec.mode == "always":
            return True
        watched = (process.watched for process in self._processes.values())
        return sum(each.family == family and each.attached["time"] for each in watched if each) < TIMED_AT_ONCE

    def _shares(self) -> dict[Part, float | None]:
        if self._spec.mode == "always":
            return dict.fromkeys(PARTS)
        time_share = self._spec.time_budget_pct / 100
        return {"time": time_share, "value": self._spec.total_budget_pct / 100 - time_share}

    def _step(self, tgid: int, process: _Process, watched: Watched) -> None:
        again = watched.step(time.monotonic_ns())
        if again is None:
            self._drop(tgid)
            return
        process.step_ns = again
        if watched.failed is None:
            return
        self._end(tgid, watched)
        process.watched = None
        if watched.failed.errno == errno.ENOENT:
            return  # its mappings have changed: it is looked at again
        del self._processes[tgid]
        if watched.failed.errno != errno.ESRCH:
            self._log(f"pid {tgid}: its digests cannot be probed ({watched.failed.strerror})")

    # --- what is tried before it is trusted ---

    def _ready(self, provider: Provider) -> bool:
        """Loads the programs and measures what a hit costs, once. False: there are no uprobes."""
        if self._uprobes is None and not self._refused:
            try:
                self._uprobes = program.Uprobes(self._codes)
            except OSError as error:
                self._refused = True
                self._log(f"the kernel refuses uprobes ({error.strerror}): digests are not seen")
        if self._uprobes and not self._prices.measured and _can_be_loaded(provider):
            with suppress(selftest.Failed, OSError):
                subject = selftest.Subject(provider.path, self._user)
                try:
                    self._prices = selftest.prices(subject, provider, self._sums, self._attach, _close)
                finally:
                    subject.close()
                self._tell_costs()
        return self._uprobes is not None

    def _is_right(self, provider: Provider) -> bool:
        """Whether a library's digests are read right, as far as it can be tried; its values must prove themselves where it cannot."""
        if not _can_be_loaded(provider) or not self._ready(provider):
            return True
        if provider.inode not in self._proven:
            wrong = self._tried(provider)
            if wrong is None:
                return True
            self._proven[provider.inode] = wrong
            if wrong:
                self._log(f"{provider.library}: {wrong}: its digests are not looked at")
        return not self._proven[provider.inode]

    def _tried(self, provider: Provider) -> str | None:
        """What is wrong with it; None where it could not be tried."""
        try:
            subject = selftest.Subject(provider.path, self._user)
        except (selftest.Failed, OSError):
            return None
        try:
            wrong = selftest.prove(subject, provider, self._sums, self._attach, _close).wrong
        except (selftest.Failed, OSError) as error:
            return f"its self-test failed ({error})"
        finally:
            subject.close()
        return f"its self-test read {', '.join(wrong)} wrong" if wrong else ""

    def _allowed(self, provider: Provider, tgid: int) -> Provider:
        """Without return probes where those might end the process."""
        why = no_returns(tgid)
        if not why or not any(site.returns for site in (*provider.value, *provider.time)):
            return provider
        self._log(f"pid {tgid} {why}: no return probes, so that digests of {provider.library} are not seen")
        return replace(provider, value=(), time=())

    # --- the kernel ---

    def _attach(self, provider: Provider, sites: Sequence[Site], tgid: int) -> list[int]:
        assert self._uprobes
        return self._uprobes.attach(provider.path, sites, tgid)

    def _log(self, text: str) -> None:
        self._tell({"op": "log", "text": text})

    def _tell_costs(self) -> None:
        alive = [process.watched for process in self._processes.values() if process.watched]
        prices = self._prices
        self._tell(
            {
                "op": "digests",
                "cost_s": {part: (self._spent[part] + sum(each.accounts[part].spent_ns for each in alive)) / 1e9 for part in PARTS},
                "target_cpu_s": (self._cpu_ns + sum(each.cpu_spent_ns for each in alive)) / 1e9,
                "attached": {part: sum(each.attached[part] for each in alive) for part in PARTS},
                "windows": self._windows + sum(each.windows for each in alive),
                "prices_ns": {"entry": prices.entry, "update": prices.pair, "final": prices.final},
            }
        )


class _Links(Kernel):
    """The real thing."""

    def __init__(self, owner: Hashing) -> None:
        self._owner = owner

    def attach(self, provider: Provider, sites: Sequence[Site], tgid: int) -> list[int]:
        return self._owner._attach(provider, sites, tgid)

    def detach(self, descriptors: list[int]) -> None:
        _close(descriptors)

    def sums(self, tgid: int) -> Sums | None:
        raw = bpf.map_lookup(self._owner._sums, struct.pack("=I", tgid), ctypes.sizeof(abi.HashingEntry))
        if raw is None:
            return None
        entry = abi.HashingEntry.from_buffer_copy(raw)
        return Sums(entry.calls, entry.bytes, entry.ns, entry.copies, entry.digests)

    def cpu_ns(self, tgid: int) -> int | None:
        try:
            return time.clock_gettime_ns(~tgid << 3 | 2)  # the process's CPU-time clock: MAKE_PROCESS_CPUCLOCK in linux/posix-timers.h
        except OSError:
            return None

    def now_ns(self) -> int:
        return time.monotonic_ns()


def _close(descriptors: list[int]) -> None:
    """All at once: each waits for the kernel's grace period, and until the last is gone the process traps."""
    closers = [threading.Thread(target=os.close, args=(fd,)) for fd in descriptors]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()


def _can_be_loaded(provider: Provider) -> bool:
    return provider.kind == "openssl" and bool(provider.value) and not provider.path.endswith("/exe")


def no_returns(tgid: int, *, proc: str = target.PROC, release: str | None = None) -> str:
    """Why a process must not have return probes; empty where it may.

    They return by a system call on Linux 6.11 and later, which seccomp filters knew nothing of until 6.14 (commit cf6cb56ef244), so
    that a strict one ended the process; and before 6.11 they did not know of shadow stacks (commit 1713b63a07a2).
    """
    numbers = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    try:
        with open(f"{proc}/{tgid}/status", encoding="utf-8", errors="replace") as file:
            status = file.read()
    except OSError:
        return ""
    if (6, 11) <= version < (6, 14) and re.search(r"^Seccomp:\s*[12]", status, re.MULTILINE):
        return "is filtered by seccomp, and this kernel would end it"
    if version < (6, 11) and re.search(r"^x86_Thread_features:.*\bshstk\b", status, re.MULTILINE):
        return "has a shadow stack, which this kernel would break"
    return ""

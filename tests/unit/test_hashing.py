# SPDX-License-Identifier: Apache-2.0
"""The broker's part of digests, with the kernel, the processes and what hashes in them made up. Its thread is real."""

from __future__ import annotations

import errno
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bucketprobe import abi, bpf, hashing, program, selftest, target
from bucketprobe.config import DigestSpec
from bucketprobe.digests import PARTS, Prices
from bucketprobe.providers import Provider, Site

SECONDS = 10.0
PID = 4_000_001  # beyond what this kernel gives, and so nobody's
SUMS = 9
PRICES = Prices(700.0, 1_100.0, 1_600.0, 11_000.0, 800.0, measured=True)


def provider(library: str = "libcrypto.so.3", kind: str = "openssl", inode: int = 5, **others: Any) -> Provider:
    time = (Site("digest_update", 16, returns=False, emulated=True), Site("digest_updated", 16, returns=True, emulated=True))
    value = (Site("digest_final", 32, returns=False, emulated=True), Site("digest_finished", 32, returns=True, emulated=True))
    return replace(Provider(kind, f"/lib/{library}", library, (1, inode), value, time, "3.0"), **others)


OPENSSL = provider()
GO = provider("store", "go", 6, time=(Site("go_begin", 16, returns=False, emulated=True),), value=())


class Host:
    """What the thread finds. By tgid: `holds`, what hashes in it, and `starts`, when it began. By library: `wrong`, what its self-test
    reads wrong; `untried`, those that cannot be loaded by themselves. `attached`: which sites, by descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.holds: dict[int, list[Provider] | Exception] = {}
        self.starts: dict[int, int] = {}
        self.filtered: set[int] = set()
        self.wrong: dict[str, Sequence[str] | Exception] = {}
        self.untried: set[str] = set()
        self.prices: Prices | Exception = PRICES
        self.refuses_programs = False
        self.refuses: dict[str, int] = {}  # by path: the errno of an attempt to attach
        self.breaks: set[int] = set()  # of whom the sums cannot be read
        self.attached: dict[int, tuple[int, str, str]] = {}
        self.tried: list[str] = []
        self.sums: dict[int, bytes] = {}
        self.heard: list[dict[str, Any]] = []
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._real_close = os.close
        self.made: hashing.Hashing | None = None
        host = self

        class Finder:
            def find(self, tgid: int) -> list[Provider]:
                found = host.holds.get(tgid, [])
                if isinstance(found, Exception):
                    raise found
                return found

        class Subject:
            tgid = 77

            def __init__(self, path: str, user: str) -> None:
                host.tried.append(path)
                if path in host.untried:
                    raise selftest.Failed("it cannot be loaded, or ended while it hashed")
                self.path = path

            def close(self) -> None:
                pass

        class Uprobes:
            def __init__(self, codes: object) -> None:
                if host.refuses_programs:
                    raise OSError(errno.EPERM, "Operation not permitted")

            attach = staticmethod(host._attach)

        def prove(subject: Subject, *_: object) -> selftest.Outcome:
            wrong = host.wrong.get(subject.path, ())
            if isinstance(wrong, Exception):
                raise wrong
            return selftest.Outcome(tuple(wrong))

        def prices(*_: object) -> Prices:
            if isinstance(host.prices, Exception):
                raise host.prices
            return host.prices

        for module, name, stand_in in (
            (hashing, "Finder", Finder),
            (hashing, "no_returns", lambda tgid: "is filtered" if tgid in self.filtered else ""),
            (hashing, "_close", self._close),
            (hashing, "AGAIN_SECONDS", (0.01,)),
            (hashing, "TELL_SECONDS", 0.05),
            (hashing._Links, "cpu_ns", lambda _, tgid: 5 if tgid in self.starts else None),
            (program, "Uprobes", Uprobes),
            (selftest, "Subject", Subject),
            (selftest, "prove", prove),
            (selftest, "prices", prices),
            (target, "start_time", self.starts.get),
            (bpf, "map_update", lambda fd, key, value, *_: self.sums.__setitem__(self._tgid(fd, key), value)),
            (bpf, "map_lookup", lambda fd, key, size: self._lookup(self._tgid(fd, key))),
            (bpf, "map_delete", lambda fd, key: self.sums.pop(self._tgid(fd, key), None) is not None),
        ):
            monkeypatch.setattr(module, name, stand_in)

    @staticmethod
    def _tgid(fd: int, key: bytes) -> int:
        assert fd == SUMS
        return int(struct.unpack("=I", key)[0])

    def _lookup(self, tgid: int) -> bytes | None:
        if tgid in self.breaks:
            raise OSError(errno.EIO, "Input/output error")
        return self.sums.get(tgid)

    def _attach(self, path: str, sites: Sequence[Site], tgid: int) -> list[int]:
        if path in self.refuses:
            raise OSError(self.refuses[path], os.strerror(self.refuses[path]))
        with self._lock:
            made = [1_000 + len(self.attached) + number for number in range(len(sites))]
            while set(made) & set(self.attached):
                made = [fd + 100 for fd in made]
            self.attached |= {fd: (tgid, path, site.program) for fd, site in zip(made, sites, strict=True)}
        return made

    def _close(self, descriptors: Sequence[int]) -> None:
        for fd in descriptors:
            del self.attached[fd]

    def on(self, tgid: int = PID) -> set[str]:
        """The programs that are attached to a process."""
        return {name for whose, _, name in list(self.attached.values()) if whose == tgid}

    def start(self, **spec: Any) -> hashing.Hashing:
        self.made = hashing.Hashing(DigestSpec(**spec), "nobody", {"hashing": SUMS}, {}, self._messages.put)
        self.made.start()
        return self.made

    def runs(self, tgid: int, *found: Provider) -> None:
        self.starts[tgid] = 1
        self.holds[tgid] = list(found)

    def until(self, op: str, when: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The next such message; all are in `heard`."""
        ends = time.monotonic() + SECONDS
        while True:
            message = self._messages.get(timeout=max(0.0, ends - time.monotonic()))
            self.heard.append(message)
            if message["op"] == op and when(message):
                return message

    def log(self, text: str) -> str:
        found: str = self.until("log", lambda message: text in message["text"])["text"]
        return found

    def settle(self) -> None:
        """Until whatever it was asked has been done: another process is taken up and let go behind it."""
        self.runs(PID + 999, OPENSSL)
        assert self.made
        self.made.watch(PID + 999)
        self.until("hasher", lambda message: message["tgid"] == PID + 999)
        self.made.forget(PID + 999)
        self.until("probing", lambda message: message["tgid"] == PID + 999 and not message["on"])

    def logged(self) -> list[str]:
        return [message["text"] for message in self.heard if message["op"] == "log"]

    def told(self, op: str, tgid: int = PID) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["op"] == op and message.get("tgid") == tgid]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(monkeypatch)
    yield made
    if made.made:
        made.made.detach()
        assert not made.made.is_alive()
    assert made.attached == {}, "probes were left"


ALL = {"digest_update", "digest_updated", "digest_final", "digest_finished"}


# --- The usual ---------------------------------------------------------------------------------------------------


def test_a_process_that_hashes_is_told_of_and_probed(host: Host) -> None:
    host.runs(PID, OPENSSL)
    host.start().watch(PID)
    told = host.until("hasher")
    assert told == {"op": "hasher", "tgid": PID, "proven": True, "outside_ns": told["outside_ns"], "valued": True, "family": "1:5"}
    assert told["outside_ns"] > 0
    assert host.log(f"pid {PID}") == f"pid {PID}: digests by openssl in libcrypto.so.3 (3.0)"
    for part in PARTS:
        assert host.until("probing", lambda message, part=part: message["part"] == part)["on"]
    assert host.on() == ALL
    assert host.sums[PID] == bytes(abi.HashingEntry())


def test_a_process_that_is_forgotten_has_no_probes_and_no_sums(host: Host) -> None:
    host.runs(PID, OPENSSL)
    made = host.start()
    made.watch(PID)
    host.until("probing")
    made.forget(PID)
    host.settle()
    assert host.on() == set()
    assert PID not in host.sums
    made.forget(PID)
    host.settle()


def test_the_end_takes_all_off_and_twice_is_no_harm(host: Host) -> None:
    made = host.start()
    for tgid in (PID, PID + 1, PID + 2):
        host.runs(tgid, OPENSSL)
        made.watch(tgid)
    host.until("probing", lambda message: message["tgid"] == PID + 2)
    for _ in range(2):
        made.detach()
        assert host.attached == {}
        assert not made.is_alive()


def test_an_end_before_anything_was_found(host: Host) -> None:
    host.start().detach()


def test_a_library_that_is_needed_only_later_is_found_then(host: Host) -> None:
    host.runs(PID)
    host.start().watch(PID)
    host.settle()
    assert host.told("hasher") == []
    host.holds[PID] = [OPENSSL]
    assert host.until("hasher", lambda message: message["tgid"] == PID)["proven"]


def test_a_process_that_runs_something_else_has_the_probes_of_that_alone(host: Host) -> None:
    host.runs(PID, OPENSSL)
    made = host.start()
    made.watch(PID)
    host.until("probing")
    host.holds[PID] = [GO]
    made.watch(PID)
    told = host.until("hasher")
    assert (told["family"], told["valued"], told["proven"]) == ("1:6", False, True)
    host.until("probing", lambda message: message["on"])
    assert host.on() == {"go_begin"}


def test_a_process_that_is_told_of_twice_keeps_its_probes(host: Host) -> None:
    host.runs(PID, OPENSSL)
    made = host.start()
    made.watch(PID)
    host.until("probing", lambda message: message["part"] == "value")
    before = dict(host.attached)
    made.watch(PID)
    host.settle()
    assert host.attached == before
    assert len(host.told("hasher")) == 1


@pytest.mark.parametrize("then", [None, 2], ids=["gone", "another"])
def test_a_process_that_is_no_longer_the_same_is_let_go(host: Host, then: int | None) -> None:
    host.runs(PID, OPENSSL)
    host.start().watch(PID)
    host.until("probing", lambda message: message["part"] == "value")
    host.starts.pop(PID) if then is None else host.starts.update({PID: then})
    host.until("probing", lambda message: message["tgid"] == PID and not message["on"])
    host.settle()
    assert host.on() == set()


def test_a_process_that_is_gone_before_it_is_looked_at(host: Host) -> None:
    host.holds[PID] = [OPENSSL]
    host.start().watch(PID)
    host.settle()
    assert host.told("hasher") == []


# --- Budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "on"),
    [
        ({}, ALL),
        ({"mode": "always", "time_budget_pct": 0.0, "total_budget_pct": 0.0}, ALL),
        ({"time_budget_pct": 0.0, "total_budget_pct": 0.4}, {"digest_final", "digest_finished"}),
        ({"time_budget_pct": 0.2, "total_budget_pct": 0.2}, {"digest_update", "digest_updated"}),
        ({"time_budget_pct": 0.0, "total_budget_pct": 0.0}, set()),
    ],
)
def test_the_settings_say_what_is_probed(host: Host, spec: dict[str, Any], on: set[str]) -> None:
    host.runs(PID, OPENSSL)
    host.start(**spec).watch(PID)
    host.until("hasher")
    host.until("digests", lambda message: not on or any(message["attached"].values()))
    host.settle() if len(on) == 4 else host.until("digests")
    assert host.on() == on


def test_the_calls_of_few_of_many_that_run_the_same_are_timed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "TIMED_AT_ONCE", 2)
    made = host.start()
    for tgid in range(PID, PID + 5):
        host.runs(tgid, OPENSSL)
        made.watch(tgid)
    host.until("digests", lambda message: message["attached"]["value"] == 5)
    attached = host.until("digests")["attached"]
    assert attached == {"time": 2, "value": 5}
    timed = next(tgid for tgid in range(PID, PID + 5) if "digest_update" in host.on(tgid))
    made.forget(timed)
    assert host.until("digests", lambda message: message["attached"] == {"time": 2, "value": 4})


def test_in_the_mode_without_a_budget_all_are_timed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "TIMED_AT_ONCE", 2)
    made = host.start(mode="always")
    for tgid in range(PID, PID + 5):
        host.runs(tgid, OPENSSL)
        made.watch(tgid)
    assert host.until("digests", lambda message: message["attached"] == {"time": 5, "value": 5})


def test_one_line_of_the_log_for_all_that_run_the_same(host: Host) -> None:
    made = host.start()
    for tgid in range(PID, PID + 4):
        host.runs(tgid, OPENSSL)
        made.watch(tgid)
    host.until("hasher", lambda message: message["tgid"] == PID + 3)
    host.settle()
    assert len([text for text in host.logged() if "digests by" in text]) == 1


def test_what_it_costs_is_told_and_goes_on_growing_when_a_process_ends(host: Host) -> None:
    host.runs(PID, OPENSSL)
    made = host.start()
    made.watch(PID)
    host.until("digests", lambda message: message["attached"] == {"time": 1, "value": 1})
    host.sums[PID] = bytes(abi.HashingEntry(calls=10, bytes=10_000, ns=9_000, digests=4))
    first = host.until("digests", lambda message: message["cost_s"]["value"] > 0)
    assert first["prices_ns"] == {"entry": 700.0, "update": 1_100.0, "final": 1_600.0}
    assert first["cost_s"]["time"] >= 10 * 1_100e-9
    assert first["cost_s"]["value"] >= 4 * 1_600e-9
    assert first["windows"] == 2
    made.forget(PID)
    after = host.until("digests", lambda message: message["attached"] == {"time": 0, "value": 0})
    assert (after["cost_s"], after["windows"]) == (first["cost_s"], 2)


# --- What is tried before it is trusted --------------------------------------------------------------------------


def test_a_library_that_is_read_wrong_is_not_looked_at_and_named_once(host: Host) -> None:
    bad = provider("liboqs.so", inode=8)
    host.wrong[bad.path] = ("sha256", "sha512")
    made = host.start()
    for tgid in (PID, PID + 1):
        host.runs(tgid, bad)
        made.watch(tgid)
    host.settle()
    host.settle()
    assert [text for text in host.logged() if "liboqs" in text] == [
        "liboqs.so: its self-test read sha256, sha512 wrong: its digests are not looked at"
    ]
    assert host.on() | host.on(PID + 1) == set()
    assert host.tried.count(bad.path) <= 2, "once to try it, and once for what a hit costs"


def test_a_library_whose_self_test_fails_is_not_looked_at(host: Host) -> None:
    host.wrong[OPENSSL.path] = selftest.Failed("it ended")
    host.runs(PID, OPENSSL)
    host.start().watch(PID)
    assert "its self-test failed (it ended)" in host.log("libcrypto")
    assert host.on() == set()


def test_of_two_libraries_the_good_one_is_looked_at(host: Host) -> None:
    bad = provider("liboqs.so", inode=8)
    host.wrong[bad.path] = ("sha256",)
    host.runs(PID, bad, OPENSSL)
    host.start().watch(PID)
    assert host.until("hasher")["proven"]
    host.until("probing", lambda message: message["part"] == "value")
    assert {path for _, path, _ in host.attached.values()} == {OPENSSL.path}


@pytest.mark.parametrize(
    "other", [GO, provider("_sha2.so", "hacl", 9), provider("node", path="/proc/9/exe")], ids=lambda each: each.library
)
def test_code_that_cannot_be_loaded_by_itself_is_not_tried_and_must_prove_itself(host: Host, other: Provider) -> None:
    host.runs(PID, other)
    host.start().watch(PID)
    told = host.until("hasher")
    assert told["valued"] is bool(other.value)
    assert told["proven"] is not told["valued"]
    assert other.path not in host.tried
    host.until("probing")


def test_a_library_that_could_not_be_tried_must_prove_itself(host: Host) -> None:
    host.untried.add(OPENSSL.path)
    host.runs(PID, OPENSSL)
    host.start().watch(PID)
    assert not host.until("hasher")["proven"]


def test_where_a_hit_cannot_be_priced_the_most_is_assumed_and_said(host: Host) -> None:
    host.prices = selftest.Failed("it ended")
    host.runs(PID, OPENSSL)
    host.start().watch(PID)
    assert "could not be measured here" in host.log("what a probe costs")
    told = host.until("digests", lambda message: any(message["attached"].values()))
    assert told["prices_ns"]["update"] == Prices().pair


def test_a_kernel_that_refuses_uprobes_is_said_once_and_asked_once(host: Host) -> None:
    host.refuses_programs = True
    made = host.start()
    for tgid in (PID, PID + 1):
        host.runs(tgid, GO)
        made.watch(tgid)
    assert "the kernel refuses uprobes (Operation not permitted)" in host.log("uprobes")
    host.until("digests")
    host.until("digests")
    assert len([text for text in host.logged() if "uprobes" in text]) == 1
    assert host.told("hasher") == []


def test_return_probes_are_not_put_where_they_might_end_the_process(host: Host) -> None:
    host.filtered |= {PID, PID + 1}
    made = host.start()
    host.runs(PID, OPENSSL)
    host.runs(PID + 1, GO)
    made.watch(PID)
    made.watch(PID + 1)
    assert f"pid {PID} is filtered: no return probes" in host.log("no return probes")
    host.until("probing", lambda message: message["tgid"] == PID + 1)
    host.settle()
    assert host.on(PID) == set()
    assert host.on(PID + 1) == {"go_begin"}, "it needs none"


# --- What goes wrong ---------------------------------------------------------------------------------------------


def test_a_process_that_cannot_be_probed_is_said_and_the_others_go_on(host: Host) -> None:
    made = host.start()
    host.refuses[GO.path] = errno.EINVAL
    host.runs(PID, GO)
    host.runs(PID + 1, OPENSSL)
    made.watch(PID)
    assert "its digests cannot be probed (Invalid argument)" in host.log(f"pid {PID}: its digests cannot")
    made.watch(PID + 1)
    host.until("probing", lambda message: message["tgid"] == PID + 1)


def test_a_mapping_that_has_moved_is_found_again(host: Host) -> None:
    """A window is opened by a path below /proc/PID/map_files, which is another when the process has changed its mappings."""
    moved = replace(OPENSSL, path="/lib/moved")
    host.runs(PID, OPENSSL)
    host.refuses[OPENSSL.path] = errno.ENOENT
    host.start().watch(PID)
    host.until("hasher")
    host.holds[PID] = [moved]
    host.until("probing", lambda message: message["tgid"] == PID and message["on"])
    assert {path for _, path, _ in host.attached.values()} == {moved.path}


def test_whatever_goes_wrong_with_one_process_takes_its_probes_off_and_leaves_the_others(host: Host) -> None:
    made = host.start()
    for tgid in (PID, PID + 1):
        host.runs(tgid, OPENSSL)
        made.watch(tgid)
    host.until("digests", lambda message: message["attached"] == {"time": 2, "value": 2})
    host.breaks.add(PID)
    assert "report this" in host.log(f"pid {PID}: its digests are not looked at any more")
    host.until("digests", lambda message: message["attached"] == {"time": 1, "value": 1})
    assert host.on(PID) == set()
    assert host.on(PID + 1) == ALL
    assert made.is_alive()


def test_a_finder_that_fails_for_one_process_ends_nothing_else(host: Host) -> None:
    made = host.start()
    host.starts[PID] = 1
    host.holds[PID] = RuntimeError("what is this")
    made.watch(PID)
    host.log("what is this")
    host.settle()


def test_how_many_processes_are_followed_is_bounded_and_said_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "MAX_PROCESSES", 3)
    made = host.start()
    for tgid in range(PID, PID + 6):
        host.runs(tgid, OPENSSL)
        made.watch(tgid)
    host.log("of no more")
    told = host.until("digests", lambda message: message["attached"]["value"] == 3)
    made.forget(PID)
    made.watch(PID + 5)
    host.until("hasher", lambda message: message["tgid"] == PID + 5)
    assert told["attached"]["time"] == 3
    assert len([text for text in host.logged() if "of no more" in text]) == 1


# --- Closing -----------------------------------------------------------------------------------------------------


def test_links_are_closed_at_once_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each close waits until the others have begun, as for one grace period."""
    together = threading.Barrier(5, timeout=SECONDS)
    closed: list[int] = []

    def close(fd: int) -> None:
        together.wait()
        closed.append(fd)

    monkeypatch.setattr(hashing.os, "close", close)
    hashing._close([11, 12, 13, 14, 15])
    assert sorted(closed) == [11, 12, 13, 14, 15]
    hashing._close([])


# --- Where return probes are no danger ---------------------------------------------------------------------------


def why(proc: Path, release: str, status: str) -> str:
    folder = proc / "7"
    folder.mkdir()
    (folder / "status").write_text("Name:\tstore\n" + status)
    return hashing.no_returns(7, proc=str(proc), release=release)


@pytest.mark.parametrize(
    ("release", "filtered"),
    [
        ("6.10.14", False),
        ("6.11.0", True),
        ("6.12.9-arch1-1", True),
        ("6.13", True),
        ("6.14.0", False),
        ("6.18.44-cloud-amd64", False),
        ("5.10.0-30-amd64", False),
        ("7.0.0", False),
        ("nonsense", False),
    ],
)
@pytest.mark.parametrize(("mode", "strict"), [(0, False), (1, True), (2, True)])
def test_a_filter_of_system_calls_forbids_them_where_the_kernel_makes_one(
    tmp_path: Path, release: str, filtered: bool, mode: int, strict: bool
) -> None:
    found = why(tmp_path, release, f"NoNewPrivs:\t1\nSeccomp:\t{mode}\nSeccomp_filters:\t2\n")
    assert bool(found) == (filtered and strict)
    assert not found or "seccomp" in found


@pytest.mark.parametrize(("release", "breaks"), [("6.6.0", True), ("6.10.5", True), ("6.11.0", False), ("6.18.1", False)])
@pytest.mark.parametrize(("features", "has"), [("shstk wrss", True), ("wrss shstk", True), ("", False), ("shstkless", False)])
def test_a_shadow_stack_forbids_them_where_the_kernel_does_not_know_it(
    tmp_path: Path, release: str, breaks: bool, features: str, has: bool
) -> None:
    found = why(tmp_path, release, f"Seccomp:\t0\nx86_Thread_features:\t{features}\nx86_Thread_features_locked:\tshstk\n")
    assert bool(found) == (breaks and has)
    assert not found or "shadow stack" in found


def test_both_dangers_are_of_kernels_apart(tmp_path: Path) -> None:
    found = why(tmp_path, "6.12.0", "Seccomp:\t2\nx86_Thread_features:\tshstk\n")
    assert "seccomp" in found


def test_a_process_that_is_gone_is_in_no_danger(tmp_path: Path) -> None:
    assert hashing.no_returns(8, proc=str(tmp_path), release="6.12.0") == ""


def test_this_process_may_have_return_probes_or_the_kernel_says_why() -> None:
    assert isinstance(hashing.no_returns(os.getpid()), str)


# --- What a hit costs --------------------------------------------------------------------------------------------


class FakeSubject:
    """A process of the self-test that takes so long for each call, ns, with probes on and off."""

    tgid = 77

    def __init__(self, on: dict[str, float], off: float = 10_000.0) -> None:
        self.on, self.off, self.probed = on, off, False

    def does(self, what: str, count: int = 1, argument: str = "-") -> int:
        return round(count * (self.off + (self.on[what] if self.probed else 0.0)))


def measured(monkeypatch: pytest.MonkeyPatch, on: dict[str, float]) -> Prices:
    subject = FakeSubject(on)
    entry = bytes(abi.HashingEntry(calls=100, ns=80_000))
    monkeypatch.setattr(bpf, "map_update", lambda *_: None)
    monkeypatch.setattr(bpf, "map_delete", lambda *_: True)
    monkeypatch.setattr(bpf, "map_lookup", lambda *_: entry)

    def attach(*_: object) -> list[int]:
        subject.probed = True
        return [1]

    def detach(_: list[int]) -> None:
        subject.probed = False

    return selftest.prices(subject, OPENSSL, SUMS, attach, detach)  # type: ignore[arg-type]


def test_what_a_hit_costs_is_the_difference_that_probes_make(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"copy": 700.0, "update": 1_100.0, "digests": 1_600.0})
    assert (found.entry, found.pair, found.final, found.inside) == (700.0, 1_100.0, 1_600.0, 800.0)
    assert found.measured
    assert found.step >= Prices().step, "of it only the most is known"


@pytest.mark.parametrize("noise", [{"copy": 0.0, "update": 0.0, "digests": 0.0}, {"copy": -50.0, "update": 3_000.0, "digests": -900.0}])
def test_on_a_busy_host_no_hit_is_for_nothing(monkeypatch: pytest.MonkeyPatch, noise: dict[str, float]) -> None:
    found = measured(monkeypatch, noise)
    assert 0 < found.entry <= found.pair <= found.final
    assert found.pair >= noise["update"]
    for sites in (OPENSSL.time, OPENSSL.value, GO.time):
        assert found.call(sites) > 0

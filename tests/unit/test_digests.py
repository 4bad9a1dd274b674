# SPDX-License-Identifier: Apache-2.0
"""Whether probes on digests keep their budget, whatever the process does: against a process, a kernel and a clock that are made up."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import digests
from bucketprobe.digests import GRANT_NS, IN_SITU, LATE_NS, MOST_NS, PARTS, PAUSE_NS, SOON_NS, TELL_NS, Account, Part, Prices, Sums, Watched
from bucketprobe.providers import Provider, Site

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000
TGID = 7
PRICES = Prices(entry=700.0, pair=1_100.0, final=1_600.0, step=11_000.0, inside=800.0, measured=True)


def site(program: str, *, returns: bool = False, emulated: bool = True) -> Site:
    return Site(program, 4096, returns, emulated)


UPDATE = (site("digest_update"), site("digest_updated", returns=True))
FINAL = (site("digest_final"), site("digest_finished", returns=True))
OPENSSL = Provider("openssl", "/lib/libcrypto.so.3", "libcrypto.so.3", (1, 2), FINAL, UPDATE, "3.0")


class Process(digests.Kernel):
    """A process that hashes, and the kernel and the clock beside it.

    `calls_a_second`, `digests_a_second`: what it does; `cpus`: how much of the CPU it takes. `cost_ns`: what the probes have cost it
    by part. `attach_ns`, `detach_ns`: how long that takes, during which it is hit. `refuses`: which attempts to attach fail, by number.
    """

    def __init__(self, provider: Provider = OPENSSL) -> None:
        self.now = 1_000 * SECOND
        self.calls_a_second = self.digests_a_second = self.cpus = 0.0
        self.bytes_a_call, self.ns_a_call = 65_536, 40_000.0
        self.attach_ns = self.detach_ns = 0
        self.refuses: set[int] = set()
        self.gone = False
        self.attempts = 0
        self.cpu = 5.0 * SECOND
        self.cost_ns = {"time": 0.0, "value": 0.0}
        self.on_ns = {"time": 0, "value": 0}
        self.open: dict[int, Part] = {}
        self._price = {"time": IN_SITU * PRICES.call(provider.time), "value": IN_SITU * PRICES.call(provider.value)}
        self._done = {"calls": 0.0, "digests": 0.0}
        self._next = 3

    def run(self, ns: int) -> None:
        """It goes on for so long."""
        self.now += ns
        self.cpu += self.cpus * ns
        on: dict[Part, tuple[str, float]] = {"time": ("calls", self.calls_a_second), "value": ("digests", self.digests_a_second)}
        for part, (what, rate) in on.items():
            if part in self.open.values():
                before = int(self._done[what])
                self._done[what] += rate * ns / SECOND
                self.cost_ns[part] += (int(self._done[what]) - before) * self._price[part]
                self.on_ns[part] += ns

    @property
    def calls(self) -> int:
        return int(self._done["calls"])

    def attach(self, provider: Provider, sites: Sequence[Site], tgid: int) -> list[int]:
        assert tgid == TGID
        self.attempts += 1
        if self.attempts in self.refuses:
            raise OSError(errno.ESRCH, "No such process")
        self._next += 2
        part: Part = "time" if sites == provider.time else "value"
        self.open |= {self._next: part, self._next + 1: part}
        self.run(self.attach_ns)
        return [self._next, self._next + 1]

    def detach(self, descriptors: list[int]) -> None:
        if descriptors:
            self.run(self.detach_ns)
        for fd in descriptors:
            del self.open[fd]

    def sums(self, tgid: int) -> Sums | None:
        calls = self.calls
        sums = Sums(calls, calls * self.bytes_a_call, round(calls * (self.ns_a_call + PRICES.inside)), 0, int(self._done["digests"]))
        return None if self.gone else sums

    def cpu_ns(self, tgid: int) -> int | None:
        return None if self.gone else int(self.cpu)

    def now_ns(self) -> int:
        return self.now


class World:
    """A process that is watched as the broker does: a look whenever the one before asked for it."""

    def __init__(
        self,
        *,
        time: float | None = 0.002,
        value: float | None = 0.002,
        process: Process | None = None,
        found: Sequence[Provider] = (OPENSSL,),
    ) -> None:
        self.process = process or Process()
        self.told: list[dict[str, Any]] = []
        self.shares: dict[Part, float | None] = {"time": time, "value": value}
        self.watched = Watched(TGID, found, PRICES, self.shares, self.process, self.told.append)
        self.begun_cpu = self.process.cpu
        self.looks: list[int] = []
        self.states: list[dict[Part, bool]] = []
        self.most_in_a_look = {"time": 0.0, "value": 0.0}

    def look(self) -> int:
        again = self.watched.step(self.process.now)
        assert again is not None
        self.states.append(self.watched.attached)
        self.looks.append(again - self.process.now)
        return again

    def go(self, seconds: float, calls: float, uploads: float = 0.0, cpus: float = 1.0) -> None:
        """It hashes like that for so long."""
        process = self.process
        process.calls_a_second, process.digests_a_second, process.cpus = calls, uploads, cpus
        until = process.now + int(seconds * SECOND)
        while process.now < until:
            before = dict(process.cost_ns)
            again = self.look()
            process.run(max(1, again - process.now))
            for part in PARTS:
                self.most_in_a_look[part] = max(self.most_in_a_look[part], process.cost_ns[part] - before[part])

    def over(self, part: Part) -> float:
        """By how much it cost more than its share and the grant, ns."""
        return self.process.cost_ns[part] - (self.shares[part] or 0.0) * (self.process.cpu - self.begun_cpu) - GRANT_NS[part]


# --- What a hit costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "price"),
    [
        ((), 0.0),
        (UPDATE, 1_100.0),
        (FINAL, 1_600.0),
        ((site("digest_update"),), 700.0),
        ((site("digest_update", emulated=False),), 11_000.0),
        ((site("digest_update", emulated=False), site("digest_updated", returns=True)), 11_400.0),
        # one call goes by one of several places, and a copy is paid by itself
        ((site("go_begin"), site("go_begin"), site("go_end"), site("go_end"), site("go_end")), 1_400.0),
        ((*UPDATE, site("digest_copied")), 1_100.0),
    ],
)
def test_the_price_of_a_call(sites: tuple[Site, ...], price: float) -> None:
    assert PRICES.call(sites) == pytest.approx(price)


def test_what_was_not_measured_is_assumed_to_be_dear() -> None:
    assumed = Prices()
    assert not assumed.measured
    for sites in (UPDATE, FINAL):
        assert assumed.call(sites) >= 10 * PRICES.call(sites)


KINDS = [UPDATE, FINAL, (site("go_check"), site("go_sum")), (site("go_begin"), site("go_end"))]


@given(st.lists(st.floats(300.0, 50_000.0), min_size=3, max_size=3).map(sorted), st.sampled_from(KINDS))
def test_a_hit_is_never_for_nothing_nor_a_gain(measured: list[float], sites: tuple[Site, ...]) -> None:
    entry, pair, final = measured
    assert Prices(entry, pair, final, 24_000.0, measured=True).call(sites) >= 300.0


# --- The budget --------------------------------------------------------------------------------------------------


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[float, float, float, float]]:
    """Seconds, calls and digests a second, and CPUs used, one after the other."""
    rates = st.sampled_from([0.0, 0.5, 10.0, 300.0, 2_000.0, 20_000.0, 200_000.0])
    # A call takes time, and so a process that makes them uses the CPU; how much it uses besides does not matter.
    phase = st.tuples(st.sampled_from([0.03, 0.3, 1.0, 4.0]), rates, rates, st.sampled_from([0.0, 0.01, 0.3, 1.0, 8.0]))
    return draw(st.lists(phase, min_size=1, max_size=5))


@settings(deadline=None, max_examples=40)
@given(lives(), st.sampled_from([0.0001, 0.002, 0.05]))
def test_the_budget_is_kept_whatever_the_process_does(life: list[tuple[float, float, float, float]], share: float) -> None:
    world = World(time=share, value=share)
    for seconds, calls, uploads, cpus in life:
        world.go(seconds, calls, uploads, cpus)
        for part in PARTS:
            assert world.over(part) <= world.most_in_a_look[part] + US, (part, calls, uploads)


@settings(deadline=None, max_examples=20)
@given(lives())
def test_the_budget_is_kept_although_links_take_their_time(life: list[tuple[float, float, float, float]]) -> None:
    """The process is hit from the first of them on until the last is gone."""
    process = Process()
    process.attach_ns, process.detach_ns = 12 * MS, 30 * MS
    world = World(process=process)
    for seconds, calls, uploads, cpus in life:
        world.go(seconds, calls, uploads, cpus)
        for part in PARTS:
            assert world.over(part) <= 2 * world.most_in_a_look[part] + US, (part, calls, uploads)


@settings(deadline=None, max_examples=20)
@given(lives())
def test_its_accounts_know_what_it_cost(life: list[tuple[float, float, float, float]]) -> None:
    world = World()
    for phase in life:
        world.go(*phase)
    world.look()
    for part in PARTS:
        assert world.watched.accounts[part].spent_ns == pytest.approx(world.process.cost_ns[part], abs=1.0)
    assert world.watched.cpu_spent_ns == pytest.approx(world.process.cpu - world.begun_cpu, abs=2.0)


def test_where_calls_are_few_the_probes_stay() -> None:
    world = World()
    world.go(60.0, calls=100.0, uploads=20.0)
    assert all(state == {"time": True, "value": True} for state in world.states)
    assert world.watched.windows == 2, "one for each"


def test_where_calls_are_many_windows_come_and_go_and_the_budget_is_used() -> None:
    world = World()
    world.go(120.0, calls=20_000.0, uploads=3_000.0)
    for part in PARTS:
        earned = 0.002 * 120 * SECOND
        assert 0.5 * earned < world.process.cost_ns[part] <= earned + GRANT_NS[part] + world.most_in_a_look[part]
        assert 0 < world.process.on_ns[part] < 60 * SECOND
    assert world.watched.windows > 10
    for part in PARTS:
        assert {state[part] for state in world.states} == {True, False}


def test_a_rate_that_rises_tenfold_makes_windows_rarer_and_costs_no_more() -> None:
    world = World()
    shares, costs = [], []
    for calls in (3_000.0, 30_000.0):
        on, cost = world.process.on_ns["time"], world.process.cost_ns["time"]
        world.go(100.0, calls)
        shares.append((world.process.on_ns["time"] - on) / (100 * SECOND))
        costs.append((world.process.cost_ns["time"] - cost) / (100 * SECOND))
    assert shares[1] < shares[0] / 4
    assert costs[1] <= 0.002 + (GRANT_NS["time"] + world.most_in_a_look["time"]) / (100 * SECOND)
    assert costs[1] > 0.001


def test_a_rate_that_falls_lets_the_probes_stay_again() -> None:
    world = World()
    world.go(30.0, calls=50_000.0, uploads=10_000.0)
    world.go(200.0, calls=50.0, uploads=10.0)
    last = len(world.states) // 10
    assert all(state == {"time": True, "value": True} for state in world.states[-last:])


def test_a_process_that_stopped_hashing_is_watched_again_at_no_cost() -> None:
    world = World()
    world.go(30.0, calls=200_000.0, uploads=20_000.0)
    cost = dict(world.process.cost_ns)
    world.go(120.0, calls=0.0)
    assert world.states[-1] == {"time": True, "value": True}
    for part in PARTS:
        assert world.process.cost_ns[part] - cost[part] <= world.most_in_a_look[part]


def test_a_process_that_takes_no_cpu_is_not_charged_more_than_the_grant() -> None:
    """Whatever made its digests: nothing is earned."""
    world = World()
    world.go(200.0, calls=5_000.0, uploads=5_000.0, cpus=0.0)
    for part in PARTS:
        assert world.process.cost_ns[part] <= GRANT_NS[part] + world.most_in_a_look[part]
    assert world.states[-1] == {"time": False, "value": False}


def test_a_quiet_hour_does_not_pay_for_a_burst() -> None:
    world = World()
    world.go(3_600.0, calls=0.0)
    before = dict(world.process.cost_ns)
    world.go(5.0, calls=100_000.0, uploads=50_000.0)
    for part in PARTS:
        most = MOST_NS[part] + 0.002 * 5 * SECOND + world.most_in_a_look[part]
        assert 0 < world.process.cost_ns[part] - before[part] <= most


def test_the_two_accounts_do_not_pay_for_each_other() -> None:
    world = World()
    world.go(60.0, calls=100_000.0, uploads=5.0)
    assert all(state["value"] for state in world.states)
    assert not all(state["time"] for state in world.states)


def test_without_a_budget_they_never_come_off() -> None:
    world = World(time=None, value=None)
    world.go(30.0, calls=200_000.0, uploads=50_000.0)
    assert all(state == {"time": True, "value": True} for state in world.states)
    assert world.watched.windows == 2
    assert world.watched.accounts["time"].spent_ns > 0, "what it cost is told all the same"


@pytest.mark.parametrize("part", PARTS)
def test_with_a_budget_of_nothing_they_never_go_on(part: Part) -> None:
    world = World(**{part: 0.0})
    world.go(30.0, calls=10.0, uploads=10.0)
    assert not any(state[part] for state in world.states)
    assert all(all(on for name, on in state.items() if name != part) for state in world.states)
    assert world.process.on_ns[part] == 0


@pytest.mark.parametrize(("lacks", "part"), [("time", "time"), ("value", "value")])
@pytest.mark.parametrize("share", [0.002, None])
def test_a_part_without_places_is_never_attached(lacks: str, part: Part, share: float | None) -> None:
    world = World(time=share, value=share, found=[replace(OPENSSL, **{lacks: ()})])
    world.go(10.0, calls=10.0, uploads=10.0)
    assert not any(state[part] for state in world.states)
    assert all(all(on for name, on in state.items() if name != part) for state in world.states)


def test_of_several_libraries_all_are_attached_and_the_dearest_is_paid() -> None:
    dear = replace(OPENSSL, kind="go", time=(site("go_begin", emulated=False), site("go_end")), value=())
    world = World(found=[OPENSSL, dear], process=Process(dear))
    assert world.look()
    assert list(world.process.open.values()).count("time") == 4
    world.go(30.0, calls=1_000.0)
    assert world.watched.accounts["time"].spent_ns == pytest.approx(world.process.cost_ns["time"], rel=0.01)


def test_a_copy_of_a_state_is_paid_by_itself() -> None:
    class Copies(Process):
        def sums(self, tgid: int) -> Sums | None:
            return replace(super().sums(tgid) or Sums(), copies=self.calls)

    world = World(process=Copies())
    world.go(10.0, calls=100.0)
    world.look()
    assert world.watched.accounts["time"].spent_ns == pytest.approx(world.process.calls * IN_SITU * (PRICES.pair + PRICES.entry))


def test_calls_are_not_timed_while_enough_others_are_and_values_are_seen_all_the_same() -> None:
    process, may = Process(), [False]
    process.calls_a_second, process.cpus = 100.0, 1.0
    watched = Watched(TGID, [OPENSSL], PRICES, {"time": 0.002, "value": 0.002}, process, lambda _: None, lambda: may[0])
    for _ in range(5):
        process.run((watched.step(process.now) or 0) - process.now)
        assert watched.attached == {"time": False, "value": True}
    may[0] = True
    watched.step(process.now)
    assert watched.attached == {"time": True, "value": True}
    may[0] = False
    process.run(SECOND)
    watched.step(process.now)
    assert watched.attached["time"], "what is on is not taken off for that"
    assert sorted(watched.descriptors) == sorted(process.open)


# --- When it looks -----------------------------------------------------------------------------------------------


def test_it_looks_soon_after_a_change_and_else_neither_often_nor_late() -> None:
    world = World()
    world.go(60.0, calls=20_000.0, uploads=2_000.0)
    for before, state, look in zip([None, *world.states], world.states, world.looks, strict=False):
        if state != before:
            assert look == SOON_NS
        elif not any(state.values()):
            assert look == PAUSE_NS
        else:
            assert SOON_NS <= look <= LATE_NS
    assert LATE_NS in world.looks or PAUSE_NS in world.looks


# --- What goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [1, 2, 3, 4])
def test_probes_that_are_refused_leave_none_of_their_part(attempt: int) -> None:
    """Four times something is attached: each part of two libraries."""
    world = World(found=[OPENSSL, replace(OPENSSL, inode=(1, 3))])
    world.process.refuses = {attempt}
    world.look()
    assert isinstance(world.watched.failed, ProcessLookupError)
    parts = [part for part, on in world.watched.attached.items() if on]
    assert set(world.process.open.values()) == set(parts)
    assert len(parts) == (attempt - 1) // 2
    world.watched.stop(world.process.now)
    assert world.process.open == {}


def test_what_was_refused_is_not_tried_again() -> None:
    world = World()
    world.process.refuses = {1}
    world.go(20.0, calls=10.0)
    assert world.process.attempts == 1


def test_a_process_that_is_gone_has_no_probes_and_no_next_look() -> None:
    world = World()
    world.go(1.0, calls=10.0, uploads=10.0)
    assert world.process.open
    world.process.gone = True
    assert world.watched.step(world.process.now) is None
    assert world.process.open == {}
    assert world.watched.attached == {"time": False, "value": False}


def test_a_stop_takes_all_off_at_once_and_twice_is_no_harm() -> None:
    world = World(time=None, value=None)
    world.look()
    assert world.process.open
    for _ in range(2):
        world.watched.stop(world.process.now)
        assert world.process.open == {}
        assert world.watched.attached == {"time": False, "value": False}


# --- What is told ------------------------------------------------------------------------------------------------


def hashed(world: World) -> list[dict[str, Any]]:
    return [message for message in world.told if message["op"] == "hashed"]


def test_each_window_is_told_once_with_its_calls_and_without_the_probes_own_time() -> None:
    world = World()
    world.go(120.0, calls=20_000.0)
    told = hashed(world)
    assert len(told) > 5
    assert sum(message["calls"] for message in told) == pytest.approx(world.process.calls, abs=world.process.calls / len(told))
    for message in told:
        assert message["tgid"] == TGID
        assert message["bytes"] == message["calls"] * world.process.bytes_a_call
        assert message["ns"] == pytest.approx(message["calls"] * world.process.ns_a_call, rel=1e-6)
        assert 0 < message["until"] - message["from"] <= TELL_NS + LATE_NS
    for before, after in pairwise(told):
        assert before["until"] <= after["from"]


def test_while_probes_stay_it_is_told_about_once_a_second() -> None:
    world = World()
    world.go(20.0, calls=100.0)
    told = hashed(world)
    assert 15 <= len(told) <= 20
    assert [message["from"] for message in told[1:]] == [message["until"] for message in told[:-1]], "without a break"


def test_nothing_is_told_of_a_process_that_does_not_hash() -> None:
    world = World()
    world.go(20.0, calls=0.0)
    assert hashed(world) == []


def test_a_call_that_took_less_than_the_probes_do_is_no_negative_time() -> None:
    process = Process()
    process.ns_a_call = -PRICES.inside
    world = World(process=process)
    world.go(5.0, calls=100.0)
    assert {message["ns"] for message in hashed(world)} == {0}


@pytest.mark.parametrize("part", PARTS)
def test_from_when_until_when_all_is_seen_is_told_and_never_too_long(part: Part) -> None:
    """From when the last link was there, until before the first went."""
    process = Process()
    process.attach_ns, process.detach_ns = 12 * MS, 30 * MS
    world = World(process=process)
    world.go(120.0, **{"time": {"calls": 60_000.0}, "value": {"calls": 0.0, "uploads": 20_000.0}}[part])
    world.watched.stop(process.now)
    told = [(message["on"], message["at"]) for message in world.told if message["op"] == "probing" and message["part"] == part]
    assert [on for on, _ in told] == [number % 2 == 0 for number in range(len(told))]
    assert len(told) > 4
    seen = sum(off - on for (_, on), (_, off) in zip(told[::2], told[1::2], strict=True))
    windows = len(told) // 2
    assert seen == process.on_ns[part] - windows * (process.attach_ns + process.detach_ns)


# --- The account by itself ---------------------------------------------------------------------------------------


def test_an_account_without_a_limit_is_never_empty_nor_lacks() -> None:
    account = Account("time", None)
    account.spend(1e12, 1)
    assert not account.is_empty
    assert account.has_enough
    assert account.lasts_ns() == LATE_NS


def test_an_account_goes_by_how_fast_it_was_spent_last() -> None:
    account = Account("time", 0.01)
    account.spend(10.0 * MS, 100 * MS)
    assert account.is_empty
    account.earn(600 * MS)
    assert account.balance_ns == pytest.approx(1 * MS)
    assert account.lasts_ns() == pytest.approx(10 * MS)
    assert not account.has_enough, "three times as much would be spent before it is worth while"
    account.earn(200 * MS)
    assert account.has_enough


def test_sums_of_a_while() -> None:
    assert Sums(10, 100, 1_000, 5, 3).since(Sums(4, 40, 400, 5, 1)) == Sums(6, 60, 600, 0, 2)

# SPDX-License-Identifier: Apache-2.0
"""How much of a process's hashing is looked at: probes come and go so that they cost no more than the budget allows.

A probe costs when it is hit, some microseconds each time. What a hit costs is measured at the start (selftest.py), hits are
counted in the kernel, and what the process itself takes of the CPU is read beside it. So each process has two accounts, one for
the time of its digests and one for their values: a share of its CPU time is paid in, each hit is taken out. Probes go on when
there is enough for a while, and off when there is nothing left. Where digests are few they simply stay on; where they are many
that makes short windows, the further apart the more there are. What was spent never exceeds the share by more than the grant
that an account begins with and what is spent between two looks at it; what was overdrawn is waited for.

Pure: the kernel and the clock are given. Times in ns, CLOCK_MONOTONIC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from bucketprobe.providers import Provider, Site

Part = Literal["time", "value"]
PARTS: tuple[Part, ...] = ("time", "value")

#: With what an account begins, and up to what it is filled again, ns: a thousand hits and more. What a quiet time leaves is little, so
#: that a busy one keeps its share by itself.
GRANT_NS = {"time": 5_000_000, "value": 10_000_000}
MOST_NS = {"time": 5_000_000, "value": 5_000_000}
#: For how long there must be enough before probes go on again: some calls, or some whole uploads.
AHEAD_NS = {"time": 30_000_000, "value": 1_000_000_000}
#: How soon the accounts are looked at after probes went on; and while they are, at most how late, where they are hit and where not.
SOON_NS, BUSY_NS, LATE_NS = 10_000_000, 50_000_000, 200_000_000
#: How often a process is looked at that has none on.
PAUSE_NS = 250_000_000
#: A hit amid a server's work costs more than one of many in a row: what it needs is not in the caches, and what it pushes out of
#: them is missed afterwards. By so much the call takes longer, and by so much the server loses (`make bench`, part digest).
IN_CALL, IN_SITU = 1.75, 3.6
#: How often what was measured is told while probes stay on.
TELL_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """What one hit costs the process, ns. `entry`: of a probe whose instruction the kernel emulates; `pair`: with the one at the
    function's return; `final`: that pair where it reads a digest; `step`: of a probe whose instruction is single-stepped, of which
    only the most is known. `inside`: what of a pair lies within the time that it measures. `measured`: whether the others were, on
    this host; else they are the most that was ever seen, in a virtual machine."""

    entry: float = 12_000.0
    pair: float = 24_000.0
    final: float = 26_000.0
    step: float = 24_000.0
    inside: float = 1_000.0
    measured: bool = False

    def call(self, sites: Iterable[Site]) -> float:
        """What one call costs with all of these attached; a copy of a state is counted by itself."""
        by_program = {site.program: site for site in sites if site.program != "digest_copied"}.values()
        total = 0.0
        for site in by_program:
            if site.returns:
                total += self.pair - self.entry
            else:
                total += self.entry if site.emulated else self.step
            if site.program in ("digest_finished", "go_sum"):
                total += self.final - self.pair
        return total


@dataclass(frozen=True, slots=True)
class Sums:
    """The kernel's sums over one process's digests (see abi.HashingEntry)."""

    calls: int = 0
    bytes: int = 0
    ns: int = 0
    copies: int = 0
    digests: int = 0

    def since(self, before: Sums) -> Sums:
        return Sums(*(getattr(self, name) - getattr(before, name) for name in Sums.__slots__))


class Kernel(Protocol):
    """What this needs of the kernel. `attach` raises OSError; `sums` and `cpu_ns` are None for a process that is gone."""

    def attach(self, provider: Provider, sites: Sequence[Site], tgid: int) -> list[int]: ...

    def detach(self, descriptors: list[int]) -> None: ...

    def sums(self, tgid: int) -> Sums | None: ...

    def cpu_ns(self, tgid: int) -> int | None: ...

    def now_ns(self) -> int: ...


@dataclass(slots=True)
class Account:
    """What probes of one kind may cost one process. `share`: of its CPU time; None: there is no limit."""

    part: Part
    share: float | None
    balance_ns: float = 0.0
    spent_ns: float = 0.0
    price_rate: float = 0.0  # spent per ns of wall time, when probes were on last

    def __post_init__(self) -> None:
        self.balance_ns = float(GRANT_NS[self.part]) if self.share else 0.0

    def earn(self, cpu_ns: int) -> None:
        most = max(self.balance_ns, float(MOST_NS[self.part]))
        self.balance_ns = min(self.balance_ns + (self.share or 0.0) * cpu_ns, most)

    def spend(self, ns: float, wall_ns: int) -> None:
        self.spent_ns += ns
        self.balance_ns -= ns
        if wall_ns > 0:
            self.price_rate = ns / wall_ns

    @property
    def is_empty(self) -> bool:
        return self.share is not None and self.balance_ns <= 0

    @property
    def has_enough(self) -> bool:
        if self.share is None:
            return True
        return self.balance_ns > 0 and self.balance_ns >= min(AHEAD_NS[self.part] * self.price_rate, MOST_NS[self.part] / 2)

    def lasts_ns(self) -> float:
        """For how long what there is lasts, as it went lately."""
        return self.balance_ns / self.price_rate if self.share is not None and self.price_rate else float(LATE_NS)


class Watched:
    """The digests of one process. `tell` is given what was measured, as a message for the agent; `may_time`: whether its calls may be
    timed now, or others are that run the same (`family`)."""

    def __init__(
        self,
        tgid: int,
        providers: Sequence[Provider],
        prices: Prices,
        shares: dict[Part, float | None],
        kernel: Kernel,
        tell: Callable[[dict[str, Any]], None],
        may_time: Callable[[], bool] = lambda: True,
    ) -> None:
        self.tgid = tgid
        self.found: Sequence[Provider] = providers  # of which those are left that may be used
        self.failed: OSError | None = None
        self.cpu_spent_ns = 0
        self.windows = 0
        self.accounts = {part: Account(part, shares[part]) for part in PARTS}
        self._prices = prices
        self._kernel = kernel
        self._tell = tell
        self._may_time = may_time
        self.family = ""
        self._on: dict[Part, list[int]] = {}  # descriptors
        self._sites: dict[Part, list[tuple[Provider, Sequence[Site]]]] = {
            "time": [(each, each.time) for each in providers if each.time],
            "value": [(each, each.value) for each in providers if each.value],
        }
        self._price = {part: IN_SITU * max((prices.call(sites) for _, sites in self._sites[part]), default=0.0) for part in PARTS}
        #: ns that a timed call takes longer because of its probes, besides what they see of it themselves.
        self.outside_ns = max(0.0, self._price["time"] * IN_CALL / IN_SITU - prices.inside)
        self._copy_price = IN_SITU * prices.entry
        self._sums: Sums | None = None
        self._told = Sums()
        self._told_ns = 0
        self._cpu_ns: int | None = None
        self._looked_ns = 0

    @property
    def attached(self) -> dict[Part, bool]:
        return {part: part in self._on for part in PARTS}

    @property
    def descriptors(self) -> list[int]:
        """Of all that is attached."""
        return [fd for attached in self._on.values() for fd in attached]

    def step(self, now_ns: int) -> int | None:
        """Looks at the accounts, and puts probes on or takes them off. When to do so again; None: the process is gone."""
        sums, cpu_ns = self._kernel.sums(self.tgid), self._kernel.cpu_ns(self.tgid)
        if sums is None or cpu_ns is None:
            self.stop(now_ns)
            return None
        self._account(now_ns, sums, cpu_ns)
        changes = False
        for part in PARTS:
            account = self.accounts[part]
            if account.share == 0 or not self._sites[part]:
                continue
            if part in self._on:
                if account.is_empty:
                    self._tell_time(now_ns, sums)
                    self._take_off(part, now_ns)
                    changes = True
            elif not self.failed and account.has_enough and (part == "value" or self._may_time()):
                self._put_on(part, now_ns)
                changes = True
        if "time" in self._on and now_ns - self._told_ns >= TELL_NS:
            self._tell_time(now_ns, sums)
        if changes:
            return now_ns + SOON_NS
        if not self._on:
            return now_ns + PAUSE_NS
        lasts = min(self.accounts[part].lasts_ns() for part in self._on)
        late = BUSY_NS if "time" in self._on and self.accounts["time"].price_rate else LATE_NS
        return now_ns + int(min(max(lasts, SOON_NS), late))

    def stop(self, now_ns: int) -> None:
        """Takes all probes off."""
        for part in list(self._on):
            self._take_off(part, now_ns)

    def _take_off(self, part: Part, now_ns: int) -> None:
        self._tell({"op": "probing", "tgid": self.tgid, "part": part, "on": False, "at": now_ns})
        self._kernel.detach(self._on.pop(part))

    def _account(self, now_ns: int, sums: Sums, cpu_ns: int) -> None:
        if self._sums is None or self._cpu_ns is None:
            self._sums, self._told, self._told_ns = sums, sums, now_ns
        else:
            new, wall_ns = sums.since(self._sums), now_ns - self._looked_ns
            used = max(0, cpu_ns - self._cpu_ns)
            self.cpu_spent_ns += used
            spent = {
                "time": new.calls * self._price["time"] + new.copies * self._copy_price,
                "value": new.digests * self._price["value"],
            }
            for part in PARTS:
                self.accounts[part].earn(used)
                if part in self._on or spent[part]:
                    self.accounts[part].spend(spent[part], wall_ns)
            self._sums = sums
        self._cpu_ns, self._looked_ns = cpu_ns, now_ns

    def _put_on(self, part: Part, now_ns: int) -> None:
        attached: list[int] = []
        try:
            for provider, sites in self._sites[part]:
                attached += self._kernel.attach(provider, sites, self.tgid)
        except OSError as error:
            self._kernel.detach(attached)
            self.failed = error
            return
        self._on[part] = attached
        self.windows += 1
        self._tell({"op": "probing", "tgid": self.tgid, "part": part, "on": True, "at": self._kernel.now_ns()})
        if part == "time" and self._sums:
            self._told, self._told_ns = self._sums, now_ns

    def _tell_time(self, now_ns: int, sums: Sums) -> None:
        new = sums.since(self._told)
        if new.calls:
            self._tell(
                {
                    "op": "hashed",
                    "tgid": self.tgid,
                    "calls": new.calls,
                    "bytes": new.bytes,
                    "ns": max(0, round(new.ns - new.calls * self._prices.inside)),
                    "from": self._told_ns,
                    "until": now_ns,
                }
            )
        self._told, self._told_ns = sums, now_ns

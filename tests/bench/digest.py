# SPDX-License-Identifier: Apache-2.0
"""What looking at digests costs a service, over what the agent costs it anyway: uploads with `--digest off`, `auto` and `always`.

The budget is a few thousandths of the service's CPU, which no two runs of anything have in common. So nothing is started between
what is compared: there are two servers of each case, each with an agent of its own, one that looks at digests and one that does not,
and they are asked in turns of half a second, off on, on off. Then agents change places, so that what else differs between the two
servers cancels out. Servers have one CPU, clients and agents the others.

An account of the agent begins with a grant, and what is compared is the time after that: it is spent before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from figures import Part, Spent, alternate, differences, relative, relative_interval
from host import file_system, system_call_tracers
from rig import Agent, Bucket, Rig, on_cpus
from uploads import Uploads

from bucketprobe.config import DigestSpec
from bucketprobe.digests import GRANT_NS, PARTS
from bucketprobe.errors import BucketprobeError

KIB = 1 << 10
#: As many server processes as clients, so that the servers' CPU is never idle; more would only share one account among more.
WORKERS = 2
PIECES = 4
#: What a hit is priced by: a call that is timed, and one that gives a value.
PROBES = ("update", "final")
ATTACH_SECONDS = 30.0
#: The broker tells its accounts once a second.
TOLD_SECONDS = 1.2
#: How grants are spent: by uploads of so many bytes, so that hits are many and cost much of the CPU, until that share of them is gone.
SPEND_BYTES, SPENT, SPEND_LOOKS = KIB, 0.9, 3
SPEC = DigestSpec()
SHARES: dict[str, float] = {"time": SPEC.time_budget_pct / 100, "value": (SPEC.total_budget_pct - SPEC.time_budget_pct) / 100}
#: An agent reads its events at least every 100 ms: what one has left over must not be another's.
DRAIN_SECONDS = 0.12

COST, TARGET_CPU, ATTACHED, PRICE = (
    f"bucketprobe_{name}" for name in ("digest_cost_seconds_total", "target_cpu_seconds_total", "digest_attached", "digest_hit_seconds")
)


@dataclass(frozen=True, slots=True)
class Case:
    """Uploads of `size` bytes, hashed in pieces of `chunk` bytes. `goal`: what may be lost, per cent."""

    name: str
    chunk: int
    size: int
    goal: float | None


CASES = (
    Case("pieces of 16 KiB", 16 * KIB, PIECES * 16 * KIB, None),
    Case("pieces of 64 KiB", 64 * KIB, PIECES * 64 * KIB, 0.5),
    Case("pieces of 256 KiB", 256 * KIB, PIECES * 256 * KIB, 0.5),
    Case("pieces of 1 MiB", 1024 * KIB, PIECES * 1024 * KIB, 0.5),
    Case("whole uploads of 16 KiB", 64 * KIB, 16 * KIB, 1.0),
)


@dataclass(frozen=True, slots=True)
class Round:
    """One stretch of load on one server. `cpu_ns`: of the server's processes, user and system; `agent_ns`: of its agent and broker."""

    uploads: int
    seconds: float
    cpu_ns: int
    agent_ns: int = 0

    @property
    def agent_us(self) -> float:
        """CPU time of agent and broker per upload."""
        return self.agent_ns / self.uploads / 1e3


#: Two rounds next to each other: without looking at digests, and with.
Rounds = tuple[Round, Round]


@dataclass(slots=True)
class Compared:
    """What came of one case. `auto`: by stage; `accounts`: by mode, the cost that the agent itself says, relative to the servers' CPU."""

    auto: list[list[Rounds]]
    always: list[Rounds]
    accounts: dict[str, list[float]]


def measure(rig: Rig) -> Part:
    kind = file_system(rig.store, Path("/proc/mounts").read_text())
    part = Part("digest", note(rig, kind))
    servers, others = cpus()
    found = {case: Compared([], [], {"auto": [], "always": []}) for case in CASES}
    prices: dict[str, list[float]] = {probe: [] for probe in PROBES}
    with on_cpus(others), ExitStack() as stack:
        sides = [{case: stack.enter_context(server(rig, case, servers)) for case in CASES} for _ in range(2)]
        for stage, (off, on) in enumerate([(0, 1), (1, 0)]):
            compare(rig, part, f"auto, stage {stage + 1} of 2", "auto", sides[off], sides[on], rig.plan.digest_pairs, found, prices)
        compare(rig, part, "always", "always", sides[1], sides[0], rig.plan.digest_always_pairs, found, prices)
    for probe, seconds in prices.items():
        part.add(f"price of a hit, {probe}", "us", [1e6 * each for each in seconds])
    for case, compared in found.items():
        add(part, case, compared)
    return part


def note(rig: Rig, kind: str) -> str:
    plan = rig.plan
    return (
        f"closed loop of {WORKERS} connections that only upload, prefork server with {WORKERS} processes and --fill on a CPU of its own,"
        f" clients and agents on the others, store on {kind}; bodies of {PIECES} pieces; agents with --digest off and with another mode"
        f" on two like servers, 2 times {plan.digest_pairs} rounds of {plan.digest_round_s:g} s each interleaved, agents changing places"
        " at half-time; always for scale only; means over all rounds with a 95 % interval by bootstrap; account: what the agent itself says"
    )


def cpus() -> tuple[set[int], set[int]]:
    """Those for servers and those for everything else; all for both where there is one."""
    first, *others = sorted(os.sched_getaffinity(0))
    return ({first}, set(others)) if others else ({first}, {first})


def server(rig: Rig, case: Case, cpus: set[int]) -> AbstractContextManager[Bucket]:
    return rig.bucket("prefork", "--chunk-size", str(case.chunk), "--fill", workers=WORKERS, cpus=cpus)


def compare(
    rig: Rig,
    part: Part,
    name: str,
    mode: str,
    off: Mapping[Case, Bucket],
    on: Mapping[Case, Bucket],
    pairs: int,
    found: Mapping[Case, Compared],
    prices: Mapping[str, list[float]],
) -> None:
    """One stage: an agent that does not look at digests on one side's servers, one that does on the other's."""
    rig.progress(f"{part.name}: {name}")
    with rig.agent([*target(off), "--digest", "off"]) as idle, rig.agent([*target(on), "--digest", mode]) as looking:
        await_attached(looking, len(CASES) * WORKERS)
        metrics = looking.metrics()
        for probe, seconds in prices.items():
            seconds.append(metrics[f'{PRICE}{{probe="{probe}"}}'])
        own = {idle.broker_pid, looking.broker_pid}
        for case in CASES:
            rig.progress(f"{part.name}: {name}, {case.name}")
            buckets, agents = (off[case], on[case]), (idle, looking)
            clients = [Uploads(bucket.port, case.size, WORKERS) for bucket in buckets]
            if mode == "auto":
                spend_grants(looking, on[case], SPEND_LOOKS)
            for side in (False, True):
                run(rig, buckets[side], agents[side], clients[side])
            time.sleep(TOLD_SECONDS)
            before = accounts(looking)
            rounds: list[Rounds] = []
            for order in alternate(pairs):
                by_side = {}
                for side in order:
                    by_side[side] = run(rig, buckets[side], agents[side], clients[side])
                rounds.append((by_side[False], by_side[True]))
                part.pairs += 1
                part.disturbed += not system_call_tracers() <= own
            time.sleep(TOLD_SECONDS)
            found[case].accounts[mode].append(accounts(looking).since(before).share)
            if mode == "always":
                found[case].always = rounds
            else:
                found[case].auto.append(rounds)


def target(servers: Mapping[Case, Bucket]) -> list[str]:
    options = ["--metadata", "*.json"]
    for bucket in servers.values():
        options += ["--port", str(bucket.port), "--storage-root", str(bucket.root)]
    return options


def await_attached(agent: Agent, processes: int) -> None:
    """Until it looks at digests of at least so many processes. Raises BucketprobeError."""
    deadline = time.monotonic() + ATTACH_SECONDS
    while agent.metrics()[f'{ATTACHED}{{part="value"}}'] < processes:
        if time.monotonic() > deadline:
            raise BucketprobeError("The agent found no digests to look at in the reference Bucket: see what its log says of them.")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Accounts:
    """By the agent's own account, CPU seconds so far: what digests cost by what they were looked at for, and what the servers used."""

    cost: Mapping[str, float]
    cpu: float

    def since(self, before: Accounts) -> Accounts:
        return Accounts({name: value - before.cost[name] for name, value in self.cost.items()}, self.cpu - before.cpu)

    @property
    def share(self) -> float:
        """Of the servers' CPU. Raises BucketprobeError where the agent saw none of it."""
        if self.cpu <= 0:
            raise BucketprobeError("The agent does not tell what its targets use of the CPU: run the bench again.")
        return sum(self.cost.values()) / self.cpu


def accounts(agent: Agent) -> Accounts:
    metrics = agent.metrics()
    return Accounts({name: metrics[f'{COST}{{part="{name}"}}'] for name in PARTS}, metrics.get(TARGET_CPU, 0.0))


def spend_grants(agent: Agent, bucket: Bucket, looks: int) -> None:
    """Until little is left of what the accounts of this server's processes began with, or for so many looks."""
    clients = Uploads(bucket.port, SPEND_BYTES, WORKERS)
    begin = before = accounts(agent)
    for _ in range(looks):
        bucket.clear()
        clients.run(TOLD_SECONDS)
        now = accounts(agent)
        if are_spent(now.since(begin), now.since(before)):
            break
        before = now


def are_spent(ever: Accounts, lately: Accounts) -> bool:
    """Whether each grant is spent, or is not going to be, as hits cost less than what is paid in."""
    return all(
        ever.cost[name] - SHARES[name] * ever.cpu >= SPENT * WORKERS * GRANT_NS[name] / 1e9
        or lately.cost[name] <= SHARES[name] * lately.cpu
        for name in PARTS
    )


def run(rig: Rig, bucket: Bucket, agent: Agent, clients: Uploads) -> Round:
    bucket.clear()
    before, agent_before = bucket.cpu_ns(), sum(agent.cpu_ns())
    done = clients.run(rig.plan.digest_round_s)
    cpu_ns = bucket.cpu_ns() - before
    time.sleep(DRAIN_SECONDS)
    return Round(done.uploads, done.seconds, cpu_ns, sum(agent.cpu_ns()) - agent_before)


def add(part: Part, case: Case, compared: Compared) -> None:
    """Figures of one case; added and lost in per cent of what it is without looking at digests."""
    for mode, stages, goal in (("auto", compared.auto, case.goal), ("always", [compared.always], None)):
        cpu = [[(cpu_spent(off), cpu_spent(on)) for off, on in rounds] for rounds in stages]
        samples = [100 * (ratio - 1) for ratio in crossed(cpu)]
        mean, low, high = (100 * (ratio - 1) for ratio in relative_interval(cpu))
        part.add(f"{case.name}: {mode}: server CPU per upload, added", "% (mean, 95 %)", samples, goal, (mean, low, high))
        wall = [[(wall_spent(off), wall_spent(on)) for off, on in rounds] for rounds in stages]
        samples = [100 * (1 - 1 / ratio) for ratio in crossed(wall)]
        mean, low, high = (100 * (1 - 1 / ratio) for ratio in relative_interval(wall))
        part.add(f"{case.name}: {mode}: uploads per second, lost", "% (mean, 95 %)", samples, goal, (mean, low, high))
        added = differences([(off.agent_us, on.agent_us) for rounds in stages for off, on in rounds])
        part.add(f"{case.name}: {mode}: agent + broker CPU per upload, added", "us", added)
        part.add(f"{case.name}: {mode}: account", "% of server CPU", [100 * value for value in compared.accounts[mode]])
    off_rounds = [off for rounds in compared.auto for off, _ in rounds]
    part.add(f"{case.name}: server CPU per upload, off", "us", [each.cpu_ns / each.uploads / 1e3 for each in off_rounds])
    part.add(f"{case.name}: agent + broker CPU per upload, off", "us", [each.agent_us for each in off_rounds])
    part.add(f"{case.name}: uploads per second, off", "1/s", [each.uploads / each.seconds for each in off_rounds])


def cpu_spent(each: Round) -> Spent:
    return each.cpu_ns, each.uploads


def wall_spent(each: Round) -> Spent:
    return each.seconds, each.uploads


def crossed(stages: Sequence[Sequence[tuple[Spent, Spent]]]) -> list[float]:
    """The ratio of each pair, together with its like of the other stage."""
    return [relative([[pair] for pair in pairs]) for pairs in zip(*stages, strict=True)]

# SPDX-License-Identifier: Apache-2.0
"""Whether looking at digests keeps its budget when uploads become ten times as many, by the agent's own account.

That account is hits counted in the kernel, at the price of one. Whether the price is right is what the part "digest" shows: there
the cost of `--digest always` is both measured and accounted.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from digest import KIB, SPEC, TOLD_SECONDS, WORKERS, accounts, await_attached, cpus, spend_grants
from figures import Part, largest_share
from rig import Agent, Rig, on_cpus
from uploads import Done, Uploads

SIZE = 64 * KIB
#: Uploads per second, one after the other.
RATES = (100.0, 1_000.0)
LOOK_SECONDS = 1.0
SPEND_LOOKS = 20
SPAN_SECONDS = 10.0
BUDGET_PCT = SPEC.total_budget_pct
PERCENT = "% of server CPU"

#: When it was read, and the CPU seconds that digests had cost and that the server had used until then.
Reading = tuple[float, float, float]


def measure(rig: Rig) -> Part:
    part = Part("budget", note(rig.plan.budget_phase_s))
    servers, others = cpus()
    with on_cpus(others), rig.bucket("prefork", workers=WORKERS, cpus=servers) as bucket:
        target = ["--port", str(bucket.port), "--storage-root", str(bucket.root), "--metadata", "*.json", "--digest", "auto"]
        with rig.agent(target) as agent:
            await_attached(agent, WORKERS)
            clients = Uploads(bucket.port, SIZE, WORKERS)
            rig.progress("budget: spending what accounts begin with")
            spend_grants(agent, bucket, SPEND_LOOKS)
            readings: list[Reading] = []
            for rate in RATES:
                bucket.clear()
                rig.progress(f"budget: {rate:,g} uploads per second")
                done, found = observed(agent, clients, rig.plan.budget_phase_s, rate)
                part.add(f"{rate:,g} uploads per second: reached", "1/s", [done.rate])
                part.add(f"{rate:,g} uploads per second: account", PERCENT, [100 * largest_share([found[0], found[-1]], 0.0)], BUDGET_PCT)
                readings += found
    part.add(f"largest account of any {SPAN_SECONDS:g} s", PERCENT, [100 * largest_share(readings, SPAN_SECONDS)], BUDGET_PCT)
    return part


def note(seconds: float) -> str:
    slow, fast = RATES
    return (
        f"whole uploads of {SIZE // KIB} KiB, {slow:,g} and then {fast:,g} per second for {seconds:g} s each, to a prefork server with"
        f" {WORKERS} processes; --digest auto, after what its accounts begin with was spent; account: what the agent itself says, read"
        " each second"
    )


def observed(agent: Agent, clients: Uploads, seconds: float, rate: float) -> tuple[Done, list[Reading]]:
    """A load, and readings from its begin until all of it is told."""
    readings = [reading(agent)]
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(clients.run, seconds, rate)
        while not load.done():
            time.sleep(LOOK_SECONDS)
            readings.append(reading(agent))
        done = load.result()
    time.sleep(TOLD_SECONDS)
    return done, [*readings, reading(agent)]


def reading(agent: Agent) -> Reading:
    now = accounts(agent)
    return time.monotonic(), sum(now.cost.values()), now.cpu

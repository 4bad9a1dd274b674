# SPDX-License-Identifier: Apache-2.0
"""What the agent costs a service under full load: a closed loop of clients on the reference Bucket, with and without it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from figures import Part, differences, ratios, size_text
from host import file_system
from rig import CONNECTIONS, DRAIN_SECONDS, Agent, Bucket, Rig

WARM_UP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One stretch of load. `server_us`: the server's CPU time per request; `agent_ms`: agent's and broker's per 1,000 requests.

    `reported_pct`: requests that the agent has a record of, in % of those sent; `lost`: losses of all kinds that it counted.
    """

    requests_per_s: float
    server_us: float
    agent_ms: float = 0.0
    reported_pct: float = 0.0
    lost: float = 0.0


def measure(rig: Rig) -> Part:
    kind = file_system(rig.store, Path("/proc/mounts").read_text())
    note = f"closed loop of {CONNECTIONS} connections, 70 % PUT, store on {kind}, agent off and on interleaved, {rig.plan.arm_s:g} s each"
    part = Part("throughput", note)
    for model, size in rig.plan.cases:
        measure_case(rig, part, model, size)
    return part


def measure_case(rig: Rig, part: Part, model: str, size: int) -> None:
    name = f"{model}, {size_text(size)}"
    with rig.bucket(model) as bucket:
        rig.load(bucket.port, size, seconds=WARM_UP_SECONDS)

        def work(agent: Agent | None) -> Arm:
            return run_arm(rig, bucket, size, agent)

        target = ["--port", str(bucket.port), "--storage-root", str(bucket.root), "--metadata", "*.json"]
        pairs = rig.pairs(part, f"{name}: ", rig.plan.throughput_pairs, target, work)
    rates = [(off.requests_per_s, on.requests_per_s) for off, on in pairs]
    server = [(off.server_us, on.server_us) for off, on in pairs]
    part.add(f"{name}: requests per second", "on/off", ratios(rates))
    part.add(f"{name}: server CPU per request", "on/off", ratios(server))
    part.add(f"{name}: server CPU per request, added", "us", differences(server))
    part.add(f"{name}: agent + broker CPU", "ms per 1,000 requests", [on.agent_ms for _, on in pairs])
    part.add(f"{name}: requests with a record", "%", [on.reported_pct for _, on in pairs])
    part.add(f"{name}: losses counted", "per arm", [on.lost for _, on in pairs])
    part.add(f"{name}: requests per second, agent off", "1/s", [off for off, _ in rates])
    part.add(f"{name}: server CPU per request, agent off", "us", [off for off, _ in server])


def run_arm(rig: Rig, bucket: Bucket, size: int, agent: Agent | None) -> Arm:
    bucket.clear()
    server_before, agent_before = bucket.cpu_ns(), sum(agent.cpu_ns()) if agent else 0
    result = rig.load(bucket.port, size, seconds=rig.plan.arm_s)
    requests = result["requests"]
    arm = Arm(result["requests_per_s"], (bucket.cpu_ns() - server_before) / requests / 1e3)
    if not agent:
        return arm
    time.sleep(DRAIN_SECONDS)
    agent_ms = (sum(agent.cpu_ns()) - agent_before) / requests / 1e6 * 1000
    status = agent.status()
    return Arm(arm.requests_per_s, arm.server_us, agent_ms, 100 * status["records"] / requests, sum(status["lost"].values()))

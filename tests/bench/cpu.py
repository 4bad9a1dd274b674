# SPDX-License-Identifier: Apache-2.0
"""CPU time of the agent itself: at a steady rate of small requests, and with none."""

from __future__ import annotations

import time

from figures import Part
from rig import DRAIN_SECONDS, Agent, Bucket, Rig

RATE = 500
SIZE = 8 << 10
IDLE_SECONDS = 2.0


def measure(rig: Rig) -> Part:
    part = Part("cpu", f"threads server, {RATE} requests per second of 8 KiB for {rig.plan.cpu_s:g} s; idle for {IDLE_SECONDS:g} s")
    with rig.bucket("threads") as bucket:
        rig.load(bucket.port, SIZE, seconds=1)
        samples: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for i in range(rig.plan.cpu_runs):
            for records in (True, False):
                rig.progress(f"cpu: run {i + 1} of {rig.plan.cpu_runs}, {'with' if records else 'without'} records")
                target = ["--port", str(bucket.port), "--storage-root", str(bucket.root), "--metadata", "*.json"]
                with rig.agent(target, records=records) as agent:
                    samples[records].append(run_steady(rig, bucket, agent))
                bucket.clear()
    for records, runs in samples.items():
        name = "--records FILE" if records else "metrics only"
        for who in ("agent", "broker"):
            part.add(f"{name}: {who}", "ms per 1,000 requests", [run[who] for run in runs])
        part.add(f"{name}: agent + broker / server", "ratio of CPU times", [run["share"] for run in runs])
    every = [run for runs in samples.values() for run in runs]
    part.add("idle: agent + broker", "ms per second", [run["idle"] for run in every])
    part.add("requests per second", "1/s", [run["rate"] for run in every])
    return part


def run_steady(rig: Rig, bucket: Bucket, agent: Agent) -> dict[str, float]:
    """CPU times in ms per 1,000 requests; `share`: agent's and broker's in relation to the server's; `idle` in ms per s."""
    time.sleep(0.5)  # what it does once after its start is no part of this
    idle_before = sum(agent.cpu_ns())
    time.sleep(IDLE_SECONDS)
    idle = (sum(agent.cpu_ns()) - idle_before) / 1e6 / IDLE_SECONDS
    server_before, before = bucket.cpu_ns(), agent.cpu_ns()
    result = rig.load(bucket.port, SIZE, seconds=rig.plan.cpu_s, rate=RATE)
    time.sleep(DRAIN_SECONDS)
    own, broker = (now - then for now, then in zip(agent.cpu_ns(), before, strict=True))
    requests = result["requests"]
    return {
        "agent": own / 1e3 / requests,
        "broker": broker / 1e3 / requests,
        "share": (own + broker) / (bucket.cpu_ns() - server_before),
        "idle": idle,
        "rate": result["requests_per_s"],
    }

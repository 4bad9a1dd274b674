# SPDX-License-Identifier: Apache-2.0
"""What it costs to tell whose file work is whose: the agent's CPU time and events per request by server model, and the resolver's part.

Live, a real agent is asked before and after a load. What of its time was spent on what comes from a recording of the same
server's events: see replay.py.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from figures import Part
from replay import Cost, Recording, costs
from rig import DRAIN_SECONDS, Rig

from bucketprobe import abi, bpf
from bucketprobe.config import Settings, StorageSpec, TargetSpec
from bucketprobe.errors import BucketprobeError
from bucketprobe.link import BrokerLink
from bucketprobe.stats import read_stats
from bucketprobe.tracker import HOLD_NS

sys.path.append(str(Path(__file__).resolve().parents[1] / "truth"))
import servers

#: From the one that needs no evidence to those that need more and more of it.
MODELS = ("threads", "asyncio", "asyncio-pool", "go")
#: What others are compared with.
BASE = "threads"
#: Many at once: then there are many whose work it may be.
CONNECTIONS = 32
#: Of different sizes, as those of clients are: a size is evidence.
SIZES = {"min_bytes": 1 << 10, "max_bytes": 128 << 10}
#: Nobody reads it while it is recorded.
RECORDING_BYTES = 16 << 20
SETTLE_SECONDS = HOLD_NS / 1e9 + DRAIN_SECONDS

CPU, RECORDS, EVENTS, LOST = (f"bucketprobe_{name}_total" for name in ("process_cpu_seconds", "records", "events", "lost"))


def measure(rig: Rig) -> Part:
    runs = rig.plan.resolver_runs
    live: dict[str, list[dict[str, float]]] = {}
    recordings: dict[str, Recording] = {}
    with ExitStack() as stack:
        running = started(rig, stack)
        for run in range(runs):
            for model, target in running.items():
                rig.progress(f"resolver: {model}, run {run + 1} of {runs}")
                live.setdefault(model, []).append(run_live(rig, target))
        for model, target in running.items():
            rig.progress(f"resolver: {model}, recording")
            recordings[model] = record(rig, target, statistics.median(run["rate"] for run in live[model]))
    part = Part("resolver", note(rig.plan.resolver_requests, [model for model in MODELS if model not in running]))
    for model, recording in recordings.items():
        rig.progress(f"resolver: {model}, playing the recording")
        add_live(part, model, live[model], live[BASE])
        add_replay(part, model, recording.bytes_per_request, costs(recording, runs))
    return part


def note(requests: int, absent: Sequence[str]) -> str:
    without = f"; without {', '.join(absent)}, which this host cannot run" if absent else ""
    return (
        f"agent CPU, events and losses: a live agent with --records FILE, {requests:,} requests of 1 to 128 KiB in a closed loop of"
        f" {CONNECTIONS} connections, models in turns; decoding, tracking and resolving: CPU time of the agent's code on one recording"
        " of such a load at the same rate, tracking with metrics and records, resolving what it takes beyond tracking with nothing decided"
        f"{without}"
    )


def add_live(part: Part, model: str, runs: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> None:
    """`base`: the runs of the model that it is compared with, each next to one of its own."""

    def add(what: str, unit: str, name: str) -> None:
        part.add(f"{model}: {what}", unit, [run[name] for run in runs])

    add("agent CPU", "us per request", "cpu_us")
    if model != BASE:
        relative = [run["cpu_us"] / other["cpu_us"] for run, other in zip(runs, base, strict=True)]
        part.add(f"{model}: agent CPU, relative to {BASE}", "ratio", relative)
    add("requests", "1/s", "rate")
    add("requests with a record", "%", "recorded_pct")
    add("losses", "per 1,000 requests", "lost")
    add("events", "per request", "events")
    for kind in abi.Kind:
        if any(run[kind.name] for run in runs):
            add(f"events, {kind.name.lower()}", "per request", kind.name)


def add_replay(part: Part, model: str, bytes_per_request: float, found: Sequence[Cost]) -> None:
    part.add(f"{model}: bytes of events", "B per request", [bytes_per_request])
    part.add(f"{model}: decoding", "us per request", [cost.decoding for cost in found])
    part.add(f"{model}: tracking", "us per request", [cost.tracking for cost in found])
    part.add(f"{model}: resolving", "us per request", [cost.resolving for cost in found])
    part.add(f"{model}: resolving, of the three", "%", [cost.resolving_pct for cost in found])


def started(rig: Rig, stack: ExitStack) -> dict[str, servers.Running]:
    """All servers that this host can run: while one is asked the others sleep."""
    running = {}
    for model in MODELS:
        folder = rig.store / f"resolver-{model}"
        folder.mkdir()
        try:
            running[model] = stack.enter_context(servers.started(model, folder))
        except servers.CannotStart as error:
            rig.progress(f"resolver: without {model}: {error}")
    return running


def load(rig: Rig, target: servers.Running, **options: float) -> dict[str, Any]:
    """Raises BucketprobeError where an answer was wrong."""
    return rig.load(target.port, connections=CONNECTIONS, requests=rig.plan.resolver_requests, **SIZES, **options)


def run_live(rig: Rig, target: servers.Running) -> dict[str, float]:
    """As `per_request` has it, and `rate`: requests per second."""
    options = ["--port", str(target.port)]
    for name, values in (("--storage-root", target.storage_roots), ("--metadata", target.metadata)):
        options += [word for value in values for word in (name, str(value))]
    with rig.agent(options) as agent:
        before = agent.metrics()
        result = load(rig, target)
        time.sleep(SETTLE_SECONDS)
        after = agent.metrics()
    return {"rate": result["requests_per_s"], **per_request(before, after, result["requests"])}


def per_request(before: Mapping[str, float], after: Mapping[str, float], requests: int) -> dict[str, float]:
    """What the agent's counters say of the requests between.

    Per request: `cpu_us`, `events`, and events by the names of abi.Kind; `lost`: of all causes, per 1,000 requests; `recorded_pct`.
    """
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    kinds = {kind.name: grown[f'{EVENTS}{{kind="{kind.name.lower()}"}}'] / requests for kind in abi.Kind}
    return {
        **kinds,
        "events": sum(kinds.values()),
        "cpu_us": grown[CPU] * 1e6 / requests,
        "recorded_pct": 100 * grown[RECORDS] / requests,
        "lost": 1000 * sum(value for name, value in grown.items() if name.startswith(f"{LOST}{{")) / requests,
    }


def record(rig: Rig, target: servers.Running, rate: float) -> Recording:
    """A load of `rate` requests per second as an agent would see it. Raises BucketprobeError.

    No agent takes CPU time meanwhile: without a rate the server would be faster, and more would be in question at once.
    """
    storage = StorageSpec(tuple(map(str, target.storage_roots)), tuple(target.metadata))
    settings = Settings(target=TargetSpec(ports=(target.port,)), cache_dir=str(rig.cache), ring_bytes=RECORDING_BYTES)
    link = BrokerLink(settings)
    descriptors: list[int] = []
    try:
        ready, descriptors = link.await_ready()
        events, stats = descriptors
        requests = load(rig, target, rate=rate)["requests"]
        time.sleep(SETTLE_SECONDS)
        counted = read_stats(stats)
        lost = sum(counted[stat] for stat in abi.Stat if stat.name.startswith("RING_"))
        if lost:
            raise BucketprobeError(f"The recording lacks {lost} events for which the ring had no room: run the bench again.")
        messages = [message for message, _ in link.messages()]
        return Recording(drained(events, ready["ring_bytes"]), messages, ready["secret"], storage, requests)
    finally:
        link.close()
        for fd in descriptors:
            os.close(fd)


def drained(events: int, size: int) -> list[bytes]:
    ring = bpf.Ring(events, size)
    records: list[bytes] = []
    while found := ring.read():
        records += found
    ring.close()
    return records

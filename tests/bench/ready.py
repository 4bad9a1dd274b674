# SPDX-License-Identifier: Apache-2.0
"""How long an agent takes from its exec until /readyz answers 200, with the target already there."""

from __future__ import annotations

import subprocess
import sys
import time

from figures import Part
from rig import Rig, environment

GOAL_COLD_S, GOAL_CACHED_S = 0.7, 0.2


def measure(rig: Rig) -> Part:
    part = Part("ready", "from exec until /readyz answers 200; cold: empty cache folder; in between a bare Python, as the host's yardstick")
    cold: list[float] = []
    cached: list[float] = []
    bare: list[float] = []
    with rig.bucket("threads") as bucket:
        target = ["--port", str(bucket.port), "--storage-root", str(bucket.root)]
        with rig.agent(target):
            pass  # leaves Python's bytecode and the files' pages behind
        for i in range(max(rig.plan.cold_starts, rig.plan.cached_starts)):
            rig.progress(f"ready: round {i + 1}")
            bare.append(bare_start())
            if i < rig.plan.cached_starts:
                with rig.agent(target) as agent:
                    cached.append(agent.ready_s)
            if i < rig.plan.cold_starts:
                with rig.agent(target, cache=rig.fresh("cold")) as agent:
                    cold.append(agent.ready_s)
    part.add("cold", "s", cold, GOAL_COLD_S)
    part.add("cached", "s", cached, GOAL_CACHED_S)
    part.add("a bare Python, start to end", "s", bare)
    part.add("cached, in bare Pythons", "ratio", [ready / yardstick for ready, yardstick in zip(cached, bare, strict=False)])
    return part


def bare_start() -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True, env=environment())
    return time.monotonic() - begin

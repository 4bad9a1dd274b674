# SPDX-License-Identifier: Apache-2.0
"""Memory of the agent over its life, of its broker, and of the compiler that a first start runs. MB are 1,000,000 bytes."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.resources import files
from pathlib import Path

from figures import Part
from host import kilobytes
from rig import DRAIN_SECONDS, Agent, Rig, environment

from bucketprobe import program
from bucketprobe.errors import EnvironmentLack

SIZE = 8 << 10
GOAL_MB = 35


def measure(rig: Rig) -> Part:
    part = Part("memory", "threads server, 8 KiB requests in a closed loop, --records FILE, one scrape before each look")
    with rig.bucket("threads") as bucket:
        rig.load(bucket.port, SIZE, seconds=0.5)
        target = ["--port", str(bucket.port), "--storage-root", str(bucket.root), "--metadata", "*.json"]
        with rig.agent(target) as agent:
            sent = 0
            steps = [look(agent)]
            part.add("agent VmRSS when ready", "MB", [steps[-1]["rss"]], GOAL_MB)
            for requests in rig.plan.memory_requests:
                rig.progress(f"memory: {requests:,} requests")
                rig.load(bucket.port, SIZE, requests=requests)
                time.sleep(DRAIN_SECONDS)
                before, sent = sent, sent + requests
                steps.append(look(agent))
                part.add(f"agent VmRSS after {sent:,} requests", "MB", [steps[-1]["rss"]], GOAL_MB)
    part.add(f"agent growth from {before:,} to {sent:,} requests", "MB", [steps[-1]["rss"] - steps[-2]["rss"]])
    part.add("agent VmHWM (its peak)", "MB", [steps[-1]["peak"]])
    part.add("broker VmRSS", "MB", [steps[-1]["broker_rss"]])
    part.add("agent + broker PSS", "MB", [steps[-1]["pss"]])
    rig.progress("memory: the compiler")
    seconds, peak = compiler_peak(rig)
    part.add("compiler VmHWM (first start only)", "MB", [peak])
    part.add("compiler run time", "s", [seconds])
    return part


def look(agent: Agent) -> dict[str, float]:
    """In MB."""
    agent.metrics()
    rss, peak = kilobytes(Path(f"/proc/{agent.pid}/status").read_text(), ("VmRSS", "VmHWM"))
    (broker_rss,) = kilobytes(Path(f"/proc/{agent.broker_pid}/status").read_text(), ("VmRSS",))
    shares = [kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text(), ("Pss",))[0] for pid in (agent.pid, agent.broker_pid)]
    return {"rss": rss / 1e6, "peak": peak / 1e6, "broker_rss": broker_rss / 1e6, "pss": sum(shares) / 1e6}


def compiler_peak(rig: Rig) -> tuple[float, float]:
    """Seconds and MB of one run of the compiler, as the kernel accounts it at its end. Raises EnvironmentLack."""
    source, stubs, log = rig.fresh("probes.c"), rig.fresh("stubs"), rig.fresh("compiler.log")
    source.write_text(program.compose())
    stubs.mkdir()
    command = [program.SYSTEM_PYTHON, "-I", str(files("bucketprobe").joinpath("loader.py")), str(stubs)]
    begin = time.monotonic()
    with source.open("rb") as text, log.open("wb") as out:
        process = subprocess.Popen(command, stdin=text, stdout=out, stderr=out, process_group=0, env=environment())
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise EnvironmentLack(f"The compiler failed with code {process.returncode}: run `bucketprobe doctor`.")
    return time.monotonic() - begin, usage.ru_maxrss * 1024 / 1e6

# SPDX-License-Identifier: Apache-2.0
"""Whether looking at digests keeps its budget when uploads become ten times as many, by the agent's own account.

That account is hits counted in the kernel, at the price of one; whether the price is right is what the part "digest" shows, where
what `--digest always` costs is measured and accounted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from digest import KIB, TOLD_SECONDS, WORKERS, accounts, await_attached, cpus, settle
from figures import Part, largest_share
from rig import Agent, Rig, on_cpus
from uploads import Done, Uploads

from bucketprobe.config import DigestSpec

SIZE = 64 * KIB
SLOW, FAST = 100.0, 1_000.0
SPAN_SECONDS = 10.0
GOAL_PCT = DigestSpec().total_budget_pct

#: When it was read, CPU seconds that digests cost so far, and those that the server used.
Reading = tuple[float, float, float]


def measure(rig: Rig) -> Part:
    part = Part(
        "budget",
        f"prefork server with {WORKERS} processes, whole uploads of {SIZE // KIB} KiB at {SLOW:g} and then {FAST:,g} per second for"
        f" {rig.plan.budget_phase_s:g} s each, --digest auto, after the grants that accounts begin with are spent; shares by the agent's"
        " own account, read each second",
    )
    servers, others = cpus()
    readings: list[Reading] = []
    with on_cpus(servers):
        bucket_context = rig.bucket("prefork", workers=WORKERS)
        bucket = bucket_context.__enter__()
    return part

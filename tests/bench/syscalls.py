# SPDX-License-Identifier: Apache-2.0
"""What the probes add to single system calls: of a target, and of a process that is none."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from figures import Part, differences
from rig import Agent, Rig

from bucketprobe.errors import BucketprobeError, EnvironmentLack

GOAL_FOREIGN_NS = 180
ROUNDS = 9

#: Name, the loop of syscalls.c, and calls per round: some 10 ms each, short enough to fall between two interruptions.
WRITE = ("write(2) to /dev/null", "n", 40_000)
UNWATCHED = ("getppid(2), which no probe looks at", "p", 80_000)
LOOPBACK = ("write(2)/read(2) on loopback TCP", "t", 6_000)
CASES = (
    ("target", WRITE),
    ("target", UNWATCHED),
    ("foreign", WRITE),
    ("foreign", UNWATCHED),
    ("foreign", LOOPBACK),
)


class Looper:
    """A process that times system calls of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    def ns_per_call(self, kind: str, calls: int) -> float:
        """Of the fastest of some rounds. Raises BucketprobeError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {calls} {ROUNDS}\n".encode())
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise BucketprobeError("The process that times system calls ended early; run the bench again.")
        return float(answer)


def measure(rig: Rig) -> Part:
    part = Part("syscalls", f"ns per call, the fastest of {ROUNDS} rounds for each value; agent off and on interleaved")
    program = compiled(rig)
    with looper(rig, program) as target, looper(rig, program) as foreign:
        loopers = {"target": target, "foreign": foreign}

        def work(agent: Agent | None) -> list[float]:
            return [loopers[who].ns_per_call(kind, calls) for who, (_, kind, calls) in CASES]

        pairs = rig.pairs(part, "", rig.plan.syscall_pairs, ["--pid", str(target.pid)], work)
    for i, (who, (name, _, _)) in enumerate(CASES):
        added = differences([(off[i], on[i]) for off, on in pairs])
        part.add(f"{who}: {name}, added", "ns", added, GOAL_FOREIGN_NS if who == "foreign" else None)
        part.add(f"{who}: {name}, agent off", "ns", [off[i] for off, _ in pairs])
    return part


@contextmanager
def looper(rig: Rig, program: Path) -> Iterator[Looper]:
    with rig.started([str(program)], rig.fresh("looper.log"), subprocess.PIPE, subprocess.PIPE) as process:
        yield Looper(process)


def compiled(rig: Rig) -> Path:
    """Raises EnvironmentLack where there is no C compiler."""
    program = rig.fresh("syscalls")
    source = Path(__file__).with_name("syscalls.c")
    try:
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)
    except FileNotFoundError:
        raise EnvironmentLack("gcc is missing, and system calls are timed by a C program: apt-get install gcc libc6-dev.") from None
    except subprocess.CalledProcessError:
        raise EnvironmentLack("gcc could not compile tests/bench/syscalls.c, see above: apt-get install libc6-dev.") from None
    return program

# SPDX-License-Identifier: Apache-2.0
"""What the agent costs, measured on this host. Run as root.

    .venv/bin/python tests/bench/bench.py
    .venv/bin/python tests/bench/bench.py --quick --only ready,syscalls

What is compared is measured in turns, without and with the agent, and given as a ratio or a difference with its spread.
Progress goes to standard error, a table to standard output, and all samples to out/bench/results.json.

Exit code: 0 all was measured (goals reached or not), 1 a part failed, 2 wrong call or host, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import budget
import cpu
import digest
import memory
import ready
import resolver
import syscalls
import throughput
from figures import Part, document, table
from host import describe
from rig import FULL, QUICK, Plan, Rig

from bucketprobe import privileges, program
from bucketprobe.errors import BucketprobeError, UsageError

ROOT = Path(__file__).resolve().parents[2]
PARTS: dict[str, Callable[[Rig], Part]] = {
    "syscalls": syscalls.measure,
    "ready": ready.measure,
    "memory": memory.measure,
    "cpu": cpu.measure,
    "resolver": resolver.measure,
    "throughput": throughput.measure,
    "digest": digest.measure,
    "budget": budget.measure,
}
#: A case of 1 MiB artifacts fills so much between two clearings, on a fast host.
STORE_BYTES = 6 << 30


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Measure what the agent costs on this host (as root).",
        epilog="Example: .venv/bin/python tests/bench/bench.py --quick --only ready,syscalls",
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes, with fewer cases and repetitions")
    parser.add_argument("--only", metavar="PARTS", help=f"some parts, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--store", type=Path, default=Path("/dev/shm"), metavar="DIR", help="where the artifacts go [%(default)s]")
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench/results.json", metavar="FILE", help="[out/bench/results.json]")
    options = parser.parse_args(arguments)
    options.only = chosen(options.only)
    return options


def chosen(text: str | None) -> list[str]:
    """The parts' names in the order in which they run. Raises UsageError."""
    if text is None:
        return list(PARTS)
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise UsageError(f"--only has no part {unknown[0]!r}: choose from {', '.join(PARTS)}.")
    return [name for name in PARTS if name in wanted]


def measure(names: Sequence[str], rig: Rig) -> list[Part]:
    """Each part fails alone."""
    parts = []
    for name in names:
        try:
            parts.append(PARTS[name](rig))
        except BucketprobeError as error:
            parts.append(Part(name, error=str(error)))
    return parts


def check_store(store: Path) -> None:
    """Raises UsageError."""
    try:
        free = shutil.disk_usage(store).free
    except OSError as error:
        raise UsageError(f"--store {store} cannot be used ({error.strerror}): name an existing folder.") from None
    if free < STORE_BYTES:
        raise UsageError(
            f"--store {store} has {free / 1e9:.1f} GB free, and up to {STORE_BYTES / 1e9:.1f} GB are written: name another folder."
        )


def bench(plan: Plan, options: argparse.Namespace) -> int:
    begin = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    check_store(options.store)
    privileges.require_root_caps()
    host = describe(ROOT)
    with tempfile.TemporaryDirectory(prefix="bucketprobe-bench-") as room, tempfile.TemporaryDirectory(dir=options.store) as store:
        rig = Rig(Path(room), Path(store).resolve(), plan, progress)
        program.compiled(str(rig.cache), progress)
        parts = measure(options.only, rig)
    host |= {"quick": plan is QUICK, "seconds": round(time.monotonic() - begin), "load_average_after": os.getloadavg()[0]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document(parts, host), indent=1) + "\n")
    print(f"{host['cpu']}, {host['cpus']} CPUs, Linux {host['kernel']}, revision {host['revision']}")
    print(f"load average {host['load_average']:.1f} before and {host['load_average_after']:.1f} after; the bench alone makes some 3\n")
    print(table(parts))
    print(f"\nAll samples: {options.out}")
    return int(any(part.error for part in parts))


def interrupt(_number: int, _frame: object) -> None:
    """Once: a second Ctrl-C must not keep what was started from being ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        options = parse(arguments)
        return bench(QUICK if options.quick else FULL, options)
    except BucketprobeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench: interrupted; all that it started has been ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The kernel's counters, from its map."""

from __future__ import annotations

import struct

from bucketprobe import abi, bpf


def read_stats(fd: int) -> list[int]:
    """The counters in the order of abi.Stat's values, summed over CPUs. Raises OSError."""
    entries, cpus = next(m for m in abi.MAPS if m.name == "stats").entries, bpf.possible_cpus()
    values = struct.unpack(f"={entries * cpus}Q", bpf.array_values(fd, entries, 8 * cpus))
    return [sum(values[i * cpus : (i + 1) * cpus]) for i in range(entries)]

# SPDX-License-Identifier: Apache-2.0
"""Writes the README's cost table from the last full benchmark.

    python tests/bench/readme_table.py

Reads `out/bench/results.json` and replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from figures import number_text

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
#: What a figure is compared with stands in the JSON; the table shows the comparison.
BASELINES = ("agent off", "a bare Python", "requests per second | 1/s")


def rows(parts: Mapping[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        for figure in part["figures"]:
            if any(word in f"{figure['name']} | {figure['unit']}" for word in BASELINES):
                continue
            goal = "" if figure["goal"] is None else f"≤ {figure['goal']:g}"
            spread = f"{number_text(figure['min'])} .. {number_text(figure['max'])}"
            yield f"| {name}: {figure['name']} | {number_text(figure['median'])} | {spread} | {figure['unit']} | {goal} |"


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each figure, then how each part was measured."""
    host = results["host"]
    lines = ["| figure | median | min .. max | unit | first goal |", "|---|---:|---:|---|---:|", *rows(results["parts"]), ""]
    lines += [f"{name}: {part['note']}." for name, part in results["parts"].items()]
    place = f"{host['date'][:10]} on Linux {host['kernel']} ({host['cpus']} CPUs)"
    lines.append(f"Measured on {place} by `make bench`, which also writes this table.")
    return "\n".join(lines)


def main() -> int:
    results = json.loads((ROOT / "out" / "bench" / "results.json").read_bytes())
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"error: the README has no place for the cost table; add the lines {BEGIN} and {END}", file=sys.stderr)
        return 2
    readme.write_text(f"{before}{begin}\n{table(results)}\n{end}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

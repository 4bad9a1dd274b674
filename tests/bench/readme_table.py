# SPDX-License-Identifier: Apache-2.0
"""Writes the README's cost tables from the last full benchmark.

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
#: Parts whose figures are of several servers or loads, and have a table of their own with a row for each: what its first column is
#: called, and for each figure's name after the row's the name of its column. What has no column stands in the JSON alone.
GOAL = "first goal"
TABLES = {
    "resolver": (
        "per request",
        {
            "agent CPU": "agent CPU, µs",
            "agent CPU, relative to threads": "relative to threads",
            "requests": "requests/s",
            "events": "events",
            "bytes of events": "bytes of events",
            "decoding": "decoding, µs",
            "tracking": "tracking, µs",
            "resolving": "resolving, µs",
            "resolving, of the three": "resolving, % of the three",
            "losses": "losses per 1,000",
        },
    ),
    "digest": (
        "digests looked at, in uploads of",
        {
            "auto: server CPU per upload, added": "server CPU added, %",
            "auto: uploads per second, lost": "uploads/s lost, %",
            GOAL: "first goal, %",
            "auto: account": "server CPU added by the agent's account, %",
            "auto: agent + broker CPU per upload, added": "agent + broker CPU per upload, added, µs",
            "always: server CPU per upload, added": "always: server CPU added, %",
            "always: account": "always: by the agent's account, %",
            "server CPU per upload, off": "server CPU per upload, off, µs",
        },
    ),
}


def rows(parts: Mapping[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        for figure in part["figures"] if name not in TABLES else ():
            if any(word in f"{figure['name']} | {figure['unit']}" for word in BASELINES):
                continue
            goal = "" if figure["goal"] is None else f"≤ {figure['goal']:g}"
            yield f"| {name}: {figure['name']} | {number_text(figure['median'])} | {spread(figure)} | {figure['unit']} | {goal} |"


def spread(figure: Mapping[str, Any]) -> str:
    return f"{number_text(figure['min'])} .. {number_text(figure['max'])}"


def cell(figure: Mapping[str, Any]) -> str:
    """The estimate with its interval, or else the median with the extremes where they differ."""
    if "estimate" in figure:
        return f"{number_text(figure['estimate'])} ({number_text(figure['low_95'])} .. {number_text(figure['high_95'])})"
    return number_text(figure["median"]) + (f" ({spread(figure)})" if figure["min"] < figure["max"] else "")


def grouped(part: Mapping[str, Any], head: str, columns: Mapping[str, str]) -> Iterator[str]:
    """Lines of a table with a row for each server or load; figures are named `ROW: WHAT`, and not every row has them all."""
    by_row: dict[str, dict[str, str]] = {}
    for figure in part["figures"]:
        row, _, what = figure["name"].partition(": ")
        if what not in columns:
            continue
        cells = by_row.setdefault(row, {})
        cells[what] = cell(figure)
        if figure["goal"] is not None:
            cells[GOAL] = f"≤ {figure['goal']:g}"
    yield f"| {head} | {' | '.join(columns.values())} |"
    yield "|---|" + "---:|" * len(columns)
    for row, cells in by_row.items():
        yield f"| {row} | {' | '.join(cells.get(what, '') for what in columns)} |"


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each figure, the parts that have a table of their own, then how each part was measured."""
    host = results["host"]
    lines = ["| figure | median | min .. max | unit | first goal |", "|---|---:|---:|---|---:|", *rows(results["parts"]), ""]
    for name, (head, columns) in TABLES.items():
        if name in results["parts"]:
            lines += [*grouped(results["parts"][name], head, columns), ""]
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

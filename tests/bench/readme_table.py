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
#: The part whose figures are of server models, and have a table of their own: each figure's name after the model's, and its column.
MODELS_PART = "resolver"
COLUMNS = {
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
}


def rows(parts: Mapping[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        for figure in part["figures"] if name != MODELS_PART else ():
            if any(word in f"{figure['name']} | {figure['unit']}" for word in BASELINES):
                continue
            goal = "" if figure["goal"] is None else f"≤ {figure['goal']:g}"
            yield f"| {name}: {figure['name']} | {number_text(figure['median'])} | {spread(figure)} | {figure['unit']} | {goal} |"


def spread(figure: Mapping[str, Any]) -> str:
    return f"{number_text(figure['min'])} .. {number_text(figure['max'])}"


def models(part: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table with a row for each server model; its figures are named `MODEL: WHAT`, and not every model has them all."""
    by_model: dict[str, dict[str, str]] = {}
    for figure in part["figures"]:
        model, _, what = figure["name"].partition(": ")
        extremes = f" ({spread(figure)})" if figure["min"] < figure["max"] else ""
        by_model.setdefault(model, {})[what] = number_text(figure["median"]) + extremes
    yield f"| per request | {' | '.join(COLUMNS.values())} |"
    yield "|---|" + "---:|" * len(COLUMNS)
    for model, cells in by_model.items():
        yield f"| {model} | {' | '.join(cells.get(what, '') for what in COLUMNS)} |"


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each figure, a table of server models, then how each part was measured."""
    host = results["host"]
    lines = ["| figure | median | min .. max | unit | first goal |", "|---|---:|---:|---|---:|", *rows(results["parts"]), ""]
    if MODELS_PART in results["parts"]:
        lines += [*models(results["parts"][MODELS_PART]), ""]
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

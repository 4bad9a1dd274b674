# SPDX-License-Identifier: Apache-2.0
"""Writes the README's accuracy table from what the truth tests measured.

    python tests/truth/readme_table.py

Reads `out/truth/MODEL.json` and replaces what stands between `<!-- accuracy:begin -->` and `<!-- accuracy:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError

ROOT = Path(__file__).parents[2]
MODELS = ("threads", "prefork")
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
FIELDS = ("status_wrong", "method_wrong", "outcome_wrong", "bytes_in_wrong", "bytes_out_wrong")

Numbers = Mapping[str, Any]


def misplaced(kind: str) -> Callable[[Numbers], str]:
    def show(scores: Numbers) -> str:
        wrong = scores[f"{kind}_wrong_bytes"] + scores[f"{kind}_unattributed_bytes"]
        return f"{wrong:,} B of {scores[f'{kind}_bytes'] / 1e9:.2f} GB"

    return show


def percent(name: str, digits: int) -> Callable[[Numbers], str]:
    return lambda scores: f"{100 * scores[name]:.{digits}f} %"


def microseconds(name: str) -> Callable[[Numbers], str]:
    return lambda scores: " / ".join(f"{scores[f'{name}_us_{point}']:,.0f}" for point in ("p50", "p99")) + " µs"


def promised_percent(name: str) -> Callable[[Numbers], str]:
    return lambda goals: f"≤ {100 * goals[name]:g} %"


#: What a row is called, how it shows what is promised, and how what was measured.
ROWS: tuple[tuple[str, Callable[[Numbers], str], Callable[[Numbers], str]], ...] = (
    ("requests found exactly once", lambda _: "all", lambda scores: f"{scores['found_once']:,} of {scores['requests']:,}"),
    ("requests invented", lambda goals: f"{goals['invented']}", lambda scores: f"{scores['invented']:,}"),
    (
        "wrong status, method, outcome or byte counts",
        lambda goals: f"{sum(goals[name] for name in FIELDS)}",
        lambda scores: f"{sum(scores[name] for name in FIELDS):,}",
    ),
    ("storage bytes written, on the wrong request or on none", lambda goals: f"{goals['write_wrong_bytes']} B", misplaced("write")),
    ("storage bytes read, on the wrong request or on none", lambda goals: f"{goals['read_wrong_bytes']} B", misplaced("read")),
    ("error of the duration, median", promised_percent("duration_error_p50"), percent("duration_error_p50", 3)),
    ("error of the duration, p99", promised_percent("duration_error_p99"), percent("duration_error_p99", 2)),
    ("error of the duration, p50 / p99", lambda _: "", microseconds("duration_error")),
    ("error of the start, p50 / p99", lambda _: "", microseconds("start_error")),
    ("error of the end, p50 / p99", lambda _: "", microseconds("end_error")),
    ("phases' sum against the duration, worst", promised_percent("phase_sum_error_max"), percent("phase_sum_error_max", 4)),
)


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a column for each report, and below what was done where and when."""
    lines = ["| | promised |" + "".join(f" {report['model']} |" for report in reports), "|---|---:|" + "---:|" * len(reports)]
    for name, promised, measured in ROWS:
        cells = [promised(reports[0]["goals"]), *(measured(report["scores"]) for report in reports)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    load, place = reports[0]["load"], reports[0]["environment"]
    puts = round(100 * load["put_share"])
    lines += [
        "",
        f"{load['connections']} keep-alive connections, bodies of {load['min_bytes'] / 1024:g} KiB to {load['max_bytes'] / (1 << 20):g} MiB"
        f" (log-uniform), {puts} % PUT and {100 - puts} % GET. Measured on {place['date']} on Linux {place['kernel']} ({place['machine']},"
        f" {place['cpus']} CPUs) by `make truth`, which also writes this table.",
    ]
    return "\n".join(lines)


def replaced(text: str, block: str) -> str:
    """The README with a new block. Raises UsageError where it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"the README has no place for the accuracy table; add the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def read_report(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} ({error}); run the tests in tests/truth first") from error
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's accuracy table from the truth tests' reports.")
    parser.add_argument("--reports", type=Path, default=ROOT / "out" / "truth", metavar="DIR", help="where they are (default out/truth)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="what to change (default README.md)")
    options = parser.parse_args(arguments)
    try:
        block = table([read_report(options.reports / f"{model}.json") for model in MODELS])
        options.readme.write_text(replaced(options.readme.read_text(), block))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())

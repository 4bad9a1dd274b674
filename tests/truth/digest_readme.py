# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table about digests from what digests.py measured.

    python tests/truth/digest_readme.py

Reads the runs that `out/truth/digests/digests.json` names, and replaces what stands between `<!-- digests: begin -->` and
`<!-- digests: end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- digests: begin -->", "<!-- digests: end -->"
HEADER = (
    "| server, pieces | time, auto | time, always | sources in auto, % | values right, auto | values right, always |",
    "|---|---:|---:|---|---:|---:|",
)
EXPLANATION = (
    "Time: the sum in the records by the sum of the server's own CPU clock around its calls. Values right: uploads whose record has the"
    " digest that the server computed; in mode auto the budget leaves some unseen."
)

Report = Mapping[str, Any]


def table(summary: Report) -> str:
    """Markdown: a row for each server and size; a line for each of the other parts. Raises UsageError where a run gave no numbers."""
    reports = summary["runs"]
    for report in reports:
        if "scores" not in report:
            raise UsageError(f"the run {report['name']} failed ({report['missed'][0]}); mend that and run `make truth` again")
    timed = {report["name"]: report for report in reports if report["part"] in ("time", "manners")}
    names = dict.fromkeys(name.removesuffix("-auto") for name in timed)
    rows = [row(name, timed.get(f"{name}-auto"), timed.get(name)) for name in names]
    others = [line for part in ("corrupt", "stored", "reads") if (line := part_text(part, of_part(reports, part)))]
    place = summary["environment"]
    measured = f"Measured on {place['date']} on Linux {place['kernel']} ({place['machine']}, {place['cpus']} CPUs) by `make truth`."
    return "\n".join([*HEADER, *rows, "", EXPLANATION, "", *others, "", measured])


def row(name: str, auto: Report | None, always: Report | None) -> str:
    cells = [name, ratio(auto), ratio(always), sources(auto), values(auto), values(always)]
    return f"| {' | '.join(cells)} |"


def ratio(report: Report | None) -> str:
    found = report["scores"]["time"].get("write", {}).get("ratio") if report else None
    return "-" if found is None else f"{100 * found:.1f} %"


def sources(report: Report | None) -> str:
    if report is None:
        return "-"
    shares = report["scores"]["time"].get("write", {}).get("by_source", {})
    return ", ".join(f"{name} {one['share_pct']:.0f}" for name, one in shares.items()) or "-"


def values(report: Report | None) -> str:
    if report is None:
        return "-"
    found = report["scores"]["values"]
    wrong = f", {found['wrong']:,} wrong" if found["wrong"] else ""
    return f"{found['right']:,} of {found['uploads']:,}{wrong}"


def of_part(reports: Iterable[Report], part: str) -> list[Report]:
    return [report for report in reports if report["part"] == part]


def part_text(part: str, reports: Sequence[Report]) -> str:
    """A list item: for each server what was told of what was there; nothing where the part was not run."""
    if not reports:
        return ""
    show = mismatches if part == "corrupt" else verified
    told = "; ".join(f"{report['name'].rpartition('-')[0]} {show(report)}" for report in reports)
    return f"- {WORDS[part]}: {told}."


WORDS = {
    "corrupt": "mismatches told (of them hidden by the server), invented",
    "stored": "digests of what was read back after an upload, requests right",
    "reads": "digests of what was read for an answer, requests right",
}


def mismatches(report: Report) -> str:
    found = report["mismatches"]
    return f"{found['told']} of {found['declared_wrong']} ({found['hidden_told']} of {found['hidden']}), {len(found['invented_ids'])}"


def verified(report: Report) -> str:
    found = report["scores"]["verified"]
    right = found["requests_right"]
    return f"{right:,} of {sum(found['true'].values()):,}, {found['recorded'].get('mismatch', 0)} mismatch"


def replaced(text: str, block: str) -> str:
    """The README with a new block. Raises UsageError where it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"the README has no place for the table about digests; add the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def read_summary(path: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} ({error}); run tests/truth/digests.py first") from error
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's table about digests from their reports.")
    parser.add_argument("--reports", type=Path, default=ROOT / "out" / "truth" / "digests", metavar="DIR", help="default out/truth/digests")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="what to change (default README.md)")
    options = parser.parse_args(arguments)
    try:
        block = table(read_summary(options.reports / "digests.json"))
        options.readme.write_text(replaced(options.readme.read_text(), block))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())

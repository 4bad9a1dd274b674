# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table about digests from what digests.py measured.

    python tests/truth/digest_readme.py

Reads `out/truth/digests/digests.json` and replaces what stands between `<!-- digests:begin -->` and `<!-- digests:end -->`.
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
BEGIN, END = "<!-- digests:begin -->", "<!-- digests:end -->"
SERVERS = ("threads", "prefork", "asyncio", "node", "go")
SIZES = ("16K", "64K", "256K", "1M")
EXPLANATION = (
    "CPU time of hashing in the records, in per cent of what the server's own clocks around the hash function say, summed over all uploads;"
    " in brackets the share of them whose time is `exact`. Columns: the size of the pieces that are hashed. Values: computed digests that"
    " are the server's own, of all uploads of these runs."
)

Report = Mapping[str, Any]


def table(summary: Report) -> str:
    """Markdown: a row for each server, what came of mismatches and of changed files, and where it was measured.

    Raises UsageError where a run gave no numbers.
    """
    for report in summary["runs"]:
        if "scores" not in report:
            raise UsageError(f"the run {report['name']} failed ({report['missed'][0]}); mend that and run `make truth` again")
    runs = {report["name"]: report for report in summary["runs"]}
    titles = ["server", *(f"{size}, auto" for size in SIZES), "64K, always", "values right"]
    lines = [row(titles), row(["---"] * len(titles))]
    for server in SERVERS:
        columns = [*(f"{server}-{size}-auto" for size in SIZES), f"{server}-64K"]
        mine = [runs[name] for name in columns if name in runs]
        lines.append(row([server, *(time_text(runs.get(name)) for name in columns), values_text(mine)]))
    place = summary["environment"]
    measured = (
        f"Measured on {place['date']} on Linux {place['kernel']} ({place['machine']}, {place['cpus']} CPUs) by `make truth`, which also"
        " writes this table."
    )
    return "\n".join([*lines, "", EXPLANATION, "", integrity_text(summary["runs"]), "", measured])


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def time_text(report: Report | None) -> str:
    """The sum in % of the truth, and how many of the uploads have an exact time."""
    found = report["scores"]["time"].get("write") if report else None
    if found is None or found["ratio"] is None:
        return "-"
    exact = found["by_source"].get("exact", {}).get("share_pct", 0)
    return f"{100 * found['ratio']:.1f} % ({exact:.0f} %)"


def values_text(reports: Sequence[Report]) -> str:
    values = [report["scores"]["values"] for report in reports]
    return f"{sum(one['right'] for one in values):,} of {sum(one['uploads'] for one in values):,}"


def integrity_text(reports: Sequence[Report]) -> str:
    """What was told of wrong digests, and of a file that was changed in storage."""
    corrupt, stored = ([report for report in reports if report["part"] == part] for part in ("corrupt", "stored"))
    sentences = []
    if corrupt:
        first = corrupt[0]
        told, hidden = (listed(report["mismatches"][name] for report in corrupt) for name in ("told", "hidden_told"))
        sentences.append(
            f"Of {first['scores']['requests']:,} uploads each, {first['mismatches']['declared_wrong']} with a wrong digest of which the"
            f" server hides {first['mismatches']['hidden']}: told {told}, hidden ones {hidden} ({servers_of(corrupt)})."
        )
    if stored:
        found = listed(report["scores"]["verified"]["recorded"].get("mismatch", 0) for report in stored)
        sentences.append(
            f"One stored file of {stored[0]['scores']['requests']:,} changed before it is read back: {found} `mismatch`"
            f" ({servers_of(stored)})."
        )
    return " ".join(sentences)


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(f"{number}" for number in numbers)


def servers_of(reports: Sequence[Report]) -> str:
    return ", ".join(report["name"].rpartition("-")[0] for report in reports)


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

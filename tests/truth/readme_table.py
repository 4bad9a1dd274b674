# SPDX-License-Identifier: Apache-2.0
"""Writes the README's accuracy table from what the matrix measured.

    python tests/truth/readme_table.py

Reads `out/truth/matrix.json` and replaces what stands between `<!-- accuracy:begin -->` and `<!-- accuracy:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError
from bucketprobe.model import LABELS

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
#: What must not be otherwise than the server says for a request to be exact.
FIELDS = ("status_wrong", "method_wrong", "outcome_wrong", "bytes_in_wrong", "bytes_out_wrong")

Numbers = Mapping[str, Any]


def exact_requests(scores: Numbers) -> str:
    """Requests found once; those that have anything wrong, however often each counts, are taken off."""
    wrong = sum(scores[name] for name in FIELDS) + scores["invented"]
    return f"{max(0, scores['found_once'] - wrong):,} of {scores['requests']:,}"


def places(kind: str) -> Callable[[Numbers], str]:
    return lambda scores: " / ".join(share(scores[f"{kind}_{part}_pct"]) for part in ("right", "wrong", "unattributed"))


def right(kind: str) -> Callable[[Numbers], str]:
    return lambda scores: share(scores[f"{kind}_right_pct"])


def labels(scores: Numbers) -> str:
    return " / ".join(share(scores[f"label_{label}_pct"]) for label in LABELS)


def exact_wrong(scores: Numbers) -> str:
    """Of what is labelled exact: requests, and bytes, that are wrong."""
    return f"{scores['exact_but_wrong']:,} / {scores['exact_wrong_bytes']:,} B"


def duration(scores: Numbers) -> str:
    return " / ".join(f"{100 * scores[f'duration_error_{at}']:.2f} %" for at in ("p50", "p99"))


def share(value: float | None) -> str:
    """A percentage with as many digits as tell it from all and from nothing."""
    if value is None:
        return "-"
    if round(value, 9) in (0, 100):  # sums of fractions
        return f"{value:.0f}"
    texts = [f"{value:.{digits}f}" for digits in (1, 2, 3, 4)]
    return next((text for text in texts if float(text) not in (0, 100)), "> 99.9999" if value > 50 else "< 0.0001")


#: What a column is called, on a terminal how wide it is, and how it shows a run.
COLUMNS: tuple[tuple[str, int, Callable[[Numbers], str]], ...] = (
    ("requests exact", 16, exact_requests),
    ("PUT bytes, %", 18, places("write")),
    ("PUT time right, %", 17, right("write_time")),
    ("metadata time right, %", 22, right("metadata_time")),
    ("GET bytes right, %", 18, right("read")),
    ("labels, %", 24, labels),
    ("exact but wrong", 16, exact_wrong),
    ("duration error", 18, duration),
)
NAME_WIDTH = 20


def text_header() -> str:
    """What stands above rows on a terminal."""
    return f"{'server':<{NAME_WIDTH}}" + "".join(f"  {title:>{width}}" for title, width, _ in COLUMNS)


def text_row(report: Numbers) -> str:
    return f"{report['name']:<{NAME_WIDTH}}" + "".join(f"  {show(report['scores']):>{width}}" for _, width, show in COLUMNS)


def rows(reports: Sequence[Numbers]) -> list[str]:
    """Markdown: a row for each run."""
    lines = ["| server |" + "".join(f" {title} |" for title, _, _ in COLUMNS), "|---|" + "---:|" * len(COLUMNS)]
    return lines + [f"| {report['name']} | {' | '.join(show(report['scores']) for *_, show in COLUMNS)} |" for report in reports]


def table(matrix: Numbers) -> str:
    """Markdown: a row for each server; one for each adversary; what the columns mean; what was done where and when.

    Raises UsageError where a run gave no numbers.
    """
    parts: dict[str, list[Numbers]] = {"every server": [], "other seed": [], "adversary": []}
    for report in matrix["runs"]:
        if "scores" not in report:
            trouble = report["missed"][0].partition("\n")[0]
            raise UsageError(f"the run {report['name']} failed ({trouble}); mend that and run `make truth` again")
        parts[report["part"]].append(report)
    lines = rows(parts["every server"])
    if parts["adversary"]:
        lines += ["", adversary_text(parts["adversary"][0]["load"]), "", *rows(parts["adversary"])]
    lines += ["", EXPLANATION]
    if parts["other seed"]:
        lines += ["", other_seed_text(parts["other seed"])]
    first, place = parts["every server"][0]["load"], matrix["environment"]
    lines += ["", f"{load_text(first)} Measured on {place['date']} on Linux {place['kernel']} ({place['machine']}, {place['cpus']} CPUs)"
              " by `make truth`, which also writes this table."]  # fmt: skip
    return "\n".join(lines)


EXPLANATION = (
    "PUT bytes: on the right request / on a wrong one / shown with none. Labels: requests that say exact / inferred / shared /"
    " unattributed of their file work. Exact but wrong: requests labelled exact with any counter or time that is wrong, and bytes"
    " labelled exact that are another's. Times are right where the calls are; `tests/truth/score.py` has the rule. Duration error:"
    " p50 / p99. nginx has no metadata and does not tell its times."
)


def load_text(load: Numbers) -> str:
    puts = round(100 * load["put_share"])
    return (
        f"{load['requests']:,} requests each, {load['connections']} keep-alive connections, bodies of {size_text(load['min_bytes'])} to"
        f" {size_text(load['max_bytes'])} (log-uniform), {puts} % PUT and {100 - puts} % GET,"
        f" {round(100 * load['paced_share'])} % of the PUT by slow clients."
    )


def adversary_text(load: Numbers) -> str:
    return (
        f"An adversary, {load['requests']:,} requests each: all bodies are {size_text(load['max_bytes'])} long and begin with the same"
        f" {size_text(load['same_head'])}, files have random names, and nothing in them tells whose they are."
    )


def other_seed_text(reports: Sequence[Numbers]) -> str:
    worst = {kind: min((value, report["name"]) for report in reports if (value := report["scores"][f"{kind}_right_pct"]) is not None)
             for kind in ("write", "read", "metadata_time")}  # fmt: skip
    shown = {kind: f"{share(value)} %" for kind, (value, _) in worst.items()}
    wrong = sum(report["scores"]["exact_but_wrong"] for report in reports)
    return (
        f"With another seed, {reports[0]['load']['requests']:,} requests each, and long bodies that begin alike, the lowest of all servers"
        f" are: PUT bytes {shown['write']}, GET bytes {shown['read']}, metadata time {shown['metadata_time']} right; {wrong:,} requests"
        " labelled exact are wrong."
    )


def size_text(size: int) -> str:
    return f"{size / (1 << 20):g} MiB" if size >= 1 << 20 else f"{size / 1024:g} KiB"


def replaced(text: str, block: str) -> str:
    """The README with a new block. Raises UsageError where it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"the README has no place for the accuracy table; add the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def read_matrix(path: Path) -> dict[str, Any]:
    try:
        matrix: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} ({error}); run tests/truth/matrix.py first") from error
    return matrix


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's accuracy table from the matrix's report.")
    parser.add_argument("--reports", type=Path, default=ROOT / "out" / "truth", metavar="DIR", help="where it is (default out/truth)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="what to change (default README.md)")
    options = parser.parse_args(arguments)
    try:
        block = table(read_matrix(options.reports / "matrix.json"))
        options.readme.write_text(replaced(options.readme.read_text(), block))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())

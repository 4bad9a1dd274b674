# SPDX-License-Identifier: Apache-2.0
"""How right the agent was: its records against what the demo server wrote down and what the load's clients saw.

    python tests/truth/score.py --records records.jsonl --truth truth.jsonl --client client.jsonl

All three are JSON lines, joined by `request_id`. A request's true life ends with the server's last send. It begins, as the
catalog has it, when the connection was established (the client's connect(2) returned) for the first request of a
connection, and when its first byte could be read (the client was about to send it) for the others; all clocks are the
host's CLOCK_MONOTONIC. What a client did not time (curl) is left out of that comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError
from bucketprobe.model import LABELS

Line = Mapping[str, Any]
#: Plain numbers by name; None where there was nothing to compare.
Score = dict[str, float | int | None]

COUNTERS = ("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames")

#: Which of the server's steps belong to which phase of a record: the catalog counts open(2) and rename(2) as storage_write.
STEPS = {
    "storage_write": ("storage_write", "open", "rename"),
    "storage_sync": ("storage_sync",),
    "storage_read": ("storage_read",),
}


def score(records: Iterable[Line], truth: Iterable[Line], client: Iterable[Line]) -> Score:
    """Compare. Raises UsageError where the truth has a request ID twice, since such requests cannot be told apart."""
    truth_lines = list(truth)
    expected = by_id(truth_lines)
    found: dict[str, list[Line]] = defaultdict(list)
    strays: list[Line] = []
    nameless = 0
    for record in records:
        request_id = record["request_id"]
        nameless += request_id is None
        if request_id in expected:
            found[request_id].append(record)
        elif request_id is not None:
            strays.append(record)
    clients = {line["request_id"]: line for line in client}
    pairs = [(matches[0], expected[request_id], clients.get(request_id)) for request_id, matches in found.items()]
    # Work in a record that no request, or another record already, accounts for is work that was attributed wrongly.
    excess = strays + [record for matches in found.values() for record in matches[1:]]
    missing = [line for request_id, line in expected.items() if request_id not in found]
    nameless_truth = len(truth_lines) - len(expected)
    return {
        "requests": len(expected),
        "found_once": sum(len(matches) == 1 for matches in found.values()),
        "missing": len(missing),
        "duplicated": sum(len(matches) > 1 for matches in found.values()),
        "invented": len(strays) + max(0, nameless - nameless_truth),
        "nameless_requests": nameless_truth,
        "nameless_records": nameless,
        **field_scores(pairs),
        **byte_scores("write", pairs, excess, missing),
        **byte_scores("read", pairs, excess, missing),
        **file_scores(pairs),
        **label_scores(pairs),
        **duration_scores(pairs),
        **step_scores(pairs),
    }


Pair = tuple[Line, Line, Line | None]


def by_id(lines: Iterable[Line]) -> dict[str, Line]:
    """The lines that have a request ID, by it."""
    found: dict[str, Line] = {}
    for line in lines:
        request_id = line["request_id"]
        if request_id in found:
            raise UsageError(f"the truth has request {request_id} twice; send a different X-Request-ID with each request")
        if request_id is not None:
            found[request_id] = line
    return found


def field_scores(pairs: Sequence[Pair]) -> Score:
    def wrong(name: str) -> int:
        return sum(record[name] != line[name] for record, line, _ in pairs)

    def disagrees(line: Line, seen: Line) -> bool:
        return any(line[name] != seen[name] for name in ("status", "bytes_in", "bytes_out"))

    return {
        "status_wrong": wrong("status"),
        "method_wrong": wrong("method"),
        "outcome_wrong": wrong("outcome"),
        "bytes_in_wrong": wrong("bytes_in"),
        "bytes_out_wrong": wrong("bytes_out"),
        "client_disagrees": sum(seen is not None and disagrees(line, seen) for _, line, seen in pairs),
        "with_lost_events": sum(record["lost_events"] > 0 for record, _, _ in pairs),
    }


def byte_scores(kind: str, pairs: Sequence[Pair], excess: Sequence[Line], missing: Sequence[Line]) -> Score:
    """Bytes of storage calls: on the right request, on a wrong one, on none. In % of the truth's."""
    name = f"{kind}_bytes"
    both = [(record["files"][name], line["files"][name]) for record, line, _ in pairs]
    both += [(record["files"][name], 0) for record in excess]
    both += [(0, line["files"][name]) for line in missing]
    total = sum(true for _, true in both)
    right = sum(min(pair) for pair in both)
    wrong = sum(recorded for recorded, _ in both) - right
    return {
        name: total,
        f"{kind}_wrong_bytes": wrong,
        f"{kind}_unattributed_bytes": total - right,
        f"{kind}_right_pct": percent(right, total),
        f"{kind}_wrong_pct": percent(wrong, total),
        f"{kind}_unattributed_pct": percent(total - right, total),
    }


def file_scores(pairs: Sequence[Pair]) -> Score:
    wrong = {name: sum(record["files"][name] != line["files"][name] for record, line, _ in pairs) for name in COUNTERS}
    return {
        "files_wrong": sum(files_differ(record, line) for record, line, _ in pairs),
        **{f"files_{name}_wrong": count for name, count in wrong.items()},
    }


def files_differ(record: Line, line: Line) -> bool:
    return any(record["files"][name] != line["files"][name] for name in COUNTERS)


def label_scores(pairs: Sequence[Pair]) -> Score:
    labels = [record["attribution"]["label"] for record, _, _ in pairs]
    return {
        **{f"label_{label}_pct": percent(labels.count(label), len(labels)) for label in LABELS},
        "exact_but_wrong": sum(record["attribution"]["label"] == "exact" and files_differ(record, line) for record, line, _ in pairs),
    }


def duration_scores(pairs: Sequence[Pair]) -> Score:
    """Errors of the records' durations, relative to the true ones (0.01 is 1 %), from three notions of the beginning."""

    def from_first_byte(seen: Line | None) -> int | None:
        return None if seen is None else seen["send_ns"]

    def from_readable(seen: Line | None) -> int | None:
        return None if seen is None else (seen["connected_ns"] or seen["send_ns"])

    lives = [(duration_ns(record), line["end_ns"] - start, line) for record, line, seen in pairs if (start := from_readable(seen))]
    sums = [(sum(record["phases"].values()) * 1e6, duration_ns(record)) for record, _, _ in pairs]
    return {
        "durations": len(lives),
        **spread("duration_error", [relative(recorded, true) for recorded, true, _ in lives]),
        **spread("duration_error_us", [abs(recorded - true) / 1000 for recorded, true, _ in lives]),
        **spread(
            "duration_error_from_send",
            [relative(duration_ns(record), line["end_ns"] - start) for record, line, seen in pairs if (start := from_first_byte(seen))],
        ),
        **spread(
            "duration_error_from_recv", [relative(duration_ns(record), line["end_ns"] - line["begin_ns"]) for record, line, _ in pairs]
        ),
        "phase_sum_error_max": max((relative(total, duration) for total, duration in sums), default=None),
    }


def duration_ns(record: Line) -> int:
    return int(record["end_ns"] - record["start_ns"])


def step_scores(pairs: Sequence[Pair]) -> Score:
    """Time in each storage phase, summed over all requests, in ms."""
    scores: Score = {}
    for phase, steps in STEPS.items():
        true_ms = sum(step["ns"] for _, line, _ in pairs for step in line["steps"] if step["step"] in steps) / 1e6
        recorded_ms = sum(record["phase_totals"].get(phase, 0.0) for record, _, _ in pairs)
        scores[f"{phase}_true_ms"] = true_ms
        scores[f"{phase}_recorded_ms"] = recorded_ms
        scores[f"{phase}_ratio"] = recorded_ms / true_ms if true_ms else None
    return scores


def percent(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None


def relative(recorded: float, true: float) -> float:
    return abs(recorded - true) / true if true else math.inf


def spread(name: str, values: Sequence[float]) -> Score:
    ordered = sorted(values)
    return {f"{name}_{point}": quantile(ordered, share) for point, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def count(value: float) -> str:
    return f"{value:,.0f}"


def plain_percent(value: float) -> str:
    return f"{value:.3f} %"


def ratio_percent(value: float) -> str:
    return f"{value * 100:.3f} %"


def microseconds(value: float) -> str:
    return f"{value:,.1f} µs"


def milliseconds(value: float) -> str:
    return f"{value:,.1f} ms"


def ratio(value: float) -> str:
    return f"{value:.4f}"


#: How a name ends, and so how its number reads; the first that fits.
FORMATS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("_pct", plain_percent),
    ("_ms", milliseconds),
    ("_ratio", ratio),
    ("_us_p50", microseconds),
    ("_us_p99", microseconds),
    ("_us_max", microseconds),
    ("_p50", ratio_percent),
    ("_p99", ratio_percent),
    ("_max", ratio_percent),
    ("_bytes", lambda value: f"{count(value)} B"),
    ("", count),
)


def table(scores: Score) -> str:
    """One line for each number, with its unit; `-` where there was nothing to compare."""
    width = max(map(len, scores))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {number_text(name, value):>16}" for name, value in scores.items())


def number_text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return next(form for ending, form in FORMATS if name.endswith(ending))(value)


def read_lines(path: Path) -> list[Line]:
    """Raises UsageError naming the file and the line."""
    lines = []
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    lines.append(json.loads(text))
                except ValueError as error:
                    raise UsageError(f"{path}:{number}: not a JSON line ({error}); was its writer stopped half way?") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from error
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the agent's records with the truth.")
    parser.add_argument("--records", type=Path, required=True, help="the agent's records, JSON lines")
    parser.add_argument("--truth", type=Path, required=True, help="what `bucketprobe.demo.bucket --truth` wrote")
    parser.add_argument("--client", type=Path, required=True, help="what `bucketprobe.demo.load --log` wrote")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to this file, too")
    options = parser.parse_args(arguments)
    try:
        scores = score(*(read_lines(path) for path in (options.records, options.truth, options.client)))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        options.json.write_text(json.dumps(scores, indent=2) + "\n")
    print(table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""How right the agent was: its records against what the demo server wrote down and what the load's clients saw.

    python tests/truth/score.py --records records.jsonl --truth truth.jsonl --client client.jsonl

All three are JSON lines, joined by `request_id`; all times are the host's CLOCK_MONOTONIC. What a client did not time (curl)
is left out where durations are compared.

The true end is when the last byte of the answer was with the server's kernel. Nobody stamps that moment itself, but three
stamps can only come after it, so that the earliest of them is nearest: the server's clock after its last send (`end_ns`; late
where its thread then waited for the interpreter lock or a CPU), the client's kernel when the last segment arrived (`rx_ns`;
late where the answer's tail still lay in the server's send buffer because the client read slowly), and the client's clock
after its last read (`done_ns`).

The true start is when the first byte became readable. The client's kernel stamps the segment with it as it leaves for the
loopback device (`tx_ns`), which delivers it there and then; without that stamp it lies between the clocks before and after
the client's call. (The kernel stamps in wall time; stamps that do not lie between the client's own are not used, since
somebody then set that clock.) The first request of a connection begins with the connection if its first byte was there when the server
accepted, and else like any other. The server's own stamp after accept(2) is late like all of its stamps: where it lies after
the sending, both starts are possible, the connection's known only to lie within connect(2). An error is the distance to the
nearest possible truth; how many truths are not a point, and how wide they are, is part of the result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError
from bucketprobe.model import LABELS

Line = Mapping[str, Any]
#: Plain numbers by name; None where there was nothing to compare.
Score = dict[str, float | int | None]

COUNTERS = ("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames")

#: What this project promises: no more than this of each number.
GOALS = {
    "missing": 0,
    "duplicated": 0,
    "invented": 0,
    "status_wrong": 0,
    "method_wrong": 0,
    "outcome_wrong": 0,
    "bytes_in_wrong": 0,
    "bytes_out_wrong": 0,
    "client_disagrees": 0,
    "write_wrong_bytes": 0,
    "write_unattributed_bytes": 0,
    "read_wrong_bytes": 0,
    "read_unattributed_bytes": 0,
    "duration_error_p50": 0.02,
    "duration_error_p99": 0.05,
    "phase_sum_error_max": 0.001,
}

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
        **phase_sum_scores(pairs),
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


@dataclass(frozen=True, slots=True)
class Life:
    """When a request began and ended, as recorded and in truth; `start_ns` is the possible one that is nearest to the record's.

    `uncertain_ns`: how far apart the possible starts are. `told_by`: whose stamp the end is. `stamped`: the kernel's were used.
    """

    record: Line
    start_ns: int
    end_ns: int
    uncertain_ns: int
    told_by: str
    stamped: bool

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


def life(record: Line, line: Line, seen: Line) -> Life:
    stamped = are_ordered(seen["send_ns"], seen["tx_ns"], seen["rx_ns"], seen["done_ns"])
    ends = {"server": line["end_ns"], "client": seen["done_ns"], **({"arrival": seen["rx_ns"]} if stamped else {})}
    told_by, end_ns = min(ends.items(), key=lambda end: end[1])
    sent = (seen["tx_ns"], seen["tx_ns"]) if stamped else (seen["send_ns"], seen["sent_ns"])
    windows = [sent]
    if seen["connect_ns"] is not None and line["accept_ns"] >= sent[0]:
        windows.append((seen["connect_ns"], seen["connected_ns"]))
    nearest = min((clamp(record["start_ns"], *window) for window in windows), key=lambda ns: abs(record["start_ns"] - ns))
    uncertain_ns = max(high for _, high in windows) - min(low for low, _ in windows)
    return Life(record, nearest, end_ns, uncertain_ns, told_by, stamped)


def are_ordered(*stamps: int | None) -> bool:
    known = [stamp for stamp in stamps if stamp is not None]
    return len(known) == len(stamps) and known == sorted(known)


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def duration_scores(pairs: Sequence[Pair]) -> Score:
    """Errors of the records' durations, relative to the true ones (0.01 is 1 %) and in us; and what the truth is worth."""
    lives = [life(record, line, seen) for record, line, seen in pairs if seen is not None and seen["send_ns"] is not None]
    uncertain = [one.uncertain_ns / 1000 for one in lives if one.uncertain_ns]
    return {
        "durations": len(lives),
        **spread("duration_error", [relative(duration_ns(one.record), one.duration_ns) for one in lives]),
        **spread("duration_error_us", [abs(duration_ns(one.record) - one.duration_ns) / 1000 for one in lives]),
        **spread("start_error_us", [abs(one.record["start_ns"] - one.start_ns) / 1000 for one in lives]),
        **spread("end_error_us", [abs(one.record["end_ns"] - one.end_ns) / 1000 for one in lives]),
        # All that can be wrong with the true end is that it is late: only a record that is later still errs for certain.
        **spread("end_too_late_us", [max(0, one.record["end_ns"] - one.end_ns) / 1000 for one in lives]),
        "true_starts_uncertain": len(uncertain),
        **spread("true_start_window_us", uncertain),
        "true_times_not_from_kernel": sum(not one.stamped for one in lives),
        **{f"true_ends_told_by_{name}": sum(one.told_by == name for one in lives) for name in ("server", "arrival", "client")},
    }


def phase_sum_scores(pairs: Sequence[Pair]) -> Score:
    sums = [(sum(record["phases"].values()) * 1e6, duration_ns(record)) for record, _, _ in pairs]
    return {"phase_sum_error_max": max((relative(total, duration) for total, duration in sums), default=None)}


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


def shortfalls(scores: Score) -> list[str]:
    """A line for each goal that was not reached; a number that is not there does not reach it."""
    return [
        f"{name.replace('_', ' ')}: {number_text(name, scores[name])}, and at most {number_text(name, goal)} is promised"
        for name, goal in GOALS.items()
        if (value := scores[name]) is None or value > goal
    ]


def percent(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None


def relative(recorded: float, true: float) -> float:
    return abs(recorded - true) / true if true > 0 else math.inf


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

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
the sending, or where the server cannot tell it, both starts are possible, the connection's known only to lie within connect(2).
An error is the distance to the nearest possible truth; how many truths are not a point, and how wide they are, is part of the
result.

File work is compared by its counters, and its time as `place_time` says. A counter or a time that the server cannot know is null
in its line and is not compared. What a request shows and did not do is wrong; what it did and does not show is unattributed; both
carry the label of its record.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError
from bucketprobe.model import LABELS

Line = Mapping[str, Any]
#: Plain numbers by name; None where there was nothing to compare.
Score = dict[str, float | int | None]

COUNTERS = ("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames")

#: What is exact under every server: no more than this of each number.
EXACT_GOALS: Mapping[str, float] = {
    "missing": 0,
    "duplicated": 0,
    "invented": 0,
    "status_wrong": 0,
    "method_wrong": 0,
    "outcome_wrong": 0,
    "bytes_in_wrong": 0,
    "bytes_out_wrong": 0,
    "client_disagrees": 0,
    "exact_but_wrong": 0,
    "exact_wrong_bytes": 0,
    "exact_wrong_ms": 0,
    "duration_error_p50": 0.02,
    "duration_error_p99": 0.05,
    "phase_sum_error_max": 0.001,
}

#: What this project promises where a thread serves one request at a time.
GOALS: Mapping[str, float] = {
    **EXACT_GOALS,
    "write_wrong_bytes": 0,
    "write_unattributed_bytes": 0,
    "read_wrong_bytes": 0,
    "read_unattributed_bytes": 0,
}

#: And under every other server: at least this of each number.
FLOORS: Mapping[str, float] = {"write_right_pct": 99, "read_right_pct": 99, "metadata_time_right_pct": 98}


@dataclass(frozen=True, slots=True)
class Work:
    """What a record has in one phase: the server's steps that it is the time of, and the counters of its calls and bytes."""

    steps: tuple[str, ...]
    place: str  # the field of the record and of the truth with the counters
    calls: tuple[str, ...]
    sizes: tuple[str, ...]


#: By phase. The catalog counts the time of open, rename and the like as storage_write.
WORK: Mapping[str, Work] = {
    "storage_write": Work(
        ("storage_write", "open", "close", "rename", "mkdir", "link", "unlink", "truncate"),
        "files",
        ("opens", "write_calls", "renames"),
        ("write_bytes",),
    ),
    "storage_sync": Work(("storage_sync",), "files", ("syncs",), ()),
    "storage_read": Work(("storage_read",), "files", ("read_calls",), ("read_bytes",)),
    "metadata": Work(
        ("metadata",), "metadata_files", ("opens", "write_calls", "read_calls", "syncs", "renames"), ("write_bytes", "read_bytes")
    ),
}

#: The phases of which a time is the sum.
TIMES: Mapping[str, tuple[str, ...]] = {
    "write_time": ("storage_write", "storage_sync"),
    "read_time": ("storage_read",),
    "metadata_time": ("metadata",),
}

#: By how much a time may exceed what the server itself measured around those calls: it does not bracket each of them (close).
EXCESS_SHARE, EXCESS_MS = 0.05, 0.5


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
        **{name: value for kind in TIMES for name, value in time_scores(kind, pairs, excess, missing).items()},
        **file_scores(pairs),
        **label_scores(pairs),
        **claim_scores(pairs),
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


def differ(name: str, found: Line, true: Line) -> bool:
    """Byte counts that the server does not know are not compared; a status that it does not have is none."""
    return found[name] != true[name] and not (true[name] is None and name.startswith("bytes"))


def field_scores(pairs: Sequence[Pair]) -> Score:
    def wrong(name: str) -> int:
        return sum(differ(name, record, line) for record, line, _ in pairs)

    def disagrees(line: Line, seen: Line) -> bool:
        return any(differ(name, seen, line) for name in ("status", "bytes_in", "bytes_out"))

    return {
        "status_wrong": wrong("status"),
        "method_wrong": wrong("method"),
        "outcome_wrong": wrong("outcome"),
        "bytes_in_wrong": wrong("bytes_in"),
        "bytes_out_wrong": wrong("bytes_out"),
        "client_disagrees": sum(seen is not None and disagrees(line, seen) for _, line, seen in pairs),
        "with_lost_events": sum(record["lost_events"] > 0 for record, _, _ in pairs),
    }


# --- file work ---


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes, or ms, of one request: shown and its own, shown and not its own, its own and not shown."""

    right: float
    wrong: float
    unattributed: float


def byte_scores(kind: str, pairs: Sequence[Pair], excess: Sequence[Line], missing: Sequence[Line]) -> Score:
    """Bytes of storage calls: on the right request, on a wrong one, on none. In % of the truth's."""
    name = f"{kind}_bytes"
    placed = [
        (label, place_bytes(found, true))
        for label, found, true in (
            *((label_of(record), record["files"][name], known(line, "files", name)) for record, line, _ in pairs),
            *((label_of(record), record["files"][name], 0) for record in excess),
            *(("unattributed", 0, known(line, "files", name)) for line in missing),
        )
        if true is not None
    ]
    return {
        name: sum(round(one.right + one.unattributed) for _, one in placed),
        f"{kind}_wrong_bytes": sum(round(one.wrong) for _, one in placed),
        f"{kind}_unattributed_bytes": sum(round(one.unattributed) for _, one in placed),
        **placed_scores(kind, placed),
    }


def time_scores(kind: str, pairs: Sequence[Pair], excess: Sequence[Line], missing: Sequence[Line]) -> Score:
    """Time in one kind of file work: on the right request, on a wrong one, on none. In % of what is right or unattributed, since
    how long the calls themselves took, nobody but the agent measured."""
    placed = [(label_of(record), place_phase(phase, record, line)) for phase in TIMES[kind] for record, line, _ in pairs]
    placed += [(label_of(record), Placed(0, recorded_ms(phase, record), 0)) for phase in TIMES[kind] for record in excess]
    placed += [("unattributed", Placed(0, 0, true_ms(phase, line) or 0)) for phase in TIMES[kind] for line in missing]
    return {
        f"{kind}_ms": sum(one.right + one.unattributed for _, one in placed),
        f"{kind}_wrong_ms": sum(one.wrong for _, one in placed),
        f"{kind}_unattributed_ms": sum(one.unattributed for _, one in placed),
        **placed_scores(kind, placed),
    }


def placed_scores(kind: str, placed: Sequence[tuple[str, Placed]]) -> Score:
    """The shares in all, and by the records' labels; all in % of the truth."""
    total = sum(one.right + one.unattributed for _, one in placed)
    scores: Score = {}
    for part in ("right", "wrong", "unattributed"):
        sums = dict.fromkeys(LABELS, 0.0)
        for label, one in placed:
            sums[label] += getattr(one, part)
        scores[f"{kind}_{part}_pct"] = percent(sum(sums.values()), total)
        scores |= {f"{kind}_{part}_{label}_pct": percent(value, total) for label, value in sums.items()}
    return scores


def place_bytes(recorded: float, true: float) -> Placed:
    right = min(recorded, true)
    return Placed(right, recorded - right, true - right)


def place_phase(phase: str, record: Line, line: Line) -> Placed:
    """The time that a record shows in one phase, against its line of the truth."""
    work = WORK[phase]
    calls, sizes = (counted(work.place, names, record, line) for names in (work.calls, work.sizes))
    return place_time(recorded_ms(phase, record), true_ms(phase, line), calls, sizes)


def place_time(recorded: float, true: float | None, calls: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> Placed:
    """How much of the recorded time of one request in one phase is right, how much is wrong, how much is missing, in ms.

    `true`: the server's own time around these calls, None where it cannot know. It is longer than the calls: after each of them
    the server's thread may have waited for a CPU or the interpreter's lock. So it is an upper bound, and which calls the time
    belongs to is told by their counters. `calls` and `sizes`: what the record counts and what the server does, for each counter
    that the server knows; sizes are in bytes.

    The rule:

    1. What exceeds the upper bound by more than 5 % and 0.5 ms is another's: it is wrong.
    2. Of the rest, the share that the server's calls have of the recorded ones is right, and what remains is wrong. It is counted
       in calls and in bytes, call by counter, and the smaller share counts. Where all counters agree it is 1.
    3. What the server did and the record lacks is unattributed: the share that the missing calls (or bytes, whichever is more)
       have of the server's, of the server's own time.

    A server that tells no counters leaves only the bound: up to it a time is right, and unattributed is all or, as soon as the
    record shows any, nothing. One that tells no time has no bound, and a missing call of it weighs as much as those found; where
    none is found, nobody knows how much.
    """
    bounded = recorded if true is None else min(recorded, bound_ms(true))
    right = bounded * min(share_found(calls), share_found(sizes))
    backwards = [[(server, found) for found, server in counters] for counters in (calls, sizes)]
    found = min(map(share_found, backwards))
    if not any(backwards):
        found = 1.0 if recorded or not true else 0.0
    if true is None:
        true = right / found if found else 0.0
    return Placed(right, recorded - right, true * (1 - found))


def bound_ms(true: float) -> float:
    return true * (1 + EXCESS_SHARE) + EXCESS_MS


def share_found(counters: Sequence[tuple[int, int]]) -> float:
    """Of what the first of each two counts, the share that the second counts, too. 1 of nothing."""
    whole = sum(first for first, _ in counters)
    return sum(map(min, counters)) / whole if whole else 1.0


def known(line: Line, place: str, name: str) -> int | None:
    """A counter of the server's; None where it cannot know."""
    value: int | None = (line.get(place) or {}).get(name)
    return value


def counted(place: str, names: Iterable[str], record: Line, line: Line) -> list[tuple[int, int]]:
    """What the record counts and what the server did, for each counter that the server knows."""
    return [(record[place][name], true) for name in names if (true := known(line, place, name)) is not None]


def recorded_ms(phase: str, record: Line) -> float:
    return float(record["phase_totals"].get(phase, 0.0))


def true_ms(phase: str, line: Line) -> float | None:
    """The server's own time in the steps of a phase. None where it did not time them: it tells of none, and does not say either
    that it made no such call."""
    work = WORK[phase]
    times = [step["ns"] for step in line["steps"] if step["step"] in work.steps]
    if None in times or (not times and any(known(line, work.place, name) != 0 for name in work.calls)):
        return None
    return sum(times) / 1e6


def file_scores(pairs: Sequence[Pair]) -> Score:
    def wrong(place: str, name: str) -> int:
        return sum(any(found != true for found, true in counted(place, (name,), record, line)) for record, line, _ in pairs)

    return {
        "files_wrong": sum(bool(differences(record, line)) for record, line, _ in pairs),
        **{f"files_{name}_wrong": wrong("files", name) for name in COUNTERS},
        **{f"metadata_files_{name}_wrong": wrong("metadata_files", name) for name in COUNTERS},
    }


def differences(record: Line, line: Line) -> list[str]:
    """What a record counts otherwise than the server, and times that are longer than the server's own; in words."""
    counters = [(place, name) for place in ("files", "metadata_files") for name in COUNTERS]
    found = [
        f"{place}.{name}: {record[place][name]:,}, truly {true:,}"
        for place, name in counters
        if (true := known(line, place, name)) is not None and record[place][name] != true
    ]
    for phase in WORK:
        shown, seen = recorded_ms(phase, record), true_ms(phase, line)
        if seen is not None and shown > bound_ms(seen):
            found.append(f"{phase}: {shown:.3f} ms, and the server itself saw {seen:.3f} ms")
    return found


def label_of(record: Line) -> str:
    label: str = record["attribution"]["label"]
    return label


def label_scores(pairs: Sequence[Pair]) -> Score:
    """How many records carry each label, and how many of those are wrong in any counter or time."""
    labels = [label_of(record) for record, _, _ in pairs]
    wrong = [label_of(record) for record, line, _ in pairs if differences(record, line)]
    return {
        **{f"label_{label}_pct": percent(labels.count(label), len(labels)) for label in LABELS},
        **{f"{label}_but_wrong": wrong.count(label) for label in LABELS},
    }


def claim_scores(pairs: Sequence[Pair]) -> Score:
    """Bytes and ms that carry a label, and how much of that is another request's.

    What a record shows as `exact`, beside work with a weaker label, is in its `by_label`. What is wrong in it is put down to the
    weakest labels first, so that each `wrong` is what is certainly so.
    """
    sums = {f"{label}_{part}": 0.0 for label in LABELS for part in ("bytes", "wrong_bytes", "ms", "wrong_ms")}
    for record, line, _ in pairs:
        for unit, wrong in (("bytes", wrong_bytes(record, line)), ("ms", wrong_ms(record, line))):
            for label, claimed in sorted(claims(record, unit).items(), key=lambda claim: LABELS.index(claim[0]), reverse=True):
                charged = min(wrong, claimed)
                wrong -= charged
                sums[f"{label}_{unit}"] += claimed
                sums[f"{label}_wrong_{unit}"] += charged
    return {
        **{name: round(value) if name.endswith("bytes") else value for name, value in sums.items()},
        **{f"{label}_wrong_bytes_pct": percent(sums[f"{label}_wrong_bytes"], sums[f"{label}_bytes"]) for label in LABELS},
        **{f"{label}_wrong_ms_pct": percent(sums[f"{label}_wrong_ms"], sums[f"{label}_ms"]) for label in LABELS},
    }


def claims(record: Line, unit: str) -> dict[str, float]:
    """How many bytes or ms of a record carry which label; all of them the record's own where it does not tell them apart."""
    by_label = record["attribution"]["by_label"]
    if by_label:
        return {label: share[unit] for label, share in by_label.items()}
    if unit == "ms":
        return {label_of(record): sum(recorded_ms(phase, record) for phase in WORK)}
    return {label_of(record): sum(record[place][name] for place, name in SIZES)}


SIZES = tuple((place, name) for place in ("files", "metadata_files") for name in ("write_bytes", "read_bytes"))


def wrong_bytes(record: Line, line: Line) -> float:
    return sum(max(0, found - true) for place, name in SIZES for found, true in counted(place, (name,), record, line))


def wrong_ms(record: Line, line: Line) -> float:
    """What of a record's time is another's. Where it has several labels, what its calls took on an average says nothing of the calls
    with one of them; then only what exceeds the server's own time is certain."""
    if sum(ms > 0 for ms in claims(record, "ms").values()) < 2:
        return sum(place_phase(phase, record, line).wrong for phase in WORK)
    times = [(recorded_ms(phase, record), true_ms(phase, line)) for phase in WORK]
    return sum(max(0.0, recorded - bound_ms(true)) for recorded, true in times if true is not None)


def examples(records: Iterable[Line], truth: Iterable[Line], limit: int) -> list[dict[str, Any]]:
    """Up to `limit` requests for each label whose record does not tell the truth: what differs, in words, and both lines."""
    expected = by_id(truth)
    left = dict.fromkeys(LABELS, limit)
    return list(_examples(records, expected, left))


def _examples(records: Iterable[Line], expected: Mapping[str, Line], left: dict[str, int]) -> Iterator[dict[str, Any]]:
    for record in records:
        line = expected.get(record["request_id"])
        label = label_of(record)
        if line is None or not left[label] or not (words := differences(record, line)):
            continue
        left[label] -= 1
        yield {"label": label, "differs": words, "record": record, "truth": line}


# --- time ---


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
    stamps = {"server": line["end_ns"], "client": seen["done_ns"], "arrival": seen["rx_ns"] if stamped else None}
    told_by, end_ns = min(((name, ns) for name, ns in stamps.items() if ns is not None), key=lambda end: end[1])
    sent = (seen["tx_ns"], seen["tx_ns"]) if stamped else (seen["send_ns"], seen["sent_ns"])
    windows = [sent]
    if seen["connect_ns"] is not None and (line["accept_ns"] is None or line["accept_ns"] >= sent[0]):
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
    """Time in each storage phase, summed over all requests whose server timed it, in ms."""
    scores: Score = {}
    for phase in WORK:
        times = [(recorded_ms(phase, record), true_ms(phase, line)) for record, line, _ in pairs]
        known = [(recorded, true) for recorded, true in times if true is not None]
        true_sum, recorded_sum = sum(true for _, true in known), sum(recorded for recorded, _ in known)
        scores[f"{phase}_true_ms"] = true_sum
        scores[f"{phase}_recorded_ms"] = recorded_sum
        scores[f"{phase}_ratio"] = recorded_sum / true_sum if true_sum else None
    return scores


def shortfalls(scores: Score, most: Mapping[str, float] = GOALS, least: Mapping[str, float] | None = None) -> list[str]:
    """A line for each goal that was not reached; a number that is not there does not reach it."""
    limits = [(name, goal, "most", 1) for name, goal in most.items()]
    limits += [(name, goal, "least", -1) for name, goal in (least or {}).items()]
    return [
        f"{name.replace('_', ' ')}: {number_text(name, scores[name])}, and at {side} {number_text(name, goal)} is promised"
        for name, goal, side, sign in limits
        if (value := scores[name]) is None or value * sign > goal * sign
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

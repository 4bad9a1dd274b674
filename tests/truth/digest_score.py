# SPDX-License-Identifier: Apache-2.0
"""How right the agent was about digests: its records against servers that know the truth about them (see servers.py).

    python tests/truth/digest_score.py --records records.jsonl --truth truth.jsonl

The time of a digest is on-CPU time, so that the truth is the CPU time of the server's hashing thread (`digest_cpu`, and `digest_other_cpu`
where a request has other things hashed, too: both count, and so do the bytes of both). A server that does not know it has its requests
counted, and not compared.

Sums are compared over requests whose time the agent knows; how many those are is a number of its own. The error of one request is the
distance to the truth in % of it. An error is admitted where it is no more than the record's own `error_pct`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bucketprobe.errors import BucketprobeError, UsageError
from bucketprobe.model import DIGEST_SOURCES

Line = Mapping[str, Any]
Score = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compared:
    """One request: what its record says, and the truth. Times in ms; None where not known."""

    operation: str
    source: str
    recorded: float | None
    true: float
    admitted_pct: float | None

    @property
    def error_pct(self) -> float:
        """How far off. Only where both are known, and the truth is not 0."""
        assert self.recorded is not None
        return 100 * abs(self.recorded - self.true) / self.true


def score(records: Iterable[Line], truth: Iterable[Line]) -> Score:
    """Compare. Raises UsageError where the truth has a request ID twice."""
    expected = by_id(truth)
    found = {record["request_id"]: record for record in records if record["request_id"] in expected}
    hashed = {name: line for name, line in expected.items() if step(line, "digest")}
    known = {name: true for name, line in hashed.items() if (true := true_ms(line))}
    compared = [compare(found[name], true) for name, true in known.items() if name in found]
    return {
        "requests": len(expected),
        "hashed": len(hashed),
        "time_not_known": len(hashed) - len(known),
        "missing": len(expected) - len(found),
        "time": {
            operation: time_scores([one for one in compared if one.operation == operation])
            for operation in sorted({one.operation for one in compared})
        },
        "phase_ratio": phase_ratio(found.values()),
        "values": value_scores(expected, found),
        "bytes": byte_scores(hashed, found),
        "verified": verify_scores(expected, found),
        "sources": dict(Counter(record["digest"]["source"] for name, record in found.items() if name in hashed)),
        "evidence": dict(Counter(str(record["digest"]["evidence"]) for name, record in found.items() if name in hashed)),
    }


def by_id(lines: Iterable[Line]) -> dict[str, Line]:
    """The lines that have a request ID, by it. Raises UsageError."""
    found: dict[str, Line] = {}
    for line in lines:
        request_id = line["request_id"]
        if request_id in found:
            raise UsageError(f"the truth has request {request_id} twice; send a different X-Request-ID with each request")
        if request_id is not None:
            found[request_id] = line
    return found


# --- the truth ---


def step(line: Line, name: str) -> Line | None:
    return next((one for one in line["steps"] if one["step"] == name), None)


def true_ms(line: Line) -> float | None:
    """On-CPU time of all of a request's hashing, in ms; None where the server does not know it."""
    cpu, other = step(line, "digest_cpu"), step(line, "digest_other_cpu")
    return None if cpu is None else (cpu["ns"] + (other["ns"] if other else 0)) / 1e6


def true_bytes(line: Line) -> int:
    """Bytes that were hashed for a request in all."""
    return sum(one["bytes"] for one in line["steps"] if one["step"] in ("digest", "digest_other"))


# --- time ---


def compare(record: Line, true: float) -> Compared:
    digest = record["digest"]
    return Compared(record["operation"], digest["source"], digest["ms"], true, digest["error_pct"])


def time_scores(compared: Sequence[Compared]) -> Score:
    """Of one operation: of all its requests, and by source."""
    by_source = {name: [one for one in compared if one.source == name] for name in DIGEST_SOURCES}
    return {
        **sums(compared),
        "known_pct": percent(sum(one.recorded is not None for one in compared), len(compared)),
        "by_source": {
            name: {**sums(some), "share_pct": percent(len(some), len(compared)), **errors(some)} for name, some in by_source.items() if some
        },
    }


def sums(compared: Sequence[Compared]) -> Score:
    known = [one for one in compared if one.recorded is not None]
    true = sum(one.true for one in known)
    recorded = sum(one.recorded or 0.0 for one in known)
    return {"requests": len(compared), "true_ms": true, "recorded_ms": recorded, "ratio": recorded / true if true else None}


def errors(compared: Sequence[Compared]) -> Score:
    known = [one for one in compared if one.recorded is not None]
    distances = sorted(one.error_pct for one in known)
    admitted = [one for one in known if one.admitted_pct is not None and one.error_pct <= one.admitted_pct]
    own = [one.admitted_pct for one in known if one.admitted_pct is not None]
    return {
        "error_pct_p50": quantile(distances, 0.5),
        "error_pct_p95": quantile(distances, 0.95),
        "own_error_pct_p50": quantile(sorted(own), 0.5),
        "admitted_pct": percent(len(admitted), len(known)),
    }


def phase_ratio(records: Iterable[Line]) -> float | None:
    """The phase `digest` of all records, by the time in their digests: 1 where nothing else took its place."""
    known = [record for record in records if record["digest"]["ms"]]
    total = sum(record["digest"]["ms"] for record in known)
    return sum(record["phases"].get("digest", 0.0) for record in known) / total if total else None


# --- values ---


def value_scores(expected: Mapping[str, Line], found: Mapping[str, Line]) -> Score:
    """Of all uploads whose digest the server told: whether the record has it, and whether it has another."""
    uploads = {name: line["computed"] for name, line in expected.items() if line.get("computed")}
    seen = {name: found[name]["digest"]["computed"] for name in uploads if name in found}
    wrong = sorted(name for name, computed in seen.items() if computed not in (None, uploads[name]))
    right = sum(computed == uploads[name] for name, computed in seen.items())
    invented = sum(record["digest"]["computed"] is not None for name, record in found.items() if name not in uploads)
    return {
        "uploads": len(uploads),
        "right": right,
        "wrong": len(wrong),
        "not_found": len(uploads) - right - len(wrong),
        "invented": invented,
        "right_pct": percent(right, len(uploads)),
        "wrong_ids": wrong[:5],
    }


def byte_scores(hashed: Mapping[str, Line], found: Mapping[str, Line]) -> Score:
    """Bytes that were hashed: told right, told wrong, not told."""
    told = [(found[name]["digest"]["bytes"], true_bytes(line)) for name, line in hashed.items() if name in found]
    return {
        "right": sum(seen == true for seen, true in told),
        "wrong": sum(seen not in (None, true) for seen, true in told),
        "not_told": sum(seen is None for seen, _ in told),
    }


def verify_scores(expected: Mapping[str, Line], found: Mapping[str, Line]) -> Score:
    """Digests of what was read back: as the server has them, or otherwise; by result, as the records have them."""
    pairs = {
        name: (list(line.get("verified") or ()), found[name]["digest"]["post_storage_verify"])
        for name, line in expected.items()
        if name in found
    }
    differing = sorted(name for name, (true, seen) in pairs.items() if true != seen)
    return {
        "true": dict(Counter(result for true, _ in pairs.values() for result in true)),
        "recorded": dict(Counter(result for _, seen in pairs.values() for result in seen)),
        "requests_right": sum(true == seen and bool(true) for true, seen in pairs.values()),
        "requests_differing": len(differing),
        "differing_ids": differing[:5],
    }


# --- mismatches ---


def mismatch_scores(records: Iterable[Line], declared_wrong: Iterable[str], hidden: Iterable[str]) -> Score:
    """Which mismatches were told, of those that the clients made; and whether by what the server computed or by its answer.

    A hidden one is answered like every other upload, so that the answer cannot tell it.
    """
    wrong, unseen = set(declared_wrong), set(hidden)
    told: dict[str, list[Line]] = defaultdict(list)
    for record in records:
        if record["digest"]["mismatch_source"] is not None or record["digest"]["result"] == "mismatch":
            told[str(record["request_id"])].append(record)
    return {
        "declared_wrong": len(wrong),
        "hidden": len(unseen),
        "told": sum(name in told for name in wrong),
        "hidden_told": sum(name in told for name in unseen),
        "hidden_told_by_answer": sum(record["digest"]["mismatch_source"] != "computed" for name in unseen for record in told.get(name, ())),
        "missed_ids": sorted(wrong - told.keys()),
        "invented_ids": sorted(told.keys() - wrong),
        "told_twice": sum(len(some) > 1 for some in told.values()),
        "by_source": dict(Counter(str(record["digest"]["mismatch_source"]) for some in told.values() for record in some)),
    }


# --- goals ---


def time_shortfalls(found: Score, most_off_pct: float, least_known_pct: float) -> list[str]:
    """A line for each operation whose sum is off by more, or of which less is known."""
    missed = []
    for operation, scores in found["time"].items():
        ratio = scores["ratio"]
        if ratio is None or abs(ratio - 1) * 100 > most_off_pct:
            missed.append(f"{operation}: digest time is {ratio_text(ratio)} of the truth, and within {most_off_pct:g} % is promised")
        if scores["known_pct"] < least_known_pct:
            missed.append(
                f"{operation}: digest time is known of {scores['known_pct']:.1f} % of requests, and of {least_known_pct:g} % is promised"
            )
    return missed if found["time"] else ["no digest time could be compared"]


def value_shortfalls(found: Score, least_right_pct: float = 100.0) -> list[str]:
    """A line where fewer are right, and one where any is wrong."""
    values = found["values"]
    missed = []
    if 100 * values["right"] < least_right_pct * values["uploads"]:
        missed.append(f"digest values: {values['right']:,} of {values['uploads']:,} are right, {values['wrong']:,} are wrong")
    if values["wrong"] or values["invented"]:
        missed.append(f"digest values: {values['wrong']:,} wrong, {values['invented']:,} of requests that are no uploads")
    return missed if values["uploads"] else ["no digest value could be compared"]


def mismatch_shortfalls(found: Score, counted: float) -> list[str]:
    """`counted`: what the metric says."""
    missed = []
    if found["missed_ids"] or found["invented_ids"]:
        missed.append(f"mismatches: {len(found['missed_ids'])} not told, {len(found['invented_ids'])} told of requests without")
    if found["hidden_told_by_answer"]:
        missed.append(f"mismatches: {found['hidden_told_by_answer']} hidden ones are said to come from the answer")
    if counted != found["declared_wrong"]:
        missed.append(f"mismatches: the metric counts {counted:g} of {found['declared_wrong']}")
    return missed


def verify_shortfalls(found: Score, counted: Mapping[str, float]) -> list[str]:
    """`counted`: what the metric says, by result."""
    verified = found["verified"]
    missed = []
    if verified["requests_differing"]:
        missed.append(f"read back: {verified['requests_differing']:,} records do not say what the server found")
    if {name: value for name, value in counted.items() if value} != verified["true"]:
        missed.append(f"read back: the metric counts {dict(counted)}, the server {verified['true']}")
    return missed if verified["true"] else ["nothing was read back"]


# --- numbers and text ---


def percent(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


WIDTHS = {
    "operation": -10, "source": -8, "requests": 9, "share %": 9, "true ms": 11, "found ms": 11, "ratio %": 9,
    "err p50": 9, "p95": 8, "own": 7, "within %": 10,
}  # fmt: skip
COLUMNS = "".join(f"{name:<{-width}}" if width < 0 else f"{name:>{width}}" for name, width in WIDTHS.items())


def table(found: Score) -> str:
    """Time by operation and source; then values and the rest."""
    lines = [COLUMNS]
    for operation, scores in found["time"].items():
        rows = [("all", {**scores, "share_pct": scores["known_pct"]}), *scores["by_source"].items()]
        lines += [row(operation, source, one) for source, one in rows]
    values, read_back = found["values"], found["verified"]
    lines.append(
        f"values of {values['uploads']:,} uploads: {values['right']:,} right, {values['wrong']:,} wrong, {values['not_found']:,} not found,"
        f" {values['invented']:,} invented; bytes {found['bytes']}"
    )
    if read_back["true"] or read_back["recorded"]:
        lines.append(f"read back: true {read_back['true']}, records {read_back['recorded']}, {read_back['requests_differing']:,} differ")
    lines.append(
        f"phase/digest {number(found['phase_ratio'], 3)}, evidence {found['evidence']}, truth without CPU time {found['time_not_known']:,}"
    )
    return "\n".join(lines)


def row(operation: str, source: str, one: Score) -> str:
    ratio = None if one["ratio"] is None else 100 * one["ratio"]
    cells = f"{operation:<10}{source:<8}{one['requests']:>9,}{number(one['share_pct']):>9}"
    cells += f"{number(one['true_ms']):>11}{number(one['recorded_ms']):>11}{number(ratio):>9}"
    names = (("error_pct_p50", 9), ("error_pct_p95", 8), ("own_error_pct_p50", 7), ("admitted_pct", 10))
    return cells + "".join(f"{number(one.get(name)):>{width}}" for name, width in names)


# --- the command ---


def read_lines(path: Path) -> list[Line]:
    """Raises UsageError where it cannot be read or a whole line is not JSON."""
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON lines ({error}); name another file") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """0: compared; 2: the call was wrong."""
    parser = argparse.ArgumentParser(description="Compare digests in the agent's records with the server's own.")
    parser.add_argument("--records", type=Path, required=True, metavar="FILE")
    parser.add_argument("--truth", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    options = parser.parse_args(arguments)
    try:
        found = score(read_lines(options.records), read_lines(options.truth))
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

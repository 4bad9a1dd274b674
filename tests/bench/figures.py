# SPDX-License-Identifier: Apache-2.0
"""What was measured, as numbers with their spread, as a table and as JSON. Pure: no process, no clock."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

#: What was measured without and with the agent, one after the other.
Pair = tuple[float, float]
#: What a stretch of work cost, and how much work was done, in any units.
Spent = tuple[float, float]
#: An estimate, and the bounds of its 95 % interval.
Estimate = tuple[float, float, float]

#: How often what was measured is drawn again for an interval: its bounds then vary by less than they say.
RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity. `samples` (at least one) are in `unit` and in the order in which they were taken.

    `goal`: what its value should be at most. `estimate`: over all samples at once, with its interval, where a median of them would
    not do: of what is rare and then large it shows nothing.
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    goal: float | None = None
    estimate: Estimate | None = None

    @property
    def value(self) -> float:
        """What counts: the estimate, or else the median."""
        return self.estimate[0] if self.estimate else self.median

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    @property
    def reached(self) -> bool | None:
        """Whether the goal was reached; None where there is none."""
        return None if self.goal is None else self.value <= self.goal

    def record(self) -> dict[str, object]:
        estimate = dict(zip(("estimate", "low_95", "high_95"), self.estimate, strict=True)) if self.estimate else {}
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "n": len(self.samples),
            "samples": list(self.samples),
            "goal": self.goal,
            "reached": self.reached,
            **estimate,
        }


@dataclass(slots=True)
class Part:
    """The figures of one part of the bench, and in `note` under which conditions they were taken.

    `disturbed`: how many of its `pairs` were measured while another program on the host traced system calls, too. `error`: why
    the part has no figures.
    """

    name: str
    note: str = ""
    figures: list[Figure] = field(default_factory=list)
    pairs: int = 0
    disturbed: int = 0
    error: str | None = None

    def add(self, name: str, unit: str, samples: Sequence[float], goal: float | None = None, estimate: Estimate | None = None) -> None:
        self.figures.append(Figure(name, unit, tuple(samples), goal, estimate))

    def record(self) -> dict[str, object]:
        figures = [figure.record() for figure in self.figures]
        return {"note": self.note, "pairs": self.pairs, "disturbed": self.disturbed, "error": self.error, "figures": figures}


def alternate(pairs: int) -> Iterator[tuple[bool, bool]]:
    """Whether the agent is on, in the order of each pair: off on, on off, off on. So a drift of the host cancels out."""
    for i in range(pairs):
        yield (False, True) if i % 2 == 0 else (True, False)


def ratios(pairs: Sequence[Pair]) -> list[float]:
    """With the agent, relative to without."""
    return [on / off for off, on in pairs]


def differences(pairs: Sequence[Pair]) -> list[float]:
    """What the agent adds."""
    return [on - off for off, on in pairs]


def relative(stages: Sequence[Sequence[tuple[Spent, Spent]]]) -> float:
    """What work costs with what is measured, relative to without: the geometric mean over stages of each one's ratio of sums.

    Sums, so that a cost which comes seldom counts as much as it took. In stages, so that what differs between the two sides besides
    cancels out where they change places from one stage to the next.
    """
    logs = []
    for pairs in stages:
        off, on = (_cost(sides) for sides in zip(*pairs, strict=True))
        logs.append(math.log(on / off))
    return math.exp(statistics.fmean(logs))


def _cost(spent: Sequence[Spent]) -> float:
    return sum(cost for cost, _ in spent) / sum(work for _, work in spent)


def relative_interval(stages: Sequence[Sequence[tuple[Spent, Spent]]]) -> Estimate:
    """`relative` with its 95 % interval: each stage's pairs are drawn again and again (a bootstrap, the same whenever it is asked)."""
    draw = random.Random(len(stages))
    found = sorted(relative([draw.choices(pairs, k=len(pairs)) for pairs in stages]) for _ in range(RESAMPLES))
    return relative(stages), found[round(0.025 * RESAMPLES)], found[round(0.975 * RESAMPLES) - 1]


def largest_share(readings: Sequence[tuple[float, float, float]], span: float) -> float:
    """The largest growth of a part relative to its whole within any stretch of at least `span` seconds.

    `readings`: time in seconds, part and whole, both only growing, one after the other. A stretch is from one reading to the first
    that is late enough. Raises ValueError where there is none in which the whole grew.
    """
    shares = []
    for i, (begin, part, whole) in enumerate(readings):
        end = next((later for later in readings[i + 1 :] if later[0] - begin >= span), None)
        if end is not None and end[2] > whole:
            shares.append((end[1] - part) / (end[2] - whole))
    return max(shares)


def size_text(size: int) -> str:
    """Bytes in binary units, for sizes that are whole numbers of them: `64 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or size % 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GiB"


def number_text(value: float) -> str:
    """Three decimals below 10, fewer above: a figure of a noisy host has no more digits than that."""
    magnitude = abs(value)
    decimals = 3 if magnitude < 10 else 2 if magnitude < 100 else 1 if magnitude < 1000 else 0
    return f"{value:,.{decimals}f}"


def goal_text(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    return f"<= {figure.goal:g}: {'reached' if figure.reached else 'missed'}"


HEADER = ("figure", "median", "min", "max", "n", "unit", "goal")
_RIGHT = {"median", "min", "max", "n"}


def table(parts: Sequence[Part]) -> str:
    """All parts below each other, in columns that line up. A figure that was taken once has no min and max.

    One with an estimate shows that and its interval instead, and says so in its name.
    """
    cells = {part.name: [_cells(figure) for figure in part.figures] for part in parts}
    everything = [HEADER, *(row for rows in cells.values() for row in rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(HEADER))]
    lines = ["  " + _line(HEADER, widths)]
    for part in parts:
        lines += ["", f"{part.name}: {part.note}" if part.note else part.name]
        if part.disturbed:
            lines.append(
                f"  ({part.disturbed} of {part.pairs} pairs: another program traced system calls, too; the agent may cost more than this)"
            )
        if part.error:
            lines.append(f"  failed: {part.error}")
        lines += ["  " + _line(row, widths) for row in cells[part.name]]
    return "\n".join(lines)


def _cells(figure: Figure) -> tuple[str, ...]:
    spread = (number_text(figure.low), number_text(figure.high)) if len(figure.samples) > 1 else ("", "")
    if figure.estimate:
        spread = (number_text(figure.estimate[1]), number_text(figure.estimate[2]))
    return (figure.name, number_text(figure.value), *spread, str(len(figure.samples)), figure.unit, goal_text(figure))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.rjust(width) if name in _RIGHT else cell.ljust(width) for name, cell, width in zip(HEADER, row, widths, strict=True))
    return "  ".join(cells).rstrip()


def document(parts: Sequence[Part], host: Mapping[str, object]) -> dict[str, object]:
    """What goes to results.json."""
    return {"host": dict(host), "parts": {part.name: part.record() for part in parts}}

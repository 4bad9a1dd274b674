# SPDX-License-Identifier: Apache-2.0
"""What was measured, as numbers with their spread, as a table and as JSON. Pure: no process, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

#: What was measured without and with the agent, one after the other.
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity. `samples` (at least one) are in `unit` and in the order in which they were taken.

    `goal`: what the median should be at most.
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    goal: float | None = None

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
        return None if self.goal is None else self.median <= self.goal

    def record(self) -> dict[str, object]:
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

    def add(self, name: str, unit: str, samples: Sequence[float], goal: float | None = None) -> None:
        self.figures.append(Figure(name, unit, tuple(samples), goal))

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
    """All parts below each other, in columns that line up. A figure that was taken once has no min and max."""
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
    return (figure.name, number_text(figure.median), *spread, str(len(figure.samples)), figure.unit, goal_text(figure))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.rjust(width) if name in _RIGHT else cell.ljust(width) for name, cell, width in zip(HEADER, row, widths, strict=True))
    return "  ".join(cells).rstrip()


def document(parts: Sequence[Part], host: Mapping[str, object]) -> dict[str, object]:
    """What goes to results.json."""
    return {"host": dict(host), "parts": {part.name: part.record() for part in parts}}

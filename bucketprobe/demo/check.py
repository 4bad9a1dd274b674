# SPDX-License-Identifier: Apache-2.0
"""The agent's numbers against those that the clients counted themselves. Pure: it compares what it is given.

Three views of the same requests: the clients' log (`bucketprobe.demo.load --log`), one scrape of /metrics, and the agent's
records. Each is counted on its own here; where two of them differ by one, that is a mismatch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

Line = Mapping[str, Any]

#: What a client's request of this kind is in the catalog; every other kind is a `write` (PUT) or a `read` (GET).
OPERATION_OF_KIND = {"metadata": "metadata", "versions": "list"}

#: What of a request both sides saw.
SHARED_FIELDS = ("method", "status", "bytes_in", "bytes_out")


@dataclass(frozen=True, slots=True)
class Histogram:
    """One histogram of a scrape: `buckets` are (upper bound, cumulative count), ascending, the last one's bound infinite."""

    buckets: tuple[tuple[float, float], ...]
    total: float

    @property
    def count(self) -> int:
        return int(self.buckets[-1][1]) if self.buckets else 0

    def quantile(self, share: float) -> float | None:
        """As PromQL's histogram_quantile estimates it: linear within a bucket. None where nothing was observed."""
        rank = share * self.count
        below, low = 0.0, 0.0
        for bound, cumulative in self.buckets if self.count else ():
            if cumulative >= rank:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (rank - below) / (cumulative - below) if cumulative > below else bound
            below, low = cumulative, bound
        return None


class Scrape:
    """The samples of one answer of /metrics."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[Sample]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append(sample)

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 for none."""
        return sum(sample.value for sample in self._with(name, labels))

    def by(self, *labels: str, name: str) -> dict[tuple[str, ...], int]:
        """The sums by the values of these labels, of those that are not 0."""
        sums: Counter[tuple[str, ...]] = Counter()
        for sample in self._samples[name]:
            sums[tuple(sample.labels[label] for label in labels)] += int(sample.value)
        return {values: count for values, count in sorted(sums.items()) if count}

    def histogram(self, name: str, **labels: str) -> Histogram:
        buckets: dict[float, float] = defaultdict(float)
        for sample in self._with(f"{name}_bucket", labels):
            buckets[float(sample.labels["le"])] += sample.value
        return Histogram(tuple(sorted(buckets.items())), self.total(f"{name}_sum", **labels))

    def _with(self, name: str, labels: Mapping[str, str]) -> list[Sample]:
        return [sample for sample in self._samples[name] if all(sample.labels.get(key) == value for key, value in labels.items())]


@dataclass(frozen=True, slots=True)
class Row:
    """One number, counted up to three times; None where that view does not have it."""

    what: str
    clients: int
    metrics: int | None
    records: int | None

    @property
    def agrees(self) -> bool:
        return all(seen in (None, self.clients) for seen in (self.metrics, self.records))


def compare(client: Sequence[Line], scrape: Scrape, records: Sequence[Line]) -> list[Row]:
    """Every number that both sides have: requests by operation and status, bytes, and each request by its ID."""
    return [*_by_status(client, scrape, records), *_requests(client, scrape, records), *_bytes(client, scrape, records)]


def losses(scrape: Scrape) -> dict[str, int]:
    """What the agent says that it lost, by `stage.cause`; empty where nothing."""
    return {".".join(key): count for key, count in scrape.by("stage", "cause", name="bucketprobe_lost_total").items()}


def operation(line: Line) -> str:
    """A client's request in the catalog's words."""
    if line["method"] == "PUT":
        return "write"
    return OPERATION_OF_KIND.get(line["kind"].removeprefix("curl_"), "read")


def _by_status(client: Sequence[Line], scrape: Scrape, records: Sequence[Line]) -> list[Row]:
    clients = Counter((operation(line), _status(line)) for line in client)
    recorded = Counter((record["operation"], _status(record)) for record in records)
    counted = {
        (name, status): count
        for name in ("write", "read")
        for (status,), count in scrape.by("status", name=f"bucket_artifact_{name}_count_total").items()
    }
    names = sorted({*clients, *recorded, *counted}, key=lambda key: (*_ORDER.get(key[0], (9, key[0])), key[1]))
    return [
        Row(f"{name}, {status}", clients[name, status], counted.get((name, status), 0) if name in ("write", "read") else None,
            recorded[name, status])
        for name, status in names
    ]  # fmt: skip


_ORDER = {name: (place, name) for place, name in enumerate(("write", "read", "metadata", "list"))}


def _status(line: Line) -> str:
    """The metrics' word for it: they have no status where none was seen."""
    return "unknown" if line["status"] is None else str(line["status"])


def _requests(client: Sequence[Line], scrape: Scrape, records: Sequence[Line]) -> list[Row]:
    answered = sum(line["status"] is not None for line in client)
    complete = sum(record["outcome"] == "complete" for record in records)
    garbled = sum(line["kind"].removeprefix("curl_") == "put_bad_digest" for line in client)
    mismatched = sum(record["digest"]["mismatch_source"] is not None for record in records)
    finished = "bucketprobe_requests_finished_total"
    return [
        Row("requests begun", len(client), int(scrape.total("bucketprobe_requests_begun_total")), None),
        Row("requests finished", len(client), int(scrape.total(finished)), len(records)),
        Row("answered in full", answered, int(scrape.total(finished, outcome="complete")), complete),
        Row("the same by their IDs", len(client), None, _same(client, records)),
        Row("digest mismatches", garbled, int(scrape.total("bucket_integrity_digest_mismatch_count_total")), mismatched),
    ]


def _same(client: Sequence[Line], records: Sequence[Line]) -> int:
    """Requests that have exactly one record, which says the same of them."""
    found: dict[str | None, list[Line]] = defaultdict(list)
    for record in records:
        found[record["request_id"]].append(record)
    return sum(len(seen) == 1 and all(seen[0][name] == line[name] for name in SHARED_FIELDS)
               for line in client for seen in (found[line["request_id"]],))  # fmt: skip


def _bytes(client: Sequence[Line], scrape: Scrape, records: Sequence[Line]) -> list[Row]:
    def written(line: Line) -> bool:
        return operation(line) == "write"

    writes = [record for record in records if record["operation"] == "write"]
    return [
        Row("bytes in, of writes", _sum(filter(written, client), "bytes_in"), int(scrape.total("bucket_artifact_write_size_bytes_sum")),
            _sum(writes, "bytes_in")),
        Row("bytes in", _sum(client, "bytes_in"), None, _sum(records, "bytes_in")),
        Row("bytes out", _sum(client, "bytes_out"), None, _sum(records, "bytes_out")),
    ]  # fmt: skip


def _sum(lines: Iterable[Line], name: str) -> int:
    return sum(line[name] or 0 for line in lines)


def render(rows: Sequence[Row], paint: Callable[[str, bool], str] = lambda text, _: text) -> str:
    """The comparison as a table of at most 79 columns; `paint(text, good)` may colour a verdict."""
    lines = [f"  {'':<23}{'clients':>14}{'metrics':>14}{'records':>14}"]
    for row in rows:
        figures = "".join(f"{'-' if number is None else f'{number:,}':>14}" for number in (row.clients, row.metrics, row.records))
        lines.append(f"  {row.what:<23}{figures}  {paint('ok' if row.agrees else 'MISMATCH', row.agrees)}")
    return "\n".join(lines) + "\n"

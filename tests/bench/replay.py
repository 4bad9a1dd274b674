# SPDX-License-Identifier: Apache-2.0
"""Where the agent's CPU time goes: one recording of the ring, played again and again through the agent's own code.

Live, decoding, tracking and resolving are one process's time and cannot be told apart. So the same events are decoded only, then
tracked with nothing decided (`Undecided`), then handled as the agent does; what each step adds is its cost. Needs no kernel.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from unittest.mock import patch

from figures import alternate

from bucketprobe import abi, decode, tracker
from bucketprobe.config import FileClasses, StorageSpec
from bucketprobe.errors import BucketprobeError
from bucketprobe.exporters.jsonl import JsonLines
from bucketprobe.model import Request
from bucketprobe.resolve import Decision, Live, Piece, Process, Unit
from bucketprobe.sinks.attribution import AttributionSink
from bucketprobe.sinks.metrics import MetricsSink
from bucketprobe.wire import Message

#: How often held requests are looked at, in the recording's time: about as often as a loaded agent empties its ring.
TICK_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Recording:
    """What an agent got: the ring's records in their order, its broker's messages and the secret of its tokens.

    `requests`: how many were made.
    """

    records: Sequence[bytes]
    messages: Sequence[Message]
    secret: int
    storage: StorageSpec
    requests: int

    @property
    def bytes_per_request(self) -> float:
        return sum(map(len, self.records)) / self.requests


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time in us per request, as one run through the recording found it.

    `tracking`: everything but decoding and resolving, with metrics and records.
    """

    decoding: float
    tracking: float
    resolving: float

    @property
    def resolving_pct(self) -> float:
        return 100 * self.resolving / (self.decoding + self.tracking + self.resolving)


class Undecided(Process):
    """Keeps the same work, but asks no question: whatever lies in a request's life when that ends is its own, whosever it was.

    A request gets about as many pieces as with the resolver, so that making its record costs the same.
    """

    def awaits(self, live: Live) -> bool:
        return False

    def review(self, live: Live) -> list[tuple[Piece, list[Live]]]:
        return []

    def concerns(self, unit: Unit) -> bool:
        return True

    def claim(self, live: Live) -> Iterable[tuple[Unit, Decision]]:
        return ()

    def settle(self, live: Live) -> Iterable[tuple[Unit, Decision]]:
        for unit in self.pending.during(live.begun_ns, live.ended_ns):
            if unit.file.closed or unit.file.many:
                self.pending.discard(unit)
                if unit.file.unit is unit:
                    unit.file.unit = None
                yield unit, Decision((live,), "exact", "window")


def costs(recording: Recording, runs: int) -> list[Cost]:
    """Of each run, with and without the resolver in turns. Raises BucketprobeError where requests are missing."""
    gc.collect()
    gc.freeze()  # as the agent does before it begins
    try:
        return [_cost(recording, order) for order in alternate(runs)]
    finally:
        gc.unfreeze()


def _cost(recording: Recording, order: Sequence[bool]) -> Cost:
    decoding = decode_seconds(recording.records)
    whole = {resolving: play_seconds(recording, Process if resolving else Undecided) for resolving in order}
    us = 1e6 / recording.requests
    return Cost(decoding * us, (whole[False] - decoding) * us, (whole[True] - whole[False]) * us)


def decode_seconds(records: Sequence[bytes]) -> float:
    begin = time.process_time()
    for record in records:
        decode.decode(record)
    return time.process_time() - begin


def play_seconds(recording: Recording, process: type[Process] = Process) -> float:
    """CPU time of the agent's work on the recording, from bytes to records. Raises BucketprobeError where requests are missing."""
    with patch.object(tracker, "Process", process), closing(JsonLines(os.memfd_create("records"), "records", print)) as output:
        played = _tracker(recording, output)
        now = 0
        begin = time.process_time()
        for record in recording.records:
            event = decode.decode(record)
            if event.kind != abi.Kind.PROCESS:
                played.feed(event)
            if event.ts - now > TICK_NS:
                now = event.ts
                played.tick(now)
                output.flush()
        played.flush()
        output.flush()
        seconds = time.process_time() - begin
    if played.records != recording.requests:
        raise BucketprobeError(f"{recording.requests} requests were recorded and {played.records} found in it: run the bench again.")
    return seconds


def _tracker(recording: Recording, output: JsonLines) -> tracker.Tracker:
    """One with all that hangs on it in the agent, and that knows what the broker told."""
    metrics, attribution = MetricsSink({"node_id": "bench"}), AttributionSink()

    def finished(request: Request) -> None:
        metrics.observe(request)
        attribution.observe(request)
        output.write(request)

    made = tracker.Tracker(FileClasses(recording.storage), lambda ns: ns, lambda _tgid, _fd: None, lambda _tgid: None, finished)
    made.secret = recording.secret
    for message in recording.messages:
        match message["op"]:
            case "process" if message["cwd"]:
                made.learn_cwd(message["tgid"], message["cwd"])
            case "runtime":
                made.learn_runtime(message["tgid"], message["kind"])
            case "files":
                for gen, _fd, path, flags in message["files"]:
                    made.learn_file(gen, path, flags)
    return made

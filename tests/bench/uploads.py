# SPDX-License-Identifier: Apache-2.0
"""Uploads of one size and nothing else, from threads of the bench itself: short stretches of load without a process to start for each."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bucketprobe.demo.load import KEY_BYTES, Block, Client, LoadOptions, Plan
from bucketprobe.errors import BucketprobeError


@dataclass(frozen=True, slots=True)
class Done:
    """Uploads that were answered, and the seconds from the first one's begin to the last one's end."""

    uploads: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.uploads / self.seconds


class Uploads:
    """New artifacts of `size` bytes for the server on `port`, each with the digest that it has."""

    def __init__(self, port: int, size: int, connections: int) -> None:
        self._options = LoadOptions(port, min_bytes=size, max_bytes=size)
        self._block = Block(1, size)
        self._connections = connections
        self._numbers = itertools.count()
        self._run = os.urandom(4).hex()

    def run(self, seconds: float, rate: float | None = None) -> Done:
        """A closed loop, or `rate` uploads per second where the server and this host carry them.

        Raises BucketprobeError where one was not acknowledged.
        """
        begin = time.monotonic()
        stop = threading.Event()
        with ThreadPoolExecutor(self._connections) as pool:
            work = [pool.submit(self._work, begin, begin + seconds, rate, index, stop) for index in range(self._connections)]
            try:
                done = [each.result() for each in work]
            finally:
                stop.set()
        return Done(sum(uploads for uploads, _ in done), max(end for _, end in done) - begin)

    def _work(self, begin: float, end: float, rate: float | None, index: int, stop: threading.Event) -> tuple[int, float]:
        """How many, and when the last was answered."""
        uploads, now = 0, begin
        with contextlib.closing(Client(self._options, self._block)) as client:
            for due in self._due(begin, rate, index):
                if due > now and stop.wait(min(due, end) - now):
                    break
                if time.monotonic() >= end or stop.is_set():
                    break
                self._upload(client)
                uploads, now = uploads + 1, time.monotonic()
        return uploads, now

    def _due(self, begin: float, rate: float | None, index: int) -> Iterator[float]:
        """When each upload of a connection is due; they take turns."""
        for number in itertools.count():
            yield begin + (index + number * self._connections) / rate if rate else begin

    def _upload(self, client: Client) -> None:
        number = next(self._numbers)
        content = self._block.content(self._options.min_bytes, number.to_bytes(KEY_BYTES, "big"))
        headers = (
            ("X-Artifact-Version", "1.0.0"),
            ("X-Artifact-Digest", content.digest),
            ("X-Uploaded-By", "bench"),
            ("X-Provenance-Source", "bench"),
            ("Content-Type", "application/octet-stream"),
        )
        name = f"{self._run}-{number}"
        outcome = client.exchange(Plan("put", "PUT", f"/v1/bench/{name}", 201, headers, content), name)
        if outcome.status != 201:
            raise BucketprobeError(f"An upload was answered with {outcome.status} ({outcome.error}): run the bench again.")

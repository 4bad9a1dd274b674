# SPDX-License-Identifier: Apache-2.0
"""How long a request's digests took: from calls that were timed, from gaps between its reads and writes, or from a rate.

While probes are on each call is timed; that is rarely affordable throughout. What they measured meanwhile gives the process's
rate, ns per byte. A thread that has one request reads a piece of the body, hashes it and writes it: the time in between, which
costs nothing to know, is the digest's and a little more, and how much more the rate tells. Where that does not fit (another
order, an event loop, a pool) the rate alone is a model. Nothing is said of a process that was never measured.

Pure. Times in ns, on a CPU but for those that are called stamps (CLOCK_MONOTONIC).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median, quantiles, stdev

from bucketprobe.model import DigestSource

#: Measurements that the rate is made of, and requests from which the gaps' own time is learned.
MEASUREMENTS, REQUESTS = 16, 256
#: The least that a measurement must be of, in bytes.
LEAST_BYTES = 1 << 18
#: How far a request may be from a measurement, in ns, to say something of the same time.
NEAR_NS = 2_000_000_000
#: Gaps hold digests where their own time is no more of them than this,
OWN_SHARE = 0.25
#: and what remains is within these bounds of what the rate says, for four of five requests.
FITS = (0.88, 1.15)
LEAST_REQUESTS = 20
#: A request whose gaps say that it took less or more of what the rate says did something else in them.
BELIEVED = (0.5, 3.0)
#: How well the probes' share in a call is known, ns, and that in a request's first, which finds nothing of them in the caches.
CALL_ERROR_NS, FIRST_ERROR_NS = 600.0, 12_000.0
#: The least error that is stated, per cent. They are to hold for 95 of 100 requests: see tests/truth.
EXACT_ERROR, GAP_ERROR, MODEL_ERROR = 3.0, 5.0, 10.0


@dataclass(frozen=True, slots=True)
class Timed:
    """What the probes saw of a request's digests: calls, their bytes, and the time in them without the probes' own."""

    ns: float
    bytes: int
    calls: int


@dataclass(frozen=True, slots=True)
class Gaps:
    """A request's gaps: their time, the bytes that were read before them, and their number."""

    ns: int = 0
    bytes: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    source: DigestSource
    ns: int
    error_pct: float


@dataclass(frozen=True, slots=True)
class _Measurement:
    from_ns: int
    until_ns: int
    rate: float
    bytes: int


class HashTime:
    """Of one process, or of several that run the same. What requests are asked for is worked out when something was measured."""

    def __init__(self) -> None:
        self._measurements: deque[_Measurement] = deque(maxlen=MEASUREMENTS)
        self._requests: deque[tuple[int, Gaps]] = deque(maxlen=REQUESTS)  # when it ended (a stamp), and its gaps
        self._owns: deque[float] = deque(maxlen=MEASUREMENTS)
        self._own = 0.0  # a gap's own time, ns
        self._fits = False
        self._spread = 0.0
        self._drift = 10.0
        #: ns per byte.
        self.rate: float | None = None

    def measured(self, nbytes: int, ns: int, from_ns: int, until_ns: int) -> None:
        """So many bytes took so long between these stamps."""
        if nbytes < LEAST_BYTES or ns <= 0:
            return
        now = _Measurement(from_ns, until_ns, ns / nbytes, nbytes)
        self._measurements.append(now)
        self.rate = sum(each.rate * each.bytes for each in self._measurements) / sum(each.bytes for each in self._measurements)
        rates = [each.rate for each in self._measurements]
        if len(rates) > 1:
            # By how much they differ among each other, per cent: twice their standard deviation.
            self._drift = 200 * stdev(rates) / median(rates)
        self._learn_gaps(now)

    def ended(self, end_ns: int, gaps: Gaps, hashed: int) -> None:
        """A request whose gaps no probe was in: its bytes were all hashed, once."""
        if gaps.count and 0 < gaps.bytes <= hashed:
            self._requests.append((end_ns, gaps))

    def estimate(self, hashed: int, timed: Timed | None, gaps: Gaps) -> Estimate | None:
        """Of a request that hashed so many bytes; `timed` where its calls were, all of them. None: nothing is known."""
        if timed and timed.ns > 0:
            unsure = timed.calls * CALL_ERROR_NS + FIRST_ERROR_NS
            return Estimate("exact", round(timed.ns), round(EXACT_ERROR + 100 * unsure / timed.ns, 1))
        rate = self.rate
        if rate is None or not hashed:
            return None
        if self._fits and gaps.count and gaps.bytes <= hashed:
            ns = gaps.ns - gaps.count * self._own + rate * (hashed - gaps.bytes)
            if BELIEVED[0] <= ns / (rate * hashed) <= BELIEVED[1]:
                return Estimate("gap", round(ns), round(GAP_ERROR + self._spread, 1))
        return Estimate("model", round(rate * hashed), round(MODEL_ERROR + self._drift, 1))

    def _learn_gaps(self, now: _Measurement) -> None:
        near = [gaps for end_ns, gaps in self._requests if now.from_ns - NEAR_NS < end_ns < now.until_ns + NEAR_NS]
        if len(near) < LEAST_REQUESTS:
            return
        self._owns.append(max(0.0, median((gaps.ns - now.rate * gaps.bytes) / gaps.count for gaps in near)))
        own = self._own = median(self._owns)
        ratios = [(gaps.ns - gaps.count * own) / (now.rate * gaps.bytes) for gaps in near]
        tenths = quantiles(ratios, n=10)
        self._fits = FITS[0] <= tenths[0] and tenths[-1] <= FITS[1] and own <= OWN_SHARE * median(gaps.ns / gaps.count for gaps in near)
        self._spread = 50 * (tenths[-1] - tenths[0])

# SPDX-License-Identifier: Apache-2.0
"""How long digests took, from what was measured: against processes of which it is known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe.hashtime import LEAST_BYTES, LEAST_REQUESTS, MEASUREMENTS, NEAR_NS, Estimate, Gaps, HashTime, Timed

MS, SECOND = 1_000_000, 1_000_000_000
MIB = 1 << 20
NO_GAPS = Gaps()


def at_rate(*rates: float) -> HashTime:
    """Measured so often, one second after the other."""
    time = HashTime()
    for second, rate in enumerate(rates):
        time.measured(MIB, round(rate * MIB), second * SECOND, second * SECOND + 20 * MS)
    return time


# --- Nothing is said of what is not known ------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [None, Timed(0.0, MIB, 3), Timed(-5.0, MIB, 3)])
def test_of_a_process_that_was_never_measured_nothing_is_said(timed: Timed | None) -> None:
    time = HashTime()
    for number in range(100):
        time.ended(number * MS, Gaps(600_000, MIB, 16), MIB)
    assert time.rate is None
    assert time.estimate(MIB, timed, Gaps(600_000, MIB, 16)) is None


@pytest.mark.parametrize(("nbytes", "ns"), [(LEAST_BYTES - 1, 10_000), (0, 0), (0, 10_000), (MIB, 0), (MIB, -5)])
def test_a_measurement_of_too_little_or_of_no_time_is_none(nbytes: int, ns: int) -> None:
    time = HashTime()
    time.measured(nbytes, ns, 0, SECOND)
    assert time.rate is None
    assert time.estimate(MIB, None, NO_GAPS) is None


def test_of_a_request_that_hashed_nothing_nothing_is_said() -> None:
    assert at_rate(0.6).estimate(0, None, Gaps(1_000, 100, 1)) is None


# --- Calls that were timed ---------------------------------------------------------------------------------------


def test_calls_that_were_timed_need_no_rate() -> None:
    assert HashTime().estimate(MIB, Timed(600_000.4, MIB, 16), NO_GAPS) == Estimate("exact", 600_000, 6.6)


def test_they_win_over_what_is_only_likely() -> None:
    time = at_rate(5.0)
    found = time.estimate(MIB, Timed(600_000.0, MIB, 1), NO_GAPS)
    assert found is not None
    assert (found.source, found.ns) == ("exact", 600_000)


@given(st.floats(1_000.0, 1e10), st.integers(1, 10_000))
def test_many_short_calls_are_known_less_well_than_a_long_one(ns: float, calls: int) -> None:
    one = HashTime().estimate(MIB, Timed(ns, MIB, 1), NO_GAPS)
    many = HashTime().estimate(MIB, Timed(ns, MIB, calls), NO_GAPS)
    assert one is not None
    assert many is not None
    assert 2.0 <= one.error_pct <= many.error_pct


# --- The rate ----------------------------------------------------------------------------------------------------


def test_with_a_rate_alone_it_is_a_model() -> None:
    found = at_rate(0.6, 0.6, 0.6).estimate(10 * MIB, None, NO_GAPS)
    assert found is not None
    assert (found.source, found.ns, found.error_pct) == ("model", pytest.approx(0.6 * 10 * MIB, rel=1e-5), 10.0)


def test_measurements_count_by_their_bytes() -> None:
    time = HashTime()
    time.measured(LEAST_BYTES, 2 * LEAST_BYTES, 0, 1)
    time.measured(9 * LEAST_BYTES, 9 * LEAST_BYTES, 1, 2)
    assert time.rate == pytest.approx(1.1)


def test_the_rate_goes_with_the_time() -> None:
    time = at_rate(*[0.6] * 40, *[1.2] * MEASUREMENTS)
    assert time.rate == pytest.approx(1.2, rel=1e-5)


def test_measurements_that_differ_make_a_larger_error() -> None:
    errors = []
    for spread in (0.0, 0.05, 0.2):
        found = at_rate(*([0.6 * (1 - spread), 0.6 * (1 + spread)] * 4)).estimate(MIB, None, NO_GAPS)
        assert found is not None
        errors.append(found.error_pct)
    assert errors[0] == 10.0
    assert errors[0] < errors[1] < errors[2]
    # Twice their standard deviation: it holds the measurements themselves.
    assert errors[2] >= 10.0 + 2 * 20.0 - 1


def test_one_measurement_alone_is_believed_less_than_several_that_agree() -> None:
    one, many = (at_rate(*[0.6] * count).estimate(MIB, None, NO_GAPS) for count in (1, 5))
    assert one is not None
    assert many is not None
    assert one.error_pct > many.error_pct


# --- Gaps --------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A process that reads pieces, hashes them at `rate` and takes `own_ns` more for each; `noise`: how far requests differ, at most.

    `other`: of how many requests the gaps hold other work besides, as a share, which takes `other_ns` a gap.
    """

    rate: float = 0.6
    piece: int = 65_536
    own_ns: float = 700.0
    noise: float = 0.01
    other: float = 0.0
    other_ns: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def request(self, size: int = MIB) -> tuple[Gaps, float]:
        """Its gaps, and how long its hashing took, ns."""
        count = -(-size // self.piece)
        hashed = size * self.rate * (1 + self.random.uniform(-self.noise, self.noise))
        busy = self.random.random() < self.other
        return Gaps(round(hashed + count * (self.own_ns + busy * self.other_ns)), size, count), hashed

    def watched(self, requests: int = 100, windows: int = 4, near_ns: int = 500 * MS) -> HashTime:
        """What is known of it after so many windows, among so many requests each."""
        time = HashTime()
        for window in range(windows):
            begin = window * 10 * SECOND
            for _ in range(requests):
                time.ended(begin - near_ns, self.request()[0], MIB)
            time.measured(4 * MIB, round(4 * MIB * self.rate), begin, begin + 20 * MS)
        return time


@pytest.mark.parametrize("piece", [16_384, 65_536, 262_144])
@pytest.mark.parametrize("own_ns", [0.0, 300.0, 1_200.0])
def test_gaps_of_a_server_that_reads_hashes_and_writes_tell_the_time(piece: int, own_ns: float) -> None:
    server = Server(piece=piece, own_ns=own_ns, noise=0.05)
    time = server.watched()
    total = truth = 0.0
    within = 0
    for _ in range(200):
        gaps, hashed = server.request()
        found = time.estimate(MIB, None, gaps)
        assert found is not None
        assert found.source == "gap"
        within += abs(found.ns - hashed) <= hashed * found.error_pct / 100
        total, truth = total + found.ns, truth + hashed
    assert total == pytest.approx(truth, rel=0.02)
    assert within >= 0.95 * 200, "what the stated error promises"


def test_a_request_that_was_slower_is_seen_to_be_which_a_model_cannot() -> None:
    time = Server().watched()
    slow = Server(rate=0.9)
    gaps, hashed = slow.request()
    found = time.estimate(MIB, None, gaps)
    assert found is not None
    assert (found.source, found.ns) == ("gap", pytest.approx(hashed, rel=0.03))


def test_bytes_that_were_in_no_gap_are_reckoned_at_the_rate() -> None:
    """They came with the head, say, or were read back."""
    server = Server(noise=0.0)
    time = server.watched()
    gaps, hashed = server.request()
    found = time.estimate(3 * MIB, None, gaps)
    assert found is not None
    assert (found.source, found.ns) == ("gap", pytest.approx(hashed + 2 * MIB * 0.6, rel=0.01))


def test_gaps_with_more_bytes_than_were_hashed_say_nothing() -> None:
    """Something was read and not hashed, or by somebody else."""
    time = Server().watched()
    gaps, _ = Server().request(2 * MIB)
    found = time.estimate(MIB, None, gaps)
    assert found is not None
    assert (found.source, found.ns) == ("model", pytest.approx(MIB * 0.6, rel=0.01))


def test_a_request_without_gaps_is_a_model_beside_others_that_have_them() -> None:
    found = Server().watched().estimate(MIB, None, NO_GAPS)
    assert found is not None
    assert found.source == "model"


@pytest.mark.parametrize(
    "server",
    [
        Server(piece=4_096, own_ns=2_000.0),  # as much of a gap is not the digest's
        Server(own_ns=30_000.0),
        Server(other=0.5, other_ns=20_000.0),  # half of the requests do something else besides
        Server(other=0.3, other_ns=30_000.0),
        Server(noise=0.5),  # they differ too much among each other
    ],
    ids=["short pieces", "much else", "half else", "some else", "differing"],
)
def test_gaps_that_hold_other_work_are_not_used(server: Server) -> None:
    time = server.watched()
    for _ in range(20):
        found = time.estimate(MIB, None, server.request()[0])
        assert found is not None
        assert found.source == "model"
        assert found.ns == pytest.approx(0.6 * MIB, rel=0.01), "whatever is in the gaps"


def test_gaps_of_hashing_that_is_done_elsewhere_are_not_used() -> None:
    """In a pool of threads: nothing of it is in the gaps."""
    time = HashTime()
    for number in range(200):
        time.ended(number * MS, Gaps(16 * 3_000, MIB, 16), MIB)
    time.measured(4 * MIB, round(4 * MIB * 0.6), 0, 200 * MS)
    found = time.estimate(MIB, None, Gaps(16 * 3_000, MIB, 16))
    assert found is not None
    assert (found.source, found.ns) == ("model", pytest.approx(0.6 * MIB, rel=0.01))


@pytest.mark.parametrize(("requests", "source"), [(LEAST_REQUESTS - 1, "model"), (LEAST_REQUESTS, "gap")])
def test_few_requests_tell_nothing_of_their_gaps(requests: int, source: str) -> None:
    server = Server()
    found = server.watched(requests, windows=1).estimate(MIB, None, server.request()[0])
    assert found is not None
    assert found.source == source


@pytest.mark.parametrize("near_ns", [NEAR_NS + MS, -NEAR_NS - 30 * MS])
def test_requests_of_another_time_than_the_measurement_tell_nothing(near_ns: int) -> None:
    server = Server()
    found = server.watched(60, windows=1, near_ns=near_ns).estimate(MIB, None, server.request()[0])
    assert found is not None
    assert found.source == "model"


@pytest.mark.parametrize(("gaps", "hashed"), [(NO_GAPS, MIB), (Gaps(5, 0, 3), MIB), (Gaps(1_000_000, 2 * MIB, 32), MIB)])
def test_requests_whose_gaps_are_not_their_digests_are_not_learned_from(gaps: Gaps, hashed: int) -> None:
    time = HashTime()
    for number in range(100):
        time.ended(number * MS, gaps, hashed)
    time.measured(4 * MIB, round(4 * MIB * 0.6), 0, 100 * MS)
    found = time.estimate(MIB, None, Server().request()[0])
    assert found is not None
    assert found.source == "model"


def test_gaps_are_given_up_when_they_no_longer_fit() -> None:
    time = Server().watched()
    changed = Server(other=0.5, other_ns=40_000.0)
    for window in range(10, 14):
        for _ in range(200):
            time.ended(window * 10 * SECOND, changed.request()[0], MIB)
        time.measured(4 * MIB, round(4 * MIB * 0.6), window * 10 * SECOND, window * 10 * SECOND + 20 * MS)
    found = time.estimate(MIB, None, changed.request()[0])
    assert found is not None
    assert found.source == "model"


# --- Whatever comes ----------------------------------------------------------------------------------------------

GAPS = st.builds(Gaps, st.integers(0, 10**13), st.integers(0, 10**10), st.integers(0, 10**6))
MEASUREMENT = st.tuples(st.just("measured"), st.integers(0, 10**10), st.integers(-(10**6), 10**12), st.integers(0, 30 * SECOND))
REQUEST = st.tuples(st.just("ended"), GAPS, st.integers(0, 10**10), st.integers(0, 30 * SECOND))


@settings(deadline=None)
@given(
    st.lists(st.one_of(MEASUREMENT, REQUEST), max_size=80),
    st.integers(0, 10**10),
    GAPS,
    st.one_of(st.none(), st.builds(Timed, st.floats(-1e9, 1e12), st.integers(0, 10**10), st.integers(1, 10**6))),
)
def test_an_estimate_is_never_negative_and_has_an_error(history, hashed: int, gaps: Gaps, timed: Timed | None) -> None:
    time = HashTime()
    for what, first, second, at in history:
        if what == "measured":
            time.measured(first, second, at, at + 20 * MS)
        else:
            time.ended(at, first, second)
    found = time.estimate(hashed, timed, gaps)
    if found is not None:
        assert found.ns >= 0
        assert found.error_pct >= 2.0
        assert found.source in ("exact", "gap", "model")
        if found.source == "model":
            rates = [second / first for what, first, second, _ in history if what == "measured" and second > 0 and first >= LEAST_BYTES]
            assert min(rates) * hashed - 1 <= found.ns <= max(rates) * hashed + 1, "what was never measured is not said"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.15, 6.0, 20.0, 1e6])
def test_gaps_that_are_much_shorter_or_longer_than_hashing_can_be_are_not_believed(share: float) -> None:
    """Its thread did something else with the bytes, or besides, whatever others do: no processor is five times as fast or as slow
    from one request to the next."""
    server = Server(noise=0.0)
    time = server.watched(requests=30, windows=2)
    found = time.estimate(MIB, None, Gaps(round(16 * server.own_ns + share * 0.6 * MIB), MIB, 16))
    assert found is not None
    assert 0.2 * 0.6 * MIB <= found.ns <= 5 * 0.6 * MIB

# SPDX-License-Identifier: Apache-2.0
"""Which digest was which request's, and what it says: of the body that came, of bytes read back from storage, of something else.

A digest is a body's when it is of as many bytes and was finished after the last of them had come. Whose it is, is told by the same
evidence as for file work; that it equals what a request declared confirms it, and never is the reason not to look for one that
does not. docs/digests.md has the rules as a reader sees them.

Pure. Times are CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from bucketprobe.hashtime import Gaps, HashTime, Timed
from bucketprobe.http1 import RequestHead, ResponseHead
from bucketprobe.model import Digest, DigestResult, MismatchSource

#: OpenSSL's numbers (include/openssl/obj_mac.h), and how many bytes each digest has.
ALGORITHMS = {4: "md5", 64: "sha1", 672: "sha256", 673: "sha384", 674: "sha512"}
SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
_BY_SIZE = {size: name for name, size in SIZES.items()}

#: "sha256:HEX" and "sha-256=:BASE64:" (RFC 9530), "sha256-BASE64", a digest by itself, all perhaps in quotes.
_NAMED = re.compile(r"(md5|sha-?1|sha-?256|sha-?384|sha-?512)[:=-]:?([0-9A-Za-z+/_=-]+?):?", re.IGNORECASE | re.ASCII)
_IN_PATH = re.compile(r"(?<![0-9a-z])(?:(sha256|sha512|sha1|md5)[:/_-])?([0-9a-f]{32,128})(?![0-9a-z])", re.IGNORECASE | re.ASCII)


#: Digests that no request has yet, and intervals in which values were seen, of one process.
MAX_UNCLAIMED, INTERVALS = 256, 64
#: A process hashes as it did if that many of the last requests agree.
HABIT, HABIT_REQUESTS = 5, 20
#: The last socket is believed after it was right so often, and never wrong.
TRUST_AFTER = 20
#: No processor hashes a byte in less, ns: what is finished again sooner was not hashed again.
FASTEST = 0.2
#: A service does not get to its next request in less CPU time.
AT_ONCE_NS = 20_000


class Owned(Protocol):
    """A file that is one request's: its `owner` is that one's number."""

    owner: int


class Owner(Protocol):
    """What of a request counts here; see resolve.Live."""

    rid: int
    begun_ns: int
    ended_ns: int
    received_ns: int
    read_key: int
    send_key: int
    writes: bool
    size: int | None
    declared: str | None
    digests: list[Seen]


@dataclass(slots=True, eq=False)
class Seen:
    """A digest that a process computed.

    `value`: "ALGORITHM:HEX"; `size`: bytes that it is of, of which `hashed` were not in another of the same hash before. `timed`: the
    calls for these, where all were timed. `files`: those that its thread had written to and read from last. `ran_ns`: for how long
    that thread had run by then.
    """

    value: str
    size: int
    at_ns: int
    tid: int = 0
    key: int = 0
    rid: int = 0  # whose socket its thread had used last
    ran_ns: int = 0
    files: tuple[Owned, ...] = ()
    timed: Timed | None = None
    evidence: str = ""

    @property
    def hashed(self) -> int:
        return self.timed.bytes if self.timed else self.size

    def repeats(self, before: Seen) -> bool:
        """Whether this is the same hash, finished once more: there was no time to hash the bytes again, or, while calls are timed, there
        were none since."""
        same = before.tid == self.tid and before.value == self.value and before.size == self.size
        ran_ns = self.ran_ns - before.ran_ns
        untimed = before.timed is not None and self.timed is None
        return same and 0 <= ran_ns < max(FASTEST * self.size, AT_ONCE_NS if untimed else 0)


@dataclass(frozen=True, slots=True)
class Hasher:
    """What hashes in a process. `family`: the same for all that run the same; `proven`: its values are known to be read right;
    `valued`: they can be read at all; `outside_ns`: by how much a timed call takes longer than its probes see."""

    family: str = ""
    proven: bool = False
    valued: bool = True
    outside_ns: float = 0.0


@dataclass(frozen=True, slots=True)
class OfThread:
    """What a request's own thread did, where it had no other: its gaps, and the time in `calls` calls of a hash function."""

    gaps: Gaps
    hash_ns: int = 0
    calls: int = 0


class Digests:
    """The digests of one process that no request has yet, and how it hashes.

    `proven`: whether its values are known to be read right: a self-test said so, or one was what a request had declared.
    `unattributed`: how many were no request's.
    """

    def __init__(self) -> None:
        self.time = HashTime()
        self.proven = False
        self.hasher = Hasher()
        self.unattributed = 0
        self._unclaimed: deque[Seen] = deque()
        self._last: dict[int, Seen] = {}  # by thread
        self._by_socket = [0, 0]  # how often the socket that its thread had used last was its request's, and was not
        self._habits: dict[str, deque[float]] = {}
        # From when until when values were seen, and calls timed; 0: still.
        self._probed: dict[str, deque[list[int]]] = {"value": deque(maxlen=INTERVALS), "time": deque(maxlen=INTERVALS)}

    def continues(self, tid: int, size: int) -> bool:
        """Whether the last digest of that thread was of so many bytes: more may have gone to the same hash since."""
        before = self._last.get(tid)
        return before is not None and before.size == size

    def repeats(self, seen: Seen) -> bool:
        """Whether it is one that was there already."""
        before = self._last.get(seen.tid)
        if len(self._last) > MAX_UNCLAIMED:
            self._last.clear()
        self._last[seen.tid] = seen
        return before is not None and seen.repeats(before)

    def wait(self, seen: Seen) -> None:
        """Nobody is known yet whose it is."""
        self._unclaimed.append(seen)
        if len(self._unclaimed) > MAX_UNCLAIMED:
            self._unclaimed.popleft()
            self.unattributed += 1

    def probing(self, part: str, on: bool, at_ns: int) -> None:
        """Values are seen from now on, or calls timed, or not any more."""
        intervals = self._probed[part]
        if on:
            intervals.append([at_ns, 0])
        elif intervals:
            intervals[-1][1] = at_ns

    def covers(self, part: str, owner: Owner) -> bool:
        """Whether all digests of a request's time were seen, or timed."""
        return any(on <= owner.begun_ns and (not off or owner.ended_ns <= off) for on, off in self._probed[part])

    def awaits(self, owner: Owner) -> bool:
        """Whether one that nobody has may be the request's, which has none."""
        return owner.writes and not _has_body(owner) and any(_fits(seen, owner) for seen in self._unclaimed)

    def claim(self, owner: Owner, others: Iterable[Owner], key_name: str, read_back: Sequence[tuple[int, int]], *, last: bool) -> None:
        """Gives a request that ended what is surely its own; `last`: and what it may have."""
        within = [seen for seen in self._unclaimed if owner.begun_ns <= seen.at_ns <= owner.ended_ns]
        for evidence in (_by_key, _by_file, _by_value):  # the same bytes may be sent twice at once: equality comes last
            for seen in within:
                name = "" if seen.evidence else evidence(seen, owner, key_name)
                if name and (name != "value" or _lacks(seen, owner, read_back)):
                    seen.evidence = name
                    self._by_socket[seen.rid != owner.rid] += 1
                    self._take(seen, owner)
        if not last or not self._unclaimed:
            return
        among = [other for other in others if other is not owner]
        for seen in list(self._unclaimed):
            if _fits(seen, owner) and _lacks(seen, owner, read_back) and not any(seen.value == other.declared for other in among):
                rivals = [other for other in among if not _has_body(other) and _fits(seen, other)]
                agreed, disagreed = self._by_socket
                if rivals and agreed >= TRUST_AFTER and not disagreed:
                    if seen.rid != owner.rid:
                        continue
                    seen.evidence = "last_socket"
                else:
                    seen.evidence = "order" if rivals else "bytes"
                self._take(seen, owner)

    def _take(self, seen: Seen, owner: Owner) -> None:
        self._unclaimed.remove(seen)
        owner.digests.append(seen)

    def expire(self, before_ns: int) -> None:
        """Those from before then are nobody's."""
        while self._unclaimed and self._unclaimed[0].at_ns < before_ns:
            self._unclaimed.popleft()
            self.unattributed += 1

    def learn_habit(self, operation: str, hashed: int, size: int) -> None:
        """A request of this kind hashed so many bytes, and had a body of that many."""
        self._habits.setdefault(operation, deque(maxlen=HABIT_REQUESTS)).append(hashed / size)

    def by_habit(self, operation: str, size: int) -> int:
        """How many bytes a request like this hashes, as far as others tell; 0 where they do not."""
        ratios = self._habits.get(operation, ())
        if len(ratios) < HABIT:
            return 0
        usual = median(ratios)
        return round(usual * size) if all(abs(ratio - usual) <= 0.01 * usual for ratio in ratios) else 0


def _fits(seen: Seen, owner: Owner) -> bool:
    """Of as many bytes as its body, finished when all of that was there and before the request was over."""
    in_time = 0 < owner.received_ns <= seen.at_ns and (not owner.ended_ns or seen.at_ns <= owner.ended_ns)
    return bool(owner.size) and seen.size == owner.size and in_time


def _has_body(owner: Owner) -> bool:
    return any(seen.size == owner.size for seen in owner.digests)


def _lacks(seen: Seen, owner: Owner, read_back: Sequence[tuple[int, int]]) -> bool:
    """Whether the request must have computed one more: over its body, or over what it read back."""
    if not _has_body(owner):
        return True
    times = [read_ns for nbytes, read_ns in read_back if nbytes == seen.size and read_ns <= seen.at_ns]
    return any(not any(has.size == seen.size and has.at_ns >= read_ns for has in owner.digests) for read_ns in times)


def _may_be(seen: Seen, owner: Owner) -> bool:
    return _fits(seen, owner) or not owner.writes


def _by_key(seen: Seen, owner: Owner, key_name: str) -> str:
    # CPython's loops receive in a context that is gone at once.
    keys = (owner.read_key, owner.send_key) if key_name == "goroutine" else (owner.send_key,)
    return key_name if seen.key and seen.key in keys and (key_name == "goroutine" or _may_be(seen, owner)) else ""


def _by_file(seen: Seen, owner: Owner, key_name: str) -> str:
    # What a thread wrote last is any goroutine's.
    owned = key_name != "goroutine" and any(file.owner == owner.rid for file in seen.files)
    return "descriptor" if owned and _may_be(seen, owner) else ""


def _by_value(seen: Seen, owner: Owner, _key_name: str) -> str:
    return "value" if seen.value == owner.declared and _may_be(seen, owner) else ""


def declared(spec: Iterable[str], head: RequestHead, response: ResponseHead | None) -> str | None:
    """The digest that a request says its body has, "ALGORITHM:HEX", from the first place of `spec` (see config.DigestSpec) that has one."""
    for place in spec:
        where, _, name = place.partition(":")
        if where == "header":
            found = parse(head.headers.get(name.lower()))
        elif where == "query":
            found = parse(head.query.get(name))
        elif where == "response":
            found = parse(response.headers.get(name.lower())) if response else None
        else:
            found = _in_path(head.path)
        if found:
            return found
    return None


def parse(text: str | None) -> str | None:
    """A digest in any of the usual forms as "ALGORITHM:HEX", of several the first; None where it is none."""
    for part in (text or "").split(","):
        if value := _parse_one(part):
            return value
    return None


def _parse_one(text: str) -> str | None:
    text = text.strip().removeprefix("W/").strip('"')
    named = _NAMED.fullmatch(text)
    if named:
        name = named[1].lower().replace("-", "")
        return _of(named[2], name)
    return _of(text, None)


def _of(text: str, name: str | None) -> str | None:
    if re.fullmatch("[0-9a-fA-F]+", text) and len(text) % 2 == 0 and len(text) // 2 in _BY_SIZE:
        value = bytes.fromhex(text)
    else:
        try:
            value = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
    name = name or _BY_SIZE.get(len(value))
    return f"{name}:{value.hex()}" if name and SIZES[name] == len(value) else None


def _in_path(path: str) -> str | None:
    for found in _IN_PATH.finditer(path):
        if value := _of(found[2], found[1].lower() if found[1] else None):
            return value
    return None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a request's digests say; see model.Digest for the fields."""

    computed: Seen | None
    result: DigestResult | None
    verified: tuple[DigestResult, ...]


def judge(
    seen: Sequence[Seen], expected: str | None, *, size: int, writes: bool, whole: bool, read_back: Sequence[tuple[int, int]]
) -> Judgement:
    """`expected`: the declared digest. `size`: bytes of the body that came; `whole`: all of it did. `read_back`: of each storage file
    that the request read, how many bytes, and when: for a write the end of it, for a read its beginning."""

    def is_read_back(each: Seen) -> bool:
        # A read may go through the file twice: once to hash it, and once to send it.
        times = (1,) if writes else (1, 2)
        return any(nbytes in [n * each.size for n in times] and read_ns <= each.at_ns for nbytes, read_ns in read_back)

    stored = [each for each in seen if each.size and is_read_back(each)]
    of_body = [each for each in seen if writes and whole and size and each.size == size]
    direct = [each for each in of_body if each not in stored] or of_body
    computed = _best(direct, expected)
    # What was stored is to be what came, right or wrong; where that was not hashed, what was declared.
    came = computed if computed and computed not in stored else None
    against = came.value if came else expected or (computed.value if computed else None)
    alike = [each for each in stored if against and _algorithm(each.value) == _algorithm(against)]
    # Of a write it is what it stored that counts; of a read, what it was asked to have.
    relevant = alike if not writes or whole else []
    verified: tuple[DigestResult, ...] = tuple("match" if each.value == against else "mismatch" for each in relevant)
    result: DigestResult | None = None
    if computed and expected and _algorithm(computed.value) == _algorithm(expected):
        result = "match" if computed.value == expected else "mismatch"
    return Judgement(computed, result, verified)


def _best(seen: Sequence[Seen], expected: str | None) -> Seen | None:
    """The one that is expected; else the first of the same algorithm, else the first."""
    if expected:
        for each in seen:
            if each.value == expected:
                return each
        for each in seen:
            if _algorithm(each.value) == _algorithm(expected):
                return each
    return seen[0] if seen else None


def _algorithm(value: str) -> str:
    return value.partition(":")[0]


def report(
    digests: Digests,
    owner: Owner,
    operation: str,
    sent: int,
    thread: OfThread,
    read_back: Sequence[tuple[int, int]],
    *,
    answered_mismatch: bool,
) -> Digest:
    """What the record says of a request's digests. `sent`: bytes of its answer's body; `answered_mismatch`: whether the answer means
    that the declared digest is not the body's."""
    size = (owner.size or 0) if owner.writes else sent
    whole = owner.received_ns > 0
    judged = judge(owner.digests, owner.declared, size=size, writes=owner.writes, whole=whole, read_back=read_back)
    if judged.result == "match":
        digests.proven = True
    if not digests.proven:
        judged = Judgement(None, None, ())
    hashed = sum(seen.hashed for seen in owner.digests)
    timed = _timed(digests, owner, operation, thread, size)
    if digests.covers("value", owner) and whole and size:
        digests.learn_habit(operation, hashed, size)
    elif not owner.digests:
        hashed = digests.by_habit(operation, size)
    if owner.digests and not any(seen.timed for seen in owner.digests):
        digests.time.ended(owner.ended_ns, thread.gaps, hashed)
    estimate = digests.time.estimate(hashed, timed, thread.gaps)
    mismatch: MismatchSource | None
    mismatch = "computed" if judged.result == "mismatch" else "answer" if answered_mismatch and judged.result is None else None
    # Which of several it is that were there at once, order does not tell; that none has the declared one, it does.
    shown = judged.computed if judged.computed and judged.computed.evidence != "order" else None
    return Digest(
        source=estimate.source if estimate else "none",
        error_pct=estimate.error_pct if estimate else None,
        ns=estimate.ns if estimate else None,
        bytes=hashed or None,
        declared=owner.declared,
        computed=shown.value if shown else None,
        evidence=judged.computed.evidence if judged.computed else None,
        result=judged.result,
        mismatch=mismatch,
        verified=judged.verified,
    )


def _timed(digests: Digests, owner: Owner, operation: str, thread: OfThread, size: int) -> Timed | None:
    """The time of all of a request's calls, where all were timed."""
    each = [seen.timed for seen in owner.digests]
    known = [timed for timed in each if timed]
    if known and len(known) == len(each):
        return Timed(sum(timed.ns for timed in known), sum(timed.bytes for timed in known), sum(timed.calls for timed in known))
    if digests.hasher.valued or not digests.covers("time", owner) or not size:
        return None
    # Of what the calls were is not known, but they were the request's. What they took tells what others' take, by the size of the body.
    digests.learn_habit(operation, size if thread.calls else 0, size)
    digests.time.measured(size, thread.hash_ns, owner.begun_ns, owner.ended_ns)
    return Timed(thread.hash_ns + thread.calls * digests.hasher.outside_ns, 0, thread.calls)

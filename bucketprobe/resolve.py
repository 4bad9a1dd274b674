# SPDX-License-Identifier: Apache-2.0
"""Whose file work was it? Evidence about one piece of work against the requests that lived then, decided late.

Where one thread has one request nobody needs to ask. On an event loop, or where threads hand work on, what the kernel saw of a
file (from its opening to its close) is compared with what it saw of each request: who called, which names are in the path, how
many bytes, which first bytes. What no single request fits is shared or nobody's, and says so. docs/attribution.md has the rules
as a reader sees them; docs/0003-late-resolution.md why they are these.

Pure: nothing here knows of events or clocks. Times are CLOCK_MONOTONIC in ns, 0 where something did not happen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bucketprobe.abi import TOKEN_BITS, TOKEN_WINDOW
from bucketprobe.integrity import Digests, Seen
from bucketprobe.model import FileWork, Label

FileClass = Literal["storage", "metadata", "other"]

#: A key is believed after so many agreements with strong evidence; a task's while it disagrees no more often than this, a thread's
#: while it never does.
TRUST_AFTER = 20
TRUST_DISAGREEMENT = 0.005
#: Agreements are forgotten by half after so many: a process may change its ways.
TRUST_MEMORY = 2_000
#: What a trusted key says is compared with other evidence this often.
CHECK_EACH = 8
#: By how much the ring's order may differ from that of the stamps.
DISORDER_NS = 50_000_000
#: What evidence says of a request that is not over: it may fit.
UNKNOWN = -1
#: Work that began in the same 134 ms is kept together.
BUCKET_BITS = 27
#: How much of a thread's past is kept, in pieces of work; and of how many requests, after they are gone.
PAST = 64
GONE = 32
#: How unlikely it must be that a name is found in a small write by chance.
TOKEN_CHANCE = 1e-6
#: A hash's highest bits choose the bit of the set (see abi.TokensEvent).
_TOKEN_SHIFT = 64 - (TOKEN_BITS.bit_length() - 1)

_MASK = (1 << 64) - 1


class Names:
    """By what a request may be known in a path or a small write: its artifact, version and digest, and its URL's path.

    `digest`: hex in lower case. `tail`: the URL's path, decoded.
    """

    __slots__ = ("_tokens", "artifact", "digest", "tail", "version")

    def __init__(self, artifact: str | None, version: str | None, digest: str | None, tail: str) -> None:
        self.artifact = artifact
        self.version = version
        self.digest = digest
        self.tail = tail if len(tail) > 2 else ""
        self._tokens: tuple[tuple[int, ...], int] | None = None

    def in_path(self, path: str) -> int:
        """2: it can hardly be another's (digest, whole URL, or artifact and version as parts of it); 1: it may be; 0: nothing."""
        if self.digest and (self.digest in path or self.digest.upper() in path):
            return 2
        if self.tail and path.endswith(self.tail):
            return 2
        if not self.artifact or self.artifact not in path:
            return 0
        parts = path.split("/")
        if self.version and self.artifact in parts:
            below = parts[parts.index(self.artifact) + 1 :]
            if self.version in below or (below and _is_named(below[-1], self.version)):
                return 2
        return int(any(_stands_in(part, self.artifact) for part in parts))

    def in_write(self, pieces: int, secret: int) -> bool:
        """Whether its digest, or its artifact and version, are in a small write of which the hashed pieces are known (see
        abi.TokensEvent); not where chance might say so: few pieces are looked for among many."""
        if self._tokens is None:
            digests = (self.digest.encode(), bytes.fromhex(self.digest)) if self.digest else ()
            both = token_bits((self.artifact or "").encode(), secret), token_bits((self.version or "").encode(), secret)
            self._tokens = tuple(token_bits(text, secret) for text in digests), both[0] | both[1] if all(both) else 0
        whole, named = self._tokens
        filled = pieces.bit_count() / TOKEN_BITS
        return any(bits & pieces == bits and filled ** bits.bit_count() < TOKEN_CHANCE for bits in (*whole, named))


def _is_named(part: str, word: str) -> bool:
    """A file's name without its extension: 1.0 is 1.0.json, but not 1.0.1."""
    return part.startswith(word + ".") and part[len(word) + 1 :][:1].isalpha()


def _stands_in(text: str, word: str) -> bool:
    """Whether a word stands in a text for itself, between characters that are neither letters nor digits."""
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not (start and text[start - 1].isalnum()) and not (end < len(text) and text[end].isalnum()):
            return True
        start = text.find(word, start + 1)
    return False


def token_bits(text: bytes, secret: int) -> int:
    """The bits that the kernel's `on_tokens` sets for a text; 0 for one that is too short to be told."""
    bits = 0
    for i in range(len(text) - TOKEN_WINDOW + 1):
        value = int.from_bytes(text[i : i + TOKEN_WINDOW], "big") * secret & _MASK
        bits |= 1 << (((value ^ value >> 32) * secret & _MASK) >> _TOKEN_SHIFT)
    return bits


@dataclass(slots=True, eq=False)
class File:
    """One generation of a file: from an open to the last close. `path` is its last known name."""

    kind: FileClass
    writes_sync: bool = False  # O_SYNC or O_DSYNC: a write is a sync
    path: str | None = None
    names: tuple[str, ...] = ()
    many: bool = False
    writable: bool = True
    opener_key: int = 0
    unit: Unit | None = None  # of it, what nobody has yet
    own: Unit | None = None  # of it, what the request did that it belongs to now
    owner: int = 0  # the request that all work on it went to so far; -1: several
    drained: bool = False
    closed: bool = False


@dataclass(slots=True, eq=False)
class Unit:
    """File work that is one request's, or was done in one go: sums over calls."""

    tgid: int
    file: File
    first_ns: int
    tid: int = 0
    key: int = 0
    rid: int = 0  # of the socket that its thread used last
    work: FileWork = field(default_factory=FileWork)
    write_ns: int = 0
    read_ns: int = 0
    sync_ns: int = 0
    other_ns: int = 0
    last_ns: int = 0
    data_ns: int = 0
    print: int = 0
    printed: int = 0
    threads: int = 1  # 2: more than one
    gone: list[Live] = field(default_factory=list)  # requests that it may have been for, and whose records are out
    mixed: bool = False  # calls came between which their thread turned to another request
    tokens: list[int] = field(default_factory=list)

    @property
    def until_ns(self) -> int:
        """The end of what must have happened within its request; a close may come later, and a last read that finds the end."""
        return self.data_ns or self.first_ns

    @property
    def ready(self) -> bool:
        """Whether all of it is known: its file is closed or read to its end, or it is what was done in one go."""
        return self.file.closed or self.file.drained or (self.file.many and self.data_ns > 0)

    @property
    def ns(self) -> int:
        return self.write_ns + self.read_ns + self.sync_ns + self.other_ns

    @property
    def bytes(self) -> int:
        return self.work.write_bytes + self.work.read_bytes

    @property
    def paths(self) -> tuple[str, ...]:
        return self.file.names

    def share(self, of: int, place: int) -> Unit:
        """One of `of` equal parts; what cannot be divided goes to the first."""

        def part(value: int) -> int:
            return value // of + (value % of if not place else 0)

        work = FileWork(*(part(getattr(self.work, name)) for name in FileWork.__slots__))
        return Unit(
            self.tgid,
            self.file,
            self.first_ns,
            work=work,
            write_ns=part(self.write_ns),
            read_ns=part(self.read_ns),
            sync_ns=part(self.sync_ns),
            other_ns=part(self.other_ns),
            data_ns=self.data_ns,
        )


@dataclass(slots=True)
class Piece:
    """Work that was given to a request."""

    unit: Unit
    label: Label
    evidence: str


@dataclass(slots=True, eq=False)
class Live:
    """A request while its file work may still come. `size`: of its body, once that was received or announced."""

    rid: int
    tgid: int
    begun_ns: int
    names: Names
    writes: bool
    reader: int = 0
    read_key: int = 0
    sender: int = 0
    send_key: int = 0
    received_ns: int = 0
    answered_ns: int = 0
    ended_ns: int = 0
    size: int | None = None
    print: int = 0
    printed: int = 0
    sent: int | None = None
    print_out: int = 0
    printed_out: int = 0
    alone: bool = False
    pieces: list[Piece] = field(default_factory=list)
    candidates: set[int] = field(default_factory=set)
    doubts: dict[FileClass, Label] = field(default_factory=dict)  # work that went to another, and might be its own
    declared: str | None = None  # the digest of its body, as its client says
    digests: list[Seen] = field(default_factory=list)
    left: bool = False  # something of its time was left undecided when its record was made

    def spans(self, unit: Unit) -> bool:
        """It had begun before the work, and was not over before its last byte."""
        return self.begun_ns <= unit.first_ns and (not self.ended_ns or self.ended_ns >= unit.until_ns)

    def take(self, unit: Unit, label: Label, evidence: str) -> None:
        self.pieces.append(Piece(unit, label, evidence))
        file = unit.file
        file.owner = self.rid if file.owner in (0, self.rid) else -1

    def waits(self, unit: Unit) -> bool:
        """Whether it was there whole, received by the thread that did the work, and not answered yet."""
        unanswered = not self.answered_ns or self.answered_ns > unit.first_ns
        return self.reader == unit.tid and 0 < self.received_ns < unit.first_ns and unanswered

    def has(self, kind: FileClass) -> bool:
        return any(piece.unit.file.kind == kind for piece in self.pieces)

    def has_body(self, like: Unit) -> bool:
        """Whether it has a file already that was written or read as this one was: each has one body."""
        of_one = (piece.unit for piece in self.pieces if piece.unit.bytes and not piece.unit.file.many)
        return any(unit.file.kind == like.file.kind and bool(unit.work.write_bytes) == bool(like.work.write_bytes) for unit in of_one)


@dataclass(slots=True)
class Trust:
    """How often a kind of key agreed with strong evidence."""

    agreed: int = 0
    disagreed: int = 0
    given: bool = False
    tolerated: float = 0.0  # the share that may disagree

    def note(self, agrees: bool) -> None:
        if agrees:
            self.agreed += 1
        else:
            self.disagreed += 1
        if self.agreed + self.disagreed > TRUST_MEMORY:
            self.agreed //= 2
            self.disagreed //= 2

    @property
    def holds(self) -> bool:
        known = self.agreed + self.disagreed
        return (self.given or self.agreed >= TRUST_AFTER) and self.disagreed <= self.tolerated * known


@dataclass(slots=True)
class Decision:
    """`owners`: one request, or several that share; `candidates`: all whose it may be."""

    owners: Sequence[Live]
    label: Label
    evidence: str
    candidates: Sequence[Live] = ()


_NOBODYS = Decision((), "unattributed", "")


class Pending:
    """File work that nobody has yet, by when it began: a request asks for what began while it lived."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[Unit]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Unit]:
        for units in list(self._buckets.values()):
            yield from list(units)

    def add(self, unit: Unit) -> None:
        self._buckets.setdefault(unit.first_ns >> BUCKET_BITS, []).append(unit)
        self._count += 1

    def discard(self, unit: Unit) -> None:
        place = unit.first_ns >> BUCKET_BITS
        units = self._buckets.get(place, [])
        if unit in units:
            units.remove(unit)
            self._count -= 1
            if not units:
                del self._buckets[place]

    def oldest(self) -> Unit:
        """Raises ValueError where there is none."""
        return self._buckets[min(self._buckets)][0]

    def during(self, start_ns: int, end_ns: int) -> list[Unit]:
        """What began then, in that order."""
        first, last = start_ns >> BUCKET_BITS, end_ns >> BUCKET_BITS
        places = range(first, last + 1) if last - first < len(self._buckets) else sorted(p for p in self._buckets if first <= p <= last)
        found = [unit for place in places for unit in self._buckets.get(place, ()) if start_ns <= unit.first_ns < end_ns]
        found.sort(key=_began)
        return found


class Process:
    """The requests and the unresolved file work of one process, and what was learned of how it works."""

    def __init__(self, secret: int = 1) -> None:
        self.secret = secret
        self.lives: dict[int, Live] = {}
        self._flying: dict[int, Live] = {}  # of them, those that have not ended, as they began
        self._ended: deque[Live] = deque()  # and those that have, as they ended
        self.pending = Pending()
        self.key_name: Literal["goroutine", "context"] = "context"
        self.by_key: dict[int, list[Live]] = {}
        self._gone: deque[Live] = deque(maxlen=GONE)
        self._keys = Trust(tolerated=TRUST_DISAGREEMENT)
        self._trust: dict[tuple[str, FileClass], Trust] = {}
        self._unsure: deque[tuple[int, int]] = deque(maxlen=64)
        self._decided = 0
        self._one_thread = Trust(tolerated=TRUST_DISAGREEMENT)  # whether one thread does all of a file
        self._tid_past: dict[int, deque[tuple[int, int]]] = {}  # by thread: when it began which request's
        self.digests = Digests()
        self.uring = False
        self.mapped = False
        self.ended = False

    def runs(self, name: Literal["goroutine", "context"]) -> None:
        """What its keys are. Go's are what the language itself goes by; others must prove themselves."""
        self.key_name = name
        self._keys = Trust(given=name == "goroutine", tolerated=TRUST_DISAGREEMENT)

    def enter(self, live: Live) -> None:
        self.lives[live.rid] = live
        self._flying[live.rid] = live
        # CPython's loops receive in a context that is gone at once, and whose place the next task may get.
        if live.read_key and self.key_name == "goroutine":
            self.by_key.setdefault(live.read_key, []).append(live)

    def answers(self, live: Live, tid: int, key: int, now_ns: int) -> None:
        """The first byte of its response."""
        live.sender, live.send_key, live.answered_ns = tid, key, now_ns
        known = self.key_name == "goroutine" and key == live.read_key
        if key and not known and live.rid in self.lives:
            self.by_key.setdefault(key, []).append(live)

    def ends(self, live: Live) -> None:
        """Its response is complete; its `ended_ns` is known."""
        if self._flying.pop(live.rid, None):
            self._ended.append(live)

    def leave(self, live: Live) -> None:
        if self.lives.pop(live.rid, None) is None:
            return
        self._gone.append(live)
        self._flying.pop(live.rid, None)
        if self._ended and self._ended[0] is live:
            self._ended.popleft()
        elif live in self._ended:
            self._ended.remove(live)
        for key in {live.read_key, live.send_key} - {0}:
            entries = self.by_key.get(key, [])
            if live in entries:
                entries.remove(live)
            if not entries:
                self.by_key.pop(key, None)

    def awaits(self, live: Live) -> bool:
        """Whether there is work that began in its time and that nobody has yet."""
        return any(unit.file.kind != "other" for unit in self.pending.during(live.begun_ns, live.ended_ns))

    def others(self, live: Live) -> list[Live]:
        """Other requests that were there at some time of its own, and have not been forgotten."""
        known = (*self.lives.values(), *self._gone)
        return [other for other in known if other is not live and (not other.ended_ns or other.ended_ns > live.begun_ns)]

    def review(self, live: Live) -> list[tuple[Piece, list[Live]]]:
        """What the request's own thread did and what may yet be for others, with those: it helped one out, or wrote for several.

        A file that another request's name is on, and not its own; more bytes in a file of many than it received, while others
        that wrote nothing were waiting.
        """
        found = []
        for piece in live.pieces:
            unit = piece.unit
            if piece.evidence != "thread" or not unit.work.write_bytes or unit.file.kind != "storage":
                continue
            excess = unit.work.write_bytes - (live.size or 0)
            if excess <= 0 if unit.file.many else _fits(unit, live):
                continue
            others = [other for other in (*self.lives.values(), *self._gone) if other is not live and other.writes and other.spans(unit)]
            if unit.file.many:
                others = [other for other in others if 0 < (other.size or 0) <= excess and not other.has("storage")]
            else:
                others = [other for other in others if _fits(unit, other)]
            if others:
                found.append((piece, others))
        return found

    def claim(self, live: Live) -> Iterable[tuple[Unit, Decision]]:
        """What is certainly a request's own when it ends; it is taken off the list."""
        for unit in self.pending.during(live.begun_ns, live.ended_ns):
            if unit.ready and unit.until_ns <= live.ended_ns and _speaks_for(unit, live):
                decision = self.decide(unit)
                if decision.label == "exact" and decision.owners[0] is live:
                    yield self._decided_on(unit, decision)

    def settle(self, live: Live) -> Iterable[tuple[Unit, Decision]]:
        """Decides on what lies within a request's life and may be its own, and takes it off the list.

        Where more may be known later (a rename, the end of a body, the close) and it is more likely another's, it stays there.
        """
        for unit in self.pending.during(live.begun_ns, live.ended_ns):
            decision = self.decide(unit) if self._asks(unit, live) else None
            if decision and self._is_final(unit, live, decision):
                yield self._decided_on(unit, decision)
            else:
                unit.gone.append(live)
                live.left = live.left or unit.work.write_bytes > 0 or not unit.ready

    @staticmethod
    def _asks(unit: Unit, live: Live) -> bool:
        """Whether it may be the request's at all: else deciding is left to others, of whom there may be hundreds."""
        if not (unit.data_ns or unit.file.closed) or unit.until_ns > live.ended_ns:
            return False
        if _speaks_for(unit, live):
            return True
        if not unit.ready:
            return False
        # It has one body; of metadata there may be several files.
        complete = unit.bytes and unit.file.kind == "storage" and live.has_body(unit)
        return not complete or bool(_bytes_fit(unit, live) or _print_fits(unit, live))

    def _is_final(self, unit: Unit, live: Live, decision: Decision) -> bool:
        if decision.label == "exact":
            return unit.ready or decision.evidence == self.key_name
        if not unit.ready:
            return False
        unlikely = live not in decision.candidates or unit.file.kind == "other"
        return not (unlikely and any(not other.ended_ns for other in decision.candidates))

    def _decided_on(self, unit: Unit, decision: Decision) -> tuple[Unit, Decision]:
        self.pending.discard(unit)
        if unit.file.unit is unit:
            unit.file.unit = None
        unit.gone = []  # else they would keep each other until the garbage collector comes
        self._learn(unit, decision)
        if decision.label != "exact" and unit.work.write_bytes and unit.file.kind == "storage":
            self._unsure.append((unit.first_ns, unit.until_ns))
        return unit, decision

    def unsure_during(self, live: Live) -> bool:
        """Whether storage was written in its life by nobody knows whom for certain."""
        return any(first < live.ended_ns and until > live.begun_ns for first, until in self._unsure)

    def decide(self, unit: Unit) -> Decision:
        """Who did this work, and how sure that is."""
        if not unit.bytes and not unit.file.many and unit.file.owner > 0:
            # The close of a file that was one request's: that one may be over and gone.
            owner = self.lives.get(unit.file.owner)
            return Decision((owner,), "exact", "descriptor") if owner else _NOBODYS
        candidates = self.candidates(unit)
        if unit.work.write_bytes:
            candidates = [live for live in candidates if live.writes] or candidates
        decision = self._decide(unit, candidates)
        if unit.gone:
            decision.owners = [live for live in decision.owners if live.rid in self.lives]
        return decision if decision.owners else _NOBODYS

    def concerns(self, unit: Unit) -> bool:
        """Whether any request lives whose it may be."""
        return any(live.spans(unit) for live in self._flying.values()) or any(live.spans(unit) for live in self._late(unit))

    def candidates(self, unit: Unit) -> list[Live]:
        """All requests whose it may be, by time alone."""
        found = []
        for live in self._flying.values():
            if live.begun_ns > unit.first_ns + DISORDER_NS:
                break  # they are in the order in which they began, but for what two CPUs did at once
            if live.spans(unit):
                found.append(live)
        found += [live for live in self._late(unit) if live.spans(unit)]
        return found + [live for live in unit.gone if live.spans(unit)]

    def _late(self, unit: Unit) -> Iterator[Live]:
        """Those that ended when it had been done, or later."""
        for live in reversed(self._ended):
            if live.ended_ns < unit.until_ns - DISORDER_NS:
                return
            yield live

    def _decide(self, unit: Unit, candidates: list[Live]) -> Decision:
        several = sum(unit.tid == live.reader for live in candidates) > 1
        keyed = self._keyed(unit, candidates, several)
        self._decided += 1
        for evidence, live in keyed:
            # What is believed needs no second opinion each time, where no name speaks against it.
            if (
                self._trust_in(evidence, unit.file.kind).holds
                and self._decided % CHECK_EACH
                and (_fits(unit, live) or not any(_fits(unit, other) for other in candidates))
            ):
                return Decision((live,), "exact", evidence)
        strong, fitting, evidence = self._strong(unit, candidates)
        for name, live in keyed:
            trust = self._trust_in(name, unit.file.kind)
            if strong is None:
                if trust.holds:
                    return Decision((live,), "exact", name)
                continue
            trusted, agrees = trust.holds, strong is live
            if len(candidates) > 1 or not agrees:  # else there was no choice
                trust.note(agrees)
            if trusted:
                return Decision((live,), "exact", name) if agrees else Decision((strong,), "inferred", evidence, (strong, live))
        if strong:
            return Decision((strong,), "exact", evidence)
        return self._weak(unit, candidates, fitting, evidence, several)

    def _trust_in(self, evidence: str, kind: FileClass) -> Trust:
        """A task's key means the same whatever it works on; that a thread does a body's writes says nothing of who writes an index."""
        if evidence == self.key_name:
            return self._keys
        trust = self._trust.get((evidence, kind))
        if trust is None:
            trust = self._trust[evidence, kind] = Trust()
        return trust

    def _keyed(self, unit: Unit, candidates: Sequence[Live], several: bool) -> list[tuple[str, Live]]:
        """What each kind of key says, the strongest first. A thread that has several requests at once says nothing of one."""
        found: list[tuple[str, Live]] = []
        live = self._by_key(unit, unit.key) or self._opener(unit)
        if live:
            found.append((self.key_name, live))
        if unit.mixed or self.key_name == "goroutine":
            return found  # any thread runs any goroutine
        if unit.threads == 1 and not several:
            live = _first_to_end(live for live in candidates if live.sender == unit.tid)
            if live:
                found.append(("thread", live))
        last = self.lives.get(unit.rid)
        # Where another request waits for its turn on that thread, it may as well have been that one's.
        if last and last.spans(unit) and not any(live.waits(unit) for live in candidates if live is not last):
            found.append(("last_socket", last))
        return found

    def _opener(self, unit: Unit) -> Live | None:
        """Who opened the file, where another goroutine did the rest of it, and it is no more than one request's."""
        file = unit.file
        if self.key_name != "goroutine" or file.many or not file.closed:
            return None
        live = self._by_key(unit, file.opener_key)
        return live if live and live.size is not None and unit.work.write_bytes <= live.size else None

    def _by_key(self, unit: Unit, key: int) -> Live | None:
        if not key:
            return None
        gone = (live for live in unit.gone if key in (live.read_key, live.send_key))
        return _first_to_end(live for live in (*self.by_key.get(key, ()), *gone) if live.spans(unit))

    def _strong(self, unit: Unit, candidates: Sequence[Live]) -> tuple[Live | None, list[Live], str]:
        """The one request that fits by two kinds of evidence, or by one that is enough; all that fit so far; by which kind first."""
        paths = [(live, max([live.names.in_path(path) for path in unit.paths], default=0)) for live in candidates]
        named = [live for live, fit in paths if fit == 2]
        told: list[Live] = []
        if unit.tokens and not unit.file.many and len(named) != 1:
            told = [live for live in candidates if self._token(unit, live)]
            if unit.file.kind == "metadata" and not named and len(told) == 1:
                return told[0], told, "token"
        kinds = {
            "path": [(live, 2) for live in named] or paths,
            "bytes": [(live, _bytes_fit(unit, live)) for live in candidates],
            "fingerprint": [(live, _print_fits(unit, live)) for live in candidates],
            # Last: an artifact's own bytes may speak of another one.
            "token": [(live, 2) for live in told],
        }
        left: list[Live] = []
        used: list[str] = []
        for name, fits in kinds.items():
            fitting = [live for live, fit in fits if fit and (not left or live in left)]
            if fitting:
                left = fitting
                # What may fit, when more is known, stays in; it speaks for nobody.
                if all(fit != UNKNOWN for live, fit in fits if live in fitting):
                    used.append(name)
        certain = len(left) == 1 and (len(used) > 1 or left == named)
        return left[0] if certain else None, left, used[0] if used else ""

    def _token(self, unit: Unit, live: Live) -> bool:
        return any(live.names.in_write(pieces, self.secret) for pieces in unit.tokens)

    def _weak(self, unit: Unit, candidates: list[Live], fitting: list[Live], evidence: str, several: bool) -> Decision:
        """What remains where nothing is certain: a likely one, several that share, or nobody."""
        if len(fitting) == 1:
            return Decision(fitting, "inferred", evidence, fitting)
        among = fitting or candidates
        if not among:
            return _NOBODYS
        if unit.file.many and unit.tokens:
            told = [live for live in among if self._token(unit, live)]
            if len(told) == 1:
                return Decision(told, "inferred", "token", among)
            among = told or among
        # Whoever opened it may have left the writing to another task; but then so may other requests have.
        opener = self._by_key(unit, unit.file.opener_key) if not unit.file.many else None
        if opener in among:
            return Decision((opener,), "inferred", self.key_name, among)
        if unit.threads == 1 and not several and self._one_thread.holds:
            before = self._before(unit)
            if before in among:
                return Decision((before,), "inferred", "continuity", among)
        if len(among) == 1:
            # What a thread did beside a request that another thread served alone is more likely the server's own.
            own = among[0].alone and among[0].has(unit.file.kind)
            return _NOBODYS if own else Decision(among, "inferred", "window", among)
        if unit.file.many or not unit.bytes:
            return Decision(among, "shared", "order", among)
        waiting = [live for live in among if not live.has_body(unit)] or among
        oldest = min(waiting, key=_begun)
        return Decision((oldest,), "shared", "order", among)

    def _before(self, unit: Unit) -> Live | None:
        """Whose the thread's work just before was, if that request still waited for its answer."""
        before = max((entry for entry in self._tid_past.get(unit.tid, ()) if entry[0] <= unit.first_ns), default=None)
        live = self.lives.get(before[1]) if before else None
        return live if live and (not live.answered_ns or live.answered_ns >= unit.last_ns) else None

    def _learn(self, unit: Unit, decision: Decision) -> None:
        if len(decision.owners) != 1 or decision.label == "shared":
            return
        live = decision.owners[0]
        past = self._tid_past.get(unit.tid)
        if past is None:
            if len(self._tid_past) > 1024:
                self._tid_past.clear()
            past = self._tid_past[unit.tid] = deque(maxlen=PAST)
        past.append((unit.first_ns, live.rid))
        if not unit.file.many and unit.work.write_bytes:
            self._one_thread.note(unit.threads == 1)


def _speaks_for(unit: Unit, live: Live) -> bool:
    """Whether something at least names this request."""
    return bool(unit.key and unit.key in (live.read_key, live.send_key)) or unit.rid == live.rid or _fits(unit, live)


def _fits(unit: Unit, live: Live) -> bool:
    return any(live.names.in_path(path) == 2 for path in unit.paths)


def _began(unit: Unit) -> int:
    return unit.first_ns


def _begun(live: Live) -> int:
    return live.begun_ns


def _first_to_end(lives: Iterable[Live]) -> Live | None:
    """Of several that had the same key it is the first to end: the key was free for the next only then."""
    return min(lives, key=lambda live: live.ended_ns or _MASK, default=None)


def _bytes_fit(unit: Unit, live: Live) -> int:
    """Written: all of the body, no sooner than it was there and no later than the answer. Read: all of the answer's body.

    0, 2, or UNKNOWN.
    """
    if unit.work.write_bytes:
        contradicted = unit.printed and unit.printed == live.printed and unit.print != live.print
        in_time = 0 < live.received_ns <= unit.data_ns and (not live.answered_ns or unit.data_ns <= live.answered_ns)
        return 2 * (unit.work.write_bytes == live.size and in_time and not contradicted)
    if not unit.work.read_bytes:
        return 0
    return 2 * (unit.work.read_bytes == live.sent) if live.ended_ns else UNKNOWN


def _print_fits(unit: Unit, live: Live) -> int:
    """The same first bytes, of no more than there are. 0, 2, or UNKNOWN."""
    if not unit.printed:
        return 0
    if unit.work.write_bytes:
        # More than its body begins like it, too, where several were written in one go.
        same = unit.printed == live.printed and unit.print == live.print
        return 2 * (same and unit.work.write_bytes <= (live.size or 0))
    if not live.ended_ns:
        return UNKNOWN
    return 2 * (unit.printed == live.printed_out and unit.print == live.print_out)

# SPDX-License-Identifier: Apache-2.0
"""Evidence to decisions: each kind alone, together and against each other; then the tracker as a whole against a model that knows.

Times are small numbers: requests are in flight from 10 to 100, bodies are there at 15, files are written from 20 to 30, and answers
begin at 90, unless a test says otherwise.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bucketprobe import abi, decode, resolve, tracker
from bucketprobe.model import LABELS, FileWork, Request, Share
from bucketprobe.resolve import Decision, File, Live, Names, Process, Unit, token_bits

SECRET = 0x9E3779B97F4A7C15
DIGEST = sha256(b"one").hexdigest()
BODY = 1000
UUID = "/srv/bucket/tmp/8d0f3f2a"

# --- Names in paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fit"),
    [
        ("/srv/b/a-1/v2", 2),
        ("/srv/b/a-1/data", 1),
        ("/srv/b/a-12/v2", 0),
        ("/srv/b/xa-1/v2", 0),
        ("/srv/b/a-12/a-1/v2", 2),  # the first that looks like it is not it
        ("/srv/b/a-1/v2.json", 2),
        ("/srv/b/a-1/sub/v2", 2),
        ("/srv/b/a-1@v2.bin", 1),  # whatever a server means by it
        ("/srv/b/a-1-2/v2", 1),
        ("/srv/b/a-1/v21", 1),
        ("/srv/b/a-1/v2.1", 1),
        ("/srv/b/v2/a-1", 1),  # the version comes after the artifact
        ("/srv/v2/other", 0),
        ("/srv/b", 0),
        ("", 0),
    ],
)
def test_an_artifact_and_its_version_in_a_path(path: str, fit: int) -> None:
    assert Names("a-1", "v2", None, "").in_path(path) == fit


@pytest.mark.parametrize(
    ("path", "fit"),
    [
        (f"/srv/blobs/{DIGEST}", 2),
        (f"/srv/blobs/sha256-{DIGEST.upper()}.part", 2),
        (f"/srv/blobs/{DIGEST[:2]}/{DIGEST[2:]}", 0),
        (f"/srv/blobs/{DIGEST[:-1]}0", 0),
    ],
)
def test_a_digest_anywhere_in_a_path(path: str, fit: int) -> None:
    assert Names(None, None, DIGEST, "").in_path(path) == fit


@pytest.mark.parametrize(
    ("tail", "path", "fit"),
    [
        ("/files/x", "/srv/www/files/x", 2),
        ("/files/x", "/srv/www/files/x.tmp", 0),
        ("/files/x", "/srv/www/otherfiles/x", 0),
        ("/", "/srv/www/", 0),  # says nothing
        ("/a", "/srv/www/a", 0),
    ],
)
def test_a_urls_path_at_the_end_of_a_files(tail: str, path: str, fit: int) -> None:
    assert Names(None, None, None, tail).in_path(path) == fit


def test_a_request_without_names_is_in_no_path() -> None:
    assert Names(None, None, None, "").in_path("/srv/bucket/a") == 0


# --- Names in small writes ---------------------------------------------------------------------------------------


def pieces_by_another_way(text: bytes, secret: int) -> set[int]:
    """What probes/file.bpf.c computes, written down again: which bits a text sets."""
    found = set()
    for start in range(len(text) - 5):
        window = 0
        for byte in text[start : start + 6]:
            window = window * 256 + byte
        once = window * secret % 2**64
        found.add((once ^ once // 2**32) * secret % 2**64 // 2**52)
    return found


@given(st.binary(max_size=600), st.integers(0, 2**63 - 1).map(lambda n: 2 * n + 1))
def test_pieces_are_the_kernels(text: bytes, secret: int) -> None:
    bits = token_bits(text, secret)
    assert {place for place in range(abi.TOKEN_BITS) if bits >> place & 1} == pieces_by_another_way(text, secret)


@given(st.binary(max_size=100), st.binary(min_size=6, max_size=60), st.binary(max_size=100))
def test_a_text_that_is_in_another_has_its_pieces(before: bytes, text: bytes, after: bytes) -> None:
    bits = token_bits(text, SECRET)
    assert bits
    assert bits & token_bits(before + text + after, SECRET) == bits


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        (Names(None, None, DIGEST, ""), DIGEST.encode(), True),
        (Names(None, None, DIGEST, ""), b"row\0" + bytes.fromhex(DIGEST) + b"\0", True),
        (Names(None, None, DIGEST, ""), DIGEST[1:].encode() + b"g", False),
        (Names("artifact-one", "1.10.0-rc1", None, ""), b'{"a": "artifact-one", "v": "1.10.0-rc1"}', True),
        (Names("artifact-one", "1.10.0-rc1", None, ""), b'{"a": "artifact-one", "v": "1.10.0-rc2"}', False),
        (Names("artifact-one", None, None, ""), b'{"a": "artifact-one", "v": "1.10.0-rc1"}', False),
        (Names("artifact-one", "1.0", None, ""), b'{"a": "artifact-one", "v": "1.0"}', False),  # too short to be told
        (Names("a", "1.10.0-rc1", None, ""), b'{"a": "a", "v": "1.10.0-rc1"}', False),
        (Names(None, None, None, "/v1/x"), b"anything at all /v1/x", False),
        (Names(None, None, DIGEST, ""), b"", False),
    ],
)
def test_names_in_a_small_write(names: Names, text: bytes, found: bool) -> None:
    assert bool(names.in_write(token_bits(text, SECRET), SECRET)) is found


def test_chance_puts_no_name_into_a_write() -> None:
    """The longest text that is looked at, and names as short as names are: some would match by chance in one of a hundred."""
    source = random.Random(11)
    names = [Names("abcdef", "1.10.0", None, ""), Names("artifact", "v1.0.0-1", None, ""), Names(None, None, DIGEST, "")]
    found = Counter()
    for _ in range(2000):
        pieces = token_bits(source.randbytes(abi.TOKEN_BYTES), SECRET)
        found.update(place for place, each in enumerate(names) if each.in_write(pieces, SECRET))
    assert not found


# --- Builders ----------------------------------------------------------------------------------------------------


def request(
    process: Process, rid: int, *, artifact: str | None = None, version: str | None = None, digest: str | None = None, **values: Any
) -> Live:
    """A request that ended, with nothing in common with another but the time."""
    key, tid, send_key = values.pop("key", 0), values.pop("tid", 0), values.pop("send_key", 0)
    fixed = {"received_ns": 15, "ended_ns": 100, "size": 10_000 + rid, "sent": 20_000 + rid, "writes": True, "begun_ns": 10}
    live = Live(rid, 1, names=Names(artifact, version, digest, ""), read_key=key, **(fixed | values))
    process.enter(live)
    answered = values.get("answered_ns", 90)
    if answered:
        process.answers(live, tid, send_key, answered)
    return live


def work(path: str = UUID, *, kind: Any = "storage", many: bool = False, write: int = BODY, read: int = 0, **values: Any) -> Unit:
    """A file that was written by a thread of a pool, and closed."""
    file = File(kind, path=path, names=(path,), many=many, closed=values.pop("closed", True))
    calls = FileWork(write_calls=int(write > 0), write_bytes=write, read_calls=int(read > 0), read_bytes=read)
    fixed = {"first_ns": 20, "last_ns": 30, "data_ns": 30, "tid": 60}
    return Unit(1, file, work=calls, **(fixed | values))


def said(decision: Decision) -> tuple[list[int], str, str]:
    return [owner.rid for owner in decision.owners], decision.label, decision.evidence


def asks(process: Process, unit: Unit) -> tuple[list[int], str, str]:
    return said(process.decide(unit))


@pytest.fixture
def process() -> Process:
    return Process(SECRET)


NOBODYS = ([], "unattributed", "")

# --- One kind of evidence alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "path", "label"),
    [
        ({"artifact": "one", "version": "v1"}, "/srv/bucket/one/v1", "exact"),
        ({"digest": DIGEST}, f"/srv/bucket/{DIGEST}", "exact"),
        ({"artifact": "one"}, "/srv/bucket/one/v1", "inferred"),
        ({"artifact": "one", "version": "v1"}, "/srv/bucket/one/data", "inferred"),
    ],
)
def test_a_path(process: Process, names: dict[str, str], path: str, label: str) -> None:
    request(process, 1, **names)
    request(process, 2, artifact="two", version="v1")
    assert asks(process, work(path)) == ([1], label, "path")


@pytest.mark.parametrize(("size", "print_", "label", "evidence"), [(BODY, 0, "inferred", "bytes"), (BODY, 7, "exact", "bytes")])
def test_as_many_bytes_as_the_body(process: Process, size: int, print_: int, label: str, evidence: str) -> None:
    """Likely; and with the same first bytes certain."""
    printed = 32 if print_ else 0
    request(process, 1, size=size, print=print_, printed=printed)
    request(process, 2)
    assert asks(process, work(print=print_, printed=printed)) == ([1], label, evidence)


def test_the_same_first_bytes(process: Process) -> None:
    request(process, 1, print=7, printed=32)
    request(process, 2, print=8, printed=32)
    owners, label, _ = asks(process, work(print=7, printed=32))
    assert (owners, label) == ([1], "inferred")


def test_first_bytes_of_another_length_are_not_the_same(process: Process) -> None:
    for rid in (1, 2):
        request(process, rid, print=7, printed=31)
    assert process.decide(work(print=7, printed=32)).label == "shared"
    assert process.decide(work(print=7, printed=0)).label == "shared"


@pytest.mark.parametrize(
    "values",
    [
        {"size": BODY + 1},
        {"received_ns": 31},  # written before it was there
        {"received_ns": 0},
        {"answered_ns": 29},  # written after the answer
    ],
)
def test_bytes_that_cannot_be_the_body(process: Process, values: dict[str, int]) -> None:
    request(process, 1, **({"size": BODY} | values))
    request(process, 2)
    assert process.decide(work()).label == "shared"


def test_as_many_bytes_as_were_sent(process: Process) -> None:
    request(process, 1, writes=False, sent=BODY)
    request(process, 2, writes=False)
    assert asks(process, work(write=0, read=BODY)) == ([1], "inferred", "bytes")
    process.lives[1].print_out, process.lives[1].printed_out = 7, 32
    assert asks(process, work(write=0, read=BODY, print=7, printed=32)) == ([1], "exact", "bytes")


def test_a_token_in_a_small_file_of_its_own(process: Process) -> None:
    request(process, 1, digest=DIGEST)
    request(process, 2)
    tokens = [token_bits(DIGEST.encode(), SECRET)]
    assert asks(process, work(kind="metadata", write=80, tokens=tokens)) == ([1], "exact", "token")


def test_a_token_in_a_file_of_many(process: Process) -> None:
    request(process, 1, digest=DIGEST)
    request(process, 2)
    tokens = [token_bits(b"other", SECRET), token_bits(DIGEST.encode(), SECRET)]
    assert asks(process, work(kind="metadata", many=True, tokens=tokens)) == ([1], "inferred", "token")


def test_a_window_in_which_one_request_lived(process: Process) -> None:
    request(process, 1)
    assert asks(process, work()) == ([1], "inferred", "window")


def test_nothing_written_is_a_readers_while_somebody_writes(process: Process) -> None:
    request(process, 1, writes=False)
    request(process, 2)
    assert asks(process, work()) == ([2], "inferred", "window")


def test_a_writer_that_is_less_well_named_comes_before_a_reader(process: Process) -> None:
    """The server gave the version: the writer did not know it, and somebody asks for it already."""
    request(process, 1, artifact="one")
    request(process, 2, artifact="one", version="v1", writes=False)
    owners, label, evidence = asks(process, work("/srv/bucket/one/v1"))
    assert (owners, evidence) == ([1], "path")
    assert label != "exact"


def test_the_close_of_a_file_that_was_one_requests(process: Process) -> None:
    live = request(process, 1)
    request(process, 2)
    unit = work()
    live.take(unit, "exact", "path")
    close = Unit(1, unit.file, 120, tid=61, other_ns=5, last_ns=121)
    assert asks(process, close) == ([1], "exact", "descriptor")
    process.leave(live)
    assert asks(process, close) == NOBODYS


# --- Evidence together, and against each other -------------------------------------------------------------------


def test_names_that_two_have_are_told_apart_by_the_bytes(process: Process) -> None:
    for rid, size in ((1, 999), (2, BODY)):
        request(process, rid, artifact="one", version="v1", size=size)
    assert asks(process, work("/srv/bucket/one/v1")) == ([2], "exact", "path")


def test_a_partial_name_and_bytes_together_are_certain(process: Process) -> None:
    request(process, 1, artifact="one", size=BODY)
    request(process, 2, artifact="one")
    request(process, 3, size=BODY)
    assert asks(process, work("/srv/bucket/one/data")) == ([1], "exact", "path")


def test_equal_bodies_are_nobodys_for_certain(process: Process) -> None:
    for rid in (1, 2):
        request(process, rid, size=BODY, print=7, printed=32, begun_ns=10 - rid)
    decision = process.decide(work(print=7, printed=32))
    assert said(decision) == ([2], "shared", "order"), "to the oldest"
    assert {live.rid for live in decision.candidates} == {1, 2}


def test_an_artifact_that_speaks_of_another_is_still_its_own(process: Process) -> None:
    """A manifest holds other artifacts' digests."""
    request(process, 1, digest=DIGEST)
    request(process, 2, size=BODY, print=7, printed=32)
    unit = work(print=7, printed=32, tokens=[token_bits(DIGEST.encode(), SECRET)])
    owners, label, _ = asks(process, unit)
    assert owners == [2] or label == "shared"


def test_bytes_of_one_and_first_bytes_of_another_prove_nothing(process: Process) -> None:
    request(process, 1, size=BODY)
    request(process, 2, print=7, printed=32)
    assert process.decide(work(print=7, printed=32)).label != "exact"


def test_a_reader_whose_answer_is_not_sent_yet_may_be_the_one(process: Process) -> None:
    """How much it will have sent is known at its end."""
    for rid, values in ((1, {"ended_ns": 0, "sent": None}), (2, {"sent": BODY, "print_out": 7, "printed_out": 32})):
        request(process, rid, artifact="one", version="v1", writes=False, **values)
    assert process.decide(work("/srv/bucket/one/v1", write=0, read=BODY, print=7, printed=32)).label != "exact"


def test_what_is_not_known_yet_proves_nothing(process: Process) -> None:
    """Of the one it is not known how much it will send; that does not make it the one."""
    request(process, 1, writes=False, ended_ns=0, sent=None)
    request(process, 2, writes=False)
    assert process.decide(work(write=0, read=BODY, print=7, printed=32)).label != "exact"


def test_a_file_whose_likely_owner_left_is_not_certainly_another_ones(process: Process) -> None:
    """Twins: one is over and gone when the file is closed."""
    first, second = (request(process, rid, size=BODY, print=7, printed=32) for rid in (1, 2))
    second.ended_ns, second.answered_ns = 0, 0
    unit = work(print=7, printed=32, closed=False)
    process.pending.add(unit)
    given_first = [decision for _, decision in process.settle(first)]
    process.leave(first)
    unit.file.closed, second.ended_ns = True, 2000
    given_second = [decision for _, decision in process.settle(second)]
    assert not [decision for decision in given_first + given_second if decision.label == "exact"]


# --- When it was -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "begun", "ended", "its"),
    [
        ({}, 10, 100, True),
        ({}, 20, 30, True),
        ({}, 21, 100, False),  # it had not begun
        ({}, 10, 29, False),  # it was over
        ({}, 10, 0, True),  # it is not over
        ({"last_ns": 500}, 10, 100, True),  # a close, and a read that finds the end, may come after it
        ({"data_ns": 101, "last_ns": 101}, 10, 100, False),
    ],
)
@pytest.mark.parametrize("evidence", ["path", "bytes", "window", "key"])
def test_nothing_is_given_to_a_request_that_had_not_begun_or_was_over(
    process: Process, values: dict[str, int], begun: int, ended: int, its: bool, evidence: str
) -> None:
    process.runs("goroutine")
    kinds = {"path": {"artifact": "one", "version": "v1"}, "bytes": {"size": BODY, "answered_ns": 0}, "window": {}, "key": {"key": 77}}
    request(process, 1, **kinds[evidence], begun_ns=begun, ended_ns=ended)
    unit = work("/srv/bucket/one/v1" if evidence == "path" else UUID, key=77 if evidence == "key" else 0, **values)
    owners, label, _ = asks(process, unit)
    assert (owners, label != "unattributed") == (([1], True) if its else ([], False))


# --- Keys --------------------------------------------------------------------------------------------------------


class Server:
    """A process whose requests come in pairs, of which the first's file is named and has a key, thread or socket."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.count = 0

    def pair(self, which: str, *, right: bool = True, named: bool = True, kind: str = "storage") -> Decision:
        """One more file. The key says that it is the first's (or, not `right`, the second's); its name, if it has one, the first's."""
        self.count += 1
        base = 10 * self.count
        key_of, tid_of = 1_000 + base, 2_000 + base
        lives = []
        for place in (1, 2):
            mine = place == (1 if right else 2)
            values = {
                "context": {"send_key": key_of if mine else key_of + 1},
                "thread": {"tid": tid_of if mine else tid_of + 1},
                "last_socket": {},
            }[which]
            lives.append(request(self.process, base + place, artifact=f"x{base + place}", version="v1", **values))
        path = f"/srv/bucket/x{base + 1}/v1" if named else f"/srv/bucket/tmp/{base}"
        rid = lives[0 if right else 1].rid if which == "last_socket" else 0
        unit = work(path, kind=kind, key=key_of if which == "context" else 0, tid=tid_of, rid=rid)
        decision = self.process.decide(unit)
        self.wanted = lives[0].rid
        for live in lives:
            self.process.leave(live)
        return decision


KEYS = ["context", "thread", "last_socket"]


@pytest.fixture
def server(process: Process) -> Server:
    return Server(process)


@pytest.mark.parametrize("which", KEYS)
def test_a_key_is_believed_after_it_has_agreed_often_enough(server: Server, which: str) -> None:
    for _ in range(resolve.TRUST_AFTER):
        decision = server.pair(which, named=False)
        assert decision.label != "exact"
        assert said(server.pair(which)) == ([server.wanted], "exact", "path")
    assert said(server.pair(which, named=False)) == ([server.wanted], "exact", which)
    assert said(server.pair(which)) == ([server.wanted], "exact", which)


@pytest.mark.parametrize("which", KEYS)
def test_a_key_that_disagrees_is_never_believed(server: Server, which: str) -> None:
    for place in range(10 * resolve.TRUST_AFTER):
        decision = server.pair(which, right=place % 4 > 0)
        assert ([owner.rid for owner in decision.owners], decision.evidence) == ([server.wanted], "path")
    assert server.pair(which, named=False).label != "exact"


@pytest.mark.parametrize("which", KEYS)
def test_a_key_does_not_overrule_a_name(server: Server, which: str) -> None:
    for _ in range(2 * resolve.TRUST_AFTER):
        server.pair(which)
    doubtful = server.pair(which, right=False)
    assert (said(doubtful)[0], doubtful.label) == ([server.wanted], "inferred"), "two that were sure disagree"
    assert {live.rid for live in doubtful.candidates} == {server.wanted, server.wanted + 1}


@pytest.mark.parametrize("which", KEYS)
def test_trust_is_lost(server: Server, which: str) -> None:
    for _ in range(2 * resolve.TRUST_AFTER):
        server.pair(which)
    for _ in range(resolve.TRUST_AFTER):
        server.pair(which, right=False)
    assert server.pair(which, named=False).label != "exact"
    assert said(server.pair(which, right=False))[::2] == ([server.wanted], "path")


@pytest.mark.parametrize("which", KEYS)
def test_a_process_may_change_its_ways(server: Server, which: str) -> None:
    """It disagreed once, long ago."""
    server.pair(which, right=False)
    for _ in range(resolve.TRUST_MEMORY + 1):
        server.pair(which)
    assert said(server.pair(which, named=False)) == ([server.wanted], "exact", which)


@pytest.mark.parametrize("which", KEYS)
def test_processes_are_trusted_each_for_itself(server: Server, which: str) -> None:
    for _ in range(resolve.TRUST_AFTER + 1):
        server.pair(which)
    assert Server(Process(SECRET)).pair(which, named=False).label != "exact"


def test_goroutines_are_what_the_language_goes_by(process: Process) -> None:
    process.runs("goroutine")
    request(process, 1, key=71)
    request(process, 2, key=72)
    assert asks(process, work(key=72)) == ([2], "exact", "goroutine")
    assert process.decide(work(key=73)).label == "shared"


def test_a_key_that_comes_with_the_answer_counts_as_well(process: Process) -> None:
    """A task of its own answers."""
    process.runs("goroutine")
    request(process, 1, key=71, send_key=81)
    request(process, 2, key=72, send_key=82)
    assert asks(process, work(key=81)) == ([1], "exact", "goroutine")


def test_a_key_that_several_had_is_the_first_to_ends(process: Process) -> None:
    """It was free for the next only then. Not the first to begin: that one may have been answered by another task."""
    process.runs("goroutine")
    request(process, 1, key=70, begun_ns=5, ended_ns=100)
    request(process, 2, key=70, begun_ns=10, ended_ns=50)
    assert asks(process, work(key=70)) == ([2], "exact", "goroutine")


def test_a_thread_that_has_several_requests_says_nothing_of_one(server: Server) -> None:
    for _ in range(resolve.TRUST_AFTER):
        server.pair("thread")
    request(server.process, 1, tid=60)
    request(server.process, 2)
    assert asks(server.process, work(tid=60)) == ([1], "exact", "thread")
    assert server.process.decide(work(tid=60, threads=2)).label == "shared", "nor where more than one thread had the file"
    for rid in (3, 4):
        request(server.process, rid, tid=60, reader=60)
    assert server.process.decide(work(tid=60)).label == "shared", "a loop reads several requests, and answers them in any order"


def test_the_last_socket_of_a_thread_that_turned_to_another_says_nothing(server: Server) -> None:
    for _ in range(resolve.TRUST_AFTER):
        server.pair("last_socket")
    for rid in (1, 2):
        request(server.process, rid)
    assert asks(server.process, work(rid=2)) == ([2], "exact", "last_socket")
    assert server.process.decide(work(rid=0)).label == "shared"


def test_a_request_that_left_is_no_keys(process: Process) -> None:
    process.runs("goroutine")
    first = request(process, 1, key=70)
    request(process, 2)
    request(process, 3)
    process.leave(first)
    assert process.decide(work(key=70)).label == "shared"


def test_a_request_whose_head_was_lost_owns_nothing(process: Process) -> None:
    """When it began, and what it asked for, is not known; its end is, and after that it is gone."""
    process.runs("goroutine")
    lost = Live(1, 1, 0, Names(None, None, None, ""), True)
    process.answers(lost, 50, 70, 90)
    lost.ended_ns = 100
    process.leave(lost)
    for rid in (2, 3):
        request(process, rid)
    assert process.decide(work(key=70)).label == "shared"


def test_work_that_is_summed_after_a_likely_owner_left_is_nobodys_for_certain(process: Process) -> None:
    """Its file was open all the time, and what was done with it is told at the close."""
    process.runs("context")
    first, second = (request(process, rid, size=BODY, print=7, printed=32) for rid in (1, 2))
    second.ended_ns, second.answered_ns = 0, 0
    opened = work(write=0, closed=False, data_ns=0, last_ns=20)
    process.pending.add(opened)
    assert list(process.settle(first)) == []
    process.leave(first)
    opened.work = FileWork(write_calls=1, write_bytes=BODY)
    opened.data_ns, opened.last_ns, opened.print, opened.printed, opened.file.closed = 30, 30, 7, 32, True
    second.ended_ns = 2000
    [(_, decision)] = process.settle(second)
    assert decision.label != "exact"


# --- What was before ---------------------------------------------------------------------------------------------


def settled(process: Process, *units: Unit) -> dict[int, Decision]:
    """Decides on all, given to their owners as the tracker does; by the place among them."""
    for unit in units:
        process.pending.add(unit)
    places = {id(unit): place for place, unit in enumerate(units)}
    found = {}
    for live in list(process.lives.values()):
        for unit, decision in process.settle(live):
            found[places[id(unit)]] = decision
            for owner in decision.owners:
                owner.take(unit, decision.label, decision.evidence)
    return found


def after_a_body(process: Process, *, threads: int) -> Decision:
    """Of an opaque note that a thread writes just after a body that is known, in a process that wrote bodies before."""
    for rid in range(100, 100 + 2 * resolve.TRUST_AFTER):
        live = request(process, rid, artifact=f"x{rid}", version="v1")
        settled(process, work(f"/srv/bucket/x{rid}/v1", threads=threads, tid=rid))
        process.leave(live)
    for rid in (1, 2):
        request(process, rid, artifact=f"y{rid}", version="v1")
    body = work("/srv/bucket/y2/v1", tid=60, threads=threads)
    other = work("/srv/bucket/y1/v1", tid=61, threads=threads)
    note = work("/srv/bucket/index.db", kind="metadata", write=50, tid=60, first_ns=40, last_ns=41, data_ns=41)
    return settled(process, body, other, note)[2]


def test_a_thread_that_does_all_of_a_file_goes_on_with_the_same_request(process: Process) -> None:
    assert said(after_a_body(process, threads=1)) == ([2], "inferred", "continuity")


def test_where_files_wander_over_threads_it_may_be_anybodys(process: Process) -> None:
    assert after_a_body(process, threads=2).label == "shared"


# --- Shared work -------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 1 << 50)


@given(st.lists(NUMBERS, min_size=7, max_size=7), st.lists(NUMBERS, min_size=4, max_size=4), st.integers(1, 40))
def test_parts_sum_to_the_whole(counts: list[int], times: list[int], of: int) -> None:
    whole = work()
    whole.work = FileWork(*counts)
    whole.write_ns, whole.read_ns, whole.sync_ns, whole.other_ns = times
    parts = [whole.share(of, place) for place in range(of)]
    for name in FileWork.__slots__:
        assert sum(getattr(part.work, name) for part in parts) == getattr(whole.work, name)
    for name in ("write_ns", "read_ns", "sync_ns", "other_ns", "ns", "bytes"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    assert max(part.ns for part in parts) - min(part.ns for part in parts) < 4 * of
    assert all(part.file is whole.file for part in parts)


def test_work_on_a_file_of_many_is_shared_by_all_that_may_have_caused_it(process: Process) -> None:
    for rid in (1, 2, 3):
        request(process, rid)
    request(process, 4, begun_ns=25)
    decision = process.decide(work(kind="metadata", many=True))
    assert said(decision) == ([1, 2, 3], "shared", "order")
    assert [live.rid for live in decision.candidates] == [1, 2, 3]


def test_bodies_that_nobody_can_tell_apart_go_one_to_each(process: Process) -> None:
    """In the order in which they came; no request gets two while another has none."""
    for rid in (1, 2, 3):
        request(process, rid, begun_ns=10 + rid, size=BODY, print=7, printed=32)
    units = [work(f"{UUID}{place}", tid=60 + place, first_ns=20 + place, print=7, printed=32) for place in range(3)]
    found = settled(process, *units)
    assert {place: said(decision) for place, decision in found.items()} == {place: ([place + 1], "shared", "order") for place in range(3)}
    assert all({live.rid for live in decision.candidates} == {1, 2, 3} for decision in found.values())


def test_an_opaque_note_is_shared_by_all_whose_it_may_be(process: Process) -> None:
    for rid in (1, 2, 3):
        request(process, rid, artifact=f"x{rid}", version="v1", answered_ns=90)
    bodies = [work(f"/srv/bucket/x{rid}/v1", tid=60 + rid) for rid in (1, 2)]
    note = work("/srv/bucket/index.db", kind="metadata", many=True, write=50, tid=69, first_ns=40, last_ns=41, data_ns=41)
    decision = settled(process, *bodies, note)[2]
    assert (said(decision)[0], decision.label) == ([1, 2, 3], "shared")


def test_what_is_decided_is_off_the_list(process: Process) -> None:
    live = request(process, 1, artifact="one", version="v1")
    units = [work("/srv/bucket/one/v1"), work("/srv/bucket/one/other", first_ns=200, last_ns=201, data_ns=201)]
    for unit in units:
        process.pending.add(unit)
    assert process.awaits(live)
    assert [unit for unit, _ in process.settle(live)] == units[:1], "what came after it is not its"
    assert list(process.pending) == units[1:]
    assert not process.awaits(live)


# --- All of it, against a model that knows -----------------------------------------------------------------------

MS = 1_000_000
TGID, LOOP = 100, 50
INDEX = 1 << 63
SIZES = (40, 900, 900, 70_000)


@dataclass(frozen=True)
class Ways:
    """How a simulated server works, and what of it can be seen."""

    model: str  # threads: one for each request; pool: a loop answers; workers: a loop reads, they answer; loop: one thread does it all
    requests: int
    names: str  # of files: those of the artifacts, or uuids; twins: several requests for one artifact
    twins: bool  # bodies of the same size and the same bytes
    rewrites: bool  # what is written has other bytes than the body
    digests: bool  # requests name theirs, and notes hold them
    runtime: abi.Runtime
    outside: bool  # files are made beside the store and renamed into it
    late: bool  # some files are closed long after the answer
    loss: float  # how probable it is that an event is lost


@dataclass
class Asked:
    """One request as the model has it; `mask`: a bit for each sum of work that is its, `body`: that of its body's."""

    rid: int
    writes: bool
    size: int
    content: int
    artifact: str
    version: str
    begun: int
    received: int = 0
    answered: int = 0
    ended: int = 0
    tid: int = 0
    key: int = 0
    mask: int = 0
    body: int = 0

    @property
    def digest(self) -> str:
        return sha256(str(self.content).encode()).hexdigest()


@dataclass
class Simulation:
    """Requests of one process and the events that the kernel would send of them. The time of each sum of work is one bit of a number,
    so that sums of these say which they are made of."""

    source: random.Random
    ways: Ways
    events: list[tuple[int, abi.Kind, bytes, dict[str, int]]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    bits: int = 0

    def bit(self, owner: Asked | None) -> int:
        if self.bits >= 60:
            return 0
        self.bits += 1
        if owner:
            owner.mask |= 1 << self.bits - 1
        return 1 << self.bits - 1

    def add(self, ts: int, kind: abi.Kind, data: bytes = b"", **values: int) -> None:
        self.events.append((ts, kind, data, values))

    def after(self, ts: int, longest: int = 10) -> int:
        return ts + self.source.randint(1, longest * MS)

    def play(self) -> None:
        free = dict.fromkeys(range(60, 64), 0)
        for number in range(self.ways.requests):
            self.request(number + 1, free)
        for number in range(self.source.randint(0, 2)):
            # What the server does for itself, such as to make room.
            start, size = self.source.randint(5, 120) * MS, self.source.choice(SIZES)
            self.file(None, 1000 + number, start, 70, size, 5000 + number, True, self.uuid())

    def uuid(self, folder: str = "bucket/tmp") -> str:
        return f"/srv/{folder}/{self.source.getrandbits(64):016x}"

    def request(self, rid: int, free: dict[int, int]) -> None:
        ways, source = self.ways, self.source
        content = source.randint(1, 2) if ways.twins else rid
        size = SIZES[1] if ways.twins else source.choice(SIZES)
        artifact = f"artifact-{source.randint(1, 2) if ways.names == 'twins' else rid}"
        version = f"release-{source.randint(1, 2)}"
        one = Asked(rid, source.random() < 0.7, size, content, artifact, version, source.randint(10, 60) * MS)
        one.key = 7000 + rid if ways.runtime else 0
        self.asked.append(one)
        one.received = self.after(one.begun, 30) if one.writes else one.begun
        start = one.received
        one.tid = 200 + rid
        if ways.model in ("pool", "loop"):
            one.tid = LOOP
        elif ways.model == "workers":
            one.tid = min(free, key=lambda tid: free[tid])
            start = max(start, free[one.tid])
        worked = self.store(one, start) if one.writes else self.serve(one, start)
        one.answered = self.after(worked)
        one.ended = self.after(one.answered, source.choice((3, 3, 1500)))
        free[one.tid] = one.ended + 1
        self.wire(one)

    def wire(self, one: Asked) -> None:
        """What is seen of its messages."""
        digest = f"X-Artifact-Digest: sha256:{one.digest}\r\n" if self.ways.digests and one.writes else ""
        target = f"/v1/bucket/{one.artifact}" + ("" if one.writes else f"?version={one.version}")
        head = f"{'PUT' if one.writes else 'GET'} {target} HTTP/1.1\r\nHost: h\r\nX-Artifact-Version: {one.version}\r\n{digest}\r\n"
        reader = one.tid if self.ways.model == "threads" else LOOP
        self.add(one.begun, abi.Kind.HEAD, head.encode(), rid=one.rid, n=len(head), last=1, tid=reader, key=one.key)
        if one.writes:
            self.add(one.received, abi.Kind.BODY, rid=one.rid, bytes=one.size, print=one.content, printed=32, tid=reader)
        answer = b"HTTP/1.1 200 OK\r\n\r\n"
        response = {"what": abi.Direction.RESPONSE, "status": 200, "n": len(answer), "last": 1}
        self.add(one.answered, abi.Kind.HEAD, answer, rid=one.rid, tid=one.tid, key=one.key, **response)
        flags = 0 if self.ways.model == "threads" else abi.RequestFlag.INTERLEAVED
        moved = {"bytes_in": one.size, "print_in": one.content, "printed_in": 32} if one.writes else {}
        moved |= {} if one.writes else {"bytes_out": one.size, "print_out": one.content, "printed_out": 32}
        times = {"start_ns": one.begun, "end_ns": one.ended, "received_ns": one.received, "answered_ns": one.answered}
        self.add(one.ended, abi.Kind.END, rid=one.rid, flags=flags, status=200, framed=1, tid=one.tid, **times, **moved)

    def store(self, one: Asked, start: int) -> int:
        """Writes a file under a name of its own and renames it; tells an index. When that is done."""
        named = f"/srv/bucket/{one.artifact}/{one.version}"
        final = self.uuid() if self.ways.names == "uuid" else named
        size, content = one.size, one.content
        if self.ways.rewrites:
            size, content = self.source.choice(SIZES), 9000 + one.rid
        written = self.file(
            one, one.rid, start, self.doer(one), size, content, True, self.uuid("tmp" if self.ways.outside else "bucket/tmp")
        )
        moved = self.after(written)
        tid, path = self.doer(one), self.path_of(one.rid)
        data = (path + final).encode()
        own = abi.FileFlag.ALONE if self.ways.model == "threads" else 0
        names = {"what": abi.PathCall.RENAME, "n": len(path), "n2": len(final), "dirfd": tracker.AT_FDCWD, "dirfd2": tracker.AT_FDCWD}
        rid = self.last_socket(one, tid)
        self.add(moved, abi.Kind.PATH, data, tid=tid, rid=rid, key=self.key(one), file_flags=own, **names)
        return self.note(one, self.after(moved))

    def serve(self, one: Asked, start: int) -> int:
        path = self.uuid() if self.ways.names == "uuid" else f"/srv/bucket/{one.artifact}/{one.version}"
        return self.file(one, one.rid, start, self.doer(one), one.size, one.content, False, path)

    def note(self, one: Asked, at: int) -> int:
        """A row in an index that is open all the time."""
        tid, done = self.doer(one), self.after(at, 2)
        if self.ways.digests:
            text = b'{"digest": "' + one.digest.encode() + b'"}'
            data = token_bits(text, SECRET).to_bytes(abi.TOKEN_BITS // 8, "little")
            self.add(done, abi.Kind.TOKENS, data, gen=INDEX, n=len(data), tid=tid, size=len(text), rid=0)
        flags = abi.FileFlag.MANY | (abi.FileFlag.ALONE if self.ways.model == "threads" else 0)
        times = {"first_ns": at, "last_ns": done, "data_ns": done, "write_ns": self.bit(one)}
        who = {"tid": tid, "rid": self.last_socket(one, tid), "key": self.key(one)}
        self.add(done + 1, abi.Kind.FILE, gen=INDEX, write_calls=1, write_bytes=4096, flags=flags, **times, **who)
        return done

    def path_of(self, gen: int) -> str:
        return next(data for _, kind, data, values in self.events if kind == abi.Kind.OPEN and values["gen"] == gen).decode()

    def doer(self, one: Asked) -> int:
        return self.source.randint(60, 63) if self.ways.model == "pool" else one.tid

    def last_socket(self, one: Asked, tid: int) -> int:
        """A pool's thread has none; a loop's is anybody's."""
        if self.ways.model == "pool":
            return 0
        return self.source.randint(1, self.ways.requests) if self.ways.model == "loop" else one.rid if self.ways.model == "threads" else 0

    def key(self, one: Asked | None) -> int:
        """Of a goroutine: its own or one of nobody. Of a task: half of the time another's, so that it must never be believed."""
        if not one or not self.ways.runtime:
            return 0
        other = 8000 + one.rid if self.ways.runtime is abi.Runtime.GO else 7000 + self.source.randint(1, self.ways.requests)
        return self.source.choice((one.key, other))

    def file(self, one: Asked | None, gen: int, start: int, tid: int, size: int, content: int, writes: bool, path: str) -> int:
        """Opens a file, moves its bytes, and closes it, at once or much later. When the bytes were there."""
        own = abi.FileFlag.ALONE if one and self.ways.model == "threads" else 0
        who = {"tid": tid, "rid": self.last_socket(one, tid) if one else 0, "key": self.key(one)}
        opened = self.after(start, 3)
        flags = tracker.os.O_CREAT | tracker.os.O_EXCL | tracker.os.O_WRONLY if writes else 0
        opening = {"gen": gen, "fd": gen, "n": len(path), "what": own, "flags": flags, "dirfd": tracker.AT_FDCWD}
        self.add(opened, abi.Kind.OPEN, path.encode(), **opening, **who)
        first, last = opened + 1, self.after(opened)
        calls = {"write_calls": 1, "write_bytes": size} if writes else {"read_calls": 1, "read_bytes": size}
        times = {"first_ns": first, "last_ns": last, "data_ns": last, "write_ns" if writes else "read_ns": self.bit(one)}
        if one:
            one.body = one.mask
        closing = 0 if own else self.source.choice((0, 20, 20, 900 if self.ways.late else 20))
        file_flags = own | (abi.FileFlag.TIDS if self.ways.model == "pool" else 0)
        closed = last + 1 + self.source.randint(0, closing) * MS
        apart = closing == 900 and self.source.random() < 0.5  # sums that were sent before
        of = {"gen": gen, "flags": file_flags, "print": content, "printed": 32} | who
        self.add(last + 1 if apart else closed, abi.Kind.FILE, what=int(not apart), **of, **times, **calls)
        if apart:
            rest = {"first_ns": closed - 1, "last_ns": closed, "other_ns": self.bit(one)}
            self.add(closed, abi.Kind.FILE, what=1, gen=gen, flags=file_flags | abi.FileFlag.CONTINUES, **rest, **who)
        return last


def encoded(kind: abi.Kind, data: bytes, values: dict[str, int]) -> Any:
    made = abi.EVENTS[kind]()
    for name, value in ({"kind": kind, "tgid": TGID} | values).items():
        setattr(made.h if hasattr(made.h, name) else made, name, value)
    return decode.decode(bytes(made) + data)


@dataclass
class Outcome:
    """What the tracker made of it. `ns` and `bytes`: of the work that it was told of."""

    asked: dict[int, Asked]
    records: dict[int, Request]
    unattributed: Share
    ns: int = 0
    bytes: int = 0


class Storage:
    def classify(self, path: str) -> resolve.FileClass:
        return "metadata" if path.endswith(".db") else "storage" if path.startswith("/srv/bucket/") else "other"


def simulate(seed: int, ways: Ways) -> Outcome:
    source = random.Random(seed)
    simulation = Simulation(source, ways)
    simulation.play()
    records: list[Request] = []
    made = tracker.Tracker(Storage(), lambda ns: ns, lambda tgid, fd: None, lambda tgid: "/", records.append)
    made.secret = SECRET
    made.learn_runtime(TGID, ways.runtime)
    made.learn_file(INDEX, "/srv/bucket/index.db", 2)
    known, lost_files, lost_of = {INDEX}, 0, Counter[int]()
    outcome = Outcome({one.rid: one for one in simulation.asked}, {}, Share())
    countable = (abi.Kind.HEAD, abi.Kind.OPEN, abi.Kind.FILE, abi.Kind.PATH, abi.Kind.BODY)
    last = 0
    for ts, kind, data, values in sorted(simulation.events, key=lambda event: event[0]):
        if source.random() < 0.3:
            made.tick(ts)
        last = ts
        if kind != abi.Kind.END and source.random() < ways.loss:
            lost_files += kind in countable
            if kind == abi.Kind.HEAD or values.get("flags", 0) & abi.FileFlag.ALONE:
                lost_of[values["rid"]] += 1
            continue
        if kind in (abi.Kind.HEAD, abi.Kind.END):
            values = values | {"lost_files": lost_files}
        if kind == abi.Kind.END:
            values |= {"lost": lost_of[values["rid"]]}
        if kind == abi.Kind.OPEN:
            known.add(values["gen"])
        if kind == abi.Kind.FILE and values["gen"] in known:
            outcome.ns += sum(values.get(name, 0) for name in ("write_ns", "read_ns", "other_ns"))
            outcome.bytes += values.get("write_bytes", 0) + values.get("read_bytes", 0)
        made.feed(encoded(kind, data, {"ts": ts} | values))
    made.tick(last + tracker.HOLD_NS + 1)
    made.tick(last + 2 * tracker.PENDING_NS)
    outcome.records = {int(record.id, 16): record for record in records}
    assert len(records) == made.records == len(outcome.records)
    for share in made.unattributed.values():
        outcome.unattributed.ns += share.ns
        outcome.unattributed.bytes += share.bytes
    return outcome


WAYS = st.builds(
    Ways,
    model=st.sampled_from(("threads", "pool", "workers", "loop")),
    requests=st.sampled_from((1, 2, 3, 8, 12, 50)),
    names=st.sampled_from(("artifacts", "twins", "uuid")),
    twins=st.booleans(),
    rewrites=st.booleans(),
    digests=st.booleans(),
    runtime=st.sampled_from((abi.Runtime.NONE, abi.Runtime.NONE, abi.Runtime.GO, abi.Runtime.CPYTHON)),
    outside=st.booleans(),
    late=st.booleans(),
    loss=st.sampled_from((0.0, 0.0, 0.03, 0.2)),
)


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), WAYS)
def test_whatever_a_server_does_exact_is_right_and_nothing_is_lost_or_counted_twice(seed: int, ways: Ways) -> None:
    outcome = simulate(seed, ways)
    assert outcome.records.keys() == outcome.asked.keys()
    given_ns = given_bytes = 0
    for rid, record in outcome.records.items():
        assert sum(record.phases.values()) == record.duration_ns
        shares = record.attribution.by_label
        exact = shares.get("exact", Share()).ns
        assert not exact & ~outcome.asked[rid].mask, f"request {rid} has what is not its: {record.attribution}"
        if record.lost_events:
            assert record.attribution.label != "exact"
        if shares:
            assert resolve_order(record.attribution.label) >= max(map(resolve_order, shares))
        assert (record.attribution.label == "shared") <= bool(record.attribution.candidates)
        given_ns += sum(share.ns for share in shares.values())
        given_bytes += sum(share.bytes for share in shares.values())
        counted = [record.files, record.metadata_files]
        assert sum(each.write_bytes + each.read_bytes for each in counted) == sum(share.bytes for share in shares.values())
    accounted = given_bytes + outcome.unattributed.bytes, given_ns + outcome.unattributed.ns
    if ways.outside and (ways.loss or ways.late):  # what never got its name in the store, or too late, is no storage work
        assert accounted[0] <= outcome.bytes
        assert accounted[1] <= outcome.ns
    else:
        assert accounted == (outcome.bytes, outcome.ns)


def resolve_order(label: str) -> int:
    return LABELS.index(label)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.sampled_from(("threads", "pool", "workers", "loop")), st.booleans(), st.booleans())
def test_where_files_have_their_requests_names_all_bodies_are_told_apart(seed: int, model: str, twins: bool, outside: bool) -> None:
    """Guards the test before: it would hold for a tracker that gives nothing to anybody."""
    ways = Ways(model, 12, "artifacts", twins, False, True, abi.Runtime.NONE, outside, late=False, loss=0.0)
    outcome = simulate(seed, ways)
    for rid, record in outcome.records.items():
        one = outcome.asked[rid]
        moved = record.files.write_bytes if one.writes else record.files.read_bytes
        assert moved >= one.size, "others may have come by the window, but then they are not exact"
        assert record.attribution.by_label["exact"].ns & one.body

# SPDX-License-Identifier: Apache-2.0
"""Which digest is whose, and what it says. A request has a body of 1 MiB here unless told otherwise, which was there whole at 50 ms."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import integrity
from bucketprobe.hashtime import Gaps, Timed
from bucketprobe.http1 import RequestHead, ResponseHead, parse_request
from bucketprobe.integrity import AT_ONCE_NS, FASTEST, HABIT, MAX_UNCLAIMED, TRUST_AFTER, Digests, Hasher, OfThread, Seen, judge, report
from bucketprobe.model import Digest

MS = 1_000_000
MIB = 1 << 20


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


RIGHT, WRONG, THIRD = (sha256(content) for content in (b"right", b"wrong", b"third"))


@dataclass
class Asked:
    """A request, as far as its digests go."""

    rid: int = 1
    begun_ns: int = 10 * MS
    ended_ns: int = 100 * MS
    received_ns: int = 50 * MS
    read_key: int = 0
    send_key: int = 0
    writes: bool = True
    size: int | None = MIB
    declared: str | None = RIGHT
    digests: list[Seen] = field(default_factory=list)

    def values(self) -> list[str]:
        return [seen.value for seen in self.digests]


@dataclass
class OwnedFile:
    owner: int


def seen(value: str = RIGHT, size: int = MIB, at_ms: float = 60.0, **others: Any) -> Seen:
    return Seen(value, size, round(at_ms * MS), **others)


def waiting(*those: Seen) -> Digests:
    digests = Digests()
    digests.proven = True
    for each in those:
        digests.wait(each)
    return digests


def end(
    digests: Digests, owner: Asked, others: Sequence[Asked] = (), key_name: str = "context", read_back: Sequence[tuple[int, int]] = ()
) -> None:
    """It ended, and was held back for as long as that takes."""
    digests.claim(owner, (), key_name, (), last=False)
    digests.claim(owner, others, key_name, read_back, last=True)


def told(
    digests: Digests, owner: Asked, read_back: Sequence[tuple[int, int]] = (), *, sent: int = 0, answered: bool = False, **thread: Any
) -> Digest:
    return report(
        digests,
        owner,
        "write" if owner.writes else "read",
        sent,
        OfThread(**({"gaps": Gaps()} | thread)),
        read_back,
        answered_mismatch=answered,
    )


# --- How a digest may be written ---------------------------------------------------------------------------------

ALGORITHMS = sorted(integrity.SIZES)
HEX = {name: hashlib.new(name, b"content", usedforsecurity=False).hexdigest() for name in ALGORITHMS}


def in_base64(name: str) -> str:
    return base64.b64encode(bytes.fromhex(HEX[name])).decode()


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "write",
    [
        lambda name: HEX[name],
        lambda name: HEX[name].upper(),
        lambda name: f"{name}:{HEX[name]}",
        lambda name: f"{name.upper()}:{HEX[name].upper()}",
        lambda name: f"  {name}:{HEX[name]} ",
        lambda name: f'"{HEX[name]}"',
        lambda name: f'"{name}:{HEX[name]}"',
        lambda name: f'W/"{name}:{HEX[name]}"',
        lambda name: in_base64(name),  # Content-MD5, say
        lambda name: f"{name}={in_base64(name)}",
        lambda name: f"{name}-{in_base64(name)}",  # subresource integrity
        lambda name: f"{name.replace('sha', 'sha-')}=:{in_base64(name)}:",  # RFC 9530
        lambda name: f"{name.replace('sha', 'SHA-')}={in_base64(name)}",  # RFC 3230
    ],
)
def test_all_usual_forms_are_read(name: str, write) -> None:
    assert integrity.parse(write(name)) == f"{name}:{HEX[name]}"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        '""',
        "sha256:",
        "sha256:" + HEX["sha256"][:-1],
        "sha256:" + HEX["sha256"] + "00",
        "sha256:" + HEX["sha512"],
        "md5:" + HEX["sha256"],
        "sha512:" + HEX["sha256"],
        "crc32:" + HEX["sha256"],
        "sha256:" + HEX["sha256"][:-1] + "g",
        HEX["sha256"] + " " + HEX["sha256"],
        "5d41402a-1",  # an entity tag of something that was put in parts
        "W/",
        "=" * 44,
        "sha-256=::",
        "\u0661" * 64,  # digits, but not ours
    ],
)
def test_what_is_none_is_not_read_as_one(text: str | None) -> None:
    assert integrity.parse(text) is None


@pytest.mark.parametrize("text", ["\u017fha256:" + HEX["sha256"], "\u017fha-256=:" + in_base64("sha256") + ":", "\u017fha1:" + HEX["sha1"]])
def test_a_letter_that_only_looks_like_one_is_another(text: str) -> None:
    """The long s is an s where case does not count. It reaches this by way of a query."""
    assert integrity.parse(text) is None
    assert integrity.declared(["query:digest"], RequestHead("GET", "/", {"digest": text}, "1.1", {}, True), None) is None


NEAR = st.text('sShHaA25613845md5MD5:=-/"W+\u017f\u0130\u212a\uff10 \x00', max_size=80)


@given(st.one_of(st.text(max_size=200), NEAR, st.binary(max_size=200).map(lambda raw: raw.decode("latin-1"))))
def test_whatever_is_written_is_a_digest_or_none_and_never_an_error(text: str) -> None:
    for found in (integrity.parse(text), integrity.parse(f"sha256:{text}"), integrity.parse(f"sha-256=:{text}:")):
        if found is not None:
            name, _, value = found.partition(":")
            assert len(bytes.fromhex(value)) == integrity.SIZES[name]
            assert value == value.lower()
            assert integrity.parse(found) == found


@settings(deadline=None)
@given(
    st.binary(max_size=300), st.lists(st.sampled_from(["path", "query:digest", "header:x-artifact-digest", "response:etag"]), max_size=5)
)
def test_no_request_that_can_be_read_is_an_error(target: bytes, spec: list[str]) -> None:
    safe = bytes(byte for byte in target if byte > 32 and byte != 127)
    head = parse_request(b"GET /" + safe + b"?digest=" + safe + b" HTTP/1.1\r\nX-Artifact-Digest: " + safe + b"\r\n\r\n")
    found = integrity.declared(spec, head, None)
    assert found is None or integrity.parse(found) == found


def test_long_text_takes_no_long_time() -> None:
    """It is written by whoever sends it: a search that goes back and forth would stop the agent."""
    for text in ("sha256" + ":" * 500, "sha256:" + "A" * 500 + ":" * 5, "a" * 1024, ("a" * 31 + "g") * 32, ("sha1/" * 200)):
        assert integrity.parse(text) is None
        assert integrity._in_path(text[:1024]) is None or len(text) > 31


# --- Where it is declared ----------------------------------------------------------------------------------------


def head(path: str = "/v1/b/a", query: dict[str, str] | None = None, **headers: str) -> RequestHead:
    return RequestHead("PUT", path, query or {}, "1.1", {name.replace("_", "-"): value for name, value in headers.items()}, True)


def answer(**headers: str) -> ResponseHead:
    return ResponseHead("1.1", 200, headers, True)


@pytest.mark.parametrize("place", ["header:x-artifact-digest", "header:X-Artifact-Digest"])
def test_a_header_whatever_its_case(place: str) -> None:
    assert integrity.declared([place], head(x_artifact_digest=RIGHT), None) == RIGHT
    assert integrity.declared([place], head(content_md5=RIGHT), None) is None


def test_a_parameter_a_header_of_the_answer_and_the_path() -> None:
    assert integrity.declared(["query:digest"], head(query={"digest": RIGHT}), None) == RIGHT
    assert integrity.declared(["response:ETag"], head(), answer(etag=f'"{HEX["md5"]}"')) == f"md5:{HEX['md5']}"
    assert integrity.declared(["response:ETag"], head(), None) is None
    assert integrity.declared(["path"], head(f"/blobs/{RIGHT}"), None) == RIGHT


def test_the_first_place_that_has_one_wins() -> None:
    spec = ["header:x-artifact-digest", "query:digest", "path"]
    full = head(f"/blobs/{THIRD}", {"digest": WRONG}, x_artifact_digest=RIGHT)
    assert integrity.declared(spec, full, None) == RIGHT
    full.headers["x-artifact-digest"] = "what"
    assert integrity.declared(spec, full, None) == WRONG
    full.query.clear()
    assert integrity.declared(spec, full, None) == THIRD
    assert integrity.declared([], full, None) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v2/x/blobs/sha256:{}", "sha256"),
        ("/v2/x/blobs/SHA256:{}", "sha256"),
        ("/objects/{}", "sha1"),
        ("/sha256/{}/data", "sha256"),
        ("/cas/sha512-{}.bin", "sha512"),
        ("/a/md5_{}", "md5"),
    ],
)
def test_paths_that_name_what_they_hold(path: str, name: str) -> None:
    for value in (HEX[name], HEX[name].upper()):
        assert integrity.declared(["path"], head(path.format(value)), None) == f"{name}:{HEX[name]}"


@pytest.mark.parametrize(
    "path", ["/", "/v1/bucket/artifact", "/deadbeef", f"/{'a' * 33}", f"/{'a' * 200}", f"/{'0' * 65}", f"/x{HEX['sha256']}y"]
)
def test_paths_that_name_nothing(path: str) -> None:
    """A part of a longer number is none, either."""
    assert integrity.declared(["path"], head(path), None) is None


# --- What a request's digests say --------------------------------------------------------------------------------


def judged(*those: Seen, expected: str | None = RIGHT, size: int = MIB, writes: bool = True, whole: bool = True, read_back=()) -> tuple:
    found = judge(those, expected, size=size, writes=writes, whole=whole, read_back=read_back)
    return found.computed and found.computed.value, found.result, found.verified


def test_a_body_that_is_what_was_declared_and_one_that_is_not() -> None:
    assert judged(seen()) == (RIGHT, "match", ())
    assert judged(seen(WRONG)) == (WRONG, "mismatch", ())


@pytest.mark.parametrize("size", [0, 1, 32, MIB - 1, MIB + 1, 2 * MIB])
def test_a_digest_of_something_else_is_not_taken_for_the_bodys(size: int) -> None:
    """A TLS transcript, a token, an entity tag."""
    assert judged(seen(WRONG, size)) == (None, None, ())
    assert judged(seen(WRONG, size), seen(RIGHT)) == (RIGHT, "match", ())


def test_a_body_that_did_not_come_whole_is_no_mismatch() -> None:
    """The digest of what came of it is not what was declared, of course."""
    for whole, size in ((False, MIB), (False, 0)):
        assert judged(seen(WRONG), whole=whole, size=size) == (None, None, ())


def test_a_body_of_nothing_is_not_judged_by_a_digest_of_nothing() -> None:
    assert judged(seen(sha256(b""), 0), size=0) == (None, None, ())


def test_a_digest_by_another_algorithm_says_nothing_of_the_one_that_was_declared() -> None:
    md5 = f"md5:{HEX['md5']}"
    assert judged(seen(md5)) == (md5, None, ())
    assert judged(seen(md5), seen()) == (RIGHT, "match", ())
    assert judged(seen(md5), seen(WRONG)) == (WRONG, "mismatch", ())
    assert judged(seen(), expected=md5) == (RIGHT, None, ())


def test_what_declares_nothing_is_computed_and_not_compared() -> None:
    assert judged(seen(), expected=None) == (RIGHT, None, ())


def test_of_several_the_declared_one_counts() -> None:
    """The same bytes hashed with a salt before, say."""
    assert judged(seen(WRONG), seen(RIGHT)) == (RIGHT, "match", ())


READ_BACK = [(MIB, 70 * MS)]


@pytest.mark.parametrize(("value", "result"), [(RIGHT, "match"), (WRONG, "mismatch")])
def test_what_is_read_back_is_compared_once_and_apart(value: str, result: str) -> None:
    found = judged(seen(RIGHT, at_ms=60), seen(value, at_ms=80), read_back=READ_BACK)
    assert found == (RIGHT, "match", (result,))


def test_a_digest_that_was_finished_before_the_file_was_read_is_not_of_that() -> None:
    assert judged(seen(RIGHT, at_ms=60), read_back=READ_BACK) == (RIGHT, "match", ())


def test_a_file_of_another_length_was_not_what_was_hashed() -> None:
    assert judged(seen(RIGHT, at_ms=80), read_back=[(MIB // 2, 70 * MS)]) == (RIGHT, "match", ())


def test_without_a_declared_digest_what_is_read_back_is_compared_with_the_body() -> None:
    for value, result in ((RIGHT, "match"), (WRONG, "mismatch")):
        assert judged(seen(RIGHT), seen(value, at_ms=80), expected=None, read_back=READ_BACK) == (RIGHT, None, (result,))


def test_a_service_that_hashes_only_what_it_has_stored_has_hashed_the_body() -> None:
    assert judged(seen(RIGHT, at_ms=80), read_back=READ_BACK) == (RIGHT, "match", ("match",))


@pytest.mark.parametrize(("value", "result"), [(RIGHT, "match"), (WRONG, "mismatch")])
@pytest.mark.parametrize("nbytes", [MIB, 2 * MIB])
def test_a_read_is_verified_by_what_it_was_asked_to_have(value: str, result: str, nbytes: int) -> None:
    """A file is gone through twice, perhaps: to hash it, and to send it."""
    found = judged(seen(value, at_ms=80), writes=False, read_back=[(nbytes, 20 * MS)])
    assert found == (None, None, (result,))


def test_a_read_that_declares_nothing_is_not_verified() -> None:
    assert judged(seen(), expected=None, writes=False, read_back=[(MIB, 20 * MS)]) == (None, None, ())


@pytest.mark.parametrize("size", [0, 8, 32, 4096])
def test_a_digest_of_something_else_in_a_read_is_no_verification(size: int) -> None:
    """Of the token that it came with, say, of which there are fewer bytes than of the file."""
    assert judged(seen(WRONG, size, at_ms=80), writes=False, read_back=[(MIB, 20 * MS)]) == (None, None, ())
    both = judged(seen(WRONG, size, at_ms=30), seen(RIGHT, at_ms=80), writes=False, read_back=[(MIB, 20 * MS)])
    assert both == (None, None, ("match",))


# --- Whose it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digest", "key_name", "evidence"),
    [
        (seen(WRONG, key=7), "context", "context"),
        (seen(WRONG, key=7), "goroutine", "goroutine"),
        (seen(WRONG, files=(OwnedFile(1),)), "context", "descriptor"),
        (seen(RIGHT), "context", "value"),
        (seen(WRONG), "context", "bytes"),
        (seen(WRONG, files=(OwnedFile(1),)), "goroutine", "bytes"),
        (seen(WRONG, files=(OwnedFile(-1), OwnedFile(0), OwnedFile(2))), "context", "bytes"),
        (seen(WRONG, key=8), "context", "bytes"),
    ],
)
def test_what_ties_a_digest_to_a_request(digest: Seen, key_name: str, evidence: str) -> None:
    owner = Asked(send_key=7)
    end(waiting(digest), owner, key_name=key_name)
    assert owner.digests == [digest]
    assert digest.evidence == evidence


def test_a_goroutine_may_be_the_one_that_read() -> None:
    for key_name, found in (("goroutine", ["goroutine"]), ("context", [])):
        owner, other = Asked(read_key=7), Asked(2)
        end(waiting(seen(WRONG, key=7)), owner, [other], key_name)
        assert [each.evidence for each in owner.digests if each.evidence != "order"] == found


@pytest.mark.parametrize(
    "digest",
    [
        seen(WRONG, MIB - 1),  # of something else
        seen(RIGHT, MIB - 1),
        seen(WRONG, at_ms=49),  # before its last byte had come
        seen(WRONG, at_ms=101),  # when it was over
        seen(WRONG, at_ms=5),
    ],
)
def test_a_digest_that_cannot_be_of_its_body_is_not_given_to_it(digest: Seen) -> None:
    owner = Asked()
    digests = waiting(digest)
    assert not digests.awaits(owner)
    end(digests, owner)
    assert owner.digests == []


def test_a_body_that_did_not_come_whole_gets_none() -> None:
    owner = Asked(received_ns=0)
    digests = waiting(seen(WRONG))
    assert not digests.awaits(owner)
    end(digests, owner)
    assert owner.digests == []


@pytest.mark.parametrize("owner", [Asked(size=0), Asked(size=None), Asked(writes=False, size=0, received_ns=10 * MS, declared=None)])
def test_a_request_without_a_body_gets_none(owner: Asked) -> None:
    digests = waiting(seen(WRONG, 0), seen(WRONG))
    assert not digests.awaits(owner)
    end(digests, owner)
    assert owner.digests == []


def test_a_request_that_ended_is_waited_with_only_while_it_may_get_one() -> None:
    owner = Asked()
    assert waiting(seen(WRONG)).awaits(owner)
    assert not Digests().awaits(owner)
    owner.digests.append(seen())
    assert not waiting(seen(WRONG)).awaits(owner)


def test_what_may_be_anothers_is_left_to_it_until_the_last() -> None:
    owner = Asked()
    digests = waiting(seen(WRONG))
    digests.claim(owner, (), "context", (), last=False)
    assert owner.digests == []


# --- Several of the same size at once ----------------------------------------------------------------------------


def values_of(count: int) -> list[str]:
    return [sha256(b"%d" % number) for number in range(count)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_those_that_match_are_told_by_their_value_and_the_one_left_over_is_the_mismatch(order: Sequence[int]) -> None:
    values = values_of(3)
    digests = waiting(seen(values[2]), seen(WRONG), seen(values[0]))
    asked = [Asked(number, declared=value) for number, value in enumerate(values, 1)]
    for number in (0, 1, 2):  # they end, and are held back
        digests.claim(asked[number], (), "context", (), last=False)
    reports = {}
    for number in order:
        digests.claim(asked[number], asked, "context", (), last=True)
        reports[number] = told(digests, asked[number])
    assert [reports[number].result for number in range(3)] == ["match", "mismatch", "match"]
    assert [reports[number].computed for number in range(3)] == [values[0], WRONG, values[2]]
    assert [reports[number].mismatch for number in range(3)] == [None, "computed", None]
    assert [reports[number].evidence for number in range(3)] == ["value", "bytes", "value"]


def test_where_several_are_left_over_each_is_a_mismatch_and_none_has_a_value() -> None:
    values = values_of(4)
    digests = waiting(seen(values[0]), seen(WRONG), seen(THIRD), seen(values[3]))
    asked = [Asked(number, declared=value) for number, value in enumerate(values, 1)]
    for each in asked:
        digests.claim(each, (), "context", (), last=False)
    reports = []
    for each in asked:
        digests.claim(each, asked, "context", (), last=True)
        reports.append(told(digests, each))
    assert [each.result for each in reports] == ["match", "mismatch", "mismatch", "match"]
    assert [each.mismatch for each in reports] == [None, "computed", "computed", None]
    assert reports[1].computed is None, "either may be the other's"
    assert sorted(value for each in asked for value in each.values()) == sorted([values[0], WRONG, THIRD, values[3]])


def test_one_that_another_declares_is_left_to_it() -> None:
    """Also where that one has not ended yet."""
    first, second = Asked(1, declared=RIGHT), Asked(2, declared=THIRD, ended_ns=0)
    digests = waiting(seen(THIRD))
    end(digests, first, [second])
    assert first.digests == []
    second.ended_ns = 100 * MS
    end(digests, second, [first])
    assert second.values() == [THIRD]


def test_the_same_bytes_sent_twice_at_once_are_hashed_once_for_each() -> None:
    """A client that tries again, say: both digests are what both declare."""
    first, second = Asked(1), Asked(2)
    digests = waiting(seen(at_ms=60), seen(at_ms=61))
    for owner, other in ((first, second), (second, first)):
        end(digests, owner, [other])
    reports = [told(digests, owner) for owner in (first, second)]
    assert [each.result for each in reports] == ["match", "match"]
    assert [each.bytes for each in reports] == [MIB, MIB]


def test_the_same_bytes_sent_twice_at_once_go_by_better_evidence_where_there_is_some() -> None:
    first, second = Asked(1, send_key=7), Asked(2, send_key=8)
    mine, other = seen(at_ms=61, key=7), seen(at_ms=60, key=8)
    digests = waiting(other, mine)
    for owner in (first, second):
        end(digests, owner, [first, second])
    assert (first.digests, second.digests) == ([mine], [other])


def test_the_socket_that_was_used_last_decides_once_it_was_always_right() -> None:
    digests = waiting()
    for number in range(TRUST_AFTER):
        digests.wait(seen(rid=number))
        end(digests, Asked(number))
    first, second = Asked(101, declared=values_of(1)[0]), Asked(102, declared=values_of(2)[1])
    digests.wait(seen(THIRD, rid=102))
    digests.wait(seen(WRONG, rid=101))
    for owner in (first, second):
        end(digests, owner, [first, second])
    reports = [told(digests, owner) for owner in (first, second)]
    assert [each.computed for each in reports] == [WRONG, THIRD]
    assert reports[0].evidence == "last_socket"


def test_the_socket_that_was_used_last_is_not_believed_where_it_was_ever_wrong() -> None:
    digests = waiting(seen(rid=99))
    end(digests, Asked(1))
    for number in range(2 * TRUST_AFTER):
        digests.wait(seen(rid=number))
        end(digests, Asked(number))
    first, second = Asked(101, declared=values_of(1)[0]), Asked(102, declared=values_of(2)[1])
    digests.wait(seen(THIRD, rid=102))
    digests.wait(seen(WRONG, rid=101))
    end(digests, first, [second])
    assert told(digests, first).evidence == "order"


@settings(deadline=None)
@given(st.data())
def test_whatever_is_in_flight_right_uploads_match_and_wrong_ones_do_not(data: st.DataObject) -> None:
    """All of one size; each digest was seen. Whoever ends first, and in whatever order they are let go."""
    count = data.draw(st.integers(1, 8))
    wrong = data.draw(st.sets(st.integers(0, count - 1)))
    values = values_of(count)
    computed = [sha256(b"wrong %d" % number) if number in wrong else value for number, value in enumerate(values)]
    digests = waiting(*(seen(computed[number]) for number in data.draw(st.permutations(range(count)))))
    asked = [Asked(number, declared=value) for number, value in enumerate(values)]
    for number in range(count):
        digests.claim(asked[number], (), "context", (), last=False)
    reports = {}
    for number in data.draw(st.permutations(range(count))):
        digests.claim(asked[number], asked, "context", (), last=True)
        reports[number] = told(digests, asked[number])
    assert {number for number, each in reports.items() if each.result == "mismatch"} == wrong
    assert {number for number, each in reports.items() if each.result == "match"} == set(range(count)) - wrong
    for number, each in reports.items():
        assert each.computed in (None, computed[number]) or len(wrong) > 1
        assert not (each.computed is None and number not in wrong)
    if len(wrong) == 1:
        assert all(each.computed is not None for each in reports.values())


# --- The same hash, finished once more ---------------------------------------------------------------------------


def test_a_digest_that_is_asked_for_again_was_not_hashed_again() -> None:
    digests = Digests()
    assert not digests.repeats(seen(tid=5, ran_ns=1_000_000))
    assert digests.repeats(seen(tid=5, ran_ns=1_003_000))
    assert digests.repeats(seen(tid=5, ran_ns=1_006_000))


@pytest.mark.parametrize(
    "again",
    [
        seen(tid=5, ran_ns=1_000_001 + round(FASTEST * MIB)),  # long enough to hash it all
        seen(tid=6, ran_ns=1_003_000),
        seen(WRONG, tid=5, ran_ns=1_003_000),
        seen(size=MIB + 1, tid=5, ran_ns=1_003_000),
        seen(tid=5, ran_ns=900_000),  # another thread with its number
    ],
)
def test_another_digest_is_no_repetition(again: Seen) -> None:
    digests = Digests()
    digests.repeats(seen(tid=5, ran_ns=1_000_000))
    assert not digests.repeats(again)


def test_where_calls_were_timed_what_has_none_was_not_hashed_again() -> None:
    """Also where there would have been time for it, as with a short body; not for ever, since timing ends at some time."""
    for ran_ns, again in ((AT_ONCE_NS - 1, True), (AT_ONCE_NS, False)):
        digests = Digests()
        digests.repeats(seen(size=100, tid=5, ran_ns=1_000_000, timed=Timed(600.0, 100, 1)))
        assert digests.repeats(seen(size=100, tid=5, ran_ns=1_000_000 + ran_ns)) is again


def test_what_is_remembered_of_threads_is_bounded() -> None:
    digests = Digests()
    for tid in range(10 * MAX_UNCLAIMED):
        digests.repeats(seen(tid=tid))
    assert len(digests._last) <= MAX_UNCLAIMED + 1


# --- Digests that nobody has -------------------------------------------------------------------------------------


def test_digests_of_nobody_are_bounded_and_counted() -> None:
    digests = waiting(*(seen(at_ms=number) for number in range(MAX_UNCLAIMED + 10)))
    assert digests.unattributed == 10
    digests.expire(20 * MS)
    assert digests.unattributed == 20
    digests.expire(1 << 62)
    assert digests.unattributed == MAX_UNCLAIMED + 10
    owner = Asked(ended_ns=1 << 61)
    end(digests, owner)
    assert owner.digests == []


# --- When all of them were seen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["value", "time"])
def test_all_was_seen_of_what_lay_within_an_interval(part: str) -> None:
    digests = Digests()
    owner = Asked()
    assert not digests.covers(part, owner)
    digests.probing(part, True, 10 * MS)
    assert digests.covers(part, owner), "and goes on"
    assert not digests.covers({"value": "time", "time": "value"}[part], owner)
    digests.probing(part, False, 100 * MS)
    assert digests.covers(part, owner)
    for begun_ns, ended_ns in ((9 * MS, 100 * MS), (10 * MS, 101 * MS), (200 * MS, 300 * MS)):
        assert not digests.covers(part, Asked(begun_ns=begun_ns, ended_ns=ended_ns))
    digests.probing(part, True, 150 * MS)
    assert digests.covers(part, Asked(begun_ns=200 * MS, ended_ns=300 * MS))
    assert not digests.covers(part, Asked(begun_ns=90 * MS, ended_ns=200 * MS)), "there was a time between"


def test_an_end_without_a_beginning_is_no_error() -> None:
    digests = Digests()
    digests.probing("value", False, 5)
    assert not digests.covers("value", Asked())


# --- How a process hashes ----------------------------------------------------------------------------------------


def test_requests_are_taken_to_hash_as_those_of_their_kind_did() -> None:
    digests = Digests()
    for number in range(HABIT):
        assert digests.by_habit("write", 100) == 0, f"after {number}"
        digests.learn_habit("write", 2 * MIB, MIB)
    assert digests.by_habit("write", 100) == 200
    assert digests.by_habit("read", 100) == 0


def test_where_requests_differ_nothing_is_taken() -> None:
    digests = Digests()
    for number in range(10 * HABIT):
        digests.learn_habit("write", MIB * (1 + number % 2), MIB)
    assert digests.by_habit("write", MIB) == 0


def test_a_habit_that_was_given_up_is_forgotten() -> None:
    digests = Digests()
    for hashed in (*[2 * MIB] * 50, *[MIB] * integrity.HABIT_REQUESTS):
        digests.learn_habit("write", hashed, MIB)
    assert digests.by_habit("write", MIB) == MIB


def test_requests_that_hash_nothing_are_a_habit_too() -> None:
    digests = Digests()
    for _ in range(HABIT):
        digests.learn_habit("read", 0, MIB)
    assert digests.by_habit("read", MIB) == 0


# --- The record --------------------------------------------------------------------------------------------------


def test_a_value_is_not_believed_before_one_was_right() -> None:
    """Where nobody could try the library."""
    digests = Digests()
    first = told(digests, Asked(digests=[seen(WRONG)]))
    assert (first.computed, first.result, first.mismatch) == (None, None, None)
    assert told(digests, Asked(digests=[seen(RIGHT)])).result == "match"
    later = told(digests, Asked(digests=[seen(WRONG)]))
    assert (later.computed, later.result, later.mismatch) == (WRONG, "mismatch", "computed")


def test_what_was_not_believed_does_not_hide_what_the_answer_says() -> None:
    found = told(Digests(), Asked(digests=[seen(WRONG)]), answered=True)
    assert (found.result, found.mismatch) == (None, "answer")


@pytest.mark.parametrize(
    ("digest", "answered", "mismatch"),
    [
        (None, False, None),
        (None, True, "answer"),
        (seen(RIGHT), True, None),  # the body was what it should be: the answer means something else
        (seen(RIGHT), False, None),
        (seen(WRONG), True, "computed"),
        (seen(WRONG), False, "computed"),  # and hidden
        (seen(WRONG, 100), True, "answer"),
        (seen(WRONG, 100), False, None),
    ],
)
def test_who_says_that_it_is_a_mismatch(digest: Seen | None, answered: bool, mismatch: str | None) -> None:
    found = told(waiting(), Asked(digests=[digest] if digest else []), answered=answered)
    assert found.mismatch == mismatch


def test_an_aborted_upload_is_no_mismatch_whatever_was_hashed() -> None:
    for size in (MIB, MIB // 2):
        found = told(waiting(), Asked(received_ns=0, size=size, digests=[seen(WRONG, size)]))
        assert (found.result, found.mismatch, found.verified, found.computed) == (None, None, (), None)


def test_nothing_seen_is_nothing_said() -> None:
    assert told(waiting(), Asked()) == Digest(declared=RIGHT)


def test_the_time_of_calls_is_that_of_all_a_requests_digests() -> None:
    owner = Asked(digests=[seen(timed=Timed(500_000.0, MIB, 16)), seen(at_ms=80, timed=Timed(700_000.0, MIB, 1))])
    found = told(waiting(), owner, READ_BACK)
    assert (found.source, found.ns, found.bytes, found.verified) == ("exact", 1_200_000, 2 * MIB, ("match",))


def test_calls_of_which_not_all_were_timed_are_no_exact_time() -> None:
    owner = Asked(digests=[seen(timed=Timed(500_000.0, MIB, 16)), seen(at_ms=80)])
    digests = waiting()
    assert told(digests, owner, READ_BACK).source == "none"
    digests.time.measured(MIB, MIB, 0, 1)
    found = told(digests, owner, READ_BACK)
    assert (found.source, found.ns) == ("model", 2 * MIB)


def measured(rate: float = 0.6) -> Digests:
    digests = waiting()
    digests.time.measured(8 * MIB, round(8 * MIB * rate), 0, 100 * MS)
    return digests


def test_where_values_are_not_seen_a_request_is_taken_to_hash_as_others_did() -> None:
    digests = measured()
    digests.probing("value", True, 0)
    for _ in range(HABIT):
        told(digests, Asked(digests=[seen()]))
    digests.probing("value", False, 100 * MS)
    found = told(digests, Asked(begun_ns=110 * MS, received_ns=150 * MS, ended_ns=200 * MS, size=10 * MIB))
    assert (found.source, found.bytes, found.ns) == ("model", 10 * MIB, pytest.approx(6 * MIB, rel=0.01))
    assert (found.computed, found.result) == (None, None)


def test_where_values_are_seen_a_request_without_one_hashed_nothing() -> None:
    digests = measured()
    digests.probing("value", True, 0)
    for _ in range(HABIT):
        told(digests, Asked(digests=[seen()]))
    assert told(digests, Asked()).source == "none"


def test_a_body_that_did_not_come_whole_is_no_habit() -> None:
    digests = measured()
    digests.probing("value", True, 0)
    for _ in range(HABIT):
        told(digests, Asked(digests=[seen()]))
        told(digests, Asked(received_ns=0, size=MIB // 2))
    assert digests.by_habit("write", MIB) == MIB


def test_where_values_can_never_be_seen_the_threads_calls_tell_the_time() -> None:
    digests = waiting()
    digests.hasher = Hasher("", False, valued=False, outside_ns=500.0)
    digests.probing("time", True, 0)
    owner = Asked(declared=None)
    found = told(digests, owner, hash_ns=600_000, calls=16)
    assert (found.source, found.ns, found.computed, found.result) == ("exact", 608_000, None, None)
    digests.probing("time", False, 100 * MS)
    for begun_ms, source in ((200, "model"), (210, "model")):
        later = Asked(begun_ns=begun_ms * MS, received_ns=(begun_ms + 1) * MS, ended_ns=(begun_ms + 5) * MS)
        for _ in range(HABIT):
            digests.learn_habit("write", MIB, MIB)
        assert told(digests, later, hash_ns=5, calls=1).source == source


def test_gaps_are_learned_only_from_requests_that_were_not_timed() -> None:
    """Probes in it make a gap longer."""
    learned: list[int] = []
    digests = waiting()
    digests.time.ended = lambda end_ns, gaps, hashed: learned.append(hashed)  # type: ignore[method-assign]
    gaps = Gaps(600_000, MIB, 16)
    told(digests, Asked(digests=[seen(timed=Timed(5.0, MIB, 16))]), gaps=gaps)
    told(digests, Asked(), gaps=gaps)
    assert learned == []
    told(digests, Asked(digests=[seen()]), gaps=gaps)
    assert learned == [MIB]

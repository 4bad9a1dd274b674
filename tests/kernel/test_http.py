# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.x framing on the real kernel: each way to cut messages into calls gives one record for each request, with its right numbers.

The server is told each call that it makes, the client decides each byte and each send; see harness.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Agent, Record, Scripted, Step, chunked, request, response, text

NewId = Callable[[], str]
KIB = 1024


def serve(data: bytes, answer: bytes, piece: int = 65536) -> list[Step]:
    """Reads a request of this length, whole, and answers in one send."""
    return [["need", len(data), piece], ["send", text(answer)]]


def check(
    record: Record,
    request_id: str | None,
    method: str,
    status: int | None,
    bytes_in: int | None,
    bytes_out: int,
    outcome: str = "complete",
) -> None:
    """What the client and the server know of a request is what its record says."""
    names = ("request_id", "method", "status", "bytes_in", "bytes_out", "outcome")
    assert tuple(record[name] for name in names) == (request_id, method, status, bytes_in, bytes_out, outcome)
    assert record["end_ns"] >= record["start_ns"]
    assert sum(record["phases"].values()) == pytest.approx(record["duration_ms"], rel=1e-3, abs=1e-6)


@pytest.fixture
def one(agent: Agent, scripted: Scripted, unique_id: NewId) -> Callable[..., None]:
    """One request on a connection of its own, and its record."""

    def run(
        data: bytes, answer: bytes, *steps: Step, method: str = "GET", status: int = 200, bytes_in: int = 0, bytes_out: int = 0,
        request_id: str | None = None, piece: int = 0, pause: float = 0.0,
    ) -> None:  # fmt: skip
        with agent.exactly(1) as records, scripted.script(*(steps or serve(data, answer)), ["drain"]) as client:
            client.send(data, piece, pause)
            client.expect(answer)
            client.close()
            assert scripted.result()["error"] is None
        check(records[0], request_id, method, status, bytes_in, bytes_out)

    return run


# How a head comes


@pytest.mark.parametrize("bare", [False, True], ids=["crlf", "lf"])
def test_head_in_pieces_of_one_byte(one: Any, unique_id: NewId, bare: bool) -> None:
    data = request("GET", "/v1/b/a", rid := unique_id())
    answer = response(200, b"hello")
    if bare:
        data, answer = data.replace(b"\r\n", b"\n"), answer.replace(b"\r\n", b"\n")
    steps = [["need", len(data), 1], ["send", text(answer), 1]]
    one(data, answer, *steps, bytes_out=5, request_id=rid, piece=1)


def test_first_byte_alone_then_the_rest(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data, answer = request("PUT", "/v1/b/a", rid := unique_id(), body=b"x" * 999), response(201)
    with agent.exactly(1) as records, scripted.script(*serve(data, answer)) as client:
        client.send(data[:1])
        time.sleep(0.05)
        client.send(data[1:])
        client.expect(answer)
    check(records[0], rid, "PUT", 201, 999, 0)
    assert records[0]["duration_ms"] >= 50


@pytest.mark.parametrize("cut", [1, 3, 15, 16, 17, 30, 255, 256, 257, 300, 511, 512, 513])
def test_head_and_body_cut_anywhere(one: Any, unique_id: NewId, cut: int) -> None:
    fields = ["X-Padding: " + "p" * 430]
    data, answer = request("POST", "/v1/b/a", rid := unique_id(), *fields, body=b"y" * 313), response(200, b"z" * 77)
    steps = [["need", cut, cut], ["need", len(data) - cut, 65536], ["send", text(answer), cut]]
    one(data, answer, *steps, method="POST", bytes_in=313, bytes_out=77, request_id=rid)


@pytest.mark.parametrize("size", [250, 1000, 4000, 7000])
def test_long_heads(one: Any, unique_id: NewId, size: int) -> None:
    data = request("GET", "/v1/b/a", rid := unique_id(), "Cookie: " + "c" * size)
    one(data, response(200, b"a" * 5, "X-Long: " + "l" * size), bytes_out=5, request_id=rid)


@pytest.mark.parametrize("size", [*range(7700, 7900, 20), 8500, 16_000, 33_000])
def test_heads_beyond_the_limit_are_said(agent: Agent, scripted: Scripted, unique_id: NewId, size: int) -> None:
    """A head that one call brings and that is longer than can be followed: a loss, never a request that somebody broke off."""
    data, answer = request("GET", "/v1/b/a", rid := unique_id()), response(200, b"fine", "X-Long: " + "l" * size)
    before = agent.ledger()
    with agent.exactly(1) as records, scripted.script(*serve(data, answer), ["drain"]) as client:
        client.send(data)
        client.expect(answer)
        client.close()
        scripted.result()
    lost = agent.ledger()["kernel.head_unreadable"] - before["kernel.head_unreadable"]
    if lost:
        assert (records[0]["request_id"], records[0]["outcome"]) == (rid, "unobserved")
    else:
        check(records[0], rid, "GET", 200, 0, 4)


def test_empty_lines_before_a_request(one: Any, unique_id: NewId) -> None:
    one(b"\r\n\r\n" + request("GET", "/", rid := unique_id()), response(200, b"."), bytes_out=1, request_id=rid)


@pytest.mark.parametrize("call", ["recv", "read", "recvfrom", "recvmsg", "readv"])
@pytest.mark.parametrize("piece", [7, 100, 65536])
def test_ways_to_receive(one: Any, unique_id: NewId, call: str, piece: int) -> None:
    data, answer = request("PUT", "/v1/b/a", rid := unique_id(), body=b"b" * 1500), response(201, b"ok")
    steps = [["need", len(data), piece, call], ["send", text(answer)]]
    one(data, answer, *steps, method="PUT", status=201, bytes_in=1500, bytes_out=2, request_id=rid)


def test_peeking_is_not_reading(one: Any, unique_id: NewId) -> None:
    data, answer = request("PUT", "/v1/b/a", rid := unique_id(), body=b"b" * 500), response(201)
    peeks: list[Step] = [["peek", 1], ["peek", 4096], ["peekmsg", 4096]]
    steps = [*peeks, ["recv", 10], *peeks, ["need", len(data) - 10, 33], ["send", text(answer)]]
    one(data, answer, *steps, method="PUT", status=201, bytes_in=500, request_id=rid)


# Interim and bodiless responses


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "with the final one"])
def test_100_continue(agent: Agent, scripted: Scripted, unique_id: NewId, times: int, together: bool) -> None:
    interim, answer = b"HTTP/1.1 100 Continue\r\n\r\n" * times, response(201, b"done!")
    data = request("PUT", "/v1/b/a", rid := unique_id(), "Expect: 100-continue", body=b"x" * 1000)
    head, body = data[:-1000], data[-1000:]
    steps: list[Step] = [["need", len(head), 4096], ["send", text(interim)], ["need", 1000, 4096], ["send", text(answer)]]
    if together:
        steps = [["need", len(data), 4096], ["send", text(interim + answer)]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(head)
        if not together:
            client.expect(interim)
        client.send(body)
        client.expect(answer if not together else interim + answer)
    check(records[0], rid, "PUT", 201, 1000, 5)


def test_interim_response_in_pieces_of_one_byte(one: Any, unique_id: NewId) -> None:
    data = request("GET", "/v1/b/a", rid := unique_id())
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102\r\n\r\n" + response(404, b"none")
    one(data, answer, ["need", len(data), 4096], ["send", text(answer), 1], status=404, bytes_out=4, request_id=rid)


@pytest.mark.parametrize(
    ("method", "answer", "status"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", 200),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\n\r\n", 304),
        ("DELETE", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200),
        ("GET", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", 200),
    ],
    ids=["head with length", "head chunked", "204", "304 with length", "no reason, no blank", "no reason"],
)
def test_response_without_body_and_the_next_one(
    agent: Agent, scripted: Scripted, unique_id: NewId, method: str, answer: bytes, status: int
) -> None:
    first, second = request(method, "/v1/b/a", one := unique_id()), request("GET", "/v1/b/a", two := unique_id())
    then = response(200, b"next")
    with agent.exactly(2) as records, scripted.script(*serve(first, answer), *serve(second, then)) as client:
        client.send(first)
        client.expect(answer)
        client.send(second)
        client.expect(then)
    check(records[0], one, method, status, 0, 0)
    check(records[1], two, "GET", 200, 0, 4)
    assert records[0]["conn"] == records[1]["conn"]


# Chunked bodies

CHUNKS = {
    "1 byte": [b"c"] * 40,
    "mixed": [b"a" * size for size in (1, 2, 15, 16, 17, 255, 256, 4096, 65535, 65536)],
    "64 KiB": [b"d" * 64 * KIB] * 4,
    "odd": [b"e" * 1009] * 31,
    "none": [],
}


@pytest.mark.parametrize("parts", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("piece", [37, 4096, 65536])
@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "extensions and trailers"])
def test_chunked_request(agent: Agent, scripted: Scripted, unique_id: NewId, parts: list[bytes], piece: int, dressed: bool) -> None:
    body = chunked(parts, ';name="a value that is long"', ["X-T: 1", "X-Sum: abc"], upper=True) if dressed else chunked(parts)
    data = request("PUT", "/v1/b/a", rid := unique_id(), "Transfer-Encoding: chunked") + body
    following = request("GET", "/v1/b/a", next_id := unique_id())
    answer = response(201, b"stored")
    with agent.exactly(2) as records, scripted.script(*serve(data, answer, piece), *serve(following, answer)) as client:
        client.send(data)
        client.expect(answer)
        client.send(following)
        client.expect(answer)
    check(records[0], rid, "PUT", 201, sum(map(len, parts)), 6)
    check(records[1], next_id, "GET", 201, 0, 6)


@pytest.mark.parametrize("piece", [1, 2, 3, 5])
def test_chunk_headers_cut_anywhere(one: Any, unique_id: NewId, piece: int) -> None:
    parts = [b"abc", b"0123456789abcdef0", b"\r\n0\r\n\r\n", b"x"]
    data = request("PUT", "/v1/b/a", rid := unique_id(), "Transfer-Encoding: chunked") + chunked(parts, ";e", ["A: b"])
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(parts, ";e", ["A: b"])
    total = sum(map(len, parts))
    steps = [["need", len(data), piece], ["send", text(answer), piece]]
    one(data, answer, *steps, method="PUT", bytes_in=total, bytes_out=total, request_id=rid)


@pytest.mark.parametrize("parts", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("piece", [41, 4096, 1 << 20])
def test_chunked_response(agent: Agent, scripted: Scripted, unique_id: NewId, parts: list[bytes], piece: int) -> None:
    data, following = request("GET", "/v1/b/a", rid := unique_id()), request("GET", "/v1/b/a", next_id := unique_id())
    answer, then = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(parts), response(404)
    steps = [["need", len(data), 4096], ["send", text(answer), piece], *serve(following, then)]
    with agent.exactly(2) as records, scripted.script(*steps) as client:
        client.send(data)
        client.expect(answer)
        client.send(following)
        client.expect(then)
    check(records[0], rid, "GET", 200, 0, sum(map(len, parts)))
    check(records[1], next_id, "GET", 404, 0, 0)


def test_too_many_chunks_in_one_call_is_said(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data = request("PUT", "/v1/b/a", rid := unique_id(), "Transfer-Encoding: chunked") + chunked([b"c"] * 5000)
    before = agent.ledger()
    answer = response(201)
    with agent.exactly(1) as records, scripted.script(["sleep", 0.1], *serve(data, answer)) as client:
        client.send(data)
        client.expect(answer)
    check(records[0], rid, "PUT", 201, None, 0)
    assert agent.ledger()["kernel.chunk_too_many"] == before["kernel.chunk_too_many"] + 1


# Many requests on one connection


def test_keep_alive(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    ids = [unique_id() for _ in range(23)]
    exchanges = [(request("PUT", "/v1/b/a", rid, body=b"i" * (i * 97)), response(200 + i, b"o" * (i * 31))) for i, rid in enumerate(ids)]
    steps = [step for data, answer in exchanges for step in serve(data, answer, 1000)]
    with agent.exactly(len(ids)) as records, scripted.script(*steps) as client:
        for data, answer in exchanges:
            client.send(data)
            client.expect(answer)
    for i, (record, rid) in enumerate(zip(records, ids, strict=True)):
        bodiless = 200 + i in (204, 304)
        check(record, rid, "PUT", 200 + i, i * 97, 0 if bodiless else i * 31)
    assert len({record["conn"] for record in records}) == 1


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("sends", ["one send", "one each", "pieces"])
@pytest.mark.parametrize("piece", [65536, 50], ids=["one read", "small reads"])
def test_pipelining(agent: Agent, scripted: Scripted, unique_id: NewId, count: int, sends: str, piece: int) -> None:
    ids = [unique_id() for _ in range(count)]
    data = b"".join(request("PUT", "/v1/b/a", rid, body=b"i" * (i * 100)) for i, rid in enumerate(ids))
    answers = [response(200 + 10 * i, b"o" * (i * 50)) for i in range(count)]
    answer = b"".join(answers)
    sent: list[Step] = [["send", text(one)] for one in answers]
    if sends != "one each":
        sent = [["send", text(answer), 0 if sends == "one send" else 33]]
    with agent.exactly(count) as records, scripted.script(["need", len(data), piece], *sent) as client:
        client.send(data)
        client.expect(answer)
    records.sort(key=lambda record: ids.index(record["request_id"]))
    for i, (record, rid) in enumerate(zip(records, ids, strict=True)):
        check(record, rid, "PUT", 200 + 10 * i, i * 100, i * 50)


def test_many_pipelined_responses_in_one_send(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    """More than can be followed in one call, perhaps: each request is found, and none is said to have been broken off."""
    ids = [unique_id() for _ in range(16)]
    data = b"".join(request("GET", "/", rid) for rid in ids)
    answer = response(200, b"body") * 16
    before = agent.ledger()
    with agent.exactly(16) as records, scripted.script(*serve(data, answer)) as client:
        client.send(data)
        client.expect(answer)
    lost = agent.ledger()["kernel.head_unreadable"] - before["kernel.head_unreadable"]
    assert {record["outcome"] for record in records} <= ({"complete", "unobserved"} if lost else {"complete"})
    assert sorted(record["request_id"] for record in records) == sorted(ids)


def test_pipelined_requests_answered_as_they_are_read(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    ids = [unique_id() for _ in range(6)]
    parts = [request("PUT", "/v1/b/a", rid, body=b"i" * 100) for rid in ids]
    answer = response(200, b"yes")
    steps = [step for part in parts for step in serve(part, answer)]
    with agent.exactly(6) as records, scripted.script(*steps) as client:
        client.send(b"".join(parts))
        client.expect(answer * 6)
    for record, rid in zip(records, ids, strict=True):
        check(record, rid, "PUT", 200, 100, 3)


def test_chunked_requests_pipelined(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    ids = [unique_id() for _ in range(4)]
    data = b"".join(request("PUT", "/v1/b/a", rid, "Transfer-Encoding: chunked") + chunked([b"i" * 9, b"j" * 300]) for rid in ids)
    answer = (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked([b"k" * 19])) * 4
    with agent.exactly(4) as records, scripted.script(*serve(data, answer)) as client:
        client.send(data)
        client.expect(answer)
    assert sorted(record["request_id"] for record in records) == ids
    for record in records:
        check(record, record["request_id"], "PUT", 200, 309, 19)


def test_more_pipelined_than_can_be_followed_is_said(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data = b"".join(request("GET", "/", unique_id()) for _ in range(20))
    before = agent.ledger()
    steps: list[Step] = [["need", len(data), 65536], *([["send", text(response(200))]] * 20)]
    with agent.exactly(16), scripted.script(*steps) as client:
        client.send(data)
        client.expect(response(200) * 20)
        scripted.result()
    now = agent.ledger()
    assert now["kernel.pipeline_full"] == before["kernel.pipeline_full"] + 1
    assert now["begun"] - before["begun"] == now["complete"] - before["complete"] == 16


# How a response is sent


@pytest.mark.parametrize("call", ["writev", "sendmsg"])
@pytest.mark.parametrize("pieces", [2, 3, 16])
def test_gathered_head_and_body_of_one_mebibyte(agent: Agent, scripted: Scripted, unique_id: NewId, call: str, pieces: int) -> None:
    data, body = request("GET", "/v1/b/a", rid := unique_id()), b"m" * (KIB * KIB + 1)
    head = response(200, body)[: -len(body)]
    size = len(body) // (pieces - 1)
    vector = [text(head)] + [text(body[i * size : (i + 1) * size if i < pieces - 2 else None]) for i in range(pieces - 1)]
    with agent.exactly(1) as records, scripted.script(["need", len(data), 4096], [call, vector]) as client:
        client.send(data)
        client.expect(head + body)
    check(records[0], rid, "GET", 200, 0, len(body))


def test_gathered_head_of_many_pieces(one: Any, unique_id: NewId) -> None:
    data, answer = request("GET", "/v1/b/a", rid := unique_id()), response(200, b"body")
    vector = [text(answer[i : i + 7]) for i in range(0, len(answer), 7)]
    assert len(vector) <= 16
    one(data, answer, ["need", len(data), 4096], ["writev", vector], bytes_out=4, request_id=rid)


@pytest.mark.parametrize("size", [1, 4097, 3 * KIB * KIB])
def test_sendfile_body(agent: Agent, scripted: Scripted, unique_id: NewId, session_base: Path, size: int) -> None:
    stored = session_base / "storage" / f"sent-{size}"
    stored.write_bytes(b"f" * size)
    data, answer = request("GET", "/v1/b/a", rid := unique_id()), response(200, b"f" * size)
    steps: list[Step] = [["need", len(data), 4096], ["send", text(answer[:-size])], ["sendfile", str(stored), size]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        client.expect(answer)
    check(records[0], rid, "GET", 200, 0, size)
    assert records[0]["files"]["opens"] == 1
    assert records[0]["files"]["read_bytes"] == size


@pytest.mark.parametrize("closed", ["the first", "the second"])
def test_socket_with_two_descriptors(one: Any, unique_id: NewId, closed: str) -> None:
    """Half by the one and half by the other; which of them is closed in between makes no difference."""
    data, answer = request("PUT", "/v1/b/a", rid := unique_id(), body=b"d" * 400), response(201, b"two halves")
    swap: Step = ["duplicate"] if closed == "the first" else ["duplicate", "back"]
    steps: list[Step] = [["need", 100, 4096], swap, ["need", len(data) - 100, 4096]]
    steps += [["send", text(answer[:30])], swap, ["send", text(answer[30:])]]
    one(data, answer, *steps, method="PUT", status=201, bytes_in=400, bytes_out=10, request_id=rid)


# How a connection ends


def test_http_1_0_delimited_by_close(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data = request("GET", "/v1/b/a", rid := unique_id(), version="HTTP/1.0")
    answer = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + b"until the end " * 100
    with agent.exactly(1) as records, scripted.script(["need", len(data), 4096], ["send", text(answer), 300]) as client:
        client.send(data)
        assert client.receive_all() == answer
    check(records[0], rid, "GET", 200, 0, 1400)


def test_http_1_0_delimited_by_close_keeps_its_file_work(agent: Agent, scripted: Scripted, unique_id: NewId, session_base: Path) -> None:
    log = session_base / "storage" / "close-delimited.log"
    data = request("GET", "/v1/b/a", rid := unique_id(), version="HTTP/1.0")
    answer = b"HTTP/1.0 200 OK\r\n\r\nall"
    steps: list[Step] = [["need", len(data), 4096], ["append", str(log), "seven.."], ["send", text(answer)]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        assert client.receive_all() == answer
    check(records[0], rid, "GET", 200, 0, 3)
    assert (records[0]["files"]["write_calls"], records[0]["files"]["write_bytes"]) == (1, 7)


def test_half_closed_after_the_request_still_gets_its_answer(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data, answer = request("PUT", "/v1/b/a", rid := unique_id(), body=b"h" * 2000), response(201, b"half")
    steps: list[Step] = [["need", len(data), 4096], ["sleep", 0.05], ["send", text(answer), 20, 0.002]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        client.finish()
        assert client.receive_all() == answer
    check(records[0], rid, "PUT", 201, 2000, 4)


def test_early_final_answer_then_reset(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data = request("PUT", "/v1/b/a", rid := unique_id(), f"Content-Length: {1 << 20}") + b"u" * 70_000
    answer = response(401, b"who are you")
    head_bytes = data.index(b"\r\n\r\n") + 4
    with agent.exactly(1) as records, scripted.script(["need", head_bytes + 10, 4096], ["send", text(answer)], ["close"]) as client:
        client.send(data[: head_bytes + 10])
        client.expect(answer)
        scripted.result()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.send(b"more of the body that nobody reads" * 1_000_000)
    check(records[0], rid, "PUT", 401, 10, 11)


def test_early_final_answer_and_the_body_after_it(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    body = b"late " * 2000
    data, answer = request("PUT", "/v1/b/a", one := unique_id(), body=body), response(403, b"no")
    following, then = request("GET", "/v1/b/a", two := unique_id()), response(200, b"yes")
    head = len(data) - len(body)
    steps: list[Step] = [["need", head, 4096], ["send", text(answer)], ["need", len(body), 777], *serve(following, then)]
    with agent.exactly(2) as records, scripted.script(*steps) as client:
        client.send(data[:head])
        client.expect(answer)
        client.send(data[head:])
        client.send(following)
        client.expect(then)
    assert records[0]["bytes_in"] in (0, None)
    assert (records[0]["request_id"], records[0]["status"], records[0]["outcome"]) == (one, 403, "complete")
    check(records[1], two, "GET", 200, 0, 3)


@pytest.mark.parametrize("interim", [False, True], ids=["plain", "after 100-continue"])
@pytest.mark.parametrize("how", ["reset", "close"])
def test_client_goes_away_half_way_through_an_upload(agent: Agent, scripted: Scripted, unique_id: NewId, how: str, interim: bool) -> None:
    data = request("PUT", "/v1/b/a", rid := unique_id(), "Content-Length: 100000")
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    steps: list[Step] = [["need", len(data), 4096], *([["send", text(go_on)]] if interim else []), ["need", 50_000, 1000], ["drain"]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        if interim:
            client.expect(go_on)
        client.send(b"u" * 50_000)
        time.sleep(0.1)
        getattr(client, how)()
        scripted.result()
    check(records[0], rid, "PUT", None, 50_000, 0, "client_closed")


def test_client_resets_while_the_answer_is_sent(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data = request("GET", "/v1/b/a", rid := unique_id())
    steps: list[Step] = [["need", len(data), 4096], ["send", "HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"], ["fill", 100_000_000]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        client.receive(100_000)
        client.reset()
        assert scripted.result()["error"]
    assert (records[0]["request_id"], records[0]["status"], records[0]["outcome"]) == (rid, 200, "client_closed")
    assert 0 < records[0]["bytes_out"] < 100_000_000


@pytest.mark.parametrize("how", ["close", "shutdown", "reset", "kill"])
def test_server_breaks_off_half_way_through_its_answer(agent: Agent, scripted: Scripted, unique_id: NewId, how: str) -> None:
    data = request("GET", "/v1/b/a", rid := unique_id())
    steps: list[Step] = [["need", len(data), 4096], ["send", "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + "p" * 1234], [how]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        client.receive(1275)
        time.sleep(0.05)
    check(records[0], rid, "GET", 200, 0, 1234, "server_closed")


@pytest.mark.parametrize("how", ["close", "kill", "client"])
def test_file_work_of_a_request_that_is_broken_off(
    agent: Agent, scripted: Scripted, unique_id: NewId, session_base: Path, how: str
) -> None:
    """Also on a file that stays open."""
    path = session_base / "storage" / "broken-off"
    data = request("PUT", "/v1/b/a", rid := unique_id(), "Content-Length: 500") + b"h" * 250
    steps: list[Step] = [["need", len(data), 4096], ["append", str(path), "h" * 250], ["drain"] if how == "client" else [how]]
    with agent.exactly(1) as records, scripted.script(*steps) as client:
        client.send(data)
        if how == "client":
            time.sleep(0.05)
            client.close()
        else:
            client.expect_end()
    check(records[0], rid, "PUT", None, 250, 0, "client_closed" if how == "client" else "server_closed")
    assert (records[0]["files"]["write_calls"], records[0]["files"]["write_bytes"]) == (1, 250)


@pytest.mark.parametrize("how", ["close", "kill"])
def test_server_never_answers(agent: Agent, scripted: Scripted, unique_id: NewId, how: str) -> None:
    data = request("PUT", "/v1/b/a", rid := unique_id(), body=b"q" * 300)
    with agent.exactly(1) as records, scripted.script(["need", len(data), 4096], [how]) as client:
        client.send(data)
        client.expect_end()
    check(records[0], rid, "PUT", None, 300, 0, "server_closed")


def test_pipelined_requests_that_are_never_answered(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    ids = [unique_id() for _ in range(5)]
    data = b"".join(request("PUT", "/v1/b/a", rid, body=b"q" * 10) for rid in ids)
    answer = response(200, b"only this")
    with agent.exactly(5) as records, scripted.script(*serve(data, answer)) as client:
        client.send(data)
        client.expect(answer)
        client.expect_end()
    records.sort(key=lambda record: ids.index(record["request_id"]))
    check(records[0], ids[0], "PUT", 200, 10, 9)
    for record, rid in zip(records[1:], ids[1:], strict=True):
        check(record, rid, "PUT", None, 10, 0, "server_closed")


def test_switching_protocols_ends_the_request(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    data = request("GET", "/chat", rid := unique_id(), "Upgrade: websocket", "Connection: Upgrade")
    answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
    frames = b"\x81\x05hello" * 3
    with agent.exactly(1) as records, scripted.script(*serve(data, answer), ["need", len(frames), 100], ["send", text(frames)]) as client:
        client.send(data)
        client.expect(answer)
        client.send(frames)
        client.expect(frames)
    check(records[0], rid, "GET", 101, 0, 0)


# What is not HTTP/1.x

NOT_HTTP = {
    "tls": bytes.fromhex("160301020001000001fc0303") + os.urandom(505),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "zeros": bytes(100),
    "no version": b"GET /v1/b/a\r\n\r\n",
    "http 0.9": b"GET /\r\n",
    "high bytes": bytes(range(128, 256)),
    "a number": b"12345\r\n\r\n",
    "bad length": b"PUT / HTTP/1.1\r\nContent-Length: ten\r\n\r\n",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP)
@pytest.mark.parametrize("piece", [65536, 1], ids=["at once", "bytewise"])
def test_not_http(agent: Agent, scripted: Scripted, data: bytes, piece: int) -> None:
    before = agent.ledger()
    answer = response(400)
    with agent.exactly(0), scripted.script(["need", len(data), piece], ["send", text(answer)], ["drain"]) as client:
        client.send(data)
        client.expect(answer)
        client.send(request("GET", "/", "after-garbage"))
        client.finish()
        client.expect_end()
        scripted.result()
    now = agent.ledger()
    assert now["kernel.head_malformed"] - before["kernel.head_malformed"] == 1


def test_half_a_head_is_counted(agent: Agent, scripted: Scripted) -> None:
    before = agent.ledger()
    with agent.exactly(0), scripted.script(["drain"]) as client:
        client.send(b"GET /v1/b/a HTTP/1.1\r\nHost: x\r\n")
        client.close()
        scripted.result()
    assert agent.ledger()["kernel.head_incomplete"] - before["kernel.head_incomplete"] == 1


def test_a_connection_without_a_byte_is_nothing(agent: Agent, scripted: Scripted) -> None:
    before = agent.ledger()
    with agent.exactly(0), scripted.script(["drain"]) as client:
        client.close()
        scripted.result()
    now = agent.ledger()
    assert {name: count - before[name] for name, count in now.items() if count != before[name]} == {}


# What a record may say


def test_request_id_of_the_request_comes_first(one: Any, unique_id: NewId) -> None:
    one(request("GET", "/", rid := unique_id()), response(200, b"", "X-Request-ID: of-the-response"), request_id=rid)


def test_request_id_only_in_the_response(one: Any, unique_id: NewId) -> None:
    one(request("GET", "/"), response(200, b"", f"x-request-id: {(rid := unique_id())}"), request_id=rid)


def test_no_request_id(one: Any) -> None:
    one(request("GET", "/"), response(200, b""), request_id=None)


def test_secrets_stay_where_they_are(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    """A token in every place that may hold a secret; none of them is to be seen in anything that the agent gives out."""
    tokens: list[str] = []

    def token() -> str:
        tokens.append(f"CANARY{len(tokens):02d}")
        return tokens[-1]

    target = f"http://{token()}:{token()}@bucket/v1/b/a?version=1&token={token()}&{token()}&digest=d#{token()}"
    fields = [
        f"Cookie: session={token()}",
        f"Authorization: Bearer {token()}",
        f"Proxy-Authorization: Basic {token()}",
        f"X-Api-Key: {token()}",
        f"X-Amz-Security-Token: {token()}",
        f"Referer: http://example.org/?{token()}",
        f"Forwarded: for={token()}",
    ]
    chunks = chunked([token().encode(), token().encode() * 50], f";{token()}", [f"X-Trailer: {token()}"])
    answer_fields = (f"Set-Cookie: a={token()}", f"Location: /?{token()}", f"WWW-Authenticate: Basic {token()}", f"X-Other: {token()}")
    data = request("PUT", target, rid := unique_id(), *fields, "Transfer-Encoding: chunked") + chunks
    answer = response(201, token().encode(), *answer_fields, reason=f" {token()}")
    garbage = f"{token()}\r\nCookie: {token()}\r\n\r\n".encode()
    half = f"GET /?{token()} HTTP/1.1\r\nCookie: {token()}\r\n".encode()
    with agent.exactly(1) as records, scripted.script(*serve(data, answer, 60)) as client:
        client.send(data)
        client.expect(answer)
    scripted.result()
    for stray in (garbage, half):
        with agent.exactly(0), scripted.script(["drain"]) as client:
            client.send(stray)
            client.close()
            scripted.result()
    assert records[0]["request_id"] == rid
    assert (records[0]["route"], records[0]["version"]) == ("/v1/{bucket_id}/{artifact_id}", None)
    shown = str(records[0]) + str(agent.records()) + agent.get("/metrics")[1] + agent.log()
    shown += agent.records_path.read_text()
    assert [name for name in tokens if name in shown] == []


def test_the_rest_of_a_read_belongs_to_the_next_request(agent: Agent, scripted: Scripted, unique_id: NewId) -> None:
    """Body's end and next head in one read, over and over, at each possible cut."""
    ids = [unique_id() for _ in range(40)]
    parts = [request("PUT", "/v1/b/a", rid, body=b"i" * 150) for rid in ids]
    data = b"".join(parts)
    size = len(parts[0]) + 1
    answer = response(200)
    steps: list[Step] = []
    answered = 0
    for end in range(size, len(data) + size, size):
        take = min(size, len(data) - (end - size))
        whole = 0
        total = 0
        for part in parts:
            total += len(part)
            whole += total <= min(end, len(data))
        steps += [["need", take, take], *([["send", text(answer)]] * (whole - answered))]
        answered = whole
    assert answered == 40
    with agent.exactly(40) as records, scripted.script(*steps) as client:
        client.send(data)
        client.expect(answer * 40)
    for record, rid in zip(records, ids, strict=True):
        check(record, rid, "PUT", 200, 150, 0)

# SPDX-License-Identifier: Apache-2.0
"""The framing that runs in the kernel (probes/include/http1.h), built by the host's compiler and compared with h11.

h11 is strict where the kernel's half is lenient, so the streams that are compared are valid ones; what only lenient readers
take is tested by example, against RFC 9112.
"""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import h11
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

SHIM = Path(__file__).with_name("framing.c")
INCLUDE = SHIM.parents[2] / "probes" / "include"
# The compiler's unroll pragmas are clang's; everything else that gcc has to say about the text is an error.
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wpadded", "-Wno-unknown-pragmas", f"-I{INCLUDE}", str(SHIM)]
#: How many programs the kernel lets one system call run in a row (MAX_TAIL_CALL_CNT), and the bytes of a head that each walks.
TAIL_CALLS, WINDOW = 33, 256

HEAD, INTERIM, END, UPGRADE, LOST = range(5)


class _Mark(ctypes.Structure):
    _fields_ = (("at", ctypes.c_uint64), ("entity", ctypes.c_uint64), ("what", ctypes.c_uint32), ("status", ctypes.c_uint32))


@dataclass
class Seen:
    """What one direction of a connection was found to hold."""

    messages: list[tuple[int, int, int, int]] = field(default_factory=list)  # end of the head, end, entity bytes, status
    interim: list[tuple[int, int]] = field(default_factory=list)  # end, status
    open_head: int | None = None  # the end of the head of a message that did not end
    lost: int | None = None
    upgrade: int | None = None


class Framing:
    """The C text, loaded."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._state = ctypes.create_string_buffer(1024)

    def read(self, pieces: Iterable[bytes], *, response: bool = False, methods: str = "", limit: int = 0, close: bool = False) -> Seen:
        """`pieces` as calls return them, `methods` by their first letters; `close`: the connection ends there."""
        seen, head = Seen(), 0
        total = 0
        self._library.framing_start(self._state, int(response))
        feeds: list[bytes | None] = [*pieces, None] if close else list(pieces)
        for piece in feeds:
            marks = (_Mark * (len(piece or b"") + 2))()
            if piece is None:
                count = self._library.framing_close(self._state, marks)
            else:
                total += len(piece)
                count = self._library.framing_feed(
                    self._state, piece, ctypes.c_uint64(len(piece)), methods.encode(), ctypes.c_uint32(limit), marks
                )
            for mark in marks[:count]:
                assert mark.at <= total
                if mark.what == HEAD:
                    head = seen.open_head = mark.at
                elif mark.what == INTERIM:
                    seen.interim.append((mark.at, mark.status))
                elif mark.what == END:
                    seen.messages.append((head, mark.at, mark.entity, mark.status))
                    seen.open_head = None
                elif mark.what == UPGRADE:
                    seen.upgrade = mark.at
                else:
                    seen.lost = mark.at
        return seen

    def requests(self, *pieces: bytes, limit: int = 0) -> Seen:
        return self.read(pieces, limit=limit)

    def responses(self, *pieces: bytes, methods: str = "", close: bool = False) -> Seen:
        return self.read(pieces, response=True, methods=methods, close=close)


@pytest.fixture(scope="session")
def framing(tmp_path_factory: pytest.TempPathFactory) -> Framing:
    library = tmp_path_factory.mktemp("framing") / "framing.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", *FLAGS, "-o", library], check=True)
    return Framing(library)


def cut(stream: bytes, at: Sequence[int]) -> list[bytes]:
    places = [0, *sorted({place % (len(stream) + 1) for place in at}), len(stream)]
    return [stream[a:b] for a, b in pairwise(places) if a < b]


def bytewise(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


# --- Streams, and what h11 says of them --------------------------------------------------------------------------

TOKEN = st.text("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=20)
#: Names that framing must not take for its own.
NAMES = ["X-Content-Length", "Content-Length-X", "Content-Lengt", "ontent-length", "X-Transfer-Encoding", "Transfer-Encodings",
         "TE", "Trailer", "Host2", "Content-Type", "X-Chunked"]  # fmt: skip
VALUES = ["chunked", "gzip, chunked", "17", "5, 5", "Content-Length: 3", "Transfer-Encoding: chunked", "HTTP/1.1 200 OK", "", "a:b::c"]
VISIBLE = st.text([chr(c) for c in range(0x21, 0x100)], min_size=1, max_size=12)
#: Blanks around values, which are no part of them.
OWS = st.text(" \t", max_size=3)
LINE_END = st.sampled_from([b"\r\n", b"\n"])
FRAMING_NAMES = {"content-length", "transfer-encoding", "connection", "host", "expect", "upgrade"}


def mixed(name: str) -> st.SearchStrategy[str]:
    """The name with letters of any case."""
    return st.lists(st.booleans(), min_size=len(name), max_size=len(name)).map(
        lambda upper: "".join(c.upper() if u else c.lower() for c, u in zip(name, upper, strict=True))
    )


@st.composite
def plain_header(draw: st.DrawFn) -> bytes:
    name = draw(st.one_of(st.sampled_from(NAMES), TOKEN.filter(lambda token: token.lower() not in FRAMING_NAMES)))
    words = draw(st.one_of(st.sampled_from(VALUES), st.lists(VISIBLE, max_size=4).map(" ".join)))
    value = words.encode("latin-1")
    if draw(st.integers(0, 9)) == 0:  # folded onto a second line, which looks like a header of its own
        value += draw(LINE_END) + draw(st.sampled_from([b" ", b"\t "])) + draw(st.sampled_from([b"Content-Length: 9", b"more"]))
    return name.encode() + b":" + draw(OWS).encode() + value + draw(OWS).encode()


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, int]:
    """A body in chunks, with extensions and a trailer; and its entity bytes."""
    out, entity = b"", 0
    for data in draw(st.lists(st.binary(min_size=1, max_size=300), max_size=5)):
        size = draw(st.sampled_from(["{:x}", "{:X}", "{:04x}", "{:020x}"])).format(len(data)).encode()
        extension = draw(st.sampled_from([b"", b";a", b';name="v al"; b=0123456789abcdef', b"  ", b";" + b"x" * 60]))
        out += size + extension + b"\r\n" + data + b"\r\n"
        entity += len(data)
    trailer = b"".join(line + b"\r\n" for line in draw(st.lists(plain_header(), max_size=2)))
    return out + draw(st.sampled_from([b"0", b"000", b"0;last"])) + b"\r\n" + trailer + b"\r\n", entity


@st.composite
def message(draw: st.DrawFn, first_line: bytes, bodyless: bool, until_close: bool) -> bytes:
    headers = draw(st.lists(plain_header(), max_size=5))
    body = b""
    framing = draw(st.sampled_from(["length", "chunked", "none"]))
    if framing == "length" or (framing == "chunked" and draw(st.booleans())):
        body = draw(st.binary(max_size=700))
        field_value = b"0" * draw(st.integers(0, 2)) + str(len(body)).encode()
        line = draw(mixed("Content-Length")).encode() + b":" + draw(OWS).encode() + field_value + draw(OWS).encode()
        headers += [line] * draw(st.integers(1, 2))
    if framing == "chunked":  # wins over a length
        body, _ = draw(chunked())
        value = draw(mixed("chunked")).encode()
        headers.append(draw(mixed("Transfer-Encoding")).encode() + b":" + draw(OWS).encode() + value + draw(OWS).encode())
    if framing == "none" and until_close:
        body = draw(st.binary(max_size=700))
    if bodyless:
        body = b""
    order = draw(st.permutations(headers))
    head = b"".join(line + draw(LINE_END) for line in (first_line, *order))
    return head + draw(LINE_END) + body


@st.composite
def request_stream(draw: st.DrawFn) -> bytes:
    stream = b""
    for _ in range(draw(st.integers(1, 5))):
        method = draw(st.one_of(st.sampled_from(["GET", "PUT", "HEAD", "DELETE", "OPTIONS", "M-SEARCH"]), TOKEN)).encode()
        target = draw(st.one_of(st.sampled_from(["/", "*", "/v1/b/a?version=1", "200", "HTTP/1.1"]), st.text("/a%?&=:.-_~0", min_size=1)))
        host = [] if draw(st.booleans()) else [b"HTTP/1.0"]
        version = host[0] if host else b"HTTP/1.1"
        line = method + b" " + target.encode() + b" " + version
        if version == b"HTTP/1.1":
            line += b"\r\nHost: h"
        stream += draw(message(line, False, False))
    return stream


@st.composite
def response_stream(draw: st.DrawFn) -> tuple[bytes, str]:
    stream, methods = b"", ""
    for _ in range(draw(st.integers(1, 5))):
        for status in draw(st.lists(st.sampled_from([100, 102, 103, 199]), max_size=2)):
            interim = [draw(plain_header())] if draw(st.booleans()) else []
            stream += b"HTTP/1.1 %d Go on\r\n" % status + b"".join(line + b"\r\n" for line in interim) + b"\r\n"
        methods += draw(st.sampled_from("GGH"))
        status = draw(st.sampled_from([200, 201, 204, 206, 304, 404, 500, 599, 999]))
        reason = draw(st.sampled_from([b"", b" ", b" OK", b" Not Found 404", b" HTTP/1.1"]))
        line = draw(st.sampled_from([b"HTTP/1.1 ", b"HTTP/1.0 "])) + str(status).encode() + reason
        bodyless = methods[-1] == "H" or status in (204, 304)
        stream += draw(message(line, bodyless, False))
    return stream, methods


def h11_requests(stream: bytes) -> Seen:
    seen, at = Seen(), 0
    while at < len(stream):
        reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        reader.receive_data(stream[at:])
        head = entity = 0
        event = None
        while not isinstance(event, h11.EndOfMessage):
            event = reader.next_event()
            if isinstance(event, h11.Request):
                head = len(stream) - len(reader.trailing_data[0])
            elif isinstance(event, h11.Data):
                entity += len(event.data)
            elif not isinstance(event, h11.EndOfMessage):
                seen.open_head = head or None
                return seen
        at = len(stream) - len(reader.trailing_data[0])
        seen.messages.append((head, at, entity, 0))
    return seen


def h11_responses(stream: bytes, methods: str) -> Seen:
    """Every response of the stream; where no method is left, that of a GET. The stream ends where the connection does."""
    seen, at = Seen(), 0
    while at < len(stream):
        method = {"H": "HEAD"}.get(methods[len(seen.messages) : len(seen.messages) + 1], "GET")
        reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(stream[at:])
        head = entity = status = 0
        event = None
        while not isinstance(event, h11.EndOfMessage):
            event = reader.next_event()
            if isinstance(event, h11.InformationalResponse):
                seen.interim.append((len(stream) - len(reader.trailing_data[0]), event.status_code))
            elif isinstance(event, h11.Response):
                head, status = len(stream) - len(reader.trailing_data[0]), event.status_code
            elif isinstance(event, h11.Data):
                entity += len(event.data)
            elif event is h11.NEED_DATA:
                reader.receive_data(b"")
        at = len(stream) - len(reader.trailing_data[0])
        seen.messages.append((head, at, entity, status))
    return seen


CUTS = st.lists(st.integers(0, 1 << 16), max_size=12)
LONG = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@LONG
@given(request_stream(), CUTS)
def test_requests_are_framed_as_h11_frames_them(framing: Framing, stream: bytes, at: list[int]) -> None:
    expected = h11_requests(stream)
    assert expected.messages[-1][1] == len(stream)
    assert framing.requests(stream) == expected
    assert framing.requests(*cut(stream, at)) == expected
    assert framing.requests(*bytewise(stream)) == expected


@LONG
@given(response_stream(), CUTS)
def test_responses_are_framed_as_h11_frames_them(framing: Framing, stream_and_methods: tuple[bytes, str], at: list[int]) -> None:
    stream, methods = stream_and_methods
    # A response without any framing is delimited by the close, and so takes all that follows: h11 then does, too.
    expected = h11_responses(stream, methods)
    assert framing.responses(stream, methods=methods, close=True) == expected
    assert framing.responses(*cut(stream, at), methods=methods, close=True) == expected
    assert framing.responses(*bytewise(stream), methods=methods, close=True) == expected


@LONG
@given(st.data(), st.sampled_from([b"HTTP/1.0 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 404 Not Found"]), CUTS)
def test_the_close_ends_a_response_that_nothing_else_delimits(framing: Framing, data: st.DataObject, line: bytes, at: list[int]) -> None:
    stream = data.draw(message(line, False, True))
    expected = h11_responses(stream, "G")
    assert framing.responses(*cut(stream, at), methods="G", close=True) == expected


@LONG
@given(request_stream(), st.integers(0, 1 << 16))
def test_a_stream_that_breaks_off_ends_nothing_early(framing: Framing, stream: bytes, length: int) -> None:
    whole = framing.requests(stream)
    part = framing.requests(stream[: length % len(stream)])
    assert part.messages == [found for found in whole.messages if found[1] <= length % len(stream)]
    assert part.lost is None


# --- Arbitrary bytes ---------------------------------------------------------------------------------------------

FRAGMENTS = [b"GET / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"\n", b"\r",
             b"0\r\n\r\n", b"5\r\nhello\r\n", b"18446744073709551617", b"ffffffffffffffffff\r\n", b" ", b":", b"HTTP/1.1 100\r\n\r\n",
             b"HTTP/1.1 204\r\n\r\n", b"\0", b"\xff" * 9]  # fmt: skip
NOISE = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=12)), max_size=30).map(b"".join)


@LONG
@given(NOISE, CUTS, st.booleans())
@example(b"5\r\n\r\n", [], False)
def test_what_is_found_does_not_depend_on_how_the_bytes_came(framing: Framing, stream: bytes, at: list[int], response: bool) -> None:
    def read(pieces: list[bytes]) -> Seen:
        return framing.read(pieces, response=response, methods="PHC", close=True)

    whole = read([stream])
    assert read(cut(stream, at)) == whole
    assert read(bytewise(stream)) == whole
    assert all(entity <= end - head for head, end, entity, _ in whole.messages)


def fuzz_inputs(seed: int, count: int) -> bytes:
    """Records of length, direction, longest call, and the bytes; streams of fragments, mutated."""
    chosen = random.Random(seed)
    out = b""
    for number in range(count):
        stream = bytearray(b"".join(chosen.choices(FRAGMENTS, k=chosen.randint(0, 40))) + chosen.randbytes(chosen.randint(0, 8)))
        for _ in range(chosen.randint(0, 4)):
            if stream:
                stream[chosen.randrange(len(stream))] = chosen.randrange(256)
        out += struct.pack("=III", len(stream), number & 1, chosen.choice([1, 3, 24, 255, 256, 257, 1 << 20])) + stream
    return out


def test_no_bytes_lead_it_out_of_the_window_or_around_in_circles(tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, each window being a block of its own."""
    program, inputs, count = tmp_path / "framing", tmp_path / "inputs", 4000
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run(["gcc", "-g", "-O1", "-DFUZZ", *sanitizers, *FLAGS, "-o", program], check=True)
    inputs.write_bytes(fuzz_inputs(7, count))
    done = subprocess.run([program, inputs], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{count}\n", "")


# --- By example --------------------------------------------------------------------------------------------------

GET = b"GET / HTTP/1.1\r\n\r\n"


def put(*headers: bytes, body: bytes = b"") -> bytes:
    return b"".join(line + b"\r\n" for line in (b"PUT /a HTTP/1.1", b"Host: h", *headers, b"")) + body


def assert_body(framing: Framing, stream: bytes, entity: int) -> None:
    """The stream is one request with a body of so many bytes, and another request is found after it."""
    assert framing.requests(stream + GET).messages == [
        (stream.find(b"\r\n\r\n") + 4, len(stream), entity, 0),
        (len(stream) + len(GET), len(stream) + len(GET), 0, 0),
    ]


@pytest.mark.parametrize("name", [b"X-Content-Length", b"Content-Length-X", b"XContent-Length", b"Content-Lengt", b"Content_Length"])
def test_a_name_that_contains_content_length_is_another_name(framing: Framing, name: bytes) -> None:
    assert_body(framing, put(name + b": 7"), 0)


@pytest.mark.parametrize("header", [b"X: chunked", b"TE: chunked", b"X-Transfer-Encoding: chunked", b"X: Transfer-Encoding: chunked"])
def test_the_word_chunked_elsewhere_means_nothing(framing: Framing, header: bytes) -> None:
    assert_body(framing, put(header, b"Content-Length: 3", body=b"abc"), 3)


@pytest.mark.parametrize("value", [b"chunked", b"Chunked", b"gzip, chunked", b"gzip,chunked", b"\t chunked \t", b"gzip ,\tCHUNKED"])
def test_chunked_as_the_last_coding(framing: Framing, value: bytes) -> None:
    assert_body(framing, put(b"Transfer-Encoding:" + value, body=b"3\r\nabc\r\n0\r\n\r\n"), 3)


@pytest.mark.parametrize("headers", [[b"Transfer-Encoding: chunked , "], [b"Transfer-Encoding: gzip,", b" chunked"]])
def test_codings_that_are_written_too_oddly_lose_the_framing(framing: Framing, headers: list[bytes]) -> None:
    """An empty last element and a folded list are valid and not understood: no message is made up, and the loss is seen."""
    seen = framing.requests(put(*headers, body=b"3\r\nabc\r\n0\r\n\r\n"), GET)
    assert len(seen.messages) == 1
    assert seen.lost is not None


@pytest.mark.parametrize("value", [b"identity", b"xchunked", b"x-chunked", b"chunked, gzip", b"chunkedx", b"xchunked,"])
def test_codings_that_are_not_chunked(framing: Framing, value: bytes) -> None:
    assert_body(framing, put(b"Transfer-Encoding: " + value), 0)


def test_identity_leaves_the_length_in_force(framing: Framing) -> None:
    """RFC 2616 had it, and old clients send it."""
    assert_body(framing, put(b"Transfer-Encoding: identity", b"Content-Length: 3", body=b"abc"), 3)


def test_a_length_that_is_said_twice_alike(framing: Framing) -> None:
    assert_body(framing, put(b"Content-Length: 3", b"Content-Length: 03", body=b"abc"), 3)


def test_of_two_lines_of_codings_the_last_one_counts(framing: Framing) -> None:
    assert_body(framing, put(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 0)
    assert_body(framing, put(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip"), 0)


@pytest.mark.parametrize("headers", [[b"Content-Length: 3, 3"], [b"Content-Length:", b" 3"], [b"Content-Length: ", b"\t 3 "]])
def test_a_length_that_is_written_too_oddly_loses_the_framing(framing: Framing, headers: list[bytes]) -> None:
    """RFC 9112 6.3 and 5.2 let a recipient refuse lists and folds; h11 takes these, and the kernel's half says that it does not."""
    stream = put(*headers)
    assert h11_requests(stream + b"abc").messages[0][2] == 3
    assert framing.requests(stream + b"abc", GET) == Seen(lost=len(stream))


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: 3", b"Content-Length: 4"],
        [b"Content-Length: 3", b"X: y", b"content-length: 0"],
        [b"Content-Length: 3, 4"],
        [b"Content-Length: "],
        [b"Content-Length:"],
        [b"Content-Length: 1 2"],
        [b"Content-Length: 3x"],
        [b"Content-Length: 0x3"],
        [b"Content-Length: -3"],
        [b"Content-Length: +3"],
        [b"Content-Length: 3.0"],
        [b"Content-Length: 99999999999999999999999999"],
    ],
    ids=lambda headers: b"|".join(headers).decode(),
)
def test_a_length_that_is_none_loses_the_framing(framing: Framing, headers: list[bytes]) -> None:
    stream = put(*headers)
    with pytest.raises(h11.RemoteProtocolError):
        h11_requests(stream + b"abc")
    seen = framing.requests(stream + b"abc" + GET)
    assert (seen.messages, seen.lost) == ([], len(stream))


@pytest.mark.parametrize("length", [1 << 64, (1 << 64) + 3, 10 * (1 << 64) + 3])
def test_a_length_that_64_bits_cannot_hold_is_none(framing: Framing, length: int) -> None:
    stream = put(b"Content-Length: %d" % length)
    assert framing.requests(stream + b"abc", GET) == Seen(lost=len(stream))


def test_the_largest_length_that_the_kernel_could_ever_move(framing: Framing) -> None:
    stream = put(b"Content-Length: 9223372036854775807", body=b"abc")
    assert framing.requests(stream) == Seen(open_head=len(stream) - 3)


def test_headers_that_are_folded(framing: Framing) -> None:
    assert_body(framing, put(b"X: a", b" Content-Length: 7", b"\tTransfer-Encoding: chunked", b"Content-Length: 3", body=b"abc"), 3)


def test_a_blank_before_the_colon_makes_another_name(framing: Framing) -> None:
    """RFC 9112 5.1: servers reject it."""
    assert_body(framing, put(b"Content-Length : 3"), 0)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"HTTP/1.1 200", 200),
        (b"HTTP/1.1 200 ", 200),
        (b"HTTP/1.1  200 OK", 200),
        (b"HTTP/1.0 404 Not 200 Found", 404),
        (b"HTTP/1.1 999 \xff", 999),
        (b"HTTP/1.1 201\tOK", 201),
    ],
)
def test_status_lines_that_servers_send(framing: Framing, line: bytes, status: int) -> None:
    stream = line + b"\r\nContent-Length: 2\r\n\r\nok"
    assert framing.responses(stream, methods="G").messages == [(len(stream) - 2, len(stream), 2, status)]


@pytest.mark.parametrize("line", [b"HTTP/1.1 OK", b"HTTP/1.1 20", b"HTTP/1.1 2000 OK", b"HTTP/1.1 0", b"HTTP/1.1  "])
def test_status_lines_without_a_status(framing: Framing, line: bytes) -> None:
    seen = framing.responses(line + b"\r\n\r\n", methods="G")
    assert (seen.messages, seen.interim, seen.lost) == ([], [], len(line) + 4)


def test_interim_responses_are_not_final(framing: Framing) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    final = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
    seen = framing.responses(interim, interim + final, methods="P")
    end = 2 * len(interim) + len(final)
    assert seen == Seen(messages=[(end, end, 0, 201)], interim=[(len(interim), 100), (2 * len(interim), 100)])


@pytest.mark.parametrize(("status", "method"), [(101, "G"), (200, "C"), (204, "C")])
def test_after_an_upgrade_nothing_is_http(framing: Framing, status: int, method: str) -> None:
    head = b"HTTP/1.1 %d X\r\n\r\n" % status
    seen = framing.responses(head + b"HTTP/1.1 200 OK\r\n\r\n", methods=method)
    assert (seen.upgrade, seen.messages) == (len(head), [])


def test_a_connect_that_is_refused_is_a_response_as_any_other(framing: Framing) -> None:
    stream = b"HTTP/1.1 407 No\r\nContent-Length: 2\r\n\r\nno"
    assert framing.responses(stream, methods="C").messages == [(len(stream) - 2, len(stream), 2, 407)]


@pytest.mark.parametrize("blank", [b"\r\n", b"\n", b"\r\n\r\n\n"])
def test_empty_lines_before_a_request_are_skipped(framing: Framing, blank: bytes) -> None:
    """RFC 9112 2.2."""
    stream = blank + GET
    assert framing.requests(stream, blank + GET).messages == [(len(stream), len(stream), 0, 0), (2 * len(stream), 2 * len(stream), 0, 0)]


def test_bare_line_feeds_everywhere(framing: Framing) -> None:
    stream = b"PUT /a HTTP/1.1\nTransfer-Encoding: chunked\n\n3;x=y\nabc\n0\nT: v\n\n"
    assert framing.requests(stream).messages == [(stream.find(b"\n\n") + 2, len(stream), 3, 0)]


@pytest.mark.parametrize("line", [b"X: a\rb", b"X: \r", b"\rX: y", b"X\r: y", b"X: a\r"])
def test_a_carriage_return_inside_a_header_ends_nothing(framing: Framing, line: bytes) -> None:
    assert_body(framing, put(line, b"Content-Length: 3", body=b"abc"), 3)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n",
        b"GET / HTTP/2\r\n",
        b"GET / http\r\n",
        b"GET\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0\0\0\0",
        b"G\xc3\x84T / HTTP/1.1\r\n",
    ],
)
def test_other_protocols_are_noticed_by_their_first_line(framing: Framing, stream: bytes) -> None:
    for seen in (framing.requests(stream), framing.requests(*bytewise(stream))):
        assert seen.messages == []
        assert seen.lost is not None
        assert seen.lost <= (stream.find(b"\n") + 1 or len(stream))


@pytest.mark.parametrize("line", [b"HTTP/2 200 OK", b"HTTP/0.9 200", b"ICY 200 OK", b"200 OK"])
def test_other_protocols_are_noticed_in_answers_too(framing: Framing, line: bytes) -> None:
    assert framing.responses(line + b"\r\n\r\n", methods="G").lost == len(line) + 2


@pytest.mark.parametrize("size", [b"g", b"-3", b" 3", b";x", b"x3"])
def test_chunk_sizes_that_are_none(framing: Framing, size: bytes) -> None:
    head = put(b"Transfer-Encoding: chunked")
    assert framing.requests(head + size + b"\r\nabc\r\n").lost == len(head)


@pytest.mark.parametrize("size", [b"10000000000000003", b"f" * 17, b"3" * 40])
def test_chunk_sizes_that_are_too_large(framing: Framing, size: bytes) -> None:
    seen = framing.requests(put(b"Transfer-Encoding: chunked") + size + b"\r\nabc\r\n0\r\n\r\n")
    assert seen.messages == []
    assert seen.lost is not None


@pytest.mark.parametrize("size", [b"3x", b"3 4", b"3,4"])
def test_chunk_sizes_with_junk_after_them(framing: Framing, size: bytes) -> None:
    """Servers differ: some take the digits, some reject. Where they take any, it is the first ones."""
    head = put(b"Transfer-Encoding: chunked")
    assert framing.requests(head + size + b"\r\nabc\r\n0\r\n\r\n").messages[0][2] == 3


def test_the_last_chunk_and_its_trailer_may_be_cut_anywhere(framing: Framing) -> None:
    stream = put(b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\nContent-Length: 9\r\n\r\n")
    for at in range(len(stream)):
        assert framing.requests(stream[:at]).messages == []
        assert framing.requests(stream[:at], stream[at:]).messages == [(stream.find(b"\r\n\r\n") + 4, len(stream), 3, 0)]


@pytest.mark.parametrize("size", [8 << 10, 20 << 10])
def test_a_long_head_is_followed_to_its_end(framing: Framing, size: int) -> None:
    stream = put(b"X: " + b"a" * size, b"Content-Length: 3", body=b"abc")
    assert_body(framing, stream, 3)
    assert framing.requests(*cut(stream, range(0, len(stream), 4096)), limit=TAIL_CALLS).messages == [(len(stream) - 3, len(stream), 3, 0)]


def test_how_long_a_head_the_kernel_can_follow_in_one_call(framing: Framing) -> None:
    room = TAIL_CALLS * WINDOW - len(put(b"X: "))
    assert framing.requests(put(b"X: " + b"a" * room), limit=TAIL_CALLS).lost is None
    assert framing.requests(put(b"X: " + b"a" * (room + 1)), limit=TAIL_CALLS).lost == TAIL_CALLS * WINDOW


def test_how_many_chunks_the_kernel_can_follow_in_one_call(framing: Framing) -> None:
    """Each has two steps, for its size and for the line end after it, of which 16 are one program's."""
    head, chunk = put(b"Transfer-Encoding: chunked"), b"1\r\nx\r\n"
    assert framing.requests(head + 250 * chunk + b"0\r\n\r\n", limit=TAIL_CALLS).messages[0][2] == 250
    assert framing.requests(head + 600 * chunk + b"0\r\n\r\n", limit=TAIL_CALLS).lost is not None

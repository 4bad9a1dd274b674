# SPDX-License-Identifier: Apache-2.0
"""One head at a time: by example, against h11 as the strict reader, and with bytes that nobody would send."""

from __future__ import annotations

from contextlib import suppress

import h11
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from bucketprobe import http1
from bucketprobe.http1 import MAX_METHOD, MAX_PATH, MAX_VALUE, REASONS, Malformed, RequestHead, parse_request, parse_response

CANARY = "s3cr3tCanary"
SHARED_HEADERS = ["content-length", "transfer-encoding", "connection", "x-request-id", "content-type"]
REQUEST_HEADERS = [
    *SHARED_HEADERS,
    "expect",
    "user-agent",
    "x-artifact-version",
    "x-artifact-digest",
    "x-uploaded-by",
    "x-provenance-source",
]
RESPONSE_HEADERS = [*SHARED_HEADERS, "x-cache"]


def request(*lines: str, start: str = "PUT /v1/b/a HTTP/1.1") -> RequestHead:
    return parse_request("\r\n".join((start, *lines, "", "")).encode("latin-1"))


def test_a_put_as_curl_sends_it() -> None:
    head = request("Host: x", "X-Artifact-Version: v1", "Content-Length: 12", "Expect: 100-continue", "Authorization: Bearer abc")
    assert head == RequestHead(
        method="PUT",
        path="/v1/b/a",
        query={},
        http_version="1.1",
        headers={"x-artifact-version": "v1", "content-length": "12", "expect": "100-continue"},
        complete=True,
    )


def test_a_response() -> None:
    head = parse_response(b"HTTP/1.1 201 Created\r\nSet-Cookie: a=b\r\nX-Cache: HIT\r\nContent-Length: 0\r\n\r\n")
    assert (head.http_version, head.status, head.complete) == ("1.1", 201, True)
    assert head.headers == {"x-cache": "HIT", "content-length": "0"}


@pytest.mark.parametrize("line", [b"HTTP/1.0 204\r\n", b"HTTP/1.0 204 \r\n", b"HTTP/1.0  204 No \xff\n", b"\r\n\nHTTP/1.0 204\n"])
def test_status_lines_that_servers_send(line: bytes) -> None:
    head = parse_response(line + b"\r\n")
    assert (head.http_version, head.status, head.complete) == ("1.0", 204, True)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/v1/b/a?version=1.0", "/v1/b/a", {"version": "1.0"}),
        ("/v1/b/a?version=1%2E0&token=x&digest=sha256%3Aab&metadata_only=true#f?g", "/v1/b/a", None),
        ("/v1/b/a?%76ersion=1", "/v1/b/a", {"version": "1"}),
        ("/v1/b/a?version=a+b", "/v1/b/a", {"version": "a b"}),
        ("/v1/b/a?version=%C3%BC", "/v1/b/a", {"version": "ü"}),
        ("/v1/b/a?version=%252e", "/v1/b/a", {"version": "%2e"}),
        ("/v1/b/a?version=%", "/v1/b/a", {"version": "%"}),
        ("/v1/b/a?version", "/v1/b/a", {"version": ""}),
        ("/v1/b/a?version=1&version=1", "/v1/b/a", {"version": "1"}),
        ("/v1/b/a?version=1&version=2", "/v1/b/a", {}),
        ("/v1/b/a?version=%FF", "/v1/b/a", {}),
        ("/v1/b/a?version=1%0A2", "/v1/b/a", {}),
        ("/v1/b/a?version=%E2%80%AE1", "/v1/b/a", {}),
        ("http://user:pw@host:80/v1/b/a?version=1", "/v1/b/a", {"version": "1"}),
        ("HTTP://user:pw@host", "/", {}),
        ("http://user:pw@host?version=1", "/", {"version": "1"}),
        ("*", "*", {}),
        ("user:pw@host:443", "", {}),
        ("/v1/b/a b\xe9\x1b", "/v1/b/a%20b%E9%1B", {}),
        ("/v1/%7e%2f", "/v1/%7e%2f", {}),
    ],
)
def test_targets(target: str, path: str, query: dict[str, str] | None) -> None:
    head = request(start=f"GET {target} HTTP/1.1")
    expected = {"version": "1.0", "digest": "sha256:ab", "metadata_only": "true"} if query is None else query
    assert (head.path, head.query) == (path, expected)


@pytest.mark.parametrize(
    ("lines", "headers"),
    [
        (["X-Request-ID:a"], {"x-request-id": "a"}),
        (["X-Request-ID: \t a b \t"], {"x-request-id": "a b"}),
        (["X-Request-ID:"], {"x-request-id": ""}),
        (["X-Request-ID: a", " b", "\tc", "Content-Type: d"], {"x-request-id": "a b c", "content-type": "d"}),
        ([" X-Request-ID: a", "Expect: b"], {"expect": "b"}),
        (["Cookie: a", f" X-Request-ID: {CANARY}"], {}),
        (["X-Request-ID : a"], {}),
        (["X-Request-ID"], {}),
        (["X-Request-ID: a", "x-request-id: b"], {}),
        (["X-Request-ID: a", "x-request-id: a"], {"x-request-id": "a"}),
        (["Connection: close", "Connection: TE"], {"connection": "close, TE"}),
        (["X-Request-ID: a\x1b[31m"], {}),
        (["X-Request-ID: a", "X-Request-ID: \x00"], {}),
        (["X-Request-ID: a\rCookie: b"], {}),
        (["X-Uploaded-By: J\xfcrgen"], {}),
        (["no colon at all", "Expect: a"], {"expect": "a"}),
    ],
)
def test_header_lines(lines: list[str], headers: dict[str, str]) -> None:
    assert request(*lines).headers == headers
    assert parse_request("\n".join(("GET / HTTP/1.1", *lines, "", "")).encode("latin-1")).headers == headers


def test_limits() -> None:
    long = "x" * 5000
    head = request(f"User-Agent: {long}", f"Connection: {long}", "Connection: close", start=f"{long} /{long}?version={long} HTTP/1.1")
    assert head.method == "x" * MAX_METHOD
    assert head.path == "/" + "x" * (MAX_PATH - 1)
    assert head.query == {"version": "x" * MAX_VALUE}
    assert head.headers == {"user-agent": "x" * MAX_VALUE, "connection": "x" * MAX_VALUE}


def test_nothing_after_the_blank_line_is_read() -> None:
    head = parse_request(b"PUT / HTTP/1.1\nExpect: a\n\nX-Request-ID: b\r\n\r\n")
    assert head.headers == {"expect": "a"}


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "empty"),
        (b"\r\n\r\n", "empty"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "tls"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http2"),
        (b"\x00\x01 / HTTP/1.1\r\n\r\n", "method"),
        (b" GET / HTTP/1.1\r\n\r\n", "method"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "target"),
        (b"GET HTTP/1.1\r\n\r\n", "target"),
        (b"GET /\r\n\r\n", "version"),
        (b"GET / HTTP/1\r\n\r\n", "version"),
        (b"GE", "cut"),
    ],
)
def test_what_is_no_request(head: bytes, reason: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_request(head)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\n", "empty"),
        (b"GET / HTTP/1.1\r\n\r\n", "version"),
        (b"HTTP/1.1 20\r\n\r\n", "status"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "status"),
        (b"HTTP/1.1 099 No\r\n\r\n", "status"),
        (b"HTTP/1.1 20", "cut"),
        (b"HTTP/1.", "cut"),
    ],
)
def test_what_is_no_response(head: bytes, reason: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_response(head)
    assert caught.value.reason == reason


FULL = (
    b"PUT /v1/models/llama?version=1.0.0&digest=sha256%3Aab HTTP/1.1\r\nX-Artifact-Version: 1.0.0\r\n"
    b"X-Uploaded-By: someone\r\nContent-Length: 1048576\r\nX-Request-ID: a\r\n b\r\n\r\n"
)


@pytest.mark.parametrize("end", range(len(b"PUT ")))
def test_a_head_cut_within_the_method(end: int) -> None:
    with pytest.raises(Malformed) as caught:
        parse_request(FULL[:end])
    assert caught.value.reason == ("cut" if end else "empty")


@pytest.mark.parametrize("end", range(len(b"PUT "), len(FULL)))
def test_a_cut_head_says_so_and_never_gives_a_cut_value(end: int) -> None:
    whole = parse_request(FULL)
    head = parse_request(FULL[:end])
    assert not head.complete
    assert head.method == "PUT"
    assert head.path in ("", whole.path)
    assert head.http_version in (None, "1.1")
    assert head.query.items() <= whole.query.items()
    # Between a line and the line that folds onto it, nothing shows that there is more to come.
    assert head.headers.items() <= whole.headers.items() | {("x-request-id", "a")}


@pytest.mark.parametrize("end", range(len(b"HTTP/1.1 200")))
def test_a_cut_status_line(end: int) -> None:
    with pytest.raises(Malformed) as caught:
        parse_response(b"HTTP/1.1 200 OK\r\n"[:end])
    assert caught.value.reason in ("empty", "cut")


# h11 as the strict, independent reader: what it accepts, we accept, and read the same.

TOKEN = st.text("abcXYZ019-_.!~", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=30)
KEPT_NAME = st.sampled_from(sorted({*REQUEST_HEADERS, *RESPONSE_HEADERS} - {"content-length", "transfer-encoding"}))
ANY_NAME = st.one_of(TOKEN, KEPT_NAME, KEPT_NAME.map(str.title))
EXACT = st.sampled_from(["Content-Length: 5", "Transfer-Encoding: Chunked", "Connection: close", "Expect: 100-continue"])
FIELD = st.one_of(EXACT, st.builds("{}:{}{}".format, ANY_NAME, st.sampled_from(["", " ", "\t "]), VALUE))
FOLDED = st.one_of(FIELD, st.builds(lambda field, fold: f"{field}\r\n {fold}", FIELD, VALUE))
PATH = st.text("abc/%20._-~:@", max_size=20).map(lambda text: "/" + text)
PARAMETER = st.builds("{}={}".format, st.sampled_from(["version", "digest", "token", "%76ersion"]), st.text("ab1%.+", max_size=6))
QUERY = st.lists(PARAMETER, max_size=3)
TARGET = st.one_of(
    st.builds(lambda path, query: path + ("?" + "&".join(query) if query else ""), PATH, QUERY),
    PATH.map(lambda path: "http://h.example:80" + path),
    st.just("*"),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20),
)
EOL = st.sampled_from(["\r\n", "\n"])


def strict(head: bytes, role: type[h11.Sentinel]) -> h11.Request | h11.Response | h11.InformationalResponse:
    """What h11 reads from the head. Where it refuses one, another is drawn; were that the rule, hypothesis would fail."""
    connection = h11.Connection(role)
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        event = None
    assume(isinstance(event, h11.Request | h11.Response | h11.InformationalResponse))
    return event


def members(value: str) -> set[str]:
    return {part.strip(" \t").lower() for part in value.split(",")}


def same_headers(ours: dict[str, str], event: h11.Request | h11.Response | h11.InformationalResponse, allowed: list[str]) -> None:
    theirs: dict[str, list[str]] = {}
    for name, value in event.headers:
        if name.decode() in allowed:
            theirs.setdefault(name.decode(), []).append(value.decode("latin-1"))
    assert ours.keys() <= theirs.keys()
    for name, values in theirs.items():
        if not all(value.isprintable() for value in values):
            assert name not in ours
        elif name in ("connection", "expect", "transfer-encoding"):
            assert members(ours[name]) == members(",".join(values))
        elif len(set(values)) > 1:
            assert name not in ours
        else:
            assert ours[name] == values[0]


@given(method=TOKEN, target=TARGET, version=st.sampled_from(["1.0", "1.1"]), fields=st.lists(FOLDED, max_size=5), eol=EOL)
@example(method="GET", target="/", version="1.1", fields=["X-Request-ID: a\r\n  b", "Cookie: c\r\n x-request-id: d"], eol="\r\n")
def test_requests_that_h11_accepts_read_the_same(method: str, target: str, version: str, fields: list[str], eol: str) -> None:
    head = f"{method} {target} HTTP/{version}{eol}Host: h{eol}{''.join(field + eol for field in fields)}{eol}".encode("latin-1")
    event = strict(head, h11.SERVER)
    ours = parse_request(head)
    assert ours.complete
    assert ours.method == event.method.decode()
    assert ours.http_version == event.http_version.decode()
    target = event.target.decode().partition("#")[0].partition("?")[0]
    if target.startswith("/") or target == "*":
        assert ours.path == target
    elif target.startswith("http://h.example:80/"):
        assert ours.path == target.removeprefix("http://h.example:80")
    same_headers(ours.headers, event, REQUEST_HEADERS)


@given(
    status=st.integers(100, 999),
    reason=st.one_of(st.none(), VALUE),
    version=st.sampled_from(["1.0", "1.1"]),
    fields=st.lists(FOLDED, max_size=5),
    eol=EOL,
)
def test_responses_that_h11_accepts_read_the_same(status: int, reason: str | None, version: str, fields: list[str], eol: str) -> None:
    line = f"HTTP/{version} {status}" + ("" if reason is None else f" {reason}")
    head = f"{line}{eol}{''.join(field + eol for field in fields)}{eol}".encode("latin-1")
    event = strict(head, h11.CLIENT)
    ours = parse_response(head)
    assert (ours.status, ours.http_version, ours.complete) == (event.status_code, event.http_version.decode(), True)
    same_headers(ours.headers, event, RESPONSE_HEADERS)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=40).map(lambda start: start + b" / HTTP/1.1\r\n\r\n")))
def test_any_bytes_give_a_head_or_malformed(head: bytes) -> None:
    for parse in (parse_request, parse_response):
        with suppress(Malformed):
            parse(head)


def test_the_reasons_are_closed() -> None:
    assert set(REASONS) == {"empty", "tls", "http2", "cut", "method", "target", "version", "status"}


NOISE = st.text(st.characters(max_codepoint=0xFF), max_size=20)
SECRET_LINE = st.sampled_from(
    [
        f"Cookie: a={CANARY}",
        f"Authorization: Bearer {CANARY}",
        f"Proxy-Authorization: {CANARY}",
        f"X-Api-Key: a\r\n {CANARY}",
        f"Cookie: a\r\n X-Request-ID: {CANARY}",
        f"X-Request-ID : {CANARY}",
        f"X-Request-IDs: {CANARY}",
        f"Set-Cookie: {CANARY}",
        f"{CANARY}",
    ]
)
SECRET_TARGET = st.sampled_from(
    [
        f"/v1/b/a?token={CANARY}",
        f"/v1/b/a?version=1&X-Amz-Signature={CANARY}&digest=2",
        f"/v1/b/a?{CANARY}=1",
        f"/v1/b/a#{CANARY}",
        f"/v1/b/a?version=1#version={CANARY}",
        f"/v1/b/a?versions={CANARY}",
        f"http://user:{CANARY}@host/v1/b/a",
        f"https://{CANARY}@host?version=1",
        f"user:{CANARY}@host:443",
    ]
)


@given(
    target=SECRET_TARGET,
    lines=st.lists(st.one_of(SECRET_LINE, FIELD, NOISE.filter(lambda text: not text.startswith((" ", "\t")))), max_size=6),
    eol=EOL,
    cut=st.integers(0, 40),
)
def test_secrets_do_not_survive(target: str, lines: list[str], eol: str, cut: int) -> None:
    block = "".join(line + eol for line in lines)
    request_bytes = f"GET {target} HTTP/1.1{eol}{block}{eol}".encode("latin-1")
    response_bytes = f"HTTP/1.1 401 {CANARY}{eol}{block}{eol}".encode("latin-1")
    assert CANARY not in repr(parse_request(request_bytes))
    with suppress(Malformed):
        assert CANARY not in repr(parse_request(request_bytes[: len(request_bytes) - cut]))
    assert CANARY not in repr(parse_response(response_bytes))


# --- Names that are kept besides ---------------------------------------------------------------------------------

MORE_HEADERS = http1.REQUEST_HEADERS | {b"content-md5": "content-md5"}
MORE_PARAMETERS = http1.PARAMETERS | {b"Sum": "Sum"}


def test_names_that_are_asked_for_are_kept_and_no_others() -> None:
    text = b"PUT /a?Sum=1&sum=2&version=3&other=4 HTTP/1.1\r\nCONTENT-MD5: abc=\r\nETag: x\r\nX-Request-ID: r\r\n\r\n"
    with_more = parse_request(text, MORE_HEADERS, MORE_PARAMETERS)
    assert with_more.headers == {"content-md5": "abc=", "x-request-id": "r"}
    assert with_more.query == {"Sum": "1", "version": "3"}, "parameters are compared as they are"
    without = parse_request(text)
    assert (without.headers, without.query) == ({"x-request-id": "r"}, {"version": "3"})


def test_a_name_of_the_answer_that_is_asked_for() -> None:
    text = b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nX-Cache: HIT\r\nSet-Cookie: a\r\n\r\n'
    assert parse_response(text, http1.RESPONSE_HEADERS | {b"etag": "etag"}).headers == {"etag": '"abc"', "x-cache": "HIT"}
    assert parse_response(text).headers == {"x-cache": "HIT"}


def test_a_name_that_is_asked_for_is_no_exception_to_the_rules() -> None:
    """Repeated with another value, cut, or not to be printed: it is none, as any other."""
    for lines in (b"Content-MD5: a\r\nContent-MD5: b\r\n\r\n", b"Content-MD5: \xff\r\n\r\n", b"Content-MD5: a"):
        assert parse_request(b"PUT /a HTTP/1.1\r\n" + lines, MORE_HEADERS).headers == {}


def test_what_one_call_keeps_another_does_not() -> None:
    text = b"PUT /a HTTP/1.1\r\nContent-MD5: abc=\r\n\r\n"
    parse_request(text, MORE_HEADERS)
    assert parse_request(text).headers == {}


@given(target=SECRET_TARGET, lines=st.lists(SECRET_LINE, max_size=6))
def test_secrets_do_not_survive_where_more_is_kept(target: str, lines: list[str]) -> None:
    text = f"GET {target} HTTP/1.1\r\n{''.join(line + chr(13) + chr(10) for line in lines)}\r\n".encode("latin-1")
    assert CANARY not in repr(parse_request(text, MORE_HEADERS, MORE_PARAMETERS))


def test_errors_carry_no_bytes_of_the_head() -> None:
    with pytest.raises(Malformed) as caught:
        parse_request(f"{CANARY}\r\n\r\n".encode())
    assert CANARY not in str(caught.value) + repr(caught.value.args)

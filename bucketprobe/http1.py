# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1 message head, read tolerantly and kept by allow-list.

The kernel half finds where a head begins and ends; here its bytes (up to the blank line, or cut at a bound) become a
`RequestHead` or a `ResponseHead`. This observes what servers accepted, so it is lenient where they are: bare LF,
empty lines before the start line, folded values (RFC 9112 section 5.2), status lines without a reason, targets in
absolute form, cut heads, any byte anywhere.

Nothing outlives the call but what the allow-lists name: no cookie, no credential, no other query parameter. What was
not seen whole is left out, because a cut value is a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import unquote_to_bytes

MAX_METHOD = 32
MAX_PATH = 1024
MAX_VALUE = 512

#: Why bytes are no head: nothing there, a TLS record, HTTP/2's preface, cut before the part that must be known, or the
#: part of the start line that is wrong.
Reason = Literal["empty", "tls", "http2", "cut", "method", "target", "version", "status"]
REASONS: tuple[Reason, ...] = get_args(Reason)

Names = Mapping[bytes, str]

#: What is kept, by the name as it is compared: in lower case.
REQUEST_HEADERS = {
    name.encode(): name
    for name in (
        "content-length",
        "transfer-encoding",
        "expect",
        "connection",
        "x-artifact-version",
        "x-artifact-digest",
        "x-uploaded-by",
        "x-provenance-source",
        "x-request-id",
        "content-type",
        "user-agent",
    )
}
RESPONSE_HEADERS = {
    name.encode(): name for name in ("content-length", "transfer-encoding", "connection", "x-request-id", "content-type", "x-cache")
}
PARAMETERS = {name.encode(): name for name in ("version", "digest", "metadata_only")}

#: Fields that are lists by definition: only these may be repeated with different values (RFC 9110 section 5.3).
_LISTS = frozenset(("transfer-encoding", "connection", "expect"))

_BLANK_LINE = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_TOKEN = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VERSION = re.compile(rb"HTTP/([0-9]\.[0-9])")
_VERSION_SO_FAR = re.compile(rb"H(T(T(P(/([0-9](\.)?)?)?)?)?)?")
_STATUS = re.compile(rb"[1-9][0-9]{2}")
_ORIGIN = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_UNSAFE_IN_PATH = re.compile(rb"[^\x21-\x7e]")


class Malformed(ValueError):
    """These bytes are no HTTP/1 head; `reason` is one of `REASONS`. Counted, not shown to people."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, frozen=True)
class RequestHead:
    """A request's head. `complete`: the blank line was seen.

    `path`: without query and fragment, still percent-encoded, other bytes than printable ASCII written as `%XX`, cut at
    `MAX_PATH` characters; `*` for the server as a whole; empty where it was not seen whole or the target names no path
    (CONNECT). `query` and `headers` hold only allow-listed names with printable values of at most `MAX_VALUE`
    characters. A name that was repeated with different values is absent, since servers disagree on which one counts.
    """

    method: str
    path: str
    query: dict[str, str]
    http_version: str | None
    headers: dict[str, str]
    complete: bool


@dataclass(slots=True, frozen=True)
class ResponseHead:
    """A response's head; `headers` and `complete` as in `RequestHead`. `status` is 100 to 999."""

    http_version: str
    status: int
    headers: dict[str, str]
    complete: bool


def parse_request(head: bytes, headers: Names = REQUEST_HEADERS, parameters: Names = PARAMETERS) -> RequestHead:
    """Read a request's head. Raises `Malformed`, and nothing else, for bytes that are none."""
    start, whole, lines, complete = _split(head)
    method, space, rest = start.partition(b" ")
    if not _TOKEN.fullmatch(method):
        raise Malformed("method")
    if not space:
        raise Malformed("target" if whole else "cut")
    target, version, target_whole = _target_and_version(rest.strip(b" \t"), whole)
    path, query = _path_and_query(target, target_whole, parameters)
    return RequestHead(method[:MAX_METHOD].decode("ascii"), path, query, version, _headers(lines, headers), complete)


def parse_response(head: bytes, headers: Names = RESPONSE_HEADERS) -> ResponseHead:
    """Read a response's head. Raises `Malformed`, and nothing else, for bytes that are none."""
    start, whole, lines, complete = _split(head)
    version, _, rest = start.partition(b" ")
    match = _VERSION.fullmatch(version)
    if match is None:
        raise Malformed("cut" if not whole and _VERSION_SO_FAR.fullmatch(version) else "version")
    status = rest.lstrip(b" ").partition(b" ")[0]
    if not _STATUS.fullmatch(status):
        raise Malformed("cut" if not whole and len(status) < 3 else "status")
    return ResponseHead(match[1].decode("ascii"), int(status), _headers(lines, headers), complete)


def _split(head: bytes) -> tuple[bytes, bool, list[bytes], bool]:
    """The start line, whether it is whole, the header lines that are whole (unfolded), and whether the head is."""
    text = head.lstrip(b"\r\n")
    if not text:
        raise Malformed("empty")
    if text.startswith(b"\x16\x03"):
        raise Malformed("tls")
    if text.startswith(b"PRI * HTTP/2"):
        raise Malformed("http2")
    blank = _BLANK_LINE.search(text)
    start, newline, rest = (text if blank is None else text[: blank.start() + 1]).partition(b"\n")
    # The last piece is empty where the text ends with a newline; otherwise it was cut, with the line that it folds onto.
    lines = _FOLD.sub(b" ", rest).split(b"\n")[:-1]
    return start.removesuffix(b"\r"), bool(newline), lines, blank is not None


def _target_and_version(rest: bytes, whole: bool) -> tuple[bytes, str | None, bool]:
    """The target, the version where it was seen, and whether the target is whole."""
    target, space, last = rest.rpartition(b" ")
    match = _VERSION.fullmatch(last)
    if match is not None:
        if not target:
            raise Malformed("target")
        return target.rstrip(b" \t"), match[1].decode("ascii"), True
    if whole:
        raise Malformed("version")
    if space and _VERSION_SO_FAR.fullmatch(last):
        return target.rstrip(b" \t"), None, True
    return rest, None, False


def _path_and_query(target: bytes, whole: bool, parameters: Names) -> tuple[str, dict[str, str]]:
    target, fragment, _ = target.partition(b"#")
    target, question, query = target.partition(b"?")
    path_whole = whole or bool(fragment or question)
    pairs = query.split(b"&")
    if not (whole or fragment):
        pairs.pop()
    return _path(target) if path_whole else "", _settled(_parameters(pairs, parameters))


def _path(target: bytes) -> str:
    # A scheme and an authority may carry credentials (RFC 3986 section 3.2.1), and no route depends on them.
    origin = _ORIGIN.match(target)
    if origin is not None:
        target = target[origin.end() :] or b"/"
    if not target.startswith(b"/") and target != b"*":
        return ""
    return _UNSAFE_IN_PATH.sub(lambda found: b"%%%02X" % found[0][0], target)[:MAX_PATH].decode("ascii")


def _parameters(pairs: Iterable[bytes], allowed: Names) -> Iterator[tuple[str, str | None]]:
    for pair in pairs:
        raw_name, _, raw_value = pair.partition(b"=")
        name = allowed.get(unquote_to_bytes(raw_name))
        if name is not None:
            yield name, _printable(unquote_to_bytes(raw_value.replace(b"+", b" ")), "utf-8")


def _headers(lines: Iterable[bytes], allowed: Names) -> dict[str, str]:
    return _settled(_fields(lines, allowed))


def _fields(lines: Iterable[bytes], allowed: Names) -> Iterator[tuple[str, str | None]]:
    for line in lines:
        raw_name, colon, raw_value = line.partition(b":")
        name = allowed.get(raw_name.lower())
        if name is not None and colon:
            yield name, _printable(raw_value.removesuffix(b"\r").strip(b" \t"), "ascii")


def _printable(value: bytes, encoding: str) -> str | None:
    """The text, cut at `MAX_VALUE`; None where a byte does not belong in a log line."""
    try:
        text = value.decode(encoding)
    except UnicodeDecodeError:
        return None
    return text[:MAX_VALUE] if text.isprintable() else None


def _settled(pairs: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """One value for each name; none where a value is unreadable or two differ, unless the field is a list."""
    kept: dict[str, str] = {}
    refused: set[str] = set()
    for name, value in pairs:
        known = kept.get(name)
        if value is None or (known is not None and known != value and name not in _LISTS):
            refused.add(name)
        elif known is None:
            kept[name] = value
        elif known != value:
            kept[name] = f"{known}, {value}"[:MAX_VALUE]
    return {name: value for name, value in kept.items() if name not in refused}

# SPDX-License-Identifier: Apache-2.0
"""The contract's calls, and what is none of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe.http1 import MAX_PATH, Malformed, parse_request
from bucketprobe.model import OPERATIONS
from bucketprobe.route import ARTIFACT, VERSIONS, Route, classify

OTHER = Route("other", None, None, None, None)


@pytest.mark.parametrize(
    ("method", "path", "query", "header", "route"),
    [
        ("PUT", "/v1/b/a", {}, "1.0", Route("write", ARTIFACT, "b", "a", "1.0")),
        ("PUT", "/v1/b/a", {"version": "2"}, None, Route("write", ARTIFACT, "b", "a", None)),
        ("GET", "/v1/b/a", {"version": "2"}, "1.0", Route("read", ARTIFACT, "b", "a", "2")),
        ("GET", "/v1/b/a", {}, None, Route("read", ARTIFACT, "b", "a", None)),
        ("GET", "/v1/b/a", {"version": "2", "metadata_only": "true"}, None, Route("metadata", ARTIFACT, "b", "a", "2")),
        ("GET", "/v1/b/a", {"metadata_only": "True"}, None, Route("metadata", ARTIFACT, "b", "a", None)),
        ("GET", "/v1/b/a", {"metadata_only": "false"}, None, Route("read", ARTIFACT, "b", "a", None)),
        ("HEAD", "/v1/b/a", {"version": "2"}, None, Route("metadata", ARTIFACT, "b", "a", "2")),
        ("GET", "/v1/b/a/versions", {"version": "2"}, None, Route("list", VERSIONS, "b", "a", None)),
        ("GET", "/v1/b/versions", {}, None, Route("read", ARTIFACT, "b", "versions", None)),
        ("GET", "/v1/m%2Dx/llama%2e3", {}, None, Route("read", ARTIFACT, "m-x", "llama.3", None)),
    ],
)
def test_the_contracts_calls(method: str, path: str, query: dict[str, str], header: str | None, route: Route) -> None:
    assert classify(method, path, query, header) == route


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/b/a"),
        ("POST", "/v1/b/a"),
        ("get", "/v1/b/a"),
        ("PUT", "/v1/b/a/versions"),
        ("HEAD", "/v1/b/a/versions"),
        ("GET", "/v1/b/a/version"),
        ("GET", "/v1/b"),
        ("GET", "/v1/b/a/"),
        ("GET", "/v1//a"),
        ("GET", "/v1/b/"),
        ("GET", "/v2/b/a"),
        ("GET", "//v1/b/a"),
        ("GET", "v1/b/a"),
        ("GET", "/v1/b/a/b/c"),
        ("OPTIONS", "*"),
        ("CONNECT", ""),
        ("GET", "/"),
        ("GET", "/v1/b/" + "a" * MAX_PATH),
    ],
)
def test_anything_else_is_other(method: str, path: str) -> None:
    assert classify(method, path, {"version": "1"}, "1") == OTHER


@pytest.mark.parametrize(
    "segment", ["%2F", "a%2Fb", "a%00b", "a b", "a%20b", "ü", "%C3%BC", "a%", "%252e", "a:b", "a%0a", "a\n", "x" * 256, "<script>", "a;b"]
)
def test_a_write_with_a_forbidden_name_is_a_write_of_no_name(segment: str) -> None:
    assert classify("PUT", f"/v1/{segment}/a", {}, "1") == Route("write", ARTIFACT, None, "a", "1")
    assert classify("PUT", f"/v1/b/{segment}", {}, "1") == Route("write", ARTIFACT, "b", None, "1")


@pytest.mark.parametrize("name", ["x" * 255, "a", "..", "A-Z_0.9"])
def test_every_name_of_the_contracts_form_is_kept(name: str) -> None:
    assert classify("PUT", f"/v1/{name}/{name}", {}) == Route("write", ARTIFACT, name, name, None)


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("1.0+b (x)", True),
        ("v" * 100, True),
        ("ü", True),
        ("", False),
        ("v" * 101, False),
        ("a\nb", False),
        ("1\n", False),
        ("\u202e1", False),
        *((f"1{character}", False) for character in '/\\:*?"<>|'),
    ],
)
def test_versions(version: str, kept: bool) -> None:
    expected = version if kept else None
    assert classify("PUT", "/v1/b/a", {}, version).version == expected
    assert classify("GET", "/v1/b/a", {"version": version}).version == expected


@given(
    method=st.sampled_from(["PUT", "GET", "HEAD", "POST"]),
    segments=st.lists(st.one_of(st.just("versions"), st.text(max_size=8)), max_size=4),
    query=st.dictionaries(st.sampled_from(["version", "metadata_only"]), st.text(max_size=8)),
    header=st.one_of(st.none(), st.text(max_size=120)),
)
def test_labels_are_bounded_whatever_is_sent(method: str, segments: list[str], query: dict[str, str], header: str | None) -> None:
    route = classify(method, "/".join(["", "v1", *segments]), query, header)
    assert route.operation in OPERATIONS
    assert route.template in (ARTIFACT, VERSIONS, None)
    for name in (route.bucket_id, route.artifact_id):
        assert name is None or re.fullmatch(r"[A-Za-z0-9._-]{1,255}", name)
    assert route.version is None or (1 <= len(route.version) <= 100 and route.version.isprintable())


@given(st.binary(max_size=60))
def test_from_the_bytes_of_a_target(tail: bytes) -> None:
    try:
        head = parse_request(b"PUT /v1/" + tail + b" HTTP/1.1\r\n\r\n")
    except Malformed:
        return
    route = classify(head.method, head.path, head.query, head.headers.get("x-artifact-version"))
    assert route.operation in ("write", "other")

# SPDX-License-Identifier: Apache-2.0
"""The demo server against the contract, over real sockets, in all models and with both kinds of metadata."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe.demo.bucket import MODELS
from bucketprobe.demo.hands import Here, complete
from bucketprobe.demo.loops import LoopWire, TaskConversation
from bucketprobe.demo.messages import Problem, Request, Response, Wire, json_response
from bucketprobe.demo.service import Options, Service, Site
from bucketprobe.demo.store import Store, file_name, folder_of
from bucketprobe.demo.truth import Trace

MAX_BYTES = 1_000_000
BYTES = b"the bytes of an artifact" * 10_000


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        error = self.document["error"]
        assert sorted(error) == ["code", "details", "message"]
        return str(error["code"])


@dataclass
class Bucket:
    """A running server. `arguments`: its command line's."""

    process: subprocess.Popen[str]
    port: int
    root: Path
    arguments: tuple[str, ...]

    @property
    def model(self) -> str:
        return self.arguments[self.arguments.index("--model") + 1]

    @property
    def ps(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    @property
    def truth(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "truth.jsonl").read_text().splitlines()]

    def truth_of(self, request_id: str) -> dict[str, Any]:
        """The one line about a request; it is written just after the answer, so it may be a moment late."""
        wait_until(lambda: any(line["request_id"] == request_id for line in self.truth))
        (line,) = (line for line in self.truth if line["request_id"] == request_id)
        return line

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def call(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None, **options: Any) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, target, body, headers or {}, **options)
            return read_answer(connection.getresponse())
        finally:
            connection.close()

    def raw(self, data: bytes, *, close_write: bool = False) -> bytes:
        """What comes back until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            if close_write:
                sock.shutdown(socket.SHUT_WR)
            received = b""
            while part := sock.recv(65536):
                received += part
            return received

    def temporary(self) -> list[str]:
        return os.listdir(self.root / "tmp")


def read_answer(response: http.client.HTTPResponse) -> Answer:
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def running(root: Path, *arguments: str) -> Iterator[Bucket]:
    """A server, ended afterwards; it must have had nothing to complain about."""
    command = [sys.executable, "-m", "bucketprobe.demo.bucket", "--port", "0", "--root", str(root), "--truth", str(root / "truth.jsonl")]
    root.mkdir(exist_ok=True)
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line
            assert line.endswith(f", pid {process.pid})\n")
            yield Bucket(process, int(line.split(":")[2].split()[0]), root, arguments)
        finally:
            process.terminate()
        assert process.stderr.read() == ""


VARIANTS = {
    "threads-json": ("--model", "threads"),
    "prefork-sqlite": ("--model", "prefork", "--workers", "20", "--metadata", "sqlite", "--verify", "--sendfile"),
    "asyncio-json": ("--model", "asyncio", "--verify", "--sendfile"),
    # With fewer threads than there are requests at the same time in any test: those that wait must not hold all of them.
    "asyncio-pool-json": ("--model", "asyncio-pool", "--workers", "3", "--verify"),
    "asyncio-pool-sqlite": ("--model", "asyncio-pool", "--metadata", "sqlite"),
    "asyncio-sync-json": ("--model", "asyncio-sync", "--workers", "3"),
    "asyncio-sync-sqlite": ("--model", "asyncio-sync", "--metadata", "sqlite", "--verify"),
}


@pytest.fixture(scope="module", params=VARIANTS, name="bucket")
def fixture_bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with running(tmp_path_factory.mktemp("bucket"), *VARIANTS[request.param], "--max-bytes", str(MAX_BYTES)) as bucket:
        yield bucket
    assert bucket.temporary() == []


@pytest.fixture(name="artifact")
def fixture_artifact(request: pytest.FixtureRequest) -> str:
    """The path of an artifact that no other test uses."""
    return f"/v1/b-1/a.{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"


def upload_headers(data: bytes, version: str = "1.0", **changes: str | None) -> dict[str, str]:
    """The contract's headers; a change is by name with underscores, and None leaves the header out."""
    headers: dict[str, str | None] = {
        "X-Artifact-Version": version,
        "X-Artifact-Digest": digest_of(data),
        "X-Uploaded-By": "someone",
        "X-Provenance-Source": "a test",
        "Content-Type": "application/octet-stream",
    }
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    return {name: value for name, value in headers.items() if value is not None}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put(bucket: Bucket, artifact: str, data: bytes = BYTES, /, version: str = "1.0", **changes: Any) -> Answer:
    return bucket.call("PUT", artifact, data, upload_headers(data, version, **changes))


def head_text(method: str, target: str, headers: dict[str, str], version: str = "1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# --- the calls ---


def test_put_then_get(bucket: Bucket, artifact: str) -> None:
    stored = put(bucket, artifact, X_Request_ID="put-1" + artifact)
    assert stored.status == 201
    document = stored.document
    assert document.pop("created_at").endswith("Z")
    assert document == {
        "bucket_id": "b-1",
        "artifact_id": artifact.rpartition("/")[2],
        "version": "1.0",
        "digest": digest_of(BYTES),
        "size_bytes": len(BYTES),
        "uploaded_by": "someone",
        "provenance_source": "a test",
    }
    assert stored.headers["x-request-id"] == "put-1" + artifact
    answer = bucket.call("GET", f"{artifact}?version=1.0")
    assert (answer.status, answer.body) == (200, BYTES)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "x-request-id" not in answer.headers


def test_metadata_only_is_what_the_upload_answered(bucket: Bucket, artifact: str) -> None:
    stored = put(bucket, artifact)
    answer = bucket.call("GET", f"{artifact}?version=1.0&metadata_only=true")
    assert (answer.status, answer.document) == (200, stored.document)
    assert bucket.call("GET", f"{artifact}?version=1.0&metadata_only=false").body == BYTES
    assert bucket.call("GET", f"{artifact}?version=1.0&metadata_only=1").code == "invalid_parameter"


def test_the_same_again_is_200_and_other_content_409(bucket: Bucket, artifact: str) -> None:
    first = put(bucket, artifact)
    again = put(bucket, artifact, X_Uploaded_By="another")
    assert (again.status, again.document) == (200, first.document)
    conflict = put(bucket, artifact, b"other content")
    assert (conflict.status, conflict.code) == (409, "version_conflict")
    assert conflict.document["error"]["details"]["digest"] == digest_of(BYTES)
    assert bucket.call("GET", f"{artifact}?version=1.0").body == BYTES
    assert bucket.temporary() == []


def test_a_wrong_digest_is_400_and_leaves_nothing(bucket: Bucket, artifact: str) -> None:
    answer = put(bucket, artifact, X_Artifact_Digest=digest_of(b"something else"))
    assert (answer.status, answer.code) == (400, "digest_mismatch")
    assert answer.document["error"]["details"]["computed"] == digest_of(BYTES)
    assert bucket.temporary() == []
    assert bucket.call("GET", f"{artifact}?version=1.0").status == 404


def test_the_digest_is_case_insensitive(bucket: Bucket, artifact: str) -> None:
    answer = put(bucket, artifact, X_Artifact_Digest=digest_of(BYTES).upper())
    assert (answer.status, answer.document["digest"]) == (201, digest_of(BYTES))


@pytest.mark.parametrize("name", ["X_Artifact_Version", "X_Artifact_Digest", "X_Uploaded_By", "X_Provenance_Source", "Content_Type"])
def test_each_header_is_required(bucket: Bucket, artifact: str, name: str) -> None:
    changes: dict[str, Any] = {name: None}
    answer = put(bucket, artifact, **changes)
    assert (answer.status, answer.code) == (400, "missing_header")
    assert answer.document["error"]["details"] == {"header": name.replace("_", "-")}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"X_Artifact_Version": "a/b"}, "invalid_identity"),
        ({"X_Artifact_Version": "v" * 101}, "invalid_identity"),
        ({"X_Artifact_Digest": "sha256:" + "0" * 63}, "invalid_identity"),
        ({"X_Artifact_Digest": "sha512:" + "0" * 64}, "invalid_identity"),
        ({"X_Artifact_Digest": "0" * 64}, "invalid_identity"),
        ({"X_Uploaded_By": "u" * 501}, "invalid_identity"),
        ({"X_Provenance_Source": "p" * 501}, "invalid_identity"),
        ({"Content_Type": "text/plain"}, "invalid_header"),
    ],
)
def test_forms_of_the_upload_headers(bucket: Bucket, artifact: str, changes: dict[str, str], code: str) -> None:
    answer = put(bucket, artifact, **changes)
    assert (answer.status, answer.code) == (400, code)


@pytest.mark.parametrize("character", r'/\:*?"<>|')
def test_versions_without_the_forbidden_characters(bucket: Bucket, artifact: str, character: str) -> None:
    assert put(bucket, artifact, version=f"1{character}0").code == "invalid_identity"


@pytest.mark.parametrize("version", ["v" * 100, ".", "..", "1.0+build 5", "%2E", "ü-日本", "日" * 100])
def test_versions_that_are_allowed(bucket: Bucket, artifact: str, version: str) -> None:
    data = version.encode()
    headers = {name: value.encode() for name, value in upload_headers(data, version).items()}
    assert bucket.call("PUT", artifact, data, headers).document["version"] == version  # type: ignore[arg-type]
    query = "".join(f"%{byte:02x}" for byte in version.encode())
    assert bucket.call("GET", f"{artifact}?version={query}").body == data
    listed = bucket.call("GET", f"{artifact}/versions").document["versions"]
    assert [row["version"] for row in listed] == [version]


@pytest.mark.parametrize("name", [".", "..", "a" * 255, "versions", "-_."])
def test_names_that_are_allowed(bucket: Bucket, artifact: str, name: str) -> None:
    version = artifact.rpartition("/")[2]
    assert put(bucket, f"/v1/{name}/{name}", version=version).status == 201
    assert bucket.call("GET", f"/v1/{name}/{name}?version={version}").body == BYTES
    outside = {"data", "tmp", "meta", "locks", "truth.jsonl"}
    assert set(os.listdir(bucket.root)) == outside


@pytest.mark.parametrize("target", ["/v1/a%20b/c", "/v1/b/c%2Fd", "/v1/b/" + "c" * 256, "/v1/b/%ff", "/v1/b/%00"])
def test_names_that_are_not(bucket: Bucket, target: str) -> None:
    answer = bucket.call("GET", f"{target}?version=1")
    assert (answer.status, answer.code) == (400, "invalid_identity")


def test_escaped_names_are_the_same_names(bucket: Bucket, artifact: str) -> None:
    assert put(bucket, artifact).status == 201
    assert bucket.call("GET", artifact.replace("b-1", "%62%2D1") + "?version=1.0").body == BYTES


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 400, "missing_parameter"),
        ("?version=", 400, "invalid_identity"),
        ("?version=1%2F0", 400, "invalid_identity"),
        ("?version=1&version=2", 400, "malformed_request"),
        ("?version=%ff", 400, "malformed_request"),
        ("?version=1.0&digest=abc", 400, "invalid_identity"),
        ("?version=2.0", 404, "not_found"),
        ("?version=2.0&metadata_only=true", 404, "not_found"),
        (f"?version=1.0&digest={digest_of(b'x')}", 412, "digest_precondition_failed"),
        (f"?version=1.0&metadata_only=true&digest={digest_of(b'x')}", 412, "digest_precondition_failed"),
    ],
)
def test_reads_that_fail(bucket: Bucket, artifact: str, query: str, status: int, code: str) -> None:
    put(bucket, artifact)
    answer = bucket.call("GET", artifact + query)
    assert (answer.status, answer.code) == (status, code)


def test_a_read_with_the_right_digest(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact)
    assert bucket.call("GET", f"{artifact}?version=1.0&digest={digest_of(BYTES).upper().replace('SHA', 'sha')}").body == BYTES


def test_versions(bucket: Bucket, artifact: str) -> None:
    assert bucket.call("GET", f"{artifact}/versions").document == {"versions": []}
    for version in ("2", "1", "3"):
        assert put(bucket, artifact, version.encode(), version).status == 201
    listed = bucket.call("GET", f"{artifact}/versions").document["versions"]
    assert [(row["version"], row["digest"], row["size_bytes"]) for row in listed] == [(v, digest_of(v.encode()), 1) for v in "213"]
    assert set(listed[0]) == {"version", "digest", "size_bytes", "created_at"}


def test_head(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact)
    answer = bucket.call("HEAD", f"{artifact}?version=1.0", headers={"X-Request-ID": "head" + artifact})
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", str(len(BYTES)))
    line = bucket.truth_of("head" + artifact)
    assert (line["method"], line["bytes_out"], line["files"]["opens"]) == ("HEAD", 0, 0)
    assert bucket.call("HEAD", f"{artifact}?version=2.0").status == 404
    both = bucket.raw(head_text("HEAD", f"{artifact}?version=1.0", {}) + head_text("HEAD", f"{artifact}/versions", {"Connection": "close"}))
    assert both.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert b"sha256" in both
    assert BYTES[:20] not in both
    assert both.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/b", 404),
        ("GET", "/v1/b/", 404),
        ("GET", "/v2/b/a", 404),
        ("GET", "/v1/b/a/", 404),
        ("GET", "/v1/b/a/other", 404),
        ("GET", "/v1/b/a/versions/x", 404),
        ("DELETE", "/nothing", 404),
        ("DELETE", "/v1/b/a", 405),
        ("BREW", "/v1/b/a", 405),
        ("PUT", "/v1/b/a/versions", 405),
        ("POST", "/v1/b/a?version=1", 405),
    ],
)
def test_routes_and_methods(bucket: Bucket, method: str, target: str, status: int) -> None:
    answer = bucket.call(method, target)
    assert answer.status == status
    assert answer.code == ("method_not_allowed" if status == 405 else "unknown_route")
    if status == 405:
        assert "GET" in answer.headers["allow"]


# --- HTTP ---


def test_chunked_upload(bucket: Bucket, artifact: str) -> None:
    headers = upload_headers(BYTES, X_Request_ID="chunked" + artifact)
    pieces = [BYTES[:1], BYTES[1:70_000], BYTES[70_000:]]
    answer = bucket.call("PUT", artifact, iter(pieces), headers, encode_chunked=True)
    assert answer.status == 201
    assert bucket.call("GET", f"{artifact}?version=1.0").body == BYTES
    assert bucket.truth_of("chunked" + artifact)["bytes_in"] == len(BYTES)


def test_chunked_with_extension_and_trailer_keeps_the_connection_usable(bucket: Bucket, artifact: str) -> None:
    headers = {**upload_headers(b"abcdef"), "Transfer-Encoding": "chunked"}
    body = b"3;name=value\r\nabc\r\n3\r\ndef\r\n0\r\nTrailer: x\r\n\r\n"
    get = head_text("GET", f"{artifact}?version=1.0", {"Connection": "close"})
    received = bucket.raw(head_text("PUT", artifact, headers) + body + get)
    assert received.startswith(b"HTTP/1.1 201 Created\r\n")
    assert received.endswith(b"\r\n\r\nabcdef")


@pytest.mark.parametrize("body", [b"x\r\nabc\r\n0\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"-3\r\nabc\r\n0\r\n\r\n", b"3" * 2000, b"\r\n"])
def test_broken_chunks(bucket: Bucket, artifact: str, body: bytes) -> None:
    headers = {**upload_headers(b"abc"), "Transfer-Encoding": "chunked"}
    assert bucket.raw(head_text("PUT", artifact, headers) + body).startswith(b"HTTP/1.1 400 ")
    assert bucket.temporary() == []


def test_an_empty_artifact(bucket: Bucket, artifact: str) -> None:
    assert put(bucket, artifact, b"").code == "empty_artifact"
    headers = {**upload_headers(b""), "Transfer-Encoding": "chunked"}
    received = bucket.raw(head_text("PUT", artifact, {**headers, "Connection": "close"}) + b"0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"empty_artifact" in received


def test_the_size_limit(bucket: Bucket, artifact: str) -> None:
    assert put(bucket, artifact, bytes(MAX_BYTES)).status == 201
    too_much = bytes(MAX_BYTES + 1)
    answer = bucket.call("PUT", artifact, iter([too_much]), upload_headers(too_much, "2"), encode_chunked=True)
    assert (answer.status, answer.code) == (413, "size_limit_exceeded")
    assert bucket.temporary() == []


@pytest.mark.parametrize("expect", [True, False])
def test_an_early_413_does_not_wait_for_the_body(bucket: Bucket, artifact: str, expect: bool) -> None:
    headers = upload_headers(b"x", X_Request_ID=f"413{expect}{artifact}") | {"Content-Length": str(MAX_BYTES + 1)}
    if expect:
        headers["Expect"] = "100-continue"
    with bucket.connect() as sock:
        sock.sendall(head_text("PUT", artifact, headers) + (b"" if expect else b"12345"))
        received = sock.recv(65536)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in received
    assert bucket.truth_of(f"413{expect}{artifact}")["bytes_in"] == (0 if expect else 5)


def test_a_client_that_sends_all_of_it_still_reads_the_early_answer(bucket: Bucket, artifact: str) -> None:
    data = bytes(20 * MAX_BYTES)
    assert put(bucket, artifact, data, X_Uploaded_By=None).status == 400


def test_expect_100_continue(bucket: Bucket, artifact: str) -> None:
    headers = upload_headers(b"abc") | {"Content-Length": "3", "Expect": "100-Continue", "Connection": "close"}
    with bucket.connect() as sock:
        sock.sendall(head_text("PUT", artifact, headers))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert sock.recv(65536).startswith(b"HTTP/1.1 201 ")


def test_curl_with_100_continue(bucket: Bucket, artifact: str, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(BYTES)
    headers = [f"-H{name}: {value}" for name, value in (upload_headers(BYTES) | {"Expect": "100-continue"}).items()]
    command = ["curl", "-sv", "-T", str(file), *headers, f"http://127.0.0.1:{bucket.port}{artifact}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(done.stdout)["digest"] == digest_of(BYTES)
    statuses = [line.split()[2] for line in done.stderr.splitlines() if line.startswith("< HTTP/")]
    assert statuses == ["100", "201"]


def test_http_1_0(bucket: Bucket, artifact: str) -> None:
    data = b"abc"
    answer = bucket.raw(b"PUT" + head_text("PUT", artifact, upload_headers(data) | {"Content-Length": "3"}, "1.0")[3:] + data)
    assert answer.startswith(b"HTTP/1.1 201 ")
    assert b"Connection: close" in answer
    get = f"GET {artifact}?version=1.0 HTTP/1.0\r\n"
    assert bucket.raw(f"{get}\r\n".encode()).endswith(b"\r\n\r\nabc")
    both = bucket.raw(f"{get}Connection: keep-alive\r\n\r\n{get}\r\n".encode())
    assert (both.count(b"\r\n\r\nabc"), both.count(b"Connection: keep-alive")) == (2, 1)


def test_two_pipelined_reads(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact)
    first, second = (
        head_text("GET", f"{artifact}?version=1.0", {"X-Request-ID": f"{name}{artifact}", "Connection": option})
        for name, option in (("first", "keep-alive"), ("second", "close"))
    )
    received = bucket.raw(first + second)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert received.count(BYTES) == 2
    one, two = bucket.truth_of("first" + artifact), bucket.truth_of("second" + artifact)
    assert one["begin_ns"] == two["begin_ns"], "both came with one read"
    assert one["accept_ns"] == two["accept_ns"]
    assert two["bytes_out"] == len(BYTES)


def test_a_request_behind_an_upload_begins_with_its_own_first_byte(bucket: Bucket, artifact: str) -> None:
    headers = upload_headers(BYTES) | {"Content-Length": str(len(BYTES))}
    get = head_text("GET", f"{artifact}?version=1.0", {"X-Request-ID": "behind" + artifact, "Connection": "close"})
    with bucket.connect() as sock:
        sock.sendall(head_text("PUT", artifact, headers) + BYTES)
        before = time.monotonic_ns()
        sock.sendall(get)
        received = b""
        while part := sock.recv(65536):
            received += part
    assert received.endswith(BYTES)
    line = bucket.truth_of("behind" + artifact)
    assert before < line["begin_ns"] < line["end_ns"]


def test_more_pipelined_requests_than_a_buffer_holds(bucket: Bucket) -> None:
    one = head_text("GET", "/", {})
    count = 200_000 // len(one)
    received = bucket.raw(one * (count - 1) + head_text("GET", "/", {"Connection": "close"}))
    assert received.count(b"HTTP/1.1 404 ") == count


def test_keep_alive_begins_each_request_with_its_own_first_byte(bucket: Bucket, artifact: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", bucket.port, timeout=10)
    begun = []
    for number in range(2):
        time.sleep(0.05)
        before = time.monotonic_ns()
        connection.request("GET", f"{artifact}?version=1", headers={"X-Request-ID": f"{number}{artifact}"})
        assert connection.getresponse().read()
        line = bucket.truth_of(f"{number}{artifact}")
        assert before < line["begin_ns"] < line["end_ns"]
        begun.append(line)
    connection.close()
    assert begun[0]["accept_ns"] == begun[1]["accept_ns"] < begun[0]["begin_ns"]


def test_a_head_in_single_bytes(bucket: Bucket, artifact: str) -> None:
    with bucket.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head_text("PUT", artifact, upload_headers(b"abc") | {"Content-Length": "3"}) + b"abc":
            sock.sendall(bytes([byte]))
        assert sock.recv(65536).startswith(b"HTTP/1.1 201 ")


def test_the_absolute_form(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact)
    received = bucket.raw(head_text("GET", f"http://host:1{artifact}?version=1.0", {"Connection": "close"}))
    assert received.endswith(BYTES)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\ny\r\n\r\n",
        b"GET http://[x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"PUT / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"x" * 200_000,
        b"\x16\x03\x01" + bytes(100) + b"\r\n\r\n",
    ],
)
def test_malformed_requests(bucket: Bucket, request_bytes: bytes) -> None:
    received = bucket.raw(request_bytes, close_write=True)
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"malformed_request"' in received


def test_a_line_break_before_the_request_is_ignored(bucket: Bucket) -> None:
    assert bucket.raw(b"\r\n" + head_text("GET", "/", {"Connection": "close"})).startswith(b"HTTP/1.1 404 ")


# --- the truth ---


def step(line: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (step for step in line["steps"] if step["step"] == name)
    return dict(found)


def calls(line: dict[str, Any]) -> dict[str, int]:
    """How many calls each step had that is done to files and folders of the bytes."""
    apart = ("receive", "send", "digest", "metadata")
    return {step["step"]: step["calls"] for step in line["steps"] if step["step"] not in apart}


#: The model that writes nothing of an upload before all of it has come.
BUFFERING = "asyncio-sync"


def test_the_truth_of_an_upload(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact, X_Request_ID="truth" + artifact)
    line = bucket.truth_of("truth" + artifact)
    verify = "--verify" in bucket.arguments
    assert (line["status"], line["method"], line["target_path"], line["outcome"]) == (201, "PUT", artifact, "complete")
    assert line["bytes_in"] == len(BYTES)
    assert line["accept_ns"] <= line["begin_ns"] < line["end_ns"] <= time.monotonic_ns()
    files = line["files"]
    assert files["write_calls"] == 1 if bucket.model == BUFFERING else files["write_calls"] >= 4
    assert files["write_bytes"] == len(BYTES)
    assert files["read_bytes"] == (len(BYTES) if verify else 0)
    assert (files["opens"], files["syncs"], files["renames"]) == (2 if verify else 1, 1, 1)
    reads = {"storage_read": files["read_calls"]} if verify else {}
    opens = 2 if verify else 1
    once = {"storage_sync": 1, "mkdir": 1, "rename": 1}
    assert calls(line) == {"open": opens, "close": opens, "storage_write": files["write_calls"], **reads, **once}
    assert step(line, "digest")["bytes"] == len(BYTES) * (2 if verify else 1)
    assert step(line, "storage_sync")["ns"] > 0
    assert step(line, "metadata")["calls"] == 2
    assert step(line, "receive")["bytes"] > len(BYTES)
    assert sum(step["ns"] for step in line["steps"]) < line["end_ns"] - line["begin_ns"]
    assert psutil.Process(line["pid"]).is_running()
    assert (line["tid"] == line["pid"]) == bucket.model.startswith("asyncio")


def test_the_truth_of_an_upload_that_is_refused(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact, X_Artifact_Digest=digest_of(b"other"), X_Request_ID="refused" + artifact)
    line = bucket.truth_of("refused" + artifact)
    assert calls(line) == {"open": 1, "storage_write": line["files"]["write_calls"], "close": 1, "unlink": 1}
    assert line["files"]["renames"] == 0


def test_the_truth_of_metadata(bucket: Bucket, artifact: str) -> None:
    stored = put(bucket, artifact, X_Request_ID="put" + artifact)
    bucket.call("GET", f"{artifact}?version=1.0&metadata_only=true", headers={"X-Request-ID": "get" + artifact})
    bucket.call("GET", f"{artifact}?version=2.0", headers={"X-Request-ID": "none" + artifact})
    bucket.call("GET", f"{artifact}/versions", headers={"X-Request-ID": "all" + artifact})
    lines = [bucket.truth_of(name + artifact) for name in ("put", "get", "none", "all")]
    assert [step(line, "metadata")["calls"] for line in lines] == [2, 1, 1, 1]
    found = [line["metadata_files"] for line in lines]
    if "sqlite" in bucket.arguments:
        assert found == [None] * 4
        return
    none = dict.fromkeys(("opens", "write_calls", "write_bytes", "read_calls", "read_bytes", "syncs", "renames"), 0)
    size = len(stored.body)  # the sidecar is the document that the upload answers
    # Looked up before it was there; and each read of a whole file takes a second call, which finds the end.
    assert found[0] == {**none, "opens": 1, "write_calls": 1, "write_bytes": size, "renames": 1}
    assert found[1] == {**none, "opens": 1, "read_calls": 2, "read_bytes": size}
    assert found[2] == none
    assert found[3] == found[1]  # the folder that is listed is no file


def test_the_truth_of_a_read(bucket: Bucket, artifact: str) -> None:
    put(bucket, artifact)
    bucket.call("GET", f"{artifact}?version=1.0", headers={"X-Request-ID": "read" + artifact})
    line = bucket.truth_of("read" + artifact)
    assert (line["bytes_in"], line["bytes_out"]) == (0, len(BYTES))
    files = line["files"]
    assert calls(line) == {"open": 1, "storage_read": files["read_calls"], "close": 1}
    assert files.pop("read_calls") >= 1
    assert files == {"opens": 1, "write_calls": 0, "write_bytes": 0, "read_bytes": len(BYTES), "syncs": 0, "renames": 0}


def test_a_client_that_leaves_during_its_upload(bucket: Bucket, artifact: str) -> None:
    headers = upload_headers(BYTES, X_Request_ID="gone" + artifact) | {"Content-Length": str(len(BYTES))}
    with bucket.connect() as sock:
        sock.sendall(head_text("PUT", artifact, headers) + BYTES[:100_000])
        wait_until(lambda: bucket.model == BUFFERING or len(bucket.temporary()) == 1)
    line = bucket.truth_of("gone" + artifact)
    assert (line["outcome"], line["status"], line["bytes_in"]) == ("client_closed", None, 100_000)
    assert line["files"]["write_bytes"] == (0 if bucket.model == BUFFERING else 100_000)
    wait_until(lambda: bucket.temporary() == [])


# --- at the same time ---


def race(bucket: Bucket, artifact: str, contents: list[bytes]) -> list[int]:
    """The statuses of uploads of the same version whose last bytes are sent at the same moment."""
    barrier = threading.Barrier(len(contents))

    def upload(data: bytes) -> int:
        headers = upload_headers(data) | {"Content-Length": str(len(data)), "Connection": "close"}
        with bucket.connect() as sock:
            sock.sendall(head_text("PUT", artifact, headers) + data[:-1])
            barrier.wait(10)
            sock.sendall(data[-1:])
            return int(sock.recv(65536).split()[1])

    with ThreadPoolExecutor(len(contents)) as pool:
        return sorted(pool.map(upload, contents))


def test_identical_uploads_at_once_store_one(bucket: Bucket, artifact: str) -> None:
    for number in range(5):
        assert race(bucket, f"{artifact}-{number}", [BYTES] * 16) == [200] * 15 + [201]
    assert bucket.temporary() == []


def test_different_uploads_at_once_store_one(bucket: Bucket, artifact: str) -> None:
    for number in range(5):
        contents = [bytes([index]) * 10_000 for index in range(16)]
        assert race(bucket, f"{artifact}-{number}", contents) == [201] + [409] * 15
        stored = bucket.call("GET", f"{artifact}-{number}?version=1.0").body
        assert stored in contents
        assert bucket.call("GET", f"{artifact}-{number}?version=1.0&metadata_only=true").document["digest"] == digest_of(stored)
    assert bucket.temporary() == []


# --- who does what, in the models with an event loop ---

IN_FLIGHT = 20


def upload_together(bucket: Bucket, meanwhile: Callable[[], None]) -> list[dict[str, Any]]:
    """Uploads of which each has its first half sent before any gets its second, round by round. Returns their truth.

    `meanwhile` is called in between.
    """
    half, rounds = len(BYTES) // 2, 4
    step = -(-half // rounds)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(bucket.connect()) for _ in range(IN_FLIGHT)]
        for number, sock in enumerate(socks):
            headers = upload_headers(BYTES, X_Request_ID=f"together-{number}") | {"Content-Length": str(len(BYTES))}
            sock.sendall(head_text("PUT", f"/v1/b/a{number}", headers) + BYTES[:half])
        meanwhile()
        for start in range(half, len(BYTES), step):
            for sock in socks:
                sock.sendall(BYTES[start : start + step])
        for sock in socks:
            assert sock.recv(65536).startswith(b"HTTP/1.1 201 ")
    lines = [bucket.truth_of(f"together-{number}") for number in range(IN_FLIGHT)]
    assert max(line["begin_ns"] for line in lines) < min(line["end_ns"] for line in lines)
    assert {line["files"]["write_bytes"] for line in lines} == {len(BYTES)}
    assert {line["tid"] for line in lines} == {bucket.process.pid}, "the loop is the main thread, and answers"
    return lines


def by_thread(bucket: Bucket, counter: str) -> dict[int, int]:
    """Bytes that each thread of the server passed to write(2), `wchar`, or got from read(2), `rchar`: sockets are not in it."""
    found = {}
    for thread in bucket.ps.threads():
        rows = Path(f"/proc/{bucket.process.pid}/task/{thread.id}/io").read_text().splitlines()
        found[thread.id] = int(dict(row.split(": ") for row in rows)[counter])
    return found


def half_is_written(bucket: Bucket) -> bool:
    sizes = [os.stat(bucket.root / "tmp" / name).st_size for name in bucket.temporary()]
    return sizes == [len(BYTES) // 2] * IN_FLIGHT


def test_asyncio_has_many_uploads_in_one_thread(tmp_path: Path) -> None:
    with running(tmp_path / "root", "--model", "asyncio") as bucket:
        # That all temporary files hold their half, and none is complete, is that the writes of the requests alternate.
        upload_together(bucket, lambda: wait_until(lambda: half_is_written(bucket)))
        assert bucket.ps.num_threads() == 1
        (written,) = by_thread(bucket, "wchar").values()
        assert written >= IN_FLIGHT * len(BYTES)


def test_asyncio_pool_writes_in_the_threads_of_its_pool(tmp_path: Path) -> None:
    with running(tmp_path / "root", "--model", "asyncio-pool", "--workers", "3") as bucket:
        lines = upload_together(bucket, lambda: wait_until(lambda: half_is_written(bucket)))
        written = by_thread(bucket, "wchar")
        by_loop = written.pop(bucket.process.pid)
        assert 1 < len(written) <= 3, "more files than the pool has threads were open at once"
        assert by_loop < len(BYTES) < IN_FLIGHT * len(BYTES) <= sum(written.values())
        assert min(line["files"]["write_calls"] for line in lines) > 1


def test_asyncio_sync_stores_a_whole_body_in_a_worker_thread(tmp_path: Path) -> None:
    with running(tmp_path / "root", "--model", "asyncio-sync", "--workers", "3") as bucket:

        def meanwhile() -> None:
            wait_until(lambda: len(bucket.ps.net_connections("tcp")) == IN_FLIGHT + 1)
            assert bucket.ps.num_threads() == 1, "no endpoint runs before its body is there"
            assert bucket.temporary() == []

        lines = upload_together(bucket, meanwhile)
        written = by_thread(bucket, "wchar")
        by_loop = written.pop(bucket.process.pid)
        assert 1 <= len(written) <= 3
        assert by_loop < len(BYTES) < IN_FLIGHT * len(BYTES) <= sum(written.values())
        assert {line["files"]["write_calls"] for line in lines} == {1}


@pytest.mark.parametrize("model", ["asyncio-pool", "asyncio-sync"])
def test_a_pool_reads_a_download_chunk_by_chunk(tmp_path: Path, model: str) -> None:
    with running(tmp_path / "root", "--model", model, "--chunk-size", "10000") as bucket:
        put(bucket, "/v1/b/a")
        before = by_thread(bucket, "rchar")
        assert bucket.call("GET", "/v1/b/a?version=1.0", headers={"X-Request-ID": "read"}).body == BYTES
        files = bucket.truth_of("read")["files"]
        assert (files["read_calls"], files["read_bytes"]) == (len(BYTES) / 10_000, len(BYTES))
        read = {thread: count - before.get(thread, 0) for thread, count in by_thread(bucket, "rchar").items()}
        assert read.pop(bucket.process.pid) < len(BYTES) <= sum(read.values())


def test_each_request_of_a_connection_has_a_task_of_its_own(tmp_path: Path) -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    class Watched(Service):
        async def answer(self, request: Request, wire: Wire) -> Response:
            tasks.append(asyncio.current_task())
            return json_response(200, {})

    async def talk(ours: socket.socket, wire: LoopWire) -> None:
        options = Options(root=tmp_path, port=0)
        store = Store(tmp_path, Here(), metadata="json", verify=False, chunk_size=65536)
        site = Site(options, Watched(store, 1), Here(), None)
        ours.sendall(head_text("GET", "/", {}) + head_text("GET", "/", {"Connection": "close"}))
        await TaskConversation(wire, 0, site).run()
        tasks.append(asyncio.current_task())

    asyncio.run(on_a_wire(talk))
    assert None not in tasks
    assert len(set(tasks)) == 3, "two requests, and the connection"


async def read_ahead(wire: LoopWire, size: int) -> None:
    """Let the loop turn until so much is in the buffer, and then some more."""
    while wire.buffered < size:
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_a_loop_read_ahead_belongs_to_the_next_request() -> None:
    first, second = head_text("GET", "/1", {}), head_text("GET", "/2", {})

    async def talk(ours: socket.socket, wire: LoopWire) -> None:
        ours.sendall(first)
        assert await wire.begin()
        await wire.head()
        ours.sendall(second[:10])
        await read_ahead(wire, 10)
        between = time.monotonic_ns()
        ours.sendall(second[10:])
        await read_ahead(wire, len(second))
        begun, received = wire.begin_ns, wire.trace.steps["receive"][1:]
        assert received == [len(first), 1]
        assert await wire.begin()
        assert begun < wire.begin_ns < between < wire.recv_ns
        assert wire.trace.steps["receive"][1:] == [len(second), 2]

    asyncio.run(on_a_wire(talk))


def test_a_loop_reads_no_further_ahead_than_its_buffer() -> None:
    async def talk(ours: socket.socket, wire: LoopWire) -> None:
        ours.sendall(BYTES[:100_000])
        assert await wire.begin()
        await read_ahead(wire, 65536)
        assert wire.buffered == 65536
        received = b""
        while len(received) < 100_000:
            received += await wire.take(1000)
        assert received == BYTES[:100_000]

    asyncio.run(on_a_wire(talk))


async def on_a_wire(talk: Callable[[socket.socket, LoopWire], Coroutine[Any, Any, None]]) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.setblocking(False)
        wire = LoopWire(theirs, 65536, Trace)
        await talk(ours, wire)
        wire.close()


# --- processes ---


@pytest.mark.parametrize("model", MODELS)
def test_sigterm_leaves_no_process_and_no_temporary_file(tmp_path: Path, model: str) -> None:
    with running(tmp_path / "root", "--model", model, "--workers", "3") as bucket:
        children = children_of(bucket, 3 if model == "prefork" else 0)
        headers = upload_headers(BYTES) | {"Content-Length": str(len(BYTES))}
        with bucket.connect() as uploading, bucket.connect() as idle:
            uploading.sendall(head_text("PUT", "/v1/b/a", headers) + BYTES[:1000])
            wait_until(lambda: model == BUFFERING or len(bucket.temporary()) == 1)
            began = time.monotonic()
            bucket.process.terminate()
            assert bucket.process.wait(20) == 0
            assert time.monotonic() - began < 2.5
            assert idle.recv(1) == b""
        assert bucket.temporary() == []
        assert not any(child.is_running() for child in children)


def children_of(bucket: Bucket, count: int) -> list[psutil.Process]:
    master = psutil.Process(bucket.process.pid)
    wait_until(lambda: len(master.children()) == count)
    return list(master.children())


@pytest.mark.parametrize("arguments", [*(("--model", model) for model in MODELS), ("--model", "asyncio", "--sendfile")])
def test_a_download_in_progress_survives_sigterm(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    data = os.urandom(8 << 20)
    with running(tmp_path / "root", *arguments) as bucket:
        put(bucket, "/v1/b/a", data)
        with bucket.connect() as sock:
            sock.sendall(head_text("GET", "/v1/b/a?version=1.0", {}))
            received = sock.recv(65536)
            bucket.process.terminate()
            time.sleep(0.2)
            while part := sock.recv(1 << 20):
                received += part
    assert received.endswith(data)


def test_workers_end_with_a_killed_master(tmp_path: Path) -> None:
    with running(tmp_path / "root", "--model", "prefork", "--workers", "3") as bucket:
        children = children_of(bucket, 3)
        headers = upload_headers(BYTES) | {"Content-Length": str(len(BYTES))}
        with bucket.connect() as uploading:
            uploading.sendall(head_text("PUT", "/v1/b/a", headers) + BYTES[:1000])
            wait_until(lambda: len(bucket.temporary()) == 1)
            bucket.process.kill()
            assert psutil.wait_procs(children, 10)[1] == []
    assert bucket.temporary() == []


def test_dead_workers_are_replaced(tmp_path: Path) -> None:
    with running(tmp_path / "root", "--model", "prefork", "--workers", "2") as bucket:
        before = children_of(bucket, 2)
        for child in before:
            child.kill()
        wait_until(lambda: not set(before) & set(children_of(bucket, 2)))
        assert bucket.call("GET", "/").status == 404


@pytest.mark.parametrize("metadata", ["json", "sqlite"])
@pytest.mark.parametrize("model", MODELS)
def test_a_server_in_another_model_still_has_its_artifacts(tmp_path: Path, metadata: str, model: str) -> None:
    with running(tmp_path / "root", "--metadata", metadata) as bucket:
        put(bucket, "/v1/b/a")
    with running(tmp_path / "root", "--metadata", metadata, "--model", model, "--workers", "1") as bucket:
        assert bucket.call("GET", "/v1/b/a?version=1.0").body == BYTES
        assert put(bucket, "/v1/b/a").status == 200


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--port", "99999", "--root", "/tmp/x"], 2, "choose another --port"),
        (["--port", "0", "--root", "/proc/nothing"], 2, "choose another --root"),
        (["--port", "0"], 2, "--root"),
    ],
)
def test_errors_for_people(arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "bucketprobe.demo.bucket", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --- the parts ---


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters='/\\:*?"<>|'), min_size=1, max_size=100), unique=True))
def test_file_names_are_safe_and_different(texts: list[str]) -> None:
    names = [file_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert len(name.encode()) <= 200
        assert "/" not in name
        assert "\0" not in name
        assert name not in ("", ".", "..")


def test_folders_stay_below_the_root() -> None:
    folders = {folder_of(Path("/r"), bucket, artifact) for bucket in (".", "..", "a") for artifact in (".", "..", "a")}
    assert len(folders) == 9
    for folder in folders:
        assert os.path.normpath(folder) == folder
        assert folder.count("/") == 3


def test_verification_removes_a_file_that_differs(tmp_path: Path) -> None:
    store = Store(tmp_path, Here(), metadata="json", verify=True, chunk_size=65536)
    path = tmp_path / "data" / "file"
    path.write_bytes(b"right")
    complete(store.verify(str(path), digest_of(b"right"), Trace()))
    with pytest.raises(Problem) as caught:
        complete(store.verify(str(path), digest_of(b"wrong"), Trace()))
    assert (caught.value.status, caught.value.code) == (500, "post_storage_mismatch")
    assert not path.exists()

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bucketprobe import web
from bucketprobe.errors import UsageError
from bucketprobe.web import MAX_CLIENTS, WebServer, open_listener


class Agent:
    """What the server is given, to be changed by a test."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = [b"one 1\n", b"two 2\n"]
        self.reason: str | None = None
        self.now = 100.0
        self.told: list[str] = []
        self.fail_after: int | None = None
        self.gate = threading.Event()
        self.gate.set()

    def metrics(self) -> Iterator[bytes]:
        for number, piece in enumerate(self.pieces):
            if number == self.fail_after:
                raise ValueError("broken")
            yield piece
        self.gate.wait(30)

    def ready(self) -> str | None:
        if self.reason == "raise":
            raise KeyError("x")
        return self.reason


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def server(agent) -> Iterator[WebServer]:
    server = WebServer(open_listener("127.0.0.1:0"), agent.metrics, "text/x-test", agent.ready, agent.told.append, clock=lambda: agent.now)
    server.start()
    yield server
    agent.gate.set()
    server.stop()


def ask(server: WebServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    client = http.client.HTTPConnection(*server.address, timeout=10)
    try:
        client.request(method, path, headers=headers)
        answer = client.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        client.close()


def raw(server: WebServer, data: bytes) -> bytes:
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def test_metrics_are_streamed(server) -> None:
    status, body, headers = ask(server, "/metrics?x=1")
    assert (status, body) == (200, b"one 1\ntwo 2\n")
    assert headers["Content-Type"] == "text/x-test"
    assert headers["Transfer-Encoding"] == "chunked"
    assert headers["Server"] == "bucketprobe"


def test_a_client_of_http_1_0_gets_plain_bytes(server) -> None:
    answer = raw(server, b"GET /metrics HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"chunked" not in head
    assert body == b"one 1\ntwo 2\n"


def test_healthz_follows_the_main_loop(server, agent) -> None:
    assert ask(server, "/healthz")[:2] == (200, b"ok\n")
    agent.now += 10
    assert ask(server, "/healthz")[0] == 200
    agent.now += 0.5
    status, body, _ = ask(server, "/healthz")
    assert (status, body.count(b"\n")) == (503, 1)
    server.beat()
    assert ask(server, "/healthz")[0] == 200


def test_readyz_says_why_not(server, agent) -> None:
    assert ask(server, "/readyz")[:2] == (200, b"ready\n")
    agent.reason = "No target process was found."
    assert ask(server, "/readyz")[:2] == (503, b"No target process was found.\n")
    agent.reason = "raise"
    assert ask(server, "/readyz")[0] == 503
    assert len(agent.told) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/secret", 404),
        ("POST", "/secret", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/", 405),
        ("EVIL", "/healthz", 405),
        ("HEAD", "/metrics", 200),
        ("HEAD", "/healthz", 200),
        ("HEAD", "/secret", 404),
    ],
)
def test_routes(server, method, path, status) -> None:
    got, body, headers = ask(server, path, method)
    assert got == status
    assert headers["Server"] == "bucketprobe"
    assert (headers.get("Allow") == "GET, HEAD") == (status == 405)
    assert b"secret" not in body
    assert b"EVIL" not in body
    assert bool(body) == (method != "HEAD")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"MARKER\r\n\r\n", 400),
        (b"GET /MARKER\r\n\r\n", 404),
        (b"GET / MARKER/9\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"MARKER a b c d HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"MARKER" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nMARKER: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"MARKER: a\r\n" * 200 + b"\r\n", 431),
        (b"GET /\xff\xfe\x00MARKER HTTP/1.1\r\n\r\n", 404),
    ],
)
def test_nothing_of_a_request_is_echoed(server, agent, capfd, data, status) -> None:
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(data)
        answer = b""
        try:
            while piece := client.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass  # bytes of an oversized request that were never read; the answer came before
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"MARKER" not in answer
    assert agent.told == []
    assert capfd.readouterr() == ("", "")


def test_silent_and_aborting_clients_cost_nothing_and_print_nothing(server, agent, capfd) -> None:
    agent.pieces = [b"x" * 1_000_000] * 20
    for data in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for _ in range(2 * MAX_CLIENTS):
            client = socket.create_connection(server.address, timeout=10)
            client.sendall(data)
            # Reset, not an orderly end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
    wait_until(lambda: not server._server._begun)
    agent.pieces = [b"fine 1\n"]
    assert ask(server, "/metrics")[:2] == (200, b"fine 1\n")
    assert agent.told == []
    assert capfd.readouterr() == ("", "")


def test_a_client_too_many_gets_503_and_a_place_comes_free_again(server, agent) -> None:
    agent.gate.clear()
    clients = []
    for _ in range(MAX_CLIENTS):
        client = socket.create_connection(server.address, timeout=10)
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert client.recv(5) == b"HTTP/"
        clients.append(client)
    assert ask(server, "/healthz")[:2] == (503, b"busy\n")
    threads = [thread for thread in threading.enumerate() if "process_request" in thread.name]
    assert len(threads) == MAX_CLIENTS
    agent.gate.set()
    wait_until(lambda: not server._server._begun)
    assert ask(server, "/healthz")[0] == 200
    for client in clients:
        client.close()


def test_a_dripping_client_is_cut_at_the_deadline(server, agent) -> None:
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(b"GET /metr")
        wait_until(lambda: server._server._begun)
        agent.now += 4.9
        time.sleep(2 * web._POLL_SECONDS)
        client.sendall(b"i")
        assert server._server._begun
        agent.now += 0.2
        client.settimeout(3)  # less than the timeout of a single call
        assert client.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_at_the_deadline(server, agent) -> None:
    agent.pieces = [b"x" * 1_000_000] * 50
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        wait_until(lambda: server._server._begun)
        agent.now += 5.1
        wait_until(lambda: not server._server._begun, seconds=3)  # less than the timeout of a single call
    assert agent.told == []


def test_a_scrape_that_fails_is_500_or_cut_short_and_told_once(server, agent) -> None:
    agent.fail_after = 0
    status, body, _ = ask(server, "/metrics")
    assert status == 500
    assert b"broken" not in body
    agent.fail_after = 1
    with pytest.raises(http.client.IncompleteRead):
        ask(server, "/metrics")
    assert len(agent.told) == 1
    assert "ValueError: broken" in agent.told[0]


def test_stop_frees_the_port_and_cuts_clients(agent) -> None:
    server = WebServer(open_listener("127.0.0.1:0"), agent.metrics, "t", agent.ready, agent.told.append)
    server.start()
    host, port = server.address
    client = socket.create_connection((host, port), timeout=10)
    wait_until(lambda: server._server._begun)
    server.stop()
    assert client.recv(1) == b""
    client.close()
    open_listener(f"{host}:{port}").close()


def test_stop_without_start(agent) -> None:
    WebServer(open_listener("127.0.0.1:0"), agent.metrics, "t", agent.ready, agent.told.append).stop()


def test_a_taken_port_is_one_sentence_that_names_the_option() -> None:
    with open_listener("127.0.0.1:0") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port} \(Address already in use\).*--listen"):
            open_listener(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "addr", ["", "9464", ":9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "h.example:1", "::1:9", "[::1]", "[1.2.3.4]:5", "1.2.3.4:²"]
)
def test_what_is_no_address(addr) -> None:
    with pytest.raises(UsageError, match="--listen"):
        open_listener(addr)


def test_localhost_and_ipv6() -> None:
    with open_listener("localhost:0") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    if socket.has_ipv6:
        with open_listener("[::1]:0") as listener:
            assert listener.getsockname()[0] == "::1"

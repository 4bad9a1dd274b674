# SPDX-License-Identifier: Apache-2.0
"""The agent's HTTP endpoint: /metrics, /healthz, /readyz and an index of them.

Nothing of a request is ever echoed or logged, so there is nothing to inject into. Each connection carries one request
and is closed: with few handler threads, one that idles between scrapes would keep another client out.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from typing import Any

from bucketprobe.errors import UsageError

#: Handler threads at once; a further connection is answered 503.
MAX_CLIENTS = 8
#: A whole exchange, from accept to the last byte sent, in seconds. A scrape takes about ten milliseconds.
EXCHANGE_SECONDS = 5.0
#: The main loop counts as alive for so long after its last beat, in seconds.
BEAT_SECONDS = 10.0

#: What serve_forever waits between looks at its clients' deadlines, in seconds.
_POLL_SECONDS = 0.5

_TEXT = "text/plain; charset=utf-8"
_INDEX = b"""bucketprobe

/metrics  Prometheus exposition
/healthz  the agent lives
/readyz   probes are attached and a target is present
"""
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 5\r\nConnection: close\r\n\r\nbusy\n"

_Address = tuple[str, int] | tuple[str, int, int, int]


def open_listener(addr: str) -> socket.socket:
    """A listening TCP socket on `IP:PORT` or `[IPv6]:PORT`; port 0 is any free one. Raises UsageError.

    Of names only `localhost` is known: this runs before privileges are dropped, when no resolver should be loaded.
    """
    family, address = _parse(addr)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MAX_CLIENTS * 2)
    except OSError as error:
        listener.close()
        raise UsageError(f"Cannot listen on {addr} ({error.strerror}); choose another address or port with --listen.") from error
    return listener


def _parse(addr: str) -> tuple[socket.AddressFamily, _Address]:
    host, _, port = addr.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError
        if bracketed:
            socket.inet_pton(socket.AF_INET6, host[1:-1])
            return socket.AF_INET6, (host[1:-1], int(port))
        host = "127.0.0.1" if host == "localhost" else host
        socket.inet_pton(socket.AF_INET, host)
    except (OSError, ValueError):
        raise UsageError(f"--listen {addr!r} is not an address; give IP:PORT, such as 127.0.0.1:9464 or [::1]:9464.") from None
    return socket.AF_INET, (host, int(port))


class WebServer:
    """Serves on `listener` in daemon threads, from `start` to `stop`.

    `metrics` gives the exposition's pieces, `content_type` says what they are. `why_not_ready` gives None when the agent
    is ready, else one sentence. The agent's main loop calls `beat`. `clock` is in seconds and monotonic. `log` gets one
    sentence when `metrics` starts to fail.
    """

    def __init__(
        self,
        listener: socket.socket,
        metrics: Callable[[], Iterable[bytes]],
        content_type: str,
        why_not_ready: Callable[[], str | None],
        log: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._why_not_ready = why_not_ready
        self._clock = clock
        self._log = log
        self._told = ""
        self._last_beat = clock()
        self.content_type = content_type
        self._server = _Server(listener, self, clock)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), name="bucketprobe-web", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: host and port."""
        host, port = self._server.socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Threads keep the privileges of the moment they start in: call it after privileges are dropped."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and close the listener; exchanges under way are cut."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.cut(older_than=0.0)

    def beat(self) -> None:
        """The main loop lives."""
        self._last_beat = self._clock()

    def health(self) -> tuple[HTTPStatus, bytes]:
        silent = self._clock() - self._last_beat
        if silent <= BEAT_SECONDS:
            return HTTPStatus.OK, b"ok\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, f"The agent's main loop has not run for {silent:.0f} s.\n".encode()

    def readiness(self) -> tuple[HTTPStatus, bytes]:
        try:
            reason = self._why_not_ready()
        except Exception as error:
            self.tell(error)
            reason = "The agent cannot tell whether it is ready."
        if reason is None:
            return HTTPStatus.OK, b"ready\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n".encode("utf-8", "replace")

    def scrape(self) -> Iterable[bytes]:
        """The exposition's pieces; raises what `metrics` raises, after telling it."""
        try:
            yield from self._metrics()
        except Exception as error:
            self.tell(error)
            raise

    def tell(self, error: BaseException) -> None:
        text = f"The HTTP endpoint failed to answer ({type(error).__name__}: {error}); please report it as a defect."
        if text != self._told:
            self._told = text
            self._log(text)


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, web: WebServer, clock: Callable[[], float]) -> None:
        BaseServer.__init__(self, listener.getsockname(), _Handler)
        # A client may be gone between select and accept, which must then not wait for the next one.
        listener.setblocking(False)
        self.socket = listener
        self.web = web
        self._clock = clock
        self._slots = threading.BoundedSemaphore(MAX_CLIENTS)
        self._begun: dict[socket.socket, float] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            _refuse(request)
            return
        self._begun[request] = self._clock()
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # No thread could be started: the host is out of them. Nobody is served, the agent goes on.
            self._release(request)
            _refuse(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._release(request)

    def _release(self, request: socket.socket) -> None:
        self._begun.pop(request, None)
        self._slots.release()

    def service_actions(self) -> None:
        self.cut(older_than=EXCHANGE_SECONDS)

    def cut(self, older_than: float) -> None:
        """End the exchanges that have lasted longer, in seconds. A timeout on each call would let a client drip for ever."""
        now = self._clock()
        for request, begun in list(self._begun.items()):
            if now - begun > older_than:
                _shut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A client that went away, or was too slow, is nobody's news.
        if error is not None and not isinstance(error, OSError):
            self.web.tell(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # A blocked call must end even if the thread that looks at deadlines is late.
    timeout = EXCHANGE_SECONDS
    disable_nagle_algorithm = True
    # Of a request line that says no version. HTTP/0.9, the base class's, would leave out the status line of the answer.
    default_request_version = "HTTP/1.0"

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.raw_requestline = self.rfile.readline(65537)
        if len(self.raw_requestline) > 65536:
            self.requestline = self.request_version = self.command = ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
        elif self.raw_requestline and self.parse_request():
            self._answer()

    def handle_expect_100(self) -> bool:
        """No request here has a body worth waiting for."""
        return True

    def _answer(self) -> None:
        web = self.server.web
        path = self.path.partition("?")[0]
        if path not in ("/", "/metrics", "/healthz", "/readyz"):
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        elif path == "/metrics":
            self._answer_metrics()
        elif path == "/healthz":
            self._send(*web.health())
        elif path == "/readyz":
            self._send(*web.readiness())
        else:
            self._send(HTTPStatus.OK, _INDEX)

    def _answer_metrics(self) -> None:
        pieces = iter(self.server.web.scrape())
        try:
            piece = next(pieces, b"")
        except Exception:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        chunked = self.request_version == "HTTP/1.1"
        self._send_head(HTTPStatus.OK, self.server.web.content_type, ("Transfer-Encoding", "chunked") if chunked else None)
        if self.command == "HEAD":
            return
        # A scrape that fails from here on ends without the last chunk, so that the client sees it was cut short.
        while piece:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            piece = next(pieces, b"")
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's texts quote the request; these do not."""
        status = HTTPStatus(code)
        self._send(status, f"{status.phrase}\n".encode())

    def _send(self, status: HTTPStatus, body: bytes) -> None:
        self._send_head(status, _TEXT, ("Content-Length", str(len(body))))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: HTTPStatus, content_type: str, length: tuple[str, str] | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if length:
            self.send_header(*length)
        self.end_headers()

    def version_string(self) -> str:
        return "bucketprobe"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _refuse(request: socket.socket) -> None:
    """Answer without waiting: this is the thread that accepts."""
    try:
        request.setblocking(False)
        # Closing with unread bytes would reset the connection and take the answer with it.
        request.send(_BUSY)
        request.shutdown(socket.SHUT_WR)
        request.recv(65536)
    except OSError:
        pass
    finally:
        request.close()


def _shut(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)

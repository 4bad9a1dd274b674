# SPDX-License-Identifier: Apache-2.0
"""The standard library's HTTP server, as people use it: buffered reads, an HTTP/1.0 or HTTP/1.1 answer in several writes.

    standard.py PORT BASE threading|forking HTTP/1.0|HTTP/1.1

PUT and GET of /NAME, stored below BASE/storage.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ForkingMixIn, ThreadingMixIn


class Handler(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with (root / self.path[1:]).open("wb") as file:
            file.write(body)
        self.answer(201, b"stored")

    def do_GET(self) -> None:
        with (root / self.path[1:]).open("rb") as file:
            self.answer(200, file.read())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if self.protocol_version == "HTTP/1.1":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Threading(ThreadingMixIn, HTTPServer):
    daemon_threads = True


class Forking(ForkingMixIn, HTTPServer):
    pass


if __name__ == "__main__":
    root = Path(sys.argv[2]) / "storage"
    Handler.protocol_version = sys.argv[4]
    server = (Forking if sys.argv[3] == "forking" else Threading)(("127.0.0.1", int(sys.argv[1])), Handler)
    print("listening", flush=True)
    server.serve_forever(0.05)

# SPDX-License-Identifier: Apache-2.0
"""A Bucket under waitress: its main thread receives and sends, and worker threads do what a request asks for.

waitress_app.py THREADS ROOT TRUTH
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import waitress
from store import CHUNK, Document, Problem, Store, TruthLog, Upload, Work, parse_path, say_listening

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], object]


class Bucket:
    """The WSGI application."""

    def __init__(self, root: Path, truth: TruthLog) -> None:
        self._store = Store(root)
        self._truth = truth

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        work = Work(environ.get("HTTP_X_REQUEST_ID"), environ["REQUEST_METHOD"], environ["PATH_INFO"])
        try:
            status, content = self._serve(environ, work)
        except Problem as problem:
            status, content = problem.status, problem.body
        if isinstance(content, bytes):
            respond(start_response, status, "application/json", len(content))
            work.bytes_out = len(content)
            self._truth.write(work.line(status))
            return [content]
        respond(start_response, status, "application/octet-stream", content["size_bytes"])
        return self._bytes(work, content)

    def _serve(self, environ: Environ, work: Work) -> tuple[int, bytes | Document]:
        """The status, and a body or the document whose bytes are the body. Raises Problem."""
        artifact, versions = parse_path(environ["PATH_INFO"])
        if versions:
            return 200, json.dumps({"versions": self._store.versions(work, *artifact)}).encode()
        if environ["REQUEST_METHOD"] == "PUT":
            status, document = self._put(environ, work, artifact)
            return status, json.dumps(document).encode()
        if environ["REQUEST_METHOD"] != "GET":
            raise Problem(405, "method_not_allowed")
        document, with_bytes = self._store.get(work, artifact, environ["QUERY_STRING"])
        return 200, document if with_bytes else json.dumps(document).encode()

    def _put(self, environ: Environ, work: Work, artifact: tuple[str, str]) -> tuple[int, Document]:
        headers = {name[5:].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
        with contextlib.closing(Upload(self._store, work, artifact, headers)) as upload:
            while part := environ["wsgi.input"].read(CHUNK):
                upload.write(part)
            return upload.finish()

    def _bytes(self, work: Work, document: Document) -> Iterator[bytes]:
        """An artifact's bytes; waitress closes this early where the client left."""
        outcome = "client_closed"
        try:
            for part in self._store.parts(work, document):
                yield part
                work.bytes_out += len(part)
            outcome = "complete"
        finally:
            self._truth.write(work.line(200, outcome))


def respond(start_response: StartResponse, status: int, content_type: str, length: int) -> None:
    start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", content_type), ("Content-Length", str(length))])


def main() -> None:
    threads, root, truth = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    # It warns of each request that waits for a thread, which under load is most of them.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # It ends the loop of `run`, which then lets the threads finish.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server = waitress.create_server(Bucket(root, TruthLog(truth)), host="127.0.0.1", port=0, threads=threads)
    say_listening(server.effective_port, "waitress")
    server.run()


if __name__ == "__main__":
    main()

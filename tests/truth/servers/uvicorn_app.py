# SPDX-License-Identifier: Apache-2.0
"""A Bucket under uvicorn, without a framework: one event loop, and file calls that block it.

uvicorn_app.py LOOP ROOT TRUTH [CHUNK]      LOOP: asyncio or uvloop; CHUNK: bytes that are hashed and written at a time
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from store import Document, Problem, Store, TruthLog, Upload, Work, parse_path, say_listening

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Left(Exception):
    """The client went away within its request. Within an answer uvicorn does not tell."""


class Bucket:
    """The ASGI application."""

    def __init__(self, root: Path, truth: TruthLog, chunk: int | None) -> None:
        self._store = Store(root, chunk)
        self._truth = truth

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        work = Work(headers.get("x-request-id"), scope["method"], scope["path"])
        exchange = Exchange(self._store, work, receive, send)
        try:
            await exchange.run(scope, headers)
        except Left:
            self._truth.write(work.line(None, "client_closed"))
        else:
            self._truth.write(work.line(exchange.status))


class Exchange:
    """One request and its answer. `status` is None until that has begun."""

    def __init__(self, store: Store, work: Work, receive: Receive, send: Send) -> None:
        self.status: int | None = None
        self._store = store
        self._work = work
        self._receive = receive
        self._send = send

    async def run(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        """Serve it. Raises Left."""
        try:
            artifact, versions = parse_path(scope["path"])
            if versions:
                await self._answer(200, {"versions": self._store.versions(self._work, *artifact)})
            elif scope["method"] == "PUT":
                await self._answer(*await self._put(Upload(self._store, self._work, artifact, headers)))
            elif scope["method"] == "GET":
                await self._get(artifact, scope["query_string"].decode())
            else:
                raise Problem(405, "method_not_allowed")
        except Problem as problem:
            await self._respond(problem.status, "application/json", len(problem.body))
            await self._part(problem.body, more=False)

    async def _put(self, upload: Upload) -> tuple[int, Document]:
        with contextlib.closing(upload):
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise Left
                upload.write(message.get("body", b""))
                more = message.get("more_body", False)
            return upload.finish()

    async def _get(self, artifact: tuple[str, str], query: str) -> None:
        document, with_bytes = self._store.get(self._work, artifact, query)
        if not with_bytes:
            await self._answer(200, document)
            return
        await self._respond(200, "application/octet-stream", document["size_bytes"])
        for part in self._store.parts(self._work, document):
            await self._part(part, more=True)
        await self._part(b"", more=False)

    async def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        await self._respond(status, "application/json", len(body))
        await self._part(body, more=False)

    async def _respond(self, status: int, content_type: str, length: int) -> None:
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(length).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self.status = status

    async def _part(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._work.bytes_out += len(body)


class Server(uvicorn.Server):
    """Says when it listens, and where."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        say_listening(sockets[0].getsockname()[1], f"uvicorn-{self.config.loop}")


def main() -> None:
    loop, root, truth = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    chunk = int(sys.argv[4]) if len(sys.argv) > 4 else None
    app = Bucket(root, TruthLog(truth), chunk)
    config = uvicorn.Config(app, loop=loop, http="httptools", interface="asgi3", lifespan="off", ws="none", log_level="warning")
    # asyncio turns Nagle's algorithm off only where the socket names its protocol, which create_server does not.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    Server(config).run([listener])


if __name__ == "__main__":
    main()

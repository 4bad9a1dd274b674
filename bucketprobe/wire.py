# SPDX-License-Identifier: Apache-2.0
"""Messages between agent and broker: JSON objects over a local datagram-preserving socket, with descriptors beside them."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

MAX_MESSAGE = 65_536
MAX_DESCRIPTORS = 32

Message = dict[str, Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    """Sends one message whole. Raises OSError where the other end is gone."""
    socket.send_fds(end, [json.dumps(message, separators=(",", ":")).encode()], list(descriptors))


def receive(end: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors (close on exec); None at the end. Raises BlockingIOError as the socket does."""
    data, descriptors, _, _ = socket.recv_fds(end, MAX_MESSAGE, MAX_DESCRIPTORS)
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return (json.loads(data), descriptors) if data else None

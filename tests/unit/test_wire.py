# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from bucketprobe import wire


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = wire.pair()
    with one, other:
        yield one, other


def test_a_message_comes_as_it_was_sent(ends) -> None:
    message = {"op": "files", "files": [[1 << 63, 3, "/a \udcff\u00fc\n", 0o2000]], "none": None, "flag": True}
    wire.send(ends[0], message)
    assert wire.receive(ends[1]) == (message, [])


def test_messages_stay_apart(ends) -> None:
    for number in range(5):
        wire.send(ends[0], {"n": number})
    assert [wire.receive(ends[1]) for _ in range(5)] == [({"n": number}, []) for number in range(5)]


def test_descriptors_come_along_and_are_closed_on_exec(ends, tmp_path) -> None:
    with open(tmp_path / "a", "w+b") as first, open(tmp_path / "b", "w+b") as second:
        wire.send(ends[0], {"op": "ready"}, (first.fileno(), second.fileno()))
        first.write(b"first")
    received = wire.receive(ends[1])
    assert received is not None
    message, descriptors = received
    assert message == {"op": "ready"}
    assert not any(os.get_inheritable(fd) for fd in descriptors)
    os.write(descriptors[0], b"!")
    assert (tmp_path / "a").read_bytes() == b"first!"
    for fd in descriptors:
        os.close(fd)


def test_the_end_of_the_other_side(ends) -> None:
    wire.send(ends[0], {"op": "last"})
    ends[0].close()
    assert wire.receive(ends[1]) == ({"op": "last"}, [])
    assert wire.receive(ends[1]) is None
    with pytest.raises(OSError, match=r".+"):
        wire.send(ends[1], {})


def test_nothing_there_is_said_as_the_socket_does(ends) -> None:
    ends[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        wire.receive(ends[1])


def test_the_largest_message_comes_whole(ends) -> None:
    message = {"text": "x" * (wire.MAX_MESSAGE - len('{"text":""}'))}
    wire.send(ends[0], message)
    assert wire.receive(ends[1]) == (message, [])

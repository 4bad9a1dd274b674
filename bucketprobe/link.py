# SPDX-License-Identifier: Apache-2.0
"""The agent's end of the socket to its broker. It is all that is loaded when the broker starts, so that both start at once."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections import deque

from bucketprobe import wire
from bucketprobe.config import Settings
from bucketprobe.errors import BucketprobeError, EnvironmentLack

#: How long the broker may take to attach: a cold compile on a slow machine.
ATTACH_SECONDS = 120.0

_ENDED = "The broker ended, and with it the probes: start bucketprobe again."


def log(text: str) -> None:
    """One line of the agent's own log."""
    sys.stderr.write(f"bucketprobe: {text}\n")
    sys.stderr.flush()


class BrokerLink:
    """Starts a broker and talks to it. Raises OSError where no process can be started."""

    def __init__(self, settings: Settings) -> None:
        self.socket, theirs = wire.pair()
        command = [sys.executable, "-I", "-m", "bucketprobe.broker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        wire.send(self.socket, settings.as_dict())
        self._waiting: deque[tuple[wire.Message, list[int]]] = deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    def tell(self, message: wire.Message) -> None:
        wire.send(self.socket, message)

    def ask(self, message: wire.Message) -> wire.Message:
        """Sends a question and waits for its answer, of the same `op`; what comes between is kept."""
        wire.send(self.socket, message)
        while True:
            received = wire.receive(self.socket)
            if received is None:
                raise BucketprobeError(_ENDED)
            if received[0]["op"] == message["op"]:
                return received[0]
            self._waiting.append(received)

    def messages(self) -> list[tuple[wire.Message, list[int]]]:
        """What has come, without waiting. Raises BucketprobeError where the broker is gone."""
        found = list(self._waiting)
        self._waiting.clear()
        while select.select([self.socket], [], [], 0)[0]:
            received = wire.receive(self.socket)
            if received is None:
                raise BucketprobeError(_ENDED)
            found.append(received)
        return found

    def await_ready(self) -> tuple[wire.Message, list[int]]:
        """The message that says that all is attached. Raises what the broker failed of."""
        deadline = time.monotonic() + ATTACH_SECONDS
        while select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            received = wire.receive(self.socket)
            if received is None:
                raise BucketprobeError("The broker ended before the probes were attached: run `bucketprobe doctor`.")
            message = received[0]
            if message["op"] == "ready":
                return received
            if message["op"] == "failed":
                error = EnvironmentLack(message["text"])
                error.exit_code = message["exit_code"]
                raise error
            if message["op"] == "log":
                log(message["text"])
            else:
                self._waiting.append(received)
        raise BucketprobeError(f"The probes were not attached within {ATTACH_SECONDS:.0f} s: run `bucketprobe doctor`.")

    def close(self) -> None:
        self.socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            log(f"the broker (pid {self._process.pid}) does not end; the probes go when it does")

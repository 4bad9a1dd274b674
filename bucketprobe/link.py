# SPDX-License-Identifier: Apache-2.0
"""The agent's end of the socket to its broker. It is all that is loaded when the broker starts, so that both start at once."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress

from bucketprobe import wire
from bucketprobe.config import Settings
from bucketprobe.errors import BucketprobeError, EnvironmentLack

#: How long the broker may take to attach: a cold compile on a slow machine.
ATTACH_SECONDS = 120.0

_ENDED = "The broker ended, and with it the probes: start bucketprobe again."


def log(text: str) -> None:
    """One line of the agent's own log. That nobody reads it is no reason to stop."""
    with suppress(OSError):
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
        # The loop hears and tells; a scrape, in a thread of its own, may ask. An answer must reach whoever asked.
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self.socket.fileno()

    def tell(self, message: wire.Message) -> None:
        """Sends a message. While there is no room for it, what the broker says is taken in: it may itself be waiting for room."""
        with self._lock:
            while not select.select([], [self.socket], [], 0)[1]:
                if select.select([self.socket], [self.socket], [])[0]:
                    self._waiting.append(self._receive())
            wire.send(self.socket, message)

    def ask(self, message: wire.Message) -> wire.Message:
        """Sends a question and waits for its answer, of the same `op`; what comes between is kept."""
        with self._lock:
            self.tell(message)
            while True:
                received = self._receive()
                if received[0]["op"] == message["op"]:
                    return received[0]
                self._waiting.append(received)

    def _receive(self) -> tuple[wire.Message, list[int]]:
        received = wire.receive(self.socket)
        if received is None:
            raise BucketprobeError(_ENDED)
        return received

    def messages(self) -> list[tuple[wire.Message, list[int]]]:
        """What has come, without waiting. Raises BucketprobeError where the broker is gone."""
        with self._lock:
            found = list(self._waiting)
            self._waiting.clear()
            while select.select([self.socket], [], [], 0)[0]:
                try:
                    found.append(self._receive())
                except BucketprobeError:
                    if found:
                        return found  # its last words first; the next call says that it is gone
                    raise
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
        self.socket.close()  # which ends it, unless it still compiles
        with suppress(PermissionError, ProcessLookupError):  # the agent may not, once it has given up its privileges
            self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            log(f"the broker (pid {self._process.pid}) does not end; the probes go when it does")

# SPDX-License-Identifier: Apache-2.0
"""Who makes the file calls of a request: the one place where the server's models differ in what they do with files.

Whatever may have to wait is a coroutine, so that it is written once for all models. Where every call blocks, nothing
in it ever waits, and `complete` runs it like a plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class Hands(Protocol):
    async def do(self, call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Make one call, and return what it returns. Raises what it raises."""
        ...

    def turn(self, number: int) -> AbstractAsyncContextManager[object]:
        """Held by one request of this process at a time, for each number below LOCK_STRIPES, while it waits for a file lock."""
        ...


class Here:
    """Every call at once, in the thread that asks for it."""

    async def do(self, call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        return call(*arguments)

    def turn(self, number: int) -> AbstractAsyncContextManager[object]:
        return nullcontext()  # the file lock itself is enough: it blocks nobody but the thread that waits for it


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run what never waits, because all its calls block. Raises what it raises."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a coroutine waited for an event loop where there is none")

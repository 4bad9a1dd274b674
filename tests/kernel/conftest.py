# SPDX-License-Identifier: Apache-2.0
"""Real probes on the running kernel: fixtures. These tests need root; what they share is in harness.py."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Agent, Scripted, Worker, free_port


@pytest.fixture(scope="session")
def cache_dir(session_base: Path) -> Path:
    """Compiled probes: one agent of the session compiles, the others load."""
    cache = session_base / "cache"
    Agent(session_base / "compile", cache, "--port", "1", ready=False).close()
    return cache


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder that the unprivileged agent may search; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="bucketprobe-test-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder for one test."""
    with folder() as path:
        yield path


@pytest.fixture(scope="session")
def session_base() -> Iterator[Path]:
    """A folder for what all tests share."""
    with folder() as path:
        for name in ("storage", "elsewhere"):
            (path / name).mkdir()
        yield path


@pytest.fixture
def start_agent(base: Path, cache_dir: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents that end with the test; each must end well if the test has not ended it."""
    agents: list[Agent] = []

    def start(*options: str, **how: object) -> Agent:
        agent = Agent(base / f"agent-{len(agents)}", cache_dir, *options, **how)  # type: ignore[arg-type]
        agents.append(agent)
        return agent

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture(scope="session")
def http_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def work_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def agent(session_base: Path, cache_dir: Path, http_port: int, work_port: int) -> Iterator[Agent]:
    """One agent for all tests that need nothing special of it. It observes both shared servers."""
    shared = Agent(
        session_base / "agent",
        cache_dir,
        *("--port", str(http_port), "--port", str(work_port)),
        *("--storage-root", str(session_base / "storage"), "--metadata", "*.meta"),
        ready=False,
    )
    yield shared
    shared.close()
    assert shared.duplicates() == []


@pytest.fixture(scope="session")
def scripted_servers() -> Iterator[list[Scripted]]:
    servers: list[Scripted] = []
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def scripted(agent: Agent, http_port: int, session_base: Path, scripted_servers: list[Scripted]) -> Scripted:
    """A server that does on each connection what the test tells it; another one where the last one is not idle, or was killed."""
    if not scripted_servers or not scripted_servers[-1].idle:
        for server in scripted_servers:
            server.kill()
        scripted_servers[:] = [Scripted(http_port, session_base)]
        agent.await_target(scripted_servers[0].pid)
    return scripted_servers[0]


@pytest.fixture(scope="session")
def worker(agent: Agent, work_port: int, session_base: Path) -> Iterator[Worker]:
    """A server that makes the system calls that a request's path names."""
    with Worker(work_port, session_base) as server:
        agent.await_target(server.pid)
        yield server


@pytest.fixture
def unique_id(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Request IDs that no other request of the session has."""
    numbers = itertools.count()
    name = request.node.name[:80]
    return lambda: f"{name}-{next(numbers)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.kernel)

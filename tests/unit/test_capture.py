# SPDX-License-Identifier: Apache-2.0
"""The breakdown's figures and drawing, and the control socket with real sockets and a clock of our own."""

from __future__ import annotations

import io
import json
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe import capture as module
from bucketprobe.capture import (
    LOCK_NAME,
    MAX_BUFFER,
    MAX_CLIENTS,
    MAX_MISMATCHED,
    SOCKET_NAME,
    ControlServer,
    Hashing,
    Look,
    NoAgent,
    WorkShare,
    capture,
    look_of,
    open_listener,
    render_json,
    render_slowest,
    render_table,
    status,
    summarise,
)
from bucketprobe.errors import AgentBusy, BucketprobeError, EnvironmentLack, UsageError
from bucketprobe.model import (
    DIGEST_SOURCES,
    EVIDENCE,
    GAPS,
    PHASES_AS_THEY_HAPPEN,
    Attribution,
    Digest,
    MismatchSource,
    Operation,
    Request,
    Share,
)


def finished(ms: float = 10.0, operation: Operation = "write", status: int | None = 201, **fields: Any) -> Request:
    phases = fields.pop("phases", {"storage_write": ms / 2, "other": ms / 2})
    return Request(
        id=fields.pop("id", "r"),
        conn="c",
        pid=1,
        wall_ns=0,
        start_ns=0,
        end_ns=round(ms * 1e6),
        operation=operation,
        outcome="complete",
        status=status,
        phases={name: round(value * 1e6) for name, value in phases.items()},
        **fields,
    )


# The figures.


def test_percentiles_are_nearest_rank() -> None:
    summary = summarise(finished(float(ms)).record() for ms in range(100, 0, -1))
    duration = summary.operations["write"].duration
    assert (duration.p50_ms, duration.p95_ms, duration.p99_ms, duration.total_ms, duration.share) == (50.0, 95.0, 99.0, 5050.0, 1.0)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(0, 20))
def test_percentiles_against_their_definition(values: list[int], absent: int) -> None:
    records = [finished(1000.0, phases={"queue": ns / 1e6}).record() for ns in values]
    records += [finished(1000.0, phases={"other": 1000.0}).record() for _ in range(absent)]
    spread = summarise(records).operations["write"].phases["queue"]
    everything = [ns / 1e6 for ns in values] + [0.0] * absent
    for percent, found in ((50, spread.p50_ms), (95, spread.p95_ms), (99, spread.p99_ms)):
        assert found == min(x for x in everything if sum(y <= x for y in everything) * 100 >= percent * len(everything))
    assert spread.requests == len(values)


def test_shares_of_the_phases_add_up_to_the_whole() -> None:
    phases = {"queue": 1.0, "storage_sync": 6.0, "other": 3.0}
    operation = summarise([finished(10.0, phases=phases).record(), finished(30.0, phases={"other": 30.0}).record()]).operations["write"]
    assert {name: spread.share for name, spread in operation.phases.items()} == pytest.approx(
        {"queue": 1 / 40, "storage_sync": 6 / 40, "other": 33 / 40}
    )
    assert list(operation.phases) == ["queue", "storage_sync", "other"]


def test_counts_and_the_slowest() -> None:
    requests = [
        finished(5.0, id="a"),
        finished(7.0, "read", 200, id="b"),
        finished(9.0, "other", None, id="c", lost_events=2),
        finished(7.0, id="d", attribution=Attribution("exact")),
    ]
    summary = summarise((request.record() for request in requests), slowest=2)
    assert summary.requests == 4
    assert {name: each.requests for name, each in summary.operations.items()} == {"write": 2, "read": 1, "other": 1}
    assert summary.statuses == {"200": 1, "201": 2, "unknown": 1}
    assert summary.outcomes == {"complete": 4}
    assert summary.labels == {"unattributed": 3, "exact": 1}
    assert summary.lost_events == 2
    assert [record["id"] for record in summary.slowest] == ["c", "b"]


def test_nothing_captured() -> None:
    summary = summarise([])
    assert render_table(summary, False, 80) == "0 requests\n"
    assert render_slowest(summary, False, 80) == ""
    assert json.loads(render_json(summary))["requests"] == 0


def test_a_request_of_no_duration_divides_nothing_by_zero() -> None:
    summary = summarise([finished(0.0, phases={"other": 0.0}).record()])
    assert summary.operations["write"].phases["other"].share == 0.0
    assert "0.0 %" in render_slowest(summary, False, 80)


def shared() -> Request:
    """A request that has a part of its file work in common with others, and was slow because of its client."""
    return finished(
        100.0,
        id="own",
        attribution=Attribution(
            "shared",
            ("path", "order"),
            candidates=("own", "a", "b"),
            by_label={"exact": Share(3 << 20, 30_000_000), "shared": Share(1 << 20, 10_000_000)},
        ),
        client_wait_ns=55_000_000,
        server_wait_ns=1_500_000,
        limited_by="client",
    )


def test_what_limited_the_requests_and_how_sure_their_file_work_is() -> None:
    own = finished(attribution=Attribution("exact", by_label={"exact": Share(4 << 20, 60_000_000)}), limited_by="storage")
    summary = summarise([shared().record(), own.record(), finished(operation="read").record()])
    assert summary.limited_by == {"client": 1, "storage": 1, "unknown": 1}
    assert summary.operations["write"].limited_by == {"client": 1, "storage": 1}
    assert summary.operations["read"].limited_by == {"unknown": 1}
    assert summary.work == {"exact": WorkShare(7 << 20, 90.0, 7 / 8, 0.9), "shared": WorkShare(1 << 20, 10.0, 1 / 8, 0.1)}
    assert sum(share.share_of_ms for share in summary.work.values()) == pytest.approx(1)
    text = render_table(summary, False, 100)
    assert "\n  limited by   client: 1, storage: 1, unknown: 1\n" in text
    assert "\nwrite, 2 requests\n  limited by   client: 1, storage: 1\n" in text
    assert "\nread, 1 request\n  phase " in text, "what is not known of any request is no line"
    assert "\n  file work    exact: 90.0 % of time and 87.5 % of bytes, shared: 10.0 % of time and 12.5 % of bytes\n" in text
    assert json.loads(render_json(summary))["work"]["shared"] == {
        "bytes": 1 << 20, "ms": 10.0, "share_of_bytes": 0.125, "share_of_ms": 0.1
    }  # fmt: skip


def test_a_phase_that_was_not_seen_is_no_zero() -> None:
    """Of four writes the probes could not see two: the percentiles are those of the other two, one of which wrote nothing."""
    records = [
        finished(phases={"storage_write": 8.0, "other": 2.0}).record(),
        finished(phases={"other": 10.0}).record(),
        *[finished(phases={"queue": 1.0, "other": 9.0}, coverage_gaps=("unseen", "io_uring")).record() for _ in range(2)],
    ]
    summary = summarise(records)
    phases = summary.operations["write"].phases
    assert (phases["storage_write"].requests, phases["storage_write"].p50_ms, phases["storage_write"].p95_ms) == (1, 0.0, 8.0)
    assert (phases["queue"].p50_ms, phases["queue"].p95_ms) == (0.0, 1.0), "what is no file work counts for all"
    assert summary.coverage_gaps == {"unseen": 2, "io_uring": 2}
    text = render_table(summary, False, 100)
    assert "  warning: file work by io_uring is not seen: storage time and file counts may lack it (2 requests)\n" in text
    assert "are left out of the storage and metadata phases that they lack" in text
    blind = summarise(records[2:])
    assert "storage_write" not in blind.operations["write"].phases
    assert "storage_write" not in render_table(blind, False, 100) + render_slowest(blind, False, 100)


def test_without_a_gap_there_is_no_warning() -> None:
    text = render_table(summarise(example()), False, 100) + render_slowest(summarise(example()), False, 100)
    assert "warning" not in text
    assert "left out" not in text


def test_every_evidence_and_every_gap_has_its_words() -> None:
    assert module._EVIDENCE_WORDS.keys() == set(EVIDENCE)
    assert module._GAP_WORDS.keys() == set(GAPS)


def test_records_of_an_earlier_agent_are_summed_up_as_well() -> None:
    record = finished().record()
    for name in ("client_wait_ms", "server_wait_ms", "limited_by", "coverage_gaps", "digest"):
        del record[name]
    record["attribution"] = {"label": "exact", "evidence": ["thread"], "unattributed_bytes": 0}
    summary = summarise([record])
    assert (summary.limited_by, summary.work, summary.coverage_gaps) == ({"unknown": 1}, {}, {})
    assert (summary.digests.compared, summary.operations["write"].hashing) == ({}, None)
    assert summary.slowest == [record], "records pass through as they came"
    assert "client wait unknown" in render_slowest(summary, False, 100)


# Digests.

DECLARED, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FITS = Digest("exact", 2.0, 2_000_000, 1 << 20, DECLARED, DECLARED, "thread", "match")
#: The client's bytes are not those that it declared; the first is noticed by nobody but us.
HIDDEN = Digest("gap", 10.0, 6_000_000, 2 << 20, DECLARED, OTHER, "thread", "mismatch", "computed")
REFUSED = Digest(declared=DECLARED, mismatch="answer")
ROTTEN = Digest(declared=DECLARED, computed=DECLARED, result="match", verified=("match", "mismatch"))


def drawn(*requests: Request, unicode: bool = True) -> tuple[str, str]:
    summary = summarise([request.record() for request in requests])
    return render_table(summary, False, 100, unicode), render_slowest(summary, False, 100, unicode)


def test_how_fast_the_bytes_were_hashed() -> None:
    unknown, no_bytes = Digest(declared=DECLARED), Digest("model", 20.0, 1_000_000)
    records = [finished(operation="write", digest=each).record() for each in (FITS, HIDDEN, REFUSED, unknown, no_bytes)]
    summary = summarise([*records, finished(operation="read").record()])
    hashing = summary.operations["write"].hashing
    assert hashing == Hashing({"exact": 1, "gap": 1, "model": 1}, 9.0, pytest.approx(0.84 / 9 * 100), 3 << 20, round((3 << 20) / 8e-3))
    assert list(hashing.sources) == ["exact", "gap", "model"]
    assert summary.operations["read"].hashing is None
    text = render_table(summary, False, 100)
    assert "\n  hashing      3.000 ms of CPU a request ±9.3 % at 393 MB/s; known of 3 requests (exact: 1, gap: 1, model: 1)\n" in text
    assert text.count("hashing") == 1
    assert json.loads(render_json(summary))["operations"]["write"]["hashing"]["bytes"] == 3 << 20


def test_a_time_of_hashing_that_is_not_known_is_no_zero() -> None:
    """Of four writes two are not known, and one was hashed in no time that could be measured."""
    known = finished(phases={"digest": 4.0, "other": 6.0}, digest=FITS)
    quick = finished(phases={"other": 10.0}, digest=Digest("exact", 2.0, 0, 5))
    unknown = finished(phases={"other": 10.0}, digest=Digest(declared=DECLARED))
    phase = summarise(each.record() for each in (known, quick, unknown, unknown)).operations["write"].phases["digest"]
    assert (phase.requests, phase.p50_ms, phase.p95_ms) == (1, 0.0, 4.0)
    note = "Requests whose time of hashing is not known are left out of the phase digest.\n"
    assert drawn(known, unknown)[0].endswith(note)
    for requests in ((known, quick), (unknown, unknown), (known, finished(operation="read"))):
        assert note not in drawn(*requests)[0]


def test_a_hash_of_no_bytes_and_no_time_divides_nothing_by_zero() -> None:
    text = "".join(drawn(finished(digest=Digest("exact", 2.0, 0, 0)), finished(digest=Digest("exact", None, 5, 0))))
    assert "0.000 ms of CPU" in text


def test_whether_digests_fit() -> None:
    requests = [
        finished(1.0, digest=FITS),
        finished(2.0, status=400, id="refused", digest=REFUSED),
        finished(3.0, status=201, id="hidden", artifact_id="weights", digest=HIDDEN),
        finished(4.0, "read", 200, id="rotten", digest=ROTTEN),
        finished(5.0, digest=Digest(declared=DECLARED)),
        finished(6.0),
    ]
    summary = summarise(request.record() for request in requests)
    found = summary.digests
    assert (found.compared, found.mismatches, found.accepted, found.verified) == (
        {"match": 2, "unknown": 2, "mismatch": 1},
        {"computed": 1, "answer": 1},
        1,
        {"match": 1, "mismatch": 1},
    )
    assert [record["id"] for record in found.mismatched] == ["hidden", "rotten", "refused"], "first those that nobody else noticed"
    text, _ = drawn(*requests)
    assert "\n  digests      match: 2, not compared: 2, mismatch: 1\n" in text
    assert "\n  read back    match: 1, mismatch: 1\n" in text
    said = "(by the service's answer: 1, by the computed digest: 1; answered with success all the same: 1)"
    assert f"\n  DIGEST MISMATCH in 2 requests {said}\n" in text
    assert "\n  STORED BYTES DIFFER: 1 of the digests over what was read back\n" in text
    listed = re.findall(r"^    (\S+Z  .*)$", text, re.M)
    assert listed == [
        "1970-01-01T00:00:00.000000Z  write  status 201 although it does not fit  id hidden  (artifact weights)",
        "1970-01-01T00:00:00.000000Z  read  status 200  id rotten",
        "1970-01-01T00:00:00.000000Z  write  status 400  id refused",
    ]


def test_many_mismatches_do_not_fill_the_screen_and_hide_no_accepted_one() -> None:
    requests = [finished(status=400, id=f"refused {number}", digest=REFUSED) for number in range(MAX_MISMATCHED + 5)]
    summary = summarise(request.record() for request in (*requests, finished(id="hidden", digest=HIDDEN)))
    assert summary.digests.mismatches == {"answer": MAX_MISMATCHED + 5, "computed": 1}
    assert len(summary.digests.mismatched) == MAX_MISMATCHED
    assert summary.digests.mismatched[0]["id"] == "hidden"
    text = render_table(summary, False, 100)
    assert len(re.findall(r"^    \S+Z ", text, re.M)) == 5
    assert "    and more: see the records" in text


def test_one_requests_digest() -> None:
    _, text = drawn(finished(digest=FITS))
    assert "   digest: 2.000 ms of CPU ±2.0 %, each call measured; 1.0 MiB at 524 MB/s; matches the declared one\n" in text
    _, text = drawn(finished(digest=Digest("model", 10.0, 2_000_000, declared=DECLARED)))
    assert "   digest: 2.000 ms of CPU ±10.0 %, from its bytes; not compared with the declared one\n" in text
    _, text = drawn(finished(digest=ROTTEN))
    assert "   digest: matches the declared one; read back: match, mismatch\n" in text
    assert "   STORED BYTES DIFFER: what was read back from storage has another digest\n" in text


def test_a_mismatch_of_one_request_stands_out_in_words() -> None:
    _, text = drawn(finished(digest=HIDDEN))
    assert "   DIGEST MISMATCH, by the computed digest, and the service answered with success\n" in text
    assert f"     declared {DECLARED}\n     computed {OTHER}\n" in text
    _, text = drawn(finished(status=400, digest=REFUSED))
    assert "   DIGEST MISMATCH, by the service's answer\n" in text
    assert "     computed not seen\n" in text


def test_where_nothing_is_known_of_digests_nothing_is_said() -> None:
    for digest in (Digest(), Digest(declared=DECLARED)):
        text = "".join(drawn(finished(digest=digest)))
        assert "hashing" not in text
        assert "MISMATCH" not in text
        assert "digest:" not in text
    assert "digests" not in "".join(drawn(finished()))


def test_digests_in_ascii_and_colour() -> None:
    assert "".join(drawn(finished(digest=HIDDEN), finished(digest=FITS), unicode=False)).isascii()
    summary = summarise([finished(digest=HIDDEN).record()])
    for render in (render_table, render_slowest):
        coloured = render(summary, color=True, width=100)
        assert re.search(r"\x1b\[31m *DIGEST MISMATCH", coloured)
        assert re.sub(r"\x1b\[\d+m", "", coloured) == render(summary, color=False, width=100)


def test_every_source_has_its_words() -> None:
    assert module._SOURCE_WORDS.keys() == set(DIGEST_SOURCES)
    assert module._MISMATCH_WORDS.keys() == set(get_args(MismatchSource))


# The drawing.


def example() -> list[dict[str, Any]]:
    slow = finished(
        200.0,
        id="slow",
        method="PUT",
        route="/v1/{bucket_id}/{artifact_id}",
        bucket_id="models",
        artifact_id="llama",
        version="1.0",
        bytes_in=3 << 20,
        phases={"queue": 50.0, "storage_sync": 100.0, "network_send": 0.001, "other": 49.999},
        attribution=Attribution("inferred", ("thread", "window"), 4096),
        lost_events=1,
    )
    return [slow.record(), finished(1.0).record(), finished(2.0, "read", None).record()]


def test_the_table_lines_up_and_names_its_units() -> None:
    lines = render_table(summarise(example()), color=False, width=100).splitlines()
    assert lines[0] == "3 requests"
    assert "  status       201: 2, unknown: 1" in lines
    assert "  1 event lost: the counts of some requests are lower bounds" in lines
    head = next(line for line in lines if "p50 ms" in line)
    row = next(line for line in lines if "storage_sync" in line)
    for column, figure in (("p50 ms", "0.000"), ("p95 ms", "100.000"), ("share", "49.8 %")):
        end = head.index(column) + len(column)
        assert row[:end].endswith(figure)
    assert "nearest-rank" in lines[-1]


def test_who_else_may_have_done_the_work() -> None:
    text = render_slowest(summarise([shared().record()]), color=False, width=100)
    assert "   client wait 55.000 ms, server wait 1.500 ms; limited by: client\n" in text
    assert "   file work: shared, by names in the path; the order of the requests (a guess)\n" in text
    assert "     of it exact 3.0 MiB in 30.000 ms, shared 1.0 MiB in 10.000 ms\n" in text
    assert "     shared with 2 requests: a, b\n" in text
    many = shared()
    many.attribution.candidates = (*(f"r{number}" for number in range(9)), "own")
    text = render_slowest(summarise([many.record()]), color=False, width=100)
    assert "     shared with 9 requests: r0, r1, r2, r3 and 5 more\n" in text
    alone = finished(attribution=Attribution("exact", ("thread",), by_label={"exact": Share(5, 6)}))
    text = render_slowest(summarise([alone.record()]), color=False, width=100)
    assert "of it" not in text
    assert "shared with" not in text


def bars(text: str) -> dict[str, tuple[int, int]]:
    """Each phase's bar as (first column, column after the last)."""
    found = {}
    for line in text.splitlines():
        match = re.match(r" +(\w+) +[\d.]+ ms +[\d.]+ %  ( *)([█#]+)$", line)
        if match:
            found[match[1]] = (len(match[2]), len(match[2]) + len(match[3]))
    return found


def test_the_slowest_request_as_steps() -> None:
    text = render_slowest(summarise(example(), slowest=1), color=False, width=85)
    assert "1. write  status 201  complete  200.000 ms" in text
    assert "PUT /v1/{bucket_id}/{artifact_id}  (bucket models, artifact llama, version 1.0)" in text
    assert "in 3.0 MiB, out unknown" in text
    assert "   file work: inferred, by its thread, which served it alone; no other request in flight\n" in text
    assert "     4.0 KiB meanwhile tied to no request\n" in text
    assert "client wait unknown, server wait unknown; limited by: unknown" in text
    assert "lower bounds" in text
    assert "do not show when each one ran" in text
    assert bars(text) == {"queue": (0, 10), "storage_sync": (10, 29), "network_send": (29, 30), "other": (29, 39)}


@given(
    st.dictionaries(st.sampled_from(PHASES_AS_THEY_HAPPEN), st.floats(0.001, 1000), min_size=1),
    st.integers(1, 200),
)
def test_bars_stay_in_their_room_and_show_every_phase(phases: dict[str, float], width: int) -> None:
    request = finished(sum(phases.values()), phases=phases)
    text = render_slowest(summarise([request.record()]), color=False, width=width)
    found = bars(text)
    assert found.keys() == phases.keys()
    assert all(0 <= first < end <= max(width - 46, 10) for first, end in found.values())


def test_colour_only_adds_to_what_is_there() -> None:
    summary = summarise(example())
    for render in (render_table, render_slowest):
        plain = render(summary, color=False, width=100)
        colored = render(summary, color=True, width=100)
        assert "\x1b" not in plain
        assert "\x1b" in colored
        assert re.sub(r"\x1b\[\d+m", "", colored) == plain


def test_ascii_where_the_output_has_nothing_else() -> None:
    summary = summarise(example())
    for render in (render_table, render_slowest):
        text = render(summary, False, 100, unicode=False)
        assert text.isascii()
        assert "#" in text


def test_a_record_cannot_steer_the_terminal() -> None:
    record = finished(1.0).record() | {"request_id": "a\x1b[2Jb\nc", "outcome": "\x1b]0;x\x07"}
    text = render_table(summarise([record]), False, 100) + render_slowest(summarise([record]), False, 100)
    assert "a?[2Jb?c" in text
    assert "\x1b" not in text


class Terminal(io.StringIO):
    encoding = "UTF-8"

    def isatty(self) -> bool:
        return True


def test_what_an_output_can_show() -> None:
    assert look_of(Terminal(), {}) == Look(color=True, width=100, unicode=True)
    assert look_of(Terminal(), {"NO_COLOR": "1"}).color is False
    assert look_of(Terminal(), {"TERM": "dumb"}).color is False
    pipe = io.TextIOWrapper(io.BytesIO(), "ascii")
    assert look_of(pipe, {}) == Look(color=False, width=100, unicode=False)


# The control socket. `Agent` stands for the agent's loop: it runs the server until nothing is left to do.


class Agent:
    def __init__(self, run_dir: Path) -> None:
        self.listener = open_listener(run_dir, os.geteuid())
        self.lost = {"ring": 5}
        self.server = ControlServer(self.listener.socket, lambda: {"pid": 42}, lambda: self.lost)
        self.run_dir = run_dir
        self.now = 1000.0
        self.closed = False

    def turn(self) -> None:
        while select.select([self.server], [], [], 0)[0]:
            self.server.on_readable(self.now)

    def ask(self, text: str | bytes) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(str(self.run_dir / SOCKET_NAME))
        client.sendall(text if isinstance(text, bytes) else text.encode())
        self.turn()
        return client

    def capture(self, duration: float = 10, min_ms: float = 0) -> socket.socket:
        return self.ask(json.dumps({"capture": {"duration": duration, "min_ms": min_ms}}) + "\n")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.server.close()
            self.listener.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def agent(run_dir: Path) -> Iterator[Agent]:
    agent = Agent(run_dir)
    yield agent
    agent.close()


def answers(client: socket.socket) -> list[dict[str, Any]]:
    """All that came until the agent closed; where it left something unread, the kernel says so by a reset."""
    data = b""
    with suppress(ConnectionResetError):
        while more := client.recv(1 << 16):
            data += more
    return [json.loads(line) for line in data.splitlines()]


def drain(client: socket.socket) -> bytes:
    client.setblocking(False)
    data = b""
    with suppress(BlockingIOError):
        while more := client.recv(1 << 20):
            data += more
    return data


def test_a_capture_streams_what_it_was_asked_for(agent: Agent) -> None:
    agent.server.offer(finished(id="before"))
    client = agent.capture(duration=10, min_ms=5)
    agent.server.offer(finished(4.9, id="fast"))
    agent.server.offer(finished(5.0, id="slow"))
    agent.turn()
    assert json.loads(client.recv(1 << 16))["id"] == "slow"
    agent.lost = {"ring": 7, "queue": 1}
    agent.now += 9.9
    agent.server.on_timer(agent.now)
    agent.server.offer(finished(6.0, id="last"))
    agent.now += 0.1
    agent.server.on_timer(agent.now)
    agent.server.offer(finished(6.0, id="after"))
    records = answers(client)
    assert [record.get("id") for record in records] == ["last", None]
    assert records[-1] == {"end": {"seen": 3, "sent": 2, "faster": 1, "dropped": 0, "lost": {"ring": 2, "queue": 1}}}


def test_a_client_that_does_not_read_costs_a_bounded_buffer(agent: Agent) -> None:
    client = agent.capture()
    size = len(json.dumps(finished().record(), separators=(",", ":"))) + 1
    for number in range(3 * MAX_BUFFER // size):
        agent.server.offer(finished())
        if number % 100 == 0:
            agent.turn()
    [held] = agent.server._clients.values()
    assert len(held.answer) <= MAX_BUFFER
    agent.server.on_timer(agent.now + 10)
    data = drain(client)
    while select.select([agent.server], [], [], 0)[0]:
        agent.turn()
        data += drain(client)
    *records, end = [json.loads(line) for line in data.splitlines()]
    account = end["end"]
    assert account["dropped"] > 0
    assert account["sent"] == len(records)
    assert account["seen"] == account["sent"] + account["faster"] + account["dropped"] == 3 * MAX_BUFFER // size


def test_a_client_that_never_reads_is_left_after_a_while(agent: Agent) -> None:
    client = agent.capture()
    for _ in range(2000):
        agent.server.offer(finished())
    agent.turn()
    agent.server.on_timer(agent.now + 10)
    assert agent.server._clients
    agent.server.on_timer(agent.now + 16)
    assert not agent.server._clients
    client.close()


def test_one_capture_at_a_time(agent: Agent) -> None:
    first = agent.capture(duration=60)
    [refusal] = answers(agent.capture())
    assert refusal == {"error": "Another capture runs for 60 more seconds: try again then."}
    first.close()
    agent.turn()
    third = agent.capture()
    agent.server.offer(finished(id="third"))
    agent.turn()
    assert json.loads(third.recv(1 << 16))["id"] == "third"


def test_a_client_that_leaves_costs_nothing_more(agent: Agent) -> None:
    agent.capture().close()
    agent.server.offer(finished())
    agent.turn()
    assert not agent.server._clients
    agent.server.offer(finished())
    assert not select.select([agent.server], [], [], 0)[0]


def test_a_client_that_has_said_all_is_still_served(agent: Agent) -> None:
    client = agent.capture()
    client.shutdown(socket.SHUT_WR)
    agent.turn()
    assert not select.select([agent.server], [], [], 0)[0], "its end of input keeps the loop awake"
    agent.server.offer(finished(id="x"))
    agent.turn()
    assert json.loads(client.recv(1 << 16))["id"] == "x"


def test_closing_ends_the_capture(agent: Agent) -> None:
    client = agent.capture()
    agent.server.offer(finished(id="x"))
    agent.close()
    assert [record.get("id", "end") for record in answers(client)] == ["x", "end"]


@pytest.mark.parametrize(
    "line",
    [
        '{"capture": {"duration": 0, "min_ms": 0}}',
        '{"capture": {"duration": 3601, "min_ms": 0}}',
        '{"capture": {"duration": true, "min_ms": 0}}',
        '{"capture": {"duration": "1", "min_ms": 0}}',
        '{"capture": {"duration": 1, "min_ms": -1}}',
        '{"capture": {"duration": 1, "min_ms": null}}',
        '{"capture": {"duration": 1e999, "min_ms": 0}}',
        '{"capture": {"duration": 1}}',
        '{"capture": 1}',
        '{"open": "/etc/passwd"}',
        "[]",
        "[" * 1000,
        "not json",
        "",
        "\x00\xff",
        "x" * 2000,
    ],
)
def test_a_wrong_request_is_told_so(agent: Agent, line: str) -> None:
    [answer] = answers(agent.ask(line.encode("latin-1") + b"\n"))
    assert answer.keys() == {"error"}
    assert answer["error"].endswith(".")
    assert agent.server._capture is None


def test_a_request_may_come_in_pieces(agent: Agent) -> None:
    client = agent.ask('{"sta')
    client.sendall(b'tus": {}}\n')
    agent.turn()
    assert answers(client) == [{"pid": 42}]


def test_a_client_that_asks_nothing_is_left(agent: Agent) -> None:
    client = agent.ask("")
    agent.server.on_timer(agent.now + 4)
    assert agent.server._clients
    agent.server.on_timer(agent.now + 5)
    assert not agent.server._clients
    assert client.recv(1) == b""


def test_more_clients_than_there_are_places(agent: Agent) -> None:
    held = [agent.ask("") for _ in range(MAX_CLIENTS)]
    [answer] = answers(agent.ask(""))
    assert "try again" in answer["error"]
    for client in held:
        client.close()
    agent.turn()
    assert answers(agent.ask('{"status": {}}\n')) == [{"pid": 42}]


def test_another_user_is_refused(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_peer_uid", lambda connection: 4242 + os.geteuid())
    [answer] = answers(agent.ask(""))
    assert f"uid {4242 + os.geteuid()} may not ask" in answer["error"]
    assert not agent.server._clients


def test_the_peers_uid_is_the_kernels_word() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert module._peer_uid(here) == os.geteuid()


# The run directory and the rule of one agent.


def test_the_run_directory(run_dir: Path) -> None:
    listener = open_listener(run_dir, os.geteuid())
    assert run_dir.stat().st_mode & 0o777 == 0o755
    assert (run_dir / SOCKET_NAME).stat().st_mode & 0o777 == 0o660
    assert (run_dir / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    listener.close()
    assert not (run_dir / SOCKET_NAME).exists()


def test_a_second_agent_is_told_the_first_ones_pid(agent: Agent, run_dir: Path) -> None:
    with pytest.raises(AgentBusy, match=rf"\(pid {os.getpid()}\)"):
        open_listener(run_dir, os.geteuid())
    assert answers(agent.ask('{"status": {}}\n')) == [{"pid": 42}]


def test_a_killed_agents_socket_is_replaced(run_dir: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            open_listener(run_dir, os.geteuid())
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (run_dir / SOCKET_NAME).exists()
    with pytest.raises(NoAgent):
        status(run_dir)
    listener = open_listener(run_dir, os.geteuid())
    assert (run_dir / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    listener.close()


def test_a_run_directory_that_is_not_ours(run_dir: Path, tmp_path: Path) -> None:
    run_dir.symlink_to(tmp_path)
    with pytest.raises(EnvironmentLack, match="another run directory"):
        open_listener(run_dir, os.geteuid())
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentLack, match="another run directory"):
        open_listener(tmp_path / "file", os.geteuid())
    with pytest.raises(EnvironmentLack, match="holds other files"):
        open_listener(tmp_path, os.geteuid() + 1)


def test_a_link_in_the_place_of_the_lock_is_not_followed(run_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    run_dir.mkdir()
    (run_dir / LOCK_NAME).symlink_to(precious)
    with pytest.raises(EnvironmentLack):
        open_listener(run_dir, os.geteuid())
    assert precious.read_text() == "keep"


# The client, against a server that runs in a thread with the real clock.


@pytest.fixture
def serving(agent: Agent) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs the agent's loop beside the test; what it is called with happens in the loop, once a capture runs."""
    todo: list[Callable[[], None]] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            if select.select([agent.server], [], [], 0.01)[0]:
                agent.server.on_readable(time.monotonic())
            if agent.server._capture is not None and todo:
                todo.pop()()
            agent.server.on_timer(time.monotonic())

    thread = threading.Thread(target=loop)
    thread.start()
    yield todo.append
    stop.set()
    thread.join()


def test_the_client_gets_the_records_and_the_account(agent: Agent, run_dir: Path, serving: Callable[[Callable[[], None]], None]) -> None:
    serving(lambda: [agent.server.offer(finished(id=str(number))) for number in range(500)] and None)
    terminal = Terminal()
    records, end = capture(run_dir, 0.5, 0, terminal)
    assert [record["id"] for record in records] == [str(number) for number in range(500)]
    assert end == {"seen": 500, "sent": 500, "faster": 0, "dropped": 0, "lost": {"ring": 0}, "beyond_limit": 0}
    assert "\rcapturing: 0 of 0.5 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_the_client_does_not_keep_is_counted(
    agent: Agent, run_dir: Path, serving: Callable[[Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 3)
    serving(lambda: [agent.server.offer(finished()) for _ in range(5)] and None)
    pipe = io.StringIO()
    records, end = capture(run_dir, 0.3, 0, pipe)
    assert end is not None
    assert (len(records), end["sent"], end["beyond_limit"]) == (3, 5, 2)
    assert pipe.getvalue() == ""


@pytest.mark.usefixtures("serving")
def test_the_client_asks_for_the_status(run_dir: Path) -> None:
    assert status(run_dir) == {"pid": 42}


@pytest.mark.usefixtures("serving")
def test_the_client_passes_a_refusal_on(agent: Agent, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_peer_uid", lambda connection: 4242 + os.geteuid())
    with pytest.raises(BucketprobeError, match="may not ask the agent"):
        capture(run_dir, 1, 0)


def test_an_agent_that_goes_away_leaves_what_came(run_dir: Path) -> None:
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / SOCKET_NAME))
        listener.listen()

        def die_after_one_record() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(json.dumps(finished(id="only").record()).encode() + b'\n{"id": "cut')
            connection.close()

        thread = threading.Thread(target=die_after_one_record)
        thread.start()
        records, end = capture(run_dir, 10, 0)
        thread.join()
    assert [record["id"] for record in records] == ["only"]
    assert end is None


def test_no_agent(run_dir: Path) -> None:
    with pytest.raises(NoAgent, match="start one first"):
        capture(run_dir, 1, 0)


@pytest.mark.parametrize(("duration", "min_ms"), [(0, 0), (3601, 0), (float("nan"), 0), (1, -1), (1, float("nan"))])
def test_limits_are_checked_before_anything_is_asked(run_dir: Path, duration: float, min_ms: float) -> None:
    with pytest.raises(UsageError):
        capture(run_dir, duration, min_ms)

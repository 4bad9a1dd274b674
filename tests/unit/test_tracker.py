# SPDX-License-Identifier: Apache-2.0
"""Events to requests. Every event goes through abi's structure and the decoder, as it would from the ring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import abi, decode, tracker
from bucketprobe.config import FileClasses, StorageSpec
from bucketprobe.model import PHASES, Request

MS = 1_000_000
TGID, TID, RID = 100, 101, 0xABC
WALL = 1_700_000_000_000_000_000
PUT = b"PUT /v1/bucket/artifact HTTP/1.1\r\nHost: h\r\nX-Artifact-Version: v1\r\nX-Request-ID: r-1\r\n\r\n"
ROOT = StorageSpec(roots=("/srv/bucket",), metadata=("*.db",))

Flag, Outcome = abi.RequestFlag, abi.EndOutcome


def event(kind: abi.Kind, data: bytes = b"", **values: int) -> Any:
    """A decoded event; what is not given is 0, but for the process."""
    made = abi.EVENTS[kind]()
    for name, value in ({"kind": kind, "tgid": TGID} | values).items():
        setattr(made.h if hasattr(made.h, name) else made, name, value)
    return decode.decode(bytes(made) + data)


class World:
    """A tracker with everything around it. Requests start at 10 ms and last 100 ms unless told otherwise."""

    def __init__(self) -> None:
        self.done: list[Request] = []
        self.open_before: dict[tuple[int, int], tuple[str, int]] = {}
        self.asked: list[tuple[int, int]] = []
        self.cwd_before: dict[int, str] = {}
        classes = FileClasses(ROOT, realpath=lambda path: path)
        self.tracker = tracker.Tracker(classes, lambda ns: WALL + ns, self._path_of, self._cwd_of, self.done.append)

    def _path_of(self, tgid: int, fd: int) -> tuple[str, int] | None:
        self.asked.append((tgid, fd))
        return self.open_before.get((tgid, fd))

    def _cwd_of(self, tgid: int) -> str | None:
        self.asked.append((tgid, tracker.AT_FDCWD))
        return self.cwd_before.get(tgid)

    def head(self, data: bytes = PUT, rid: int = RID, direction: abi.Direction = abi.Direction.REQUEST, last: bool = True) -> None:
        self.tracker.feed(event(abi.Kind.HEAD, data, rid=rid, what=direction, n=len(data), conn=7, last=int(last)))

    def open(self, path: str, gen: int, *, fd: int = 5, flags: int = os.O_WRONLY, dirfd: int = tracker.AT_FDCWD, **values: int) -> None:
        raw = path.encode()
        values = {"rid": RID, "tid": TID} | values
        self.tracker.feed(event(abi.Kind.OPEN, raw, n=len(raw), gen=gen, fd=fd, flags=flags, dirfd=dirfd, **values))

    def file(self, gen: int, **values: int) -> None:
        self.tracker.feed(event(abi.Kind.FILE, gen=gen, **({"rid": RID} | values)))

    def path(self, call: abi.PathCall, first: str, second: str = "", **values: int) -> None:
        a, b = first.encode(), second.encode()
        values = {"rid": RID, "dirfd": tracker.AT_FDCWD, "dirfd2": tracker.AT_FDCWD} | values
        self.tracker.feed(event(abi.Kind.PATH, a + b, what=call, n=len(a), n2=len(b), **values))

    def end(self, outcome: abi.EndOutcome = Outcome.COMPLETE, **values: int) -> Request | None:
        """Ends the request; the record, if there is one now."""
        before = len(self.done)
        given_values = {"rid": RID, "conn": 7, "start_ns": 10 * MS, "end_ns": 110 * MS, "status": 201, "framed": 1, "ts": 110 * MS} | values
        self.tracker.feed(event(abi.Kind.END, what=outcome, **given_values))
        return self.done[-1] if len(self.done) > before else None

    def finished(self, **values: int) -> Request:
        request = self.end(**values)
        assert request is not None
        return request


@pytest.fixture
def world() -> World:
    return World()


def test_a_put_from_its_first_byte_to_its_record(world: World) -> None:
    world.head()
    world.open("/srv/bucket/tmp/a", 1, ns=1 * MS)
    world.file(1, write_calls=3, write_bytes=3000, write_ns=5 * MS, syncs=1, sync_ns=7 * MS, other_ns=1 * MS, what=1)
    world.path(abi.PathCall.RENAME, "/srv/bucket/tmp/a", "/srv/bucket/a", ns=2 * MS)
    world.open("/srv/bucket/meta.db", 2, ns=1 * MS)
    world.file(2, write_calls=1, write_bytes=50, write_ns=1 * MS, read_calls=1, read_bytes=10, read_ns=1 * MS, syncs=1, sync_ns=3 * MS)
    world.open("/etc/hosts", 3, ns=9 * MS)
    world.file(3, read_calls=2, read_bytes=99, read_ns=9 * MS)
    request = world.finished(bytes_in=3000, bytes_out=20, recv_ns=10 * MS, wait_rx_ns=1 * MS, send_ns=2 * MS, runqueue_ns=4 * MS)

    assert (request.method, request.operation, request.route) == ("PUT", "write", "/v1/{bucket_id}/{artifact_id}")
    assert (request.bucket_id, request.artifact_id, request.version, request.request_id) == ("bucket", "artifact", "v1", "r-1")
    assert (request.status, request.outcome, request.bytes_in, request.bytes_out) == (201, "complete", 3000, 20)
    assert (request.id, request.conn, request.pid) == ("0000000000000abc", "0000000000000007", TGID)
    assert (request.start_ns, request.end_ns, request.wall_ns) == (10 * MS, 110 * MS, WALL + 10 * MS)
    assert request.files.record() == {
        "opens": 1, "write_calls": 3, "write_bytes": 3000, "read_calls": 0, "read_bytes": 0, "syncs": 1, "renames": 1,
    }  # fmt: skip
    assert (request.metadata_files.opens, request.metadata_files.write_bytes, request.metadata_files.syncs) == (1, 50, 1)
    assert (request.other_files.opens, request.other_files.read_bytes) == (1, 99)
    assert request.phases == {
        "storage_sync": 7 * MS, "storage_write": 9 * MS, "metadata": 6 * MS, "network_receive": 11 * MS, "network_send": 2 * MS,
        "runqueue": 4 * MS, "other": 61 * MS,
    }  # fmt: skip
    assert request.attribution.label == "exact"
    assert request.attribution.unattributed_bytes == 0
    assert (world.tracker.records, set(world.tracker.lost.values())) == (1, {0})


def test_requests_do_not_mix(world: World) -> None:
    for rid in (1, 2):
        world.head(PUT.replace(b"r-1", b"r-%d" % rid), rid=rid)
        world.open(f"/srv/bucket/{rid}", rid, rid=rid)
    for rid in (1, 2):
        world.file(rid, rid=rid, write_calls=rid, write_bytes=rid * 10)
    found = [world.finished(rid=rid) for rid in (2, 1)]
    assert [(request.request_id, request.files.write_bytes) for request in found] == [("r-2", 20), ("r-1", 10)]


def test_a_file_that_is_written_for_two_requests_counts_for_each_what_it_did(world: World) -> None:
    """A database that stays open, say."""
    world.tracker.learn_file(9, "/srv/bucket/meta.db", os.O_RDWR)
    world.head(rid=1)
    world.head(rid=2)
    world.file(9, rid=1, write_calls=1, write_bytes=10)
    world.file(9, rid=2, write_calls=2, write_bytes=20)
    assert [world.finished(rid=rid).metadata_files.write_bytes for rid in (1, 2)] == [10, 20]


# --- Heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 30, 200])
def test_a_head_in_pieces(world: World, size: int) -> None:
    for at in range(0, len(PUT), size):
        world.head(PUT[at : at + size], last=at + size >= len(PUT))
    assert world.finished().request_id == "r-1"


def test_a_head_of_which_only_the_beginning_was_captured(world: World) -> None:
    """Its last event then has no bytes."""
    world.head(PUT[:40], last=False)
    world.head(b"")
    request = world.finished()
    assert (request.operation, request.request_id, world.tracker.lost["malformed_head"]) == ("write", None, 0)


def test_bytes_past_a_pieces_length_are_not_its(world: World) -> None:
    world.tracker.feed(event(abi.Kind.HEAD, PUT + b"padding", rid=RID, n=len(PUT), last=1))
    assert world.finished().request_id == "r-1"


def test_the_request_id_that_the_server_made_up(world: World) -> None:
    world.head(PUT.replace(b"X-Request-ID: r-1\r\n", b""))
    world.head(b"HTTP/1.1 201\r\nX-Request", direction=abi.Direction.RESPONSE, last=False)
    world.head(b"-ID: from-server\r\n\r\n", direction=abi.Direction.RESPONSE)
    assert world.finished().request_id == "from-server"


def test_the_clients_request_id_wins(world: World) -> None:
    world.head()
    world.head(b"HTTP/1.1 201\r\nX-Request-ID: other\r\n\r\n", direction=abi.Direction.RESPONSE)
    assert world.finished().request_id == "r-1"


def test_an_answer_that_cannot_be_read_is_no_trouble(world: World) -> None:
    world.head(PUT.replace(b"X-Request-ID: r-1\r\n", b""))
    world.head(b"junk x-request-id: 1\r\n\r\n", direction=abi.Direction.RESPONSE)
    assert world.finished().request_id is None


def test_an_end_without_a_head_is_a_request_of_which_nothing_is_guessed(world: World) -> None:
    request = world.finished(status=0, framed=0, bytes_in=77)
    assert (request.operation, request.method, request.route, request.status, request.bytes_in) == ("unknown", None, None, None, None)
    assert world.tracker.lost["no_head"] == 1
    assert world.tracker.records == 1


def test_a_head_that_cannot_be_read_is_counted(world: World) -> None:
    world.head(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert world.finished().operation == "unknown"
    assert world.tracker.lost["malformed_head"] == 1
    assert world.tracker.lost["no_head"] == 0


def test_an_unframed_request_has_no_byte_count(world: World) -> None:
    world.head()
    assert world.finished(framed=0, bytes_in=5).bytes_in is None


# --- Which file --------------------------------------------------------------------------------------------------


def opened_as(world: World, gen: int = 1) -> str:
    """What the generation counts as, by where a byte written to it goes."""
    world.file(gen, write_calls=1, write_bytes=1)
    request = world.finished()
    [name] = [name for name in ("files", "metadata_files", "other_files") if getattr(request, name).write_bytes]
    return name


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/bucket/a", "files"),
        ("/srv/bucket/a/../b", "files"),
        ("/srv/bucket/../other/a", "other_files"),
        ("/srv//bucket/./a", "files"),
        ("/srv/bucketeer/a", "other_files"),
        ("/srv/bucket/m.db", "metadata_files"),
        ("/srv/bucket/m.db-wal", "metadata_files"),
        ("/tmp/a", "other_files"),
    ],
)
def test_absolute_paths(world: World, path: str, kind: str) -> None:
    world.head()
    world.open(path, 1)
    assert opened_as(world) == kind


def test_a_path_relative_to_the_working_directory(world: World) -> None:
    world.tracker.learn_cwd(TGID, "/srv")
    world.head()
    world.open("bucket/a", 1)
    assert opened_as(world) == "files"


def test_a_path_relative_to_a_working_directory_that_changed(world: World) -> None:
    world.tracker.learn_cwd(TGID, "/srv")
    world.path(abi.PathCall.CHDIR, "bucket", rid=0)
    world.path(abi.PathCall.CHDIR, "sub", rid=0)
    world.head()
    world.open("../a", 1)
    assert opened_as(world) == "files"


def test_working_directories_are_each_processes_own(world: World) -> None:
    world.tracker.learn_cwd(TGID, "/tmp")
    world.tracker.learn_cwd(TGID + 1, "/srv/bucket")
    world.head()
    world.open("a", 1)
    assert opened_as(world) == "other_files"


def test_a_working_directory_that_was_changed_by_descriptor(world: World) -> None:
    """fchdir has no path: only what its descriptor is."""
    world.tracker.learn_cwd(TGID, "/tmp")
    world.open("/srv/bucket/sub", 8, rid=0)
    world.path(abi.PathCall.CHDIR, "", rid=0, dirfd=3, dirgen=8)
    world.head()
    world.open("../a", 1)
    assert opened_as(world) == "files"


def test_a_path_relative_to_a_directory_that_was_opened(world: World) -> None:
    """Whatever its number is by now: the kernel names the generation."""
    world.head()
    world.open("/srv/bucket", 1, fd=8, flags=os.O_DIRECTORY)
    world.open("/tmp", 2, fd=8)
    world.open("a", 3, dirfd=8, dirgen=1)
    assert opened_as(world, 3) == "files"


def test_a_path_relative_to_a_directory_that_was_open_before(world: World) -> None:
    world.tracker.learn_file(8, "/srv/bucket/sub", os.O_DIRECTORY)
    world.head()
    world.open("../a", 2, dirfd=4, dirgen=8)
    assert opened_as(world, 2) == "files"


def test_an_absolute_path_does_not_need_the_directory(world: World) -> None:
    world.head()
    world.open("/srv/bucket/a", 2, dirfd=4, dirgen=99)
    assert opened_as(world, 2) == "files"
    assert world.tracker.lost["unnamed_path"] == 0


def test_a_working_directory_of_which_nothing_was_told_is_asked_for_once(world: World) -> None:
    world.cwd_before[TGID] = "/srv/bucket"
    world.head()
    for gen in (1, 2):
        world.open("a", gen, tgid=TGID)
        world.open("a", gen + 10, tgid=TGID + 1)
    request = world.finished()
    assert (request.files.opens, request.other_files.opens) == (2, 2)
    assert world.asked == [(TGID, tracker.AT_FDCWD), (TGID + 1, tracker.AT_FDCWD)]


def test_a_child_names_files_as_its_parent_did(world: World) -> None:
    world.tracker.learn_cwd(TGID, "/srv/bucket")
    world.tracker.inherit(TGID + 1, TGID)
    world.path(abi.PathCall.CHDIR, "/tmp", rid=0)
    world.head()
    world.open("a", 1, tgid=TGID + 1)
    world.open("a", 2)
    request = world.finished()
    assert (request.files.opens, request.other_files.opens) == (1, 1)
    assert world.asked == []


def test_a_path_relative_to_something_unknown_is_another_file(world: World) -> None:
    world.head()
    world.open("bucket/a", 1, dirfd=77)
    assert opened_as(world) == "other_files"
    assert world.tracker.lost["unnamed_path"] == 1


def test_a_name_that_is_no_text(world: World) -> None:
    raw = b"/srv/bucket/\xff\xfe"
    world.head()
    world.tracker.feed(event(abi.Kind.OPEN, raw, n=len(raw), gen=1, rid=RID, dirfd=tracker.AT_FDCWD))
    assert opened_as(world) == "files"


def test_a_file_that_was_open_before(world: World) -> None:
    world.open_before[TGID, 4] = ("/srv/bucket/a", os.O_RDWR)
    world.tracker.feed(event(abi.Kind.UNKNOWN_FD, gen=1, fd=4))
    assert world.asked == [(TGID, 4)]
    world.head()
    assert opened_as(world) == "files"


def test_a_file_that_nobody_can_name_is_another_file(world: World) -> None:
    world.tracker.feed(event(abi.Kind.UNKNOWN_FD, gen=1, fd=4))
    world.head()
    assert opened_as(world) == "other_files"


def test_a_generation_is_forgotten_with_its_last_descriptor(world: World) -> None:
    world.head()
    world.open("/srv/bucket/a", 1)
    world.file(1, what=1)
    assert opened_as(world) == "other_files"


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("/srv/bucket/t", "/srv/bucket/a", "files"),
        ("/tmp/t", "/srv/bucket/a", "files"),
        ("/srv/bucket/t", "/tmp/a", "files"),
        ("/srv/bucket/t", "/srv/bucket/m.db", "metadata_files"),
        ("/tmp/t", "/tmp/a", "other_files"),
    ],
)
def test_a_rename_belongs_where_it_leads(world: World, first: str, second: str, kind: str) -> None:
    world.head()
    world.path(abi.PathCall.RENAME, first, second, ns=3 * MS)
    request = world.finished()
    assert getattr(request, kind).renames == 1
    phase = {"files": "storage_write", "metadata_files": "metadata", "other_files": "other"}[kind]
    assert request.phases[phase] >= 3 * MS
    assert sum(getattr(request, name).renames for name in ("files", "metadata_files", "other_files")) == 1


def test_a_rename_between_directories_that_are_open(world: World) -> None:
    world.tracker.learn_file(70, "/tmp", 0)
    world.tracker.learn_file(80, "/srv/bucket", 0)
    world.head()
    world.path(abi.PathCall.RENAME, "t", "a", dirfd=7, dirgen=70, dirfd2=8, dirgen2=80)
    assert world.finished().files.renames == 1


@pytest.mark.parametrize("call", [abi.PathCall.LINK, abi.PathCall.UNLINK, abi.PathCall.MKDIR, abi.PathCall.TRUNCATE])
def test_other_calls_on_paths_cost_time_and_are_no_renames(world: World, call: abi.PathCall) -> None:
    world.head()
    world.path(call, "/srv/bucket/a", "/srv/bucket/b" if call == abi.PathCall.LINK else "", ns=3 * MS)
    request = world.finished()
    assert (request.files.renames, request.phases["storage_write"]) == (0, 3 * MS)


@pytest.mark.parametrize(("flags", "phase"), [(os.O_DSYNC, "storage_sync"), (os.O_SYNC, "storage_sync"), (0, "storage_write")])
def test_a_write_that_waits_for_the_disk_is_a_sync(world: World, flags: int, phase: str) -> None:
    world.head()
    world.open("/srv/bucket/a", 1, flags=os.O_WRONLY | flags)
    world.file(1, write_calls=1, write_ns=20 * MS)
    request = world.finished()
    assert request.phases[phase] == 20 * MS
    assert request.files.syncs == 0


# --- How work was tied -------------------------------------------------------------------------------------------


def stored(world: World) -> None:
    world.head()
    world.open("/srv/bucket/a", 1)
    world.file(1, write_calls=1, write_bytes=1000, write_ns=5 * MS)


def test_an_interleaved_request_claims_no_file_work(world: World) -> None:
    stored(world)
    request = world.finished(flags=Flag.INTERLEAVED)
    assert request.attribution.label == "unattributed"
    assert request.attribution.unattributed_bytes == 1000
    assert not any(request.files.record().values())
    assert not {"storage_write", "storage_sync", "storage_read", "metadata"} & request.phase_totals.keys()
    assert sum(request.phases.values()) == 100 * MS


@pytest.mark.parametrize(("values", "label"), [({}, "exact"), ({"flags": Flag.MOVED}, "inferred"), ({"lost": 1}, "inferred")])
def test_work_that_may_not_be_all_is_inferred(world: World, values: dict[str, int], label: str) -> None:
    stored(world)
    request = world.finished(**values)
    assert request.attribution.label == label
    assert request.attribution.evidence == ("thread",)
    assert request.files.write_bytes == 1000


def test_a_request_that_touches_no_file_is_exact(world: World) -> None:
    world.head()
    assert world.finished().attribution.label == "exact"


@pytest.mark.parametrize(
    ("first", "last", "tgid", "counts"),
    [
        (20, 30, TGID, True),
        (0, 11, TGID, True),
        (109, 200, TGID, True),
        (0, 10, TGID, False),
        (110, 120, TGID, False),
        (20, 30, TGID + 1, False),
    ],
)
def test_untied_work_in_the_window_is_said(world: World, first: int, last: int, tgid: int, counts: bool) -> None:
    """Of the same process, and while the request lived."""
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    world.head()
    world.file(5, rid=0, tgid=tgid, write_bytes=300, read_bytes=4, first_ns=first * MS, last_ns=last * MS)
    request = world.finished()
    assert request.attribution.unattributed_bytes == (304 if counts else 0)
    assert request.attribution.label == ("unattributed" if counts else "exact")
    assert request.files.write_bytes == 0


def test_untied_work_beside_own_work_leaves_the_label(world: World) -> None:
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    stored(world)
    world.file(5, rid=0, write_bytes=300, first_ns=20 * MS, last_ns=30 * MS)
    request = world.finished()
    assert (request.attribution.label, request.attribution.unattributed_bytes) == ("exact", 300)


def test_untied_work_on_other_files_does_not_matter(world: World) -> None:
    world.tracker.learn_file(5, "/var/log/x", os.O_WRONLY)
    world.head()
    world.file(5, rid=0, write_bytes=300, first_ns=20 * MS, last_ns=30 * MS)
    assert world.finished().attribution.unattributed_bytes == 0


def test_work_that_comes_after_its_request_is_counted_as_late(world: World) -> None:
    stored(world)
    world.finished()
    world.file(1, write_bytes=10)
    assert world.tracker.lost["late_file"] == 1


def test_lost_events_are_the_kernels_count(world: World) -> None:
    world.head()
    assert world.finished(lost=3).lost_events == 3


# --- Ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.CLIENT_CLOSED, Outcome.SERVER_CLOSED])
def test_an_aborted_request_waits_for_its_threads_last_work(world: World, outcome: abi.EndOutcome) -> None:
    stored(world)
    assert world.end(outcome, status=0) is None
    world.tracker.tick(110 * MS + tracker.GRACE_NS)
    assert world.done == []
    world.file(1, write_calls=1, write_bytes=24)
    world.tracker.tick(110 * MS + tracker.GRACE_NS + 1)
    [request] = world.done
    assert (request.outcome, request.status, request.files.write_bytes) == (outcome.name.lower(), None, 1024)


@pytest.mark.parametrize("outcome", [Outcome.COMPLETE, Outcome.UNOBSERVED])
def test_other_requests_end_at_once(world: World, outcome: abi.EndOutcome) -> None:
    world.head()
    request = world.end(outcome)
    assert request is not None
    assert request.outcome == outcome.name.lower()


def test_nothing_waits_past_the_end(world: World) -> None:
    for rid in (1, 2):
        world.head(rid=rid)
        world.end(Outcome.CLIENT_CLOSED, rid=rid)
    world.tracker.flush()
    world.tracker.flush()
    assert [request.id[-1] for request in world.done] == ["1", "2"]


def test_an_end_before_its_start_lasts_no_time(world: World) -> None:
    world.head()
    request = world.finished(start_ns=100, end_ns=50, recv_ns=10)
    assert (request.duration_ns, request.phases) == (0, {"other": 0})


def test_events_of_processes_are_not_for_the_tracker(world: World) -> None:
    world.tracker.feed(event(abi.Kind.PROCESS, what=abi.ProcessChange.EXIT))
    assert world.done == []


# --- Phases ------------------------------------------------------------------------------------------------------

TIMES = st.one_of(st.integers(0, 200), st.integers(0, 1 << 40))


@settings(deadline=None)
@given(st.integers(0, 1 << 40), st.lists(TIMES, min_size=9, max_size=9), st.integers(0, 63))
def test_phases_sum_to_the_duration_whatever_overlaps(duration: int, times: list[int], flags: int) -> None:
    world = World()
    world.head()
    world.open("/srv/bucket/a", 1, ns=times[0])
    world.file(1, write_ns=times[1], read_ns=times[2], sync_ns=times[3], other_ns=times[4])
    request = world.finished(
        end_ns=10 * MS + duration, recv_ns=times[5], send_ns=times[6], runqueue_ns=times[7], flags=flags, first_read_ns=10 * MS + times[8]
    )
    assert sum(request.phases.values()) == request.duration_ns == duration
    assert set(request.phases) <= set(PHASES)
    assert all(request.phases[name] <= total for name, total in request.phase_totals.items() if name in request.phases)
    assert all(ns > 0 for name, ns in request.phases.items() if name != "other")


def test_where_phases_overlap_the_higher_one_keeps_its_time(world: World) -> None:
    stored(world)
    world.file(1, sync_ns=60 * MS, write_ns=30 * MS)
    request = world.finished(recv_ns=40 * MS, send_ns=1)
    assert request.phases == {"storage_sync": 60 * MS, "storage_write": 35 * MS, "network_receive": 5 * MS, "other": 0}
    assert request.phase_totals == {"storage_sync": 60 * MS, "storage_write": 35 * MS, "network_receive": 40 * MS, "network_send": 1}


@pytest.mark.parametrize(
    ("values", "stages", "queue"),
    [
        # The first request of a connection: in the accept queue, then unread.
        ({"established_ns": 10, "start_ns": 10, "accept_ns": 40, "first_read_ns": 100}, {"accept": 30, "read": 60}, 90),
        # It came after the accept.
        ({"established_ns": 10, "start_ns": 50, "accept_ns": 40, "first_read_ns": 100}, {"read": 50}, 50),
        # A later request on the same connection.
        ({"established_ns": 10, "start_ns": 500, "accept_ns": 40, "first_read_ns": 700}, {"read": 200}, 200),
        # The accept was not seen.
        ({"established_ns": 0, "start_ns": 50, "accept_ns": 0, "first_read_ns": 60}, {"read": 10}, 10),
        # Read at once.
        ({"established_ns": 10, "start_ns": 50, "accept_ns": 40, "first_read_ns": 50}, {"read": 0}, None),
    ],
)
def test_stages_of_the_queue_sum_to_it(world: World, values: dict[str, int], stages: dict[str, int], queue: int | None) -> None:
    world.head()
    request = world.finished(flags=Flag.QUEUE_SEEN, end_ns=1000, **values)
    assert request.queue_stages == stages
    assert request.phases.get("queue") == queue
    assert sum(request.queue_stages.values()) == (queue or 0)


def test_a_queue_that_was_not_seen_is_absent(world: World) -> None:
    world.head()
    request = world.finished(start_ns=10, first_read_ns=50, end_ns=100)
    assert (request.queue_stages, request.phases) == ({}, {"other": 90})


# --- Bounds ------------------------------------------------------------------------------------------------------


@contextmanager
def bound(name: str, value: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, name, value)
        yield


def test_requests_are_bounded_the_oldest_go_and_are_counted(world: World) -> None:
    with bound("MAX_REQUESTS", 10):
        for rid in range(1, 16):
            world.head(rid=rid)
        assert world.tracker.lost["evicted"] == 5
        assert world.finished(rid=1).operation == "unknown"
        assert world.finished(rid=15).operation == "write"
    assert world.tracker.lost["no_head"] == 1


def test_heads_that_never_end_are_bounded_and_counted(world: World) -> None:
    with bound("MAX_PARTIAL_HEADS", 10):
        for rid in range(1, 16):
            world.head(PUT[:20], rid=rid, last=False)
        assert world.tracker.lost["partial_head"] == 5
        for rid in (5, 6):
            world.head(PUT[20:], rid=rid)
        assert [world.finished(rid=rid).operation for rid in (5, 6)] == ["unknown", "write"]
    assert world.tracker.lost["evicted"] == 0


def test_generations_are_bounded_and_the_oldest_go(world: World) -> None:
    with bound("MAX_GENERATIONS", 10):
        for gen in range(1, 16):
            world.tracker.learn_file(gen, "/srv/bucket/a", 0)
        world.head()
        world.file(1, write_bytes=1)
        world.file(15, write_bytes=10)
        request = world.finished()
    assert (request.files.write_bytes, request.other_files.write_bytes) == (10, 1)


def test_untied_work_is_bounded(world: World) -> None:
    world.tracker.learn_file(5, "/srv/bucket/late", 0)
    world.head()
    for _ in range(tracker.MAX_UNTIED + 100):
        world.file(5, rid=0, write_bytes=1, first_ns=20 * MS, last_ns=30 * MS)
    assert world.finished().attribution.unattributed_bytes == tracker.MAX_UNTIED


def test_what_is_finished_is_forgotten(world: World) -> None:
    for rid in range(1, 100):
        world.head(rid=rid)
        world.finished(rid=rid)
    assert len(world.tracker._requests) == 0


def test_a_process_that_ends_takes_its_working_directory_along(world: World) -> None:
    world.tracker.learn_cwd(TGID, "/srv/bucket")
    world.tracker.forget_process(TGID)
    world.tracker.forget_process(TGID)
    world.head()
    world.open("a", 1)
    assert opened_as(world) == "other_files"

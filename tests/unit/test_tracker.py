# SPDX-License-Identifier: Apache-2.0
"""Events to requests. Every event goes through abi's structure and the decoder, as it would from the ring."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import md5, sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import abi, decode, integrity, tracker
from bucketprobe.config import FileClasses, StorageSpec
from bucketprobe.model import PHASES, Request
from bucketprobe.resolve import token_bits

MS = 1_000_000
TGID, TID, RID = 100, 101, 0xABC
WALL = 1_700_000_000_000_000_000
PUT = b"PUT /v1/bucket/artifact HTTP/1.1\r\nHost: h\r\nX-Artifact-Version: v1\r\nX-Request-ID: r-1\r\n\r\n"
ROOT = StorageSpec(roots=("/srv/bucket",), metadata=("*.db",))

Flag, FileFlag, Outcome = abi.RequestFlag, abi.FileFlag, abi.EndOutcome


def event(kind: abi.Kind, data: bytes = b"", **values: int) -> Any:
    """A decoded event; what is not given is 0, but for the process."""
    made = abi.EVENTS[kind]()
    for name, value in ({"kind": kind, "tgid": TGID} | values).items():
        setattr(made.h if hasattr(made.h, name) else made, name, value)
    return decode.decode(bytes(made) + data)


class World:
    """A tracker with everything around it. Requests start at 10 ms and last 100 ms unless told otherwise, and files are opened at 20 ms,
    written from 21 to 22 ms and renamed at 30 ms. File work is that of a thread that has its request alone, but where `rid` is 0.
    """

    def __init__(self, declared: tuple[str, ...] = tracker.DECLARED) -> None:
        self.done: list[Request] = []
        self.open_before: dict[tuple[int, int], tuple[str, int]] = {}
        self.asked: list[tuple[int, int]] = []
        self.cwd_before: dict[int, str] = {}
        classes = FileClasses(ROOT, realpath=lambda path: path)
        self.tracker = tracker.Tracker(classes, lambda ns: WALL + ns, self._path_of, self._cwd_of, self.done.append, declared)

    def _path_of(self, tgid: int, fd: int) -> tuple[str, int] | None:
        self.asked.append((tgid, fd))
        return self.open_before.get((tgid, fd))

    def _cwd_of(self, tgid: int) -> str | None:
        self.asked.append((tgid, tracker.AT_FDCWD))
        return self.cwd_before.get(tgid)

    def head(
        self, data: bytes = PUT, rid: int = RID, direction: abi.Direction = abi.Direction.REQUEST, last: bool = True, **values: int
    ) -> None:
        values = {"tid": TID, "ts": 10 * MS, "status": 201 if direction == abi.Direction.RESPONSE and last else 0} | values
        self.tracker.feed(event(abi.Kind.HEAD, data, rid=rid, what=direction, n=len(data), conn=7, last=int(last), **values))

    def answer(self, rid: int = RID, **values: int) -> None:
        self.head(b"HTTP/1.1 201 Created\r\n\r\n", rid, abi.Direction.RESPONSE, **({"ts": 90 * MS} | values))

    def answer_with(self, data: bytes) -> None:
        self.head(data, direction=abi.Direction.RESPONSE, ts=90 * MS)

    def open(self, path: str, gen: int, *, fd: int = 5, flags: int = os.O_WRONLY, dirfd: int = tracker.AT_FDCWD, **values: int) -> None:
        raw = path.encode()
        values = {"rid": RID, "tid": TID, "ts": 20 * MS} | values
        values = {"what": FileFlag.ALONE if values["rid"] else 0} | values
        self.tracker.feed(event(abi.Kind.OPEN, raw, n=len(raw), gen=gen, fd=fd, flags=flags, dirfd=dirfd, **values))

    def file(self, gen: int, **values: int) -> None:
        values = {"rid": RID, "tid": TID, "first_ns": 21 * MS, "last_ns": 22 * MS} | values
        moved = values["last_ns"] if values.get("write_bytes") or values.get("read_bytes") else 0
        values = {"flags": FileFlag.ALONE if values["rid"] else 0, "data_ns": moved, "ts": values["last_ns"]} | values
        self.tracker.feed(event(abi.Kind.FILE, gen=gen, **values))

    def path(self, call: abi.PathCall, first: str, second: str = "", **values: int) -> None:
        a, b = first.encode(), second.encode()
        values = {"rid": RID, "tid": TID, "ts": 30 * MS, "dirfd": tracker.AT_FDCWD, "dirfd2": tracker.AT_FDCWD} | values
        values = {"file_flags": FileFlag.ALONE if values["rid"] else 0} | values
        self.tracker.feed(event(abi.Kind.PATH, a + b, what=call, n=len(a), n2=len(b), **values))

    def body(self, rid: int, size: int, ts: int, **values: int) -> None:
        self.tracker.feed(event(abi.Kind.BODY, rid=rid, bytes=size, ts=ts, **values))

    def tokens(self, gen: int, text: bytes, **values: int) -> None:
        data = token_bits(text, self.tracker.secret).to_bytes(abi.TOKEN_BITS // 8, "little")
        self.tracker.feed(event(abi.Kind.TOKENS, data, gen=gen, n=len(data), size=len(text), **({"tid": TID, "ts": 21 * MS} | values)))

    def end(self, outcome: abi.EndOutcome = Outcome.COMPLETE, **values: int) -> Request | None:
        """Ends the request; the record, if there is one at once."""
        before = len(self.done)
        given_values = {"rid": RID, "conn": 7, "start_ns": 10 * MS, "end_ns": 110 * MS, "status": 201, "framed": 1} | values
        given_values.setdefault("ts", given_values["end_ns"])
        self.tracker.feed(event(abi.Kind.END, what=outcome, **given_values))
        return self.done[-1] if len(self.done) > before else None

    def finished(self, **values: int) -> Request:
        """The record of the request that ends now, at once or after it was held back."""
        before = len(self.done)
        self.end(**values)
        self.tracker.tick(self.tracker.latest_ns + tracker.HOLD_NS + 1)
        assert len(self.done) == before + 1
        return self.done[-1]

    def records(self) -> dict[int, Request]:
        """All records, by request; none is held back any longer."""
        self.tracker.flush()
        return {int(request.id, 16): request for request in self.done}


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
    world.file(9, rid=1, write_calls=1, write_bytes=10, flags=FileFlag.ALONE | FileFlag.MANY)
    world.file(9, rid=2, write_calls=2, write_bytes=20, flags=FileFlag.ALONE | FileFlag.MANY)
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
    world.tracker.feed(event(abi.Kind.OPEN, raw, n=len(raw), gen=1, rid=RID, what=FileFlag.ALONE, dirfd=tracker.AT_FDCWD))
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


@pytest.mark.parametrize(
    ("values", "label"),
    [({}, "exact"), ({"flags": Flag.MOVED}, "exact"), ({"flags": Flag.INTERLEAVED}, "exact"), ({"lost": 1}, "inferred")],
)
def test_work_that_may_not_be_all_is_inferred(world: World, values: dict[str, int], label: str) -> None:
    """What a thread did while it had the request alone is the request's, whatever came later."""
    stored(world)
    request = world.finished(**values)
    assert request.attribution.label == label
    assert request.attribution.evidence == ("thread",)
    assert request.files.write_bytes == 1000
    assert {name: (share.bytes, share.ns) for name, share in request.attribution.by_label.items()} == {label: (1000, 5 * MS)}


def test_a_request_that_touches_no_file_is_exact(world: World) -> None:
    world.head()
    assert world.finished().attribution.label == "exact"


@pytest.mark.parametrize(
    ("first", "last", "tgid", "counts"),
    [(0, 11, TGID, True), (9, 100, TGID, True), (0, 10, TGID, False), (0, 11, TGID + 1, True)],
)
def test_work_that_began_before_any_request_is_nobodys(world: World, first: int, last: int, tgid: int, counts: bool) -> None:
    """But what went on while a request lived is said with it: who knows what one process does for another."""
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    world.head()
    times = {"first_ns": first * MS, "last_ns": last * MS}
    world.file(5, rid=0, flags=FileFlag.MANY, tgid=tgid, write_bytes=300, read_bytes=4, **times)
    assert world.tracker.unattributed["storage"].bytes == 304
    request = world.finished()
    assert request.attribution.unattributed_bytes == (304 if counts else 0)
    assert request.attribution.label == ("unattributed" if counts else "exact")
    assert request.files.write_bytes == 0


def test_work_after_a_request_is_not_said_with_it(world: World) -> None:
    """Not even where the request is held back."""
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    stored(world)
    world.end(Outcome.CLIENT_CLOSED)
    world.file(5, rid=0, flags=FileFlag.MANY, write_bytes=300, first_ns=110 * MS, last_ns=120 * MS)
    world.tracker.flush()
    [request] = world.done
    assert (request.attribution.unattributed_bytes, request.files.write_bytes) == (0, 1000)
    assert world.tracker.unattributed["storage"].bytes == 300


def test_work_of_another_thread_is_the_only_requests_by_the_window(world: World) -> None:
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    world.head()
    world.file(5, rid=0, tid=TID + 1, flags=FileFlag.MANY, write_bytes=300, first_ns=20 * MS, last_ns=30 * MS)
    request = world.finished()
    assert (request.attribution.label, request.attribution.evidence, request.files.write_bytes) == ("inferred", ("window",), 300)
    assert request.attribution.unattributed_bytes == 0


def test_untied_work_beside_own_work_leaves_the_label(world: World) -> None:
    """A thread that does its request's work itself has no other do it."""
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    stored(world)
    world.file(5, rid=0, tid=TID + 1, flags=FileFlag.MANY, write_bytes=300, first_ns=20 * MS, last_ns=30 * MS)
    request = world.finished()
    assert (request.attribution.label, request.attribution.unattributed_bytes) == ("exact", 300)


def test_untied_work_on_other_files_does_not_matter(world: World) -> None:
    world.tracker.learn_file(5, "/var/log/x", os.O_WRONLY)
    world.head()
    world.file(5, rid=0, flags=FileFlag.MANY, write_bytes=300, first_ns=5 * MS, last_ns=30 * MS)
    assert world.finished().attribution.unattributed_bytes == 0
    assert world.tracker.unattributed == {}


def test_work_that_comes_after_its_request_is_counted_as_late(world: World) -> None:
    stored(world)
    world.finished()
    world.file(1, write_bytes=10)
    assert world.tracker.lost["late_file"] == 1
    assert world.tracker.unattributed["storage"].bytes == 10


def test_lost_events_are_the_kernels_count(world: World) -> None:
    world.head()
    assert world.finished(lost=3).lost_events == 3


# --- Ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.CLIENT_CLOSED, Outcome.SERVER_CLOSED])
def test_an_aborted_request_waits_for_its_threads_last_work(world: World, outcome: abi.EndOutcome) -> None:
    stored(world)
    assert world.end(outcome, status=0) is None
    world.tracker.tick(110 * MS + tracker.HOLD_NS)
    assert world.done == []
    world.file(1, write_calls=1, write_bytes=24)
    world.tracker.tick(110 * MS + tracker.HOLD_NS + 1)
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
        world.file(5, rid=0, flags=FileFlag.MANY, write_bytes=1, first_ns=5 * MS, last_ns=30 * MS)
    assert world.finished().attribution.unattributed_bytes == tracker.MAX_UNTIED
    assert world.tracker.lost["evicted_untied"] == 100
    assert world.tracker.unattributed["storage"].bytes == tracker.MAX_UNTIED + 100


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


# --- Whose work, where threads serve many ------------------------------------------------------------------------

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
DIGEST = sha256(b"one").hexdigest()


def put(name: str, version: str = "v1", *more: str) -> bytes:
    lines = (f"PUT /v1/bucket/{name} HTTP/1.1", "Host: h", f"X-Artifact-Version: {version}", *more, "", "")
    return "\r\n".join(lines).encode()


def get(name: str, version: str = "v1") -> bytes:
    return f"GET /v1/bucket/{name}?version={version} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


class Pool(World):
    """Requests 1 and 2 upload or read, in flight from 10 to 110 ms, and threads of a pool do the file work."""

    def begin(self, *heads: bytes) -> None:
        for rid, data in enumerate(heads, 1):
            self.head(data, rid, tid=50)

    def written(self, gen: int, path: str, size: int, *, tid: int = 60, closed: int = 1, flags: int = NEW, **values: int) -> None:
        self.open(path, gen, rid=0, tid=tid, flags=flags)
        self.file(gen, rid=0, tid=tid, what=closed, write_calls=1, write_bytes=size, **({"write_ns": MS} | values))

    def read(self, gen: int, path: str, size: int, *, tid: int = 60, **values: int) -> None:
        self.open(path, gen, rid=0, tid=tid, flags=os.O_RDONLY)
        self.file(gen, rid=0, tid=tid, what=1, read_calls=1, read_bytes=size, read_ns=MS, **values)

    def done_by(self, **of: dict[str, int]) -> dict[int, Request]:
        """The records of requests 1 and 2, which end interleaved; `r1` and `r2` are what their ends say."""
        for rid in (1, 2):
            values = {"flags": Flag.INTERLEAVED, "received_ns": 15 * MS, "answered_ns": 100 * MS} | of.get(f"r{rid}", {})
            self.end(rid=rid, **values)
        self.tracker.tick(self.tracker.latest_ns + tracker.HOLD_NS + 1)
        return {int(request.id, 16): request for request in self.done}


@pytest.fixture
def pool() -> Pool:
    return Pool()


def told(request: Request) -> tuple[str, tuple[str, ...]]:
    return request.attribution.label, request.attribution.evidence


def test_uploads_at_once_are_told_apart_by_their_paths(pool: Pool) -> None:
    pool.begin(put("one"), put("two"))
    pool.written(2, "/srv/bucket/two/v1", 2000, tid=61)
    pool.written(1, "/srv/bucket/one/v1", 1000)
    found = pool.done_by()
    assert {rid: (request.files.opens, request.files.write_bytes, *told(request)) for rid, request in found.items()} == {
        1: (1, 1000, "exact", ("path",)),
        2: (1, 2000, "exact", ("path",)),
    }
    assert all(request.phases["storage_write"] == MS for request in found.values())


def test_a_file_is_known_by_the_name_that_it_gets_later(pool: Pool) -> None:
    pool.begin(put("one"), put("two"))
    pool.written(1, "/srv/bucket/tmp/3f2a", 1000)
    pool.path(abi.PathCall.RENAME, "/srv/bucket/tmp/3f2a", "/srv/bucket/two/v1", rid=0, tid=63, ns=2 * MS)
    found = pool.done_by()
    assert (found[1].files.write_bytes, found[2].files.write_bytes, found[2].files.renames) == (0, 1000, 1)
    assert told(found[2]) == ("exact", ("path",))
    assert found[2].phases["storage_write"] == 3 * MS


def test_a_file_outside_of_the_store_that_is_renamed_into_it(pool: Pool) -> None:
    """Also where another request ends before it has its name."""
    pool.begin(put("one"), put("three"))
    pool.written(1, "/srv/tmp/3f2a", 1000)
    pool.end(rid=2, flags=Flag.INTERLEAVED, status=404, end_ns=25 * MS)
    pool.path(abi.PathCall.RENAME, "/srv/tmp/3f2a", "/srv/bucket/one/v1", rid=0, tid=63, ns=2 * MS)
    pool.end(rid=1, flags=Flag.INTERLEAVED, answered_ns=100 * MS)
    found = pool.records()
    assert (found[1].files.write_bytes, found[2].files.write_bytes) == (1000, 0)
    assert told(found[1]) == ("exact", ("path",))


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_a_file_without_a_name_gets_one_by_a_link(pool: Pool, by_descriptor: bool) -> None:
    """O_TMPFILE and linkat: by AT_EMPTY_PATH, or by its name in /proc."""
    pool.begin(put("one"), put("two"))
    pool.open("/srv/bucket", 1, rid=0, fd=9, flags=os.O_WRONLY | tracker.O_TMPFILE)
    pool.file(1, rid=0, write_calls=1, write_bytes=1000)
    if by_descriptor:
        pool.path(abi.PathCall.LINK, "", "/srv/bucket/two/v1", rid=0, dirfd=9, dirgen=1)
    else:
        pool.path(abi.PathCall.LINK, "/proc/self/fd/9", "/srv/bucket/two/v1", rid=0)
    pool.file(1, rid=0, what=1, first_ns=40 * MS, last_ns=41 * MS)
    found = pool.done_by()
    assert (found[2].files.opens, found[2].files.write_bytes, *told(found[2])) == (1, 1000, "exact", ("path",))
    assert found[1].files.write_bytes == 0


def test_a_file_that_is_closed_after_the_answer_belongs_to_it(pool: Pool) -> None:
    """As nginx does it; the close is its, too."""
    pool.begin(put("one"), put("two"))
    pool.written(1, "/srv/bucket/two/v1", 1000, closed=0)
    for rid in (1, 2):
        assert pool.end(rid=rid, flags=Flag.INTERLEAVED, answered_ns=100 * MS) is None
    pool.file(1, rid=0, what=1, other_ns=3 * MS, first_ns=111 * MS, last_ns=112 * MS)
    found = pool.records()
    assert found[2].files.write_bytes == 1000
    assert found[2].phase_totals["storage_write"] == 4 * MS
    assert found[1].files.write_bytes == 0


def test_a_call_from_the_file_to_the_connection_is_sure(pool: Pool) -> None:
    pool.begin(get("one"), get("one"))
    pool.open("/srv/bucket/one/v1", 1, rid=0, flags=os.O_RDONLY)
    pool.file(1, rid=2, flags=FileFlag.SAME_CALL, read_calls=1, read_bytes=500, what=1)
    found = pool.done_by()
    assert (found[1].files.read_bytes, found[2].files.read_bytes) == (0, 500)
    assert found[2].attribution.label == "exact"
    assert "same_call" in found[2].attribution.evidence


@pytest.mark.parametrize(("flags", "opens"), [(os.O_RDONLY | os.O_DIRECTORY, 0), (os.O_WRONLY | tracker.O_TMPFILE, 1), (os.O_RDONLY, 1)])
def test_a_directory_that_is_opened_is_no_file(world: World, flags: int, opens: int) -> None:
    """It costs the same time."""
    world.head()
    world.open("/srv/bucket", 1, flags=flags, ns=3 * MS)
    request = world.finished()
    assert (request.files.opens, request.phases["storage_write"]) == (opens, 3 * MS)


def test_a_small_file_says_whose_it_is(pool: Pool) -> None:
    """In a file of its own the digest is sure."""
    pool.tracker.secret = 0x9E3779B97F4A7C15
    pool.begin(put("one", "v1", f"X-Artifact-Digest: sha256:{DIGEST}"), put("two"))
    pool.open("/srv/bucket/77.db", 1, rid=0, tid=60, flags=NEW)
    pool.tokens(1, b'{"digest": "' + DIGEST.encode() + b'"}', tid=60)
    pool.file(1, rid=0, tid=60, what=1, write_calls=1, write_bytes=80)
    found = pool.done_by()
    assert (found[1].metadata_files.write_bytes, *told(found[1])) == (80, "exact", ("token",))
    assert found[2].metadata_files.write_bytes == 0


def test_a_row_in_a_file_of_many_says_whose_it_is_likely_to_be(pool: Pool) -> None:
    pool.tracker.secret = 0x9E3779B97F4A7C15
    pool.tracker.learn_file(9, "/srv/bucket/meta.db", os.O_RDWR)
    pool.begin(put("one", "v1", f"X-Artifact-Digest: sha256:{DIGEST}"), put("two"))
    for tid, text in ((60, DIGEST.encode()), (61, b"nothing that anybody knows")):
        pool.tokens(9, text, tid=tid)
        pool.file(9, rid=0, tid=tid, flags=FileFlag.MANY, write_calls=1, write_bytes=4096 + tid, ts=tid * MS)
    found = pool.done_by()
    assert found[1].metadata_files.write_bytes >= 4096 + 60
    assert "token" in found[1].attribution.evidence
    assert found[1].attribution.by_label["inferred"].bytes >= 4096 + 60
    assert "exact" not in found[1].attribution.by_label


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
def test_an_interim_response_is_no_answer(pool: Pool, pieces: bool) -> None:
    """A body that is written after it is still written before the answer."""
    pool.begin(put("one"), put("two"))
    text = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nX-Request-ID: none\r\n\r\n"
    for data, last in [(text[:30], False), (text[30:], True)] if pieces else [(text, True)]:
        pool.head(data, 1, abi.Direction.RESPONSE, last, status=103, ts=12 * MS)
    pool.written(1, "/srv/bucket/tmp/3f2a", 1000, print=5, printed=32)
    pool.answer(1)
    found = pool.done_by(r1={"answered_ns": 0, "bytes_in": 1000, "print_in": 5, "printed_in": 32}, r2={"bytes_in": 999})
    assert (found[1].files.write_bytes, *told(found[1])) == (1000, "exact", ("bytes",))
    assert found[1].request_id is None


def test_a_sync_for_many_is_shared_by_all_and_counted_once(pool: Pool) -> None:
    pool.tracker.learn_file(9, "/srv/bucket/journal", os.O_RDWR)
    pool.begin(put("one"), put("two"))
    pool.file(9, rid=0, flags=FileFlag.MANY, syncs=1, sync_ns=7 * MS + 1, data_ns=22 * MS)
    found = pool.done_by()
    assert sum(request.phases["storage_sync"] for request in found.values()) == 7 * MS + 1
    assert all(request.phases["storage_sync"] >= 3 * MS for request in found.values())
    assert sum(request.files.syncs for request in found.values()) == 1
    for request in found.values():
        assert request.attribution.label == "shared"
        assert request.attribution.candidates == ("0000000000000001", "0000000000000002")


def test_what_the_kernel_could_not_tell_makes_nothing_exact(world: World) -> None:
    """Events about file work that were lost between its head and its end; those before it do not matter."""
    world.head(lost_files=3)
    world.open("/srv/bucket/a", 1)
    request = world.finished(lost_files=5)
    assert (request.attribution.label, request.lost_events) == ("inferred", 2)
    world.head(rid=2, lost_files=5)
    world.open("/srv/bucket/b", 2, rid=2)
    request = world.finished(rid=2, lost_files=5)
    assert (request.attribution.label, request.lost_events) == ("exact", 0)


@pytest.mark.parametrize(("lost", "label"), [(0, "exact"), (1, "inferred")])
def test_where_heads_were_lost_nobody_is_the_only_one_that_fits(pool: Pool, lost: int, label: str) -> None:
    """Before its own head came: there may be another request with the same body, of which nothing is known."""
    pool.head(put("one"), 1, tid=50, lost_files=lost)
    pool.written(1, "/srv/bucket/tmp/3f2a", 1000, print=5, printed=32)
    of = {"answered_ns": 100 * MS, "received_ns": 15 * MS, "bytes_in": 1000, "print_in": 5, "printed_in": 32, "lost_files": lost}
    request = pool.finished(rid=1, flags=Flag.INTERLEAVED, **of)
    assert (request.files.write_bytes, *told(request)) == (1000, label, ("bytes",))
    assert request.lost_events == 0


def test_a_record_waits_only_where_work_may_still_come(pool: Pool) -> None:
    pool.begin(put("one"), put("two"))
    assert pool.end(rid=1, flags=Flag.INTERLEAVED) is not None
    pool.written(2, "/srv/bucket/two/v1", 1000, closed=0)
    assert pool.end(rid=2, flags=Flag.INTERLEAVED) is None
    pool.tracker.tick(110 * MS + tracker.HOLD_NS)
    assert len(pool.done) == 1
    pool.tracker.tick(110 * MS + tracker.HOLD_NS + 1)
    assert len(pool.done) == 2


def test_work_while_no_request_is_in_flight_is_nobodys(world: World) -> None:
    world.tracker.learn_file(5, "/srv/bucket/late", os.O_WRONLY)
    world.tracker.learn_file(6, "/srv/bucket/meta.db", os.O_WRONLY)
    world.tracker.learn_file(7, "/var/log/x", os.O_WRONLY)
    for gen in (5, 6, 7):
        world.file(gen, rid=0, flags=FileFlag.MANY, write_bytes=100 + gen, write_ns=gen)
    assert {kind: (share.bytes, share.ns) for kind, share in world.tracker.unattributed.items()} == {
        "storage": (105, 5),
        "metadata": (106, 6),
    }


def test_what_was_opened_and_is_never_closed_is_nobodys_after_a_while(world: World) -> None:
    world.open("/srv/bucket/late", 1, rid=0, flags=NEW, ns=7)
    world.tracker.tick(tracker.PENDING_NS)
    assert world.tracker.unattributed == {}
    world.tracker.tick(2 * tracker.PENDING_NS)
    assert world.tracker.unattributed["storage"].ns == 7


def test_counters_of_attributed_work_are_the_records_sums(pool: Pool) -> None:
    pool.begin(put("one"), put("two"))
    pool.written(1, "/srv/bucket/one/v1", 1000)
    pool.written(2, "/srv/bucket/two/v1.db", 50)
    found = pool.done_by()
    shares = [share for request in found.values() for share in request.attribution.by_label.values()]
    assert sum(share.bytes for share in shares) == sum(share.bytes for share in pool.tracker.attributed.values()) == 1050
    assert sum(share.ns for share in shares) == sum(share.ns for share in pool.tracker.attributed.values()) == 2 * MS
    assert {kind for _, kind in pool.tracker.attributed} == {"storage", "metadata"}


# --- Which keys mean something -----------------------------------------------------------------------------------


def by_key(world: World, tgid: int = TGID) -> Request:
    """A request of which only the key of its task says that the file is its, with another in flight."""
    for rid in (1, 2):
        world.head(put(f"a{rid}"), rid, tid=50, key=70 + rid, tgid=tgid)
    world.open("/srv/bucket/tmp/3f2a", 1, rid=0, key=72, flags=NEW, tgid=tgid)
    world.file(1, rid=0, key=72, what=1, write_bytes=10, tgid=tgid)
    for rid in (1, 2):
        world.end(rid=rid, flags=Flag.INTERLEAVED, tgid=tgid)
    world.tracker.flush()
    [request] = [request for request in world.done if request.id[-1] == "2"]
    return request


@pytest.mark.parametrize("kind", [abi.Runtime.GO, abi.Runtime.GO_CGO])
def test_a_goroutine_is_believed_from_the_start(world: World, kind: abi.Runtime) -> None:
    world.tracker.learn_runtime(TGID, kind)
    assert told(by_key(world)) == ("exact", ("goroutine",))


@pytest.mark.parametrize("kind", [abi.Runtime.NONE, abi.Runtime.CPYTHON])
def test_a_key_of_which_nothing_is_known_is_not(world: World, kind: abi.Runtime) -> None:
    world.tracker.learn_runtime(TGID, kind)
    assert by_key(world).attribution.label != "exact"


def test_a_child_runs_what_its_parent_does(world: World) -> None:
    world.tracker.learn_runtime(TGID, abi.Runtime.GO)
    world.tracker.inherit(TGID + 1, TGID)
    assert told(by_key(world, TGID + 1)) == ("exact", ("goroutine",))


def test_what_was_known_of_a_process_ends_with_it(world: World) -> None:
    """Also where a request of it was held back, or still in flight, when it ended."""
    world.tracker.learn_runtime(TGID, abi.Runtime.GO)
    world.tracker.learn_uring(TGID)
    world.head(rid=9)
    world.tracker.forget_process(TGID)
    world.end(Outcome.SERVER_CLOSED, rid=9)
    world.tracker.flush()
    request = by_key(world)
    assert "goroutine" not in request.attribution.evidence


# --- What cannot be seen -----------------------------------------------------------------------------------------


def mapped(world: World, path: str) -> None:
    world.open(path, 1, rid=0)
    world.file(1, rid=0, what=0)
    world.tracker.feed(event(abi.Kind.MAP, gen=1, size=4096, prot=3, flags=1, ts=20 * MS))


@pytest.mark.parametrize(
    ("out_of_sight", "reason"),
    [
        (lambda world: None, "unseen"),
        (lambda world: world.tracker.learn_uring(TGID), "io_uring"),
        (lambda world: world.tracker.learn_uring(TGID + 1), "unseen"),
        (lambda world: mapped(world, "/srv/bucket/data"), "mmap"),
        (lambda world: mapped(world, "/usr/lib/libc.so"), "unseen"),
        (lambda world: (world.tracker.learn_uring(TGID + 1), world.tracker.inherit(TGID, TGID + 1)), "io_uring"),
    ],
)
def test_a_body_without_file_work_is_a_gap_with_a_reason(world: World, out_of_sight: Callable[[World], object], reason: str) -> None:
    out_of_sight(world)
    world.tracker.tick(60_000 * MS)  # what was mapped had been opened long before
    later = {"start_ns": 60_010 * MS, "end_ns": 60_110 * MS}
    world.head(ts=60_010 * MS)
    assert world.finished(bytes_in=700, **later).coverage_gaps == (reason,)
    world.head(get("artifact"), rid=2, ts=60_010 * MS)
    assert world.finished(rid=2, status=200, bytes_out=900, **later).coverage_gaps == (reason,)
    assert world.tracker.gap_bytes == {(reason, "write"): 700, (reason, "read"): 900}


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (PUT, {"bytes_in": 700, "status": 409}),
        (PUT, {"bytes_in": 700, "status": 200}),  # it was there already
        (PUT, {"bytes_in": 0}),
        (PUT, {"bytes_in": 700, "lost": 1}),
        (get("artifact"), {"status": 404, "bytes_out": 90}),
        (get("artifact"), {"status": 200, "bytes_out": 0}),
        (b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n", {"status": 200, "bytes_out": 5}),
    ],
)
def test_what_needs_no_file_work_is_no_gap(world: World, data: bytes, values: dict[str, int]) -> None:
    world.head(data)
    assert world.finished(**values).coverage_gaps == ()
    assert world.tracker.gap_bytes == {}


def test_a_body_with_file_work_is_no_gap(world: World) -> None:
    stored(world)
    assert world.finished(bytes_in=1000).coverage_gaps == ()


# --- Who waited for whom -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"client_ns": 60 * MS}, "client"),
        ({"send_ns": 60 * MS}, "client"),
        ({"client_ns": 30 * MS, "send_ns": 30 * MS}, "client"),
        ({"server_ns": 60 * MS}, "server"),
        ({}, "server"),
        ({"client_ns": 20 * MS, "sync": 50 * MS}, "storage"),
        ({"sync": 30 * MS, "client_ns": 20 * MS}, "server"),
    ],
)
def test_the_one_that_took_most_of_the_time_limited_it(world: World, values: dict[str, int], limit: str) -> None:
    world.head()
    world.open("/srv/bucket/a", 1)
    world.file(1, syncs=1, sync_ns=values.pop("sync", 0))
    request = world.finished(flags=Flag.QUEUE_SEEN, first_read_ns=10 * MS, **values)
    assert request.limited_by == limit
    assert (request.client_wait_ns, request.server_wait_ns) == (values.get("client_ns", 0), values.get("server_ns", 0))


def test_where_nobody_tells_when_bytes_come_nobody_is_blamed(world: World) -> None:
    world.head()
    request = world.finished(client_ns=5, server_ns=6)
    assert (request.client_wait_ns, request.server_wait_ns, request.limited_by) == (None, None, None)


# --- More bounds -------------------------------------------------------------------------------------------------


def test_work_that_waits_is_bounded_and_what_is_pushed_out_is_nobodys(world: World) -> None:
    world.tracker.learn_file(5, "/srv/bucket/late", 0)
    world.head()
    with bound("MAX_PENDING", 10):
        for _ in range(15):
            world.file(5, rid=0, flags=FileFlag.MANY, write_bytes=1)
    assert world.tracker.lost["evicted_work"] == 5
    assert world.tracker.unattributed["storage"].bytes == 5


def test_records_that_are_held_are_bounded(world: World) -> None:
    with bound("MAX_HELD", 10):
        for rid in range(1, 16):
            world.head(rid=rid)
            world.end(Outcome.CLIENT_CLOSED, rid=rid)
        assert len(world.done) == 5
    world.tracker.flush()
    assert len(world.done) == 15


# --- Digests -----------------------------------------------------------------------------------------------------

SHA256 = 672
BODY, OTHER = b"body", b"other"
WELL_FORMED = (
    b"PUT /v1/bucket/artifact HTTP/1.1\r\nHost: h\r\nX-Artifact-Version: v1\r\nX-Uploaded-By: me\r\nX-Provenance-Source: ci\r\n"
    b"Content-Length: 1000\r\n"
)


def value_of(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"


def declaring(content: bytes = BODY, head: bytes = WELL_FORMED) -> bytes:
    return head + b"X-Artifact-Digest: " + value_of(content).encode() + b"\r\n\r\n"


def hashed(world: World, content: bytes = BODY, **values: int) -> None:
    """A digest was finished at 60 ms, by the thread of the request alone; by whom is not known where `what` is 0."""
    value = sha256(content).digest()
    given_values = {"what": FileFlag.ALONE, "rid": RID, "tid": TID, "ts": 60 * MS, "bytes": 1000, "algorithm": SHA256} | values
    world.tracker.feed(event(abi.Kind.DIGEST, value, n=len(value), **given_values))


def uploaded(world: World, **values: int) -> Request:
    return world.finished(bytes_in=1000, received_ns=50 * MS, **values)


@pytest.fixture
def proven(world: World) -> World:
    """What hashes there was tried, and is read right."""
    world.tracker.learn_hasher(TGID, integrity.Hasher("libcrypto", proven=True, outside_ns=500.0))
    return world


def test_a_digest_of_the_requests_own_thread_is_its_own(proven: World) -> None:
    proven.head(declaring())
    hashed(proven)
    digest = uploaded(proven).digest
    assert (digest.declared, digest.computed, digest.evidence) == (value_of(BODY), value_of(BODY), "thread")
    assert (digest.result, digest.mismatch, digest.bytes, digest.verified) == ("match", None, 1000, ())
    assert (digest.source, digest.ns) == ("none", None), "no call was ever timed there"


@pytest.mark.parametrize("status", [201, 400])
def test_a_digest_that_is_not_the_declared_one_is_a_mismatch_whatever_the_answer(proven: World, status: int) -> None:
    proven.head(declaring())
    hashed(proven, OTHER)
    digest = uploaded(proven, status=status).digest
    assert (digest.computed, digest.result, digest.mismatch) == (value_of(OTHER), "mismatch", "computed")


@pytest.mark.parametrize("values", [{"bytes": 999}, {"bytes": 100}, {"algorithm": 0}, {"algorithm": 1}])
def test_a_digest_of_something_else_is_not_compared(proven: World, values: dict[str, int]) -> None:
    proven.head(declaring())
    hashed(proven, OTHER, **values)
    digest = uploaded(proven).digest
    assert (digest.computed, digest.result, digest.mismatch) == (None, None, None)


def test_an_upload_that_was_broken_off_is_no_mismatch(proven: World) -> None:
    proven.head(declaring())
    hashed(proven, OTHER, bytes=700)
    assert proven.end(Outcome.CLIENT_CLOSED, bytes_in=700, status=0) is None
    digest = proven.records()[RID].digest
    assert (digest.declared, digest.computed, digest.result, digest.mismatch) == (value_of(BODY), None, None, None)


@pytest.mark.parametrize(
    ("data", "status", "mismatch"),
    [
        (declaring(), 400, "answer"),
        (declaring(), 201, None),
        (declaring(), 409, None),
        (declaring(), 500, None),
        *(
            (declaring(head=re.sub(b"(?i)%s: [^\r]*\r\n" % name, b"", WELL_FORMED)), 400, None)
            for name in (b"x-artifact-version", b"x-uploaded-by")
        ),
        (declaring(head=re.sub(b"X-Provenance-Source: ci\r\n", b"", WELL_FORMED)), 400, None),
        (WELL_FORMED + b"\r\n", 400, None),
        (WELL_FORMED + b"X-Artifact-Digest: sha256:what\r\n\r\n", 400, None),
    ],
)
def test_without_a_value_a_refusal_is_a_mismatch_where_nothing_else_explains_it(
    proven: World, data: bytes, status: int, mismatch: str | None
) -> None:
    proven.head(data)
    assert uploaded(proven, status=status).digest.mismatch == mismatch


def test_a_refusal_of_a_body_that_is_right_is_no_mismatch(proven: World) -> None:
    proven.head(declaring())
    hashed(proven)
    digest = uploaded(proven, status=400).digest
    assert (digest.result, digest.mismatch) == ("match", None)


def test_a_refusal_before_the_body_was_there_is_no_mismatch(proven: World) -> None:
    proven.head(declaring())
    assert proven.finished(bytes_in=300, status=400).digest.mismatch is None


def test_a_value_must_prove_itself_where_nobody_could_try_it(world: World) -> None:
    world.tracker.learn_hasher(TGID, integrity.Hasher("node", proven=False))
    results = []
    for rid, content in enumerate((OTHER, BODY, OTHER), 1):
        world.head(declaring(), rid=rid)
        hashed(world, content, rid=rid, tid=rid)
        results.append(uploaded(world, rid=rid).digest.result)
    assert results == [None, "match", "mismatch"]


def test_a_hash_that_is_finished_twice_is_one(proven: World) -> None:
    proven.head(declaring())
    hashed(proven, ran_ns=1_000)
    hashed(proven, ran_ns=1_001)
    assert uploaded(proven).digest.bytes == 1000


@pytest.mark.parametrize(("content", "result"), [(BODY, "match"), (OTHER, "mismatch")])
def test_what_is_read_back_from_storage_is_verified_once(proven: World, content: bytes, result: str) -> None:
    proven.head(declaring())
    proven.open("/srv/bucket/a", 1)
    proven.file(1, write_calls=1, write_bytes=1000)
    hashed(proven)
    proven.open("/srv/bucket/a", 2, flags=os.O_RDONLY)
    proven.file(2, read_calls=1, read_bytes=1000, first_ns=61 * MS, last_ns=65 * MS)
    hashed(proven, content, ts=70 * MS, ran_ns=1 * MS)
    digest = uploaded(proven).digest
    assert (digest.result, digest.verified, digest.bytes) == ("match", (result,), 2000)


def test_a_file_that_is_not_the_storages_is_no_read_back(proven: World) -> None:
    proven.head(declaring())
    proven.open("/etc/other", 2, flags=os.O_RDONLY)
    proven.file(2, read_calls=1, read_bytes=1000, first_ns=51 * MS, last_ns=55 * MS)
    hashed(proven)
    assert uploaded(proven).digest.verified == ()


@pytest.mark.parametrize(("content", "result"), [(BODY, "match"), (OTHER, "mismatch")])
def test_a_read_that_says_what_it_should_get_is_verified(proven: World, content: bytes, result: str) -> None:
    proven.head(b"GET /v1/bucket/artifact?version=v1&digest=%s HTTP/1.1\r\nHost: h\r\n\r\n" % value_of(BODY).encode())
    proven.open("/srv/bucket/a", 1, flags=os.O_RDONLY)
    proven.file(1, read_calls=1, read_bytes=1000)
    hashed(proven, content)
    digest = proven.finished(status=200, bytes_out=1000).digest
    assert (digest.declared, digest.verified, digest.mismatch) == (value_of(BODY), (result,), None)


@pytest.mark.parametrize(
    ("declared", "head", "answer"),
    [
        (("header:Content-MD5",), b"PUT /x HTTP/1.1\r\nContent-Length: 1000\r\nContent-MD5: %(md5)s\r\n\r\n", b""),
        (("query:sum",), b"PUT /x?sum=%(sha)s&digest=no HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b""),
        (("path",), b"PUT /blobs/sha256/%(sha)s HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b""),
        (("header:none", "response:ETag"), b"PUT /x HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b'ETag: "%(sha)s"\r\n'),
    ],
)
def test_a_digest_is_declared_where_the_settings_say(declared: tuple[str, ...], head: bytes, answer: bytes) -> None:
    names = {b"md5": b64encode(md5(BODY, usedforsecurity=False).digest()), b"sha": sha256(BODY).hexdigest().encode()}
    world = World(declared)
    world.head(head % names)
    world.answer_with(b"HTTP/1.1 200 OK\r\n" + answer % names + b"\r\n")
    found = uploaded(world).digest.declared
    assert found in (value_of(BODY), f"md5:{md5(BODY, usedforsecurity=False).hexdigest()}")


def test_hostile_text_in_the_place_of_a_digest_is_none(world: World) -> None:
    """It is percent-encoded UTF-8 there, so any letter may come."""
    for rid, text in enumerate((b"%C5%BFha256:" + b"ab" * 32, b"%00", b"sha256:%F0%9F%98%80", b"=" * 400), 1):
        world.head(b"PUT /v1/b/a?digest=" + text + b" HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", rid=rid)
        assert uploaded(world, rid=rid).digest.declared is None


# --- Whose they are --------------------------------------------------------------------------------------------


def together(world: World, *declared: bytes) -> None:
    """So many requests that one thread serves at once."""
    for rid, content in enumerate(declared, 1):
        world.head(declaring(content), rid=rid)


def test_of_requests_that_are_served_at_once_each_gets_its_own(proven: World) -> None:
    contents = [b"%d" % number for number in range(4)]
    together(proven, *contents)
    for content in (contents[2], contents[0], OTHER, contents[3]):
        hashed(proven, content, what=0, rid=0)
    for rid in (3, 1, 2, 4):
        proven.end(rid=rid, bytes_in=1000, received_ns=50 * MS, flags=Flag.INTERLEAVED)
    digests = {rid: request.digest for rid, request in proven.records().items()}
    assert {rid: digest.result for rid, digest in digests.items()} == {1: "match", 2: "mismatch", 3: "match", 4: "match"}
    assert digests[2].computed == value_of(OTHER)
    assert proven.tracker.unattributed_digests() == 0


def test_a_digest_by_the_file_that_its_thread_wrote(proven: World) -> None:
    together(proven, BODY, BODY)
    for rid in (1, 2):
        proven.open(f"/srv/bucket/{rid}", rid, rid=rid)
        proven.file(rid, rid=rid, write_calls=1, write_bytes=1000)
    hashed(proven, OTHER, what=0, rid=0, wrote=2)
    hashed(proven, BODY, what=0, rid=0, wrote=1, tid=TID + 1)
    digests = [uploaded(proven, rid=rid).digest for rid in (1, 2)]
    assert [(digest.result, digest.evidence) for digest in digests] == [("match", "descriptor"), ("mismatch", "descriptor")]


def test_a_digest_whose_request_is_not_known_waits_for_one_that_fits(proven: World) -> None:
    """Its head was lost, say: the kernel knew it, and the agent does not."""
    hashed(proven, rid=77)
    proven.head(declaring())
    assert uploaded(proven).digest.result == "match"


def test_digests_of_nobody_are_counted_when_their_time_is_over(proven: World) -> None:
    hashed(proven, what=0, rid=0)
    assert proven.tracker.unattributed_digests() == 0
    proven.tracker.tick(60 * MS + tracker.PENDING_NS + 1)
    assert proven.tracker.unattributed_digests() == 1


def test_digests_of_nobody_are_counted_when_their_process_ends(proven: World) -> None:
    for number in range(3):
        hashed(proven, b"%d" % number, what=0, rid=0)
    proven.tracker.forget_process(TGID)
    assert proven.tracker.unattributed_digests() == 3


def test_a_process_that_is_gone_stays_forgotten(proven: World) -> None:
    """That its probes came off is told after it ended."""
    proven.tracker.learn_probing(TGID, "value", on=True, at_ns=1 * MS)
    proven.tracker.forget_process(TGID)
    proven.tracker.learn_probing(TGID, "value", on=False, at_ns=2 * MS)
    proven.tracker.learn_hashing(TGID, 1 << 20, 600_000, 1 * MS, 2 * MS)
    assert proven.tracker._processes == {}


# --- Their time --------------------------------------------------------------------------------------------------


def test_calls_that_were_timed_are_the_phase_with_what_the_probes_do_not_see_of_themselves(proven: World) -> None:
    proven.head(declaring())
    hashed(proven, ns=3 * MS, timed_bytes=1000, calls=4)
    request = uploaded(proven)
    assert (request.digest.source, request.digest.ns) == ("exact", 3 * MS + 4 * 500)
    assert request.phases["digest"] == request.phase_totals["digest"] == request.digest.ns
    assert sum(request.phases.values()) == request.duration_ns


@pytest.mark.parametrize("values", [{"timed_bytes": 900}, {"timed_bytes": 1001}, {"timed_bytes": 0, "calls": 0}, {"timed_bytes": 3000}])
def test_calls_of_which_not_all_were_timed_are_no_time(proven: World, values: dict[str, int]) -> None:
    proven.head(declaring())
    hashed(proven, **({"ns": 3 * MS, "calls": 4} | values))
    request = uploaded(proven)
    assert (request.digest.source, request.digest.ns) == ("none", None)
    assert "digest" not in request.phases


def test_gos_calls_are_of_whole_blocks(proven: World) -> None:
    """1000 bytes and their padding are 16 blocks of 64; a little of something else is taken off."""
    for rid, (timed_bytes, ns) in enumerate([(1024, 3 * MS), (1033, 3 * MS * 1024 / 1033)], 1):
        proven.head(declaring(), rid=rid)
        hashed(proven, rid=rid, tid=rid, ns=3 * MS, timed_bytes=timed_bytes, calls=1)
        digest = uploaded(proven, rid=rid).digest
        assert (digest.source, digest.ns) == ("exact", pytest.approx(ns, rel=0.001))


def test_a_prefix_and_the_whole_of_one_hash_are_its_bytes_once(proven: World) -> None:
    """As where the digest so far is asked for on the way."""
    proven.head(declaring())
    hashed(proven, OTHER, bytes=400, timed_bytes=400, ns=1 * MS, calls=1)
    hashed(proven, BODY, ts=61 * MS, timed_bytes=600, ns=2 * MS, calls=2)
    digest = uploaded(proven).digest
    assert (digest.result, digest.bytes, digest.ns) == ("match", 1000, 3 * MS + 3 * 500)


def test_a_rate_that_was_measured_is_a_model_for_the_others_that_run_the_same(proven: World) -> None:
    proven.tracker.learn_hasher(TGID + 1, integrity.Hasher("libcrypto", proven=True))
    proven.tracker.learn_hasher(TGID + 2, integrity.Hasher("another", proven=True))
    proven.tracker.learn_hashing(TGID, 1 << 20, 2 << 20, 1 * MS, 2 * MS)
    sources = {}
    for tgid in (TGID, TGID + 1, TGID + 2):
        proven.head(declaring(), rid=tgid, tgid=tgid)
        hashed(proven, rid=tgid, tgid=tgid)
        digest = uploaded(proven, rid=tgid, tgid=tgid).digest
        sources[tgid] = (digest.source, digest.ns)
    assert sources == {TGID: ("model", 2000), TGID + 1: ("model", 2000), TGID + 2: ("none", None)}


def test_a_request_of_a_time_in_which_values_were_not_seen_is_taken_to_hash_as_the_others_did(proven: World) -> None:
    proven.tracker.learn_hashing(TGID, 1 << 20, 2 << 20, 1 * MS, 2 * MS)
    proven.tracker.learn_probing(TGID, "value", on=True, at_ns=1 * MS)
    for rid in range(1, 10):
        proven.head(declaring(), rid=rid)
        hashed(proven, rid=rid, tid=rid)
        uploaded(proven, rid=rid)
    proven.tracker.learn_probing(TGID, "value", on=False, at_ns=120 * MS)
    proven.head(declaring(), rid=10, ts=130 * MS)
    digest = proven.finished(rid=10, bytes_in=4000, start_ns=130 * MS, received_ns=140 * MS, end_ns=150 * MS).digest
    assert (digest.source, digest.bytes, digest.ns) == ("model", 4000, 8000)
    assert (digest.computed, digest.result) == (None, None)


def test_an_estimate_is_never_more_than_the_request_took(proven: World) -> None:
    proven.tracker.learn_hashing(TGID, 1 << 20, 1 << 40, 1 * MS, 2 * MS)
    proven.head(declaring())
    hashed(proven)
    request = uploaded(proven)
    assert sum(request.phases.values()) == request.duration_ns
    assert request.phases["digest"] <= request.duration_ns


def test_where_no_value_can_be_seen_the_calls_of_the_requests_thread_are_its_time(world: World) -> None:
    world.tracker.learn_hasher(TGID, integrity.Hasher("static", valued=False, outside_ns=500.0))
    world.tracker.learn_probing(TGID, "time", on=True, at_ns=1 * MS)
    world.head(declaring())
    digest = uploaded(world, hash_ns=2 * MS, hash_calls=3).digest
    assert (digest.source, digest.ns, digest.computed, digest.result) == ("exact", 2 * MS + 1500, None, None)

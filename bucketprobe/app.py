# SPDX-License-Identifier: Apache-2.0
"""The agent: wires everything together and runs the loop. The only module that sees all the others."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bucketprobe import abi, bpf, capture, decode, privileges, web
from bucketprobe.catalog import CAPABILITY_SET_NAMES, DigestHealth, HealthSnapshot
from bucketprobe.config import FileClasses, Settings
from bucketprobe.errors import BucketprobeError
from bucketprobe.exporters.jsonl import JsonLines, open_records
from bucketprobe.exporters.prometheus import CONTENT_TYPE, PrometheusText
from bucketprobe.integrity import Hasher
from bucketprobe.link import BrokerLink, log
from bucketprobe.model import OUTCOMES, Request, Share
from bucketprobe.sinks.attribution import AttributionSink
from bucketprobe.sinks.integrity import IntegritySink
from bucketprobe.sinks.metrics import MetricsSink
from bucketprobe.stats import read_stats
from bucketprobe.tracker import Tracker

#: The agent's nice value.
NICE = -10
#: How long the loop sleeps at most; the kernel wakes it earlier where the ring fills.
PERIOD_SECONDS = 0.1

_WHAT_IS_MISSING = {
    "sk_data_ready": "no tracepoint sk_data_ready: a request begins at its first read, and the queue phase is absent",
    "tcp_receive_reset": "no tracepoint tcp_receive_reset: a reset by the client may count as closed by the server",
}


class WallClock:
    """Wall time of kernel stamps: the tightest of a few readings gives the offset, measured again every second."""

    def __init__(self) -> None:
        self._offset = 0
        self.measure()

    def measure(self) -> None:
        best = None
        for _ in range(3):
            before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
            if best is None or after - before < best:
                best = after - before
                self._offset = wall - (before + after) // 2

    def wall_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self._offset


class Agent:
    """One running agent: opens all that needs privileges, gives them up, and serves until a signal."""

    def __init__(self, settings: Settings, link: BrokerLink) -> None:
        self._settings = settings
        self._link = link
        self._clock = WallClock()
        self._events: Counter[int] = Counter()
        self._undecodable = 0
        self._processes: dict[int, str] = {}
        self._ring: bpf.Ring | None = None
        self._stats_fd = -1
        self._stats = dict.fromkeys(abi.Stat, 0)
        self._stop = False
        self._reopen = False
        self._records: JsonLines | None = None

    def run(self) -> None:
        """Ends at SIGTERM or SIGINT with everything flushed. Raises BucketprobeError for whatever keeps it from running."""
        settings = self._settings
        uid, _ = privileges.unprivileged_ids(settings.user)
        control = capture.open_listener(Path(settings.run_dir), uid)
        try:
            listener = web.open_listener(settings.listen)
            if settings.records is not None:
                self._records = JsonLines(open_records(settings.records), settings.records, log)
            self._serve(control.socket, listener)
        finally:
            control.close()

    def _serve(self, control_socket: socket.socket, listener: socket.socket) -> None:
        settings, link = self._settings, self._link
        self._sink = MetricsSink(settings.tags.labels())
        self._attribution = AttributionSink()
        self._integrity = IntegritySink()
        self._hashing: dict[str, Any] = {}  # what digests cost, as the broker says
        classes, declared = FileClasses(settings.storage), settings.digest.declared
        self._tracker = Tracker(classes, self._clock.wall_ns, self._path_of, self._cwd_of, self._finished, declared)
        self._control = capture.ControlServer(control_socket, self._status, self._lost_flat)
        text = PrometheusText(self._sink.collect, self._health)
        wake, wake_end = socket.socketpair()
        wake_end.setblocking(False)
        signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

        # It needs little, but when the host is short of CPU, which is when it is asked most, it must not be the one to wait.
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        dropped = privileges.drop_all(settings.user)
        log(f"runs as {dropped.user} (uid {dropped.uid}) without capabilities: all five sets are empty, and no new ones can be gained")
        ready, descriptors = link.await_ready()
        events, self._stats_fd = descriptors
        self._tracker.secret = ready["secret"]
        self._ring = bpf.Ring(events, ready["ring_bytes"])
        for name in ready["missing"]:
            log(_WHAT_IS_MISSING[name])
        self._hear_broker()
        if not self._processes:
            log(f"waits for a target ({self._wanted()}): nothing runs there yet")
        server = web.WebServer(listener, text.chunks, CONTENT_TYPE, self._why_not_ready, log)
        server.start()
        host, port = server.address
        log(f"ready: metrics on http://{f'[{host}]' if ':' in host else host}:{port}/metrics")
        gc.collect()
        gc.freeze()
        poll = select.epoll()
        for source in (events, link.fileno(), self._control.fileno(), wake.fileno()):
            poll.register(source, select.EPOLLIN)
        try:
            second = 0.0
            while not self._stop:
                ready_sources = {fd for fd, _ in poll.poll(0 if self._tracker.due else PERIOD_SECONDS)}
                if wake.fileno() in ready_sources:
                    wake.recv(64)
                self._hear_broker()  # whether or not more has come: who asked it last may have taken in what it said before
                now = time.monotonic()
                self._drain()
                if self._control.fileno() in ready_sources:
                    self._control.on_readable(now)
                self._control.on_timer(now)
                if self._records:
                    self._records.flush()
                if self._reopen:
                    self._reopen = False
                    self._ask_reopen()
                server.beat()
                if now >= second:
                    second = now + 1
                    self._clock.measure()
        finally:
            server.stop()
            with suppress(BucketprobeError, OSError):  # without a broker they are detached already
                link.ask({"op": "detach"})
            self._drain()
            self._tracker.flush()
            self._control.close()
            if self._records:
                self._records.close()
            log(self._account())

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._reopen = True
        else:
            self._stop = True

    def _ask_reopen(self) -> None:
        if self._settings.records in (None, "-"):
            log("SIGHUP: there is no records file to open again")
        else:
            self._link.tell({"op": "reopen"})

    def _drain(self) -> None:
        """Reads the ring until it is empty or a good part of a second's events is done."""
        assert self._ring is not None
        for _ in range(16):
            records = self._ring.read()
            if records:
                self._hear_broker()  # what these speak of, it has named before
            for record in records:
                try:
                    event = decode.decode(record)
                except decode.Undecodable:
                    self._undecodable += 1
                    continue
                self._events[event.kind] += 1
                if event.kind == abi.Kind.PROCESS:
                    self._process_changed(event)
                else:
                    self._tracker.feed(event)
            if len(records) < 4096:
                break
        # Where the ring could not be emptied, what lies in it may still say whose work something was.
        self._tracker.tick(time.monotonic_ns() if len(records) < 4096 else self._tracker.latest_ns)

    def _process_changed(self, event: Any) -> None:
        match event.what:
            case abi.ProcessChange.LISTEN:
                self._link.tell({"op": "process", "tgid": event.tgid, "why": f"listens on port {event.other}"})
            case abi.ProcessChange.FORK:
                # The kernel follows it already, and finds what it inherited in its parent's descriptors.
                self._processes[event.tgid] = f"child of {event.other}"
                self._tracker.inherit(event.tgid, event.other)
                self._link.tell({"op": "fork", "tgid": event.tgid})
            case abi.ProcessChange.EXEC:
                self._link.tell({"op": "exec", "tgid": event.tgid})
            case abi.ProcessChange.URING:
                self._tracker.learn_uring(event.tgid)
            case abi.ProcessChange.EXIT:
                if self._processes.pop(event.tgid, None):
                    self._link.tell({"op": "gone", "tgid": event.tgid})
                    self._tracker.forget_process(event.tgid)
                    if not self._processes:
                        log(f"the target is gone (pid {event.tgid} ended): {self._what_now()}")

    def _hear_broker(self) -> None:
        for message, descriptors in self._link.messages():
            match message["op"]:
                case "log":
                    log(message["text"])
                case "process":
                    if not self._processes:
                        log(f"observes pid {message['tgid']} ({message['why']})")
                    self._processes[message["tgid"]] = message["why"]
                    if message["cwd"]:
                        self._tracker.learn_cwd(message["tgid"], message["cwd"])
                case "runtime":
                    log(f"pid {message['tgid']}: {message['detail']}")
                    self._tracker.learn_runtime(message["tgid"], message["kind"])
                case "uring":
                    self._tracker.learn_uring(message["tgid"])
                case "files":
                    for gen, _fd, path, flags in message["files"]:
                        self._tracker.learn_file(gen, path, flags)
                case "hasher":
                    hasher = Hasher(message["family"], message["proven"], message["valued"], message["outside_ns"])
                    self._tracker.learn_hasher(message["tgid"], hasher)
                case "hashed":
                    self._tracker.learn_hashing(message["tgid"], message["bytes"], message["ns"], message["from"], message["until"])
                case "probing":
                    self._tracker.learn_probing(message["tgid"], message["part"], on=message["on"], at_ns=message["at"])
                case "digests":
                    self._hashing = message
                case "records":
                    assert self._records is not None
                    self._records.reopen(descriptors[0])
                    log(f"SIGHUP: {self._settings.records} was opened again")

    def _path_of(self, tgid: int, fd: int) -> tuple[str, int] | None:
        found = self._link.ask({"op": "path", "tgid": tgid, "fd": fd})["found"]
        return (found[0], found[1]) if found else None

    def _cwd_of(self, tgid: int) -> str | None:
        found: str | None = self._link.ask({"op": "cwd", "tgid": tgid})["found"]
        return found

    def _finished(self, request: Request) -> None:
        self._sink.observe(request)
        self._attribution.observe(request)
        self._integrity.observe(request)
        self._control.offer(request)
        if self._records:
            self._records.write(request)

    def _kernel_stats(self) -> dict[abi.Stat, int]:
        try:
            values = read_stats(self._stats_fd)
        except PermissionError:
            # Before Linux 5.19 a process without capabilities may not look into a map: bpf(2) is refused to it altogether.
            try:
                values = self._link.ask({"op": "stats"})["values"]
            except (BucketprobeError, OSError):
                return self._stats  # the broker has ended, which the loop finds out and says: what it counted last
        self._stats = {stat: values[stat] for stat in abi.Stat}
        return self._stats

    def _lost(self) -> dict[tuple[str, str], int]:
        lost = {("kernel", stat.name.lower()): self._stats[stat] for stat in abi.Stat if stat >= abi.Stat.RING_HEAD}
        lost[("decode", "undecodable")] = self._undecodable
        lost |= {("tracker", cause): count for cause, count in self._tracker.lost.items()}
        if self._records:
            lost |= {("jsonl", cause): count for cause, count in self._records.lost.items()}
        return lost

    def _lost_flat(self) -> Mapping[str, int]:
        self._kernel_stats()
        return {f"{stage}.{cause}": count for (stage, cause), count in self._lost().items()}

    def _health(self) -> HealthSnapshot:
        stats = self._kernel_stats()
        finished: dict[str, int] = {name: stats[abi.Stat(abi.Stat.COMPLETE + i)] for i, name in enumerate(OUTCOMES)}
        held = privileges.current()
        return HealthSnapshot(
            begun=stats[abi.Stat.BEGUN],
            finished=finished,
            in_flight=stats[abi.Stat.BEGUN] - sum(finished.values()),
            records=self._tracker.records,
            lost=self._lost(),
            events={kind.name.lower(): self._events[kind] for kind in abi.Kind},
            series_overflow=self._sink.overflowed,
            capabilities={CAPABILITY_SET_NAMES[name]: mask.bit_count() for name, mask in held.items()},
            target_processes=len(self._processes),
            targets_up=int(bool(self._processes)),
            accept_queue=max(0, stats[abi.Stat.QUEUED] - stats[abi.Stat.DEQUEUED]),
            ring_bytes=self._settings.ring_bytes,
            cpu_seconds=time.process_time(),
            rss_bytes=_resident_bytes(),
            labelled=self._attribution.labelled,
            evidence=self._attribution.evidence,
            limited_by=self._attribution.limited_by,
            attributed=self._attributed(),
            gap_bytes=self._tracker.gap_bytes,
            coverage_gaps=("tls",) if stats[abi.Stat.TLS] else (),
            digest=self._digest_health(),
        )

    def _digest_health(self) -> DigestHealth:
        spec, told = self._settings.digest, self._hashing
        budgets = {"time": spec.time_budget_pct / 100, "total": spec.total_budget_pct / 100} if spec.mode == "auto" else {}
        return DigestHealth(
            requests=dict(self._integrity.requests),
            compared=dict(self._integrity.compared),
            mismatches=dict(self._integrity.mismatches),
            accepted=self._integrity.accepted,
            unattributed=self._tracker.unattributed_digests(),
            budgets=budgets,
            cost=told.get("cost_s", {}),
            prices={name: ns / 1e9 for name, ns in told.get("prices_ns", {}).items()},
            target_cpu=told.get("target_cpu_s"),
            attached=told.get("attached", {}),
            windows=told.get("windows", 0),
        )

    def _attributed(self) -> dict[tuple[str, str], Share]:
        """File work by label and kind; what no request got is unattributed."""
        untied = {("unattributed", kind): share for kind, share in self._tracker.unattributed.items()}
        return self._tracker.attributed | untied

    def _status(self) -> Mapping[str, object]:
        health = self._health()
        return {
            "pid": os.getpid(),
            "processes": {str(tgid): why for tgid, why in self._processes.items()},
            "begun": health.begun,
            "finished": dict(health.finished),
            "in_flight": health.in_flight,
            "records": health.records,
            "lost": {f"{stage}.{cause}": count for (stage, cause), count in health.lost.items() if count},
            "cpu_seconds": health.cpu_seconds,
            "rss_bytes": health.rss_bytes,
            "coverage_gaps": health.gaps,
        }

    def _why_not_ready(self) -> str | None:
        return None if self._processes else f"no target: nothing matches {self._wanted()}"

    def _what_now(self) -> str:
        if self._settings.target.only_pids:
            return "nothing is left to observe; what was counted stays on /metrics until bucketprobe is stopped"
        return f"waits for {self._wanted()}"

    def _wanted(self) -> str:
        spec = self._settings.target
        parts = (
            *(f"port {port}" for port in spec.ports),
            *(f"pid {pid}" for pid in spec.pids),
            *(f"exe {exe}" for exe in spec.exes),
            *(f"unit {unit}" for unit in spec.units),
            *(f"cgroup {cgroup}" for cgroup in spec.cgroups),
        )
        return ", ".join(parts)

    def _account(self) -> str:
        """What was counted, at the end: requests begun = finished by outcome + still in flight."""
        health = self._health()
        outcomes = ", ".join(f"{count} {name}" for name, count in health.finished.items())
        causes = ", ".join(f"{count} {stage}.{cause}" for (stage, cause), count in health.lost.items() if count)
        lost = f"lost: {causes}" if causes else "0 losses"
        return f"stopped: {health.begun} requests begun, {outcomes}, {health.in_flight} in flight; {health.records} records, {lost}"


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(settings: Settings, link: BrokerLink) -> None:
    """Runs an agent in this process until it is told to stop. Raises BucketprobeError."""
    if not settings.storage.roots:
        log("no --storage-root: all file work counts as other files, and no phase is named storage")
    try:
        Agent(settings, link).run()
    finally:
        link.close()

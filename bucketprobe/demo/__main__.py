# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a reference Bucket under the load of real clients, observed; what was seen, checked against the clients.

    python -m bucketprobe.demo --seconds 8 --model threads

Runs as root. Everything it makes is in one folder below $TMPDIR, or else /var/tmp, which unlike /tmp is on a disk; the folder
and all processes are gone when it ends, however it ends.

Exit code: 0 all numbers agree, 1 one does not or something failed, 2 it cannot run here, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil

from bucketprobe import capture
from bucketprobe.demo import check, load
from bucketprobe.errors import BucketprobeError, UsageError

CONNECTIONS = 16
CURL_EVERY = 20
MAX_BYTES = 2 << 20
PUT_SHARE = 0.5
#: How long the parts may take to start, to report the last requests, and to end; seconds. A cold compile is what takes long.
START_S = 130.0
SETTLE_S = 5.0
STOP_S = 15.0

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    seconds: float
    model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process took: CPU time from the load's begin to its end in seconds, resident memory after it in bytes."""

    cpu_s: float
    rss_bytes: int


@dataclass(slots=True)
class Findings:
    """All that came of one demonstration."""

    options: Options
    result: load.LoadResult
    metrics: str
    captured: list[dict[str, Any]]
    capture_end: dict[str, Any] | None
    client: list[check.Line]
    records: list[check.Line]
    ready_s: float
    usage: dict[str, Usage] = field(default_factory=dict)


class Progress:
    """What it is about, on standard error: a line for each step and, on a terminal, one that is rewritten."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()

    def step(self, text: str) -> None:
        self._stream.write(f"demo: {text}\n")
        self._stream.flush()

    def update(self, text: str) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()

    def clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Child:
    """A process of the demonstration. In a session of its own: Ctrl-C is for the demonstration, which ends it in its turn."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def await_start(self, started: Callable[[], bool]) -> None:
        """Waits until it is. Raises BucketprobeError, with what the process said, where it ended before."""
        deadline = time.monotonic() + START_S
        while not started():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                trouble = BucketprobeError(f"the {self.name} did not start: {self.log().strip() or 'it said nothing; run `bucketprobe doctor`'}")
                trouble.exit_code = code or 1
                raise trouble
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it, and by force what does not end in time."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


def demonstrate(options: Options, progress: Progress) -> Findings:
    """Runs it all and ends it all. Raises BucketprobeError."""
    with ExitStack() as stack:
        # Entered first, so that it is left last: the capture ends with the agent at the latest.
        background = stack.enter_context(ThreadPoolExecutor(1))
        folder = _folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        bucket = Child("Bucket", "bucketprobe.demo.bucket", ["--port", "0", "--root", f"{folder}/bucket", "--model", options.model], folder)
        stack.callback(bucket.stop)
        bucket.await_start(lambda: "listening on" in bucket.log())
        port = int(bucket.log().partition("listening on http://127.0.0.1:")[2].split()[0])
        progress.step(f"the reference Bucket ({options.model}) listens on 127.0.0.1:{port}")

        begin = time.monotonic()
        listen = f"127.0.0.1:{_free_port()}"
        agent = Child("agent", "bucketprobe.cli", _agent_arguments(port, listen, folder), folder)
        stack.callback(agent.stop)
        stack.callback(_ignore_signals)  # from here on, the clean-up is not to be interrupted
        progress.update("compiling and attaching the probes ...")
        agent.await_start(lambda: _ready(listen))
        ready_s = time.monotonic() - begin
        progress.clear()
        progress.step(f"the agent observes it, ready after {ready_s:.1f} s (its probes were compiled: the demonstration keeps no cache)")

        wanted = load.LoadOptions(
            port, connections=CONNECTIONS, seconds=options.seconds, put_share=PUT_SHARE, max_bytes=MAX_BYTES,
            curl_every=CURL_EVERY, log=folder / "client.jsonl",
        )  # fmt: skip
        load.check(wanted)
        progress.step(f"{CONNECTIONS} clients for {options.seconds:g} s, each {CURL_EVERY}th request of each by curl; a capture runs meanwhile")
        processes = _processes(agent.pid)
        before = _usage(processes)
        capturing = background.submit(capture.capture, folder / "run", options.seconds, 0.0)
        result = load.run(wanted, lambda done, seconds: progress.update(_load_line(done, seconds, options.seconds)))
        progress.clear()
        usage = {name: Usage(used.cpu_s - before[name].cpu_s, used.rss_bytes) for name, used in _usage(processes).items()}
        captured, end = capturing.result()
        _settle(folder / "run")
        metrics = _get(f"http://{listen}/metrics")
        agent.stop()
        return Findings(
            options, result, metrics, captured, end, _lines(folder / "client.jsonl"), _lines(folder / "records.jsonl"), ready_s, usage
        )


def _folder() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="bucketprobe-demo-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
    except OSError as error:
        raise UsageError(f"no folder could be made in {error.filename} ({error.strerror}): name a writable one in TMPDIR") from error
    folder.chmod(0o755)  # the agent, as nobody, removes its socket from it
    return folder


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _agent_arguments(port: int, listen: str, folder: Path) -> list[str]:
    return [
        "run", "--port", str(port), "--listen", listen, "--storage-root", f"{folder}/bucket", "--metadata", "meta/**",
        "--records", f"{folder}/records.jsonl", "--run-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache",
    ]  # fmt: skip


def _ready(listen: str) -> bool:
    try:
        return bool(_get(f"http://{listen}/readyz"))
    except OSError:
        return False


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=1) as answer:
        return str(answer.read().decode())


def _processes(agent: int) -> dict[str, psutil.Process]:
    """The agent and the broker that it has started."""
    found = psutil.Process(agent)
    return {"agent": found} | {"broker": child for child in found.children()}


def _usage(processes: Mapping[str, psutil.Process]) -> dict[str, Usage]:
    usage = {}
    for name, process in processes.items():
        times = process.cpu_times()
        usage[name] = Usage(times.user + times.system, process.memory_info().rss)
    return usage


def _settle(run_dir: Path) -> None:
    """Waits until the agent has reported what has ended; where it never does, the comparison shows what is missing."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        status = capture.status(run_dir)
        if status["in_flight"] == 0 and status["records"] == status["begun"]:
            return
        time.sleep(0.1)


def _lines(path: Path) -> list[check.Line]:
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def _load_line(done: int, seconds: float, wanted: float) -> str:
    part = min(seconds / wanted, 1.0)
    return f"load: [{'#' * round(part * 30):<30}] {min(seconds, wanted):4.1f} of {wanted:g} s, {done:,} requests "


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# --- what is printed ---


def report(findings: Findings, rows: Sequence[check.Row], look: capture.Look) -> str:
    """The whole report: metrics, breakdown, the slowest, the cost, the comparison, and what to do next."""
    scrape = check.Scrape(findings.metrics)
    summary = capture.summarise(findings.captured)
    parts = [
        (f"Metrics, an extract of /metrics after the load ({len(findings.metrics):,} bytes)", metrics_table(scrape)),
        (_capture_title(findings), capture.render_table(summary, *look)),
        ("Where the time of the slowest went", capture.render_slowest(summary, *look)),
        ("What it cost, measured here in this run", cost_table(findings)),
        ("Checked against the clients' own count", comparison(findings, rows, scrape, look)),
        ("By hand, as root, for your own service", BY_HAND),
    ]
    return "\n".join(f"{_heading(title, look)}\n{text}" for title, text in parts)


def _heading(title: str, look: capture.Look) -> str:
    line = f"== {title} "
    line += "=" * max(2, min(look.width, 100) - 1 - len(line))
    return f"\x1b[1m{line}\x1b[0m" if look.color else line


def _capture_title(findings: Findings) -> str:
    return f"Breakdown by phase, a capture of {findings.options.seconds:g} s during the load"


#: Histograms of the extract: catalog name, unit, and the tag by which its series are shown.
_HISTOGRAMS = (
    ("bucket.artifact.write.duration", "milliseconds", None, ()),
    ("bucket.artifact.write.size", "bytes", None, ()),
    ("bucket.artifact.read.duration", "milliseconds", None, ()),
    ("bucket.performance.queue_delay.duration", "milliseconds", "stage", ("accept", "read", "runqueue")),
)


def metrics_table(scrape: check.Scrape) -> str:
    """The catalog's metrics, 79 columns wide at most; histograms by count, estimated quantiles and sum."""
    lines = []
    for name in ("write", "read"):
        counts = scrape.by("status", name=f"bucket_artifact_{name}_count_total")
        shown = ", ".join(f"{status}: {count:,}" for (status,), count in counts.items())
        lines.append(f"  bucket.artifact.{name}.count by status".ljust(41) + (shown or "none"))
    lines.append("  bucket.storage.backlog_size.gauge".ljust(41) + f"{scrape.total('bucket_storage_backlog_size_gauge'):.0f}")
    lines += ["", f"  {'':<33}{'count':>8}{'p50':>11}{'p95':>11}{'sum':>14}"]
    for name, unit, label, values in _HISTOGRAMS:
        series = f"{name.replace('.', '_')}_{unit}"
        short = "ms" if unit == "milliseconds" else unit
        if label is None:
            lines.append(_histogram_line(f"{name.removeprefix('bucket.')}, {short}", scrape.histogram(series), short))
            continue
        lines.append(f"  {name.removeprefix('bucket.')}, {short}")
        lines += [_histogram_line(f"  {label} {value}", scrape.histogram(series, **{label: value}), short) for value in values]
    lines.append("  Quantiles are estimated from the buckets, as histogram_quantile in PromQL does.")
    return "\n".join(lines) + "\n"


def _histogram_line(name: str, histogram: check.Histogram, unit: str) -> str:
    digits = 0 if unit == "bytes" else 2
    quantiles = "".join(f"{'-' if value is None else f'{value:,.{digits}f}':>11}" for value in map(histogram.quantile, (0.5, 0.95)))
    return f"  {name:<33}{histogram.count:>8,}{quantiles}{histogram.total:>14,.{digits}f}"


def cost_table(findings: Findings) -> str:
    """CPU as a share of one core during the load, memory after it; both processes of the agent."""
    result = findings.result
    lines = []
    for name, used in findings.usage.items():
        share = 100 * used.cpu_s / result.elapsed_s
        each = 1e6 * used.cpu_s / result.requests
        lines.append(f"  {name:<8}{share:6.1f} % of a core, {each:6.0f} ms of CPU per 1,000 requests, {used.rss_bytes / 2**20:5.1f} MiB resident")
    latency = result.latency_ms
    lines += [
        f"  Bucket, observed: {result.requests_per_s:,.0f} requests/s, {result.bytes_per_s / 1e6:,.1f} MB/s;"
        f" clients waited {latency['p50']:,.1f} ms (p50), {latency['p99']:,.1f} ms (p99)",
        "  The probes' own time is the Bucket's system calls': `make bench` compares it with and without.",
    ]
    return "\n".join(lines) + "\n"


def comparison(findings: Findings, rows: Sequence[check.Row], scrape: check.Scrape, look: capture.Look) -> str:
    def paint(text: str, good: bool) -> str:
        return f"\x1b[{32 if good else 31}m{text}\x1b[0m" if look.color else text

    lost = ", ".join(f"{cause} {count:,}" for cause, count in check.losses(scrape).items())
    text = check.render(rows, paint) + f"  losses, by the agent's own account: {lost or 'none'}\n"
    result = findings.result
    if not result.clean:
        text += f"  the service itself failed the clients: {result.errors} unanswered, {result.unexpected} unexpected, {result.corrupt} corrupt\n"
    verdict = "every number agrees" if passed(findings, rows) else "MISMATCH: this run's numbers are not to be trusted"
    return f"{text}  {paint(verdict, passed(findings, rows))}\n"


def passed(findings: Findings, rows: Sequence[check.Row]) -> bool:
    """Whether every number agrees with the clients' and the clients were served as the contract says."""
    return findings.result.clean and findings.result.requests == len(findings.client) and all(row.agrees for row in rows)


_COMMAND = shlex.quote(str(Path(sys.executable).parent.joinpath("bucketprobe")))
BY_HAND = f"""\
  {_COMMAND} doctor
  {_COMMAND} run --port 8080 --storage-root /srv/bucket --metadata 'meta/**'
  curl -s http://127.0.0.1:9464/metrics
  {_COMMAND} capture --duration 10 --min-ms 50
"""


# --- the command ---


def seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise ValueError
    return value


def parse_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m bucketprobe.demo",
        description="Observe a reference Bucket under load and show where the time went. Example: python -m bucketprobe.demo --seconds 8",
    )
    parser.add_argument("--seconds", type=seconds, default=8.0, metavar="S", help="length of the load, 1 to 3600 (default %(default)g)")
    parser.add_argument("--model", choices=("threads", "prefork"), default="threads", help="how the Bucket serves (default %(default)s)")
    return Options(**vars(parser.parse_args(arguments)))


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    progress = Progress()
    for number in SIGNALS:
        signal.signal(number, _end)
    try:
        findings = demonstrate(options, progress)
    except BucketprobeError as error:
        progress.clear()
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    rows = check.compare(findings.client, check.Scrape(findings.metrics), findings.records)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    with suppress(BrokenPipeError):
        print(report(findings, rows, capture.look_of(sys.stdout, os.environ)), end="", flush=True)
    return 0 if passed(findings, rows) else 1


if __name__ == "__main__":
    sys.exit(main())

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
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bucketprobe import capture
from bucketprobe.demo import check, load
from bucketprobe.demo.bucket import MODELS
from bucketprobe.errors import BucketprobeError, UsageError

CONNECTIONS = 16
CURL_EVERY = 20
MAX_BYTES = 2 << 20
PUT_SHARE = 0.5
#: How long the parts may take to start, to report the last requests, and to end; seconds. A cold compile is what takes long.
START_S = 130.0
SETTLE_S = 5.0
STOP_S = 15.0

#: How the logs of the Bucket and of the agent say where they listen.
LISTENING = "listening on http://127.0.0.1:"
SERVING = "ready: metrics on http://"

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    seconds: float
    model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has taken: CPU time in seconds, and resident memory in bytes."""

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
    usage: dict[str, Usage]


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
        """Waits until it is. Raises BucketprobeError, with the process's last words, where it ended or took too long."""
        deadline = time.monotonic() + START_S
        while not started():
            self.check_alive("did not start")
            if time.monotonic() > deadline:
                raise BucketprobeError(f"the {self.name} did not start within {START_S:.0f} s: run `bucketprobe doctor`")
            time.sleep(0.02)

    def check_alive(self, trouble: str) -> None:
        """Raises BucketprobeError, with the process's last words and its exit code, where it ended by itself."""
        code = self._process.poll()
        if code is not None:
            words = self.log().strip().splitlines() or [f"it ended with {code} and said nothing"]
            error = BucketprobeError(f"the {self.name} {trouble}: {words[-1].removeprefix('bucketprobe: ').removeprefix('error: ')}")
            error.exit_code = max(code, 1)
            raise error

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
        try:
            return _demonstrate(stack, options, progress)
        finally:
            _on_signals(signal.SIG_IGN)  # the clean-up that the stack does now is not to be interrupted


def _demonstrate(stack: ExitStack, options: Options, progress: Progress) -> Findings:
    # Entered first, so that it is left last: the capture in it ends with the agent at the latest.
    background = stack.enter_context(ThreadPoolExecutor(1))
    folder = _folder()
    stack.callback(shutil.rmtree, folder, ignore_errors=True)

    bucket = Child("Bucket", "bucketprobe.demo.bucket", ["--port", "0", "--root", f"{folder}/bucket", "--model", options.model], folder)
    stack.callback(bucket.stop)
    bucket.await_start(lambda: LISTENING in bucket.log())
    port = int(bucket.log().partition(LISTENING)[2].split()[0])
    progress.step(f"the reference Bucket ({options.model}) listens on 127.0.0.1:{port}")

    begin = time.monotonic()
    progress.update("compiling and attaching the probes ...")
    agent = Child("agent", "bucketprobe.cli", _agent_arguments(port, folder), folder)
    stack.callback(agent.stop)
    agent.await_start(lambda: SERVING in agent.log())
    base = "http://" + agent.log().partition(SERVING)[2].partition("/")[0]
    agent.await_start(lambda: _ready(base))
    progress.clear()
    progress.step(f"the agent observes it, {time.monotonic() - begin:.1f} s after its start, the probes compiled anew")

    progress.step(f"{CONNECTIONS} clients for {options.seconds:g} s, each {CURL_EVERY}th of their requests by curl")
    processes = dict(zip(("agent", "broker"), (agent.pid, *_children(agent.pid)), strict=False))
    before = {name: _usage(pid) for name, pid in processes.items()}
    capturing = background.submit(capture.capture, folder / "run", options.seconds, 0.0)
    result = load.run(_load(port, options, folder), lambda done, seconds: progress.update(_load_line(done, seconds, options.seconds)))
    progress.clear()
    for child in (bucket, agent):
        child.check_alive("ended during the load")
    usage = {name: _used(before[name], _usage(pid)) for name, pid in processes.items()}
    captured, end = capturing.result()
    _settle(folder / "run")
    metrics = _get(f"{base}/metrics")
    agent.stop()
    return Findings(options, result, metrics, captured, end, _lines(folder / "client.jsonl"), _lines(folder / "records.jsonl"), usage)


def _folder() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="bucketprobe-demo-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
    except OSError as error:
        raise UsageError(f"no folder could be made in {error.filename} ({error.strerror}): name a writable one in TMPDIR") from error
    folder.chmod(0o755)  # the agent, as nobody, removes its socket from it
    return folder


def _agent_arguments(port: int, folder: Path) -> list[str]:
    return [
        "run", "--port", str(port), "--listen", "127.0.0.1:0", "--storage-root", f"{folder}/bucket", "--metadata", "meta/**",
        "--records", f"{folder}/records.jsonl", "--run-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache",
    ]  # fmt: skip


def _ready(base: str) -> bool:
    try:
        return bool(_get(f"{base}/readyz"))
    except OSError:
        return False


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=1) as answer:
        return str(answer.read().decode())


def _load(port: int, options: Options, folder: Path) -> load.LoadOptions:
    return load.LoadOptions(
        port, connections=CONNECTIONS, seconds=options.seconds, put_share=PUT_SHARE, max_bytes=MAX_BYTES,
        curl_every=CURL_EVERY, log=folder / "client.jsonl",
    )  # fmt: skip


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (proc_pid_stat(5)): state, ppid, ..."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def _children(parent: int) -> list[int]:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if int(_stat(int(pid))[1]) == parent:
                found.append(int(pid))
    return found


def _usage(pid: int) -> Usage:
    fields = _stat(pid)
    return Usage((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


def _used(before: Usage, after: Usage) -> Usage:
    """CPU time in between, memory at its end."""
    return Usage(after.cpu_s - before.cpu_s, after.rss_bytes)


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


def _on_signals(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


# --- what is printed ---


def report(findings: Findings, rows: Sequence[check.Row], look: capture.Look) -> str:
    """The whole report: metrics, breakdown, the slowest, the cost, the comparison, and what to do next."""
    scrape = check.Scrape(findings.metrics)
    summary = capture.summarise(findings.captured)
    parts = [
        (f"Metrics, an extract of /metrics after the load ({len(findings.metrics):,} bytes)", metrics_table(scrape)),
        (f"Breakdown by phase, from a capture of {findings.options.seconds:g} s during the load",
         capture.render_table(summary, *look) + capture_note(findings)),
        ("Where the time of the slowest went", capture.render_slowest(summary, *look)),
        ("What it cost, measured here in this run", cost_table(findings)),
        ("Checked against the clients' own count", comparison(findings, rows, scrape, look)),
        ("By hand, as root, for a service of your own", by_hand()),
    ]  # fmt: skip
    return "\n".join(f"{_heading(title, look)}\n{text}" for title, text in parts)


def _heading(title: str, look: capture.Look) -> str:
    line = f"== {title} "
    line += "=" * max(2, min(look.width, 100) - 1 - len(line))
    return f"\x1b[1m{line}\x1b[0m" if look.color else line


def capture_note(findings: Findings) -> str:
    """How much of the load the capture saw."""
    text = f"Of all {findings.result.requests:,} requests, {len(findings.captured):,} ended within the capture"
    if findings.capture_end is None:
        return f"{text}, which ended early.\n"
    dropped = findings.capture_end["dropped"]
    return f"{text}; {dropped:,} of them were dropped.\n" if dropped else f"{text}.\n"


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
    lines.append("  Quantiles are estimated from buckets, as PromQL's histogram_quantile does.")
    return "\n".join(lines) + "\n"


def _histogram_line(name: str, histogram: check.Histogram, unit: str) -> str:
    digits = 0 if unit == "bytes" else 2
    quantiles = "".join(f"{'-' if value is None else f'{value:,.{digits}f}':>11}" for value in map(histogram.quantile, (0.5, 0.95)))
    return f"  {name:<33}{histogram.count:>8,}{quantiles}{histogram.total:>14,.{digits}f}"


def cost_table(findings: Findings) -> str:
    """CPU as a share of one core during the load, memory after it, of both processes of the agent; and what was served meanwhile."""
    result, latency = findings.result, findings.result.latency_ms
    lines = [f"  {'':<8}{'share of a core':>18}{'CPU per 1,000 requests':>26}{'resident memory':>19}"]
    for name, used in findings.usage.items():
        share, each = used.cpu_s / result.elapsed_s, 1000 * used.cpu_s / (result.requests or 1)
        lines.append(f"  {name:<8}{share * 100:>16.1f} %{each * 1000:>23.0f} ms{used.rss_bytes / 2**20:>15.1f} MiB")
    lines += [
        f"  Meanwhile the Bucket served {result.requests_per_s:,.0f} requests/s and {result.bytes_per_s / 1e6:,.1f} MB/s,",
        f"  and its clients waited {latency['p50']:,.1f} ms (p50) and {latency['p99']:,.1f} ms (p99).",
        "  The probes run within the Bucket's system calls, and their time is not in",
        "  here: `make bench` compares the Bucket with and without them.",
    ]
    return "\n".join(lines) + "\n"


def comparison(findings: Findings, rows: Sequence[check.Row], scrape: check.Scrape, look: capture.Look) -> str:
    def paint(text: str, good: bool) -> str:
        return f"\x1b[{32 if good else 31}m{text}\x1b[0m" if look.color else text

    lost = ", ".join(f"{cause} {count:,}" for cause, count in check.losses(scrape).items())
    result = findings.result
    by_curl = sum(count for kind, count in result.by_kind.items() if kind.startswith("curl_"))
    text = f"  {result.requests:,} requests, {by_curl:,} of them by curl\n\n{check.render(rows, paint)}"
    text += f"  what the agent says that it lost: {lost or 'nothing'}\n"
    if not result.clean:
        text += f"  not served as it should be: {result.errors} without answer, {result.unexpected} unexpected, {result.corrupt} corrupt\n"
    verdict = "Every number agrees." if passed(findings, rows) else "MISMATCH: not every number agrees."
    return f"{text}  {paint(verdict, passed(findings, rows))}\n"


def passed(findings: Findings, rows: Sequence[check.Row]) -> bool:
    """Whether every number agrees with the clients' and the clients were served as the contract says."""
    return findings.result.clean and findings.result.requests == len(findings.client) and all(row.agrees for row in rows)


def by_hand() -> str:
    """What to type next; the command by the shortest path."""
    path = Path(sys.executable).with_name("bucketprobe")
    command = shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
    return f"""\
  see what the host gives:  {command} doctor
  observe a service:        {command} run --port 8080 \\
                              --storage-root /srv/bucket --metadata 'meta/**'
  scrape it:                curl -s http://127.0.0.1:9464/metrics
  see where time goes:      {command} capture --duration 10
"""


# --- the command ---


def seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 600:
        raise ValueError
    return value


def parse_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m bucketprobe.demo",
        description="Observe a reference Bucket under load and show where the time went. Example: python -m bucketprobe.demo --seconds 8",
    )
    parser.add_argument("--seconds", type=seconds, default=8.0, metavar="S", help="length of the load, 1 to 600 (default %(default)g)")
    parser.add_argument("--model", choices=MODELS, default="threads", help="how the Bucket serves (default %(default)s)")
    return Options(**vars(parser.parse_args(arguments)))


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    progress = Progress()
    _on_signals(_end)
    try:
        findings = demonstrate(options, progress)
    except BucketprobeError as error:
        progress.clear()
        progress.step(str(error))
        return error.exit_code
    except OSError as error:
        progress.clear()
        progress.step(f"it could not go on: {error}; make room or repair that, and run it again")
        return 1
    except SystemExit:
        progress.clear()
        progress.step("interrupted; its processes and files are gone")
        raise
    _on_signals(signal.SIG_DFL)
    rows = check.compare(findings.client, check.Scrape(findings.metrics), findings.records)
    try:
        print(report(findings, rows, capture.look_of(sys.stdout, os.environ)), end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output has enough
    return 0 if passed(findings, rows) else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The command line. Exit codes: 0 done, 1 failed while running (doctor: works, reduced), 2 cannot run as called or here,
3 another agent runs on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bucketprobe import __version__
from bucketprobe.errors import BucketprobeError

#: How long an agent that was started for one capture may take to be ready, in seconds.
START_SECONDS = 130.0


class Sentences(click.Group):
    """Turns every expected error into one line on standard error and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BucketprobeError as error:
            click.echo(f"bucketprobe: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output has enough
            sys.exit(1)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name what is observed and how; each overrides the file of --config."""
    options = (
        click.option("--config", "config", metavar="FILE", help="Settings in TOML; options override it."),
        click.option("--port", "ports", type=int, multiple=True, metavar="N", help="The process that listens on this TCP port."),
        click.option("--pid", "pids", type=int, multiple=True, metavar="PID", help="This process and its children."),
        click.option("--exe", "exes", multiple=True, metavar="PATH|NAME", help="Processes of this program."),
        click.option("--unit", "units", multiple=True, metavar="NAME", help="Processes of this systemd unit."),
        click.option("--cgroup", "cgroups", multiple=True, metavar="PATH", help="Processes in this control group."),
        click.option("--storage-root", "roots", multiple=True, metavar="DIR", help="A directory that holds artifacts."),
        click.option("--metadata", "metadata", multiple=True, metavar="GLOB", help="Files that hold metadata, such as '*.db'."),
        click.option("--digest", "mode", metavar="MODE", help="Look at digests: auto (within a budget), always or off. [auto]"),
        click.option("--run-dir", metavar="DIR", help="Where the control socket is. [/run/bucketprobe]"),
        click.option("--cache-dir", metavar="DIR", help="Where compiled probes are kept. [/var/cache/bucketprobe]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


_TIME_BUDGET = "What measuring digests' time may cost, in per cent of the service's CPU. [0.2]"
_TOTAL_BUDGET = "What measuring digests' time and values may cost, in per cent of the service's CPU. [0.4]"
_DECLARED = "Where a request says which digest its body has. [header:X-Artifact-Digest, query:digest]"


def agent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a running agent."""
    options = (
        click.option("--listen", metavar="HOST:PORT", help="Where /metrics, /healthz and /readyz are served. [127.0.0.1:9464]"),
        click.option("--records", metavar="PATH|-", help="Write one JSON object per finished request there; - is standard output."),
        click.option("--user", metavar="NAME", help="Whom the agent becomes once it is attached. [nobody]"),
        click.option("--ring-bytes", type=int, metavar="N", help="Size of the event ring, a power of two. [1048576]"),
        click.option("--max-connections", type=int, metavar="N", help="Connections followed at once. [4096]"),
        click.option("--head-bytes", type=int, metavar="N", help="How much of a request's head is captured. [8192]"),
        click.option("--digest-time-budget", "time_budget_pct", type=float, metavar="PCT", help=_TIME_BUDGET),
        click.option("--digest-total-budget", "total_budget_pct", type=float, metavar="PCT", help=_TOTAL_BUDGET),
        click.option("--digest-declared", "declared", multiple=True, metavar="PLACE", help=_DECLARED),
        click.option("--environment", metavar="TEXT", help="Value of the tag environment."),
        click.option("--region", metavar="TEXT", help="Value of the tag region."),
        click.option("--node-id", metavar="TEXT", help="Value of the tag node_id. [the host's name]"),
        click.option("--service-version", "bucket_service_version", metavar="TEXT", help="Value of the tag bucket_service_version."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _settings(given: dict[str, Any]) -> Any:
    from bucketprobe import config

    table_of = {key.name: key.table for key in config.KEYS}
    path = given.pop("config", None)
    for name in ("run_dir", "cache_dir"):  # a shell's user means the current directory; a file's author cannot know it
        given[name] = given.get(name) and os.path.abspath(given[name])
    given["roots"] = tuple(map(os.path.abspath, given["roots"]))
    return config.load(path, {f"{table_of[name]}.{name}": value for name, value in given.items()})


@click.group(cls=Sentences, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bucketprobe")
def main() -> None:
    """Sees from outside, by eBPF, where each request to an artifact store spent its time."""


@main.command()
@settings_options
@agent_options
def run(**given: Any) -> None:
    """Observe a service until stopped.

    \b
    Example:
      bucketprobe run --port 8080 --storage-root /srv/bucket --metadata '*.json'

    SIGTERM and SIGINT stop it, SIGHUP opens the records file again. The service does not notice.
    """
    from bucketprobe import privileges
    from bucketprobe.errors import UsageError

    settings = _settings(given)
    if settings.target.empty:
        raise UsageError("Nothing to observe: name the service with --port, --pid, --exe, --unit or --cgroup.")
    if settings.target.only_pids and not any(Path(f"/proc/{pid}").exists() for pid in settings.target.pids):
        pids = ", ".join(str(pid) for pid in settings.target.pids)
        raise UsageError(f"No process has pid {pids}: look it up, or name the service by --port, which also finds it after a restart.")
    privileges.require_root_caps()
    from bucketprobe.link import BrokerLink

    link = BrokerLink(settings)  # it loads the probes while the rest of this program is being imported
    from bucketprobe import app

    app.run(settings, link)


@main.command()
@settings_options
@click.option("--duration", type=float, default=10.0, show_default=True, metavar="S", help="Seconds to look.")
@click.option("--min-ms", type=float, default=0.0, show_default=True, metavar="N", help="Only requests that took at least so long.")
@click.option("--slowest", type=click.IntRange(0, 100), default=3, show_default=True, metavar="N", help="How many to show one by one.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def capture(duration: float, min_ms: float, slowest: int, form: str, **given: Any) -> None:
    """Show where requests spend their time, for some seconds.

    Asks the running agent; where none runs, one is started for the time (name the service then, as for run).

    \b
    Example:
      bucketprobe capture --duration 10 --min-ms 50
    """
    from bucketprobe import capture as captures

    settings = _settings(given)
    run_dir = Path(settings.run_dir)
    try:
        records, end = captures.capture(run_dir, duration, min_ms, sys.stderr)
    except captures.NoAgent:
        if settings.target.empty:
            raise
        with _Borrowed(settings):
            records, end = captures.capture(run_dir, duration, min_ms, sys.stderr)
    summary = captures.summarise(records, slowest)
    if form == "json":
        click.echo(captures.render_json(summary))
    else:
        look = captures.look_of(sys.stdout, os.environ)
        click.echo(captures.render_table(summary, *look))
        if slowest and records:
            click.echo(captures.render_slowest(summary, *look))
    if end is None:
        click.echo("bucketprobe: the capture ended early; what came so far is shown.", err=True)
        sys.exit(1)
    missing = {name: count for name, count in {"dropped": end["dropped"], **end["lost"]}.items() if count}
    if missing:
        shown = ", ".join(f"{name} {count}" for name, count in missing.items())
        click.echo(f"bucketprobe: not all is shown; lost meanwhile: {shown}", err=True)


class _Borrowed:
    """An agent for the time of one capture, on a free metrics port."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __enter__(self) -> None:
        from bucketprobe import capture as captures

        spec, storage, digest = self._settings.target, self._settings.storage, self._settings.digest
        named = {
            "--port": spec.ports, "--pid": spec.pids, "--exe": spec.exes, "--unit": spec.units, "--cgroup": spec.cgroups,
            "--storage-root": storage.roots, "--metadata": storage.metadata,
            "--digest": (digest.mode,), "--digest-declared": digest.declared,
            "--digest-time-budget": (digest.time_budget_pct,), "--digest-total-budget": (digest.total_budget_pct,),
            "--run-dir": (self._settings.run_dir,), "--cache-dir": (self._settings.cache_dir,),
        }  # fmt: skip
        command = [sys.executable, "-m", "bucketprobe.cli", "run", "--listen", "127.0.0.1:0"]
        for option, values in named.items():
            for value in values:
                command += [option, str(value)]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the agent is not left behind
        self._agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._agent.poll() is None:
            try:
                captures.status(Path(self._settings.run_dir))
                return
            except captures.NoAgent:
                time.sleep(0.05)
        self.__exit__()
        raise BucketprobeError("The agent for this capture did not start: see the lines above, and run `bucketprobe doctor`.")

    def __exit__(self, *_: object) -> None:
        if self._agent.poll() is None:
            self._agent.send_signal(signal.SIGTERM)
            try:
                self._agent.wait(10)
            except subprocess.TimeoutExpired:
                self._agent.kill()


@main.command()
@settings_options
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def doctor(as_json: bool, **given: Any) -> None:
    """Say what this kernel, these privileges and these packages give, what each lack costs, and its remedy.

    \b
    Exit code: 0 all is there, 1 it works with something reduced, 2 it cannot work.
    Example:
      bucketprobe doctor --port 8080
    """
    import orjson

    from bucketprobe import doctor as doctors

    report = doctors.run(_settings(given))
    if as_json:
        click.echo(orjson.dumps(report.as_dict(), option=orjson.OPT_INDENT_2))
    else:
        click.echo(doctors.render_table(report, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    sys.exit(report.exit_code)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The command line: what it says, where it says it, and with which exit code. No agent is started, and nothing is attached."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bucketprobe import __version__, capture, cli, config, doctor, privileges
from bucketprobe.doctor import Check, Report
from bucketprobe.errors import AgentBusy, BucketprobeError, EnvironmentLack

COMMANDS = ("run", "capture", "doctor")
END = {"dropped": 0, "lost": {}}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def sentence(result: Result, code: int) -> str:
    """The one line that an expected error is."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("bucketprobe: ")
    return line.removeprefix("bucketprobe: ")


# --- Help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_lists_every_command(option: str) -> None:
    result = call(option)
    assert result.exit_code == 0
    assert set(COMMANDS) <= set(re.findall(r"^  (\w+) ", result.stdout, re.M))
    assert set(cli.main.commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_commands_help_has_an_example_that_is_one(command: str) -> None:
    """An example whose options were renamed is worse than none."""
    result = call(command, "--help")
    assert result.exit_code == 0
    [example] = re.findall(rf"bucketprobe {command} (.*)", result.stdout)
    known = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", result.stdout, re.M))
    assert set(re.findall(r"--[\w-]+", example)) <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str) -> None:
    for parameter in cli.main.commands[command].params:
        if parameter.name != "form":
            assert getattr(parameter, "help", None), parameter.name


def test_every_key_of_the_configuration_has_its_option() -> None:
    options = {option for parameter in cli.main.commands["run"].params for option in parameter.opts}
    assert {key.option for key in config.KEYS} <= options


def test_defaults_in_the_help_are_those_of_the_settings() -> None:
    text = re.sub(r"\s+", " ", call("run", "--help").stdout)
    for name in ("listen", "run_dir", "cache_dir", "user", "ring_bytes", "max_connections", "head_bytes"):
        assert f"[{getattr(config.Settings(), name)}]" in text, name
    digest = config.Settings().digest
    for value in (digest.mode, digest.time_budget_pct, digest.total_budget_pct, ", ".join(digest.declared)):
        assert f"[{value}]" in text, value


def test_the_version() -> None:
    assert call("--version").stdout == f"bucketprobe, version {__version__}\n"


def test_the_installed_command_is_this_one() -> None:
    done = subprocess.run([Path(sys.executable).with_name("bucketprobe"), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"bucketprobe, version {__version__}\n"


# --- Wrong calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--no-such-option"),
        ("capture", "--no-such-option"),
        ("doctor", "--no-such-option"),
        ("no-such-command",),
        ("run", "--port", "eighty"),
        ("run", "--port"),
        ("run", "extra"),
        ("capture", "--format", "xml"),
        ("capture", "--slowest", "-1"),
        ("capture", "--duration", "long"),
    ],
)
def test_a_call_that_cannot_be_read_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[target]\nprots = [1]\n", "c.toml:2: [target] prots is not a known key; did you mean ports?"),
        ("[agent]\nring_bytes = 5\n", "c.toml:2: [agent] ring_bytes: 5 is not allowed"),
        ("nonsense\n", "c.toml:1: not valid TOML"),
    ],
)
def test_a_configuration_that_is_wrong_names_file_line_and_key(tmp_path: Path, command: str, text: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert sentence(call(command, "--config", str(path)), 2).startswith(f"{tmp_path}/{said}")


def test_a_configuration_that_is_missing(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in sentence(call("run", "--config", str(tmp_path / "none")), 2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "0"),
        ("--pid", "-5"),
        ("--ring-bytes", "1000"),
        ("--head-bytes", "1"),
        ("--listen", "nowhere"),
        ("--digest", "on"),
        ("--digest-time-budget", "101"),
        ("--digest-total-budget", "nan"),
        ("--digest-declared", "somewhere"),
    ],
)
def test_an_option_that_is_not_allowed_says_what_is(option: str, value: str) -> None:
    text = sentence(call("run", option, value), 2)
    assert text.startswith(f"{option}: ")
    assert "give" in text


def test_directories_of_the_command_line_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = cli._settings({"roots": ("data", "/srv"), "run_dir": "run", "cache_dir": None})
    assert settings.storage.roots == (str(tmp_path / "data"), "/srv")
    assert settings.run_dir == str(tmp_path / "run")


def test_an_agent_without_a_target_names_the_options(tmp_path: Path) -> None:
    text = sentence(call("run", "--run-dir", str(tmp_path)), 2)
    assert all(option in text for option in ("--port", "--pid", "--exe", "--unit", "--cgroup"))


def test_a_pid_that_nobody_has(tmp_path: Path) -> None:
    assert "No process has pid 4194304" in sentence(call("run", "--pid", "4194304", "--run-dir", str(tmp_path)), 2)


def test_an_agent_without_privileges_says_so_before_it_starts_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lack(*_: object) -> None:
        raise EnvironmentLack("CAP_BPF missing; run as root (sudo)")

    monkeypatch.setattr(privileges, "require_root_caps", lack)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started something"))
    assert sentence(call("run", "--port", "1", "--run-dir", str(tmp_path)), 2) == "CAP_BPF missing; run as root (sudo)"


@pytest.mark.parametrize("error", [BucketprobeError("It failed."), EnvironmentLack("It lacks."), AgentBusy("It is busy.")])
def test_an_expected_error_is_one_line_and_its_exit_code(monkeypatch: pytest.MonkeyPatch, error: BucketprobeError) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert sentence(call("doctor"), error.exit_code) == str(error)


# --- doctor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("statuses", "code"), [(("ok", "ok"), 0), (("ok", "reduced"), 1), (("reduced", "missing"), 2)])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_doctors_exit_code_is_its_worst_check(
    monkeypatch: pytest.MonkeyPatch, statuses: tuple[Any, ...], code: int, form: tuple[str, ...]
) -> None:
    report = Report(tuple(Check(f"check {i}", status, "found", "cost", "remedy") for i, status in enumerate(statuses)))
    monkeypatch.setattr(doctor, "run", lambda settings: report)
    result = call("doctor", *form)
    assert result.exit_code == code
    if form:
        told = json.loads(result.stdout)
        assert (told["exit_code"], [check["status"] for check in told["checks"]]) == (code, list(statuses))
    else:
        assert all(f"check {i}" in result.stdout for i in range(len(statuses)))
    assert "\x1b" not in result.stdout


def test_the_doctor_looks_at_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(settings: config.Settings) -> Report:
        asked.append(settings)
        return Report((Check("check", "ok", "found", "", ""),))

    monkeypatch.setattr(doctor, "run", run)
    call("doctor", "--port", "8080", "--port", "8081", "--storage-root", "/srv/bucket")
    assert asked[0].target.ports == (8080, 8081)
    assert asked[0].storage.roots == ("/srv/bucket",)


# --- capture -----------------------------------------------------------------------------------------------------


def test_a_capture_with_no_agent_and_no_target(tmp_path: Path) -> None:
    text = sentence(call("capture", "--run-dir", str(tmp_path)), 1)
    assert f"{tmp_path}/control.sock" in text


def test_a_capture_of_no_time(tmp_path: Path) -> None:
    for duration in ("0", "-1", "nan", "3601"):
        result = call("capture", "--duration", duration, "--run-dir", str(tmp_path))
        assert "lasts more than 0 and at most 3600 seconds" in sentence(result, 2)


def record(number: int) -> dict[str, Any]:
    return {
        "id": f"{number:016x}", "operation": "write", "method": "PUT", "route": "/v1/{bucket_id}/{artifact_id}", "bucket_id": "b",
        "artifact_id": "a", "version": None, "request_id": None, "status": 201, "outcome": "complete", "duration_ms": 10.0 + number,
        "phases": {"storage_write": 4.0, "other": 6.0 + number}, "time": "2026-11-23T00:00:00.000000Z", "bytes_in": 5, "bytes_out": 6,
        "attribution": {"label": "exact", "evidence": ["thread"], "unattributed_bytes": 0}, "lost_events": 0, "pid": 1, "conn": "c",
        "files": {}, "queue_stages": {}, "phase_totals": {}, "start_ns": 0, "end_ns": 0, "metadata_files": {}, "other_files": {},
    }  # fmt: skip


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """An agent that has three requests to show; the arguments that it was asked with."""
    asked: list[tuple[Any, ...]] = []

    def answer(run_dir: Path, duration: float, min_ms: float, progress: object) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        asked.append((run_dir, duration, min_ms))
        return [record(number) for number in range(3)], END

    monkeypatch.setattr(capture, "capture", answer)
    return asked


def test_a_capture_as_a_table(captured: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = call("capture", "--run-dir", str(tmp_path), "--duration", "2.5", "--min-ms", "7")
    assert (result.exit_code, result.stderr) == (0, "")
    assert captured == [(tmp_path, 2.5, 7.0)]
    assert "storage_write" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_capture_as_json(captured: list[tuple[Any, ...]]) -> None:
    told = json.loads(call("capture", "--format", "json", "--slowest", "1").stdout)
    assert told["requests"] == 3
    assert [slow["duration_ms"] for slow in told["slowest"]] == [12.0]


def test_a_capture_that_ended_early_shows_what_came_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "capture", lambda *_: ([record(0)], None))
    result = call("capture")
    assert result.exit_code == 1
    assert "storage_write" in result.stdout
    assert "ended early" in result.stderr


def test_a_capture_says_what_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    end = {"dropped": 2, "lost": {"kernel.ring_end": 3, "tracker.evicted": 0}}
    monkeypatch.setattr(capture, "capture", lambda *_: ([record(0)], end))
    result = call("capture")
    assert result.exit_code == 0
    assert result.stderr == "bucketprobe: not all is shown; lost meanwhile: dropped 2, kernel.ring_end 3\n"


@contextmanager
def no_agent_but_a_borrowed_one(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> Iterator[list[list[str]]]:
    """Captures find an agent only once a command was started; that is another one than the agent."""
    started: list[list[str]] = []
    popen = subprocess.Popen

    def start(arguments: list[str], **how: Any) -> Any:
        started.append(arguments)
        return popen(command, **how)

    def answer(*_: object) -> Any:
        if not started:
            raise capture.NoAgent("nobody there")
        return [record(0)], END

    def status(*_: object) -> dict[str, object]:
        if command[-1] != "pass":
            return {}
        raise capture.NoAgent("nobody there")

    monkeypatch.setattr(capture, "capture", answer)
    monkeypatch.setattr(capture, "status", status)
    monkeypatch.setattr(cli.subprocess, "Popen", start)
    yield started


def test_a_capture_of_a_named_service_borrows_an_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forever = [sys.executable, "-c", "import signal; signal.pause()"]
    with no_agent_but_a_borrowed_one(monkeypatch, forever) as started:
        result = call("capture", "--port", "8080", "--storage-root", "/srv/bucket", "--metadata", "*.db", "--run-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    [command] = started
    pairs = dict(zip(command[-1:1:-2], command[-2:0:-2], strict=False))
    assert {"8080", "/srv/bucket", "*.db", str(tmp_path), "127.0.0.1:0"} <= set(pairs)
    assert "run" in command


def test_a_borrowed_agent_looks_at_digests_as_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config_file = tmp_path / "c.toml"
    config_file.write_text('[digest]\ntime_budget_pct = 0.75\ntotal_budget_pct = 1.5\ndeclared = ["path", "response:ETag"]\n')
    forever = [sys.executable, "-c", "import signal; signal.pause()"]
    arguments = ("--config", str(config_file), "--digest", "always", "--port", "8080", "--run-dir", str(tmp_path))
    with no_agent_but_a_borrowed_one(monkeypatch, forever) as started:
        result = call("capture", *arguments)
    assert result.exit_code == 0, result.output
    parsed = cli.run.make_context("run", started[0][started[0].index("run") + 1 :]).params
    assert cli._settings(parsed).digest == config.DigestSpec("always", 0.75, 1.5, ("path", "response:ETag"))


def test_a_borrowed_agent_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with no_agent_but_a_borrowed_one(monkeypatch, [sys.executable, "-c", "pass"]):
        assert "did not start" in sentence(call("capture", "--port", "8080", "--run-dir", str(tmp_path)), 1)


def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path: Path) -> None:
    """`bucketprobe run --help | head -1`, say."""
    command = f"{sys.executable} -m bucketprobe.cli doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""The README's accuracy table, from reports whose numbers are known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


readme_table = module("readme_table")

GOALS = {
    **dict.fromkeys(readme_table.FIELDS, 0),
    "invented": 0,
    "write_wrong_bytes": 0,
    "read_wrong_bytes": 0,
    "duration_error_p50": 0.02,
    "duration_error_p99": 0.05,
    "phase_sum_error_max": 0.001,
}
SCORES = {
    **GOALS,
    "requests": 10_000,
    "found_once": 9_999,
    "status_wrong": 2,
    "bytes_in_wrong": 1,
    "write_bytes": 6_000_000_000,
    "write_wrong_bytes": 5,
    "write_unattributed_bytes": 7000,
    "read_bytes": 2_000_000_000,
    "read_unattributed_bytes": 0,
    "duration_error_p50": 0.000123,
    "duration_error_p99": 0.0456,
    "phase_sum_error_max": 0.0000012,
    **{f"{name}_error_us_{point}": 1234.5 for name in ("duration", "start", "end") for point in ("p50", "p99")},
}
REPORT = {
    "load": {"connections": 32, "put_share": 0.7, "min_bytes": 1024, "max_bytes": 8 << 20},
    "environment": {"kernel": "6.1.0", "machine": "x86_64", "cpus": 2, "date": "2026-01-02"},
    "goals": GOALS,
    "scores": SCORES,
}


@pytest.fixture(name="reports")
def fixture_reports(tmp_path: Path) -> Path:
    for model in readme_table.MODELS:
        (tmp_path / f"{model}.json").write_text(json.dumps({"model": model, **REPORT}))
    return tmp_path


def test_the_block_is_replaced_and_nothing_else(reports: Path) -> None:
    readme = reports / "README.md"
    readme.write_text("# head\n\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\n\ntail\n")
    arguments = ["--reports", str(reports), "--readme", str(readme)]
    assert readme_table.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# head\n\n<!-- accuracy:begin -->\n| | promised | threads | prefork |\n|---|---:|---:|---:|\n")
    assert text.endswith("\n<!-- accuracy:end -->\n\ntail\n")
    assert "old" not in text
    assert readme_table.main(arguments) == 0
    assert readme.read_text() == text


def test_what_the_table_says(reports: Path) -> None:
    lines = readme_table.table([readme_table.read_report(reports / "threads.json")]).splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ") and "promised" not in line)
    assert rows["requests found exactly once"] == "all | 9,999 of 10,000"
    assert rows["wrong status, method, outcome or byte counts"] == "0 | 3"
    assert rows["storage bytes written, on the wrong request or on none"] == "0 B | 7,005 B of 6.00 GB"
    assert rows["error of the duration, median"] == "≤ 2 % | 0.012 %"
    assert rows["error of the duration, p99"] == "≤ 5 % | 4.56 %"
    assert rows["error of the start, p50 / p99"] == " | 1,234 / 1,234 µs"
    assert rows["phases' sum against the duration, worst"] == "≤ 0.1 % | 0.0001 %"
    assert "bodies of 1 KiB to 8 MiB (log-uniform), 70 % PUT and 30 % GET" in lines[-1]
    assert "on 2026-01-02 on Linux 6.1.0 (x86_64, 2 CPUs)" in lines[-1]


def test_no_place_and_no_reports(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = reports / "README.md"
    readme.write_text("# head\n<!-- accuracy:begin -->\n")
    assert readme_table.main(["--reports", str(reports), "--readme", str(readme)]) == 2
    assert "add the lines <!-- accuracy:begin --> and <!-- accuracy:end -->" in capsys.readouterr().err
    (reports / "prefork.json").unlink()
    assert readme_table.main(["--reports", str(reports), "--readme", str(readme)]) == 2
    assert "run the tests in tests/truth first" in capsys.readouterr().err
    assert readme.read_text() == "# head\n<!-- accuracy:begin -->\n"

# SPDX-License-Identifier: Apache-2.0
"""The README's accuracy table, from a report whose numbers are known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bucketprobe.errors import UsageError

HERE = Path(__file__).parent


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


readme_table = module("readme_table")

SCORES: dict[str, Any] = {
    **dict.fromkeys(readme_table.FIELDS, 0),
    "requests": 10_000,
    "found_once": 9_999,
    "invented": 0,
    "status_wrong": 2,
    "write_right_pct": 99.96,
    "write_wrong_pct": 0.0,
    "write_unattributed_pct": 0.04,
    "write_time_right_pct": 99.5,
    "metadata_time_right_pct": None,
    "read_right_pct": 100.0,
    "label_exact_pct": 90.0,
    "label_inferred_pct": 9.0,
    "label_shared_pct": 1.0,
    "label_unattributed_pct": 0.0,
    "exact_but_wrong": 3,
    "exact_wrong_bytes": 1_234,
    "duration_error_p50": 0.000123,
    "duration_error_p99": 0.0456,
}
LOAD = {"connections": 32, "requests": 10_000, "put_share": 0.7, "min_bytes": 1024, "max_bytes": 1 << 20, "paced_share": 0.25}


def report(name: str, part: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "part": part, "load": {**LOAD, "same_head": 4096}, "missed": [], "scores": {**SCORES, **changes}}


MATRIX = {
    "environment": {"kernel": "6.1.0", "machine": "x86_64", "cpus": 2, "date": "2026-01-02"},
    "runs": [
        report("threads", "every server"),
        report("go", "every server", read_right_pct=99.9996),
        report("threads-seed-2", "other seed", exact_but_wrong=1, metadata_time_right_pct=98.5),
        report("go-seed-2", "other seed", write_right_pct=99.2, exact_but_wrong=0),
        report("adversary-pool", "adversary", write_right_pct=12.34),
    ],
}


@pytest.fixture(name="reports")
def fixture_reports(tmp_path: Path) -> Path:
    (tmp_path / "matrix.json").write_text(json.dumps(MATRIX))
    return tmp_path


def test_the_block_is_replaced_and_nothing_else(reports: Path) -> None:
    readme = reports / "README.md"
    readme.write_text("# head\n\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\n\ntail\n")
    arguments = ["--reports", str(reports), "--readme", str(readme)]
    assert readme_table.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# head\n\n<!-- accuracy:begin -->\n| server | requests exact |")
    assert text.endswith("\n<!-- accuracy:end -->\n\ntail\n")
    assert "old" not in text
    assert readme_table.main(arguments) == 0
    assert readme.read_text() == text


def test_what_the_table_says() -> None:
    lines = readme_table.table(MATRIX).splitlines()
    titles, rule, threads, go, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len(titles) == len(rule) == len(threads) == len(go)
    shown = dict(zip(titles, threads, strict=True))
    assert shown == {
        "server": "threads",
        "requests exact": "9,997 of 10,000",
        "PUT bytes, %": "99.96 / 0 / 0.04",
        "PUT time right, %": "99.5",
        "metadata time right, %": "-",
        "GET bytes right, %": "100",
        "labels, %": "90.0 / 9.0 / 1.0 / 0",
        "exact but wrong": "3 / 1,234 B",
        "duration error": "0.01 % / 4.56 %",
    }
    assert go[titles.index("GET bytes right, %")] == "99.9996"
    assert next([cells[0], cells[2].split(" / ")[0]] for cells in rest if cells[0] == "adversary-pool") == ["adversary-pool", "12.3"]
    assert not any(cells[0].endswith("seed-2") for cells in rest)
    text = "\n".join(lines)
    assert "all bodies are 1 MiB long and begin with the same 4 KiB" in text
    assert "PUT bytes 99.2 %, GET bytes 100 %, metadata time 98.5 % right; 1 requests labelled exact are wrong" in text
    assert "bodies of 1 KiB to 1 MiB (log-uniform), 70 % PUT and 30 % GET, 25 % of the PUT by slow clients." in lines[-1]
    assert "on 2026-01-02 on Linux 6.1.0 (x86_64, 2 CPUs)" in lines[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (100.0, "100"),
        (99.94, "99.9"),
        (99.96, "99.96"),
        (0.004, "0.004"),
        (99.99999, "> 99.9999"),
        (1e-5, "< 0.0001"),
        (100 - 1e-12, "100"),
        (50, "50.0"),
    ],
)
def test_all_and_almost_all_are_told_apart(value: float | None, text: str) -> None:
    assert readme_table.share(value) == text


def test_rows_of_a_terminal_line_up() -> None:
    assert len({len(line) for line in (readme_table.text_header(), *map(readme_table.text_row, MATRIX["runs"]))}) == 1


def test_a_run_that_failed_gives_no_table() -> None:
    failed = {"name": "go", "part": "every server", "missed": ["the load ended with 1\nand more"]}
    with pytest.raises(UsageError, match=r"the run go failed \(the load ended with 1\); mend that"):
        readme_table.table({**MATRIX, "runs": [failed]})


def test_no_place_and_no_reports(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = reports / "README.md"
    readme.write_text("# head\n<!-- accuracy:begin -->\n")
    assert readme_table.main(["--reports", str(reports), "--readme", str(readme)]) == 2
    assert "add the lines <!-- accuracy:begin --> and <!-- accuracy:end -->" in capsys.readouterr().err
    (reports / "matrix.json").unlink()
    assert readme_table.main(["--reports", str(reports), "--readme", str(readme)]) == 2
    assert "run tests/truth/matrix.py first" in capsys.readouterr().err
    assert readme.read_text() == "# head\n<!-- accuracy:begin -->\n"

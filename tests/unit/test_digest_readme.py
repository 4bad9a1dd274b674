# SPDX-License-Identifier: Apache-2.0
"""The README's table about digests: what it says of a report, and that it replaces only its own block."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "truth"))

import digest_readme

from bucketprobe.errors import UsageError

ENVIRONMENT = {"date": "2026-01-02", "kernel": "6.1.0", "machine": "x86_64", "cpus": 4}


def timed(name: str, mode: str, ratio: float, exact_pct: float, right: int) -> dict[str, Any]:
    write = {"ratio": ratio, "by_source": {"exact": {"share_pct": exact_pct}}}
    return {"name": name, "part": "time", "mode": mode, "scores": {"time": {"write": write}, "values": {"right": right, "uploads": 100}}}


def report() -> dict[str, Any]:
    corrupt = {"name": "go-corrupt", "part": "corrupt", "mode": "always", "mismatches": {"told": 6, "hidden_told": 2}}
    stored = {"name": "go-stored", "part": "stored", "mode": "always", "scores": {"verified": {"recorded": {"match": 9, "mismatch": 1}}}}
    runs = [timed("asyncio-pool-16K-auto", "auto", 0.987, 3.4, 99), timed("asyncio-pool-64K", "always", 1.01, 100.0, 100), corrupt, stored]
    return {"environment": ENVIRONMENT, "runs": runs}


def test_a_server_has_a_row_of_what_was_measured_and_of_nothing_else() -> None:
    row = next(line for line in digest_readme.table(report()).splitlines() if line.startswith("| asyncio-pool"))
    assert row == "| asyncio-pool | 98.7 % (3 %) | - | - | - | 101.0 % (100 %) | 199 of 200 |"


def test_mismatches_are_given_as_they_were_told() -> None:
    block = digest_readme.table(report())
    assert "told 6, hidden ones 2 (go)" in block
    assert "1 `mismatch` (go)" in block


def test_only_its_own_block_is_replaced(tmp_path: Path) -> None:
    readme, numbers = tmp_path / "README.md", tmp_path / "digests.json"
    readme.write_text(f"before\n{digest_readme.BEGIN}\nold\n{digest_readme.END}\nafter\n")
    numbers.write_text(json.dumps(report()))
    assert digest_readme.main(["--report", str(numbers), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "asyncio-pool" in text


def test_a_readme_without_its_place_is_refused() -> None:
    with pytest.raises(UsageError, match="add the lines"):
        digest_readme.replaced("nothing here", "block")


def test_without_a_report_it_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digest_readme.main(["--report", str(tmp_path / "none.json")]) == 1
    assert "run tests/truth/digests.py first" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""The wheel holds what the tree holds: a package that pyproject.toml forgot, or a .c file, would be missed only by users."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"bucketprobe": "bucketprobe", "probes": "bucketprobe/probes", "exporters": "bucketprobe/exporters"}
#: Files that are neither code nor part of the wheel.
LEFT_OUT = ("*.pyc", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, as a build leaves `build/lib` in its tree and a later one takes whatever lies there."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy(source, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tree / "out", tree]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"{built.stdout}{built.stderr}\n(make setup brings the build backend)"
    [path] = (tree / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def shipped(folder: str) -> set[str]:
    """What of a room belongs in the wheel, as the wheel names it."""
    patterns = ["*.py", "*.typed", "*.c", "*.h"]
    files = {path for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
    return {f"{ROOMS[folder]}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}


@pytest.mark.parametrize("folder", ROOMS)
def test_every_file_of_a_room_is_in_the_wheel(wheel: zipfile.ZipFile, folder: str) -> None:
    expected = shipped(folder)
    assert expected
    assert expected <= set(wheel.namelist())


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = set().union(*map(shipped, ROOMS))
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found - expected <= {"bucketprobe/probes/LICENSE"}


def test_both_licences_and_the_command_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    [entry_points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert "bucketprobe = bucketprobe.cli:main" in wheel.read(entry_points).decode()
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "probes/LICENSE"}

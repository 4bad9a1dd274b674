# SPDX-License-Identifier: Apache-2.0
"""The direction of imports, as a table. A new module needs a row here: what it may know of the others.

Read from the source, so that imports within functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"bucketprobe": "bucketprobe", "probes": "bucketprobe.probes", "exporters": "bucketprobe.exporters"}

#: Who may import whom, below `bucketprobe`; `*` stands for part of a name. From the vocabulary up to the command line.
ALLOWED: dict[str, list[str]] = {
    "": [],
    "errors": [],
    "model": [],
    "abi": [],
    "bpf": ["errors"],
    "btf": ["errors"],
    "http1": ["errors", "model"],
    "route": ["errors", "model", "http1"],
    "catalog": ["errors", "model", "abi"],
    "config": ["errors", "model"],
    "wire": [],
    "target": ["errors", "model", "config"],
    "privileges": ["errors"],
    "elf": [],
    "x86": [],
    "runtimes": ["errors", "elf"],
    "gotable": ["elf"],
    "providers": ["elf", "gotable", "x86"],
    "web": ["errors"],
    "capture": ["errors", "model"],
    "probes": [],
    "program": ["errors", "abi", "bpf", "btf", "providers"],
    # Runs under the system's Python, as a script that sees none of ours.
    "loader": [],
    "doctor": ["errors", "model", "bpf", "capture", "config", "privileges", "program", "target"],
    "decode": ["errors", "model", "abi"],
    # Pure: they know neither of events nor of the kernel.
    "hashtime": ["model"],
    "integrity": ["model", "hashtime", "http1"],
    "resolve": ["errors", "model", "abi", "integrity"],
    "tracker": ["errors", "model", "abi", "config", "decode", "hashtime", "http1", "integrity", "resolve", "route"],
    # Pure, too: what it needs of the kernel is given.
    "digests": ["providers"],
    "sinks": [],
    "sinks.*": ["errors", "model", "catalog"],
    "exporters": [],
    "exporters.*": ["errors", "model", "catalog"],
    # The privileged half: nothing that reads what a client of the service sent.
    "selftest": ["abi", "bpf", "digests", "privileges", "providers"],
    "hashing": ["abi", "bpf", "config", "digests", "program", "providers", "selftest", "target"],
    "broker": ["errors", "abi", "bpf", "config", "hashing", "program", "runtimes", "stats", "target", "wire", "exporters.jsonl"],
    # Loaded before the rest of the agent, so that the broker starts meanwhile.
    "link": ["errors", "config", "wire"],
    "stats": ["abi", "bpf"],
    # The half that stays: without what only the broker needs, since each import is resident memory.
    "app": [
        *(
            "errors",
            "model",
            "abi",
            "bpf",
            "capture",
            "catalog",
            "config",
            "decode",
            "integrity",
            "link",
            "privileges",
            "stats",
            "tracker",
            "web",
        ),
        *("sinks.*", "exporters.*"),
    ],
    "cli": ["*"],
    "demo": [],
    "demo.truth": [],
    "demo.hands": [],
    "demo.messages": ["demo.truth"],
    "demo.store": ["demo.truth", "demo.hands", "demo.messages"],
    "demo.service": ["demo.truth", "demo.hands", "demo.messages", "demo.store"],
    "demo.loops": ["demo.truth", "demo.hands", "demo.messages", "demo.store", "demo.service"],
    "demo.bucket": ["errors", "demo.truth", "demo.hands", "demo.messages", "demo.store", "demo.service", "demo.loops"],
    "demo.load": ["errors"],
    "demo.check": [],
    "demo.__main__": ["errors", "model", "config", "capture", "cli", "demo", "demo.*"],
}


def module_name(path: Path) -> str:
    """`bucketprobe.` left out; the package itself is the empty name."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join([FOLDERS[folder], *rest])
    return name.removesuffix(".__init__").removeprefix("bucketprobe").removeprefix(".")


def imported(tree: ast.Module) -> Iterator[str]:
    """Each imported module by its full name, and each imported name as if it were one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
IMPORTS = {module: set(imported(ast.parse(path.read_text()))) for module, path in SOURCES.items()}


def ours(module: str) -> set[str]:
    """The modules of ours that this one imports. That the package itself is imported first goes without saying."""
    known = {name.removeprefix("bucketprobe.") for name in IMPORTS[module] if name.startswith("bucketprobe.")}
    return known & SOURCES.keys() - {module}


def row(module: str) -> list[str]:
    """The module's own row, or else that of the pattern."""
    if module in ALLOWED:
        return ALLOWED[module]
    rows = [allowed for pattern, allowed in ALLOWED.items() if fnmatchcase(module, pattern)]
    assert len(rows) == 1, f"{module} has {len(rows)} rows in the table of tests/contract/test_layers.py, and needs one"
    return rows[0]


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    allowed = row(module)
    wrong = {name for name in ours(module) if not any(fnmatchcase(name, pattern) for pattern in allowed)}
    assert not wrong


@pytest.mark.parametrize("pattern", ALLOWED)
def test_a_row_is_of_a_module_that_exists(pattern: str) -> None:
    assert any(fnmatchcase(module, pattern) for module in SOURCES)


def test_the_walk_sees_imports() -> None:
    """Guards the rest: a table says nothing about imports that were not found."""
    assert "model" in ours("route")
    assert "http1" in ours("route")
    tree = ast.parse("def f():\n    from bucketprobe import loader\n    import bcc.table")
    assert set(imported(tree)) == {"bucketprobe", "bucketprobe.loader", "bcc.table"}


def importers(name: str) -> set[str]:
    return {module for module, names in IMPORTS.items() if any(each == name or each.startswith(f"{name}.") for each in names)}


def test_only_the_loader_imports_bcc() -> None:
    assert importers("bcc") == {"loader"}


def test_only_the_command_line_imports_the_app() -> None:
    assert importers("bucketprobe.app") <= {"cli"}


def test_nothing_imports_the_command_line_but_the_demo() -> None:
    assert importers("bucketprobe.cli") <= {"demo", "demo.__main__", "__main__"}


@pytest.mark.parametrize("room", ["sinks", "exporters", "probes"])
def test_siblings_do_not_know_each_other(room: str) -> None:
    for module in SOURCES:
        if module.startswith(f"{room}."):
            assert not {name for name in ours(module) if name.split(".")[0] in ("sinks", "exporters", "probes", "app", "cli")}

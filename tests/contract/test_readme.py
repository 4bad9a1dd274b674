# SPDX-License-Identifier: Apache-2.0
"""The README's tables are what the code says. Run as a script, this writes them:

    python tests/contract/test_readme.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import click
import pytest

from bucketprobe import cli, model
from bucketprobe.catalog import CATALOG, HEALTH, catalog_table, health_table
from bucketprobe.config import DIGEST_MODES, KEYS, Settings, load
from bucketprobe.demo import __main__ as demo

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown whose columns line up."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n" for line in lines)


def options_table() -> str:
    """The keys of the configuration with their options, limits and defaults, from config.KEYS and the command line's help."""
    options = [parameter for parameter in cli.run.params if isinstance(parameter, click.Option)]
    meanings = {name: re.sub(r" \[.*\]$", "", option.help or "") for option in options for name in option.opts}
    rows = [
        (f"`[{key.table}]`", f"`{key.name}`", f"`{key.option}`", meanings[key.option], key.allowed, default(key.table, key.name))
        for key in KEYS
    ]
    return table(("table", "key", "option", "meaning", "what may be given", "default"), rows)


def default(room: str, name: str) -> str:
    settings = Settings()
    value = getattr(settings if room == "agent" else getattr(settings, room), name)
    if name == "node_id":
        return "the host's name"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value) or "none"
    return f"`{value}`" if value not in (None, "") else "none"


#: What stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
BLOCKS: dict[str, Callable[[], str]] = {"options": options_table, "catalog": catalog_table, "health": health_table}


def block(text: str, name: str) -> str:
    """Raises ValueError unless the README has the block exactly once."""
    found = re.findall(f"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"README.md has {len(found)} blocks {name}; it needs one, between <!-- {name}:begin --> and <!-- {name}:end -->")
    return str(found[0])


def written(text: str) -> str:
    """The README with its tables renewed."""
    for name, render in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        text = text.replace(f"{begin}{block(text, name)}{end}", f"{begin}{render()}{end}")
    return text


@pytest.mark.parametrize("name", BLOCKS)
def test_a_table_is_current(name: str) -> None:
    assert block(README.read_text(), name) == BLOCKS[name](), "run: python tests/contract/test_readme.py"


def test_writing_changes_only_the_blocks() -> None:
    bare = "a\n" + "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in BLOCKS) + "z\n"
    new = written(bare)
    assert written(new) == new
    for name, render in BLOCKS.items():
        assert block(new, name) == render()
        new = new.replace(render(), "old\n")
    assert new == bare


@pytest.mark.parametrize("name", ["accuracy", "bench"])
def test_what_others_fill_in_has_a_place(name: str) -> None:
    assert block(README.read_text(), name).strip()


def test_every_field_of_a_record_is_explained() -> None:
    request = model.Request("1", "2", 3, 4, 5, 6, "write", "complete")
    record = request.record()
    names = {*record, *request.files.record(), *request.digest.record(), *(field.name for field in fields(model.Attribution))}
    explained = set(re.findall(r"`([a-z_]+)`", README.read_text()))
    assert names <= explained


WORDS = (
    *(model.PHASES, model.OUTCOMES, model.LABELS, model.OPERATIONS, model.EVIDENCE, model.GAPS, get_args(model.Limit)),
    *(model.DIGEST_SOURCES, model.DIGEST_RESULTS, get_args(model.MismatchSource), DIGEST_MODES),
)


@pytest.mark.parametrize("words", WORDS)
def test_every_word_of_a_record_is_explained(words: Sequence[str]) -> None:
    texts = "".join(page.read_text() for page in (README, *(ROOT / "docs" / f"{name}.md" for name in ("phases", "attribution", "digests"))))
    assert set(words) <= set(re.findall(r"`([a-z_]+)`", texts))


def test_the_settings_that_it_shows_can_be_read(tmp_path: Path) -> None:
    shown = re.findall(r"^```toml\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    for number, text in enumerate(shown):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        assert load(str(path), {}) != load(None, {})


def test_the_metrics_that_it_asks_for_exist() -> None:
    known = {row.name for row in HEALTH} | {metric.prometheus_name for metric in CATALOG}
    known |= {f"{metric.prometheus_name}_{suffix}" for metric in CATALOG if metric.kind == "histogram" for suffix in ("sum", "count")}
    asked = set()
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        asked |= set(re.findall(r"\b(?:bucketprobe_[a-z_]*[a-z]|bucket_[a-z_]*_(?:total|sum|count|gauge))\b", page.read_text()))
    assert asked
    assert asked <= known


def test_the_options_that_it_shows_exist() -> None:
    known = {option for command in cli.main.commands.values() for parameter in command.params for option in parameter.opts}
    known |= {"--seconds", "--model", "--help"}
    assert demo.parse_options(["--seconds", "8", "--model", "threads"])
    commands = "\n".join(re.findall(r"^.*bucketprobe (?:run|capture|doctor).*$|^ +--.*$", README.read_text(), re.MULTILINE))
    shown = set(re.findall(r"(?<![-\w])--[a-z][a-z-]*", commands))
    assert shown
    assert shown <= known


def test_every_link_leads_to_a_file() -> None:
    for page in (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
    print(f"{README.name}: {', '.join(BLOCKS)} written")

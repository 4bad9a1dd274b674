# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import fnmatch
import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketprobe import config
from bucketprobe.config import DigestSpec, FileClasses, Settings, StorageSpec, Tags, TargetSpec, load
from bucketprobe.errors import ConfigError

FULL = """\
[target]
ports = [8080, 9000, 8080]
pids = [12]
exes = ["/usr/bin/bucketd", "minio"]
units = ["bucket.service"]
cgroups = ["/system.slice/bucket/", "kubepods"]

[storage]
roots = ["/srv/bucket/", "/srv//b2/../b3"]
metadata = ["*.db"]

[digest]
mode = "always"
time_budget_pct = 1
total_budget_pct = 2.5
declared = ["header:Content-MD5", "query:sum", "response:ETag", "path", "path"]

[tags]
environment = "production"
node_id = "store-3"

[agent]
listen = "[::1]:9000"
records = "-"
run_dir = "/run/bp"
cache_dir = "/var/tmp/bp"
user = "bucketprobe"
ring_bytes = 65536
max_connections = 100
head_bytes = 4096
"""


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "bp.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def message(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), {})
    return str(caught.value)


def test_a_full_file(tmp_path: Path) -> None:
    settings = load(write(tmp_path, FULL), {})
    assert settings.target == TargetSpec(
        (8080, 9000), (12,), ("/usr/bin/bucketd", "minio"), ("bucket.service",), ("/system.slice/bucket", "kubepods")
    )
    assert settings.storage == StorageSpec(("/srv/bucket", "/srv/b3"), ("*.db",))
    assert settings.digest == DigestSpec("always", 1.0, 2.5, ("header:Content-MD5", "query:sum", "response:ETag", "path"))
    assert settings.tags == Tags("production", "", "store-3", "")
    assert settings.tags.labels() == {"environment": "production", "node_id": "store-3"}
    assert settings.host_port() == ("::1", 9000)
    assert (settings.records, settings.ring_bytes, settings.max_connections, settings.head_bytes) == ("-", 65536, 100, 4096)
    assert (settings.run_dir, settings.cache_dir, settings.user) == ("/run/bp", "/var/tmp/bp", "bucketprobe")


def test_every_key_of_the_table_is_in_the_full_file_and_survives_json(tmp_path: Path) -> None:
    settings = load(write(tmp_path, FULL), {"tags.region": "r", "tags.bucket_service_version": "1"})
    tables = settings.as_dict()
    assert {(key.table, key.name) for key in config.KEYS} == {(table, name) for table, keys in tables.items() for name in keys}
    assert Settings.from_dict(json.loads(json.dumps(tables))) == settings


def test_no_file_gives_defaults_and_the_host_name() -> None:
    settings = load(None, {})
    assert settings.target.empty
    assert settings.tags.labels() == {"node_id": os.uname().nodename}
    assert settings.records is None
    assert Settings.from_dict(settings.as_dict()) == settings
    assert settings.host_port() == ("127.0.0.1", 9464)


def test_the_command_line_replaces_what_the_file_says_but_only_if_given(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    given_ = {"target.ports": (1, 2), "target.exes": (), "agent.user": None, "agent.listen": "0.0.0.0:1", "tags.node_id": ""}
    settings = load(path, given_)
    assert settings.target.ports == (1, 2)
    assert settings.target.exes == ("/usr/bin/bucketd", "minio")
    assert settings.user == "bucketprobe"
    assert settings.listen == "0.0.0.0:1"
    assert settings.tags.labels() == {"environment": "production"}


def test_a_wrong_option_is_named_as_the_option() -> None:
    with pytest.raises(ConfigError, match=r"^--port: \[0\] is not allowed; give a list of TCP ports from 1 to 65535$"):
        load(None, {"target.ports": (0,)})
    with pytest.raises(KeyError):
        load(None, {"target.prots": (1,)})


def test_digests_are_looked_at_within_a_budget_unless_told_otherwise() -> None:
    digest = load(None, {}).digest
    assert digest == DigestSpec()
    assert (digest.mode, digest.time_budget_pct, digest.total_budget_pct) == ("auto", 0.2, 0.4)
    assert digest.declared == ("header:X-Artifact-Digest", "query:digest")
    assert load(None, {"digest.mode": "off", "digest.total_budget_pct": 5.0}).digest == DigestSpec("off", total_budget_pct=5.0)
    assert load(None, {"digest.time_budget_pct": 0.0, "digest.total_budget_pct": 0.0}).digest.total_budget_pct == 0.0


def test_the_time_of_digests_is_part_of_what_they_may_cost(tmp_path: Path) -> None:
    text = "[digest]\n\ntime_budget_pct = 0.5\n"
    said = message(tmp_path, text)
    assert "bp.toml:3: [digest] time_budget_pct: 0.5 is more than total_budget_pct (0.4), which includes it; lower it, or raise" in said
    assert "\n" not in said
    assert "bp.toml: [digest] time_budget_pct: 0.2 is more than total" in message(tmp_path, "[digest]\ntotal_budget_pct = 0.1\n")
    with pytest.raises(ConfigError, match=r"^--digest-time-budget: 0\.2 is more than total_budget_pct \(0\.1\)"):
        load(None, {"digest.total_budget_pct": 0.1})
    assert load(write(tmp_path, text), {"digest.total_budget_pct": 0.5}).digest.time_budget_pct == 0.5
    with pytest.raises(ConfigError, match=r"^settings: \[digest\] time_budget_pct"):
        Settings.from_dict({"digest": {"time_budget_pct": 99}})


def test_which_specs_ask_on_exec() -> None:
    assert not TargetSpec(ports=(1,), pids=(1,)).asks_on_exec
    assert not TargetSpec(pids=(1,)).empty
    for spec in (TargetSpec(exes=("x",)), TargetSpec(units=("x",)), TargetSpec(cgroups=("x",))):
        assert spec.asks_on_exec
        assert not spec.empty


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[target]\n\nport = [1]", 3, "[target] port is not a known key; did you mean ports?"),
        ("[target]\nzzz = [1]", 2, "known are ports, pids, exes, units, cgroups"),
        ("[agent]\nports = [1]", 2, "write it below [target]"),
        ("ports = [1]", 1, "write it below [target]"),
        ("\n[targte]\nports = [1]", 2, "did you mean target?"),
        ("target = 3", 1, "[target] is not a table"),
        ("[[target]]\nports = [1]", 1, "[target] is not a table"),
        ("[target]\nports = 8080", 2, "8080 is not allowed; give a list of TCP ports"),
        ('[target]\nports = ["8080"]', 2, "give a list of TCP ports"),
        ("[target]\nports = [true]", 2, "give a list of TCP ports"),
        ("[target]\nports = [\n  80,\n  65536,\n]", 2, "give a list of TCP ports"),
        ("[target]\npids = [0]", 2, "process ids"),
        ('[target]\nexes = ["bin/x"]', 2, "absolute paths"),
        ('[target]\nexes = [""]', 2, "absolute paths"),
        ('[target]\nunits = ["a/b"]', 2, "without '/'"),
        ('[target]\ncgroups = ["/"]', 2, "other than '/'"),
        ('[target]\ncgroups = ["/a/../.."]', 2, "without '..'"),
        ("target.ports = [0]", 1, "TCP ports"),
        ('[storage]\nroots = ["data"]', 2, "absolute directories"),
        ('[storage]\nmetadata = ["[z-a]"]', 2, "file patterns"),
        ('[storage]\nmetadata = ["meta/"]', 2, "file patterns"),
        ('[tags] # comment\nregion = "a\\u001b[0m"', 2, "printable"),
        (f'[tags]\nregion = "{"x" * 256}"', 2, "255"),
        ("[tags]\nregion = 1", 2, "text"),
        ('[agent]\nlisten = "9464"', 2, "HOST:PORT"),
        ('[agent]\nlisten = "127.0.0.1:65536"', 2, "HOST:PORT"),
        ('[agent]\nlisten = "::1:80"', 2, "HOST:PORT"),
        ('[digest]\nmode = "on"', 2, "'on' is not allowed; give auto, always or off"),
        ("[digest]\nmode = true", 2, "give auto, always or off"),
        ("[digest]\ntime_budget_pct = -0.1", 2, "from 0 to 100"),
        ("[digest]\ntime_budget_pct = nan", 2, "from 0 to 100"),
        ("[digest]\ntotal_budget_pct = 100.5", 2, "from 0 to 100"),
        ("[digest]\ntotal_budget_pct = true", 2, "from 0 to 100"),
        ('[digest]\ntotal_budget_pct = "1"', 2, "from 0 to 100"),
        ("[digest]\ndeclared = []", 2, "one or more of 'header:NAME'"),
        ('[digest]\ndeclared = ["header:"]', 2, "one or more of 'header:NAME'"),
        ('[digest]\ndeclared = ["header:a b"]', 2, "one or more of 'header:NAME'"),
        ('[digest]\ndeclared = ["query:a&b"]', 2, "one or more of 'header:NAME'"),
        ('[digest]\ndeclared = ["path:x"]', 2, "one or more of 'header:NAME'"),
        ('[digest]\ndeclared = ["cookie:x"]', 2, "one or more of 'header:NAME'"),
        ('[digest]\ndeclared = "path"', 2, "one or more of 'header:NAME'"),
        ("[digest]\nbudget = 1", 2, "known are mode, time_budget_pct, total_budget_pct, declared"),
        ("[agent]\nring_bytes = 100000", 2, "power of two"),
        ("[agent]\nring_bytes = 16384", 2, "power of two from 32768"),
        ("[agent]\nring_bytes = 262144.0", 2, "power of two"),
        ("[agent]\nhead_bytes = 32768", 2, "to 16384 bytes"),
        ("[agent]\nmax_connections = 0", 2, "from 64"),
        ('[agent]\nrun_dir = "run"', 2, "an absolute path"),
        ('[agent]\nrecords = ""', 2, "a file name"),
        ('[agent]\n"user" = 1', 2, "unprivileged user"),
        ("[target]\nports = [1", None, "not valid TOML"),
        ("[target]\nports = 1 2", 2, "not valid TOML"),
        ("[target]\nports = [1]\nports = [1]\n", 3, "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    said = message(tmp_path, text)
    assert words in said
    assert "\n" not in said
    place = f"bp.toml:{line}: " if line else "bp.toml: "
    assert place in said


def test_the_value_shown_is_short_and_harmless(tmp_path: Path) -> None:
    assert len(message(tmp_path, f'[agent]\nlisten = "{"x" * 5000}"')) < 300
    assert "\x1b" not in message(tmp_path, '[agent]\nlisten = "\\u001b[2J"')


def test_unreadable_files(tmp_path: Path) -> None:
    assert "not UTF-8 at byte 9" in message(tmp_path, b"# comment\xff")
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "none"), {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load(str(tmp_path), {})


def test_deep_nesting_is_an_error_of_the_file(tmp_path: Path) -> None:
    assert "not valid TOML" in message(tmp_path, "x = " + "[" * 100_000)


def test_from_dict_refuses_what_a_file_could_not_say() -> None:
    with pytest.raises(ConfigError, match=r"settings: \[target\] ports"):
        Settings.from_dict({"target": {"ports": [0]}})
    with pytest.raises(ConfigError):
        Settings.from_dict({"target": {"nope": 1}})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_no_value_of_any_key_causes_anything_but_a_config_error(value: object) -> None:
    for key in config.KEYS:
        try:
            settings = Settings.from_dict({key.table: {key.name: value}})
        except ConfigError:
            continue
        assert Settings.from_dict(settings.as_dict()) == settings


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/srv/bucket", "storage"),
        ("/srv/bucket/", "storage"),
        ("/srv/bucket/a/b", "storage"),
        ("/srv/bucket2/a", "other"),
        ("/srv//bucket/./x/../a", "storage"),
        ("/srv/bucket/../x", "other"),
        ("//srv/bucket/a", "storage"),
        ("/srv/bucket/a (deleted)", "storage"),
        ("/srv/bucket (deleted)", "storage"),
        ("/srv/bucket/x.db", "metadata"),
        ("/var/lib/x.db", "metadata"),
        ("/var/lib/x.db (deleted)", "metadata"),
        ("x.db", "metadata"),
        ("x", "other"),
        ("/srv/bucket/x.db-wal", "metadata"),
        ("/srv/bucket/x.db-shm", "metadata"),
        ("/srv/bucket/x.db-journal (deleted)", "metadata"),
        ("/srv/bucket/x.db-other", "storage"),
        ("/srv/bucket/x.database", "storage"),
        ("/srv/bucket/meta/a/b", "metadata"),
        ("/srv/bucket/a/meta/b", "storage"),
        ("/srv/bucket/deep/er/artifact.json", "metadata"),
        ("/srv/bucket/artifact.json", "metadata"),
        ("/srv/bucket/ab/note.txt", "metadata"),
        ("/srv/bucket/ab/cd/note.txt", "storage"),
        ("/etc/meta/x", "metadata"),
        ("/etc/meta/x/y", "other"),
        ("/etc/meta/x\ny", "metadata"),
        ("", "other"),
        ("/", "other"),
    ],
)
def test_classes(path: str, expected: str) -> None:
    classes = FileClasses(StorageSpec(("/srv/bucket",), ("*.db", "meta/**", "**/artifact.json", "*/note.txt", "/etc/meta/*")))
    assert classes.classify(path) == expected
    assert classes.classify(path) == expected


def test_a_root_that_is_the_whole_host() -> None:
    classes = FileClasses(StorageSpec(("/",), ()))
    assert [classes.classify(path) for path in ("/", "/a", "/a/b")] == ["storage"] * 3


def test_nothing_is_storage_without_roots() -> None:
    assert FileClasses(StorageSpec()).classify("/srv/x") == "other"


def test_relative_patterns_without_roots_match_nothing() -> None:
    assert FileClasses(StorageSpec((), ("meta/**",))).classify("/meta/x") == "other"


def test_roots_and_patterns_through_symlinks(tmp_path: Path) -> None:
    real = tmp_path / "disk1" / "store"
    real.mkdir(parents=True)
    (tmp_path / "bucket").symlink_to(real)
    link = str(tmp_path / "bucket")
    classes = FileClasses(StorageSpec((link,), ("meta/*", link + "/index/*.json")))
    for base in (link, str(real)):
        assert classes.classify(f"{base}/x") == "storage"
        assert classes.classify(f"{base}/meta/x") == "metadata"
        assert classes.classify(f"{base}/index/x.json") == "metadata"
    assert classes.classify(str(tmp_path / "disk1" / "x")) == "other"


def test_the_cache_is_bounded() -> None:
    classes = FileClasses(StorageSpec(("/srv",), ()))
    for number in range(3 * FileClasses.CACHE_ENTRIES):
        classes.classify(f"/srv/{number}")
    classes.classify("/srv/" + "x" * 4000)
    assert len(classes._cache) == FileClasses.CACHE_ENTRIES
    assert max(map(len, classes._cache)) <= FileClasses.CACHED_PATH_CHARS


def test_a_hostile_path_is_classified_quickly() -> None:
    classes = FileClasses(StorageSpec(("/srv",), ("**/a/**/b/**/*.json", "*.db")))
    started = time.perf_counter()
    classes.classify("/srv" + "/a/b" * 250 + "/x")  # the kernel sends 1,024 bytes of a path
    assert time.perf_counter() - started < 2


@given(st.text(alphabet="ab*?[]!-.", min_size=1, max_size=8), st.text(alphabet="ab-.!]", min_size=1, max_size=6))
def test_base_name_patterns_mean_what_fnmatch_means(pattern: str, name: str) -> None:
    if "**" in pattern or name in (".", ".."):
        return
    try:
        expected = fnmatch.fnmatchcase(name, pattern)
        StorageSpec((), (config._pattern(pattern),))
    except (re.error, ValueError):
        return
    assert (FileClasses(StorageSpec((), (pattern,))).classify("/d/" + name) == "metadata") == expected

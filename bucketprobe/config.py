# SPDX-License-Identifier: Apache-2.0
"""What the operator wants: one TOML file, overridden by the command line, as frozen settings.

    [target]                                   [tags]
    ports = [8080]                             environment = "production"
    pids = []                                  region = "eu-west-1"
    exes = ["/usr/bin/bucketd"]                node_id = "store-3"
    units = ["bucket.service"]                 bucket_service_version = "1.4.2"
    cgroups = ["/system.slice/bucket"]
                                               [agent]
    [storage]                                  listen = "127.0.0.1:9464"
    roots = ["/srv/bucket"]                    records = "/var/log/bucketprobe/requests.jsonl"
    metadata = ["*.db", "meta/**"]             user = "nobody"

    [digest]
    mode = "auto"
    time_budget_pct = 0.2
    total_budget_pct = 0.4
    declared = ["header:X-Artifact-Digest", "query:digest"]

`KEYS` is the one table of what may be set, by which option, and within which limits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bucketprobe.errors import ConfigError

FileClass = Literal["storage", "metadata", "other"]

DigestMode = Literal["auto", "always", "off"]
DIGEST_MODES: tuple[DigestMode, ...] = ("auto", "always", "off")

#: sqlite writes these beside a database: https://www.sqlite.org/tempfiles.html
SQLITE_SIDE_FILES = ("-wal", "-shm", "-journal")

#: The kernel appends it to the path of an unlinked file (d_path in fs/d_path.c).
DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """Which processes are observed: those that any one of these names, and their descendants.

    `ports`: TCP ports, in any network namespace. `exes`: absolute paths, or base names. `units`: systemd units, `.service`
    may be left out. `cgroups`: absolute under the cgroup mount, or the components at which a path is to match.
    """

    ports: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()
    exes: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.ports or self.pids or self.asks_on_exec)

    @property
    def only_pids(self) -> bool:
        """Whether nothing but processes is named: when they are gone, nothing can come in their place."""
        return bool(self.pids) and not (self.ports or self.exes or self.units or self.cgroups)

    @property
    def asks_on_exec(self) -> bool:
        """Whether a process may become a target by what it executes or where it runs."""
        return bool(self.exes or self.units or self.cgroups)


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """Which files hold artifacts (`roots`, absolute directories) and which metadata (`metadata`, see FileClasses)."""

    roots: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DigestSpec:
    """How digests are observed. Budgets are per cent of the targets' CPU time.

    `mode`: auto keeps the budgets, always attaches everything without one (for an experiment), off attaches nothing.
    `time_budget_pct`: what measuring the time of digests may cost; `total_budget_pct`: with their values. `declared`: where a
    request says which digest its body has, the first that does wins: `header:NAME`, `query:NAME`, `response:NAME`, or `path` for a
    digest in the path of its URL.
    """

    mode: DigestMode = "auto"
    time_budget_pct: float = 0.2
    total_budget_pct: float = 0.4
    declared: tuple[str, ...] = ("header:X-Artifact-Digest", "query:digest")


@dataclass(frozen=True, slots=True)
class Tags:
    """The standard tags of every series; an empty one is left out."""

    environment: str = ""
    region: str = ""
    node_id: str = ""
    bucket_service_version: str = ""

    def labels(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; units and limits are those of `KEYS`.

    `listen`: host:port of the metrics endpoint. `records`: file for JSON records, `-` for standard output, None for no records.
    `ring_bytes`: size of the event ring, mapped twice and so counted twice in the agent's resident memory.
    `max_connections`: connections and open files followed at once. `head_bytes`: how much of a request's head is captured.
    `user`: whom the agent becomes once everything is attached.
    """

    target: TargetSpec = TargetSpec()
    storage: StorageSpec = StorageSpec()
    digest: DigestSpec = DigestSpec()
    tags: Tags = Tags()
    listen: str = "127.0.0.1:9464"
    records: str | None = None
    run_dir: str = "/run/bucketprobe"
    cache_dir: str = "/var/cache/bucketprobe"
    user: str = "nobody"
    ring_bytes: int = 1_048_576
    max_connections: int = 4096
    head_bytes: int = 8192

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The settings by table and key, as JSON can carry them; `from_dict` is the inverse."""
        tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        for key in KEYS:
            holder = self if key.table == "agent" else getattr(self, key.table)
            value = getattr(holder, key.name)
            if value is not None:
                tables[key.table][key.name] = list(value) if isinstance(value, tuple) else value
        return tables

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Settings:
        """Settings from tables of keys. Raises ConfigError for whatever a file could not say either."""

        def place(table: str, key: str) -> str:
            return f"settings: [{table}] {key}"

        return _build(_checked(tables, place), place)

    def host_port(self) -> tuple[str, int]:
        """`listen` taken apart; the brackets of an IPv6 address are gone."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file. `check` returns the value to keep, or raises ValueError if `allowed` does not hold."""

    table: str
    name: str
    option: str
    allowed: str
    check: Callable[[Any], Any]


def load(path: str | None, overrides: Mapping[str, Any]) -> Settings:
    """Settings from the TOML file at `path` (None: defaults only), then `overrides` by `table.key`, such as `target.ports`.

    An override of None or () was not given. Raises ConfigError, which names the file, the line, the key and what is allowed;
    KeyError for an override that is no key of `KEYS`.
    """
    tables = _read(path) if path is not None else {}

    def place(table: str, name: str) -> str:
        return _KEYS[table][name].option if path is None else _place(path, table, name)

    values = _checked(tables, place)
    for dotted, value in overrides.items():
        table, _, name = dotted.partition(".")
        key = _KEYS[table][name]
        if value is not None and value != ():
            values[table, name] = _check(key, list(value) if isinstance(value, tuple) else value, key.option)
    return _build(values, place)


def _read(path: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable TOML file, or leave --config out") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{path}:{line[1]}" if line else path
        raise ConfigError(f"{where}: not valid TOML ({error}); correct it there") from None


def _place(path: str, table: str, name: str) -> str:
    line = _line_of(path, table, name)
    where = f"{path}:{line}" if line else path
    return f"{where}: [{table}] {name}" if name else f"{where}: [{table}]"


def _line_of(path: str, table: str, name: str) -> int | None:
    """Line of the key in its table, or of the table itself if `name` is empty; None if it is written in some other way."""
    wanted = [table, name] if name else [table]
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError):
        return None
    current: list[str] = []
    for number, line in enumerate(lines, 1):
        header = re.match(r"\s*\[+([^\[\]=]+)\]+\s*(#.*)?$", line)
        assigned = re.match(r"([^=#\[]+)=", line)
        if header:
            current = _dotted(header[1])
        here = current + (_dotted(assigned[1]) if assigned else [])
        if here[: len(wanted)] == wanted:
            return number
    return None


def _dotted(text: str) -> list[str]:
    return [part.strip(" \t\"'") for part in text.split(".")]


def _checked(tables: Mapping[str, Any], place: Callable[[str, str], str]) -> dict[tuple[str, str], Any]:
    values: dict[tuple[str, str], Any] = {}
    for table, content in tables.items():
        if table not in _KEYS:
            raise ConfigError(f"{place(table, '')} is not a known table{_hint(table, _KEYS)}")
        if not isinstance(content, Mapping):
            raise ConfigError(f"{place(table, '')} is not a table; write its keys below a line [{table}]")
        for name, value in content.items():
            if name not in _KEYS[table]:
                raise ConfigError(f"{place(table, name)} is not a known key{_hint(name, _KEYS[table])}")
            values[table, name] = _check(_KEYS[table][name], value, place(table, name))
    return values


def _check(key: Key, value: Any, place: str) -> Any:
    try:
        return key.check(value)
    except ValueError:
        raise ConfigError(f"{place}: {_shown(value)} is not allowed; give {key.allowed}") from None


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hint(name: str, known: Mapping[str, object]) -> str:
    from difflib import get_close_matches

    for key in KEYS:
        if key.name == name:
            return f"; write it below [{key.table}]"
    close = get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _build(values: Mapping[tuple[str, str], Any], place: Callable[[str, str], str]) -> Settings:
    """Settings from values that are each allowed. Raises ConfigError where two of them contradict each other."""

    def table(wanted: str) -> dict[str, Any]:
        return {name: value for (table, name), value in values.items() if table == wanted}

    tags = {"node_id": os.uname().nodename, **table("tags")}
    digest = DigestSpec(**table("digest"))
    if digest.time_budget_pct > digest.total_budget_pct:
        raise ConfigError(
            f"{place('digest', 'time_budget_pct')}: {digest.time_budget_pct:g} is more than total_budget_pct "
            f"({digest.total_budget_pct:g}), which includes it; lower it, or raise total_budget_pct (--digest-total-budget)"
        )
    return Settings(
        target=TargetSpec(**table("target")),
        storage=StorageSpec(**table("storage")),
        digest=digest,
        tags=Tags(**tags),
        **table("agent"),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():
        raise ValueError
    return value


def _tag(value: Any) -> str:
    return value if value == "" else _short(value)


def _short(value: Any) -> str:
    if len(_text(value)) > 255:
        raise ValueError
    return str(value)


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return check


def _power_of_two(low: int, high: int) -> Callable[[Any], int]:
    within = _integer(low, high)

    def check(value: Any) -> int:
        if within(value) & (value - 1):
            raise ValueError
        return int(value)

    return check


def _list(check_item: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError
        return tuple(dict.fromkeys(check_item(item) for item in value))

    return check


def _one_of(*words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value

    return check


def _per_cent(value: Any) -> float:
    # Not-a-number is within no limits, so it fails here as well.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        raise ValueError
    return float(value)


def _declared(value: Any) -> str:
    # A header's name is a token: RFC 9110, section 5.1. Of a query parameter's name, only the plain characters are taken.
    if not re.fullmatch(r"path|(?:header|response):[A-Za-z0-9!#$%&'*+.^_`|~-]{1,255}|query:[A-Za-z0-9._~-]{1,255}", _text(value)):
        raise ValueError
    return str(value)


def _places(value: Any) -> tuple[Any, ...]:
    places = _list(_declared)(value)
    if not places:
        raise ValueError
    return places


def _directory(value: Any) -> str:
    if not _text(value).startswith("/"):
        raise ValueError
    return "/" + str(os.path.normpath(value)).lstrip("/")


def _pattern(value: Any) -> str:
    if _text(value).endswith("/"):
        raise ValueError
    try:
        re.compile(_glob(value))
    except re.error:
        raise ValueError from None
    return str(value)


def _exe(value: Any) -> str:
    if "/" in _text(value) and not value.startswith("/"):
        raise ValueError
    return str(value)


def _unit(value: Any) -> str:
    if "/" in _text(value):
        raise ValueError
    return str(value)


def _cgroup(value: Any) -> str:
    # The root cgroup would be every process of the host.
    if not _text(value).strip("/") or ".." in value.split("/"):
        raise ValueError
    return str(value).rstrip("/")


def _listen(value: Any) -> str:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", _text(value))
    if not match or int(match[2]) > 65535:
        raise ValueError
    return str(value)


_PATH = "an absolute path"
_TAG = "text of at most 255 printable characters"
_PER_CENT = "a number from 0 to 100"
_DECLARED = "a list of one or more of 'header:NAME', 'query:NAME', 'response:NAME' and 'path'"

#: The tables of the file; what is in `agent` are fields of the settings themselves.
TABLES = ("target", "storage", "digest", "tags", "agent")

KEYS = (
    Key("target", "ports", "--port", "a list of TCP ports from 1 to 65535", _list(_integer(1, 65535))),
    Key("target", "pids", "--pid", "a list of process ids from 1 to 4194304", _list(_integer(1, 4_194_304))),
    Key("target", "exes", "--exe", "a list of absolute paths, or of base names without '/'", _list(_exe)),
    Key("target", "units", "--unit", "a list of systemd unit names without '/'", _list(_unit)),
    Key("target", "cgroups", "--cgroup", "a list of cgroup paths other than '/', without '..'", _list(_cgroup)),
    Key("storage", "roots", "--storage-root", "a list of absolute directories", _list(_directory)),
    Key("storage", "metadata", "--metadata", "a list of file patterns such as '*.db' or '/srv/meta/**'", _list(_pattern)),
    Key("digest", "mode", "--digest", "auto, always or off", _one_of(*DIGEST_MODES)),
    Key("digest", "time_budget_pct", "--digest-time-budget", _PER_CENT, _per_cent),
    Key("digest", "total_budget_pct", "--digest-total-budget", _PER_CENT, _per_cent),
    Key("digest", "declared", "--digest-declared", _DECLARED, _places),
    Key("tags", "environment", "--environment", _TAG, _tag),
    Key("tags", "region", "--region", _TAG, _tag),
    Key("tags", "node_id", "--node-id", _TAG, _tag),
    Key("tags", "bucket_service_version", "--service-version", _TAG, _tag),
    Key("agent", "listen", "--listen", "HOST:PORT or [IPV6]:PORT with a port of at most 65535", _listen),
    Key("agent", "records", "--records", "a file name, or '-' for standard output", _text),
    Key("agent", "run_dir", "--run-dir", _PATH, _directory),
    Key("agent", "cache_dir", "--cache-dir", _PATH, _directory),
    Key("agent", "user", "--user", "the name of an unprivileged user", _short),
    Key("agent", "ring_bytes", "--ring-bytes", "a power of two from 32768 to 16777216 bytes", _power_of_two(32_768, 16_777_216)),
    Key("agent", "max_connections", "--max-connections", "a number from 64 to 1048576", _integer(64, 1_048_576)),
    Key("agent", "head_bytes", "--head-bytes", "a power of two from 1024 to 16384 bytes", _power_of_two(1024, 16_384)),
)

_KEYS = {table: {key.name: key for key in KEYS if key.table == table} for table in TABLES}


class FileClasses:
    """Says what a path of the target holds: artifacts, metadata or something else.

    A metadata pattern without `/` matches the base name; one that starts with `/` the whole path; any other the path below
    each root. `*` and `?` stay within one component, `**` crosses directories. Metadata wins over storage, and sqlite's side
    files go with their database. Roots and the fixed part of absolute patterns are also taken with their symlinks resolved
    (by `realpath`), so build this while the process may still read those directories.
    """

    #: Paths are the target's, and so a client's: neither many of them nor long ones may fill the agent's memory.
    CACHE_ENTRIES = 1024
    CACHED_PATH_CHARS = 512

    __slots__ = ("_cache", "_exact", "_metadata", "_prefixes")

    def __init__(self, spec: StorageSpec, realpath: Callable[[str], str] = os.path.realpath) -> None:
        roots = tuple(dict.fromkeys(form.rstrip("/") for root in spec.roots for form in (root, realpath(root))))
        self._exact = frozenset(root or "/" for root in roots)
        self._prefixes = tuple(root + "/" for root in roots)
        patterns = [regex for pattern in spec.metadata for regex in _regexes(pattern, roots, realpath)]
        self._metadata = re.compile("|".join(f"(?:{regex})" for regex in patterns), re.DOTALL) if patterns else None
        self._cache: dict[str, FileClass] = {}

    def classify(self, path: str) -> FileClass:
        known = self._cache.get(path)
        if known is not None:
            return known
        found = self._classify(path)
        if len(path) <= self.CACHED_PATH_CHARS:
            if len(self._cache) >= self.CACHE_ENTRIES:
                del self._cache[next(iter(self._cache))]
            self._cache[path] = found
        return found

    def _classify(self, path: str) -> FileClass:
        path = os.path.normpath(path.removesuffix(DELETED))
        if path.startswith("//"):
            path = path[1:]
        if self._metadata and (self._metadata.fullmatch(path) or self._metadata.fullmatch(_database_of(path))):
            return "metadata"
        return "storage" if path in self._exact or path.startswith(self._prefixes) else "other"


def _database_of(path: str) -> str:
    for suffix in SQLITE_SIDE_FILES:
        if path.endswith(suffix):
            return path.removesuffix(suffix)
    return path


def _regexes(pattern: str, roots: tuple[str, ...], realpath: Callable[[str], str]) -> list[str]:
    if "/" not in pattern:
        return ["(?:.*/)?" + _glob(pattern)]
    if not pattern.startswith("/"):
        return [re.escape(root + "/") + _glob(pattern) for root in roots]
    fixed, rest = _fixed_part(pattern)
    return [re.escape(form.rstrip("/")) + _glob(rest) for form in dict.fromkeys((fixed, realpath(fixed)))]


def _fixed_part(pattern: str) -> tuple[str, str]:
    """The leading directories without wildcards, and the rest, which starts with `/`."""
    wild = re.search(r"[*?\[]", pattern)
    cut = pattern.rfind("/", 0, wild.start() if wild else len(pattern))
    return pattern[:cut] or "/", pattern[cut:]


def _glob(pattern: str) -> str:
    """The pattern as a regular expression. A `[` that is never closed stands for itself."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\])", pattern)
    return "".join(_WILDCARDS.get(part) or _char_class(part) or re.escape(part) for part in parts)


_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _char_class(part: str) -> str | None:
    negated = part.startswith("[!")
    inside = part[2 if negated else 1 : -1]
    if not inside or part[0] != "[" or part[-1] != "]":
        return None
    escaped = re.sub(r"([\\\[\]^&~|]|-(?=-))", r"\\\1", inside)
    return f"(?!/)[{'^' if negated else ''}{escaped}]"

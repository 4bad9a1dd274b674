# SPDX-License-Identifier: Apache-2.0
"""Probes at the sites of real programs are hit as often as the programs hash, and the programs do not notice."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bucketprobe.providers import Finder, Provider, Site, providers

DIGESTS, CHUNKS, CHUNK = 10, 100, 65536
DIGEST = hashlib.sha256(bytes(CHUNK * CHUNKS)).hexdigest()

#: All of these say that they are there, hash as asked when told to, say the last digest, and go on until they are told once more.
PYTHON = f"""
import sys
{{before}}
print("ready", flush=True)
sys.stdin.readline()
chunk = bytes({CHUNK})
for _ in range({DIGESTS}):
    digest = {{new}}
    for _ in range({CHUNKS}):
        digest.update(chunk)
    last = digest.hexdigest()
print(last, flush=True)
sys.stdin.readline()
"""
NODE = f"""
const crypto = require("crypto");
let last;
process.stdin.on("data", () => {{
  if (last) process.exit(0);
  for (let i = 0; i < {DIGESTS}; i++) {{
    const digest = crypto.createHash("sha256");
    for (let j = 0; j < {CHUNKS}; j++) digest.update(Buffer.alloc({CHUNK}));
    last = digest.digest("hex");
  }}
  console.log(last);
}});
console.log("ready");
"""
GO = f"""package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
)

func main() {{
	in := bufio.NewReader(os.Stdin)
	fmt.Println("ready")
	in.ReadString('\\n')
	chunk := make([]byte, {CHUNK})
	var last []byte
	for i := 0; i < {DIGESTS}; i++ {{
		digest := sha256.New()
		for j := 0; j < {CHUNKS}; j++ {{
			digest.Write(chunk)
		}}
		last = digest.Sum(nil)
	}}
	fmt.Printf("%x\\n", last)
	in.ReadString('\\n')
}}
"""
PRIMES = [number for number in range(2, 312) if all(number % each for each in range(2, number))]


def root(number: int, degree: int) -> int:
    """The first 32 bits of the fractional part of a root, of which SHA-256's constants are made."""
    low, high = 0, number << 32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= number << 32 * degree else (low, middle)
    return low & 0xFFFFFFFF


#: SHA-256 with the processor's instructions: as a function of its own, so that there is one call for each chunk.
C = f"""
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
static const uint32_t K[64] __attribute__((aligned(16))) = {{{", ".join(str(root(prime, 3)) for prime in PRIMES)}}};
static const uint32_t start[8] = {{{", ".join(str(root(prime, 2)) for prime in PRIMES[:8])}}};
__attribute__((noipa)) void blocks(uint32_t *h, const uint8_t *data, size_t count) {{
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
  __m128i t = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)h), 0xB1);
  __m128i b = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(h + 4)), 0x1B);
  __m128i a = _mm_alignr_epi8(t, b, 8);
  b = _mm_blend_epi16(b, t, 0xF0);
  while (count--) {{
    __m128i first = a, second = b, m[4];
    for (int i = 0; i < 4; i++) m[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), swap);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {{
      __m128i k = _mm_add_epi32(m[i & 3], _mm_load_si128((const __m128i *)(K + 4 * i)));
      b = _mm_sha256rnds2_epu32(b, a, k);
      a = _mm_sha256rnds2_epu32(a, b, _mm_shuffle_epi32(k, 0x0E));
      __m128i next = _mm_sha256msg1_epu32(m[i & 3], m[(i + 1) & 3]);
      next = _mm_add_epi32(next, _mm_alignr_epi8(m[(i + 3) & 3], m[(i + 2) & 3], 4));
      m[i & 3] = _mm_sha256msg2_epu32(next, m[(i + 3) & 3]);
    }}
    a = _mm_add_epi32(a, first);
    b = _mm_add_epi32(b, second);
    data += 64;
  }}
  t = _mm_shuffle_epi32(a, 0x1B);
  b = _mm_shuffle_epi32(b, 0xB1);
  _mm_storeu_si128((__m128i *)h, _mm_blend_epi16(t, b, 0xF0));
  _mm_storeu_si128((__m128i *)(h + 4), _mm_alignr_epi8(b, t, 8));
}}
static uint8_t chunk[{CHUNK}];
int main(void) {{
  uint32_t h[8];
  uint8_t last[64] = {{0x80}};
  char line[8];
  uint64_t bits = __builtin_bswap64(8ull * {CHUNK} * {CHUNKS});
  memcpy(last + 56, &bits, 8);
  puts("ready");
  fflush(stdout);
  fgets(line, sizeof line, stdin);
  for (int i = 0; i < {DIGESTS}; i++) {{
    memcpy(h, start, sizeof h);
    for (int j = 0; j < {CHUNKS}; j++) blocks(h, chunk, {CHUNK} / 64);
    blocks(h, last, 1);
  }}
  for (int i = 0; i < 8; i++) printf("%08x", h[i]);
  puts("");
  fflush(stdout);
  fgets(line, sizeof line, stdin);
  return 0;
}}
"""


class Program:
    """One of the above, running."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "ready"

    @property
    def tgid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> int:
        self.tell()
        return self.process.wait(60)


@contextmanager
def running(*command: str | Path) -> Iterator[Program]:
    program = Program(*command)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.communicate()


class Probe:
    """A uprobe that only counts, by perf_event_open(2), in all threads that the process has and will have."""

    TYPE = Path("/sys/bus/event_source/devices/uprobe/type")
    OPEN, INHERIT, CLOSE_ON_EXEC = 298, 1 << 1, 8

    def __init__(self, tgid: int, path: str, site: Site) -> None:
        self._path = ctypes.create_string_buffer(os.fsencode(path))
        attributes = bytearray(128)
        struct.pack_into("<IIQ", attributes, 0, int(self.TYPE.read_text()), len(attributes), int(site.returns))
        struct.pack_into("<Q", attributes, 40, self.INHERIT)
        struct.pack_into("<QQ", attributes, 56, ctypes.addressof(self._path), site.offset)
        raw = (ctypes.c_char * len(attributes)).from_buffer(attributes)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fds = []
        for tid in os.listdir(f"/proc/{tgid}/task"):
            fd = libc.syscall(self.OPEN, raw, int(tid), -1, -1, self.CLOSE_ON_EXEC)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            self._fds.append(fd)

    def close(self) -> int:
        """How often it was hit."""
        count = sum(struct.unpack("<Q", os.read(fd, 8))[0] for fd in self._fds)
        for fd in self._fds:
            os.close(fd)
        return count


def hits(kind: str, *command: str | Path) -> tuple[Provider, Counter[str]]:
    """The provider of that kind, and how often each of its programs would have run. The digest stays right, the process well."""
    with running(*command) as program:
        found = next(each for each in providers(program.tgid) if each.kind == kind)
        probes = [(site.program, Probe(program.tgid, found.path, site)) for site in found.value + found.time]
        program.tell()
        assert program.line() == DIGEST
        counts: Counter[str] = Counter()
        for name, probe in probes:
            counts[name] += probe.close()
        assert program.end() == 0
    return found, counts


def needed(name: str) -> str:
    path = shutil.which(name)
    if not path:
        pytest.fail(f"the {name} command is missing: run `.ci/setup test`")
    return path


OPENSSL = PYTHON.format(before="import hashlib", new="hashlib.sha256()")
#: digest_finished returns from digest_final, digest_updated from digest_update.
EXACT = {"digest_final": DIGESTS, "digest_finished": DIGESTS, "digest_update": DIGESTS * CHUNKS, "digest_updated": DIGESTS * CHUNKS}


@pytest.mark.parametrize("interpreter", [sys.executable, "/usr/bin/python3"])
def test_python_with_openssl(interpreter: str) -> None:
    found, counts = hits("openssl", interpreter, "-c", OPENSSL)
    # hexdigest() finishes a copy, so that the digest may be added to.
    assert counts == {**EXACT, "digest_copied": DIGESTS}
    assert all(each.emulated for each in found.value + found.time)


def test_node() -> None:
    found, counts = hits("openssl", needed("node"), "-e", NODE)
    assert +counts == EXACT
    assert found.path.endswith("/exe")
    assert all(each.emulated for each in found.value + found.time)


def pythons_with_their_own() -> list[str]:
    """CPython of 3.12 and later on the path whose module can be read by names; Debian 12 has none."""
    found = []
    for minor in range(12, 20):
        name = shutil.which(f"python3.{minor}")
        if name and subprocess.run([name, "-c", "import _sha2"], stderr=subprocess.DEVNULL).returncode == 0:
            found.append(name)
    return found


@pytest.mark.parametrize("interpreter", pythons_with_their_own())
def test_python_without_openssl(interpreter: str) -> None:
    _, counts = hits("hacl", interpreter, "-c", PYTHON.format(before="import _sha2", new="_sha2.sha256()"))
    assert counts == {"hacl_final" if name == "digest_final" else name: count for name, count in EXACT.items()}


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    command, folder = needed("go"), tmp_path_factory.mktemp("go")
    (folder / "go.mod").write_text("module target\n\ngo 1.17\n")
    cache = {"GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GO111MODULE": "on"}

    def build(source: str, *options: str) -> Path:
        (folder / "main.go").write_text(source)
        subprocess.run([command, "build", "-o", "program", *options, "."], cwd=folder, env={**os.environ, **cache}, check=True)
        return folder / "program"

    return build


CGO = GO.replace("import (", '// #include <stdlib.h>\nimport "C"\nimport (').replace("in :=", "_ = C.abs(-1)\n\tin :=")


@pytest.mark.parametrize(
    ("source", "options"),
    [
        pytest.param(GO, [], id="plain"),
        pytest.param(GO, ["-ldflags", "-s -w"], id="stripped"),
        pytest.param(GO, ["-buildmode=pie"], id="position independent"),
        pytest.param(CGO, [], id="cgo"),
        pytest.param(CGO, ["-ldflags", "-s -w"], id="cgo, stripped"),
        pytest.param(CGO, ["-buildmode=pie", "-ldflags", "-s -w"], id="cgo, position independent, stripped"),
    ],
)
def test_go(go: Callable[..., Path], source: str, options: list[str]) -> None:
    found, counts = hits("go", go(source, *options))
    assert (counts["go_check"], counts["go_sum"]) == (DIGESTS, DIGESTS)
    # Each digest's padding is one block more, or two; short writes end without having begun.
    begun = counts["go_begin"] + counts["go_begin_stack"]
    assert DIGESTS * (CHUNKS + 1) <= begun <= DIGESTS * (CHUNKS + 2)
    assert begun <= counts["go_end"] <= begun + DIGESTS * 3
    assert all(each.emulated and not each.returns for each in found.value + found.time)


@pytest.mark.skipif(" sha_ni " not in Path("/proc/cpuinfo").read_text(), reason="the processor has no instructions for SHA-256")
@pytest.mark.parametrize("options", [[], ["-s"], ["-static", "-s"]])
def test_c_without_names(tmp_path: Path, options: list[str]) -> None:
    command = ["gcc", "-O2", "-w", "-msha", "-msse4.1", *options, "-x", "c", "-", "-o", tmp_path / "program"]
    subprocess.run(command, input=C, text=True, check=True)
    found, counts = hits("sha-ni", tmp_path / "program")
    assert found.value == ()
    assert counts == {"block_begin": DIGESTS * (CHUNKS + 1), "digest_updated": DIGESTS * (CHUNKS + 1)}


#: Sees its libraries under a folder that nobody else sees, and removes the one that it has loaded.
HIDDEN = """
mount -t tmpfs none "$1" && cp "$2" "$1/libcrypto.so.3" || exit 1
LD_LIBRARY_PATH="$1" exec "$3" -c "import hashlib, os; os.unlink('$1/libcrypto.so.3')
$4"
"""


def test_a_library_that_is_deleted_and_was_never_visible_here(tmp_path: Path) -> None:
    with running(sys.executable, "-c", OPENSSL) as visible:
        library = next(each.library for each in providers(visible.tgid) if each.kind == "openssl")
    command = ("unshare", "-m", "sh", "-c", HIDDEN, "sh", str(tmp_path), library, sys.executable, OPENSSL)
    found, counts = hits("openssl", *command)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/libcrypto\.so\.3 \(deleted\)", found.library)
    assert counts == {**EXACT, "digest_copied": DIGESTS}
    assert os.listdir(tmp_path) == []


def test_many_processes_of_one_program_are_searched_once() -> None:
    with running(sys.executable, "-c", OPENSSL) as first, running(sys.executable, "-c", OPENSSL) as second:
        finder = Finder()
        found = [next(each for each in finder.find(program.tgid) if each.kind == "openssl") for program in (first, second)]
        assert found[0].inode == found[1].inode
        assert (found[0].value, found[0].time) == (found[1].value, found[1].time)
        assert str(second.tgid) in found[1].path
        assert os.stat(found[1].path).st_ino == found[1].inode[1]

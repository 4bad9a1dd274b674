# SPDX-License-Identifier: Apache-2.0
"""Where the execution key of real processes lies: what the kernel program would read there is what the process says of itself."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from harness import await_that

from bucketprobe import btf, runtimes
from bucketprobe.runtimes import Kind, Layout

#: Blocks in read(2) as asked; before that each thread says its tid and the address of the context it runs in.
PYTHON = r"""
import asyncio, contextvars, ctypes, json, os, sys, threading
def tid():
    return ctypes.CDLL(None).syscall(186)  # gettid; Python has it from 3.8 on
def block(context):
    os.write(1, json.dumps([tid(), id(context)]).encode() + b"\n")
    os.read(0, 1)
def task():
    context = contextvars.copy_context()
    loop = asyncio.new_event_loop()
    loop.call_soon(block, context, context=context)
    loop.call_soon(loop.stop)
    loop.run_forever()
def threads(target=task):
    started = [threading.Thread(target=target) for _ in range(3)]
    for thread in started:
        thread.start()
    return started
def fork():
    if os.fork():
        os.wait()
    else:
        task()
def nothing():
    os.write(1, json.dumps([tid(), 0]).encode() + b"\n")
    os.read(0, 1)
def keep_state():
    "What pybind11 does: the state of a thread under a key of its own."
    libc = ctypes.CDLL(None)
    ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p
    key = ctypes.c_uint()
    libc.pthread_key_create(ctypes.byref(key), None)
    libc.pthread_setspecific(key, ctypes.c_void_p(ctypes.pythonapi.PyThreadState_Get()))
for step in sys.argv[1:]:
    globals()[step]()
"""

#: Takes keys before the interpreter is there, and puts the thread's own address under each.
KEYS = """
#include <pthread.h>
__attribute__((constructor)) static void take(void) {
  for (int i = 0; i < 5; i++) {
    pthread_key_t key;
    pthread_key_create(&key, 0);
    pthread_setspecific(key, (void *)pthread_self());
  }
}
"""

GO_MODULE = {
    "go.mod": "module target\n\ngo 1.17\n",
    "key/key.go": "package key\n\nfunc Current() uintptr\n",
    "key/key_amd64.s": '#include "textflag.h"\n\nTEXT ·Current(SB), NOSPLIT, $0-8\n\tMOVQ R14, ret+0(FP)\n\tRET\n',
    "main.go": """package main

import (
	"fmt"
	"runtime"
	"syscall"
	"target/key"
)

func wait() {
	runtime.LockOSThread()
	fmt.Printf("[%d, %d]\\n", syscall.Gettid(), key.Current())
	block()
}

func main() {
	for i := 0; i < 3; i++ {
		go wait()
	}
	wait()
}
""",
}
BLOCKS = {
    "go": 'package main\n\nimport "syscall"\n\nfunc block() { syscall.Read(0, make([]byte, 1)) }\n',
    "c": """package main

// #include <unistd.h>
// static int block(void) { char c; return read(0, &c, 1); }
import "C"

func block() { C.block() }
""",
}

Start = Callable[..., "Target"]


class Target:
    """A process whose threads say, as JSON lines, their tid and execution key, and then block in read(2)."""

    def __init__(self, *command: str, said: int = 1, **how: object) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)  # type: ignore[call-overload]
        assert self.process.stdout
        self.keys: dict[int, int] = dict(json.loads(self.process.stdout.readline()) for _ in range(said))
        first = next(iter(self.keys))
        self.tgid = next(int(line.split()[1]) for line in Path(f"/proc/{first}/status").read_text().splitlines() if line[:5] == "Tgid:")
        for tid in self.keys:
            await_that("it blocks in read", partial(blocks_in_read, tid))

    def end(self) -> None:
        """Ends what was started: a forked child reads the end of its input."""
        self.process.kill()
        self.process.communicate()

    def word(self, address: int) -> int:
        with open(f"/proc/{self.tgid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return int.from_bytes(memory.read(8), "little")

    def key(self, layout: Layout, tid: int) -> int:
        """As the kernel program reads it, at the system call in which the thread is."""
        r14, fsbase = registers(tid)
        match layout.kind:
            case Kind.GO:
                return r14
            case Kind.GO_CGO:
                return self.word(self.word(self.word(fsbase - 8) + layout.slot) + layout.member)
            case Kind.CPYTHON:
                return self.word(self.word(fsbase + layout.slot) + layout.member)
        pytest.fail(layout.detail)


def blocks_in_read(tid: int) -> bool:
    return Path(f"/proc/{tid}/syscall").read_text().startswith("0 ")


def registers(tid: int) -> tuple[int, int]:
    """R14 and the FS base."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    attach, getregs, detach, wall = 16, 12, 17, 0x40000000
    assert libc.ptrace(attach, tid, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(tid, wall)
    raw = ctypes.create_string_buffer(27 * 8)
    assert libc.ptrace(getregs, tid, None, raw) == 0
    libc.ptrace(detach, tid, None, None)
    words = struct.unpack("<27Q", raw.raw)
    return words[1], words[21]


@pytest.fixture
def start() -> Iterator[Start]:
    targets: list[Target] = []

    def begin(*command: str, **how: object) -> Target:
        targets.append(Target(*command, **how))  # type: ignore[arg-type]
        return targets[-1]

    yield begin
    for target in targets:
        target.end()


def interpreters() -> list[str]:
    """The environment's CPython, which is mostly a link, and those of other versions that are on the path."""
    found = [sys.executable]
    for minor in range(7, 20):
        name = shutil.which(f"python3.{minor}")
        if name and subprocess.run([name, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            found.append(name)
    return found


def check(target: Target, kind: Kind) -> Layout:
    layout = runtimes.layout(target.tgid)
    assert layout.kind == kind, layout.detail
    assert {tid: target.key(layout, tid) for tid in target.keys} == target.keys
    return layout


@pytest.mark.parametrize("interpreter", interpreters())
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(["task"], id="task"),
        pytest.param(["threads"], id="tasks only in threads"),
        pytest.param(["threads", "task"], id="threads"),
        pytest.param(["fork"], id="forked"),
        pytest.param(["keep_state", "task"], id="kept state"),
        pytest.param(["keep_state", "threads", "task"], id="kept state, threads"),
    ],
)
def test_a_task_of_python_is_known_by_its_context(start: Start, interpreter: str, steps: list[str]) -> None:
    said = 3 * ("threads" in steps) + ("threads" not in steps or "task" in steps)
    layout = check(start(interpreter, "-c", PYTHON, *steps, said=said), Kind.CPYTHON)
    assert f"context at +{layout.member}" in layout.detail
    assert hex(layout.slot) in layout.detail


def test_a_child_forked_by_a_thread(start: Start) -> None:
    code = PYTHON + "\nthread = threading.Thread(target=fork); thread.start(); thread.join()"
    check(start(sys.executable, "-c", code), Kind.CPYTHON)


def test_other_keys_were_taken_before(start: Start, tmp_path: Path) -> None:
    (tmp_path / "keys.c").write_text(KEYS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "keys.so", tmp_path / "keys.c"], check=True)
    plain = check(start(sys.executable, "-c", PYTHON, "task"), Kind.CPYTHON)
    later = check(start(sys.executable, "-c", PYTHON, "task", env={**os.environ, "LD_PRELOAD": str(tmp_path / "keys.so")}), Kind.CPYTHON)
    assert later.slot == plain.slot + 5 * 16
    assert later.member == plain.member


def test_a_python_without_tasks_may_be_asked_again(start: Start) -> None:
    layout = runtimes.layout(start(sys.executable, "-c", PYTHON, "nothing").tgid)
    assert layout.kind == Kind.NONE
    assert "no task context in use" in layout.detail


def test_the_executable_is_gone(start: Start, tmp_path: Path) -> None:
    copy = tmp_path / "python"
    shutil.copy(os.path.realpath(sys.executable), copy)
    target = start(str(copy), "-c", PYTHON, "task", env={**os.environ, "PYTHONHOME": sys.base_prefix})
    copy.unlink()
    check(target, Kind.CPYTHON)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    go = shutil.which("go")
    if not go:
        pytest.fail("the go command is missing: run `.ci/setup test`")
    folder = tmp_path_factory.mktemp("go")
    cache = {"GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GO111MODULE": "on"}

    def compile(block: str, *options: str) -> str:
        for name, text in {**GO_MODULE, "block.go": BLOCKS[block]}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        program = str(folder / f"{block}{len(list(folder.iterdir()))}")
        environment = {**os.environ, **cache, "CGO_ENABLED": "1" if block == "c" else "0"}
        subprocess.run([go, "build", "-o", program, *options, "."], cwd=folder, env=environment, check=True)
        return program

    return compile


@pytest.mark.parametrize(
    ("block", "options", "kind"),
    [
        pytest.param("go", [], Kind.GO, id="pure"),
        pytest.param("go", ["-trimpath", "-ldflags", "-s -w"], Kind.GO, id="pure, stripped"),
        # Linked dynamically it might run C code, and the other way holds for it as well.
        pytest.param("go", ["-buildmode=pie"], Kind.GO_CGO, id="pure, position independent"),
        pytest.param("c", [], Kind.GO_CGO, id="cgo"),
        pytest.param("c", ["-trimpath", "-ldflags", "-s -w"], Kind.GO_CGO, id="cgo, stripped"),
        pytest.param("c", ["-buildmode=pie"], Kind.GO_CGO, id="cgo, position independent"),
    ],
)
def test_a_goroutine_is_known_in_go_and_in_c(start: Start, build: Callable[..., str], block: str, options: list[str], kind: Kind) -> None:
    layout = check(start(build(block, *options), said=4), kind)
    assert layout.detail.startswith("go1.")


def test_go_linked_statically_with_c_is_not_guessed(start: Start, build: Callable[..., str]) -> None:
    layout = runtimes.layout(start(build("c", "-ldflags", '-extldflags "-static"'), said=4).tgid)
    assert layout.kind == Kind.NONE
    assert "C code" in layout.detail


def test_other_programs_have_none(start: Start) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert runtimes.layout(process.pid).kind == Kind.NONE
    finally:
        process.kill()
    # Not waited for, so it is a zombie as soon as it has ended.
    await_that("it has ended", lambda: ") Z" in Path(f"/proc/{process.pid}/stat").read_text())
    assert runtimes.layout(process.pid).kind == Kind.NONE
    process.wait()
    assert runtimes.layout(process.pid).kind == Kind.NONE
    assert runtimes.layout(2).kind == Kind.NONE  # the kernel's own threads have no memory


def test_the_kernel_says_where_it_saves_the_fs_base() -> None:
    found = btf.offsets({"thread": ("task_struct", "thread"), "fsbase": ("task_struct", "thread.fsbase")})
    assert found["fsbase"] > found["thread"] > 0

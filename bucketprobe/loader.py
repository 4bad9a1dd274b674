# SPDX-License-Identifier: Apache-2.0
"""The compiler: C on standard input, bytecode as JSON on standard output. The one module that imports bcc.

Run as a script by the system's Python (`/usr/bin/python3 -I loader.py STUBS`), which is where Debian's python3-bpfcc lives. BCC
with LLVM needs some 125 MB and never gives it back, so this process ends when it has compiled; loading the bytecode needs neither.

STUBS is a folder in which it lays out the few headers that BCC includes by itself, in place of a kernel's: no kernel header
package is needed, and no kernel structure exists that could be read with another kernel's layout.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

STUBS = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "include/linux/types.h": """#pragma once
typedef unsigned char u8, __u8; typedef signed char s8, __s8; typedef short s16, __s16; typedef int s32, __s32;
typedef unsigned short u16, __u16, __be16, __le16, __sum16; typedef unsigned int u32, __u32, __be32, __le32, __wsum;
typedef unsigned long long u64, __u64, __be64, __le64; typedef long long s64, __s64;
typedef unsigned long size_t, uintptr_t; typedef long ssize_t; typedef _Bool bool; typedef int pid_t;
#define __aligned_u64 __u64 __attribute__((aligned(8)))
""",
    "include/linux/version.h": """#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
""",
    "include/linux/bpf.h": "",
    "include/linux/bpf_common.h": "",
    "include/linux/log2.h": "",
    "include/asm/page.h": "#define PAGE_SIZE 4096\n",
    "include/uapi/linux/bpf.h": "",
    "include/uapi/linux/if_packet.h": "",
    "include/uapi/linux/ptrace.h": """#pragma once
struct pt_regs { unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss; };
""",
}


def main(folder: str) -> None:
    for name, text in STUBS.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    os.environ["BCC_KERNEL_SOURCE"] = folder
    import bcc  # type: ignore[import-not-found]  # it reads the environment

    answer = os.dup(1)
    os.dup2(2, 1)  # the compiler's messages are not the answer
    program = bcc.BPF(text=sys.stdin.buffer.read(), cflags=["-w", "-g0"])
    names = [bcc.lib.bpf_function_name(program.module, i) for i in range(bcc.lib.bpf_num_functions(program.module))]
    code = {name.decode(): base64.b64encode(program.dump_func(name)).decode() for name in names}
    with os.fdopen(answer, "w", encoding="ascii") as out:
        json.dump({"bcc": bcc.__version__, "programs": code}, out)
    os._exit(0)  # no clean-up to wait for


if __name__ == "__main__":
    main(sys.argv[1])

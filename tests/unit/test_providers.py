# SPDX-License-Identifier: Apache-2.0
"""Which sites are found in real and in made-up binaries, and that none is where it could do harm."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
import random
import re
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketprobe import elf
from bucketprobe.providers import Finder, Provider, Site, providers

TGID = 4711

#: (*digest).Write, Sum and checkSum, one after the other as the linker laid them, of programs built with these versions of Go.
GO_1_27 = (
    "c-oCr|7%-S6u)s3vN?UPupjzEps#R$XmLWrkTq`5IHH{Qe1jm0{b6DR8D;E;ET&kRZZ;&fz1}>Duph=8sEGJ4v}}-OomnfwvK6FTVN6ANp%v07qz0PjIrk+QLMIkp?"
    "<eP-FQ0qP=N<FpIbHh%o?+~55Whig8$g`p2@o+p4#MUW5P%7g@dV7>*FIZjj6tpy)#jhW2oN(o>AO3rWmD9l`N%Bqj+uj1%Q?!xdDDQ%4rulch%_I9$a<QCsDjvWUt"
    "8PrKvE4!H6-Pb<Rd91l?yaL#1loTHW>zI+*pcYadFo@e+Vn9&^yrtBSQP77;b`SLGvM$TVpWTfWSJ4A7Hq#b%0JxI&%cXPmue4x%N5bn7f}o1y0hSS0$>1v|HK$gUF"
    "xh0lMfY;Qhqku3Y^$bM<Bl8@3wW46i}%HoUvyTeEi<^E^}Rn#~Pr%d6SPj0KpDanU!NPyn*G$bm>3kgfQ*mspV1ulp7sp)N-u+olAUUxchjAocMQ9qxFLnm}IJ78$f"
    "$#`C<bceH^h@^7Y0>iF@Vld2bKq+U`qX>7x7D7VM#!HPY6i;PilLMNVZsXc0Yp4(X2^V~o1-=Zq|YY#mjL@jggA}W$}g2Y!R{q)lv40rN7ziUC7lTKOtsgO~uW%fMp"
    "$EW|<&IkOfGfJe}fsRPC+Z!|>k>{>D3w&3d*Lhu?H#yQ`?)!gXL!B50kOk!#)AVpm>l?xIqK+V`6EX-HghmLdw^2e-LUBTILJ2|%LKB20+^?|+IA>9D;xU>j`Z%7Hw"
    "eLfH_9kB>b!z!9l}4{9lD2a?M0ALtHV{KYq?|eoGOws_9qS@ntdv3&=e+#s7cVe(@-p?$&tZy<PT2xq?KGmQV)9&lpn>WV#j5=7=Jyoodw{&|d&o{?_BM5r1lyx$bm"
    "{#EGs9<AzlO{<FFl=Ek5PvqF{4=b_5Vd`KOr6ac7Gw&*7w&D>8I}N=c6b3Sx^_a!mlb-^u2=5G$zAMhxADhC-KS9AT#tUL$l3{R$|<k#r2W<WegYIDsDUM*8+asxHL"
    "v>?R3R-;z7iq&3oPcn~|zEzuoBp2?EMLA26NdB7Je@U>&rzq9yEu_^sb70rlp5%To<i&bjFX)8-0_Zj6)gM)8@_<zbAY^(?J}KDr>SppTN$I^v_Wv~(X$N$aSOW~9|"
    "msK942>+E!rO+GKJkZ;PXLWNFWl%&I5Nng})G7J7>oM&N=u^Weo@3k{H5ka=ZRn&ug57$Jcge!q=Q*>{XIy+&=O@8CgZm4#y-5u6HguQcG"
)
GO_1_23 = (
    "c-nnbUuaWT7{94nf>cflJ_MK1+wI8GCs$OKIHfUU^4)Pe*2%WQ6e5UJ>}GWlisT{grfUz!D|zTcVGj1#$2|yBS7x$FO+h4D@IRuk$rWY0)rXXd&A#uPTWf1I4=3L_-"
    "@o7YJHK<Sj}JuHkFh4h_!7iF;5-2k8Qu#b&j&!*ybr`4o-KK!FB*+c*w>Byw%oFDw$W&S%%D@+7#rG&Mo$)ouCY^|VHn`drP%OqA++41We|0!--Ak{3)*jhyFLl-7b"
    "YZqV73n;$KxQe10<(&Z6InOX1wtoOUf&^RDswe^b`dCVT)s5foS32?lcK<7%pXaBt`Afh?2qDQik_UvthgjycaH|vIfPj)F$b(AO2NNBB7%WVh-xJp)!XPJhepG>hK"
    "{n{dgUkK^DeY&TK0GJ+YOt5l(^_{7?bJqp;=NFVnF}ON4w;ud-$ZWF~>Zyg#9%3YFO|8_yDUdl|3*xl-W9LRLp@5qS4dIftC~n1tXDn%g2~HJ>>GqDbAneJQERb0ph"
    "&r*jINi?H`E5ET%<cW5)liP||$Ao7R%k|r1jiI66ugx~b`wd#stA|XO$qr`;yXdJb2Ir!P`e*R0h5?L)2i0s6Zo5Zdta-|kA!41-iILT+#{xtXTzr@-yhT*;Q{59d7"
    "(Rs3&U;#LjVQ};Oa}fR92NxIb?~f?%Tht#0cw<<dMOJgxn&EL4!3!WOQJCOoNdv6-vnqF5w|95PK%P{PaDGT$J-QZTQ9*kA!GZ;1`a(=aZ{5(}WO!R|%p+^JUltLgy"
    "lUu~%E7EP6}}}3?jF>b@Xt|x$@_g9K@HrPuF_<XcH$y2g?F<E&RhWZ7G$PIRyc&ne!9L4S<niRRRg4DjcnCRWR&l{w+vW009IWBY$ag;dxJ3kdqo(p=)>3gIJ~Hj5i"
    "FiztrL7~!5CNFp$|7$Nv(0UCe#XQ?VZF2Q~+_sdDvyUyQ)_GrtN+<V%2YfGoR>Y>8j-(38M{c_?gzXm7HP2cLQQb4p4cp%5r<o(sQ@kuL7I;RM;&haf9EPnF~PNOwQ"
    "4SqdLJko;BD|Q6tTB4RKI5u_}_&C)2By(J#|sWemu4i!yRD9Z|-hOs`i)UZ$gH6nO!Q6^;)W2TI3UWICqKr~!$$kF^#RFSHq?&A7gi5q%@>n()CUyw7)&oz0}L^YaZ"
    "`ROu7&>n3{IGw0O^?{5m;b=(_Ur|&EN=)3vl7xX`E<Vq3"
)


class Process:
    """A folder like /proc/PID whose mappings are of the given files, each executable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / str(TGID)
        (self.path / "map_files").mkdir(parents=True)
        (self.path / "maps").touch()
        self._next = 0x7F0000000000

    def map(self, file: Path | str, *, exe: bool = False) -> Process:
        info = os.stat(file)
        start, end = self._next, self._next + 0x1000
        self._next += 0x10000
        (self.path / "map_files" / f"{start:x}-{end:x}").symlink_to(file)
        if exe:
            (self.path / "exe").symlink_to(file)
        with open(self.path / "maps", "a") as maps:
            maps.write(f"{start:x}-{end:x} r-xp 00001000 fe:00 {info.st_ino}      {file}\n")
        return self

    def find(self) -> list[Provider]:
        return providers(TGID, proc=str(self.folder))


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path / "proc")


def only(found: list[Provider]) -> Provider:
    assert len(found) == 1
    return found[0]


def shape(sites: tuple[Site, ...]) -> list[tuple[str, bool]]:
    return [(each.program, each.returns) for each in sites]


OPENSSL_TIME = [("digest_update", False), ("digest_updated", True), ("digest_copied", False)]
OPENSSL_VALUE = [("digest_final", False), ("digest_finished", True)]
HACL_TIME = [("digest_update", False), ("digest_updated", True)]
HACL_VALUE = [("hacl_final", False), ("digest_finished", True)]
BLOCK_TIME = [("block_begin", False), ("digest_updated", True)]


def compiled(folder: Path, source: str, *options: str, name: str = "made.so") -> Path:
    path = folder / name
    command = ["gcc", "-x", "c", "-", "-o", str(path), *(options or ("-O2", "-shared", "-fPIC"))]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return path


def disassembled(path: Path | str, site: Site) -> str:
    """The instruction at the site, as binutils has it. The files have one executable segment each."""
    segments = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    rows = [[int(part, 16) for part in row] for row in re.findall(r"LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+) 0x\w+ R E", segments)]
    at = next(site.offset - offset + address for offset, address, size in rows if 0 <= site.offset - offset < size)
    command = ["objdump", "-d", "--no-show-raw-insn", f"--start-address={at}", f"--stop-address={at + 16}", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(line.split("\t")[1] for line in lines if line.lstrip().startswith(f"{at:x}:"))


# --- OpenSSL ---


def test_this_process_has_openssl() -> None:
    hashlib.sha256()
    found = next(each for each in providers(os.getpid()) if each.kind == "openssl")
    assert (shape(found.time), shape(found.value)) == (OPENSSL_TIME, OPENSSL_VALUE)
    assert re.fullmatch(r"OpenSSL 3\.\d+\.\d+", found.detail)
    assert all(each.emulated for each in found.time + found.value)
    # What the dynamic linker says, turned into a place in the file by the mappings.
    library = ctypes.CDLL(found.library)
    for name, site in zip(("EVP_DigestUpdate", "EVP_DigestUpdate", "EVP_MD_CTX_copy_ex"), found.time, strict=True):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        assert address
        assert 0 <= site.offset - place_in_file(address) <= 16
        assert re.match(r"push|j", disassembled(found.library, site))


def place_in_file(address: int) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset = line.split()[:3]
        start, end = (int(each, 16) for each in span.split("-"))
        if start <= address < end:
            return address - start + int(offset, 16)
    raise AssertionError(f"{address:x} is not mapped")


def test_node_has_openssl_in_itself_and_is_not_kept(process: Process) -> None:
    node = shutil.which("node")
    assert node, "Debian's package nodejs is needed"
    process.map(os.path.realpath(node), exe=True)
    tracemalloc.start()
    found = only(process.find())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.kind, shape(found.time), shape(found.value)) == ("openssl", OPENSSL_TIME, OPENSSL_VALUE)
    assert found.path == f"{process.path}/exe"
    assert peak < 8 << 20


#: What the functions do does not matter, only how they look: OpenSSL's begin with a test and with pushes.
LIKE_OPENSSL = """
int other(void *, const void *, unsigned long);
int EVP_DigestUpdate(void *c, const void *d, unsigned long n) { if (!n) return 1; return other(c, d, n) + 1; }
int EVP_DigestFinal_ex(void *c, void *m, void *s) { int a = other(c, m, 1); return a + other(s, c, a) + other(m, c, 2); }
int EVP_MD_CTX_copy_ex(void *o, const void *i) { int a = other(o, i, 2); return a + other(o, i, a) + other(o, i, 3); }
"""
VERSION = "unsigned long OpenSSL_version_num(void) {{ return {}; }}\n"


@pytest.mark.parametrize(
    ("more", "detail", "value"),
    [
        (VERSION.format("0x30500040L"), "OpenSSL 3.5.4", True),
        (VERSION.format("0x1010117fL"), "OpenSSL 1.1.1: the arrangement", False),
        (VERSION.format("0x20000000L"), "OpenSSL 2.0.0: the arrangement", False),
        (VERSION.format("0x40000000L"), "OpenSSL 4.0.0: the arrangement", False),
        ("", "OpenSSL of an unknown version: the arrangement", False),
        (VERSION.format("other(0, 0, 0)"), "OpenSSL of an unknown version: the arrangement", False),
        (VERSION.format("0x30000000L") + "int awslc_version_string;void BORINGSSL_self_test(void) {}", "BoringSSL: the arrangement", False),
        (VERSION.format("0x30000000L") + "const char *awslc_version_string(void) { return 0; }", "AWS-LC: the arrangement", False),
    ],
)
@pytest.mark.parametrize("option", ["-fcf-protection=none", "-fcf-protection=full"])
def test_values_only_where_the_contexts_are_known(
    process: Process, tmp_path: Path, more: str, detail: str, value: bool, option: str
) -> None:
    library = compiled(tmp_path, LIKE_OPENSSL + more, "-O2", "-shared", "-fPIC", option, name="libanything.so.7")
    found = only(process.map(library).find())
    assert found.kind == "openssl"
    assert found.detail.startswith(detail)
    assert shape(found.time) == OPENSSL_TIME
    assert shape(found.value) == (OPENSSL_VALUE if value else [])
    assert all(each.emulated for each in found.time + found.value)
    assert {disassembled(library, each).split()[0] for each in found.time + found.value} <= {"push", "je", "jne", "jmp"}


def test_private_names_count_until_they_are_stripped(process: Process, tmp_path: Path) -> None:
    source = (
        LIKE_OPENSSL
        + VERSION.format("0x30000000L")
        + "int other(void *a, const void *b, unsigned long c) { return c; } int main(void) { return 0; }"
    )
    program = compiled(tmp_path, source, "-O1", "-fno-inline", "-static", name="program")
    assert shape(only(process.map(program, exe=True).find()).value) == OPENSSL_VALUE
    subprocess.run(["strip", program], check=True)
    assert process.find() == []


def test_a_longer_name_that_ends_the_same_is_another(process: Process, tmp_path: Path) -> None:
    source = LIKE_OPENSSL.replace("EVP_DigestUpdate", "aws_lc_EVP_DigestUpdate")
    assert process.map(compiled(tmp_path, source)).find() == []


ASSEMBLY = """
asm(".text; .globl EVP_DigestUpdate; .type EVP_DigestUpdate, @function; EVP_DigestUpdate: %s; ret;"
    ".size EVP_DigestUpdate, .-EVP_DigestUpdate");
""" + LIKE_OPENSSL.replace("int EVP_DigestUpdate", "static int unused")


@pytest.mark.parametrize(
    ("code", "at"),
    [
        ("test %rdx, %rdx; je 1f; 1: nop", 3),
        ("endbr64; nopl 8(%rax, %rax); test %rdx, %rdx; jne 1f; 1: nop", 12),
        ("xor %eax, %eax; mov %rdi, %r8; push %r15", 5),
        ("cmp %rsi, %rdi; jmp 1f; 1: nop", 3),
        # The stack pointer or an argument is another then.
        ("sub $8, %rsp; test %rdx, %rdx; je 1f; 1: add $8, %rsp", None),
        ("mov %rsi, %rdi; push %rbx; pop %rbx", None),
        ("xor %edx, %edx; push %rbx; pop %rbx", None),
        # Not a copy between registers.
        ("mov 8(%rdi), %rax; test %rax, %rax; je 1f; 1: nop", None),
        ("pop %rax; push %rax", None),
        # The kernel emulates only the pushes of two bytes at most, and no jumps with a prefix.
        ("push $1; pop %rax", None),
        # To another segment or mode: nothing for a probe.
        ("lret", -1),
        ("int $0x80", -1),
        (".byte 0x66, 0xe9; .long 0", -1),
        # Memory relative to the instruction, which the kernel would have to move.
        ("mov 8(%rip), %rax", -1),
        ("jmp *8(%rip)", -1),
    ],
)
def test_the_site_of_a_function(process: Process, tmp_path: Path, code: str, at: int | None) -> None:
    found = only(process.map(compiled(tmp_path, ASSEMBLY % code)).find())
    if at == -1:
        assert found.time == ()
        assert "no times" in found.detail or "no values" in found.detail
        return
    site, returned = found.time[:2]
    entry = function_offset(process, "EVP_DigestUpdate")
    assert (site.offset - entry, site.emulated) == ((0, False) if at is None else (at, True))
    assert (returned.offset, returned.returns) == (site.offset, True)


def function_offset(process: Process, name: str) -> int:
    path = next((process.path / "map_files").iterdir()).resolve()
    symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    address = next(int(line.split()[0], 16) for line in symbols.splitlines() if line.split()[-1] == name)
    with elf.Bytes(str(path), 1 << 30) as file:
        return next(each.offset + address - each.address for each in elf.code(file) if 0 <= address - each.address < each.size)


# --- HACL* ---


@pytest.mark.parametrize(
    ("update", "final"), [("Streaming_SHA2_update_256", "Streaming_SHA2_finish_256"), ("Hash_SHA2_update_256", "Hash_SHA2_digest_256")]
)
def test_hacl_by_its_private_names(process: Process, tmp_path: Path, update: str, final: str) -> None:
    source = "int other(void *, const void *, unsigned long);" + "".join(
        f"__attribute__((noinline, used)) static int python_hashlib_Hacl_{name}(void *a, void *b, unsigned c) "
        "{ int r = other(a, b, c); return r + other(b, a, r) + other(a, a, 3); }\n"
        for name in (update, final, update.replace("256", "512"))
    )
    library = compiled(tmp_path, source, name="_sha2.so")
    found = only(process.map(library).find())
    assert (found.kind, shape(found.time), shape(found.value)) == ("hacl", HACL_TIME, HACL_VALUE)
    assert found.time[0].offset == function_offset(process, f"python_hashlib_Hacl_{update}")
    assert found.value[0].offset == function_offset(process, f"python_hashlib_Hacl_{final}")
    subprocess.run(["strip", library], check=True)
    assert process.find() == []


# --- Go ---

TEXT, TABLE = 0x1000, 0x8000
GO_SITES = {
    "1.27": (GO_1_27, "crypto/internal/fips140/sha256.(*Digest).", "crypto/internal/fips140/sha256.block", (0x2A0, 0x4E0, 0x680, 0xA20)),
    "1.23": (GO_1_23, "crypto/sha256.(*digest).", "crypto/sha256.block", (0x260, 0x480, 0x620, 0x740)),
}
#: From the disassembly: where in Write the calls and the branches after them are, in checkSum the check of the stack, in Sum the test.
GO_PLACES = {
    "1.27": {"go_check": [0x4E9], "go_sum": [0x361], "go_begin": [0xB1, 0x1C3, 0x1E8], "go_end": [0xF0, 0x1D4, 0x1FA]},
    "1.23": {"go_check": [0x489], "go_sum": [0x303], "go_begin_stack": [0xE0, 0x17A], "go_end": [0x116, 0x1C5]},
}


def go_program(
    path: Path, version: str, *, shift: int = 0, text_start: bool = True, code: bytes | None = None, magic: int = 0xFFFFFFF1
) -> Path:
    """The real functions under the names that they had; `shift`: bytes of C before Go's text, as with cgo."""
    encoded, prefix, block, ends = GO_SITES[version]
    code = zlib.decompress(base64.b85decode(encoded)) if code is None else code
    starts = (0, ends[0], ends[1], ends[3])
    names = [f"{prefix}Write", f"{prefix}Sum", f"{prefix}checkSum", block]
    strings = b"".join(b"\0" + name.encode() for name in ["main.main", *names]) + b"\0"
    offsets = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names]
    functions_at = 72 + len(strings) + (-len(strings) % 8)
    rows = 8 * len(names) + 8
    table = b"".join(struct.pack("<II", 0x100 + start, rows + 8 * index) for index, start in enumerate(starts))
    table += struct.pack("<II", 0x100 + ends[3] + 0x40, 0)
    table += b"".join(struct.pack("<Ii", 0x100 + start, offset) for start, offset in zip(starts, offsets, strict=True))
    start = 0x400000 + TEXT + shift if text_start else 0
    head = struct.pack("<IBBBB8Q", magic, 0, 0, 1, 8, len(names), 1, start, 72, 0, 0, 0, functions_at)
    pclntab = head + strings.ljust(functions_at - 72, b"\0") + table
    info = b"\xff Go buildinf:\x08\x02".ljust(32, b"\0") + bytes([6]) + b"go" + version.encode()
    sections = {
        b".text": (TEXT, b"\xc3" * (shift + 0x100) + code),
        b".go.buildinfo": (0x6000, info),
        b".gopclntab": (TABLE, pclntab),
    }
    return program(path, sections)


def program(path: Path, sections: dict[bytes, tuple[int, bytes]]) -> Path:
    """An ELF file with these sections; what lies before TABLE is executable."""
    names = b"\0" + b"\0".join(sections) + b"\0.shstrtab\0"
    placed = {**sections, b".shstrtab": (0x10000, names)}
    rows = [bytes(64)] + [
        struct.pack("<IIQQQQIIQQ", names.index(b"\0" + name + b"\0") + 1, 1, 2, 0x400000 + at, at, len(data), 0, 0, 1, 0)
        for name, (at, data) in placed.items()
    ]
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0x11000, 0, 64, 56, 1, 64, len(rows), len(rows) - 1)
    image = bytearray(0x11000)
    image[:64] = head
    image[64:120] = struct.pack("<IIQQQQQQ", 1, 5, TEXT, 0x400000 + TEXT, 0, TABLE - TEXT, TABLE - TEXT, 0x1000)
    for at, data in placed.values():
        image[at : at + len(data)] = data
    path.write_bytes(bytes(image) + b"".join(rows))
    return path


def go_places(found: Provider, shift: int = 0) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for each in found.value + found.time:
        assert each.emulated
        assert not each.returns, "a return probe would break a Go program"
        places.setdefault(each.program, []).append(each.offset - TEXT - 0x100 - shift)
    return places


@pytest.mark.parametrize("version", GO_SITES)
@pytest.mark.parametrize("shift", [0, 0x240])
@pytest.mark.parametrize("text_start", [True, False])
def test_the_sites_of_real_go_functions(process: Process, tmp_path: Path, version: str, shift: int, text_start: bool) -> None:
    path = go_program(tmp_path / "go", version, shift=shift, text_start=text_start)
    found = only(process.map(path, exe=True).find())
    assert (found.kind, found.detail) == ("go", f"Go {version}")
    assert go_places(found, shift) == GO_PLACES[version]


def changed(version: str, before: str, after: str) -> bytes:
    code = zlib.decompress(base64.b85decode(GO_SITES[version][0]))
    assert bytes.fromhex(before) in code
    return code.replace(bytes.fromhex(before), bytes.fromhex(after))


@pytest.mark.parametrize(
    ("before", "after", "lack"),
    [
        ("488b4868", "488b4870", "values"),  # checkSum takes the length from elsewhere
        ("80bc24b800000000", "80bc24b900000000", "values"),  # is224 is not where it was
        ("4d3b6610", "4d3b6618", "values"),  # another check of the stack
        ("4989f048", "ea89f048", "times"),  # an instruction that is not known
    ],
)
def test_go_that_looks_otherwise_is_refused(process: Process, tmp_path: Path, before: str, after: str, lack: str) -> None:
    found = only(process.map(go_program(tmp_path / "go", "1.27", code=changed("1.27", before, after))).find())
    assert bool(found.value) == (lack != "values")
    assert bool(found.time) == (lack != "times")
    assert f"so no {lack}" in found.detail


def test_go_with_another_table(process: Process, tmp_path: Path) -> None:
    assert process.map(go_program(tmp_path / "go", "1.27", magic=0xFFFFFFF9)).find() == []


# --- instructions for SHA-256 ---

ROUNDS = "sha256rnds2 %xmm1, %xmm2;" * 32
BLOCK = '__attribute__((naked)) void block(void) {{ asm("{}; {} ret"); }} int main(void) {{ return 0; }}'


@pytest.mark.parametrize(
    ("before", "at"),
    [
        ("movdqu (%rdi), %xmm7; test %rdx, %rdx; je 1f; 1: lea (%rdx), %rcx", 7),
        ("lea 64(%rip), %rcx; jmp 1f; nop; 1: nop", 7),
        ("push %rbx; pop %rbx", 0),
        ("movdqu (%rdi), %xmm7", None),
        ("sub $8, %rsp; test %rdx, %rdx; je 1f; 1: add $8, %rsp", None),
        ("add $64, %rsi; jne 1f; 1: nop", None),
        ("call 1f; 1: pop %rax", None),
        ("push %rbx; call 1f; 1: pop %rax; pop %rbx", None),
        ("aesenc %xmm1, %xmm3; test %rdx, %rdx; je 1f; 1: nop", None),
        ("rdtsc; test %rdx, %rdx; je 1f; 1: nop", None),
    ],
)
@pytest.mark.parametrize("options", [("-O1", "-static"), ("-O1", "-static", "-s"), ("-O1", "-s")])
def test_a_function_without_a_name(process: Process, tmp_path: Path, before: str, at: int | None, options: tuple[str, ...]) -> None:
    path = compiled(tmp_path, BLOCK.format(before, ROUNDS), *options, name="program")
    found = only(process.map(path, exe=True).find())
    assert (found.kind, found.value) == ("sha-ni", ())
    assert shape(found.time) == (BLOCK_TIME if at is not None else [])
    assert found.time or "no times" in found.detail
    if at is not None:
        image = path.read_bytes()
        # After what is before the branch comes the branch, and then the first of the rounds.
        assert {each.offset for each in found.time} == {found.time[0].offset}
        assert 0 < image.index(b"\x0f\x38\xcb") - found.time[0].offset < 16
        assert re.match(r"push|j", disassembled(path, found.time[0]))


def test_no_unwind_tables_no_site(process: Process, tmp_path: Path) -> None:
    source = BLOCK.format("test %rdx, %rdx; je 1f; 1: nop", ROUNDS)
    found = only(process.map(compiled(tmp_path, source, "-O1", "-fno-asynchronous-unwind-tables", name="program")).find())
    assert (found.time, found.value) == ((), ())


@pytest.mark.parametrize("rounds", [15, 49])
def test_too_few_or_too_many_rounds(process: Process, tmp_path: Path, rounds: int) -> None:
    source = BLOCK.format("test %rdx, %rdx; je 1f; 1: nop", "sha256rnds2 %xmm1, %xmm2;" * rounds)
    assert not any(each.time for each in process.map(compiled(tmp_path, source, "-O1", name="program")).find())


def test_instructions_are_not_looked_for_where_names_are(process: Process, tmp_path: Path) -> None:
    process.map(compiled(tmp_path, BLOCK.format("push %rbx; pop %rbx", ROUNDS), "-O1", name="program"))
    assert only(process.find()).kind == "sha-ni"
    process.map(compiled(tmp_path, LIKE_OPENSSL))
    assert only(process.find()).kind == "openssl"


def test_never_a_return_probe_in_go(process: Process, tmp_path: Path) -> None:
    """Go's stacks move. A Go program that brings another SHA-256 has no sites."""
    path = go_program(tmp_path / "go", "1.27", code=b"\x55" + b"\x0f\x38\xcb\xd1" * 32)
    assert not any(each.time for each in process.map(path).find())


# --- processes and files ---


def test_a_process_that_does_not_exist(tmp_path: Path) -> None:
    assert providers(TGID, proc=str(tmp_path)) == []


def test_what_is_mapped_but_no_program(process: Process, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("nothing to execute")
    (tmp_path / "empty").touch()
    for name in ("fifo", "text", "empty"):
        process.map(tmp_path / name)
    assert process.find() == []


def test_a_file_is_searched_once_and_again_when_it_changed(process: Process, tmp_path: Path) -> None:
    path = compiled(tmp_path, LIKE_OPENSSL)
    process.map(path).map(path)
    finder = Finder(proc=str(process.folder))
    first = finder.find(TGID)
    assert only(first).kind == "openssl"
    with mock.patch.object(os, "pread", side_effect=AssertionError("read again")):
        assert finder.find(TGID) == first
    with open(path, "r+b") as file:
        file.truncate(100)
    assert finder.find(TGID) == []


def test_a_file_that_is_exchanged_meanwhile_is_not_remembered_as_the_old(process: Process, tmp_path: Path) -> None:
    old, new = compiled(tmp_path, LIKE_OPENSSL), compiled(tmp_path, LIKE_OPENSSL, "-O0", "-shared", "-fPIC", name="new.so")
    process.map(old)
    finder = Finder(proc=str(process.folder))
    link = next((process.path / "map_files").iterdir())
    opened = os.open

    def exchange(path: str, flags: int) -> int:
        link.unlink()
        link.symlink_to(new)
        return opened(path, flags)

    with mock.patch.object(os, "open", exchange):
        assert finder.find(TGID) == []
    link.unlink()
    link.symlink_to(old)
    assert finder.find(TGID) == process.find()
    assert only(process.find()).kind == "openssl"


def test_a_map_without_end(process: Process) -> None:
    (process.path / "maps").write_bytes(b"7f0000000000-7f0000001000 r-xp 00000000 fe:00 1 /x\n" * 200_000)
    assert process.find() == []


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("seeds")
    made = [
        compiled(folder, LIKE_OPENSSL + VERSION.format("0x30000000L")),
        compiled(folder, BLOCK.format("push %rbx; pop %rbx", ROUNDS), "-O1", "-s", name="block"),
        go_program(folder / "go27", "1.27"),
        go_program(folder / "go23", "1.23", text_start=False, shift=0x40),
    ]
    return [path.read_bytes() for path in made]


def disturbed(seed: bytes, source: random.Random) -> bytes:
    image = bytearray(seed)
    for _ in range(source.randrange(1, 40)):
        # Half of the changes where the tables are that lead to all the rest.
        anywhere = source.random() < 0.5
        at = source.randrange(len(image)) if anywhere else source.choice((0, len(image) - 0x400, TABLE)) + source.randrange(0x400)
        at %= len(image)
        place = struct.pack("<Q", source.randrange(len(image)))
        new = source.choice((bytes(8), b"\xff" * 8, source.randbytes(1), source.randbytes(4), place))
        image[at : at + len(new)] = new
    return bytes(image[: source.randrange(len(image))]) if source.random() < 0.1 else bytes(image[: len(seed)])


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 3), source=st.randoms(use_true_random=False))
def test_a_disturbed_file(tmp_path_factory: pytest.TempPathFactory, seeds: list[bytes], which: int, source: random.Random) -> None:
    folder = tmp_path_factory.mktemp("disturbed")
    path = folder / "file"
    path.write_bytes(disturbed(seeds[which], source))
    process = Process(folder / "proc").map(path)
    for found in process.find():
        with elf.Bytes(str(path), 1 << 30) as file:
            segments = elf.code(file)
        for site in found.value + found.time:
            assert any(each.offset <= site.offset < each.offset + each.size for each in segments)
            assert site.offset < 1 << 64
            if found.kind == "go":
                assert not site.returns


@given(content=st.binary(max_size=2048), maps=st.binary(max_size=256))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, maps: bytes) -> None:
    folder = tmp_path_factory.mktemp("random")
    (folder / "file").write_bytes(content)
    process = Process(folder / "proc").map(folder / "file", exe=True)
    with open(process.path / "maps", "ab") as file:
        file.write(maps)
    assert process.find() == []


def test_the_interpreter_that_runs_this_is_found_by_its_executable_first() -> None:
    found = providers(os.getpid())
    assert [each.path for each in found if each.path.endswith("/exe")] in ([], [f"/proc/{os.getpid()}/exe"])
    assert all(os.path.exists(each.path) for each in found)
    assert all((os.stat(each.path).st_dev, os.stat(each.path).st_ino) == each.inode for each in found)

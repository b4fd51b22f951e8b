"""A static model of the ARM inner loops: cycles and share of the core's peak, without the hardware.

    python -m bench.mca [--compiler aarch64-linux-gnu-gcc] [--mca llvm-mca] [--all]

Compiles the kernel files as CMakeLists.txt does, cuts the innermost loop of each register tile out of the assembly, and
asks llvm-mca for its cycles on each core. The peak is that of the same model for the same multiply-adds alone, all of
them independent. A turn of the loop is 4 steps of k in float32, 16 in int8. `spills` counts its accesses to
the stack and copies between registers: 0 when the tile fits. Also the tiles of more or fewer rows than the one in use
(--all: and the narrow, wide ones for few rows), which is how the shapes were chosen. What such a model cannot say:
bench/README.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from fastbert.benchmark import markdown
from tests.toolchain import CSRC, isa_rows

CORES = [
    *("cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "cortex-a78"),
    *("neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2", "apple-m1"),
]
TURNS = 200


class Loop(NamedTuple):
    """One kernel set's inner loops of one operation."""

    isa: str
    op: str
    macro: str  # FB_<macro>_MR and FB_<macro>_TILES in the kernel file
    prefix: str  # of the tile functions
    products: tuple[str, ...]  # multiply-adds, with registers {acc} and {t} to fill in
    rows: tuple[int, ...]  # candidates


LOOPS = [
    Loop("neon", "gemm_f32", "GEMM", "tile", ("fmla v{acc}.4s, v30.4s, v31.s[0]",), (4, 5, 6)),
    Loop(
        *("neon", "gemm_s8", "S8", "s8_tile"),
        ("smull v{t}.8h, v30.8b, v31.8b", "smlal2 v{t}.8h, v30.16b, v31.16b", "sadalp v{acc}.4s, v{t}.8h"),
        (3, 4, 5),
    ),
    Loop("dotprod", "gemm_s8", "S8", "s8_tile", ("sdot v{acc}.4s, v30.16b, v31.4b[0]",), (4, 5, 6)),
    Loop("i8mm", "gemm_s8", "S8", "s8_tile", ("usmmla v{acc}.4s, v30.16b, v31.16b",), (2, 4, 6)),
]


def assembly(loop: Loop, rows: int, compiler: str, flags: list[str]) -> str:
    """Of the kernel file with the tile `rows` x 1 strip added where it has none."""
    source = (CSRC / "kernels" / f"{loop.isa}.c").read_text()
    most = int(re.search(rf"#define FB_{loop.macro}_MR (\d+)", source)[1])
    if rows > most:
        source = source.replace(f"FB_{loop.macro}_MR {most}", f"FB_{loop.macro}_MR {rows}")
        tiles = "".join(f" X({mr}, 1)" for mr in range(most + 1, rows + 1))
        source = re.sub(rf"(#define FB_{loop.macro}_TILES\(X\).*)", rf"\1{tiles}", source)
    gnu = "clang" not in compiler
    options = ["-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", *["-fno-schedule-insns"] * gnu]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{loop.isa}.c"
        path.write_text(source)
        command = [*compiler.split(), *options, *flags, "-iquote", CSRC / "kernels", "-S", path, "-o", "-"]
        compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        raise SystemExit(f"{loop.isa}.c: the compiler says: {compiled.stderr}")
    return compiled.stdout


def inner_loop(text: str, function: str, mnemonics: set[str]) -> list[str]:
    """The instructions of the loop of `function` in which these are densest."""
    lines = re.search(rf"^{function}:.*?\n(.*?)^\s*\.size\s+{function},", text, re.DOTALL | re.MULTILINE)[
        1
    ].splitlines()
    # GCC prints a byte of movi with its sign, which LLVM does not read
    lines = [re.sub(r"0xf{14}(?=..$)", "0x", line.split("//")[0].rstrip()) for line in lines]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L\w+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.match(r"\s+(?:b\.?\w+|cbn?z|tbn?z)\s+(?:.*, *)?(\.L\w+)$", line)
        if branch and labels.get(branch[1], i) < i:
            body = lines[labels[branch[1]] + 1 : i + 1]
            loops.append([instruction for instruction in body if re.match(r"\s+[a-z]", instruction)])
    return max(loops, key=lambda body: sum(x.split()[0] in mnemonics for x in body) / len(body))


def cycles(instructions: list[str], core: str, mca: str) -> float:
    """For one turn, in the long run."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+dotprod,+i8mm", f"-iterations={TURNS}"]
    answer = subprocess.run(command, input="\n".join(instructions) + "\n", capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{mca}: {answer.stderr}")
    return int(re.search(r"Total Cycles: +(\d+)", answer.stdout)[1]) / TURNS


def peak(loop: Loop, core: str, mca: str) -> float:
    """Multiply-adds a cycle when there is nothing else: 20 chains, with ten temporaries where a chain needs one."""
    tens = (range(10), range(10, 20))
    turn = [product.format(acc=i, t=20 + i % 10) for ten in tens for product in loop.products for i in ten]
    return len(turn) / cycles(turn, core, mca)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mca", description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="aarch64-linux-gnu-gcc", help="default aarch64-linux-gnu-gcc")
    parser.add_argument("--mca", default="llvm-mca", help="llvm-mca of LLVM 19 or newer: older ones know few cores")
    parser.add_argument("--all", action="store_true", help="also the tiles of several strips")
    arguments = parser.parse_args()
    for tool in (arguments.compiler.split()[0], arguments.mca):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool}: not found")
    flags = {row.name: row.flags for row in isa_rows()}
    table = []
    for loop in LOOPS:
        peaks = {core: peak(loop, core, arguments.mca) for core in CORES}
        table.append([f"**{loop.isa} {loop.op}**", "", "", *(f"{peaks[core]:.2f}" for core in CORES)])
        mnemonics = {product.split()[0] for product in loop.products}
        for rows in loop.rows:
            text = assembly(loop, rows, arguments.compiler, flags[loop.isa])
            widths = sorted(re.findall(rf"^{loop.prefix}_{rows}x(\d):", text, re.MULTILINE))
            for width in widths if arguments.all else widths[:1]:
                body = inner_loop(text, f"{loop.prefix}_{rows}x{width}", mnemonics)
                products = sum(line.split()[0] in mnemonics for line in body)
                spills = sum("[sp" in line or re.match(r"\s+mov\s+v", line) is not None for line in body)
                cells = []
                for core in CORES:
                    turn = cycles(body, core, arguments.mca)
                    cells.append(f"{turn:.1f} ({products / turn / peaks[core]:.0%})")
                table.append([f"{rows}x{16 * int(width)}", f"{products} of {len(body)}", str(spills), *cells])
    print(markdown(["tile", "multiply-adds of instructions", "spills", *CORES], table))


if __name__ == "__main__":
    main()

"""Instructions that a forward pass executes on ARM, counted under qemu, without the hardware.

    python -m bench.instructions [--compiler-target aarch64-linux-gnu] [--emulator qemu-aarch64-static]

Cross-builds the C library, and tests/smoke.c with the shapes of BERT-Tiny and BERT-Mini: four texts of 1, 7, 16 and 72
tokens, one thread. qemu writes down each block of instructions that it translates, and each execution. The figures
are those of two passes less those of one, so that loading drops out, and are exact: they depend on compiler and code
alone. What they say about time: bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from bench.workload import SHAPES
from fastbert.benchmark import markdown
from tests.toolchain import ROOT

MODELS = ("tiny", "mini")
# Kernel set -> the CPU model of qemu that ends where the set does, so that no better one's instruction can be executed
CPUS = {"neon": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}
# Multiplying instructions of vectors, by mask and value of their encoding
PRODUCTS = {
    "fmla by element": (0xBF80F400, 0x0F801000),
    "fmla": (0xBFA0FC00, 0x0E20CC00),
    "smull": (0xBFE0FC00, 0x0E20C000),
    "smlal": (0xBFE0FC00, 0x0E208000),
    "sdot by element": (0xBFC0F400, 0x0F80E000),
    "usmmla": (0xFFE0FC00, 0x4E80AC00),
}


def product(opcode: int) -> str | None:
    return next((name for name, (mask, value) in PRODUCTS.items() if opcode & mask == value), None)


def count(command: list[str]) -> Counter[str]:
    """Executed instructions, in all and by PRODUCTS, of a command of qemu with "-d in_asm,exec,nochain"."""
    blocks: dict[int, Counter[str]] = {}  # by address, as last translated
    executed: Counter[int] = Counter()
    start: int | None = None
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            if line.startswith("Trace"):  # Trace 0: HOST [BASE/ADDRESS/FLAGS/FLAGS]
                executed[int(line.split("/")[1], 16)] += 1
            elif line.startswith("IN:"):
                start = None
            elif line.startswith("0x"):  # ADDRESS:  OPCODE  TEXT
                address, opcode = line.split()[:2]
                if start is None:
                    start = int(address[:-1], 16)
                    blocks[start] = Counter()
                blocks[start]["all"] += 1
                if name := product(int(opcode, 16)):
                    blocks[start][name] += 1
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    total: Counter[str] = Counter()
    for address, times in executed.items():
        for name, instructions in blocks[address].items():
            total[name] += times * instructions
    return total


def build(target: str, folder: Path) -> dict[str, Path]:
    """model -> tests/smoke.c of its shape, for the target."""
    env = os.environ | {"FASTBERT_TARGET": target}
    toolchain = ROOT / ".ci" / "cross.cmake"
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "--toolchain", toolchain],
        ["cmake", "--build", folder],
    ):
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    programs = {}
    for name in MODELS:
        layers, hidden, heads = SHAPES[name]
        shape = f"LAYERS = {layers}, HIDDEN = {hidden}, HEADS = {heads}, INTERMEDIATE = {4 * hidden}"
        programs[name] = folder / f"smoke_{name}"
        command = [f"{target}-gcc", "-std=gnu11", "-O2", f"-DSHAPE={shape}", f"-I{ROOT / 'csrc'}"]
        command += [ROOT / "tests" / "smoke.c", folder / "libfastbert.a", "-lm", "-lpthread", "-o", programs[name]]
        subprocess.run(command, check=True)
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler-target", default="aarch64-linux-gnu", help="TARGET of TARGET-gcc and /usr/TARGET")
    parser.add_argument("--emulator", default="qemu-aarch64-static")
    args = parser.parse_args()
    for tool in ("cmake", f"{args.compiler_target}-gcc", args.emulator):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool}: not found")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, program in build(args.compiler_target, Path(folder)).items():
            for isa, cpu in CPUS.items():
                for precision in ("fp32", "int8"):
                    emulator = [args.emulator, "-cpu", cpu, "-L", f"/usr/{args.compiler_target}"]
                    command = [*emulator, "-d", "in_asm,exec,nochain", program, isa, precision]
                    once, twice = (count([*map(str, command), passes]) for passes in "12")
                    found = {name: twice[name] - once[name] for name in twice}
                    every = found.pop("all")
                    by_name = ", ".join(
                        f"{name} {n / every:.0%}"
                        for name, n in sorted(found.items(), key=lambda item: -item[1])
                        if n >= every / 200
                    )
                    rows.append(
                        [model, isa, precision, f"{every / 1e6:.2f}", f"{sum(found.values()) / 1e6:.2f}", by_name]
                    )
    print(markdown(["model", "kernel set", "precision", "million instructions", "multiplying", "shares"], rows))


if __name__ == "__main__":
    main()

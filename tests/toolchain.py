"""The rows of csrc/isa.def and the C compiler at hand: for tests of the sources and for the bench."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


class IsaRow(NamedTuple):
    family: str
    name: str
    flags: list[str]


def isa_rows() -> list[IsaRow]:
    """The rows of isa.def, best first."""
    rows = re.findall(r'^FB_ISA\( *(\w+), *(\w+), *"(.*)" *\)$', (CSRC / "isa.def").read_text(), re.MULTILINE)
    return [IsaRow(family, name, flags.split()) for family, name, flags in rows]


def compiler() -> str | None:
    """Path of the C compiler: $CC, else cc; None where there is none."""
    return shutil.which(os.environ.get("CC", "cc"))


def compile_c(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the C compiler. A sanitizer that this process preloads is not for the compiler."""
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run([compiler() or "cc", *arguments], env=env, capture_output=True, text=True)

"""What every benchmark needs beside fastbert.benchmark: the machine, the checkout, a core of its own."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastbert import _core
from fastbert.benchmark import core_count, cpu_model

ROOT = Path(__file__).parent.parent


def cpu_flags() -> set[str]:
    """Features of the CPU under the kernel's names; empty where there is no /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}


def commit() -> str:
    """The commit of the checkout, with "+changes" if files differ from it; "unknown" without git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(*packages: str) -> dict[str, Any]:
    """What a figure depends on: machine, kernel set, commit, and the versions of other packages."""
    return {
        "cpu": cpu_model(),
        "cores": core_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "isa": _core.select_isa(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("fastbert-cpu", "numpy", *packages)},
    }


def pin(cores: int) -> list[int]:
    """Keep this process, and threads it starts from now on, on the last ``cores`` of its cores; returns them."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    os.sched_setaffinity(0, chosen)
    return chosen

"""The plan of the house (csrc/README.md): who may include or import whom, and what no file may contain."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toolchain import CSRC, ROOT, IsaRow, compile_c, compiler, isa_rows

PACKAGE = ROOT / "python" / "fastbert"

# file stem -> stems it may include besides its own header
C_ARROWS = {
    "fastbert": "",
    "cpu": "",
    "error": "fastbert",
    "kernels": "fastbert",
    "threads": "fastbert",
    "pooling": "fastbert",
    "dispatch": "isa cpu kernels error",
    "weights": "kernels error",
    "head": "weights threads dispatch error fastbert",
    "crc32c": "",
    "bert": "weights pooling threads dispatch error fastbert",
}
KERNEL_ARROWS = {
    # and one simd_*.h
    ".c": "cpu kernels activations.inc epilogue.inc gemm_f32.inc gemm_s8.inc gemm_split.inc rows.inc s8_pairs.inc",
    ".h": "unroll",
}

# module of the package -> modules of the package it may import
PYTHON_ARROWS = {
    "__init__": "_core encoder classification token_classification question_answering masked_lm",
    "__main__": "cli",
    "cli": "_core benchmark encoder classification glue",
    "benchmark": "encoder",
    "glue": "classification",
    "classification": "_core heads encoder pretrained sentence tokenizer",
    "token_classification": "_core heads pretrained tokenizer",
    "question_answering": "_core heads pretrained tokenizer",
    "masked_lm": "_core heads pretrained tokenizer",
    "heads": "_core pretrained checkpoint tokenizer files",
    "encoder": "_core pretrained sentence tokenizer",
    "pretrained": "_core checkpoint tensors tokenizer hub",
    "sentence": "checkpoint tensors files",
    "checkpoint": "families safetensors pytorch_bin tensorflow_ckpt tensors files",
    "families": "",
    "safetensors": "tensors files",
    "pytorch_bin": "archive tensors files",
    "tensorflow_ckpt": "_core tensors files",
    "tensors": "",
    "tokenizer": "files",
    "hub": "archive",
    "archive": "files",
    "files": "",
}
DEPENDENCIES = {"numpy", "tokenizers", "huggingface_hub", "tqdm"}

PYX_ARROWS = {"_core": "Python fastbert dispatch crc32c", "_kernels": "fastbert kernels dispatch threads"}


def c_files(folder: Path = CSRC) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".c", ".h", ".def"))


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)


def stem(name: str) -> str:
    return re.sub(r"\.(c|h|def)$", "", Path(name).name)


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- arrows ----


@pytest.mark.parametrize("path", c_files(), ids=by_name)
def test_includes(path: Path) -> None:
    included = {stem(name) for name in re.findall(r'^ *# *include *"(.+)"', path.read_text(), re.MULTILINE)}
    if path.parent.name == "kernels":
        allowed = set(KERNEL_ARROWS[path.suffix].split())
        if path.suffix == ".c":
            vectors = {name for name in included if name.startswith("simd_")}
            assert len(vectors) == 1, f"{by_name(path)}: expected one simd_*.h, found {len(vectors)}"
            allowed |= vectors
    elif path.suffix == ".def":
        allowed = set()
    else:
        assert stem(path.name) in C_ARROWS, f"{by_name(path)}: expected a row in C_ARROWS of this test"
        allowed = {stem(path.name), *C_ARROWS[stem(path.name)].split()}
    assert included <= allowed, f"{by_name(path)} may not include {included - allowed}"


def imports(path: Path) -> set[str]:
    """Full names of imported modules; `from fastbert import x` counts as fastbert.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{by_name(path)}:{node.lineno}: expected an absolute import"
            whole = node.module in ("fastbert", "tests", "bench")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=by_name)
def test_imports_of_the_package(path: Path) -> None:
    assert path.stem in PYTHON_ARROWS, f"{by_name(path)}: expected a row in PYTHON_ARROWS of this test"
    names = imports(path)
    inside = {name.split(".")[1] for name in names if name.split(".")[0] == "fastbert"}
    assert inside <= set(PYTHON_ARROWS[path.stem].split()), f"{by_name(path)} may not import {inside}"
    outside = {name.split(".")[0] for name in names} - {"fastbert"}
    foreign = outside - DEPENDENCIES - sys.stdlib_module_names
    assert not foreign, f"{by_name(path)} may not import {foreign}: runtime dependencies are {DEPENDENCIES}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/*.py")), ids=by_name)
def test_tests_do_not_need_the_bench(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] == "bench"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.pyx")), ids=by_name)
def test_headers_of_the_bindings(path: Path) -> None:
    headers = {stem(name) for name in re.findall(r'^cdef extern from "(.+)"', path.read_text(), re.MULTILINE)}
    assert headers <= set(PYX_ARROWS[path.stem].split())


# ---- contents ----

FORBIDDEN_FLAGS = r"-march=native|-mtune=native|-mcpu=native|-Ofast|-ffast-math|-funsafe-math-optimizations"
ISA_FLAGS = r"-m(arch|cpu|avx|fma|f16c|sse|amx|bmi)\w*"
ISA_CODE = r"_mm(256|512)_|__m(256|512)|arm_neon|__attribute__\(\(target|pragma GCC target"


@pytest.mark.parametrize("name", ["CMakeLists.txt", "pyproject.toml", "csrc/isa.def", ".ci/run"])
def test_no_forbidden_flags(name: str) -> None:
    assert not re.findall(FORBIDDEN_FLAGS, (ROOT / name).read_text())


def test_instruction_sets_stay_in_kernels() -> None:
    assert not re.findall(ISA_FLAGS, (ROOT / "CMakeLists.txt").read_text()), "flags belong to the rows of isa.def"
    for path in c_files():
        if path.parent.name != "kernels":
            assert not re.findall(ISA_CODE, without_comments(path)), by_name(path)


@pytest.mark.parametrize("path", c_files(), ids=by_name)
def test_c_source(path: Path) -> None:
    """ASCII; prints nothing and ends no process; threads start in threads.c alone."""
    assert path.read_bytes().isascii()
    code = without_comments(path)
    assert not re.findall(r"\b(?:printf|fprintf|vprintf|puts|fputs|putchar|perror|abort|_?exit|assert) *\(", code)
    if path.name != "threads.c":
        assert not re.findall(r"pthread_create|CreateThread|thrd_create|omp parallel", code)


def test_every_kernel_set_has_a_row_and_a_file() -> None:
    assert sorted(path.stem for path in CSRC.glob("kernels/*.c")) == sorted(row.name for row in isa_rows())


def symbols(source: Path, tmp_path: Path, *flags: str) -> list[tuple[str, str]]:
    """(type, name) of what the object file of source defines, types as in nm; skips without a compiler or its flags."""
    if compiler() is None or shutil.which("nm") is None:
        pytest.skip("this machine has no C compiler or no nm")
    compiled = compile_c("-std=gnu11", "-O1", "-fno-pic", "-c", source, "-o", tmp_path / "x.o", *flags)
    if compiled.returncode and flags:
        pytest.skip(f"this compiler has no {' '.join(flags)}")
    assert compiled.returncode == 0, compiled.stderr
    listed = subprocess.run(["nm", "--defined-only", tmp_path / "x.o"], capture_output=True, text=True, check=True)
    return [(line.split()[1], line.split()[2]) for line in listed.stdout.splitlines()]


@pytest.mark.parametrize("row", isa_rows(), ids=lambda row: row.name)
def test_a_kernel_file_shows_only_its_table(row: IsaRow, tmp_path: Path) -> None:
    found = symbols(CSRC / "kernels" / f"{row.name}.c", tmp_path, *row.flags)
    assert [(kind, name) for kind, name in found if kind.isupper()] == [("R", f"fb_kernels_{row.name}")]
    assert not [name for kind, name in found if kind in "bd"], "a kernel set keeps no state"


@pytest.mark.parametrize("path", sorted(CSRC.glob("*.c")), ids=by_name)
def test_state_lives_in_the_thread_pool_alone(path: Path, tmp_path: Path) -> None:
    haves = [f"-DFB_HAVE_{row.name}=1" for row in isa_rows()]
    state = [name for kind, name in symbols(path, tmp_path, *haves) if kind in "bBdDC"]
    assert (state != []) == (path.name == "threads.c"), f"{by_name(path)}: {state}"

"""Which kernel set runs: the table of the build, the CPU, FASTBERT_ISA."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastbert
from fastbert._kernels import KernelSet, kernel_sets
from tests.toolchain import IsaRow, compile_c, compiler, isa_rows

SUPPORTED = [name for name, supported in kernel_sets() if supported]
UNSUPPORTED = [name for name, supported in kernel_sets() if not supported]


def test_the_build_has_rows_of_isa_def_in_their_order() -> None:
    built = [name for name, _ in kernel_sets()]
    assert built == [row.name for row in isa_rows() if row.name in built]
    assert built[-1] == "scalar"
    assert "scalar" in SUPPORTED


@pytest.mark.parametrize("row", isa_rows(), ids=lambda row: row.name)
def test_a_row_is_left_out_for_a_reason(row: IsaRow, tmp_path: Path) -> None:
    built = {name for name, _ in kernel_sets()}
    if row.name in built:
        return
    assert row.family != "PORTABLE"
    if not built & {other.name for other in isa_rows() if other.family == row.family}:
        pytest.skip(f"{row.name}: no {row.family} set is in this build")
    if compiler() is None:
        pytest.skip("this machine has no C compiler")
    source = tmp_path / "empty.c"
    source.write_text("int empty;\n")
    compiled = compile_c("-c", source, "-o", tmp_path / "empty.o", *row.flags)
    assert compiled.returncode != 0, f"{row.name}: the compiler has {row.flags}, the build has not"


@pytest.mark.parametrize("name", SUPPORTED)
def test_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_ISA", name)
    assert KernelSet().isa == name
    assert [row.name for row in fastbert.kernels() if row.chosen] == [name]


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_argument_overrides_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_ISA", "nonsense")
    assert KernelSet(name).isa == name


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_cap_the_best_set_runs(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("FASTBERT_ISA", raising=False)
    else:
        monkeypatch.setenv("FASTBERT_ISA", value)
    assert KernelSet().isa == SUPPORTED[0]
    assert [(row.name, row.supported) for row in fastbert.kernels()] == kernel_sets()


@pytest.mark.parametrize("name", ["sse2", "AVX2", " scalar", "scalar ", "scalar,avx2", "x" * 1000, *UNSUPPORTED])
def test_an_unknown_or_unsupported_name_is_an_error_that_lists_the_valid_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBERT_ISA", name)
    for select in (KernelSet, lambda: KernelSet(name), fastbert.kernels):
        with pytest.raises(ValueError, match=f"expected one of {', '.join(SUPPORTED)} on this machine") as error:
            select()
        assert f'"{name[:40]}"' in str(error.value)

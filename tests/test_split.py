"""gemm_split: float32 layers on AMX-BF16, on a CPU that has it and over amx_emulated.c; `strict=False`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert import Encoder, _core
from fastbert._kernels import ACTS, SPLIT_PANEL, KernelSet, kernel_sets
from tests import models, reference
from tests.cases import GemmF32, GemmSplit, Linear, Operands, aligned, expect, seeded
from tests.test_amx import EmulatedAmx, amx  # noqa: F401 (a fixture)
from tests.test_bert import SHAPES, forward
from tests.test_kernels import (
    EXTREMES,
    LAYOUTS,
    Memory,
    around,
    bits,
    case_id,
    fused,
    packed_alike,
    run,
    spoiled,
    unwritten,
)

HAS_AMX = dict(kernel_sets()).get("amx", False) and KernelSet("amx").gemm_split_name is not None
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this CPU, or this build, has no gemm_split")


@pytest.fixture(params=["emulated", pytest.param("amx", marks=needs_amx)])
def split(request: pytest.FixtureRequest) -> KernelSet:
    return KernelSet("amx") if request.param == "amx" else request.getfixturevalue("amx")


def cases() -> list[Linear]:
    shapes = [
        *((m, n, k) for m in range(1, 71, 3) for n, k in [(33, 70), (70, 31)]),
        *((m, n, 33) for n in range(1, 71, 5) for m in (7, 37)),
        *((m, 35, k) for k in around(16, 32, 48, SPLIT_PANEL, 2 * SPLIT_PANEL + 64) for m in (3, 19)),
        *product(around(16, 32, 64), around(16, 32, 64), (64,)),
        *((m, 33, 65) for m in (*around(96), *around(256), 513)),
        (13, 128, 512), (40, 48, 1536), (5, 32, 3072), (512, 257, 256), (3, 20, 0), (0, 5, 5), (5, 0, 5), (0, 0, 0),
    ]  # fmt: skip
    return fused(shapes, GemmSplit)


every_case = pytest.mark.parametrize("case", cases(), ids=case_id)
every_fused_case = pytest.mark.parametrize(
    "case",
    [GemmSplit(m, 70, k, act, True, True) for act in ACTS for m, k in ((13, 131), (45, SPLIT_PANEL + 9))],
    ids=case_id,
)


@every_case
def test_right(split: KernelSet, case: GemmSplit, seed: int) -> None:
    """Within the bound, to the bits of the contract, and nothing else is touched."""
    operands = case.operands(seeded(case, seed))
    expected = expect(case, operands)
    for name, layout in LAYOUTS.items():
        memory = Memory(layout)
        placed = {key: memory(key, x) for key, x in operands.items()}
        out = memory("out", unwritten(case))
        case.bind(split, placed, out, lambda key, x, memory=memory: (memory if key != "scratch" else aligned)(key, x))(
            1
        )
        expected.check(out)
        assert memory.written(operands) == [], f"{case}, {name}: written"


@pytest.mark.parametrize("case", [case for case in cases() if 0 not in case.out_shape()], ids=case_id)
def test_wrong_results_are_refused(case: GemmSplit, seed: int) -> None:
    operands = case.operands(seeded(case, seed))
    expected = expect(case, operands)
    wrong = dict(case.wrong(operands))
    if case.k and case.act == "none":  # a split of two parts, 16 bits
        wrong["third parts left out"] = case.truth(
            operands | {key: sum(case.parts(operands[key])[:2]) for key in ("a", "w")}
        )
    for mistake, result in wrong.items():
        with pytest.raises(AssertionError, match="elements are off"):
            expected.check(result)
            pytest.fail(f"accepted: {mistake}")


@every_fused_case
def test_any_rows_and_columns(split: KernelSet, case: GemmSplit, seed: int) -> None:
    """Threads split rows anywhere and columns at strips."""
    operands = case.operands(seeded(case, seed))
    whole = run(split, case, operands)
    packed = aligned("packed", np.zeros(case.packed_bytes(split, case.n), np.uint8))
    case.pack(split, operands, packed)
    for row, column in product(
        (slice(0, 1), slice(5, 13), slice(1, None)), (slice(0, 16), slice(16, 48), slice(48, None))
    ):
        part = {
            "a": operands["a"][row],
            "w": operands["w"][column],
            "bias": operands["bias"][column],
            "residual": operands["residual"][row, column],
        }
        out = np.empty(whole[row, column].shape, np.float32)
        smaller = replace(case, m=out.shape[0], n=out.shape[1])
        smaller.multiply(
            split, part, packed[case.packed_bytes(split, column.start) :][: case.packed_bytes(split, smaller.n)], out
        )
        assert bits(out) == bits(whole[row, column]), (row, column)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 37, 64])
@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 31, 32, 33, 70])
def test_pack_strides(split: KernelSet, n: int, k: int, seed: int) -> None:
    assert packed_alike(split.pack_split, split.packed_bytes_split(n, k), n, k, seed)


# ---- the ends of the number line ----


def plain(case: GemmSplit) -> GemmF32:
    return GemmF32(case.m, case.n, case.k, case.act, case.bias, case.residual)


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", ["a", "w"])
def test_extreme_values(split: KernelSet, extreme: str, name: str, seed: int) -> None:
    """Finite values stay finite and within the bound; others make NaN of just what a chain makes infinite or NaN."""
    case = GemmSplit(19, 37, 300)
    rng = seeded(case, seed)
    operands = case.operands(rng)
    x = operands[name].copy()
    x[::3] = spoiled(x[::3], EXTREMES[extreme], rng)
    operands[name] = (
        np.where(np.abs(x) >= np.float32(2.0**128 - 2.0**119), np.copysign(np.float32(3e38), x), x)
        if (extreme == "huge")
        else x
    )
    other = "w" if name == "a" else "a"
    operands[other] = operands[other] * np.float32(2.0**-20)  # no sum of huge values overflows
    result = run(split, case, operands)
    chain = run(KernelSet("scalar"), plain(case), operands)
    assert np.array_equal(np.isfinite(result), np.isfinite(chain))
    assert np.isnan(result[~np.isfinite(chain)]).all()
    if np.isfinite(chain).all():
        expect(case, operands).check(result)


@pytest.mark.parametrize("name", ["a", "w"])
def test_what_rounds_to_infinity_counts_as_infinite(split: KernelSet, name: str) -> None:
    case = GemmSplit(2, 2, 40)
    for value, finite in (
        (2.0**128 - 2.0**119, False),
        (np.nextafter(np.float32(2.0**128 - 2.0**119), np.float32(0)), True),
    ):
        operands: Operands = {"a": np.full((2, 40), 2.0**-30, np.float32), "w": np.full((2, 40), 2.0**-30, np.float32)}
        operands[name][0, 7] = value
        result = run(split, case, operands)
        hit = result[0] if name == "a" else result[:, 0]
        untouched = result[1, 1]
        assert np.isfinite(hit).all() if finite else np.isnan(hit).all()
        assert untouched == np.float32(40 * 2.0**-60)


@pytest.mark.parametrize("exponent", [-149, -127, -126, -118, -110, -103, -100, -64, 0, 60])
def test_small_values(split: KernelSet, exponent: int, seed: int) -> None:
    """Where second and third parts, or products, are denormal and vanish."""
    for case in (GemmSplit(5, 17, 70), GemmSplit(17, 33, 300)):
        operands = case.operands(seeded(case, seed))
        operands["a"] = (operands["a"] * 2.0**exponent).astype(np.float32)
        expect(case, operands).check(run(split, case, operands))


# ---- as exact as the chains of gemm_f32 ----


def wide(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * 2.0 ** rng.uniform(-12, 12, shape)).astype(np.float32)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def positive(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.uniform(0, 1, shape).astype(np.float32)


def outliers(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """A few columns a hundred times as large, as BERT's activations have."""
    return normal(rng, *shape) * np.where(rng.random(shape[-1]) < 0.01, np.float32(100), np.float32(1))


def cancelling(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Row sums near 0: against equal factors nearly all cancels."""
    x = normal(rng, *shape)
    x[:, 1::2] = -x[:, ::2][:, : x[:, 1::2].shape[1]] * np.float32(1 + 2.0**-10)
    return x


@pytest.mark.parametrize("k", [128, 256, 384, 768, 1536, 3072])
@pytest.mark.parametrize(
    "of_a, of_w",
    [
        (normal, normal),
        (wide, wide),
        (outliers, normal),
        (positive, positive),
        (cancelling, positive),
        (positive, normal),
    ],
    ids=lambda kind: kind.__name__,
)
def test_error_is_not_above_that_of_chains(split: KernelSet, of_a: Any, of_w: Any, k: int, seed: int) -> None:
    if isinstance(split, EmulatedAmx) and HAS_AMX:
        pytest.skip("the CPU itself has run this")
    m, n = 128, 128
    rng = np.random.default_rng([seed, k])
    operands = {"a": of_a(rng, m, k), "w": of_w(rng, n, k)}
    case = GemmSplit(m, n, k)
    truth = case.truth(operands)
    errors = [np.abs(x - truth) for x in (run(split, case, operands), run(KernelSet("scalar"), plain(case), operands))]
    assert errors[0].max() <= errors[1].max()
    assert np.sqrt((errors[0] ** 2).mean()) <= np.sqrt((errors[1] ** 2).mean())


# ---- whole models ----


def core_of(model: models.Model, isa: str | None = None, **options: Any) -> _core.Model:
    return _core.Model(model.config | options, model.tensors(), isa)


@needs_amx
@pytest.mark.parametrize("shape", SHAPES)
def test_strict_has_the_bits_of_avx512(shape: str) -> None:
    model = models.random_model(seed=1, **SHAPES[shape])
    batch = models.random_batch((64, 1, 130, 7, 33), model.config["vocab_size"], model.config["type_vocab_size"])
    strict, chains, split = core_of(model, "amx"), core_of(model, "avx512"), core_of(model, "amx", strict=False)
    assert (strict.gemm, split.gemm) == (chains.gemm, "gemm_split_32x32_amx")
    results = [forward(core, batch) for core in (strict, chains, split)]
    for by_strict, by_chains, by_split in zip(*results, strict=True):
        assert (by_strict is None) == (by_chains is None)
        if by_strict is not None and by_chains is not None and by_split is not None:
            assert bits(by_strict) == bits(by_chains) != bits(by_split)


@needs_amx
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_in_any_batch_for_any_threads(shape: str) -> None:
    model = models.random_model(seed=1, **SHAPES[shape])
    core = core_of(model, "amx", strict=False)
    lengths = (64, 1, 300, 7, 128, 2, 33, 17, 512, 5)
    ids, offsets, types = models.random_batch(lengths, model.config["vocab_size"], model.config["type_vocab_size"])
    whole = core.forward(ids, offsets, types, hidden=True)[0]
    assert whole is not None
    for threads in (1, 2, 3, 8):
        again = core.forward(ids, offsets, types, hidden=True, threads=threads)[0]
        assert again is not None and bits(again) == bits(whole), threads
        for begin, end in pairwise(offsets):
            one = np.array([0, end - begin], np.int64)
            alone = core.forward(ids[begin:end], one, types[begin:end], hidden=True, threads=threads)[0]
            assert alone is not None and bits(alone) == bits(whole[begin:end]), (threads, end - begin)


@needs_amx
def test_int8_does_not_use_it() -> None:
    model = models.random_model(seed=1, **SHAPES["head64"])
    batch = models.random_batch((64, 5), model.config["vocab_size"], model.config["type_vocab_size"])
    results = []
    for isa, strict in (("amx", False), ("amx", True), ("avx512", False)):
        core = core_of(model, isa, precision="int8", strict=strict)
        assert core.gemm.startswith("gemm_s8")
        results.append(bits(core.forward(*batch, hidden=True)[0]))
    assert len({*results}) == 1


@needs_amx
@pytest.mark.parametrize("shape", range(len(models.MINIATURES)))
def test_models_are_not_less_exact_than_with_chains(shape: int) -> None:
    model = models.random_model(**models.MINIATURES[shape] | {"vocab_size": 1000})
    batch = models.random_batch((150, 9, 33), 1000, seed=shape)  # from 128 tokens on attention is split, too
    exact = reference.forward(model.config, model.weights, *batch).last_hidden_state
    rms = []
    for strict in (False, True):
        hidden = core_of(model, "amx", strict=strict).forward(*batch, hidden=True)[0]
        rms.append(np.sqrt(((hidden - exact) ** 2).mean()))
    assert rms[0] <= rms[1]


@needs_amx
def test_strict_of_an_encoder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models.write_model(tmp_path, seed=1, **SHAPES["head64"])
    monkeypatch.delenv("FASTBERT_ISA", raising=False)
    vectors = {strict: Encoder(tmp_path, strict=strict) for strict in (False, True)}
    assert [vectors[strict].info()["strict"] for strict in (False, True)] == [False, True]
    assert vectors[False].info()["gemm"] == "gemm_split_32x32_amx"
    monkeypatch.setenv("FASTBERT_ISA", "avx512")
    chains = Encoder(tmp_path, strict=False)
    assert vectors[True].info()["gemm"] == chains.info()["gemm"] == Encoder(tmp_path).info()["gemm"]
    ids, offsets = np.arange(5, dtype=np.int32), np.array([0, 5], np.int64)
    by_chains = bits(chains.forward_ragged(ids, offsets))
    assert (
        bits(vectors[True].forward_ragged(ids, offsets))
        == by_chains
        != bits(vectors[False].forward_ragged(ids, offsets))
    )

"""Every op on every kernel set: right, in the bits of the contract, and touching nothing but its operands."""

from __future__ import annotations

import ctypes
import mmap
import random
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert._kernels import ACTS, KC, STRIP, KernelSet, kernel_sets
from tests.cases import (
    ACTIVATIONS,
    F32,
    TINY,
    Case,
    Expected,
    GemmF32,
    LayerNormF32,
    Operands,
    SoftmaxF32,
    U,
    aligned,
    expect,
    seeded,
)

SUPPORTED = [KernelSet(name) for name, supported in kernel_sets() if supported]
POISON = 0x7FC0DEAD  # the bits of a NaN: it spoils what reads it and shows what writes over it
WORDS = 16  # float32 in a 64-byte line
PAGE_WORDS = mmap.PAGESIZE // 4


# ---- where operands lie ----


@dataclass(frozen=True)
class Layout:
    """offset: words past a 64-byte line; gap: words between rows; guard: which end touches a page without access."""

    offset: int = 0
    gap: int = 0
    guard: str = ""


LAYOUTS = {
    "dense": Layout(),
    "offset": Layout(offset=1),
    "wide": Layout(gap=19),
    "guard before": Layout(guard="before"),
    "guard after": Layout(guard="after"),
}


def guarded(words: int) -> NDArray[np.uint32]:
    """Whole pages of at least so many words between two pages that fault on every access."""
    pages = max(-(-words // PAGE_WORDS), 1)
    room = np.frombuffer(mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE), np.uint32)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        address = room.ctypes.data + page * mmap.PAGESIZE
        if protect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(0)):
            raise OSError(ctypes.get_errno(), "mprotect")
    return room[PAGE_WORDS:-PAGE_WORDS]


@dataclass
class Memory:
    """A Place that surrounds operands with poison, and tells afterwards whether they or the poison were written."""

    layout: Layout
    placed: dict[str, tuple[NDArray[np.uint32], NDArray[np.uint32]]] = field(default_factory=dict)

    def __call__(self, name: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
        source = np.ascontiguousarray(values).view(np.uint32)
        strides = tuple(s + 4 * self.layout.gap for s in source.strides[:-1]) + source.strides[-1:]
        extent = 1 + sum((n - 1) * s // 4 for n, s in zip(source.shape, strides, strict=True)) if source.size else 0
        if self.layout.guard:
            room = guarded(extent)
            start = 0 if self.layout.guard == "before" else room.size - extent
        else:
            room = np.empty(extent + 5 * WORDS, np.uint32)
            start = -room.ctypes.data // 4 % WORDS + 2 * WORDS + self.layout.offset
        if name == "packed":
            start -= (room.ctypes.data // 4 + start) % WORDS
        room[:] = POISON
        words = np.lib.stride_tricks.as_strided(room[start:], source.shape, strides)
        words[...] = source
        self.placed[name] = room, words
        return words.view(values.dtype)

    def written(self, operands: Operands) -> list[str]:
        """Names of operands that are no longer what they were, and "around NAME" where the poison is not."""
        names = [name for name, x in operands.items() if bits(self.placed[name][1]) != bits(x)]
        for name, (room, words) in self.placed.items():
            kept = words.copy()
            words[...] = POISON
            if (room != POISON).any():
                names.append(f"around {name}")
            words[...] = kept
        return names


def bits(x: NDArray[np.generic]) -> bytes:
    """The bits of float32, all NaNs alike."""
    words = np.ascontiguousarray(x).view(np.uint32)
    return np.where((words & 0x7FFFFFFF) > 0x7F800000, np.uint32(POISON), words).tobytes()


def unwritten(case: Case) -> F32:
    return np.full(case.out_shape(), POISON, np.uint32).view(np.float32)


def run(kernels: KernelSet, case: Case, operands: Operands) -> F32:
    out = aligned("out", unwritten(case))
    case.bind(kernels, operands, out)(1)
    return out


# ---- which cases ----


def around(*sizes: int) -> list[int]:
    return sorted({size + step for size in sizes for step in (-1, 0, 1)})


def gemm_cases() -> list[GemmF32]:
    tiles = [re.search(r"_(\d+)x(\d+)_", kernels.gemm_f32_name).groups() for kernels in SUPPORTED]
    rows = sorted({0, *around(*(int(mr) for mr, _ in tiles))})
    columns = sorted({0, 1, 7, 37, *around(STRIP, 2 * STRIP, 8 * STRIP), *around(*(int(nr) for _, nr in tiles))})
    depths = [0, 1, 2, 19, *around(KC, 2 * KC)]
    models = [(128, 128), (512, 128), (128, 512), (384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768)]
    shapes = [
        *((m, n, 23) for m, n in product(rows, columns)),
        *((5, n, k) for n, k in product(columns, depths)),
        *((m, n, k) for m in range(1, 41) for n, k in [(33, 70), (131, 9)]),
        *((m, n, k) for m in (1, 13) for n, k in [*models, (768, 3072)]),
        *((length, length, size) for length in (7, 64, 128) for size in (32, 64)),  # scores of attention
        *((length, size, length) for length in (7, 64, 128) for size in (32, 64)),  # context of attention
    ]
    draw = random.Random(0)
    plain = [len(ACTS) - 1] + [1] * (len(ACTS) - 1)  # half of the cases without activation: their bits are prescribed
    return [
        GemmF32(*shape, draw.choices(list(ACTS), plain)[0], draw.random() < 0.5, draw.random() < 0.5)
        for shape in dict.fromkeys(shapes)
    ]


CASES: list[Case] = [
    *gemm_cases(),
    *(SoftmaxF32(0, 5), SoftmaxF32(40, 128)),
    *(SoftmaxF32(3, n, scale) for n in [1, 2, 7, *around(16, 32), 131, 512] for scale in (1.0, 0.125, 48**-0.5)),
    *(LayerNormF32(0, 5), LayerNormF32(40, 128)),
    *(
        LayerNormF32(3, n, eps, inplace)
        for n in [1, 2, 7, *around(16, 32), 48, 128, 312, 384, 768, 1021]
        for eps, inplace in [(1e-12, False), (1e-12, True), (0.1, False)]
    ),
]
SMALL = [
    *(GemmF32(m, n, k, act, True, True) for act in ACTS for m, n, k in [(13, 37, 19), (7, 130, KC + 3)]),
    *(SoftmaxF32(5, n) for n in (1, 16, 37)),
    *(LayerNormF32(5, n, 1e-5) for n in (1, 16, 37)),
]


@cache
def prepared(case: Case, seed: int) -> tuple[Operands, Expected]:
    operands = case.operands(seeded(case, seed))
    return operands, expect(case, operands)


def case_id(case: Case) -> str:
    return f"{case.op}-{case}"


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_small_case = pytest.mark.parametrize("case", SMALL, ids=case_id)


# ---- right, wherever the operands lie ----


@every_case
def test_right(kernels: KernelSet, case: Case, seed: int) -> None:
    operands, expected = prepared(case, seed)
    for name, layout in LAYOUTS.items():
        if layout.guard and sys.platform != "linux":
            continue  # test_guard_pages says so
        memory = Memory(layout)
        placed = {key: memory(key, x) for key, x in operands.items()}
        out = memory("out", unwritten(case))
        case.bind(kernels, placed, out, memory)(1)
        expected.check(out)
        assert memory.written(operands) == [], f"{case.op} {case}, {name}: written"


@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case.out_shape()], ids=case_id)
def test_wrong_results_are_refused(case: Case, seed: int) -> None:
    operands, expected = prepared(case, seed)
    wrong = dict(case.wrong(operands))
    off = expected.truth.copy()
    off[0, -1] += 2 * expected.bound[0, -1]
    wrong["two bounds off"] = off
    if expected.bits is not None:
        off = expected.bits.copy()
        off[-1, 0] = np.nextafter(off[-1, 0], np.float32(np.inf))
        wrong["one bit off"] = off
    for mistake, result in wrong.items():
        with pytest.raises(AssertionError, match="elements are off"):
            expected.check(result)
            pytest.fail(f"accepted: {mistake}")


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set up for Linux only")
def test_guard_pages() -> None:
    room = guarded(1)
    with open("/proc/self/maps") as maps:
        access = {line.split()[0]: line.split()[1] for line in maps}
    begin, end = room.ctypes.data, room.ctypes.data + room.nbytes
    before = [rights for pages, rights in access.items() if pages.endswith(f"-{begin:x}")]
    after = [rights for pages, rights in access.items() if pages.startswith(f"{end:x}-")]
    assert before == after == ["---s"]


# ---- the same bits: on every kernel set, in any batch, for any split ----


@every_case
def test_same_bits_on_every_kernel_set(case: Case, seed: int) -> None:
    operands, _ = prepared(case, seed)
    results = {kernels.isa: bits(run(kernels, case, operands)) for kernels in SUPPORTED}
    assert len(set(results.values())) == 1, f"{case.op} {case}: {list(results)} differ"


ROWWISE = {"gemm_f32": ("m", ("a", "residual")), "softmax_f32": ("rows", ("x",)), "layernorm_f32": ("rows", ("x",))}


@every_small_case
def test_rows_do_not_depend_on_the_batch(kernels: KernelSet, case: Case, seed: int) -> None:
    operands, _ = prepared(case, seed)
    whole = run(kernels, case, operands)
    count, rowwise = ROWWISE[case.op]
    rows = case.out_shape()[0]
    for begin, end in [*((i, i + 1) for i in range(rows)), (0, rows // 2), (rows // 2, rows)]:
        part = {name: x[begin:end] if name in rowwise else x for name, x in operands.items()}
        alone = run(kernels, replace(case, **{count: end - begin}), part)
        assert bits(alone) == bits(whole[begin:end]), f"rows {begin}..{end}"


@pytest.mark.parametrize("m, n, k", [(1, 161, 40), (13, 161, KC + 3), (5, 768, 64), (3, 40, 0)])
def test_strips_of_columns(kernels: KernelSet, m: int, n: int, k: int, seed: int) -> None:
    case = GemmF32(m, n, k, "gelu", True, True)
    operands, _ = prepared(case, seed)
    whole = run(kernels, case, operands)
    packed = aligned("packed", np.zeros(kernels.packed_bytes(n, k), np.uint8))
    kernels.pack(operands["w"], packed)
    for begin, end in [(0, STRIP), (STRIP, 2 * STRIP), (STRIP, n), (2 * STRIP, n)]:
        strips = packed[kernels.packed_bytes(begin, k) : kernels.packed_bytes(end, k)]
        out, columns = np.empty((m, end - begin), np.float32), slice(begin, end)
        kernels.gemm_f32(
            operands["a"], strips, out, operands["bias"][columns], "gelu", operands["residual"][:, columns]
        )
        assert bits(out) == bits(whole[:, columns]), f"columns {begin}..{end}"


@pytest.mark.parametrize("n", [1, 15, 16, 17, 37, 64])
@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 33, KC + 3])
def test_pack_strides(kernels: KernelSet, n: int, k: int, seed: int) -> None:
    """W, W with wide rows and W stored as its transpose are packed alike."""
    w = np.random.default_rng([seed, n, k]).standard_normal((n, k)).astype(np.float32)
    wide = Memory(Layout(gap=19))
    wide_transposed = Memory(Layout(gap=3, offset=1))
    forms = [w, wide("w", w), np.ascontiguousarray(w.T).T, wide_transposed("w", np.ascontiguousarray(w.T)).T]
    packed = [aligned("packed", np.full(kernels.packed_bytes(n, k), 0xFF, np.uint8)) for _ in forms]
    for form, room in zip(forms, packed, strict=True):
        kernels.pack(form, room)
    assert len({room.tobytes() for room in packed}) == 1


# ---- the ends of the number line ----

EXTREMES = {
    "denormal": [1e-40, -3e-42, 1.4e-45],
    "huge": [1e38, -3e38, 3.4e38],
    "zero": [0.0, -0.0],
    "infinite": [np.inf, -np.inf],
    "nan": [np.nan],
    "mixed": [1e-40, -0.0, 3.4e38, -np.inf, np.nan],
}


def spoiled(x: F32, values: list[float], rng: np.random.Generator) -> F32:
    """x with a quarter of its elements, at least one, replaced by some of values."""
    where = rng.random(x.shape) < 0.25
    where[tuple(rng.integers(x.shape))] = True
    return np.where(where, rng.choice(values, x.shape), x).astype(np.float32)


@pytest.mark.parametrize("extreme", EXTREMES)
@every_small_case
def test_extreme_values(kernels: KernelSet, case: Case, extreme: str, seed: int) -> None:
    """Every kernel set makes the same of them, which is what the contract prescribes where it prescribes bits."""
    rng = seeded(case, seed)
    operands = {name: spoiled(x, EXTREMES[extreme], rng) for name, x in case.operands(rng).items()}
    result = run(kernels, case, operands)
    assert bits(result) == bits(run(SUPPORTED[-1], case, operands))
    prescribed = case.bits(operands)
    if prescribed is not None:
        np.testing.assert_array_equal(result, prescribed)


@pytest.mark.parametrize("extreme", EXTREMES)
@every_small_case
def test_extreme_rows_spoil_no_others(kernels: KernelSet, case: Case, extreme: str, seed: int) -> None:
    operands, _ = prepared(case, seed)
    rng = seeded(case, seed)
    whole = run(kernels, case, operands)
    others = np.arange(len(whole)) != 2
    for name in ROWWISE[case.op][1]:
        x = operands[name].copy()
        x[2] = spoiled(x[2], EXTREMES[extreme], rng)
        result = run(kernels, case, {**operands, name: x})
        assert bits(result[others]) == bits(whole[others])
        if extreme == "nan" and name != "residual":
            assert np.isnan(result[2]).all()


# ---- activations ----


def activation(kernels: KernelSet, act: str, x: F32) -> F32:
    """act(x) [n], by a GEMM without products whose bias is x."""
    out = np.empty((1, x.size), np.float32)
    packed = aligned("packed", np.zeros(kernels.packed_bytes(x.size, 0), np.uint8))
    kernels.gemm_f32(np.empty((1, 0), np.float32), packed, out, x, act)
    return out[0]


@pytest.mark.parametrize("act", ACTS)
def test_activation_error(act: str, request: pytest.FixtureRequest) -> None:
    """On 2^22 float32 of every sign and exponent (--exhaustive: on all 2^32): error, NaNs, the same bits everywhere."""
    step, chunk = (1, 2**20) if request.config.getoption("--exhaustive") else (1021, 2**16)
    for begin in range(0, 2**32, chunk * step):
        x = np.arange(begin, min(begin + chunk * step, 2**32), step, np.uint32).view(np.float32)
        result, *others = (activation(kernels, act, x) for kernels in SUPPORTED)
        assert all(bits(other) == bits(result) for other in others), f"{act}: kernel sets differ"
        assert np.isnan(result[np.isnan(x)]).all(), f"{act}: a NaN was lost"
        finite = np.isfinite(x)
        x, result = x[finite], result[finite].astype(np.float64)
        with np.errstate(all="ignore"):
            truth = ACTIVATIONS[act].exact(x.astype(np.float64))
            off = ~(np.abs(result - truth) <= ACTIVATIONS[act].bound(x.astype(np.float64)))
        if off.any():
            at = np.argmax(off)
            bound = ACTIVATIONS[act].bound(x[at : at + 1].astype(np.float64))[0]
            pytest.fail(f"{act}({x[at]!r}): expected {truth[at]!r} +- {bound:.3g}, got {result[at]!r}")


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation_ends(kernels: KernelSet, act: str) -> None:
    """Far above 0 they are x; far below 0 they are 0, but for what exp, held near exp(-88), leaves of it."""
    x = np.array([100, 1e4, 1e10, 1e30, np.finfo(np.float32).max], np.float32)
    assert np.array_equal(activation(kernels, act, x), x)
    low = activation(kernels, act, -x)
    assert (-ACTIVATIONS[act].held <= low).all() and (low <= 0).all(), low


def test_tanh_ends(kernels: KernelSet) -> None:
    x = np.array([10, 100, 1e30, np.finfo(np.float32).max, np.inf], np.float32)
    assert np.array_equal(activation(kernels, "tanh", np.append(x, -x)), np.sign(np.append(x, -x)))


# ---- softmax ----


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 128, 512])
def test_softmax_sums_to_one(kernels: KernelSet, n: int, seed: int) -> None:
    """The errors of exp cancel; what is left: additions to a lane, 4 levels of the tree, the quotient, the product."""
    case = SoftmaxF32(20, n)
    sums = run(kernels, case, prepared(case, seed)[0]).astype(np.float64).sum(axis=1)
    assert np.abs(sums - 1).max() <= U * (-(-n // 16) + 4 + 2) + n * TINY


@pytest.mark.parametrize("scale", [1.0, 0.125, 32**-0.5, 48**-0.5])
def test_softmax_of_one_is_one(kernels: KernelSet, scale: float) -> None:
    x = np.array([[0, 1, -1, 87.3, -1e4, 3e38, 1e-40]], np.float32).T
    assert np.array_equal(run(kernels, SoftmaxF32(len(x), 1, scale), {"x": x}), np.ones_like(x))


@pytest.mark.parametrize("level", [-1e6, 1e3, 1e6])
def test_softmax_of_large_scores(kernels: KernelSet, level: float, seed: int) -> None:
    case = SoftmaxF32(5, 37, 48**-0.5)
    operands = {"x": case.operands(seeded(case, seed))["x"] + np.float32(level)}
    expect(case, operands).check(run(kernels, case, operands))

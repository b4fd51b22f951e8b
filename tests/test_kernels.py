"""Every op on every kernel set: right, in the bits of the contract, and touching nothing but its operands."""

from __future__ import annotations

import ctypes
import mmap
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert._kernels import ACTS, CHAIN, STRIP, KernelSet, k8, kernel_sets, mix_gain
from tests.cases import (
    F32,
    TINY,
    Case,
    Expected,
    GemmF32,
    GemmS8,
    LayerNormF32,
    Linear,
    MixF32,
    MixQuantizeU8,
    Operands,
    QuantizeU8,
    SoftmaxF32,
    SoftmaxU8,
    U,
    aligned,
    expect,
    seeded,
)

SUPPORTED = [KernelSet(name) for name, supported in kernel_sets() if supported]
POISON = 0xFF  # in every byte; as float32 a NaN: it spoils what reads it and shows what writes over it
LINE = 64  # bytes


# ---- where operands lie ----


@dataclass(frozen=True)
class Layout:
    """offset: elements past a 64-byte line; gap: elements between rows; guard: the end at a page without access."""

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


def guarded(size: int) -> NDArray[np.uint8]:
    """Whole pages of at least so many bytes between two pages that fault on every access."""
    pages = max(-(-size // mmap.PAGESIZE), 1)
    room = np.frombuffer(mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        address = room.ctypes.data + page * mmap.PAGESIZE
        if protect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(0)):
            raise OSError(ctypes.get_errno(), "mprotect")
    return room[mmap.PAGESIZE : -mmap.PAGESIZE]


@dataclass
class Memory:
    """A Place that surrounds operands with poison, and tells afterwards whether they or the poison were written."""

    layout: Layout
    placed: dict[str, tuple[NDArray[np.uint8], NDArray[np.generic]]] = field(default_factory=dict)

    def __call__(self, name: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
        size = values.itemsize
        source = np.ascontiguousarray(values).view(f"u{size}")
        strides = tuple(s + size * self.layout.gap for s in source.strides[:-1]) + source.strides[-1:]
        extent = size + sum((n - 1) * s for n, s in zip(source.shape, strides, strict=True)) if source.size else 0
        if self.layout.guard:
            room = guarded(extent)
            start = 0 if self.layout.guard == "before" else room.size - extent
        else:
            room = np.empty(extent + 5 * LINE, np.uint8)
            start = -room.ctypes.data % LINE + 2 * LINE + size * self.layout.offset
        if name == "packed":
            start -= (room.ctypes.data + start) % LINE
        room[:] = POISON
        elements = np.ndarray(source.shape, source.dtype, room, start, strides)
        elements[...] = source
        self.placed[name] = room, elements
        return elements.view(values.dtype)

    def written(self, operands: Operands) -> list[str]:
        """Names of operands that are no longer what they were, and "around NAME" where the poison is not."""
        names = [name for name, x in operands.items() if self.placed[name][1].tobytes() != x.tobytes()]
        for name, (room, elements) in self.placed.items():
            kept = elements.copy()
            elements[...] = np.iinfo(elements.dtype).max
            if (room != POISON).any():
                names.append(f"around {name}")
            elements[...] = kept
        return names


def bits(x: NDArray[np.generic]) -> bytes:
    """The bits of float32, all NaNs alike."""
    words = np.ascontiguousarray(x).view(np.uint32)
    return np.where((words & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FC00000), words).tobytes()


def unwritten(case: Case) -> F32:
    return np.full(case.out_shape(), -1, np.int32).view(np.float32)


def run(kernels: KernelSet, case: Case, operands: Operands) -> F32:
    out = aligned("out", unwritten(case))
    case.bind(kernels, operands, out)(1)
    return out


# ---- which cases ----


def around(*sizes: int) -> list[int]:
    return sorted({size + step for size in sizes for step in (-1, 0, 1)})


# Linear layers of models: n, k
MODELS = [
    (128, 128),
    (512, 128),
    (128, 512),
    (384, 384),
    (1536, 384),
    (384, 1536),
    (768, 768),
    (3072, 768),
    (768, 3072),
]
ATTENTION = list(product((7, 64, 128), (32, 64)))  # tokens, head_dim


def tile_edges(names: list[str]) -> tuple[list[int], list[int]]:
    """Rows and columns at the edges of the register tiles that these names tell."""
    tiles = [re.search(r"_(\d+)x(\d+)_", name).groups() for name in names]
    rows = {0, *around(*(int(mr) for mr, _ in tiles))}
    columns = {0, 1, 7, 37, *around(STRIP, 2 * STRIP, 8 * STRIP), *around(*(int(nr) for _, nr in tiles))}
    return sorted(rows), sorted(columns)


def fused(shapes: list[tuple[int, int, int]], op: type[Linear]) -> list[Linear]:
    """Each shape once, with an activation, bias and residual by lot."""
    draw = random.Random(0)
    plain = [len(ACTS) - 1] + [1] * (len(ACTS) - 1)  # half of the cases without activation: their bits are prescribed
    return [
        op(*shape, draw.choices(list(ACTS), plain)[0], draw.random() < 0.5, draw.random() < 0.5)
        for shape in dict.fromkeys(shapes)
    ]


def gemm_f32_cases() -> list[Linear]:
    rows, columns = tile_edges([kernels.gemm_f32_name for kernels in SUPPORTED])
    depths = [0, 1, 2, 19, *around(CHAIN, 2 * CHAIN, 3 * CHAIN, 4 * CHAIN)]
    shapes = [
        *((m, n, 23) for m, n in product(rows, columns)),
        *((5, n, k) for n, k in product(columns, depths)),
        *((m, n, k) for m in range(1, 41) for n, k in [(33, 70), (131, 9)]),
        *((m, n, k) for m in (1, 13) for n, k in MODELS),
        *((tokens, tokens, size) for tokens, size in ATTENTION),  # scores
        *((tokens, size, tokens) for tokens, size in ATTENTION),  # context
        *((m, n, k) for m in (95, 96, 101) for n, k in [(37, 0), (128, 129), (131, 300), (263, 70)]),  # turns
    ]
    return fused(shapes, GemmF32)


def gemm_s8_cases() -> list[Linear]:
    rows, columns = tile_edges([kernels.gemm_s8_name for kernels in SUPPORTED])
    shapes = [
        *((m, n, 23) for m, n in product(rows, columns)),
        *((5, n, 65) for n in range(1, 50)),
        *((3, 37, k) for k in range(71)),
        *((m, n, k) for m in range(1, 41) for n, k in [(33, 70), (131, 9)]),
        *((m, n, k) for m in (1, 13) for n, k in MODELS),
        (513, 37, 70),
    ]
    sizes = [*((13, 70, k) for k in (1, 3, 4, 63, 64, 65, 768, 3072)), *((mn, mn, 32768) for mn in range(1, 17))]
    extreme = [GemmS8(*size, extreme=True) for size in sizes]
    uneven = [
        GemmS8(*size, extreme=extreme, large=large)
        for size in [*((m, 37, 131) for m in range(1, 18)), *sizes]
        for extreme, large in ((False, 0.02), (False, 0.2), (True, 0.2), (True, 0.8), (False, 0.98))
    ]
    return [*fused(shapes, GemmS8), *extreme, GemmS8(13, 70, 3072, "gelu", True, True, extreme=True), *uneven]


# One vector, odd numbers of them, every butterfly with and without reflection, rows that are not mixed.
MIXED = [1, 15, 16, 17, 32, 37, 48, 64, 80, 96, 128, 192, 256, 312, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 9216]

CASES: list[Case] = [
    *gemm_f32_cases(),
    *gemm_s8_cases(),
    *(SoftmaxF32(0, 5), SoftmaxF32(40, 128)),
    *(SoftmaxF32(3, n, scale) for n in [1, 2, 7, *around(16, 32), 131, 512] for scale in (1.0, 0.125, 48**-0.5)),
    *(
        SoftmaxU8(rows, n)
        for rows, n in [(0, 5), (40, 128), *((4, n) for n in [*range(1, 71), 127, 128, 129, 512, 1021])]
    ),
    *(LayerNormF32(0, 5), LayerNormF32(40, 128)),
    *(
        LayerNormF32(3, n, eps, inplace)
        for n in [1, 2, 7, *around(16, 32), 48, 128, 312, 384, 768, 1021]
        for eps, inplace in [(1e-12, False), (1e-12, True), (0.1, False)]
    ),
    *(MixF32(rows, n) for rows, n in [(0, 48), (2, 0), (40, 384)]),
    *(MixF32(3, n, inplace) for n in MIXED for inplace in (False, True)),
    *(QuantizeU8(rows, k) for rows, k in [(0, 5), (40, 128)]),
    *(QuantizeU8(4, k) for k in [*range(71), 127, 128, 129, 312, 384, 768, 1021, 3072]),
    *(MixQuantizeU8(rows, k) for rows, k in [(0, 48), (41, 384)]),
    *(MixQuantizeU8(5, k, inplace) for k in MIXED for inplace in (False, True)),
]
SMALL = [
    *(GemmF32(m, n, k, act, True, True) for act in ACTS for m, n, k in [(13, 37, 19), (7, 130, CHAIN + 3)]),
    *(SoftmaxF32(5, n) for n in (1, 16, 37)),
    *(SoftmaxU8(5, n) for n in (1, 16, 37, 70)),
    *(LayerNormF32(5, n, 1e-5) for n in (1, 16, 37)),
    *(GemmS8(m, n, k, act, True, True) for act in ACTS for m, n, k in [(13, 37, 19), (7, 130, 131)]),
    *(MixF32(5, n) for n in (37, 48, 128, 768)),
    *(QuantizeU8(5, k) for k in (1, 16, 37, 70)),
    *(MixQuantizeU8(6, k) for k in (37, 48, 128, 768)),
]


@cache
def prepared(case: Case, seed: int) -> tuple[Operands, Expected]:
    operands = case.operands(seeded(case, seed))
    return operands, expect(case, operands)


def case_id(case: Case) -> str:
    return f"{case.op}-{case}"


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_small_case = pytest.mark.parametrize("case", SMALL, ids=case_id)
every_gemm = pytest.mark.parametrize("op", [GemmF32, GemmS8], ids=lambda op: op.op)


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


# op -> the field that counts rows, the operands that have a row for each
ROWWISE = {
    "gemm_f32": ("m", ("a", "residual")),
    "gemm_s8": ("m", ("a", "scale_a", "zero", "residual")),
    "softmax_f32": ("rows", ("x",)),
    "softmax_u8": ("rows", ("x",)),
    "layernorm_f32": ("rows", ("x",)),
    "mix_f32": ("rows", ("x",)),
    "quantize_u8": ("rows", ("x",)),
    "mix_quantize_u8": ("rows", ("x",)),
}


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


@pytest.mark.parametrize("m, n, k", [(1, 161, 40), (13, 161, CHAIN + 3), (5, 768, 64), (3, 40, 0)])
@every_gemm
def test_strips_of_columns(kernels: KernelSet, op: type[Linear], m: int, n: int, k: int, seed: int) -> None:
    case = op(m, n, k, "gelu", True, True)
    operands, _ = prepared(case, seed)
    whole = run(kernels, case, operands)
    packed = aligned("packed", np.zeros(case.packed_bytes(kernels, n), np.uint8))
    case.pack(kernels, operands, packed)
    for begin, end in [(0, STRIP), (STRIP, 2 * STRIP), (STRIP, n), (2 * STRIP, n)]:
        strips = packed[case.packed_bytes(kernels, begin) : case.packed_bytes(kernels, end)]
        out, columns = np.empty((m, end - begin), np.float32), slice(begin, end)
        epilogue = {"bias": operands["bias"][columns], "residual": operands["residual"][:, columns]}
        case.multiply(kernels, operands | epilogue, strips, out)
        assert bits(out) == bits(whole[:, columns]), f"columns {begin}..{end}"


def packed_alike(pack: Callable[[F32, NDArray[np.uint8]], None], packed_bytes: int, n: int, k: int, seed: int) -> bool:
    """Whether W [n][k], W with wide rows and W stored as its transpose are packed to the same bytes."""
    w = np.random.default_rng([seed, n, k]).standard_normal((n, k)).astype(np.float32)
    wide = Memory(Layout(gap=19))
    wide_transposed = Memory(Layout(gap=3, offset=1))
    forms = [w, wide("w", w), np.ascontiguousarray(w.T).T, wide_transposed("w", np.ascontiguousarray(w.T)).T]
    packed = [aligned("packed", np.full(packed_bytes, 0xFF, np.uint8)) for _ in forms]
    for form, room in zip(forms, packed, strict=True):
        pack(form, room)
    return len({room.tobytes() for room in packed}) == 1


@pytest.mark.parametrize("n", [1, 15, 16, 17, 37, 64])
@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 33, CHAIN + 3])
def test_pack_strides(kernels: KernelSet, n: int, k: int, seed: int) -> None:
    assert packed_alike(kernels.pack, kernels.packed_bytes(n, k), n, k, seed)


# ---- the ends of the number line ----

EXTREMES = {
    "denormal": [1e-40, -3e-42, 1.4e-45],
    "huge": [1e38, -3e38, 3.4e38],
    "zero": [0.0, -0.0],
    "infinite": [np.inf, -np.inf],
    "nan": [np.nan, -np.nan],
    "mixed": [1e-40, -0.0, 3.4e38, -np.inf, -np.nan],
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
    operands = {
        name: spoiled(x, EXTREMES[extreme], rng) if x.dtype == np.float32 else x
        for name, x in case.operands(rng).items()
    }
    result = run(kernels, case, operands)
    assert bits(result) == bits(run(SUPPORTED[-1], case, operands))
    prescribed = case.bits(operands)
    if prescribed is not None:
        np.testing.assert_array_equal(result, prescribed)


# Columns that a NaN anywhere in the row must reach, where that is not all of them: mix_f32 keeps lanes apart (its bits
# are prescribed), the quantising ops and softmax_u8 hand the NaN on in the scale.
ALL = slice(None)
NAN_REACHES = {"mix_f32": slice(0)} | dict.fromkeys(("quantize_u8", "mix_quantize_u8", "softmax_u8"), slice(-1, None))


@pytest.mark.parametrize("extreme", EXTREMES)
@every_small_case
def test_extreme_rows_spoil_no_others(kernels: KernelSet, case: Case, extreme: str, seed: int) -> None:
    operands, _ = prepared(case, seed)
    rng = seeded(case, seed)
    whole = run(kernels, case, operands)
    others = np.arange(len(whole)) != 2
    for name in ROWWISE[case.op][1]:
        x = operands[name].copy()
        if x.dtype != np.float32:
            continue
        x[2:3] = spoiled(x[2:3], EXTREMES[extreme], rng)
        result = run(kernels, case, {**operands, name: x})
        assert bits(result[others]) == bits(whole[others])
        if extreme == "nan" and name != "residual":
            assert np.isnan(result[2, NAN_REACHES.get(case.op, ALL)]).all()


# ---- activations ----


def activation(op: type[Linear], kernels: KernelSet, act: str, x: F32) -> F32:
    """act(x) [n], by a GEMM without products whose bias is x."""
    case = op(1, x.size, 0, act, True)
    return run(kernels, case, case.factors(np.random.default_rng(0)) | {"bias": x})[0]


@every_gemm
@pytest.mark.parametrize("act", ACTS)
def test_activation_error(act: str, op: type[Linear], request: pytest.FixtureRequest) -> None:
    """On 2^22 float32 of every sign and exponent (--exhaustive: on all 2^32): error, NaNs, the same bits everywhere."""
    step, chunk = (1, 2**20) if request.config.getoption("--exhaustive") else (1021, 2**16)
    for begin in range(0, 2**32, chunk * step):
        x = np.arange(begin, min(begin + chunk * step, 2**32), step, np.uint32).view(np.float32)
        result, *others = (activation(op, kernels, act, x) for kernels in SUPPORTED)
        assert all(bits(other) == bits(result) for other in others), f"{act}: kernel sets differ"
        assert np.isnan(result[np.isnan(x)]).all(), f"{act}: a NaN was lost"
        finite = np.isfinite(x)
        x, result = x[finite], result[finite].astype(np.float64)
        with np.errstate(all="ignore"):
            truth, bound = (
                op.activations[act].exact(x.astype(np.float64)),
                op.activations[act].bound(x.astype(np.float64)),
            )
            off = ~(np.abs(result - truth) <= bound)
        if off.any():
            at = np.argmax(off)
            pytest.fail(f"{act}({x[at]!r}): expected {truth[at]!r} +- {bound[at]:.3g}, got {result[at]!r}")


@every_gemm
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation_ends(kernels: KernelSet, act: str, op: type[Linear]) -> None:
    """Far above 0 they are x; far below 0 they are 0, but for what exp, held near exp(-88), leaves of it."""
    x = np.array([100, 1e4, 1e10, 1e30, np.finfo(np.float32).max], np.float32)
    assert np.array_equal(activation(op, kernels, act, x), x)
    low = activation(op, kernels, act, -x)
    assert (-op.activations[act].held <= low).all() and (low <= 0).all(), low


def test_tanh_ends(kernels: KernelSet) -> None:
    x = np.array([10, 100, 1e30, np.finfo(np.float32).max, np.inf], np.float32)
    assert np.array_equal(activation(GemmF32, kernels, "tanh", np.append(x, -x)), np.sign(np.append(x, -x)))


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


def softmax_u8(kernels: KernelSet, x: F32) -> tuple[NDArray[np.int64], F32]:
    """q, all k8(n) columns of it, and scale."""
    out = run(kernels, SoftmaxU8(*x.shape), {"x": x})
    return out[:, :-1].astype(np.int64), out[:, -1]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 128, 512, 4097, 65536])
def test_softmax_u8_scale_is_the_sum(kernels: KernelSet, n: int, seed: int) -> None:
    x = SoftmaxU8(3, n).operands(np.random.default_rng([seed, n]))["x"]
    x[-1] = 7  # all equal: the largest sum there is
    q, scale = softmax_u8(kernels, x)
    assert (q.max(axis=1) == 255).all() and q[-1].sum() == 255 * n
    assert np.array_equal(scale, np.float32(1) / q.sum(axis=1).astype(np.float32))


def test_softmax_u8_error(kernels: KernelSet) -> None:
    """Of every argument that matters, many at a time; a row's largest element is 0."""
    x = np.concatenate([[0], np.linspace(-7, 0, 60000)]).astype(np.float32)[None]
    q, _ = softmax_u8(kernels, x)
    assert np.abs(q[0, : x.size] - 255 * np.exp(x[0].astype(np.float64))).max() < SoftmaxU8.ROUNDED


@pytest.mark.parametrize("n", [1, 16, 37, 70])
@pytest.mark.parametrize(
    "values",
    [[np.nan], [np.inf], [-np.inf], [np.nan, -np.inf], [np.inf, np.nan], [np.inf, 0], [-np.inf, 0], [3e38, -3e38]],
)
def test_softmax_u8_of_what_is_not_finite(kernels: KernelSet, values: list[float], n: int) -> None:
    """NaN where the float32 softmax is, which is wherever the largest element is not finite; then all q are 0."""
    x = np.resize(np.array(values, np.float32), (1, n))
    q, scale = softmax_u8(kernels, x)
    if np.isfinite(x.max()):
        assert q[0, : len(values)].max() == 255 and np.isfinite(scale[0])
        assert np.array_equal(q[0, :n], np.where(x[0] == x.max(), 255, 0))
    else:
        assert not q.any() and np.isnan(scale[0])
        assert np.isnan(run(kernels, SoftmaxF32(1, n), {"x": x})).all()


# ---- int8 ----


def symmetric(w: F32) -> tuple[NDArray[np.int8], F32]:
    """q and scale_w as pack_f32 of gemm_s8 makes them."""
    with np.errstate(all="ignore"):
        bad = ~np.isfinite(w).all(axis=1)
        scale = np.abs(w).max(axis=1, initial=0) / np.float32(127)
        scale = np.where(bad, np.float32(np.nan), np.where(scale < np.float32(2.0**-120), np.float32(0), scale))
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
        exact = np.where(bad[:, None], 0, w.astype(np.float64)) * inverse[:, None]  # 48 bits: exact in float64
    return np.rint(exact).astype(np.int8), scale


@pytest.mark.parametrize("zero", [0, 63, 64, 128, 255])
def test_all_pairs_of_bytes(kernels: KernelSet, zero: int) -> None:
    """Row i holds i beside every byte, in both orders; weights are the largest of either sign: nothing saturates."""
    each = np.arange(256, dtype=np.uint8)
    beside = np.stack([np.repeat(each, 256), np.tile(each, 256)], axis=1).reshape(256, 512)
    a = np.concatenate([beside, beside.reshape(256, 256, 2)[:, :, ::-1].reshape(256, 512)])
    signs = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]])
    w = (127 * np.tile(signs, 256)).astype(np.int8)
    packed = aligned("packed", np.zeros(kernels.packed_bytes_s8(4, 512), np.uint8))
    kernels.pack_s8(w, np.ones(4, np.float32), packed)
    out = np.zeros((512, 4), np.float32)
    kernels.gemm_s8(a, 512, np.ones(512, np.float32), np.full(512, zero, np.int32), packed, out)
    assert np.array_equal(out, (a.astype(np.int64) - zero) @ w.T.astype(np.int64))


@pytest.mark.parametrize("n, k", [*product([1, 15, 16, 17, 37], [0, 1, 2, 15, 16, 17, 33, 64, 65, 255, 256, 257, 700])])
def test_pack_f32(kernels: KernelSet, n: int, k: int, seed: int) -> None:
    """The bytes that pack makes of the same integers, whichever way W lies; rows of all sizes, extremes among them."""
    rng = np.random.default_rng([seed, n, k])
    w = (rng.standard_normal((n, k)) * 10.0 ** rng.integers(-3, 4, (n, 1))).astype(np.float32)
    for row, values in enumerate([*EXTREMES.values(), [2.0**-114], [-3.4e38], [2.5 * 2.0**-120, 127 * 2.0**-120]]):
        if k and row < n - 2:
            w[row] = spoiled(w[row], values, rng) if len(values) > 2 else np.resize(np.array(values, np.float32), k)
    q, scale = symmetric(w)
    assert k == 0 or np.abs(q).max(axis=1)[scale > 0].min(initial=127) == 127
    expected = aligned("packed", np.full(kernels.packed_bytes_s8(n, k), POISON, np.uint8))
    kernels.pack_s8(q, scale, expected)
    wide, transposed = Memory(Layout(gap=19)), Memory(Layout(gap=3, offset=1))
    guard = Memory(Layout(guard="after") if sys.platform == "linux" else Layout())
    for form in (
        w,
        wide("w", w),
        guard("w", w),
        np.ascontiguousarray(w.T).T,
        transposed("w", np.ascontiguousarray(w.T)).T,
    ):
        packed = guard("packed", np.full(expected.size, POISON, np.uint8))
        kernels.pack_f32_s8(form, packed)
        assert bits(packed.view(np.uint32)) == bits(expected.view(np.uint32))
        assert guard.written({}) == []


def test_attention_in_integers(kernels: KernelSet, seed: int) -> None:
    """A head as the engine chains it: what half a step of each operand makes of softmax(q k^T) v."""
    seq, dim = 70, 32
    rng = np.random.default_rng([seed, seq])
    q, k, v = rng.standard_normal((3, seq, dim)).astype(np.float32)
    keys = aligned("packed", np.zeros(kernels.packed_bytes_s8(seq, dim), np.uint8))
    values = aligned("packed", np.zeros(kernels.packed_bytes_s8(dim, seq), np.uint8))
    kernels.pack_f32_s8(k, keys)
    kernels.pack_f32_s8(v.T, values)
    copies = run(kernels, QuantizeU8(seq, dim), {"x": q})
    a, zero, scale = copies[:, :-2].astype(np.uint8), copies[:, -2].astype(np.int32), copies[:, -1].copy()
    scores, context = np.empty((seq, seq), np.float32), np.empty((seq, dim), np.float32)
    kernels.gemm_s8(a, dim, scale, zero, keys, scores)
    probs, scale = np.empty((seq, k8(seq)), np.uint8), np.empty(seq, np.float32)
    kernels.softmax_u8(scores, probs, scale)
    kernels.gemm_s8(probs, seq, scale, np.zeros(seq, np.int32), values, context)
    exact = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    # a score is off by what two steps are; a probability by half of one, in it and in the sum; a value by half of one
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    step_q, step_k = 1.01 * copies[:, -1:], 0.501 * np.abs(k64).max(axis=1) / 127
    off = step_q * np.abs(k64).sum(axis=1) + np.abs(q64).sum(axis=1)[:, None] * step_k + dim * step_q * step_k
    assert (np.abs(scores - q64 @ k64.T) <= off).all()
    total = exact.sum(axis=1, keepdims=True)
    step_p = SoftmaxU8.ROUNDED / 255 * (1 + seq / total) / total * 1.05
    bound = step_p * np.abs(v64).sum(axis=0) + 0.501 * np.abs(v64).max(axis=0) / 127 * 1.01 + 1e-6
    error = np.abs(context - exact / total @ v64)
    assert (error <= bound).all()


@pytest.mark.parametrize("k", [1, 16, 37, 384])
@pytest.mark.parametrize("value", [1.0, -1.0, 3e38, -3e38, 3.4e38, 1e-30, -1e-30, 5e-324])
def test_quantize_equal_values(kernels: KernelSet, value: float, k: int) -> None:
    """One step of 255 takes the range: the value comes back within rounding, 0 exactly."""
    x = np.full((1, k), value, np.float32)
    q, zero, scale = np.split(run(kernels, QuantizeU8(1, k), {"x": x})[0], [-2, -1])
    expected = (255, 0) if x[0, 0] > 0 else (0, 255) if x[0, 0] < 0 else (0, 0)
    assert (q[:k] == expected[0]).all() and zero == expected[1]
    assert np.abs(scale.astype(np.float64) * (q[:k] - zero) - x[0].astype(np.float64)).max() <= U * abs(float(x[0, 0]))


@pytest.mark.parametrize("values", [[0.0], [-0.0], [1e-40], [-1e-40, 1e-40], [255 * (1 - U) * 2.0**-120]])
def test_quantize_of_nothing_is_zeros(kernels: KernelSet, values: list[float]) -> None:
    x = np.resize(np.array(values, np.float32), (2, 37))
    assert not run(kernels, QuantizeU8(2, 37), {"x": x}).any()


def test_quantize_smallest_step(kernels: KernelSet) -> None:
    x = np.full((1, 37), 255 * 2.0**-120, np.float32)
    result = run(kernels, QuantizeU8(1, 37), {"x": x})[0]
    assert (result[:37] == 255).all() and result[-1] == np.float32(2.0**-120)


@pytest.mark.parametrize("n", [*MIXED, 8])
def test_mix_is_its_own_inverse_but_for_the_gain(kernels: KernelSet, n: int, seed: int) -> None:
    case = MixF32(3, n)
    operands, expected = prepared(case, seed)
    matrix, gain = case.matrix(), mix_gain(n)
    thrice = np.rint(3 * matrix)  # whole numbers: exact
    assert np.array_equal(thrice, thrice.T)
    assert np.array_equal(thrice @ thrice, 9 * gain * np.eye(len(matrix)))
    once = {"x": run(kernels, case, operands)}
    error = case.mixed(np.abs(matrix), expected.bound) + case.bound(once)
    Expected("M M x", gain * operands["x"].astype(np.float64), error, None).check(run(kernels, case, once))


def test_layers_keep_their_value_in_int8(kernels: KernelSet, seed: int) -> None:
    """mix, quantize and gemm_s8 as the engine chains them: x . w within what half a step of q and of w makes of it."""
    m, n, k = 5, 33, 768
    rng = np.random.default_rng([seed, k])
    x, w = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((n, k)).astype(np.float32)
    mixed_x, mixed_w = (run(kernels, MixF32(len(v), k), {"x": v}) for v in (x, w))
    scale_w = (np.abs(mixed_w).max(axis=1) / 127).astype(np.float32)
    w8 = np.rint(mixed_w / scale_w[:, None]).astype(np.int8)
    copies = run(kernels, QuantizeU8(m, k), {"x": mixed_x})
    a, zero, scale_a = copies[:, :-2].astype(np.uint8), copies[:, -2].astype(np.int32), copies[:, -1].copy()
    operands = {"a": a, "scale_a": scale_a, "zero": zero, "w": w8, "scale_w": scale_w / np.float32(mix_gain(k))}
    result = run(kernels, GemmS8(m, n, k), operands)
    # a step is off by at most 1 (zero and the quotient are rounded by themselves), a weight by half of one
    off_a, off_w = 1.01 * scale_a[:, None].astype(np.float64), 0.501 * scale_w.astype(np.float64)
    bound = off_a * np.abs(mixed_w).sum(axis=1) + np.abs(mixed_x).sum(axis=1)[:, None] * off_w + k * off_a * off_w
    assert (np.abs(result - x.astype(np.float64) @ w.T.astype(np.float64)) <= bound / mix_gain(k)).all()

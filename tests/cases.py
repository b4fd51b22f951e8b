"""The op table: what each slot of a kernel set computes, how exactly, and what it costs. Tests and bench read it.

An op is one class and one row of OPS; an instance is one case: a shape and its options. It makes the operands and knows
the float64 truth, the error that float32 arithmetic may make, the bits where kernels.h prescribes every rounding, and
some wrong results that a check must refuse. Error bounds follow from the contracts in csrc/kernels.h.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbert._kernels import CHAIN, SPLIT_PANEL, SPLIT_SCRATCH, KernelSet, k8
from tests.reference import GATES

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Operands = dict[str, NDArray[Any]]

U = 2.0**-24  # half a unit in the last place of 1: the relative error of one float32 operation
TINY = 2.0**-149  # smallest float32: the absolute error of an operation that underflows
EXP = 2.0**-22  # relative error that kernels.h allows exp
HELD = 2.0**-124  # exp is held near exp(-87): nothing smaller comes out of it
HELD_AT = 88.0  # and no argument beyond this goes into it


class Place(Protocol):
    """Puts an operand somewhere in memory: a copy with the same values. "packed" must start on a 64-byte line."""

    def __call__(self, name: str, values: NDArray[np.generic]) -> NDArray[np.generic]: ...


def aligned(name: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """The plain place: dense, on a 64-byte line."""
    room = np.empty(values.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


class Case(Protocol):
    """One case of one op. out is what the kernel writes, [rows][n]; where that is not all float32, a float32 copy."""

    op: ClassVar[str]

    def __str__(self) -> str: ...
    def operands(self, rng: np.random.Generator) -> Operands: ...
    def out_shape(self) -> tuple[int, int]: ...

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        """Packs what needs packing, and returns run(repeat), which writes out."""
        ...

    def truth(self, operands: Operands) -> F64:
        """The result in float64."""
        ...

    def bound(self, operands: Operands) -> F64:
        """The largest error of each element that the contract allows."""
        ...

    def bits(self, operands: Operands) -> F32 | None:
        """The result with every rounding of the contract, where the contract names them all; the sign of 0 is free."""
        ...

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        """Results of plausible mistakes, each of which a check must refuse."""
        ...

    def flops(self) -> int:
        """Additions and multiplications of a linear layer; 0 for what is reported per element of x."""
        ...

    def moved_bytes(self) -> int:
        """Operands and result, each once."""
        ...


def seeded(case: Case, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{case.op} {case}".encode())])


@dataclass(frozen=True)
class Expected:
    """What the contract says of one case and its operands."""

    what: str
    truth: F64
    bound: F64
    bits: F32 | None

    def check(self, result: NDArray[np.floating]) -> None:
        """Raises AssertionError unless result is within bound of truth, and equals bits where those are prescribed."""
        self._refuse(~(np.abs(result - self.truth) <= self.bound), result)
        if self.bits is not None:
            self._refuse(self.bits != result, result)

    def _refuse(self, off: NDArray[np.bool_], result: NDArray[np.floating]) -> None:
        if off.any():
            at = tuple(map(int, np.argwhere(off)[0]))
            exactly = "" if self.bits is None else f", by the contract exactly {self.bits[at]!r}"
            raise AssertionError(
                f"{self.what}: {off.sum()} of {off.size} elements are off; {list(at)}: "
                f"expected {self.truth[at]!r} +- {self.bound[at]:.3g}{exactly}, got {result[at]!r}"
            )


def expect(case: Case, operands: Operands) -> Expected:
    return Expected(f"{case.op} {case}", case.truth(operands), case.bound(operands), case.bits(operands))


# ---- float32 arithmetic as the contracts write it ----


def fma(a: F32, b: F32, c: F32) -> F32:
    """a * b + c rounded once.

    The product of two float32 is exact in float64. The sum is rounded to odd (its last bit records that something was
    cut off), after which rounding to float32 is right: Boldo & Melquiond, IEEE Trans. Comput. 57(4), 2008.
    """
    with np.errstate(all="ignore"):
        p, c64 = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
        s = np.asarray(p + c64)
        t = s - p
        lost = (p - (s - t)) + (c64 - t)  # Knuth's two-sum: s + lost is exact
        even = s.view(np.int64) & 1 == 0
        toward = np.where(lost > 0, np.inf, -np.inf)
        odd = np.where(np.isfinite(s) & (lost != 0) & even, np.nextafter(s, toward), s)
        return odd.astype(np.float32)


def lane_sum(x: F32, add: Callable[[F32, F32], F32]) -> F32:
    """The row reduction of kernels.h: 16 lanes, each in ascending order by add(lanes, values), then a tree."""
    rows, n = x.shape
    vectors = np.zeros((rows, -(-n // 16) * 16), np.float32)
    vectors[:, :n] = x
    lanes = np.zeros((rows, 16), np.float32)
    for j in range(0, vectors.shape[1], 16):
        lanes = add(lanes, vectors[:, j : j + 16])
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


# ---- activations ----


def _gelu(x: F64) -> F64:
    """x Phi(x) = x erfc(-x / sqrt 2) / 2; near 0 the Taylor series, whose next term is below 2^-65 of the result."""
    near = np.abs(x) < 2.0**-13
    phi = 0.5 + x * (1 - x * x / 6) / math.sqrt(2 * math.pi)
    far = ~near & np.isfinite(x)
    z = x[far] * -math.sqrt(0.5)
    phi[far] = 0.5 * np.fromiter(map(math.erfc, z.tolist()), np.float64, z.size)
    return x * np.where(np.isposinf(x), 1.0, phi)


def _gelu_tanh(x: F64) -> F64:
    """x (1 + tanh z) / 2 = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: F64) -> F64:
    return x / (1 + np.exp(-x))


@dataclass(frozen=True)
class Activation:
    """An activation and its error: at most EXP * (near * min(|x|, 8) + relative * |act(x)|) + held + absolute.

    x g(x) with g in [0, 1] as exact as exp: near = 1 where g is a difference that cancels for negative x (beyond -8 it
    is 0), relative = 1 for the value itself, 1 more for a quotient. held: exp and its argument stop near 88. absolute:
    of an approximation.
    """

    exact: Callable[[F64], F64]
    slope: float  # largest |derivative|
    near: float = 0.0
    relative: float = 0.0
    held: float = 0.0
    absolute: float = 0.0

    def bound(self, x: F64) -> F64:
        with np.errstate(all="ignore"):
            factor = self.near * np.minimum(np.abs(x), 8) + self.relative * np.abs(self.exact(x))
            return EXP * factor + self.held + self.absolute + TINY


ACTIVATIONS = {
    "none": Activation(lambda x: x, 1.0),
    "gelu": Activation(_gelu, 1.13, near=1, relative=1),
    "gelu_tanh": Activation(_gelu_tanh, 1.13, near=1, relative=1, held=HELD_AT * HELD),
    "relu": Activation(lambda x: np.maximum(x, 0), 1.0),
    "silu": Activation(_silu, 1.1, relative=2, held=HELD_AT * HELD),
    "tanh": Activation(np.tanh, 1.0, relative=1),
}

# Those of gemm_s8, whose results are quantised next.
ACTIVATIONS_S8 = ACTIVATIONS | {
    "gelu": Activation(_gelu, 1.13, relative=1, absolute=2.6e-5),
    "gelu_tanh": Activation(_gelu_tanh, 1.13, relative=1, absolute=2.2e-5),
    "silu": Activation(_silu, 1.1, relative=1, absolute=1.03e-4),
}


def gate4(q: Sequence[float], x: F32) -> F32:
    """An activation of gemm_s8 with every rounding of the contract."""
    a, (r, *lower) = np.abs(x), np.array(q, np.float32)[::-1]
    for c in lower:
        r = fma(r, a, c)
    r = np.maximum(r, np.float32(0))
    return fma(-a, (r * r) * (r * r), np.maximum(x, np.float32(0)))


# ---- the ops ----


def signed(rng: np.random.Generator, *shape: int) -> F32:
    """No element is small, so that no product of two may be missed."""
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


@dataclass(frozen=True)
class Linear(ABC):
    """out [m][n] = residual + act(sums + bias): what the linear layers share. W is packed; columns of it may be cut."""

    op: ClassVar[str]
    activations: ClassVar[Mapping[str, Activation]] = ACTIVATIONS
    m: int
    n: int
    k: int
    act: str = "none"
    bias: bool = False
    residual: bool = False

    def __str__(self) -> str:
        fused = [self.act] * (self.act != "none") + ["bias"] * self.bias + ["residual"] * self.residual
        return "-".join([f"m{self.m}n{self.n}k{self.k}", *fused])

    @abstractmethod
    def factors(self, rng: np.random.Generator) -> Operands:
        """Operands whose sums have about unit variance."""

    @abstractmethod
    def packed_bytes(self, kernels: KernelSet, n: int) -> int: ...

    @abstractmethod
    def pack(self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8]) -> None: ...

    @abstractmethod
    def multiply(
        self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8], out: F32, repeat: int = 1
    ) -> None: ...

    @abstractmethod
    def sums(self, operands: Operands) -> F64:
        """Without the bias, in float64."""

    @abstractmethod
    def sum_bound(self, operands: Operands) -> F64:
        """The largest error of a sum with its bias."""

    @abstractmethod
    def sum_bits(self, operands: Operands) -> F32:
        """A sum with its bias and every rounding of the contract."""

    @abstractmethod
    def wrong_sums(self, operands: Operands) -> Iterator[tuple[str, Operands]]:
        """Operands that give the sums of plausible mistakes; k > 0."""

    def operands(self, rng: np.random.Generator) -> Operands:
        operands = self.factors(rng)
        if self.bias:
            operands["bias"] = signed(rng, self.n)
        if self.residual:
            operands["residual"] = signed(rng, self.m, self.n)
        return operands

    def out_shape(self) -> tuple[int, int]:
        return self.m, self.n

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        packed = place("packed", np.zeros(self.packed_bytes(kernels, self.n), np.uint8))
        self.pack(kernels, operands, packed)
        return lambda repeat: self.multiply(kernels, operands, packed, out, repeat)

    def truth(self, operands: Operands) -> F64:
        with np.errstate(all="ignore"):
            sums = self.sums(operands) + operands.get("bias", 0.0)
            return self.activations[self.act].exact(sums) + operands.get("residual", 0.0)

    def bound(self, operands: Operands) -> F64:
        """The sum and the bias; through the activation; the addition of the residual."""
        act, sums = self.activations[self.act], self.sums(operands) + operands.get("bias", 0.0)
        return act.slope * self.sum_bound(operands) + act.bound(sums) + U * np.abs(self.truth(operands)) * self.residual

    def act_bits(self, x: F32) -> F32 | None:
        """act(x), where the contract names every rounding."""
        return x if self.act == "none" else np.maximum(x, np.float32(0)) if self.act == "relu" else None

    def bits(self, operands: Operands) -> F32 | None:
        with np.errstate(all="ignore"):
            result = self.act_bits(self.sum_bits(operands))
            return None if result is None else result + operands.get("residual", np.float32(0))

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        if self.m * self.n == 0:
            return
        if self.act == "none":
            if self.k:
                for mistake, mistaken in self.wrong_sums(operands):
                    yield mistake, self.truth(mistaken)
            for name in ("bias", "residual"):
                if name in operands:
                    yield f"{name} left out", self.truth({key: x for key, x in operands.items() if key != name})
            if self.n > 1 and self.k + self.bias + self.residual:
                yield "columns in the wrong order", self.truth(operands)[:, ::-1]
        elif self.k and self.m * self.n >= 64:
            yield "activation left out", replace(self, act="none").truth(operands)

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def moved_bytes(self) -> int:
        factors = self.factors(np.random.default_rng(0)).values()
        return sum(x.nbytes for x in factors) + 4 * (self.m * self.n * (1 + self.residual) + self.n * self.bias)


@dataclass(frozen=True)
class GemmF32(Linear):
    """sums = a [m][k] * w [n][k]^T."""

    op: ClassVar[str] = "gemm_f32"

    def factors(self, rng: np.random.Generator) -> Operands:
        return {
            "a": signed(rng, self.m, self.k),
            "w": signed(rng, self.n, self.k) / np.float32(math.sqrt(max(self.k, 1))),
        }

    def packed_bytes(self, kernels: KernelSet, n: int) -> int:
        return kernels.packed_bytes(n, self.k)

    def pack(self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8]) -> None:
        kernels.pack(operands["w"], packed)

    def multiply(
        self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8], out: F32, repeat: int = 1
    ) -> None:
        fused = operands.get("bias"), self.act, operands.get("residual")
        kernels.gemm_f32(operands["a"], packed, out, *fused, repeat)

    def sums(self, operands: Operands) -> F64:
        return operands["a"].astype(np.float64) @ operands["w"].T.astype(np.float64)

    def sum_bound(self, operands: Operands) -> F64:
        """A chain, the sum of the blocks and the bias."""
        magnitude = np.abs(operands["a"]).astype(np.float64) @ np.abs(operands["w"]).T.astype(np.float64)
        magnitude += np.abs(operands.get("bias", 0.0))
        return (min(self.k, CHAIN) + -(-self.k // CHAIN) + 2) * (U * magnitude + TINY)

    def sum_bits(self, operands: Operands) -> F32:
        a, w = operands["a"], operands["w"]
        total = np.zeros(self.out_shape(), np.float32)
        for begin in range(0, self.k, CHAIN):
            block = np.zeros_like(total)
            for p in range(begin, min(begin + CHAIN, self.k)):
                block = fma(a[:, p, None], w[None, :, p], block)
            total = total + block if begin else block
        return total + operands.get("bias", np.float32(0))

    def wrong_sums(self, operands: Operands) -> Iterator[tuple[str, Operands]]:
        yield "last product left out", {**operands, "a": operands["a"] * (np.arange(self.k) < self.k - 1)}


@dataclass(frozen=True)
class GemmSplit(GemmF32):
    """The same sums on bfloat16: six products of the three parts of a and w."""

    op: ClassVar[str] = "gemm_split"
    PAIRS: ClassVar = (
        (0, 2),
        (0, 1),
        (1, 1),
        (1, 0),
        (2, 0),
        (0, 0),
    )  # parts of a and of w; the last in a pass of its own

    def packed_bytes(self, kernels: KernelSet, n: int) -> int:
        return kernels.packed_bytes_split(n, self.k)

    def pack(self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8]) -> None:
        kernels.pack_split(operands["w"], packed)

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        packed = place("packed", np.zeros(self.packed_bytes(kernels, self.n), np.uint8))
        scratch = place("scratch", np.full(SPLIT_SCRATCH, 0xFF, np.uint8))
        self.pack(kernels, operands, packed)
        fused = operands.get("bias"), self.act, operands.get("residual")
        return lambda repeat: kernels.gemm_split(operands["a"], packed, out, scratch, *fused, repeat)

    def multiply(
        self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8], out: F32, repeat: int = 1
    ) -> None:
        scratch = aligned("scratch", np.full(SPLIT_SCRATCH, 0xFF, np.uint8))
        fused = operands.get("bias"), self.act, operands.get("residual")
        kernels.gemm_split(operands["a"], packed, out, scratch, *fused, repeat)

    def sum_bound(self, operands: Operands) -> F64:
        """The chains of 16, their sum, the tiles of a panel, the panels, the bias; what is below 2^-126 is lost: of a
        factor two parts, and each of 14 results for a step of k. The products left out are the 1 of 3."""
        a, w = np.abs(operands["a"]).astype(np.float64), np.abs(operands["w"]).T.astype(np.float64)
        magnitude = a @ w + np.abs(operands.get("bias", 0.0))
        roundings = 16 + 1 + min(self.k, SPLIT_PANEL) / 32 + self.k / SPLIT_PANEL + 3
        lost = 2.0**-124 * (a.sum(axis=1, keepdims=True) + w.sum(axis=0)) + 14 * self.k * 2.0**-126
        return roundings * U * magnitude + lost + TINY

    @staticmethod
    def parts(x: F32) -> list[F32]:
        """Three bfloat16 that add up to x, ties away from 0."""
        found = []
        for _ in range(3):
            rounded = ((x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
            found.append(rounded)
            x = x - rounded
        return found

    def sum_bits(self, operands: Operands) -> F32:
        """The product of two bfloat16 is exact in float32, so that a sum with it is an fma."""

        def flushed(x: F32) -> F32:
            return np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)

        def blocks(x: F32) -> list[F32]:  # [blocks][2][16][rows], of each part
            padded = np.zeros((len(x), -(-self.k // 32) * 32), np.float32)
            padded[:, : self.k] = x
            shape = padded.shape[1] // 32, 2, 16, len(x)
            return [flushed(part).T.reshape(shape) for part in self.parts(padded)]

        a, w = blocks(operands["a"]), blocks(operands["w"])
        total, per_panel = np.zeros(self.out_shape(), np.float32), SPLIT_PANEL // 32
        for begin in range(0, len(a[0]), per_panel):
            terms = []
            for of_a, of_w in self.PAIRS:
                x, y = a[of_a][begin : begin + per_panel], w[of_w][begin : begin + per_panel]
                chains = np.zeros((*x.shape[:2], self.m, self.n), np.float32)
                for p in range(16):
                    chains = flushed(chains + x[:, :, p, :, None] * y[:, :, p, None, :])
                terms.append(flushed(chains[:, 0] + chains[:, 1]))
            panel = np.zeros_like(total)
            for term in (*(of_pair[i] for i in range(len(terms[0])) for of_pair in terms[:5]), *terms[5]):
                panel = flushed(panel + term)
            total = total + panel if begin else panel
        return total + operands.get("bias", np.float32(0))


@dataclass(frozen=True)
class GemmS8(Linear):
    """sums = (a [m][:k] - zero [m]) * w [n][k]^T * scale_a [m] * scale_w [n]; a is u8 [m][k8(k)], w s8.

    extreme: every w is -127 or 127, every a and zero 0 or 255.
    large: so many of the bytes of a are near 255 and the others near 0, which kernel sets that multiply bytes in pairs
    have to take apart: far from their mean, and next to others that are.
    """

    op: ClassVar[str] = "gemm_s8"
    activations: ClassVar[Mapping[str, Activation]] = ACTIVATIONS_S8
    extreme: bool = False
    large: float | None = None

    def __str__(self) -> str:
        large = "" if self.large is None else f"-large{self.large}"
        return super().__str__() + "-extreme" * self.extreme + large

    def factors(self, rng: np.random.Generator) -> Operands:
        """No w or a - zero is small. What a holds beyond k is as large as any."""
        m, n, k = self.m, self.n, self.k
        if self.extreme:  # whole rows and columns of one sign, and mixed ones
            row, column = np.arange(m)[:, None], np.arange(n)[:, None]
            zero = np.where(np.arange(m) // 3 % 2, 0, 255)
            a = np.choose(row % 3, [0, 255, rng.choice([0, 255], (m, k8(k)))])
            w = np.choose(column % 3, [127, -127, rng.choice([-127, 127], (n, k))])
        else:
            zero = rng.integers(0, 256, m)
            a = (zero[:, None] + rng.integers(32, 225, (m, k8(k)))) % 256  # a - zero: +-32 .. +-224
            w = rng.integers(32, 128, (n, k)) * rng.choice([-1, 1], (n, k))
            a[:, k:] = rng.integers(1, 256, a[:, k:].shape)
        if self.large is not None:
            zero = np.full(m, 128)
            a = np.where(rng.random((m, k8(k))) < self.large, 255, 0)
            a ^= 0 if self.extreme else rng.integers(0, 32, a.shape)
        deviation = 100 * 80 * math.sqrt(max(k, 1))  # of a sum of integers, about
        return {
            "a": a.astype(np.uint8),
            "scale_a": rng.uniform(0.5, 1.5, m).astype(np.float32),
            "zero": zero.astype(np.int32),
            "w": w.astype(np.int8),
            "scale_w": (rng.uniform(0.5, 1.5, n) / deviation).astype(np.float32),
        }

    def packed_bytes(self, kernels: KernelSet, n: int) -> int:
        return kernels.packed_bytes_s8(n, self.k)

    def pack(self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8]) -> None:
        kernels.pack_s8(operands["w"], operands["scale_w"], packed)

    def multiply(
        self, kernels: KernelSet, operands: Operands, packed: NDArray[np.uint8], out: F32, repeat: int = 1
    ) -> None:
        a, scale_a, zero = operands["a"], operands["scale_a"], operands["zero"]
        fused = operands.get("bias"), self.act, operands.get("residual")
        kernels.gemm_s8(a, self.k, scale_a, zero, packed, out, *fused, repeat)

    def _exact(self, operands: Operands) -> NDArray[np.int64]:
        """The sums of integers. Products and sums in float64 are exact: all are below 2^53."""
        a = operands["a"][:, : self.k].astype(np.float64) - operands["zero"][:, None]
        return (a @ operands["w"].T.astype(np.float64)).astype(np.int64)

    def sums(self, operands: Operands) -> F64:
        return self._exact(operands) * operands["scale_a"][:, None].astype(np.float64) * operands["scale_w"]

    def sum_bound(self, operands: Operands) -> F64:
        """The conversion of the integer, the product of the scales, the fma."""
        return 3 * (U * (np.abs(self.sums(operands)) + np.abs(operands.get("bias", 0.0))) + TINY)

    def sum_bits(self, operands: Operands) -> F32:
        scale = operands["scale_a"][:, None] * operands["scale_w"]
        return fma(self._exact(operands).astype(np.float32), scale, operands.get("bias", np.float32(0)))

    def act_bits(self, x: F32) -> F32 | None:
        return gate4(GATES[self.act], x) if self.act in GATES else super().act_bits(x)

    def wrong_sums(self, operands: Operands) -> Iterator[tuple[str, Operands]]:
        a, zero = operands["a"].copy(), operands["zero"]
        a[:, self.k - 1] = zero
        yield "last product left out", {**operands, "a": a}
        if zero.any():
            yield "zero points left out", {**operands, "zero": np.zeros_like(zero)}
        yield "weights' scales left out", {**operands, "scale_w": np.ones_like(operands["scale_w"])}


@dataclass(frozen=True)
class SoftmaxF32:
    """Rows of x [rows][n] become softmax(scale * x)."""

    op: ClassVar[str] = "softmax_f32"
    rows: int
    n: int
    scale: float = 0.125

    def __str__(self) -> str:
        return f"rows{self.rows}n{self.n}scale{self.scale:.3g}"

    def operands(self, rng: np.random.Generator) -> Operands:
        return {"x": (8 * rng.standard_normal((self.rows, self.n))).astype(np.float32)}

    def out_shape(self) -> tuple[int, int]:
        return self.rows, self.n

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        out[...] = operands["x"]
        return lambda repeat: kernels.softmax_f32(out, self.scale, repeat)

    def _exponents(self, x: F32) -> F64:
        scaled = x.astype(np.float64) * float(np.float32(self.scale))
        return scaled - scaled.max(axis=1, keepdims=True)

    def truth(self, operands: Operands) -> F64:
        e = np.exp(self._exponents(operands["x"]))
        return e / e.sum(axis=1, keepdims=True)

    def bound(self, operands: Operands) -> F64:
        """To first order. Rounding max * scale shifts every exponent alike and cancels; each exponent t then has one
        rounding (U |t|), exp its own; the error of the sum is the mean error of its terms, weighted by themselves, and
        one U for each addition to a lane and each level of the tree; 1 / sum and the product add one each."""
        t, y = np.abs(self._exponents(operands["x"])), self.truth(operands)
        # |t| differs from the kernel's by at most half a unit in the last place of max * scale
        shift = U * np.abs(operands["x"]).max(axis=1, keepdims=True) * self.scale
        term = U * (np.minimum(t, HELD_AT) + shift) + EXP
        total = (y * term).sum(axis=1, keepdims=True) + U * (-(-self.n // 16) + 4)
        return y * (term + total + 2 * U) + HELD + TINY

    def bits(self, operands: Operands) -> None:
        return None  # exp may be any function within EXP

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        if self.rows and self.n > 1:
            e = np.exp(self._exponents(operands["x"]))
            yield "largest element left out of the sum", e / (e.sum(axis=1, keepdims=True) - 1)
            if self.scale != 1:
                yield "scale left out", replace(self, scale=1.0).truth(operands)

    def flops(self) -> int:
        return 0  # reported per element

    def moved_bytes(self) -> int:
        return 8 * self.rows * self.n


@dataclass(frozen=True)
class SoftmaxU8:
    """out [rows][k8(n) + 1] = q, scale of x [rows][n]: copies of what the kernel writes, in float32.

    truth is e = 255 exp(x - max(x)) and 1 / its sum; what scale must be to the last bit, q tells.
    """

    op: ClassVar[str] = "softmax_u8"
    rows: int
    n: int

    ROUNDED: ClassVar[float] = 0.5124  # kernels.h

    def __str__(self) -> str:
        return f"rows{self.rows}n{self.n}"

    def operands(self, rng: np.random.Generator) -> Operands:
        """A row of several bytes of each size: sharp rows, flat ones and ones in between in turn."""
        spread = np.array([3.0, 1.0, 0.2])[np.arange(self.rows) % 3, None]
        return {"x": (spread * rng.standard_normal((self.rows, self.n))).astype(np.float32)}

    def out_shape(self) -> tuple[int, int]:
        return self.rows, k8(self.n) + 1

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        q = place("q", np.full((self.rows, k8(self.n)), 255, np.uint8))
        scale = place("scale", np.full(self.rows, -1, np.float32))

        def run(repeat: int) -> None:
            kernels.softmax_u8(operands["x"], q, scale, repeat)
            out[:, :-1], out[:, -1] = q, scale

        return run

    def _truth(self, x: F32, most: F64) -> F64:
        out = np.zeros(self.out_shape())
        out[:, : self.n] = 255 * np.exp(x.astype(np.float64) - most)
        out[:, -1] = 1 / out.sum(axis=1)
        return out

    def truth(self, operands: Operands) -> F64:
        return self._truth(operands["x"], operands["x"].max(axis=1, keepdims=True).astype(np.float64))

    def bound(self, operands: Operands) -> F64:
        """One rounding of x - max, which exp multiplies; the bound of the contract. The sum has that of its terms."""
        out, x = self.truth(operands), operands["x"].astype(np.float64)
        scale = out[:, -1]
        difference = U * (x.max(axis=1, keepdims=True) - x)
        off = np.zeros(self.out_shape())
        off[:, : self.n] = self.ROUNDED + out[:, : self.n] * difference
        total = off.sum(axis=1)
        off[:, -1] = scale * (scale * total / np.maximum(1 - scale * total, 1e-9) + 2 * U)
        return off

    def bits(self, operands: Operands) -> None:
        return None  # exp may be any function within its bound

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        if self.rows == 0:
            return
        truth = self.truth(operands)
        if self.n > 1:
            yield "largest element not taken off", self._truth(operands["x"], np.zeros((self.rows, 1)))
            yield "elements in the wrong order", np.hstack([truth[:, self.n - 1 :: -1], truth[:, self.n :]])
        if self.n % 64:
            padded = truth.copy()
            padded[:, self.n : -1] = 1
            yield "bytes from n on not cleared", padded
        yield "256 steps", truth * np.where(np.arange(truth.shape[1]) == truth.shape[1] - 1, 255 / 256, 256 / 255)

    def flops(self) -> int:
        return 0

    def moved_bytes(self) -> int:
        return self.rows * (4 * self.n + k8(self.n) + 4)


@dataclass(frozen=True)
class LayerNormF32:
    """out [rows][n] = (x - mean) / sqrt(var + eps) * gamma + beta; inplace: out is x."""

    op: ClassVar[str] = "layernorm_f32"
    rows: int
    n: int
    eps: float = 1e-12
    inplace: bool = False

    def __str__(self) -> str:
        return f"rows{self.rows}n{self.n}eps{self.eps:.3g}" + "-inplace" * self.inplace

    def operands(self, rng: np.random.Generator) -> Operands:
        x = rng.standard_normal((self.rows, self.n)) * 2 + rng.uniform(-1, 1, (self.rows, 1))
        gamma, beta = rng.uniform(0.5, 1.5, self.n), rng.uniform(1, 2, self.n)
        return {"x": x.astype(np.float32), "gamma": gamma.astype(np.float32), "beta": beta.astype(np.float32)}

    def out_shape(self) -> tuple[int, int]:
        return self.rows, self.n

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        x = operands["x"]
        if self.inplace:
            out[...] = x
            x = out
        return lambda repeat: kernels.layernorm_f32(x, operands["gamma"], operands["beta"], self.eps, out, repeat)

    def _moments(self, x: F32) -> tuple[F64, F64]:
        x64 = x.astype(np.float64)
        d = x64 - x64.mean(axis=1, keepdims=True)
        return d, (d * d).mean(axis=1, keepdims=True) + float(np.float32(self.eps))

    def truth(self, operands: Operands) -> F64:
        d, var = self._moments(operands["x"])
        return d / np.sqrt(var) * operands["gamma"].astype(np.float64) + operands["beta"]

    def bound(self, operands: Operands) -> F64:
        """To first order: the mean (additions to a lane, 4 levels, the quotient), then d, var, 1 / sqrt and the fma.
        An error of the mean shifts all d alike: it enters var by its square, and by the d it is multiplied with."""
        x = np.abs(operands["x"].astype(np.float64))
        (d, var), gamma = self._moments(operands["x"]), np.abs(operands["gamma"].astype(np.float64))
        additions = -(-self.n // 16) + 4
        mean_error = U * (additions + 1) * x.mean(axis=1, keepdims=True) + TINY
        d_error = mean_error + U * np.abs(d)
        var_error = U * (additions + 4) + (2 * mean_error * np.abs(d).mean(axis=1, keepdims=True) + mean_error**2) / var
        rstd = (1 + var_error) / np.sqrt(var)
        product = gamma * rstd * (d_error + (np.abs(d) + d_error) * (var_error / 2 + 4 * U))
        return product + U * np.abs(self.truth(operands)) + 2 * TINY

    def bits(self, operands: Operands) -> F32:
        with np.errstate(all="ignore"):
            x, n = operands["x"], np.float32(self.n)
            mean = lane_sum(x, lambda lanes, v: lanes + v) / n
            d = x - mean
            var = lane_sum(d, lambda lanes, v: fma(v, v, lanes)) / n
            rstd = np.float32(1) / np.sqrt(var + np.float32(self.eps))
            return fma(d * rstd, operands["gamma"], operands["beta"])

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        if self.rows == 0:
            return
        yield "beta left out", self.truth({**operands, "beta": np.zeros_like(operands["beta"])})
        if self.n > 1:
            d, var = self._moments(operands["x"])
            yield "variance over n - 1", d / np.sqrt(var * self.n / (self.n - 1)) * operands["gamma"] + operands["beta"]
            yield "gamma left out", self.truth({**operands, "gamma": np.ones_like(operands["gamma"])})

    def flops(self) -> int:
        return 0  # reported per element

    def moved_bytes(self) -> int:
        return 4 * (2 * self.rows * self.n + 2 * self.n)


@dataclass(frozen=True)
class MixF32:
    """out [rows][n] = M x; inplace: out is x.

    M is the Kronecker product of 8-lane identity, Hadamard matrix and reflection: truth and bound are made from that
    matrix, bits from the order of additions.
    """

    op: ClassVar[str] = "mix_f32"
    rows: int
    n: int
    inplace: bool = False

    def __str__(self) -> str:
        return f"rows{self.rows}n{self.n}" + "-inplace" * self.inplace

    def operands(self, rng: np.random.Generator) -> Operands:
        return {"x": rng.standard_normal((self.rows, self.n)).astype(np.float32)}

    def out_shape(self) -> tuple[int, int]:
        return self.rows, self.n

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        x = operands["x"]
        if self.inplace:
            out[...] = x
            x = out
        return lambda repeat: kernels.mix_f32(x, out, repeat)

    def sizes(self) -> tuple[int, int, bool]:
        """Lanes of an octet, octets of a butterfly, whether three runs of that are reflected; (1, 1, False): M = I."""
        octets = self.n // 8
        if octets == 0 or self.n % 16:
            return 1, 1, False
        butterfly = min(octets & -octets, 128)
        return 8, butterfly, octets % (3 * butterfly) == 0

    def matrix(self) -> F64:
        """What M does to octets of lanes [n / lanes][n / lanes]."""
        lanes, butterfly, threes = self.sizes()
        m = np.ones((1, 1))
        while len(m) < butterfly:
            m = np.kron([[1, 1], [1, -1]], m)
        if threes:
            m = np.kron(np.eye(3) - 2 / 3, m)
        return np.kron(np.eye(self.n // lanes // len(m)), m)

    def mixed(self, m: F64, x: NDArray[np.floating]) -> F64:
        """m applied to the octets of each row."""
        return (m @ x.astype(np.float64).reshape(self.rows, len(m), self.sizes()[0])).reshape(self.out_shape())

    def truth(self, operands: Operands) -> F64:
        return self.mixed(self.matrix(), operands["x"])

    def bound(self, operands: Operands) -> F64:
        """One rounding for each stage of the butterfly. In the reflection m has four, of up to twice what the matrix of
        absolute values gives (factors 2 / 3 for 1 / 3), and the difference has one. One more for the second order."""
        _, butterfly, threes = self.sizes()
        roundings = math.log2(butterfly) + (4 * 2 + 1) * threes + 1
        return roundings * (U * self.mixed(np.abs(self.matrix()), np.abs(operands["x"])) + TINY)

    def bits(self, operands: Operands) -> F32:
        lanes, butterfly, threes = self.sizes()
        x, half = operands["x"], 1
        with np.errstate(all="ignore"):
            while half < butterfly:
                a, b = np.moveaxis(x.reshape(self.rows, self.n // (2 * half * lanes), 2, half * lanes), 2, 0)
                x, half = np.stack([a + b, a - b], axis=2), 2 * half
            if threes:
                run = butterfly * lanes
                a, b, c = np.moveaxis(x.reshape(self.rows, self.n // (3 * run), 3, run), 2, 0)
                m = ((a + b) + c) * (np.float32(2) / np.float32(3))
                x = np.stack([a - m, b - m, c - m], axis=2)
        return x.reshape(self.out_shape())

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        lanes, butterfly, threes = self.sizes()
        if self.rows == 0:
            return
        truth, x = self.truth(operands), operands["x"].astype(np.float64)
        if butterfly > 1 or threes:
            yield "not mixed", x
            yield "lanes in the wrong order", np.roll(truth, 1, axis=1)
        if butterfly > 1:
            yield "scaled to length 1", truth / math.sqrt(butterfly)
        if threes:
            run = butterfly * lanes
            groups = truth.reshape(self.rows, self.n // (3 * run), 3, run)
            yield "not reflected", (groups - groups.sum(axis=2, keepdims=True) * (2 / 3)).reshape(x.shape)

    def flops(self) -> int:
        return 0

    def moved_bytes(self) -> int:
        return 8 * self.rows * self.n


@dataclass(frozen=True)
class QuantizeU8:
    """out [rows][k8(k) + 2] = q, zero, scale of x [rows][k]: copies of what the kernel writes, in float32.

    truth is q and zero before rounding; bits are exact.
    """

    op: ClassVar[str] = "quantize_u8"
    rows: int
    k: int

    def __str__(self) -> str:
        return f"rows{self.rows}k{self.k}"

    def operands(self, rng: np.random.Generator) -> Operands:
        """Rows of positive, mixed and negative elements in turn."""
        x = rng.uniform(1, 5, (self.rows, self.k)) - 3 * (np.arange(self.rows) % 3)[:, None]
        return {"x": x.astype(np.float32)}

    def out_shape(self) -> tuple[int, int]:
        return self.rows, k8(self.k) + 2

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        q = place("q", np.full((self.rows, k8(self.k)), 255, np.uint8))
        zero = place("zero", np.full(self.rows, -1, np.int32))
        scale = place("scale", np.full(self.rows, -1, np.float32))

        def run(repeat: int) -> None:
            kernels.quantize_u8(operands["x"], q, scale, zero, repeat)
            out[:, :-2], out[:, -2], out[:, -1] = q, zero, scale

        return run

    def _out(self, q: NDArray[Any], zero: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
        out = np.zeros(self.out_shape(), scale.dtype)
        out[:, : self.k], out[:, -2], out[:, -1] = q, zero, scale
        return out

    def _truth(self, x: F64, high: F64, low: F64) -> F64:
        with np.errstate(all="ignore"):
            scale = (high - low) / 255
            inverse = np.where(scale > 0, 1 / scale, 0.0)
            return self._out(np.clip(x * inverse[:, None] + (-low * inverse)[:, None], 0, 255), -low * inverse, scale)

    def truth(self, operands: Operands) -> F64:
        x = operands["x"].astype(np.float64)
        return self._truth(x, x.max(axis=1, initial=0), x.min(axis=1, initial=0))

    def bound(self, operands: Operands) -> F64:
        """scale: two quotients, of one sign, and their difference. The inverse and the product with it are one more
        each, of values up to 255; then zero is rounded to an integer, and so is the other term of q."""
        off = np.full(self.rows, 255 * 5 * U)
        scale = self.truth(operands)[:, -1]
        return self._out(1 + np.repeat(off[:, None], self.k, axis=1), 0.5 + off, 2 * U * scale + 2 * TINY)

    def bits(self, operands: Operands) -> F32:
        x = operands["x"]
        with np.errstate(all="ignore"):
            high = np.fmax.reduce(x, axis=1, initial=np.float32(0))
            low = np.fmin.reduce(x, axis=1, initial=np.float32(0))
            scale = high / np.float32(255) - low / np.float32(255)
            finite = np.isfinite(x).all(axis=1)
            used = finite & (scale >= np.float32(2.0**-120))
            inverse = np.where(used, np.float32(1) / scale, np.float32(0))
            zero = np.where(used, np.rint(-low * inverse), np.float32(0))
            q = np.clip(np.rint(x * inverse[:, None]) + zero[:, None], 0, 255)
            q = np.where(used[:, None], q, np.float32(0))
            held = np.where(used, scale, np.float32(0))
            return self._out(q, zero, np.where(finite, held, np.float32(np.nan)))

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        if self.rows * self.k == 0:
            return
        x, truth = operands["x"].astype(np.float64), self.truth(operands)
        yield "range without 0", self._truth(x, x.max(axis=1), x.min(axis=1))
        yield "256 steps", truth * np.where(np.arange(truth.shape[1]) == truth.shape[1] - 1, 255 / 256, 1)
        padded = truth.copy()
        padded[:, self.k : -2] = 255
        if self.k % 64:
            yield "bytes from k on not cleared", padded

    def flops(self) -> int:
        return 0

    def moved_bytes(self) -> int:
        return self.rows * (4 * self.k + k8(self.k) + 8)


@dataclass(frozen=True)
class MixQuantizeU8:
    """out [rows][k + k8(k) + 2] = y, q, zero, scale of x [rows][k]; inplace: y is x. The bits of the two ops."""

    op: ClassVar[str] = "mix_quantize_u8"
    rows: int
    k: int
    inplace: bool = False

    def __str__(self) -> str:
        return f"rows{self.rows}k{self.k}" + "-inplace" * self.inplace

    def ops(self) -> tuple[MixF32, QuantizeU8]:
        return MixF32(self.rows, self.k), QuantizeU8(self.rows, self.k)

    def operands(self, rng: np.random.Generator) -> Operands:
        return self.ops()[1].operands(rng)

    def out_shape(self) -> tuple[int, int]:
        return self.rows, self.k + k8(self.k) + 2

    def bind(self, kernels: KernelSet, operands: Operands, out: F32, place: Place = aligned) -> Callable[[int], None]:
        x = operands["x"]
        q = place("q", np.full((self.rows, k8(self.k)), 255, np.uint8))
        zero = place("zero", np.full(self.rows, -1, np.int32))
        scale = place("scale", np.full(self.rows, -1, np.float32))
        y = out[:, : self.k]
        if self.inplace:
            y[...] = x
            x = y

        def run(repeat: int) -> None:
            kernels.mix_quantize_u8(x, y, q, scale, zero, repeat)
            out[:, self.k : -2], out[:, -2], out[:, -1] = q, zero, scale

        return run

    def truth(self, operands: Operands) -> F64:
        return self.bits(operands).astype(np.float64)

    def bound(self, operands: Operands) -> F64:
        return U * np.abs(self.truth(operands)) + TINY

    def bits(self, operands: Operands) -> F32:
        mix, quantize = self.ops()
        y = mix.bits(operands)
        return np.hstack([y, quantize.bits({"x": y})])

    def wrong(self, operands: Operands) -> Iterator[tuple[str, F64]]:
        if self.rows and self.k > 1:
            swapped = operands["x"][:, ::-1]
            yield "lanes in the wrong order", self.bits({"x": swapped}).astype(np.float64)

    def flops(self) -> int:
        return 0

    def moved_bytes(self) -> int:
        return self.rows * (8 * self.k + k8(self.k) + 8)


OPS: dict[str, type[Case]] = {
    op.op: op
    for op in (GemmF32, GemmSplit, GemmS8, SoftmaxF32, SoftmaxU8, LayerNormF32, MixF32, QuantizeU8, MixQuantizeU8)
}

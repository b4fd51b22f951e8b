"""The kernel set amx on any CPU with AVX-512: its source over a model of the tile instructions (amx_emulated.c).

The model does in plain C what the instructions do, and notes what would fault. Where a CPU has AMX, the tests of all
kernel sets (test_kernels.py) run it there as well. Also here: when cpu.c says that a CPU has AMX.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert._kernels import ACTS, KernelSet, k8, kernel_sets
from tests.cases import GemmS8, Linear, aligned, seeded
from tests.test_kernels import (
    EXTREMES,
    LAYOUTS,
    Memory,
    around,
    bits,
    case_id,
    fused,
    prepared,
    run,
    spoiled,
    unwritten,
)
from tests.toolchain import CSRC, ROOT, compile_c, compiler, isa_rows

# As CMakeLists.txt compiles the kernel sets; with a sanitizer where this process runs on one.
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno"]
SANITIZE = ["-fsanitize=address,undefined"] if "libasan" in os.environ.get("LD_PRELOAD", "") else []


def shared_library(folder: Path, *arguments: str | Path) -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("this machine has no C compiler")
    library = folder / "library.so"
    compiled = compile_c(*FLAGS, *SANITIZE, "-I", CSRC, *arguments, "-o", library)
    assert compiled.returncode == 0, compiled.stderr
    return ctypes.CDLL(str(library))


def rows_of(x: NDArray[Any] | None) -> tuple[int | None, int]:
    """Address and elements between rows; a matrix of one row has any distance."""
    if x is None:
        return None, 0
    return x.ctypes.data, (x.strides[0] // x.itemsize if len(x) > 1 else x.shape[1])


class EmulatedAmx(KernelSet):
    """The GEMMs of amx.c on the model, all else from the set below. A fault or a tile left in use is an error."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__("avx512")
        size, address = ctypes.c_ssize_t, ctypes.c_void_p
        library.amx_packed_bytes.argtypes = [size, size]
        library.amx_packed_bytes.restype = ctypes.c_size_t
        library.amx_pack.argtypes = [size, size, address, size, address, address]
        library.amx_pack.restype = None
        library.amx_run.argtypes = [size] * 3 + [address, size, address, address, address, address, ctypes.c_int]
        library.amx_run.argtypes += [address, size, address, size]
        library.amx_run.restype = None
        library.amx_split_packed_bytes.argtypes = [size, size]
        library.amx_split_packed_bytes.restype = ctypes.c_size_t
        library.amx_split_pack.argtypes = [size, size, address, size, size, address]
        library.amx_split_pack.restype = None
        library.amx_split_run.argtypes = [size] * 3 + [address, size, address, address, ctypes.c_int]
        library.amx_split_run.argtypes += [address, size, address, size, address]
        library.amx_split_run.restype = None
        library.amx_split_name.restype = ctypes.c_char_p
        library.amx_name.restype = library.emulated_fault.restype = ctypes.c_char_p
        library.emulated_multiplied_rows.restype = ctypes.c_int64
        self.library = library

    @property
    def gemm_s8_name(self) -> str:
        return self.library.amx_name().decode()

    def packed_bytes_s8(self, n: int, k: int) -> int:
        return self.library.amx_packed_bytes(n, k)

    def pack_s8(
        self, w: NDArray[np.int8], scale_w: NDArray[np.float32], packed: NDArray[np.uint8], repeat: int = 1
    ) -> None:
        self.library.amx_pack(*w.shape, *rows_of(w), scale_w.ctypes.data, packed.ctypes.data)

    def gemm_s8(
        self,
        a: NDArray[np.uint8],
        k: int,
        scale_a: NDArray[np.float32],
        zero: NDArray[np.int32],
        packed: NDArray[np.uint8],
        out: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
        act: str = "none",
        residual: NDArray[np.float32] | None = None,
        repeat: int = 1,
    ) -> None:
        (m, n), address = out.shape, packed.ctypes.data
        factors = *rows_of(a), scale_a.ctypes.data, zero.ctypes.data, address
        self.library.emulated_start()
        self.library.amx_run(
            m, n, k, *factors, None if bias is None else bias.ctypes.data, ACTS[act], *rows_of(residual), *rows_of(out)
        )
        assert self.library.emulated_fault() == b""
        assert not self.library.emulated_in_use(), "tiles are not released"

    @property
    def gemm_split_name(self) -> str:
        return self.library.amx_split_name().decode()

    def packed_bytes_split(self, n: int, k: int) -> int:
        return self.library.amx_split_packed_bytes(n, k)

    def pack_split(self, w: NDArray[np.float32], packed: NDArray[np.uint8], repeat: int = 1) -> None:
        strides = (stride // w.itemsize if size > 1 else 1 for size, stride in zip(w.shape, w.strides, strict=True))
        self.library.amx_split_pack(*w.shape, w.ctypes.data, *strides, packed.ctypes.data)

    def gemm_split(
        self,
        a: NDArray[np.float32],
        packed: NDArray[np.uint8],
        out: NDArray[np.float32],
        scratch: NDArray[np.uint8],
        bias: NDArray[np.float32] | None = None,
        act: str = "none",
        residual: NDArray[np.float32] | None = None,
        repeat: int = 1,
    ) -> None:
        (m, n), k = out.shape, a.shape[1]
        fused = None if bias is None else bias.ctypes.data, ACTS[act], *rows_of(residual)
        self.library.emulated_start()
        self.library.amx_split_run(m, n, k, *rows_of(a), packed.ctypes.data, *fused, *rows_of(out), scratch.ctypes.data)
        assert self.library.emulated_fault() == b""
        assert not self.library.emulated_in_use(), "tiles are not released"


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> EmulatedAmx:
    if not dict(kernel_sets()).get("avx512vnni"):
        pytest.skip("this CPU, or this build, has no avx512vnni, which amx needs besides its tiles")
    flags = next(row.flags for row in isa_rows() if row.name == "amx")
    vectors = [flag for flag in flags if not flag.startswith("-mamx")]
    return EmulatedAmx(shared_library(tmp_path_factory.mktemp("amx"), ROOT / "tests" / "amx_emulated.c", *vectors))


def cases() -> list[Linear]:
    shapes = [
        *((m, n, k) for m in range(1, 71) for n, k in [(33, 70), (70, 130)]),
        *((m, n, k) for n in range(1, 71) for m, k in [(7, 65), (37, 65)]),
        *((m, n, k) for k in range(201) for m, n in [(3, 70), (19, 35)]),
        *product(around(16, 32, 64), around(16, 32, 48, 64), (64, 129)),
        *((m, n, k) for m in (13, 40) for n, k in [(128, 512), (384, 384), (32, 3072)]),
        *((m, 100, 200) for m in (*around(96, 128), 160, 333)),  # groups of rows, and W fetched ahead
        *((m, 37, 70) for m in (*around(512), 1100)),  # more rows than tiles are set up for once
        (128, 16, 64), (128, 32, 0), (128, 33, 1), (0, 5, 5), (5, 0, 5), (0, 0, 0),
    ]  # fmt: skip
    sizes = [*((m, 70, k) for m in (13, 45) for k in (1, 3, 63, 64, 65, 768, 3072)), (16, 64, 32768), (17, 17, 32768)]
    extreme = [GemmS8(*size, extreme=True) for size in sizes]
    return [*fused(shapes, GemmS8), *extreme, GemmS8(45, 70, 3072, "gelu", True, True, extreme=True)]


every_case = pytest.mark.parametrize("case", cases(), ids=case_id)
every_fused_case = pytest.mark.parametrize(
    "case", [GemmS8(m, 70, 131, act, True, True) for act in ACTS for m in (13, 45)], ids=case_id
)


@every_case
def test_right(amx: EmulatedAmx, case: GemmS8, seed: int) -> None:
    operands, expected = prepared(case, seed)
    for name, layout in LAYOUTS.items():
        memory = Memory(layout)
        placed = {key: memory(key, x) for key, x in operands.items()}
        out = memory("out", unwritten(case))
        case.bind(amx, placed, out, memory)(1)
        expected.check(out)
        assert memory.written(operands) == [], f"{case}, {name}: written"


@every_case
def test_same_bits_as_the_scalar_set(amx: EmulatedAmx, case: GemmS8, seed: int) -> None:
    operands, _ = prepared(case, seed)
    assert bits(run(amx, case, operands)) == bits(run(KernelSet("scalar"), case, operands))


@pytest.mark.parametrize("extreme", EXTREMES)
@every_fused_case
def test_extreme_values(amx: EmulatedAmx, case: GemmS8, extreme: str, seed: int) -> None:
    rng = seeded(case, seed)
    operands = {
        name: spoiled(x, EXTREMES[extreme], rng) if x.dtype == np.float32 else x
        for name, x in case.operands(rng).items()
    }
    assert bits(run(amx, case, operands)) == bits(run(KernelSet("scalar"), case, operands))


@every_fused_case
def test_strips_of_columns(amx: EmulatedAmx, case: GemmS8, seed: int) -> None:
    """Threads that split the columns start at any strip."""
    operands, _ = prepared(case, seed)
    whole = run(amx, case, operands)
    packed = aligned("packed", np.zeros(case.packed_bytes(amx, case.n), np.uint8))
    case.pack(amx, operands, packed)
    for begin in range(0, case.n, 16):
        strips, columns = packed[case.packed_bytes(amx, begin) :], slice(begin, None)
        out = np.empty((case.m, case.n - begin), np.float32)
        cut = {"bias": operands["bias"][columns], "residual": operands["residual"][:, columns]}
        case.multiply(amx, operands | cut, strips, out)
        assert bits(out) == bits(whole[:, columns]), f"columns from {begin}"


@pytest.mark.parametrize("n, k", list(product((1, 16, 37), (0, 1, 63, 64, 130))))
def test_packs_as_scalar_does(amx: EmulatedAmx, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng([seed, n, k])
    w, scale = rng.integers(-127, 128, (n, k)).astype(np.int8), rng.random(n).astype(np.float32)
    packed = []
    for kernels in (amx, KernelSet("scalar")):
        packed.append(aligned("packed", np.full(kernels.packed_bytes_s8(n, k), 255, np.uint8)))
        kernels.pack_s8(w, scale, packed[-1])
    assert packed[0].tobytes() == packed[1].tobytes()


@pytest.mark.parametrize("m", [*range(9, 71), 96, 97, 128, 333])  # below, no tiles
def test_rows_are_not_padded(amx: EmulatedAmx, m: int, seed: int) -> None:
    """Products take as long as they have rows: all rows, and at most one twice for each block of 32 but the first."""
    case = GemmS8(m, 70, 130)
    run(amx, case, prepared(case, seed)[0])
    products = -(-case.n // 16) * k8(case.k) // 64
    assert 0 <= amx.library.emulated_multiplied_rows() - m * products < -(-m // 32) * products


def test_from_many_threads(amx: EmulatedAmx, seed: int) -> None:
    """Tiles belong to a thread: each call shapes its own."""
    jobs = [GemmS8(m, n, k, "none", True) for m, n, k in [(5, 70, 700), (20, 70, 700), (70, 70, 700), (16, 16, 64)]]
    operands = [prepared(case, seed)[0] for case in jobs]

    def job(at: int) -> bytes:
        return bits(run(amx, jobs[at % 4], operands[at % 4]))

    alone = [job(at) for at in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, range(40))) == alone * 10


# ---- which CPU and OS have it ----

# A CPU as listed() of cpu.c sees it: registers EAX .. EDX of CPUID leaves 1, 7.0, 7.1 and 1D.1
SAPPHIRE_RAPIDS = [
    [0, 0, 1 << 12 | 1 << 27 | 1 << 29, 0],
    [1, 1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31, 1 << 11, 1 << 22 | 1 << 24 | 1 << 25],
    [1 << 4, 0, 0, 0],
    [0x04002000, 0x00080040, 16, 0],
]
ALL_STATE = 0x600E7  # XCR0: x87, SSE, AVX, the three of AVX-512, tile shapes and tiles
AMX_TILE, AMX_INT8, AMX_BF16 = 1 << 9, 1 << 10, 1 << 11
AMX = AMX_TILE | AMX_INT8 | AMX_BF16

CPU_C = """
#include <stdint.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
static long os_result, os_permitted, asked;
static long os(long number, int code, ...)
{
    va_list rest;
    va_start(rest, code);
    if (number != SYS_arch_prctl)
        asked = -1;
    else if (code == 0x1023)
        asked = va_arg(rest, int);
    else if (code == 0x1022)
        *va_arg(rest, uint64_t *) = (uint64_t)os_permitted;
    va_end(rest);
    return os_result;
}
#define syscall os
#include "cpu.c"
uint32_t fake_listed(uint32_t leaves[LEAVES][4], uint64_t saved) { return listed(leaves, saved); }
int fake_permitted(long result, long permitted)
{
    os_result = result;
    os_permitted = permitted;
    return tiles_permitted();
}
long fake_asked(void) { return asked; }
#undef syscall
long real(long code, long argument) { return syscall(SYS_arch_prctl, code, argument); }
"""


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("AMX is looked for on x86-64 under Linux only")
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "fake.c").write_text("#define _GNU_SOURCE\n" + CPU_C)
    library = shared_library(folder, folder / "fake.c")
    library.fake_listed.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.fake_listed.restype = ctypes.c_uint32
    library.fake_permitted.argtypes = [ctypes.c_long, ctypes.c_long]
    library.fake_asked.restype = library.real.restype = ctypes.c_long
    library.real.argtypes = [ctypes.c_long, ctypes.c_long]
    return library


def listed(cpu: ctypes.CDLL, leaves: Sequence[Sequence[int]], saved: int) -> int:
    registers = np.array(leaves, np.uint32)
    return cpu.fake_listed(registers.ctypes.data, saved)


def test_every_bit_of_the_cpu_counts(cpu: ctypes.CDLL) -> None:
    everything = listed(cpu, SAPPHIRE_RAPIDS, ALL_STATE)
    assert everything == (1 << 12) - 1
    lost = {}
    for leaf, registers in enumerate(SAPPHIRE_RAPIDS[:3]):
        for register, value in enumerate(registers):
            for bit in range(32):
                if value >> bit & 1:
                    leaves = [list(row) for row in SAPPHIRE_RAPIDS]
                    leaves[leaf][register] ^= 1 << bit
                    lost[leaf, register, bit] = everything & ~listed(cpu, leaves, ALL_STATE)
    single = {place: bits for place, bits in lost.items() if bits}
    assert sorted(single.values()) == [1 << i for i in range(12)]  # each feature hangs on one bit
    assert [single[1, 3, bit] for bit in (24, 25, 22)] == [AMX_TILE, AMX_INT8, AMX_BF16]


@pytest.mark.parametrize(
    "palette",
    [[0, 0, 0, 0], [0x04002000, 0x00080040, 8, 0], [0x04002000, 0x00080020, 16, 0], [0x02001000, 0x00080040, 16, 0]],
)
def test_tiles_of_another_size_are_none(cpu: ctypes.CDLL, palette: list[int]) -> None:
    assert listed(cpu, [*SAPPHIRE_RAPIDS[:3], palette], ALL_STATE) == ((1 << 12) - 1) & ~AMX


@pytest.mark.parametrize("saved, missing", [(0x000E7, AMX), (0x200E7, AMX), (0x400E7, AMX), (0, (1 << 12) - 1)])
def test_what_the_os_does_not_save_is_none(cpu: ctypes.CDLL, saved: int, missing: int) -> None:
    assert listed(cpu, SAPPHIRE_RAPIDS, saved) == ((1 << 12) - 1) & ~missing


def test_permission(cpu: ctypes.CDLL) -> None:
    tiles = 1 << 17 | 1 << 18
    assert cpu.fake_permitted(0, 0xE7 | tiles)
    assert cpu.fake_asked() == 18
    assert not cpu.fake_permitted(-1, 0xE7 | tiles), "refused"
    assert not cpu.fake_permitted(0, 0xE7), "granted in word alone"


def test_the_set_is_supported_where_this_os_grants_tiles(cpu: ctypes.CDLL) -> None:
    if "amx" not in dict(kernel_sets()):
        pytest.skip("this build has no amx")
    listed_by_os = "amx_int8" in Path("/proc/cpuinfo").read_text().split()
    assert dict(kernel_sets())["amx"] == (listed_by_os and cpu.real(0x1023, 18) == 0)

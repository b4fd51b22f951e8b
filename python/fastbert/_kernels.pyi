from typing import Final

import numpy as np
from numpy.typing import NDArray

CHAIN: Final[int]
STRIP: Final[int]
SPLIT_PANEL: Final[int]
SPLIT_SCRATCH: Final[int]
ACTS: Final[dict[str, int]]

class KernelSet:
    def __init__(self, isa: str | None = None) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def gemm_f32_name(self) -> str: ...
    def packed_bytes(self, n: int, k: int) -> int: ...
    def pack(self, w: NDArray[np.float32], packed: NDArray[np.uint8], repeat: int = 1) -> None: ...
    def gemm_f32(
        self,
        a: NDArray[np.float32],
        packed: NDArray[np.uint8],
        out: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
        act: str = "none",
        residual: NDArray[np.float32] | None = None,
        repeat: int = 1,
    ) -> None: ...
    @property
    def gemm_split_name(self) -> str | None: ...
    def packed_bytes_split(self, n: int, k: int) -> int: ...
    def pack_split(self, w: NDArray[np.float32], packed: NDArray[np.uint8], repeat: int = 1) -> None: ...
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
    ) -> None: ...
    def softmax_f32(self, x: NDArray[np.float32], scale: float, repeat: int = 1) -> None: ...
    def softmax_u8(
        self, x: NDArray[np.float32], q: NDArray[np.uint8], scale: NDArray[np.float32], repeat: int = 1
    ) -> None: ...
    def layernorm_f32(
        self,
        x: NDArray[np.float32],
        gamma: NDArray[np.float32],
        beta: NDArray[np.float32],
        eps: float,
        out: NDArray[np.float32],
        repeat: int = 1,
    ) -> None: ...
    def mix_f32(self, x: NDArray[np.float32], out: NDArray[np.float32], repeat: int = 1) -> None: ...
    def quantize_u8(
        self,
        x: NDArray[np.float32],
        q: NDArray[np.uint8],
        scale: NDArray[np.float32],
        zero: NDArray[np.int32],
        repeat: int = 1,
    ) -> None: ...
    def mix_quantize_u8(
        self,
        x: NDArray[np.float32],
        y: NDArray[np.float32],
        q: NDArray[np.uint8],
        scale: NDArray[np.float32],
        zero: NDArray[np.int32],
        repeat: int = 1,
    ) -> None: ...
    @property
    def gemm_s8_name(self) -> str: ...
    def packed_bytes_s8(self, n: int, k: int) -> int: ...
    def pack_s8(
        self, w: NDArray[np.int8], scale_w: NDArray[np.float32], packed: NDArray[np.uint8], repeat: int = 1
    ) -> None: ...
    def pack_f32_s8(self, w: NDArray[np.float32], packed: NDArray[np.uint8], repeat: int = 1) -> None: ...
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
    ) -> None: ...

def k8(k: int) -> int: ...
def mix_gain(n: int) -> int: ...
def kernel_sets() -> list[tuple[str, bool]]: ...
def team_drill(log: NDArray[np.int32], rounds: int = 0, nested: int = 0) -> None: ...
def split(rank: int, size: int, count: int, step: int) -> tuple[int, int]: ...

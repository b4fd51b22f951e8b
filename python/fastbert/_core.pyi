from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# buffer, dtype, shape, strides in elements
_Tensor = tuple[Any, str, Sequence[int]] | tuple[Any, str, Sequence[int], Sequence[int] | None]

class Model:
    """Binding of fastbert.h: one packed, read-only encoder."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, _Tensor],
        isa: str | None = None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def gemm(self) -> str: ...
    @property
    def weights_bytes(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def vector_dim(self) -> int: ...
    @property
    def has_pooler(self) -> bool: ...
    def scratch_bytes(self, threads: int = 0) -> int: ...
    def forward(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        type_ids: NDArray[np.int32] | None = None,
        *,
        hidden: bool = False,
        pooler: bool = False,
        vectors: bool = False,
        threads: int = 0,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None, NDArray[np.float32] | None]: ...

class Linear:
    """A float32 layer of a task head: act(x W^T + bias), then LayerNorm where norm is given."""

    def __init__(
        self,
        weight: _Tensor,
        bias: _Tensor | None = None,
        norm: tuple[_Tensor, _Tensor] | None = None,
        *,
        act: str = "none",
        layer_norm_eps: float = 0,
        names: Sequence[str] = ("weight", "bias", "gamma", "beta"),
        isa: str | None = None,
    ) -> None: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    def __call__(self, x: NDArray[np.float32], *, threads: int = 0) -> NDArray[np.float32]: ...

def softmax(x: NDArray[np.float32]) -> NDArray[np.float32]: ...
def crc32c(data: bytes | memoryview) -> int: ...
def isas() -> list[tuple[str, bool]]: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def all_below(values: NDArray[np.int32] | NDArray[np.int64], end: int) -> bool: ...
def usable_threads(threads: int = 0) -> int: ...
def select_isa(isa: str | None = None) -> str: ...

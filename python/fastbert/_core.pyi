from collections.abc import Buffer, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Model:
    """Binding of fastbert.h: one packed, read-only encoder."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, tuple[Buffer, str, Sequence[int]]],
        isa: str | None = None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def gemm_f32(self) -> str: ...
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
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None, NDArray[np.float32] | None]: ...

def isas() -> list[tuple[str, bool]]: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...

"""A tensor in a mapped file: what every reader of weights gives."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The dtypes that weights may have. NumPy has no bfloat16: its bits, the upper half of a float32.
FLOAT_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


class Tensor(NamedTuple):
    """A tensor in a mapped file."""

    data: memoryview
    """Its bytes from its first element to its last: little-endian, any alignment, read-only; they keep the file
    mapped."""
    dtype: str
    """As in safetensors: F32, F16, BF16, F64, I64, ..."""
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    """Elements from an index to the next, each 0 or more; None: C order."""

    def rows(self, first: int) -> "Tensor":
        """Without the first rows, of which there are more. The dtype must be one of FLOAT_DTYPES."""
        if not first:
            return self
        item = np.dtype(FLOAT_DTYPES[self.dtype]).itemsize
        row = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        return self._replace(data=self.data[item * row * first :], shape=(self.shape[0] - first, *self.shape[1:]))

    def array(self) -> NDArray[np.float32]:
        """A copy in float32, C order. Raises ValueError where the dtype is none of FLOAT_DTYPES."""
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"expected a dtype of {', '.join(FLOAT_DTYPES)}, got {self.dtype}")
        if not math.prod(self.shape):
            return np.zeros(self.shape, np.float32)
        stored = np.frombuffer(self.data, FLOAT_DTYPES[self.dtype])
        if self.strides is None:
            stored = stored.reshape(self.shape)
        else:
            strides = [stride * stored.itemsize for stride in self.strides]
            stored = np.lib.stride_tricks.as_strided(stored, self.shape, strides, writeable=False)
        if self.dtype == "BF16":
            return (stored.astype(np.uint32, order="C") << 16).view(np.float32)
        return stored.astype(np.float32, order="C")

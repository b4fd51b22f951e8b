"""Every op on every kernel set: right, in the bits of the contract, and touching nothing but its operands."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from fastbert._kernels import ACTS, KC, STRIP, KernelSet, kernel_sets
from numpy.typing import NDArray

from tests.cases import ACTIVATIONS, F32, U, Case, GemmF32, LayerNormF32, Operands, SoftmaxF32, aligned, check, seeded

SUPPORTED = [KernelSet(name) for name, supported in kernel_sets() if supported]
TILES = [tuple(map(int, re.search(r"_(\d+)x(\d+)_", k.gemm_f32_name).groups())) for k in SUPPORTED]


# ---- where operands lie ----

POISON = np.frombuffer(np.uint32(0x7FC0DEAD).tobytes(), np.uint8)  # a NaN: spoils what reads it, shows what wrote over it
PAGE = mmap.PAGESIZE


@dataclass
class Memory:
    """Puts operands into poisoned rooms and tells afterwards whether anything around or in them was written."""

    layout: str
    rooms: dict[str, tuple[NDArray[np.uint8], NDArray[np.generic]]] = field(default_factory=dict)

    def place(self, name: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
        room, view = LAYOUTS[self.layout](name, values)
        room.reshape(-1, 4)[:] = POISON
        view[...] = values
        self.rooms[name] = room, view
        return view

    def written(self, before: dict[str, bytes]) -> list[str]:
        """Operands other than out that have changed, and "around NAME" where bytes that belong to no operand have."""
        names = []
        for name, (room, view) in self.rooms.items():
            if name != "out" and view.tobytes() != before[name]:
                names.append(name)
            kept = view.copy()
            view.view(np.uint8 if view.itemsize == 1 else np.uint32)[...] = 0x7FC0DEAD & (2 ** (8 * view.itemsize) - 1)
            if view.itemsize == 1:
                view.reshape(-1, 4)[:] = POISON
            if (room.reshape(-1, 4) != POISON).any():
                names.append(f"around {name}")
            view[...] = kept
        return names

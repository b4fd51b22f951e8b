"""BERT encoders on CPUs: text in, vectors out.

from fastbert import Encoder
vectors = Encoder().encode(["a sentence", "another"])
"""

from fastbert._core import get_num_threads, set_num_threads
from fastbert.encoder import EncodeInfo, Encoder, KernelSet, ModelOutput, kernels

__all__ = [
    "EncodeInfo",
    "Encoder",
    "KernelSet",
    "ModelOutput",
    "__version__",
    "get_num_threads",
    "kernels",
    "set_num_threads",
]

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":  # importlib.metadata costs a third of the import: only for those who ask
        from importlib.metadata import version

        return version("fastbert-cpu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

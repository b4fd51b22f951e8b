"""BERT encoders on CPUs: text in, vectors out.

from fastbert import Encoder
vectors = Encoder().encode(["a sentence", "another"])
"""

from fastbert._core import get_num_threads, set_num_threads
from fastbert.classification import CrossEncoder, NextSentence, SequenceClassifier
from fastbert.encoder import EncodeInfo, Encoder, KernelSet, ModelOutput, kernels
from fastbert.masked_lm import MaskedLM
from fastbert.question_answering import QuestionAnswerer
from fastbert.token_classification import TokenClassifier

__all__ = [
    "CrossEncoder",
    "EncodeInfo",
    "Encoder",
    "KernelSet",
    "MaskedLM",
    "ModelOutput",
    "NextSentence",
    "QuestionAnswerer",
    "SequenceClassifier",
    "TokenClassifier",
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

"""What every model class shares: the folder is found, its encoder and tokenizer are loaded, arguments are checked."""

import logging
import operator
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbert import _core, hub
from fastbert.checkpoint import Checkpoint, load_checkpoint
from fastbert.tensors import Tensor
from fastbert.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("fastbert")
logger.addHandler(logging.NullHandler())

Floats = NDArray[np.float32]
T = TypeVar("T")


class Pretrained(ABC):
    """A model on this CPU. Many threads may use one at once; it survives fork; it pickles as its name and options.

    Attributes
    ----------
    folder : Path
        Where the files were read from: a folder, an archive, or the prefix of a TensorFlow checkpoint.
    model : str
        The hub id, or the path in full.
    config : BertConfig
    tokenizer : Tokenizer
    threads : int or None
        Threads per call; None: `fastbert.get_num_threads()` at the time of the call. May be set. No more are used than
        the CPUs that the calling thread may run on.
    """

    _state: ClassVar[tuple[str, ...]] = ()
    """Attributes that a user may set, and that a pickle keeps."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None,
        precision: str,
        strict: bool,
        threads: int | None,
        max_seq_length: int | None,
        token: str | bool | None,
        **hub_options: Any,
    ) -> None:
        self.precision = one_of("precision", precision, ("fp32", "int8"))
        self.strict = bool(strict)
        self.threads = None if threads is None else positive("threads", threads)
        self._hub = hub_options
        self.folder = hub.resolve(model, **hub_options, token=token)
        is_path = model is not None and Path(model).expanduser() == self.folder
        self.model = str(self.folder.absolute()) if is_path else model or hub.DEFAULT_MODEL
        with hub.open_model(self.folder) as (folder, prefix):
            self._load(folder, prefix, max_seq_length)

    @abstractmethod
    def _load(self, folder: Path, prefix: Path | None, max_seq_length: int | None) -> None:
        """Read the model of `folder`, the weights of the TensorFlow checkpoint `prefix` if given."""

    def _read(
        self, folder: Path, prefix: Path | None, max_seq_length: int | None, **tokenizer_options: Any
    ) -> Checkpoint:
        """Read the encoder's files; the options are load_tokenizer's."""
        checkpoint = load_checkpoint(folder, prefix)
        self.config = checkpoint.config
        self.tokenizer: Tokenizer = load_tokenizer(
            folder,
            vocab_size=self.config.vocab_size,
            max_position_embeddings=self.config.max_position_embeddings,
            max_seq_length=max_seq_length,
            type_vocab_size=self.config.type_vocab_size,
            **tokenizer_options,
        )
        return checkpoint

    def _build(self, tensors: Mapping[str, Tensor], **after: Any) -> None:
        """Pack the weights; `after` says what stands after the encoder (pooling, dense, normalize of _core.Model)."""
        self._model = _core.Model(
            asdict(self.config) | {"precision": self.precision, "strict": self.strict} | after, tensors
        )

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """The same call as the class itself."""
        return cls(model, **options)

    @property
    def _threads(self) -> int:
        """Threads that a call made now uses."""
        return _core.usable_threads(self.threads or 0)

    @property
    def max_seq_length(self) -> int:
        """Tokens that a text is cut to, [CLS] and [SEP] included. May be set, up to the model's positions."""
        return self.tokenizer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer = self.tokenizer.with_max_seq_length(value)

    def _info(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "folder": str(self.folder),
            "precision": self.precision,
            "strict": self.strict,
            **asdict(self.config),
            "has_pooler": self._model.has_pooler,
            "max_seq_length": self.max_seq_length,
            "isa": self._model.isa,
            "gemm": self._model.gemm,
        }

    def __repr__(self) -> str:
        shape = f"layers={self.config.num_hidden_layers}, hidden_size={self.config.hidden_size}"
        return f"{type(self).__name__}({self.model!r}, {shape}, precision={self.precision!r}, isa={self._model.isa!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        load = partial(
            type(self),
            self.model,
            precision=self.precision,
            strict=self.strict,
            threads=self.threads,
            max_seq_length=self.max_seq_length,
            **self._hub,
        )
        return load, (), {name: getattr(self, name) for name in self._state}


# ---- checks of arguments ----


def one_of(name: str, value: Any, choices: Iterable[str]) -> Any:
    """`value` if it is one of `choices`, else ValueError."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices) or 'none'}, got {value!r}")
    return value


def positive(name: str, value: Any, most: int | None = None) -> int:
    """`value` if it is a whole number from 1 to `most`, else TypeError or ValueError."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}") from None
    if count < 1 or (most is not None and count > most):
        raise ValueError(f"{name}: expected {'at least 1' if most is None else f'1 to {most}'}, got {value}")
    return count


# ---- while working ----


class LongTexts:
    """What becomes of texts of too many tokens: on_long of the public calls."""

    CHOICES = ("truncate", "warn", "error")

    def __init__(self, on_long: str) -> None:
        self.on_long = one_of("on_long", on_long, self.CHOICES)

    def report(self, index: int, limit: int, tokens: int) -> None:
        """Text `index` is cut from `tokens` to `limit`: say nothing, warn once, or raise ValueError."""
        if self.on_long == "truncate":
            return
        message = f"inputs[{index}]: expected at most {limit} tokens (max_seq_length), got {tokens}"
        if self.on_long == "error":
            raise ValueError(message)
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals["__name__"].startswith("fastbert."):  # the warning is about their line
            level, frame = level + 1, frame.f_back
        warnings.warn(f"{message}; it is cut, as is every longer text after it", stacklevel=level)
        self.on_long = "truncate"


class Ahead(Generic[T]):
    """What a function gives, call by call; `make` calls it before its result is taken, while other threads run."""

    __slots__ = ("_function", "_made")

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._made: list[T] = []

    def make(self) -> None:
        self._made.append(self._function())

    def take(self) -> T:
        return self._made.pop(0) if self._made else self._function()


def progress_bar(total: int, shown: bool | None) -> AbstractContextManager[Callable[[int], object]]:
    """Gives a function to be called with the number of texts done. None: shown where the logger says INFO."""
    if logger.isEnabledFor(logging.INFO) if shown is None else shown:
        return _shown_bar(total)
    return nullcontext(lambda texts: None)


@contextmanager
def _shown_bar(total: int) -> Iterator[Callable[[int], object]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Texts", unit="text") as bar:
        yield bar.update

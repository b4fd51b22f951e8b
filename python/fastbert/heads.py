"""What stands on an encoder for a task: which of its outputs a head reads, its layers, its labels.

    texts (and pairs) -> Tokenizer -> encoder (fp32 or int8) -> rows -> layers of the head, always fp32 -> logits

HEADS says it all as a table; the classes of the tasks are in classification.py, token_classification.py,
question_answering.py and masked_lm.py. A row of logits has the same bits whatever else is in the batch.
"""

import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from fastbert import _core
from fastbert.checkpoint import Checkpoint
from fastbert.files import count, read_optional_json
from fastbert.pretrained import Floats, LongTexts, Pretrained, positive
from fastbert.tokenizer import TokenBatch, check_texts


class Layer(NamedTuple):
    """act(x W^T + bias), then LayerNorm where `norm` names one. Names are those of the checkpoint."""

    name: str
    activation: str = "none"  # of _core.Linear, or "hidden_act": that of config.json
    norm: str = ""
    tied_weight: str = ""  # what serves where the checkpoint has no weight of its own
    tied_bias: str = ""


class Head(NamedTuple):
    """A row of HEADS."""

    reads: Literal["pooler", "first", "hidden"]
    """pooler_output [batch, hidden], or of last_hidden_state the first token's or all rows [tokens, hidden]."""
    outputs: int | Literal["labels", "vocabulary"]
    """Rows of the last layer; those before it keep hidden_size."""
    architecture: tuple[str, ...]
    """How the names end that config.json has for models with this head."""
    layers: tuple[Layer, ...]


_WORDS = "embeddings.word_embeddings.weight"
_SEQUENCE = ("ForSequenceClassification",)
_TOKENS = Head("hidden", "labels", ("ForTokenClassification",), (Layer("classifier"),))
_ANSWERS = Head("hidden", 2, ("ForQuestionAnswering",), (Layer("qa_outputs"),))
_MASKED = ("ForMaskedLM", "ForPreTraining")

_ROBERTA = {
    "sequence-classification": Head(
        "first", "labels", _SEQUENCE, (Layer("classifier.dense", "tanh"), Layer("classifier.out_proj"))
    ),
    "token-classification": _TOKENS,
    "question-answering": _ANSWERS,
    "masked-lm": Head(
        "hidden",
        "vocabulary",
        _MASKED,
        (
            Layer("lm_head.dense", "gelu", "lm_head.layer_norm"),
            Layer("lm_head.decoder", "none", "", _WORDS, "lm_head.bias"),
        ),
    ),
}

# model_type of config.json -> task -> head. transformers 5.23, models/<model_type>/.
HEADS: dict[str, dict[str, Head]] = {
    "bert": {
        "sequence-classification": Head("pooler", "labels", _SEQUENCE, (Layer("classifier"),)),
        "token-classification": _TOKENS,
        "question-answering": _ANSWERS,
        "masked-lm": Head(
            "hidden",
            "vocabulary",
            _MASKED,
            (
                Layer("cls.predictions.transform.dense", "hidden_act", "cls.predictions.transform.LayerNorm"),
                Layer("cls.predictions.decoder", "none", "", _WORDS, "cls.predictions.bias"),
            ),
        ),
        "next-sentence": Head(
            "pooler", 2, ("ForNextSentencePrediction", "ForPreTraining"), (Layer("cls.seq_relationship"),)
        ),
    },
    "distilbert": {
        "sequence-classification": Head(
            "first", "labels", _SEQUENCE, (Layer("pre_classifier", "relu"), Layer("classifier"))
        ),
        "token-classification": _TOKENS,
        "question-answering": _ANSWERS,
        "masked-lm": Head(
            "hidden",
            "vocabulary",
            _MASKED,
            (Layer("vocab_transform", "hidden_act", "vocab_layer_norm"), Layer("vocab_projector", "none", "", _WORDS)),
        ),
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
}

MAX_LABELS = 1 << 16


class TaskModel(Pretrained):
    """An encoder with the head of one task; the base of the task classes.

    Parameters
    ----------
    model : str or path-like
        A folder with a Hugging Face BERT model that has this head, which never touches the network, or a hub id.
    precision : {"fp32", "int8"}
        Of the encoder. The head is float32 in both, read from the checkpoint as it is.
    strict, threads, max_seq_length, revision, cache_dir, local_files_only, token
        As in `Encoder`.

    Raises
    ------
    OSError
        The model or one of its files is missing or cannot be read.
    ValueError
        A file or an argument is wrong, or the checkpoint has no such head; the text names the place.
    """

    task: ClassVar[str]
    """A key of the rows of HEADS."""

    def __init__(
        self,
        model: str | os.PathLike[str],
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
        if model is None:
            raise TypeError("model: expected a folder or a hub id, got None")
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
        checkpoint = self._read(folder, prefix, max_seq_length)
        self._where = folder / "config.json"
        self._settings = read_optional_json(self._where)
        heads = HEADS[self.config.model_type]
        if self.task not in heads:
            having = ", ".join(name for name, row in HEADS.items() if self.task in row)
            raise ValueError(
                f"{self._where}: model_type: expected {having} for {type(self).__name__}, got {self.config.model_type}"
            )
        self._head = heads[self.task]
        self.id2label = self._labels() if self._head.outputs == "labels" else {}
        self._check_architecture()
        self._layers = self._load_layers(checkpoint)
        self._build(checkpoint.tensors, pooling=("cls",) if self._head.reads == "first" else ())
        if self._head.reads == "pooler" and not self._model.has_pooler:
            shape = [self.config.hidden_size] * 2
            raise ValueError(f"{self.folder}: pooler.dense.weight: expected {shape} for this head, got no such tensor")
        self._finish_loading()

    def _finish_loading(self) -> None:
        """What a task reads of the files besides."""

    # ---- the files ----

    def _check_architecture(self) -> None:
        """Heads of different tasks share names ("classifier"): what config.json says they are must agree."""
        names = self._settings.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self._where}: architectures: expected a list of strings, got {reprlib.repr(names)}")
        if names and not any(name.endswith(self._head.architecture) for name in names):
            raise ValueError(
                f"{self._where}: architectures: expected a name that ends in {' or '.join(self._head.architecture)} "
                f"for {type(self).__name__}, got {', '.join(names)}"
            )

    def _labels(self) -> dict[int, str]:
        """id2label of config.json, else LABEL_0, LABEL_1, ... for num_labels."""
        labels = self._settings.get("id2label")
        if labels is None:
            n = count(self._where, "num_labels", self._settings.get("num_labels", 2), 1, MAX_LABELS)
            return {i: f"LABEL_{i}" for i in range(n)}
        expected = {str(i) for i in range(len(labels))} if isinstance(labels, dict) else set()
        if not expected or labels.keys() != expected or not all(isinstance(name, str) for name in labels.values()):
            raise ValueError(
                f'{self._where}: id2label: expected an object of strings with the keys "0", "1", ..., '
                f"got {reprlib.repr(labels)}"
            )
        count(self._where, "id2label", len(labels), 1, MAX_LABELS)
        return {i: labels[str(i)] for i in range(len(labels))}

    def _load_layers(self, checkpoint: Checkpoint) -> list[_core.Linear]:
        hidden = self.config.hidden_size
        last = {"labels": len(self.id2label), "vocabulary": self.config.vocab_size}.get(
            self._head.outputs, self._head.outputs
        )
        layers = []
        for layer in self._head.layers:
            rows = last if layer is self._head.layers[-1] else hidden

            def tensor(name: str, shape: tuple[int, ...], tied: str = "") -> Any:
                found = checkpoint.find(name, shape)
                if found is None and tied:
                    found = checkpoint.find(tied, shape)
                if found is None:
                    raise ValueError(f"{checkpoint.folder}: {name}: expected {list(shape)}, got no such tensor")
                return found

            tied_weight = layer.tied_weight if self._settings.get("tie_word_embeddings", True) else ""
            norm = layer.norm and tuple(tensor(f"{layer.norm}.{part}", (rows,)) for part in ("weight", "bias"))
            layers.append(
                _core.Linear(
                    tensor(f"{layer.name}.weight", (rows, hidden), tied_weight),
                    tensor(f"{layer.name}.bias", (rows,), layer.tied_bias),
                    norm or None,
                    act=self.config.hidden_act if layer.activation == "hidden_act" else layer.activation,
                    layer_norm_eps=self.config.layer_norm_eps,
                    names=(f"{layer.name}.weight", f"{layer.name}.bias", f"{layer.norm}.weight", f"{layer.norm}.bias"),
                )
            )
        return layers

    # ---- running ----

    def _logits(self, rows: Floats) -> Floats:
        """The head on rows [n, hidden] of what it reads: [n, outputs]."""
        for layer in self._layers:
            rows = layer(rows, threads=self._threads)
        return rows

    def _encode(self, batch: TokenBatch, meanwhile: Callable[[], object] | None = None) -> Floats:
        """What the head reads: a row for each text, or for each token. meanwhile: called while other threads run."""
        wanted = {"pooler": "pooler", "first": "vectors", "hidden": "hidden"}[self._head.reads]
        arrays = batch.ids, batch.offsets, batch.type_ids
        outputs = self._model.forward(*arrays, **{wanted: True}, threads=self._threads, meanwhile=meanwhile)
        return next(rows for rows in outputs if rows is not None)

    def _report_long(
        self, long: LongTexts, batch: TokenBatch, first: int, texts: Sequence[str], pairs: Sequence[str] | None
    ) -> None:
        """Says, as `long` wants it, which of these texts, the first of which is inputs[first], were cut."""
        cut = np.flatnonzero(batch.truncated)
        if cut.size and long.on_long != "truncate":
            i = int(cut[0])
            tokens = int(self.tokenizer.count_tokens([texts[i]], None if pairs is None else [pairs[i]])[0])
            long.report(first + i, self.max_seq_length, tokens)

    def info(self) -> dict[str, Any]:
        """What was loaded and how it runs, ready for JSON."""
        return self._info() | {
            "task": self.task,
            "labels": list(self.id2label.values()),
            "threads": self._threads,
        }


def check_pairs(
    texts: Any, pairs: Any, name: str = "inputs", pair_name: str = "text_pairs"
) -> tuple[list[str], list[str], bool]:
    """The first and the second texts of two arguments, and whether they were a single str each."""
    first, single = check_texts(texts, name)
    second, single_pair = check_texts(pairs, pair_name)
    if single != single_pair:
        raise TypeError(f"{pair_name}: expected {'str' if single else 'a sequence of str'} as {name}")
    if len(second) != len(first):
        raise ValueError(f"{pair_name}: expected as many texts as {name}, {len(first)}, got {len(second)}")
    return first, second, single


def slices(total: int, size: int) -> Iterator[slice]:
    """0 .. total in steps of `size`."""
    return (slice(i, min(i + size, total)) for i in range(0, total, positive("batch_size", size)))

"""Heads on pooler_output: classes of a text or a pair, relevance of a pair, whether a text follows another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fastbert import _core
from fastbert.encoder import BATCHES_PER_STEP
from fastbert.heads import TaskModel, check_pairs, slices
from fastbert.pretrained import Ahead, Floats, LongTexts, one_of, positive, progress_bar
from fastbert.sentence import load_cross_encoder_config
from fastbert.tokenizer import TokenBatch, check_texts

OnLong = Literal["truncate", "warn", "error"]
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)): the first of the softmax of x and 0, so the same bits on every kernel set."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1, 1)
    return _core.softmax(np.concatenate([flat, np.zeros_like(flat)], axis=1))[:, 0].reshape(np.shape(x))


def identity(x: Floats) -> Floats:
    return x


# function_to_apply of SequenceClassifier: logits [n, labels] -> scores
FUNCTIONS: dict[str, Callable[[Floats], Floats]] = {
    "softmax": _core.softmax,
    "sigmoid": sigmoid,
    "none": identity,
}


class _PooledModel(TaskModel):
    """A head on pooler_output: a row of logits for each text or pair."""

    def logits(
        self,
        inputs: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        on_long: OnLong = "truncate",
    ) -> Floats:
        """What the head says, before any softmax or sigmoid.

        Parameters
        ----------
        inputs : str or sequence of str
        text_pairs : str or sequence of str, optional
            The second text of each pair: as many as `inputs`. Of a pair that is too long the longer text is cut.
        batch_size : int, default 32
            Bounds memory: 8 batches of texts are in work at a time. Never changes a result.
        show_progress_bar : bool, optional
            Default: whether the logger "fastbert" is at INFO or below.
        on_long : {"truncate", "warn", "error"}
            A text or pair of more than `max_seq_length` tokens is cut, cut with a UserWarning, or a ValueError.

        Returns
        -------
        ndarray of float32, shape (len(inputs), outputs)
            For a single str (outputs,).

        Raises
        ------
        TypeError
            An argument is neither str nor sequence, or one of its items is no str; the text names the item.
        ValueError
            An argument is out of range, the two have different lengths, or a text is too long and ``on_long="error"``.
        """
        if text_pairs is None:
            texts, single = check_texts(inputs)
            pairs = None
        else:
            texts, pairs, single = check_pairs(inputs, text_pairs)
        steps = self._steps(texts, pairs, batch_size, LongTexts(on_long))
        logits = np.empty((len(texts), self._layers[-1].out_features), np.float32)
        with progress_bar(len(texts), show_progress_bar) as progress:
            for part, rows in steps:
                logits[part] = rows
                progress(len(rows))
        return logits[0] if single else logits

    def _steps(
        self, texts: list[str], pairs: list[str] | None, batch_size: int, long: LongTexts
    ) -> Iterator[tuple[slice, Floats]]:
        parts = slices(len(texts), BATCHES_PER_STEP * positive("batch_size", batch_size))

        def tokenized() -> tuple[slice, list[str] | None, TokenBatch] | None:
            part = next(parts, None)
            if part is None:
                return None
            second = None if pairs is None else pairs[part]
            return part, second, self.tokenizer.encode_batch(texts[part], second)

        batches = Ahead(tokenized)
        while taken := batches.take():
            part, second, batch = taken
            self._report_long(long, batch, part.start, texts[part], second)
            yield part, self._logits(self._encode(batch, batches.make if self._threads > 1 else None))


class SequenceClassifier(_PooledModel):
    """Classes of texts or of pairs of texts: BertForSequenceClassification. Loaded as `TaskModel` says.

    classifier = SequenceClassifier("folder-or-hub-id")
    classifier("a fine film")                           # {"label": "positive", "score": 0.99}
    classifier(["a fine film", "a bore"], top_k=None)   # for each text all labels, best first
    classifier(premises, hypotheses)                    # pairs

    Attributes
    ----------
    id2label : dict of int to str
        Of config.json.
    problem_type : {"regression", "single_label_classification", "multi_label_classification"} or None
        Of config.json; it chooses `function_to_apply`.
    """

    task = "sequence-classification"

    def _finish_loading(self) -> None:
        self.problem_type = self._settings.get("problem_type")
        if self.problem_type is not None:
            one_of(f"{self._where}: problem_type", self.problem_type, PROBLEM_TYPES)

    @property
    def function_to_apply(self) -> str:
        """What makes scores of logits where a call does not say: as in transformers' pipeline."""
        if self.problem_type == "regression":
            return "none"
        return "sigmoid" if self.problem_type == "multi_label_classification" or len(self.id2label) == 1 else "softmax"

    def predict(
        self,
        inputs: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None,
        **options: Any,
    ) -> Floats:
        """Scores of all labels: float32 (len(inputs), labels), for a single str (labels,). Options as in `logits`.

        function_to_apply: the probability of each label among all ("softmax"), of each by itself ("sigmoid"), or the
        logits ("none"). Default: "none" for regression, "sigmoid" for several labels at a time and for a single
        one, else "softmax".
        """
        name = self.function_to_apply if function_to_apply is None else function_to_apply
        function = FUNCTIONS[one_of("function_to_apply", name, FUNCTIONS)]
        logits = self.logits(inputs, text_pairs, **options)
        return function(np.atleast_2d(logits)).reshape(logits.shape)

    def __call__(
        self,
        inputs: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        top_k: int | None = 1,
        function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None,
        **options: Any,
    ) -> Any:
        """Labels with scores, named as in transformers' pipeline "text-classification".

        top_k : int or None, default 1
            1: the best label of each text, a dict {"label", "score"}. Otherwise a list of the best `top_k`, or of all
            where it is None, best first.
        Other arguments as in `predict`. A list gives a list with an entry per text, a single str that entry.
        """
        most = len(self.id2label) if top_k is None else positive("top_k", top_k)
        scores = self.predict(inputs, text_pairs, function_to_apply=function_to_apply, **options)
        results: list[Any] = []
        for row in np.atleast_2d(scores):
            order = np.argsort(-row, kind="stable")[:most]
            best = [{"label": self.id2label[i], "score": float(row[i])} for i in order.tolist()]
            results.append(best[0] if top_k == 1 else best)
        return results[0] if scores.ndim == 1 else results


class NextSentence(_PooledModel):
    """Whether one text follows another: BertForNextSentencePrediction. Loaded as `TaskModel` says."""

    task = "next-sentence"

    def predict(self, inputs: str | Sequence[str], next_texts: str | Sequence[str], **options: Any) -> Any:
        """The probability that each of `next_texts` follows its input: float32 (len(inputs),); options as in `logits`.

        A single pair of str gives a number.
        """
        logits = self.logits(inputs, next_texts, **options)
        follows = _core.softmax(np.atleast_2d(logits))[:, 0]
        return follows[0] if logits.ndim == 1 else follows


class CrossEncoder(_PooledModel):
    """Scores of pairs of texts, with the names and arguments of sentence-transformers. Loaded as `TaskModel` says.

    Attributes
    ----------
    activation_fn : callable
        float32 [n, labels] to scores; what the model's files say, else a sigmoid where there is one label and nothing
        where there are several. May be set.
    prompts : dict of str to str
        Texts that `prompt_name` puts in front of the first text of each pair.
    default_prompt_name : str or None
    """

    task = "sequence-classification"
    _state = ("activation_fn", "prompts", "default_prompt_name")

    def _finish_loading(self) -> None:
        config = load_cross_encoder_config(self._where.parent, self._settings)
        name = config.activation or ("sigmoid" if len(self.id2label) == 1 else "none")
        self.activation_fn: Callable[[Floats], Floats] = FUNCTIONS[name]
        self.prompts = config.prompts
        self.default_prompt_name = config.default_prompt_name

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    def predict(
        self,
        inputs: Sequence[Sequence[str]] | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Floats], Floats] | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        on_long: OnLong = "truncate",
    ) -> Any:
        """Scores of pairs.

        Parameters
        ----------
        inputs : sequence of pairs of str, or one pair
        prompt_name, prompt : str, optional
            A key of `prompts`, or a text, that is put in front of the first text of each pair.
        batch_size, show_progress_bar, on_long
            As in `logits`.
        activation_fn : callable, optional
            Instead of the attribute: float32 [n, labels] to scores.
        apply_softmax : bool, default False
            Scores of several labels become probabilities, after `activation_fn`.
        convert_to_numpy : bool, default True
            False gives the scores as a list.

        Returns
        -------
        ndarray of float32, shape (len(inputs),)
            (len(inputs), labels) where there are several labels; without the first axis for one pair.

        Raises
        ------
        TypeError, ValueError
            As in `logits`; the text names the pair.
        """
        firsts, seconds, single = _check_pair_list(inputs)
        prompt = self._prompt(prompt_name, prompt)
        logits = self.logits(
            [prompt + text for text in firsts] if prompt else firsts,
            seconds,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            on_long=on_long,
        )
        scores = (self.activation_fn if activation_fn is None else activation_fn)(logits)
        if self.num_labels == 1:
            scores = scores[:, 0]
        elif apply_softmax:
            scores = _core.softmax(np.ascontiguousarray(scores, np.float32))
        if single:
            return scores[0]
        return scores if convert_to_numpy else list(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Floats], Floats] | None = None,
        on_long: OnLong = "truncate",
    ) -> list[dict[str, Any]]:
        """Documents by their score with a query, best first.

        Returns a list of {"corpus_id": index in `documents`, "score": float}, the best `top_k` where that is given,
        with the document as "text" where `return_documents`. Other arguments and errors as in `predict`; ValueError
        where the model has more than one label.
        """
        if self.num_labels != 1:
            raise ValueError(f"rank: expected a model with one label, got {self.num_labels}: use predict")
        if not isinstance(query, str):
            raise TypeError(f"query: expected str, got {type(query).__name__}")
        if isinstance(documents, str):
            raise TypeError("documents: expected a sequence of str, got str")
        texts, _ = check_texts(documents, "documents")
        most = len(texts) if top_k is None else positive("top_k", top_k)
        scores = self.predict(
            [(query, text) for text in texts],
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            activation_fn,
            on_long=on_long,
        )
        ranked = [
            {"corpus_id": i, "score": float(scores[i])} | ({"text": texts[i]} if return_documents else {})
            for i in np.argsort(-scores, kind="stable").tolist()
        ]
        return ranked[:most]

    def _prompt(self, prompt_name: str | None, prompt: str | None) -> str:
        if prompt is None:
            name = self.default_prompt_name if prompt_name is None else prompt_name
            return "" if name is None else self.prompts[one_of("prompt_name", name, self.prompts)]
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected str, got {type(prompt).__name__}")
        return prompt


def _check_pair_list(inputs: Any) -> tuple[list[str], list[str], bool]:
    """First texts, second texts, and whether inputs was one pair: two str, not in a list of their own."""
    if isinstance(inputs, str | bytes | Mapping) or not all(hasattr(inputs, name) for name in ("__len__", "__iter__")):
        raise TypeError(f"inputs: expected a pair of str or a sequence of pairs, got {type(inputs).__name__}")
    pairs: list[Any] = list(inputs)
    single = bool(pairs) and isinstance(pairs[0], str)
    pairs = [pairs] if single else pairs
    for i, pair in enumerate(pairs):
        place = "inputs" if single else f"inputs[{i}]"
        if not isinstance(pair, list | tuple | np.ndarray):
            raise TypeError(f"{place}: expected a pair of str, got {type(pair).__name__}")
        if len(pair) != 2:
            raise ValueError(f"{place}: expected 2 texts, got {len(pair)}")
        for j, text in enumerate(pair):
            if not isinstance(text, str):
                raise TypeError(f"{place}[{j}]: expected str, got {type(text).__name__}")
    return [str(pair[0]) for pair in pairs], [str(pair[1]) for pair in pairs], single

"""TokenClassifier: a label for each token, or entities: runs of tokens or words of one label.

The rules, names and results are those of transformers' pipeline "token-classification".
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from fastbert import _core
from fastbert.heads import TaskModel, slices
from fastbert.pretrained import Floats, LongTexts, one_of
from fastbert.tokenizer import Tokens, check_texts, to_batch

Entity = dict[str, Any]


class _Piece(NamedTuple):
    """A token, or a word that a strategy has made of its tokens, with its label."""

    word: str
    scores: Floats  # [labels]
    start: int
    end: int
    index: int  # of its first token
    continues: bool  # the word of the piece before it


# aggregation_strategy -> the scores of a word, of those of its tokens [tokens, labels]
_WORD_SCORES: dict[str, Callable[[Floats], Floats]] = {
    "first": lambda scores: scores[0],
    "average": lambda scores: scores.mean(axis=0),
    "max": lambda scores: scores[scores.max(axis=1).argmax()],
}
AGGREGATION_STRATEGIES = ("none", "simple", *_WORD_SCORES)


class TokenClassifier(TaskModel):
    """Labels of tokens, such as names or parts of speech: BertForTokenClassification. Loaded as `TaskModel` says.

    tagger = TokenClassifier("folder-or-hub-id")
    tagger("Ada lives in Rome", aggregation_strategy="simple")
    # [{"entity_group": "PER", "score": 0.99, "word": "ada", "start": 0, "end": 3}, ...]

    Attributes
    ----------
    id2label : dict of int to str
        Of config.json. "B-X" and "I-X" begin and continue an entity X; any other label is its own entity.
    """

    task = "token-classification"

    def logits(
        self,
        inputs: str | Sequence[str],
        *,
        batch_size: int = 32,
        on_long: Literal["truncate", "warn", "error"] = "truncate",
    ) -> Any:
        """float32 [tokens, labels] for each text, [CLS] and [SEP] included; arguments and errors as in the call."""
        texts, single = check_texts(inputs)
        rows = [logits for _, logits in self._tokens(texts, batch_size, LongTexts(on_long))]
        return rows[0] if single else rows

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "none",
        ignore_labels: Iterable[str] = ("O",),
        stride: int | None = None,
        batch_size: int = 32,
        on_long: Literal["truncate", "warn", "error"] = "truncate",
    ) -> Any:
        """The labels that are not ignored, in the order of the text.

        Parameters
        ----------
        inputs : str or sequence of str
        aggregation_strategy : {"none", "simple", "first", "average", "max"}
            "none": a result for each token. "simple": neighbours of one label become an entity. The others do the same
            after each word got one label: that of its first token, of the mean of its tokens' scores, or of the token
            with the highest score.
        ignore_labels : iterable of str
        stride : int, optional
            Texts of more than `max_seq_length` tokens are not cut, but run in pieces that share `stride` tokens; of
            entities that overlap the longer counts, of equally long ones that with the higher score. Not with "none".
        batch_size : int, default 32
            Bounds memory, never changes a result.
        on_long : {"truncate", "warn", "error"}
            Without `stride` a text of more than `max_seq_length` tokens is cut, cut with a UserWarning, or an error.

        Returns
        -------
        list of dict for a str, list of such lists for a sequence
            "none": entity (the label), score, index (of the token), word (the token), start, end.
            Else: entity_group, score (the mean over its tokens or words), word, start, end.
            Characters start to end of the text are the entity's.

        Raises
        ------
        TypeError
            `inputs` is neither str nor sequence, or one of its items is no str; the text names the item.
        ValueError
            An argument is out of range, or a text is too long and ``on_long="error"``.
        """
        one_of("aggregation_strategy", aggregation_strategy, AGGREGATION_STRATEGIES)
        if isinstance(ignore_labels, str):
            raise TypeError("ignore_labels: expected an iterable of str, got str")
        ignored = set(ignore_labels)
        texts, single = check_texts(inputs)
        if stride is not None and aggregation_strategy == "none":
            raise ValueError("stride: expected an aggregation_strategy other than 'none'")
        if stride is None:
            runs = ([run] for run in self._tokens(texts, batch_size, LongTexts(on_long)))
        else:
            runs = self._windows(texts, stride, batch_size)
        results = []
        for text, windows in zip(texts, runs, strict=True):
            entities = [
                entity
                for tokens, logits in windows
                for entity in self._entities(text, tokens, _core.softmax(logits), aggregation_strategy)
                if not ignored & {entity.get("entity"), entity.get("entity_group")}
            ]
            results.append(_without_overlaps(entities) if len(windows) > 1 else entities)
        return results[0] if single else results

    def _tokens(self, texts: list[str], batch_size: int, long: LongTexts) -> Iterator[tuple[Tokens, Floats]]:
        """Each text cut to max_seq_length, and its logits [tokens, labels]."""
        for part in slices(len(texts), batch_size):
            tokens = self.tokenizer.encode(texts[part])
            self._report_long(long, to_batch(tokens), part.start, texts[part], None)
            yield from zip(tokens, self._run(tokens), strict=True)

    def _windows(self, texts: list[str], stride: int, batch_size: int) -> Iterator[list[tuple[Tokens, Floats]]]:
        """Each whole text in pieces that share `stride` tokens, with the logits of each piece."""
        for text in texts:
            windows = self.tokenizer.windows(text, stride=stride)
            logits = [rows for part in slices(len(windows), batch_size) for rows in self._run(windows[part])]
            yield list(zip(windows, logits, strict=True))

    def _run(self, tokens: Sequence[Tokens]) -> list[Floats]:
        batch = to_batch(tokens)
        logits = self._logits(self._encode(batch))
        return [logits[a:b] for a, b in pairwise(batch.offsets)]

    # ---- from scores to entities ----

    def _entities(self, text: str, tokens: Tokens, scores: Floats, strategy: str) -> list[Entity]:
        pieces = list(self._pieces(text, tokens, scores))
        if strategy in _WORD_SCORES:
            pieces = [self._word(run, strategy) for run in _runs(pieces, lambda _, piece: piece.continues)]
        labelled = [(piece, self.id2label[int(piece.scores.argmax())]) for piece in pieces]
        if strategy == "none":
            return [
                {
                    "entity": label,
                    "score": float(piece.scores.max()),
                    "index": piece.index,
                    "word": piece.word,
                    "start": piece.start,
                    "end": piece.end,
                }
                for piece, label in labelled
            ]
        return [self._group(run) for run in _runs(labelled, lambda last, this: _continues(last[1], this[1]))]

    def _pieces(self, text: str, tokens: Tokens, scores: Floats) -> Iterator[_Piece]:
        """The tokens that are not special."""
        unknown, marked = self.tokenizer.special_ids["unk"], bool(self.tokenizer.subword_prefix)
        for i, (word, (start, end)) in enumerate(zip(tokens.texts, tokens.offsets, strict=True)):
            covered = text[start:end]
            if tokens.special[i]:
                continue
            if tokens.ids[i] == unknown:
                word, continues = covered, False
            elif marked:
                continues = len(word) != len(covered)
            else:
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            yield _Piece(word, scores[i], start, end, i, continues)

    def _word(self, run: list[_Piece], strategy: str) -> _Piece:
        return run[0]._replace(
            word=self.tokenizer.join([token.word for token in run]),
            scores=_WORD_SCORES[strategy](np.array([token.scores for token in run])),
            end=run[-1].end,
        )

    def _group(self, run: list[tuple[_Piece, str]]) -> Entity:
        pieces, labels = [piece for piece, _ in run], [label for _, label in run]
        return {
            "entity_group": labels[0].split("-", 1)[-1],
            "score": float(np.mean([piece.scores.max() for piece in pieces])),
            "word": self.tokenizer.join([piece.word for piece in pieces]),
            "start": pieces[0].start,
            "end": pieces[-1].end,
        }


def _runs(items: list[Any], joins: Callable[[Any, Any], bool]) -> list[list[Any]]:
    """Items in runs: an item joins the run of the one before it where joins(before, item)."""
    runs: list[list[Any]] = []
    for item in items:
        if runs and joins(runs[-1][-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _continues(last: str, label: str) -> bool:
    """Whether an entity goes on from a token labelled `last`: the same kind, and not marked as a beginning."""

    def kind(name: str) -> str:
        return name[2:] if name.startswith(("B-", "I-")) else name

    return kind(label) == kind(last) and not label.startswith("B-")


def _without_overlaps(entities: list[Entity]) -> list[Entity]:
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if kept and kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept[-1] = max(kept[-1], entity, key=lambda entity: (entity["end"] - entity["start"], entity["score"]))
        else:
            kept.append(entity)
    return kept

"""MaskedLM: the words that fit in the place of [MASK].

The results are those of transformers' pipeline "fill-mask". Only rows of [MASK] go through the decoder.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastbert import _core
from fastbert.heads import TaskModel, slices
from fastbert.pretrained import Floats, LongTexts, positive
from fastbert.tokenizer import TokenBatch, check_texts

MASKS_AT_ONCE = 32  # rows of logits held: 32 x 30522 floats are 4 MB


class MaskedLM(TaskModel):
    """Words for [MASK]: BertForMaskedLM, BertForPreTraining. Loaded as `TaskModel` says.

    The decoder is tied to the word embeddings, in float32 in an int8 model too.

    model = MaskedLM("folder-or-hub-id")
    model.fill("Rome is the [MASK] of Italy.", top_k=3)
    # [{"score": 0.99, "token": 3007, "token_str": "capital", "sequence": "rome is the capital of italy."}, ...]

    Attributes
    ----------
    mask_token : str
        How a text says it: "[MASK]".
    """

    task = "masked-lm"

    def _finish_loading(self) -> None:
        mask = self.tokenizer.special_ids["mask"]
        if mask is None:
            raise ValueError(f"{self.folder}: expected a tokenizer with a mask token, which stands in the vocabulary")
        self._mask = mask
        self.mask_token = self.tokenizer.token(mask)

    def fill(
        self,
        inputs: str | Sequence[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        batch_size: int = 32,
        on_long: Literal["truncate", "warn", "error"] = "truncate",
    ) -> Any:
        """The most likely tokens for each [MASK].

        Parameters
        ----------
        inputs : str or sequence of str
            Each with at least one [MASK].
        top_k : int, default 5
        targets : str or sequence of str, optional
            Choose among these tokens of the vocabulary alone; their scores stay those among all.
        batch_size : int, default 32
            Bounds memory, never changes a result.
        on_long : {"truncate", "warn", "error"}
            A text of more than `max_seq_length` tokens is cut, cut with a UserWarning, or a ValueError.

        Returns
        -------
        list of dict for a text with one mask, list of such lists for several; for a sequence a list with one per text
            score (probability among the whole vocabulary), token (its id), token_str, and sequence: the text with it.
            With several masks each is filled by itself; the others stay in "sequence".

        Raises
        ------
        TypeError
            `inputs` is neither str nor sequence, or one of its items is no str; the text names the item.
        ValueError
            A text has no mask within `max_seq_length` tokens, a target is not in the vocabulary, or an argument is out
            of range.
        """
        texts, single = check_texts(inputs)
        chosen = self._targets(targets)
        most = positive("top_k", top_k)
        results = []
        long = LongTexts(on_long)
        for part in slices(len(texts), batch_size):
            batch = self.tokenizer.encode_batch(texts[part])
            self._report_long(long, batch, part.start, texts[part], None)
            places = self._masks(batch, part.start)
            fillings = self._fillings(self._encode(batch)[np.concatenate(places)], most, chosen)
            for (a, b), masks in zip(pairwise(batch.offsets), places, strict=True):
                ids = batch.ids[a:b]
                rows = [self._row(ids, mask - a, *next(fillings), single_mask=len(masks) == 1) for mask in masks]
                results.append(rows[0] if len(masks) == 1 else rows)
        return results[0] if single else results

    def logits(self, inputs: str | Sequence[str], *, batch_size: int = 32) -> Any:
        """float32 [masks, vocab_size] for each text: the rows of its masks. Errors as in `fill`."""
        texts, single = check_texts(inputs)
        rows = []
        for part in slices(len(texts), batch_size):
            batch = self.tokenizer.encode_batch(texts[part])
            hidden = self._encode(batch)
            rows += [self._logits(hidden[masks]) for masks in self._masks(batch, part.start)]
        return rows[0] if single else rows

    def _masks(self, batch: TokenBatch, first: int) -> list[NDArray[np.int64]]:
        """The rows of the masks of each text; texts[0] is inputs[first]."""
        rows = np.flatnonzero(batch.ids == self._mask)
        places = np.split(rows, np.searchsorted(rows, batch.offsets[1:-1]))
        for i, masks in enumerate(places):
            if not len(masks):
                raise ValueError(
                    f"inputs[{first + i}]: expected {self.mask_token} within {self.max_seq_length} tokens, got none"
                )
        return places

    def _targets(self, targets: str | Sequence[str] | None) -> NDArray[np.int64] | None:
        if targets is None:
            return None
        words, _ = check_texts(targets, "targets")
        ids = [self.tokenizer.token_id(word) for word in words]
        if not ids or None in ids:
            what = f"{words[ids.index(None)]!r}" if ids else "none"
            raise ValueError(f"targets: expected tokens of the vocabulary, got {what}")
        return np.unique(ids)

    def _fillings(self, rows: Floats, most: int, chosen: NDArray[np.int64] | None) -> Any:
        """(ids, probabilities) of the best tokens for each row, best first, of equal ones the smallest id."""
        for part in slices(len(rows), MASKS_AT_ONCE):
            for scores in _core.softmax(self._logits(rows[part])):
                ids = np.arange(len(scores)) if chosen is None else chosen
                best = ids[np.argsort(-scores[ids], kind="stable")[:most]]
                yield best, scores[best]

    def _row(
        self, ids: NDArray[np.int32], place: int, tokens: NDArray[np.int64], scores: Floats, *, single_mask: bool
    ) -> list[dict[str, Any]]:
        row = []
        for token, score in zip(tokens.tolist(), scores.tolist(), strict=True):
            filled = ids.copy()
            filled[place] = token
            filled = filled[filled != self.tokenizer.special_ids["pad"]]
            # Without special tokens a text reads better, but other masks must stay.
            sequence = self.tokenizer.decode(filled.tolist(), skip_special_tokens=single_mask)
            text = self.tokenizer.decode([token])
            row.append({"score": score, "token": token, "token_str": text, "sequence": sequence})
        return row

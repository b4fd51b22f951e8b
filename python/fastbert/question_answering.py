"""QuestionAnswerer: the piece of a context that answers a question.

The rules, arguments and results are those of the pipeline "question-answering" of transformers 4 (version 5 has none).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastbert import _core
from fastbert.heads import TaskModel, check_pairs, slices
from fastbert.pretrained import Floats, positive
from fastbert.tokenizer import Tokens, to_batch

Answer = dict[str, Any]

MAX_WINDOW = 384  # tokens of question and piece of context, as BERT was fine-tuned on SQuAD


class QuestionAnswerer(TaskModel):
    """Answers that stand in a context, also in a very long one: BertForQuestionAnswering. Loaded as `TaskModel` says.

    answerer = QuestionAnswerer("folder-or-hub-id")
    answerer("Where does Ada live?", "Ada lives in Rome.")
    # {"score": 0.98, "start": 13, "end": 17, "answer": "Rome"}
    """

    task = "question-answering"

    def __call__(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        batch_size: int = 32,
    ) -> Any:
        """The best answers.

        Parameters
        ----------
        question, context : str or sequence of str
            As many of one as of the other.
        top_k : int, default 1
        doc_stride : int, optional
            Tokens that a piece of a long context shares with the one before. Default: at most 128.
        max_answer_len : int, default 15
            In tokens.
        max_seq_len : int, optional
            Tokens of the question and a piece of the context. Default: `max_seq_length`, at most 384.
        handle_impossible_answer : bool, default False
            "" is among the answers, with the probability of the least sure piece that there is none.
        align_to_words : bool, default True
            Answers begin and end with a word, not inside one.
        batch_size : int, default 32
            Pieces that are run at a time: bounds memory, never changes a result.

        Returns
        -------
        dict, or list of at most top_k dict where top_k > 1; for sequences a list of these
            score (the probability in its piece; equal answers of several pieces are added up), start, end (characters
            of the context) and answer. A span of probability 0 is no answer: there may be fewer than `top_k`, and where
            there is none at all the dict has score 0 and answer "".

        Raises
        ------
        TypeError
            An argument is neither str nor sequence, or an item is no str; the text names the item.
        ValueError
            The two have different lengths, a question or context is empty, a question is too long, or an argument is
            out of range.
        """
        positive("top_k", top_k)
        positive("max_answer_len", max_answer_len)
        questions, contexts, single = check_pairs(question, context, "question", "context")
        length = min(self.max_seq_length, MAX_WINDOW) if max_seq_len is None else max_seq_len
        results: list[Any] = []
        for i, (ask, text) in enumerate(zip(questions, contexts, strict=True)):
            for name, value in (("question", ask), ("context", text)):
                if not value:
                    raise ValueError(f"{name}{'' if single else f'[{i}]'}: expected a text, got an empty one")
            try:
                windows = self.tokenizer.windows(ask, text, stride=doc_stride, length=length)
            except ValueError as error:
                raise ValueError(f"question{'' if single else f'[{i}]'}: {error}") from None
            answers: dict[str, Answer] = {}
            no_answer = 1.0
            for window, start, end in self._probabilities(windows, batch_size):
                no_answer = min(no_answer, float(start[0] * end[0]))
                for first, last, score in _best_spans(start, end, max_answer_len, _candidates(top_k, align_to_words)):
                    a, b = _characters(window, first, last, align_to_words)
                    # Answers that differ in case only are one.
                    answer = answers.setdefault(
                        text[a:b].lower(), {"score": 0.0, "start": a, "end": b, "answer": text[a:b]}
                    )
                    answer["score"] += score
            found = list(answers.values())
            if handle_impossible_answer:
                found.append({"score": no_answer, "start": 0, "end": 0, "answer": ""})
            found = sorted(found, key=lambda answer: -answer["score"])[:top_k]
            if top_k == 1:
                results.append(found[0] if found else {"score": 0.0, "start": 0, "end": 0, "answer": ""})
            else:
                results.append(found)
        return results[0] if single else results

    def logits(self, question: str, context: str) -> Floats:
        """Start and end logits of the tokens of one question and its context, cut to `max_seq_length`: [tokens, 2]."""
        questions, contexts, _ = check_pairs([question], [context], "question", "context")
        return self._logits(self._encode(self.tokenizer.encode_batch(questions, contexts)))

    def _probabilities(self, windows: list[Tokens], batch_size: int) -> Iterator[tuple[Tokens, Floats, Floats]]:
        """Each window with the probabilities that an answer starts and ends at each of its tokens.

        They are spread over [CLS], which means that there is no answer, and the tokens of the context.
        """
        cls = self.tokenizer.special_ids["cls"]
        for part in slices(len(windows), batch_size):
            batch = to_batch(windows[part])
            logits = self._logits(self._encode(batch))
            for window, (a, b) in zip(windows[part], pairwise(batch.offsets), strict=True):
                here = np.array([sequence == 1 for sequence in window.sequences]) | (batch.ids[a:b] == cls)
                probabilities = np.zeros((2, b - a), np.float32)
                probabilities[:, here] = _core.softmax(np.ascontiguousarray(logits[a:b][here].T))
                yield window, probabilities[0], probabilities[1]


def _candidates(top_k: int, align_to_words: bool) -> int:
    """Spans to look at in each window: several may align to the same words."""
    return top_k * 2 + 10 if align_to_words else top_k


def _best_spans(start: Floats, end: Floats, longest: int, most: int) -> Iterator[tuple[int, int, float]]:
    """(first token, last token, probability) of the `most` best spans of at most `longest` tokens, without [CLS].

    Of equal ones the first. Spans are scored in rows of one start: n * longest of them, not n * n.
    """
    n = len(start)
    longest = min(longest, n)
    ends = np.zeros(n + longest, np.float32)
    ends[:n] = end
    ends[0] = 0
    scores = start[:, None] * np.lib.stride_tricks.sliding_window_view(ends, longest)[:n]
    scores[0] = 0
    flat = scores.ravel()
    for i in np.argsort(-flat, kind="stable")[:most].tolist():
        if flat[i] > 0:
            yield i // longest, i // longest + i % longest, float(flat[i])


def _characters(window: Tokens, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Where tokens first .. last stand in the context, or as much of the words that they are in as the window has."""
    words = list(zip(window.sequences, window.words, strict=True))
    if align_to_words and window.sequences[first] == window.sequences[last] == 1:
        first = words.index(words[first])
        last = len(words) - 1 - words[::-1].index(words[last])
    return window.offsets[first][0], window.offsets[last][1]

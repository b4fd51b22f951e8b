"""Text to token ids: a thin adapter on the package `tokenizers`, for ragged batches.

    texts -> (very long texts: only as far as the limit needs) -> ids, [CLS] and [SEP] included, cut to max_seq_length

The vocabulary comes from tokenizer.json, else from a bare vocab.txt. Truncation and padding stored in tokenizer.json
are overridden: we cut at max_seq_length and never pad. Where tokenizer_config.json and tokenizer.json disagree on lower
case, accents or Chinese characters, the former wins, as in transformers.
"""

import copy
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.files import count, flag, read_file, read_optional_json

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 256 << 20  # multilingual vocabularies of 250,000 pieces take 17 MB

# Characters kept of a very long text per token that is wanted. English has about 4; see Tokenizer._head.
_CHARACTERS_PER_TOKEN = 16

# Characters that BERT's pre-tokenizer parts from what stands before them, enough to find one in most long texts. Not
# "_", which counts as a letter where added tokens are sought.
_BREAKS = " \t\n\r" + string.punctuation.replace("_", "") + "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"

# Classes of tokenizer_config.json under which transformers takes tokenizer.json as it is. All others that come with a
# BERT are BertTokenizer, whose own settings replace those of the normalizer.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class TokenBatch(NamedTuple):
    """A ragged batch: the tokens of all texts in one row, no padding."""

    ids: NDArray[np.int32]
    """[tokens]"""
    type_ids: NDArray[np.int32]
    """[tokens] 0 for the first text, 1 for the second of a pair."""
    offsets: NDArray[np.int64]
    """[batch + 1] text i has the tokens offsets[i] .. offsets[i + 1]."""
    truncated: NDArray[np.bool_]
    """[batch] whether the text had more than max_seq_length tokens."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text or pair, or of a piece of it: an entry per token in each list, special tokens included."""

    ids: list[int]
    type_ids: list[int]
    texts: list[str]
    """As in the vocabulary."""
    offsets: list[tuple[int, int]]
    """First character and the one after the last, in the text that the token is of."""
    words: list[int | None]
    """Which word of its text; None for special tokens."""
    sequences: list[int | None]
    """0 for the first text, 1 for the second of a pair; None for special tokens."""
    special: list[int]
    truncated: bool


def to_batch(parts: Sequence[Tokens]) -> TokenBatch:
    """The tokens of all parts in one row."""
    return _ragged([t.ids for t in parts], [t.type_ids for t in parts], [t.truncated for t in parts])


def _ragged(ids: list[list[int]], type_ids: list[list[int]] | None, truncated: list[bool]) -> TokenBatch:
    bounds = [0, *accumulate(map(len, ids))]
    tokens = bounds[-1]
    types = np.zeros(tokens, np.int32) if type_ids is None else _flat(type_ids, tokens)
    return TokenBatch(_flat(ids, tokens), types, np.array(bounds, np.int64), np.array(truncated, np.bool_))


def _flat(rows: list[list[int]], tokens: int) -> NDArray[np.int32]:
    return np.fromiter(chain.from_iterable(rows), np.int32, tokens)


class Tokenizer:
    """Made by load_tokenizer. Immutable: many threads may use one at once.

    Attributes
    ----------
    max_seq_length : int
        Tokens that a text is cut to, special tokens included.
    special_ids : dict of str to int or None
        The ids of "unk", "cls", "sep", "pad" and "mask"; None for one that the vocabulary lacks.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        max_seq_length: int,
        max_position_embeddings: int,
        special_tokens: Mapping[str, str],
        type_vocab_size: int = 2,
    ) -> None:
        backend.enable_truncation(max_seq_length)
        self.max_seq_length = max_seq_length
        self.special_ids = {role: backend.token_to_id(token) for role, token in special_tokens.items()}
        self._special_tokens = special_tokens
        self._backend = backend
        self._max_position_embeddings = max_position_embeddings
        self._breaks = _breaks(backend)
        self._type_vocab_size = type_vocab_size
        self._one_type = not any(backend.encode("a").type_ids)

    def with_max_seq_length(self, max_seq_length: int) -> "Tokenizer":
        """This tokenizer with another limit. Raises ValueError where the model has not as many positions."""
        _check_length(self._backend, max_seq_length, self._max_position_embeddings)
        backend = copy.deepcopy(self._backend)
        return Tokenizer(
            backend, max_seq_length, self._max_position_embeddings, self._special_tokens, self._type_vocab_size
        )

    def encode_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, parallel: bool = False
    ) -> TokenBatch:
        """Tokenize texts, or pairs of texts.

        Halves of surrogate pairs, which no Unicode text has, count as U+FFFD, which BERT drops.

        Parameters
        ----------
        texts : sequence of str
        pairs : sequence of str, optional
            The second text of each pair; the longer of two is cut first.
        parallel : bool, default False
            Let `tokenizers` use its own threads: one per CPU, started on first use and kept; the environment variables
            TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS limit them; a later fork prints a warning. False: all work is
            done by the calling thread. The result is the same.
        """
        encodings = self._encode(texts, pairs, parallel)
        one_type = self._type_vocab_size == 1 or (pairs is None and self._one_type)
        return _ragged(
            [encoding.ids for encoding in encodings],
            None if one_type else [encoding.type_ids for encoding in encodings],
            [self._is_cut(encoding) for encoding in encodings],
        )

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Tokens]:
        """As encode_batch, with all that is known of each token."""
        return [self._tokens(encoding, self._is_cut(encoding)) for encoding in self._encode(texts, pairs, False)]

    def windows(
        self, text: str, pair: str | None = None, *, stride: int | None = None, length: int | None = None
    ) -> list[Tokens]:
        """All of a long text in pieces that overlap, special tokens around each. Of a pair the second text is cut up.

        Parameters
        ----------
        text : str
        pair : str, optional
            The first text then stands whole in each piece.
        stride : int, optional
            Tokens that a piece shares with the one before. Default: at most 128, at most half of a piece.
        length : int, optional
            Tokens of a piece, special ones included, at most the model's positions. Default: max_seq_length.

        Raises
        ------
        ValueError
            ``length`` is out of range, the first text of a pair leaves no room, or ``stride`` does not fit.
        """
        length = self.max_seq_length if length is None else length
        _check_length(self._backend, length, self._max_position_embeddings)
        encoding = _run(self._whole, [text], None if pair is None else [pair], False)[0]
        parted = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == (pair is not None)]
        n = len(parted)
        room = length - len(encoding) + n
        if room < 1:
            raise ValueError(
                f"expected a text that leaves room for the other of the pair in {length} tokens, "
                f"got one of {len(encoding) - n}, special tokens included"
            )
        if stride is None:
            stride = min(length // 2, 128)
            stride = stride if stride < room else room // 2
        count("stride", "tokens", stride, 0, room - 1)
        begin, end = (parted[0], parted[-1] + 1) if parted else (len(encoding), len(encoding))
        head, tail = range(begin), range(end, len(encoding))
        starts = range(begin, max(end - stride, begin + 1), room - stride)
        return [self._tokens(encoding, False, [*head, *range(a, min(a + room, end)), *tail]) for a in starts]

    def token(self, token_id: int) -> str | None:
        """The text of a token, as in the vocabulary."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text from ids."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def join(self, tokens: Sequence[str]) -> str:
        """Text from tokens: word pieces are joined, words stand apart."""
        return self._backend.decoder.decode(list(tokens))

    @property
    def subword_prefix(self) -> str:
        """What a piece that continues a word begins with: "##"; empty where the model has no such mark."""
        return getattr(self._backend.model, "continuing_subword_prefix", None) or ""

    def count_tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Tokens of each whole text or pair, special tokens included, before any cut: [len(texts)]."""
        return np.array([len(encoding) for encoding in _run(self._whole, texts, pairs, False)], np.int64)

    @cached_property
    def _whole(self) -> "tokenizers.Tokenizer":
        """The same without a limit."""
        backend = copy.deepcopy(self._backend)
        backend.no_truncation()
        return backend

    def _tokens(self, encoding: "tokenizers.Encoding", truncated: bool, places: Sequence[int] | None = None) -> Tokens:
        """Those at `places`, all unless given."""
        lists = (
            encoding.ids,
            [0] * len(encoding) if self._type_vocab_size == 1 else encoding.type_ids,
            encoding.tokens,
            encoding.offsets,
            encoding.word_ids,
            encoding.sequence_ids,
            encoding.special_tokens_mask,
        )
        return Tokens(*(lists if places is None else ([entry[i] for i in places] for entry in lists)), truncated)

    def _is_cut(self, encoding: "tokenizers.Encoding") -> bool:
        return len(encoding) == self.max_seq_length and bool(encoding.overflowing)

    def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None, parallel: bool) -> "list[tokenizers.Encoding]":
        if pairs is not None:
            return _run(self._backend, texts, pairs, parallel)
        heads = [self._head(text) for text in texts]
        encodings = _run(self._backend, heads, None, parallel)
        for i, (head, text) in enumerate(zip(heads, texts, strict=True)):
            if len(head) < len(text) and not encodings[i].overflowing:  # few tokens: mostly white space
                encodings[i] = _run(self._backend, [text], None, parallel)[0]
        return encodings

    def _head(self, text: str) -> str:
        """The beginning of a very long text, which gives the same ids if it has more tokens than the limit.

        BERT's normalizer works on characters, its pre-tokenizer parts words at white space and punctuation, WordPiece
        works on words: what comes from a break onwards changes no token before it.
        """
        enough = _CHARACTERS_PER_TOKEN * self.max_seq_length
        if len(text) <= enough:
            return text
        end = max((text.rfind(character, 0, enough) for character in self._breaks), default=-1)
        return text[:end] if end > 0 else text


def check_texts(inputs: Any, name: str = "inputs") -> tuple[list[str], bool]:
    """The texts of the argument ``name``, and whether it was a single str.

    Sequences are lists, tuples, one-dimensional arrays, pandas Series and the like. Raises TypeError for anything else
    and for an entry that is no str, whose index it names.
    """
    if isinstance(inputs, str):
        return [inputs], True
    is_sequence = all(hasattr(inputs, method) for method in ("__len__", "__iter__", "__getitem__"))
    is_sequence = is_sequence and not isinstance(inputs, bytes | bytearray | memoryview | Mapping)
    if not is_sequence or getattr(inputs, "ndim", 1) != 1:
        raise TypeError(f"{name}: expected str or a sequence of str, got {type(inputs).__name__}")
    texts = list(inputs)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}]: expected str, got {type(text).__name__}")
    return texts, False


def load_tokenizer(
    folder: Path,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    max_seq_length: int | None = None,
    default_max_seq_length: int | None = None,
    do_lower_case: bool = False,
    type_vocab_size: int = 2,
) -> Tokenizer:
    """Read the tokenizer of a BERT folder.

    Parameters
    ----------
    folder : Path
        With tokenizer.json or vocab.txt, and perhaps tokenizer_config.json and special_tokens_map.json. Where nothing
        but bert_config.json describes a model, one with capitals in its vocabulary is cased.
    vocab_size, max_position_embeddings : int
        Of the model.
    max_seq_length : int, optional
        The user's limit of tokens per text, special tokens included.
    default_max_seq_length : int, optional
        Limit where the user gives none (SentenceConfig.max_seq_length); else model_max_length of
        tokenizer_config.json, else max_position_embeddings. Both are cut to max_position_embeddings.
    do_lower_case : bool
        Lower-case texts whatever tokenizer.json and tokenizer_config.json say (SentenceConfig.do_lower_case).
    type_vocab_size : int
        Of the model. With 1, as in RoBERTa, all tokens have type 0, those of a second text too.

    Raises
    ------
    OSError
        A file is missing or cannot be read.
    ValueError
        A file is malformed, a special token is missing, the vocabulary is larger than the model's, or the limit is
        outside the model's positions; the text names the file or the argument.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_optional_json(config_path)
    there = [(folder / name).exists() for name in ("bert_config.json", "vocab.txt", "config.json", "tokenizer.json")]
    if not config and there == [True, True, False, False]:
        config = {"do_lower_case": not _is_cased(folder / "vocab.txt")}
    # transformers gives special_tokens_map.json the last word on the special tokens.
    tokens = _special_tokens(config_path, config | read_optional_json(folder / "special_tokens_map.json"))
    normalizer = _normalizer(config_path, config)
    path = folder / "tokenizer.json"
    if path.exists():
        backend = _from_json(path, tokens, normalizer, config.get("tokenizer_class") in _GENERIC_CLASSES)
    else:
        path = folder / "vocab.txt"
        if not path.exists():
            raise FileNotFoundError(f"{folder}: expected tokenizer.json or vocab.txt, found neither")
        backend = _from_vocabulary(path, tokens, normalizer)
    _check_vocabulary(path, backend, vocab_size)
    if do_lower_case:
        _lower_case(backend)

    limit = max_seq_length
    if limit is None:
        limit = default_max_seq_length or _model_max_length(config_path, config)
        limit = min(limit, max_position_embeddings)
    _check_length(backend, limit, max_position_embeddings)
    return Tokenizer(backend, limit, max_position_embeddings, tokens, type_vocab_size)


# ---- the files ----


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for role, default in {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}.items():
        token = config.get(f"{role}_token") or default
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or not token:
            raise ValueError(f"{path}: {role}_token: expected a string, got {token!r}")
        tokens[role] = token
    return tokens


def _normalizer(path: Path, config: Mapping[str, Any]) -> "tokenizers.normalizers.BertNormalizer":
    """BertTokenizer's. Where strip_accents is not set, accents go if upper case goes."""
    from tokenizers.normalizers import BertNormalizer

    accents = None if config.get("strip_accents") is None else flag(path, config, "strip_accents", False)
    return BertNormalizer(
        clean_text=True,
        handle_chinese_chars=flag(path, config, "tokenize_chinese_chars", True),
        strip_accents=accents,
        lowercase=flag(path, config, "do_lower_case", True),
    )


def _model_max_length(path: Path, config: Mapping[str, Any]) -> int:
    value = config.get("model_max_length")
    if value is None:
        return 1 << 62
    if type(value) not in (int, float) or not 1 <= value <= 1e31:  # "no limit" is written as 1e30
        raise ValueError(f"{path}: model_max_length: expected a number from 1, got {value!r}")
    return int(value)


def _from_json(
    path: Path, tokens: Mapping[str, str], normalizer: "tokenizers.normalizers.BertNormalizer", as_is: bool
) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer
    from tokenizers.normalizers import BertNormalizer

    data = read_file(path, MAX_TOKENIZER_BYTES)
    try:
        backend = Tokenizer.from_buffer(data)
    except BaseException as error:  # the package raises bare Exception, or PanicException, which is none
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path}: expected a tokenizer: {error}") from None
        raise
    backend.no_padding()
    backend.no_truncation()
    if not as_is and isinstance(backend.normalizer, BertNormalizer):
        backend.normalizer = normalizer
    if not as_is and backend.post_processor is None:
        _add_template(path, backend, tokens)
    return backend


def _from_vocabulary(
    path: Path, tokens: Mapping[str, str], normalizer: "tokenizers.normalizers.BertNormalizer"
) -> "tokenizers.Tokenizer":
    """BERT's tokenizer for a vocab.txt: the word piece of id i in line i. Of equal lines the last counts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    data = read_file(path, MAX_TOKENIZER_BYTES)
    try:
        lines = data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None
    vocabulary = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk"], max_input_chars_per_word=100))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _add_template(path, backend, tokens)
    backend.add_special_tokens([token for token in tokens.values() if token in vocabulary])
    return backend


def _is_cased(path: Path) -> bool:
    """Whether pieces have capitals: google-research/bert says it in the name of a download alone, "cased_L-12_...".

    The special tokens, [PAD] and so on, have capitals in every vocabulary.
    """
    lines = read_file(path, MAX_TOKENIZER_BYTES).split(b"\n")
    return any(line != line.lower() and not line.startswith(b"[") for line in lines)  # ASCII alone


def _add_template(path: Path, backend: "tokenizers.Tokenizer", tokens: Mapping[str, str]) -> None:
    """[CLS] a [SEP] for a text, [CLS] a [SEP] b [SEP] for a pair; b and what follows it have type 1."""
    from tokenizers.processors import BertProcessing

    marks = [(tokens[role], backend.token_to_id(tokens[role])) for role in ("sep", "cls")]
    for token, token_id in marks:
        if token_id is None:
            raise ValueError(f"{path}: expected the token {token} in the vocabulary")
    backend.post_processor = BertProcessing(*marks)


def _check_vocabulary(path: Path, backend: "tokenizers.Tokenizer", vocab_size: int) -> None:
    largest = max(backend.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(f"{path}: expected ids below the model's vocab_size {vocab_size}, got {largest}")
    unknown = getattr(backend.model, "unk_token", None)  # of WordPiece; without it an unknown word is an error
    if unknown is not None and backend.model.token_to_id(unknown) is None:
        raise ValueError(f"{path}: expected the token {unknown} in the vocabulary")
    special = [*backend.encode("").ids, *backend.encode("", "").ids]
    if not special or max(special) >= vocab_size:
        raise ValueError(
            f"{path}: expected special tokens around a text, with ids below vocab_size {vocab_size}, got {special}"
        )


def _check_length(backend: "tokenizers.Tokenizer", value: int, max_position_embeddings: int) -> None:
    """The least length has room for a token beside the special ones of a text, and for those of a pair."""
    least = max(backend.num_special_tokens_to_add(False) + 1, backend.num_special_tokens_to_add(True))
    count("max_seq_length", "tokens", value, least, max_position_embeddings)


def _lower_case(backend: "tokenizers.Tokenizer") -> None:
    from tokenizers.normalizers import BertNormalizer, Lowercase, Sequence

    normalizer = backend.normalizer
    if not (isinstance(normalizer, BertNormalizer) and normalizer.lowercase):
        backend.normalizer = Sequence([Lowercase(), *([normalizer] if normalizer is not None else [])])


# ---- running it ----


def _run(
    backend: "tokenizers.Tokenizer", texts: Sequence[str], pairs: Sequence[str] | None, parallel: bool
) -> "list[tokenizers.Encoding]":
    try:
        return _run_unicode(backend, texts, pairs, parallel)
    except TypeError:  # half a surrogate pair somewhere: such a str has no UTF-8
        return _run_unicode(backend, list(map(_repair, texts)), pairs and list(map(_repair, pairs)), parallel)


def _run_unicode(
    backend: "tokenizers.Tokenizer", texts: Sequence[str], pairs: Sequence[str] | None, parallel: bool
) -> "list[tokenizers.Encoding]":
    if parallel:
        return backend.encode_batch_fast(texts if pairs is None else list(zip(texts, pairs, strict=True)))
    if pairs is None:
        return [backend.encode(text) for text in texts]
    return [backend.encode(text, pair) for text, pair in zip(texts, pairs, strict=True)]


def _repair(text: str) -> str:
    """Two halves of a surrogate pair become their character, a lone half U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _breaks(backend: "tokenizers.Tokenizer") -> str:
    """Characters such that no token before one depends on what comes from it onwards; none if this is not BERT's."""
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    parts = (backend.normalizer, backend.pre_tokenizer, backend.model)
    if not all(map(isinstance, parts, (BertNormalizer, BertPreTokenizer, WordPiece))):
        return ""
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    added += [backend.normalizer.normalize_str(content) for content in added]
    return "".join(character for character in _BREAKS if not any(character in content for content in added))

"""Seeded random-weight BERT models: in memory, and as Hugging Face folders on disk.

The numbers come from the raw 64-bit words of NumPy's PCG64, whose stream NumPy guarantees for all versions and
platforms (it does not for Generator.standard_normal), one generator per tensor name. So a model is the same everywhere,
whichever tensors surround a tensor, and tests/golden can be made again.

Queries and keys are scaled so that attention scores have a standard deviation near 3; attention adds little to the
residual, so that the rows do not become alike from layer to layer (which would make attention uniform in deep models).
LayerNorm gains vary by 25 %. test_bert.py checks it by the mean entropy of attention rows, which would be ln(seq) if
attention were uniform.
"""

import json
import math
import re
import string
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests import formats
from tests.formats import write_safetensors as write_safetensors  # for the tests

Weights = dict[str, NDArray[np.float32]]

# config.json's names of hidden_act and what they mean: "gelu" the erf form, "gelu_tanh" the tanh form.
HIDDEN_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# The 24 shapes of google/bert_uncased_L-*_H-*_A-* (Turc et al., arXiv:1908.08962): config.json keys.
MINIATURES = [
    {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "vocab_size": 30522,
    }
    for layers in (2, 4, 6, 8, 10, 12)
    for hidden in (128, 256, 512, 768)
]

# A small WordPiece vocabulary: special tokens, every printable ASCII character as a word and as a continuation, and
# some words and endings. Lower case, as "uncased" models have it.
_CHARACTERS = string.punctuation + string.digits + string.ascii_lowercase
_WORDS = """the of and a to in is you that it he was for on are as with his they at be this have from or one had by
word but not what all were we when your can said there use an each which she do how their if will up other about out
many then them these so some her would make like him into time has look two more write go see number no way could people
my than first water been call who oil its now find long down day did get come made may part cat dog""".split()
_ENDINGS = "s es ed ing er est ly ness able ment tion al ful less ous ive y en re un th".split()
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *_CHARACTERS,
    *(f"##{c}" for c in _CHARACTERS),
    *sorted({w for w in _WORDS if len(w) > 1}),
    *(f"##{e}" for e in _ENDINGS if len(e) > 1),
]


class Sentence(NamedTuple):
    """What a sentence-transformers folder adds to the encoder."""

    pooling: Sequence[str] = ("mean",)  # names of reference.POOLING
    dense: Sequence[tuple[str, int]] = ()  # (name of reference.ACTIVATIONS, out_features)
    normalize: bool = True
    max_seq_length: int | None = None


# Class of transformers -> rows of each linear layer of its head, and of its LayerNorm; a str is a key of the config, or
# "labels": the number of id2label.
HEADS: dict[str, dict[str, int | str]] = {
    "BertForSequenceClassification": {"classifier": "labels"},
    "BertForTokenClassification": {"classifier": "labels"},
    "BertForQuestionAnswering": {"qa_outputs": 2},
    "BertForMaskedLM": {
        "cls.predictions.transform.dense": "hidden_size",
        "cls.predictions.transform.LayerNorm": "hidden_size",
        "cls.predictions": "vocab_size",  # a bias alone: the weight is that of the word embeddings
    },
    "BertForNextSentencePrediction": {"cls.seq_relationship": 2},
}
HEAD_PREFIXES = ("classifier.", "qa_outputs.", "cls.")


class Model(NamedTuple):
    """A model in memory, in the terms of reference.forward and of fastbert._core.Model."""

    config: dict[str, Any]
    weights: Weights

    def tensors(self) -> dict[str, tuple[NDArray[np.float32], str, tuple[int, ...]]]:
        """The weights as fastbert._core.Model takes them."""
        return {name: (w, "F32", w.shape) for name, w in self.weights.items()}


class Batch(NamedTuple):
    ids: NDArray[np.int32]  # [tokens]
    offsets: NDArray[np.int64]  # [batch + 1]
    type_ids: NDArray[np.int32]  # [tokens]


# ---- numbers ----


def _raw(name: str, seed: int, n: int) -> NDArray[np.uint64]:
    return np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(n)


def _normal(name: str, seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Sums of four uniform 16-bit integers, scaled to mean 0 and variance 1: near normal, within 3.5 deviations."""
    words = _raw(name, seed, math.prod(shape)).view(np.uint16).reshape(-1, 4)
    return ((words.sum(axis=1, dtype=np.int32) - 131070) / math.sqrt((65536**2 - 1) / 3)).reshape(shape)


def random_batch(lengths: Iterable[int], vocab_size: int, type_vocab_size: int = 2, seed: int = 0) -> Batch:
    """Random ids; the second half of each sequence has the highest token type, as the second text of a pair."""
    lengths = list(lengths)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids = (_raw("ids", seed, int(offsets[-1])) % np.uint64(vocab_size)).astype(np.int32)
    second = [np.arange(n) >= (n + 1) // 2 for n in lengths]
    return Batch(ids, offsets, np.concatenate([[], *second]).astype(np.int32) * (type_vocab_size - 1))


# ---- a model in memory ----


def bert_config(**config: Any) -> dict[str, Any]:
    """The content of config.json: a small model, changed by ``config``. A key set to None is left out."""
    defaults = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 4 * config.get("hidden_size", 64),
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    return {key: value for key, value in (defaults | config).items() if value is not None}


def _shapes(config: Mapping[str, Any], sentence: Sentence | None) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    def linear(name: str, n_out: int, n_in: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    norm("embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", intermediate, hidden)
        linear(f"{layer}.output.dense", hidden, intermediate)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    for layer, rows in HEADS.get((config.get("architectures") or [""])[0], {}).items():
        n = len(config.get("id2label", "12")) if rows == "labels" else config.get(rows, rows)
        linear(layer, n, hidden)
        if layer.endswith("LayerNorm"):
            norm(layer)
        if layer == "cls.predictions":
            del shapes[f"{layer}.weight"]
    if sentence:
        n_in = hidden * len(sentence.pooling)
        for i, (_, n_out) in enumerate(sentence.dense):
            linear(f"dense.{i}", n_out, n_in)
            n_in = n_out
    return shapes


# (mean, standard deviation * sqrt(columns)) by the first ending that fits the name
_SCALES = {
    "LayerNorm.weight": (1.0, 0.25),
    "query.weight": (0.0, 1.7),
    "key.weight": (0.0, 1.7),
    "attention.output.dense.weight": (0.0, 0.3),
    ".weight": (0.0, 1.0),
    ".bias": (0.0, 0.1),
}


def random_model(
    *, seed: int = 0, sentence: Sentence | None = None, dtype: str = "F32", pooler: bool = True, **config: Any
) -> Model:
    """A model in memory. ``config`` as in bert_config; ``dtype`` F32, F16 or BF16: the values are rounded to it."""
    config = bert_config(**config)
    weights = {}
    for name, shape in _shapes(config, sentence).items():
        if name.startswith("pooler.") and not pooler:
            continue
        mean, deviation = next(scale for ending, scale in _SCALES.items() if name.endswith(ending))
        columns = shape[1] if len(shape) == 2 else 1
        values = mean + deviation / math.sqrt(columns) * _normal(name, seed, shape)
        weights[name] = _decode(dtype, _encode(dtype, values.astype(np.float32)))
    config["hidden_act"] = HIDDEN_ACTS[config["hidden_act"]]
    config["pooling"] = tuple(sentence.pooling) if sentence else ()
    config["dense"] = tuple(act for act, _ in sentence.dense) if sentence else ()
    config["normalize"] = sentence.normalize if sentence else False
    return Model(config, weights)


# ---- files ----


def _encode(dtype: str, x: NDArray[np.float32]) -> NDArray[Any]:
    """Rounded to the nearest value of ``dtype``, ties to even. NumPy has no bfloat16: its bits, as uint16."""
    if dtype == "BF16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return x.astype({"F32": np.float32, "F16": np.float16}[dtype])


def _decode(dtype: str, x: NDArray[Any]) -> NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else x.astype(np.float32)


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The F32 and I64 tensors of a trusted file: the tests' own reader, to check the strict one against."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    dtypes = {"F32": "<f4", "I64": "<i8"}
    return {
        name: np.frombuffer(data, dtypes[t["dtype"]], math.prod(t["shape"]), start + t["data_offsets"][0]).reshape(
            t["shape"]
        )
        for name, t in header.items()
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, kind: str, words: Sequence[str]) -> None:
    if kind == "vocab":
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8", newline="\n")
        return
    from tokenizers import BertWordPieceTokenizer

    BertWordPieceTokenizer({word: i for i, word in enumerate(words)}).save(str(folder / "tokenizer.json"))


_POOLING_KEYS = {  # of 1_Pooling/config.json
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_DENSE_ACTS = {
    "none": "torch.nn.modules.linear.Identity",
    "gelu": "torch.nn.modules.activation.GELU",
    "relu": "torch.nn.modules.activation.ReLU",
    "silu": "torch.nn.modules.activation.SiLU",
    "tanh": "torch.nn.modules.activation.Tanh",
}


def _write_sentence(folder: Path, sentence: Sentence, hidden: int, weights: Weights, dtype: str) -> None:
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modes = {key: name in sentence.pooling for name, key in _POOLING_KEYS.items()}
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden} | modes)
    for i, (act, n_out) in enumerate(sentence.dense):
        path = f"{len(modules)}_Dense"
        modules.append(("Dense", path))
        w = weights[f"dense.{i}.weight"]
        content = {"in_features": w.shape[1], "out_features": n_out, "bias": True}
        _write_json(folder / path / "config.json", content | {"activation_function": _DENSE_ACTS[act]})
        linear = {
            f"linear.{part}": (dtype, _encode(dtype, weights[f"dense.{i}.{part}"])) for part in ("weight", "bias")
        }
        write_safetensors(folder / path / "model.safetensors", linear)
    if sentence.normalize:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))  # the folder is not made: real models lack it
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    if sentence.max_seq_length is not None:
        content = {"max_seq_length": sentence.max_seq_length, "do_lower_case": False}
        _write_json(folder / "sentence_bert_config.json", content)


def random_heads(config: Mapping[str, Any], seed: int, dtype: str) -> Weights:
    """The tensors of the two heads of pre-training, but for the decoder: cls.*."""
    hidden = config["hidden_size"]
    shapes = {
        "cls.predictions.bias": (config["vocab_size"],),
        "cls.predictions.transform.dense.weight": (hidden, hidden),
        "cls.predictions.transform.dense.bias": (hidden,),
        "cls.predictions.transform.LayerNorm.weight": (hidden,),
        "cls.predictions.transform.LayerNorm.bias": (hidden,),
        "cls.seq_relationship.weight": (2, hidden),
        "cls.seq_relationship.bias": (2,),
    }
    values = {name: _normal(name, seed, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: _decode(dtype, _encode(dtype, w)) for name, w in values.items()}


def _write_google(prefix: Path, tensors: formats.Tensors) -> None:
    """A checkpoint as google-research/bert writes it: its names, kernels [in, out]."""
    theirs = {}
    for name, (dtype, array) in tensors.items():
        name, transposed = formats.tensorflow_name(name)
        theirs[name] = dtype, np.ascontiguousarray(array.T) if transposed else array
    formats.write_tensorflow(prefix, theirs)


# format of write_model -> file, writer
FORMATS = {
    "safetensors": ("model.safetensors", formats.write_safetensors),
    "pytorch": ("pytorch_model.bin", formats.write_pytorch),
    "pytorch_legacy": ("pytorch_model.bin", formats.write_pytorch_legacy),
    "tensorflow": ("bert_model.ckpt", _write_google),
}


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "F32",
    prefix: str = "",
    gamma_beta: bool = False,
    sharded: bool = False,
    pooler: bool = True,
    heads: bool = False,
    format: str = "safetensors",
    tokenizer: str | None = "vocab",
    vocabulary: Sequence[str] = VOCABULARY,
    sentence: Sentence | None = None,
    model: Model | None = None,
    **config: Any,
) -> Model:
    """Write a Hugging Face BERT folder with random weights, and return the model as the files hold it.

    Parameters
    ----------
    folder : Path
        Made if absent.
    seed : int
        Of the weights.
    dtype : "F32", "F16" or "BF16"
        Of the stored tensors.
    prefix : str
        Put before every tensor name, such as "bert.".
    gamma_beta : bool
        LayerNorm.gamma and LayerNorm.beta, the TensorFlow spelling that google-bert/bert-base-uncased keeps.
    sharded : bool
        Two files and an index instead of one file.
    pooler : bool
        Whether the checkpoint has pooler.dense.*.
    heads : bool
        The two heads of pre-training as well, cls.*. The decoder is the table of word embeddings: a PyTorch file has it
        again, in the same storage, the others not.
    format : key of FORMATS
        Of the weights. "tensorflow" is google-research/bert's folder: bert_config.json, bert_model.ckpt.*, vocab.txt.
    tokenizer : "vocab", "json" or None
        vocab.txt alone, tokenizer.json alone (needs the package ``tokenizers``), or neither.
    vocabulary : sequence of str
        Word pieces in the order of their ids; vocab_size defaults to their number.
    sentence : Sentence or None
        Adds modules.json and what it refers to, in the layout of all-MiniLM-L6-v2.
    model : Model or None
        What an earlier call with the same arguments but for the form of the files returned: saves time.
    **config
        Keys of config.json, as in bert_config: hidden_size=..., hidden_act="gelu_new", model_type=None. With
        architectures=[a key of HEADS] the model has that head, with labels for id2label={"0": ..., "1": ...}.
    """
    config = bert_config(**({"vocab_size": len(vocabulary)} | config))
    model = model or random_model(seed=seed, sentence=sentence, dtype=dtype, pooler=pooler, **config)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)

    weights = {name: w for name, w in model.weights.items() if not name.startswith("dense.")}
    tensors = {
        name if name.startswith(HEAD_PREFIXES) else f"{prefix}{name}": (dtype, _encode(dtype, w))
        for name, w in weights.items()
    }
    if heads:
        random = random_heads(config, seed, dtype)
        tensors |= {name: (dtype, _encode(dtype, w)) for name, w in random.items()}
    if gamma_beta:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {re.sub("|".join(old), lambda m: old[m[0]], name): tensor for name, tensor in tensors.items()}
    if format == "tensorflow":
        (folder / "config.json").rename(folder / "bert_config.json")
    else:
        positions = np.arange(config["max_position_embeddings"], dtype=np.int64)[None]
        tensors[f"{prefix}embeddings.position_ids"] = "I64", positions  # a buffer that many real files carry
    if heads and format.startswith("pytorch"):
        tensors["cls.predictions.decoder.weight"] = tensors[f"{prefix}embeddings.word_embeddings.weight"]

    file, write = FORMATS[format]
    if sharded:
        stem, _, suffix = file.partition(".")
        names = sorted(tensors)
        halves = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
        for part_file, part in halves.items():
            write(folder / part_file, {name: tensors[name] for name in part})
        index = {
            "metadata": {"total_size": sum(array.nbytes for _, array in tensors.values())},
            "weight_map": {name: part_file for part_file, part in halves.items() for name in part},
        }
        _write_json(folder / f"{file}.index.json", index)
    else:
        write(folder / file, tensors)

    if tokenizer:
        _write_tokenizer(folder, tokenizer, vocabulary)
    if sentence:
        _write_sentence(folder, sentence, config["hidden_size"], model.weights, dtype)
    return model

"""Reader of a BERT folder: config.json and weights, checked against each other.

Weights are the first of these that is there:

    model.safetensors, the shards of model.safetensors.index.json
    pytorch_model.bin, the shards of pytorch_model.bin.index.json
    *.index and its data files, a TensorFlow checkpoint; the only one, unless it is named

DistilBERT, RoBERTa, XLM-RoBERTa and CamemBERT are the same mathematics under other names: they are read as what they
are in BERT's. What cannot be run exactly is refused by name: other architectures, other mathematics, missing, extra and
misshapen tensors. Nothing is allocated from a number of config.json: the tensors in the file must confirm it.
"""

import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from fastbert.families import FAMILIES, Family
from fastbert.files import count, read_json, require
from fastbert.pytorch_bin import open_pytorch
from fastbert.safetensors import open_safetensors
from fastbert.tensorflow_ckpt import open_tensorflow
from fastbert.tensors import FLOAT_DTYPES, Tensor

# config.json name -> name in the engine (transformers, activations.py: each alias is the same function).
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Whole numbers of config.json: value where absent (that of transformers' BertConfig), smallest, largest.
_COUNTS = {
    "vocab_size": (30522, 1, 1 << 24),
    "hidden_size": (768, 1, 1 << 16),
    "num_hidden_layers": (12, 1, 1 << 10),
    "num_attention_heads": (12, 1, 1 << 16),
    "intermediate_size": (3072, 1, 1 << 20),
    "max_position_embeddings": (512, 1, 1 << 20),
    "type_vocab_size": (2, 1, 1 << 16),
}

# Keys that change the mathematics, and the values under which it is BERT's.
_REQUIRED = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "feed_forward_type": ("original", None),  # gated units of models that bring their own code
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

_GOOGLE_CONFIG = "bert_config.json"

# Files with weights, the first that is there counts; "shards" lists others.
_WEIGHTS = (
    ("model.safetensors", open_safetensors, False),
    ("model.safetensors.index.json", open_safetensors, True),
    ("pytorch_model.bin", open_pytorch, False),
    ("pytorch_model.bin.index.json", open_pytorch, True),
)

# Endings of files with weights that are not read, to be named where there are no others.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".safetensors")

# "module." is DataParallel's, "0.auto_model." sentence-transformers', "bert." that of the models with a head.
_PREFIX = r"(?:(?:{}|model|module|0|auto_model)\.)*"
_ENCODER = ("embeddings.", "encoder.", "pooler.")
_BUFFERS = {"embeddings.position_ids", "embeddings.token_type_ids"}  # 0, 1, 2, ... and zeros: no weights
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

_POSITIONS = "embeddings.position_embeddings.weight"
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; names as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    """Positions of a text, without those that the model skips."""
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    """A value of ACTIVATIONS."""
    pad_token_id: int | None
    model_type: str = "bert"
    """A key of FAMILIES."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def skipped_positions(self) -> int:
        """Rows of the checkpoint's position table before that of a text's first token."""
        return self.pad_token_id + 1 if self.family.skips_padding else 0


@dataclass(frozen=True)
class Checkpoint:
    """A BERT folder, weights mapped."""

    folder: Path
    config: BertConfig
    tensors: dict[str, Tensor]
    """The encoder's tensors as BERT's: those of encoder_shapes(config), with or without pooler.dense.*."""
    other: dict[str, Tensor]
    """All other tensors (heads), under their names in transformers: classifier.weight, cls.predictions.bias, ..."""

    def find(self, name: str, shape: Iterable[int]) -> Tensor | None:
        """The tensor of this name, in `tensors` or `other`; None if there is none.

        Raises ValueError, which names folder and tensor, for another shape or dtype.
        """
        tensor = self.other.get(name, self.tensors.get(name))
        if tensor is not None:
            check_tensor(f"{self.folder}: {name}", tensor, shape)
        return tensor


def load_checkpoint(folder: Path, prefix: Path | None = None) -> Checkpoint:
    """Read config.json (else bert_config.json) and the weights, those of the TensorFlow checkpoint ``prefix`` if given.

    Raises
    ------
    OSError
        A file is missing or cannot be read.
    ValueError
        A file is malformed, or the model is not one that this engine computes; the text names the file and, for
        weights, the tensor, what was expected and what was found.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not os.path.lexists(path) and os.path.lexists(folder / _GOOGLE_CONFIG):
        path = folder / _GOOGLE_CONFIG
    config = load_config(path)
    tensors, other = _load_tensors(config, *open_weights(folder, prefix))
    return Checkpoint(folder, config, tensors, other)


# ---- config.json ----


def load_config(path: Path) -> BertConfig:
    """Read and check config.json or bert_config.json. Raises OSError or ValueError, with the path and the key."""
    config = read_json(path, dict)
    model_type = config.get("model_type") or "bert"
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type: expected one of {', '.join(FAMILIES)}, got {reprlib.repr(config['model_type'])}"
        )
    family = FAMILIES[model_type]
    require(path, config, _REQUIRED)
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and "AutoModel" in auto_map:
        raise ValueError(f"{path}: auto_map: expected a plain BERT, got a model that brings its own code")
    if path.name == _GOOGLE_CONFIG:
        config = {"type_vocab_size": 16} | config  # BertConfig of google-research/bert
    if not family.has_token_types:
        config |= {"type_vocab_size": 2}  # of zeros
    counts = {}
    for key, (absent, *limits) in _COUNTS.items():
        key_there = family.keys.get(key, key)
        value = config.get(key_there, family.absent.get(key, absent))
        counts[key] = count(path, key_there, value, *limits)
    if counts["hidden_size"] % counts["num_attention_heads"]:
        raise ValueError(
            f"{path}: hidden_size: expected a multiple of num_attention_heads {counts['num_attention_heads']}, "
            f"got {counts['hidden_size']}"
        )
    eps = config.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not 1e-37 <= eps <= 1:  # from 1e-37: no subnormal float32
        raise ValueError(f"{path}: layer_norm_eps: expected a number from 1e-37 to 1, got {reprlib.repr(eps)}")
    act_key = family.keys.get("hidden_act", "hidden_act")
    act = config.get(act_key, "gelu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"{path}: {act_key}: expected one of {', '.join(ACTIVATIONS)}, got {reprlib.repr(act)}")
    pad = config.get("pad_token_id", family.absent.get("pad_token_id", 0))
    if pad is not None or family.skips_padding:
        count(path, "pad_token_id", pad, 0, counts["vocab_size"] - 1)
    if family.skips_padding:
        positions = count(path, "max_position_embeddings", counts["max_position_embeddings"], pad + 2, 1 << 20)
        counts["max_position_embeddings"] = positions - (pad + 1)
    return BertConfig(
        **counts, layer_norm_eps=float(eps), hidden_act=ACTIVATIONS[act], pad_token_id=pad, model_type=model_type
    )


# ---- weights ----


def encoder_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint's encoder, under BERT's names; the pooler comes last."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    shapes["embeddings.word_embeddings.weight"] = (config.vocab_size, hidden)
    shapes[_POSITIONS] = (config.max_position_embeddings + config.skipped_positions, hidden)
    if config.family.has_token_types:
        shapes[_TOKEN_TYPES] = (config.type_vocab_size, hidden)
    layer_norm("embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        linear(f"{layer}.attention.self.query", hidden, hidden)
        linear(f"{layer}.attention.self.key", hidden, hidden)
        linear(f"{layer}.attention.self.value", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        layer_norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", intermediate, hidden)
        linear(f"{layer}.output.dense", hidden, intermediate)
        layer_norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    return shapes


_Files = list[tuple[Path, dict[str, Tensor]]]


def _load_tensors(config: BertConfig, source: Path, files: _Files) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors under BERT's names, and all others. `source` says what tensors there are."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}  # name here -> file and name there, for messages
    prefix = re.compile(_PREFIX.format(config.family.prefix))
    for path, content in files:
        for name, tensor in content.items():
            canonical = _canonical(name[prefix.match(name).end() :], config.family)
            if canonical in tensors:
                raise ValueError(f"{path}: {name}: expected one tensor of this meaning, got also {places[canonical]}")
            if canonical not in _BUFFERS:
                tensors[canonical] = tensor
                places[canonical] = f"{path}: {name}"
    other = {name: tensors.pop(name) for name in list(tensors) if not name.startswith(_ENCODER)}

    shapes = encoder_shapes(config)
    if not any(name.startswith("pooler.") for name in tensors):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("pooler.")}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{source}: {name}: expected {list(shape)}, got no such tensor")
        check_tensor(places[name], tensors[name], shape)
    for name in tensors:
        if name not in shapes:  # another architecture, or more layers than num_hidden_layers
            raise ValueError(
                f"{places[name]}: expected no such tensor in a {config.model_type} model of "
                f"{config.num_hidden_layers} layers (config.json)"
            )
    tensors[_POSITIONS] = tensors[_POSITIONS].rows(config.skipped_positions)
    if not config.family.has_token_types:
        shape = config.type_vocab_size, config.hidden_size
        tensors[_TOKEN_TYPES] = Tensor(memoryview(bytes(4 * math.prod(shape))), "F32", shape)
    return tensors, other


def check_tensor(place: str, tensor: Tensor, shape: Iterable[int]) -> None:
    """Raise ValueError, which begins with ``place``, unless the tensor has this shape and a float dtype."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{place}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{place}: expected a dtype of {', '.join(FLOAT_DTYPES)}, got {tensor.dtype}")


def _canonical(name: str, family: Family) -> str:
    """BERT's name of a tensor whose prefix is gone. Names of tensors outside the encoder stay other names."""
    for theirs, ours in family.names:
        name = name.replace(theirs, ours)
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def open_weights(folder: Path, prefix: Path | None = None) -> tuple[Path, _Files]:
    """Map the weights of a folder, or the TensorFlow checkpoint ``prefix``.

    Returns
    -------
    (Path, list of (Path, dict of str to Tensor))
        The file that says what tensors there are, and each file with tensors.

    Raises
    ------
    OSError, ValueError
        As from load_checkpoint.
    """
    if prefix is None:
        for name, read, sharded in _WEIGHTS:
            path = folder / name
            if os.path.lexists(path):
                return path, _load_shards(path, read) if sharded else [(path, read(path))]
        found = sorted(folder.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(path.stem for path in found)
            raise ValueError(f"{folder}: expected one TensorFlow checkpoint, or the path of one, got {names}")
        if not found:
            others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _OTHER_WEIGHTS)
            raise FileNotFoundError(
                f"{folder}: expected {', '.join(name for name, _, _ in _WEIGHTS)} or a TensorFlow checkpoint "
                f"(*.index); found {', '.join(others) or 'no weights'}"
            )
        prefix = found[0].with_suffix("")
    path = prefix.with_name(f"{prefix.name}.index")
    return path, [(path, open_tensorflow(prefix))]


def _load_shards(index_path: Path, read: Callable[[Path], dict[str, Tensor]]) -> _Files:
    weight_map = read_json(index_path, dict).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index_path}: weight_map: expected an object of file names")
    suffix = index_path.name.removesuffix(".index.json").rpartition(".")[2]
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    files = []
    for shard, names in shards.items():
        if "\\" in shard or PurePath(shard).name != shard or not shard.endswith(f".{suffix}"):
            raise ValueError(f"{index_path}: weight_map: expected plain .{suffix} names, got {shard[:99]!r}")
        path = index_path.parent / shard
        content = read(path)
        for name in sorted(names ^ content.keys()):
            found = "none of that name" if name in names else "one that is not listed"
            raise ValueError(f"{path}: {name}: expected the tensors that {index_path.name} lists, got {found}")
        files.append((path, content))
    return files

"""Reader of a Hugging Face BERT folder: config.json and safetensors weights, checked against each other.

What cannot be run exactly is refused by name: other architectures, other mathematics, missing, extra and misshapen
tensors. Nothing is allocated from a number of config.json: the tensors in the file must confirm it.
"""

import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from fastbert.files import count, read_json, require
from fastbert.safetensors import Tensor, open_safetensors

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

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")

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
    "model_type": ("bert", None),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "feed_forward_type": ("original", None),  # gated units of models that bring their own code
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

# Files that hold weights which are not read at present, to be named where safetensors are missing.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".index", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")

# "module." is DataParallel's, "0.auto_model." sentence-transformers', "bert." that of the models with a head.
_PREFIX = re.compile(r"(?:(?:bert|model|module|0|auto_model)\.)*")
_ENCODER = ("embeddings.", "encoder.", "pooler.")
_BUFFERS = {"embeddings.position_ids", "embeddings.token_type_ids"}  # 0, 1, 2, ... and zeros: no weights
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; names as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    """A value of ACTIVATIONS."""
    pad_token_id: int | None


@dataclass(frozen=True)
class Checkpoint:
    """A BERT folder, weights mapped."""

    folder: Path
    config: BertConfig
    tensors: dict[str, Tensor]
    """The encoder's tensors, exactly those of encoder_shapes(config), with or without pooler.dense.*."""
    other: dict[str, Tensor]
    """All other tensors (heads), under their names in the file."""

    def find(self, name: str, shape: Iterable[int]) -> Tensor | None:
        """The tensor that transformers calls `name`, without the prefix of the encoder; None if there is none.

        Raises ValueError, which names folder and tensor, for another shape or dtype, or two tensors of this meaning.
        """
        places = {stored: tensor for stored, tensor in self.other.items() if _canonical(stored) == name}
        if name in self.tensors:
            places[name] = self.tensors[name]
        if len(places) > 1:
            raise ValueError(f"{self.folder}: {name}: expected one tensor of this meaning, got {', '.join(places)}")
        for stored, tensor in places.items():
            check_tensor(f"{self.folder}: {stored}", tensor, shape)
            return tensor
        return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and model.safetensors (or the shards of model.safetensors.index.json).

    Raises
    ------
    OSError
        A file is missing or cannot be read.
    ValueError
        A file is malformed, or the model is not one that this engine computes; the text names the file and, for
        weights, the tensor, what was expected and what was found.
    """
    folder = Path(folder)
    config = load_config(folder / "config.json")
    tensors, other = _load_tensors(folder, config)
    return Checkpoint(folder, config, tensors, other)


# ---- config.json ----


def load_config(path: Path) -> BertConfig:
    """Read and check config.json. Raises OSError or ValueError, with the path and the key."""
    config = read_json(path, dict)
    require(path, config, _REQUIRED)
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and "AutoModel" in auto_map:
        raise ValueError(f"{path}: auto_map: expected a plain BERT, got a model that brings its own code")
    counts = {key: count(path, key, config.get(key, absent), *limits) for key, (absent, *limits) in _COUNTS.items()}
    if counts["hidden_size"] % counts["num_attention_heads"]:
        raise ValueError(
            f"{path}: hidden_size: expected a multiple of num_attention_heads {counts['num_attention_heads']}, "
            f"got {counts['hidden_size']}"
        )
    eps = config.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not 1e-37 <= eps <= 1:  # from 1e-37: no subnormal float32
        raise ValueError(f"{path}: layer_norm_eps: expected a number from 1e-37 to 1, got {reprlib.repr(eps)}")
    act = config.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {reprlib.repr(act)}")
    pad = config.get("pad_token_id", 0)
    if pad is not None:
        count(path, "pad_token_id", pad, 0, counts["vocab_size"] - 1)
    return BertConfig(**counts, layer_norm_eps=float(eps), hidden_act=ACTIVATIONS[act], pad_token_id=pad)


# ---- weights ----


def encoder_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the encoder, as in transformers' BertModel; the pooler comes last."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    shapes["embeddings.word_embeddings.weight"] = (config.vocab_size, hidden)
    shapes["embeddings.position_embeddings.weight"] = (config.max_position_embeddings, hidden)
    shapes["embeddings.token_type_embeddings.weight"] = (config.type_vocab_size, hidden)
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


def _load_tensors(folder: Path, config: BertConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors under the names of encoder_shapes, and all others under their own."""
    source, files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}  # encoder name -> file and name there, for messages
    other: dict[str, Tensor] = {}
    for path, content in files:
        for name, tensor in content.items():
            canonical = _canonical(name)
            if not canonical.startswith(_ENCODER):
                other[name] = tensor
            elif canonical in tensors:
                raise ValueError(f"{path}: {name}: expected one tensor of this meaning, got also {places[canonical]}")
            elif canonical not in _BUFFERS:
                tensors[canonical] = tensor
                places[canonical] = f"{path}: {name}"

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
                f"{places[name]}: expected no such tensor in a BERT of {config.num_hidden_layers} layers (config.json)"
            )
    return tensors, other


def check_tensor(place: str, tensor: Tensor, shape: Iterable[int]) -> None:
    """Raise ValueError, which begins with ``place``, unless the tensor has this shape and a float dtype."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{place}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{place}: expected a dtype of {', '.join(FLOAT_DTYPES)}, got {tensor.dtype}")


def _canonical(name: str) -> str:
    """An encoder tensor's name in transformers' BertModel. Names of other tensors stay other names."""
    name = name[_PREFIX.match(name).end() :]
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _weight_files(folder: Path) -> tuple[Path, list[tuple[Path, dict[str, Tensor]]]]:
    """The file that says what tensors there are, and (file, its tensors) for each file with weights."""
    path = folder / "model.safetensors"
    if os.path.lexists(path):
        return path, [(path, open_safetensors(path))]
    index_path = folder / "model.safetensors.index.json"
    if os.path.lexists(index_path):
        return index_path, _load_shards(index_path)
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _OTHER_WEIGHTS)
    raise FileNotFoundError(
        f"{folder}: expected model.safetensors or model.safetensors.index.json, which are the weights read at present; "
        f"found {', '.join(found) or 'no weights'}"
    )


def _load_shards(index_path: Path) -> list[tuple[Path, dict[str, Tensor]]]:
    weight_map = read_json(index_path, dict).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index_path}: weight_map: expected an object of file names")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    files = []
    for shard, names in shards.items():
        if "\\" in shard or PurePath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index_path}: weight_map: expected plain .safetensors names, got {shard[:99]!r}")
        path = index_path.parent / shard
        content = open_safetensors(path)
        for name in sorted(names ^ content.keys()):
            found = "none of that name" if name in names else "one that is not listed"
            raise ValueError(f"{path}: {name}: expected the tensors that {index_path.name} lists, got {found}")
        files.append((path, content))
    return files

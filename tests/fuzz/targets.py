"""A fuzzing target for each format: the content of a file, which may be refused with ValueError or OSError.

    python -m tests.fuzz.run                                            seconds of seeded mutations for each target
    python -m tests.fuzz.run --target pytorch --seconds 600
    python -m tests.fuzz.run --target pytorch --seconds 600 --atheris   guided by coverage (pip install atheris)

What a target opens it reads in full. Seeds are files as the tests write them. Inputs that fail are kept in --keep, and
given again with --input FILE. test_fuzz.py runs a fixed number of mutations.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbert._core import Model
from fastbert.archive import read_directory, unpack
from fastbert.checkpoint import load_checkpoint, load_config
from fastbert.pytorch_bin import open_pytorch
from fastbert.safetensors import open_safetensors
from fastbert.sentence import load_sentence_config
from fastbert.tensorflow_ckpt import MAX_INDEX_BYTES, _unsnap, open_tensorflow
from fastbert.tensors import FLOAT_DTYPES, Tensor
from fastbert.tokenizer import load_tokenizer
from tests import formats
from tests.models import Sentence, write_model
from tests.test_tensorflow_ckpt import snappy


class Target(NamedTuple):
    run: Callable[[bytes], object]
    seeds: list[bytes]


class Targets:
    """All targets, in a temporary folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models = 0
        tensors = {
            "a": ("F32", np.arange(6, dtype="<f4").reshape(2, 3)),
            "b": ("BF16", np.arange(4, dtype="<u2")),
            "c": ("I64", np.arange(2, dtype="<i8")),
        }
        model = self._model()
        legacy, zipped, safe = (
            self._written(write, tensors)
            for write in (formats.write_pytorch_legacy, formats.write_pytorch, formats.write_safetensors)
        )
        prefix = folder / "bundle"
        formats.write_tensorflow(
            prefix, {f"bert/{name}/kernel" if name == "a" else name: t for name, t in tensors.items()}
        )
        self._bundle = index = folder.joinpath("bundle.index").read_bytes()
        self._data = folder.joinpath("bundle.data-00000-of-00001").read_bytes()
        config = (model / "config.json").read_bytes()
        vocabulary = b"\n".join([b"[PAD]", b"[UNK]", b"[CLS]", b"[SEP]", b"[MASK]", b"a", b"##b", b"the"])
        tokenizer = self._model(tokenizer="json", vocabulary=vocabulary.decode().split()) / "tokenizer.json"
        modules = {name: (model / name).read_bytes() for name in ("modules.json", "1_Pooling/config.json")}
        self.all = {
            "safetensors": Target(lambda data: self._tensors(open_safetensors, data), [safe]),
            "pytorch": Target(lambda data: self._tensors(open_pytorch, data), [zipped]),
            "pytorch_legacy": Target(lambda data: self._tensors(open_pytorch, data), [legacy]),
            "pickle": Target(self._pickle, [formats.pytorch_pickle(tensors)[0]]),
            "tensorflow": Target(self._index, [index]),
            "tensorflow_block": Target(self._block, [index[: index.index(b"\0\0\0\0\1\0\0\0") + 8]]),
            "tensorflow_data": Target(self._bundle_data, [self._data]),
            "snappy": Target(self._snappy, [snappy(index), snappy(vocabulary * 9)]),
            "zip": Target(self._zip, [formats.pytorch_zip({"config.json": config, "vocab.txt": vocabulary})]),
            "config": Target(lambda data: load_config(self._file("config.json", data)), [config]),
            "model": Target(self._load, [(model / "model.safetensors").read_bytes()]),
            "modules": Target(self._modules, [json.dumps({n: d.decode() for n, d in modules.items()}).encode()]),
            "vocabulary": Target(lambda data: self._tokenize("vocab.txt", data), [vocabulary]),
            "tokenizer": Target(lambda data: self._tokenize("tokenizer.json", data), [tokenizer.read_bytes()]),
        }
        self._model_folder = model

    def _model(self, **options: object) -> Path:
        self._models += 1
        folder = self._folder / f"model{self._models}"
        size = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        words = options.pop("vocabulary", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
        write_model(folder, **size, max_position_embeddings=8, vocabulary=words, sentence=Sentence(), **options)
        return folder

    def _file(self, name: str, data: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(data)
        return path

    def _written(self, write: Callable[[Path, formats.Tensors], None], tensors: formats.Tensors) -> bytes:
        path = self._folder / "written"
        write(path, tensors)
        return path.read_bytes()

    def _read_all(self, tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            bytes(tensor.data)
            if tensor.dtype in FLOAT_DTYPES:
                tensor.array()

    def _tensors(self, read: Callable[[Path], dict[str, Tensor]], data: bytes) -> None:
        self._read_all(read(self._file("weights", data)))

    def _pickle(self, data: bytes) -> None:
        entries = {"data.pkl": data, "data/0": bytes(24), "data/1": bytes(8), "data/2": bytes(16)}
        self._tensors(open_pytorch, formats.pytorch_zip(entries))

    def _index(self, data: bytes) -> None:
        self._file("bundle.data-00000-of-00001", self._data)
        self._file("bundle.index", data)
        self._read_all(open_tensorflow(self._folder / "bundle"))

    def _block(self, data: bytes) -> None:
        """A data block, and the tensors that it names, under checksums that hold."""
        self._index(formats.table([(b"zz", data)]))

    def _bundle_data(self, data: bytes) -> None:
        self._file("bundle.index", self._bundle)
        self._file("bundle.data-00000-of-00001", data)
        self._read_all(open_tensorflow(self._folder / "bundle"))

    def _snappy(self, data: bytes) -> None:
        assert len(_unsnap("", data)) <= MAX_INDEX_BYTES

    def _zip(self, data: bytes) -> None:
        view = memoryview(data)
        for name, entry in read_directory(Path("x.zip"), view).items():
            for _ in unpack(Path("x.zip"), view, name, entry):
                pass

    def _load(self, data: bytes) -> None:
        """The engine packs what the checkpoint reader lets through."""
        (self._model_folder / "model.safetensors").write_bytes(data)
        checkpoint = load_checkpoint(self._model_folder)
        config = {name: getattr(checkpoint.config, name) for name in checkpoint.config.__dataclass_fields__}
        Model(config, checkpoint.tensors)

    def _modules(self, data: bytes) -> None:
        """{file: content} of a sentence-transformers folder."""
        try:
            files = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(files, dict):
            return
        for name in ("modules.json", "1_Pooling/config.json"):
            content = files.get(name, "")
            (self._model_folder / name).write_bytes(
                content.encode("utf-8", "replace") if isinstance(content, str) else b""
            )
        load_sentence_config(self._model_folder)

    def _tokenize(self, name: str, data: bytes) -> None:
        folder = self._folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        try:
            load_tokenizer(folder, vocab_size=8, max_position_embeddings=16).encode_batch(
                ["a the", "ab " * 40], ["", "b"]
            )
        finally:
            (folder / name).unlink()

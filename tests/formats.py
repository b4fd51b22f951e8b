"""Writers of checkpoint files, in the layouts of their originals: safetensors, PyTorch's .bin, TensorFlow's bundle.

Tensors are given as {name: (dtype, array)}, dtype as in safetensors; bfloat16 as its bits in uint16.
test_pytorch_bin.py compares the .bin files with those of PyTorch where that is installed, test_tensorflow_ckpt.py the
index with a real one.
"""

import io
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert._core import crc32c

Tensors = Mapping[str, tuple[str, NDArray[Any]]]

# ---- safetensors ----


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """In the reference writer's order: widest type first, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    end = 0
    for name in order:
        dtype, array = tensors[name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name][1].tobytes())


# ---- PyTorch ----

_STORAGES = {"F32": "Float", "F16": "Half", "BF16": "BFloat16", "F64": "Double", "I64": "Long", "I32": "Int"}


class Pickle:
    """Writes pickles of protocol 2 as Python's pickler does: what can come again is memoized."""

    def __init__(self) -> None:
        self.data = bytearray(b"\x80\x02")
        self.memo: dict[Any, int] = {}

    def put(self, key: Any = None) -> None:
        """Memoize what was written last, under ``key``, by which it is found again."""
        index = len(self.memo)
        self.memo[(index,) if key is None else key] = index
        self.data += b"q%c" % index if index < 256 else b"r" + struct.pack("<I", index)

    def again(self, key: Any) -> bool:
        """Write a reference to what is memoized under ``key``, if there is such a thing."""
        if key in self.memo:
            index = self.memo[key]
            self.data += b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index)
        return key in self.memo

    def text(self, text: str) -> None:
        if not self.again(text):
            self.data += b"X" + struct.pack("<I", len(text.encode())) + text.encode()
            self.put(text)

    def number(self, n: int) -> None:
        if 0 <= n < 1 << 8:
            self.data += b"K%c" % n
        elif 0 <= n < 1 << 16:
            self.data += b"M" + struct.pack("<H", n)
        elif -(1 << 31) <= n < 1 << 31:
            self.data += b"J" + struct.pack("<i", n)
        else:
            size = n.bit_length() // 8 + 1
            self.data += b"\x8a%c" % size + n.to_bytes(size, "little", signed=True)

    def name(self, module: str, name: str) -> None:
        if not self.again((module, name)):
            self.data += f"c{module}\n{name}\n".encode()
            self.put((module, name))

    def numbers(self, numbers: Iterable[int]) -> None:
        """A tuple."""
        numbers = list(numbers)
        if not numbers:
            self.data += b")"
            return
        if len(numbers) > 3:
            self.data += b"("
        for n in numbers:
            self.number(n)
        self.data += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(numbers), b"t")
        self.put()

    def ordered_dict(self) -> None:
        self.name("collections", "OrderedDict")
        self.data += b")R"
        self.put()

    def tensor(
        self,
        dtype: str,
        key: str,
        numel: int,
        shape: Iterable[int],
        strides: Iterable[int],
        *,
        offset: int = 0,
        legacy: bool,
    ) -> None:
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.data += b"(("
        self.text("storage")
        self.name("torch", f"{_STORAGES[dtype]}Storage")
        self.text(key)
        self.text("cpu")
        self.number(numel)
        self.data += b"N" if legacy else b""
        self.data += b"t"
        self.put()
        self.data += b"Q"
        self.number(offset)
        self.numbers(shape)
        self.numbers(strides)
        self.data += b"\x89"
        self.ordered_dict()
        self.data += b"t"
        self.put()
        self.data += b"R"
        self.put()


def pytorch_pickle(tensors: Tensors, *, legacy: bool = False) -> tuple[bytes, dict[str, bytes]]:
    """The pickle of an OrderedDict of tensors, and the storages: arrays that are the same object share one."""
    pickle = Pickle()
    storages: dict[str, bytes] = {}
    keys: dict[int, str] = {}
    pickle.ordered_dict()
    pickle.data += b"("
    for name, (dtype, array) in tensors.items():
        key = keys.setdefault(id(array), str(len(keys)))
        storages[key] = array.tobytes()
        pickle.text(name)
        strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
        pickle.tensor(dtype, key, array.size, array.shape, strides, legacy=legacy)
    pickle.data += b"u."
    return bytes(pickle.data), storages


def write_pytorch(path: Path, tensors: Tensors) -> None:
    """The zip layout."""
    pickle, storages = pytorch_pickle(tensors)
    entries = {"data.pkl": pickle, "byteorder": b"little"} | {f"data/{key}": data for key, data in storages.items()}
    path.write_bytes(pytorch_zip(entries | {"version": b"3\n"}))


def pytorch_zip(entries: Mapping[str, bytes], folder: str = "archive") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), data)
    return out.getvalue()


LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_VERSION = b"\x80\x02M\xe9\x03."
LEGACY_SYSTEM = (
    b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88"
    b"X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04"
    b"X\x04\x00\x00\x00longq\x07K\x04uu."
)


def legacy_keys(keys: Iterable[str]) -> bytes:
    pickle = Pickle()
    pickle.data += b"]"
    pickle.put()
    pickle.data += b"("
    for key in keys:
        pickle.text(key)
    return bytes(pickle.data + b"e.")


def write_pytorch_legacy(path: Path, tensors: Tensors) -> None:
    """The layout before PyTorch 1.6."""
    pickle, storages = pytorch_pickle(tensors, legacy=True)
    sizes = {str(i): array.itemsize for i, array in enumerate({id(a): a for _, a in tensors.values()}.values())}
    with path.open("wb") as file:
        file.write(LEGACY_MAGIC + LEGACY_VERSION + LEGACY_SYSTEM + pickle + legacy_keys(sorted(storages)))
        for key in sorted(storages):
            file.write(struct.pack("<q", len(storages[key]) // sizes[key]) + storages[key])


# ---- TensorFlow ----

_TF_DTYPES = {"F32": 1, "F64": 2, "I32": 3, "I64": 9, "BF16": 14, "F16": 19}


def varint(n: int) -> bytes:
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer; zeros are left out."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def entry(dtype: int, shape: Iterable[int], shard: int, start: int, size: int, crc: int) -> bytes:
    """BundleEntryProto."""
    dims = b"".join(field(2, field(1, n)) for n in shape)
    parts = (field(1, dtype), field(2, dims), field(3, shard), field(4, start), field(5, size))
    return b"".join(parts) + b"\x35" + struct.pack("<I", crc)


def header(shards: int = 1, endianness: int = 0) -> bytes:
    """BundleHeaderProto, of producer 1."""
    return field(1, shards) + field(2, endianness) + field(3, field(1, 1))


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(entries: Iterable[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    """The contents of a block: keys share the beginning of the one before, but for every sixteenth."""
    out, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


EMPTY_BLOCK = block([])


def table(
    blocks: Iterable[tuple[bytes, bytes]],
    *,
    kind: int = 0,
    compress: Any = None,
    metaindex: bytes = EMPTY_BLOCK,
    gap: bytes = b"",
) -> bytes:
    """A file of (last key or a successor of it, contents) blocks.

    ``compress`` makes Snappy of contents, else ``kind`` is what data blocks are said to be; ``gap`` stands behind them.
    """
    out, handles = bytearray(), []

    def write(contents: bytes, kind: int = 0) -> bytes:
        contents, kind = (compress(contents), 1) if compress else (contents, kind)
        handle = varint(len(out)) + varint(len(contents))
        contents += bytes([kind])
        out.extend(contents + struct.pack("<I", masked(crc32c(contents))))
        return handle

    for key, contents in blocks:
        handles.append((key, write(contents, kind)))
    out += gap
    footer = write(metaindex) + write(block(handles, 1))
    return bytes(out) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def successor(key: bytes) -> bytes:
    """The shortest key that is not before ``key``: its first byte plus one."""
    return bytes([key[0] + 1])


def index(entries: Mapping[str, bytes], shards: int = 1, *, blocks: int = 1, compress: Any = None) -> bytes:
    """The index file of a bundle: {name: BundleEntryProto}."""
    rows = [(b"", header(shards)), *sorted((name.encode(), value) for name, value in entries.items())]
    size = -(-len(rows) // blocks)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    last = [part[-1][0] for part in parts[:-1]] + [successor(parts[-1][-1][0])]
    return table(zip(last, map(block, parts), strict=True), compress=compress)


def write_tensorflow(prefix: Path, tensors: Tensors, *, shards: int = 1, blocks: int = 1, compress: Any = None) -> None:
    """``prefix``.index and ``prefix``.data-*; {TensorFlow name: (dtype, array)}, spread over the shards in turn."""
    entries = {}
    data = [bytearray() for _ in range(shards)]
    for i, name in enumerate(sorted(tensors)):
        dtype, array = tensors[name]
        content, shard = array.tobytes(), data[i % shards]
        crc = masked(crc32c(content))
        entries[name] = entry(_TF_DTYPES[dtype], array.shape, i % shards, len(shard), len(content), crc)
        shard += content
    prefix.with_name(f"{prefix.name}.index").write_bytes(index(entries, shards, blocks=blocks, compress=compress))
    for i, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{shards:05d}").write_bytes(content)


def tensorflow_name(name: str) -> tuple[str, bool]:
    """google-research/bert's name of a tensor of transformers' BertForPreTraining; whether it is transposed there."""
    dense = name.endswith(".weight") and re.search(r"(query|key|value|dense)\.weight$", name) is not None
    name = name.replace("LayerNorm.weight", "LayerNorm/gamma").replace("LayerNorm.bias", "LayerNorm/beta")
    name = re.sub(r"layer\.(\d+)\.", r"layer_\1/", name)
    name = {
        "cls.predictions.bias": "cls/predictions/output_bias",
        "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
        "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
    }.get(name, name)
    name = re.sub(r"_embeddings\.weight$", "_embeddings", name)
    return re.sub(r"\.weight$", "/kernel", name).replace(".", "/"), dense

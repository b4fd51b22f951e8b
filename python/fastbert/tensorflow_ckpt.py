"""Reader of TensorFlow checkpoints of BERT, as google-research/bert writes them, without copying.

    PREFIX.index                    a sorted table of name -> dtype, shape, place and CRC-32C of each tensor
    PREFIX.data-00000-of-00001, ..  their bytes

PREFIX.meta, the graph, is not needed. Names become those of Hugging Face, kernels, which are [in, out] here, are
transposed by their strides, and the slots of optimizers are left out.

The table: data blocks, metaindex block, index block, footer. Each block is a row of (shared, unshared, value length,
rest of the key, value), whose keys share a beginning with the key before, and ends with its restart points; behind it
stand one byte for its compression and its masked CRC-32C. Layouts: TensorFlow, tensorflow/core/lib/io/format.cc,
block_builder.cc, tensorflow/core/protobuf/tensor_bundle.proto; Snappy, format_description.txt.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastbert._core import crc32c
from fastbert.files import map_file, read_file
from fastbert.tensors import Tensor

MAX_INDEX_BYTES = 4 << 20  # that of BERT-Large with two slots for each tensor has 60 kB
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 512
MAX_SHARDS = 99999

_FOOTER_BYTES, _TRAILER_BYTES = 48, 5
_MAGIC = bytes.fromhex("57fb808b247547db")

# DataType (types.proto) -> name here, bytes of an element
_DTYPES = {1: ("F32", 4), 2: ("F64", 8), 3: ("I32", 4), 9: ("I64", 8), 14: ("BF16", 2), 19: ("F16", 2)}

# TensorFlow name -> Hugging Face name, in this order; then "/" becomes ".".
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^cls/squad/", "qa_outputs/"),  # run_squad.py
        (r"^output_(weights|bias)$", r"classifier/output_\1"),  # run_classifier.py
        (r"/layer_(\d+)/", r"/layer/\1/"),
        (r"_embeddings$", "_embeddings/weight"),
        (r"/(kernel|gamma|output_weights)$", "/weight"),
        (r"/(beta|output_bias)$", "/bias"),
    )
]


class _Place(NamedTuple):
    """Where a tensor lies, as the index says."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    size: int
    crc: int


def open_tensorflow(prefix: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Map the checkpoint ``prefix``.index with its data files (see files.map_file) and verify all checksums.

    Returns
    -------
    dict of str to Tensor
        Under Hugging Face names, such as "bert.pooler.dense.weight", each name once.

    Raises
    ------
    OSError
        A file is missing or cannot be read.
    ValueError
        A file breaks a rule of the format or a checksum does not hold; the text names the file, the tensor and what was
        expected.
    """
    path = Path(f"{os.fspath(prefix)}.index")
    index = read_file(path, MAX_INDEX_BYTES)
    shards, places = _parse_index(path, index)
    places = {name: place for name, place in places.items() if name != "global_step" and not _is_slot(name, places)}
    files = {}
    for shard in sorted({place.shard for place in places.values()}):
        data_path = Path(f"{os.fspath(prefix)}.data-{shard:05d}-of-{shards:05d}")
        files[shard] = data_path, map_file(data_path)

    tensors: dict[str, Tensor] = {}
    ends = dict.fromkeys(files, 0)
    for name, place in sorted(places.items(), key=lambda item: (item[1].shard, item[1].start)):
        data_path, data = files[place.shard]
        where = f"{data_path}: {name}"
        end = place.start + place.size
        if place.start < ends[place.shard] or end > len(data):
            raise ValueError(
                f"{where}: expected it between the tensor before, which ends at byte {ends[place.shard]}, and the end "
                f"of the file, {len(data)}, got bytes {place.start} to {end}"
            )
        ends[place.shard] = end
        content = data[place.start : end]
        _check_crc(where, content, place.crc)
        shape, strides = place.shape, None
        if name.endswith("/kernel"):
            if len(shape) != 2:
                raise ValueError(f"{where}: expected a matrix, got {list(shape)}")
            shape, strides = shape[::-1], (1, shape[1])
        renamed = _rename(name)
        if renamed in tensors:
            raise ValueError(f"{where}: expected one tensor of this meaning ({renamed}), got two")
        tensors[renamed] = Tensor(content, place.dtype, shape, strides)
    return tensors


def _is_slot(name: str, places: dict[str, _Place]) -> bool:
    """Optimizers keep slots under the name of their variable: <variable>/adam_m, <variable>/Adam_1."""
    return name.rpartition("/")[0] in places


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name.replace("/", ".")


def _check_crc(where: str, data: bytes | memoryview, masked: int) -> None:
    """Stored checksums are masked: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    got = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if got != masked:
        raise ValueError(f"{where}: expected the checksum {masked:#010x}, got {got:#010x}: the data are damaged")


# ---- the table ----


def _parse_index(path: Path, index: bytes) -> tuple[int, dict[str, _Place]]:
    """The number of data files, and name -> place."""
    if len(index) < _FOOTER_BYTES or index[-8:] != _MAGIC:
        raise ValueError(f"{path}: expected a table that ends with {_MAGIC.hex()}, got {index[-8:].hex()}")
    footer = _Wire(f"{path}: footer", index[-_FOOTER_BYTES:-8])
    metaindex, directory = [(footer.varint(), footer.varint()) for _ in range(2)]
    blocks = []  # (last key, start, size)
    for limit, value in _block(path, index, *directory):
        handle = _Wire(f"{path}: handle of a block", value)
        blocks.append((limit, handle.varint(), handle.varint()))
        handle.finish()
    at = 0  # the blocks cover the file, so none is read twice
    for start, size in [*(handle for _, *handle in blocks), metaindex, directory]:
        if start != at:
            raise ValueError(f"{path}: expected a block at byte {at}, the end of the one before, got {start}")
        at = start + size + _TRAILER_BYTES
    if at != len(index) - _FOOTER_BYTES:
        raise ValueError(f"{path}: expected {at + _FOOTER_BYTES} bytes, got {len(index)}")
    if next(_block(path, index, *metaindex), None):
        raise ValueError(f"{path}: metaindex: expected it empty")

    shards, places, last = 0, {}, None
    for limit, start, size in blocks:
        for key, value in _block(path, index, start, size):
            if (last is None) != (key == b"") or (last is not None and key <= last) or key > limit:
                raise ValueError(f"{path}: {key!r}: expected a header, then ascending keys, up to {limit!r} here")
            last = key
            if not key:
                shards = _parse_header(f"{path}: header", value)
            elif len(places) == MAX_TENSORS:
                raise ValueError(f"{path}: expected at most {MAX_TENSORS} tensors")
            elif not key.isascii():
                raise ValueError(f"{path}: {key!r}: expected a name in ASCII")
            else:
                places[key.decode()] = _parse_entry(f"{path}: {key.decode()}", value, shards)
    if not shards:
        raise ValueError(f"{path}: expected a header, got no entry")
    return shards, places


def _block(path: Path, index: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a block; its keys strictly ascend."""
    where = f"{path}: block at {start}"
    end = start + size
    if end + _TRAILER_BYTES > len(index) - _FOOTER_BYTES:
        raise ValueError(f"{where}: expected it to end in front of the footer, got {size} bytes")
    content, kind = index[start:end], index[end]
    _check_crc(where, index[start : end + 1], int.from_bytes(index[end + 1 : end + 5], "little"))
    if kind == 1:
        content = _unsnap(where, content)
    elif kind != 0:
        raise ValueError(f"{where}: expected compression 0 (none) or 1 (Snappy), got {kind}")
    restarts = int.from_bytes(content[-4:], "little") if len(content) >= 4 else 1 << 32
    if 4 * restarts + 4 > len(content):
        raise ValueError(f"{where}: expected {restarts} restart points inside its {len(content)} bytes")
    entries = _Wire(where, content[: len(content) - 4 * restarts - 4])
    key = None
    while entries.left:
        shared, unshared, value_bytes = entries.varint(), entries.varint(), entries.varint()
        if shared > len(key or b"") or shared + unshared > MAX_KEY_BYTES:
            raise ValueError(
                f"{where}: expected a key of at most {MAX_KEY_BYTES} bytes that shares at most {len(key or b'')} with "
                f"the one before, got {shared} and {unshared} more"
            )
        following = (key or b"")[:shared] + entries.take(unshared)
        if key is not None and following <= key:
            raise ValueError(f"{where}: expected keys to ascend, got {following!r} behind {key!r}")
        key = following
        yield key, entries.take(value_bytes)


def _unsnap(where: str, data: bytes) -> bytes:
    """Decompress Snappy: a length, then literals and copies of what was made before."""
    wire = _Wire(f"{where}: Snappy", data)
    length = wire.varint()
    if length > MAX_INDEX_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_INDEX_BYTES} bytes, got {length}")
    out = bytearray()
    while wire.left:
        tag = wire.take(1)[0]
        kind, high = tag & 3, tag >> 2
        if kind == 0:
            size = 1 + (high if high < 60 else int.from_bytes(wire.take(high - 59), "little"))
            out += wire.take(size)
        else:
            if kind == 1:
                size, offset = 4 + (high & 7), (tag & 0xE0) << 3 | wire.take(1)[0]
            else:
                size, offset = 1 + high, int.from_bytes(wire.take(2 if kind == 2 else 4), "little")
            if not 0 < offset <= len(out):
                raise ValueError(f"{where}: Snappy: expected a copy from 1 to {len(out)} bytes back, got {offset}")
            piece = out[len(out) - offset : len(out) - offset + size]
            out += (piece * (size // len(piece) + 1))[:size]  # it may reach into what it makes
        if len(out) > length:
            break
    if len(out) != length:
        raise ValueError(f"{where}: Snappy: expected {length} bytes, got {len(out)}{' or more' if wire.left else ''}")
    return bytes(out)


# ---- protocol buffers ----


class _Wire:
    """A cursor over bytes. `where` is for messages."""

    def __init__(self, where: str, data: bytes) -> None:
        self._where, self._data, self._at = where, data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"{self._where}: expected {size} more bytes, got {self.left}")
        self._at += size
        return self._data[self._at - size : self._at]

    def varint(self) -> int:
        """Of 64 bits: at most ten bytes."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value
        raise ValueError(f"{self._where}: expected a number of at most 64 bits")

    def finish(self) -> None:
        if self.left:
            raise ValueError(f"{self._where}: expected its end, got {self.left} more bytes")

    def fields(self) -> Iterator[tuple[int, int | bytes]]:
        """(number, value) of each field of a message: bytes for wire type 2, numbers for the others."""
        while self.left:
            number, wire_type = divmod(self.varint(), 8)
            if wire_type == 0:
                yield number, self.varint()
            elif wire_type == 2:
                yield number, self.take(self.varint())
            elif wire_type in (1, 5):
                yield number, int.from_bytes(self.take(8 if wire_type == 1 else 4), "little")
            else:
                raise ValueError(f"{self._where}: expected a field of wire type 0, 1, 2 or 5, got {wire_type}")


def _message(where: str, data: bytes, fields: dict[int, type]) -> dict[int, int | bytes]:
    """The fields of a message, 0 or empty where absent, of these numbers and kinds, each at most once."""
    values: dict[int, int | bytes] = {}
    for number, value in _Wire(where, data).fields():
        if number not in fields or number in values or type(value) is not fields[number]:
            raise ValueError(f"{where}: expected each of the fields {', '.join(map(str, fields))} once, got {number}")
        values[number] = value
    return {number: values.get(number, kind()) for number, kind in fields.items()}


def _parse_header(where: str, data: bytes) -> int:
    """BundleHeaderProto: the number of data files."""
    fields = _message(where, data, {1: int, 2: int, 3: bytes})
    if not 1 <= fields[1] <= MAX_SHARDS:
        raise ValueError(f"{where}: expected 1 to {MAX_SHARDS} data files, got {fields[1]}")
    if fields[2] != 0:
        raise ValueError(f"{where}: expected little-endian data, got big-endian")
    return fields[1]


def _parse_entry(where: str, data: bytes, shards: int) -> _Place:
    """BundleEntryProto: dtype, shape, shard_id, offset, size, crc32c; 7 would be the slices of a partitioned tensor."""
    fields = _message(where, data, {1: int, 2: bytes, 3: int, 4: int, 5: int, 6: int})
    number, shape, shard, start, size, crc = fields.values()
    if number not in _DTYPES:
        known = ", ".join(f"{number} ({name})" for number, (name, _) in _DTYPES.items())
        raise ValueError(f"{where}: dtype: expected one of {known}, got {number}")
    extents = []
    for field, dim in _Wire(where, shape).fields():
        if field != 2 or type(dim) is not bytes:
            raise ValueError(f"{where}: shape: expected nothing but extents, got field {field}")
        extents.append(_message(f"{where}: shape", dim, {1: int, 2: bytes})[1])
    if len(extents) > 64 or any(n >= 1 << 63 for n in extents):
        raise ValueError(f"{where}: shape: expected at most 64 extents from 0, got {extents[:9]}")
    if shard >= shards:
        raise ValueError(f"{where}: shard_id: expected one of {shards} data files, got {shard}")
    dtype, item_bytes = _DTYPES[number]
    if size != math.prod(extents) * item_bytes:
        raise ValueError(f"{where}: expected {math.prod(extents) * item_bytes} bytes for {dtype} {extents}, got {size}")
    return _Place(dtype, tuple(extents), shard, start, size, crc)

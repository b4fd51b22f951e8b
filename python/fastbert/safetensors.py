"""Reader of the safetensors format: strict, and without copying.

    u64 N, little-endian | N bytes of JSON, padded with spaces | tensor bytes

The tensors cover the bytes after the header exactly: no hole, no overlap, nothing behind the last. Their data may have
any alignment. Format and limits: huggingface/safetensors, README.md and safetensors/src/tensor.rs.
"""

import os
import reprlib
from pathlib import Path
from typing import Any

from fastbert.files import map_file, parse_json
from fastbert.tensors import Tensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

# Bits of an element.
DTYPES = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Map a safetensors file (see files.map_file).

    Returns
    -------
    dict of str to Tensor
        In the order of the header.

    Raises
    ------
    OSError
        The file is missing, a folder, or not readable.
    ValueError
        Its content breaks a rule of the format; the text names the file, the tensor and what was expected.
    """
    path = Path(path)
    file_bytes = map_file(path)
    size = len(file_bytes)
    if size < 8:
        raise ValueError(f"{path}: expected a safetensors file of at least 8 bytes, got {size}")
    header_bytes = int.from_bytes(file_bytes[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {header_bytes}")
    if 8 + header_bytes > size:
        raise ValueError(f"{path}: expected {8 + header_bytes} bytes up to the end of the header, got {size}")
    header = _parse_header(path, bytes(file_bytes[8 : 8 + header_bytes]))
    body = file_bytes[8 + header_bytes :]

    entries = {name: _parse_entry(f"{path}: tensor {name!r}", entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(
                f"{path}: tensor {name!r}: expected data_offsets from {end}, the end of the tensor before, got {start}"
            )
        end = stop
    if end != len(body):
        raise ValueError(f"{path}: expected {8 + header_bytes + end} bytes, got {size}")
    return {name: Tensor(body[start:stop], dtype, shape) for name, (dtype, shape, start, stop) in entries.items()}


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    """The header without its metadata, which is checked and dropped."""
    if not header.startswith(b"{"):
        raise ValueError(f"{path}: expected a header that begins with '{{', got {header[:16]!r}")
    if not header.rstrip(b" ").endswith(b"}"):
        raise ValueError(f"{path}: expected a header that ends with '}}' and spaces, got {header[-16:]!r}")
    tensors = parse_json(header, f"{path}: header", object_pairs_hook=_unique)
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__: expected an object of strings, got {reprlib.repr(metadata)}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of two equal keys they take, so a file with both could be two models."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        key.encode()  # half a surrogate pair, as "\\ud800", is no text: UnicodeEncodeError, a ValueError
        result[key] = value
    return result


def _parse_entry(where: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, start, stop of {"dtype", "shape", "data_offsets"}; stop - start is the size of the others."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {reprlib.repr(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, got {reprlib.repr(dtype)}")
    if not _is_counts(shape):
        raise ValueError(f"{where}: shape: expected an array of 64-bit counts, got {reprlib.repr(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets: expected two ascending 64-bit counts, got {reprlib.repr(offsets)}")
    bits = DTYPES[dtype]
    for extent in shape:
        bits *= extent
        if bits >= 1 << 64:
            raise ValueError(f"{where}: shape: expected fewer than 2**64 bits, got {reprlib.repr(shape)}")
    start, stop = offsets
    if 8 * (stop - start) != bits:
        raise ValueError(
            f"{where}: expected {bits} bits for {dtype} {reprlib.repr(shape)}, got data_offsets of {stop - start} bytes"
        )
    return dtype, tuple(shape), start, stop


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 64 for item in value)

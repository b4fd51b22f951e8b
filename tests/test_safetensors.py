"""The safetensors reader: every rule of the format broken once, and random damage."""

import gc
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.safetensors import DTYPES, MAX_HEADER_BYTES, open_safetensors
from tests.models import write_safetensors

# Three tensors of 24, 4 and 0 bytes.
ENTRIES: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    "c": {"dtype": "I64", "shape": [4, 0], "data_offsets": [28, 28]},
}
BODY = bytes(range(28))


def pack(header: Any, body: bytes = BODY) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed(name: str, **keys: Any) -> bytes:
    return pack(ENTRIES | {name: ENTRIES[name] | keys})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        open_safetensors(path)
    assert str(error.value).startswith(str(path))


# ---- good files ----


@pytest.mark.parametrize("padding", range(9))
def test_reads_any_alignment(path: Path, padding: int) -> None:
    path.write_bytes(pack(json.dumps(ENTRIES | {"__metadata__": {"format": "pt"}}).encode() + b" " * padding))
    tensors = open_safetensors(path)
    assert {name: (bytes(t.data), t.dtype, t.shape) for name, t in tensors.items()} == {
        "a": (BODY[:24], "F32", (2, 3)),
        "b": (BODY[24:], "BF16", (2,)),
        "c": (b"", "I64", (4, 0)),
    }
    assert all(t.data.readonly for t in tensors.values())


@pytest.mark.parametrize("dtype", ["F32", "F16", "I64"])
def test_reads_what_another_writer_writes(path: Path, dtype: str) -> None:
    array = np.arange(-3, 3).astype({"F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).reshape(2, 3)
    write_safetensors(path, {"x": (dtype, array), "scalar": (dtype, array[0, 0])})
    tensors = open_safetensors(path)
    np.testing.assert_array_equal(np.frombuffer(tensors["x"].data, array.dtype).reshape(tensors["x"].shape), array)
    assert tensors["scalar"].shape == ()


def test_order_in_the_header_is_free(path: Path) -> None:
    path.write_bytes(pack({name: ENTRIES[name] for name in "cba"}))
    assert bytes(open_safetensors(path)["a"].data) == BODY[:24]


def test_no_tensors(path: Path) -> None:
    path.write_bytes(pack({}, b""))
    assert open_safetensors(path) == {}


@pytest.mark.parametrize(("dtype", "bits"), DTYPES.items())
def test_size_of_every_dtype(path: Path, dtype: str, bits: int) -> None:
    path.write_bytes(pack({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits)))
    assert len(open_safetensors(path)["x"].data) == bits
    refused(path, pack({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits + 1]}}, bytes(bits + 1)), "bits")


def test_a_tensor_keeps_the_file_mapped(path: Path) -> None:
    path.write_bytes(pack(ENTRIES))
    data = open_safetensors(path)["a"].data
    path.unlink()
    gc.collect()
    assert bytes(data) == BODY[:24]


# ---- bad files ----

BAD = {
    "empty file": (b"", "at least 8 bytes, got 0"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "at least 8 bytes, got 7"),
    "header length over the cap": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100000000 bytes"),
    "header length of 2**64 - 1": (b"\xff" * 8 + b"{}", "at most 100000000 bytes"),
    "header beyond the file": (struct.pack("<Q", 3) + b"{}", "expected 11 bytes up to the end of the header, got 10"),
    "no header": (pack(b"", b""), "begins with"),
    "space before the header": (pack(b" {}", b""), "begins with"),
    "array": (pack(b"[]", b""), "begins with"),
    "newline after the header": (pack(b"{}\n", b""), "ends with"),
    "NUL after the header": (pack(b"{}\0", b""), "ends with"),
    "two objects": (pack(b"{}{}", b""), "invalid JSON"),
    "cut JSON": (pack(b'{"a":{}', b""), "invalid JSON"),
    "no UTF-8": (pack(b'{"\xff":{}}', b""), "invalid JSON.*utf-8"),
    "lone surrogate": (pack(b'{"\\ud800":{}}', b""), "invalid JSON.*surrogates"),
    "NaN": (pack(b'{"a":NaN}', b""), "NaN"),
    "deep arrays": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "nested too deeply"),
    "deep objects": (pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "nested too deeply"),
    "number of 5000 digits": (pack(b'{"a":' + b"9" * 5000 + b"}", b""), "invalid JSON"),
    "duplicate tensor": (pack(b'{"a":{},"a":{}}', b""), "duplicate key 'a'"),
    "duplicate key": (pack(b'{"a":{"dtype":"F32","dtype":"F16"}}', b""), "duplicate key 'dtype'"),
    "metadata no object": (pack(ENTRIES | {"__metadata__": []}), "__metadata__: expected an object of strings"),
    "metadata no strings": (pack(ENTRIES | {"__metadata__": {"a": 1}}), "__metadata__: expected an object of strings"),
    "entry no object": (pack(ENTRIES | {"b": 1}), "tensor 'b': expected dtype, shape and data_offsets, got 1"),
    "entry lacks a key": (pack({"b": {"dtype": "F32", "shape": []}}, b""), "tensor 'b': expected dtype, shape"),
    "entry with another key": (changed("b", strides=[1]), "tensor 'b': expected dtype, shape"),
    "unknown dtype": (changed("b", dtype="F128"), "tensor 'b': dtype: expected one of F4, .* got 'F128'"),
    "dtype no string": (changed("b", dtype=["F32"]), "tensor 'b': dtype"),
    "shape no array": (changed("b", shape=2), "tensor 'b': shape: expected an array of 64-bit counts, got 2"),
    "negative extent": (changed("b", shape=[-2]), r"tensor 'b': shape: .* got \[-2\]"),
    "extent is true": (changed("b", shape=[2, True]), "tensor 'b': shape"),
    "extent is a float": (changed("b", shape=[2.0]), "tensor 'b': shape"),
    "extent of 65 bits": (changed("b", shape=[1 << 64]), "tensor 'b': shape"),
    "product overflows": (
        changed("b", shape=[1 << 40, 1 << 40]),
        r"tensor 'b': shape: expected fewer than 2\*\*64 bits",
    ),
    "product wraps to the size": (changed("b", shape=[(1 << 63) + 1, 2]), r"fewer than 2\*\*64 bits"),
    "overflow times 0": (changed("c", shape=[1 << 60, 1 << 60, 0]), r"fewer than 2\*\*64 bits"),
    "three offsets": (changed("b", data_offsets=[24, 28, 28]), "tensor 'b': data_offsets"),
    "descending offsets": (changed("b", data_offsets=[28, 24]), "tensor 'b': data_offsets"),
    "negative offset": (changed("b", data_offsets=[-4, 0]), "tensor 'b': data_offsets"),
    "offset is false": (changed("a", data_offsets=[False, 24]), "tensor 'a': data_offsets"),
    "offsets do not fit the shape": (changed("b", shape=[3]), "tensor 'b': expected 48 bits for BF16 .*of 4 bytes"),
    "hole": (changed("b", data_offsets=[25, 29]), "tensor 'b': expected data_offsets from 24, .* got 25"),
    "overlap": (changed("b", data_offsets=[23, 27]), "tensor 'b': expected data_offsets from 24, .* got 23"),
    "same bytes twice": (pack(ENTRIES | {"d": ENTRIES["a"]}), "tensor 'd': expected data_offsets from 24, .* got 0"),
    "hole at the start": (pack({"a": ENTRIES["b"]}), "tensor 'a': expected data_offsets from 0"),
    "one byte more": (pack(ENTRIES, BODY + b"\0"), r"expected \d+ bytes, got \d+$"),
    "one byte less": (pack(ENTRIES, BODY[:-1]), r"expected \d+ bytes, got \d+$"),
    "tensors but no body": (pack(ENTRIES, b""), r"expected \d+ bytes, got \d+$"),
    "body but no tensors": (pack({}, b"\0"), r"expected 10 bytes, got 11$"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:53aa51172d142c89d9012cce15ae4d6c\nsize 90868376\n",
        "Git LFS pointer",
    ),
    "pytorch zip": (b"PK\3\4" + bytes(100), "expected 67324760 bytes up to the end of the header, got 104"),
}


@pytest.mark.parametrize(("content", "match"), BAD.values(), ids=BAD.keys())
def test_bad_file_is_refused(path: Path, content: bytes, match: str) -> None:
    refused(path, content, match)


def test_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(path)):
        open_safetensors(path)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        open_safetensors(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ValueError, match="expected a regular file"):
        open_safetensors(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_file_raises_value_error_alone(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut out and put in, mostly in the header: what opens must cover the body exactly."""
    content = bytearray(pack(ENTRIES | {"__metadata__": {"format": "pt"}}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        end = at + data.draw(st.sampled_from([0, 1, 1, 3]))
        piece = st.sampled_from(
            [b"", b"0", b"9" * 30, b"-", b"[", b"]", b"{", b"}", b",", b'"', b"true", b"1e9", b"\0"]
        )
        content[at:end] = data.draw(piece | st.binary(max_size=2))
    header_bytes = len(content) - len(BODY) - 8
    if header_bytes >= 0 and data.draw(st.booleans()):  # let the damage reach the parser of the header
        content[:8] = struct.pack("<Q", header_bytes)
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        tensors = open_safetensors(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        body = b"".join(bytes(t.data) for t in tensors.values())
        assert sorted(body) == sorted(content[8 + int.from_bytes(content[:8], "little") :])

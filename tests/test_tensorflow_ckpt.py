"""The reader of TensorFlow checkpoints: a real index, names and transposes, and every way to lie in one."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert._core import crc32c
from fastbert.checkpoint import load_checkpoint
from fastbert.tensorflow_ckpt import MAX_INDEX_BYTES, MAX_KEY_BYTES, open_tensorflow
from tests import formats
from tests.formats import block, entry, field, header, masked, table, varint, write_tensorflow
from tests.models import MINIATURES, _shapes, bert_config, write_model

FIXTURE = Path(__file__).parents[2] / "shared" / "data" / "fixtures" / "news-uncompressed.ckpt.index"

KERNEL = np.arange(6, dtype="<f4").reshape(2, 3)
TENSORS: dict[str, tuple[str, Any]] = {
    "bert/pooler/dense/kernel": ("F32", KERNEL),
    "bert/pooler/dense/bias": ("F16", np.arange(3, dtype="<f2")),
    "cls/seq_relationship/output_weights": ("F32", KERNEL),
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "bert_model.ckpt"


def index_of(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def data_of(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.data-00000-of-00001")


def snappy(data: bytes) -> bytes:
    """Compressed: literals, and copies of each kind where eight bytes come again."""
    out, at, start = bytearray(varint(len(data))), 0, 0

    def literal(piece: bytes) -> None:
        for i in range(0, len(piece), 300):
            part = piece[i : i + 300]
            n = len(part) - 1
            out.extend(bytes([n << 2]) if n < 60 else b"\xf0%c" % n if n < 256 else b"\xf4" + struct.pack("<H", n))
            out.extend(part)

    while at < len(data):
        found = data.rfind(data[at : at + 8], 0, at + 7) if at + 8 <= len(data) else -1
        if found < 0:
            at += 1
            continue
        size = 8
        while size < 64 and at + size < len(data) and data[found + size] == data[at + size]:
            size += 1
        literal(data[start:at])
        offset = at - found
        if size < 12 and offset < 2048:
            out += bytes([1 | (size - 4) << 2 | offset >> 8 << 5, offset & 0xFF])
        elif offset < 1 << 16 and at % 2:
            out += bytes([2 | (size - 1) << 2]) + struct.pack("<H", offset)
        else:
            out += bytes([3 | (size - 1) << 2]) + struct.pack("<I", offset)
        at += size
        start = at
    literal(data[start:])
    return bytes(out)


# ---- checksum ----


def crc32c_by_bits(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c_of_rfc_3720() -> None:
    """Appendix B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=100), st.integers(0, 9))
def test_crc32c(data: bytes, start: int) -> None:
    assert crc32c(memoryview(data)[start:]) == crc32c_by_bits(data[start:])


# ---- good files ----


def test_a_real_index(tmp_path: Path) -> None:
    """202 tensors of a BERT-Base: all read, and the writer of the tests makes the same file."""
    if not FIXTURE.exists():
        pytest.skip(f"{FIXTURE.name}: not beside this checkout")
    with pytest.raises(FileNotFoundError, match=r"news-uncompressed.ckpt.data-00000-of-00001"):
        open_tensorflow(FIXTURE.with_suffix(""))
    content = FIXTURE.read_bytes()
    from fastbert.tensorflow_ckpt import _DTYPES, _parse_index

    shards, places = _parse_index(FIXTURE, content)
    assert (shards, len(places)) == (1, 202)
    numbers = {name: number for number, (name, _) in _DTYPES.items()}
    entries = {name: entry(numbers[p.dtype], p.shape, p.shard, p.start, p.size, p.crc) for name, p in places.items()}
    assert formats.index(entries) == content
    config = bert_config(hidden_size=768, num_hidden_layers=12, vocab_size=5981)
    shapes = {name: shape for name, shape in _shapes(config, None).items() if not name.startswith("pooler.")}
    for name, shape in shapes.items():
        theirs, transposed = formats.tensorflow_name(f"bert.{name}")
        assert places[theirs].shape == (shape[::-1] if transposed else shape)


INDEX_BYTES = """1983 1983 1987 1997 3257 3257 3265 3283 4531 4531 4543 4571 5805 5805 5821 5890
7079 7079 7099 7208 8355 8355 8379 8528"""


@pytest.mark.parametrize(
    ("shape", "size"),
    list(zip(MINIATURES, map(int, INDEX_BYTES.split()), strict=True)),
    ids=lambda v: v if isinstance(v, int) else "",
)
def test_size_of_the_index_of_the_miniatures(shape: dict[str, Any], size: int) -> None:
    """As published: eleven of these sizes are known."""
    config = bert_config(**shape)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {f"bert.{name}": s for name, s in _shapes(config, None).items()} | {
        "cls.predictions.bias": (vocab,),
        "cls.predictions.transform.dense.weight": (hidden, hidden),
        "cls.predictions.transform.dense.bias": (hidden,),
        "cls.predictions.transform.LayerNorm.weight": (hidden,),
        "cls.predictions.transform.LayerNorm.bias": (hidden,),
        "cls.seq_relationship.weight": (2, hidden),
        "cls.seq_relationship.bias": (2,),
    }
    entries, start = {}, 0
    for name, shape_there in sorted((formats.tensorflow_name(name)[0], s) for name, s in shapes.items()):
        n = 4 * int(np.prod(shape_there))
        entries[name] = entry(1, shape_there, 0, start, n, 0xFFFFFFFF)
        start += n
    assert len(formats.index(entries)) == size


def test_names_transposes_and_dtypes(prefix: Path) -> None:
    write_tensorflow(prefix, TENSORS)
    tensors = open_tensorflow(prefix)
    assert {name: (t.dtype, t.shape, t.strides) for name, t in tensors.items()} == {
        "bert.pooler.dense.weight": ("F32", (3, 2), (1, 3)),
        "bert.pooler.dense.bias": ("F16", (3,), None),
        "cls.seq_relationship.weight": ("F32", (2, 3), None),
    }
    np.testing.assert_array_equal(tensors["bert.pooler.dense.weight"].array(), KERNEL.T)
    np.testing.assert_array_equal(tensors["cls.seq_relationship.weight"].array(), KERNEL)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("output_weights", "classifier.weight"),  # run_classifier.py
        ("output_bias", "classifier.bias"),
        ("cls/squad/output_weights", "qa_outputs.weight"),  # run_squad.py
        ("cls/squad/output_bias", "qa_outputs.bias"),
        ("cls/predictions/output_bias", "cls.predictions.bias"),
        ("cls/predictions/transform/LayerNorm/gamma", "cls.predictions.transform.LayerNorm.weight"),
        ("bert/embeddings/token_type_embeddings", "bert.embeddings.token_type_embeddings.weight"),
        ("bert/encoder/layer_11/output/LayerNorm/beta", "bert.encoder.layer.11.output.LayerNorm.bias"),
    ],
)
def test_names(prefix: Path, theirs: str, ours: str) -> None:
    write_tensorflow(prefix, {theirs: ("F32", KERNEL)})
    assert list(open_tensorflow(prefix)) == [ours]


def test_slots_of_optimizers_are_skipped(prefix: Path) -> None:
    slots = ("adam_m", "adam_v", "Adam", "Adam_1", "ExponentialMovingAverage")
    extra = {f"{name}/{slot}": TENSORS[name] for name in TENSORS for slot in slots}
    write_tensorflow(prefix, TENSORS | extra | {"global_step": ("I64", np.int64(7).reshape(()))})
    assert len(open_tensorflow(prefix)) == len(TENSORS)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("compress", [None, snappy])
def test_shards_blocks_and_snappy(prefix: Path, shards: int, blocks: int, compress: Any) -> None:
    tensors = {
        f"bert/encoder/layer_{i}/output/dense/{n}": ("F32", KERNEL + i) for i in range(40) for n in ("kernel", "a")
    }
    write_tensorflow(prefix, tensors, shards=shards, blocks=blocks, compress=compress)
    found = open_tensorflow(prefix)
    assert len(found) == len(tensors)
    for i in range(40):
        np.testing.assert_array_equal(found[f"bert.encoder.layer.{i}.output.dense.weight"].array(), KERNEL.T + i)
    last = prefix.with_name(f"{prefix.name}.data-{shards - 1:05d}-of-{shards:05d}")
    last.unlink()
    with pytest.raises(FileNotFoundError, match=last.name):
        open_tensorflow(prefix)


def test_checkpoint_without_config_json(tmp_path: Path) -> None:
    model = write_model(tmp_path, format="tensorflow", prefix="bert.", heads=True, type_vocab_size=16)
    assert not (tmp_path / "config.json").exists()
    checkpoint = load_checkpoint(tmp_path)
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].array(), weight)
    assert "cls.seq_relationship.weight" in checkpoint.other
    named = load_checkpoint(tmp_path, tmp_path / "bert_model.ckpt")
    assert named.tensors.keys() == checkpoint.tensors.keys()


def test_two_checkpoints_in_a_folder(tmp_path: Path) -> None:
    write_model(tmp_path, format="tensorflow", prefix="bert.")
    for file in list(tmp_path.glob("bert_model.ckpt.*")):
        (tmp_path / file.name.replace("bert_model.ckpt", "model.ckpt-900")).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{tmp_path}: expected one .*got bert_model.ckpt, model.ckpt-900"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, tmp_path / "model.ckpt-900").tensors


# ---- bad files ----

NAME = "bert/x"
DATA = KERNEL.tobytes()
GOOD = {"dtype": 1, "shape": (2, 3), "shard": 0, "start": 0, "size": 24, "crc": masked(crc32c(DATA))}


def rows(*entries: tuple[bytes, bytes], first: bytes = header()) -> bytes:
    """A file of one block."""
    return table([(b"z", block([(b"", first), *entries]))])


def changed(**changes: Any) -> bytes:
    return rows((NAME.encode(), entry(**(GOOD | changes))))


def raw_block(contents: bytes, kind: int = 0) -> bytes:
    """A file whose only data block has these contents, under a valid checksum."""
    return table([(b"z", contents)], kind=kind)


def prefixed(*numbers: int, tail: bytes = b"", restarts: int = 1) -> bytes:
    return raw_block(b"".join(map(varint, numbers)) + tail + bytes(4 * restarts) + struct.pack("<I", restarts))


FINE = changed()
BAD_INDEXES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a table that ends with 57fb808b247547db"),
    "short": (FINE[-20:], "expected a table that ends with"),
    "magic": (FINE[:-1] + b"\0", "expected a table that ends with"),
    "large": (bytes(MAX_INDEX_BYTES + 1), f"expected at most {MAX_INDEX_BYTES} bytes"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "handle of 11 bytes": (FINE[:-48] + b"\xff" * 11 + FINE[-37:], "footer: expected a number of at most 64 bits"),
    "handle beyond the file": (
        FINE[:-48] + (varint(0) + varint(8) + varint(1 << 62) + varint(9)).ljust(40, b"\0") + FINE[-8:],
        "block at 4611686018427387904: expected it to end in front of the footer",
    ),
    "block beyond the footer": (
        FINE[:-48] + (varint(0) + varint(8) + varint(0) + varint(len(FINE) - 52)).ljust(40, b"\0") + FINE[-8:],
        "block at 0: expected it to end in front of the footer",
    ),
    "damaged block": (FINE[:20] + bytes([FINE[20] ^ 1]) + FINE[21:], "block at 0: expected the checksum"),
    "gap": (
        table([(b"z", block([(b"", header())]))], gap=b"\0"),
        "expected a block at byte 22, the end of the one before, got 23",
    ),
    "more in front of the footer": (FINE[:-48] + b"\0" + FINE[-48:], r"expected \d+ bytes, got \d+"),
    "compression 2": (
        raw_block(block([(b"", header())]), 2),
        r"expected compression 0 \(none\) or 1 \(Snappy\), got 2",
    ),
    "restarts beyond the block": (raw_block(struct.pack("<I", 1 << 30)), "expected 1073741824 restart points inside"),
    "no room for restarts": (raw_block(b"\1\2"), "restart points inside its 2 bytes"),
    "shared of nothing": (prefixed(1, 0, 0), "expected a key of at most 512 bytes that shares at most 0 with .* got 1"),
    "huge shared": (
        raw_block(bytes([0, 0, 6]) + header() + varint(1 << 40) + bytes(6) + b"\1\0\0\0"),
        "expected a key of at most 512 bytes that shares at most 0",
    ),
    "huge unshared": (prefixed(0, 1 << 40, 0), "expected a key of at most 512 bytes"),
    "long key": (prefixed(0, MAX_KEY_BYTES + 1, 0, tail=b"a" * 999), "expected a key of at most 512 bytes"),
    "value beyond the block": (prefixed(0, 0, 99), "expected 99 more bytes, got 0"),
    "entry ends in a number": (raw_block(b"\0\x80" + b"\0\0\0\0\1\0\0\0"), "expected 1 more bytes, got 0"),
    "keys descend": (
        rows((b"b", entry(**GOOD)), (b"a", entry(**GOOD))),
        "expected keys to ascend, got b'a' behind b'b'",
    ),
    "key twice": (rows((b"a", entry(**GOOD)), (b"a", entry(**GOOD))), "expected keys to ascend"),
    "key beyond its block": (table([(b"a", block([(b"", header()), (b"b", entry(**GOOD))]))]), "up to b'a' here"),
    "no header": (table([(b"z", block([(b"a", entry(**GOOD))]))]), "b'a': expected a header, then ascending keys"),
    "no entry": (table([(b"z", block([]))]), "expected a header, got no entry"),
    "no block": (table([]), "expected a header, got no entry"),
    "metaindex with content": (
        table([(b"z", block([(b"", header())]))], metaindex=block([(b"a", b"b")])),
        "metaindex: expected it empty",
    ),
    "name no ASCII": (rows((b"y\xff", entry(**GOOD))), "expected a name in ASCII"),
    "header: no shards": (rows(first=header(0)), "header: expected 1 to 99999 data files, got 0"),
    "header: many shards": (rows(first=header(100_000)), "header: expected 1 to 99999 data files, got 100000"),
    "header: big-endian": (rows(first=header(1, 1)), "header: expected little-endian data, got big-endian"),
    "header: unknown field": (rows(first=field(9, 1)), "header: expected each of the fields 1, 2, 3 once, got 9"),
    "header: wire type 3": (rows(first=b"\x0b"), "header: expected a field of wire type"),
    "header: field twice": (rows(first=field(1, 1) * 2), "header: expected each of the fields"),
    "dtype 127": (changed(dtype=127), "bert/x: dtype: expected one of 1 .F32.*, got 127"),
    "dtype string": (changed(dtype=7), "bert/x: dtype: .* got 7"),
    "dtype missing": (changed(dtype=0), "bert/x: dtype: .* got 0"),
    "shard": (changed(shard=1), "bert/x: shard_id: expected one of 1 data files, got 1"),
    "negative shard": (changed(shard=(1 << 64) - 1), "bert/x: shard_id"),
    "size": (changed(size=20), r"bert/x: expected 24 bytes for F32 \[2, 3\], got 20"),
    "negative extent": (changed(shape=((1 << 64) - 1, 3)), "bert/x: shape: expected at most 64 extents from 0"),
    "product wraps": (changed(shape=(1 << 32, 1 << 32), size=0), "bert/x: expected 73786976294838206464 bytes"),
    "65 axes": (changed(shape=(1,) * 65), "bert/x: shape: expected at most 64 extents"),
    "slices": (rows((NAME.encode(), entry(**GOOD) + field(7, b"\x0a\0"))), "bert/x: expected .*7"),
    "unknown rank": (
        rows((NAME.encode(), field(1, 1) + field(2, field(3, 1)) + field(5, 24))),
        "shape: expected nothing but extents, got field 3",
    ),
    "shape is a number": (rows((NAME.encode(), b"\x10\1")), "bert/x: expected each of the fields"),
    "cut message": (rows((NAME.encode(), b"\x12\x7f")), "bert/x: expected 127 more bytes"),
    "cut number": (rows((NAME.encode(), b"\x08\xff")), "bert/x: expected 1 more bytes"),
    "number of 65 bits": (
        rows((NAME.encode(), b"\x08" + b"\xff" * 9 + b"\x7f")),
        "expected a number of at most 64 bits",
    ),
}


@pytest.mark.parametrize(("content", "match"), BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_bad_index(prefix: Path, content: bytes, match: str) -> None:
    data_of(prefix).write_bytes(DATA)
    index_of(prefix).write_bytes(FINE)
    assert open_tensorflow(prefix)
    index_of(prefix).write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        open_tensorflow(prefix)
    assert str(error.value).startswith(f"{index_of(prefix)}: ")


BAD_DATA: dict[str, tuple[bytes, bytes, str]] = {
    "cut": (FINE, DATA[:-1], "bert/x: expected it between .* and the end of the file, 23, got bytes 0 to 24"),
    "empty": (FINE, b"", "end of the file, 0, got bytes 0 to 24"),
    "one bit": (FINE, DATA[:-1] + b"\1", "bert/x: expected the checksum 0x[0-9a-f]*, got .* the data are damaged"),
    "start": (changed(start=1 << 63), DATA, "bert/x: expected it between"),
    "overlap": (
        rows((b"a", entry(**GOOD)), (b"b", entry(**GOOD))),
        DATA,
        "b: expected it between the tensor before, which ends at byte 24",
    ),
    "kernel of one axis": (rows((b"a/kernel", entry(**GOOD | {"shape": (6,)}))), DATA, "a/kernel: expected a matrix"),
    "one meaning": (
        rows((b"a/beta", entry(**GOOD)), (b"a/output_bias", entry(**GOOD | {"start": 24}))),
        DATA * 2,
        r"a/output_bias: expected one tensor of this meaning \(a.bias\), got two",
    ),
}


@pytest.mark.parametrize(("content", "data", "match"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(prefix: Path, content: bytes, data: bytes, match: str) -> None:
    index_of(prefix).write_bytes(content)
    data_of(prefix).write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        open_tensorflow(prefix)
    assert str(error.value).startswith(f"{data_of(prefix)}: ")


BAD_SNAPPY: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Snappy: expected 1 more bytes"),
    "length over the cap": (varint(MAX_INDEX_BYTES + 1), f"expected at most {MAX_INDEX_BYTES} bytes, got"),
    "length of 64 bits": (b"\xff" * 9 + b"\1", f"expected at most {MAX_INDEX_BYTES} bytes"),
    "too little": (b"\x05\x00a", "Snappy: expected 5 bytes, got 1"),
    "too much": (b"\x01\x04ab\x00c", "Snappy: expected 1 bytes, got 2 or more"),
    "copy of nothing": (b"\x05\x01\x01", "Snappy: expected a copy from 1 to 0 bytes back, got 1"),
    "copy from 0 back": (b"\x05\x00a\x01\x00", "Snappy: expected a copy from 1 to 1 bytes back, got 0"),
    "copy from too far": (b"\x05\x00a\x02\x02\x00", "Snappy: expected a copy from 1 to 1 bytes back, got 2"),
    "copy of 32 bits": (
        b"\x05\x00a\x03\xff\xff\xff\xff",
        "Snappy: expected a copy from 1 to 1 bytes back, got 4294967295",
    ),
    "cut literal": (b"\x05\x10ab", "Snappy: expected 5 more bytes, got 2"),
    "cut length": (b"\x05\xf4\x01", "Snappy: expected 2 more bytes, got 1"),
    "literal of 4 GB": (b"\x05\xfc\xff\xff\xff\xff", "Snappy: expected 4294967296 more bytes, got 0"),
    "bomb": (varint(1000) + b"\x00a" + b"\xfe\x01\x00" * 1000, "Snappy: expected 1000 bytes, got"),
}


@pytest.mark.parametrize(("content", "match"), BAD_SNAPPY.values(), ids=BAD_SNAPPY.keys())
def test_bad_snappy(prefix: Path, content: bytes, match: str) -> None:
    index_of(prefix).write_bytes(raw_block(content, 1))
    with pytest.raises(ValueError, match=match) as error:
        open_tensorflow(prefix)
    assert str(error.value).startswith(f"{index_of(prefix)}: block at 0: ")


def test_snappy_copies_overlap(prefix: Path) -> None:
    """A copy may reach into what it makes: runs."""
    from fastbert.tensorflow_ckpt import _unsnap

    assert _unsnap("", varint(10) + b"\x04ab" + b"\x11\x02") == b"ababababab"
    text = bytes(range(7)) * 999
    assert _unsnap("", snappy(text)) == text


def test_missing_index(prefix: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(index_of(prefix))):
        open_tensorflow(prefix)


def test_damaged_index_raises_value_error_alone(prefix: Path, seed: int) -> None:
    """Bytes changed, cut out and put in, checksums made right again in half of the cases."""
    write_tensorflow(prefix, TENSORS, blocks=1)
    content = index_of(prefix).read_bytes()
    size = len(content) - 48 - 13 - 5  # of the data block and the index block's content, roughly
    rng = np.random.default_rng(seed)
    for i in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(size if i % 2 else len(damaged)))
            damaged[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        whole = raw_block(bytes(damaged[: size - 40])) if i % 2 else bytes(damaged)
        index_of(prefix).write_bytes(whole)
        try:
            open_tensorflow(prefix)
        except ValueError as error:
            assert str(error).startswith(str(prefix))

"""The reader of PyTorch's .bin: both layouts, what PyTorch itself writes, and every way to lie in one."""

import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.checkpoint import load_checkpoint
from fastbert.pytorch_bin import MAX_OPERATIONS, MAX_SHARING, WRAPPERS, open_pytorch
from tests import formats
from tests.formats import LEGACY_MAGIC, LEGACY_SYSTEM, LEGACY_VERSION, Pickle, legacy_keys, pytorch_pickle, pytorch_zip
from tests.models import write_model

A = np.arange(6, dtype="<f4").reshape(2, 3)
TENSORS: dict[str, tuple[str, Any]] = {
    "a": ("F32", A),
    "tied": ("F32", A),
    "half": ("F16", np.arange(4, dtype="<f2")),
    "bfloat": ("BF16", np.arange(16256, 16260, dtype="<u2")),
    "ids": ("I64", np.arange(5, dtype="<i8")[None]),
    "scalar": ("F64", np.float64(0.5).reshape(())),
    "none": ("F32", np.zeros((0, 3), "<f4")),
}
WRITERS = {"zip": formats.write_pytorch, "legacy": formats.write_pytorch_legacy}
each_layout = pytest.mark.parametrize("layout", WRITERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def zip_of(pickle_bytes: bytes, storages: dict[str, bytes]) -> bytes:
    return pytorch_zip({"data.pkl": pickle_bytes} | {f"data/{key}": data for key, data in storages.items()})


def legacy_of(pickle_bytes: bytes, storages: dict[str, bytes], item_bytes: int = 4) -> bytes:
    data = b"".join(struct.pack("<q", len(data) // item_bytes) + data for data in storages.values())
    return LEGACY_MAGIC + LEGACY_VERSION + LEGACY_SYSTEM + pickle_bytes + legacy_keys(storages) + data


def one_tensor(**changes: Any) -> tuple[bytes, dict[str, bytes]]:
    """A pickle of {"a": a view of six float32}."""
    view = {"dtype": "F32", "key": "0", "numel": 6, "shape": (2, 3), "strides": (3, 1), "legacy": False} | changes
    out = Pickle()
    out.ordered_dict()
    out.data += b"("
    out.text("a")
    out.tensor(**view)
    return bytes(out.data + b"u."), {"0": A.tobytes()}


def both(pickle_bytes: bytes, storages: dict[str, bytes]) -> list[bytes]:
    return [zip_of(pickle_bytes, storages), legacy_of(pickle_bytes, storages)]


def refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        open_pytorch(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 2000


# ---- good files ----


@each_layout
def test_reads_what_the_writer_writes(path: Path, layout: str) -> None:
    WRITERS[layout](path, TENSORS)
    tensors = open_pytorch(path)
    assert list(tensors) == list(TENSORS)
    for name, (dtype, array) in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape, tensors[name].strides) == (dtype, array.shape, None)
        assert bytes(tensors[name].data) == array.tobytes()
        assert tensors[name].data.readonly
    assert path.read_bytes().count(A.tobytes()) == 1, "tied tensors share a storage"


VIEWS = {
    "transposed": ({"shape": (3, 2), "strides": (1, 3)}, A.T),
    "row": ({"shape": (3,), "strides": (1,), "offset": 3}, A[1]),
    "column": ({"shape": (2,), "strides": (3,), "offset": 2}, A[:, 2]),
    "scalar": ({"shape": (), "strides": (), "offset": 5}, A[1, 2]),
    "every other": ({"shape": (3,), "strides": (2,)}, A.reshape(-1)[::2]),
    "axis of one element": ({"shape": (2, 1, 3), "strides": (3, 77, 1)}, A[:, None]),
    "three axes": ({"shape": (1, 3, 2), "strides": (6, 1, 3)}, A.T[None]),
    "empty at the end": ({"shape": (0, 3), "strides": (3, 1), "offset": 6}, A[2:]),
}


@pytest.mark.parametrize(("view", "expected"), VIEWS.values(), ids=VIEWS.keys())
def test_views(path: Path, view: dict[str, Any], expected: Any) -> None:
    for content in both(*one_tensor(**view)):
        path.write_bytes(content)
        tensor = open_pytorch(path)["a"]
        np.testing.assert_array_equal(tensor.array(), expected)
        assert (tensor.strides is None) == bool(expected.flags.c_contiguous)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_in_a_larger_dict(path: Path, wrapper: str) -> None:
    """{"epoch": 3, "loss": 0.5, <wrapper>: {...}, "best": None}, as training scripts save it."""
    inner, storages = one_tensor()
    body = inner[2:-1]
    loss = b"X\4\0\0\0lossG" + struct.pack(">d", 0.5)
    outer = b"\x80\x02}(X\5\0\0\0epochK\3" + loss + b"X" + struct.pack("<I", len(wrapper)) + wrapper.encode() + body
    for content in both(outer + b"X\4\0\0\0bestNu.", storages):
        path.write_bytes(content)
        assert list(open_pytorch(path)) == ["a"]


def test_attributes_of_a_state_dict_are_ignored(path: Path) -> None:
    """state_dict() has `_metadata`, which PyTorch saves as the state of the OrderedDict."""
    inner, storages = one_tensor()
    path.write_bytes(zip_of(inner[:-1] + b"}X\x09\0\0\0_metadatah\1sb.", storages))
    assert list(open_pytorch(path)) == ["a"]


@each_layout
def test_a_model_of_two_shards(tmp_path: Path, layout: str) -> None:
    name = "pytorch" if layout == "zip" else "pytorch_legacy"
    model = write_model(tmp_path, format=name, sharded=True)
    tensors = load_checkpoint(tmp_path).tensors
    for key, weight in model.weights.items():
        np.testing.assert_array_equal(tensors[key].array(), weight)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin"):
        load_checkpoint(tmp_path)


def test_damaged_shard_names_the_shard(tmp_path: Path) -> None:
    write_model(tmp_path, format="pytorch", sharded=True)
    shard = tmp_path / "pytorch_model-00001-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{shard}: expected"):
        load_checkpoint(tmp_path)


# ---- PyTorch itself ----


def torch_state(torch: Any) -> Any:
    layer = torch.nn.Linear(4, 3)
    state = layer.state_dict()
    state["tied"] = state["weight"]
    state["transposed"] = state["weight"].t()
    state["row"] = state["weight"][1]
    state["parameter"] = torch.nn.Parameter(torch.rand(2, 3))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state[str(dtype)] = torch.rand(5).to(dtype)
    state["embeddings.position_ids"] = torch.arange(512)[None]
    state["scalar"] = torch.tensor(3.0)
    return state


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda state: {"model": state, "epoch": 1, "loss": 0.5}])
def test_what_pytorch_writes(path: Path, zipped: bool, wrap: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    state = torch_state(torch)
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    tensors = open_pytorch(path)
    assert tensors.keys() == state.keys()
    for name, expected in state.items():
        assert tensors[name].shape == tuple(expected.shape)
        if name.endswith("position_ids"):
            assert tensors[name].dtype == "I64"
        else:
            np.testing.assert_array_equal(tensors[name].array(), expected.detach().float().numpy())


@each_layout
def test_pytorch_reads_what_the_writer_writes(path: Path, layout: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    WRITERS[layout](path, TENSORS)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(TENSORS)
    for name, (dtype, array) in TENSORS.items():
        theirs = loaded[name].view(torch.uint16) if dtype == "BF16" else loaded[name]
        np.testing.assert_array_equal(theirs.numpy(), array)
    assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    if layout == "zip":  # the same bytes as PyTorch's
        again = io.BytesIO()
        torch.save(loaded, again)
        with zipfile.ZipFile(again) as archive:
            ours = pytorch_pickle(TENSORS)[0]
            assert archive.read("archive/data.pkl") == ours


# ---- bad pickles: nothing is executed, nothing is read outside the storages ----


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def global_call(module: str, name: str, arguments: bytes = b"X\2\0\0\0id\x85") -> bytes:
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\6tQ"
TAIL = b"\x89}t"  # requires_grad, hooks, end of the arguments
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
VIEW = REBUILD + STORAGE + b"K\0K\2K\3\x86K\3K\1\x86" + TAIL + b"R"


def a_is(value: bytes) -> bytes:
    return b"\x80\x02}X\1\0\0\0a" + value + b"s."


BAD_PICKLES = {
    # code
    "os.system": (a_is(global_call("os", "system")), "expected names that tensors need .*got 'os.system'"),
    "posix.system": (a_is(global_call("posix", "system")), "got 'posix.system'"),
    "builtins.eval": (a_is(global_call("builtins", "eval")), "got 'builtins.eval'"),
    "getattr": (a_is(global_call("builtins", "getattr")), "got 'builtins.getattr'"),
    "webbrowser": (a_is(global_call("webbrowser", "open")), "got 'webbrowser.open'"),
    "torch.load": (a_is(global_call("torch", "load")), "got 'torch.load'"),
    "a module": (a_is(global_call("torch.nn.modules.linear", "Linear")), "got 'torch.nn.modules.linear.Linear'"),
    "sparse tensor": (a_is(global_call("torch._utils", "_rebuild_sparse_tensor")), "got 'torch._utils._rebuild_sparse"),
    "quantized tensor": (a_is(global_call("torch._utils", "_rebuild_qtensor")), "got 'torch._utils._rebuild_qtensor'"),
    "numpy scalar": (a_is(global_call("numpy.core.multiarray", "scalar")), "got 'numpy.core.multiarray.scalar'"),
    "instance": (a_is(b"(ios\nsystem\n"), "expected an opcode that tensors need, got 0x69"),
    "object": (a_is(b"(cos\nsystem\no"), "got 'os.system'"),
    "new object": (a_is(b"ccollections\nOrderedDict\n)\x81"), "expected an opcode that tensors need, got 0x81"),
    "extension": (a_is(b"\x82\1"), "expected an opcode that tensors need, got 0x82"),
    "stack global": (a_is(b"X\2\0\0\0osX\6\0\0\0system\x93"), "expected an opcode that tensors need, got 0x93"),
    "protocol 4": (pickle.dumps({"a": 1}, 4), "expected pickle protocol 2, got 4"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "expected an opcode that tensors need, got"),
    "reduce of a class": (pickle.dumps(Attack(), 2), "expected names that tensors need"),
    "call of a storage class": (a_is(b"ctorch\nFloatStorage\n)R"), "expected a function and its arguments"),
    "call of a string": (a_is(b"X\1\0\0\0f)R"), "expected a function and its arguments, got str and tuple"),
    "call without a tuple": (a_is(b"ccollections\nOrderedDict\n]R"), "expected a function .* and list"),
    "OrderedDict of items": (a_is(b"ccollections\nOrderedDict\n]\x85R"), "the arguments of collections.OrderedDict"),
    "line without end": (b"\x80\x02c" + b"a" * 1000, "expected names that tensors need|more bytes"),
    # structure
    "empty": (b"", "expected 1 more bytes, got the end"),
    "no stop": (b"\x80\x02}", "expected 1 more bytes, got the end"),
    "nothing to return": (b"\x80\x02.", "expected a value on the stack, got none"),
    "too much to return": (b"\x80\x02}}.", "expected one object at the end, got more"),
    "open mark": (b"\x80\x02}(.", "expected a value on the stack, got none"),
    "open mark below": (b"\x80\x02(}.", "expected one object at the end, got more"),
    "pop through a mark": (b"\x80\x02}(X\1\0\0\0as.", "expected a value on the stack, got none"),
    "tuple underflow": (b"\x80\x02K\1\x87.", "expected a value on the stack, got none"),
    "no mark": (b"\x80\x02}u.", "expected a mark on the stack, got none"),
    "put on nothing": (b"\x80\x02q\0.", "expected a value on the stack, got none"),
    "get of nothing": (b"\x80\x02h\7.", "expected an object that is in the memo, got index 7"),
    "long get of nothing": (
        b"\x80\x02j\xff\xff\xff\xff.",
        "expected an object that is in the memo, got index 4294967295",
    ),
    "cut number": (b"\x80\x02J\1\2", "expected 4 more bytes"),
    "cut long number": (b"\x80\x02\x8a\xff\1", "expected 255 more bytes"),
    "cut string": (b"\x80\x02X\xff\xff\xff\xffabc", "expected 4294967295 more bytes"),
    "bad UTF-8": (b"\x80\x02X\2\0\0\0\xff\xfe.", "expected UTF-8"),
    "surrogate": (b"\x80\x02X\3\0\0\0\xed\xa0\x80.", "expected UTF-8"),
    "set on a list": (b"\x80\x02]X\1\0\0\0aK\1s.", "expected a dict and pairs to put into it, got list"),
    "set on a tensor": (b"\x80\x02" + VIEW + b"(X\1\0\0\0aK\1u.", "expected a dict and pairs to put into it, got view"),
    "set on a string": (b"\x80\x02X\1\0\0\0a(K\1K\1u.", "expected a dict and pairs to put into it, got str"),
    "set on nothing": (b"\x80\x02(K\1K\1u.", "expected a dict and pairs to put into it"),
    "odd items": (b"\x80\x02}(K\1u.", "expected a dict and pairs to put into it, got dict and 1"),
    "append to a dict": (b"\x80\x02}K\1a.", "expected a list to append to, got dict"),
    "append to a tuple": (b"\x80\x02)(K\1e.", "expected a list to append to, got tuple"),
    "state of a tensor": (b"\x80\x02" + VIEW + b"}b.", "expected an OrderedDict that takes attributes"),
    "state of nothing": (b"\x80\x02}b.", "expected an OrderedDict that takes attributes"),
    "key is a list": (b"\x80\x02}]K\1s.", "expected a string or a small number as key, got list"),
    "key is a tuple": (b"\x80\x02}))s.", "expected a string or a small number as key, got tuple"),
    "key is a tensor": (b"\x80\x02}" + VIEW + b"K\1s.", "expected a string or a small number as key, got view"),
    "key is a large number": (b"\x80\x02}\x8a\x08" + b"\1" * 8 + b"Ns.", "expected a string or a small number as key"),
    "deep key": (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "expected a string or a small number as key, got tuple"),
    "endless": (b"\x80\x02" + b"N" * MAX_OPERATIONS, f"expected at most {MAX_OPERATIONS} operations"),
    # content
    "no dict": (b"\x80\x02K\1.", "expected a dict of tensors, got int"),
    "a list": (b"\x80\x02].", "expected a dict of tensors, got list"),
    "a tensor alone": (b"\x80\x02" + VIEW + b".", "expected a dict of tensors, got view"),
    "persistent id no tuple": (a_is(b"K\1Q"), "expected a storage of five parts"),
    "persistent id too short": (a_is(b"X\7\0\0\0storage\x85Q"), "expected a storage of five parts"),
    "a whole module": (
        a_is(STORAGE.replace(b"X\7\0\0\0storage", b"X\6\0\0\0module")),
        "expected a storage, got 'module'",
    ),
    "view of a storage": (a_is(STORAGE[:-2] + b"K\0K\0K\0\x87tQ"), "expected a storage of five parts, whole"),
    "class is a string": (
        a_is(STORAGE.replace(b"ctorch\nFloatStorage\n", b"X\1\0\0\0f")),
        "expected a class of storages and a number of elements, got str and int",
    ),
    "class is a function": (
        a_is(STORAGE.replace(b"ctorch\nFloatStorage", b"ccollections\nOrderedDict")),
        "expected a class of storages .* got collections.OrderedDict",
    ),
    "complex storage": (
        a_is(STORAGE.replace(b"FloatStorage", b"ComplexFloatStorage")),
        "expected names that tensors need .*got 'torch.ComplexFloatStorage'",
    ),
    "key is a number": (a_is(STORAGE.replace(b"X\1\0\0\x000", b"K\0")), "expected a storage"),
    "numel is a string": (a_is(STORAGE.replace(b"K\6t", b"X\1\0\0\x006t")), "class of storages .* and str"),
    "numel is true": (a_is(STORAGE.replace(b"K\6t", b"\x88t")), "class of storages .* and bool"),
    "numel is negative": (a_is(STORAGE.replace(b"K\6t", b"J\xff\xff\xff\xfft")), "class of storages"),
    "numel of 64 bits": (a_is(STORAGE.replace(b"K\6t", b"\x8a\x09" + b"\xff" * 8 + b"\0t")), "class of storages"),
    "two types of a storage": (
        a_is(STORAGE + STORAGE.replace(b"Float", b"Half") + b"\x86"),
        "expected one type and size of the storage '0', got two",
    ),
    "rebuild without arguments": (a_is(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "the arguments of torch._utils"),
    "conjugated": (
        a_is(REBUILD + STORAGE + b"K\0K\6\x85K\1\x85\x89}}X\4\0\0\0conj\x88stR"),
        "expected the arguments of torch._utils._rebuild_tensor_v2",
    ),
    "parameter of a number": (
        a_is(b"ctorch._utils\n_rebuild_parameter\nK\1\x88}\x87R"),
        "expected the arguments of torch._utils._rebuild_parameter",
    ),
    "storage is a number": (
        a_is(REBUILD + b"K\1K\0K\6\x85K\1\x85" + TAIL + b"R"),
        "tensor 'a': expected a storage, got int",
    ),
    "shape is a list": (a_is(REBUILD + STORAGE + b"K\0]K\1\x85" + TAIL + b"R"), "tensor 'a': expected offset, shape"),
    "shape is a storage": (
        a_is(REBUILD + STORAGE + b"K\0" + STORAGE + b"K\1\x85" + TAIL + b"R"),
        "expected offset, shape",
    ),
}


@pytest.mark.parametrize(("content", "match"), BAD_PICKLES.values(), ids=BAD_PICKLES.keys())
def test_bad_pickle(path: Path, content: bytes, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    storages = {"0": A.tobytes()}
    refused(path, zip_of(content, storages), match)
    if content.endswith(b"."):  # else the next pickle is read as the rest of this one
        refused(path, legacy_of(content, storages if STORAGE in content else {}), match)
    assert list(path.parent.iterdir()) == [path], "nothing was executed"


HUGE = (1 << 62) + 1  # 4 bytes times this is 4 in 64 bits
BAD_VIEWS: dict[str, tuple[dict[str, Any], str]] = {
    "one element too many": ({"shape": (7,), "strides": (1,)}, "inside a storage of 6, got shape"),
    "offset too large": ({"offset": 1}, "inside a storage of 6"),
    "offset beyond": ({"shape": (0,), "strides": (1,), "offset": 7}, "inside a storage of 6"),
    "negative offset": ({"offset": -1}, "expected offset, shape and as many strides, counts"),
    "negative extent": ({"shape": (-2, 3)}, "expected offset, shape and as many strides, counts"),
    "negative stride": ({"strides": (-3, 1), "offset": 3}, "expected offset, shape and as many strides, counts"),
    "stride too large": ({"strides": (4, 1)}, "inside a storage of 6"),
    "stride of 62 bits": ({"strides": (HUGE, 1)}, "inside a storage of 6"),
    "extent of 62 bits": ({"shape": (HUGE, 3)}, "inside a storage of 6"),
    "product wraps to 0": ({"shape": (1 << 32, 1 << 32), "strides": (1 << 32, 1)}, "inside a storage of 6"),
    "extent of 64 bits": ({"shape": (1 << 64,), "strides": (1,)}, "expected offset, shape and as many strides, counts"),
    "fewer strides": ({"strides": (1,)}, "expected offset, shape and as many strides"),
    "more strides": ({"strides": (3, 1, 1)}, "expected offset, shape and as many strides"),
    "expanded": ({"shape": (1 << 40,), "strides": (0,)}, "expected elements of their own"),
    "overlapping": ({"shape": (3, 3), "strides": (1, 1)}, "expected elements of their own"),
    "65 axes": ({"shape": (1,) * 65, "strides": (1,) * 65}, "expected offset, shape"),
}


@pytest.mark.parametrize(("view", "match"), BAD_VIEWS.values(), ids=BAD_VIEWS.keys())
def test_bad_view(path: Path, view: dict[str, Any], match: str) -> None:
    for content in both(*one_tensor(**view)):
        refused(path, content, f"tensor 'a': .*{match}")


@pytest.mark.parametrize("numel", [0, 5, 7, HUGE, 1 << 40])
def test_declared_elements_are_not_those_of_the_file(path: Path, numel: int) -> None:
    """CVE-2026-24747, and products that wrap around 64 bits."""
    pickled, storages = one_tensor(numel=numel)
    refused(
        path, zip_of(pickled, storages), rf"archive/data/0: expected {numel} elements of 4 bytes \(F32\), got 24 bytes"
    )
    refused(path, legacy_of(pickled, storages), rf"storage '0': expected {numel} elements of 4 bytes \(F32\) at byte")


def test_many_tensors_of_one_storage(path: Path) -> None:
    """A small file that would become a large model."""
    tensors = {str(i): ("F32", A) for i in range(MAX_SHARING)}
    for write in WRITERS.values():
        write(path, tensors)
        assert len(open_pytorch(path)) == MAX_SHARING
        write(path, tensors | {"one more": ("F32", A)})
        with pytest.raises(
            ValueError, match=f"{path}: expected tensors of at most 8 times the data, 192 bytes, got 216"
        ):
            open_pytorch(path)


# ---- bad files ----


def legacy_with(magic: bytes = LEGACY_MAGIC, version: bytes = LEGACY_VERSION, system: bytes = LEGACY_SYSTEM) -> bytes:
    pickled, storages = one_tensor()
    return magic + version + system + pickled + legacy_keys(storages) + struct.pack("<q", 6) + storages["0"]


def tar_archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return out.getvalue()


PICKLED, STORAGES = one_tensor()
BAD_FILES = {
    "empty": (b"", "expected a PyTorch file"),
    "text": (b"hello", "expected a PyTorch file, a zip archive or a legacy pickle, got b'hello'"),
    "a bare pickle": (pickle.dumps({"a": 1}, 2), "expected a PyTorch file"),
    "tar": (tar_archive(), r"expected a PyTorch file.*\(a tar archive, as written before PyTorch 0.2\)"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "legacy magic": (legacy_with(magic=LEGACY_MAGIC[:-2] + b"\x20."), "expected a PyTorch file"),
    "legacy version": (legacy_with(version=b"\x80\x02M\xea\x03."), "expected protocol version 1001"),
    "legacy system": (legacy_with(system=b"\x80\x02}."), "expected little-endian data"),
    "legacy big-endian": (legacy_with(system=LEGACY_SYSTEM.replace(b"\x88", b"\x89")), "expected little-endian data"),
    "legacy cut": (legacy_with()[:-1], "storage '0': expected 6 elements"),
    "legacy with more behind": (legacy_with() + b"\0", r"expected \d+ bytes, got \d+"),
    "legacy cut in a pickle": (legacy_with()[:200], "object: byte .*: expected"),
    "legacy count is negative": (legacy_with().replace(struct.pack("<q", 6), struct.pack("<q", -1)), "storage '0'"),
    "legacy count is large": (legacy_with().replace(struct.pack("<q", 6), b"\xff" * 7 + b"\x7f"), "storage '0'"),
    "legacy keys no list": (
        LEGACY_MAGIC + LEGACY_VERSION + LEGACY_SYSTEM + PICKLED + b"\x80\x02}.",
        "storage keys: expected a list of different strings",
    ),
    "legacy key twice": (legacy_of(PICKLED, {})[:-6] + b"](X\1\0\0\x000X\1\0\0\x000e.", "list of different strings"),
    "legacy key of no tensor": (legacy_of(PICKLED, STORAGES | {"1": b""}), r"storage keys: .* differs in \['1'\]"),
    "legacy key is missing": (legacy_of(PICKLED, {}), r"storage keys: .* differs in \['0'\]"),
    "zip cut": (zip_of(PICKLED, STORAGES)[:-30], "expected a zip archive, got no end record"),
    "zip without data.pkl": (pytorch_zip({"data/0": STORAGES["0"]}), "archive/data.pkl: expected this entry"),
    "zip without the storage": (zip_of(PICKLED, {}), "archive/data/0: expected this entry"),
    "zip big-endian": (
        pytorch_zip({"data.pkl": PICKLED, "byteorder": b"big", "data/0": STORAGES["0"]}),
        "archive/byteorder: expected little, got b'big'",
    ),
    "zip with more behind the pickle": (zip_of(PICKLED + b"N.", STORAGES), r"archive/data.pkl: expected \d+ bytes"),
    "TorchScript": (
        pytorch_zip({"data.pkl": PICKLED, "constants.pkl": b"\x80\x02).", "data/0": STORAGES["0"]}),
        "expected a state_dict, got a TorchScript program",
    ),
}


@pytest.mark.parametrize(("content", "match"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(path: Path, content: bytes, match: str) -> None:
    refused(path, content, match)


def test_deflated_storages_are_refused(path: Path) -> None:
    """A zip bomb: a gigabyte of zeros in a megabyte. Nothing is unpacked."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", PICKLED, zipfile.ZIP_STORED)
        archive.writestr("archive/data/0", bytes(1 << 24))
    refused(path, out.getvalue(), "archive/data/0: expected it stored, as PyTorch does, got it deflated")


BOUNDED = """
import resource, sys, time
from pathlib import Path
from fastbert.pytorch_bin import open_pytorch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_pytorch(path)
    except ValueError as error:
        assert str(error).startswith(path)
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.memory
@pytest.mark.skipif(sys.platform == "win32", reason="this system has no resource module")
def test_time_and_memory_are_bounded(tmp_path: Path) -> None:
    """The worst pickles: nesting, containers, memo entries, shared tuples, long strings."""
    most = MAX_OPERATIONS - 10
    pickles = [
        b"\x80\x02" + b"(" * most,
        b"\x80\x02)" + b"\x85" * most + b".",
        b"\x80\x02](" + b"}" * most + b"e.",
        b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", i << 12) for i in range(most)) + b".",
        b"\x80\x02]q\0" + b"(h\0h\0h\0h\0tq\0" * (most // 7) + b".",
        b"\x80\x02" + b"X\xf0\xff\xff\0" + bytes(0xFFFFF0) + b".",
    ]
    paths = []
    for i, content in enumerate(pickles):
        paths.append(tmp_path / f"{i}.bin")
        paths[-1].write_bytes(zip_of(content, {}))
    ran = subprocess.run([sys.executable, "-c", BOUNDED, *paths], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, ran.stdout.split())
    assert seconds < 60  # 2 s on an idle machine
    assert kilobytes < 150_000


# ---- random damage ----


@each_layout
def test_damaged_files_raise_value_error_alone(path: Path, layout: str, seed: int) -> None:
    """Bytes changed, cut out and put in."""
    WRITERS[layout](path, TENSORS)
    content = path.read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(damaged)))
            damaged[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        path.write_bytes(damaged)
        try:
            for tensor in open_pytorch(path).values():
                assert tensor.dtype not in ("F32", "F16") or np.isfinite(tensor.array().size)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")

"""Reader of PyTorch's .bin files: a state_dict in either layout, without copying and without executing anything.

zip (since PyTorch 1.6)         NAME/data.pkl, NAME/byteorder, NAME/data/<key>, ...: the object, and a storage per file
legacy                          five pickles: magic, 1001, system, the object, [keys]; then, for each key in this order,
                                i64 number of elements, elements

The pickle of the object builds a dict of name -> tensor. It is read by a machine that knows the opcodes and the names
that this takes, and refuses all others: it makes dicts, lists, tuples, strings, numbers and descriptions of tensors.
A tensor is (storage, offset, shape, strides); several may share a storage (tied weights, views), so together they may
be larger than the file, up to MAX_SHARING times.

Layouts: PyTorch 2.13, torch/serialization.py, torch/_utils.py and caffe2/serialize/inline_container.cc.
"""

import math
import os
import reprlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.archive import STORED, read_directory
from fastbert.files import map_file
from fastbert.tensors import Tensor

MAX_PICKLE_BYTES = 16 << 20  # a tensor takes about 150
MAX_OPERATIONS = 1 << 18  # a tensor takes about 30
MAX_SHARING = 8

# Keys under which training scripts put the state_dict into a larger dict.
WRAPPERS = ("state_dict", "model_state_dict", "model")

_LEGACY = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
_PROTOCOL_VERSION = 1001


class _Global(NamedTuple):
    """A name that a pickle may refer to: a function to be called, or a class of storages."""

    name: str
    call: Callable[..., Any] | None = None
    dtype: str = ""
    item_bytes: int = 0


class _Storage(NamedTuple):
    key: str
    dtype: str
    item_bytes: int
    numel: int


class _View(NamedTuple):
    """A tensor of a pickle, not yet checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


def open_pytorch(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Map a PyTorch file (see files.map_file).

    Returns
    -------
    dict of str to Tensor
        The tensors of the state_dict under their names there; other values are left out.

    Raises
    ------
    OSError
        The file is missing, a folder, or not readable.
    ValueError
        It is no state_dict in one of the two layouts, or breaks one of their rules; the text names the file, the tensor
        or the byte, and what was expected.
    """
    path = Path(path)
    data = map_file(path)
    if data[:4] == b"PK\3\4":
        content, storages = _read_zip(path, data)
    elif data[: len(_LEGACY)] == _LEGACY:
        content, storages = _read_legacy(path, data)
    else:
        tar = " (a tar archive, as written before PyTorch 0.2)" if data[257:262] == b"ustar" else ""
        raise ValueError(
            f"{path}: expected a PyTorch file, a zip archive or a legacy pickle, got {bytes(data[:16])!r}{tar}"
        )
    for wrapper in WRAPPERS:
        if type(content) is dict and type(content.get(wrapper)) is dict:
            content = content[wrapper]
    if type(content) is not dict:
        raise ValueError(f"{path}: expected a dict of tensors, got {_kind(content)}")
    tensors = {
        name: _tensor(f"{path}: tensor {name[:256]!r}", view, storages)
        for name, view in content.items()
        if type(view) is _View and type(name) is str
    }
    most = MAX_SHARING * sum(map(len, storages.values()))
    total = sum(len(t.data) for t in tensors.values())
    if total > most:
        raise ValueError(f"{path}: expected tensors of at most {MAX_SHARING} times the data, {most} bytes, got {total}")
    return tensors


def _tensor(where: str, view: _View, storages: dict[str, memoryview]) -> Tensor:
    storage, offset, shape, strides = view
    if type(storage) is not _Storage:
        raise ValueError(f"{where}: expected a storage, got {_kind(storage)}")
    if not _is_counts((offset,)) or not _is_counts(shape) or not _is_counts(strides) or len(shape) != len(strides):
        raise ValueError(f"{where}: expected offset, shape and as many strides, counts all of them")
    numel = math.prod(shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if numel else 0
    if offset + span > storage.numel or numel > span:
        raise ValueError(
            f"{where}: expected elements of their own inside a storage of {storage.numel}, got shape {list(shape)}, "
            f"strides {list(strides)}, offset {offset}"
        )
    data = storages[storage.key][storage.item_bytes * offset : storage.item_bytes * (offset + span)]
    expected = 1  # the stride of an axis in C order; that of an axis of one element is never used
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected and numel:
            return Tensor(data, storage.dtype, shape, strides)
        expected *= n
    return Tensor(data, storage.dtype, shape)


def _is_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _kind(value: object) -> str:
    """For messages: what a value of a pickle is. Never its content, which may be long, deep or endless."""
    return value.name if type(value) is _Global else type(value).__name__.lstrip("_").lower()


# ---- the layouts ----


def _read_zip(path: Path, data: memoryview) -> tuple[Any, dict[str, memoryview]]:
    """The object, and the bytes of each storage that it refers to."""
    entries = read_directory(path, data)
    for name, entry in entries.items():
        if entry.method != STORED:
            raise ValueError(f"{path}: {name}: expected it stored, as PyTorch does, got it deflated")
    folder = next(iter(entries), "").partition("/")[0]

    def content(name: str) -> memoryview:
        entry = entries.get(f"{folder}/{name}")
        if entry is None:
            raise ValueError(f"{path}: {folder}/{name}: expected this entry in a PyTorch file, got none")
        return data[entry.start : entry.start + entry.bytes]

    if f"{folder}/constants.pkl" in entries:
        raise ValueError(f"{path}: expected a state_dict, got a TorchScript program")
    if f"{folder}/byteorder" in entries and content("byteorder") != b"little":
        raise ValueError(f"{path}: {folder}/byteorder: expected little, got {bytes(content('byteorder')[:16])!r}")
    machine = _Machine(f"{path}: {folder}/data.pkl")
    pickle = content("data.pkl")
    value, end = machine.run(pickle)
    if end != len(pickle):
        raise ValueError(f"{path}: {folder}/data.pkl: expected {end} bytes, got {len(pickle)}")
    storages = {}
    for key, storage in machine.storages.items():
        storages[key] = content(f"data/{key}")
        if len(storages[key]) != storage.numel * storage.item_bytes:
            raise ValueError(
                f"{path}: {folder}/data/{key}: expected {storage.numel} elements of {storage.item_bytes} bytes "
                f"({storage.dtype}), got {len(storages[key])} bytes"
            )
    return value, storages


def _read_legacy(path: Path, data: memoryview) -> tuple[Any, dict[str, memoryview]]:
    """The object, and the bytes of each storage that it refers to."""
    at = len(_LEGACY)
    parts = []
    for name in ("protocol version", "system", "object", "storage keys"):
        machine = _Machine(f"{path}: {name}", at)
        value, size = machine.run(data[at:])
        parts.append((value, machine.storages))
        at += size
    (version, _), (system, _), (value, wanted), (keys, _) = parts
    if version != _PROTOCOL_VERSION:
        raise ValueError(f"{path}: expected protocol version {_PROTOCOL_VERSION}, got another")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError(f"{path}: expected little-endian data, got another byte order")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise ValueError(f"{path}: storage keys: expected a list of different strings")
    if wanted.keys() != set(keys):
        odd = sorted(wanted.keys() ^ set(keys))
        raise ValueError(f"{path}: storage keys: expected those of the tensors, differs in {reprlib.repr(odd)}")
    storages = {}
    for key in keys:
        storage = wanted[key]
        end = at + 8 + storage.numel * storage.item_bytes
        if end > len(data) or int.from_bytes(data[at : at + 8], "little", signed=True) != storage.numel:
            raise ValueError(
                f"{path}: storage {key!r}: expected {storage.numel} elements of {storage.item_bytes} bytes "
                f"({storage.dtype}) at byte {at}, got another number, or the end of the file"
            )
        storages[key] = data[at + 8 : end]
        at = end
    if at != len(data):
        raise ValueError(f"{path}: expected {at} bytes, got {len(data)}")
    return value, storages


# ---- names ----


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _View:
    return _View(storage, offset, shape, strides)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _View:
    if metadata:  # conjugated or negated where it is used
        raise TypeError
    return _View(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any, state: Any = None) -> _View:
    if type(tensor) is not _View:
        raise TypeError
    return tensor


def _size(shape: Any) -> tuple[Any, ...]:
    if type(shape) is not tuple:
        raise TypeError
    return shape


_GLOBALS = {
    name: _Global(name, call)
    for name, call in {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch.Size": _size,
    }.items()
} | {
    f"torch.{name}Storage": _Global(f"torch.{name}Storage", None, dtype, item_bytes)
    for name, dtype, item_bytes in (
        ("Float", "F32", 4),
        ("Half", "F16", 2),
        ("BFloat16", "BF16", 2),
        ("Double", "F64", 8),
        ("Long", "I64", 8),
        ("Int", "I32", 4),
        ("Short", "I16", 2),
        ("Char", "I8", 1),
        ("Byte", "U8", 1),
        ("Bool", "BOOL", 1),
    )
}


# ---- the machine ----


class _Machine:
    """Runs one pickle of protocol 2. `place` and `start` (its offset there) are for messages."""

    def __init__(self, place: str, start: int = 0) -> None:
        self.storages: dict[str, _Storage] = {}
        """All that were referred to."""
        self._place, self._start = place, start
        self._at = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}

    def run(self, data: memoryview) -> tuple[Any, int]:
        """The object of the pickle at the start of ``data``, and the pickle's length."""
        self._data = data[:MAX_PICKLE_BYTES]
        for _ in range(MAX_OPERATIONS):
            opcode = self._take(1)[0]
            if opcode == 0x2E:  # STOP
                value = self._pop()
                if self._stack or self._marked:
                    raise self._error("one object at the end, got more")
                return value, self._at
            step = _OPCODES.get(opcode)
            if step is None:
                raise self._error(f"an opcode that tensors need, got {opcode:#04x}")
            step(self)
        raise self._error(f"at most {MAX_OPERATIONS} operations")

    def _error(self, expected: str) -> ValueError:
        return ValueError(f"{self._place}: byte {self._start + self._at}: expected {expected}")

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self._at:
            raise self._error(f"{size} more bytes, got the end (a pickle may have {MAX_PICKLE_BYTES})")
        self._at += size
        return self._data[self._at - size : self._at]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _text(self, size: int) -> str:
        try:
            return bytes(self._take(size)).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"UTF-8: {error.reason}") from None

    def _line(self) -> str:
        line = bytes(self._data[self._at : self._at + 256]).partition(b"\n")[0]
        text = self._text(len(line))
        self._take(1)
        return text

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise self._error("a value on the stack, got none")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        if not self._marked:
            raise self._error("a mark on the stack, got none")
        values, self._stack = self._stack, self._marked.pop()
        return values

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _protocol(self) -> None:
        protocol = self._unsigned(1)
        if protocol != 2:
            raise self._error(f"pickle protocol 2, got {protocol}")

    def _put(self, size: int) -> None:
        index = self._unsigned(size)
        if not self._stack:
            raise self._error("a value on the stack, got none")
        self._memo[index] = self._stack[-1]

    def _get(self, size: int) -> None:
        index = self._unsigned(size)
        if index not in self._memo:
            raise self._error(f"an object that is in the memo, got index {index}")
        self._push(self._memo[index])

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1] if self._stack else None
        if type(target) is not list:
            raise self._error(f"a list to append to, got {_kind(target)}")
        target.extend(values)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1] if self._stack else None
        if type(target) is not dict or len(items) % 2:
            raise self._error(f"a dict and pairs to put into it, got {_kind(target)} and {len(items)} values")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Others could be deep, and large numbers made to have one hash.
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 32):
                raise self._error(f"a string or a small number as key, got {_kind(key)}")
            target[key] = value

    def _set_one(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if name not in _GLOBALS:
            raise self._error(f"names that tensors need ({', '.join(_GLOBALS)}), got {name!r}")
        self._push(_GLOBALS[name])

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not _Global or function.call is None or type(arguments) is not tuple:
            raise self._error(f"a function and its arguments, got {_kind(function)} and {_kind(arguments)}")
        try:
            self._push(function.call(*arguments))
        except TypeError:
            raise self._error(f"the arguments of {function.name}, got others") from None

    def _build(self) -> None:
        """Sets attributes, of which an OrderedDict has `_metadata`: versions of modules, not needed."""
        self._pop()
        if not self._stack or type(self._stack[-1]) is not dict:
            raise self._error("an OrderedDict that takes attributes")

    def _persistent(self) -> None:
        """('storage', class, key, device, number of elements[, None]) -> storage"""
        value = self._pop()
        if type(value) is not tuple or not 5 <= len(value) <= 6 or value[5:] not in ((), (None,)):
            raise self._error("a storage of five parts, whole, not a view of another")
        kind, cls, key, device, numel = value[:5]
        if type(kind) is not str or kind != "storage" or type(key) is not str or type(device) is not str:
            raise self._error(f"a storage, got {reprlib.repr(kind) if type(kind) is str else _kind(kind)}")
        if type(cls) is not _Global or not cls.dtype or not _is_counts((numel,)):
            raise self._error(f"a class of storages and a number of elements, got {_kind(cls)} and {_kind(numel)}")
        storage = _Storage(key, cls.dtype, cls.item_bytes, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise self._error(f"one type and size of the storage {reprlib.repr(key)}, got two")
        self._push(storage)


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": _Machine._protocol,
        "(": _Machine._mark,
        "N": lambda m: m._push(None),
        "\x88": lambda m: m._push(True),
        "\x89": lambda m: m._push(False),
        "K": lambda m: m._push(m._unsigned(1)),
        "M": lambda m: m._push(m._unsigned(2)),
        "J": lambda m: m._push(int.from_bytes(m._take(4), "little", signed=True)),
        "\x8a": lambda m: m._push(int.from_bytes(m._take(m._unsigned(1)), "little", signed=True)),
        "G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
        "X": lambda m: m._push(m._text(m._unsigned(4))),
        "}": lambda m: m._push({}),
        "]": lambda m: m._push([]),
        ")": lambda m: m._push(()),
        "t": lambda m: m._push(tuple(m._pop_mark())),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "a": lambda m: m._extend([m._pop()]),
        "e": lambda m: m._extend(m._pop_mark()),
        "s": _Machine._set_one,
        "u": lambda m: m._set(m._pop_mark()),
        "q": lambda m: m._put(1),
        "r": lambda m: m._put(4),
        "h": lambda m: m._get(1),
        "j": lambda m: m._get(4),
        "c": _Machine._global,
        "R": _Machine._reduce,
        "b": _Machine._build,
        "Q": _Machine._persistent,
    }.items()
}

"""Opening and mapping the files of a model, and checking the values in their JSON.

Regular files only, sizes checked before reading; every error names the file.
"""

import contextlib
import json
import mmap
import os
import reprlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

MAX_JSON_BYTES = 16 << 20  # no metadata file of a BERT folder comes near; tokenizer.json has its own limit

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

T = TypeVar("T", dict, list)


def open_file(path: Path) -> BinaryIO:
    """Open ``path`` for reading, at its start.

    Raises OSError (missing, a folder, not readable) or ValueError (a pipe or device, a Git LFS pointer).
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a pipe would wait for its writer
        raise ValueError(f"{path}: expected a regular file")
    file = open(path, "rb")
    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
        file.close()
        raise ValueError(f"{path}: expected the file itself, got a Git LFS pointer (`git lfs pull` fetches the file)")
    file.seek(0)
    return file


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of ``path``. Raises what open_file raises, and ValueError where it is longer than ``max_bytes``."""
    with open_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes} bytes, got more")
    return data


def map_file(path: Path) -> memoryview:
    """The bytes of ``path``, mapped and read-only; they stay mapped as long as a view of them lives.

    The file must not be made shorter meanwhile: the system would end the process (SIGBUS). Raises as open_file does.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return memoryview(b"")
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else a touched tensor may bring back neighbours that were let go
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapped.madvise(mmap.MADV_NOHUGEPAGE)
        return memoryview(mapped)


def parse_json(data: bytes, where: object, **hooks: Callable[..., Any]) -> Any:
    """The value of UTF-8 JSON. Raises ValueError, which begins with ``where``; NaN and infinities are refused."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, **hooks)
    except RecursionError:
        raise ValueError(f"{where}: invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: invalid JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_json(path: Path, kind: type[T]) -> T:
    """The object (``kind`` dict) or array (list) in a JSON file of at most MAX_JSON_BYTES.

    Raises OSError or ValueError, both with the path.
    """
    value = parse_json(read_file(path, MAX_JSON_BYTES), path)
    if not isinstance(value, kind):
        name = {dict: "object", list: "array"}[kind]
        raise ValueError(f"{path}: expected a JSON {name}, got {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. A dangling link is an error, not an absent file."""
    return read_json(path, dict) if os.path.lexists(path) else {}


def count(where: object, key: str, value: Any, low: int, high: int) -> int:
    """``value`` if it is a whole number from ``low`` to ``high``; ValueError, which begins with ``where``, if not."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{where}: {key}: expected a whole number from {low} to {high}, got {reprlib.repr(value)}")
    return value


def flag(where: object, config: Mapping[str, Any], key: str, absent: bool) -> bool:
    """The true or false of a key, ``absent`` where it is not there; ValueError as from count."""
    value = config.get(key, absent)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key}: expected true or false, got {reprlib.repr(value)}")
    return value


def require(where: object, config: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]]) -> None:
    """ValueError as from count for a value outside the table {key: supported values}; an absent key passes."""
    for key, supported in table.items():
        if key in config and config[key] not in supported:
            raise ValueError(f"{where}: {key}: expected {supported[0]!r}, got {reprlib.repr(config[key])}")

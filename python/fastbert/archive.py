"""Reader of zip archives: strict, so that no other reader can see another content in the same file; and models in one.

    (local header, name, extra, data)*  central directory  [zip64 record, zip64 locator]  end record, comment

The central directory counts; local headers must agree with it. Entries do not overlap, nor reach outside the file; no
two names are equal, upper and lower case apart; no name leads out of the archive; nothing is encrypted; entries are
stored or deflated. Format: PKWARE, APPNOTE.TXT 6.3.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from fastbert.files import map_file

MAX_ENTRIES = 1 << 16

# What is unpacked from a model's archive; not the graph of a TensorFlow model, and not what macOS adds.
_MODEL_FILES = re.compile(r"(?!__MACOSX/)(.*/)?[^./][^/]*\.(json|txt|safetensors|bin|index|data-\d+-of-\d+)")
_CONFIGS = ("config.json", "bert_config.json", "modules.json")

# Weights in float32 shrink by a tenth, vocabularies to a third.
MAX_RATIO, MAX_RATIO_FROM = 64, 64 << 20

STORED, DEFLATED = 0, 8
# Flags: effort of the compressor; sizes and CRC follow the data; names are UTF-8. The others: encryption and patches.
_EFFORT, _DESCRIPTOR, _UTF8 = 0x0006, 0x0008, 0x0800

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")


class Entry(NamedTuple):
    """A file in an archive."""

    start: int
    """Offset of its data in the archive."""
    packed_bytes: int
    """Length of its data in the archive."""
    bytes: int
    """Its length, as the archive declares it."""
    method: int
    """STORED or DEFLATED."""
    crc: int


def read_directory(path: Path, data: memoryview) -> dict[str, Entry]:
    """The entries of an archive, folders left out. Raises ValueError with ``path`` and what was expected."""
    start, size, count = _find_directory(path, data)
    if count > MAX_ENTRIES:
        raise ValueError(f"{path}: expected at most {MAX_ENTRIES} entries, got {count}")
    entries: dict[str, Entry] = {}
    spans = []  # (start of the local header, end of the data, name) of each entry
    seen = set()
    at, end = start, start + size
    for number in range(count):
        where = f"{path}: entry {number}"
        if end - at < _CENTRAL.size:
            raise ValueError(f"{where}: expected it in the central directory, which ends before it")
        fields = _CENTRAL.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc, packed, plain, name_bytes, extra_bytes, comment_bytes = fields[:13]
        disk, _, _, header = fields[13:]
        at += _CENTRAL.size
        if signature != b"PK\1\2" or end - at < name_bytes + extra_bytes + comment_bytes:
            raise ValueError(f"{where}: expected a whole record of the central directory")
        raw_name = bytes(data[at : at + name_bytes])
        name = _name(where, raw_name, flags)
        where = f"{path}: {name}"
        extra = data[at + name_bytes : at + name_bytes + extra_bytes]
        plain, packed, header = _widen(where, extra, plain, packed, header)
        at += name_bytes + extra_bytes + comment_bytes
        if flags & ~(_EFFORT | _DESCRIPTOR | _UTF8):
            raise ValueError(f"{where}: expected no encryption or patches, got flags {flags:#06x}")
        if method not in (STORED, DEFLATED) or (method == STORED and packed != plain):
            raise ValueError(f"{where}: expected it stored or deflated, got method {method}, {packed} of {plain} bytes")
        if disk not in (0, 0xFFFF):
            raise ValueError(f"{where}: expected an archive in one file, got part {disk}")
        if name.casefold() in seen:
            raise ValueError(f"{where}: expected one entry of this name, upper and lower case apart")
        seen.add(name.casefold())
        data_start = _check_local(where, data, header, start, raw_name, (flags, method, crc, packed, plain))
        spans.append((header, data_start + packed, name))
        if not name.endswith("/"):
            entries[name] = Entry(data_start, packed, plain, method, crc)
    if at != end:
        raise ValueError(f"{path}: expected a central directory of {at - start} bytes, got {size}")
    spans.sort()
    last = 0
    for header, data_end, name in [*spans, (start, start, "the central directory")]:
        if header < last:
            raise ValueError(f"{path}: {name}: expected it behind the data of the entry before, which ends at {last}")
        last = data_end
    return entries


def unpack(path: Path, data: memoryview, name: str, entry: Entry) -> Iterator[bytes]:
    """The bytes of an entry in pieces of at most 1 MiB. ValueError where size or CRC differ from what is declared."""
    piece = 1 << 20
    done, crc = 0, 0
    packed = data[entry.start : entry.start + entry.packed_bytes]
    for block in _inflate(packed, piece) if entry.method == DEFLATED else _slices(packed, piece):
        done, crc = done + len(block), zlib.crc32(block, crc)
        if done > entry.bytes:
            break
        yield block
    if (done, crc) != (entry.bytes, entry.crc):
        raise ValueError(
            f"{path}: {name}: expected {entry.bytes} bytes of CRC {entry.crc:#010x}, got {done} of CRC {crc:#010x}"
        )


@contextmanager
def unpacked_model(path: Path) -> Iterator[Path]:
    """Unpack the one model in an archive, and give its folder: a temporary one, deleted at the end.

    Raises OSError, and ValueError with ``path`` where the archive is damaged, has no model or several, or would grow to
    more than MAX_RATIO times its size.
    """
    data = map_file(path)
    entries = {name: entry for name, entry in read_directory(path, data).items() if _MODEL_FILES.fullmatch(name)}
    size, most = sum(entry.bytes for entry in entries.values()), max(MAX_RATIO * len(data), MAX_RATIO_FROM)
    if size > most:
        raise ValueError(f"{path}: expected files of at most {most} bytes, {MAX_RATIO} times the archive, got {size}")
    folders = {name.rpartition("/")[0] for name in entries if name.rpartition("/")[2] in _CONFIGS}
    outermost = {folder for folder in folders if not any(_is_inside(folder, other) for other in folders)}
    if len(outermost) != 1:
        got = ", ".join(sorted(folder or "the root" for folder in outermost))
        raise ValueError(f"{path}: expected one folder with {' or '.join(_CONFIGS)}, got {got or 'none'}")
    with TemporaryDirectory(prefix="fastbert-", ignore_cleanup_errors=True) as temporary:
        for name, entry in entries.items():
            target = Path(temporary, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                file.writelines(unpack(path, data, name, entry))
        yield Path(temporary, *outermost)


def _is_inside(folder: str, other: str) -> bool:
    return folder != other and (not other or folder.startswith(f"{other}/"))


def _slices(data: memoryview, piece: int) -> Iterator[bytes]:
    return (bytes(data[at : at + piece]) for at in range(0, len(data), piece))


def _inflate(packed: memoryview, piece: int) -> Iterator[bytes]:
    """What a damaged stream gives up to the damage; nothing is made in advance."""
    inflater = zlib.decompressobj(-15)
    for part in [*_slices(packed, piece), b""]:
        block = b"?"
        while block and not inflater.eof:
            try:
                block = inflater.decompress(part, piece)
            except zlib.error:
                return
            part = inflater.unconsumed_tail
            yield block


def _find_directory(path: Path, data: memoryview) -> tuple[int, int, int]:
    """Start, size and number of entries of the central directory."""
    tail = bytes(data[-(_END.size + 0xFFFF) :])
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise ValueError(f"{path}: expected a zip archive, got no end record: the file is cut, or none")
    _, disk, first_disk, here, count, size, start, comment_bytes = _END.unpack_from(tail, at)
    if comment_bytes != len(tail) - at - _END.size:
        raise ValueError(f"{path}: expected the end record and its comment to end the file")
    end = len(data) - len(tail) + at
    if end >= _LOCATOR64.size and data[end - _LOCATOR64.size :][:4] == b"PK\6\7":
        narrow = (count, size, start)
        _, disk, end64, _ = _LOCATOR64.unpack_from(data, end - _LOCATOR64.size)
        end -= _LOCATOR64.size
        if end64 != end - _END64.size or data[end64 : end64 + 4] != b"PK\6\6":
            raise ValueError(f"{path}: expected the zip64 end record in front of its locator")
        _, record_bytes, _, _, _, first_disk, here, count, size, start = _END64.unpack_from(data, end64)
        end = end64
        wide = (count, size, start)
        limits = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        if record_bytes != _END64.size - 12 or any(
            n not in (w, limit) for n, w, limit in zip(narrow, wide, limits, strict=True)
        ):
            raise ValueError(f"{path}: expected equal numbers in the zip64 end record and the end record")
    if disk or first_disk or here != count:
        raise ValueError(f"{path}: expected an archive in one file")
    if start + size != end:
        raise ValueError(f"{path}: expected the central directory to end at {end}, got {start} + {size}")
    return start, size, count


def _name(where: str, raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: expected a name in UTF-8 or ASCII, got {raw[:99]!r}") from None
    parts = name.removesuffix("/").split("/")
    if not name.isprintable() or any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in name:
        raise ValueError(f"{where}: expected a plain relative name, got {name[:99]!r}")
    return name


def _widen(where: str, extra: memoryview, *narrow: int) -> list[int]:
    """Sizes and offset with those of 0xFFFFFFFF taken from the zip64 extra field."""
    wide, found = b"", False
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if len(extra) < 4 + size or (kind == 1 and found):
            raise ValueError(f"{where}: expected whole extra fields, and one of zip64")
        if kind == 1:
            wide, found = bytes(extra[4 : 4 + size]), True
        extra = extra[4 + size :]
    numbers = []
    for number in narrow:
        if number == 0xFFFFFFFF and len(wide) >= 8:
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        numbers.append(number)
    return numbers


def _check_local(
    where: str, data: memoryview, at: int, end: int, raw_name: bytes, central: tuple[int, int, int, int, int]
) -> int:
    """The start of an entry's data, which ends before ``end``; its local header must say what the directory says."""
    if at + _LOCAL.size > end:
        raise ValueError(f"{where}: expected a local header in front of the central directory, got offset {at}")
    signature, _, *fields, name_bytes, extra_bytes = _LOCAL.unpack_from(data, at)
    flags, method, _, _, crc, packed, plain = fields
    at += _LOCAL.size
    start = at + name_bytes + extra_bytes
    if signature != b"PK\3\4" or start + central[3] > end or bytes(data[at : at + name_bytes]) != raw_name:
        raise ValueError(f"{where}: expected a local header of the same name and its data inside the file")
    if 0xFFFFFFFF in (packed, plain):
        plain, packed = _widen(where, data[at + name_bytes : start], plain, packed)
    local = (flags, method, crc, packed, plain)
    if local != central and not (flags & _DESCRIPTOR and local == (*central[:2], 0, 0, 0)):
        raise ValueError(
            f"{where}: expected the same flags, method, CRC and sizes in both headers, got {local} and {central}"
        )
    return start

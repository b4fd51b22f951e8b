"""Zip archives: the strict reader, and models in archives as they are downloaded."""

import io
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastbert import Encoder
from fastbert.archive import MAX_RATIO_FROM, read_directory, unpack, unpacked_model
from tests.models import Sentence, write_model

FILES = {"m/a.txt": b"alpha " * 99, "m/b.bin": bytes(range(256)), "m/empty": b""}


def made(files: dict[str, bytes] = FILES, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            archive.writestr(entry, data)
    return out.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    path, view = Path("x.zip"), memoryview(data)
    return {name: b"".join(unpack(path, view, name, e)) for name, e in read_directory(path, view).items()}


# ---- good archives ----


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_python_writes(method: int) -> None:
    assert contents(made(method=method)) == FILES


def test_sizes_behind_the_data() -> None:
    """A writer that cannot seek: flag 3, sizes and CRC 0 in the local header."""

    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, block: bytes) -> int:  # type: ignore[override]
            self.data += bytes(block)
            return len(block)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    assert contents(pipe.data) == FILES


def test_zip64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    data = made(FILES | {"c": bytes(200)})
    assert b"PK\6\6" in data
    assert contents(data) == FILES | {"c": bytes(200)}


def test_folders_and_a_comment() -> None:
    out = io.BytesIO(made())
    with zipfile.ZipFile(out, "a") as archive:
        archive.mkdir("m")
        archive.comment = b"from somewhere"
    assert contents(out.getvalue()) == FILES


def test_what_info_zip_writes(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    try:
        subprocess.run(["zip", "-qr", "x.zip", "m"], cwd=tmp_path, check=True)
    except FileNotFoundError:
        pytest.skip("this machine has no zip")
    assert contents((tmp_path / "x.zip").read_bytes()) == FILES


# ---- bad archives ----

ONE = {"m/a": b"abc"}
LOCAL, CENTRAL, END = 0, 30 + 3 + 3, 30 + 3 + 3 + 46 + 3  # offsets in an archive of ONE, stored


def patched(at: int, form: str, *values: int, data: bytes | None = None) -> bytes:
    out = bytearray(made(ONE, zipfile.ZIP_STORED) if data is None else data)
    struct.pack_into("<" + form, out, at, *values)
    return bytes(out)


def duplicate(first: str, second: str) -> bytes:
    """Two entries, whose names have the same length, one name written over the other where that is wanted."""
    return (
        made({"m/data.pkl": b"one", "m/DATA.PKL": b"two"})
        .replace(b"m/data.pkl", first.encode())
        .replace(b"m/DATA.PKL", second.encode())
    )


def overlapping() -> bytes:
    """Two records of the directory that lead to one local header: a bomb without recursion (Fifield, 2019)."""
    good = made(ONE, zipfile.ZIP_STORED)
    record = good[CENTRAL:END]
    other = record.replace(b"m/a", b"m/b")
    end = bytearray(good[END:])
    struct.pack_into("<HHI", end, 8, 2, 2, len(record) * 2)
    return good[:CENTRAL] + record + other + bytes(end)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a zip archive, got no end record"),
    "cut": (made()[:-1], "expected a zip archive, got no end record|end record and its comment to end the file"),
    "more behind": (made() + b"\0", "expected the end record and its comment to end the file"),
    "more in front": (b"\0" + made(), "expected the central directory to end at"),
    "gap": (made(ONE)[:-22] + b"\0" + made(ONE)[-22:], "expected the central directory to end at"),
    "directory beyond": (patched(END + 16, "I", 1 << 31), "expected the central directory to end at"),
    "entries missing": (patched(END + 8, "HH", 2, 2), "entry 1: expected it in the central directory"),
    "entries not counted": (patched(END + 8, "HH", 0, 0), "expected a central directory of 0 bytes, got 49"),
    "several disks": (patched(END + 4, "H", 1), "expected an archive in one file"),
    "entries of another disk": (patched(END + 8, "H", 2), "expected an archive in one file"),
    "entry on another disk": (patched(CENTRAL + 34, "H", 1), "m/a: expected an archive in one file, got part 1"),
    "no record": (patched(CENTRAL, "I", 0), "entry 0: expected a whole record"),
    "name beyond the directory": (patched(CENTRAL + 28, "H", 999), "entry 0: expected a whole record"),
    "encrypted": (patched(CENTRAL + 8, "H", 1), "m/a: expected no encryption or patches"),
    "strong encryption": (patched(CENTRAL + 8, "H", 0x40), "m/a: expected no encryption or patches"),
    "masked headers": (patched(CENTRAL + 8, "H", 0x2000), "m/a: expected no encryption or patches"),
    "bzip2": (made(ONE, zipfile.ZIP_BZIP2), "m/a: expected it stored or deflated, got method 12"),
    "lzma": (made(ONE, zipfile.ZIP_LZMA), "m/a: expected it stored or deflated, got method 14"),
    "stored of two sizes": (patched(CENTRAL + 24, "I", 4), "m/a: expected it stored or deflated, .* 3 of 4 bytes"),
    "twice": (duplicate("m/data.pkl", "m/data.pkl"), "m/data.pkl: expected one entry of this name"),
    "twice but for case": (duplicate("m/data.pkl", "m/Data.pkl"), "m/Data.pkl: expected one entry of this name"),
    "header beyond": (patched(CENTRAL + 42, "I", 9999), "m/a: expected a local header in front of"),
    "header in the directory": (patched(CENTRAL + 42, "I", CENTRAL), "m/a: expected a local header in front of"),
    "no header": (patched(LOCAL, "I", 0), "m/a: expected a local header of the same name"),
    "other name": (patched(LOCAL + 30, "B", 0x6E), "m/a: expected a local header of the same name"),
    "data beyond": (patched(CENTRAL + 20, "II", 99, 99), "m/a: expected a local header of the same name and its data"),
    "local extra beyond": (patched(LOCAL + 28, "H", 999), "m/a: expected a local header of the same name and its data"),
    "other flags": (patched(LOCAL + 6, "H", 2), "m/a: expected the same flags, method, CRC and sizes in both headers"),
    "other method": (patched(LOCAL + 8, "H", 8), "m/a: expected the same flags, method, CRC and sizes"),
    "other CRC": (patched(LOCAL + 14, "I", 1), "m/a: expected the same flags, method, CRC and sizes"),
    "other size": (patched(LOCAL + 18, "II", 2, 2), "m/a: expected the same flags, method, CRC and sizes"),
    "wrong CRC": (
        patched(LOCAL + 14, "I", 1, data=patched(CENTRAL + 16, "I", 1)),
        "m/a: expected 3 bytes of CRC 0x00000001, got 3 of CRC 0x352441c2",
    ),
    "overlap": (overlapping(), "m/b: expected a local header of the same name"),
    "zip64 size without field": (patched(CENTRAL + 20, "II", 0xFFFFFFFF, 0xFFFFFFFF), "m/a: expected a local header"),
    "locator without record": (
        made(ONE)[:-22] + b"PK\6\7" + bytes(16) + made(ONE)[-22:],
        "expected the zip64 end record in front of its locator",
    ),
} | {
    f"name {name!r}": (made(ONE, zipfile.ZIP_STORED).replace(b"m/a", name), "entry 0: expected a plain relative name")
    for name in (b"/ab", b"../", b"a/.", b"a//", b"a\\b", b"c:a", b"a\0b", b"a\nb")
}


@pytest.mark.parametrize(("data", "match"), BAD.values(), ids=BAD.keys())
def test_bad_archive(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        contents(data)
    assert str(error.value).startswith("x.zip: ")


def test_names_that_are_no_utf8() -> None:
    data = made({"m/ä": b""}).replace("m/ä".encode(), b"m/\xff\xfe")
    with pytest.raises(ValueError, match="entry 0: expected a name in UTF-8 or ASCII"):
        contents(data)


def test_overlapping_data() -> None:
    """The second header lies inside the data of the first."""
    inner = made(ONE, zipfile.ZIP_STORED)
    outer = bytearray(made({"m/b": inner[:CENTRAL]}, zipfile.ZIP_STORED))
    start = outer.index(b"PK\1\2")
    record = bytearray(inner[CENTRAL:END])
    struct.pack_into("<I", record, 42, 33)
    end = outer.index(b"PK\5\6")
    outer[end:end] = record
    struct.pack_into("<HHI", outer, end + len(record) + 8, 2, 2, end + len(record) - start)
    with pytest.raises(ValueError, match="m/a: expected it behind the data of the entry before"):
        contents(bytes(outer))


def test_damaged_stream() -> None:
    data = bytearray(made({"m/a": b"abcdefgh" * 999}))
    data[40] ^= 0xFF
    with pytest.raises(ValueError, match="m/a: expected 7992 bytes of CRC"):
        contents(bytes(data))


def test_bomb_that_declares_little() -> None:
    """A gigabyte behind a declared size of 1000: unpacking stops after a piece."""
    data = bytearray(made({"m/a": bytes(1 << 28)}))
    start = data.index(b"PK\1\2")
    struct.pack_into("<I", data, 22, 1000)
    struct.pack_into("<I", data, start + 24, 1000)
    view = memoryview(bytes(data))
    entry = read_directory(Path("x.zip"), view)["m/a"]
    pieces = []
    with pytest.raises(ValueError, match=r"m/a: expected 1000 bytes of CRC .* got 1048576"):
        pieces.extend(unpack(Path("x.zip"), view, "m/a", entry))
    assert not pieces


def test_random_damage(seed: int) -> None:
    good = made()
    rng = np.random.default_rng(seed)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            data[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        try:
            contents(bytes(data))
        except ValueError as error:
            assert str(error).startswith("x.zip: ")


# ---- models in archives ----


def archived(folder: Path, target: Path, inside: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return target


@pytest.mark.parametrize("format", ["safetensors", "pytorch", "pytorch_legacy", "tensorflow"])
@pytest.mark.parametrize("inside", ["", "uncased_L-2_H-64_A-2/", "a/b/"])
def test_model_in_an_archive(tmp_path: Path, format: str, inside: str) -> None:
    write_model(tmp_path / "model", format=format, prefix="bert.", heads=True)
    archive = archived(tmp_path / "model", tmp_path / "uncased_L-2_H-64_A-2.zip", inside)
    texts = ["the cat sat", "a dog"]
    expected = Encoder(tmp_path / "model").encode(texts)
    encoder = Encoder(archive)
    np.testing.assert_array_equal(encoder.encode(texts), expected)
    assert encoder.model == str(archive)
    np.testing.assert_array_equal(
        Encoder(str(archive), precision="int8").encode("a"), Encoder(archive, precision="int8").encode("a")
    )


def test_sentence_model_in_an_archive(tmp_path: Path) -> None:
    write_model(tmp_path / "model", sentence=Sentence(dense=[("tanh", 8)], max_seq_length=16))
    archive = archived(tmp_path / "model", tmp_path / "m.zip", "m/")
    np.testing.assert_array_equal(Encoder(archive).encode("a"), Encoder(tmp_path / "model").encode("a"))


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", format="tensorflow", prefix="bert.")
    archive = archived(tmp_path / "model", tmp_path / "m.zip")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with unpacked_model(archive) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "bert_config.json",
            "bert_model.ckpt.data-00000-of-00001",
            "bert_model.ckpt.index",
            "vocab.txt",
        ]
    Encoder(archive)
    assert not list((tmp_path / "temporary").iterdir())


def test_other_files_stay_packed(tmp_path: Path) -> None:
    names = (
        "model.py",
        "bert_model.ckpt.meta",
        "README.md",
        "__MACOSX/config.json",
        "._config.json",
        "a/.x/config.json",
    )
    archive = tmp_path / "m.zip"
    archive.write_bytes(made({"config.json": b"{}"} | dict.fromkeys(names, b"?")))
    with unpacked_model(archive) as folder:
        assert [path.name for path in folder.iterdir() if path.is_file()] == ["config.json"]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"a.txt": b""}, "expected one folder with config.json or bert_config.json or modules.json, got none"),
        ({"a/config.json": b"", "b/config.json": b""}, "expected one folder with .* got a, b"),
        ({"config.json": bytes(MAX_RATIO_FROM)}, None),
        ({"config.json": bytes(MAX_RATIO_FROM + 1)}, f"expected files of at most {MAX_RATIO_FROM} bytes, 64 times"),
    ],
)
def test_archives_without_one_model(tmp_path: Path, files: dict[str, bytes], match: str | None) -> None:
    archive = tmp_path / "m.zip"
    archive.write_bytes(made(files))
    if match is None:
        with unpacked_model(archive):
            pass
        return
    with pytest.raises(ValueError, match=match) as error, unpacked_model(archive):
        pass
    assert str(error.value).startswith(f"{archive}: ")

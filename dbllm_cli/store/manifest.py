"""manifest.json: what an artifact is, what it was made from, and what its files must be."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store.digest import digest_of, file_sha256
from dbllm_cli.store.json_file import parse_json, read_bytes

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name
    if outside or path.as_posix() != name or name in (".", MANIFEST):
        raise ValueError(f"{name!r} is not the name of a file in the artifact")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


class FileRecord(_Record):
    """What one file must be: its size in bytes and the hex sha256 of its content."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class LineageRecord(_Record):
    """What an artifact was made from: the settings, and the digest of each input by slot."""

    stage: str
    stage_version: int
    config: dict[str, Any]
    inputs: dict[str, str]


class Provenance(_Record):
    """How an artifact was made, as far as it is told: time, seconds, MiB, device."""

    step: str | None = None
    started: str | None = None
    seconds: float = Field(0.0, ge=0)
    peak_memory_mib: float = Field(0.0, ge=0)
    device: str | None = None


class Manifest(_Record):
    """The content of manifest.json; files by their name in the folder."""

    schema_version: int
    kind: str = Field(min_length=1)
    digest: str
    lineage: LineageRecord
    files: dict[Annotated[str, AfterValidator(_inside)], FileRecord]
    provenance: Provenance
    provenance_digest: str | None = None
    """Of the provenance, which `digest` does not cover; older manifests have none."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def lineage_key(lineage: Mapping[str, Any]) -> str:
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
    return {
        **manifest,
        "digest": digest_of(manifest),
        "provenance": provenance,
        "provenance_digest": digest_of(provenance),
    }


def manifest_text(manifest: dict[str, Any]) -> str:
    """The text of manifest.json, for people to read too."""
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def read_manifest(folder: Path, *, links: bool) -> dict[str, Any]:
    """Read and check the manifest of an artifact, and that its files have the sizes it says.

    Args:
        folder: the artifact.
        links: whether its files may be links, as in the cache of the hub.

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
    record = typed_manifest(folder, manifest)
    covered = {name: manifest[name] for name in ("schema_version", "kind", "lineage", "files")}
    if version != SCHEMA_VERSION or digest_of(covered) != record.digest:
        raise corrupt(folder, f"its {MANIFEST} was changed after it was written")
    for name in (MANIFEST, *record.files):
        if not links and _is_behind_link(folder, name):
            raise corrupt(folder, f"{name} is a link, where an artifact holds only files")
    for name, file in record.files.items():
        problem = size_problem(folder / name, file.size)
        if problem:
            raise corrupt(folder, f"file {name} {problem}")
    return manifest


def typed_manifest(folder: Path, manifest: dict[str, Any]) -> Manifest:
    """The manifest of the artifact in `folder` with its types.

    Raises:
        ArtifactCorruptError: a field is missing or of another type.
    """
    try:
        return Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise corrupt(folder, f"its {MANIFEST} is wrong at {where}: {first['msg']}") from error


def size_problem(path: Path, size: int) -> str:
    """What is wrong with a file that should have `size` bytes; empty when nothing is."""
    try:
        found = path.stat()
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"is unreadable: {error}"
    if not stat.S_ISREG(found.st_mode):
        return "is not a plain file"
    return "" if found.st_size == size else f"has {found.st_size} bytes instead of {size}"


def corrupt(folder: Path, problem: str) -> ArtifactCorruptError:
    """The error for a damaged artifact; it is never rebuilt without being told to."""
    return ArtifactCorruptError(
        f"artifact {folder} is damaged: {problem}",
        f"see all of the damage with `dbllm verify {folder}`; make it anew by running the command "
        "that made it with --force",
    )


def _parse(folder: Path) -> dict[str, Any]:
    try:
        data = read_bytes(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactMissingError(
            f"{folder} is not an artifact: it has no {MANIFEST}",
            "list the artifacts with `dbllm ls`",
        ) from error
    except (OSError, ValueError) as error:
        raise corrupt(folder, f"its {MANIFEST} can't be read: {error}") from error
    try:
        manifest = parse_json(data)
    except ValueError as error:
        raise corrupt(folder, f"its {MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise corrupt(folder, f"its {MANIFEST} is not a JSON object")
    return manifest


def _is_behind_link(folder: Path, name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(folder.joinpath(*parts[: end + 1]).is_symlink() for end in range(len(parts)))


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()

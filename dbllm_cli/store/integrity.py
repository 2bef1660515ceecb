"""Whether artifacts are what their manifests say, file by file."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from dbllm_cli.progress import Progress, SilentProgress
from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.digest import DigestCache, digest_of
from dbllm_cli.store.json_file import parse_json, read_bytes
from dbllm_cli.store.manifest import MANIFEST, artifact_files, corrupt, size_problem

# Hashing less than this takes no time that a person would wonder about.
_SHOWN_FROM_BYTES = 2**29
_MIB = 2**20


def find_problems(artifact: Artifact, sha256: Callable[[Path], str]) -> Iterator[str]:
    """What is wrong with an artifact, a line each.

    Args:
        artifact: with a manifest.
        sha256: gives the hex digest of a file.
    """
    record = artifact.record
    for name, file in record.files.items():
        path = artifact.path / name
        problem = size_problem(path, file.size) or _hash_problem(path, file.sha256, sha256)
        if problem:
            yield f"{name} {problem}"
    for path in artifact_files(artifact.path):
        inner = path.relative_to(artifact.path)
        # Nothing reads what is hidden: desktops and git leave such files.
        if inner.as_posix() not in record.files and not any(p[0] == "." for p in inner.parts):
            yield f"{inner.as_posix()} is not part of the artifact"
    told = record.provenance_digest
    if told is not None and digest_of(artifact.manifest["provenance"]) != told:
        yield f"{MANIFEST}: its provenance was changed after it was written"


def _hash_problem(path: Path, wanted: str, sha256: Callable[[Path], str]) -> str:
    try:
        same = sha256(path) == wanted
    except OSError as error:
        return f"is unreadable: {error.strerror or error}"
    return "" if same else "has the right size but other bytes (sha256 differs)"


def require_whole(artifacts: Collection[Artifact], cache: DigestCache, progress: Progress) -> None:
    """Check artifacts before they are read; files that have not changed are hashed once.

    Models from outside have no manifest: their digest was made from their bytes.

    Args:
        artifacts: what will be read.
        cache: of digests.
        progress: shows a bar where much is hashed.

    Raises:
        ArtifactCorruptError: one is damaged.
    """
    ours = list({each.path: each for each in artifacts if "files" in each.manifest}.values())
    sizes = [
        file.size
        for each in ours
        for name, file in each.record.files.items()
        if not cache.remembers(each.path / name)
    ]
    shown = progress if sum(sizes) >= _SHOWN_FROM_BYTES else SilentProgress()
    with shown.task("check inputs", sum(sizes) // _MIB, unit="MiB") as task:

        def sha256(path: Path) -> str:
            known = cache.remembers(path)
            digest = cache.sha256(path)
            if not known:
                task.advance(path.stat().st_size // _MIB)
            return digest

        for each in ours:
            for problem in find_problems(each, sha256):
                raise corrupt(each.path, problem)


def read_object(artifact: Artifact, name: str) -> dict[str, Any]:
    """The content of a JSON file of an artifact that holds an object, after a look at its hash.

    Raises:
        ArtifactCorruptError: it is not what the manifest says, or no object.
    """
    file = artifact.record.files.get(name)
    if file is None:
        raise corrupt(artifact.path, f"it has no {name}")
    try:
        data = read_bytes(artifact.path / name)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ValueError("it has other bytes than were written (sha256 differs)")
        value = parse_json(data)
    except (OSError, ValueError) as error:
        raise corrupt(artifact.path, f"its {name} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise corrupt(artifact.path, f"its {name} is not a JSON object")
    return value

"""What a killed run left in its scratch, read again."""

from pathlib import Path
from typing import Any

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.store.json_file import read_json_object


def read_scratch(path: Path) -> dict[str, Any]:
    """The content of a JSON file in a scratch folder.

    Raises:
        ArtifactCorruptError: it is damaged.
    """
    return read_json_object(path, _way_out(path))


def damaged_scratch(path: Path, problem: str) -> ArtifactCorruptError:
    """The error for a file of a scratch folder that a run can't go on from."""
    return ArtifactCorruptError(f"{path} is damaged: {problem}", _way_out(path))


def _way_out(path: Path) -> str:
    return f"remove the folder {path.parent}; the step then begins anew"

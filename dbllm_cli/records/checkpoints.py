"""What a stage leaves in its scratch so that a killed run goes on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dbllm_cli.store.disk import rename_durably
from dbllm_cli.store.scratch import read_scratch
from dbllm_cli.tensors import TensorFolder, save_tensors


def keep_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file to the scratch, whole or not at all."""
    save_tensors(tensors, path.with_suffix(".part"))
    rename_durably(path.with_suffix(".part"), path)


def save_checkpoint(
    scratch: Path, name: str, number: int, tensors: dict[str, Tensor], state: dict[str, object]
) -> None:
    """Write checkpoint `<name>-<number>`, whole or not at all, and drop the older ones."""
    write_checkpoint(scratch, name, number, tensors, state)
    drop_checkpoints(scratch, name, number)


def write_checkpoint(
    scratch: Path, name: str, number: int, tensors: dict[str, Tensor], state: dict[str, object]
) -> None:
    """Write checkpoint `<name>-<number>`, whole or not at all; the older ones stay."""
    folder = scratch / f"{name}-{number}"
    # One name for all numbers: what a kill left half-written is gone with the next checkpoint.
    staging = scratch / f".{name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    save_tensors(tensors, staging / "model.safetensors")
    (staging / "state.json").write_text(json.dumps(state))
    shutil.rmtree(folder, ignore_errors=True)
    rename_durably(staging, folder)


def drop_checkpoints(scratch: Path, name: str, kept: int) -> None:
    """Remove the checkpoints of this name but for number `kept`."""
    for other in checkpoint_numbers(scratch, name):
        if other != kept:
            shutil.rmtree(scratch / f"{name}-{other}", ignore_errors=True)


def last_checkpoint(scratch: Path, name: str) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """The newest checkpoint's tensors and state."""
    numbers = checkpoint_numbers(scratch, name)
    return read_checkpoint(scratch, name, max(numbers)) if numbers else None


def read_checkpoint(
    scratch: Path, name: str, number: int
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the state of checkpoint `<name>-<number>`."""
    folder = scratch / f"{name}-{number}"
    return dict(TensorFolder(folder).items()), read_scratch(folder / "state.json")


def checkpoint_numbers(scratch: Path, name: str) -> list[int]:
    """The numbers of the checkpoints of this name, in order."""
    endings = (path.name.removeprefix(f"{name}-") for path in scratch.glob(f"{name}-*"))
    return sorted(int(ending) for ending in endings if ending.isdigit())

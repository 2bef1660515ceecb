"""What a stage leaves in its scratch so that a killed run goes on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.kernels import kernel_name
from dbllm_cli.llm.models import require_device
from dbllm_cli.llm.tensors import TensorFolder, save_tensors
from dbllm_cli.stages.compute_dtype import faster_dtype
from dbllm_cli.stages.machine import ENVIRONMENT, processor
from dbllm_cli.stages.spec import Context
from dbllm_cli.store.disk import put


def begin_or_resume(ctx: Context, compute_dtype: str) -> torch.dtype:
    """Record where a run is begun, and say so when it goes on elsewhere: its bytes may differ.

    Args:
        ctx: of the stage.
        compute_dtype: as the settings have it.

    Returns:
        The dtype of the products: a run that goes on keeps the one that it was begun with.

    Raises:
        ConfigError: the device is not there.
    """
    require_device(ctx.device)
    here = {
        "device": ctx.device,
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernel": kernel_name(),
    }
    path = ctx.scratch / ENVIRONMENT
    # Alone in the scratch the record is of a run that did nothing.
    if path.is_file() and any(each != path for each in ctx.scratch.iterdir()):
        begun = json.loads(path.read_text())
        changed = [
            f"{name} {begun.get(name)} -> {here[name]}"
            for name in here
            if begun.get(name, here[name]) != here[name]
        ]
        if changed:
            ctx.progress.note(f"resuming under another {', '.join(changed)}: the result is inexact")
        # An older dbllm did not tell it, and knew no auto.
        return _dtype(begun.get("compute_dtype", compute_dtype))
    if compute_dtype == "auto":
        compute_dtype = str(faster_dtype(ctx.device)).removeprefix("torch.")
        if compute_dtype == "float32":
            ctx.progress.note(f"products in float32: {ctx.device} is slower in bfloat16")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(here | {"compute_dtype": compute_dtype}))
    put(part, path)
    return _dtype(compute_dtype)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def keep_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file to the scratch, whole or not at all."""
    save_tensors(tensors, path.with_suffix(".part"))
    put(path.with_suffix(".part"), path)


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
    put(staging, folder)


def drop_checkpoints(scratch: Path, name: str, kept: int) -> None:
    """Remove the checkpoints of this name but for number `kept`."""
    for other in _checkpoints(scratch, name):
        if other != kept:
            shutil.rmtree(scratch / f"{name}-{other}", ignore_errors=True)


def last_checkpoint(scratch: Path, name: str) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """The newest checkpoint's tensors and state."""
    numbers = _checkpoints(scratch, name)
    return read_checkpoint(scratch, name, max(numbers)) if numbers else None


def read_checkpoint(
    scratch: Path, name: str, number: int
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the state of checkpoint `<name>-<number>`."""
    folder = scratch / f"{name}-{number}"
    state: dict[str, object] = json.loads((folder / "state.json").read_text())
    return dict(TensorFolder(folder).items()), state


def _checkpoints(scratch: Path, name: str) -> list[int]:
    endings = (path.name.removeprefix(f"{name}-") for path in scratch.glob(f"{name}-*"))
    return sorted(int(ending) for ending in endings if ending.isdigit())

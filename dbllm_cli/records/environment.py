"""Where a run of a stage is begun, kept in its scratch, and told where it goes on elsewhere."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dbllm_cli.kernels import kernel_name
from dbllm_cli.llm.models import require_device
from dbllm_cli.machine.compute_dtype import faster_dtype
from dbllm_cli.machine.environment import ENVIRONMENT, Environment
from dbllm_cli.machine.processor import processor
from dbllm_cli.progress import Progress
from dbllm_cli.store.disk import rename_durably
from dbllm_cli.store.scratch import damaged_scratch, read_scratch

_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def environment_here(device: str, compute_dtype: str) -> Environment:
    """What a run computes in that starts now.

    Args:
        device: torch device.
        compute_dtype: of the products.

    Raises:
        ConfigError: the device is not there.
    """
    require_device(device)
    return Environment(
        device=device,
        processor=processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernel=kernel_name(device),
        compute_dtype=compute_dtype,
    )


def begin_or_resume(
    scratch: Path, device: str, compute_dtype: str, progress: Progress
) -> Environment:
    """Record where a run is begun, and say so when it goes on elsewhere: its bytes may differ.

    Args:
        scratch: of the stage.
        device: torch device.
        compute_dtype: as the settings have it, `auto` too.
        progress: told of a change.

    Returns:
        What it computes in now; its dtype is the one that it was begun with.

    Raises:
        ConfigError: the device is not there.
        ArtifactCorruptError: the record in the scratch is damaged.
    """
    here = environment_here(device, compute_dtype)
    path = scratch / ENVIRONMENT
    # Alone in the scratch the record is of a run that did nothing.
    if path.is_file() and any(each != path for each in scratch.iterdir()):
        begun = read_scratch(path)
        if begun.get("compute_dtype") not in _COMPUTE_DTYPES:
            raise damaged_scratch(path, "it names no compute dtype")
        here = replace(here, compute_dtype=begun["compute_dtype"])
        changed = [
            f"{name} {begun.get(name)} -> {value}"
            for name, value in asdict(here).items()
            if begun.get(name) != value
        ]
        if changed:
            progress.note(f"resuming under another {', '.join(changed)}: the result is inexact")
        return here
    if compute_dtype == "auto":
        here = replace(here, compute_dtype=faster_dtype(device))
        other = "bfloat16" if here.compute_dtype == "float32" else "float32"
        progress.note(f"products in {here.compute_dtype}: {device} is slower in {other}")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(here)))
    rename_durably(part, path)
    return here

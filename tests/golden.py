"""Golden digests: what a tiny pipeline writes, recorded so that no byte changes unsaid.

    python -m tests.golden                take them anew, into tests/golden.json
    python -m tests.golden --defaults     the defaults alone, on any machine

Rounding differs from one processor to another: the digests count on the type where they were
taken alone. The defaults beside each stage's version count everywhere.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dbllm_cli.pipeline.stage import run_stage
from dbllm_cli.progress import SilentProgress
from dbllm_cli.records.environment import environment_here
from dbllm_cli.registry import declared, registered
from dbllm_cli.stages.spec import STAGES
from dbllm_cli.store import Artifact, Store, resolve_model
from dbllm_cli.store.digest import file_sha256
from tests.tiny_models import save_model

RECORD = Path(__file__).with_name("golden.json")
RETAKE = "python -m tests.golden"
_TEXT = {"num_samples": 6, "held_out": 2, "sequence_length": 24, "batch_size": 4}
_TRAINING = {"batch_size": 2, "warmup_steps": 1}
_STEPS = {**_TRAINING, "steps": 3, "eval_every": 2}


def machine() -> dict[str, Any]:
    """What the bytes may depend on, beside the code."""
    here = asdict(environment_here("cpu", "float32"))
    del here["compute_dtype"]
    return {**here, "threads": 1, "transformers": version("transformers")}


def defaults() -> dict[str, Any]:
    """Every stage's version, and the defaults that its keys leave out."""
    return {
        name: {"version": spec.version, "settings": spec.config().model_dump(mode="json")}
        for name, spec in STAGES.items()
    }


def digests(folder: Path) -> dict[str, Any]:
    """The sha256 of the tensors that each step of the tiny pipeline writes, by step.

    Args:
        folder: where model and store go.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return dict(_digests(folder))
    finally:
        torch.set_num_threads(threads)


def _digests(folder: Path) -> Iterator[tuple[str, Any]]:
    store = Store(folder / "store")
    model = resolve_model(str(save_model(folder / "model")), None, store)
    made = {"model": model}
    for name, stage, inputs, settings in _steps():
        artifact = _run(store, stage, {slot: made[step] for slot, step in inputs.items()}, settings)
        made[name] = artifact
        files = sorted(artifact.path.glob("*.safetensors"))
        yield (
            name,
            {
                "stage": stage,
                "version": STAGES[stage].version,
                "files": {file.name: file_sha256(file) for file in files},
            },
        )


def _steps() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """Name, stage, inputs and settings of every step."""
    read = {"model": "model", "calibration": "calibrate"}
    yield "calibrate", "calibrate", {"model": "model"}, _TEXT
    for levels, methods in declared("fdb/schemes", "METHODS").items():
        for method in methods:
            yield f"{levels}-{method}", "init-fdb", read, {"levels": levels, "method": method}
        start, rebuilt = {"student": f"{levels}-als", **read}, f"{levels}-reconstruct"
        yield rebuilt, "reconstruct", start, _TRAINING
        student = {"student": rebuilt, **read}
        yield f"{levels}-scales", "distill", student, _STEPS
        weights = {**_STEPS, "train": "weights", "loss": "dad", "keep_latents": True}
        yield f"{levels}-weights", "distill", student, weights
        for name in registered("formats"):
            yield f"{levels}-{name}", "pack", {"fdb": f"{levels}-scales"}, {"format": name}
    yield "int8", "pack", {"fdb": "offset-scales"}, {"embeddings": "int8"}


def _run(
    store: Store, stage: str, inputs: Mapping[str, Artifact], settings: dict[str, Any]
) -> Artifact:
    spec = STAGES[stage]
    if "compute_dtype" in spec.config.model_fields and settings.get("method", "gptq") == "gptq":
        settings = {**settings, "compute_dtype": "float32"}
    config = spec.config(**settings)
    return run_stage(spec, config, inputs, store, progress=SilentProgress()).artifact


def main() -> None:
    """Take the digests, or the defaults alone, anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--defaults", action="store_true", help="leave the digests as they are")
    if parser.parse_args().defaults:
        taken = json.loads(RECORD.read_text(encoding="utf-8")) | {"defaults": defaults()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            taken = {"machine": machine(), "defaults": defaults(), "steps": digests(Path(folder))}
    RECORD.write_text(json.dumps(taken, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

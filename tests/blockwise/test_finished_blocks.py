"""What a walk over the blocks writes, and that it goes on from it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from dbllm_cli.records import checkpoints
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import TensorFolder
from tests.conftest import Workshop
from tests.stages.conftest import KilledAndResumed, killed_and_resumed
from tests.tiny_models import FAMILIES, build_model, save_model, save_tokenizer

__all__ = ["killed_and_resumed"]
BLOCKS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "init-fdb": {"method": "gptq", "batch_size": 3},
    "reconstruct": {"batch_size": 3, "passes": 1, "warmup_steps": 1},
}


@pytest.fixture(scope="module")
def inputs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A model of six blocks, its calibration and its start."""
    folder = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(**(FAMILIES["llama"]().to_dict() | {"num_hidden_layers": BLOCKS}))
    build_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    model = workshop.model(folder)
    given = {"model": model, "calibration": workshop.calibrate(model)}
    return given | {"student": workshop.make("init-fdb", given)}


def inputs_of(stage: str, inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    return {slot: item for slot, item in inputs.items() if stage != "init-fdb" or slot != "student"}


@pytest.mark.parametrize("stage", list(SETTINGS))
@pytest.mark.parametrize("kept", ["streams-4", "report-5"])
def test_killed_at_any_block_it_ends_with_the_same_bytes(
    workshop: Workshop,
    killed_and_resumed: KilledAndResumed,
    inputs: dict[str, Artifact],
    stage: str,
    kept: str,
) -> None:
    given, settings = inputs_of(stage, inputs), SETTINGS[stage]
    resumed = killed_and_resumed(stage, given, f".scratch/*/{kept}/state.json", **settings)
    assert resumed.digest == workshop.make(stage, given, **settings).digest


def test_a_block_that_runs_again_has_the_biases_and_norms_of_the_student(
    workshop: Workshop, killed_and_resumed: KilledAndResumed, tmp_path: Path
) -> None:
    model = workshop.model(save_model(tmp_path / "qwen2", "qwen2"))
    given = {"model": model, "calibration": workshop.calibrate(model)}
    given["student"] = workshop.make("init-fdb", given)
    fast = {"steps": 6, "warmup_steps": 0, "unquantized_lr": 0.1, "eval_every": 6}
    given["student"] = workshop.make("distill", given, **fast)
    settings = SETTINGS["reconstruct"]
    resumed = killed_and_resumed("reconstruct", given, ".scratch/*/report-1/state.json", **settings)
    assert resumed.digest == workshop.make("reconstruct", given, **settings).digest


@pytest.mark.parametrize("stage", list(SETTINGS))
def test_the_hidden_states_are_written_after_every_fourth_block_only(
    fresh: Workshop, inputs: dict[str, Artifact], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[torch.Size] = []

    def record(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.extend(t.shape for name, t in tensors.items() if name in ("teacher", "student"))
        save(tensors, path)

    save = checkpoints.save_tensors
    monkeypatch.setattr(checkpoints, "save_tensors", record)
    fresh.make(stage, inputs_of(stage, inputs), **SETTINGS[stage])
    assert written == [torch.Size([6, 24, 64])] * 2


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("init-fdb", {}),
        ("reconstruct", {"window": 1, "sensitivity_power": 0, "position_power": 0}),
        ("reconstruct", {"window": 2, "sensitivity_power": 0, "position_power": 0}),
    ],
)
def test_a_block_of_the_teacher_is_read_once_by_the_walk_and_its_layers_by_the_report(
    fresh: Workshop,
    inputs: dict[str, Artifact],
    stage: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: Counter[str] = Counter()
    get = TensorFolder.get

    def record(self: TensorFolder, name: str) -> torch.Tensor:
        if self.folder == inputs["model"].path and ".layers." in name:
            reads[name] += 1
        return get(self, name)

    monkeypatch.setattr(TensorFolder, "get", record)
    outcome = fresh.run(stage, inputs_of(stage, inputs), **SETTINGS[stage], **settings)
    layers = json.loads((outcome.artifact.path / "layers.json").read_text())
    assert len(layers) == 7 * BLOCKS
    assert {name for name, count in reads.items() if count == 2} >= {f"{n}.weight" for n in layers}
    # init-fdb copies the norms.
    assert max(reads.values()) == 2

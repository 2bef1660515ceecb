"""Training that ends in numbers that are none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbllm_cli.errors import DbllmError, StageFailedError
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.test_distill import SETTINGS, tensors_of


def test_a_loss_that_is_no_number_ends_the_stage(
    fresh: Workshop, training: dict[str, Artifact]
) -> None:
    with pytest.raises(StageFailedError, match=r"the loss is .* at step") as caught:
        fresh.make("distill", training, **SETTINGS, beyond={"scale_lr": 1e30})
    assert "--scale-lr" in caught.value.hint
    assert fresh.store.artifacts() == []


def test_a_last_measurement_that_is_no_number_ends_the_stage_or_keeps_the_best(
    fresh: Workshop, training: dict[str, Artifact], start: Artifact
) -> None:
    settings = SETTINGS | {"beyond": {"scale_lr": 1e30}, "steps": 1}
    try:
        kept = fresh.make("distill", training, **settings)
    except StageFailedError:
        return
    assert torch.equal(
        tensors_of(kept)["model.layers.0.mlp.up_proj.alpha"],
        tensors_of(start)["model.layers.0.mlp.up_proj.alpha"],
    )


def test_scales_that_float16_can_not_hold_end_the_stage(
    fresh: Workshop, workshop: Workshop, training: dict[str, Artifact], llama: Artifact
) -> None:
    nothing_held_out = workshop.calibrate(llama, held_out=0)
    inputs = training | {"calibration": nothing_held_out}
    with pytest.raises(StageFailedError, match="not finite in float16"):
        fresh.make(
            "distill", inputs, batch_size=2, steps=1, warmup_steps=0, beyond={"scale_lr": 1e8}
        )


def test_a_teacher_that_gives_no_numbers_ends_the_stage(
    fresh: Workshop, training: dict[str, Artifact], llama: Artifact, tmp_path: Path
) -> None:
    for path in llama.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(llama.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken = Artifact(tmp_path, "model", llama.digest, {})
    with pytest.raises(DbllmError) as caught:
        fresh.make("distill", training | {"model": broken}, **SETTINGS)
    assert caught.value.exit_code in (5, 6)
    assert "please report" not in caught.value.hint

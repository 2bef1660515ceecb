"""init-fdb by error-compensated rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.models import load_model
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.conftest import KilledAndResumed
from tests.stages.test_init_fdb import LAYERS, quantized
from tests.stages.test_reconstruct import block_errors
from tests.tiny_models import save_model

GPTQ: dict[str, Any] = {"method": "gptq", "batch_size": 3}


@pytest.fixture
def inputs(llama: Artifact, calibration: Artifact) -> dict[str, Artifact]:
    return {"model": llama, "calibration": calibration}


@pytest.fixture
def compensated(workshop: Workshop, inputs: dict[str, Artifact]) -> Artifact:
    return workshop.make("init-fdb", inputs, **GPTQ)


def test_every_blocks_output_is_nearer_to_the_teachers_than_after_als(
    compensated: Artifact, start: Artifact, llama_folder: Path, calibration: Artifact
) -> None:
    assert quantized(compensated) == LAYERS
    ids = load_file(calibration.path / "tokens.safetensors")["train"].long()
    errors = block_errors(compensated, llama_folder, ids)
    plain = block_errors(start, llama_folder, ids)
    assert all(own < 0.9 * other for own, other in zip(errors, plain, strict=True))


def test_reconstruct_goes_on_from_the_compensated_weights(
    workshop: Workshop, inputs: dict[str, Artifact], compensated: Artifact
) -> None:
    without = workshop.make("init-fdb", inputs, **GPTQ, keep_latents=False)
    assert not list(without.path.glob("latents*"))
    latents = load_file(compensated.path / "latents.safetensors")
    assert latents.keys() == set(LAYERS)
    errors = [
        workshop.run("reconstruct", {**inputs, "student": student}, batch_size=3).metrics
        for student in (compensated, without)
    ]
    assert errors[0]["mean_error"] < errors[1]["mean_error"]


def test_the_errors_of_the_blocks_are_those_of_the_stored_model(
    workshop: Workshop, inputs: dict[str, Artifact], llama_folder: Path, calibration: Artifact
) -> None:
    outcome = workshop.run("init-fdb", inputs, **GPTQ)
    ids = load_file(calibration.path / "tokens.safetensors")["train"].long()
    told = [block["error"] for block in outcome.metrics["blocks"]]
    assert told == pytest.approx(block_errors(outcome.artifact, llama_folder, ids), rel=0.02)


def test_bfloat16_comes_close_to_float32(workshop: Workshop, inputs: dict[str, Artifact]) -> None:
    errors = [
        workshop.run("init-fdb", inputs, **GPTQ, compute_dtype=dtype).metrics["blocks"][-1]["error"]
        for dtype in ("float32", "bfloat16")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_layers_that_are_left_out_stay_as_they_are(
    workshop: Workshop, inputs: dict[str, Artifact], llama_folder: Path
) -> None:
    chosen = workshop.make("init-fdb", inputs, **GPTQ, exclude=("*.down_proj", "*.layers.0.*"))
    expected = {n for n in LAYERS if ".layers.1." in n and not n.endswith("down_proj")}
    assert quantized(chosen) == expected
    stored = load_file(chosen.path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    original = load_file(llama_folder / "model.safetensors")[name]
    assert torch.equal(stored[name], original.bfloat16())


def test_layers_that_share_an_input_see_the_quantized_ones_before_them(
    workshop: Workshop, inputs: dict[str, Artifact], compensated: Artifact
) -> None:
    alone = workshop.make("init-fdb", inputs, **GPTQ, include=("*.layers.1.mlp.down_proj",))
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = [load_file(a.path / "model.safetensors")[name] for a in (alone, compensated)]
    assert not torch.equal(*tensors)


def test_killed_after_its_first_block_it_ends_with_the_same_bytes(
    killed_and_resumed: KilledAndResumed, inputs: dict[str, Artifact], compensated: Artifact
) -> None:
    resumed = killed_and_resumed("init-fdb", inputs, ".scratch/*/report-1/state.json", **GPTQ)
    assert resumed.digest == compensated.digest


def test_it_needs_a_calibration(workshop: Workshop, llama: Artifact) -> None:
    with pytest.raises(ConfigError, match="gptq needs a calibration"):
        workshop.make("init-fdb", {"model": llama}, **GPTQ)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
def test_layers_with_biases_and_of_other_kinds_gain_too(
    family: str, fresh: Workshop, tmp_path: Path
) -> None:
    model = fresh.model(save_model(tmp_path / family, family))
    calibration = fresh.calibrate(model, num_samples=12)
    inputs = {"model": model, "calibration": calibration}
    ids = load_file(calibration.path / "tokens.safetensors")["train"].long()
    errors = []
    teacher = load_model(model.path, torch.float32)
    for settings in (GPTQ, {"method": "als"}):
        student = load_model(fresh.make("init-fdb", inputs, **settings).path, torch.float32)
        with torch.no_grad():
            errors.append(float((student(ids).logits - teacher(ids).logits).norm()))
    assert errors[0] < 0.9 * errors[1]

"""The training stages on a GPU, beside the same on the CPU; skipped where there is none."""

from typing import Any

import pytest
import torch

from dbllm_cli.pipeline.stage import run_stage
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.spec import STAGES
from dbllm_cli.store import Artifact
from tests.conftest import Workshop

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(
    workshop: Workshop, stage: str, inputs: dict[str, Artifact], **settings: Any
) -> dict[str, Any]:
    spec, exact = STAGES[stage], {"compute_dtype": "float32"}
    config = spec.config(**exact | settings)
    progress = SilentProgress()
    return run_stage(spec, config, inputs, workshop.store, progress=progress, device=GPU).metrics


@pytest.mark.parametrize(
    ("stage", "settings", "figure"),
    [
        ("init-fdb", {}, "relative_error"),
        ("init-fdb", {"method": "gptq", "batch_size": 3}, "relative_error"),
        ("reconstruct", {"batch_size": 3, "passes": 4}, "mean_error"),
        ("distill", {"batch_size": 2, "steps": 6, "scale_lr": 1e-2}, "held_out_loss"),
        ("distill", {"batch_size": 2, "steps": 6, "train": "weights"}, "held_out_loss"),
    ],
)
def test_a_stage_gives_nearly_what_it_gives_on_the_cpu(
    workshop: Workshop,
    fresh: Workshop,
    training: dict[str, Artifact],
    stage: str,
    settings: dict[str, Any],
    figure: str,
) -> None:
    slots = [slot.name for slot in STAGES[stage].inputs]
    inputs = {slot: artifact for slot, artifact in training.items() if slot in slots}
    expected = workshop.run(stage, inputs, **settings).metrics[figure]
    assert on_gpu(fresh, stage, inputs, **settings)[figure] == pytest.approx(expected, rel=0.05)


def test_calibrate_writes_text_on_a_gpu(fresh: Workshop, llama: Artifact) -> None:
    metrics = on_gpu(fresh, "calibrate", {"model": llama}, num_samples=4, sequence_length=24)
    assert metrics["tokens"] == 4 * 24

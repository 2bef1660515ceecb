from pathlib import Path
from typing import Any

import pytest
import torch

from dbllm_cli.blockwise import output_metric
from dbllm_cli.blockwise.block_error import Sensitivity
from dbllm_cli.blockwise.sensitivity import output_sensitivities
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.errors import StageFailedError
from dbllm_cli.llm.models import load_model
from dbllm_cli.progress import SilentProgress
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.block_outputs import hidden_after
from tests.stages.conftest import KilledAndResumed

SETTINGS: dict[str, Any] = {"batch_size": 3, "passes": 12, "warmup_steps": 1}
FREELY: dict[str, Any] = SETTINGS | {"latent_decay": 0.0, "window": 1, "teacher_inputs": 0.0}


def sensitivity(folder: Path, ids: torch.Tensor) -> Sensitivity:
    """Of the second block's output."""
    with SilentProgress().task("sensitivity", 1) as task:
        return dict(output_sensitivities(StreamedModel(folder, "cpu"), ids, 3, 0, task))[1]


def relative_errors(fdb: Artifact, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the second block's output, over the norms of the teacher's, `[n, tokens, hidden]`."""
    exact, found = (hidden_after(load_model(p, torch.float32), ids, 1) for p in (folder, fdb.path))
    return (found - exact) / exact.norm(dim=-1, keepdim=True)


def test_errors_in_directions_that_the_predictions_feel_become_smaller(
    workshop: Workshop, training: dict[str, Artifact], llama_folder: Path, ids: torch.Tensor
) -> None:
    felt = sensitivity(llama_folder, ids)
    plain, weighed = [], []
    for power in (0.0, 1.0):
        powers = {"sensitivity_power": power, "position_power": 0.0}
        fdb = workshop.make("reconstruct", training, **FREELY, **powers)
        error = relative_errors(fdb, llama_folder, ids)
        plain.append(float(error.square().sum()))
        weighed.append(float(((error @ felt.directions) * error).sum()))
    assert weighed[1] < 0.97 * weighed[0]
    assert plain[1] > plain[0]


def test_errors_at_positions_that_the_predictions_feel_become_smaller(
    fresh: Workshop,
    training: dict[str, Artifact],
    llama_folder: Path,
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A model with random weights feels all positions alike; in a trained one the first is so far.
    positions = torch.ones(ids.shape[1])
    positions[0] = 1e4
    alike = Sensitivity(
        torch.eye(load_model(llama_folder, torch.float32).config.hidden_size), positions
    )
    monkeypatch.setattr(output_metric, "output_sensitivities", lambda *_: [(1, alike), (0, alike)])
    first, others = [], []
    for power in (0.0, 0.5):
        fdb = fresh.make("reconstruct", training, **FREELY, position_power=power)
        errors = relative_errors(fdb, llama_folder, ids).square().sum(-1).mean(0)
        first.append(float(errors[0]))
        others.append(float(errors[1:].mean()))
    assert first[1] < 0.7 * first[0]
    assert others[1] > others[0]


def test_killed_among_the_metrics_it_ends_with_the_same_bytes(
    killed_and_resumed: KilledAndResumed, workshop: Workshop, training: dict[str, Artifact]
) -> None:
    resumed = killed_and_resumed(
        "reconstruct", training, ".scratch/*/metric-1.safetensors", **SETTINGS
    )
    assert resumed.digest == workshop.make("reconstruct", training, **SETTINGS).digest


def test_gradients_of_the_teacher_that_are_no_numbers_end_the_stage(
    fresh: Workshop, training: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = [(1, Sensitivity(torch.full((2, 2), torch.nan), torch.full((3,), torch.nan)))]
    monkeypatch.setattr(output_metric, "output_sensitivities", lambda *_: nothing)
    with pytest.raises(StageFailedError, match="gradients at block 1") as caught:
        fresh.make("reconstruct", training, **SETTINGS)
    assert "--sensitivity-power 0 --position-power 0" in caught.value.hint

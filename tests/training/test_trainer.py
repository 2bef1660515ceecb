from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.levels import sorted_levels
from dbllm_cli.fdb.quantized import latent_start, quantize_matrix
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.store import Artifact
from dbllm_cli.training.student import latent_layer
from dbllm_cli.training.trainer import Trainer
from tests.conftest import Workshop


@pytest.mark.parametrize(("steps", "late"), [(12, 3), (6, 1)])
def test_scales_train_through_their_rounding_in_the_last_quarter_of_the_steps(
    fresh: Workshop,
    training: dict[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    late: int,
) -> None:
    step, rounded = Trainer._step, []

    def watched(self: Trainer, number: int, task: Any) -> dict[str, float]:
        entry = step(self, number, task)
        (state,) = {layer.rounds_scales for layer in self.layers.values()}
        rounded.append(state)
        return entry

    monkeypatch.setattr(Trainer, "_step", watched)
    fresh.make("distill", training, steps=steps, batch_size=2)
    assert rounded == [False] * (steps - late) + [True] * late


def test_latent_weights_in_fixed_cells_start_a_fifth_of_a_cell_away_from_its_borders() -> None:
    matrix = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    quantized = quantize_matrix(matrix, fit_scales(matrix, 64, "als"), 64)
    # As reconstruct leaves them: many close to a border.
    kept = cast(
        PackedFolder, SimpleNamespace(latent=lambda _, q, teacher: latent_start(q, teacher))
    )
    shares = []
    for fixed in (False, True):
        layer = latent_layer(kept, "layer", quantized, matrix, None, fixed_cells=fixed)
        grouped = layer.latent.detach().view(16, 4, 64)
        borders = sorted_levels(quantized.scales.float().unsqueeze(-1)).borders
        cells = [(borders[0], borders[1]), (borders[1], borders[2])]
        found = [
            torch.minimum(grouped - low, high - grouped)[(grouped > low) & (grouped < high)]
            / (high - low).expand_as(grouped)[(grouped > low) & (grouped < high)]
            for low, high in cells
        ]
        shares.append(float(torch.cat(found).min()))
    assert shares[0] < 0.01
    assert shares[1] == pytest.approx(0.2, abs=1e-3)


def test_the_folder_of_a_student_tells_the_dtype_of_what_is_not_quantized(start: Artifact) -> None:
    assert PackedFolder(Path(start.path)).dtype == torch.bfloat16

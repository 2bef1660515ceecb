"""How `reconstruct` weighs the errors of a block's output: by what they do to the predictions."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.blockwise.block_error import ErrorMetric, Sensitivity, error_metric
from dbllm_cli.blockwise.sensitivity import output_sensitivities
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.errors import StageFailedError
from dbllm_cli.progress import Progress
from dbllm_cli.records.checkpoints import keep_tensors
from dbllm_cli.tensors import TensorFolder

_TOKENS = 16_384
"""Enough for a matrix that only a root of is used; all blocks' outputs of them are in memory."""


@dataclass(frozen=True)
class OutputMetrics:
    """The metric of every block's output errors, kept in the scratch.

    Attributes:
        scratch: of the stage.
        direction_power: of the Fisher matrix; 0 weighs all directions alike.
        position_power: of the positions' traces; 0 weighs all positions alike.
    """

    scratch: Path
    direction_power: float
    position_power: float

    def make(
        self,
        model: StreamedModel,
        sequences: Tensor,
        batch_size: int,
        seed: int,
        progress: Progress,
    ) -> None:
        """Write the metric of every block, unless it is there; nothing without a power.

        Args:
            model: the teacher.
            sequences: int64 token ids `[n, tokens]`; the first ones are enough.
            batch_size: sequences at once.
            seed: of the labels that are drawn.
            progress: where the passes are reported.

        Raises:
            StageFailedError: the teacher's gradients are not finite.
        """
        # The last block's comes first: with the first block's all are there.
        if not self._weigh or self._file(0).is_file():
            return
        few = sequences[: math.ceil(_TOKENS / sequences.shape[1])]
        total = 2 * len(few) * len(model.blocks)
        with progress.task("sensitivity", total, unit="sequences") as task:
            for index, found in output_sensitivities(model, few, batch_size, seed, task):
                if not torch.isfinite(found.directions).all():
                    raise StageFailedError(
                        f"reconstruct: the teacher's gradients at block {index} are not finite",
                        "use --compute-dtype float32, or --sensitivity-power 0 --position-power 0",
                    )
                on_device = Sensitivity(
                    found.directions.to(model.device), found.positions.to(model.device)
                )
                metric = error_metric(on_device, self.direction_power, self.position_power)
                keep_tensors(vars(metric), self._file(index))

    def of_block(self, index: int, device: str) -> ErrorMetric | None:
        """The metric of a block's output errors on the device; None where all count alike."""
        if not self._weigh:
            return None
        kept = TensorFolder(self.scratch, self._file(index).stem)
        return ErrorMetric(*(kept.get(name).to(device) for name in ("directions", "positions")))

    @property
    def _weigh(self) -> bool:
        return self.direction_power > 0 or self.position_power > 0

    def _file(self, index: int) -> Path:
        return self.scratch / f"metric-{index}.safetensors"

"""How `reconstruct` weighs the errors of a block's output: by what they do to the predictions."""

import math
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.configs import ReconstructConfig
from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.block_error import ErrorMetric, Sensitivity, error_metric
from dbllm_cli.llm.sensitivity import output_sensitivities
from dbllm_cli.llm.streaming import StreamedModel
from dbllm_cli.llm.tensors import TensorFolder
from dbllm_cli.stages.resuming import keep_tensors
from dbllm_cli.stages.spec import Context

_TOKENS = 16_384
"""Enough for a matrix that only a root of is used; all blocks' outputs of them are in memory."""


def keep_metrics(
    config: ReconstructConfig, model: StreamedModel, sequences: Tensor, ctx: Context
) -> None:
    """Write the metric of every block's output errors to the scratch, unless it is there.

    Args:
        config: without a power nothing is done.
        model: the teacher.
        sequences: int64 token ids `[n, tokens]`; the first ones are enough.
        ctx: of the stage.

    Raises:
        StageFailedError: the teacher's gradients are not finite.
    """
    # The last block's comes first: with the first block's all are there.
    if not _weighs(config) or _file(ctx.scratch, 0).is_file():
        return
    few = sequences[: math.ceil(_TOKENS / sequences.shape[1])]
    with ctx.progress.task(
        "sensitivity", 2 * len(few) * len(model.blocks), unit="sequences"
    ) as task:
        for index, found in output_sensitivities(model, few, config.batch_size, config.seed, task):
            if not torch.isfinite(found.directions).all():
                raise StageFailedError(
                    f"reconstruct: the teacher's gradients at block {index} are not finite",
                    "use --compute-dtype float32, or --sensitivity-power 0 --position-power 0",
                )
            on_device = Sensitivity(found.directions.to(ctx.device), found.positions.to(ctx.device))
            metric = error_metric(on_device, config.sensitivity_power, config.position_power)
            keep_tensors(vars(metric), _file(ctx.scratch, index))


def output_metric(config: ReconstructConfig, index: int, ctx: Context) -> ErrorMetric | None:
    """The metric of a block's output errors on the device, or None."""
    if not _weighs(config):
        return None
    kept = TensorFolder(ctx.scratch, _file(ctx.scratch, index).stem)
    return ErrorMetric(*(kept.get(name).to(ctx.device) for name in ("directions", "positions")))


def _weighs(config: ReconstructConfig) -> bool:
    return config.sensitivity_power > 0 or config.position_power > 0


def _file(scratch: Path, index: int) -> Path:
    return scratch / f"metric-{index}.safetensors"

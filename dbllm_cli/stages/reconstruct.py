"""reconstruct: block by block, the quantized block's output made to match the teacher's."""

import math
from collections.abc import Mapping

from dbllm_cli.blockwise.reconstruction import BlockTraining, BlockTrainingOptions
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.configs import ReconstructConfig
from dbllm_cli.llm.models import model_folder
from dbllm_cli.llm.quantized_folder import PackedFolder, write_requantized
from dbllm_cli.records.calibration import open_calibration, require_same_model
from dbllm_cli.records.environment import begin_or_resume
from dbllm_cli.records.layers import over_all_layers, write_layer_report
from dbllm_cli.records.metrics import ReconstructMetrics
from dbllm_cli.stages.context import Context, Result, options_from
from dbllm_cli.stages.spec import RECONSTRUCT, implements
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import torch_dtype


@implements(RECONSTRUCT)
def run(
    config: ReconstructConfig, inputs: Mapping[str, Artifact], ctx: Context
) -> Result[ReconstructMetrics]:
    """Train the blocks in order and make the fdb artifact that results.

    Raises:
        ArtifactMissingError: student or calibration belong to another model.
        StageFailedError: a loss is not finite.
    """
    require_same_model(inputs)
    calibration = open_calibration(inputs["calibration"], config.num_samples)
    environment = begin_or_resume(ctx.scratch, ctx.device, config.compute_dtype, ctx.progress)
    dtype = torch_dtype(environment.compute_dtype)
    folder = model_folder(inputs["model"], ctx.work, ctx.trust_remote_code)
    teacher = StreamedModel(folder, ctx.device, ctx.trust_remote_code, dtype)
    student = PackedFolder(inputs["student"].path)
    options = options_from(config, BlockTrainingOptions)
    training = BlockTraining(options, student, teacher, ctx.scratch, ctx.progress)
    report = training.train_all(calibration.train)
    write_requantized(student, ctx.out, training.finished.layers())
    means = calibration.input_mean_squares
    layers = write_layer_report(ctx.out, folder, means, ctx.trust_remote_code)
    errors = [block["error_after"] for block in report]
    ctx.progress.table(
        "relative error of the block's output",
        ("block", "before", "after"),
        [
            (index, block["error_before"], block["error_after"])
            for index, block in enumerate(report)
        ],
    )
    mean_error = round(math.fsum(errors) / len(errors), 6)
    metrics: ReconstructMetrics = {
        **over_all_layers(layers),
        "blocks": report,
        "mean_error": mean_error,
    }
    return Result(metrics, environment)

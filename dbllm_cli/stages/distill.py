"""distill: end to end against the teacher's predictions, by KD, DAD or next-token loss."""

import json
from collections.abc import Mapping

import torch

from dbllm_cli.configs import DistillConfig
from dbllm_cli.llm.models import CURVE, load_model, model_folder
from dbllm_cli.llm.quantized_folder import PackedFolder, write_requantized
from dbllm_cli.records.calibration import open_calibration, require_same_model
from dbllm_cli.records.environment import begin_or_resume
from dbllm_cli.records.layers import over_all_layers, write_layer_report
from dbllm_cli.records.metrics import DistillMetrics
from dbllm_cli.stages.context import Context, Result, options_from
from dbllm_cli.stages.spec import DISTILL, implements
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import torch_dtype
from dbllm_cli.training.trainer import TeacherAndStudent, Trainer, TrainerOptions


@implements(DISTILL)
def run(
    config: DistillConfig, inputs: Mapping[str, Artifact], ctx: Context
) -> Result[DistillMetrics]:
    """Train the student and make the fdb artifact of its best measurement on the held-out part.

    Raises:
        ArtifactMissingError: student or calibration belong to another model.
        StageFailedError: the loss is not finite.
    """
    require_same_model(inputs)
    calibration = open_calibration(inputs["calibration"], config.num_samples)
    environment = begin_or_resume(ctx.scratch, ctx.device, config.compute_dtype, ctx.progress)
    folder = model_folder(inputs["model"], ctx.work, ctx.trust_remote_code)
    student = PackedFolder(inputs["student"].path)
    dtype = torch_dtype(environment.compute_dtype)
    models = TeacherAndStudent(
        load_model(folder, dtype, ctx.device, ctx.trust_remote_code),
        load_model(student.folder, torch.float32, ctx.device, ctx.trust_remote_code, trains=True),
    )
    options = options_from(config, TrainerOptions)
    trainer = Trainer(options, models, student, calibration, ctx.scratch, ctx.progress)
    metrics = trainer.train()
    trainer.restore_best()
    write_requantized(student, ctx.out, trainer.trained_layers(), trainer.others)
    lines = [json.dumps(entry, sort_keys=True, allow_nan=False) for entry in trainer.curve]
    (ctx.out / CURVE).write_text("\n".join(lines) + "\n")
    means = calibration.input_mean_squares
    report = write_layer_report(ctx.out, folder, means, ctx.trust_remote_code)
    return Result({**metrics, **over_all_layers(report)}, environment)

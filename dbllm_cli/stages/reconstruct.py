"""reconstruct: block by block, the quantized block's output made to match the teacher's."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dbllm_cli.configs import ReconstructConfig
from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.block_error import ErrorMetric, relative_token_error
from dbllm_cli.fdb.optimizer import RelativeAdamW, schedule_factor
from dbllm_cli.fdb.training import LatentLinear
from dbllm_cli.llm.blocks import layer_shape
from dbllm_cli.llm.models import model_folder
from dbllm_cli.llm.packed import PackedFolder, write_requantized
from dbllm_cli.llm.streaming import StreamedModel
from dbllm_cli.progress import Task
from dbllm_cli.stages.block_streams import (
    BlockReport,
    BlockStreams,
    begin_streams,
    entering_batch,
    finished_layers,
    keep_layers,
    keep_streams,
    mean_error,
)
from dbllm_cli.stages.layer_report import over_all_layers, write_layer_report
from dbllm_cli.stages.output_metric import keep_metrics, output_metric
from dbllm_cli.stages.resuming import begin_or_resume
from dbllm_cli.stages.sequences import open_calibration, require_same_model
from dbllm_cli.stages.spec import Context, Metrics
from dbllm_cli.stages.trained_layers import dense_layer, latent_layer, replace_module
from dbllm_cli.store import Artifact

_BATCHES_BEFORE = 4


class _Matched(NamedTuple):
    """A block whose output is matched: the one that trains, or the one after it, unquantized.

    Attributes:
        place: index of the block.
        block: the module.
        targets: its output in the teacher.
        metric: of the errors of its output, or None.
    """

    place: int
    block: nn.Module
    targets: Tensor
    metric: ErrorMetric | None


def run(config: ReconstructConfig, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
    """Train the blocks in order and make the fdb artifact that results.

    Raises:
        ArtifactMissingError: student or calibration belong to another model.
        StageFailedError: a loss is not finite.
    """
    require_same_model(inputs)
    dtype = begin_or_resume(ctx, config.compute_dtype)
    folder = model_folder(inputs["model"], ctx.work, ctx.trust_remote_code)
    teacher = StreamedModel(folder, ctx.device, ctx.trust_remote_code, dtype)
    training = _BlockTraining(config, PackedFolder(inputs["student"].path), teacher, ctx)
    calibration = open_calibration(inputs["calibration"])
    report = training.train_all(calibration.train[: config.num_samples])
    student = training.student
    finished = finished_layers(training.model, ctx.scratch, student.group_size, student.levels)
    write_requantized(student, ctx.out, finished)
    layers = over_all_layers(write_layer_report(folder, calibration.input_mean_squares, ctx))
    errors = [block["error_after"] for block in report]
    ctx.progress.table(
        "relative error of the block's output",
        ("block", "before", "after"),
        [
            (index, block["error_before"], block["error_after"])
            for index, block in enumerate(report)
        ],
    )
    return {**layers, "blocks": report, "mean_error": round(math.fsum(errors) / len(errors), 6)}


class _BlockTraining:
    """The walk over the blocks: two streams of hidden states, a window of blocks in memory."""

    def __init__(
        self, config: ReconstructConfig, student: PackedFolder, teacher: StreamedModel, ctx: Context
    ) -> None:
        self.config, self.student, self.model, self.ctx = config, student, teacher, ctx
        self.quantized_names = set(student.layer_names())

    def train_all(self, sequences: Tensor) -> BlockReport:
        """Train every block that is not yet finished; errors before and after of each block."""
        keep_metrics(self.config, self.model, sequences, self.ctx)
        streams, report = begin_streams(
            self.model,
            sequences,
            self.config.batch_size,
            self.ctx.scratch,
            self.student.tensors,
        )
        blocks = len(self.model.blocks)
        per_block = self.steps(len(sequences)) * self.config.batch_size + 2 * len(sequences)
        with self.ctx.progress.task(
            "reconstruct", blocks * per_block, len(report) * per_block, "sequences"
        ) as task:
            for index in range(len(report), blocks):
                report.append(self._train_block(index, streams, task))
                keep_streams(self.ctx.scratch, streams, report)
        return report

    def steps(self, samples: int) -> int:
        """Optimizer steps of one block."""
        return math.ceil(samples / self.config.batch_size) * self.config.passes

    def _train_block(self, index: int, streams: BlockStreams, task: Task) -> dict[str, float]:
        """Train one block; the streams move on to its outputs."""
        batch_size = self.config.batch_size
        teacher = self.model.load_block(index)
        targets = self._targets(index, teacher, streams, task)
        streams.ahead = None
        block, layers = self._student_block(index, teacher)
        self.model.drop_block(index)
        before = self._error_before(index, block, streams.student, targets)
        window = [self._matched(index, block, targets)]
        if layers:
            window += self._following(index, targets, streams)
            self._optimize(window, layers, streams, task)
        for following in window[1:]:
            self.model.drop_block(following.place)
        quantized = {name: layer.quantize() for name, layer in layers.items()}
        for name, layer in layers.items():
            dense = dense_layer(quantized[name], layer.bias, self.model.dtype)
            replace_module(block, name, dense)
        output = self.model.run_all(index, block, streams.student, batch_size, task.advance)
        after = mean_error(output, targets, batch_size)
        latents = {name: layer.latent for name, layer in layers.items()}
        kept = latents if self.config.keep_latents else None
        keep_layers(self.ctx.scratch, index, quantized, kept)
        streams.teacher, streams.student = targets, output
        return {"error_before": round(before, 6), "error_after": round(after, 6)}

    def _targets(self, index: int, teacher: nn.Module, streams: BlockStreams, task: Task) -> Tensor:
        """The block's output in the teacher."""
        if streams.ahead is not None:
            task.advance(len(streams.ahead))
            return streams.ahead
        return self.model.run_all(
            index, teacher, streams.teacher, self.config.batch_size, task.advance
        )

    def _following(self, index: int, entering: Tensor, streams: BlockStreams) -> list[_Matched]:
        """The next block, where the window has two and the model goes on."""
        following = index + 1
        if self.config.window == 1 or following == len(self.model.blocks):
            return []
        block, batch_size = self.model.load_block(following), self.config.batch_size
        streams.ahead = self.model.run_all(following, block, entering, batch_size)
        return [self._matched(following, block, streams.ahead)]

    def _matched(self, index: int, block: nn.Module, targets: Tensor) -> _Matched:
        return _Matched(index, block, targets, output_metric(self.config, index, self.ctx))

    def _error_before(
        self, index: int, block: nn.Module, entering: Tensor, targets: Tensor
    ) -> float:
        """The untrained block's error, over the first batches: the whole would take a pass."""
        batch_size = self.config.batch_size
        few = slice(0, _BATCHES_BEFORE * batch_size)
        output = self.model.run_all(index, block, entering[few], batch_size)
        return mean_error(output, targets[few], batch_size)

    def _student_block(
        self, index: int, teacher: nn.Module
    ) -> tuple[nn.Module, dict[str, LatentLinear]]:
        """A copy of the block with layers that train, the rest as the student has it."""
        prefix = self.model.blocks.name(index)
        block = copy.deepcopy(teacher)
        layers: dict[str, LatentLinear] = {}
        for name, module in list(teacher.named_modules()):
            full = f"{prefix}.{name}"
            if full not in self.quantized_names:
                continue
            in_features, _ = layer_shape(module)
            bias = self._student_bias(full)
            quantized = self.student.layer(full, in_features)
            matrix = self.model.matrix(full)
            layers[name] = latent_layer(self.student, full, quantized, matrix, bias)
            replace_module(block, name, layers[name])
        own = {f"{name}.alpha" for name in layers}
        for name, parameter in block.named_parameters():
            if name not in own and f"{prefix}.{name}" in self.student.tensors:
                parameter.data.copy_(self.student.tensors.get(f"{prefix}.{name}"))
        return block, layers

    def _student_bias(self, name: str) -> Tensor | None:
        stored = f"{name}.bias"
        if stored not in self.student.tensors:
            return None
        return self.student.tensors.get(stored).to(self.ctx.device, torch.float32)

    def _batches(self, index: int, samples: int) -> Iterator[Tensor]:
        """Indices of the sequences of each step, drawn from seed, block and pass alone."""
        for number in range(self.config.passes):
            seed = (self.config.seed * 100_003 + index) * 1_009 + number
            order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
            # The short batch stays short: only batch sizes that `enter` met can run.
            yield from order.split(self.config.batch_size)

    def _optimize(
        self,
        window: list[_Matched],
        layers: Mapping[str, LatentLinear],
        entering: BlockStreams,
        task: Task,
    ) -> None:
        """Train the layers of the first block of the window."""
        index, samples = window[0].place, len(entering.student)
        total = self.steps(samples)
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + index)
        optimizer = RelativeAdamW(
            layers,
            self.config.latent_lr,
            self.config.scale_lr,
            latent_decay=self.config.latent_decay / total,
        )
        for step, chosen in enumerate(self._batches(index, samples)):
            hidden = entering_batch(entering, chosen, self.config.teacher_inputs, generator)
            loss = self._window_loss(window, hidden, chosen)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise StageFailedError(
                    f"reconstruct: the loss of block {index} is {value} at step {step}",
                    "lower --latent-lr, or use --compute-dtype float32",
                )
            loss.backward()
            optimizer.step(schedule_factor(step, total, self.config.warmup_steps))
            task.advance(len(chosen), block=index, loss=value)

    def _window_loss(self, window: list[_Matched], entering: Tensor, chosen: Tensor) -> Tensor:
        """The sum of the errors of a batch after every block of the window."""
        device = self.ctx.device
        hidden, loss = entering.to(device), torch.zeros((), device=device)
        for matched in window:
            hidden = self.model.run_block(matched.place, matched.block, hidden)
            targets = matched.targets[chosen].to(device)
            loss = loss + relative_token_error(hidden, targets, matched.metric)
        return loss

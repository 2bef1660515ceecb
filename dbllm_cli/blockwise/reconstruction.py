"""The training of reconstruct: one block after the other, to give the teacher's output."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dbllm_cli.blockwise.block_error import ErrorMetric, relative_token_error
from dbllm_cli.blockwise.finished_blocks import BlockReport, FinishedBlocks
from dbllm_cli.blockwise.output_metric import OutputMetrics
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.blockwise.streams import BlockStreams, entering_batch, mean_error
from dbllm_cli.errors import StageFailedError
from dbllm_cli.llm.blocks import layer_shape
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.progress import Progress, Task
from dbllm_cli.training.layers import LatentLinear
from dbllm_cli.training.optimizer import RelativeAdamW, schedule_factor
from dbllm_cli.training.student import latent_layer

_BATCHES_BEFORE = 4


@dataclass(frozen=True)
class BlockTrainingOptions:
    """How blocks train; `configs.ReconstructConfig` says what each is."""

    batch_size: int
    latent_lr: float
    scale_lr: float
    warmup_steps: int
    keep_latents: bool
    seed: int
    passes: int
    window: int
    latent_decay: float
    teacher_inputs: float
    sensitivity_power: float
    position_power: float


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


class BlockTraining:
    """The walk over the blocks: two streams of hidden states, a window of blocks in memory.

    Args:
        options: how blocks train.
        student: the quantized model.
        teacher: the full-precision model.
        scratch: where finished blocks are kept.
        progress: where the sequences are reported.
    """

    def __init__(
        self,
        options: BlockTrainingOptions,
        student: PackedFolder,
        teacher: StreamedModel,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.options, self.student, self.model = options, student, teacher
        self.progress = progress
        self.finished = FinishedBlocks(teacher, scratch, student.group_size, student.levels)
        self.metrics = OutputMetrics(scratch, options.sensitivity_power, options.position_power)
        self.quantized_names = set(student.layer_names())

    def train_all(self, sequences: Tensor) -> BlockReport:
        """Train every block that is not yet finished; errors before and after of each block."""
        options = self.options
        self.metrics.make(self.model, sequences, options.batch_size, options.seed, self.progress)
        report = self.finished.report()
        streams = self.finished.streams(
            self._entering(sequences), options.batch_size, self._finished_block, self.progress
        )
        blocks = len(self.model.blocks)
        per_block = self.steps(len(sequences)) * self.options.batch_size + 2 * len(sequences)
        with self.progress.task(
            "reconstruct", blocks * per_block, len(report) * per_block, "sequences"
        ) as task:
            for index in range(len(report), blocks):
                report.append(self._train_block(index, streams, task))
                self.finished.keep_report(report, streams)
        return report

    def _entering(self, sequences: Tensor) -> BlockStreams:
        """What enters the first block, after the teacher's embeddings and after the student's."""
        batch_size = self.options.batch_size
        teacher = self.model.embed(sequences, batch_size)
        self.model.load_outside(self.student.tensors)
        student = self.model.embed(sequences, batch_size)
        self.model.load_outside(self.model.tensors)
        return BlockStreams(teacher, student)

    def steps(self, samples: int) -> int:
        """Optimizer steps of one block."""
        return math.ceil(samples / self.options.batch_size) * self.options.passes

    def _train_block(self, index: int, streams: BlockStreams, task: Task) -> dict[str, float]:
        """Train one block; the streams move on to its outputs."""
        batch_size = self.options.batch_size
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
        quantized = {name: layer.quantize() for name, layer in layers.items()}
        latents = {name: layer.latent for name, layer in layers.items()}
        kept = latents if self.options.keep_latents else None
        self.finished.keep_layers(index, quantized, kept)
        self.finished.set_layers(index, block)
        output = self.model.run_all(index, block, streams.student, batch_size, task.advance)
        after = mean_error(output, targets, batch_size)
        streams.teacher, streams.student = targets, output
        return {"error_before": round(before, 6), "error_after": round(after, 6)}

    def _targets(self, index: int, teacher: nn.Module, streams: BlockStreams, task: Task) -> Tensor:
        """The block's output in the teacher."""
        if streams.ahead is not None:
            task.advance(len(streams.ahead))
            return streams.ahead
        return self.model.run_all(
            index, teacher, streams.teacher, self.options.batch_size, task.advance
        )

    def _following(self, index: int, entering: Tensor, streams: BlockStreams) -> list[_Matched]:
        """The next block, where the window has two and the model goes on; it stays loaded."""
        following = index + 1
        if self.options.window == 1 or following == len(self.model.blocks):
            return []
        block, batch_size = self.model.load_block(following), self.options.batch_size
        streams.ahead = self.model.run_all(following, block, entering, batch_size)
        return [self._matched(following, block, streams.ahead)]

    def _matched(self, index: int, block: nn.Module, targets: Tensor) -> _Matched:
        return _Matched(index, block, targets, self.metrics.of_block(index, self.model.device))

    def _error_before(
        self, index: int, block: nn.Module, entering: Tensor, targets: Tensor
    ) -> float:
        """The untrained block's error, over the first batches: the whole would take a pass."""
        batch_size = self.options.batch_size
        few = slice(0, _BATCHES_BEFORE * batch_size)
        output = self.model.run_all(index, block, entering[few], batch_size)
        return mean_error(output, targets[few], batch_size)

    def _student_block(
        self, index: int, teacher: nn.Module
    ) -> tuple[nn.Module, dict[str, LatentLinear]]:
        """A copy of the block with layers that train, the rest as the student has it."""
        prefix = self.model.blocks.name(index)
        block = self._copied_block(index, teacher)
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
            block.set_submodule(name, layers[name])
        return block, layers

    def _copied_block(self, index: int, teacher: nn.Module) -> nn.Module:
        """A copy of the block in which all but the quantized weights is the student's."""
        block = copy.deepcopy(teacher)
        for name, parameter in block.named_parameters():
            full = f"{self.model.blocks.name(index)}.{name}"
            quantized = full.removesuffix(".weight") in self.quantized_names
            if not quantized and full in self.student.tensors:
                parameter.data.copy_(self.student.tensors.get(full))
        return block

    def _finished_block(self, index: int, teacher: nn.Module) -> nn.Module:
        block = self._copied_block(index, teacher)
        self.finished.set_layers(index, block)
        return block

    def _student_bias(self, name: str) -> Tensor | None:
        stored = f"{name}.bias"
        if stored not in self.student.tensors:
            return None
        return self.student.tensors.get(stored).to(self.model.device, torch.float32)

    def _batches(self, index: int, samples: int) -> Iterator[Tensor]:
        """Indices of the sequences of each step, drawn from seed, block and pass alone."""
        for number in range(self.options.passes):
            seed = (self.options.seed * 100_003 + index) * 1_009 + number
            order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
            # The short batch stays short: only batch sizes that `embed` met can run.
            yield from order.split(self.options.batch_size)

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
        generator = torch.Generator().manual_seed(self.options.seed * 100_003 + index)
        optimizer = RelativeAdamW(
            layers,
            self.options.latent_lr,
            self.options.scale_lr,
            latent_decay=self.options.latent_decay / total,
        )
        for step, chosen in enumerate(self._batches(index, samples)):
            hidden = entering_batch(entering, chosen, self.options.teacher_inputs, generator)
            loss = self._window_loss(window, hidden, chosen)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise StageFailedError(
                    f"reconstruct: the loss of block {index} is {value} at step {step}",
                    "lower --latent-lr, or use --compute-dtype float32",
                )
            loss.backward()
            optimizer.step(schedule_factor(step, total, self.options.warmup_steps))
            task.advance(len(chosen), block=index, loss=value)

    def _window_loss(self, window: list[_Matched], entering: Tensor, chosen: Tensor) -> Tensor:
        """The sum of the errors of a batch after every block of the window."""
        device = self.model.device
        hidden, loss = entering.to(device), torch.zeros((), device=device)
        for matched in window:
            hidden = self.model.run_block(matched.place, matched.block, hidden)
            targets = matched.targets[chosen].to(device)
            loss = loss + relative_token_error(hidden, targets, matched.metric)
        return loss

"""The `gptq` start of init-fdb: error-compensated rounding, layer by layer in order.

Later layers see the quantized earlier ones. One block of the model, its layers' XᵀX and the hidden
states between two blocks are in memory.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dbllm_cli.blockwise.finished_blocks import BlockReport, FinishedBlocks
from dbllm_cli.blockwise.layer_inputs import layers_by_input, weighted_gram
from dbllm_cli.blockwise.statistics import token_weights
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.blockwise.streams import BlockStreams, mean_error
from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.compensation import Compensated, quantize_compensated
from dbllm_cli.llm.blocks import layer_shape
from dbllm_cli.progress import Progress
from dbllm_cli.tensors import require_finite
from dbllm_cli.training.student import set_dense_layer


@dataclass(frozen=True)
class GptqOptions:
    """How layers are quantized.

    Attributes:
        group_size: inputs that share their scales.
        levels: the scheme of levels.
        batch_size: sequences run at once.
        keep_latents: keep the compensated weights, for reconstruct to go on from.
    """

    group_size: int
    levels: str
    batch_size: int
    keep_latents: bool


class GptqStart:
    """The walk over the blocks.

    Args:
        options: how layers are quantized.
        model: the teacher.
        names: full names of the layers to quantize.
        scratch: where finished blocks are kept.
    """

    def __init__(
        self, options: GptqOptions, model: StreamedModel, names: Collection[str], scratch: Path
    ) -> None:
        self.options, self.model, self.names = options, model, set(names)
        self.finished = FinishedBlocks(model, scratch, options.group_size, options.levels)

    def quantize_all(self, sequences: Tensor, progress: Progress) -> BlockReport:
        """Quantize every block that is not finished; the layers go to scratch.

        Args:
            sequences: int64 token ids `[n, tokens]`.
            progress: where the blocks are reported.

        Returns:
            The relative error of every block's output.

        Raises:
            ArtifactCorruptError: a weight is NaN.
            StageFailedError: a scale is not finite, or XᵀX is singular.
        """
        report, size = self.finished.report(), self.options.batch_size
        entering = self.model.embed(sequences, size)
        streams = self.finished.streams(
            BlockStreams(entering, entering), size, self._finished_block, progress
        )
        blocks = len(self.model.blocks)
        with progress.task("gptq", blocks, len(report), "blocks") as task:
            for index in range(len(report), blocks):
                report.append({"error": self._quantize_block(index, streams)})
                self.finished.keep_report(report, streams)
                task.advance(block=index, error=report[-1]["error"])
        return report

    def _finished_block(self, index: int, teacher: nn.Module) -> nn.Module:
        block = copy.deepcopy(teacher)
        self.finished.set_layers(index, block)
        return block

    def _quantize_block(self, index: int, streams: BlockStreams) -> float:
        """Quantize one block; the streams move on to its outputs. Its relative error."""
        size = self.options.batch_size
        block = self.model.load_block(index)
        targets = self.model.run_all(index, block, streams.teacher, size)
        student = copy.deepcopy(block)
        layers = self._compensate(index, student, streams.student, targets)
        self.model.drop_block(index)
        output = self.model.run_all(index, student, streams.student, size)
        latents = {name: layer.latent for name, layer in layers.items()}
        self.finished.keep_layers(
            index,
            {name: layer.quantized for name, layer in layers.items()},
            latents if self.options.keep_latents else None,
        )
        streams.teacher, streams.student = targets, output
        return round(mean_error(output, targets, size), 6)

    def _compensate(
        self, index: int, block: nn.Module, entering: Tensor, targets: Tensor
    ) -> dict[str, Compensated]:
        """Quantize a block's layers in order and put them in their places.

        Args:
            index: of the block.
            block: a copy of the teacher's block, changed in place.
            entering: what the quantized blocks before it give, `[n, tokens, hidden]`.
            targets: the teacher block's output in the teacher, which weighs the tokens.

        Returns:
            Name within the block -> planes and scales, and latent weights.
        """
        prefix, size = self.model.blocks.name(index), self.options.batch_size
        names = [name for name, _ in block.named_modules() if f"{prefix}.{name}" in self.names]
        weights = [part.to(self.model.device) for part in token_weights(targets).split(size)]
        layers: dict[str, Compensated] = {}
        for together in self._in_order(index, block, names, entering[:size]):
            layer = block.get_submodule(together[0])
            gram = weighted_gram(
                layer,
                layer_shape(layer)[0],
                weights,
                entering.split(size),
                lambda batch: self.model.run_block(index, block, batch.to(self.model.device)),
            )
            for name in together:
                full = f"{prefix}.{name}"
                layers[name] = _quantize(full, self.model.matrix(full), gram, self.options)
                set_dense_layer(block, name, layers[name].quantized, self.model.dtype)
        return layers

    def _in_order(
        self, index: int, block: nn.Module, names: list[str], few: Tensor
    ) -> list[list[str]]:
        """The layers in the order of their calls on a batch, by the input they share."""
        few = few.to(self.model.device)
        shared = layers_by_input(block, names, lambda: self.model.run_block(index, block, few))
        missed = set(names) - {name for together in shared for name in together}
        if missed:
            name = f"{self.model.blocks.name(index)}.{min(missed)}"
            raise StageFailedError(
                f"{name} was not called by the first batch, so its errors can't be weighed",
                f"leave it out: --exclude {name}, or use --method als",
            )
        return shared


def _quantize(name: str, matrix: Tensor, gram: Tensor, options: GptqOptions) -> Compensated:
    require_finite(f"{name}.weight", matrix)
    with names_layer(name):
        return quantize_compensated(matrix, gram, options.group_size, options.levels)


@contextmanager
def names_layer(name: str) -> Iterator[None]:
    """Puts the layer's name, and how to leave it out, into a StageFailedError."""
    try:
        yield
    except StageFailedError as error:
        hint = f"leave it out: --exclude {name}"
        raise StageFailedError(f"{name}: {error.message}", hint) from error

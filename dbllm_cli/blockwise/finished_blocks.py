"""What is kept of the blocks that are finished, so that a killed walk goes on with the same bytes.

After every block its layers and its figures are written, after every fourth the hidden states that
enter the next one too: they are by far the largest, and the blocks since can be run again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.blockwise.streams import BlockStreams
from dbllm_cli.fdb.quantized import QuantizedMatrix
from dbllm_cli.llm.blocks import layer_shape
from dbllm_cli.progress import Progress
from dbllm_cli.records.checkpoints import (
    checkpoint_numbers,
    keep_tensors,
    last_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from dbllm_cli.tensors import TensorFolder
from dbllm_cli.training.student import set_dense_layer

BlockReport = list[dict[str, float]]
"""The figures of every finished block."""

_BLOCKS_BETWEEN = 4
_REPORT, _STREAMS = "report", "streams"


@dataclass(frozen=True)
class FinishedBlocks:
    """The finished blocks in the scratch of a stage.

    Attributes:
        model: the teacher.
        scratch: of the stage.
        group_size: inputs that share their scales.
        levels: the scheme of levels.
    """

    model: StreamedModel
    scratch: Path
    group_size: int
    levels: str

    def keep_layers(
        self,
        index: int,
        layers: Mapping[str, QuantizedMatrix],
        latents: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a block's layers, whole or not at all.

        Args:
            index: of the block.
            layers: name within the block -> planes and scales.
            latents: name within the block -> latent weights, where they were trained.
        """
        tensors = {f"{name}.latent": latent for name, latent in (latents or {}).items()}
        for name, matrix in layers.items():
            tensors[f"{name}.weight"], tensors[f"{name}.alpha"] = matrix.weight, matrix.scales
        keep_tensors(tensors, self.scratch / f"block-{index}.safetensors")

    def keep_report(self, report: BlockReport, streams: BlockStreams) -> None:
        """Note that a block is finished whose layers were kept before.

        Args:
            report: of all finished blocks.
            streams: what enters the next block.
        """
        finished = len(report)
        save_checkpoint(self.scratch, _REPORT, finished, {}, {"blocks": report})
        # After the report: streams of more blocks than it tells of could not be used.
        if finished % _BLOCKS_BETWEEN == 0 and finished < len(self.model.blocks):
            tensors = {"teacher": streams.teacher, "student": streams.student}
            save_checkpoint(self.scratch, _STREAMS, finished, tensors, {})

    def report(self) -> BlockReport:
        """The figures of all finished blocks."""
        kept = last_checkpoint(self.scratch, _REPORT)
        return [] if kept is None else cast(BlockReport, kept[1]["blocks"])

    def streams(
        self,
        entering: BlockStreams,
        batch_size: int,
        finish: Callable[[int, nn.Module], nn.Module],
        progress: Progress,
    ) -> BlockStreams:
        """What enters the first block that is not finished; no matter what when all are.

        Args:
            entering: what enters the first block of all.
            batch_size: sequences at once, whenever blocks run.
            finish: from a block's index and the teacher's block to a finished copy of it.
            progress: where the blocks that run again are reported.
        """
        finished = len(self.report())
        usable = [n for n in checkpoint_numbers(self.scratch, _STREAMS) if n <= finished]
        first, streams = max(usable, default=0), entering
        if usable:
            tensors, _ = read_checkpoint(self.scratch, _STREAMS, first)
            streams = BlockStreams(tensors["teacher"], tensors["student"])
        if first == finished or finished == len(self.model.blocks):
            return streams
        with progress.task("blocks run again", finished - first, unit="blocks") as task:
            for index in range(first, finished):
                block = self.model.load_block(index)
                student = finish(index, block)
                streams = BlockStreams(
                    self.model.run_all(index, block, streams.teacher, batch_size),
                    self.model.run_all(index, student, streams.student, batch_size),
                )
                self.model.drop_block(index)
                task.advance()
        return streams

    def set_layers(self, index: int, block: nn.Module) -> None:
        """Put a block's kept layers, dense, in the places of those whose biases they take."""
        for name, matrix, _ in self._layers_of(index):
            on_device = replace(
                matrix,
                weight=matrix.weight.to(self.model.device),
                scales=matrix.scales.to(self.model.device),
            )
            set_dense_layer(block, name, on_device, self.model.dtype)

    def layers(self) -> Iterator[tuple[str, QuantizedMatrix, Tensor | None]]:
        """Full name, planes and scales, and latent weights or None, of every layer of the model."""
        for index in range(len(self.model.blocks)):
            for name, matrix, latent in self._layers_of(index):
                yield f"{self.model.blocks.name(index)}.{name}", matrix, latent

    def _layers_of(self, index: int) -> Iterator[tuple[str, QuantizedMatrix, Tensor | None]]:
        tensors = TensorFolder(self.scratch, f"block-{index}")
        for key in tensors.names():
            if not key.endswith(".alpha"):
                continue
            name = key.removesuffix(".alpha")
            full = f"{self.model.blocks.name(index)}.{name}"
            in_features, _ = layer_shape(self.model.model.get_submodule(full))
            weight, scales = tensors.get(f"{name}.weight"), tensors.get(key)
            latent = tensors.get(f"{name}.latent") if f"{name}.latent" in tensors else None
            matrix = QuantizedMatrix(weight, scales, in_features, self.group_size, self.levels)
            yield name, matrix, latent

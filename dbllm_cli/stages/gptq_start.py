"""The `gptq` start of init-fdb: error-compensated rounding, layer by layer in order.

Later layers see the quantized earlier ones. One block of the model, its layers' XᵀX and the hidden
states between two blocks are in memory.
"""

import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dbllm_cli.configs import InitFdbConfig
from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.compensation import quantize_compensated
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.losses import relative_token_error
from dbllm_cli.fdb.quantized import QuantizedMatrix
from dbllm_cli.llm.blocks import layer_shape, matrix_of
from dbllm_cli.llm.layer_inputs import layers_by_input, weighted_gram
from dbllm_cli.llm.streaming import StreamedModel
from dbllm_cli.llm.tensors import TensorFolder, require_finite, save_tensors
from dbllm_cli.stages.block_streams import BlockReport, BlockStreams, begin_streams, keep_streams
from dbllm_cli.stages.resuming import note_environment
from dbllm_cli.stages.spec import Context
from dbllm_cli.stages.trained_layers import autocast, replace_module


class GptqStart:
    """The walk over the blocks.

    Args:
        config: of init-fdb.
        folder: the teacher's.
        names: full names of the layers to quantize.
        ctx: of the stage.
    """

    def __init__(
        self, config: InitFdbConfig, folder: Path, names: Collection[str], ctx: Context
    ) -> None:
        self.config, self.names, self.ctx = config, set(names), ctx
        note_environment(ctx.scratch, ctx.device, ctx.progress)
        self.model = StreamedModel(folder, ctx.device, ctx.trust_remote_code)

    def quantize_all(self, sequences: Tensor) -> BlockReport:
        """Quantize every block that is not finished; the layers go to scratch.

        Args:
            sequences: int64 token ids `[n, tokens]`.

        Returns:
            The relative error of every block's output.

        Raises:
            ArtifactCorruptError: a weight is NaN.
            StageFailedError: a scale is not finite, or XᵀX is singular.
        """
        streams, report = begin_streams(
            self.model, sequences, self.config.batch_size, self.ctx.scratch
        )
        blocks = len(self.model.blocks)
        with self.ctx.progress.task("gptq", blocks, len(report), "blocks") as task:
            for index in range(len(report), blocks):
                report.append({"error": self._quantize_block(index, streams)})
                keep_streams(self.ctx.scratch, streams, report)
                task.advance(block=index, error=report[-1]["error"])
        return report

    def finished_layers(self) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Every layer, read back from scratch."""
        for index in range(len(self.model.blocks)):
            tensors = TensorFolder(self.ctx.scratch, f"block-{index}")
            for key in tensors.names():
                if not key.endswith(".alpha"):
                    continue
                name = key.removesuffix(".alpha")
                module = self.model.model.get_submodule(name)
                yield (
                    name,
                    QuantizedMatrix(
                        tensors.get(f"{name}.weight"),
                        tensors.get(key),
                        layer_shape(module)[0],
                        self.config.group_size,
                    ),
                )

    def _quantize_block(self, index: int, streams: BlockStreams) -> float:
        """Quantize one block; the streams move on to its outputs. Its relative error."""
        size = self.config.batch_size
        block = self.model.load_block(index)
        with autocast(self.ctx.device, self.config.compute_dtype):
            targets = self.model.run_all(index, block, streams.teacher, size)
            student = copy.deepcopy(block)
            self.model.drop_block(index)
            quantized = compensate_layers(
                self.model,
                index,
                student,
                self.names,
                streams.student,
                targets,
                self.config.group_size,
                size,
            )
            output = self.model.run_all(index, student, streams.student, size)
        tensors: dict[str, Tensor] = {}
        for name, matrix in quantized.items():
            tensors[f"{name}.weight"], tensors[f"{name}.alpha"] = matrix.weight, matrix.alpha
        path = self.ctx.scratch / f"block-{index}.safetensors"
        save_tensors(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        streams.teacher, streams.student = targets, output
        return round(float(relative_token_error(output, targets)), 6)


def compensate_layers(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    names: Collection[str],
    entering: Tensor,
    targets: Tensor,
    group_size: int,
    batch_size: int,
) -> dict[str, QuantizedMatrix]:
    """Quantize a block's layers in order and put them in their places.

    Args:
        model: the teacher.
        index: of the block.
        block: a copy of the teacher's block, changed in place.
        names: full names of the layers to quantize, others among them.
        entering: what the quantized blocks before it give, float32 `[n, tokens, hidden]`.
        targets: the teacher block's output in the teacher, which weighs the tokens.
        group_size: inputs that share two scales.
        batch_size: as given to `model.enter`.

    Returns:
        Full name -> planes and scales.

    Raises:
        ArtifactCorruptError: a weight is NaN.
        StageFailedError: a scale is not finite, or XᵀX has no inverse.
    """
    prefix, device = model.blocks.name(index), model.device
    own = [name for name, _ in block.named_modules() if f"{prefix}.{name}" in names]
    # As in reconstruct, the first token's huge hidden state must not stand for all.
    weights = targets.square().mean(-1).clamp(min=1e-12).reciprocal()
    batches = [part.to(device) for part in weights.split(batch_size)]
    first = entering[:batch_size].to(device)
    quantized: dict[str, QuantizedMatrix] = {}
    shared = layers_by_input(block, own, lambda: model.run_block(index, block, first))
    for name in sorted(set(own) - {name for together in shared for name in together}):
        raise StageFailedError(
            f"{prefix}.{name} was not called by the first batch, so its errors can't be weighed",
            f"leave it out: --exclude {prefix}.{name}, or use --method als",
        )
    for together in shared:
        layer = block.get_submodule(together[0])
        gram = weighted_gram(
            block,
            layer,
            layer_shape(layer)[0],
            batches,
            lambda: model.run_all(index, block, entering, batch_size),
        )
        for name in together:
            full, module = f"{prefix}.{name}", block.get_submodule(name)
            quantized[full] = _quantize(full, module, gram, group_size)
            bias = cast("Tensor | None", getattr(module, "bias", None))
            replace_module(block, name, FdbLinear.holding(quantized[full], bias))
    return quantized


def _quantize(name: str, module: nn.Module, gram: Tensor, group_size: int) -> QuantizedMatrix:
    weight = cast(Tensor, module.weight)
    require_finite(f"{name}.weight", weight)
    matrix = matrix_of(module, weight).to(torch.float32)
    try:
        with torch.autocast(gram.device.type, enabled=False):  # it is for the blocks' products
            return quantize_compensated(matrix, gram, group_size)
    except StageFailedError as error:
        hint = f"leave it out: --exclude {name}"
        raise StageFailedError(f"{name}: {error.message}", hint) from error

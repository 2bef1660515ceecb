"""pack: planes and scales as a model folder that loads where people are, or a plain dense one."""

import math
from collections.abc import Mapping

from pydantic import BaseModel, Field, ValidationError

from dbllm_cli.configs import PackConfig
from dbllm_cli.formats import Format, open_format
from dbllm_cli.formats.packed import Int8Embeddings
from dbllm_cli.llm.models import LAYER_REPORT, copy_other_files
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.records.card import model_card
from dbllm_cli.records.metrics import PackMetrics
from dbllm_cli.stages.context import Context, Result, members
from dbllm_cli.stages.spec import PACK, implements
from dbllm_cli.store import Artifact, read_object
from dbllm_cli.store.json_file import read_json_object, write_json
from dbllm_cli.store.manifest import corrupt
from dbllm_cli.tensors import ShardWriter


@implements(PACK)
def run(config: PackConfig, inputs: Mapping[str, Artifact], ctx: Context) -> Result[PackMetrics]:
    """Make the packed artifact from an fdb artifact.

    Raises:
        ArtifactCorruptError: the fdb artifact is not whole.
        ConfigError: the model's embeddings can't be packed in 8 bits, or figures of other models.
    """
    fdb = inputs["fdb"]
    student = PackedFolder(fdb.path)
    chosen = Int8Embeddings() if config.embeddings == "int8" else open_format(config.format)
    copy_other_files(student.folder, ctx.out)
    total = _write_tensors(chosen, student, config.shard_size * 1e9, ctx)
    path = ctx.out / "config.json"
    write_json(path, chosen.config(read_json_object(path)), finite=False)
    weights, bits = _quantized_size(fdb)
    metrics: PackMetrics = {
        "format": config.format,
        "embeddings": config.embeddings,
        "levels": student.levels,
        "weight_bytes": total,
        "quantized_weights": weights,
        "bits_per_quantized_weight": bits,
    }
    card = model_card(fdb, members(inputs, "evals"), metrics, chosen)
    (ctx.out / "README.md").write_text(card)
    return Result(metrics)


def _write_tensors(chosen: Format, student: PackedFolder, shard_bytes: float, ctx: Context) -> int:
    """Write the folder's tensors; how many bytes they are."""
    total = 0
    with (
        ShardWriter(ctx.out, shard_bytes=shard_bytes) as writer,
        ctx.progress.task("pack", len(student.tensors.names()), unit="tensors") as task,
    ):
        for name, tensor in chosen.tensors(student, ctx.trust_remote_code):
            writer.add(name, tensor)
            total += tensor.numel() * tensor.element_size()
            task.advance()
    return total


class _LayerSize(BaseModel):
    weights: int = Field(gt=0)
    bits_per_weight: float


def _quantized_size(fdb: Artifact) -> tuple[int, float]:
    """The quantized weights, and bits of each with planes and scales."""
    try:
        layers = [_LayerSize.model_validate(e) for e in read_object(fdb, LAYER_REPORT).values()]
    except ValidationError as error:
        raise corrupt(fdb.path, f"its {LAYER_REPORT} does not tell the size of layers") from error
    weights = sum(layer.weights for layer in layers)
    if not weights:
        raise corrupt(fdb.path, f"its {LAYER_REPORT} tells of no layers")
    bits = math.fsum(layer.weights * layer.bits_per_weight for layer in layers)
    return weights, round(bits / weights, 6)

"""init-fdb: the starting planes and scales of every selected linear layer."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dbllm_cli.blockwise.finished_blocks import BlockReport
from dbllm_cli.blockwise.gptq import GptqOptions, GptqStart, names_layer
from dbllm_cli.blockwise.layer_inputs import uncalled_layers
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.configs import InitFdbConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import QuantizedMatrix, quantize_matrix
from dbllm_cli.llm.blocks import find_blocks, matrix_of, select_layers
from dbllm_cli.llm.models import (
    Model,
    copy_other_files,
    empty_model,
    load_config,
    model_folder,
    module_tensor_names,
)
from dbllm_cli.llm.quantized_folder import (
    QuantizedLayer,
    quantized_config,
    write_quantized,
)
from dbllm_cli.llm.tokenizers import load_tokenizer
from dbllm_cli.records.calibration import open_calibration, require_same_model
from dbllm_cli.records.environment import begin_or_resume, environment_here
from dbllm_cli.records.layers import (
    note_coarse_layers,
    over_all_layers,
    show_layers,
    write_layer_report,
)
from dbllm_cli.records.metrics import GptqMetrics, InitFdbMetrics
from dbllm_cli.stages.context import Context, Result, options_from
from dbllm_cli.stages.spec import INIT_FDB, implements
from dbllm_cli.store import Artifact
from dbllm_cli.store.json_file import read_json_object, write_json
from dbllm_cli.tensors import TensorFolder, require_finite, torch_dtype


@implements(INIT_FDB)
def run(
    config: InitFdbConfig, inputs: Mapping[str, Artifact], ctx: Context
) -> Result[InitFdbMetrics]:
    """Make an fdb artifact: a quantized model's folder and layers.json.

    Raises:
        ArtifactCorruptError: a weight is NaN.
        ConfigError: no layer selected, one that is never called, or fused experts.
        ArtifactMissingError: the calibration is another model's.
        StageFailedError: a scale is not finite in float16.
    """
    require_same_model(inputs)
    calibration = None
    if "calibration" in inputs:
        calibration = open_calibration(inputs["calibration"], config.num_samples)
    folder = model_folder(inputs["model"], ctx.work, ctx.trust_remote_code)
    load_tokenizer(folder, ctx.trust_remote_code)
    model = empty_model(load_config(folder, ctx.trust_remote_code), ctx.trust_remote_code)
    blocks = find_blocks(model)
    layers = select_layers(blocks, config.include, config.exclude)
    _require_calls(model, layers)
    means = {} if calibration is None else calibration.input_mean_squares
    blocks_report: BlockReport | None = None
    if config.method == "gptq":
        assert calibration is not None  # config.require_inputs
        environment = begin_or_resume(ctx.scratch, ctx.device, config.compute_dtype, ctx.progress)
        dtype = torch_dtype(environment.compute_dtype)
        teacher = StreamedModel(folder, ctx.device, ctx.trust_remote_code, dtype)
        start = GptqStart(options_from(config, GptqOptions), teacher, layers, ctx.scratch)
        blocks_report = start.quantize_all(calibration.train, ctx.progress)
        quantized = start.finished.layers()
    else:
        environment = environment_here(ctx.device, "float32")
        quantized = _fitted_layers(config, folder, layers, means, ctx)
    _write_tensors(config, folder, model, quantized, layers, ctx.out)
    _write_files(folder, ctx.out, config, [n for n, _ in blocks.linear_layers() if n not in layers])
    report = write_layer_report(ctx.out, folder, means, ctx.trust_remote_code)
    show_layers(report, ctx.progress)
    note_coarse_layers(report, ctx.progress)
    overall = over_all_layers(report)
    if blocks_report is None:
        return Result(overall, environment)
    with_blocks: GptqMetrics = {**overall, "blocks": blocks_report}
    return Result(with_blocks, environment)


def _require_calls(model: Model, layers: Collection[str]) -> None:
    uncalled = uncalled_layers(model, layers)
    if uncalled:
        raise ConfigError(
            f"{type(model).__name__} does not call {uncalled[0]} ({len(uncalled)} such layers), so "
            "that it needs its weight in full precision",
            f"leave them out: --exclude '*{uncalled[0].rpartition('.')[2]}'",
        )


def _fitted_layers(
    config: InitFdbConfig,
    folder: Path,
    layers: Mapping[str, nn.Module],
    means: Mapping[str, Tensor],
    ctx: Context,
) -> Iterator[QuantizedLayer]:
    reader = TensorFolder(folder)
    with ctx.progress.task("init-fdb", len(layers), unit="layers") as task:
        for name, module in layers.items():
            weight = reader.get(f"{name}.weight")
            require_finite(f"{name}.weight", weight)
            matrix = matrix_of(module, weight).to(ctx.device, torch.float32)
            yield name, _quantize(name, matrix, config, means.get(name)), None
            task.advance()


def _quantize(
    name: str, matrix: Tensor, config: InitFdbConfig, importance: Tensor | None
) -> QuantizedMatrix:
    on_device = None if importance is None else importance.to(matrix.device)
    scales = fit_scales(matrix, config.group_size, config.method, on_device, config.levels)
    with names_layer(name):
        return quantize_matrix(matrix, scales, config.group_size, config.levels)


def _write_tensors(
    config: InitFdbConfig,
    folder: Path,
    model: Model,
    layers: Iterator[QuantizedLayer],
    chosen: Collection[str],
    out: Path,
) -> None:
    reader, dtype = TensorFolder(folder), torch_dtype(config.dtype)

    def others() -> Iterator[tuple[str, Tensor]]:
        for name in module_tensor_names(model):
            if name.removesuffix(".weight") not in chosen:
                tensor = reader.get(name)
                require_finite(name, tensor)
                yield name, _stored(name, tensor, dtype)

    write_quantized(out, layers, others())


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not torch.isfinite(stored).all():
        raise ConfigError(
            f"tensor {name} is too large for {str(dtype).removeprefix('torch.')}",
            "keep what is not quantized in --dtype bfloat16",
        )
    return stored


def _write_files(folder: Path, out: Path, config: InitFdbConfig, kept: list[str]) -> None:
    copy_other_files(folder, out)
    own = read_json_object(folder / "config.json")
    settings = quantized_config(own, config.group_size, kept, config.dtype, config.levels)
    write_json(out / "config.json", settings, finite=False)

"""layers.json of an fdb artifact: error, zeros and bits of every quantized layer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.fdb.groups import to_groups
from dbllm_cli.fdb.quantized import QuantizedMatrix, count_planes, stored_bits
from dbllm_cli.llm.blocks import find_blocks, layer_shape, matrix_of
from dbllm_cli.llm.models import LAYER_REPORT, empty_model, load_config
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.progress import Progress
from dbllm_cli.records.metrics import LayerMetrics
from dbllm_cli.store.json_file import write_json
from dbllm_cli.tensors import TensorFolder

_MANY_COARSE = 1e-3
"""Of a layer's groups: as many as one row that an outlier has spoilt."""
FIGURES = ("relative_error", "zeros_b1", "zeros_b2", "zeros_both", "bits_per_weight")


LayerReport = dict[str, dict[str, float]]
"""Layer name -> figure -> value."""


def write_layer_report(
    out: Path, teacher_folder: Path, means: Mapping[str, Tensor], trust_remote_code: bool = False
) -> LayerReport:
    """Compare an fdb artifact with the teacher's weights and write its layers.json.

    Args:
        out: the artifact's folder.
        teacher_folder: safetensors under module names.
        means: layer name -> mean square of each input, which weighs the errors; equal when absent.
        trust_remote_code: let transformers run code that comes with the model.
    """
    student, teacher = PackedFolder(out), TensorFolder(teacher_folder)
    model = empty_model(load_config(teacher_folder, trust_remote_code), trust_remote_code)
    quantized = set(student.layer_names())
    report: LayerReport = {}
    for name, module in find_blocks(model).linear_layers():
        if name in quantized:
            in_features, _ = layer_shape(module)
            matrix = matrix_of(module, teacher.get(f"{name}.weight")).to(torch.float32)
            report[name] = layer_figures(student.layer(name, in_features), matrix, means.get(name))
    write_json(out / LAYER_REPORT, report)
    return report


def show_layers(report: LayerReport, progress: Progress) -> None:
    """Show the report as a table."""
    rows = [(name, *(layer[figure] for figure in FIGURES)) for name, layer in report.items()]
    progress.table("layers", ("layer", *(f.replace("_", " ") for f in FIGURES)), rows)


def over_all_layers(report: LayerReport) -> LayerMetrics:
    """The figures over all layers, weighted by their size."""
    total = sum(layer["weights"] for layer in report.values())

    def mean(figure: str) -> float:
        return round(sum(layer[figure] * layer["weights"] for layer in report.values()) / total, 6)

    return {
        "layers": len(report),
        "weights": int(total),
        "relative_error": mean("relative_error"),
        "zeros_b1": mean("zeros_b1"),
        "zeros_b2": mean("zeros_b2"),
        "zeros_both": mean("zeros_both"),
        "bits_per_weight": mean("bits_per_weight"),
    }


def note_coarse_layers(report: LayerReport, progress: Progress) -> None:
    """Tell which layers have rows whose range is too wide for the codes of their scales."""
    names = [name for name, layer in report.items() if layer["coarse_groups"] > _MANY_COARSE]
    if names:
        progress.note(
            f"{len(names)} layers, {names[0]} first, have rows whose groups differ so much in size "
            "that small ones are stored with few digits: leave them out with --exclude, or use "
            "--levels plain"
        )


def _coarse_share(quantized: QuantizedMatrix, matrix: Tensor) -> Tensor:
    """Share of the groups whose scales have few digits; those of zeros have none to lose."""
    used = to_groups(matrix, quantized.group_size).abs().amax(-1) > 0
    coarse = quantized.scheme.coarse_groups(quantized.scales)
    return (coarse & used).to(torch.float32).mean()


def layer_figures(
    quantized: QuantizedMatrix, matrix: Tensor, importance: Tensor | None
) -> dict[str, float]:
    """What layers.json says of a layer.

    Args:
        quantized: planes and scales.
        matrix: full-precision weights, float32 `[out, in]`.
        importance: weight of each input `[in]`; equal when absent.
    """
    weights = torch.ones(matrix.shape[-1]) if importance is None else importance
    error = ((quantized.dense() - matrix).square() * weights).sum()
    counts = count_planes(quantized)
    zeros_both = counts.weights - counts.ones_b1 - counts.ones_b2 + counts.ones_both
    figures: dict[str, float | Tensor] = {
        "relative_error": error / (matrix.square() * weights).sum().clamp(min=1e-30),
        "zeros_b1": 1 - counts.ones_b1 / counts.weights,
        "zeros_b2": 1 - counts.ones_b2 / counts.weights,
        "zeros_both": zeros_both / counts.weights,
        "bits_per_weight": stored_bits(quantized) / counts.weights,
        "coarse_groups": _coarse_share(quantized, matrix),
        "weights": counts.weights,
    }
    return {key: round(float(value), 6) for key, value in figures.items()}

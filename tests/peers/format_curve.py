"""Square error against real bits per weight, for every way to store scales that was thought of.

    python tests/peers/format_curve.py MODEL CALIBRATION

MODEL is a folder with safetensors, CALIBRATION an artifact, whose input statistics weigh the
errors. The start `als` alone, without training: relative error of unit normal weights, and of some
rows of every projection of the model. `offset` adds a free level per group, beta, stored like the
scales.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.groups import from_groups, to_groups
from dbllm_cli.fdb.quantized import quantize_matrix
from dbllm_cli.fdb.scales import decode_scales, encode_scales

FORMATS = [
    *((form, size) for form in ("float16", "float8") for size in (32, 64, 128)),
    *((form, size) for form in ("tied", "offset float16", "offset float8") for size in (64, 128)),
]
ALTERNATIONS = 6
Part = tuple[Tensor, Tensor]
"""Rows of a matrix and the importance of its inputs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="of each projection")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    normal = torch.randn(256, 1536, generator=torch.Generator().manual_seed(0))
    parts = list(model_parts(options.model, options.calibration, options.rows))
    print("| scales | group size | bits | normal weights | the model's |\n|---|---|---|---|---|")
    for form, size in FORMATS:
        own = relative_error([(normal, torch.ones(1536))], form, size)
        bits = mean_bits(parts, form, size)
        print(f"| {form} | {size} | {bits:.3f} | {own:.4f} |", end=" ", flush=True)
        print(f"{relative_error(parts, form, size):.4f} |", flush=True)


def model_parts(model: Path, calibration: Path, rows: int) -> Iterator[Part]:
    means = load_file(calibration / "statistics.safetensors")
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                layer = name.removesuffix(".weight")
                if layer in means:
                    yield file.get_tensor(name)[:rows].float(), means[layer]


def relative_error(parts: list[Part], form: str, size: int) -> float:
    """Mean over the matrices."""
    shares = []
    for matrix, importance in parts:
        difference = rounded(matrix, importance, form, size) - matrix
        error = (difference.square() * importance).sum()
        shares.append(float(error / (matrix.square() * importance).sum()))
    return sum(shares) / len(shares)


def rounded(matrix: Tensor, importance: Tensor, form: str, size: int) -> Tensor:
    if form.startswith("offset"):
        return rounded_with_offset(matrix, importance, form.removeprefix("offset "), size)
    tied = form == "tied"
    quantized = quantize_matrix(
        matrix, fit_scales(matrix, size, "als", importance, tied), size, tied
    )
    if form == "float8":
        alpha = decode_scales(*encode_scales(quantized.alpha))
        return type(quantized)(quantized.weight, alpha, matrix.shape[1], size).dense()
    return quantized.dense()


def rounded_with_offset(matrix: Tensor, importance: Tensor, form: str, size: int) -> Tensor:
    """Alternate the fit of planes and scales with the best offset of every group."""
    weights = to_groups(importance, size)
    total = weights.sum(-1, keepdim=True).clamp(min=1e-30)
    spread = to_groups(matrix, size).square().mean(-1, keepdim=True).sqrt()
    best, best_error = matrix, torch.inf
    for start in (-0.4, 0.0, 0.4):
        offset = start * spread
        for _ in range(ALTERNATIONS):
            spread_out = from_groups(offset.expand_as(to_groups(matrix, size)), matrix.shape[1])
            dense = rounded(matrix - spread_out, importance, form, size) + spread_out
            error = float(((dense - matrix).square() * importance).sum())
            if error < best_error:
                best, best_error = dense, error
            residual = to_groups(matrix - dense, size) * weights
            offset = offset + residual.sum(-1, keepdim=True) / total
    return best


def mean_bits(parts: list[Part], form: str, size: int) -> float:
    """Bits per weight over whole matrices of these widths."""
    numbers = {"tied": 1}.get(form, 3 if form.startswith("offset") else 2)
    bits = weights = 0.0
    for matrix, _ in parts:
        width = matrix.shape[1]
        groups = -(-width // size)
        each = 8 if form.endswith("float8") else 16
        bits += 2 * width + groups * numbers * each + (16 if each == 8 else 0)
        weights += width
    return bits / weights


if __name__ == "__main__":
    main()

"""Square error against real bits per weight, for every kind of levels and several group sizes.

    python tests/peers/format_curve.py MODEL CALIBRATION

MODEL is a folder with safetensors, CALIBRATION an artifact, whose input statistics weigh the
errors. The start `als` alone, without training: relative error of unit normal weights, and of some
rows of every projection of the model.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import QuantizedMatrix, quantize_matrix, stored_bits

KINDS: tuple[str, ...] = ("plain", "tied", "offset")
GROUP_SIZES = (32, 64, 128)
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
    print("| levels | group size | bits | normal weights | the model's |\n|---|---|---|---|---|")
    for kind in KINDS:
        for size in GROUP_SIZES:
            _, own = bits_and_error([(normal, torch.ones(1536))], kind, size)
            bits, error = bits_and_error(parts, kind, size)
            print(f"| {kind} | {size} | {bits:.3f} | {own:.4f} | {error:.4f} |", flush=True)


def model_parts(model: Path, calibration: Path, rows: int) -> Iterator[Part]:
    means = load_file(calibration / "statistics.safetensors")
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                layer = name.removesuffix(".weight")
                if layer in means:
                    yield file.get_tensor(name)[:rows].float(), means[layer]


def bits_and_error(parts: list[Part], kind: str, size: int) -> tuple[float, float]:
    """Bits per weight, and the relative error, a mean over the matrices."""
    shares = []
    bits = weights = 0
    for matrix, importance in parts:
        quantized = rounded(matrix, importance, kind, size)
        error = ((quantized.dense() - matrix).square() * importance).sum()
        shares.append(float(error / (matrix.square() * importance).sum()))
        bits += stored_bits(quantized)
        weights += matrix.numel()
    return bits / weights, sum(shares) / len(shares)


def rounded(matrix: Tensor, importance: Tensor, kind: str, size: int) -> QuantizedMatrix:
    return quantize_matrix(matrix, fit_scales(matrix, size, "als", importance, kind), size, kind)


if __name__ == "__main__":
    main()

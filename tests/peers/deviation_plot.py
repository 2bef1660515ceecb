"""Draws the observation behind DAD: how far predictions stray, by the entropy of the teacher's.

    python tests/peers/deviation_plot.py TEACHER CALIBRATION docs/deviation.svg \
        --students "start=artifacts/fdb-…" "KD=artifacts/fdb-…" "DAD=artifacts/fdb-…"

TEACHER is a model folder; the tokens are the calibration's held-out part. The deviation is the
divergence KL(teacher || student) in nats, its mean in each tenth of the tokens, sorted by entropy.
Needs matplotlib; `--json` writes the figures.
"""

import argparse
import json
from pathlib import Path

import torch
from line_plot import named_axis, save_plot
from safetensors.torch import load_file
from torch import Tensor

from dbllm_cli.kernels import can_distil, distillation_terms
from dbllm_cli.llm.heads import final_hidden, head
from dbllm_cli.llm.models import Model, load_model

PARTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("plot", type=Path)
    parser.add_argument("--students", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens = load_file(options.calibration / "tokens.safetensors")["held_out"].long()
    teacher = load_model(options.teacher, torch.float32)
    lines: dict[str, dict[str, list[float]]] = {}
    for student in options.students:
        name, folder = student.split("=", 1)
        entropies, deviations = figures(teacher, load_model(Path(folder), torch.float32), tokens)
        order = entropies.argsort()
        lines[name] = {
            "entropy": [float(part.mean()) for part in entropies[order].tensor_split(PARTS)],
            "deviation": [float(part.mean()) for part in deviations[order].tensor_split(PARTS)],
        }
        print(name, *(f"{value:.3f}" for value in lines[name]["deviation"]))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2))
    draw(lines, options.plot)


@torch.no_grad()
def figures(teacher: Model, student: Model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's entropy and the deviation of every token, nats."""
    to_student, to_teacher = head(student), head(teacher)
    parts = []
    for row in tokens.split(1):
        logits = (
            to_student(final_hidden(student, row)[0]),
            to_teacher(final_hidden(teacher, row)[0]),
        )
        if not can_distil(*logits):
            raise SystemExit("the models differ in vocabulary, or the kernels are not compiled")
        cross, entropy, *_ = distillation_terms(*logits, gradient=False)
        parts.append(torch.stack((entropy, cross - entropy)))
    entropies, deviations = torch.cat(parts, 1)
    return entropies, deviations


def draw(lines: dict[str, dict[str, list[float]]], plot: Path) -> None:
    axis = named_axis(
        "entropy of the teacher's prediction, nats", "deviation, KL(teacher || student), nats"
    )
    for name, line in lines.items():
        axis.plot(line["entropy"], line["deviation"], marker="o", markersize=4, label=name)
    axis.set_ylim(bottom=0)
    save_plot(axis, plot)


if __name__ == "__main__":
    main()

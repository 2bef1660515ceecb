"""Draws perplexity by bits per weight, a line for every kind of levels.

    python tests/peers/bits_plot.py pipelines/smollm2-135m-bits.yaml docs/bits.svg

Reads the store that `dbllm run PIPELINE` filled (DBLLM_STORE), as far as it came, and of its steps
those that are named LEVELS-GROUP_SIZE. Needs matplotlib; prints the figures as a Markdown table.
"""

import argparse
import re
from pathlib import Path

from line_plot import named_axis, save_plot
from pipeline_table import Steps, read_steps, row

Points = dict[str, list[tuple[float, float]]]
"""Bits and perplexity, by the kind of levels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline")
    parser.add_argument("plot", type=Path)
    options = parser.parse_args()
    print(row("levels", "group size", "bits", "perplexity"))
    print("|---" * 4 + "|")
    draw(points(read_steps(options.pipeline)), options.plot)


def points(steps: Steps) -> Points:
    """Of every step that is evaluated, printed on the way."""
    found: Points = {}
    perplexity_of = {
        step["lineage"]["inputs"]["model"]: step["metrics"]["perplexity"]
        for step in steps.values()
        if step["lineage"]["stage"] == "eval-ppl"
    }
    for name, step in steps.items():
        parts = re.fullmatch(r"(\w+)-(\d+)", name)
        if parts and step["digest"] in perplexity_of:
            levels, group_size = parts.groups()
            bits, perplexity = step["metrics"]["bits_per_weight"], perplexity_of[step["digest"]]
            print(row(levels, group_size, f"{bits:.3f}", f"{perplexity:,.2f}"))
            found.setdefault(levels, []).append((bits, perplexity))
    return found


def draw(points: Points, plot: Path) -> None:
    axis = named_axis("bits per quantized weight, scales included", "perplexity")
    for levels, line in points.items():
        axis.plot(*zip(*sorted(line), strict=True), marker="o", markersize=4, label=levels)
    axis.set_yscale("log")
    save_plot(axis, plot)


if __name__ == "__main__":
    main()

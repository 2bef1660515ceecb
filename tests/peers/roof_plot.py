"""Draws the share of the read bandwidth that each product reaches, from kernel_bench's figures.

    python tests/peers/roof_plot.py kernel.json docs/kernel-roof.svg

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

NAMES = {
    "avx512": "dbllm, AVX-512",
    "avx2": "dbllm, AVX2",
    "Q2_K": "llama.cpp Q2_K",
    "Q2_K repacked": "llama.cpp Q2_K, repacked",
}
COLORS = ("#1b6ca8", "#7fb3d5", "#e59866", "#a04000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("plot", type=Path)
    options = parser.parse_args()
    rows = [row for row in json.loads(options.figures.read_text()) if row["batch"] == 1]
    threads = sorted({row["threads"] for row in rows})
    mpl.rcParams["svg.hashsalt"] = "dbllm"  # the same bytes for the same figures
    figure, axes = plt.subplots(1, len(threads), figsize=(11, 4.2), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], threads, strict=True):
        draw(axis, [row for row in rows if row["threads"] == count])
        axis.set_title("1 thread" if count == 1 else f"{count} threads")
    axes[0][0].set_ylabel("share of the read bandwidth")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), fontsize=8, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    options.plot.parent.mkdir(exist_ok=True)
    figure.savefig(options.plot, metadata={"Date": None})


def draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    width = 0.8 / len(NAMES)
    for place, ((name, label), color) in enumerate(zip(NAMES.items(), COLORS, strict=True)):
        shares = [row["roof"].get(name, 0) for row in rows]
        centers = [shape + (place - (len(NAMES) - 1) / 2) * width for shape in range(len(rows))]
        axis.bar(centers, shares, width, label=label, color=color)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [f"{row['out']}×{row['in']}" for row in rows], rotation=30)


if __name__ == "__main__":
    main()

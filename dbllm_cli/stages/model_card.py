"""The README.md of a packed model: lineage, size and the figures of its evaluations."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from dbllm_cli.stages.comparison import (
    EvalResult,
    TasksResult,
    accuracy,
    comparable_groups,
    paired_accuracy,
    paired_difference,
)
from dbllm_cli.store import Artifact


def model_card(fdb: Artifact, evals: Sequence[Artifact], sizes: dict[str, Any]) -> str:
    """The model card.

    Args:
        fdb: the artifact that was packed.
        evals: eval and tasks artifacts; only results of the same settings and data share a table.
        sizes: metrics of the pack.
    """
    lineage = fdb.manifest["lineage"]
    bits = sizes["bits_per_quantized_weight"]
    title = ["tags: [dbllm, 2-bit]", "---", f"# A model of {bits} bits per quantized weight"]
    if sizes["format"] == "dense":
        title = ["tags: [dbllm]", "---", f"# A model trained at {bits} bits, as plain bfloat16"]
    lines = [
        "---",
        "library_name: transformers",
        *title,
        "",
        "Made by `dbllm` with the DB-LLM method (arXiv 2402.11960).",
        "",
        *_how_to_load(sizes["format"]),
        "## Size",
        "",
        f"- {sizes['quantized_weights']:,} quantized weights, {bits} bits each when packed",
        f"- {sizes['weight_bytes']:,} bytes of tensors in all",
        *_embeddings(sizes["embeddings"]),
        *_levels(sizes["levels"]),
        "",
        "## Made by",
        "",
        "```json",
        json.dumps(lineage, indent=2, sort_keys=True),
        "```",
        "",
        *_perplexities(EvalResult.read(each) for each in evals if each.kind == "eval"),
        *_accuracies(TasksResult.read(each) for each in evals if each.kind == "tasks"),
    ]
    return "\n".join(lines) + "\n"


def _embeddings(kind: str) -> list[str]:
    if kind == "kept":
        return []
    return ["- embeddings and output layer in 8 bits; the figures of an fdb are from before that"]


def _levels(kind: str) -> list[str]:
    notes = {
        "offset": "- two scales and an offset per group, in 16 bits, and 8 bits a row",
        "tied": "- one scale per group, levels -d, 0, d and 2d",
    }
    return [notes[kind]] if kind in notes else []


def _how_to_load(format_name: str) -> list[str]:
    needed = ["import dbllm_cli.hf"] if format_name == "packed" else []
    return [
        "```python",
        *needed,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
    ]


def _perplexities(results: Iterable[EvalResult]) -> list[str]:
    lines: list[str] = []
    for group in comparable_groups(results):
        lines += [
            f"## Perplexity: {group[0].what}",
            "",
            "| model | perplexity | ln, against the first row (paired standard error) |",
            "|---|---|---|",
        ]
        for result in group:
            difference, error = paired_difference(result, group[0])
            compared = f"{difference:+.4f} ± {error:.4f}" if result is not group[0] else ""
            lines.append(
                f"| {result.kind} `{result.model}` | {result.perplexity:.3f} | {compared} |"
            )
        lines.append("")
    return lines


def _accuracies(results: Iterable[TasksResult]) -> list[str]:
    lines: list[str] = []
    for group in comparable_groups(results):
        models = [f"{result.kind} `{result.model}`" for result in group]
        lines += [
            f"## Accuracy: {group[0].what}",
            "",
            "With standard errors; in parentheses the difference to the first model, paired.",
            "",
            f"| task | {' | '.join(models)} |",
            "|---|" + "---|" * len(group),
        ]
        for task, metrics in group[0].scores.items():
            for metric in metrics:
                columns = [result.scores[task][metric] for result in group]
                cells = [_accuracy_cell(column, columns[0]) for column in columns]
                lines.append(f"| {task}, {metric} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _accuracy_cell(scores: tuple[float, ...], first: tuple[float, ...]) -> str:
    mean, error = accuracy(scores)
    cell = f"{mean:.4f} ± {error:.4f}"
    if scores is first:
        return cell
    difference, paired_error = paired_accuracy(scores, first)
    return f"{cell} ({difference:+.4f} ± {paired_error:.4f})"

"""The README.md of a packed model: lineage, size and the figures of its evaluations."""

import json
from collections.abc import Sequence

from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.schemes import open_scheme
from dbllm_cli.formats import Format
from dbllm_cli.records.evaluation import (
    EvalResult,
    Result,
    TasksResult,
    accuracy,
    comparable_groups,
    paired_accuracy,
    paired_difference,
)
from dbllm_cli.records.metrics import PackMetrics
from dbllm_cli.store import Artifact


def model_card(
    fdb: Artifact, evals: Sequence[Artifact], sizes: PackMetrics, written: Format
) -> str:
    """The model card.

    Args:
        fdb: the artifact that was packed.
        evals: eval and tasks artifacts; only results of the same settings and data share a table.
        sizes: metrics of the pack.
        written: the format of the folder.

    Raises:
        ConfigError: figures of other models alone.
    """
    lineage = fdb.manifest["lineage"]
    bits = sizes["bits_per_quantized_weight"]
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{', '.join(written.tags)}]",
        "---",
        f"# {written.title(bits)}",
        "",
        "Made by `dbllm` with the DB-LLM method (arXiv 2402.11960).",
        "",
        *_how_to_load(written),
        "## Size",
        "",
        f"- {sizes['quantized_weights']:,} quantized weights, {bits} bits each when packed",
        f"- {sizes['weight_bytes']:,} bytes of tensors in all",
        *_rounded_since(written, has_figures=bool(evals)),
        *_levels(sizes["levels"]),
        "",
        "## Made by",
        "",
        "```json",
        json.dumps(lineage, indent=2, sort_keys=True),
        "```",
        "",
        *_perplexities([EvalResult.read(each) for each in evals if each.kind == "eval"], fdb),
        *_accuracies([TasksResult.read(each) for each in evals if each.kind == "tasks"], fdb),
    ]
    return "\n".join(lines) + "\n"


def _rounded_since(written: Format, has_figures: bool) -> list[str]:
    if written.rounded is None:
        return []
    before = "; the figures below are from before that" if has_figures else ""
    return [f"- {written.rounded}{before}"]


def _groups(results: list[Result], fdb: Artifact) -> list[list[Result]]:
    """Results that may stand side by side; in each group is one of this model.

    Raises:
        ConfigError: there is none, as where another model's evaluation was given.
    """
    groups = comparable_groups(results)
    for group in groups:
        if all(result.model != fdb.digest[:12] for result in group):
            others = ", ".join(f"{result.kind} {result.model}" for result in group)
            raise ConfigError(
                f"the figures '{group[0].what}' are of {others} alone, not of {fdb.path}",
                f"evaluate {fdb.path} with the same settings and give that too",
            )
    return groups


def _name(result: EvalResult | TasksResult, fdb: Artifact) -> str:
    roles = {fdb.record.lineage.inputs.get("model", "")[:12]: "teacher", fdb.digest[:12]: "this"}
    return f"{roles.get(result.model, 'another')} {result.kind} `{result.model}`"


def _levels(name: str) -> list[str]:
    note = open_scheme(name).note
    return [] if note is None else [f"- {note}"]


def _how_to_load(written: Format) -> list[str]:
    return [
        "```python",
        *written.imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
    ]


def _perplexities(results: list[EvalResult], fdb: Artifact) -> list[str]:
    lines: list[str] = []
    for group in _groups(results, fdb):
        lines += [
            f"## Perplexity: {group[0].what}",
            "",
            "| model | perplexity | ln, against the first row (paired standard error) |",
            "|---|---|---|",
        ]
        for result in group:
            difference, error = paired_difference(result, group[0])
            compared = f"{difference:+.4f} ± {error:.4f}" if result is not group[0] else ""
            lines.append(f"| {_name(result, fdb)} | {result.perplexity:.3f} | {compared} |")
        lines.append("")
    return lines


def _accuracies(results: list[TasksResult], fdb: Artifact) -> list[str]:
    lines: list[str] = []
    for group in _groups(results, fdb):
        models = [_name(result, fdb) for result in group]
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

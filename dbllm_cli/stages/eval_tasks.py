"""eval-tasks: accuracy on tasks of lm-evaluation-harness, with the score of every item."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dbllm_cli.configs import EvalTasksConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.models import load_model, model_folder
from dbllm_cli.llm.tokenizers import load_tokenizer
from dbllm_cli.records.checkpoints import last_checkpoint, save_checkpoint
from dbllm_cli.records.environment import begin_or_resume
from dbllm_cli.records.evaluation import ITEMS, accuracy
from dbllm_cli.records.metrics import TasksMetrics
from dbllm_cli.stages.context import Context, Result
from dbllm_cli.stages.spec import EVAL_TASKS, implements
from dbllm_cli.store import Artifact, digest_of
from dbllm_cli.store.json_file import write_json
from dbllm_cli.tensors import torch_dtype

_CHECKPOINT = "tasks"
_Results = dict[str, dict[str, Any]]


@implements(EVAL_TASKS)
def run(
    config: EvalTasksConfig, inputs: Mapping[str, Artifact], ctx: Context
) -> Result[TasksMetrics]:
    """Make the tasks artifact: items.json beside the metrics.

    Raises:
        ConfigError: the harness is not installed, or a task can't be read or gives no accuracy.
        StageFailedError: the model gives no numbers.
    """
    harness = _harness()
    include_path = None if config.include_path is None else Path(config.include_path)
    tasks = harness.open_tasks(config.tasks, include_path, config.num_fewshot, config.seed)
    environment = begin_or_resume(ctx.scratch, ctx.device, config.compute_dtype, ctx.progress)
    dtype = torch_dtype(environment.compute_dtype)
    results = _finished(ctx)
    left = [name for name in tasks if name not in results]
    if left:
        scorer = _scorer(harness, inputs["model"], dtype, config.batch_size, ctx)
        for name in left:
            found = scorer.score(name, tasks[name], config.limit)
            results[name] = {"scores": found.scores, "data_digest": found.data_digest}
            save_checkpoint(ctx.scratch, _CHECKPOINT, len(results), {}, {"results": results})
    results = {name: results[name] for name in tasks}
    write_json(ctx.out / ITEMS, {name: result["scores"] for name, result in results.items()})
    metrics = _metrics(config, inputs["model"].kind, results)
    _show(metrics, ctx)
    return Result(metrics, environment)


def _harness() -> ModuleType:
    try:
        from dbllm_cli.llm import tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"eval-tasks needs lm-evaluation-harness: {error}",
            "pip install -c constraints.txt -e '.[eval]'",
        ) from error
    return tasks


def _scorer(
    harness: ModuleType, model: Artifact, dtype: torch.dtype, batch_size: int, ctx: Context
) -> Any:
    folder = model_folder(model, ctx.work, ctx.trust_remote_code)
    tokenizer = load_tokenizer(folder, ctx.trust_remote_code)
    loaded = load_model(folder, dtype, ctx.device, ctx.trust_remote_code)
    return harness.TaskScorer(loaded, tokenizer, batch_size, ctx.progress)


def _finished(ctx: Context) -> _Results:
    """The results of the tasks that a killed run had finished."""
    checkpoint = last_checkpoint(ctx.scratch, _CHECKPOINT)
    if checkpoint is None:
        return {}
    results: Any = checkpoint[1]["results"]
    ctx.progress.note(f"going on after the tasks {', '.join(results)}")
    return dict(results)


def _metrics(config: EvalTasksConfig, evaluated: str, results: _Results) -> TasksMetrics:
    tasks: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        figures: dict[str, Any] = {"items": len(next(iter(result["scores"].values())))}
        for metric, scores in result["scores"].items():
            figures[metric], figures[f"{metric}_standard_error"] = accuracy(scores)
        tasks[name] = {**figures, "data_digest": result["data_digest"]}
    first = f", first {config.limit} items" if config.limit else ""
    errors = [task["acc_standard_error"] for task in tasks.values()]
    return {
        "evaluated": evaluated,
        "what": f"{', '.join(config.tasks)}, {config.num_fewshot}-shot{first}",
        "mean_acc": math.fsum(task["acc"] for task in tasks.values()) / len(tasks),
        "mean_acc_standard_error": math.hypot(*errors) / len(tasks),
        "items": sum(task["items"] for task in tasks.values()),
        "tasks": tasks,
        "comparable": digest_of(
            {
                "compute_dtype": config.compute_dtype,
                "data": {name: task["data_digest"] for name, task in tasks.items()},
            }
        ),
    }


def _show(metrics: TasksMetrics, ctx: Context) -> None:
    columns = ("acc", "acc_norm")
    rows = [
        (name, task["items"], *(_cell(task, metric) for metric in columns))
        for name, task in metrics["tasks"].items()
    ]
    mean = {"acc": metrics["mean_acc"], "acc_standard_error": metrics["mean_acc_standard_error"]}
    rows.append(("mean", metrics["items"], *(_cell(mean, metric) for metric in columns)))
    ctx.progress.table("accuracy with its standard error", ("task", "items", *columns), rows)


def _cell(figures: Mapping[str, float | str], metric: str) -> str:
    if metric not in figures:
        return ""
    return f"{figures[metric]:.4f} ± {figures[f'{metric}_standard_error']:.4f}"

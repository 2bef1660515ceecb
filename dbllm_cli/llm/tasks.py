"""Tasks of lm-evaluation-harness, scored item by item. The one module that imports it."""

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dbllm_cli.errors import ConfigError, StageFailedError, first_line
from dbllm_cli.llm.models import Model, Tokenizer
from dbllm_cli.progress import Progress, Task

METRICS = ("acc", "acc_norm")
_SCORED_TYPES = ("multiple_choice", "loglikelihood")
_YAML_SUFFIXES = (".yaml", ".yml")
# (context, continuation), and the tokens of both
_Request = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class TaskScores:
    """What a model got in one task.

    Attributes:
        scores: metric (acc, acc_norm) -> score of every item, 0 or 1, in the task's order.
        data_digest: hex sha256 of every item with its prompts and answers.
    """

    scores: dict[str, list[float]]
    data_digest: str


def open_tasks(
    names: Sequence[str], include_path: Path | None, num_fewshot: int, seed: int
) -> dict[str, Any]:
    """The harness's tasks of these names by name, groups resolved, with their data read.

    Args:
        names: tasks, groups and tags.
        include_path: folder of task files that count beside the harness's own, and before them.
        num_fewshot: solved examples before every item, except where a task forbids them.
        seed: seed of the choice of these.

    Raises:
        ConfigError: no such task, no such folder, a task can't be read or gives no accuracy.
    """
    own = _own_tasks(include_path)
    everything = own
    with _quiet():
        if not set(names) <= set(own.all_tasks):
            everything = TaskManager(include_path=include_path)
        for name in names:
            _require_known(name, everything.all_tasks, own.all_tasks)
        tasks: dict[str, Any] = {}
        for name in names:
            tasks |= _load(name, everything, include_path if name in own.all_tasks else None)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _SCORED_TYPES or "acc" not in task.aggregation():
            raise ConfigError(
                f"task {name} gives no accuracy: it is of type {task.OUTPUT_TYPE} and measures "
                f"{', '.join(task.aggregation())}",
                f"name tasks of type {' or '.join(_SCORED_TYPES)} that measure acc",
            )
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(seed)
    return tasks


def _own_tasks(include_path: Path | None) -> TaskManager:
    """The tasks of the user's folder alone, without the seconds that reading them all takes."""
    if include_path is None:
        return TaskManager(include_defaults=False)
    if not include_path.is_dir():
        raise ConfigError(f"{include_path} is not a folder", "give a folder of task files")
    # The harness leaves out what it can't read.
    for path in sorted(include_path.rglob("*")):
        if path.suffix in _YAML_SUFFIXES:
            try:
                yaml.compose(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{path} is not YAML: {' '.join(str(error).split())}", "correct the file"
                ) from error
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not manager.all_tasks:
        raise ConfigError(
            f"{include_path} holds no task file", "a task file is a .yaml with `task: NAME`"
        )
    return manager


def _require_known(name: str, known: Sequence[str], own: Sequence[str]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, own, n=3) or difflib.get_close_matches(name, known, n=3)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif own:
        hint = f"the folder of task files holds {', '.join(own)}"
    else:
        hint = "see the names with `lm-eval ls tasks`; your own task files need --include-path"
    raise ConfigError(f"lm-evaluation-harness has no task {name!r}", hint)


def _load(name: str, manager: TaskManager, include_path: Path | None) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:
        if include_path is not None:
            hint = f"correct its task file in {include_path}, or the data that it names"
        else:
            hint = "its data come from the Hugging Face hub: is the network there? Task files of "
            hint += "your own with data beside them: --include-path FOLDER"
        raise ConfigError(
            f"task {name} can't be loaded: {type(error).__name__}: {first_line(error)}", hint
        ) from error
    return loaded


class TaskScorer:
    """A model that answers the items of tasks.

    Args:
        model: dense or packed.
        tokenizer: its own.
        batch_size: requests at once.
        progress: where the requests are counted.

    Raises:
        ConfigError: the tokenizer can't begin a text.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, batch_size: int, progress: Progress
    ) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {model.name_or_path} has no token to begin a text with",
                "name its bos_token or eos_token in tokenizer_config.json",
            )
        with _quiet():
            self._model = _ReportingModel(
                progress,
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
            )

    def score(self, name: str, task: Any, limit: int | None) -> TaskScores:
        """Score the items of a task of `open_tasks`, only the first `limit` where it is given.

        Raises:
            ConfigError: the task has no items, or an answer does not fit the model's positions.
            StageFailedError: the model gives no numbers.
        """
        self._model.label = name
        with _quiet() as people:
            self._model.people = people
            results = evaluate(self._model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
        samples = results["samples"][name]
        # The same items come again for every further filter of the answers.
        items = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        scores = {
            metric: [float(item[metric]) for item in items]
            for metric in METRICS
            if metric in items[0]
        }
        content = [[item["doc_hash"], item["arguments"]] for item in items]
        text = json.dumps(content, sort_keys=True)
        return TaskScores(scores, hashlib.sha256(text.encode()).hexdigest())


class _ReportingModel(HFLM):  # type: ignore[misc]
    """The harness's model of transformers with our progress in place of its own bars.

    Attributes:
        label: what is being done.
        people: stderr as it is outside `_quiet`.
    """

    label = ""
    people: Any = None

    def __init__(self, progress: Progress, **options: Any) -> None:
        super().__init__(**options)
        self._progress = progress

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        del disable_tqdm
        with contextlib.redirect_stderr(self.people):
            self._require_room(requests)
            with self._progress.task(self.label, len(requests), unit="requests") as bar:
                self.set_cache_hook(_Counter(bar))
                answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                    requests, disable_tqdm=True, override_bs=override_bs
                )
        if not all(math.isfinite(loss) for loss, _ in answers):
            raise StageFailedError(
                f"{self.model.name_or_path} gives losses that are not finite",
                "evaluate with --compute-dtype float32",
            )
        return answers

    def _require_room(self, requests: list[_Request]) -> None:
        longest = max(len(answer) for _, _, answer in requests)
        shortest = min(len(answer) for _, _, answer in requests)
        if longest > self.max_length or not shortest:
            problem = f"of {longest} tokens; the model has {self.max_length} positions"
            raise ConfigError(
                f"task {self.label} has an answer {problem if shortest else 'of no tokens'}",
                "leave the task out, or take other items with --limit",
            )
        cut = sum(
            len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests
        )
        if cut:
            self._progress.note(
                f"{self.label}: {cut} of {len(requests)} prompts are longer than the model's "
                f"{self.max_length} positions and lose their beginning"
            )


class _Counter:
    """Takes the answers that the harness would cache, and counts them."""

    def __init__(self, bar: Task) -> None:
        self._bar = bar

    def add_partial(self, _kind: str, _request: object, _answer: object) -> None:
        self._bar.advance()


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Keep the harness's bars, prints and advice off the screen; gives the real stderr."""
    people = sys.stderr
    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield people
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dbllm_cli.llm
from dbllm_cli.app import run
from dbllm_cli.errors import ConfigError, StageFailedError
from dbllm_cli.records.evaluation import TasksResult, comparable_groups
from dbllm_cli.store import Artifact
from tests.conftest import SHARED_DATA, Workshop
from tests.stages.conftest import KilledAndResumed, Notes
from tests.stages.task_files import ITEMS, TaskFolder
from tests.test_bad_input import with_changed_tensor

INSTALL = "pip install -c constraints.txt -e '.[eval]'"
SHARED_TASKS = Path(__file__).parents[1] / "tasks"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"needs lm_eval: {INSTALL}"
)


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    (tmp_path / "own").mkdir()
    made = TaskFolder(tmp_path / "own")
    made.add("numbers", ITEMS)
    made.add("more", ITEMS[3:9])
    return made


def log_likelihood(folder: Path) -> Callable[[str, str], tuple[float, bool]]:
    """ln p of a continuation after a context, and whether it is what the model would write."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def of(context: str, continuation: str) -> tuple[float, bool]:
        before = tokenizer(context)["input_ids"]
        ids = tokenizer(context + continuation)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        predictions = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
        target = torch.tensor(ids[len(before) :])
        greedy = bool((predictions.argmax(-1) == target).all())
        return float(predictions.gather(1, target[:, None]).sum()), greedy

    return of


def expected_scores(model: Path, items: list[dict[str, Any]]) -> dict[str, list[float]]:
    score = log_likelihood(model)
    scores: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for item in items:
        losses = np.array([score(item["question"], f" {each}")[0] for each in item["choices"]])
        lengths = np.array([len(each) for each in item["choices"]])
        scores["acc"].append(float(losses.argmax() == item["gold"]))
        scores["acc_norm"].append(float((losses / lengths).argmax() == item["gold"]))
    return scores


def items_of(artifact: Artifact) -> dict[str, dict[str, list[float]]]:
    content: dict[str, dict[str, list[float]]] = json.loads(
        (artifact.path / "items.json").read_text()
    )
    return content


@needs_harness
def test_every_item_is_scored_by_the_likelihood_of_its_choices(
    fresh: Workshop, llama: Artifact, llama_folder: Path, folder: TaskFolder
) -> None:
    outcome = fresh.run("eval-tasks", {"model": llama}, **folder.settings("numbers"))
    expected = expected_scores(llama_folder, ITEMS)
    assert 0 < sum(expected["acc"]) < len(ITEMS)
    assert items_of(outcome.artifact) == {"numbers": expected}
    figures = outcome.metrics["tasks"]["numbers"]
    assert figures["items"] == outcome.metrics["items"] == len(ITEMS)
    for metric, scores in expected.items():
        error = np.std(scores, ddof=1) / len(scores) ** 0.5
        assert figures[metric] == pytest.approx(np.mean(scores))
        assert figures[f"{metric}_standard_error"] == pytest.approx(error)
    assert outcome.metrics["evaluated"] == "model"
    assert outcome.artifact.path.name.startswith("tasks-")


@needs_harness
def test_the_mean_is_over_tasks_and_limit_takes_the_first_items(
    fresh: Workshop, llama: Artifact, llama_folder: Path, folder: TaskFolder
) -> None:
    settings = folder.settings("numbers,more", limit=5)
    metrics = fresh.run("eval-tasks", {"model": llama}, **settings).metrics
    means = [
        np.mean(expected_scores(llama_folder, items[:5])["acc"]) for items in (ITEMS, ITEMS[3:9])
    ]
    assert metrics["mean_acc"] == pytest.approx(np.mean(means))
    assert metrics["items"] == 10
    assert metrics["what"] == "numbers, more, 0-shot, first 5 items"


@needs_harness
def test_solved_examples_change_what_is_asked_and_are_drawn_by_the_seed(
    fresh: Workshop, llama: Artifact, folder: TaskFolder
) -> None:
    folder.add("short", [item | {"question": item["question"][-4:]} for item in ITEMS])
    digests = [
        fresh.run("eval-tasks", {"model": llama}, **folder.settings("short", **settings)).metrics[
            "comparable"
        ]
        for settings in ({}, {"num_fewshot": 1}, {"num_fewshot": 1, "seed": 7})
    ]
    assert len(set(digests)) == 3


@needs_harness
def test_fdb_and_packed_agree_and_equal_inputs_give_equal_bytes(
    workshop: Workshop, fresh: Workshop, start: Artifact, folder: TaskFolder
) -> None:
    settings = folder.settings("numbers", "more")
    packed = workshop.make("pack", {"fdb": start})
    first = fresh.make("eval-tasks", {"model": start}, **settings)
    again = workshop.make("eval-tasks", {"model": start}, **settings)
    assert first.digest == again.digest
    assert items_of(workshop.make("eval-tasks", {"model": packed}, **settings)) == items_of(first)
    int8 = workshop.make("pack", {"fdb": start}, embeddings="int8")
    outcome = workshop.run("eval-tasks", {"model": int8}, **settings)
    assert outcome.metrics["evaluated"] == "packed"


@needs_harness
def test_task_files_count_by_their_bytes_and_not_their_path(
    fresh: Workshop, llama: Artifact, folder: TaskFolder, tmp_path: Path
) -> None:
    inputs = {"model": llama}
    made = fresh.make("eval-tasks", inputs, **folder.settings("more"))
    copied = TaskFolder(shutil.copytree(folder.path, tmp_path / "copied"))
    (copied.path / "__pycache__").mkdir()
    (copied.path / "__pycache__" / "functions.pyc").write_bytes(b"made by Python")
    assert fresh.make("eval-tasks", inputs, **copied.settings("more")).path == made.path
    with (folder.path / "more.jsonl").open("a") as file:
        file.write(json.dumps(ITEMS[0]) + "\n")
    changed = fresh.run("eval-tasks", inputs, **folder.settings("more"))
    assert changed.artifact.path != made.path
    assert changed.metrics["items"] == 7


@needs_harness
def test_a_killed_run_goes_on_with_the_next_task(
    workshop: Workshop,
    fresh: Workshop,
    llama: Artifact,
    folder: TaskFolder,
    killed_and_resumed: KilledAndResumed,
) -> None:
    settings = folder.settings("numbers", "more")
    inputs = {"model": llama}
    resumed = killed_and_resumed("eval-tasks", inputs, ".scratch/*/tasks-1", **settings)
    assert resumed.digest == workshop.make("eval-tasks", inputs, **settings).digest


@needs_harness
def test_the_model_card_holds_the_accuracies_beside_the_teachers(
    workshop: Workshop, llama: Artifact, start: Artifact, folder: TaskFolder
) -> None:
    evals = [
        workshop.make("eval-tasks", {"model": model}, **folder.settings("numbers", **settings))
        for settings in ({}, {"limit": 3})
        for model in (llama, start)
    ]
    inputs = {f"evals.{number}": each for number, each in enumerate(evals)}
    card = (workshop.make("pack", {"fdb": start, **inputs}).path / "README.md").read_text()
    tables = card.split("## Accuracy: ")[1:]
    assert len(tables) == len(comparable_groups(TasksResult.read(each) for each in evals)) == 2
    teacher, student = (np.array(items_of(each)["numbers"]["acc"]) for each in evals[:2])
    difference = student - teacher
    error = difference.std(ddof=1) / len(difference) ** 0.5
    (row,) = (line for line in tables[0].splitlines() if line.startswith("| numbers, acc |"))
    _, first, second = (cell.strip() for cell in row.strip("|").split("|"))
    assert first.startswith(f"{teacher.mean():.4f} ± ")
    assert second.startswith(f"{student.mean():.4f} ± ")
    assert second.endswith(f" ({difference.mean():+.4f} ± {error:.4f})")


@needs_harness
def test_stdout_carries_only_the_path_and_stderr_the_accuracies(
    llama_folder: Path, folder: TaskFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["--include-path", str(folder.path), "--store", str(tmp_path / "store")]
    arguments = ["--tasks", "numbers,more", "--limit", "4", *own]
    assert run(["eval-tasks", str(llama_folder), *arguments]) == 0
    captured = capfd.readouterr()
    (line,) = captured.out.splitlines()
    assert Path(line).joinpath("items.json").is_file()
    words = [line.split()[0] for line in captured.err.splitlines()]
    assert words[:6] == ["numbers:", "more:", "accuracy", "task", "numbers", "more"]
    assert "it/s" not in captured.err
    assert "±" in captured.err


@needs_harness
def test_an_answer_longer_than_the_models_positions_is_told(
    fresh: Workshop, llama: Artifact, folder: TaskFolder
) -> None:
    folder.add("long", [{"question": "Why", "choices": ["x" * 65, "y"], "gold": 0}])
    with pytest.raises(ConfigError, match="long has an answer of 66 tokens; the model has 64"):
        fresh.make("eval-tasks", {"model": llama}, **folder.settings("long"))


@needs_harness
def test_prompts_that_lose_their_beginning_are_counted(
    fresh: Workshop, llama: Artifact, folder: TaskFolder
) -> None:
    long = {"question": "x" * 80, "choices": ["a", "b"], "gold": 0}
    folder.add("long", [*ITEMS[:2], long])
    progress = Notes()
    fresh.run("eval-tasks", {"model": llama}, progress=progress, **folder.settings("long"))
    assert progress.notes[0].startswith("long: 2 of 7 prompts are longer than the model's 64")


@needs_harness
def test_a_model_that_gives_no_numbers_is_told(
    fresh: Workshop, llama: Artifact, folder: TaskFolder, tmp_path: Path
) -> None:
    broken = with_changed_tensor(llama.path, tmp_path / "nan", "model.norm.weight", np.nan)
    with pytest.raises(StageFailedError, match="not finite"):
        fresh.make("eval-tasks", {"model": fresh.model(broken)}, **folder.settings("more"))


def test_without_the_harness_the_error_says_how_to_install_it(
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "dbllm_cli.llm.tasks", raising=False)
    monkeypatch.delattr(dbllm_cli.llm, "tasks", raising=False)
    assert run(["eval-tasks", str(llama_folder), "--store", str(tmp_path / "store")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: eval-tasks needs lm-evaluation-harness" in captured.err
    assert f"hint: {INSTALL}\n" in captured.err


@needs_harness
@pytest.mark.shared_data
def test_the_shared_tasks_are_scored_as_transformers_would(
    workshop: Workshop, stories: Artifact
) -> None:
    settings: dict[str, Any] = {"include_path": str(SHARED_TASKS), "limit": 12}
    names = ["dbllm_piqa", "dbllm_arc_easy", "dbllm_winogrande", "dbllm_lambada"]
    outcome = workshop.run("eval-tasks", {"model": stories}, tasks=names, **settings)
    scored = items_of(outcome.artifact)
    assert {name: set(found) for name, found in scored.items()} == {
        name: {"acc", "acc_norm"} if name in names[:2] else {"acc"} for name in names
    }
    score = log_likelihood(stories.path)
    lines = (SHARED_DATA / "tasks" / "lambada_test.jsonl").read_text().splitlines()[:12]
    texts = [json.loads(line)["text"].rsplit(" ", 1) for line in lines]
    assert scored["dbllm_lambada"]["acc"] == [score(text, f" {word}")[1] for text, word in texts]
    items = (SHARED_DATA / "tasks" / "winogrande_dev.jsonl").read_text().splitlines()[:12]
    for line, right in zip(items, scored["dbllm_winogrande"]["acc"], strict=True):
        item = json.loads(line)
        losses = [score(each, f" {item['continuation']}")[0] for each in item["context_options"]]
        assert right == (losses[item["gold"]] == max(losses))

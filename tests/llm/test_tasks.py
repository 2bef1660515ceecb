import json
import socket
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -c constraints.txt -e '.[eval]'")

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm import tasks
from dbllm_cli.llm.tasks import open_tasks
from tests.llm.conftest import shared_data

OWN = Path(__file__).parents[1] / "tasks"
HARNESS = Path(tasks.evaluate.__code__.co_filename).parent / "tasks"
FIRST = 40


def rows(name: str) -> list[dict[str, Any]]:
    lines = shared_data("tasks", name).read_text().splitlines()[:FIRST]
    return [json.loads(line) for line in lines]


def piqa() -> list[dict[str, Any]]:
    labels = shared_data("tasks", "piqa_valid-labels.lst").read_text().split()
    pairs = zip(rows("piqa_valid.jsonl"), labels, strict=False)
    return [row | {"label": int(label)} for row, label in pairs]


def arc_easy() -> list[dict[str, Any]]:
    return [
        {
            "question": row["question"]["stem"],
            "choices": {
                key: [choice[key] for choice in row["question"]["choices"]]
                for key in ("text", "label")
            },
            "answerKey": row["answerKey"],
        }
        for row in rows("arc_easy_test.jsonl")
    ]


def winogrande() -> list[dict[str, Any]]:
    made = []
    for row in rows("winogrande_dev.jsonl"):
        first, second = row["context_options"]
        pairs = zip(first, second, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        made.append(
            {
                "sentence": f"{first[:same]}_ {row['continuation']}",
                "option1": first[same:],
                "option2": second[same:],
                "answer": str(row["gold"] + 1),
            }
        )
    return made


def lambada() -> list[dict[str, Any]]:
    return rows("lambada_test.jsonl")


def asked(task: Any) -> list[tuple[Any, ...]]:
    """Every prompt with its answer."""
    task.build_all_requests(limit=FIRST)
    return [instance.arguments for instance in task.instances]


def judged(task: Any) -> list[dict[str, Any]]:
    """What the items get for made-up likelihoods."""
    requests = Counter(instance.doc_id for instance in task.instances)
    return [
        task.process_results(
            doc, [(-float((number + choice) % 3), True) for choice in range(requests[number])]
        )
        for number, doc in zip(range(FIRST), task.eval_docs, strict=False)
    ]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "original", "hub_rows"),
    [
        ("dbllm_piqa", "piqa/piqa.yaml", piqa),
        ("dbllm_arc_easy", "arc/arc_easy.yaml", arc_easy),
        ("dbllm_winogrande", "winogrande/default.yaml", winogrande),
        ("dbllm_lambada", "lambada/lambada_openai.yaml", lambada),
    ],
)
def test_our_task_files_ask_and_measure_what_the_harness_does(
    name: str, original: str, hub_rows: Callable[[], list[dict[str, Any]]]
) -> None:
    data = Dataset.from_list(hub_rows())
    config = load_yaml(HARNESS / original) | {
        "custom_dataset": lambda **_: DatasetDict(dict.fromkeys(("test", "validation"), data)),
        "training_split": None,
    }
    config.pop("tag", None)
    theirs = ConfigurableTask(config=config)
    ours = open_tasks([name], OWN, num_fewshot=0, seed=0)[name]
    assert asked(ours) == asked(theirs)
    assert set(ours.aggregation()) == set(theirs.aggregation())
    assert judged(ours) == judged(theirs)


@pytest.fixture(scope="module")
def everything() -> TaskManager:
    return TaskManager()


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch, everything: TaskManager) -> None:
    """Reading all of the harness's task files takes seconds."""

    def manager(include_path: Path | None = None, include_defaults: bool = True) -> TaskManager:
        if include_defaults:
            return everything
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", manager)


def opened(*names: str, include_path: Path | None = None) -> dict[str, Any]:
    return open_tasks(names, include_path, num_fewshot=0, seed=0)


def write_task(folder: Path, name: str, **changes: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text('{"question": "Yes or", "choices": ["no", "yes"], "gold": 0}\n')
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("piqqa", "did you mean piqa"), ("mone", "did you mean mine?"), ("@@", "folder of task")],
)
def test_an_unknown_task_is_told_with_the_nearest_names(
    read_once: None, tmp_path: Path, name: str, hint: str
) -> None:
    write_task(tmp_path, "mine")
    with pytest.raises(ConfigError, match=f"has no task '{name}'") as caught:
        opened(name, include_path=tmp_path)
    assert hint in caught.value.hint


def test_a_task_of_the_hub_without_network_is_told(
    read_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"task piqa can't be loaded: \w+Error: ") as caught:
        opened("piqa")
    assert "is the network there?" in caught.value.hint
    assert "--include-path" in caught.value.hint


def test_a_task_file_of_ones_own_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_task(tmp_path, "mine")
    assert list(opened("mine", include_path=tmp_path)) == ["mine"]


def test_a_group_is_its_tasks(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_task(tmp_path, name)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    assert list(opened("both", "two", include_path=tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "generate_until"}, "is of type generate_until"),
        ({"metric_list": [{"metric": "brier_score"}]}, "measures brier_score"),
        ({"metric_list": [{"metric": "acc_norm"}]}, "measures acc_norm"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}, r"nowhere\.jsonl"),
        ({"test_split": "exam"}, "mine can't be loaded"),
    ],
    ids=["generated", "no-accuracy", "acc-norm-alone", "no-data", "no-split"],
)
def test_a_task_that_can_not_be_used_is_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_task(tmp_path, "mine", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        opened("mine", include_path=tmp_path)
    assert "mine" in caught.value.message


def test_a_folder_without_task_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ConfigError, match="holds no task file"):
        opened("mine", include_path=tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        opened("mine", include_path=tmp_path / "notes.txt")


def test_a_task_file_that_is_not_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    write_task(tmp_path, "mine")
    (tmp_path / "other.yaml").write_text("task: other\nlist: [1\n")
    with pytest.raises(ConfigError, match=r"other\.yaml is not YAML: .* line 2"):
        opened("mine", include_path=tmp_path)


def test_what_a_task_forbids_is_left_at_no_examples(tmp_path: Path) -> None:
    write_task(tmp_path, "free")
    write_task(tmp_path, "never", num_fewshot=0)
    found = open_tasks(["free", "never"], tmp_path, num_fewshot=3, seed=0)
    assert {name: task.config.num_fewshot for name, task in found.items()} == {
        "free": 3,
        "never": 0,
    }

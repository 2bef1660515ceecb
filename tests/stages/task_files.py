"""A folder of tasks for lm-evaluation-harness, with items of a few words."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEMS: list[dict[str, Any]] = [
    {"question": f"Number {number} is", "choices": choices, "gold": number % len(choices)}
    for number, choices in enumerate(
        [["odd", "even, as we know"], ["a", "bc", "def"], ["near", "far away"], ["x", "yy"]] * 4
    )
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@dataclass(frozen=True)
class TaskFolder:
    """A folder of task files, as settings."""

    path: Path

    def add(self, name: str, items: list[dict[str, Any]]) -> None:
        data = self.path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        (self.path / f"{name}.yaml").write_text(TASK.format(name=name, data=data))

    def settings(self, *tasks: str, **others: Any) -> dict[str, Any]:
        return {"tasks": tasks, "include_path": str(self.path)} | others

"""Data of the task files beside this one, wherever the command is run from."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"


def load(data_files: dict[str, str], **_metadata: Any) -> DatasetDict:
    """What `dataset_path: json` with these `data_files` is, from the folder of the shared data."""
    paths = {split: str(FOLDER / name) for split, name in data_files.items()}
    return load_dataset("json", data_files=paths)


def load_piqa(data_files: dict[str, str], labels: str, **_metadata: Any) -> DatasetDict:
    """PIQA, whose labels lie in a file of their own, one a line."""

    def labelled(split: Dataset) -> Dataset:
        return split.add_column("label", [int(line) for line in lines])

    lines = (FOLDER / labels).read_text().split()
    return DatasetDict({name: labelled(split) for name, split in load(data_files).items()})

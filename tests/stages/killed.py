"""A run of a stage that kills itself with -9 as soon as a certain file is in the store.

python -m tests.stages.killed STORE STAGE CONFIG INPUTS GLOB [COUNT]
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dbllm_cli.pipeline.stage import run_stage
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.spec import STAGES
from dbllm_cli.store import Artifact, Store


class _Killer(SilentProgress):
    def __init__(self, root: Path, pattern: str) -> None:
        self._root, self._pattern = root, pattern

    @contextmanager
    def task(
        self, label: str, total: int, done: int = 0, unit: str = "steps"
    ) -> Iterator["_Killer"]:
        yield self

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        if any(self._root.glob(self._pattern)):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    store, stage, config, inputs, pattern = sys.argv[1:]
    torch.set_num_threads(1)
    artifacts = {
        slot: Artifact(Path(given["path"]), given["kind"], given["digest"], given["manifest"])
        for slot, given in json.loads(inputs).items()
    }
    spec = STAGES[stage]
    root = Path(store)
    run_stage(
        spec,
        spec.config(**json.loads(config)),
        artifacts,
        Store(root),
        progress=_Killer(root, pattern),
    )


if __name__ == "__main__":
    main()

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.store import Artifact, Store

Publish = Callable[..., Artifact]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def publish(store: Store) -> Publish:
    """Publish an artifact with the given text; `steps` sets its lineage apart."""

    def make(
        text: str = "content", *, kind: str = "fdb", steps: int = 1, replace: bool = False
    ) -> Artifact:
        staging = store.staging()
        (staging / "inner").mkdir()
        (staging / "inner" / "data.txt").write_text(text)
        (staging / "metrics.json").write_text("{}")
        lineage: dict[str, Any] = {
            "stage": "train",
            "stage_version": 1,
            "config": {"steps": steps},
            "inputs": {},
        }
        return store.publish(staging, kind, lineage, {"seconds": 1.5}, replace=replace)

    return make

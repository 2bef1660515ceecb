from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.configs import StageConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.pipeline.lineage import keyed_config, lineage_of
from dbllm_cli.stages.spec import STAGES, AnyStage
from dbllm_cli.store import Artifact, Store, lineage_key

Stages = dict[str, AnyStage]


def config(stages: Stages, stage: str, **settings: Any) -> StageConfig:
    return stages[stage].config(**settings)


def test_the_lineage_holds_what_differs_from_the_defaults(
    stages: Stages, store: Store, model: Artifact
) -> None:
    spec = stages["gather"]
    assert lineage_of(
        spec, config(stages, "gather", letters=4, mode="fast"), {"model": model}, store
    ) == {
        "stage": "gather",
        "stage_version": 1,
        "config": {"letters": 4},
        "inputs": {"model": model.digest},
    }


def test_a_new_setting_with_its_default_changes_no_key(
    stages: Stages, store: Store, model: Artifact
) -> None:
    spec = stages["gather"]

    class Newer(spec.config):  # type: ignore[misc, name-defined]
        added: int = 7

    def key(settings: StageConfig) -> str:
        return lineage_key(lineage_of(spec, settings, {"model": model}, store))

    assert key(Newer(letters=4)) == key(spec.config(letters=4))
    assert key(Newer(letters=4, added=8)) != key(spec.config(letters=4))


def test_a_package_s_version_is_in_the_key_of_the_stages_that_name_it(
    stages: Stages, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lineage(*packages: str) -> dict[str, Any]:
        spec = replace(stages["gather"], packages=packages)
        return lineage_of(spec, config(stages, "gather"), {}, store)

    versions = {"lm_eval": "0.4.9"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert "packages" not in lineage()
    assert lineage("lm_eval")["packages"] == {"lm_eval": "0.4.9"}
    assert lineage("absent")["packages"] == {"absent": None}
    assert STAGES["eval-tasks"].packages == ("lm_eval",)


def test_a_setting_marked_as_no_part_of_the_key_changes_no_key(
    stages: Stages, store: Store
) -> None:
    keys = {
        lineage_key(lineage_of(stages["train"], config(stages, "train", **settings), {}, store))
        for settings in ({}, {"save_every": 9}, {"steps": 10}, {"steps": 11})
    }
    assert len(keys) == 2


def test_a_named_file_counts_by_its_bytes_not_its_path(
    stages: Stages, store: Store, tmp_path: Path
) -> None:
    def keyed(name: str, text: str) -> dict[str, Any]:
        (tmp_path / name).write_text(text)
        return keyed_config(config(stages, "gather", text=str(tmp_path / name)), store)

    first = keyed("a.txt", "words")
    assert str(tmp_path) not in str(first)
    assert keyed("b.txt", "words") == first
    assert keyed("c.txt", "other") != first
    assert keyed("d.jsonl", "words") != first


def test_a_missing_text_file_is_told(stages: Stages, store: Store, tmp_path: Path) -> None:
    missing = tmp_path / "no.txt"
    with pytest.raises(ConfigError, match=rf"text: {missing} can't be read: no such file"):
        keyed_config(config(stages, "gather", text=str(missing)), store)

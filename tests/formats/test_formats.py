import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from dbllm_cli.app import app
from dbllm_cli.configs import PackConfig
from dbllm_cli.formats import Format, open_format, packed
from dbllm_cli.registry import registered
from dbllm_cli.store import Artifact
from tests.conftest import Workshop


@pytest.mark.parametrize("name", registered("formats"))
def test_every_file_of_the_folder_is_a_format_that_pack_takes(name: str) -> None:
    assert isinstance(open_format(name), Format)
    assert PackConfig(format=name).format == name


def test_the_help_of_pack_says_what_each_format_is() -> None:
    shown = " ".join(CliRunner().invoke(app, ["pack", "--help"]).stdout.split())
    for name, line in registered("formats").items():
        assert f"{name}: {line}" in shown


def test_a_format_decides_on_tensors_config_and_card(
    fresh: Workshop, start: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Renamed(packed.PackedFormat):
        tags = ("mine",)
        rounded = "names in another style"

        def tensors(self, student, trust_remote_code):  # type: ignore[no-untyped-def]
            found = super().tensors(student, trust_remote_code)
            return ((f"mine.{name}", tensor) for name, tensor in found)

        def config(self, config: dict[str, object]) -> dict[str, object]:
            return config | {"mine": True}

        def title(self, bits: float) -> str:
            return f"Mine, of {bits} bits"

    monkeypatch.setattr(packed, "FORMAT", Renamed())
    folder: Path = fresh.make("pack", {"fdb": start}).path
    names = load_file(folder / "model.safetensors")
    assert names
    assert all(name.startswith("mine.") for name in names)
    assert json.loads((folder / "config.json").read_text())["mine"] is True
    card = (folder / "README.md").read_text()
    assert "tags: [mine]" in card
    assert "# Mine, of 2." in card
    assert "- names in another style" in card

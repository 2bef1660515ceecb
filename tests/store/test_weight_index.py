import json
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.store.weight_index import index_name, read_weight_map


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / index_name()


def test_the_file_of_each_tensor_is_read(index: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    assert read_weight_map(index) == weight_map


@pytest.mark.parametrize(
    "content",
    [[], None, {}, *({"weight_map": w} for w in ([], None, 3, "a", {"a": 1}, {"a": None}))],
)
def test_what_is_no_index_is_damage(index: Path, content: Any) -> None:
    index.write_text(json.dumps(content))
    with pytest.raises(ArtifactCorruptError, match="is not an index of shards"):
        read_weight_map(index)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "inner/a", "..", ".", "", "a\0b", "a\\b", "./a"]
)
def test_no_file_lies_elsewhere_than_beside_the_index(index: Path, name: str) -> None:
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtifactCorruptError, match="not the name of a file in its folder") as told:
        read_weight_map(index)
    assert "weight_map.a" in told.value.message

import os
from pathlib import Path

import pytest

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.store import json_file
from dbllm_cli.store.json_file import parse_json, read_json, read_json_object, write_json

HOSTILE = {
    "no JSON": b"{",
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "half a character": b'{"a": ["\\ud800"]}',
    "half a character as a key": b'{"\\udfff": 1}',
    "nested beyond the stack": b"[" * 10**5 + b"]" * 10**5,
    "nested deep": b'{"a":' * 100 + b"1" + b"}" * 100,
    "a number of 5,000 digits": b"9" * 5000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_sound_json_is_damage(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(ArtifactCorruptError, match=r"a\.json can't be read as JSON") as caught:
        read_json(file)
    assert caught.value.exit_code == 5
    assert caught.value.hint


def test_a_larger_file_than_any_real_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"1" + b" " * 1000)
    assert read_json(file) == 1
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(ArtifactCorruptError, match="1,001 bytes; at most 1,000"):
        read_json(file, most_bytes=1000)
    os.truncate(file, 2**30)
    with pytest.raises(ArtifactCorruptError, match=f"at most {json_file._MOST_BYTES:,}"):
        read_json(file)


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(ArtifactCorruptError, match="not a plain file"):
            read_json(tmp_path / name)
    with pytest.raises(ArtifactCorruptError, match="No such file"):
        read_json(tmp_path / "nothing")


def test_an_object_is_told_from_other_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "é", "b": [1, null]}')
    (tmp_path / "b.json").write_text("[]")
    assert read_json_object(tmp_path / "a.json") == {"a": "é", "b": [1, None]}
    with pytest.raises(ArtifactCorruptError, match=r"b\.json is not a JSON object"):
        read_json_object(tmp_path / "b.json")


def test_infinity_is_read_where_models_have_it_and_refused_where_we_write(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    config = read_json(tmp_path / "config.json")
    assert config == {"time_step_limit": [0.0, float("inf")]}
    write_json(tmp_path / "copy.json", config, finite=False)
    assert read_json(tmp_path / "copy.json") == config
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "metrics.json", config)
    for text in (b"[Infinity]", b"NaN", b"1e999"):
        with pytest.raises(ValueError, match="not finite"):
            parse_json(text)

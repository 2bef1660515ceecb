"""`generate` streams the text that a model writes."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.commands.conftest import Call, DbllmCall


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a writer of three words in place of the real one; what it was asked for."""
    request: dict[str, Any] = {}

    def generate_stream(artifact: object, prompt: str, **options: Any) -> Iterator[str]:
        request.update(artifact=artifact, prompt=prompt, **options)
        yield from (prompt, " upon a", " time")

    module = ModuleType("dbllm_cli.llm.generation")
    module.generate_stream = generate_stream  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return request


def test_stdout_carries_the_text_alone(dbllm: DbllmCall, model: str, asked: dict[str, Any]) -> None:
    result = dbllm("generate", "model", "--prompt", "Once")

    assert result.code == 0
    assert result.out == "Once upon a time\n"
    assert result.err == ""


def test_options_reach_the_writer(dbllm: DbllmCall, model: str, asked: dict[str, Any]) -> None:
    dbllm(
        *("generate", "model", "--prompt", "Hi", "--chat", "--max-new-tokens", "5", "--seed", "3"),
        *("--temperature", "0.7", "--top-k", "40", "--dtype", "bfloat16", "--device", "cuda"),
    )

    asked.pop("work")
    assert asked.pop("artifact").kind == "model"
    assert asked == {
        "prompt": "Hi", "chat": True, "max_new_tokens": 5, "temperature": 0.7, "top_k": 40,
        "seed": 3, "device": "cuda", "dtype": "bfloat16", "trust_remote_code": False,
    }  # fmt: skip


def test_an_artifact_writes_too(
    dbllm: DbllmCall, model: str, stage_calls: list[Call], asked: dict[str, Any]
) -> None:
    packed = dbllm("pack", dbllm("init-fdb", "model").path).path

    assert dbllm("generate", packed, "--prompt", "Once").code == 0
    assert asked["artifact"].kind == "packed"


def test_a_packed_model_with_one_changed_byte_writes_nothing(
    dbllm: DbllmCall, model: str, stage_calls: list[Call], asked: dict[str, Any]
) -> None:
    packed = dbllm("pack", dbllm("init-fdb", "model").path).path
    path = Path(packed, "result.txt")
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    result = dbllm("generate", packed, "--prompt", "Once")

    assert result.code == 5
    assert "result.txt has the right size but other bytes" in result.err
    assert f"dbllm verify {packed}" in result.err
    assert not asked


def test_a_model_that_is_not_there_ends_with_4(dbllm: DbllmCall, asked: dict[str, Any]) -> None:
    result = dbllm("generate", "nowhere", "--prompt", "Once")

    assert result.code == 4
    assert "nowhere" in result.err
    assert not asked


def test_a_prompt_is_needed(dbllm: DbllmCall, model: str) -> None:
    result = dbllm("generate", "model")

    assert result.code == 2
    assert "--prompt" in result.err

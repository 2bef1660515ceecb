"""A setting without effect is refused, by the mark at its field."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from dbllm_cli.configs import Needs, StageConfig
from dbllm_cli.stages.spec import STAGES

REVISION = "0" * 40
WITHOUT_EFFECT = [
    ("calibrate", {"source": "text", "text": "x", "temperature": 2.0}, "source generate"),
    ("calibrate", {"source": "text", "text": "x", "top_k": 3}, "source generate"),
    ("calibrate", {"source": "text", "text": "x", "greedy_tokens": 3}, "source generate"),
    ("calibrate", {"source": "text", "text": "x", "seed": 3}, "source generate"),
    ("calibrate", {"text_field": "body"}, "text or dataset"),
    ("calibrate", {"documents": ":9"}, "text or dataset"),
    ("calibrate", {"source": "text", "text": "x", "split": "test"}, "dataset"),
    ("calibrate", {"source": "text", "text": "x", "revision": REVISION}, "dataset"),
    (
        "calibrate",
        {"source": "text", "dataset": "x", "revision": REVISION, "separator": "-"},
        "text",
    ),
    ("init-fdb", {"batch_size": 8}, "method gptq"),
    ("init-fdb", {"num_samples": 8}, "method gptq"),
    ("init-fdb", {"compute_dtype": "float32"}, "method gptq"),
    ("init-fdb", {"keep_latents": False}, "method gptq"),
    ("distill", {"gamma": 1.0}, "loss dad"),
    ("distill", {"loss": "ce", "ambiguity": "cross"}, "loss dad"),
    ("distill", {"plain_weight": 0.1}, "loss dad"),
    ("distill", {"latent_lr": 0.1}, "train weights"),
    ("distill", {"keep_latents": True}, "train weights"),
    ("distill", {"unquantized": "frozen", "unquantized_lr": 0.1}, "unquantized norms or all"),
    ("pack", {"format": "dense", "embeddings": "int8"}, "format packed"),
    ("eval-ppl", {"text": "x", "stride": 8}, "protocol strided"),
    ("eval-ppl", {"text": "x", "protocol": "documents", "reading": "raw"}, "protocol gptq or"),
    ("eval-ppl", {"reading": "raw"}, "text or dataset"),
    ("eval-ppl", {"protocol": "documents"}, "text or dataset"),
    ("eval-ppl", {"sequence_length": 8}, "text or dataset"),
    ("eval-ppl", {"text": "x", "split": "train"}, "dataset"),
    ("eval-tasks", {"seed": 3}, "num_fewshot"),
]


@pytest.mark.parametrize(("stage", "settings", "needed"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused_with_what_it_needs(
    stage: str, settings: dict[str, Any], needed: str
) -> None:
    name = list(settings)[-1]
    with pytest.raises(ValidationError, match=f"{name} has no effect: it needs {needed}"):
        STAGES[stage].config(**settings)


def test_the_schema_for_editors_says_what_a_setting_needs() -> None:
    fields = STAGES["eval-ppl"].config.model_json_schema()["properties"]
    assert fields["stride"]["$comment"] == "needs protocol strided"
    assert "needs text or dataset" in fields["reading"]["$comment"]
    assert "needs protocol gptq or strided" in fields["reading"]["$comment"]


def test_every_mark_at_a_field_is_tried_here() -> None:
    marked = {
        (stage, name)
        for stage, spec in STAGES.items()
        for name, field in spec.config.model_fields.items()
        if any(isinstance(mark, Needs) for mark in field.metadata)
    }
    tried = {(stage, list(settings)[-1]) for stage, settings, _ in WITHOUT_EFFECT}
    inherited = {
        ("eval-ppl", name) for name in ("revision", "text_field", "documents", "separator")
    }
    assert marked == tried | inherited


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("init-fdb", {"batch_size": 4, "compute_dtype": "auto"}),
        ("init-fdb", {"method": "gptq", "batch_size": 8}),
        ("distill", {"loss": "dad", "gamma": 1.0}),
        ("distill", {"unquantized": "norms", "unquantized_lr": 0.1}),
        ("eval-tasks", {"num_fewshot": 2, "seed": 3}),
        ("eval-ppl", {"text": "x", "protocol": "strided", "stride": 8}),
    ],
)
def test_a_default_or_a_setting_with_effect_is_taken(stage: str, settings: dict[str, Any]) -> None:
    STAGES[stage].config(**settings)


def test_all_marks_of_a_setting_must_be_met() -> None:
    class Config(StageConfig):
        mode: Literal["fast", "slow"] = "fast"
        file: str | None = None
        size: Annotated[int, Needs(mode="slow"), Needs(file=...)] = 3

    Config(mode="slow", file="x", size=4)
    for settings in ({"mode": "slow"}, {"file": "x"}):
        with pytest.raises(ValidationError, match="size has no effect"):
            Config(**settings, size=4)


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_bounds_on_both_sides(stage: str) -> None:
    schema = STAGES[stage].config.model_json_schema()["properties"]
    for name, field in schema.items():
        for kind in (field, *field.get("anyOf", [])):
            if kind.get("type") in ("integer", "number") and "enum" not in kind:
                assert {"minimum", "exclusiveMinimum"} & set(kind), name
                assert {"maximum", "exclusiveMaximum"} & set(kind), name


def test_a_text_has_a_length_and_a_number_a_field_can_hold() -> None:
    class Config(StageConfig):
        name: str = "x"
        count: int = Field(1, gt=0, le=9)

    for wrong in ({"name": ""}, {"name": "x" * 5000}, {"name": "\udcff"}, {"count": 10**5000}):
        with pytest.raises(ValidationError):
            Config(**wrong)

"""Settings of the stages that measure a model."""

from collections.abc import Collection
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dbllm_cli.configs.base import (
    COMPUTE,
    ComputeDtype,
    InputFile,
    Seed,
    StageConfig,
    TextConfig,
)
from dbllm_cli.errors import ConfigError

_OF_HELD_OUT = ("max_windows", "batch_size", "compute_dtype")
"""Settings that count where the held-out part of a calibration is read."""


class EvalPplConfig(TextConfig):
    """Settings of `eval-ppl`. Without text or dataset it reads the calibration's held-out part."""

    protocol: Literal["gptq", "strided", "documents"] = Field(
        "gptq",
        description="gptq: windows over the joined text; strided: overlapping windows; "
        "documents: windows over documents with BOS, or two newlines, between them",
    )
    reading: Literal["raw", "wikitext-rows"] | None = Field(
        None,
        description="how a split becomes one string: raw (a text file's default), or its rows "
        "joined by two newlines (any other's)",
    )
    split: str = Field("test", description="split of the dataset")
    sequence_length: int = Field(2048, gt=1, description="tokens per window")
    stride: int = Field(512, gt=0, description="strided: tokens between the starts of two windows")
    max_windows: int | None = Field(None, gt=0, description="take only the first windows")
    batch_size: int = Field(1, gt=0, description="windows run at once")
    compute_dtype: ComputeDtype = Field("float32", description=COMPUTE)

    @model_validator(mode="after")
    def _windows_overlap(self) -> "EvalPplConfig":
        if self.protocol == "strided" and self.stride >= self.sequence_length:
            raise ValueError("strided needs a stride below sequence_length")
        if self.protocol == "documents" and self.reading is not None:
            raise ValueError("reading has no effect on the protocol documents")
        return self

    def require_inputs(self, given: Collection[str]) -> None:
        """Refuse no or two things to read, and settings without effect on a held-out part."""
        if self.text is not None or self.dataset is not None:
            if "calibration" in given:
                raise ConfigError(
                    "eval-ppl got both a text and a calibration to read", "give one of them"
                )
            return
        if "calibration" not in given:
            raise ConfigError(
                "eval-ppl got no text, no dataset and no calibration to read",
                "add --text FILE, or give a calibration artifact",
            )
        fields = type(self).model_fields
        for name in fields:
            if name not in _OF_HELD_OUT and getattr(self, name) != fields[name].default:
                raise ConfigError(
                    f"{name} has no effect on the held-out part of a calibration",
                    "leave it out, or add --text FILE in place of the calibration",
                )


class EvalTasksConfig(StageConfig):
    """Settings of `eval-tasks`."""

    tasks: tuple[str, ...] = Field(
        ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"),
        description="names of lm-evaluation-harness tasks or groups, separated by commas",
    )
    include_path: InputFile | None = Field(
        None,
        description="folder of task files of your own, with the data they read; "
        "code that they name with !function runs",
    )
    limit: int | None = Field(None, gt=0, description="take only the first items of every task")
    num_fewshot: int = Field(0, ge=0, description="solved examples before every item")
    batch_size: int = Field(8, gt=0, description="requests run at once")
    compute_dtype: ComputeDtype = Field("float32", description=COMPUTE)
    seed: int = Field(0, ge=0, description="seed of the choice of solved examples")

    @field_validator("tasks")
    @classmethod
    def _one_name_each(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        names = [name.strip() for entry in tasks for name in entry.split(",")]
        if not all(names):
            raise ValueError("a name of a task is empty")
        return tuple(dict.fromkeys(names))


class BenchConfig(StageConfig):
    """Settings of `bench`."""

    prompt_tokens: int = Field(128, gt=0, description="tokens of one prefill")
    decode_tokens: int = Field(16, gt=1, description="tokens of one decode")
    batch_size: int = Field(1, gt=0, description="sequences at once")
    repeats: int = Field(5, gt=0, description="timed runs after one warm-up")
    compute_dtype: ComputeDtype = Field("bfloat16", description=COMPUTE)
    seed: Seed = 0

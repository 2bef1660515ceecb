"""Settings of the stages that measure a model."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dbllm_cli.configs.base import (
    COMPUTE,
    LARGEST_BATCH,
    LONGEST,
    MOST,
    SPLIT,
    ComputeDtype,
    InputFile,
    Needs,
    Seed,
    StageConfig,
    TextConfig,
)
from dbllm_cli.errors import ConfigError

_OF_TEXT = Needs(text=..., dataset=...)
"""Marks what has no effect on the held-out part of a calibration."""


class EvalPplConfig(TextConfig):
    """Settings of `eval-ppl`. Without text or dataset it reads the calibration's held-out part."""

    protocol: Annotated[Literal["gptq", "strided", "documents"], _OF_TEXT] = Field(
        "gptq",
        description="gptq: windows over the joined text; strided: overlapping windows; "
        "documents: windows over documents with BOS, or two newlines, between them",
    )
    reading: Annotated[
        Literal["raw", "wikitext-rows"] | None, _OF_TEXT, Needs(protocol=("gptq", "strided"))
    ] = Field(
        None,
        description="how a split becomes one string: raw (a text file's default), or its rows "
        "joined by two newlines (any other's)",
    )
    split: Annotated[str, Needs(dataset=...)] = Field("test", description=SPLIT)
    sequence_length: Annotated[int, _OF_TEXT] = Field(
        2048, gt=1, le=LONGEST, description="tokens per window"
    )
    stride: Annotated[int, Needs(protocol="strided")] = Field(
        512, gt=0, le=LONGEST, description="tokens between the starts of two windows"
    )
    max_windows: int | None = Field(None, gt=0, le=MOST, description="take only the first windows")
    batch_size: int = Field(1, gt=0, le=LARGEST_BATCH, description="windows run at once")
    compute_dtype: ComputeDtype = Field("float32", description=COMPUTE)

    @model_validator(mode="after")
    def _windows_overlap(self) -> "EvalPplConfig":
        if self.protocol == "strided" and self.stride >= self.sequence_length:
            raise ValueError("strided needs a stride below sequence_length")
        return self

    def require_inputs(self, given: Collection[str]) -> None:
        """Refuse no or two things to read."""
        reads_text = self.text is not None or self.dataset is not None
        if reads_text and "calibration" in given:
            raise ConfigError(
                "eval-ppl got both a text and a calibration to read", "give one of them"
            )
        if not reads_text and "calibration" not in given:
            raise ConfigError(
                "eval-ppl got no text, no dataset and no calibration to read",
                "add --text FILE, or give a calibration artifact",
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
    limit: int | None = Field(
        None, gt=0, le=MOST, description="take only the first items of every task"
    )
    num_fewshot: int = Field(0, ge=0, le=1000, description="solved examples before every item")
    batch_size: int = Field(8, gt=0, le=LARGEST_BATCH, description="requests run at once")
    compute_dtype: ComputeDtype = Field("float32", description=COMPUTE)
    seed: Annotated[Seed, Needs(num_fewshot=...)] = Field(
        0, description="seed of the choice of solved examples"
    )

    @field_validator("tasks")
    @classmethod
    def _one_name_each(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        names = [name.strip() for entry in tasks for name in entry.split(",")]
        if not all(names):
            raise ValueError("a name of a task is empty")
        return tuple(dict.fromkeys(names))


class BenchConfig(StageConfig):
    """Settings of `bench`."""

    prompt_tokens: int = Field(128, gt=0, le=LONGEST, description="tokens of one prefill")
    decode_tokens: int = Field(16, gt=1, le=LONGEST, description="tokens of one decode")
    batch_size: int = Field(1, gt=0, le=LARGEST_BATCH, description="sequences at once")
    repeats: int = Field(5, gt=0, le=MOST, description="timed runs after one warm-up")
    compute_dtype: ComputeDtype = Field("bfloat16", description=COMPUTE)
    seed: Seed = 0

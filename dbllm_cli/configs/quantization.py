"""Settings of the stages that make a quantized model without training it."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from dbllm_cli.configs.base import (
    COMPUTE_OR_AUTO,
    LARGEST_BATCH,
    LONGEST,
    MOST,
    STRONGEST,
    ComputeDtypeOrAuto,
    Needs,
    Seed,
    StageConfig,
    TextConfig,
)
from dbllm_cli.errors import ConfigError
from dbllm_cli.registry import declared, described, registered

if TYPE_CHECKING:
    FormatName = str
    SchemeName = str
else:
    FormatName = Literal[tuple(registered("formats"))]
    SchemeName = Literal[tuple(registered("fdb/schemes"))]


class CalibrateConfig(TextConfig):
    """Settings of `calibrate`."""

    source: Literal["generate", "text"] = Field(
        "generate",
        description="generate: the teacher writes the text itself; text: from text or dataset",
    )
    num_samples: int = Field(128, gt=0, le=MOST, description="number of training sequences")
    sequence_length: int = Field(512, gt=1, le=LONGEST, description="tokens per sequence")
    held_out: int = Field(
        8, ge=0, le=MOST, description="further sequences kept for evaluation, never trained on"
    )
    batch_size: int = Field(
        32, gt=0, le=LARGEST_BATCH, description="sequences generated or run at once"
    )
    temperature: Annotated[float, Needs(source="generate")] = Field(
        1.0, gt=0, le=STRONGEST, description="sampling temperature of generated text"
    )
    top_k: Annotated[int, Needs(source="generate")] = Field(
        50, ge=0, le=MOST, description="sample among the k likeliest tokens; 0: among all"
    )
    greedy_tokens: Annotated[int, Needs(source="generate")] = Field(
        4, ge=0, le=LONGEST, description="tokens taken greedily after the start token"
    )
    compute_dtype: ComputeDtypeOrAuto = Field("auto", description=COMPUTE_OR_AUTO)
    seed: Annotated[Seed, Needs(source="generate")] = 0

    @model_validator(mode="after")
    def _source_has_text(self) -> "CalibrateConfig":
        named = self.text is not None or self.dataset is not None
        if self.source == "text" and not named:
            raise ValueError("source text needs text (a file or folder) or dataset (a name)")
        if self.source == "generate" and named:
            raise ValueError(
                "source generate reads no text: set source to text, or drop text and dataset"
            )
        return self


class InitFdbConfig(StageConfig):
    """Settings of `init-fdb`."""

    method: Literal["als", "gptq", "mse", "paper"] = Field(
        "als",
        description="als: least squares weighted by the calibration; gptq: errors compensated "
        "layer by layer; mse: best step per group; paper: max|w|/2",
    )
    group_size: int = Field(
        64, gt=0, le=LONGEST, multiple_of=8, description="inputs that share their scales"
    )
    levels: SchemeName = Field("offset", description=f"of a group: {described('fdb/schemes')}")
    include: tuple[str, ...] = Field(
        ("*",), description="shell wildcards on module names: linear layers to quantize"
    )
    exclude: tuple[str, ...] = Field(
        (), description="shell wildcards on module names to leave alone"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of the tensors that are not quantized"
    )
    num_samples: Annotated[int | None, Needs(method="gptq")] = Field(
        None, gt=0, le=MOST, description="use only the first sequences of the calibration"
    )
    batch_size: Annotated[int, Needs(method="gptq")] = Field(
        4, gt=0, le=LARGEST_BATCH, description="sequences run at once"
    )
    compute_dtype: Annotated[ComputeDtypeOrAuto, Needs(method="gptq")] = Field(
        "auto", description=COMPUTE_OR_AUTO
    )
    keep_latents: Annotated[bool, Needs(method="gptq")] = Field(
        True, description="store the compensated weights, for reconstruct to go on from"
    )

    @model_validator(mode="after")
    def _method_finds_levels(self) -> "InitFdbConfig":
        methods = declared("fdb/schemes", "METHODS")
        if self.method not in methods[self.levels]:
            finding = ", ".join(name for name, each in methods.items() if self.method in each)
            raise ValueError(
                f"method {self.method} finds no {self.levels} levels: set levels to one of "
                f"{finding}, or method to one of {', '.join(methods[self.levels])}"
            )
        return self

    def require_inputs(self, given: Collection[str]) -> None:
        """Refuse gptq without a calibration."""
        if self.method == "gptq" and "calibration" not in given:
            raise ConfigError(
                "init-fdb by gptq needs a calibration", "dbllm calibrate MODEL, and give its path"
            )


class PackConfig(StageConfig):
    """Settings of `pack`."""

    format: FormatName = Field("packed", description=described("formats"))
    embeddings: Annotated[Literal["kept", "int8"], Needs(format="packed")] = Field(
        "kept", description="int8: embeddings and output layer in 8 bits, one scale per token"
    )
    shard_size: float = Field(5.0, gt=0, le=STRONGEST, description="largest shard, in 10^9 bytes")

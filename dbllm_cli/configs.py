"""One flat, frozen model per stage: the only declaration of every setting.

The YAML file, the command line options, the manifest and the JSON schema are all made from these.
A field's `json_schema_extra` may say `{"file": True}` (a local file or folder that enters the key
by its bytes, not its path) or `{"key": False}` (does not change the result: not in the key).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ComputeDtype = Literal["bfloat16", "float32"]
ComputeDtypeOrAuto = Literal["auto", "bfloat16", "float32"]
InputFile = Annotated[str, Field(json_schema_extra={"file": True})]

_COMPUTE = "dtype of the products"
_COMPUTE_OR_AUTO = _COMPUTE + "; auto: bfloat16 where the device is faster in it, else float32"
_SEED = "seed of everything drawn at random"


class StageConfig(BaseModel):
    """Base of every stage's settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextConfig(StageConfig):
    """Where text comes from: shared by the stages that read text."""

    text: InputFile | None = Field(
        None, description="text, JSONL or parquet file, or a folder of them"
    )
    dataset: str | None = Field(
        None, description="name of a dataset on the hub, NAME or NAME:CONFIG"
    )
    revision: str | None = Field(None, description="commit of the dataset; required with dataset")
    split: str = Field("train", description="split of the dataset")
    text_field: str = Field(
        "text", description="column of JSONL, parquet and datasets with the text"
    )
    documents: str | None = Field(
        None, pattern=r"^\d*:\d*$", description="range START:STOP of the documents to read"
    )
    separator: str | None = Field(
        None, min_length=1, description="string that splits a text file into documents"
    )

    @model_validator(mode="after")
    def _dataset_is_pinned(self) -> "TextConfig":
        if self.text is not None and self.dataset is not None:
            raise ValueError("give text or dataset, not both")
        if self.dataset is not None and self.revision is None:
            raise ValueError(
                "a dataset needs a revision (its commit), so that the run can be repeated"
            )
        return self


class CalibrateConfig(TextConfig):
    """Settings of `calibrate`."""

    source: Literal["generate", "text"] = Field(
        "generate",
        description="generate: the teacher writes the text itself; text: from text or dataset",
    )
    num_samples: int = Field(128, gt=0, description="number of training sequences")
    sequence_length: int = Field(512, gt=1, description="tokens per sequence")
    held_out: int = Field(
        8, ge=0, description="further sequences kept for evaluation, never trained on"
    )
    batch_size: int = Field(32, gt=0, description="sequences generated or run at once")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of generated text")
    top_k: int = Field(50, ge=0, description="sample among the k likeliest tokens; 0: among all")
    greedy_tokens: int = Field(4, ge=0, description="tokens taken greedily after the start token")
    compute_dtype: ComputeDtypeOrAuto = Field("auto", description=_COMPUTE_OR_AUTO)
    seed: int = Field(0, ge=0, description=_SEED)

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
    group_size: int = Field(64, gt=0, multiple_of=8, description="inputs that share their scales")
    levels: Literal["offset", "plain", "tied"] = Field(
        "offset",
        description="of a group: offset: moved by a third number, all in 16 bits; plain: the "
        "paper's, two float16 scales; tied: one, -d, 0, d, 2d as GGUF's Q2_0 has them",
    )
    include: tuple[str, ...] = Field(
        ("*",), description="shell wildcards on module names: linear layers to quantize"
    )
    exclude: tuple[str, ...] = Field(
        (), description="shell wildcards on module names to leave alone"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of the tensors that are not quantized"
    )
    num_samples: int | None = Field(
        None, gt=0, description="gptq: use only the first sequences of the calibration"
    )
    batch_size: int = Field(4, gt=0, description="gptq: sequences run at once")
    compute_dtype: ComputeDtypeOrAuto = Field("auto", description="gptq: " + _COMPUTE_OR_AUTO)
    keep_latents: bool = Field(
        True, description="gptq: store the compensated weights, for reconstruct to go on from"
    )

    @model_validator(mode="after")
    def _method_finds_levels(self) -> "InitFdbConfig":
        if self.levels == "tied" and self.method == "gptq":
            raise ValueError("method gptq has no tied levels: use als, or other levels")
        if self.levels == "offset" and self.method in ("paper", "mse"):
            raise ValueError(f"method {self.method} finds no offset: set levels to plain or tied")
        return self


class TrainConfig(StageConfig):
    """Settings that both training stages share."""

    batch_size: int = Field(4, gt=0, description="sequences per step")
    latent_lr: float = Field(
        1.5e-2, gt=0, description="learning rate of latent weights, times the layer's mean |alpha1|"
    )
    scale_lr: float = Field(
        2e-3, gt=0, description="learning rate of scales, times the layer's mean |alpha1|"
    )
    warmup_steps: int = Field(3, ge=0, description="steps of linear warm-up")
    num_samples: int | None = Field(
        None, gt=0, description="use only the first sequences of the calibration; all when absent"
    )
    keep_latents: bool = Field(True, description="store the latent weights, to train on from them")
    compute_dtype: ComputeDtypeOrAuto = Field("auto", description=_COMPUTE_OR_AUTO)
    seed: int = Field(0, ge=0, description=_SEED)


class ReconstructConfig(TrainConfig):
    """Settings of `reconstruct`."""

    passes: int = Field(2, gt=0, description="passes over the calibration for every block")
    window: Literal[1, 2] = Field(
        2,
        description="2: the output of the next block, in full precision, is matched too, in about "
        "1.5 times the time of 1",
    )
    latent_decay: float = Field(
        1.2,
        ge=0,
        description="latent weights go back towards where they start by this share of the way, "
        "divided by the steps and times the schedule, in every step",
    )
    teacher_inputs: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the tokens that enter a block as the teacher has them, drawn anew in "
        "every step; the others enter as the quantized blocks before it leave them",
    )
    sensitivity_power: float = Field(
        0.3,
        ge=0,
        le=1,
        description="errors of a block's output count, by direction, by its Fisher matrix to this "
        "power; 0: alike",
    )
    position_power: float = Field(
        0.5,
        ge=0,
        le=1,
        description="errors of a token count by how much predictions feel those of its position, "
        "most of all the first, to this power; 0: alike",
    )


class DistillConfig(TrainConfig):
    """Settings of `distill`."""

    train: Literal["scales", "weights"] = Field(
        "scales", description="scales: planes fixed; weights: latent weights and scales"
    )
    loss: Literal["kd", "dad", "ce"] = Field(
        "kd", description="kd: plain distillation; dad: weighted by ambiguity; ce: next token"
    )
    ambiguity: Literal["teacher", "student", "product", "cross"] = Field(
        "teacher", description="dad: teacher's entropy, student's, their product, or cross-entropy"
    )
    gamma: float = Field(0.5, ge=0, description="dad: exponent of the ambiguity")
    plain_weight: float = Field(
        0.0, ge=0, description="dad: lambda, weight of the plain distillation term added to it"
    )
    steps: int = Field(40, gt=0, description="optimizer steps")
    gradient_accumulation: int = Field(1, gt=0, description="batches summed up for one step")
    latent_lr: float = Field(
        4e-3, gt=0, description="learning rate of latent weights, times the layer's mean |alpha1|"
    )
    unquantized: Literal["frozen", "norms", "all"] = Field(
        "all",
        description="what else is trained: norms: vectors outside the quantized layers; all: "
        "embeddings and output layer too, 16 bytes of memory a number",
    )
    unquantized_lr: float = Field(
        1e-3, gt=0, description="learning rate of unquantized parameters, times their mean size"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    eval_every: int = Field(10, gt=0, description="steps between measurements on the held-out part")
    patience: int = Field(0, ge=0, description="stop after so many worse measurements; 0: never")
    save_every: int = Field(
        10, gt=0, description="steps between checkpoints", json_schema_extra={"key": False}
    )
    keep_latents: bool = Field(False, description="store the latent weights, to train on from them")
    recompute: bool = Field(
        True,
        description="run every block again in backward instead of keeping its activations: "
        "less memory, a fifth more time",
        json_schema_extra={"key": False},
    )


class PackConfig(StageConfig):
    """Settings of `pack`."""

    format: Literal["packed", "dense"] = Field(
        "packed",
        description="packed: planes and scales; dense: plain bfloat16 weights for other tools",
    )
    embeddings: Literal["kept", "int8"] = Field(
        "kept", description="int8: embeddings and output layer in 8 bits, one scale per token"
    )
    shard_size: float = Field(5.0, gt=0, description="largest shard, in 10^9 bytes")

    @model_validator(mode="after")
    def _dense_stores_weights_only(self) -> "PackConfig":
        if self.format == "dense" and self.embeddings != "kept":
            raise ValueError("format dense writes plain bfloat16: leave out embeddings int8")
        return self


class EvalPplConfig(TextConfig):
    """Settings of `eval-ppl`. Without text or dataset it reads the calibration's held-out part."""

    protocol: Literal["gptq", "strided", "documents"] = Field(
        "gptq",
        description="gptq: windows over the joined text; strided: overlapping windows; "
        "documents: windows over BOS-separated documents",
    )
    reading: Literal["raw", "wikitext-rows"] = Field(
        "wikitext-rows",
        description="how a split becomes one string: raw, or its rows joined by two newlines",
    )
    split: str = Field("test", description="split of the dataset")
    sequence_length: int = Field(2048, gt=1, description="tokens per window")
    stride: int = Field(512, gt=0, description="strided: tokens between the starts of two windows")
    max_windows: int | None = Field(None, gt=0, description="take only the first windows")
    batch_size: int = Field(1, gt=0, description="windows run at once")
    compute_dtype: ComputeDtype = Field("float32", description=_COMPUTE)

    @model_validator(mode="after")
    def _windows_overlap(self) -> "EvalPplConfig":
        if self.protocol == "strided" and self.stride >= self.sequence_length:
            raise ValueError("strided needs a stride below sequence_length")
        return self


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
    compute_dtype: ComputeDtype = Field("float32", description=_COMPUTE)
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
    compute_dtype: ComputeDtype = Field("bfloat16", description=_COMPUTE)
    seed: int = Field(0, ge=0, description=_SEED)

"""Settings of `reconstruct` and `distill`."""

from typing import Annotated, Literal

from pydantic import Field

from dbllm_cli.configs.base import (
    COMPUTE_OR_AUTO,
    LARGEST_BATCH,
    MOST,
    STRONGEST,
    ComputeDtypeOrAuto,
    Needs,
    Seed,
    StageConfig,
)


class TrainConfig(StageConfig):
    """Settings that both training stages share."""

    batch_size: int = Field(4, gt=0, le=LARGEST_BATCH, description="sequences per step")
    latent_lr: float = Field(
        1.5e-2,
        gt=0,
        le=STRONGEST,
        description="learning rate of latent weights, times the layer's mean |alpha1|",
    )
    scale_lr: float = Field(
        2e-3,
        gt=0,
        le=STRONGEST,
        description="learning rate of scales, times the layer's mean |alpha1|",
    )
    warmup_steps: int = Field(3, ge=0, le=MOST, description="steps of linear warm-up")
    num_samples: int | None = Field(
        None,
        gt=0,
        le=MOST,
        description="use only the first sequences of the calibration; all when absent",
    )
    keep_latents: bool = Field(True, description="store the latent weights, to train on from them")
    compute_dtype: ComputeDtypeOrAuto = Field("auto", description=COMPUTE_OR_AUTO)
    seed: Seed = 0


class ReconstructConfig(TrainConfig):
    """Settings of `reconstruct`."""

    passes: int = Field(1, gt=0, le=1000, description="passes over the calibration for every block")
    window: Literal[1, 2] = Field(
        2,
        description="2: the output of the next block, in full precision, is matched too, in about "
        "1.5 times the time of 1",
    )
    latent_decay: float = Field(
        1.2,
        ge=0,
        le=STRONGEST,
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
    ambiguity: Annotated[Literal["teacher", "student", "product", "cross"], Needs(loss="dad")] = (
        Field(
            "teacher",
            description="dad: teacher's entropy, student's, their product, or cross-entropy",
        )
    )
    gamma: Annotated[float, Needs(loss="dad")] = Field(
        0.5, ge=0, le=STRONGEST, description="dad: exponent of the ambiguity"
    )
    plain_weight: Annotated[float, Needs(loss="dad")] = Field(
        0.0,
        ge=0,
        le=STRONGEST,
        description="dad: lambda, weight of the plain distillation term added to it",
    )
    steps: int = Field(40, gt=0, le=MOST, description="optimizer steps")
    gradient_accumulation: int = Field(
        1, gt=0, le=LARGEST_BATCH, description="batches summed up for one step"
    )
    latent_lr: Annotated[float, Needs(train="weights")] = Field(
        4e-3,
        gt=0,
        le=STRONGEST,
        description="learning rate of latent weights, times the layer's mean |alpha1|",
    )
    unquantized: Literal["frozen", "norms", "all"] = Field(
        "all",
        description="what else is trained: norms: vectors outside the quantized layers; all: "
        "embeddings and output layer too, 16 bytes of memory a number; matrices in the blocks that "
        "are left out of quantizing stay",
    )
    unquantized_lr: Annotated[float, Needs(unquantized=("norms", "all"))] = Field(
        1e-3,
        gt=0,
        le=STRONGEST,
        description="learning rate of unquantized parameters, times their mean size",
    )
    clip: float = Field(1.0, gt=0, le=STRONGEST, description="largest norm of the gradient")
    eval_every: int = Field(
        10, gt=0, le=MOST, description="steps between measurements on the held-out part"
    )
    patience: int = Field(
        0, ge=0, le=MOST, description="stop after so many worse measurements; 0: never"
    )
    save_every: int = Field(
        10, gt=0, le=MOST, description="steps between checkpoints", json_schema_extra={"key": False}
    )
    keep_latents: Annotated[bool, Needs(train="weights")] = Field(
        False, description="store the latent weights, to train on from them"
    )
    recompute: bool = Field(
        True,
        description="run every block again in backward instead of keeping its activations: "
        "less memory, a fifth more time",
        json_schema_extra={"key": False},
    )

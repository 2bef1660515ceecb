"""The calibration artifact: what is in it, and whether it belongs to the model at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.errors import ArtifactMissingError, ConfigError
from dbllm_cli.store import Artifact, read_object
from dbllm_cli.tensors import TensorFolder, save_tensors

_TOKENS, _STATISTICS = "tokens", "statistics"


@dataclass(frozen=True)
class Calibration:
    """Token sequences and the statistics of the teacher's inputs over them.

    Attributes:
        train: int64 `[num_samples, sequence_length]`.
        held_out: int64 `[held_out, sequence_length]`, never trained on.
        input_mean_squares: layer name -> float32 `[in]`.
    """

    train: Tensor
    held_out: Tensor
    input_mean_squares: Mapping[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write tokens (int32) and statistics."""
        tokens = {"train": self.train, "held_out": self.held_out}
        save_tensors(
            {name: ids.to(torch.int32) for name, ids in tokens.items()},
            folder / f"{_TOKENS}.safetensors",
        )
        save_tensors(self.input_mean_squares, folder / f"{_STATISTICS}.safetensors")


def open_calibration(artifact: Artifact, num_samples: int | None = None) -> Calibration:
    """Read a calibration artifact.

    Args:
        artifact: the calibration.
        num_samples: train on so many of its sequences, the first ones; on all when absent.

    Raises:
        ConfigError: it holds fewer.
    """
    tokens = TensorFolder(artifact.path, _TOKENS)
    statistics = TensorFolder(artifact.path, _STATISTICS)
    train = tokens.get("train").to(torch.int64)
    if num_samples is not None and num_samples > len(train):
        raise ConfigError(
            f"calibration {artifact.path} holds {len(train)} sequences to train on, "
            f"fewer than the {num_samples} of num_samples",
            f"use --num-samples {len(train)} or fewer, or calibrate again with more",
        )
    return Calibration(
        train[:num_samples],
        tokens.get("held_out").to(torch.int64),
        dict(statistics.items()),
    )


def require_same_tokenizer(calibration: Artifact, digest: str) -> None:
    """Check that a calibration's tokens mean the same to a model.

    Args:
        calibration: the artifact.
        digest: of the model's tokenizer.

    Raises:
        ArtifactMissingError: they were made by another tokenizer.
    """
    if read_object(calibration, "metrics.json").get("tokenizer_digest") != digest:
        raise ArtifactMissingError(
            f"calibration {calibration.path} was made with another model's tokenizer",
            "give the calibration of this model, or --text FILE",
        )


def require_same_model(inputs: Mapping[str, Artifact]) -> None:
    """Check that the calibration and the student were made from the model given.

    Raises:
        ArtifactMissingError: one was made from another model (the digests differ).
    """
    model = inputs["model"]
    for slot in ("calibration", "student"):
        if slot not in inputs:
            continue
        made_from = inputs[slot].record.lineage.inputs.get("model")
        if made_from != model.digest:
            raise ArtifactMissingError(
                f"{slot} {inputs[slot].path} was made from another model than {model.path} "
                f"(digest {str(made_from)[:12]}, not {model.digest[:12]})",
                "give the model it was made from, or make it again from this model",
            )

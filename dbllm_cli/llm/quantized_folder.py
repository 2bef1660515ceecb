"""Folders of quantized models: an fdb artifact is one, with latent weights beside it.

`<layer>.weight` is uint8 `[2, out, ceil(in / 8)]`; beside it are the scales as the scheme of levels
stores them (`fdb.schemes`), `<layer>.alpha` first. Every other tensor has the model's own name.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.fdb.groups import group_count
from dbllm_cli.fdb.quantized import QuantizedMatrix, latent_start
from dbllm_cli.fdb.schemes import open_scheme
from dbllm_cli.llm.models import copy_other_files
from dbllm_cli.llm.quantizer import packed_settings
from dbllm_cli.store.json_file import read_json_object
from dbllm_cli.tensors import ShardWriter, TensorFolder

LATENTS = "latents"
QuantizedLayer = tuple[str, QuantizedMatrix, Tensor | None]
"""Name, planes and scales, and the latent weights to keep, or None."""


class PackedFolder:
    """The quantized layers of an fdb or packed artifact, read one at a time.

    Raises:
        ArtifactCorruptError: config.json says nothing of dbllm, or a layer has the wrong shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = TensorFolder(folder)
        config = packed_settings(folder)
        if config is None:
            raise ArtifactCorruptError(
                f"{folder / 'config.json'} has no quantization_config of dbllm",
                "make the artifact again: dbllm init-fdb",
            )
        self.group_size = config.group_size
        self.levels = config.levels or "plain"
        self.scheme = open_scheme(self.levels)
        has_latents = any(folder.glob(f"{LATENTS}*.safetensors"))
        self.latents = TensorFolder(folder, LATENTS) if has_latents else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that are not quantized."""
        name = read_json_object(self.folder / "config.json").get("dtype")
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype):
            raise ArtifactCorruptError(
                f"{self.folder / 'config.json'} has the dtype {name}", "make the artifact again"
            )
        return dtype

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether a folder holds planes and scales, not a dense export."""
        return packed_settings(folder) is not None

    def layer_names(self) -> list[str]:
        """Names of the quantized layers, sorted."""
        stems = (n.removesuffix(".alpha") for n in self.tensors.names() if _is_alpha(n))
        return [name for name in stems if f"{name}.weight" in self.tensors]

    def layer(self, name: str, in_features: int) -> QuantizedMatrix:
        """Planes and scales of one layer."""
        weight = self.tensors.get(f"{name}.weight")
        out_features = weight.shape[1]
        groups = group_count(in_features, self.group_size)
        stored = {
            part: self.tensors.get(f"{name}.{part}")
            for part in self.scheme.parts(out_features, groups)
            if f"{name}.{part}" in self.tensors
        }
        has_planes = weight.shape == (2, out_features, -(-in_features // 8))
        if not (has_planes and self.scheme.is_stored(stored, out_features, groups)):
            found = ", ".join(
                f"{part} {tuple(each.shape)} of {each.dtype}" for part, each in stored.items()
            )
            raise ArtifactCorruptError(
                f"layer {name} of {self.folder} has planes {tuple(weight.shape)} and scales "
                f"{found}, which do not fit {in_features} inputs and {self.levels} levels",
                "make the artifact again",
            )
        scales = self.scheme.expand(stored)
        return QuantizedMatrix(weight, scales, in_features, self.group_size, self.levels)

    def latent(self, name: str, quantized: QuantizedMatrix, teacher: Tensor) -> Tensor:
        """Latent weights to train from, float32 `[out, in]`: stored ones, else the teacher's.

        Args:
            name: the layer.
            quantized: its planes and scales.
            teacher: its full-precision matrix `[out, in]`.
        """
        if self.latents is not None and name in self.latents:
            return self.latents.get(name)
        return latent_start(quantized, teacher)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not a plane or a scale."""
        parts = {"weight", *self.scheme.part_names}
        quantized = {f"{name}.{part}" for name in self.layer_names() for part in parts}
        for name in self.tensors.names():
            if name not in quantized:
                yield name, self.tensors.get(name)


def _is_alpha(name: str) -> bool:
    return name.endswith(".alpha")


def layer_tensors(name: str, quantized: QuantizedMatrix) -> list[tuple[str, Tensor]]:
    """A layer's tensors under the names that packed models store."""
    stored = {"weight": quantized.weight} | quantized.scheme.store(quantized.scales)
    return [(f"{name}.{part}", tensor) for part, tensor in stored.items()]


def quantized_config(
    config: dict[str, Any],
    group_size: int,
    kept: Sequence[str],
    dtype: str,
    levels: str = "plain",
) -> dict[str, Any]:
    """config.json of a quantized model: the model's own with `quantization_config` added."""
    own = {key: value for key, value in config.items() if key != "torch_dtype"}
    settings = {
        "quant_method": "dbllm",
        "format_version": open_scheme(levels).format_version,
        "group_size": group_size,
        "modules_to_not_convert": sorted(kept),
    }
    # The first readers knew no other levels and no such setting.
    if levels != "plain":
        settings["levels"] = levels
    return {
        **own,
        "dtype": dtype,
        "quantization_config": settings,
    }


def write_requantized(
    student: PackedFolder,
    out: Path,
    layers: Iterable[QuantizedLayer],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an fdb artifact like `student` with other planes and scales.

    Args:
        student: where all other tensors and files come from.
        out: the new artifact's folder.
        layers: every quantized layer.
        others: tensors in place of the student's, which are stored in the student's dtype.
    """
    copy_other_files(student.folder, out)
    kept = (
        (name, (others or {}).get(name, tensor).detach().to("cpu", tensor.dtype))
        for name, tensor in student.other_tensors()
    )
    write_quantized(out, layers, kept)


def write_quantized(
    out: Path, layers: Iterable[QuantizedLayer], others: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the tensors of an fdb artifact, latent weights beside them where there are any.

    Args:
        out: the artifact's folder.
        layers: every quantized layer.
        others: name and value of every other tensor; read after the layers.
    """
    latents = out / ".latents"
    latents.mkdir()
    with ShardWriter(out) as writer, ShardWriter(latents, LATENTS) as latent_writer:
        any_latents = False
        for name, quantized, latent in layers:
            writer.add_all(layer_tensors(name, quantized))
            if latent is not None:
                any_latents = True
                latent_writer.add(name, latent)
        writer.add_all(others)
    if any_latents:
        for path in latents.iterdir():
            path.rename(out / path.name)
    shutil.rmtree(latents)

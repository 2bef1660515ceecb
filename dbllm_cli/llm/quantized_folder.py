"""Folders of quantized models: an fdb artifact is one, with latent weights beside it.

`<layer>.weight` is uint8 `[2, out, ceil(in / 8)]` and `<layer>.alpha` what `fdb.scales` stores:
float16 `[2, out, groups]`, of tied levels `[1, out, groups]`, with an offset codes, uint16
`[1, out, groups]`, beside `<layer>.row_exponent` int8 `[out]`. Every other tensor has the model's
own name.
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
from dbllm_cli.fdb.scales import LevelKind, expand_scales, stored_scales
from dbllm_cli.llm.models import copy_other_files
from dbllm_cli.llm.quantizer import FORMAT_VERSION, NEWEST_FORMAT, packed_settings
from dbllm_cli.store.json_file import read_json_object
from dbllm_cli.tensors import ShardWriter, TensorFolder

LATENTS = "latents"
QuantizedLayer = tuple[str, QuantizedMatrix, Tensor | None]
"""Name, planes and scales, and the latent weights to keep, or None."""
_ROW_EXPONENT = ".row_exponent"
_LAYER_TENSORS = {".weight", ".alpha", _ROW_EXPONENT}


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
        self.levels: LevelKind = config.levels or "plain"
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
        weight, alpha = self.tensors.get(f"{name}.weight"), self.tensors.get(f"{name}.alpha")
        out_features = weight.shape[1]
        groups = group_count(in_features, self.group_size)
        fits = weight.shape == (2, out_features, -(-in_features // 8))
        coded = self.levels == "offset"
        fits &= alpha.shape == (2 if self.levels == "plain" else 1, out_features, groups)
        fits &= (alpha.dtype == torch.uint16) == coded
        stored = f"{name}{_ROW_EXPONENT}"
        exponents = self.tensors.get(stored) if coded and stored in self.tensors else None
        if coded:
            fits &= exponents is not None and exponents.shape == (out_features,)
            fits &= exponents is not None and exponents.dtype == torch.int8
        if not fits:
            raise ArtifactCorruptError(
                f"layer {name} of {self.folder} has planes {tuple(weight.shape)} and scales "
                f"{tuple(alpha.shape)} of {alpha.dtype}, which do not fit {in_features} inputs "
                f"and {self.levels} levels",
                "make the artifact again",
            )
        alpha = expand_scales(alpha, exponents)
        return QuantizedMatrix(weight, alpha, in_features, self.group_size, self.levels)

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
        quantized = set(self.layer_names())
        for name, tensor in self.tensors.items():
            layer = name.rpartition(".")[0]
            if not (layer in quantized and name.removeprefix(layer) in _LAYER_TENSORS):
                yield name, tensor


def _is_alpha(name: str) -> bool:
    return name.endswith(".alpha")


def layer_tensors(name: str, quantized: QuantizedMatrix) -> list[tuple[str, Tensor]]:
    """A layer's tensors under the names that packed models store."""
    alpha, exponents = stored_scales(quantized.alpha, quantized.levels)
    tensors = [(f"{name}.weight", quantized.weight), (f"{name}.alpha", alpha)]
    return tensors if exponents is None else [*tensors, (f"{name}{_ROW_EXPONENT}", exponents)]


def quantized_config(
    config: dict[str, Any],
    group_size: int,
    kept: Sequence[str],
    dtype: str,
    levels: LevelKind = "plain",
) -> dict[str, Any]:
    """config.json of a quantized model: the model's own with `quantization_config` added."""
    own = {key: value for key, value in config.items() if key != "torch_dtype"}
    settings = {
        "quant_method": "dbllm",
        "format_version": FORMAT_VERSION,
        "group_size": group_size,
        "modules_to_not_convert": sorted(kept),
    }
    if levels != "plain":
        settings |= {"levels": levels, "format_version": NEWEST_FORMAT}
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

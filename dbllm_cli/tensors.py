"""Safetensors folders: read one tensor at a time, write in shards under Hugging Face's names."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store.json_file import COPY_AGAIN, write_json
from dbllm_cli.store.weight_index import index_name, read_weight_map

_METADATA = {"format": "pt"}
_OPEN_BYTES = 256 * 2**20
"""Read from a file before it is opened anew: while it is open, what was read counts as memory."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file; equal tensors give equal bytes.

    Args:
        tensors: name -> tensor.
        path: the file.
    """
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(contiguous, path, metadata=_METADATA)
    # save_file makes its file private; an artifact is as readable as its folder.
    path.chmod(0o644)


class TensorFolder:
    """The tensors of a folder, read one at a time.

    Raises:
        ArtifactMissingError: the folder holds no such safetensors file.
        ArtifactCorruptError: a file is not safetensors, or the index names no files of the folder.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0
        index = folder / index_name(stem)
        if index.is_file():
            self._files = {name: folder / file for name, file in read_weight_map(index).items()}
            return
        single = folder / f"{stem}.safetensors"
        if not single.is_file():
            raise ArtifactMissingError(
                f"{folder} has no {stem}.safetensors", "give a folder with safetensors weights"
            )
        with _opened(single) as file:
            self._files = dict.fromkeys(file.keys(), single)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU in its stored dtype.

        Raises:
            ArtifactCorruptError: there is none of this name.
        """
        if name not in self._files:
            raise ArtifactCorruptError(f"{self.folder} has no tensor {name}", COPY_AGAIN)
        path = self._files[name]
        if self._open is None or self._open[0] != path or self._read_bytes >= _OPEN_BYTES:
            self._open, self._read_bytes = (path, _opened(path)), 0
        try:
            tensor: Tensor = self._open[1].get_tensor(name)
        except SafetensorError as error:
            raise ArtifactCorruptError(
                f"{path} has no tensor {name}, which its index names", COPY_AGAIN
            ) from error
        self._read_bytes += tensor.nbytes
        return tensor

    def check(self) -> None:
        """Open every file once.

        Raises:
            ArtifactCorruptError: one is not safetensors.
        """
        for path in sorted(set(self._files.values())):
            with _opened(path):
                pass

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time."""
        for name in self.names():
            yield name, self.get(name)


def _opened(path: Path) -> safe_open:
    # Opening a FIFO would wait for a writer.
    if path.exists() and not path.is_file():
        raise ArtifactCorruptError(f"{path} is not a plain file", COPY_AGAIN)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactCorruptError(
            f"{path} can't be read as safetensors: {error}", COPY_AGAIN
        ) from error


class ShardWriter:
    """Writes tensors into `<stem>.safetensors`, or into numbered shards with an index.

    Args:
        folder: where the files go.
        stem: first part of the names.
        shard_bytes: largest shard.
    """

    def __init__(self, folder: Path, stem: str = "model", shard_bytes: float = 5e9) -> None:
        self._folder, self._stem, self._limit = folder, stem, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; a full shard is written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.detach().cpu()
        self._pending_bytes += size
        self._total_bytes += size

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Queue many."""
        for name, tensor in tensors:
            self.add(name, tensor)

    def _part(self, number: int) -> Path:
        return self._folder / f".{self._stem}-part-{number}"

    def _flush(self) -> None:
        save_tensors(self._pending, self._part(len(self._shards)))
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / f"{self._stem}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"{self._stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self._folder / index_name(self._stem), index)


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ArtifactCorruptError: names the tensor.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ArtifactCorruptError(
            f"tensor {name} holds NaN or infinity", "download or export the model again"
        )


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name as settings and records have it."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype

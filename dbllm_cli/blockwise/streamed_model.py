"""One decoder block at a time: the rest of the model stays on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.blocks import (
    BlockCall,
    capture_calls,
    find_blocks,
    matrix_of,
    same_arguments,
)
from dbllm_cli.llm.models import empty_model, load_config, require_device
from dbllm_cli.tensors import TensorFolder


class StreamedModel:
    """A model whose blocks are loaded when asked for and dropped after.

    Args:
        folder: safetensors under module names.
        device: where blocks run.
        trust_remote_code: let transformers run code that comes with the model.
        dtype: of the model and of the hidden states between its blocks.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        require_device(device)
        self.tensors = TensorFolder(folder)
        self.device, self.dtype = device, dtype
        self.model = empty_model(load_config(folder, trust_remote_code), trust_remote_code)
        self.blocks = find_blocks(self.model)
        self._calls: dict[int, list[BlockCall]] = {}
        self._stored: dict[str, Tensor] = {}
        self.load_outside(self.tensors)
        for _, buffer in self.model.named_buffers():
            buffer.data = buffer.data.to(device)

    def load_outside(self, tensors: TensorFolder) -> None:
        """Load what lies outside the blocks, embeddings and the last norm, from a folder."""
        inside = f"{self.blocks.prefix}."
        for name, _ in self.model.named_parameters():
            if not name.startswith(inside) and name in tensors:
                self._load(self.model, name, tensors.get(name))
        # Loading puts new parameters in place of those that were tied.
        self.model.tie_weights()

    def _load(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        set_module_tensor_to_device(module, name, self.device, value=tensor, dtype=tensor.dtype)

    def load_block(self, index: int) -> nn.Module:
        """A block with its weights, in the model's dtype, on the device; not read if there."""
        block = self.blocks.modules[index]
        for name in list(block.state_dict()):
            full = f"{self.blocks.name(index)}.{name}"
            if full not in self._stored:
                self._stored[full] = self.tensors.get(full)
                self._load(block, name, self._stored[full])
        return block.requires_grad_(False)

    def matrix(self, name: str) -> Tensor:
        """A linear layer of a loaded block as it is stored, float32 `[out, in]` on the device.

        The block's own may have been rounded to the model's dtype.
        """
        stored = self._stored[f"{name}.weight"].to(self.device, torch.float32)
        return matrix_of(self.model.get_submodule(name), stored)

    def drop_block(self, index: int) -> None:
        """Give the block's memory back."""
        block = self.blocks.modules[index]
        for name in list(block.state_dict()):
            del self._stored[f"{self.blocks.name(index)}.{name}"]
        for name, _ in list(block.named_parameters()):
            set_module_tensor_to_device(block, name, "meta")

    def embed(self, sequences: Tensor, batch_size: int) -> Tensor:
        """Hidden states that enter the first block, on the CPU `[n, tokens, hidden]`.

        Args:
            sequences: int64 token ids `[n, tokens]`.
            batch_size: sequences at once, here and whenever blocks run.

        Raises:
            ConfigError: the blocks' arguments depend on the text, not only on its length.
        """
        entering = []
        for batch in sequences.split(batch_size):
            hidden, calls = capture_calls(self.model, self.blocks, batch.to(self.device))
            self._keep_calls(batch.shape[0], calls)
            entering.append(hidden.to("cpu", self.dtype))
        return torch.cat(entering)

    def _keep_calls(self, size: int, calls: list[BlockCall]) -> None:
        kept = self._calls.setdefault(size, calls)
        for one, other in zip(kept, calls, strict=True):
            if not same_arguments((one.args, one.kwargs), (other.args, other.kwargs)):
                raise ConfigError(
                    f"{type(self.model).__name__} gives its blocks arguments that depend on the "
                    "text, so they can't be trained one by one",
                    "leave out reconstruct and use distill --train weights",
                )

    def run_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for a batch, with the model's own arguments.

        Args:
            index: which block's arguments.
            block: the module to run: this model's, or a quantized copy.
            hidden: `[batch, tokens, hidden]` on the device; a batch size that `embed` met.
        """
        return self._calls[hidden.shape[0]][index].run(block, hidden)

    @torch.no_grad()
    def run_all(
        self,
        index: int,
        block: nn.Module,
        hidden: Tensor,
        batch_size: int,
        done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The block's output for all sequences, on the CPU.

        Args:
            index: which block's arguments.
            block: the module to run.
            hidden: `[n, tokens, hidden]`.
            batch_size: as given to `embed`.
            done: called with the number of sequences of each batch.
        """
        output = torch.empty_like(hidden)
        start = 0
        for batch in hidden.split(batch_size):
            result = self.run_block(index, block, batch.to(self.device))
            output[start : start + batch.shape[0]] = result.cpu()
            start += batch.shape[0]
            if done is not None:
                done(batch.shape[0])
        return output

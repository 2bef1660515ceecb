"""The norms of packed models in one operator each."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dbllm_cli.kernels import cpu_kernels, rms_norm


class RmsNorm(nn.Module):
    """`kernels.rms_norm` with the parameter of a transformers module, under its name."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden]` normalized."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


def use_cpu_norms(model: PreTrainedModel) -> None:
    """Replace the norms that compute just what `kernels.rms_norm` does, where that is compiled."""
    if cpu_kernels() is None:
        return
    for name, module in list(model.named_modules()):
        replacement = _equivalent(module)
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)


def _equivalent(module: nn.Module) -> RmsNorm | None:
    """An RmsNorm that gives the same as a module on random numbers, or None."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if "RMSNorm" not in type(module).__name__ or eps is None or list(parameters) != ["weight"]:
        return None
    weight = parameters["weight"]
    replacement = RmsNorm(weight, float(eps))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight.dtype)
    with torch.inference_mode():
        same = torch.allclose(module(x), replacement(x), rtol=1e-2, atol=1e-6)
    return replacement if same else None

"""AdamW with learning rates relative to each layer's scales, warm-up and cosine."""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from dbllm_cli.training.layers import LatentLinear, TrainableLinear

_BETAS = (0.9, 0.95)
_FINAL_FACTOR = 0.05


def schedule_factor(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then a cosine down to 5 %.

    Args:
        step: from 0.
        total: steps of the whole run.
        warmup: steps of warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return _FINAL_FACTOR + (1 - _FINAL_FACTOR) * cosine


class RelativeAdamW:
    """AdamW over the latent weights and scales of layers, each rate times the mean |alpha1|.

    An absolute rate suits no two layers: their scales differ by orders of magnitude.

    Args:
        layers: name -> layer.
        latent_lr: relative rate of latent weights.
        scale_lr: relative rate of scales.
        others: name -> parameter outside the layers; their rates are times their mean magnitude, of
            one that is all zero, as a bias may be, times that of the others of its rank.
        others_lr: relative rate of these.
        latent_decay: share of the way back to where they start that latent weights go in every
            step (decoupled weight decay as AdamW's, but towards the start: L2-SP, Li et al. 2018).
            The start is not part of `state_tensors`.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableLinear],
        latent_lr: float,
        scale_lr: float,
        others: Mapping[str, Tensor] | None = None,
        others_lr: float = 0.0,
        latent_decay: float = 0.0,
    ) -> None:
        self._layers = dict(layers)
        self._latent_decay = latent_decay
        self._starts = {
            name: layer.latent.detach().clone()
            for name, layer in layers.items()
            if latent_decay and isinstance(layer, LatentLinear)
        }
        groups = []
        for name, layer in layers.items():
            size = float(layer.scales[0].detach().abs().mean())
            groups.append(_group(f"{name}.alpha", layer.scales, scale_lr * size))
            if isinstance(layer, LatentLinear):
                groups.append(_group(f"{name}.latent", layer.latent, latent_lr * size))
        sizes = _sizes(others or {})
        for name, parameter in (others or {}).items():
            groups.append(_group(name, parameter, others_lr * sizes[name]))
        # The gradients are those of a relative error and tiny: a usual epsilon would rule the step.
        self._optimizer = torch.optim.AdamW(
            groups, betas=_BETAS, eps=1e-12, weight_decay=0.0, fused=True
        )

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [group["params"][0] for group in self._optimizer.param_groups]

    def step(self, factor: float) -> None:
        """One step at `factor` times the base rates; then the scales get their signs back."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self._decay_latents(min(1.0, self._latent_decay * factor))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for layer in self._layers.values():
            layer.project()

    @torch.no_grad()
    def _decay_latents(self, share: float) -> None:
        for name, start in self._starts.items():
            cast(LatentLinear, self._layers[name]).latent.lerp_(start, share)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and moments by name, to save."""
        tensors: dict[str, Tensor] = {}
        for group in self._optimizer.param_groups:
            (parameter,) = group["params"]
            tensors[group["name"]] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{group['name']}:{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        for group in self._optimizer.param_groups:
            (parameter,) = group["params"]
            parameter.copy_(tensors[group["name"]])
            prefix = f"{group['name']}:"
            state = {
                name.removeprefix(prefix): value.to(parameter.device)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            if state:
                self._optimizer.state[parameter] = state


def _sizes(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean magnitudes; of one that is all zero, the mean of the others' of its rank, or 0."""
    sizes = {name: float(each.detach().abs().mean()) for name, each in parameters.items()}
    means = {}
    for rank in {each.dim() for each in parameters.values()}:
        found = [sizes[name] for name, each in parameters.items() if each.dim() == rank]
        means[rank] = sum(found) / max(1, sum(size > 0 for size in found))
    return {name: sizes[name] or means[each.dim()] for name, each in parameters.items()}


def _group(name: str, parameter: Tensor, base_lr: float) -> dict[str, object]:
    return {"name": name, "params": [parameter], "lr": base_lr, "base_lr": base_lr}

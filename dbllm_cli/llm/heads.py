"""The last step of a model, from final hidden states to logits, apart from the rest.

The vocabulary is large: whoever reads logits does so chunk by chunk through `head`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dbllm_cli.errors import ArtifactCorruptError, ConfigError

Head = Callable[[Tensor], Tensor]
"""Final hidden states `[tokens, hidden]` to logits `[tokens, vocabulary]`."""

CHUNK_TOKENS = 512
"""Tokens whose logits exist at once."""


def final_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Final hidden states `[batch, tokens, hidden]` of tokens `[batch, tokens]`."""
    hidden: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def head_parameters(model: PreTrainedModel) -> list[Tensor]:
    """The parameters of the output embeddings."""
    return list(model.get_output_embeddings().parameters())


def head(model: PreTrainedModel) -> Head:
    """The map from final hidden states to logits: output embeddings, the family's scale and cap.

    Raises:
        ConfigError: the model's own logits are not reproduced.
        ArtifactCorruptError: the model's logits are not finite.
    """
    embeddings = model.get_output_embeddings()
    settings = model.config.get_text_config()
    cap = getattr(settings, "final_logit_softcapping", None)
    scale = _logit_scale(settings)

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = embeddings(hidden)
        logits = logits if scale == 1.0 else logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    with torch.no_grad():
        probe = torch.arange(4, device=model.device).unsqueeze(0)
        own = model(input_ids=probe, use_cache=False).logits.to(torch.float32)
        ours = to_logits(final_hidden(model, probe)).to(torch.float32)
    if not torch.isfinite(own).all():
        raise ArtifactCorruptError(
            f"{model.name_or_path} gives logits that are not finite",
            "its weights may hold NaN: download, export or train it again",
        )
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * own.abs().max().item()):
        raise ConfigError(
            f"{type(model).__name__} changes its logits after the output embeddings in a way that "
            "dbllm does not know",
            "please report the model",
        )
    return to_logits


def _logit_scale(settings: PreTrainedConfig) -> float:
    """What the family multiplies logits by; MPT has a setting of the name and ignores it."""
    if settings.model_type == "mpt":
        return 1.0
    return getattr(settings, "logit_scale", 1.0) / getattr(settings, "logits_scaling", 1.0)

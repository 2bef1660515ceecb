"""The paper's, two float16 scales: alpha2, 0, alpha1 + alpha2, alpha1.

`alpha2 <= 0 <= alpha1` (DB-LLM, Flexible Dual Binarization).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dbllm_cli.fdb.alternation import alternate, least_squares_scales
from dbllm_cli.fdb.levels import project_signs
from dbllm_cli.fdb.schemes import Scheme, keep_orientation

METHODS = ("als", "gptq", "mse", "paper")


class Plain(Scheme):
    """Two free scales."""

    format_version = 1

    def fit(self, grouped: Tensor, importance: Tensor) -> Tensor:
        """See `Scheme.fit`."""
        return alternate(
            grouped,
            importance,
            lambda planes, _: least_squares_scales(grouped, importance, planes),
        )

    def project(self, scales: Tensor, upright: Tensor | None = None) -> Tensor:
        """See `Scheme.project`."""
        allowed = torch.stack(project_signs(*scales))
        return allowed if upright is None else keep_orientation(allowed, upright)

    def parts(self, out_features: int, groups: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """See `Scheme.parts`."""
        return {"alpha": (torch.float16, [2, out_features, groups])}

    def store(self, scales: Tensor) -> dict[str, Tensor]:
        """See `Scheme.store`."""
        return {"alpha": scales.to(torch.float16)}

    def expand(self, stored: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme.expand`."""
        return stored["alpha"]


SCHEME = Plain()

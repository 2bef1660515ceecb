"""Moved by a third number, all in 16 bits: centre ± outer, centre ± inner.

A third number beta moves all four levels (`w = beta + alpha1·b1 + alpha2·b2`), which then lie
evenly around a centre. All three take 16 bits (`_codes`), and 8 bits a row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dbllm_cli.fdb.alternation import Candidate
from dbllm_cli.fdb.schemes import Scheme, keep_orientation
from dbllm_cli.fdb.schemes._codes import coarse_codes, decode_spans, encode_spans
from dbllm_cli.fdb.schemes._spans import Spans, least_squares_spans

METHODS = ("als", "gptq")
_ALTERNATIONS = 12
_FIRST_ALTERNATIONS = 4
_CENTRES = (-0.7, -0.35, 0.0, 0.35, 0.7)
_NORMAL_OUTER, _NORMAL_INNER = 1.51, 0.453
"""Starts, in units of the root mean square: the best four levels of a normal weight, moved."""
_TINY = 1e-30


class Offset(Scheme):
    """Two scales and an offset."""

    numbers = 3
    format_version = 3
    trains_rounded = True
    note = "two scales and an offset per group, in 16 bits, and 8 bits a row"

    def fit(self, grouped: Tensor, importance: Tensor) -> Tensor:
        """Alternation from several centres; the best one goes on. See `Scheme.fit`."""
        total = importance.sum(-1, keepdim=True).clamp(min=_TINY)
        spread = ((grouped.square() * importance).sum(-1, keepdim=True) / total).sqrt()
        best = None
        for centre in _CENTRES:
            spans = Spans(centre * spread, _NORMAL_OUTER * spread, _NORMAL_INNER * spread)
            for _ in range(_FIRST_ALTERNATIONS):
                spans = least_squares_spans(grouped, importance, spans)
            found = Candidate.of(grouped, importance, spans.scales)
            best = found if best is None else best.or_better(found)
        assert best is not None
        spans = Spans.of(best.scales)
        for _ in range(_ALTERNATIONS):
            spans = least_squares_spans(grouped, importance, spans)
        return best.or_better(Candidate.of(grouped, importance, spans.scales)).scales

    def project(self, scales: Tensor, upright: Tensor | None = None) -> Tensor:
        """See `Scheme.project`."""
        allowed = Spans.of(scales).project().scales
        return allowed if upright is None else keep_orientation(allowed, upright)

    def parts(self, out_features: int, groups: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """See `Scheme.parts`."""
        return {
            "alpha": (torch.uint16, [1, out_features, groups]),
            "row_exponent": (torch.int8, [out_features]),
        }

    def store(self, scales: Tensor) -> dict[str, Tensor]:
        """See `Scheme.store`."""
        codes, exponents = encode_spans(*Spans.of(scales.to(torch.float32)))
        return {"alpha": codes.unsqueeze(0), "row_exponent": exponents}

    def expand(self, stored: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme.expand`."""
        spans = Spans(*decode_spans(stored["alpha"][0], stored["row_exponent"]))
        return spans.scales.to(torch.float16)

    def coarse_groups(self, scales: Tensor) -> Tensor:
        """See `Scheme.coarse_groups`."""
        return coarse_codes(self.store(scales)["alpha"][0])


SCHEME = Offset()

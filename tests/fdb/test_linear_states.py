import pytest
import torch

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import quantize_matrix


@pytest.mark.parametrize(
    ("levels", "missing"),
    [
        ("plain", ["weight"]),
        ("plain", ["alpha"]),
        ("plain", ["alpha", "weight"]),
        ("offset", ["row_exponent"]),
        ("offset", ["alpha", "row_exponent"]),
    ],
)
@pytest.mark.parametrize("form", ["stored", "expanded", "tiled"])
def test_a_state_without_a_part_is_refused_whatever_form_the_layer_has(
    form: str, levels: str, missing: list[str]
) -> None:
    matrix = torch.randn(5, 172, generator=torch.Generator().manual_seed(0))
    scales = fit_scales(matrix, 64, "als", levels=levels)
    quantized = quantize_matrix(matrix, scales, 64, levels)
    state = {"weight": quantized.weight} | quantized.scheme.store(quantized.scales)
    layer = FdbLinear(172, 5, 64, levels=levels)
    if form != "stored":
        layer.load_state_dict(state)
    if form == "tiled":
        layer.use_cpu_kernels()
    for name in missing:
        del state[name]
    with pytest.raises(RuntimeError, match="Missing key") as refused:
        layer.load_state_dict(state)
    assert all(f'"{name}"' in str(refused.value) for name in missing)

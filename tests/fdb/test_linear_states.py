import pytest
import torch

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import quantize_matrix


@pytest.mark.parametrize("missing", ["weight", "alpha", "row_exponent"])
@pytest.mark.parametrize("form", ["stored", "expanded", "tiled"])
def test_a_state_without_a_part_is_refused_whatever_form_the_layer_has(
    form: str, missing: str
) -> None:
    matrix = torch.randn(5, 172, generator=torch.Generator().manual_seed(0))
    scales = fit_scales(matrix, 64, "als", levels="offset")
    quantized = quantize_matrix(matrix, scales, 64, "offset")
    state = {"weight": quantized.weight} | quantized.scheme.store(quantized.scales)
    layer = FdbLinear(172, 5, 64, levels="offset")
    if form != "stored":
        layer.load_state_dict(state)
    if form == "tiled":
        layer.use_cpu_kernels()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        layer.load_state_dict(state)

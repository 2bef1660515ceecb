import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbllm_cli.kernels import unpack_planes
from dbllm_cli.kernels.packing import pack_planes


def test_the_least_significant_bit_comes_first_and_rows_are_padded_with_zeros() -> None:
    row = torch.zeros(11, dtype=torch.bool)
    row[[0, 3, 8, 10]] = True
    assert pack_planes(row).tolist() == [0b00001001, 0b00000101]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**31))
def test_packing_is_numpy_s_little_bit_order_and_unpacking_undoes_it(
    rows: int, inputs: int, seed: int
) -> None:
    planes = np.random.default_rng(seed).integers(0, 2, (2, rows, inputs)).astype(bool)
    packed = pack_planes(torch.tensor(planes))
    assert np.array_equal(packed.numpy(), np.packbits(planes, axis=-1, bitorder="little"))
    assert torch.equal(unpack_planes(packed, inputs, torch.float32).bool(), torch.tensor(planes))

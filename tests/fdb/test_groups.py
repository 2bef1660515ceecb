import pytest
import torch

from dbllm_cli.fdb.groups import from_groups, group_count, to_groups


@pytest.mark.parametrize(("inputs", "size", "groups"), [(64, 64, 1), (172, 64, 3), (8, 128, 1)])
def test_a_short_last_group_is_a_group(inputs: int, size: int, groups: int) -> None:
    assert group_count(inputs, size) == groups
    matrix = torch.arange(2.0 * inputs).view(2, inputs) + 1
    grouped = to_groups(matrix, size)
    assert grouped.shape == (2, groups, size)
    assert torch.equal(grouped.flatten(-2)[:, :inputs], matrix)
    assert not grouped.flatten(-2)[:, inputs:].any()
    assert torch.equal(from_groups(grouped, inputs), matrix)

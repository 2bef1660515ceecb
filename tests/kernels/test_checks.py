"""The public operators refuse what would make them read beyond a tensor."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbllm_cli.kernels import cpu, cpu_kernels

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not compiled")

OPERATORS = torch.ops.dbllm
IN, OUT, GROUP, HEADS, DIM, INNER = 64, 48, 32, 3, 16, 96
Arguments = tuple[object, ...]


def tiles(in_features: int = IN, out_features: int = OUT) -> Tensor:
    kernels = cpu_kernels()
    assert kernels is not None
    planes = torch.zeros(2, out_features, in_features // 8, dtype=torch.uint8)
    scales = torch.ones(2, out_features, in_features // GROUP, dtype=torch.float16)
    return kernels.to_tiles(planes, scales, in_features, GROUP)


def plane_bits() -> Tensor:
    return torch.zeros(2, OUT, IN // 8, dtype=torch.uint8)


def scales() -> Tensor:
    return torch.ones(2, OUT, IN // GROUP)


def head(heads: int = HEADS, positions: int = 1) -> Tensor:
    return torch.ones(2, heads, positions, DIM)


NONE = torch.empty(0)
NO_MASK = torch.empty(0, 0, dtype=torch.bool)
HIDDEN = HEADS * DIM
ANGLES = torch.ones(1, 1, DIM)

# An operator's arguments, as they are right.
RIGHT: dict[str, Callable[[], Arguments]] = {
    "fdb_linear_tiled": lambda: (torch.ones(2, IN), tiles(), OUT, GROUP),
    "int8_linear_cpu": lambda: (
        torch.ones(2, IN),
        torch.zeros(OUT, IN + 2, dtype=torch.uint8),
    ),
    "attend_one_cpu": lambda: (head(), head(1, 5), head(1, 5), NO_MASK, 0.25),
    "plane_levels_cpu": lambda: (plane_bits(), scales(), IN, GROUP, False),
    "plane_gradients_cpu": lambda: (torch.ones(OUT, IN), plane_bits(), scales(), GROUP),
    "latent_levels_cpu": lambda: (torch.ones(OUT, IN), scales(), scales(), GROUP, False),
    "latent_gradients_cpu": lambda: (
        torch.ones(OUT, IN),
        torch.ones(OUT, IN),
        scales(),
        scales(),
        GROUP,
    ),
    "distillation_cpu": lambda: (torch.ones(2, 9), torch.ones(2, 9), True),
    "block_before_cache": lambda: (
        torch.ones(2, 1, IN),
        torch.ones(IN),
        *(tiles(IN, HIDDEN) for _ in range(3)),
        *(NONE for _ in range(5)),
        ANGLES,
        ANGLES,
        HEADS,
        HEADS,
        DIM,
        GROUP,
        1e-5,
    ),
    "block_after_cache": lambda: (
        torch.ones(2, 1, IN),
        head(2),
        head(2, 5),
        head(2, 5),
        NO_MASK,
        tiles(2 * DIM, IN),
        torch.ones(IN),
        tiles(IN, INNER),
        tiles(IN, INNER),
        tiles(INNER, IN),
        INNER,
        GROUP,
        1e-5,
        0.25,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_arguments_are_taken(name: str) -> None:
    getattr(OPERATORS, name)(*RIGHT[name]())


def spoiled(argument: object) -> list[object]:
    """What would be read in another way than it is, or beyond its end."""
    if isinstance(argument, Tensor):
        floats = argument.is_floating_point()
        found: list[object] = [argument.double() if floats else argument.to(torch.int32)]
        if argument.numel() > 0:
            found.append(argument.new_ones(argument.numel() + 1))
            # More dimensions than the operators' own records have room for.
            found.append(argument.reshape(*[1] * 70, *argument.shape))
            found.append(argument.unsqueeze(0).unsqueeze(0).unsqueeze(0))
            found += [argument.narrow(d, 0, n - 1) for d, n in enumerate(argument.shape) if n > 1]
        return found
    if isinstance(argument, bool | float):
        return []
    assert isinstance(argument, int)
    return [0, -argument, argument * 2, argument + 1, 2**40]


CASES = [
    f"{name}-{place}-{number}"
    for name, right in RIGHT.items()
    for place, argument in enumerate(right())
    for number in range(len(spoiled(argument)))
]


# Other leading sizes, fewer rows or heads, inputs or groups that fill as many words, and empty
# tensors of any dtype.
HARMLESS = {
    "fdb_linear_tiled-0-3", "fdb_linear_tiled-0-4", "fdb_linear_tiled-0-5",
    "int8_linear_cpu-0-3", "int8_linear_cpu-0-4", "int8_linear_cpu-1-4",
    "attend_one_cpu-0-5", "attend_one_cpu-3-0", "latent_levels_cpu-3-3",
    "latent_gradients_cpu-4-3", "block_before_cache-0-4", "block_after_cache-4-0",
    *(f"block_before_cache-{place}-0" for place in range(5, 10)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_argument_that_does_not_fit_is_refused(case: str) -> None:
    name, place, number = case.split("-")
    arguments = list(RIGHT[name]())
    arguments[int(place)] = spoiled(arguments[int(place)])[int(number)]
    if case in HARMLESS:
        result = getattr(OPERATORS, name)(*arguments)
        assert all(torch.isfinite(each).all() for each in torch.utils._pytree.tree_leaves(result))
    else:
        with pytest.raises(RuntimeError, match="dbllm: "):
            getattr(OPERATORS, name)(*arguments)


def test_double_inputs_and_tiles_of_another_layer_are_refused() -> None:
    x = torch.ones(2, IN)
    with pytest.raises(RuntimeError, match="takes an input in float32, bfloat16 or float16"):
        OPERATORS.fdb_linear_tiled(x.double(), tiles(), OUT, GROUP)
    with pytest.raises(RuntimeError, match="tiles of another layer"):
        OPERATORS.fdb_linear_tiled(x, tiles(IN, OUT + 64), OUT, GROUP)
    with pytest.raises(RuntimeError, match="tiles of another layer"):
        OPERATORS.fdb_linear_tiled(x, tiles(), OUT + 64, GROUP)


def test_what_is_refused_frees_its_tensors() -> None:
    import weakref

    x = torch.ones(2, IN + 1)
    gone = weakref.ref(x)
    with pytest.raises(RuntimeError):
        OPERATORS.fdb_linear_tiled(x, tiles(), OUT, GROUP)
    del x
    assert gone() is None


@pytest.mark.parametrize(("platform", "name"), [("linux", ".so"), ("darwin", ".dylib")])
def test_torchs_library_is_named_as_the_platform_names_libraries(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str
) -> None:
    monkeypatch.setattr(cpu.sys, "platform", platform)
    path: Path = cpu.torch_library()
    assert path.name == f"libtorch_cpu{name}"
    assert path.is_file() == (platform == "linux")

"""The Triton kernels without a GPU: their sums in Triton's interpreter, their code by its compiler.

The interpreter is chosen when Triton is imported: it runs in a process of its own, this module as
a script, which makes the products of all cases at once.
"""

import itertools
import os
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbllm_cli.kernels import fdb_linear, operator

ROOT = Path(__file__).parents[2]
# The interpreter cuts bfloat16 off instead of rounding it.
ERROR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Case(NamedTuple):
    inputs: int
    outputs: int
    group_size: int
    rows: int
    dtype: torch.dtype = torch.float16
    bias: bool = False
    layout: str = "rows"
    offset: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(part).removeprefix("torch.") for part in self)


class Layer(NamedTuple):
    x: Tensor
    weight: Tensor
    alpha: Tensor
    bias: Tensor | None
    group_size: int

    def to(self, device: str) -> "Layer":
        bias = None if self.bias is None else self.bias.to(device)
        x, weight, alpha = (part.to(device) for part in (self.x, self.weight, self.alpha))
        return Layer(x, weight, alpha, bias, self.group_size)


def _cases() -> list[Case]:
    """Odd shapes in all combinations; then the edges between blocks, rows and layouts."""
    draw = random.Random(0)  # noqa: S311 -- choices of tests
    sizes = itertools.product([172, 40, 1000], [8, 32, 64, 128], [1, 3, 17, 40])
    odd = [
        Case(
            inputs,
            draw.choice([5, 33, 100]),
            group,
            rows,
            draw.choice([*ERROR]),
            draw.random() < 0.5,
            offset=draw.random() < 0.5,
        )
        for inputs, group, rows in sizes
    ]
    edges = [Case(256, 33, 64, rows) for rows in (0, 2, 4, 5, 16, 64, 65, 130)]
    whole = [
        Case(2048, 16, 64, rows, dtype, offset=offset)
        for rows in (1, 8, 70)
        for dtype in ERROR
        for offset in (False, True)
    ]
    float32 = [Case(172, 33, 64, rows, torch.float32) for rows in (5, 70)]
    groups = [Case(128, 9, group, rows) for group in (8, 24, 96) for rows in (2, 6)]
    small = [Case(8, 1, 8, rows, bias=True) for rows in (1, 40)] + [Case(13, 3, 8, 1)]
    layouts = ("vector", "batch", "transposed", "every second", "odd planes")
    kinds = [Case(160, 9, 32, rows, layout=layout) for layout in layouts for rows in (2, 6)]
    broken = [Case(172, 9, 64, rows, d, layout="NaN") for rows in (3, 20) for d in ERROR]
    return [*odd, *edges, *whole, *float32, *groups, *small, *kinds, *broken]


CASES = _cases()


def _amid_nan(values: Tensor) -> Tensor:
    """A view of the values, with NaN before and behind: whoever reads beyond them will show it."""
    room = torch.full((len(values) + 2, *values.shape[1:]), torch.nan, dtype=values.dtype)
    room[1:-1] = values
    return room[1:-1]


def _layer(case: Case) -> Layer:
    """Random bits, in the padding too."""
    draw = torch.Generator().manual_seed(case.inputs + case.rows)
    byte_columns, groups = -(-case.inputs // 8), -(-case.inputs // case.group_size)
    planes = torch.randint(256, (2, case.outputs, byte_columns), generator=draw, dtype=torch.uint8)
    if case.layout == "odd planes":
        planes = torch.cat([torch.zeros(1, dtype=torch.uint8), planes.flatten()])[1:].view_as(
            planes
        )
    least = torch.tensor([0.0, -1.0, -0.5])[: 3 if case.offset else 2].view(-1, 1, 1)
    scales = torch.rand(len(least), case.outputs, groups, generator=draw) + least
    x = torch.randn(case.rows, case.inputs, generator=draw)
    if case.layout == "NaN":
        planes[:, 0] = 0
        x[1, 70] = torch.nan
    bias = torch.randn(case.outputs, generator=draw).to(case.dtype) if case.bias else None
    x = _laid_out(_amid_nan(x.to(case.dtype)), case.layout)
    return Layer(x, planes, _amid_nan(scales.half()), bias, case.group_size)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "vector":
        return x[0]
    if layout == "batch":
        return x.view(2, -1, x.shape[-1])
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every second":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    return x


def _expected(layer: Layer) -> NDArray[np.float64]:
    """y = alpha1·(b1 x) + alpha2·(b2 x) + beta·(1 x) + bias in float64, from the bytes."""
    x, weight, alpha = layer.x.double().numpy(), layer.weight.numpy(), layer.alpha.double().numpy()
    bits = np.unpackbits(weight, axis=-1, bitorder="little")[..., : x.shape[-1]]
    scales = np.repeat(alpha, layer.group_size, axis=-1)[..., : x.shape[-1]]
    y: NDArray[np.float64] = x @ ((bits * scales[:2]).sum(0) + scales[2:].sum(0)).T
    return y if layer.bias is None else y + layer.bias.double().numpy()


def _check(result: Tensor, case: Case) -> None:
    layer = _layer(case)
    assert (result.shape, result.dtype) == ((*layer.x.shape[:-1], case.outputs), case.dtype)
    expected = _expected(layer)
    got = result.double().cpu().numpy()
    assert (np.isnan(got) == np.isnan(expected)).all()
    error = np.linalg.norm(np.nan_to_num(got - expected))
    assert error <= ERROR[case.dtype] * np.linalg.norm(np.nan_to_num(expected))


def _interpret(path: Path) -> None:
    """What the process in the interpreter does."""
    import triton.language as tl
    from triton.runtime import interpreter

    from dbllm_cli.kernels.gpu import fdb_linear_gpu

    multiply = interpreter.InterpreterBuilder.create_dot

    # Triton 3.9's own would multiply the bit patterns of bfloat16 as integers.
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.is_bf16():
            a, b = (self.cast_impl(side, tl.float32) for side in (a, b))
        return multiply(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    save_file({case.name: fdb_linear_gpu(*_layer(case)) for case in CASES}, path)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The kernels' results for all cases."""
    path = tmp_path_factory.mktemp("interpreter") / "products.safetensors"
    command = [sys.executable, "-m", "tests.kernels.test_gpu", str(path)]
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(path)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_interpreted_kernels_give_the_product(products: dict[str, Tensor], case: Case) -> None:
    _check(products[case.name], case)


def _compiled(case: Case, architecture: int, patch: pytest.MonkeyPatch) -> Any:
    """The kernel that a product would be made with: Triton compiles for GPUs that are not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from dbllm_cli.kernels.gpu import fdb_linear_gpu

    made = []
    run = JITFunction.run

    def run_without_a_launch(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(run(self, *arguments, **options | {"warmup": True}))

    target = GPUTarget("cuda", architecture, 32)
    absent = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
    )
    patch.setattr(JITFunction, "run", run_without_a_launch)
    patch.setattr(driver, "_active", absent)
    fdb_linear_gpu(*_layer(case))
    return made[0]


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [(torch.float16, 90), (torch.bfloat16, 80), (torch.float32, 80)],
)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "rows"),
    [
        *[(4096, 64, 64, rows) for rows in (1, 4, 16, 64, 512)],
        *[(4072, 64, 64, rows) for rows in (1, 4, 16, 64, 512)],
        (8, 1, 8, 1),
        (8, 1, 8, 20),
    ],
)
def test_the_compiled_kernels_fit_a_gpu(
    inputs: int,
    outputs: int,
    group_size: int,
    rows: int,
    offset: bool,
    dtype: torch.dtype,
    architecture: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter knows no types of pointers, no layouts, registers or shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case(inputs, outputs, group_size, rows, dtype, bias=outputs == 1, offset=offset)
    made = _compiled(case, architecture, monkeypatch)
    assert made.metadata.shared <= 99 * 1024
    from triton import knobs

    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    told = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"STACK:(\d+)", told.stdout) == ["0"], "registers are spilled"


@needs_triton
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": torch.zeros(2, 100)}, r"take planes \[2, 3, 13\] there, not \[2, 3, 8\] on cpu"),
        ({"alpha": torch.zeros(2, 3, 2)}, r"take scales \[2, 3, 1\]"),
        ({"bias": torch.zeros(2)}, r"take a bias \[3\]"),
        ({"weight": torch.zeros(2, 3, 8, device="meta")}, "on meta"),
        ({"group_size": 68}, "groups of 68"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, Any], told: str) -> None:
    from dbllm_cli.kernels.gpu import fdb_linear_gpu

    layer = Layer(torch.zeros(2, 64), torch.zeros(2, 3, 8), torch.zeros(2, 3, 1), None, 64)
    with pytest.raises(ValueError, match=told):
        fdb_linear_gpu(*layer._replace(**changed))


def test_triton_need_not_be_there_before_a_gpu_is() -> None:
    code = "import sys; sys.modules['triton'] = None; import dbllm_cli.kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("there", "capability", "kernel"),
    [(False, (9, 0), ""), (True, (7, 5), ""), (True, (9, 0), "reference")],
)
def test_the_reference_stands_in_where_triton_can_t_run_or_is_not_wanted(
    there: bool, capability: tuple[int, int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("DBLLM_KERNEL", kernel)
    assert not operator.has_gpu_kernel.__wrapped__(torch.device("cuda", 0))


@pytest.mark.parametrize(("version", "taken"), [("3.2.0", False), ("3.3.0", True)])
def test_a_gpu_s_product_is_triton_s_from_a_version_on(
    version: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.delenv("DBLLM_KERNEL", raising=False)
    assert operator.has_gpu_kernel.__wrapped__(torch.device("cuda", 0)) is taken


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operator_on_a_gpu_gives_the_product(case: Case) -> None:
    _check(fdb_linear(*_layer(case).to("cuda")), case)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ERROR)
def test_the_operator_keeps_torch_s_rules_on_a_gpu(dtype: torch.dtype) -> None:
    layer = _layer(Case(172, 33, 64, 20, dtype, bias=True)).to("cuda")
    torch.library.opcheck(fdb_linear, tuple(layer))


@pytest.mark.gpu
@needs_gpu
def test_offsets_beyond_31_bits_reach_their_rows() -> None:
    rows = 2**31 // 4096 + 100
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    layer = _layer(Case(4096, 8, 64, 4)).to("cuda")
    x = torch.zeros(rows, 4096, dtype=torch.float16, device="cuda")
    x[-4:] = layer.x
    y = fdb_linear(*layer._replace(x=x))
    assert torch.equal(y[:-4], torch.zeros_like(y[:-4]))
    _check(y[-4:], Case(4096, 8, 64, 4))


if __name__ == "__main__":
    _interpret(Path(sys.argv[1]))

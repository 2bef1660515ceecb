"""The Triton kernels without a GPU: their sums in Triton's interpreter, their code by its compiler.

The interpreter is chosen when Triton is imported: it runs in a process of its own, this module as
a script, which makes the products of all cases at once.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbllm_cli.kernels import fdb_linear, operator
from tests.kernels.gpu_cases import CASES, ERROR, Case, Layer, check_product, random_layer

ROOT = Path(__file__).parents[2]
# Triton's interpreter takes long to start.
pytestmark = pytest.mark.slow
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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
    save_file({case.name: fdb_linear_gpu(*random_layer(case)) for case in CASES}, path)


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
    check_product(products[case.name], case)


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
    fdb_linear_gpu(*random_layer(case))
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
        ({"scales": torch.zeros(2, 3, 2)}, r"take scales \[2, 3, 1\]"),
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
    check_product(fdb_linear(*random_layer(case).to("cuda")), case)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ERROR)
def test_the_operator_keeps_torch_s_rules_on_a_gpu(dtype: torch.dtype) -> None:
    layer = random_layer(Case(172, 33, 64, 20, dtype, bias=True)).to("cuda")
    torch.library.opcheck(fdb_linear, tuple(layer))


@pytest.mark.gpu
@needs_gpu
def test_offsets_beyond_31_bits_reach_their_rows() -> None:
    rows = 2**31 // 4096 + 100
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    layer = random_layer(Case(4096, 8, 64, 4)).to("cuda")
    x = torch.zeros(rows, 4096, dtype=torch.float16, device="cuda")
    x[-4:] = layer.x
    y = fdb_linear(*layer._replace(x=x))
    assert torch.equal(y[:-4], torch.zeros_like(y[:-4]))
    check_product(y[-4:], Case(4096, 8, 64, 4))


if __name__ == "__main__":
    _interpret(Path(sys.argv[1]))

"""llama.cpp's Q2_K product of one matrix, served line by line to a process that has torch.

    LlamaProduct(Path("llama-venv/bin/python"), 4096, 4096, 1, 2, 200 * 2**20, repacked=True)

starts this file under the Python that has llama-cpp-python. There it is numpy and ctypes only: two
OpenMP pools in one process disturb each other, so each keeps to its own. The first line read is
JSON with `out`, `in`, `columns`, `threads`, `bytes` (of the copies that make weights cold in cache)
and `repacked` (the layout that llama.cpp gives weights at load, for its vector kernels). `run`
answers the seconds of the next copy's product, `check` the output of copy 0.
"""

import ctypes
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from line_child import LineChild, openmp_settings

Q2_K, F32 = 10, 0  # enum ggml_type
BLOCK, BLOCK_BYTES = 256, 84  # of Q2_K: 16 scales, 64 of two bits each, d, dmin
# Untimed, on other copies: after a sleep, the threads and the core's clock must wake.
WARM_SECONDS = 0.003


class LlamaProduct:
    """A product of llama.cpp in a process of its own.

    Asking it waits until the OpenMP pools of both sides have stopped spinning; the server then
    wakes its own pool by products that are not timed. The caller must do the same for its own
    contenders after `run`, or they are timed with threads that sleep.

    Args:
        python: of the environment that has llama-cpp-python.
        out: rows of the matrix.
        inputs: its columns.
        columns: vectors multiplied at once.
        threads: of the product.
        cold_bytes: of all copies together, at least.
        repacked: in llama.cpp's own layout for vector instructions.

    Raises:
        ChildError: the matrix can't be Q2_K, or can't be repacked.
    """

    def __init__(
        self,
        python: Path,
        out: int,
        inputs: int,
        columns: int,
        threads: int,
        cold_bytes: int,
        repacked: bool,
    ) -> None:
        self._shape = out, inputs, columns
        self.repacked = repacked
        self._child = LineChild([str(python), str(Path(__file__))], openmp_settings(threads))
        self._child.send(
            json.dumps(
                {"out": out, "in": inputs, "columns": columns, "threads": threads,
                 "bytes": cold_bytes, "repacked": repacked}
            )
        )  # fmt: skip
        ready = self._child.receive()
        self.copy_bytes: int = ready["copy_bytes"]
        self.copies: int = ready["copies"]

    def run(self) -> float:
        """Seconds of one product with weights that are cold in cache."""
        return float(self._child.ask("run"))

    def relative_error(self) -> float:
        """Of the output beside a float64 product of the dequantized matrix (needs gguf)."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        out, inputs, columns = self._shape
        dense = dequantize(q2_k_rows(out, inputs), GGMLQuantizationType.Q2_K)
        exact = vectors(inputs, columns).astype(np.float64) @ dense.astype(np.float64).T
        found = np.array(self._child.ask("check"))
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    def close(self) -> None:
        """End the process."""
        self._child.close()


def q2_k_rows(out: int, inputs: int) -> np.ndarray:
    """Random Q2_K bytes `[out, row bytes]`; weights have mean 0 and deviation 0.02."""
    blocks = out * inputs // BLOCK
    rows = np.random.default_rng(1).integers(256, size=(blocks, BLOCK_BYTES), dtype=np.uint8)
    rows[:, 80:] = np.array([0.0015, 0.00225], np.float16).view(np.uint8)
    return rows.reshape(out, -1)


def vectors(inputs: int, columns: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((columns, inputs), dtype=np.float32)


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
IGNORE_LOG = LogCallback(lambda level, text, data: None)  # must live as long as ggml


def load_ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ValueError(f"{sys.executable} has no llama-cpp-python")
    folder = Path(spec.origin).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so")) for name in ("base", "cpu"))
    pointer, size, long, whole = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    )  # fmt: skip
    signatures: list[tuple[ctypes.CDLL, str, Any, list[Any]]] = [
        (base, "ggml_log_set", None, [pointer, pointer]),
        (base, "ggml_init", pointer, [InitParams]),
        (base, "ggml_tensor_overhead", size, []),
        (base, "ggml_graph_overhead_custom", size, [size, ctypes.c_bool]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, whole, long, long]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_new_graph_custom", pointer, [pointer, size, ctypes.c_bool]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        (base, "ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
        (base, "ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
        (base, "ggml_backend_cpu_buffer_type", pointer, []),
        (base, "ggml_backend_graph_compute", whole, [pointer, pointer]),
        (cpu, "ggml_backend_cpu_init", pointer, []),
        (cpu, "ggml_backend_cpu_set_n_threads", None, [pointer, whole]),
        (cpu, "_Z35ggml_backend_cpu_repack_buffer_typev", pointer, []),
    ]
    for library, name, result, arguments in signatures:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    base.ggml_log_set(ctypes.cast(IGNORE_LOG, pointer), None)  # repacking logs every matrix
    return base, cpu


class Products:
    """Graphs of one product each, every one with its own copy of the matrix."""

    def __init__(self, out: int, inputs: int, columns: int, threads: int, repacked: bool) -> None:
        if inputs % BLOCK:
            raise ValueError(f"Q2_K takes inputs in blocks of {BLOCK}, not {inputs}")
        if repacked and out % 8:
            raise ValueError(f"the repacked Q2_K takes rows in eights, not {out}")
        self._out, self._inputs, self._columns = out, inputs, columns
        self._base, self._cpu = load_ggml()
        self._backend = self._cpu.ggml_backend_cpu_init()
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, threads)
        plain = self._base.ggml_backend_cpu_buffer_type
        repack = self._cpu._Z35ggml_backend_cpu_repack_buffer_typev
        self._plain, self._kind = plain(), (repack if repacked else plain)()
        self._graphs: list[tuple[int, int]] = []
        self.copy_bytes = out * inputs // BLOCK * BLOCK_BYTES

    def add_copies(self, count: int) -> None:
        base, shape = self._base, (self._inputs, self._out)
        room = (count + 1) * base.ggml_tensor_overhead()
        graphs_room = count * base.ggml_graph_overhead_custom(8, False)
        weights = base.ggml_init(InitParams(room, None, True))
        rest = base.ggml_init(InitParams(room + graphs_room, None, True))
        matrices = [base.ggml_new_tensor_2d(weights, Q2_K, *shape) for _ in range(count)]
        # llama.cpp too has one context of weights in the repacking buffer, one of all else.
        self._allocate(weights, self._kind)
        x = base.ggml_new_tensor_2d(rest, F32, self._inputs, self._columns)
        for matrix in matrices:
            graph = base.ggml_new_graph_custom(rest, 8, False)
            y = base.ggml_mul_mat(rest, matrix, x)
            base.ggml_build_forward_expand(graph, y)
            self._graphs.append((graph, y))
        self._allocate(rest, self._plain)
        self._fill(x, vectors(self._inputs, self._columns))
        rows = q2_k_rows(self._out, self._inputs)
        for matrix in matrices:
            self._fill(matrix, rows)

    def _allocate(self, context: int, kind: int) -> None:
        if not self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind):
            raise ValueError("ggml can't allocate the tensors")

    def _fill(self, tensor: int, values: np.ndarray) -> None:
        self._base.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def seconds(self, number: int) -> float:
        graph, _ = self._graphs[number % len(self._graphs)]
        compute, backend = self._base.ggml_backend_graph_compute, self._backend
        begin = time.perf_counter()
        status = compute(backend, graph)
        seconds = time.perf_counter() - begin
        if status:
            raise ValueError(f"ggml_backend_graph_compute gives {status}")
        return seconds

    def output(self) -> list[list[float]]:
        self.seconds(0)
        found = np.empty((self._columns, self._out), np.float32)
        self._base.ggml_backend_tensor_get(self._graphs[0][1], found.ctypes.data, 0, found.nbytes)
        return found.tolist()


def serve() -> None:
    """Answer lines until there are no more."""
    # The process that starts this one may be bound to one core.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        asked = json.loads(sys.stdin.readline())
        products = Products(
            asked["out"], asked["in"], asked["columns"], asked["threads"], asked["repacked"]
        )
        copies = max(2, -(-asked["bytes"] // products.copy_bytes))
        products.add_copies(copies)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"copies": copies, "copy_bytes": products.copy_bytes}), flush=True)
    number = 0
    for line in sys.stdin:
        if line.strip() == "run":
            begin = time.perf_counter()
            while time.perf_counter() - begin < WARM_SECONDS:
                products.seconds(number)
                number += 1
            print(products.seconds(number), flush=True)
            number += 1
        else:
            print(json.dumps(products.output()), flush=True)


if __name__ == "__main__":
    serve()

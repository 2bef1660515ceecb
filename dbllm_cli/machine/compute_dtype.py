"""The dtype that a stage multiplies in, where its settings leave that to the machine."""

import json
import os
import time
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from dbllm_cli.machine.processor import processor

DTYPES = ("bfloat16", "float32")
_SIZE = 512
"""Rows, columns and inputs of the product that is timed: 3 ms at 85 GFLOPS."""
_REPEATS = 9


@cache
def faster_dtype(device: str) -> str:
    """bfloat16 where the device multiplies faster in it than in float32, else float32.

    On a CPU it is measured once and kept in the user's cache folder: where the two are close, a
    measurement in every run would give one key two contents. What a processor says of itself does
    not tell. One thread of an Intel Xeon with AVX-512 BF16 and no AMX takes 1.8 times as long in
    bfloat16, one with AVX2 alone 12 times.

    Args:
        device: torch device.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    return "bfloat16" if kind != "cpu" else _kept_or_measured()


def kept_file() -> Path:
    """Where the choices for CPUs are kept, by processor and torch."""
    return user_cache_path("dbllm") / "compute_dtype.json"


def _kept_or_measured() -> str:
    path = kept_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two first runs at once must not choose differently.
        with FileLock(path.with_suffix(".lock")):
            choices = _read(path)
            name = _machine()
            if choices.get(name) not in DTYPES:
                choices[name] = _measured()
                part = path.with_suffix(".part")
                part.write_text(json.dumps(choices, indent=2, sort_keys=True) + "\n")
                part.replace(path)
            return choices[name]
    except (OSError, NotImplementedError):
        return _measured()


def _read(path: Path) -> dict[str, str]:
    try:
        choices = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return choices if isinstance(choices, dict) else {}


def _machine() -> str:
    """What the speeds depend on: a torch that is limited to older instructions is another one."""
    capability = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "none")
    return f"{processor()}, torch {torch.__version__}, {capability}, ONEDNN_MAX_CPU_ISA {limit}"


def _measured() -> str:
    """The faster one by the shortest of several products each, in turns."""
    matrices = {name: torch.ones(_SIZE, _SIZE, dtype=getattr(torch, name)) for name in DTYPES}
    seconds = dict.fromkeys(DTYPES, float("inf"))
    for repeat in range(_REPEATS + 1):
        for name, matrix in matrices.items():
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            # The first lets the library choose its code.
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(DTYPES, key=seconds.__getitem__)

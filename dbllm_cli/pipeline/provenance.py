"""How an artifact was made: kept beside it, never part of its digest."""

import json
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dbllm_cli.stages.machine import (
    ENVIRONMENT,
    forget_peak,
    peak_device_memory_mib,
    peak_memory_mib,
    processor,
)

_PACKAGES = ("dbllm", "torch", "transformers", "lm_eval")


class Recorder:
    """Measures one run from its making to `record`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._processor_clock = time.process_time()
        forget_peak(device)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._clock

    def record(self, scratch: Path) -> dict[str, Any]:
        """Versions, machine, time and peak memory of the run until now.

        Args:
            scratch: of the stage; a run that can be resumed left there where it was begun.
        """
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "processor_seconds": round(time.process_time() - self._processor_clock, 3),
            "peak_memory_mib": round(peak_memory_mib(), 1),
            **_device_memory(self._device),
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in _PACKAGES},
            },
            "device": self._device,
            "threads": _threads(),
            "kernel": _kernel(),
            "processor": processor(),
            **_begun(scratch / ENVIRONMENT),
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _kernel() -> str | None:
    """The CPU kernels that this process has asked for, which figures and bytes depend on."""
    module = sys.modules.get("dbllm_cli.kernels.cpu")
    asked = module is not None and module.cpu_kernels.cache_info().currsize > 0
    return str(module.kernel_name()) if module is not None and asked else None


def _begun(path: Path) -> dict[str, Any]:
    return {"begun": json.loads(path.read_text())} if path.is_file() else {}


def _device_memory(device: str) -> dict[str, float]:
    peak = peak_device_memory_mib(device)
    return {} if peak is None else {"peak_device_memory_mib": round(peak, 1)}

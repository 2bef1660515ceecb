"""How an artifact was made: kept beside it, never part of its digest."""

import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dbllm_cli.machine.environment import ENVIRONMENT, Environment
from dbllm_cli.machine.memory import forget_peak, peak_memory_mib
from dbllm_cli.machine.processor import processor
from dbllm_cli.store.scratch import read_scratch

_PACKAGES = ("dbllm", "torch", "transformers", "lm_eval")


class Recorder:
    """Measures one run from its making to `record`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._processor_clock = time.process_time()
        forget_peak()
        if _has_memory_of_its_own(device):
            from dbllm_cli.machine.device_memory import forget_device_peak

            forget_device_peak(device)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._clock

    def record(self, scratch: Path, environment: Environment | None) -> dict[str, Any]:
        """Versions, machine, time and peak memory of the run until now.

        Args:
            scratch: of the stage; a run that can be resumed left there where it was begun.
            environment: what the stage computed in.
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
            "processor": processor(),
            **_computed_in(environment),
            **_begun(scratch / ENVIRONMENT),
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _computed_in(environment: Environment | None) -> dict[str, Any]:
    if environment is None:
        return {"threads": None, "kernel": None, "compute_dtype": None}
    return {
        "threads": environment.threads,
        "kernel": environment.kernel,
        "compute_dtype": environment.compute_dtype,
    }


def _has_memory_of_its_own(device: str) -> bool:
    return device.startswith("cuda")


def _begun(path: Path) -> dict[str, Any]:
    return {"begun": read_scratch(path)} if path.is_file() else {}


def _device_memory(device: str) -> dict[str, float]:
    if not _has_memory_of_its_own(device):
        return {}
    from dbllm_cli.machine.device_memory import peak_device_memory_mib

    peak = peak_device_memory_mib(device)
    return {} if peak is None else {"peak_device_memory_mib": round(peak, 1)}

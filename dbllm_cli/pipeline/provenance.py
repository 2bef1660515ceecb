"""How an artifact was made: kept beside it, never part of its digest."""

import platform
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("dbllm", "torch", "transformers")
_CLEAR_PEAK = "5"


class Recorder:
    """Measures one run from its making to `record`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._own_peak = _clear_peak()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._clock

    def record(self) -> dict[str, Any]:
        """Versions, machine, time and peak memory of the run until now."""
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "peak_memory_mib": round(_peak_memory_mib(self._own_peak), 1),
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in _PACKAGES},
            },
            "device": self._device,
            "threads": _threads(),
            "processor": _processor(),
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _clear_peak() -> bool:
    # Linux can forget the peak so far, so that each step of a pipeline gets its own.
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    except OSError:
        return False
    return True


def _peak_memory_mib(own_peak: bool) -> float:
    if own_peak:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024

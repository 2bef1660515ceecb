"""The processor, and the peak memory of this process. Imports no torch."""

import platform
import resource
import sys
from pathlib import Path

ENVIRONMENT = "environment.json"
"""In a stage's scratch: where its run was begun, and the dtype of its products."""


def forget_peak(device: str) -> None:
    """Begin a new peak where the system can (Linux), so that each step of a run gets its own."""
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda") and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mib() -> float:
    """Most memory that was resident since the start, or since `forget_peak`, MiB.

    The kernel's high-water mark where there is one: getrusage hands a parent's peak on to a child.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def peak_device_memory_mib(device: str) -> float | None:
    """Most memory that torch held on a GPU since `forget_peak`, MiB; None on a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_allocated(device)) / 2**20


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name(info: dict[str, str]) -> str:
    """The processor's name, `info` being `cpu_info()`; its architecture where it has none."""
    return info.get("model name") or platform.processor() or platform.machine()


def processor() -> str:
    """The processor's name, and whether it has AMX, which virtual machines of one name may lack."""
    info = cpu_info()
    name = processor_name(info)
    return f"{name} with AMX" if "amx_bf16" in info.get("flags", "").split() else name

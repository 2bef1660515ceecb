"""The peak memory of this process. Imports no torch."""

import resource
import sys
from pathlib import Path


def forget_peak() -> None:
    """Begin a new peak where the system can (Linux), so that each step of a run gets its own."""
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

"""The processor's name and features."""

import platform
from pathlib import Path


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

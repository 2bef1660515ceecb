"""The peak memory of a GPU. Imports torch: asked for only where a device is given that has it."""

import torch


def forget_device_peak(device: str) -> None:
    """Begin a new peak on a CUDA device; nothing on others, which keep none."""
    if device.startswith("cuda") and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory_mib(device: str) -> float | None:
    """Most memory that torch held on a CUDA device since `forget_device_peak`, MiB; else None."""
    if not device.startswith("cuda") or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_allocated(device)) / 2**20

"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(device: str | None = None) -> str:
    """Processor, threads, torch and Python, in words. `device`: the one measured, by default the one chosen."""
    return (
        f"{processor(device)}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def processor(device: str | None = None) -> str:
    """The name of the GPU where there is one and `device` is not "cpu", else of the CPU."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

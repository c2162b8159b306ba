"""The device that a setting names, and how it is called; torch is loaded when one is asked for."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from satdifuser.errors import SettingsError

if TYPE_CHECKING:
    import torch

NO_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",
)


def choose_device(device: str, setting: str) -> torch.device:
    """Choose the device: ``auto`` is a GPU where there is one.

    Args:
        device: ``auto``, or one of torch's names.
        setting: What names it, for the message.

    Raises:
        SettingsError: the device is not there.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = "no such device" if "Expected one of" in str(error) else error
        problem = f"{setting}: {device!r} is not available here: {reason}; use auto, cpu, or cuda with a GPU"
        raise SettingsError(problem) from error
    return chosen


def check_dtype(device: torch.device, dtype: torch.dtype, setting: str, instead: str) -> None:
    """Refuse bfloat16 on a GPU that only emulates it, slower than float32.

    Args:
        device: Which computes …
        dtype: … in this type.
        setting: What names the type, for the message.
        instead: What else to do.

    Raises:
        SettingsError: naming the GPU.
    """
    import torch

    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    with torch.cuda.device(device):
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if not supported:
        raise SettingsError(f"{setting}: bfloat16, but {device_name(device)} does not compute it; {instead}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had no memory: its driver, cuBLAS and cuDNN say so in words of their own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def first_sentence(error: RuntimeError) -> str:
    """What torch says first; advice on its allocator may follow."""
    return str(error).split(". ")[0]


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_uuid(device: torch.device) -> str | None:
    """The UUID of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)

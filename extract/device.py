"""Where the backbone runs: which device, in what arithmetic, and how data travel there and back.

A GPU works through a queue; whoever looks at a value waits for it. So data go out from page-locked memory
without waiting, results come back on a queue of their own, and only the thread that needs them waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[np.generic]]
ALIGNMENT = 256  # bytes
CONTEXT_BYTES = 600e6  # at most, that a process takes of a GPU's memory beside its tensors


def fix_arithmetic(threads: int) -> None:
    """Let equal inputs give equal bits in every process: so many threads, no choice of algorithms by speed.

    float32 stays float32: TF32, with 10 bits of mantissa, is switched off.
    """
    set_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def set_threads(threads: int) -> None:
    """Let torch compute with so many threads here, whatever other threads set, and in threads to come."""
    torch.get_num_threads()  # otherwise torch sets its own number at the thread's first operation
    torch.set_num_threads(threads)


def share_memory(device: torch.device, processes: int) -> None:
    """Let this process take an equal part of the memory of a GPU that several use, and no more."""
    if device.type == "cuda" and processes > 1:
        total = torch.cuda.get_device_properties(device).total_memory
        named = None if device.index is None else device
        part = max(0.0, 1 / processes - CONTEXT_BYTES / total)
        torch.cuda.set_per_process_memory_fraction(part, named)


def stack_for(device: torch.device, arrays: Sequence[NDArray[np.float32]]) -> Tensor:
    """Stack arrays of one shape on the CPU, in memory from which a tensor goes to a device at once."""
    shape = (len(arrays), *arrays[0].shape)
    stacked = torch.empty(shape, pin_memory=device.type == "cuda")
    np.stack(arrays, out=stacked.numpy())
    return stacked


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor from the CPU to a device, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetcher:
    """Brings tensors of a device to the CPU beside its work.

    Args:
        device: Where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._queue = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, tensors: Mapping[str, Tensor]) -> Callable[[], Arrays]:
        """Begin to copy tensors; what is returned waits for them and yields arrays."""
        if self._queue is None:
            return lambda: {name: tensor.numpy() for name, tensor in tensors.items()}
        self._queue.wait_stream(torch.cuda.current_stream(self._queue.device))
        copies = room_for(tensors, page_locked=True)
        with torch.cuda.stream(self._queue):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._queue)  # its memory is not given away before
            # one that waits sleeps: with spinning it would take a core
            done = self._queue.record_event(torch.cuda.Event(blocking=True))

        def wait() -> Arrays:
            done.synchronize()
            # they stay in page-locked memory until their shard is written: to copy them into memory that is
            # fresh each time can take as long as the network does
            return {name: copy.numpy() for name, copy in copies.items()}

        return wait


def room_for(tensors: Mapping[str, Tensor], page_locked: bool) -> dict[str, Tensor]:
    """Empty tensors on the CPU like some others, in one piece of memory.

    Torch rounds each piece of page-locked memory up to a power of two bytes: of several, each just above one,
    half would be wasted. A shard's default size is just below one.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=page_locked)
    return {
        name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(tensors.items(), whole.split(sizes), strict=True)
    }


class Stopwatch:
    """Seconds that a device works on something, begun when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._began = self._now()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> Callable[[], float]:
        """End; what is returned tells the seconds once the device is done."""
        ended = self._now()
        if self._on_gpu:
            return lambda: float(self._began.elapsed_time(ended)) / 1000
        return lambda: float(ended - self._began)

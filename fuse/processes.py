"""One training in several processes, one for each GPU, started by torchrun; alone, nothing here does a thing.

Every process holds all networks and takes its part of each batch. torch's DistributedDataParallel averages
the gradients, so that all of them take the same step. Only the first process measures, writes and prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from satdifuser.errors import SettingsError

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)  # the others wait while the first one fits baselines or measures


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, where torchrun started this one, for the length of a `with` block."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the one that measures, writes and prints."""
    return number() == 0


def parallel(network: nn.Module) -> nn.Module:
    """A network whose gradients are averaged over all processes; its weights are those of `network`."""
    if processes() == 1:
        return network
    if next(network.parameters()).is_cuda:  # on CPUs each process normalises its own part of a batch
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network)


def own_part(order: NDArray[np.intp], batch_size: int) -> NDArray[np.intp]:
    """This process's tiles of every batch, in batches of `batch_size` over the number of processes.

    Raises:
        SettingsError: the batches cannot be shared evenly, or there are too few tiles.
    """
    if processes() == 1:
        return order
    if batch_size % processes() or min(batch_size, len(order)) < 2 * processes():
        raise SettingsError(
            f"fit.batch_size: {batch_size} ({len(order)} tiles to learn from), but {processes()} processes "
            f"share each batch evenly, two tiles each or more; set it to a multiple of {processes()} from "
            f"{2 * processes()} on, or start fewer processes"
        )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return np.concatenate([np.array_split(batch, processes())[number()] for batch in batches])


def weight_of(count: Tensor) -> Tensor:
    """What a mean over so many of this process's targets counts for in the mean of all processes' means."""
    if processes() == 1:
        return torch.ones_like(count)
    total = count.clone()
    dist.all_reduce(total)
    return count * processes() / total.clamp(min=1)


def from_first(value: Value) -> Value:
    """The first process's value, in all of them."""
    if processes() == 1:
        return value
    carried: list[Any] = [value]
    dist.broadcast_object_list(carried)
    found: Value = carried[0]
    return found

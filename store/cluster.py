"""Where Dask's workers are; nothing of Dask is loaded before they are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from satdifuser.errors import ClusterError

CONNECT_SECONDS = 30.0
LOCAL_OPTIONS: dict[str, Any] = {
    "memory_limit": 0,  # a worker that is killed by Dask is a shard done twice
    "dashboard_address": None,
    "silence_logs": logging.ERROR,
}


@dataclass(frozen=True)
class Cluster:
    """Where the workers are: so many processes of this machine, or those of a scheduler."""

    workers: int = 0
    scheduler: str = ""
    threads: int = 2  # of each process: one writes while the other computes

    def __post_init__(self) -> None:
        if find_spec("distributed") is None:
            raise ClusterError("several workers need Dask: install it with `pip install 'satdifuser[dask]'`")

    @contextmanager
    def connect(self, patience: float = CONNECT_SECONDS) -> Iterator[Any]:
        """A client of the cluster.

        Raises:
            ClusterError: the scheduler cannot be reached.
        """
        from distributed import Client, LocalCluster

        if not self.scheduler:
            with (
                LocalCluster(
                    n_workers=self.workers, threads_per_worker=self.threads, **LOCAL_OPTIONS
                ) as local,
                Client(local) as client,
            ):
                yield client
            return
        try:
            client = Client(self.scheduler, timeout=patience)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"--scheduler {self.scheduler}: cannot be reached within {patience:.0f} s ({error}); start "
                "it with `dask scheduler`, or name its address; the same command goes on with what is "
                "committed"
            ) from error
        with client:
            yield client

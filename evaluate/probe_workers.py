"""Spreads the cells of a sweep: over threads of this process, or over Dask's workers.

Each cell is computed by one thread, so that the same bits come out wherever it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TypeVar

import torch

from satdifuser.errors import ClusterError, SatDiFuserError
from satdifuser.evaluate.probe_cells import Cell, Row, SweepData, fit_cell
from satdifuser.evaluate.settings import ProbeSettings
from satdifuser.store.cluster import Cluster
from satdifuser.store.location import Location
from satdifuser.store.reader import open_store

T = TypeVar("T")
R = TypeVar("R")


def fit_cells(
    data: SweepData, cells: Sequence[Cell], cluster: Cluster | None = None
) -> Iterator[tuple[Cell, list[Row]]]:
    """Fit cells, and yield each with its rows as soon as it is done.

    Args:
        data: What they learn from and are chosen by.
        cells: Which.
        cluster: Dask's workers; None for as many threads as there are cores, or one where a GPU computes.

    Raises:
        ClusterError: Dask's workers cannot be reached, or fail.
    """
    if not cells:
        return
    if cluster is not None:
        yield from _on_workers(data, cells, cluster)
        return
    data.load()
    yield from in_threads(partial(fit_cell, data), cells, data.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for each operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(function: Callable[[T], R], items: Sequence[T], device: torch.device) -> Iterator[tuple[T, R]]:
    """Call a function for items, one in each thread at a time; yield each with its result when done."""
    count = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    with one_thread():
        pool = ThreadPoolExecutor(count)
        try:
            futures = {pool.submit(function, item): item for item in items}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # an interruption waits for what is under way only
            pool.shutdown(cancel_futures=True)


def _on_workers(data: SweepData, cells: Sequence[Cell], cluster: Cluster) -> Iterator[tuple[Cell, list[Row]]]:
    path, hashes = data.store.path, data.store.hashes().model_dump_json()
    place: Location = path if isinstance(path, str) else path.resolve()
    with cluster.connect() as client:
        from distributed import as_completed as completed

        futures = {
            client.submit(_fit_on_worker, place, hashes, data.settings, cell, pure=False): cell
            for cell in cells
        }
        for future in completed(list(futures)):
            try:
                yield futures[future], future.result()
            except SatDiFuserError:
                raise
            except Exception as error:
                raise ClusterError(
                    f"{futures[future]}: failed on a worker: {type(error).__name__}: {error}; finished "
                    "cells are kept, and the same command goes on"
                ) from error


def _fit_on_worker(place: Location, hashes: str, settings: ProbeSettings, cell: Cell) -> list[Row]:
    torch.set_num_threads(1)
    return fit_cell(_data_of(place, hashes, settings.model_dump_json()), cell)


@lru_cache(maxsize=1)
def _data_of(place: Location, hashes: str, settings: str) -> SweepData:
    """What the cells of one sweep learn from, read once by each worker."""
    store = open_store(place)
    if store.hashes().model_dump_json() != hashes:
        raise ClusterError(
            f"{place}: is another store for a worker than here; name one that all machines see"
        )
    return SweepData(store, ProbeSettings.model_validate_json(settings))

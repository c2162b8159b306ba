"""Spreads an extraction's shards over Dask workers: local processes, or any cluster that has a scheduler.

The store says which shards are missing, and only committed ones count. So workers may come, leave and die,
and the scheduler may be started anew: whatever is not committed is sent out again.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from satdifuser.errors import ClusterError, SatDiFuserError
from satdifuser.extract.changes import refuse_changed
from satdifuser.extract.job import Job
from satdifuser.extract.plan import Plan, make_plan, require_space
from satdifuser.extract.read_tile import read_row
from satdifuser.extract.readers import processes_wanted
from satdifuser.extract.run import ask_for_labels, planned_attributes, report_skipped, tell_what_is_there
from satdifuser.extract.worker import Order, Report, extract_shard, own_versions, prepare, survey
from satdifuser.store.cluster import CONNECT_SECONDS, Cluster
from satdifuser.store.files import remove_orphans
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore

RECONNECT_SECONDS = 600.0
SHOWN_WORKERS = 6


class SchedulerLostError(Exception):
    """The scheduler is gone, or has forgotten what it was given."""


def extract_on_cluster(
    job: Job, out: Path, cluster: Cluster, overwrite: bool = False, ignore_free_space: bool = False
) -> FeatureStore:
    """Write a store as `satdifuser.extract.run.extract` does, its shards spread over workers.

    Images, backbone and store must have the same paths on all machines.

    Raises:
        ClusterError: the scheduler cannot be reached, a worker has other versions, or workers keep dying.
        SatDiFuserError: as there; whatever was committed stays.
    """
    with cluster.connect() as client:
        plan, order = _order(job, out, cluster, client, overwrite, ignore_free_space)
        batch, loaded = client.submit(prepare, order, plan.records[0], pure=False).result()
        job = plan.job.with_batch(batch)
        attributes = planned_attributes(plan, job, loaded, overwrite)
        with open_or_create(out, attributes, overwrite) as writer:
            order = replace(order, job=job, store_id=writer.attributes.store_id)
            refuse_changed(
                FeatureStore(out),
                plan.records,
                lambda record: read_row(plan.preparation, plan.source, record)[0],
            )
            tell_what_is_there(writer)
            done = _distribute(client, cluster, order, plan.records)
            remove_orphans(out)  # of workers that died
            ask_for_labels(writer.attributes, done)
            store = FeatureStore(out)
            report_skipped(store)
    return store


def _order(
    job: Job, out: Path, cluster: Cluster, client: Any, overwrite: bool, ignore_free_space: bool
) -> tuple[Plan, Order]:
    """Plan the extraction for the machines of the workers, and what they are told of it."""
    versions = own_versions()
    print("waiting for the first worker", file=sys.stderr)
    client.wait_for_workers(1)
    machine = client.submit(survey, versions, job.backbone_settings.device, pure=False).result()
    backbone = job.backbone_settings.model_copy(update={"device": machine.device})
    asked = replace(job, backbone_settings=backbone)
    own_cores = max(1, machine.cores // max(cluster.workers, 1))  # of each worker
    plan = make_plan(asked, out, overwrite, own_cores)
    if not ignore_free_space:
        require_space(plan)
    return plan, Order(
        key=uuid.uuid4().hex,
        out=str(out.resolve()),
        store_id="",
        job=plan.job,
        image_size=plan.image_size,
        layers=plan.layers,
        per_shard=plan.tiles_per_shard,
        versions=versions,
        processes_per_gpu=machine.processes_per_gpu(cluster.workers),
        reader_processes=processes_wanted(plan.job, plan.source, own_cores) if plan.left else 0,
    )


def _distribute(client: Any, cluster: Cluster, order: Order, records: Sequence[Any]) -> int:
    """Have all missing shards extracted, through as many schedulers as it takes; how many tiles that were."""
    store = FeatureStore(Path(order.out))
    todo = sum(_tiles(store, shard) for shard in store.missing_shards())
    with tqdm(
        total=len(records), initial=len(records) - todo, unit="tile", desc="extract", disable=None
    ) as bar:
        try:
            _send(client, order, records, bar)
        except SchedulerLostError as lost:
            _go_on(cluster, order, records, bar, lost)
    return todo


def _go_on(
    cluster: Cluster, order: Order, records: Sequence[Any], bar: tqdm[NoReturn], lost: SchedulerLostError
) -> None:
    """Wait for a scheduler at the same address, and send out what is still missing."""
    end = time.monotonic() + RECONNECT_SECONDS
    while True:
        tqdm.write(f"the scheduler is lost ({lost}); waiting for it at {cluster.scheduler}", file=sys.stderr)
        try:
            with cluster.connect(patience=5.0) as client:
                client.wait_for_workers(1, timeout=max(1.0, end - time.monotonic()))
                _send(client, order, records, bar)
            return
        except SchedulerLostError as error:
            lost, end = error, time.monotonic() + RECONNECT_SECONDS
        except (ClusterError, TimeoutError) as error:
            if time.monotonic() > end:
                raise ClusterError(
                    f"--scheduler {cluster.scheduler}: did not come back within {RECONNECT_SECONDS:.0f} s; "
                    "committed shards are kept: start scheduler and workers, and run the same command again"
                ) from error
            time.sleep(1.0)


def _send(client: Any, order: Order, records: Sequence[Any], bar: tqdm[NoReturn]) -> None:
    """Send out the missing shards, a few more at a time than there are workers' threads."""
    from distributed import as_completed

    store = FeatureStore(Path(order.out))
    waiting, token = list(reversed(store.missing_shards())), uuid.uuid4().hex
    bar.n = len(records) - sum(_tiles(store, shard) for shard in waiting)

    def submit(shard: int) -> Any:
        held = list(records[slice(*store.attributes.shard_range(shard))])
        return client.submit(extract_shard, order, shard, held, key=f"shard-{shard}-{token}")

    rates: dict[str, tuple[int, float]] = {}
    workers: dict[str, int] = client.ncores()
    warned, sent = False, min(_window(workers), len(waiting))
    under_way = as_completed([submit(waiting.pop()) for _ in range(sent)])
    for future in under_way:
        report = _result(future)
        before, workers = workers, client.ncores()
        for lost in sorted(before.keys() - workers.keys()):
            tqdm.write(f"worker {lost} has left; what it had begun is done again", file=sys.stderr)
        tiles, seconds = rates.get(report.worker, (0, 0.0))
        rates[report.worker] = tiles + report.tiles, seconds + report.seconds
        bar.set_postfix_str(rates_text(rates))
        bar.update(report.tiles)
        if report.warning and not warned:
            warned = True
            tqdm.write(report.warning, file=sys.stderr)
        for _ in range(min(len(waiting), max(0, _window(workers) - under_way.count()))):
            under_way.add(submit(waiting.pop()))


def _window(workers: Mapping[str, int]) -> int:
    """How many shards are with workers of so many threads each, or on their way to them."""
    return 2 * max(1, sum(workers.values()))


def _result(future: Any) -> Report:
    """The report of a shard, or the reason why there is none."""
    from distributed import CancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    if future.status in ("lost", "cancelled"):
        raise SchedulerLostError(future.status)
    try:
        report: Report = future.result(timeout=CONNECT_SECONDS)
        return report
    except SatDiFuserError:
        raise
    except KilledWorker as error:
        raise ClusterError(
            f"{future.key}: {error.allowed_failures + 1} workers died over it, the last one "
            f"{error.last_worker}; look at their logs (out of memory?); committed shards are kept, and the "
            "same command goes on"
        ) from error
    except (CancelledError, CommClosedError, TimeoutError) as error:
        raise SchedulerLostError(str(error) or type(error).__name__) from error
    except Exception as error:
        raise ClusterError(f"{future.key}: failed on a worker: {type(error).__name__}: {error}") from error


def rates_text(rates: dict[str, tuple[int, float]]) -> str:
    """Tiles per second of each worker, the slowest first: ``1: 3.2, 0: 3.4 tiles/s``."""
    each = sorted((tiles / max(seconds, 1e-9), name) for name, (tiles, seconds) in rates.items())
    shown = ", ".join(f"{name}: {rate:.3g}" for rate, name in each[:SHOWN_WORKERS])
    return f"{shown}{', …' if len(each) > SHOWN_WORKERS else ''} tiles/s"


def _tiles(store: FeatureStore, shard: int) -> int:
    start, stop = store.attributes.shard_range(shard)
    return stop - start

"""What a worker of a Dask cluster does: load the backbone once, then extract and commit whole shards.

It sets threads, batch and dtype as the store has them, whatever Dask set before, so that its bits are those
of any other worker. Two shards may be under way: one is written while the backbone computes the next.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from threading import BoundedSemaphore, Lock

import torch

from satdifuser.errors import ClusterError, StoreError
from satdifuser.extract.backbone import LoadedModel, find_backbone
from satdifuser.extract.background import Background
from satdifuser.extract.compute import Work, background_of, compute_shard, write_shard
from satdifuser.extract.cost import ShardCost
from satdifuser.extract.device import fix_arithmetic, share_memory
from satdifuser.extract.job import Job
from satdifuser.extract.loading import prepare_work
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.readers import Readers
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.sources import Source, open_source
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.device import choose_device, cores
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import StoreWriter

PACKAGES = ("satdifuser", "torch", "diffusers", "numpy")  # that make the last bits
_loading, _computing, _under_way = Lock(), Lock(), BoundedSemaphore(2)
_loaded: dict[str, Loaded] = {}  # of the one extraction that this process works for


@dataclass(frozen=True)
class Order:
    """What every worker of an extraction is told."""

    key: str  # of this run of the extraction
    out: str  # the store's folder
    store_id: str
    job: Job
    image_size: tuple[int, int]
    layers: list[LayerInfo]
    per_shard: int
    versions: dict[str, str]
    processes_per_gpu: int = 1
    reader_processes: int = 0  # of each worker


@dataclass
class Loaded:
    """What a worker keeps from shard to shard."""

    work: Work
    cost: ShardCost
    source: Source
    readers: Readers | None
    last: Background | None = None  # of the shard before


@dataclass(frozen=True)
class Report:
    """A shard that was committed."""

    shard: int
    tiles: int
    seconds: float
    worker: str
    warning: str  # of its values


@dataclass(frozen=True)
class Machine:
    """What a worker runs on."""

    device: str  # cpu, cuda, or the one GPU that was asked for
    cores: int
    gpus: int

    def processes_per_gpu(self, workers: int) -> int:
        """How many of so many workers of this machine share a GPU; 1 where a scheduler places them."""
        if not self.device.startswith("cuda"):
            return 1
        gpus = self.gpus if self.device == "cuda" else 1
        return max(1, -(-workers // gpus))


def own_versions() -> dict[str, str]:
    """Versions of what makes the last bits of features, and a digest of this package's code."""
    digest = hashlib.sha256()
    package = Path(str(files("satdifuser")))
    for room in ("extract", "store"):
        for file in sorted((package / room).rglob("*.py")):
            digest.update(file.read_bytes())
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "code": digest.hexdigest()[:12]}
    return found | {name: version(name) for name in PACKAGES}


def check_versions(expected: dict[str, str]) -> None:
    """Refuse to work for a process with another version of this package, or of what it computes with.

    Raises:
        ClusterError: naming the worker and what differs.
    """
    own = own_versions()
    differing = [
        f"{name} {own.get(name)} instead of {wanted}"
        for name, wanted in expected.items()
        if own.get(name) != wanted
    ]
    if differing:
        raise ClusterError(
            f"worker {worker_name()} has {', '.join(differing)}; its features could differ in their last "
            "bits: install the same versions everywhere and start the workers anew"
        )


def worker_name() -> str:
    """The name of the Dask worker that runs this; the host outside of one."""
    from distributed import get_worker

    try:
        return str(get_worker().name)
    except ValueError:
        return platform.node()


def survey(versions: dict[str, str], asked: str) -> Machine:
    """Say what this worker runs on, for a device that is asked for or ``auto``."""
    check_versions(versions)
    return Machine(str(choose_device(asked, "backbone.device")), cores(), torch.cuda.device_count())


def prepare(order: Order, first: TileRecord) -> tuple[int, LoadedModel]:
    """Load the backbone: the batch size, found by trial where it was open, and what identifies it."""
    check_versions(order.versions)
    work = _load(order, [first]).work
    return work.batch_size, work.extractor.backbone.loaded


def extract_shard(order: Order, shard: int, records: list[TileRecord]) -> Report:
    """Extract one shard and commit it.

    Raises:
        ClusterError: this worker has other versions.
        StoreError: the store is another one by now, or cannot be written.
        SatDiFuserError: a tile cannot be used.
    """
    check_versions(order.versions)
    with _under_way:
        loaded = _load(order, records)
        work = loaded.work
        if order.job.backbone_settings.metadata:
            work = replace(work, metadata=collect_metadata(records, order.image_size))
        values = ValueRange(order.job.images)
        ahead = read_ahead(order.job, loaded.source, order.image_size, records, loaded.readers)
        with closing(ahead) as tiles:
            begun = chain(list(islice(tiles, 1)), tiles)  # reading begins while another shard is computed
            with _turn_of(loaded, work) as background:
                began = loaded.cost.read()
                computed = compute_shard(work, begun, len(records), values, background, background.check)
        note = loaded.cost.note(began)
        write_shard(_writer(order), shard, computed, lambda: note)
    return Report(shard, len(records), note["seconds"], worker_name(), values.warning())


@contextmanager
def _turn_of(loaded: Loaded, work: Work) -> Iterator[Background]:
    """This shard's turn to compute; without lanes, the next one's begins before the last batch is fetched."""
    if work.lanes is None:
        with background_of(work) as background, _computing:
            fix_arithmetic(int(work.job.settings.threads))  # of this thread
            # no third batch is launched while two are under way: a batch is chosen for two
            background.after, loaded.last = loaded.last, background
            yield background
    else:
        with _computing:
            fix_arithmetic(int(work.job.settings.threads))
            with background_of(work) as background:
                yield background


def _load(order: Order, records: list[TileRecord]) -> Loaded:
    """The loaded backbone, the source and what reads from it, opened once in this process."""
    with _loading:
        if order.key not in _loaded:
            _loaded.clear()
            info, job = find_backbone(order.job.backbone_settings), _placed(order.job)
            share_memory(torch.device(job.backbone_settings.device), order.processes_per_gpu)
            count, preparation = order.reader_processes, job.preparation(order.image_size)
            readers = Readers(count, job.source_settings, preparation) if count else None
            work = prepare_work(job, info, order.image_size, order.layers, records, order.per_shard)
            alone = work.extractor.backbone.device.type == "cuda" and order.processes_per_gpu == 1
            cost = ShardCost(work, metered=alone)
            _loaded[order.key] = Loaded(work, cost, open_source(job.source_settings), readers)
        return _loaded[order.key]


def _placed(job: Job) -> Job:
    """The job on a GPU of its own, where this worker sees several and has a number for a name."""
    name, gpus = worker_name(), torch.cuda.device_count()
    if job.backbone_settings.device != "cuda" or gpus < 2 or not name.isdecimal():
        return job
    backbone = job.backbone_settings.model_copy(update={"device": f"cuda:{int(name) % gpus}"})
    return replace(job, backbone_settings=backbone)


def _writer(order: Order) -> StoreWriter:
    """Open the store, for which the process that sent the order holds the lock."""
    writer = StoreWriter(Path(order.out), lock=None, alone=False)
    if writer.attributes.store_id != order.store_id:
        raise StoreError(f"{order.out}: is another store by now; this shard is not written to it")
    return writer

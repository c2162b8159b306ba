"""What the reading of images and the writing of features cost the thread that launches a GPU's work.

    python benchmarks/launching.py [--readers 1] [--rounds 5] [--launches 3000]

A GPU does its work in order; a thread hands it some thousand operations a batch, and has to be ahead of it.
Here that thread adds small tensors on the CPU, which costs the interpreter what a launch does. Measured in
turns: alone, while threads of this process read tiles (256 px PNG files), while each of these threads has a
process read for it, and while this process writes shards of int8 features of Stable Diffusion 2.1's size
with as many threads as it has cores, at most 8.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from made_up_backbone import make_images
from write_throughput import attributes, made_up, sd_layers

from satdifuser.extract.job import Job
from satdifuser.extract.plan import Plan, make_plan
from satdifuser.extract.readers import started_readers
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, FolderSettings
from satdifuser.store.opening import open_or_create
from satdifuser.store.settings import StoreSettings
from satdifuser.store.writer import TileRow

TILES, PIXELS = 184, 256
TILES_OF_SHARD = 46


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--launches", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), TILES, PIXELS)
        for _ in range(args.rounds):
            found.setdefault("alone", []).append((timed(args.launches), 0))
            for way, own in (("threads", False), ("processes", True)):
                with reading(planned(Path(folder), args.readers, own)) as count:
                    found.setdefault(way, []).append(beside(count, args.launches))
            with writing(Path(folder)) as count:
                found.setdefault("writing", []).append(beside(count, args.launches))
    for way, pairs in found.items():
        seconds, rates = (statistics.median(numbers) for numbers in zip(*pairs, strict=True))
        slower = [pair[0] / alone[0] for pair, alone in zip(pairs, found["alone"], strict=True)]
        print(
            f"{way:10} {1e3 * seconds:6.1f} ms for {args.launches} launches, {statistics.median(slower):.1f} "
            f"times as long ({min(slower):.1f} to {max(slower):.1f}); beside them {rates:.0f} tiles/s"
        )


def beside(count: list[int], launches: int) -> tuple[float, float]:
    """Seconds of some launches, and how many tiles were counted a second meanwhile."""
    began, before = time.perf_counter(), count[0]
    seconds = timed(launches)
    return seconds, (count[0] - before) / (time.perf_counter() - began)


def planned(folder: Path, readers: int, processes: bool) -> Plan:
    settings = ExtractSettings(threads=1, read_threads=readers, read_processes=processes)
    source = FolderSettings(kind="folder", root=folder)
    return make_plan(Job(source, BackboneSettings(), settings, StoreSettings()), folder / "none.zarr")


@contextmanager
def reading(plan: Plan) -> Iterator[list[int]]:
    """Let tiles be read, again and again; yields their number so far."""
    ended, count = threading.Event(), [0]
    with started_readers(plan) as readers:

        def read() -> None:
            while not ended.is_set():
                with closing(
                    read_ahead(plan.job, plan.source, plan.image_size, plan.records, readers)
                ) as tiles:
                    for _ in tiles:
                        count[0] += 1
                        if ended.is_set():
                            return

        thread = threading.Thread(target=read)
        thread.start()
        while count[0] < TILES // 4 and thread.is_alive():  # processes take some time to start
            time.sleep(0.01)
        try:
            yield count
        finally:
            ended.set()
            thread.join()


@contextmanager
def writing(folder: Path) -> Iterator[list[int]]:
    """Let one shard be written, again and again; yields the number of tiles written so far."""
    ended, count = threading.Event(), [0]
    layers, rows = sd_layers(), [TileRow(str(tile), "train") for tile in range(TILES_OF_SHARD)]
    encoded = made_up(layers, "int8", TILES_OF_SHARD)
    declared = attributes(layers, "int8", TILES_OF_SHARD, shards=1)
    with open_or_create(folder / "s.zarr", declared, overwrite=True) as writer:

        def write() -> None:
            while not ended.is_set():
                writer.write_shard(0, rows, [encoded], {})
                count[0] += TILES_OF_SHARD

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield count
        finally:
            ended.set()
            thread.join()


def timed(launches: int, repeats: int = 20) -> float:
    """Seconds of some launches; the median of some repeats."""
    small, found = torch.randn(64), []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(launches):
            torch.add(small, 1.0)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()

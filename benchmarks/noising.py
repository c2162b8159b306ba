"""Cost of the two noisings, and what leaving the U-Net after the last tapped layer saves of each.

    python benchmarks/noising.py [--tiles 32] [--rounds 5]

Sends the same generated tiles through the embedded backbone's autoencoder and U-Net: with forward noising
(all timesteps in one call) and with DDIM inversion, with skipping and without, for the default layers, which
reach into the last block, and for those of the first up block alone. Everything is measured in turns, so that
other load on the machine meets all alike; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from satdifuser.extract.compute import Work
from satdifuser.extract.device import stack_for
from satdifuser.extract.job import Job
from satdifuser.extract.layers import Taps
from satdifuser.extract.loading import load_work
from satdifuser.extract.plan import make_plan
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.store.settings import StoreSettings

LAYERS = {"all up blocks": ["up_blocks.*.attn1", "up_blocks.*.conv2"], "first up block": ["up_blocks.0.*"]}
NOISINGS = ("forward", "inversion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    works = {
        (layers, noising): prepare(args.tiles, noising, patterns)
        for (layers, patterns), noising in itertools.product(LAYERS.items(), NOISINGS)
    }
    seconds: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(args.rounds + 1):
        for (layers, noising), skips in itertools.product(works, (True, False)):
            passing = works[layers, noising][1]
            seconds.setdefault((layers, noising, skips), []).append(timed(passing, skips) / args.tiles)
    found = {key: values[1:] for key, values in seconds.items()}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'layers':15} {'noising':10} {'U-Net calls a batch':>22} {'passes a tile':>17} s a tile, never left"
    )
    for layers, noising in works:
        work, _ = works[layers, noising]
        calls, passes = calls_and_passes(work)
        left, whole = (statistics.median(found[layers, noising, skips]) for skips in (True, False))
        saved = statistics.median(ratios(found[layers, noising, False], found[layers, noising, True]))
        print(f"{layers:15} {noising:10} {calls:22} {passes:17} {left:9.4f} {whole:9.4f} ({saved:.2f} times)")
    slower = ratios(*(found["all up blocks", noising, True] for noising in reversed(NOISINGS)))
    print(f"forward is {statistics.median(slower):.2f} times as fast as inversion (median, default layers)")


def prepare(tiles: int, noising: str, layers: list[str]) -> tuple[Work, Callable[[], object]]:
    """A loaded extraction, and what sends all of its tiles through the backbone."""
    settings = ExtractSettings(noising=noising, layers=layers)  # type: ignore[arg-type]
    job = Job(SyntheticSettings(tiles=tiles), BackboneSettings(), settings, StoreSettings())
    plan = make_plan(job, Path("none.zarr"))
    work = load_work(plan)
    read = list(read_ahead(work.job, plan.source, work.image_size, plan.records))
    batches = [read[start : start + work.batch_size] for start in range(0, tiles, work.batch_size)]

    def run() -> None:
        for batch in batches:
            pictures = stack_for(work.extractor.backbone.device, [t.picture.rgb for t in batch if t.picture])
            work.extractor(pictures, [tile.row.tile_id for tile in batch])

    return work, run


def calls_and_passes(work: Work) -> tuple[int, int]:
    """How often the U-Net runs for a batch, and for a tile; counted."""
    rows: list[int] = []
    handle = work.extractor.backbone.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    work.extractor(torch.zeros(work.batch_size, 3, *work.image_size), ["a tile"] * work.batch_size)
    handle.remove()
    return len(rows), sum(rows) // work.batch_size


def timed(run: Callable[[], object], skips: bool) -> float:
    """Seconds of it, with leaving the U-Net early or without."""
    leave_early = Taps.features_only
    if not skips:
        Taps.features_only = run_whole  # type: ignore[method-assign,assignment]
    try:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    finally:
        Taps.features_only = leave_early  # type: ignore[method-assign]


def run_whole(taps: Taps, *words: Tensor) -> list[Tensor]:
    """The maps of a forward that is not left."""
    taps.output(*words)  # type: ignore[arg-type]
    return taps.features()


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


if __name__ == "__main__":
    main()

"""What extraction costs beyond the U-Net, and what extracting once saves.

    python benchmarks/extract_throughput.py [--size small] [--batch 4] [--tiles 24] [--rounds 5]
    python benchmarks/extract_throughput.py --size sd21 --device cuda --dtype float16 --batch auto --tiles 460

`--root /dev/shm` keeps images and stores in memory, so that the disk's share can be told.

A backbone of random weights: `small`, a U-Net of 34 M parameters (64, 128, 256, 256 channels) behind a small
autoencoder, or `sd21`, U-Net and autoencoder of Stable Diffusion 2.1. Tiles are PNG files, 256 px by default.
Everything is measured in turns within one run, so that other load on the machine meets all alike; the first
round warms up and is not counted.

(a) Extraction, with reading, autoencoder, int8 encoding and writing, against a bare loop of the same U-Net
    calls on the same batches: the share of the loop's speed that is left. What a store costs once, to be
    created, is left out and printed.
(b) Against the released code's way, autoencoder and 10 U-Net calls in a row for each image in each of 40
    epochs, anew for each of three fusions: (i) U-Net passes, by counting; (ii) wall time with extraction,
    reading and the training of the fusions counted on both sides.
(c) Where the time of an extraction goes, each part by itself.
(d) How fast images are read, if nothing else is done.
(e) Tiles per second of one process and of several on the same device (`--shard I/N`, which have equal parts
    of the CPU's cores and no limit of a GPU's memory), while all are between their first and last commits.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from gpu_watch import GpuWatch
from made_up_backbone import SIZES, make_backbone, make_images
from several_processes import rate_of

from satdifuser.extract import run
from satdifuser.extract.compute import Work, background_of, compute_shard
from satdifuser.extract.device import stack_for
from satdifuser.extract.job import Job
from satdifuser.extract.loading import load_work, with_lanes
from satdifuser.extract.plan import Plan, make_plan
from satdifuser.extract.read_tile import ReadTile
from satdifuser.extract.readers import Readers, started_readers
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, FolderSettings
from satdifuser.extract.value_range import ValueRange
from satdifuser.fuse.data import MapLoader
from satdifuser.fuse.inputs import named_inputs
from satdifuser.fuse.run_network import new_network
from satdifuser.fuse.settings import FitSettings
from satdifuser.fuse.train import loss
from satdifuser.store.device import device_name
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.settings import StoreSettings

EPOCHS, FUSIONS = 40, ("global", "localized", "moe")
TILES_OF_SHARD = 24  # or two batches, if batches are given: the default, up to 64, is much for a short run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--noising", choices=["forward", "inversion"], default="forward")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=auto_or_count, default="4", help="tiles of a batch, or auto")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=auto_or_count, default="auto")
    parser.add_argument("--readers", type=auto_or_count, default="auto", help="threads that read images")
    parser.add_argument(
        "--reader-processes", choices=["auto", "true", "false"], default="auto", help="one for each of them"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--autoencoder", action="store_true", help="count it in the bare loop, too")
    parser.add_argument("--mixed", action="store_true", help="train in bfloat16 in (b), on both sides")
    parser.add_argument("--parts", default="abc", help="which of a, b, c, d and e")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of them for (e)")
    parser.add_argument("--root", type=Path, help="where images and stores lie meanwhile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.root) as folder:
        root = Path(folder)
        make_backbone(root / "backbone", SIZES[args.size])
        make_images(root / "images", args.tiles, args.pixels)
        bench = Bench(root, args)
        print(bench.describe())
        with started_readers(bench.plan) as bench.readers:
            if "a" in args.parts:
                bench.against_the_bare_loop()
            if "b" in args.parts:
                bench.against_the_reference()
            if "c" in args.parts:
                bench.profile()
            if "d" in args.parts:
                bench.reading()
        if "e" in args.parts:
            bench.several_processes()


def auto_or_count(text: str) -> int | str:
    return text if text == "auto" else int(text)


class Bench:
    """A planned extraction, loaded, and ways to time its parts."""

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        self.root, self.args, self.number = root, args, 0
        self.plan = self.planned(args.noising)
        self.work = load_work(self.plan)
        self.device = self.work.extractor.backbone.device
        self.tiles = len(self.plan.records)
        self.gpu = GpuWatch(self.device)
        self.store: Any = None  # the one that was written last
        self.readers: Readers | None = None

    def planned(self, noising: str) -> Plan:
        batch = self.args.batch
        job = Job(
            FolderSettings.model_validate({"kind": "folder", "root": self.root / "images"}),
            BackboneSettings(
                model=str(self.root / "backbone"), device=self.args.device, dtype=self.args.dtype
            ),
            ExtractSettings.model_validate(
                {
                    "noising": noising,
                    "batch_size": batch,
                    "threads": self.args.threads,
                    "read_threads": self.args.readers,
                    "read_processes": self.args.reader_processes,
                    "compile": self.args.compile,
                }
            ),
            StoreSettings(tiles_per_shard="auto" if batch == "auto" else max(TILES_OF_SHARD, 2 * batch)),
        )
        return make_plan(job, self.root / "none.zarr")

    def describe(self) -> str:
        unet = sum(p.numel() for p in self.work.extractor.backbone.unet.parameters()) / 1e6
        return (
            f"U-Net of {unet:.1f} M parameters, {len(self.plan.layers)} layers, timesteps "
            f"{self.plan.timesteps}, {self.args.noising} noising, {self.args.pixels} px; "
            f"{device_name(self.device)}, {self.args.dtype}, batches of {self.work.batch_size}, "
            f"{self.plan.job.settings.threads} threads, torch {torch.__version__}"
        )

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds of an action a tile."""
        self.wait()
        began = time.perf_counter()
        action()
        self.wait()
        return (time.perf_counter() - began) / self.tiles

    # --- (a)

    def extract(self, work: Work | None = None, plan: Plan | None = None) -> float:
        """Write a new store in place of the last one: seconds a tile, without its creation."""
        if self.store:  # which may hold files open, and their space with them
            last, self.store = self.store.folder, None
            shutil.rmtree(last)
        work, plan, self.number = work or self.work, plan or self.plan, self.number + 1
        path = self.root / f"{self.number}.zarr"
        attributes = run.planned_attributes(plan, work.job, work.extractor.backbone.loaded)
        began = time.perf_counter()
        with open_or_create(path, attributes, overwrite=False) as writer:
            self.creation = time.perf_counter() - began
            missing = writer.missing_shards()
            with self.gpu:
                seconds = self.timed(
                    lambda: run._fill(work, plan.source, plan.records, writer, missing, self.readers)
                )
        self.store = FeatureStore(path)
        return seconds

    @torch.no_grad()
    def bare_loop(self) -> None:
        """The same U-Net calls on the same batches, whole, and nothing else, unless --autoencoder."""
        backbone, extractor = self.work.extractor.backbone, self.work.extractor
        grid = extractor._grid()
        for start in range(0, self.tiles, self.work.batch_size):
            tiles = min(self.work.batch_size, self.tiles - start)
            rows = tiles * (1 if grid else len(extractor.timesteps))
            shape = backbone.info.latent_shape(self.plan.image_size)
            # no zeros: a GPU calculates with them faster than with other numbers
            x = torch.randn(rows, *shape, device=self.device, dtype=backbone.dtype)
            time = torch.full((rows,), 21.0, device=self.device)
            prompt = backbone.conditions(rows).prompt
            if self.args.autoencoder:
                images = torch.rand(tiles, 3, *self.plan.image_size, device=self.device)
                backbone.vae.encode((2 * images - 1).to(backbone.dtype))
            for _ in grid or [0]:
                backbone.unet(x, time, prompt)

    def against_the_bare_loop(self) -> None:
        ratios, rates = [], []
        for number in range(self.args.rounds + 1):
            bare, ours = self.timed(self.bare_loop), self.extract()
            if number:
                ratios.append(bare / ours)
                rates.append(1 / ours)
                print(f"  (a) bare loop {1 / bare:.2f} tiles/s, extraction {1 / ours:.2f} tiles/s")
            else:
                self.gpu.forget()
        print(
            f"(a) extraction runs at {statistics.median(ratios):.3f} of a bare loop of its U-Net calls"
            f"{' and the autoencoder' * self.args.autoencoder} (median; {min(ratios):.3f} to "
            f"{max(ratios):.3f}), {statistics.median(rates):.2f} tiles/s; "
            f"creating the store took {self.creation:.2f} s"
        )
        if self.device.type == "cuda":
            print(f"    the GPU while extracting: {self.gpu.describe()}")

    # --- (b)

    def against_the_reference(self) -> None:
        plan = self.planned("inversion")
        job = plan.job.with_batch(self.work.batch_size)
        extractor = type(self.work.extractor)(self.work.extractor.backbone, job.settings, plan.layers)
        work = with_lanes(Work(job, extractor, plan.image_size, {}))
        passes = plan.passes_per_tile
        times: dict[str, list[float]] = {}
        for number in range(self.args.rounds + 1):
            found = {
                "features of an image": self.timed(lambda: self.features(work, plan)),
                "its extraction": self.extract(work, plan),
                "its loading": self.timed(self.load),
                "its reading": self.timed(self.read),
            }
            found |= {name: self.timed(lambda name=name: self.train(self.store, name)) for name in FUSIONS}
            for name, seconds in found.items() if number else ():
                times.setdefault(name, []).append(seconds)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        print("  (b) seconds a tile: " + ", ".join(f"{name} {value:.4f}" for name, value in medians.items()))
        ours, theirs = passes, passes * EPOCHS * len(FUSIONS)
        print(f"(b i) U-Net passes a tile: {theirs} their way, {ours} ours: {theirs / ours:.0f} times fewer")
        for fusions in (FUSIONS[:1], FUSIONS):
            ratios = [self.ratio(times, fusions, i) for i in range(self.args.rounds)]
            print(
                f"(b ii) wall time of {EPOCHS} epochs, {len(fusions)} fusion(s): ours "
                f"{statistics.median(ratios):.1f} times faster (median; {min(ratios):.1f} to "
                f"{max(ratios):.1f})"
            )

    def ratio(self, times: dict[str, list[float]], fusions: tuple[str, ...], i: int) -> float:
        """Their wall time over ours, by the figures of one round."""
        training = EPOCHS * sum(times[name][i] for name in fusions)
        theirs = EPOCHS * len(fusions) * times["features of an image"][i] + training
        reading = times["its loading"][i] + EPOCHS * len(fusions) * times["its reading"][i]
        return theirs / (times["its extraction"][i] + reading + training)

    def features(self, work: Work, plan: Plan) -> None:
        """Autoencoder and U-Net calls of every image, as a step of theirs has them; images are in memory."""
        for start in range(0, self.tiles, work.batch_size):
            ids = [record.tile_id for record in plan.records[start : start + work.batch_size]]
            work.extractor(torch.rand(len(ids), 3, *plan.image_size), ids)

    def load(self) -> None:
        """What the first epoch does: all tiles to a GPU, if they fit; nothing is kept in a CPU's memory."""
        self.loaded = self.loader(self.store)

    def read(self) -> None:
        """All tiles of the store, decoded and on the device, as each epoch does."""
        for _ in self.loaded.batches(np.arange(self.tiles), self.work.batch_size, None):
            pass

    def loader(self, store: FeatureStore) -> MapLoader:
        settings = FitSettings(projection=384, norm_groups=32, memory_gb=0)
        return MapLoader(store, np.arange(self.tiles), settings, self.device)

    def train(self, store: FeatureStore, fusion: str) -> None:
        """Forward, backward and step of a fusion on every tile; their features are in memory."""
        settings = FitSettings(projection=384, norm_groups=32, warmup_steps=0)
        inputs = named_inputs(store, None, ["*"])
        network = new_network(store, inputs, settings, fusion).to(self.device)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(network.parameters())
        size = self.work.batch_size
        maps, targets, _ = next(self.loader(store).batches(np.arange(size), size, None))
        assert targets is not None
        targets = targets.to(self.device)
        for _ in range(0, self.tiles, size):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed):
                logits = network(maps)[0]
            loss(logits.float(), targets, 255).backward()
            optimizer.step()

    def read_images(self) -> list[ReadTile]:
        """All tiles, as they are read ahead of the backbone."""
        plan = self.plan
        return list(read_ahead(self.work.job, plan.source, plan.image_size, plan.records, self.readers))

    # --- (c)

    @torch.no_grad()
    def profile(self) -> None:
        """Each part of an extraction by itself, one after the other."""
        job, extractor, size = self.work.job, self.work.extractor, self.work.batch_size
        found: list[Any] = []

        def read() -> None:
            found[:] = self.read_images()

        def batches() -> Any:
            return (found[start : start + size] for start in range(0, self.tiles, size))

        def encode_images() -> None:
            for part in batches():
                pictures = stack_for(self.device, [t.picture.rgb for t in part])
                extractor.latents(pictures, [t.row.tile_id for t in part])

        def everything_but_writing() -> None:
            with background_of(self.work) as background:
                values = ValueRange(job.images)
                compute_shard(self.work, iter(found), self.tiles, values, background, background.check)

        def rounds(action: Callable[[], object]) -> float:
            action()
            return statistics.median(self.timed(action) for _ in range(self.args.rounds))

        parts = {"reading (threads)": rounds(read), "autoencoder": rounds(encode_images)}
        parts["U-Net, bare loop"] = rounds(self.bare_loop)
        computing = rounds(everything_but_writing)
        parts["reduction and fetching"] = computing - parts["autoencoder"] - parts["U-Net, bare loop"]
        whole = statistics.median(self.extract() for _ in range(self.args.rounds))
        parts["writing that was waited for, and the rest"] = whole - computing
        print(
            "(c) seconds a tile; what is negative was saved, by leaving the U-Net early and on a CPU by "
            "computing two batches at once, or overlaps"
        )
        for name, seconds in {**parts, "extraction": whole}.items():
            print(f"    {name:44} {seconds:8.4f}  {seconds / whole:6.1%}")

    # --- (d)

    def reading(self) -> None:
        self.read_images()
        rates = [1 / self.timed(self.read_images) for _ in range(self.args.rounds)]
        print(f"(d) {statistics.median(rates):.0f} tiles/s are read ({min(rates):.0f} to {max(rates):.0f})")

    # --- (e)

    def several_processes(self) -> None:
        per_shard, found = self.plan.tiles_per_shard, dict[int, list[tuple[float, float]]]()
        for count in self.args.processes:
            if self.tiles % (per_shard * count) or self.tiles < 3 * per_shard * count:
                raise SystemExit(
                    f"(e): --tiles {self.tiles}, expected 3, 4, … times {per_shard * count}: at least three "
                    f"whole shards of {per_shard} tiles for each of {count} process(es)"
                )
        self.bare_loop()
        for number in range(self.args.rounds):
            for count in self.args.processes:
                bare = 1 / self.timed(self.bare_loop)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # for the processes
                out = self.root / f"{count}-{number}.zarr"
                rate = rate_of(self.work.job, per_shard, out, count)
                found.setdefault(count, []).append((rate, rate / bare))
                print(f"  (e) bare loop {bare:.2f} tiles/s, {count} process(es) {rate:.2f} tiles/s")
        for count, pairs in found.items():
            rates, shares = zip(*pairs, strict=True)
            print(
                f"(e) {count} process(es): {statistics.median(rates):.2f} tiles/s, "
                f"{statistics.median(shares):.3f} of the bare loop (median; {min(shares):.3f} to "
                f"{max(shares):.3f})"
            )


if __name__ == "__main__":
    main()

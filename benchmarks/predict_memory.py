"""Memory of `satdifuser predict` over a large scene: does it stay flat, and below 2 GB?

    python benchmarks/predict_memory.py [--size 5000] [--tile 256] [--overlap 64] [--folder FOLDER]

A U-Net of random weights (0.9 M parameters), forward noising, one timestep; the run is fitted on a small
generated scene. This one (`tools/make_scene.py`), repeated over --size x --size px, is mapped in a process of
its own with a confidence band. Told are resident and unshared memory of the process and its children (RSS,
USS) over time, with the share of the map that is done, then the largest RSS that the kernel saw, and tiles
per second. Linux only; psutil comes with the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import rasterio
from made_up_backbone import Size, make_backbone
from rasterio.windows import Window

from satdifuser.extract.sources.grid import offsets

MAKE_SCENE = Path(__file__).parents[1] / "tools/make_scene.py"
ONE_THREAD = "--set=extract.threads=1"  # more of them wait for each other by spinning on a busy machine
SATDIFUSER = (sys.executable, "-m", "satdifuser")
BACKBONE = Size(channels=(32,) * 4, heads=1, text=(4, 32), vae=(8,) * 4)
PART = 1024  # px of the generated scene
SHOWN = 25  # samples
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, in bytes."""

    seconds: float
    done: float  # share of the map's rows
    rss: int
    uss: int

    def __str__(self) -> str:
        return (
            f"  {self.seconds:7.0f} s  {self.done:6.1%} of the rows  RSS {self.rss / MB:6.0f} MB  "
            f"USS {self.uss / MB:6.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=5000, help="px a side of the scene")
    parser.add_argument("--tile", type=int, default=256, help="px")
    parser.add_argument("--overlap", type=int, default=64, help="px")
    parser.add_argument("--folder", type=Path, help="for all files; by default one that is deleted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), args.size, args.tile, args.overlap)


def measure(folder: Path, size: int, tile: int, overlap: int) -> None:
    """Map a scene, and print what that took."""
    run = fit_run(folder, tile)
    scene, out = repeat_scene(folder / "part/scene.tif", folder / "scene.tif", size), folder / "map.tif"
    words = (
        *SATDIFUSER,
        "predict",
        run,
        scene,
        "-o",
        out,
        "--confidence",
        "--overlap",
        str(overlap),
        ONE_THREAD,
    )
    print(f"scene of {size} x {size} px, {scene.stat().st_size / MB:.0f} MB", flush=True)
    process = subprocess.Popen(list(map(str, words)))
    samples = watch(process, out.with_name(f".{out.name}.strips"), 2 * size * size)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"satdifuser predict ended with status {status}")
    tiles, seconds = len(offsets(size, tile, overlap)) ** 2, samples[-1].seconds
    processor = usage.ru_utime + usage.ru_stime
    print(
        f"{tiles} tiles of {tile} px, overlap {overlap} px: {seconds:.0f} s, {tiles / seconds:.1f} tiles/s, "
        f"{processor / tiles:.3f} s of CPU a tile\n"
        f"largest RSS {usage.ru_maxrss * 1024 / MB:.0f} MB (kernel), of the samples "
        f"{max(s.rss for s in samples) / MB:.0f} MB; largest USS {max(s.uss for s in samples) / MB:.0f} MB"
    )


def fit_run(folder: Path, tile: int) -> Path:
    """Fit a run on a small scene."""
    part, store = folder / "part", folder / "part.zarr"
    make_backbone(folder / "backbone", BACKBONE)
    source = {"kind": "scenes", "root": part / "scene.tif", "tile_size": tile}
    settings = [f"--set=source.{name}={value}" for name, value in source.items()]
    settings += [f"--set=backbone.model={folder / 'backbone'}", "--set=extract.timesteps=[61]", ONE_THREAD]
    fit = [f"--set=fit.{name}" for name in ("fusion=[global]", "head=linear", "projection=16", "epochs=1")]
    fit += ["--set=fit.norm_groups=4", "--set=evaluate.baselines=false"]
    for words in (
        (sys.executable, MAKE_SCENE, part, "--size", PART),
        (*SATDIFUSER, "extract", *settings, "-o", store),
        (*SATDIFUSER, "label", store, part / "labels.gpkg"),
        (*SATDIFUSER, "fit", store, *fit, "-o", folder / "runs"),
    ):
        subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    return folder / "runs/global-seed0"


def repeat_scene(part: Path, path: Path, size: int) -> Path:
    """Write a scene of (size, size) px that repeats a small one."""
    with rasterio.open(part) as dataset:
        pixels, profile = dataset.read(), dataset.profile
    with rasterio.open(path, "w", **(profile | {"width": size, "height": size})) as dataset:
        for top in range(0, size, PART):
            for left in range(0, size, PART):
                height, width = min(PART, size - top), min(PART, size - left)
                dataset.write(pixels[:, :height, :width], window=Window(left, top, width, height))
    return path


def watch(process: subprocess.Popen[bytes], strips: Path, whole: int) -> list[Sample]:
    """Sample the memory of a process and its children until it ends; print some, evenly over the rows."""
    began, samples, shown = time.monotonic(), list[Sample](), 0
    while not has_ended(process.pid):
        sample = sample_of(process.pid, time.monotonic() - began, strips, whole)
        if sample is not None:
            samples.append(sample)
            if sample.done * SHOWN >= shown:
                print(sample, flush=True)
                shown = int(sample.done * SHOWN) + 1
        time.sleep(1)
    return samples


def has_ended(process: int) -> bool:
    """Whether a process has ended, without asking the kernel to forget it."""
    return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)


def sample_of(process: int, seconds: float, strips: Path, whole: int) -> Sample | None:
    """Memory of a process and its children now; None where one of them ends just then."""
    try:
        parent = psutil.Process(process)
        found = [one.memory_full_info() for one in (parent, *parent.children(recursive=True))]
        done = strips.stat().st_size / whole if strips.exists() else 0
    except (psutil.Error, OSError):
        return None
    return Sample(seconds, done, sum(one.rss for one in found), sum(one.uss for one in found))


if __name__ == "__main__":
    main()

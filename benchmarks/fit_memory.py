"""Memory of `satdifuser fit` from a store that is larger than the memory it may use.

    python benchmarks/fit_memory.py [--gigabytes 10] [--memory 4] [--epochs 2] [--folder FOLDER]

Makes up a store of Stable Diffusion 2.1's size at 256 px, 21 layers, one timestep, float16: 7 MB a tile; 70 %
of the tiles are train, the rest val. A global fusion of 32 channels is fitted to it in a process of its own
with `fit.memory_gb` as given, on one thread. Told are its resident and unshared memory (RSS, USS) every ten
seconds, and the largest RSS that the kernel saw. Linux only; psutil comes with the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from write_throughput import attributes, made_up, sd_layers

from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.writer import TileRow

TILES = 24  # of a shard
TRAIN = 0.7
CLASSES = ("a", "b")
EVERY = 10  # seconds
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10, help="size of the store")
    parser.add_argument("--memory", type=float, default=4, help="fit.memory_gb")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for all files; by default one that is deleted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = write_store(Path(folder) / "s.zarr", args.gigabytes)
        print(f"store of {store.size_bytes() / GB:.1f} GB, {store.attributes.tiles} tiles", flush=True)
        watch_fit(Path(folder), args.memory, args.epochs)


def write_store(path: Path, gigabytes: float) -> FeatureStore:
    """Write a store of that size; all shards have the same features."""
    layers = sd_layers()
    encoded = made_up(layers, "float16", TILES)
    shard_bytes = sum(array.nbytes for arrays in encoded.values() for array in arrays.values())
    shards = round(gigabytes * GB / shard_bytes)
    declared = attributes(layers, "float16", TILES, shards).model_copy(
        update={"task": "classification", "classes": list(CLASSES)}
    )
    with open_or_create(path, declared, overwrite=False) as writer:
        for shard in range(shards):
            split = "train" if shard < TRAIN * shards else "val"
            targets = np.arange(TILES, dtype=np.int32) % len(CLASSES)
            rows = [TileRow(f"{shard}-{i}", split, target=targets[i, ...]) for i in range(TILES)]
            writer.write_shard(shard, rows, [encoded], {})
    return FeatureStore(path)


def watch_fit(folder: Path, memory: float, epochs: int) -> None:
    """Fit to the store, and print the memory that takes."""
    settings = {
        "fusion": "[global]",
        "projection": 32,
        "norm_groups": 4,
        "epochs": epochs,
        "memory_gb": memory,
    }
    words = [sys.executable, "-m", "satdifuser", "fit", folder / "s.zarr", "-o", folder / "runs"]
    words += [f"--set=fit.{name}={value}" for name, value in settings.items()]
    words += ["--set=evaluate.baselines=false"]
    began = time.monotonic()
    process = subprocess.Popen(list(map(str, words)), env=os.environ | {"OMP_NUM_THREADS": "1"})
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        held = psutil.Process(process.pid).memory_full_info()
        print(
            f"  {time.monotonic() - began:6.0f} s  RSS {held.rss / GB:5.2f} GB  USS {held.uss / GB:5.2f} GB",
            flush=True,
        )
        time.sleep(EVERY)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"satdifuser fit ended with status {status}")
    print(
        f"{epochs} epochs, fit.memory_gb={memory:g}: {time.monotonic() - began:.0f} s, largest RSS "
        f"{usage.ru_maxrss * 1024 / GB:.2f} GB (kernel)"
    )


if __name__ == "__main__":
    main()

"""Memory of `satdifuser extract` over many shards: does it stay flat?

    python benchmarks/extract_memory.py [--tiles 6000] [--folder FOLDER]

Generated tiles of 64 px through the embedded backbone, forward noising at three timesteps, int8, 32 tiles a
shard, one thread. Told is the resident memory (RSS) as each tenth of the shards but the last is committed,
and the largest that the kernel saw. Linux only; psutil comes with the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

TILES_OF_SHARD = 32
TENTHS = 10
EVERY = 0.2  # seconds between two looks
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", type=int, default=6000)
    parser.add_argument("--folder", type=Path, help="for the store; by default one that is deleted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        watch_extraction(Path(folder) / "s.zarr", args.tiles)


def watch_extraction(store: Path, tiles: int) -> None:
    """Extract so many tiles, and print the memory that takes."""
    settings = {
        "source.tiles": tiles,
        "store.tiles_per_shard": TILES_OF_SHARD,
        "extract.threads": 1,
        "backbone.device": "cpu",
    }
    words = [sys.executable, "-m", "satdifuser", "extract", "-o", str(store)]
    words += [f"--set={name}={value}" for name, value in settings.items()]
    began, shards, shown = time.monotonic(), -(-tiles // TILES_OF_SHARD), 1
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    while watched.status() != psutil.STATUS_ZOMBIE:
        committed = sum(1 for _ in (store / "commits/c").glob("*[0-9]"))
        if committed < shards and committed * TENTHS >= shown * shards:
            rss = watched.memory_info().rss / MB
            print(f"  {time.monotonic() - began:6.0f} s  {committed} shards  RSS {rss:.0f} MB", flush=True)
            shown = committed * TENTHS // shards + 1
        time.sleep(EVERY)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"satdifuser extract ended with {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - began
    print(
        f"{tiles} tiles, {shards} shards: {seconds:.0f} s, largest RSS {usage.ru_maxrss * 1024 / MB:.0f} MB "
        "(kernel)"
    )


if __name__ == "__main__":
    main()

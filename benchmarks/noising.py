"""Cost of the two noisings: forward (all timesteps in one U-Net call) against DDIM inversion.

    python benchmarks/noising.py [--tiles 32] [--rounds 5]

Extracts the same generated tiles with the embedded backbone by both, in turns so that other load on the
machine meets both alike, and prints tiles per second of each round and the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from satdifuser.extract.job import Job
from satdifuser.extract.run import extract
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.store.settings import StoreSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ratios = []
    for number in range(args.rounds):
        forward, inversion = (tiles_per_second(args.tiles, noising) for noising in ("forward", "inversion"))
        ratios.append(forward / inversion)
        print(f"round {number}: forward {forward:.1f} tiles/s, inversion {inversion:.1f} tiles/s")
    print(f"forward is {statistics.median(ratios):.2f} times as fast as inversion (median)")


def tiles_per_second(tiles: int, noising: str) -> float:
    """Extract at the released timesteps; counts the reading of tiles and the U-Net, not the start-up."""
    settings = ExtractSettings(noising=noising)  # type: ignore[arg-type]
    job = Job(SyntheticSettings(tiles=tiles), BackboneSettings(), settings, StoreSettings())
    with tempfile.TemporaryDirectory() as folder:
        store = extract(job, Path(folder) / "features.zarr")
        seconds = sum(record["seconds"] for record in store.commits)
    return tiles / seconds


if __name__ == "__main__":
    main()

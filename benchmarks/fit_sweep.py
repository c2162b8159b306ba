"""What a sweep saves by training several networks on the same batches.

    python benchmarks/fit_sweep.py STORE [--rounds 3] [--epochs 1] [--memory_gb 4]

Trains the same candidates (two learning rates for each of single, concatenation and global) together and one
after the other, in turns so that other load on the machine meets both alike, and prints processor seconds of
each round and the median ratio. `--memory_gb 0` reads every batch from the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from satdifuser.evaluate.evaluation import new_outcome
from satdifuser.fuse.fit import fit_candidates
from satdifuser.fuse.grid import Candidate, expand
from satdifuser.fuse.settings import SweepSettings
from satdifuser.store.reader import FeatureStore, open_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--memory_gb", type=float, default=4.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = open_store(args.store)
    sweep = SweepSettings(
        fusion=["single", "concatenation", "global"],
        lr=[0.002, 0.004],
        epochs=args.epochs,
        memory_gb=args.memory_gb,
    )
    candidates = expand(sweep, store)
    ratios = []
    for number in range(args.rounds):
        together = seconds(store, [candidates])
        apart = seconds(store, [[one] for one in candidates])
        ratios.append(apart / together)
        print(f"round {number}: {len(candidates)} networks together {together:.1f} s, apart {apart:.1f} s")
    print(f"apart takes {statistics.median(ratios):.2f} times as long as together (median)")


def seconds(store: FeatureStore, groups: Sequence[Sequence[Candidate]]) -> float:
    """Processor seconds of training the candidates of one group after the other."""
    began = time.process_time()
    for candidates in groups:
        with tempfile.TemporaryDirectory() as folder:
            fit_candidates(store, candidates, Path(folder), new_outcome)
    return time.process_time() - began


if __name__ == "__main__":
    main()

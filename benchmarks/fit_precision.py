"""How much faster a training step of each fusion is in mixed precision.

    python benchmarks/fit_precision.py [--precision bfloat16] [--layers small] [--projection 384] [--batch 4]

Forward under `torch.autocast`, as `fit.precision` has it, and backward, in turns with float32 within one run;
the first round warms up and is not counted. Layers as in benchmarks/fusion_step.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from fusion_step import FUSIONS, LAYERS, now, random_maps

from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.store.device import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--layers", choices=LAYERS, default="small")
    parser.add_argument("--projection", type=int, default=384)
    parser.add_argument("--norm_groups", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(
        f"{args.layers} layers, {args.timesteps} timesteps, projection {args.projection}, batches of "
        f"{args.batch}; {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    pixels, channels = LAYERS[args.layers]
    maps = random_maps(pixels, channels, args.timesteps, args.batch, device)
    narrow = getattr(torch, args.precision)
    for name, kind in FUSIONS.items():
        torch.manual_seed(0)
        own = {"warmup_steps": 0} if name == "moe" else {}
        fusion = kind(channels, args.timesteps, args.projection, args.norm_groups, **own).to(device)
        found = [
            [step_seconds(fusion, maps, dtype) for dtype in (torch.float32, narrow)]
            for _ in range(args.rounds + 1)
        ][1:]
        wide, mixed = (statistics.median(seconds) for seconds in zip(*found, strict=True))
        ratios = [a / b for a, b in found]
        print(
            f"{name:10} float32 {wide:.3f} s, {args.precision} {mixed:.3f} s: "
            f"{statistics.median(ratios):.2f} times as fast (median; {min(ratios):.2f} to {max(ratios):.2f})"
        )


def step_seconds(fusion: nn.Module, maps: FeatureMaps, dtype: torch.dtype) -> float:
    """Seconds of a forward and its backward."""
    fusion.zero_grad(set_to_none=True)
    device = next(fusion.parameters()).device.type
    began = now()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        fused = fusion(maps)[0]
    torch.autograd.backward([x.float().square().mean() for x in fused])
    return now() - began


if __name__ == "__main__":
    main()

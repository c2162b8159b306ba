"""How much faster a training step of each fusion is in mixed precision.

    python benchmarks/fit_precision.py [--precision bfloat16] [--layers small] [--projection 384] [--batch 4]

Forward under `torch.autocast`, as `fit.precision` has it, and backward, in turns with float32 within one run;
the first round warms up and is not counted. Layers as in benchmarks/fusion_step.py.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from fusion_step import made_up, now, options

from satdifuser.fuse.fusion import FeatureMaps


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", choices=["bfloat16", "float16"], default="bfloat16")
    args = parser.parse_args()
    dtypes = torch.float32, getattr(torch, args.precision)
    for name, fusion, maps in made_up(args):
        found = [[step_seconds(fusion, maps, dtype) for dtype in dtypes] for _ in range(args.rounds + 1)][1:]
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

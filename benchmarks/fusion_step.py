"""What folding timesteps into the batch saves in a training step of each fusion.

    python benchmarks/fusion_step.py [--layers small] [--projection 384] [--batch 4] [--rounds 5]

The reference is the equations as they stand: a call of a layer's bottleneck, or of an expert mixture, for
each timestep. Both use the same modules and weights; that they agree is checked first. Forward and backward
are timed in turns within one run; the first round warms up and is not counted. `small` are the layers of the
U-Net of benchmarks/made_up_backbone.py, `sd21` those of Stable Diffusion 2.1, both at 256 px; `embedded`
those of the embedded backbone at 64 px.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from satdifuser.fuse.fusion import Channels, FeatureMaps, GlobalFusion, LocalizedFusion, MoEFusion
from satdifuser.store.device import device_name

FUSIONS: dict[str, type[nn.Module]] = {"global": GlobalFusion, "localized": LocalizedFusion, "moe": MoEFusion}
LAYERS: dict[str, tuple[int, Channels]] = {
    "embedded": (64, {4: [48] * 4, 8: [96] * 4, 16: [128] * 4}),
    "small": (256, {8: [64] * 6, 16: [128] * 6, 32: [256] * 6, 64: [256] * 3}),
    "sd21": (256, {8: [320] * 6, 16: [640] * 6, 32: [1280] * 6, 64: [1280] * 3}),
}
"""Image size in pixels, and per stride the widths of the layers."""


def main() -> None:
    args = options(__doc__).parse_args()
    for name, fusion, maps in made_up(args):
        compare(name, fusion, maps, args.rounds)


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", choices=LAYERS, default="small")
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=list(FUSIONS))
    parser.add_argument("--projection", type=int, default=384)
    parser.add_argument("--norm_groups", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser


def made_up(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module, FeatureMaps]]:
    """Fusions by name, untrained, each with maps to fuse; says on stdout what is measured."""
    device = torch.device(args.device)
    print(
        f"{args.layers} layers, {args.timesteps} timesteps, projection {args.projection}, batches of "
        f"{args.batch}; {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    pixels, channels = LAYERS[args.layers]
    maps = random_maps(pixels, channels, args.timesteps, args.batch, device)
    for name in args.fusions:
        torch.manual_seed(0)
        own = {"warmup_steps": 0} if name == "moe" else {}
        fusion = FUSIONS[name](channels, args.timesteps, args.projection, args.norm_groups, **own).to(device)
        yield name, fusion, maps


def random_maps(
    pixels: int, channels: Channels, timesteps: int, tiles: int, device: torch.device
) -> FeatureMaps:
    """Standard normal feature maps."""
    return {
        stride: [
            torch.randn(tiles, timesteps, width, pixels // stride, pixels // stride, device=device)
            for width in widths
        ]
        for stride, widths in channels.items()
    }


def compare(name: str, fusion: nn.Module, maps: FeatureMaps, rounds: int) -> None:
    """Print how both ways compare in turns."""
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "loop": lambda: LOOPS[name](fusion, maps),
        "folded": lambda: fusion(maps)[0],
    }
    with torch.no_grad():
        for theirs, ours in zip(*(way() for way in ways.values()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    found = [{way: step_seconds(fusion, run) for way, run in ways.items()} for _ in range(rounds + 1)][1:]
    for i, part in enumerate(("forward", "backward", "both")):
        loop, folded = ([times[way][i] for times in found] for way in ways)
        ratios = [a / b for a, b in zip(loop, folded, strict=True)]
        speed = f"{statistics.median(ratios):.2f} times (median; {min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:10} {part:8} loop {statistics.median(loop):.3f} s, "
            f"folded {statistics.median(folded):.3f} s: {speed}"
        )


def step_seconds(fusion: nn.Module, forward: Callable[[], list[Tensor]]) -> tuple[float, float, float]:
    """Seconds of a forward, of its backward, and of both."""
    fusion.zero_grad(set_to_none=True)
    began = now()
    fused = forward()
    between = now()
    torch.autograd.backward([x.square().mean() for x in fused])
    ended = now()
    return between - began, ended - between, ended - began


def now() -> float:
    """The time at which all work is done that was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- the equations, one timestep at a time


def loop_global(fusion: GlobalFusion, maps: FeatureMaps) -> list[Tensor]:
    weights, layers, fused, layer = fusion.mixing_weights.softmax(0), len(fusion.bottleneck_layers), [], 0
    for xs in maps.values():
        total: Tensor | float = 0.0
        for x in xs:
            for t in range(fusion.timesteps):
                total = total + weights[t * layers + layer] * fusion.bottleneck_layers[layer](x[:, t])
            layer += 1
        fused.append(torch.as_tensor(total))
    return fused


def loop_localized(fusion: LocalizedFusion, maps: FeatureMaps) -> list[Tensor]:
    modules, fused = iter(fusion.bottleneck_layers), []
    for xs, gate in zip(maps.values(), fusion.gate_modules, strict=True):
        blocks = [next(modules) for _ in xs]
        ys = [block(x[:, t]) for t in range(fusion.timesteps) for x, block in zip(xs, blocks, strict=True)]
        weights = gate(torch.stack(ys).mean(0)).softmax(1)
        fused.append(torch.stack([weights[:, k, None] * y for k, y in enumerate(ys)]).sum(0))
    return fused


def loop_moe(fusion: MoEFusion, maps: FeatureMaps) -> list[Tensor]:
    fused = []
    for xs, mixture in zip(maps.values(), fusion.scale_moes, strict=True):
        soft = torch.zeros(len(xs[0]), dtype=torch.bool, device=xs[0].device)
        ys = [mixture(torch.cat([x[:, t] for x in xs], 1), soft)[0] for t in range(fusion.timesteps)]
        fused.append(torch.stack(ys).mean(0))
    return fused


LOOPS: dict[str, Callable[..., list[Tensor]]] = {
    "global": loop_global,
    "localized": loop_localized,
    "moe": loop_moe,
}


if __name__ == "__main__":
    main()

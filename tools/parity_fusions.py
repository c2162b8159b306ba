"""Rebuilds the recorded cases of A, the fusions, and B, fusions with heads and a training step."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from parity_case import WITH_WEIGHT, Case, Pairs, UnknownCaseError
from torch import Tensor, nn

from satdifuser.fuse.fusion import Channels, FeatureMaps, GlobalFusion, LocalizedFusion, MoEFusion
from satdifuser.fuse.heads import LinearHead, UPerNetHead
from satdifuser.fuse.network import Network
from satdifuser.fuse.train import loss

IGNORE = -100  # the reference's ignored label
LATENT_STRIDE = 8
# The reference's own defaults, which its checkpoints and cases do not repeat.
FUSION_DEFAULTS = {
    "projection_dim": 384,
    "num_norm_groups": 32,
    "num_res_blocks": 1,
    "gating_tempature": 1.0,
    "num_experts": 8,
    "top_k": 2,
    "channels": 512,
}
MOE_WARMUP_STEPS = {"archs.classifiers": 300, "archs.segmenters": 500, "archs.aggregation_networks": 500}


def describe_layers(arguments: dict[str, Any]) -> tuple[Channels, list[int]]:
    """Widths by stride, and the map sizes from large to small, of a case's feature_dims."""
    dims = {int(size): widths for size, widths in arguments["feature_dims"].items()}
    sizes = sorted(dims, reverse=True)
    return {LATENT_STRIDE * sizes[0] // size: dims[size] for size in sizes}, sizes


def build_fusion(case: Case, arguments: dict[str, Any]) -> nn.Module:
    """Build the fusion that a reference class contains, as the released code computes it."""
    channels, _ = describe_layers(arguments)
    options = {
        "channels": channels,
        "timesteps": len(arguments["save_timesteps"]),
        "projection": arguments["projection_dim"],
        "norm_groups": arguments["num_norm_groups"],
        "num_res_blocks": arguments["num_res_blocks"],
    }
    name = case.info.get("cls", case.info.get("decoder"))
    if re.search(r"\.(Global|GW)", name):
        return GlobalFusion(**options)
    if re.search(r"\.(Local|LW)", name):
        return LocalizedFusion(**options, temperature=arguments["gating_tempature"], reference_slicing=True)
    if re.search(r"\.MoE", name):
        fusion = MoEFusion(
            **options,
            experts=arguments["num_experts"],
            top_k=arguments["top_k"],
            warmup_steps=arguments.get("warmup_steps", MOE_WARMUP_STEPS[name.rsplit(".", 1)[0]]),
            reference_counting=True,
        )
        fusion.forwards.fill_(forwards_before(case))
        return fusion
    raise UnknownCaseError(f"class {name}")


def forwards_before(case: Case) -> int:
    """What the reference's counter of calls held before the first one; it counts per scale."""
    if case.info.get("calls"):
        return int(case.info["calls"][0]["global_step_during_call"]) - 1
    return int(np.max(case.info.get("global_step_before") or 0))


def read_maps(case: Case, arguments: dict[str, Any]) -> FeatureMaps:
    """A case's inputs ``in/SAVED_STEP/SCALE``: per stride one (B, T, C, H, W) tensor per layer."""
    channels, _ = describe_layers(arguments)
    steps = sorted(arguments["save_timesteps"], reverse=True)  # descending index is ascending noise
    return {
        stride: list(
            torch.stack([case.tensor(f"in/{step}/{scale}") for step in steps], dim=1).split(widths, dim=2)
        )
        for scale, (stride, widths) in enumerate(channels.items())
    }


def check_mode(case: Case) -> str:
    mode = str(case.info.get("mode", "eval"))
    if not mode.startswith(("train", "eval")):
        raise UnknownCaseError(f"mode {mode}")
    return mode


def run_fusion(case: Case) -> Pairs:
    """A fusion alone: one forward for each of out/, out2/, …"""
    arguments = FUSION_DEFAULTS | case.info["kwargs"]
    fusion = build_fusion(case, arguments)
    fusion.load_state_dict(case.state())
    fusion.train(check_mode(case).startswith("train"))
    maps = read_maps(case, arguments)
    for prefix in sorted({name.split("/")[0] for name in case.arrays if name.startswith("out")}):
        with torch.no_grad(), experts_watched(fusion) as watched:
            fused, weights = fusion(maps)
        yield from ((f"{prefix}/fused/{i}", x) for i, x in enumerate(fused))
        if isinstance(fusion, GlobalFusion):
            yield f"{prefix}/mixing_softmax", weights.flatten()
        if isinstance(fusion, LocalizedFusion):
            yield from ((f"{prefix}/gating/{i}", x) for i, x in enumerate(weights))
        yield from expert_calls(case, prefix, arguments, watched)


@contextmanager
def experts_watched(fusion: nn.Module) -> Iterator[list[tuple[Any, Tensor, Tensor]]]:
    """Collect (mixture, input, output) of every expert mixture that runs."""
    calls: list[tuple[Any, Tensor, Tensor]] = []
    hooks = [
        mixture.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out[0])))
        for mixture in getattr(fusion, "scale_moes", [])
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def expert_calls(
    case: Case, prefix: str, arguments: dict[str, Any], calls: list[tuple[Any, Tensor, Tensor]]
) -> Pairs:
    """What the reference recorded of each call of its mixtures: gate logits, choice, mean of the result."""
    steps = sorted(arguments["save_timesteps"], reverse=True)
    for scale, (mixture, x, y) in enumerate(calls):
        logits = mixture.gate(x).detach()
        found = {
            "gate_logits_over_temperature": logits,
            "topk_indices": logits.topk(mixture.top_k).indices,
            "fused_channel_mean": y.mean((2, 3)),
        }
        for position, step in enumerate(steps):
            for name, values in found.items():
                key = f"{prefix}/per_call/{scale}/{step}/{name}"
                if key in case.arrays:
                    yield key, values.unflatten(0, (-1, len(steps)))[:, position]


def build_decoder(case: Case, arguments: dict[str, Any]) -> Network:
    """Build a fusion with its head and load the reference's weights."""
    fusion = build_fusion(case, arguments)
    projection, classes = arguments["projection_dim"], arguments["num_classes"]
    name = case.info.get("cls", case.info.get("decoder"))
    head: nn.Module = LinearHead(projection, classes)
    if name.startswith("archs.segmenters."):
        scales = len(arguments["feature_dims"])
        check_upernet(arguments, scales)
        head = UPerNetHead(projection, scales, classes, arguments["channels"])
    network = Network(fusion, head)
    network.load_reference(case.state())
    return network


def check_upernet(arguments: dict[str, Any], scales: int) -> None:
    for name, usual in (("pool_scales", [1, 2, 3, 6]), ("rescales", [1, 1, 1, 1])):
        if list(arguments.get(name, usual))[:scales] != usual[:scales]:
            raise UnknownCaseError(f"{name} {arguments[name]}")
    if arguments.get("align_corners"):
        raise UnknownCaseError("align_corners true")


def run_decoder(case: Case) -> Pairs:
    """A fusion with a head: logits; in training mode also loss, gradients and buffers."""
    arguments = FUSION_DEFAULTS | case.info["kwargs"]
    network = build_decoder(case, arguments)
    training = check_mode(case).startswith("train")
    network.train(training)
    if "Dropout2d" in case.info.get("mode", "") and isinstance(network.head, UPerNetHead):
        network.head.dropout.eval()
    maps = read_maps(case, arguments)
    size = case.info.get("output_shape") or (case.arrays["out/logits"].shape[2:] or None)
    if training:
        yield from train_step(case, network, maps, size)
        return
    with torch.no_grad():
        logits, weights = network(maps, size and tuple(size))
    yield "out/logits", logits
    if isinstance(network.fusion, GlobalFusion) and "out/misc" in case.arrays:
        yield "out/misc", weights.flatten()
    if isinstance(network.fusion, LocalizedFusion):
        yield from ((f"out/misc/{i}", x) for i, x in enumerate(weights) if f"out/misc/{i}" in case.arrays)


def train_step(case: Case, network: Network, maps: FeatureMaps, size: Any) -> Pairs:
    """Loss, gradients and buffers of one training step, and the logits after one step of Adam."""
    size = size and tuple(size)
    logits, _ = network(maps, size)
    value = loss(logits, case.tensor("in_labels"), IGNORE)
    value.backward()
    yield "out/logits", logits
    yield "out/loss", value
    grads = {}
    for name, parameter in network.named_parameters():
        grads[name.split(".", 1)[1]] = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )
    buffers = {name.split(".", 1)[1]: value for name, value in network.named_buffers()}
    vanishing = biases_before_batch_norm(network)
    for key in list(case.arrays):
        kind, _, name = key.removeprefix("out/").partition("/")
        if kind == "after":
            yield (
                key,
                (network.fusion.forwards.view(1) if name.endswith("global_step") else buffers[name].clone()),
            )
        elif kind in ("grad", "grad_norm"):
            yield (
                with_weight(case, key, kind, grads)
                if name in vanishing
                else (key, measure(kind, grads[name]))
            )
    if "out/logits_after_one_adam_step" in case.arrays:
        rate = re.search(r"lr ([\d.e-]+)", case.info["optimizer"])
        if rate is None:
            raise UnknownCaseError(f"optimizer {case.info['optimizer']}")
        torch.optim.Adam(network.parameters(), lr=float(rate[1])).step()
        yield "out/logits_after_one_adam_step", network(maps, size)[0]


def measure(kind: str, gradient: Tensor) -> Tensor:
    return gradient.norm() if kind == "grad_norm" else gradient


def biases_before_batch_norm(network: Network) -> set[str]:
    """Names of biases whose gradient is 0 but for rounding, since a batch norm takes the mean away."""
    found = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            for i, (first, second) in enumerate(itertools.pairwise(module)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    found.add(f"{name}.{i}.bias".split(".", 1)[1])
    return found


def with_weight(case: Case, key: str, kind: str, grads: dict[str, Tensor]) -> tuple[str, Tensor]:
    """A vanishing gradient together with that of its weight, which says how small is small."""
    names = [key.rsplit("/", 1)[1], key.rsplit("/", 1)[1].removesuffix("bias") + "weight"]
    both = key + WITH_WEIGHT
    case.arrays[both] = np.concatenate([case.arrays[f"out/{kind}/{name}"].ravel() for name in names])
    return both, torch.cat([measure(kind, grads[name]).flatten() for name in names])

"""Compare this package with arrays recorded from the reference implementation.

    python tools/check_parity.py GOLDEN_DIR

GOLDEN_DIR holds the folders A (fusions), B (fusions with heads), C (DiffusionSat's U-Net) and D (extraction,
text, schedule, end to end). Each case is a JSON file that names class, arguments and mode, with its arrays in
an npz beside it. All computation is the package's own; this file only rebuilds what a case describes.

One line per case; it passes where max|ours - golden| <= 1e-4 max|golden| for every array compared. Exit code
0: all passed; 1: a case failed or is of a kind unknown here; 2: there is no case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from satdifuser.extract.backbone import Backbone, find_backbone, load_backbone, load_unet, load_vae
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.layers import select_layers
from satdifuser.extract.metadata import FIELDS, ORIGINS, Metadata, normalise
from satdifuser.extract.noising import alpha_bar, inversion_grid
from satdifuser.extract.settings import BackboneSettings, ExtractSettings
from satdifuser.extract.unet import Conditions
from satdifuser.fuse.fusion import Channels, FeatureMaps, GlobalFusion, LocalizedFusion, MoEFusion
from satdifuser.fuse.heads import LinearHead, UPerNetHead
from satdifuser.fuse.network import Network
from satdifuser.fuse.train import loss

TOLERANCE = 1e-4
IGNORE = -100  # the reference's ignored label
LATENT_STRIDE = 8
WITH_WEIGHT = " and weight"
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

Pairs = Iterator[tuple[str, Any]]
"""Names of recorded arrays, with our own value for each."""


class UnknownCaseError(Exception):
    """A case that this tool cannot rebuild."""


@dataclass(frozen=True)
class Case:
    """One recorded case."""

    root: Path
    path: Path
    info: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def state(self) -> dict[str, Tensor]:
        return {key[6:]: self.tensor(key) for key in self.arrays if key.startswith("state/")}


@dataclass
class Result:
    """What came of comparing one case."""

    name: str
    compared: int = 0
    left: int = 0  # recorded results that we do not compute, such as the unused load-balance value
    worst: float = 0.0
    worst_array: str = ""
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.compared > 0 and self.worst <= TOLERANCE

    def line(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        if self.problem or not self.compared:
            return f"{verdict}  {self.name:32} {self.problem or 'nothing was compared'}"
        left = f" ({self.left} more not computed here)" if self.left else ""
        arrays = f"{self.compared} arrays{left}, worst {self.worst_array}"
        return f"{verdict}  {self.name:32} {self.worst:.1e}  {arrays}"


def main() -> int:
    """Run all cases of the folder that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="GOLDEN_DIR")
    folder = parser.parse_args().folder
    paths = find_cases(folder)
    if not paths:
        print(f"{folder}: no cases; expected JSON files in its folders A, B, C or D", file=sys.stderr)
        return 2
    results = []
    for path in paths:
        results.append(check(folder, path))
        print(results[-1].line(), flush=True)
    failed = [result.name for result in results if not result.passed]
    print(f"{len(results) - len(failed)} of {len(results)} cases passed, tolerance {TOLERANCE:g}")
    return 1 if failed else 0


def find_cases(folder: Path) -> list[Path]:
    """List JSON files, npz files without one, and model folders that are cases of their own."""
    found: list[Path] = []
    for kind in "ABCD":
        here = folder / kind
        found += here.glob("*.json")
        found += [path for path in here.glob("*.npz") if not path.with_suffix(".json").exists()]
        found += [path for path in here.glob("vae_*") if path.is_dir()]
    return sorted(found)


def check(root: Path, path: Path) -> Result:
    """Rebuild one case and compare all arrays that we compute too."""
    result = Result(path.relative_to(root).with_suffix("").as_posix())
    try:
        case = read_case(root, path)
        recorded = {name for name in case.arrays if "out" in name.split("/")[0] or "/out/" in name}
        for name, ours in choose_runner(case)(case):
            compare(result, name, ours, case.arrays[name])
            recorded.discard(name.removesuffix(WITH_WEIGHT))
        result.left = len(recorded)
    except UnknownCaseError as error:
        result.problem = f"unknown case: {error}"
    except Exception as error:  # whatever breaks, the other cases still run
        result.problem = f"{type(error).__name__}: {error}"
    return result


def read_case(root: Path, path: Path) -> Case:
    info = json.loads(path.read_text()) if path.suffix == ".json" else {}
    npz = path.with_name(info["npz"]) if "npz" in info else path.with_suffix(".npz")
    arrays: dict[str, NDArray[Any]] = {}
    if npz.is_file():
        with np.load(npz) as held:  # NumPy's default refuses pickled arrays
            arrays = {name: held[name] for name in held.files}
    return Case(root, path, info, arrays)


def compare(result: Result, name: str, ours: Any, golden: NDArray[Any]) -> None:
    """Add one array to a result; another shape or kind of dtype, or a NaN, is a failure."""
    mine = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours, golden.dtype)
    result.compared += 1
    if mine.shape != golden.shape or mine.dtype.kind != golden.dtype.kind:
        result.problem = f"{name}: {mine.dtype} {mine.shape}, expected {golden.dtype} {golden.shape}"
        return
    size = np.abs(golden).max(initial=0)
    error = float(np.abs(mine - golden).max(initial=0) / (size if size else 1))
    if not np.isfinite(error):
        result.problem = f"{name}: not finite"
    elif error >= result.worst:
        result.worst, result.worst_array = error, name


def choose_runner(case: Case) -> Callable[[Case], Pairs]:
    """Pick what rebuilds a case, by what its files hold."""
    info, arrays = case.info, case.arrays
    kinds: list[tuple[bool, Callable[[Case], Pairs]]] = [
        (str(info.get("cls", "")).startswith("archs.aggregation_networks."), run_fusion),
        (str(info.get("cls", "")).startswith(("archs.classifiers.", "archs.segmenters.")), run_decoder),
        ("cases" in info and "attn_processor" in info, run_unet),
        ("fields_in_order" in info, run_metadata),
        ("config" in info and "diffusion_mode" in info["config"], run_extraction),
        ("decoder" in info and "checkpoint" in info, run_end_to_end),
        ("prompts" in info and "embedding" in arrays, run_text),
        ("alphas_cumprod" in arrays, run_schedule),
        (bool(info) and all(key.isdecimal() for key in info), run_timesteps),
        (case.path.is_dir() and case.path.name.startswith("vae_"), run_vae),
    ]
    for matches, runner in kinds:
        if matches:
            return runner
    raise UnknownCaseError(f"its keys are {', '.join(list(info)[:8]) or ', '.join(list(arrays)[:8])}")


# --- A, B: fusions and heads


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


# --- C: DiffusionSat's U-Net


def run_unet(case: Case) -> Pairs:
    """Forwards of the U-Net with and without metadata, and its embeddings."""
    for described in case.info["cases"]:
        tag, weights = described["tag"], described["weights"].split()[0]
        folder = next(f for f in (case.root / weights, case.path.parent / weights) if f.is_dir())
        given = {k.split("/in/")[1]: case.tensor(k) for k in case.arrays if k.startswith(f"{tag}/in/")}
        unet = load_unet(folder, metadata="metadata" in given)
        conditions = Conditions(given["encoder_hidden_states"], given.get("metadata"))
        with torch.no_grad(), outputs_watched(unet) as watched:
            yield (
                f"{tag}/out/sample",
                unet(given["sample"], given["timestep"], **conditions.keywords()).sample,
            )
        yield from ((key, x) for name, x in watched if (key := f"{tag}/mid/{name}") in case.arrays)


@contextmanager
def outputs_watched(unet: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect the outputs of the embeddings by the names under which the reference recorded them."""
    seen: list[tuple[str, Tensor]] = []

    def keep(name: str, second: str = "") -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            again = second and any(name == earlier for earlier, _ in seen)
            seen.append((second if again else name, output.flatten(0, -2)))

        return hook

    named = [(unet.time_proj, keep("time_proj", "time_proj_of_metadata"))]
    named += [(unet.time_embedding, keep("time_embedding"))]
    embeddings = getattr(unet, "metadata_embedding", [])
    named += [(module, keep(f"metadata_embedding/{i}")) for i, module in enumerate(embeddings)]
    hooks = [module.register_forward_hook(hook) for module, hook in named]
    yield seen
    for hook in hooks:
        hook.remove()


def run_metadata(case: Case) -> Pairs:
    """The scaling of the seven metadata fields; the recorded inputs already start at 0."""
    if tuple(case.info["fields_in_order"]) != FIELDS:
        raise UnknownCaseError(f"fields {case.info['fields_in_order']}")
    for name, recorded in case.info["cases"].items():
        absolute = [float(v) + origin for v, origin in zip(recorded["in"], ORIGINS, strict=True)]
        dropped = {i for i, v in enumerate(recorded["in"]) if v == 0}
        values = [None if i in dropped else value for i, value in enumerate(absolute)]
        case.arrays[name] = np.array(recorded["normalised_float32"], np.float32)
        if absolute[4] <= 2100:  # one recorded case passes a year that was not made relative first
            yield name, normalise(Metadata(*values))


# --- D: extraction


def load_checkpoint(case: Case, folder: Path, **settings: Any) -> Backbone:
    chosen = BackboneSettings(model=str(folder), device="cpu", **settings)
    return load_backbone(find_backbone(chosen), chosen)


def find_checkpoint(case: Case, image_size: int | None = None) -> Path:
    """The checkpoint a case names, the one of its image size, or the only one there is."""
    if "checkpoint" in case.info:
        return case.root / case.info["checkpoint"]
    pattern = "resolution*" if image_size is None else f"resolution{image_size}"
    found = sorted((case.path.parent / "ckpt").glob(pattern))
    if not found:
        raise UnknownCaseError(f"no checkpoint {pattern} beside it")
    return found[0]


def run_extraction(case: Case) -> Pairs:
    """Features of given latents by inversion, or by the reference's one-pass generation mode."""
    config = case.info["config"]
    prompt = case.info.get("prompts") or config.get("prompt", "A satellite image")
    negative = config.get("negative_prompt", "")
    backbone = load_checkpoint(
        case, find_checkpoint(case, config["img_size"]), prompt=prompt, negative_prompt=negative
    )
    latents = case.tensor("in/latents")
    conditions = backbone.conditions(len(latents))
    yield "in/cond", conditions.prompt
    if "in/uncond" in case.arrays:
        yield "in/uncond", backbone.negative_conditions(conditions).prompt
    if config["diffusion_mode"] == "inversion":
        yield from run_inversion(case, backbone, latents, conditions)
    elif config["diffusion_mode"] == "generation":
        yield from run_generation(case, backbone, latents, conditions)
    else:
        raise UnknownCaseError(f"diffusion_mode {config['diffusion_mode']}")


def saved_timesteps(config: dict[str, Any], backbone: Backbone) -> dict[int, int]:
    """Saved step of the reference to the timestep its inversion feeds there."""
    info, steps = backbone.info, config["num_timesteps"]
    grid = inversion_grid(info.train_steps, steps, info.steps_offset)
    return {saved: grid[steps - 1 - saved] for saved in config["save_timesteps"]}


def make_extractor(case: Case, backbone: Backbone, latents: Tensor, **settings: Any) -> FeatureExtractor:
    paths = case.info.get("module_paths", ["up_blocks.*.attn1", "up_blocks.*.conv2"])
    chosen = ExtractSettings(prediction="epsilon", layers=paths, **settings)
    stride = backbone.info.latent_stride
    table = backbone.info.layers((latents.shape[-2] * stride, latents.shape[-1] * stride))
    return FeatureExtractor(backbone, chosen, select_layers(table, paths))


def run_inversion(case: Case, backbone: Backbone, latents: Tensor, conditions: Conditions) -> Pairs:
    config, guidance = case.info["config"], case.info.get("guidance_scale", -1)
    saved = saved_timesteps(config, backbone)
    extractor = make_extractor(
        case,
        backbone,
        latents,
        noising="inversion",
        timesteps=sorted(saved.values()),
        steps=config["num_timesteps"],
        guidance=False if guidance == -1 else float(guidance),
    )
    with inputs_watched(backbone.unet) as seen:
        maps = extractor.invert(latents, conditions)
    yield from recorded_features(case, "out", extractor, maps, saved)
    own = seen if guidance == -1 else seen[::2]  # with guidance every step but the last has a second call
    yield from ((key, x) for i, (x, _) in enumerate(own) if (key := f"out/step/{i}/xt") in case.arrays)
    if "out/steps/t" in case.arrays:
        yield "out/steps/t", torch.stack([t for _, t in own])
        alphas = [alpha_bar(backbone.alphas, int(t[0])).float().expand(len(t)) for _, t in own]
        yield "out/steps/alpha_t", torch.stack(alphas)


def run_generation(case: Case, backbone: Backbone, latents: Tensor, conditions: Conditions) -> Pairs:
    """The reference's generation mode: noise once to the level of its lowest saved step, one forward."""
    saved = min(case.info["config"]["save_timesteps"])
    timestep = case.info["scheduler_timesteps"][saved]
    extractor = make_extractor(case, backbone, latents, noising="forward", timesteps=[timestep])
    for call in sorted(name for name in case.arrays if name.startswith("in/noise_call")):
        prefix = call.replace("in/noise_", "out_")
        with inputs_watched(backbone.unet) as seen:
            maps = extractor.noise_once(latents, [case.tensor(call)], conditions)
        yield f"{prefix}/noisy_latents", seen[0][0]
        yield from recorded_features(case, prefix, extractor, maps, {saved: timestep})


@contextmanager
def inputs_watched(unet: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect latents and timesteps of every call of the U-Net."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = unet.register_forward_pre_hook(lambda _module, args: seen.append((args[0], args[1])))
    yield seen
    hook.remove()


def recorded_features(
    case: Case, prefix: str, extractor: FeatureExtractor, maps: list[Tensor], saved: dict[int, int]
) -> Pairs:
    """Bring our maps into the reference's form: per saved step and scale, the layers' channels joined."""
    paths = case.info.get("module_paths", [layer.name for layer in extractor.layers])
    by_name = {layer.name: m for layer, m in zip(extractor.layers, maps, strict=True)}
    ordered = [by_name[path] for path in paths]
    side = case.info.get("config", {}).get("resize_outputs", -1)
    if side > 0:
        ordered = [
            F.interpolate(m.flatten(0, 1), side, mode="bilinear").unflatten(0, m.shape[:2]) for m in ordered
        ]
    widths = sorted({m.shape[-1] for m in ordered}, reverse=True)
    joined = [torch.cat([m for m in ordered if m.shape[-1] == width], dim=2) for width in widths]
    for step, timestep in saved.items():
        position = sorted(saved.values()).index(timestep)
        for scale, m in enumerate(joined):
            for key, x in (
                (f"{prefix}/feats/{step}/{scale}", m[:, position]),
                (f"{prefix}/feats/{step}", m[:, position]),
                (f"{prefix}/feats_mean_hw/{step}/{scale}", m[:, position].mean((2, 3))),
            ):
                if key in case.arrays:
                    yield key, x


def run_end_to_end(case: Case) -> Pairs:
    """Image to latents to features to logits."""
    backbone = load_checkpoint(case, find_checkpoint(case))
    rgb = (case.tensor("in/image") + 1) / 2
    scaling = backbone.vae.config.scaling_factor
    yield "mid/vae_mean", backbone.encode(rgb, None) / scaling
    latents = backbone.encode(rgb, case.tensor("mid/sample_noise"))
    yield "mid/latents", latents
    arguments = FUSION_DEFAULTS | case.info["kwargs"]
    steps = arguments.get("num_timesteps", 50)
    saved = saved_timesteps({"save_timesteps": arguments["save_timesteps"], "num_timesteps": steps}, backbone)
    extractor = make_extractor(
        case, backbone, latents, noising="inversion", timesteps=sorted(saved.values()), steps=steps
    )
    maps = extractor.invert(latents, backbone.conditions(len(latents)))
    yield from recorded_features(case, "out", extractor, maps, saved)
    by_stride: FeatureMaps = {}
    for layer, m in zip(extractor.layers, maps, strict=True):
        by_stride.setdefault(layer.stride, []).append(m)
    with torch.no_grad():
        logits, weights = build_decoder(case, arguments).eval()(by_stride)
    yield "out/logits", logits
    if isinstance(weights, Tensor) and "out/mixing_softmax" in case.arrays:
        yield "out/mixing_softmax", weights.flatten()


def run_text(case: Case) -> Pairs:
    """Hidden states of prompts."""
    yield "embedding", load_checkpoint(case, find_checkpoint(case), prompt=case.info["prompts"]).prompt


def run_schedule(case: Case) -> Pairs:
    """Noise levels, and the timesteps of the inversion."""
    backbone = load_checkpoint(case, find_checkpoint(case))
    info = backbone.info
    for name in ("alphas_cumprod", "alphas_cumprod_as_extractor"):
        if name in case.arrays:
            yield name, backbone.alphas.float()
    for name in [name for name in case.arrays if re.fullmatch(r"timesteps_\d+", name)]:
        steps = int(name.split("_")[1])
        grid = inversion_grid(info.train_steps, steps, info.steps_offset)
        case.arrays[f"{name}[1:]"] = case.arrays[name][1:]  # the inversion never feeds the noisiest
        yield f"{name}[1:]", np.array(grid[:0:-1])


def run_timesteps(case: Case) -> Pairs:
    """The timesteps and noise levels that the network is fed for several step counts."""
    backbone = load_checkpoint(case, find_checkpoint(case))
    for steps, table in case.info.items():
        config = {"num_timesteps": int(steps), "save_timesteps": table["save_timesteps"]}
        saved = saved_timesteps(config, backbone)
        grid = inversion_grid(backbone.info.train_steps, int(steps), backbone.info.steps_offset)
        calls = grid[: grid.index(max(saved.values())) + 1]
        alphas = [float(alpha_bar(backbone.alphas, t)) for t in saved.values()]
        found = {"t_per_call": calls, "t_of_saved": list(saved.values()), "alpha_of_saved": alphas}
        for name, ours in found.items():
            golden = table[name]
            values = [golden[str(s)] for s in saved] if isinstance(golden, dict) else golden
            case.arrays[f"{steps}/{name}"] = np.array(values, np.float64)
            yield f"{steps}/{name}", ours


def run_vae(case: Case) -> Pairs:
    """An autoencoder with other key names holds the same weights as the checkpoint's."""
    renamed, expected = load_vae(case.path), load_vae(find_checkpoint(case) / "vae")
    for name, tensor in expected.state_dict().items():
        case.arrays[name] = tensor.numpy()
        yield name, renamed.state_dict()[name]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())

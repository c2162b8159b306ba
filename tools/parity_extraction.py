"""Rebuilds the recorded cases of D: extraction, text, schedule, autoencoder, and all of it end to end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from parity_case import Case, Pairs, UnknownCaseError
from parity_fusions import FUSION_DEFAULTS, build_decoder
from torch import Tensor, nn

from satdifuser.extract.backbone import Backbone, find_backbone, load_backbone, load_vae
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.layers import select_layers
from satdifuser.extract.noising import alpha_bar, inversion_grid
from satdifuser.extract.settings import BackboneSettings, ExtractSettings
from satdifuser.extract.unet import Conditions
from satdifuser.fuse.fusion import FeatureMaps


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

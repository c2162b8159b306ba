"""Train the embedded backbone: a small diffusion model of satellite images.

    python tools/train_embedded.py IMAGES [IMAGES …] --out FOLDER

IMAGES is a folder, a zip, a GeoTIFF or synthetic:N (embedded_images.py). FOLDER/backbone becomes a diffusers
folder that `backbone.model` takes, FOLDER/seen_images.json lists the hashes of all images used. The run
checkpoints itself; the same command continues where it stopped, on the same numbers: whatever is random
depends on the seed and the step alone. `--set steps=20000` changes a field of Recipe (embedded_recipe.py),
and `steps` may be changed between runs. `--start BACKBONE` begins from the weights of another backbone.

Two models, one after the other, as in Rombach et al. 2022 (arXiv 2112.10752): a VAE (64 x 64 x 3 to
16 x 16 x 4) on random crops, then a U-Net that predicts the noise in its latents.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from embedded_images import Crops, load_crops
from embedded_models import (
    PatchSpace,
    load_matching,
    new_scheduler,
    new_unet,
    new_vae,
    prompt_embedding,
    save_backbone,
    to_signed,
)
from embedded_recipe import Recipe
from embedded_state import Log, load_checkpoint, save_checkpoint

LOG_EVERY = 50
CHECKPOINT_EVERY = 100
VIEWS = 8  # flips and quarter turns
Batches = Callable[[int], Tensor]
"""Step -> clean latents (B, c, h, w)."""


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = args.recipe
    crops = load_crops(args.images, recipe.size, recipe.seed)
    crops.save_record(args.out / "seen_images.json")
    vae = make_vae(crops, recipe, args.out, args.start)
    batches = make_batches(vae, crops, recipe, args.out)
    unet = train_unet(batches, recipe, args.out, args.start, args.compile)
    save_backbone(args.out / "backbone", vae, unet, recipe)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGES")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, log and finished backbone")
    parser.add_argument("--start", type=Path, help="a backbone's folder whose weights are the first ones")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    try:
        args.recipe = change(Recipe(), args.changes)
    except ValueError as error:
        parser.error(str(error))
    if args.recipe.latents == "patches":
        parser.error(
            "--set latents=patches: extraction reads no such backbone yet; try_recipes.py trains one"
        )
    return args


def change(recipe: Recipe, changes: list[str]) -> Recipe:
    """Apply FIELD=VALUE to a recipe; values are JSON where they are no plain words."""
    known = {field.name for field in fields(recipe)}
    for text in changes:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"--set {text}: no field {name!r}; expected one of {', '.join(sorted(known))}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        recipe = replace(recipe, **{name: tuple(parsed) if isinstance(parsed, list) else parsed})
    return recipe


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def advance(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step of the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def make_vae(crops: Crops, recipe: Recipe, out: Path, start: Path | None) -> Any:
    """What turns images into latents and back: learned here, taken from another backbone, or fixed."""
    if recipe.latents == "patches":
        return PatchSpace(crops.pixels[:2000], recipe.components, recipe.whitening)
    if start is None:
        return train_vae(crops.pixels, recipe, out)
    vae = type(new_vae()).from_pretrained(start / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


def train_vae(images: Tensor, recipe: Recipe, out: Path) -> Any:
    """Fit the autoencoder on half-size crops: L1 plus a slight KL pull (1e-6)."""
    torch.manual_seed(recipe.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0.0)
    state = load_checkpoint(out / "vae.pt") or {"step": 0}
    if state["step"]:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log, schedule = (
        Log(out / "log.jsonl", "vae", state["step"]),
        replace(recipe, steps=recipe.vae_steps, lr=recipe.vae_lr),
    )
    for step in range(state["step"], recipe.vae_steps):
        generator = step_generator(recipe.seed, step)
        x = to_signed(random_window(images, recipe.batch, recipe.size // 2, generator))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.sample(generator)).sample
        l1 = (reconstruction.float() - x).abs().mean()
        advance(l1 + 1e-6 * posterior.kl().float().mean(), vae, optimizer, schedule.learning_rate(step))
        if (step + 1) % LOG_EVERY == 0:
            log.write(step + 1, l1=l1.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.vae_steps:
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_checkpoint(out / "vae.pt", state)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_signed(x)).latent_dist.mode() for x in images[:1024].split(128)])
    vae.register_to_config(scaling_factor=1 / z.std().item())
    return vae.eval().requires_grad_(False)


def random_window(images: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """One window of `count` images drawn at random, (count, C, side, side)."""
    chosen = torch.randint(len(images), (count,), generator=generator)
    top, left = torch.randint(images.shape[-1] - side + 1, (2,), generator=generator).tolist()
    return images[chosen, :, top : top + side, left : left + side]


def make_batches(vae: Any, crops: Crops, recipe: Recipe, out: Path) -> Batches:
    """Latents of random crops, each flipped and turned at random."""
    side = recipe.size // 4

    def draw(step: int) -> Tensor:
        generator = step_generator(recipe.seed + 1, step)
        chosen = torch.randint(count, (recipe.batch,), generator=generator)
        view = torch.randint(VIEWS, (recipe.batch,), generator=generator)
        top, left = torch.randint(side - recipe.crop + 1, (2,), generator=generator).tolist()
        return look_up(chosen, view)[:, :, top : top + recipe.crop, left : left + recipe.crop]

    count = len(crops.pixels)
    if recipe.latents == "vae":
        latents = encode_views(vae, crops.pixels, out)

        def look_up(chosen: Tensor, view: Tensor) -> Tensor:
            return latents[chosen, view].float()
    else:

        def look_up(chosen: Tensor, view: Tensor) -> Tensor:
            turned = [turn(crops.pixels[i], int(v)) for i, v in zip(chosen, view, strict=True)]
            return vae.encode(to_signed(torch.stack(turned))).latent_dist.mode()

    return draw


def turn(image: Tensor, view: int) -> Tensor:
    """One of the eight flips and quarter turns of (…, H, W)."""
    return torch.rot90(image.flip(-1) if view >= 4 else image, view % 4, (-2, -1))


@torch.no_grad()
def encode_views(vae: Any, images: Tensor, out: Path) -> Tensor:
    """Encode every image in its eight views, once: (N, 8, 4, h, w) float16, scaled to unit variance."""
    path = out / "latents.pt"
    state = load_checkpoint(path)
    if state is None:
        views = []
        for view in range(VIEWS):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                encoded = [vae.encode(turn(to_signed(x), view)).latent_dist.mode() for x in images.split(128)]
            views.append((torch.cat(encoded).float() * vae.config.scaling_factor).half())
        state = {"latents": torch.stack(views, 1)}
        save_checkpoint(path, state)
    return state["latents"]


def draw_timesteps(recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A share uniform below `low_noise`, the others uniform over the schedule; (B,) int64."""
    low = torch.rand(recipe.batch, generator=generator) < recipe.low_noise_share
    limit = torch.where(low, recipe.low_noise, 1000)
    return (torch.rand(recipe.batch, generator=generator) * limit).long()


def denoising_loss(unet: Any, z: Tensor, alphas: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Weighted mean squared error of the U-Net's prediction at random noise levels."""
    generator = step_generator(recipe.seed + 2, step)
    noise = torch.randn(z.shape, generator=generator)
    t = draw_timesteps(recipe, generator)
    a = alphas[t].view(-1, 1, 1, 1)
    target = noise if recipe.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    prompt = prompt_embedding(recipe).expand(len(z), -1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, prompt).sample
    error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    return (error * loss_weights(a.flatten(), recipe)).mean()


def loss_weights(a: Tensor, recipe: Recipe) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v (Hang et al. 2023, section 3.4)."""
    if not recipe.min_snr:
        return torch.ones_like(a)
    snr = a / (1 - a)
    return snr.clamp(max=recipe.min_snr) / (snr + (recipe.prediction == "v_prediction"))


def train_unet(
    batches: Batches, recipe: Recipe, out: Path, start: Path | None, compiled: bool = False
) -> Any:
    """Fit the U-Net with AdamW; the returned weights are an exponential moving average."""
    torch.manual_seed(recipe.seed)
    unet = new_unet(recipe)
    fresh = load_matching(unet, start / "unet/diffusion_pytorch_model.safetensors") if start else []
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    state = load_checkpoint(out / "unet.pt") or {"step": 0, "cpu_seconds": 0.0}
    if state["step"]:
        unet.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    elif start:
        print(f"started from {start}; at random values: {', '.join(fresh) or 'none'}", flush=True)
    before, started = state["cpu_seconds"], time.process_time()
    log, alphas = Log(out / "log.jsonl", "unet", state["step"]), new_scheduler(recipe).alphas_cumprod
    forward = torch.compile(unet) if compiled else unet
    recent: list[float] = []
    for step in range(state["step"], recipe.steps):
        loss = denoising_loss(forward, batches(step), alphas, recipe, step)
        advance(loss, unet, optimizer, recipe.learning_rate(step))
        average.update_parameters(unet)
        recent.append(loss.item())
        spent = before + time.process_time() - started
        if (step + 1) % LOG_EVERY == 0:
            log.write(step + 1, loss=sum(recent) / len(recent), cpu_seconds=round(spent, 1))
            recent.clear()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.steps:
            state = {"model": unet.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "cpu_seconds": spent}
            save_checkpoint(out / "unet.pt", state)
    return average.module.eval()


if __name__ == "__main__":
    main()

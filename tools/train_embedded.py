"""Train the embedded backbone: a small diffusion model of satellite images.

    python tools/train_embedded.py IMAGES [IMAGES …] --out FOLDER

IMAGES is a folder, a zip, a GeoTIFF or synthetic:N (embedded_images.py). FOLDER/backbone becomes a diffusers
folder that `backbone.model` takes, FOLDER/seen_images.json lists the hashes of all images used. The run
checkpoints itself; the same command continues where it stopped, on the same numbers: whatever is random
depends on the seed, the step and the kind of device alone. `--set steps=20000` changes a field of Recipe
(embedded_recipe.py), and `steps` may be changed between runs. `--start BACKBONE` begins from the weights of
another backbone. `--snapshots 4000` also keeps FOLDER/backbone-4000, -8000 and so on.

Two models, one after the other, as in Rombach et al. 2022 (arXiv 2112.10752): a VAE (64 x 64 x 3 to
16 x 16 x 4) on random crops, then a U-Net that predicts the noise in its latents.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from embedded_images import load_crops
from embedded_models import (
    CPU,
    STRIDE,
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
from embedded_step import Optimizer, Step

from satdifuser.store.device import choose_device

LOG_EVERY = 50
VIEWS = 8  # flips and quarter turns
Batches = Callable[[int], Tensor]
"""Step -> clean latents (B, c, h, w)."""
Prompts = Callable[[int], Tensor]
"""Step -> what the U-Net is told of the batch's images, (B, 1, width)."""


@dataclass(frozen=True)
class Run:
    """Where and how a recipe is trained."""

    out: Path
    device: torch.device = CPU
    start: Path | None = None  # a backbone whose weights are the first ones
    compiled: bool = False
    checkpoint_every: int = 100  # steps
    snapshots: int = 0  # steps between the U-Nets that are kept beside the last one; 0: none


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = args.recipe
    device = choose_device(args.device, "--device")
    run = Run(args.out, device, args.start, args.compile, args.checkpoint_every, args.snapshots)
    crops = load_crops(args.images, recipe.size, recipe.seed)
    crops.save_record(args.out / "seen_images.json")
    images = crops.pixels.to(device)
    vae = make_vae(images, recipe, run)

    def keep(unet: Any, step: int) -> None:
        save_backbone(args.out / f"backbone-{step}", vae, unet, recipe)

    unet = train_unet(make_batches(vae, images, recipe, run), recipe, run, keep=keep)
    save_backbone(args.out / "backbone", vae, unet, recipe)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGES")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, log and finished backbone")
    parser.add_argument("--start", type=Path, help="a backbone's folder whose weights are the first ones")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--snapshots", type=int, default=0, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    try:
        args.recipe = change(Recipe(), args.changes)
    except ValueError as error:
        parser.error(str(error))
    if problem := find_problem(args.recipe):
        parser.error(problem)
    return args


def find_problem(recipe: Recipe) -> str:
    """What is wrong with a recipe; "" where nothing is."""
    if recipe.latents == "patches":
        return "--set latents=patches: extraction reads no such backbone yet; try_recipes.py trains one"
    if recipe.vae_crop % STRIDE or not 0 < recipe.vae_crop <= recipe.size:
        limit = f"a multiple of {STRIDE} up to the size, {recipe.size}"
        return f"--set vae_crop: vae_crop is {recipe.vae_crop}, but must be {limit}"
    side = recipe.size // STRIDE
    if not 1 <= recipe.crop <= side:
        return f"--set crop: crop is {recipe.crop}, but must be 1 to {side}, the side of the latents"
    return ""


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


def step_generator(seed: int, step: int, device: torch.device = CPU) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def make_vae(images: Tensor, recipe: Recipe, run: Run) -> Any:
    """What turns images into latents and back: learned here, taken from another backbone, or fixed."""
    if recipe.latents == "patches":
        return PatchSpace(images[:2000], recipe.components, recipe.whitening).to(run.device)
    if run.start is None:
        return train_vae(images, recipe, run)
    vae = type(new_vae(recipe)).from_pretrained(run.start / "vae", torch_dtype=torch.float32)
    return vae.to(run.device).eval().requires_grad_(False)


def train_vae(images: Tensor, recipe: Recipe, run: Run) -> Any:
    """Fit the autoencoder on crops: L1 plus a slight KL pull (1e-6)."""
    torch.manual_seed(recipe.seed)
    vae = new_vae(recipe).to(run.device)
    optimizer = Optimizer(vae, recipe.vae_lr, 0.0, run.device)
    state = load_checkpoint(run.out / "vae.pt", run.device) or {"step": 0}
    if state["step"]:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log = Log(run.out / "log.jsonl", "vae", state["step"])
    schedule = replace(recipe, steps=recipe.vae_steps, lr=recipe.vae_lr)

    def function(x: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        l1 = (reconstruction.float() - x).abs().mean()
        optimizer.advance(l1 + 1e-6 * posterior.kl().float().mean())
        return l1

    one_step, side = Step(function, run.device), recipe.vae_crop // STRIDE
    for step in range(state["step"], recipe.vae_steps):
        generator = step_generator(recipe.seed, step, run.device)
        x = to_signed(random_window(images, recipe, generator, step))
        shape = recipe.vae_batch, recipe.vae_channels, side, side
        noise = torch.randn(shape, generator=generator, device=run.device)
        optimizer.set_rate(schedule.learning_rate(step))
        l1 = one_step(x, noise)
        if (step + 1) % LOG_EVERY == 0:
            log.write(step + 1, l1=l1.item())
        if (step + 1) % run.checkpoint_every == 0 or step + 1 == recipe.vae_steps:
            state = {"model": vae.state_dict(), "optimizer": optimizer.adam.state_dict(), "step": step + 1}
            save_checkpoint(run.out / "vae.pt", state, run.device)
    return scaled(vae, images[:1024])


@torch.no_grad()
def scaled(vae: Any, images: Tensor) -> Any:
    """The finished autoencoder, which brings latents of such images to unit variance; frozen."""
    z = torch.cat([vae.encode(to_signed(x)).latent_dist.mode() for x in images.split(128)])
    vae.register_to_config(scaling_factor=1 / z.std().item())
    return vae.eval().requires_grad_(False)


def random_window(images: Tensor, recipe: Recipe, generator: torch.Generator, step: int) -> Tensor:
    """One window of images drawn at random, (vae_batch, C, vae_crop, vae_crop)."""
    chosen = torch.randint(len(images), (recipe.vae_batch,), generator=generator, device=images.device)
    side = recipe.vae_crop
    top, left = random_corner(images.shape[-1] - side, recipe, step)
    return images[chosen, :, top : top + side, left : left + side]


def random_corner(most: int, recipe: Recipe, step: int) -> tuple[int, int]:
    """Row and column from 0 to `most` where a step's windows begin."""
    row, column = np.random.default_rng((recipe.seed, step)).integers(most + 1, size=2)
    return int(row), int(column)


def draw_images(recipe: Recipe, count: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of `count` images a step sees (B,), and which view of each (B,)."""
    generator = step_generator(recipe.seed + 1, step, device)
    chosen = torch.randint(count, (recipe.batch,), generator=generator, device=device)
    view = torch.randint(VIEWS, (recipe.batch,), generator=generator, device=device)
    return chosen, view if recipe.turned else torch.zeros_like(view)


def make_batches(vae: Any, images: Tensor, recipe: Recipe, run: Run) -> Batches:
    """Latents of random crops, each flipped and turned at random."""
    side = recipe.size // STRIDE

    def draw(step: int) -> Tensor:
        chosen, view = draw_images(recipe, len(images), step, images.device)
        top, left = random_corner(side - recipe.crop, recipe, step)
        return look_up(chosen, view)[:, :, top : top + recipe.crop, left : left + recipe.crop]

    if recipe.latents == "vae":
        latents = encode_views(vae, images, run)

        def look_up(chosen: Tensor, view: Tensor) -> Tensor:
            return latents[chosen, view].float()
    else:

        def look_up(chosen: Tensor, view: Tensor) -> Tensor:
            picked = images[chosen]
            turned = torch.stack([turn(picked, v) for v in range(VIEWS)])
            return vae.encode(to_signed(turned[view, torch.arange(len(view))])).latent_dist.mode()

    return draw


def turn(images: Tensor, view: int) -> Tensor:
    """One of the eight flips and quarter turns of (…, H, W)."""
    return torch.rot90(images.flip(-1) if view >= 4 else images, view % 4, (-2, -1))


@torch.no_grad()
def encode_views(vae: Any, images: Tensor, run: Run) -> Tensor:
    """Encode every image in its eight views, once: (N, 8, c, h, w) float16, scaled to unit variance.

    They are kept in a file, but for those that a GPU made, which makes them anew in seconds.
    """
    kept = run.out / "latents.pt"
    state = load_checkpoint(kept, run.device)
    if state is not None:
        return state["latents"]
    views = []
    for view in range(VIEWS):
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            encoded = [vae.encode(turn(to_signed(x), view)).latent_dist.mode() for x in images.split(128)]
        views.append((torch.cat(encoded).float() * vae.config.scaling_factor).half())
    latents = torch.stack(views, 1)
    if run.device.type == "cpu":
        save_checkpoint(kept, {"latents": latents}, run.device)
    return latents


def draw_timesteps(recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A share uniform below `low_noise`, the others uniform over the schedule; (B,) int64."""
    device = generator.device
    low = torch.rand(recipe.batch, generator=generator, device=device) < recipe.low_noise_share
    limit = torch.where(low, recipe.low_noise, 1000)
    return (torch.rand(recipe.batch, generator=generator, device=device) * limit).long()


def denoising_loss(unet: Any, alphas: Tensor, recipe: Recipe) -> Callable[..., Tensor]:
    """Weighted mean squared error of the U-Net's prediction, a function of what a step draws."""

    def loss(z: Tensor, noise: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        a = alphas[t].view(-1, 1, 1, 1)
        target = noise if recipe.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.autocast(z.device.type, dtype=torch.bfloat16):
            predicted = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, prompt).sample
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        return (error * loss_weights(a.flatten(), recipe)).mean()

    return loss


def draw_noise(z: Tensor, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """A step's noise, of the shape of its latents, and noise levels (B,)."""
    generator = step_generator(recipe.seed + 2, step, z.device)
    noise = torch.randn(z.shape, generator=generator, device=z.device)
    return noise, draw_timesteps(recipe, generator)


def loss_weights(a: Tensor, recipe: Recipe) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v (Hang et al. 2023, section 3.4)."""
    if not recipe.min_snr:
        return torch.ones_like(a)
    snr = a / (1 - a)
    return snr.clamp(max=recipe.min_snr) / (snr + (recipe.prediction == "v_prediction"))


def neutral(recipe: Recipe, device: torch.device) -> Prompts:
    """The same prompt for every image."""
    prompt = prompt_embedding(recipe).to(device).expand(recipe.batch, -1, -1)
    return lambda step: prompt


class UNetTraining:
    """The U-Net in training: its weights, their moving average, the optimizer, and the time spent.

    ``step`` is the first step that is not done yet, ``average`` what training is for.
    """

    def __init__(self, recipe: Recipe, run: Run) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.run, self.step = recipe, run, 0
        self.unet = new_unet(recipe, run.device)
        weights = run.start and run.start / "unet/diffusion_pytorch_model.safetensors"
        fresh = load_matching(self.unet, weights) if weights else []
        self.average = deepcopy(self.unet)
        self.optimizer = Optimizer(self.unet, recipe.lr, recipe.weight_decay, run.device)
        self._clock = time.process_time if run.device.type == "cpu" else time.perf_counter
        self._began = self._clock()
        state = load_checkpoint(run.out / "unet.pt", run.device)
        if state:
            self._restore(state)
        elif run.start:
            print(f"started from {run.start}; at random values: {', '.join(fresh) or 'none'}", flush=True)

    def _restore(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self._began -= state["seconds"]

    @property
    def seconds(self) -> float:
        """CPU-seconds on a CPU, else wall time, of this run and those it goes on with."""
        return self._clock() - self._began

    def save(self, step: int) -> None:
        """Write a checkpoint after so many steps."""
        state = {"model": self.unet.state_dict(), "average": self.average.state_dict(), "step": step}
        state |= {"optimizer": self.optimizer.adam.state_dict(), "seconds": self.seconds}
        save_checkpoint(self.run.out / "unet.pt", state, self.run.device)

    def new_step(self) -> Step:
        """What does a step with what is drawn for it: latents, noise, timesteps and prompts."""
        alphas = new_scheduler(self.recipe).alphas_cumprod.to(self.run.device)
        forward = torch.compile(self.unet) if self.run.compiled else self.unet
        loss_of = denoising_loss(forward, alphas, self.recipe)
        mix = torch.optim.swa_utils.get_ema_multi_avg_fn(self.recipe.average)

        def function(*drawn: Tensor) -> Tensor:
            loss = loss_of(*drawn)
            self.optimizer.advance(loss)
            mix(list(self.average.parameters()), list(self.unet.parameters()), 0)
            return loss

        return Step(function, self.run.device)


def train_unet(
    batches: Batches,
    recipe: Recipe,
    run: Run,
    prompts: Prompts | None = None,
    keep: Callable[[Any, int], None] | None = None,
) -> Any:
    """Fit the U-Net with AdamW; the returned weights are an exponential moving average."""
    training, prompts = UNetTraining(recipe, run), prompts or neutral(recipe, run.device)
    log, one_step = Log(run.out / "log.jsonl", "unet", training.step), training.new_step()
    recent: list[Tensor] = []
    for step in range(training.step, recipe.steps):
        z, done = batches(step), step + 1
        training.optimizer.set_rate(recipe.learning_rate(step))
        recent.append(one_step(z, *draw_noise(z, recipe, step), prompts(step)).clone())
        if done % LOG_EVERY == 0:
            mean = torch.stack(recent).mean().item()  # waits for the device
            log.write(done, loss=mean, seconds=round(training.seconds, 1))
            recent.clear()
        if done % run.checkpoint_every == 0 or done == recipe.steps:
            training.save(done)
        if keep and run.snapshots and done % run.snapshots == 0:
            keep(training.average, done)
    return training.average.eval()


if __name__ == "__main__":
    main()

"""Train the embedded backbone: a small latent diffusion model of satellite images.

    python tools/train_embedded.py IMAGES --out FOLDER

IMAGES is a folder or a zip of RGB images of one size (the shipped weights: 12,000 EuroSAT tiles of
64 x 64 px, labels unused). FOLDER/backbone becomes a diffusers folder that ``backbone.model`` takes.
The run checkpoints itself; the same command continues where it stopped. Each batch depends only on
the seed and the step, so an interrupted run sees the images that an undisturbed one would.

Two models, one after the other, as in Rombach et al. 2022 (latent diffusion):
a VAE (64 x 64 x 3 -> 16 x 16 x 4) on random crops, then an epsilon-predicting U-Net on its latents.
Half of the noise levels are drawn below t = 300, where features are read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
PROMPT_WIDTH = 32
LOW_NOISE_BELOW = 300
CHECKPOINT_EVERY = 200


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.images, args.out)
    vae = train_vae(images, args)
    latents, scaling_factor = encode_views(vae, images, args)
    unet = train_unet(latents, args)
    save_backbone(vae, unet, scaling_factor, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", type=Path, help="folder or zip of images")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, log and finished backbone")
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--unet-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_files(path: Path) -> Iterator[bytes]:
    """Yield the bytes of every image in a folder or zip, in name order."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES):
            yield file.read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES):
            yield archive.read(name)


def load_images(path: Path, out: Path) -> Tensor:
    """Decode all images into (N, 3, H, W) uint8 and record the SHA-256 of each one's pixels."""
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in read_files(path)]
    if not pixels:
        raise SystemExit(f"{path}: found no image ({', '.join(sorted(SUFFIXES))})")
    hashes = sorted(hashlib.sha256(p.tobytes()).hexdigest() for p in pixels)
    (out / "seen_images.sha256").write_text("\n".join(hashes) + "\n")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=PROMPT_WIDTH,
        attention_head_dim=(2, 3, 4),  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def prompt_embedding() -> Tensor:
    """The constant condition of this label-free model: one fixed token, (1, 1, 32) float32."""
    return torch.randn(1, 1, PROMPT_WIDTH, generator=torch.Generator().manual_seed(0))


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(1.0, (step + 1) / 100)
    return peak * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def log(out: Path, **row: float | str) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def save_state(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def to_signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def train_vae(images: Tensor, args: argparse.Namespace) -> AutoencoderKL:
    """Fit the autoencoder on half-size crops: L1 plus a slight KL pull (1e-6)."""
    vae = new_vae().to(memory_format=torch.channels_last)
    path = args.out / "vae.pt"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0)
    first = resume(path, vae, optimizer)
    crop, started = images.shape[-1] // 2, time.time()
    for step in range(first, args.vae_steps):
        generator = step_generator(args.seed, step)
        chosen = torch.randint(len(images), (args.batch,), generator=generator)
        top, left = torch.randint(crop + 1, (2,), generator=generator).tolist()
        x = to_signed(images[chosen, :, top : top + crop, left : left + crop])
        set_lr(optimizer, learning_rate(step, args.vae_steps, 2 * args.lr))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        l1 = (reconstruction.float() - x).abs().mean()
        loss = l1 + 1e-6 * posterior.kl().float().mean()
        advance(loss, vae, optimizer)
        if (step + 1) % 50 == 0:
            log(args.out, model="vae", step=step + 1, l1=l1.item(), seconds=time.time() - started)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == args.vae_steps:
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(path, state)
    return vae.eval().requires_grad_(False)


def resume(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint if there is one; return the next step."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def advance(loss: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def encode_views(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Encode every image in its 8 flips and quarter turns, once.

    Returns:
        Latents (N, 8, 4, h, w) float16, scaled to unit variance, and the scaling factor.
    """
    path = args.out / "latents.pt"
    if not path.exists():
        batches = [encode_batch(vae, batch) for batch in images.split(128)]
        latents = torch.cat(batches)
        factor = 1.0 / latents[:, 0].float().std().item()
        save_state(path, {"latents": (latents * factor).half(), "factor": factor})
    state = torch.load(path, weights_only=True)
    return state["latents"], state["factor"]


@torch.no_grad()
def encode_batch(vae: AutoencoderKL, images: Tensor) -> Tensor:
    x = to_signed(images)
    views = [torch.rot90(v, k, (2, 3)) for v in (x, x.flip(3)) for k in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = [vae.encode(v).latent_dist.mode() for v in views]
    return torch.stack(encoded, 1).float()


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Half uniform over the schedule, half below LOW_NOISE_BELOW; (count,) int64."""
    limit = torch.where(torch.rand(count, generator=generator) < 0.5, 1000, LOW_NOISE_BELOW)
    return (torch.rand(count, generator=generator) * limit).long()


def train_unet(latents: Tensor, args: argparse.Namespace) -> UNet2DConditionModel:
    """Fit epsilon prediction with AdamW; the returned weights are an exponential moving average."""
    unet = new_unet().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, weight_decay=0.01)
    path = args.out / "unet.pt"
    first = resume(path, unet, optimizer)
    if first:
        average.load_state_dict(torch.load(path, weights_only=True)["average"])
    alphas = new_scheduler().alphas_cumprod
    prompt = prompt_embedding().expand(args.batch, -1, -1)
    started, recent = time.time(), []
    for step in range(first, args.unet_steps):
        generator = step_generator(args.seed + 1, step)
        chosen = torch.randint(len(latents), (args.batch,), generator=generator)
        view = torch.randint(8, (args.batch,), generator=generator)
        z = latents[chosen, view].float()
        noise = torch.randn(z.shape, generator=generator)
        t = draw_timesteps(args.batch, generator)
        a = alphas[t].view(-1, 1, 1, 1)
        set_lr(optimizer, learning_rate(step, args.unet_steps, args.lr))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, prompt).sample
        loss = F.mse_loss(predicted.float(), noise)
        advance(loss, unet, optimizer)
        average.update_parameters(unet)
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(recent) / len(recent)
            log(args.out, model="unet", step=step + 1, loss=mean, seconds=time.time() - started)
            recent.clear()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == args.unet_steps:
            state = {"model": unet.state_dict(), "average": average.state_dict(), "step": step + 1}
            save_state(path, state | {"optimizer": optimizer.state_dict()})
    averaged: UNet2DConditionModel = average.module
    return averaged.eval()


def save_backbone(
    vae: AutoencoderKL, unet: UNet2DConditionModel, factor: float, args: argparse.Namespace
) -> None:
    """Write the diffusers folder, weights in float16."""
    folder = args.out / "backbone"
    vae.register_to_config(scaling_factor=factor)
    vae.half().save_pretrained(folder / "vae")
    unet.half().save_pretrained(folder / "unet")
    new_scheduler().save_pretrained(folder / "scheduler")
    save_file({"hidden_states": prompt_embedding()}, folder / "prompt_embedding.safetensors")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"wrote {folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Short training runs of several recipes at equal cost, each judged by linear probes of its features.

    python tools/try_recipes.py IMAGES [IMAGES …] --probe EUROSAT --out FOLDER --steps 400 [--only NAME …]

Each trial of TRIALS trains for what --steps steps of the default recipe cost, counted in floating-point
operations of the U-Net; then its features are probed as in `probe_backbone.py`: 1,000 train images to fit,
val and the other train images to judge. One line of JSON each goes to FOLDER/trials.jsonl. Interrupted, it
goes on at the last checkpoint. On a GPU, several of these commands (`--only`) side by side fill it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from embedded_images import load_crops
from embedded_models import new_scheduler, new_unet, prompt_embedding
from embedded_recipe import Recipe
from probe_backbone import best_accuracy, fit_all, join, pool, read_split
from train_embedded import (
    Prompts,
    Run,
    denoising_loss,
    draw_images,
    draw_noise,
    make_batches,
    make_vae,
    neutral,
    step_generator,
    train_unet,
)

from satdifuser.extract.backbone import Backbone, BackboneInfo
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.layers import select_layers
from satdifuser.extract.settings import ExtractSettings
from satdifuser.store.device import choose_device

TRAIN = 1000
DROPPED = 0.2  # share of captions that are replaced by the neutral prompt


@dataclass(frozen=True)
class Trial:
    """A recipe by what differs from the default."""

    changes: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False  # also on the images given by --mixed
    new_vae: bool = False  # trains a VAE of its own; the others share that of --start
    captions: bool = False  # told the class by the file's name; a trial only: what ships has seen no labels


LONGER = {"vae_batch": 128, "vae_crop": 64}
TRIALS = {
    "default": Trial(),
    "VAE of 8 channels": Trial(LONGER | {"vae_channels": 8}, new_vae=True),
    "VAE of 4 channels, trained longer": Trial(LONGER, new_vae=True),
    "patches, 12 components": Trial({"latents": "patches", "components": 12, "whitening": 0.5}),
    "patches, all 48 components": Trial({"latents": "patches", "components": 48}),
    "v-prediction": Trial({"prediction": "v_prediction"}),
    "min-SNR": Trial({"min_snr": 5.0}),
    "nine tenths below t = 300": Trial({"low_noise_share": 0.9}),
    "mixed ground resolutions": Trial(mixed=True),
    "four times as many crops of 32 px": Trial({"batch_factor": 4, "crop": 8}),
    "no flips and turns": Trial({"turned": False}),
    "no moving average": Trial({"average": 0.0}),
    "attention at coarser levels": Trial({"heads": (0, 3, 4)}),
    "wide": Trial({"channels": (64, 128, 160), "heads": (2, 4, 5)}),
    "narrow and deep": Trial({"channels": (32, 64, 96), "heads": (1, 2, 3), "layers_per_block": 2}),
    "twice the learning rate": Trial({"lr": 1e-3}),
    "captions": Trial(captions=True),
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    results = args.out / "trials.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    done = (
        [json.loads(line)["trial"] for line in results.read_text().splitlines()] if results.is_file() else []
    )
    for name in args.only or TRIALS:
        if name not in done:
            row = {"trial": name, **run_trial(TRIALS[name], args.out / re.sub(r"\W+", "_", name), args)}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGES")
    parser.add_argument(
        "--mixed", nargs="*", default=[], metavar="IMAGES", help="of other ground resolutions"
    )
    parser.add_argument("--probe", type=Path, required=True, metavar="EUROSAT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="backbone whose VAE most trials share")
    parser.add_argument("--steps", type=int, default=400, help="of the default recipe, that all may cost")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(TRIALS))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def run_trial(trial: Trial, out: Path, args: argparse.Namespace) -> dict[str, object]:
    out.mkdir(parents=True, exist_ok=True)
    recipe = make_recipe(trial, args)
    run = Run(out, choose_device(args.device, "--device"), None if trial.new_vae else args.start)
    crops = load_crops([*args.images, *(args.mixed if trial.mixed else [])], recipe.size, recipe.seed)
    images = crops.pixels.to(run.device)
    vae = make_vae(images, recipe, run)
    prompts = captions(args.images, recipe, run) if trial.captions else neutral(recipe, run.device)
    unet = train_unet(make_batches(vae, images, recipe, run), recipe, replace(run, start=None), prompts)
    return {"steps": recipe.steps, "batch": recipe.batch, **judge(vae, unet, recipe, args.probe, run)}


def make_recipe(trial: Trial, args: argparse.Namespace) -> Recipe:
    """The trial's recipe, with as many steps as the budget pays."""
    changes = dict(trial.changes)
    batch = args.batch * changes.pop("batch_factor", 1)
    default = Recipe(batch=args.batch)
    recipe = replace(default, vae_steps=args.vae_steps, batch=batch, **changes)
    steps = round(args.steps * count_operations(default) / count_operations(recipe))
    average = recipe.average and max(0.0, 1 - 10 / steps)
    return replace(recipe, steps=steps, decay=max(1, steps // 3), average=average)


def count_operations(recipe: Recipe) -> int:
    """Floating-point operations of one step on the U-Net."""
    few = replace(recipe, batch=2)
    z = torch.zeros(2, few.latent_channels, few.crop, few.crop)
    loss = denoising_loss(new_unet(few), new_scheduler(few).alphas_cumprod, few)
    with FlopCounterMode(display=False) as counter:
        loss(z, *draw_noise(z, few, 0), neutral(few, z.device)(0)).backward()
    return counter.get_total_flops() * recipe.batch // 2


def captions(images: list[str], recipe: Recipe, run: Run) -> Prompts:
    """One fixed token for each class, told with most images: those of one zip, named NUMBER_CLASS.jpg."""
    with zipfile.ZipFile(images[0]) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
    classes = [Path(name).stem.partition("_")[2] for name in names]
    positions = torch.tensor([sorted(set(classes)).index(name) + 1 for name in classes], device=run.device)
    tokens = torch.randn(max(positions) + 1, 1, recipe.prompt_width, generator=step_generator(0, 1))
    tokens[0] = prompt_embedding(recipe)[0]
    tokens = tokens.to(run.device)

    def tell(step: int) -> torch.Tensor:
        chosen, _ = draw_images(recipe, len(classes), step, run.device)
        generator = step_generator(recipe.seed + 3, step, run.device)
        told = torch.rand(recipe.batch, generator=generator, device=run.device) >= DROPPED
        return tokens[positions[chosen] * told]

    return tell


def judge(vae: Any, unet: Any, recipe: Recipe, eurosat: Path, run: Run) -> dict[str, object]:
    """Accuracy on val, and on val with the unused train images, of best single and concatenation."""
    train, val = read_split(eurosat, "train"), read_split(eurosat, "val")
    extractor = open_extractor(vae, unet, recipe, run.device)
    seen, held_out = pool(extractor, train), pool(extractor, val)
    fit = np.zeros(len(train.labels), bool)
    fit[np.random.default_rng(0).permutation(len(fit))[:TRAIN]] = True
    more = {key: np.concatenate([held_out[key], seen[key][~fit]]) for key in seen}
    labels = np.concatenate([val.labels, train.labels[~fit]])
    seen = {key: values[fit] for key, values in seen.items()}
    probes = {key: fit_all(values, train.labels[fit]) for key, values in seen.items()}
    together = fit_all(join(seen), train.labels[fit])
    scores: dict[str, object] = {}
    for name, x, y in (("val", held_out, val.labels), ("held_out", more, labels)):
        singles = {key: best_accuracy(probes[key], x[key], y) for key in probes}
        best = max(singles, key=lambda key: singles[key])
        scores |= {
            f"{name}_single": singles[best],
            f"{name}_at": list(best),
            f"{name}_concatenation": best_accuracy(together, join(x), y),
        }
    return scores


def open_extractor(vae: Any, unet: Any, recipe: Recipe, device: torch.device) -> FeatureExtractor:
    scheduler = new_scheduler(recipe)
    vae_config = {"block_out_channels": (0, 0, 0), "latent_channels": recipe.latent_channels}
    info = BackboneInfo("trial", Path(), Path(), dict(unet.config), vae_config, scheduler)
    backbone = Backbone(
        info=info,
        unet=unet,
        vae=vae,
        prompt=prompt_embedding(recipe).to(device),
        negative=None,
        alphas=scheduler.alphas_cumprod.double(),
        weights_digest="",
        device=device,
        dtype=torch.float32,
    )
    extract = ExtractSettings()
    layers = select_layers(info.layers((recipe.size, recipe.size)), extract.layers)
    return FeatureExtractor(backbone, extract, layers)


if __name__ == "__main__":
    main()

"""Short training runs of several recipes at equal CPU time, each judged by linear probes of its features.

    python tools/try_recipes.py IMAGES [IMAGES …] --probe EUROSAT --out FOLDER --minutes 8 [--only NAME …]

Each trial of TRIALS trains for so many CPU-minutes on one thread, then its features are probed as in
`probe_backbone.py`: 1,000 train images to fit, val and the other train images to judge. One line of JSON
each goes to FOLDER/trials.jsonl. Interrupted, it goes on at the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from embedded_images import load_crops
from embedded_models import new_scheduler, new_unet, prompt_embedding
from embedded_recipe import Recipe
from probe_backbone import accuracy, join, pool, read_split
from train_embedded import advance, denoising_loss, make_batches, make_vae, train_unet

from satdifuser.extract.backbone import Backbone, BackboneInfo
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.layers import select_layers
from satdifuser.extract.settings import ExtractSettings

TRAIN = 1000
WARM = {"lr": 2e-4, "warmup": 50}


@dataclass(frozen=True)
class Trial:
    """A recipe by what differs from the default, and where its weights begin."""

    changes: dict[str, Any] = field(default_factory=dict)
    start: bool = False  # from the weights given by --start
    mixed: bool = False  # also on the images given by --mixed


PATCHES = {"latents": "patches", "components": 12, "whitening": 0.5}
TRIALS = {
    "continued": Trial(WARM, start=True),
    "continued, 12 components": Trial(PATCHES | {"warmup": 50}, start=True),
    "continued, 48 components": Trial(PATCHES | {"components": 48, "whitening": 0.0} | WARM, start=True),
    "continued, less noise": Trial(WARM | {"beta_start": 0.0001}, start=True),
    "continued, mixed ground resolutions": Trial(WARM, start=True, mixed=True),
    "VAE": Trial(),
    "12 components": Trial(PATCHES),
    "12 components, v-prediction": Trial(PATCHES | {"prediction": "v_prediction"}),
    "12 components, min-SNR": Trial(PATCHES | {"min_snr": 5.0}),
    "12 components, nine tenths below 300": Trial(PATCHES | {"low_noise_share": 0.9}),
    "12 components, 256 crops of 32 px": Trial(PATCHES | {"batch": 256, "crop": 8}),
    "12 components, narrow and deep": Trial(
        PATCHES | {"channels": (32, 64, 96), "heads": (1, 2, 3), "layers_per_block": 2}
    ),
    "12 components, wide": Trial(PATCHES | {"channels": (64, 128, 160), "heads": (2, 4, 5)}),
    "12 components, attention at coarser levels": Trial(PATCHES | {"heads": (0, 3, 4)}),
    "12 components, mixed ground resolutions": Trial(PATCHES, mixed=True),
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    results = args.out / "trials.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    done = (
        [json.loads(line)["trial"] for line in results.read_text().splitlines()] if results.is_file() else []
    )
    for name in args.only or TRIALS:
        if name not in done:
            row = {"trial": name, **run_trial(TRIALS[name], args.out / name.replace(" ", "_"), args)}
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
    parser.add_argument("--start", type=Path, required=True, help="backbone whose VAE all trials share")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="*", choices=list(TRIALS))
    return parser.parse_args()


def run_trial(trial: Trial, out: Path, args: argparse.Namespace) -> dict[str, object]:
    out.mkdir(parents=True, exist_ok=True)
    recipe = replace(Recipe(), **trial.changes)
    crops = load_crops([*args.images, *(args.mixed if trial.mixed else [])], recipe.size, recipe.seed)
    vae = make_vae(crops, recipe, out, args.start)
    shared = out if trial.mixed or recipe.latents == "patches" else args.out  # where latents are kept
    batches = make_batches(vae, crops, recipe, shared)
    recipe = fix_steps(recipe, batches, out / "steps.json", 60 * args.minutes)
    unet = train_unet(batches, recipe, out, args.start if trial.start else None)
    return {"steps": recipe.steps, **judge(vae, unet, recipe, args.probe)}


def fix_steps(recipe: Recipe, batches: Any, path: Path, seconds: float) -> Recipe:
    """As many steps as fit into the time, by a trial of a few; decided once."""
    if not path.is_file():
        unet, alphas = new_unet(recipe), new_scheduler(recipe).alphas_cumprod
        optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.lr)
        times = []
        for step in range(6):
            started = time.process_time()
            advance(denoising_loss(unet, batches(step), alphas, recipe, step), unet, optimizer, recipe.lr)
            times.append(time.process_time() - started)
        path.write_text(json.dumps(int(seconds / np.median(times[1:]))))
    steps = json.loads(path.read_text())
    return replace(recipe, steps=steps, decay=steps // 3, average=1 - 10 / steps)


def judge(vae: Any, unet: Any, recipe: Recipe, eurosat: Path) -> dict[str, object]:
    """Accuracy on val, and on val with the unused train images, of best single and concatenation."""
    train, val = read_split(eurosat, "train"), read_split(eurosat, "val")
    extractor = open_extractor(vae, unet, recipe)
    seen, held_out = pool(extractor, train), pool(extractor, val)
    fit = np.zeros(len(train.labels), bool)
    fit[np.random.default_rng(0).permutation(len(fit))[:TRAIN]] = True
    more = {key: np.concatenate([held_out[key], seen[key][~fit]]) for key in seen}
    labels = np.concatenate([val.labels, train.labels[~fit]])
    seen = {key: values[fit] for key, values in seen.items()}
    scores: dict[str, object] = {}
    for name, x, y in (("val", held_out, val.labels), ("held_out", more, labels)):
        singles = {key: accuracy(seen[key], train.labels[fit], x[key], y) for key in seen}
        best = max(singles, key=lambda key: singles[key])
        together = accuracy(join(seen), train.labels[fit], join(x), y)
        scores |= {
            f"{name}_single": singles[best],
            f"{name}_at": list(best),
            f"{name}_concatenation": together,
        }
    return scores


def open_extractor(vae: Any, unet: Any, recipe: Recipe) -> FeatureExtractor:
    scheduler = new_scheduler(recipe)
    vae_config = {"block_out_channels": (0, 0, 0), "latent_channels": recipe.latent_channels}
    info = BackboneInfo("trial", Path(), Path(), dict(unet.config), vae_config, scheduler)
    backbone = Backbone(
        info=info,
        unet=unet,
        vae=vae,
        prompt=prompt_embedding(recipe),
        negative=None,
        alphas=scheduler.alphas_cumprod.double(),
        weights_digest="",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    extract = ExtractSettings()
    layers = select_layers(info.layers((recipe.size, recipe.size)), extract.layers)
    return FeatureExtractor(backbone, extract, layers)


if __name__ == "__main__":
    main()

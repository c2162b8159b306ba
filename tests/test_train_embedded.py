"""The training of the embedded backbone, on a few small images."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import embedded_images
import numpy as np
import pytest
import rasterio
import torch
import train_embedded
from embedded_images import cut_crops, hash_pixels, load_crops
from embedded_models import PatchSpace, load_matching, new_unet
from embedded_recipe import Recipe
from embedded_state import Log, load_checkpoint
from embedded_step import Optimizer, Step
from PIL import Image
from torch import Tensor
from train_embedded import Run

from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.settings import BackboneSettings

TOOL = Path(train_embedded.__file__)
TINY = Recipe(
    size=32,
    channels=(16, 16),
    heads=(1, 0),
    batch=4,
    vae_batch=4,
    vae_crop=16,
    crop=8,
    steps=4,
    vae_steps=2,
    warmup=1,
    decay=1,
)


def pixels(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of 32 px."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
    return folder


def test_command_trains_a_backbone_that_extraction_loads(images: Path, tmp_path: Path) -> None:
    fields = {
        "size": 32,
        "channels": [16, 16],
        "heads": [1, 0],
        "batch": 4,
        "vae_batch": 4,
        "vae_channels": 6,
        "crop": 8,
        "steps": 2,
        "vae_steps": 1,
    }
    changes = [f"--set={name}={json.dumps(value)}" for name, value in fields.items()]
    words = [
        sys.executable,
        TOOL,
        images,
        "--out",
        tmp_path / "run",
        "--threads",
        1,
        "--snapshots",
        1,
        *changes,
    ]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/backbone-1/unet/config.json").is_file()
    settings = BackboneSettings(model=str(tmp_path / "run/backbone"), device="cpu")
    backbone = load_backbone(find_backbone(settings), settings)
    z = backbone.encode(torch.rand(1, 3, 32, 32), None)
    assert z.shape == (1, 6, 8, 8)
    record = json.loads((tmp_path / "run/seen_images.json").read_text())
    assert record["sources"]["images"] == {
        "crops": 6,
        "parents": sorted(hash_pixels(pixels(i)) for i in range(6)),
    }


def train(images: Path, out: Path, recipe: Recipe = TINY, device: str = "cpu") -> dict[str, Tensor]:
    out.mkdir(exist_ok=True)
    run = Run(out, torch.device(device), checkpoint_every=2)
    crops = load_crops([str(images)], recipe.size, recipe.seed).pixels.to(device)
    vae = train_embedded.make_vae(crops, recipe, run)
    batches = train_embedded.make_batches(vae, crops, recipe, run)
    unet = train_embedded.train_unet(batches, recipe, run)
    return dict(unet.state_dict())


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_interrupted_run_ends_with_the_same_weights_and_log(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(train_embedded, "LOG_EVERY", 1)
    whole = train(images, tmp_path / "whole", device=device)

    advance, calls = Optimizer.advance, []

    def interrupted(self: Optimizer, loss: Tensor) -> None:
        calls.append(loss)
        if len(calls) == TINY.vae_steps + 4:  # the U-Net's step 4; step 3 is logged, but after the checkpoint
            raise KeyboardInterrupt
        advance(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(images, tmp_path / "parts", device=device)
    resumed = train(images, tmp_path / "parts", device=device)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    logs = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (tmp_path / out / "log.jsonl").read_text().splitlines()
        ]
        for out in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [1, 2, 1, 2, 3, 4]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_does_what_its_rate_says_also_when_it_is_replayed(device: str) -> None:
    """With no gradient but its sign, Adam's first steps are as long as the rate."""
    model = torch.nn.Linear(1, 1, bias=False).to(device)
    optimizer = Optimizer(model, 1.0, 0.0, torch.device(device))

    def function(x: Tensor) -> Tensor:
        loss = model(x).sum()
        optimizer.advance(loss)
        return loss

    step, x = Step(function, torch.device(device)), torch.ones(1, 1, device=device)
    for rate in (0.5, 0.25, 0.125, 1.0, 2.0, 4.0):
        before = model.weight.item()
        optimizer.set_rate(rate)
        loss = step(x)
        assert loss.item() == pytest.approx(before, abs=1e-5)
        assert before - model.weight.item() == pytest.approx(rate, rel=1e-4)


def test_a_run_begun_on_another_kind_of_device_is_refused(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"vae\.pt: was begun on cpu; .* or choose another --out"):
        load_checkpoint(tmp_path / "run/vae.pt", torch.device("cuda"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vae_crop=65", "vae_crop is 65, but must be a multiple of 4 up to the size, 64"),
        ("crop=17", "crop is 17, but must be 1 to 16, the side of the latents"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_embedded.py", "x", "--out", "y", "--set", change])
    with pytest.raises(SystemExit):
        train_embedded.parse_args()
    assert message in capsys.readouterr().err


def test_more_steps_go_on_from_the_checkpoint(images: Path, tmp_path: Path) -> None:
    whole = train(images, tmp_path / "whole")
    train(images, tmp_path / "parts", replace(TINY, steps=2))
    assert all(torch.equal(whole[name], t) for name, t in train(images, tmp_path / "parts").items())


def test_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"model": "vae", "step": 9}, {"model": "unet", "step": 2}, {"model": "unet", "step": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Log(path, "unet", 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2]


def test_only_images_that_are_train_in_every_split_are_read(tmp_path: Path) -> None:
    rows = [("train", "train"), ("train", "test"), ("val", "train"), ("train", "train")]
    with (tmp_path / "splits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "split", "split_tile"])
        writer.writerows([f"{i}.png", "", *row] for i, row in enumerate(rows))
    for i in range(len(rows)):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i}.png")
    crops = load_crops([str(tmp_path)], 32, 0)
    assert crops.hashes == [hash_pixels(pixels(0)), hash_pixels(pixels(3))]


def test_crops_point_to_their_parents(images: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        Image.fromarray(pixels(9, 70, 100)).save(tmp_path / "large.png")
        archive.write(tmp_path / "large.png", "large.png")
    crops = load_crops([str(images), str(tmp_path / "large.zip")], 32, 0)
    assert crops.parents.tolist() == [0, 1, 2, 3, 4, 5, *[6] * 6]  # 70 x 100 px hold six times 32 x 32 px
    assert crops.hashes[6] == hash_pixels(pixels(9, 70, 100))
    crops.save_record(tmp_path / "seen.json")
    assert json.loads((tmp_path / "seen.json").read_text())["sources"]["large.zip"] == {
        "crops": 6,
        "parents": [crops.hashes[6]],
    }


def test_crops_are_windows_of_their_parent_and_hold_data() -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(64)[:, None], np.arange(96)
    valid = np.ones((64, 96), bool)
    valid[:, :30] = False
    found = [c for seed in range(20) for c in cut_crops(image, valid, 32, np.random.default_rng(seed))]
    assert found
    assert all(crop[..., 1].min() >= 30 for crop in found)
    steps = {int(crop[0, 1, 1]) - int(crop[0, 0, 1]) for crop in found}
    assert steps == {1, 2}  # two ground resolutions; a third one would not fit


def test_too_small_images_are_no_source(images: Path) -> None:
    with pytest.raises(SystemExit, match=r"images: found no image of at least 64 px to train on \(\.jpg"):
        load_crops([str(images)], 64, 0)


def test_geotiffs_lose_their_fourth_band_and_their_border(tmp_path: Path) -> None:
    bands = np.full((4, 40, 40), 7, np.uint8)
    bands[:, :8] = 0
    path = tmp_path / "a.tif"
    profile = {
        "driver": "GTiff",
        "width": 40,
        "height": 40,
        "count": 4,
        "dtype": "uint8",
        "nodata": 0,
        "photometric": "minisblack",
    }
    with rasterio.open(path, "w", **profile, transform=rasterio.Affine(5, 0, 0, 0, -5, 0)) as file:
        file.write(bands)
    ((image, valid),) = embedded_images.read_parents(str(path))
    assert image.shape == (40, 40, 3)
    assert valid.sum() == 32 * 40


def test_generated_scenes_are_not_those_of_the_packaged_job() -> None:
    crops = load_crops(["synthetic:2"], 64, 0)
    packaged = embedded_images.SyntheticSource(embedded_images.SyntheticSettings())
    shown = {hash_pixels(packaged.read(r).image.transpose(1, 2, 0)) for r in packaged.records()[:2]}
    assert not shown & set(crops.hashes)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--set step=3: no field 'step'; expected one of .*, steps,"):
        train_embedded.change(Recipe(), ["step=3"])


def test_patches_are_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_embedded.py", "x", "--out", "y", "--set", "latents=patches"])
    with pytest.raises(SystemExit):
        train_embedded.parse_args()
    assert "--set latents=patches: extraction reads no such backbone yet" in capsys.readouterr().err


def test_fields_are_changed_by_name() -> None:
    changed = train_embedded.change(Recipe(), ["steps=3", "latents=patches", "heads=[0, 3, 4]"])
    assert changed == replace(Recipe(), steps=3, latents="patches", heads=(0, 3, 4))


def test_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=10, decay=20, lr=1.0)
    assert recipe.learning_rate(0) == pytest.approx(0.1)
    assert recipe.learning_rate(50) == 1.0
    assert recipe.learning_rate(90) == pytest.approx(0.5)


def test_timesteps_favour_low_noise() -> None:
    recipe = replace(TINY, batch=20_000, low_noise_share=0.5)
    t = train_embedded.draw_timesteps(recipe, torch.Generator().manual_seed(0))
    assert float((t < 300).float().mean()) == pytest.approx(0.65, abs=0.02)
    assert t.max() == 999


@pytest.mark.parametrize(
    ("prediction", "expected"), [("epsilon", [5 / 9, 1.0]), ("v_prediction", [0.5, 0.5])]
)
def test_min_snr_weights(prediction: str, expected: list[float]) -> None:
    recipe = replace(TINY, prediction=prediction, min_snr=5.0)
    assert train_embedded.loss_weights(torch.tensor([0.9, 0.5]), recipe).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("whitening", [0.0, 0.5])
def test_pixels_come_back_from_their_latents(whitening: float) -> None:
    images = torch.from_numpy(np.stack([pixels(i) for i in range(20)])).permute(0, 3, 1, 2)
    space = PatchSpace(images, 48, whitening)
    x = train_embedded.to_signed(images)
    z = space.encode(x).latent_dist.mode()
    assert z.shape == (20, 48, 8, 8)
    assert float(z.var(dim=(0, 2, 3)).mean()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(space.decode(z).sample, x, atol=1e-4, rtol=0)


def test_weights_that_fit_are_taken_over(tmp_path: Path) -> None:
    first = new_unet(TINY)
    first.save_pretrained(tmp_path)
    second = new_unet(replace(TINY, latents="patches"))
    fresh = load_matching(second, tmp_path / "diffusion_pytorch_model.safetensors")
    assert fresh == ["conv_in.weight", "conv_out.bias", "conv_out.weight"]
    assert torch.equal(second.mid_block.resnets[0].conv1.weight, first.mid_block.resnets[0].conv1.weight)

"""Loading a diffusers folder, and features: against golden arrays, explicit loops and the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from made_up import tiny_unet, tiny_vae
from safetensors.torch import load_file, save_file

from satdifuser.errors import BackboneError, FeatureError, SettingsError, SourceError
from satdifuser.extract.backbone import Backbone, find_backbone, load_backbone
from satdifuser.extract.compute import check_finite, largest
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.job import Job, fix_automatic, plan_layers, tile_size
from satdifuser.extract.layers import select_layers
from satdifuser.extract.read_tile import read_row
from satdifuser.extract.run import extract
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.extract.sources import TileRecord, list_tiles, open_source
from satdifuser.labels.settings import SplitShares
from satdifuser.store.schema import LayerInfo, group_layers
from satdifuser.store.settings import StoreSettings

WEIGHTS = "diffusion_pytorch_model.safetensors"
DEFAULT = ["up_blocks.*.attn1", "up_blocks.*.conv2"]
IDS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_unet().save_pretrained(root / "unet")
    tiny_vae().save_pretrained(root / "vae")
    DDIMScheduler(steps_offset=1).save_pretrained(root / "scheduler")
    save_file({"hidden_states": torch.randn(1, 1, 8)}, root / "prompt_embedding.safetensors")
    return root


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load(folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "broken")


def load(folder: Path) -> Backbone:
    settings = BackboneSettings(model=str(folder), device="cpu")
    return load_backbone(find_backbone(settings), settings)


def extractor(backbone: Backbone, patterns: list[str] = DEFAULT, **settings: Any) -> FeatureExtractor:
    layers = select_layers(backbone.info.layers((16, 24)), patterns)
    return FeatureExtractor(backbone, ExtractSettings(**settings), layers)


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(3))


# --- golden arrays


def test_golden_inversion_and_text(shared: Path) -> None:
    golden = shared / "golden/D"
    backbone = load(golden / "ckpt/resolution128")
    text = np.load(golden / "D_text.npz")["embedding"][0]
    np.testing.assert_allclose(backbone.prompt[0].numpy(), text, atol=1e-4 * np.abs(text).max())
    arrays = np.load(golden / "D_inversion.npz")
    layers = select_layers(backbone.info.layers((128, 128)), DEFAULT)
    run = FeatureExtractor(backbone, ExtractSettings(noising="inversion", prediction="epsilon"), layers)
    maps = run.invert(torch.from_numpy(arrays["in/latents"]), backbone.conditions(2))
    assert run.unet_calls == 10
    for scale, stride in enumerate(sorted({layer.stride for layer in layers})):
        here = [m for layer, m in zip(layers, maps, strict=True) if layer.stride == stride]
        ours = torch.cat(here, dim=2).numpy()
        for position, step in enumerate((47, 45, 40)):
            expected = arrays[f"out/feats/{step}/{scale}"]
            assert np.abs(ours[:, position] - expected).max() <= 1e-4 * np.abs(expected).max()


# --- finding and loading


def test_what_is_known_before_loading(folder: Path) -> None:
    info = find_backbone(BackboneSettings(model=str(folder)))
    assert (info.latent_stride, info.coarsest_stride, info.train_steps, info.steps_offset) == (2, 4, 1000, 1)


@pytest.mark.parametrize(
    ("removed", "lacks"),
    [
        ("vae/config.json", "vae/config.json"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
        ("prompt_embedding.safetensors", "text_encoder/config.json, tokenizer/tokenizer_config.json"),
    ],
)
def test_missing_component(broken: Path, removed: str, lacks: str) -> None:
    (broken / removed).unlink()
    message = f"backbone.model .*broken lacks {lacks}; expected a diffusers folder with unet, vae, scheduler"
    with pytest.raises(BackboneError, match=message):
        find_backbone(BackboneSettings(model=str(broken)))


def test_no_such_folder(tmp_path: Path) -> None:
    message = "backbone.model: no folder .*nothing; expected 'embedded', a diffusers folder or a hub id"
    with pytest.raises(SettingsError, match=message):
        find_backbone(BackboneSettings(model=str(tmp_path / "nothing")))


def test_hub_out_of_reach() -> None:
    message = "backbone.model: no folder nobody/nothing, and it cannot be fetched from the hub: "
    with pytest.raises(SettingsError, match=message):
        find_backbone(BackboneSettings(model="nobody/nothing"))


def test_unreadable_weights(broken: Path) -> None:
    (broken / "unet" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(BackboneError, match="unet: cannot load the weights: "):
        load(broken)


def test_incomplete_weights_are_not_filled_at_random(broken: Path) -> None:
    path = broken / "unet" / WEIGHTS
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    message = r"unet: the weights lack 1 tensors that config.json asks for, e\.g\. conv_in.weight; expected a"
    with pytest.raises(BackboneError, match=message):
        load(broken)


def test_unknown_device(folder: Path) -> None:
    settings = BackboneSettings(model=str(folder), device="abacus")
    with pytest.raises(SettingsError, match=r"backbone.device: 'abacus' is not available .*; use auto"):
        load_backbone(find_backbone(settings), settings)


def test_digest_follows_the_weights_not_the_file(backbone: Backbone, broken: Path) -> None:
    path = broken / "unet" / WEIGHTS
    weights = load_file(path)
    path.unlink()
    torch.save(weights, path.with_suffix(".bin"))
    assert load(broken).weights_digest == backbone.weights_digest
    torch.save(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, path.with_suffix(".bin"))
    assert load(broken).weights_digest != backbone.weights_digest


# --- features


@torch.no_grad()
def explicit_forward(run: FeatureExtractor, rgb: torch.Tensor) -> list[torch.Tensor]:
    """Tile by tile, timestep by timestep, draw by draw, with the scheduler's own add_noise."""
    backbone = run.backbone
    z0 = backbone.vae.encode(2 * rgb - 1).latent_dist.mode() * backbone.vae.config.scaling_factor
    modules = dict(backbone.unet.named_modules())
    shape = (len(rgb), len(run.timesteps))
    maps = [torch.zeros(*shape, la.channels, la.height, la.width) for la in run.layers]
    for draw in range(run.settings.draws):
        noise = run._noise("noise", draw, IDS, z0.shape[1:])
        for b in range(len(rgb)):
            for j, t in enumerate(run.timesteps):
                seen: dict[str, torch.Tensor] = {}
                handles = [modules[la.name].register_forward_hook(keep(seen, la.name)) for la in run.layers]
                x = backbone.info.scheduler.add_noise(z0[[b]], noise[[b]], torch.tensor([t]))
                backbone.unet(x, t, backbone.prompt)
                for handle in handles:
                    handle.remove()
                for total, la in zip(maps, run.layers, strict=True):
                    out = seen[la.name][0]
                    out = out if out.ndim == 3 else out.T.reshape(la.channels, la.height, la.width)
                    total[b, j] += out / run.settings.draws
    return maps


def keep(seen: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    return lambda _module, _args, output: seen.update({name: output})


@pytest.mark.parametrize("draws", [1, 2])
def test_forward_equals_an_explicit_loop(backbone: Backbone, draws: int) -> None:
    run = extractor(backbone, draws=draws)
    maps = run(images(), IDS)
    assert run.unet_calls == draws
    for ours, expected in zip(maps, explicit_forward(run, images()), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_inversion_calls_the_network_ten_times_to_161(backbone: Backbone) -> None:
    run = extractor(backbone, noising="inversion", timesteps=[161], steps=50)
    maps = run(images(), IDS)
    assert run.unet_calls == 10
    assert {m.shape[:2] for m in maps} == {(3, 1)}
    several = extractor(backbone, noising="inversion", timesteps=[-1, 21, 161], steps=50)(images(), IDS)
    for one, many in zip(maps, several, strict=True):
        assert torch.equal(one[:, 0], many[:, 2])


@pytest.mark.parametrize("settings", [{}, {"latent": "sample"}, {"latent": "sample", "noising": "inversion"}])
def test_features_depend_on_the_tile_not_its_place_in_the_batch(backbone: Backbone, settings: Any) -> None:
    run, order = extractor(backbone, **settings), [2, 0, 1]
    maps = run(images(), IDS)
    moved = run(images()[order], [IDS[i] for i in order])
    for a, b in zip(maps, moved, strict=True):
        torch.testing.assert_close(a[order], b, atol=1e-5, rtol=1e-5)
    renamed = run(images(), ["x", "y", "z"])
    assert not torch.allclose(maps[0], renamed[0], atol=1e-4)


@pytest.mark.parametrize("purpose", ["noise", "latent"])
def test_noise_of_a_tile_is_the_same_in_every_batch(backbone: Backbone, purpose: str) -> None:
    run = extractor(backbone)
    together = run._noise(purpose, 1, IDS, (4, 8, 12))
    assert torch.equal(together[2], run._noise(purpose, 1, ["c", "a"], (4, 8, 12))[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("noising", ["forward", "inversion"])
def test_no_hooks_are_left(backbone: Backbone, noising: str) -> None:
    extractor(backbone, noising=noising)(images(), IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.unet.modules())


# --- jobs and runs


def make_job(folder: Path, **settings: Any) -> Job:
    source = SyntheticSettings(
        tiles=18, tile_size=(16, 24), split=SplitShares(train=0.5, val=0.25, test=0.25)
    )
    chosen = ExtractSettings(**({"batch_size": 4, "threads": 1, "layers": DEFAULT} | settings))
    backbone = BackboneSettings(model=str(folder), device="cpu")
    return Job(source, backbone, chosen, StoreSettings(encoding="float32", tiles_per_shard=7))


def test_store_holds_what_the_extractor_computes(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    job = make_job(folder)
    store = extract(job, tmp_path / "f.zarr")
    source = open_source(job.source_settings)
    records = list_tiles(source)
    assert store.tiles["tile_id"].tolist() == [record.tile_id for record in records]
    run = extractor(backbone)
    rgb = np.stack([read_row(job.preparation((16, 24)), source, record)[1].rgb for record in records[4:7]])
    expected = run(torch.from_numpy(rgb), [record.tile_id for record in records[4:7]])
    stored = store.maps(np.arange(4, 7))
    for name, positions in group_layers(run.layers).items():
        ours = np.stack([expected[p].numpy() for p in positions], axis=2)
        np.testing.assert_allclose(stored[name], ours, atol=1e-5)


def test_automatic_values_are_those_the_store_was_begun_with(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.zarr"
    extract(make_job(folder, batch_size=3), out)
    automatic = make_job(folder, batch_size="auto", threads="auto")
    assert fix_automatic(automatic, out, overwrite=False).settings.batch_size == 3
    assert fix_automatic(automatic, out, overwrite=True).settings.batch_size == 8
    assert fix_automatic(automatic, out, overwrite=False).batch_threads == 1


def test_plan_refuses_a_timestep_off_the_grid(folder: Path) -> None:
    job = make_job(folder, noising="inversion", timesteps=[50])
    info = find_backbone(job.backbone_settings)
    with pytest.raises(SettingsError, match=r"50 is not on the inversion grid .* nearest: 41 and 61"):
        plan_layers(job, info, (16, 24))


def test_plan_rounds_the_image_size_up(folder: Path) -> None:
    size, layers = plan_layers(make_job(folder), find_backbone(BackboneSettings(model=str(folder))), (15, 21))
    assert size == (16, 24)
    assert (layers[-1].height, layers[-1].width) == (8, 12)


def test_tiles_of_two_sizes() -> None:
    records = [TileRecord(name, "", "train", size) for name, size in (("a", (4, 4)), ("b", (4, 5)))]
    assert tile_size(records[:1]) == (4, 4)
    with pytest.raises(SourceError, match=r"tile b: is 4 x 5 px, but a is 4 x 4; .* set source.tile_size"):
        tile_size(records)


@pytest.mark.parametrize(("value", "seen"), [(np.nan, "nan"), (-np.inf, "inf"), (-70000.0, "70000")])
def test_values_that_cannot_be_stored(value: float, seen: str) -> None:
    layers = [LayerInfo(name=name, channels=2, stride=8, height=3, width=3) for name in ("first", "second")]
    maps = torch.zeros(2, 3, 2, 4, 3, 3)
    check_finite(largest(maps).numpy(), ["a", "b"], layers, [21, 61, 161], 65504)
    maps[1, 2, 1, 0, 1, 1] = value
    message = (
        f"tile b, layer second, timestep 161: feature of magnitude {seen}, expected a finite value of at "
        "most 65504; use a wider backbone.dtype or store.encoding .*, or check the tile"
    )
    with pytest.raises(FeatureError, match=message):
        check_finite(largest(maps).numpy(), ["a", "b"], layers, [21, 61, 161], 65504)

"""DiffusionSat: its folder, its metadata, prompts and guidance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import diffusionsat
from safetensors.torch import load_file, save_file

from satdifuser.errors import BackboneError, SettingsError, SourceError
from satdifuser.extract.backbone import Backbone, find_backbone, load_backbone
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.layers import select_layers
from satdifuser.extract.metadata import FIELDS, Metadata, missing_fields, normalise, tile_metadata
from satdifuser.extract.settings import BackboneSettings, ExtractSettings
from satdifuser.extract.sources.tile import TileRecord

IDS = ["a", "b", "c"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return diffusionsat(tmp_path_factory.mktemp("published") / "resolution16")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "broken")


def load(folder: Path, **settings: Any) -> Backbone:
    chosen = BackboneSettings(model=str(folder), device="cpu", **settings)
    return load_backbone(find_backbone(chosen), chosen)


def extractor(backbone: Backbone, **settings: Any) -> FeatureExtractor:
    layers = select_layers(backbone.info.layers((16, 16)), ["up_blocks.*.attn1", "up_blocks.*.conv2"])
    return FeatureExtractor(backbone, ExtractSettings(**settings), layers)


def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# --- the folder


def test_published_layout(folder: Path) -> None:
    info = find_backbone(BackboneSettings(model=str(folder)))
    assert info.unet_folder == folder / "checkpoint-150000/unet"
    assert (info.trained_size, info.reads_metadata) == (16, True)


def test_newest_checkpoint_is_taken(broken: Path) -> None:
    shutil.copytree(broken / "checkpoint-150000", broken / "checkpoint-90000")
    shutil.copytree(broken / "checkpoint-150000/unet", broken / "unet")
    assert find_backbone(BackboneSettings(model=str(broken))).unet_folder.parent.name == "checkpoint-150000"


def test_folder_of_backbones_names_them(folder: Path) -> None:
    message = (
        r"lacks vae/config.json, .*unet/config.json \(or checkpoint-\*/unet/config.json\), .*resolution16$"
    )
    with pytest.raises(BackboneError, match=message):
        find_backbone(BackboneSettings(model=str(folder.parent)))


def test_weights_are_the_same_with_and_without_metadata(folder: Path) -> None:
    with_metadata, without = load(folder, metadata=True).unet.state_dict(), load(folder).unet.state_dict()
    assert {name for name in with_metadata if name not in without} == {
        f"metadata_embedding.{i}.linear_{j}.{kind}"
        for i in range(7)
        for j in (1, 2)
        for kind in ("weight", "bias")
    }
    assert all(torch.equal(with_metadata[name], value) for name, value in without.items())


def test_metadata_of_a_plain_backbone(broken: Path) -> None:
    config = broken / "checkpoint-150000/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_metadata": False}))
    with pytest.raises(SettingsError, match=r"backbone.metadata: true, but the U-Net of .* has no metadata"):
        find_backbone(BackboneSettings(model=str(broken), metadata=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.bias": None}, "lack 1 tensors that config.json asks for, e.g. conv_in.bias; expected a"),
        ({"other.bias": torch.zeros(2)}, "hold 1 tensors that config.json knows nothing of, e.g. other.bias"),
        (
            {"conv_in.bias": torch.zeros(9)},
            r"hold 1 tensors of other shapes than config.json says, e.g. conv_in.bias \[9\] instead of \[8\]",
        ),
    ],
)
def test_weights_that_do_not_fit(broken: Path, change: dict[str, Any], message: str) -> None:
    file = broken / "checkpoint-150000/unet" / WEIGHTS
    weights = load_file(file) | change
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
    with pytest.raises(BackboneError, match=message):
        load(broken)


@pytest.mark.parametrize("name", ["checkpoint-150000/unet/config.json", "vae/config.json"])
def test_config_that_is_no_json(broken: Path, name: str) -> None:
    (broken / name).write_text("{")
    with pytest.raises(
        BackboneError, match=r"config.json: not a readable JSON file: .*; copy the checkpoint"
    ):
        find_backbone(BackboneSettings(model=str(broken)))


def test_truncated_weights(broken: Path) -> None:
    file = broken / "checkpoint-150000/unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=r"unet: cannot load the weights: .*; copy or convert"):
        load(broken)


# --- metadata


def test_fields_are_scaled_as_in_training() -> None:
    """Sydney in 2017, with the figures of DiffusionSat's own normalisation."""
    metadata = Metadata(151.2093, -33.8688, 0.5, 0.12, 2017, 2, 11)
    expected = [920.0258, 311.8400, 500.0, 120.0, 308.3333, 166.6667, 354.8387]
    torch.testing.assert_close(normalise(metadata), torch.tensor(expected), atol=1e-3, rtol=0)


def test_a_missing_field_is_zero_as_in_training() -> None:
    assert normalise(Metadata()).tolist() == [0.0] * 7
    assert missing_fields(Metadata(gsd=1, day=3)) == [f for f in FIELDS if f not in ("gsd", "day")]


@pytest.mark.parametrize(
    ("field", "value", "limits"),
    [("longitude", 200, "-180 to 180"), ("latitude", -91, "-90 to 90"), ("month", 13, "1 to 12")],
)
def test_out_of_range(field: str, value: float, limits: str) -> None:
    message = f"tile a: {field} is {value}, expected {limits}; .* or set backbone.metadata: false"
    with pytest.raises(SourceError, match=message):
        normalise(Metadata(**{field: value}), "tile a")


def test_nothing_is_known_of_a_plain_picture() -> None:
    assert missing_fields(tile_metadata(TileRecord("a", "", "none", (4, 4)), (8, 8))) == list(FIELDS)


def test_metadata_changes_features_tile_by_tile(folder: Path) -> None:
    run = extractor(load(folder, metadata=True))
    dropped = torch.zeros(3, 7)
    known = dropped.clone()
    known[1] = normalise(Metadata(10, 50, 10, 0.1, 2020, 5, 6))
    base, other = run(images(), IDS, dropped), run(images(), IDS, known)
    torch.testing.assert_close(base[0][[0, 2]], other[0][[0, 2]], atol=1e-6, rtol=0)
    assert not torch.allclose(base[0][1], other[0][1], atol=1e-4)
    without = extractor(load(folder))(images(), IDS)
    assert not torch.allclose(base[0], without[0], atol=1e-4)  # dropped is not the same as switched off


# --- prompts and guidance


def test_one_prompt_per_tile_of_a_batch(folder: Path) -> None:
    several = load(folder, prompt=["forest", "water", "forest"])
    assert several.prompt.shape == (3, 12, 8)
    one = load(folder, prompt="water")
    assert torch.equal(several.prompt[1], one.prompt[0])
    maps, expected = extractor(several)(images(), IDS), extractor(one)(images(), IDS)
    torch.testing.assert_close(maps[0][1], expected[0][1], atol=1e-6, rtol=0)
    assert not torch.allclose(maps[0][0], expected[0][0], atol=1e-5)


@torch.no_grad()
def guided_inversion(backbone: Backbone, rgb: torch.Tensor, scale: float) -> torch.Tensor:
    """The latent that reaches t = 41, step by step, by the equations of DDIM and of guidance."""
    alphas = {-1: torch.tensor(1.0), **dict(enumerate(backbone.info.scheduler.alphas_cumprod))}
    x = backbone.encode(rgb, None)
    prompt, negative = (p.expand(len(x), -1, -1) for p in (backbone.prompt, backbone.negative))
    for t, after in ((-1, 1), (1, 21), (21, 41)):
        time = torch.full((len(x),), float(t))
        towards, away = (backbone.unet(x, time, p).sample for p in (prompt, negative))
        epsilon = away + scale * (towards - away)
        clean = (x - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
        x = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * epsilon
    return x


def test_guidance_equals_an_explicit_loop(folder: Path) -> None:
    backbone = load(folder, negative_prompt="water")
    settings: dict[str, Any] = {"noising": "inversion", "timesteps": [41], "prediction": "epsilon"}
    run = extractor(backbone, **settings, guidance=3.0)
    seen: list[torch.Tensor] = []
    hook = backbone.unet.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    run(images(), IDS)
    hook.remove()
    assert run.unet_calls == len(seen) == 7  # two for each step but the last
    torch.testing.assert_close(seen[-1], guided_inversion(backbone, images(), 3.0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen[-1], guided_inversion(backbone, images(), 1.0), atol=1e-3)


def test_guidance_without_a_text_encoder(broken: Path) -> None:
    save_file({"hidden_states": torch.randn(1, 1, 8)}, broken / "prompt_embedding.safetensors")
    run = extractor(load(broken), noising="inversion", timesteps=[21], guidance=2.0)
    message = r"extract.guidance: .*broken has a fixed prompt embedding and no text encoder .*guidance: false"
    with pytest.raises(SettingsError, match=message):
        run(images(), IDS)

"""Two batches at once on a CPU: the same bits, shared weights, errors, interruption, threads given back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import diffusionsat, image_folder

import satdifuser.extract.compute as compute
from satdifuser.errors import FeatureError
from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.grow import Additions, grow
from satdifuser.extract.job import Job, plan_layers
from satdifuser.extract.lanes import BLOCKS, Lanes, StoppedError
from satdifuser.extract.loading import load_work
from satdifuser.extract.plan import make_plan
from satdifuser.extract.run import extract
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, FolderSettings
from satdifuser.store.reader import open_store
from satdifuser.store.settings import StoreSettings
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
TILES = {"field": 7, "water": 6}
LAYERS = ["up_blocks.1.*attn1", "up_blocks.*.conv2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return diffusionsat(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    image_folder(root, TILES)
    return root


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(folder: Path, images: Path) -> Callable[..., Job]:
    """Shards of 5 tiles in batches of 2."""

    def make(threads: int, **settings: Any) -> Job:
        chosen = {"timesteps": [21, 161], "layers": LAYERS, "batch_size": 2, "threads": threads}
        return Job(
            FolderSettings.model_validate({"kind": "folder", "root": images}),
            BackboneSettings(model=str(folder), device="cpu"),
            ExtractSettings.model_validate(chosen | settings),
            StoreSettings(tiles_per_shard=5),
        )

    return make


@pytest.fixture
def extractor(job: Callable[..., Job]) -> FeatureExtractor:
    wanted = job(1)
    info = find_backbone(wanted.backbone_settings)
    _, layers = plan_layers(wanted, info, (16, 16))
    return FeatureExtractor(load_backbone(info, wanted.backbone_settings), wanted.settings, layers)


def features(extractor: FeatureExtractor) -> list[torch.Tensor]:
    return extractor(torch.linspace(0, 1, 768).view(1, 3, 16, 16), ["a"])


# --- the copies


def test_copies_share_the_weights_and_no_hooks(extractor: FeatureExtractor) -> None:
    lanes, never = Lanes(extractor), threading.Event()
    whole = features(extractor)
    with lanes.one(never) as first, lanes.one(never) as second:
        assert first is not second
        for lane in (first, second):
            own, shared = lane.backbone.unet, extractor.backbone.unet
            assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in shared.parameters()]
            assert all(map(torch.equal, features(lane), whole))
    blocks = [m for m in extractor.backbone.unet.modules() if isinstance(m, BLOCKS)]
    assert blocks
    assert not any(block._forward_pre_hooks for block in blocks)


class StopsAt(threading.Event):
    """Set once it was asked a number of times."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_forward_stops_in_its_midst_and_the_copy_is_used_again(extractor: FeatureExtractor) -> None:
    lanes, before = Lanes(extractor, 1), extractor.unet_calls
    with pytest.raises(StoppedError), lanes.one(StopsAt(4)) as lane:
        features(lane)
    assert lane.unet_calls == before + 1  # the U-Net had begun
    with pytest.raises(StoppedError), lanes.one(StopsAt(0)):
        pytest.fail("reached")
    with lanes.one(threading.Event()) as again:
        assert again is lane
        assert all(map(torch.equal, features(again), features(extractor)))


# --- extraction


def threads_of_new_ones() -> int:
    """How many threads torch computes with in a thread that is begun now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("noising", ["forward", "inversion"])
def test_two_lanes_of_a_thread_give_the_bits_of_one_thread(
    job: Callable[..., Job], tmp_path: Path, noising: str
) -> None:
    steps = [21] if noising == "inversion" else [21, 161]
    made = [
        extract(job(threads, noising=noising, timesteps=steps), tmp_path / f"{threads}.zarr")
        for threads in (1, 2)
    ]
    assert verify(made[1], deep=True) == []
    assert made[1].content_digest() == made[0].content_digest()
    assert made[1].tiles.equals(made[0].tiles)
    assert made[1].attributes.feature_identity["threads"] == 2


def test_both_lanes_compute_at_once_and_threads_are_given_back(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, seen = threading.Barrier(2, timeout=20), []
    launch = compute.launch_images

    def meet(*rest: Any) -> Any:
        seen.append(torch.get_num_threads())
        if len(seen) <= 2:
            both.wait()  # for the other lane, or for ever
        return launch(*rest)

    monkeypatch.setattr(compute, "launch_images", meet)
    extract(job(4), tmp_path / "s.zarr")
    assert seen == [2] * 8  # two batches and one of a single tile in each whole shard, two in the last
    assert threads_of_new_ones() == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("compute")]


@pytest.mark.parametrize(("threads", "settings"), [(1, {}), (3, {}), (2, {"compile": True})])
def test_there_are_no_lanes_where_threads_cannot_be_halved_or_copies_not_shared(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, settings: Any
) -> None:
    monkeypatch.setattr(FeatureExtractor, "_compile", lambda self: None)
    assert load_work(make_plan(job(threads, **settings), tmp_path / "s.zarr")).lanes is None


def test_a_run_that_is_interrupted_goes_on_with_the_same_bits(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, calls = compute.launch_images, []

    def interrupt(*rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return launch(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(compute, "launch_images", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract(job(2), tmp_path / "s.zarr")
    assert open_store(tmp_path / "s.zarr").missing_shards() == [1, 2]
    assert threads_of_new_ones() == 2
    resumed = extract(job(2), tmp_path / "s.zarr")
    assert resumed.content_digest() == extract(job(2), tmp_path / "whole.zarr").content_digest()


def test_a_tile_that_cannot_be_encoded_is_named(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = compute._send

    def spoil(work: Any, latents: Any, maps: Any, ids: Any, watch: Any) -> Any:
        if "field/3" in ids:
            maps[0][:] = np.nan
        return send(work, latents, maps, ids, watch)

    monkeypatch.setattr(compute, "_send", spoil)
    with pytest.raises(FeatureError, match=r"tile field/\d, layer up_blocks.* magnitude nan"):
        extract(job(2), tmp_path / "s.zarr")


@pytest.mark.parametrize("latents", [True, False])
def test_a_store_grows_in_two_lanes(job: Callable[..., Job], tmp_path: Path, latents: bool) -> None:
    """With the bits of one thread, on which a batch is computed either way."""
    grown = []
    for threads in (1, 2):
        wanted = job(threads, timesteps=[21])
        wanted = Job(
            wanted.source_settings,
            wanted.backbone_settings,
            wanted.settings,
            StoreSettings(tiles_per_shard=5, latents=latents),
        )
        path = tmp_path / f"{threads}.zarr"
        extract(wanted, path)
        grown.append(grow(wanted, path, Additions(timesteps=[161]), False, False))
    assert verify(grown[1], deep=True) == []
    assert grown[1].content_digest() == grown[0].content_digest()

"""Two batches at once on a CPU: the same bits, shared weights, errors, interruption, threads given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import diffusionsat, image_folder

import satdifuser.extract.compute as compute
import satdifuser.extract.job as job_module
from satdifuser.errors import FeatureError, StoreError
from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.device import set_threads
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.grow import Additions, grow
from satdifuser.extract.job import Job, plan_layers, share_threads
from satdifuser.extract.lanes import BLOCKS, Lanes, StoppedError
from satdifuser.extract.loading import load_work
from satdifuser.extract.plan import make_plan
from satdifuser.extract.run import extract, planned_attributes
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, FolderSettings
from satdifuser.store.opening import open_or_create
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

    def make(threads: int | str, **settings: Any) -> Job:
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
    lanes, never = Lanes(extractor, 2), threading.Event()
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


def test_a_batch_stops_in_its_midst_and_the_copy_is_used_again(extractor: FeatureExtractor) -> None:
    lanes = Lanes(extractor, 1)
    encoder = extractor.backbone.vae.encoder
    images = sum(isinstance(module, BLOCKS) for module in encoder.modules())
    in_autoencoder, in_unet = (1 + images // 2, 0), (1 + images + 2, 1)
    for questions, forwards in (in_autoencoder, in_unet):
        with pytest.raises(StoppedError), lanes.one(StopsAt(questions)) as lane:
            features(lane)
        assert lane.unet_calls == forwards
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


def test_a_thread_keeps_its_number_whatever_others_set() -> None:
    with ThreadPoolExecutor(1, initializer=partial(set_threads, 1)) as pool:
        pool.submit(int).result()
        set_threads(4)
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 4


def test_lanes_have_their_part_of_the_threads_whatever_others_set(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    with compute.background_of(load_work(make_plan(job(4), tmp_path / "s.zarr"))) as background:
        assert torch.get_num_threads() == 2
        torch.set_num_threads(3)
        assert background.hand(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == threads_of_new_ones() == 4


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
    assert made[1].hashes() == made[0].hashes()  # of the threads those count that share a batch
    device, wall = (sum(record[name] for record in made[1].commits) for name in ("device_seconds", "seconds"))
    assert 0 < device < wall  # up to the last batch of the last shard


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


@pytest.mark.parametrize(
    ("asked", "held", "shared"),
    [
        ("auto", None, (8, 2)),  # threads, lanes
        (1, None, (1, 1)),
        (3, None, (3, 1)),  # cannot be halved
        (4, None, (4, 2)),
        ("auto", 1, (2, 2)),
        ("auto", 3, (6, 2)),
        ("auto", 8, (8, 1)),
        ("auto", 16, (16, 1)),  # begun on a larger machine
        (2, 1, (2, 2)),
        (1, 1, (1, 1)),
        (2, 2, (2, 1)),
        (3, 2, (3, 1)),  # will be refused
    ],
)
def test_threads_are_shared_as_the_store_has_them(
    job: Callable[..., Job], asked: Any, held: int | None, shared: tuple[int, int]
) -> None:
    assert share_threads(job(asked), held, 8) == shared


def test_what_changes_the_shared_network_has_one_lane(job: Callable[..., Job]) -> None:
    plain = job(4)
    compiled = job(4, compile=True)
    on_gpu, widening, half = (
        replace(plain, backbone_settings=plain.backbone_settings.model_copy(update=changes))
        for changes in (
            {"device": "cuda:1"},
            {"dtype": "float16", "overflow": "widen"},
            {"dtype": "float16"},
        )
    )
    found = [share_threads(each, None, 4)[1] for each in (plain, half, compiled, on_gpu, widening)]
    assert found == [2, 2, 1, 1, 1]


def test_a_store_that_was_begun_without_lanes_goes_on_without(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions began them: two threads on each batch."""
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "LANES", 1)
        whole = extract(job(2), tmp_path / "whole.zarr")
        part = extract(job(2), tmp_path / "part.zarr")
    assert whole.attributes.feature_identity["threads"] == 2
    (part.folder / "commits/c/1").unlink()
    assert extract(job(2), part.folder).content_digest() == whole.content_digest()
    assert load_work(make_plan(job("auto"), part.folder)).lanes is None
    with pytest.raises(StoreError, match="threads: store has 2, asked for 1"):
        extract(job(1), part.folder)


def test_workers_of_a_cluster_have_lanes_too(job: Callable[..., Job], tmp_path: Path) -> None:
    """Two shards under way in one process, as Dask sends them: neither changes the other's threads."""
    expected = extract(job(2), tmp_path / "one.zarr")
    as_a_worker(job(2), tmp_path / "several.zarr")
    assert open_store(tmp_path / "several.zarr").content_digest() == expected.content_digest()


def test_a_worker_without_lanes_begins_a_shard_while_the_last_batch_of_another_is_fetched(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU is not idle between them."""
    launch, launched, begun, waited = compute.launch_images, [], threading.Event(), []
    under_way, most = [0], [0]

    def end(finish: Callable[[], Any], number: int) -> Any:
        if number == 3:  # batches of 2 in shards of 5: the last one of its shard
            waited.append(begun.wait(60))
            time.sleep(0.5)  # in which a second batch of the next shard could begin
        found = finish()
        under_way[0] -= 1
        return found

    def count(*rest: Any) -> Any:
        launched.append(rest)
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        if len(launched) == 4:
            begun.set()
        return partial(end, launch(*rest), len(launched))

    monkeypatch.setattr(compute, "launch_images", count)
    as_a_worker(job(1), tmp_path / "several.zarr")
    monkeypatch.undo()
    assert waited == [True]
    assert most == [2]  # for which a batch is chosen
    expected = extract(job(1), tmp_path / "one.zarr")
    store = open_store(tmp_path / "several.zarr")
    assert store.content_digest() == expected.content_digest()
    assert all(record["seconds"] > 0 for record in store.commits)


def as_a_worker(job: Job, out: Path) -> None:
    """Extract all shards in one process, two at once, as Dask sends them."""
    worker = pytest.importorskip("satdifuser.extract.worker", reason="the extra dask is not installed")
    plan = make_plan(job, out)
    loaded = load_work(plan).extractor.backbone.loaded
    with open_or_create(out, planned_attributes(plan, plan.job, loaded), overwrite=False) as writer:
        order = worker.Order(
            key=str(out),
            out=str(out),
            store_id=writer.attributes.store_id,
            job=plan.job,
            image_size=plan.image_size,
            layers=plan.layers,
            per_shard=plan.tiles_per_shard,
            versions=worker.own_versions(),
        )
        ranges = [writer.attributes.shard_range(shard) for shard in range(writer.attributes.shards)]
        with ThreadPoolExecutor(2) as pool:
            parts = [plan.records[start:stop] for start, stop in ranges]
            list(pool.map(partial(worker.extract_shard, order), range(len(parts)), parts))


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
        wanted = replace(
            job(threads, timesteps=[21]), store=StoreSettings(tiles_per_shard=5, latents=latents)
        )
        path = tmp_path / f"{threads}.zarr"
        extract(wanted, path)
        grown.append(grow(wanted, path, Additions(timesteps=[161]), False, False))
    assert verify(grown[1], deep=True) == []
    assert grown[1].content_digest() == grown[0].content_digest()

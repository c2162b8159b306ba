"""The training loop's own arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up import random_store

from satdifuser.errors import SettingsError
from satdifuser.fuse.data import MapLoader, device_budget
from satdifuser.fuse.network import build_network
from satdifuser.fuse.run_network import mask_size
from satdifuser.fuse.settings import FitSettings
from satdifuser.fuse.train import SHORTCUT_DECAY, learning_rate, loss, parameter_groups, training_order
from satdifuser.store.device import choose_device
from satdifuser.store.schema import LayerInfo
from satdifuser.store.settings import Encoding

LAYERS = [
    LayerInfo(name="fine", channels=4, stride=4, height=5, width=5),
    LayerInfo(name="coarse", channels=3, stride=8, height=3, width=3),
]


@pytest.mark.parametrize(("tiles", "expected"), [(1, 1), (8, 8), (9, 8), (10, 10)])
def test_a_last_batch_of_one_tile_is_left_out(tiles: int, expected: int) -> None:
    order = training_order(tiles, batch_size=4, seed=[0, 0], min_steps=0)
    assert len(order) == expected
    assert len(set(order.tolist())) == expected


def test_few_tiles_are_seen_as_often_as_the_steps_of_an_epoch_need() -> None:
    order = training_order(3, batch_size=4, seed=[0, 0], min_steps=4)
    assert len(order) == 16
    assert sorted(order[:3].tolist()) == sorted(order[3:6].tolist()) == [0, 1, 2]
    assert (
        training_order(40, 4, [0, 0], min_steps=4).tolist()
        == training_order(40, 4, [0, 0], min_steps=0).tolist()
    )


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first = training_order(20, 4, [0, 1], min_steps=0).tolist()
    assert first == training_order(20, 4, [0, 1], min_steps=0).tolist()
    assert first != training_order(20, 4, [0, 2], min_steps=0).tolist()


def test_the_learning_rate_warms_up_then_decays() -> None:
    settings = FitSettings(epochs=10, lr=0.01, warmup_epochs=2)
    assert learning_rate(0, settings) == pytest.approx(2e-5)
    assert learning_rate(2, settings) == pytest.approx(0.01)
    assert learning_rate(6, settings) == pytest.approx((0.01 + 1e-5) / 2)
    assert learning_rate(10, settings) == pytest.approx(1e-5)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(SettingsError, match=f"fit.device: '{device}' is not available here: "):
        choose_device(device, "fit.device")


def test_the_loss_of_several_classes_per_tile_is_binary_for_each() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    p = logits.sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(loss(logits, targets, 255), by_hand)
    torch.testing.assert_close(loss(logits, targets.float(), 255), by_hand)
    assert mask_size(targets) is None


def test_the_loss_leaves_out_what_is_ignored() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0] = 255
    torch.testing.assert_close(loss(logits, masks, 255), F.cross_entropy(logits[1:], masks[1:]))
    assert loss(logits[:1], masks[:1], 255) == 0
    flat, labels = logits[:, :, 0, 0], torch.tensor([2, 0])
    torch.testing.assert_close(loss(flat, labels, -1), F.cross_entropy(flat, labels))
    assert mask_size(masks) == (4, 4)


@pytest.mark.parametrize("encoding", get_args(Encoding))
def test_batches_are_the_same_from_disk_from_memory_and_on_the_device(
    encoding: Encoding, tmp_path: Path
) -> None:
    store = random_store(tmp_path / "s.zarr", LAYERS, 8, encoding)
    rows = store.select()
    order = np.random.default_rng(0).permutation(len(rows))
    budgets = [{"memory_gb": 0.0}, {"memory_gb": 1.0}, {"device_memory_gb": 1.0}]
    settings = [FitSettings(**budget) for budget in budgets]
    loaders = [MapLoader(store, rows, each, torch.device("cpu")) for each in settings]
    statistics = loaders[0].statistics()
    for loader in loaders[1:]:
        for ours, theirs in zip(loader.statistics().values(), statistics.values(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    expected = store.maps(rows)
    for batches in zip(*(loader.batches(order, 3, statistics) for loader in loaders), strict=True):
        for maps, _, chosen in batches:
            for group, held in store.groups.items():
                mean, spread = (values[..., None, None] for values in statistics[group])
                wanted = (expected[group][chosen] - mean) / spread
                stride = store.attributes.layers[held[0]].stride
                np.testing.assert_array_equal(np.stack([m.numpy() for m in maps[stride]], axis=2), wanted)


def test_features_may_take_a_part_of_a_gpu_or_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 90 * 10**9))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert device_budget(FitSettings(), gpu) == 20e9
    assert device_budget(FitSettings(), cpu) == 0
    assert [device_budget(FitSettings(device_memory_gb=2), device) for device in (gpu, cpu)] == [2e9, 2e9]


@pytest.mark.parametrize("head", ["shortcut", "reference"])
def test_every_weight_is_trained_once_and_the_shortcut_is_penalised(head: str) -> None:
    settings = FitSettings.model_validate({"head": head, "weight_decay": 1e-3})
    network = build_network("global", {4: [8, 8]}, 2, 3, "classification", settings)
    groups = parameter_groups(network, settings)
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in network.parameters())
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        expected = 1e-3 + SHORTCUT_DECAY * name.startswith("shortcut.")
        assert decays[id(parameter)] == pytest.approx(expected), name

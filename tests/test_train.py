"""The training loop's own arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from satdifuser.errors import SettingsError
from satdifuser.fuse.settings import FitSettings
from satdifuser.fuse.train import choose_device, learning_rate, loss, mask_size, training_order


@pytest.mark.parametrize(("tiles", "expected"), [(1, 1), (8, 8), (9, 8), (10, 10)])
def test_a_last_batch_of_one_tile_is_left_out(tiles: int, expected: int) -> None:
    order = training_order(tiles, batch_size=4, seed=[0, 0])
    assert len(order) == expected
    assert len(set(order.tolist())) == expected


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first = training_order(20, 4, [0, 1]).tolist()
    assert first == training_order(20, 4, [0, 1]).tolist()
    assert first != training_order(20, 4, [0, 2]).tolist()


def test_the_learning_rate_warms_up_then_decays() -> None:
    settings = FitSettings(epochs=10, lr=0.01, warmup_epochs=2)
    assert learning_rate(0, settings) == pytest.approx(2e-5)
    assert learning_rate(2, settings) == pytest.approx(0.01)
    assert learning_rate(6, settings) == pytest.approx((0.01 + 1e-5) / 2)
    assert learning_rate(10, settings) == pytest.approx(1e-5)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(SettingsError, match=f"fit.device: '{device}' is not available here: "):
        choose_device(device)


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

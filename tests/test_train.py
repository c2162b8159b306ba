"""The training loop's own arithmetic."""

from __future__ import annotations

import pytest

from satdifuser.errors import SettingsError
from satdifuser.fuse.settings import FitSettings
from satdifuser.fuse.train import choose_device, learning_rate, training_order


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

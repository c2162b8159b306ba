"""What is kept of a run comes back as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up import random_store

from satdifuser.evaluate.evaluation import StoreNetwork, new_outcome
from satdifuser.fuse.data import TrainingData, labelled
from satdifuser.fuse.fit import fit
from satdifuser.fuse.inputs import choose_inputs
from satdifuser.fuse.run_folder import load_weights
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.schema import LayerInfo

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def test_statistics_keep_their_order_and_predictions_are_those_of_the_training(tmp_path: Path) -> None:
    """A choice of layers may lie in memory in another order than its axes say: nothing asks it on the way."""
    layers = [LayerInfo(name=f"l{i}", channels=2, stride=2, height=4, width=4) for i in range(3)]
    store = random_store(tmp_path / "s.zarr", layers, 40)
    settings = FitSettings(projection=8, norm_groups=1, epochs=1, warmup_epochs=0, device="cpu")
    run = fit(store, settings, "global", 0, tmp_path / "run", new_outcome)
    _, kept = load_weights(run)
    known = TrainingData(store, settings, choose_inputs(store, settings)).statistics
    assert kept
    assert known
    for group, pair in kept.items():
        for found, expected in zip(pair, known[group], strict=True):
            np.testing.assert_array_equal(found, expected)
    outcome = StoreNetwork(run, store).predict(labelled(store, "val"))
    assert outcome.metrics() == pytest.approx(run.info["history"][0]["val"])

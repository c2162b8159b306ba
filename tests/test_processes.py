"""One training in several processes: who learns from which tiles; the result is that of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import succeed
from made_up import random_mask_row, random_store
from safetensors.torch import load_file

from satdifuser.errors import SettingsError
from satdifuser.fuse import processes
from satdifuser.fuse.run_folder import open_run
from satdifuser.fuse.train import training_order
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import TileRow

LAYERS = [
    LayerInfo(name="fine", channels=4, stride=4, height=4, width=4),
    LayerInfo(name="coarse", channels=3, stride=8, height=2, width=2),
]


def one_of(monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    """Be one of so many processes."""
    monkeypatch.setattr(processes, "processes", lambda: count)
    monkeypatch.setattr(processes, "number", lambda: number)


def test_every_batch_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(0).permutation(21)
    parts = []
    for number in range(4):
        one_of(monkeypatch, number, 4)
        parts.append(processes.own_part(order, 8))
    for start in (0, 8):
        batch = np.concatenate([part[start // 4 : start // 4 + 2] for part in parts])
        np.testing.assert_array_equal(batch, order[start : start + 8])
    np.testing.assert_array_equal(np.concatenate([part[4:] for part in parts]), order[16:])  # 2, 1, 1, 1


@pytest.mark.parametrize(("batch_size", "tiles"), [(9, 20), (4, 20), (8, 7)])
def test_batches_that_cannot_be_shared(batch_size: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one_of(monkeypatch, 0, 4)
    message = rf"fit\.batch_size: {batch_size} \({tiles} tiles .* 4 processes .* to a multiple of 4"
    with pytest.raises(SettingsError, match=message):
        processes.own_part(np.arange(tiles), batch_size)


def test_a_last_batch_has_two_tiles_for_each_process_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satdifuser.fuse.train.processes", lambda: 2)
    assert [len(training_order(tiles, 8, [0, 0], min_steps=0)) for tiles in (3, 16, 19, 20)] == [
        3,
        16,
        16,
        20,
    ]


def test_alone_nothing_is_shared() -> None:
    network = torch.nn.Linear(1, 1)
    with processes.joined():
        assert processes.parallel(network) is network
        assert processes.is_first()
        assert processes.weight_of(torch.tensor(7)) == 1
        assert processes.from_first("x") == "x"


def partly_labelled(number: int) -> TileRow:
    """A tile with so many labelled pixels that the processes' losses do not weigh the same."""
    row = random_mask_row(number)
    if row.target is not None:
        row.target[number % 16 + 1 :] = 255
    return row


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s.zarr", LAYERS, 20, row_of=partly_labelled, task="segmentation")
    words = ["fit", store.path, "--set", "fit.fusion=[global,moe]", "--set", "fit.head=linear"]
    for setting in (
        "projection=8",
        "norm_groups=1",
        "epochs=2",
        "batch_size=4",
        "device=cpu",
        "warmup_epochs=0",
    ):
        words += ["--set", f"fit.{setting}"]
    words += ["--set", "evaluate.baselines=false"]
    succeed(*words, "-o", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "satdifuser", *map(str, words), "-o", str(tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters") == 1  # one table
    for name in ("global-seed0", "moe-seed0"):
        one, two = (open_run(tmp_path / folder / name) for folder in ("one", "two"))
        assert [run.info["resolved"]["processes"] for run in (one, two)] == [1, 2]
        assert len(two.info["history"]) == 2
        for ours, theirs in zip(two.info["history"], one.info["history"], strict=True):
            assert ours["val"] == pytest.approx(theirs["val"], abs=1e-4)
        found, expected = (load_file(run.path / "model.safetensors") for run in (two, one))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=key)

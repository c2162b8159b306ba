"""The results table, from made-up run folders."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import run_record

from satdifuser.errors import RunError
from satdifuser.evaluate.results import format_table, results_table
from satdifuser.fuse.run_folder import find_runs, open_run

HASHES = {"feature": "f1", "contents": "c1", "labels": "l1"}


def fake_run(folder: Path, val: float, reported: float = 0.5, **changes: Any) -> Path:
    """Write what the table reads of a run; `evaluate` in the changes updates how it was measured."""
    evaluate = {"split": "test", "bootstrap": 1000, "level": 0.95} | changes.pop("evaluate", {})
    info = run_record(
        name=folder.name,
        classes=["sea", "land"],
        layers=[{"name": "up_blocks.1.resnets.0.conv2", "channels": 64, "stride": 8}],
        **changes,
    )
    interval = {"accuracy": [reported - 0.05, reported + 0.05]}
    scores = {"val": {"accuracy": val}, evaluate["split"]: {"accuracy": reported, "interval": interval}}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.json").write_text(json.dumps({"evaluate": evaluate, **scores}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """moe is best on test, but global is on val; the baseline is above moe on val."""
    return [
        fake_run(tmp_path / "global_0", 0.8, 0.7, seed=0),
        fake_run(tmp_path / "global_1", 0.9, 0.74, seed=1),
        fake_run(tmp_path / "moe_0", 0.7, 0.99, fusion="moe"),
        fake_run(tmp_path / "colour", 0.75, 0.6, kind="baseline", fusion=None, head=None),
    ]


def test_seeds_are_averaged_and_the_choice_is_made_on_val(runs: list[Path]) -> None:
    table = results_table(runs)
    assert table["run"].tolist() == ["global + linear", "colour", "moe_0"]
    assert table["chosen"].tolist() == [True, False, False]
    assert table["val"].tolist() == pytest.approx([0.85, 0.75, 0.7])
    assert table["seeds"].tolist() == [[0, 1], [0], [0]]
    averaged = table.loc[0, ["reported", "spread", "low", "high"]].tolist()
    assert averaged == pytest.approx([0.72, np.std([0.7, 0.74], ddof=1), 0.67, 0.77])
    assert table["spread"].isna().tolist() == [False, True, True]


def test_a_baseline_is_never_chosen_over_a_fusion(tmp_path: Path) -> None:
    baseline = fake_run(tmp_path / "colour", 0.9, kind="baseline", fusion=None, head=None)
    fusion = fake_run(tmp_path / "moe", 0.5, fusion="moe")
    assert results_table([baseline, fusion])["chosen"].tolist() == [False, True]
    assert results_table([baseline])["chosen"].tolist() == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 0},  # the same seed again: something else must differ
        {"timesteps": [21]},
        {"parameters": 7},
        {"store": {"path": "b.zarr", "hashes": {**HASHES, "feature": "f2"}}},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_keep_their_rows(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    first = fake_run(tmp_path / "a", 0.5, seed=0)
    second = fake_run(tmp_path / "b", 0.5, **({"seed": 1} | change))
    assert sorted(results_table([first, second])["run"]) == ["a", "b"]


def test_the_table_reads_as_text(runs: list[Path]) -> None:
    lines = format_table(results_table(runs)).splitlines()
    heading = r"run +val accuracy +test accuracy +95% interval +seeds +parameters +seconds +device seconds"
    assert re.fullmatch(heading, lines[0])
    first = r"\* global \+ linear +0\.850 +0\.720 ± 0\.028 +0\.670 to 0\.770 +0, 1 +123,456 +12\.3 +–"
    assert re.fullmatch(first, lines[2])
    assert lines[3].startswith("colour (baseline) ")
    sentence = (
        "* chosen: highest accuracy on val among the fusions. The test split had no part in the choice."
    )
    assert lines[-1] == sentence
    assert "on val among these runs" in format_table(results_table(runs[3:]))


@pytest.mark.parametrize(
    ("split", "columns"), [("train", "val accuracy  train accuracy"), ("val", "val accuracy")]
)
def test_another_split_than_test_can_be_reported(tmp_path: Path, split: str, columns: str) -> None:
    measured = {"split": split, "level": 0.9}
    table = results_table([fake_run(tmp_path / "a", 0.5, 0.625, evaluate=measured)])
    heading, _, row, _ = format_table(table).splitlines()
    assert heading.split("  ", 1)[1].strip().startswith(f"{columns}  90% interval")
    assert "0.625" in row


def test_a_figure_without_interval_has_a_dash(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", 0.5)
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["test"]["interval"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    table = results_table([run])
    assert math.isnan(table["low"][0])
    assert "  –  " in format_table(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "segmentation"}, r"/b/metrics.json, val, has no miou; measure the run again: `satdifuser"),
        ({"partition": "0.01x_train"}, r"runs of one partition, got: .*/a \(default\), .*/b \(0.01x_train\)"),
        ({"evaluate": {"split": "val"}}, r"runs of one evaluate.split, got: .*/a \(test\), .*/b \(val\); "),
        ({"evaluate": {"level": 0.9}}, r"runs of one evaluate.level, got: .*/a \(0.95\), .*/b \(0.9\); name"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    runs = [fake_run(tmp_path / "a", 0.5), fake_run(tmp_path / "b", 0.5, **change)]
    with pytest.raises(RunError, match=message):
        results_table(runs)


def test_incomplete_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="runs of one task, got: none; name runs that can be compared"):
        results_table([])
    run = fake_run(tmp_path / "a", 0.5)
    metrics = {"evaluate": {"split": "test", "level": 0.95}, "val": {"accuracy": 1.0}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(RunError, match=r"metrics.json, test, has no accuracy; .*`satdifuser evaluate`"):
        results_table([run])
    (run / "metrics.json").write_text(json.dumps({"val": {"accuracy": 1.0}}))
    with pytest.raises(RunError, match=r"metrics.json has no evaluate; measure the run again: `satdifuser"):
        results_table([run])
    (run / "run.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(RunError, match=r"run.json has no kind, task, fusion, head"):
        results_table([run])


def test_runs_are_found_in_a_folder_and_beside_it(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    held = sorted(runs)
    assert find_runs([tmp_path]) == held
    assert find_runs([runs[2]]) == [runs[2]]
    other = fake_run(tmp_path / "notes/far/x", 0.5)
    assert find_runs([other, tmp_path, runs[0]]) == [other, *held]


def test_a_folder_without_runs_is_told_what_one_holds(tmp_path: Path) -> None:
    for folder, hint in ((tmp_path, ""), (tmp_path / "begun", "; its training is unfinished")):
        folder.mkdir(exist_ok=True)
        message = (
            rf"{folder}: not a run \(no run.json\){hint}; a run is a folder with settings.yaml, run.json and "
            "metrics.json; make one with `satdifuser fit`"
        )
        (tmp_path / "begun").mkdir(exist_ok=True)
        (tmp_path / "begun/checkpoint.pt").write_bytes(b"")
        with pytest.raises(RunError, match=message):
            find_runs([folder])
    with pytest.raises(RunError, match="nowhere: no such run folder"):
        find_runs([tmp_path / "nowhere"])


def test_a_damaged_record_of_a_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: is damaged: .*; fit again with --overwrite"):
        open_run(tmp_path)

"""The command line from tiles to report, on a backbone small enough to be made here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import call, refuse, succeed
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from made_up_labelled import labelled_store
from PIL import Image
from safetensors.torch import save_file

import satdifuser.cli as cli_module
import satdifuser.extract.run as run_module
from satdifuser.fuse.train import NewScorer, Training, run_epoch
from satdifuser.store.reader import open_store
from satdifuser.store.writer import StoreWriter

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
# Runs commands as if diffusers and transformers were not installed.
WITHOUT_DIFFUSERS = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from satdifuser.cli import cli
for words in json.loads(sys.argv[1]):
    cli.main(words, standalone_mode=False)
"""


def make_backbone(folder: Path) -> Path:
    """Write a backbone of two blocks: map strides of 2 and 4 px."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    save_file({"hidden_states": torch.randn(1, 1, 8)}, folder / "prompt_embedding.safetensors")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    settings = {
        "source": {"kind": "synthetic", "tiles": 24, "tile_size": 32},
        "backbone": {"model": str(make_backbone(folder / "backbone")), "device": "cpu"},
        "extract": {"timesteps": [21, 161], "batch_size": 2, "threads": 1},
        "store": {"tiles_per_shard": 5},
        "fit": {"fusion": ["global"], "projection": 16, "norm_groups": 4, "epochs": 2, "device": "cpu"},
        "evaluate": {"bootstrap": 20, "pictures": 2, "baselines": False},
        "output": str(folder / "out"),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def store(config: Path) -> Path:
    path = config.parent / "tiny.zarr"
    succeed("extract", "-c", config, "-o", path)
    return path


@pytest.fixture(scope="module")
def fitted(config: Path, store: Path) -> Path:
    succeed("fit", store, "-c", config, "-o", config.parent / "runs")
    return config.parent / "runs/global-seed0"


def succeed_json(*words: object) -> Any:
    return json.loads(succeed(*words, "--json"))


def digest(store: Path) -> str:
    found: str = succeed_json("store", "info", store)["content_digest"]
    return found


def commit_times(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (store / "commits/c").iterdir()}


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "satdifuser", "store", "info", "nowhere.zarr"]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nowhere.zarr: ")
    assert "Traceback" not in done.stderr


def test_import_and_settings_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import satdifuser, satdifuser.cli, sys; from satdifuser.pipeline import load_pipeline; "
        "load_pipeline(); print({'torch', 'diffusers', 'zarr'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code]
    assert subprocess.check_output(words, cwd=tmp_path, env=ENVIRONMENT, text=True) == "set()\n"


def test_wrong_settings_exit_2() -> None:
    result = call("tiles", "--set", "source.tile=3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --set source.tile=3: 1 setting is wrong\n  source.tile = 3: ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("backbone.model=nowhere", "backbone.model: no folder nowhere; expected 'embedded', a diffusers fol"),
        ("backbone.device=abacus", "backbone.device: 'abacus' is not available here: "),
        ("extract.timesteps=[1000]", "extract.timesteps: got [1000], expected values from 0 to 999"),
    ],
)
def test_settings_that_do_not_fit_the_machine_exit_2(
    config: Path, tmp_path: Path, setting: str, message: str
) -> None:
    result = call("extract", "-c", config, "-o", tmp_path / "s.zarr", "--set", setting)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")


def test_a_folder_in_place_of_a_pipeline_file(tmp_path: Path) -> None:
    result = call("run", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: is a folder, expected a pipeline file (YAML); to extract the im" in result.stderr


def output_refusals(config: Path, place: Path) -> list[str]:
    """What the commands say, before any work, to outputs at or below a place that cannot hold them."""
    calls = [
        call("run", config, "-o", place / "out"),
        call("extract", "-c", config, "-o", place / "s.zarr"),
        call("fit", "nowhere.zarr", "-c", config, "-o", place / "runs"),
        call("report", "nowhere", "-o", place / "r.html"),
    ]
    assert {(result.exit_code, result.stdout) for result in calls} == {(2, "")}
    return [result.stderr for result in calls]


def test_an_output_below_a_file_is_refused(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    names = ["output (-o)", "store.path (-o)", "output (-o)", "-o"]
    for name, text in zip(names, output_refusals(config, file), strict=True):
        assert text.startswith(f"error: {name}: cannot write in {file}")
        assert text.endswith(f": {file} is not a folder; choose another path\n")


def test_an_output_that_may_not_be_written_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != (os.W_OK | os.X_OK) and access(path, mode))
    for text in output_refusals(config, tmp_path / "new"):
        assert text.endswith(
            f": {tmp_path} is not writable; choose another path, or change its permissions\n"
        )
    assert list(tmp_path.iterdir()) == []


def test_tiles(config: Path) -> None:
    lines = [json.loads(line) for line in succeed("tiles", "-c", config, "--json").splitlines()]
    assert len({line["tile_id"] for line in lines}) == 24
    assert {line["split"] for line in lines} == {"train", "val", "test"}
    assert all(line["size"] == [32, 32] and line["bands"] == 3 for line in lines)
    assert all(0 <= mean <= 1 for line in lines for mean in line["prepared_means"])
    plain = call("tiles", "-c", config)
    assert len(plain.stdout.splitlines()) == 24
    counts = Counter(line["split"] for line in lines)
    parts = ", ".join(f"{count} {split}" for split, count in counts.most_common())
    assert plain.stderr == f"24 tiles ({parts}); 0 left out for lack of valid pixels\n"


def test_layers(config: Path, store: Path) -> None:
    table = succeed_json("layers", "-c", config)
    assert table == succeed_json("store", "info", store)["layers"]
    assert {layer["stride"] for layer in table} == {2, 4}
    assert all(layer["height"] == 32 // layer["stride"] for layer in table)
    every = {layer["name"] for layer in succeed_json("layers", "-c", config, "--all")}
    assert every > {layer["name"] for layer in table}
    assert len(succeed("layers", "-c", config).splitlines()) == len(table) + 1


def test_same_extraction_again_is_reused(config: Path, store: Path) -> None:
    before = commit_times(store)
    assert before.keys() == {"0", "1", "2", "3", "4"}
    succeed("extract", "-c", config, "-o", store)
    assert commit_times(store) == before


def test_other_settings_are_refused_until_overwritten(config: Path, tmp_path: Path) -> None:
    words = ("extract", "-c", config, "-o", tmp_path / "s.zarr", "--set", "source.tiles=6")
    succeed(*words)
    first = digest(tmp_path / "s.zarr")
    refused = call(*words, "--set", "extract.seed=1")
    assert refused.exit_code == 1
    assert "this store was made with other settings:\n  seed: store has 0, asked for 1\n" in refused.stderr
    assert "or replace the store with --overwrite" in refused.stderr
    assert digest(tmp_path / "s.zarr") == first
    succeed(*words, "--set", "extract.seed=1", "--overwrite")
    assert digest(tmp_path / "s.zarr") != first


def test_a_store_of_other_images_is_refused(config: Path, store: Path) -> None:
    result = call("extract", "-c", config, "-o", store, "--set", "source.seed=7")
    assert result.exit_code == 1
    assert "  source.seed: store has 0, asked for 7\n" in result.stderr


def test_a_store_in_which_nothing_was_committed_is_replaced(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "begun.zarr"
    succeed("extract", "-c", config, "-o", out)
    shutil.rmtree(out / "commits/c")
    assert call("store", "verify", out).stderr.endswith("run the same `satdifuser extract` command again\n")
    succeed("extract", "-c", config, "-o", out, "--set", "source.seed=7")
    assert succeed_json("store", "info", out)["content_digest"]


def test_altered_weights_are_refused(fitted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fitted, tmp_path / "run")
    weights = bytearray((run / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "model.safetensors").write_bytes(weights)
    result = call("evaluate", run)
    assert result.exit_code == 1
    assert "model.safetensors: was altered after the fit (SHA-256 differs); fit again" in result.stderr


def test_store_info(store: Path) -> None:
    info = succeed_json("store", "info", store)
    assert (info["complete"], info["tiles"], info["shards"], info["skipped"]) == (True, 24, 5, {})
    assert sum(info["splits"].values()) == 24
    for value in (*info["hashes"].values(), info["content_digest"]):
        assert len(value) == 64
    assert info["content_digest"] in succeed("store", "info", store)


def test_store_verify(config: Path, store: Path, tmp_path: Path) -> None:
    clean: dict[str, Any] = {"missing": [], "damaged": [], "problems": []}
    assert succeed_json("store", "verify", store, "--deep") == {"ok": True, "deep": True} | clean
    assert succeed("store", "verify", store, "--deep") == f"{store}: whole (every byte checked)\n"
    damaged = tmp_path / "damaged.zarr"
    succeed("extract", "-c", config, "-o", damaged, "--set", "source.tiles=5")
    files = [path for path in (damaged / "features").rglob("c/**/*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 255
    victim.write_bytes(content)
    assert call("store", "verify", damaged).exit_code == 0
    deep = call("store", "verify", damaged, "--deep")
    assert deep.exit_code == 1
    assert "was altered after it was committed (its digest differs)" in deep.stdout


def test_killed_extraction_goes_on_to_the_same_features(config: Path, tmp_path: Path) -> None:
    shards = ("--set", "store.tiles_per_shard=1", "--set", "source.tiles=12")
    words = ["extract", "-c", str(config), *shards, "-o"]
    killed, whole = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    process = subprocess.Popen(
        [sys.executable, "-m", "satdifuser", *words, str(killed)],
        env=ENVIRONMENT,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (killed / "commits/c/0").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    missing = open_store(killed).missing_shards()
    assert 0 < len(missing) < 12
    assert succeed_json("store", "info", killed)["content_digest"] is None
    before = commit_times(killed)
    succeed(*words, killed)
    assert commit_times(killed).items() >= before.items()
    succeed(*words, whole)
    assert digest(killed) == digest(whole)
    succeed("store", "verify", killed, "--deep")


def test_interrupted_extraction_exits_130_and_goes_on(
    config: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("extract", "-c", config, "-o", tmp_path / "s.zarr")
    write_shard = StoreWriter.write_shard

    def interrupt(self: StoreWriter, shard: int, *rest: Any) -> int:
        if shard == 2:
            raise KeyboardInterrupt
        return write_shard(self, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_shard", interrupt)
        result = call(*words)
    assert result.exit_code == 130
    assert result.stderr.endswith(
        "error: interrupted; the same command (without --overwrite) goes on where this one stopped; "
        "2 of 5 shards are kept\n"
    )
    assert open_store(tmp_path / "s.zarr").missing_shards() == [2, 3, 4]
    succeed(*words)
    assert digest(tmp_path / "s.zarr") == digest(store)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """It does not where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_an_interruption_says_what_is_kept(
    config: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_module, "extract", interrupted)
    result = call("extract", "-c", config, "-o", store)
    assert result.exit_code == 130
    assert result.stderr.endswith("where this one stopped; 5 of 5 shards are kept\n")


def test_truncated_image_fails_or_is_skipped(config: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("forest", "water"):
        (tmp_path / "tiles" / name).mkdir(parents=True)
        for index in range(5):
            pixels = random.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "tiles" / name / f"{index}.jpg")
    broken = tmp_path / "tiles/water/3.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * 2 // 3])
    file = tmp_path / "folder.yaml"
    settings = yaml.safe_load(config.read_text())
    file.write_text(
        yaml.safe_dump(settings | {"source": {"kind": "folder", "root": str(tmp_path / "tiles")}})
    )
    failed = call("extract", "-c", file, "-o", tmp_path / "fail.zarr")
    assert failed.exit_code == 1
    assert "water/3.jpg" in failed.stderr
    skip = ("--set", "source.on_error=skip")
    succeed("extract", "-c", file, "-o", tmp_path / "skip.zarr", *skip)
    info = succeed_json("store", "info", tmp_path / "skip.zarr")
    assert info["complete"]
    assert len(info["skipped"]) == 1
    ((tile_id, reason),) = info["skipped"].items()
    assert "water/3" in tile_id
    assert "3.jpg" in reason
    assert "SKIPPED: " in succeed("tiles", "-c", file, *skip)


def test_fit_evaluate_report(config: Path, fitted: Path) -> None:
    run = json.loads((fitted / "run.json").read_text())
    assert (run["task"], run["head"], len(run["history"])) == ("classification", "shortcut", 2)
    assert not (fitted / "checkpoint.pt").exists()
    before = succeed_json("evaluate", fitted, "-c", config)
    metrics = succeed_json("evaluate", fitted, "-c", config)
    assert metrics == before | {"test_reads": before["test_reads"] + 1}
    assert 0 <= metrics["test"]["accuracy"] <= 1
    assert "accuracy" in succeed("evaluate", fitted, "-c", config)
    page = config.parent / "page.html"
    assert succeed("report", fitted, "-o", page).strip() == str(page)
    assert "global" in page.read_text()
    assert succeed("report", fitted.parent, "-o", page).strip() == str(page)


def test_segmentation(config: Path, tmp_path: Path) -> None:
    task = ("--set", "source.task=segmentation")
    succeed("extract", "-c", config, *task, "-o", tmp_path / "s.zarr")
    assert succeed_json("store", "info", tmp_path / "s.zarr")["task"] == "segmentation"
    table = succeed("fit", tmp_path / "s.zarr", "-c", config, "-o", tmp_path / "runs")
    assert "global" in table
    metrics = succeed_json("evaluate", tmp_path / "runs/global-seed0", "-c", config)
    assert metrics["head"] == "upernet"
    assert 0 <= metrics["test"]["miou"] <= 1
    assert np.load(tmp_path / "runs/global-seed0/masks.npz")["predicted"].shape == (4, 32, 32)
    succeed("report", tmp_path / "runs/global-seed0", "-o", tmp_path / "page.html")


def test_run_does_everything_in_one_go_and_reuses_it(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "run",
        config,
        "-o",
        out,
        "--set",
        "evaluate.baselines=true",
        "--set",
        "fit.fusion=[global, moe]",
    )
    printed = succeed(*words)
    for path in (out / "features.zarr", out / "runs", out / "report.html"):
        assert path.exists()
        assert str(path) in printed
    runs = {path.parent.name for path in (out / "runs").glob("*/metrics.json")}
    assert runs > {"global-seed0", "moe-seed0"}
    models = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/model.safetensors")}
    commits = commit_times(out / "features.zarr")
    assert succeed(*words) == printed
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert commit_times(out / "features.zarr") == commits


def test_fixed_seed_gives_equal_metrics(config: Path, store: Path, fitted: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        words = ("fit", store, "-c", config, "-o", tmp_path / name, "--set", f"fit.seeds=[{seed}]")
        succeed(*words)
    first, again, other = (
        json.loads((path / "metrics.json").read_text())
        for path in (fitted, tmp_path / "again/global-seed0", tmp_path / "other/global-seed1")
    )
    values = [{k: v for k, v in one["val"].items() if k != "interval"} for one in (first, again, other)]
    assert values[0] == values[1] != values[2]


def test_interrupted_fit_resumes_to_the_same_weights(
    config: Path, store: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []

    def interrupt(trainings: Sequence[Training], new_scorer: NewScorer) -> None:
        if trainings[0].epoch == 1:
            raise KeyboardInterrupt
        run_epoch(trainings, new_scorer)

    def count(trainings: Sequence[Training], new_scorer: NewScorer) -> None:
        epochs.append(trainings[0].epoch)
        run_epoch(trainings, new_scorer)

    words = ("fit", store, "-c", config, "-o", tmp_path)
    run = tmp_path / "global-seed0"
    with monkeypatch.context() as patch:
        patch.setattr("satdifuser.fuse.fit.run_epoch", interrupt)
        result = call(*words)
    assert result.exit_code == 130
    assert result.stderr.endswith("(without --overwrite) goes on where this one stopped\n")
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt"}
    assert "its training is unfinished" in call("evaluate", run).stderr
    monkeypatch.setattr("satdifuser.fuse.fit.run_epoch", count)
    succeed(*words)
    assert epochs == [1]
    assert (run / "model.safetensors").read_bytes() == (fitted / "model.safetensors").read_bytes()
    losses = [
        [row["train_loss"] for row in json.loads((r / "run.json").read_text())["history"]]
        for r in (run, fitted)
    ]
    assert losses[0] == losses[1]


def test_a_run_of_other_settings_is_refused(config: Path, store: Path, fitted: Path) -> None:
    result = call("fit", store, "-c", config, "-o", fitted.parent, "--set", "fit.lr=0.5")
    assert result.exit_code == 1
    assert "holds a run of other settings:\n  settings.lr: run has 0.004, asked for 0.5\n" in result.stderr


def test_after_extraction_diffusers_is_not_needed(config: Path, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/global-seed0"
    commands = [
        ["store", "info", store],
        ["fit", store, "-c", config, "-o", run.parent, "--set", "evaluate.baselines=true"],
        ["evaluate", run, "-c", config],
        ["report", run, "-o", tmp_path / "page.html"],
    ]
    words = json.dumps([[str(word) for word in words] for words in commands])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFUSERS, words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").is_file()


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_an_interruption_that_a_library_turns_into_an_error_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries may that are imported just then."""

    def load(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("Failed to import diffusers") from None

    monkeypatch.setattr(cli_module, "_load", load)
    result = call("tiles")
    assert (result.exit_code, result.stderr[:18]) == (130, "error: interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_fit_refuses_what_it_cannot_have_before_the_baselines(tmp_path: Path) -> None:
    labelled_store(tmp_path / "s.zarr", "classification")
    for setting, message in (
        ("fit.head=upernet", "head is upernet, but classification needs"),
        ("fit.device=gpu", "fit.device: 'gpu' is not available here: no such device"),
    ):
        assert message in refuse("fit", tmp_path / "s.zarr", "-o", tmp_path / "runs", "--set", setting)
        assert not (tmp_path / "runs").exists()


def test_tiles_need_no_diffusers(tmp_path: Path) -> None:
    """Which takes seconds to import."""
    words = [["tiles", "--set", "source.kind=synthetic", "--set", "source.tiles=20"]]
    command = [sys.executable, "-c", WITHOUT_DIFFUSERS, json.dumps(words)]
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=tmp_path, capture_output=True)


def test_without_dask_several_workers_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    labelled_store(tmp_path / "s.zarr", "classification")
    message = "several workers need Dask: install it with `pip install 'satdifuser[dask]'`"
    assert message in refuse("probe", tmp_path / "s.zarr", "--workers", 2, "-o", tmp_path / "probe")
    assert message in refuse("extract", "--workers", 2, "-o", tmp_path / "new.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]

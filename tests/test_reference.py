"""Checkpoints of the authors' training script: read without running them, checked, measured, given back."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from made_up import store_attributes
from torch import Tensor

from satdifuser.cli import cli
from satdifuser.errors import RunError, StoreError
from satdifuser.evaluate.evaluation import evaluate_run, new_outcome
from satdifuser.evaluate.results import RUN_FIELDS, results_table
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.extract.noising import inversion_grid
from satdifuser.fuse.data import as_feature_maps
from satdifuser.fuse.fit import fit
from satdifuser.fuse.fusion import FeatureMaps, GlobalFusion, LocalizedFusion, MoEFusion
from satdifuser.fuse.heads import LinearHead, UPerNetHead
from satdifuser.fuse.inputs import named_inputs
from satdifuser.fuse.network import Network
from satdifuser.fuse.reference import export_reference, import_reference
from satdifuser.fuse.reference_file import ReferenceConfig, read_checkpoint
from satdifuser.fuse.run_folder import load_weights, open_run
from satdifuser.fuse.run_network import load_network
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.encoding import encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo, group_layers
from satdifuser.store.writer import TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

CLASSES = ["Annual Crop", "Forest", "River"]
SPLITS = ["train"] * 2 + ["val"] * 2 + ["test"] * 4
TIMESTEPS = [21, 61, 161]
LAYERS = [  # two strides, and two widths at the finer one
    LayerInfo(name="up_blocks.0.resnets.0.conv2", channels=12, stride=16, height=2, width=2),
    LayerInfo(name="up_blocks.1.attentions.0.attn1", channels=8, stride=8, height=4, width=4),
    LayerInfo(name="up_blocks.1.resnets.0.conv2", channels=6, stride=8, height=4, width=4),
]
CHANNELS = {8: [8, 6], 16: [12]}
PROJECTION, EXPERTS, DECODER = 128, 3, 20
CONFIG = {
    "task": "classification",
    "fuser": "gw",
    "num_classes": 3,
    "class_names": ["AnnualCrop", "Forest", "River"],
    "projection_dim": PROJECTION,
    "save_timesteps": [47, 45, 40],
    "num_timesteps": 50,
    "diffusion_mode": "inversion",
    "layer_idxs": {"up_blocks": {"attn1": "all", "conv2": "all"}},
    "num_experts": EXPERTS,
    "top_k": 2,
    "channels": DECODER,
    "pool_scales": [1, 2, 3, 6],
    "rescales": [1, 1, 1, 1],
    "resize_outputs": -1,
    "img_size": 32,
    "prompt": "A satellite image",
    "ignore_index": None,
    "lr": 0.01,
    "batch_size": 32,
    "seed": 42,
}
MADE_LIKE_THE_SCRIPT = {
    "extract": {
        "noising": "inversion",
        "steps": 50,
        "latent": "sample",
        "prediction": "epsilon",
        "image_size": [32, 32],
    },
    "backbone": {"prompt": "A satellite image"},
}
CASES = [(fuser, task) for fuser in ("gw", "lw", "moe") for task in ("classification", "segmentation")]


def make_store(
    path: Path,
    task: str | None = "classification",
    maps: list[np.ndarray] | None = None,
    splits: list[str] = SPLITS,
    tile_size: tuple[int, int] = (32, 32),
    **changes: Any,
) -> FeatureStore:
    """Write a store with random features, or with maps (tile, timestep, channel, y, x) per layer."""
    fields: dict[str, Any] = {"layers": LAYERS, "timesteps": TIMESTEPS, "settings": MADE_LIKE_THE_SCRIPT}
    attributes = store_attributes(
        **fields | {"classes": CLASSES if task else []} | changes,
        task=task,
        tiles=len(splits),
        tile_size=tile_size,
        tiles_per_shard=len(splits),
        encoding="float32",
        previews=False,
        colour_statistics=["mean"],
    )
    random = np.random.default_rng(0)
    if maps is None:
        front = (len(splits), len(attributes.timesteps))
        shapes = [(*front, layer.channels, layer.height, layer.width) for layer in attributes.layers]
        maps = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    groups = {
        name: encode(np.stack([maps[position] for position in held], axis=2), "float32")
        for name, held in group_layers(attributes.layers).items()
    }
    labels = random.integers(0, 3, len(splits)).astype(np.int32)
    masks = random.integers(0, 3, (len(splits), *tile_size)).astype(np.uint8)
    targets: dict[str | None, Any] = {
        "classification": labels,
        "segmentation": masks,
        None: [None] * len(splits),
    }[task]
    rows = [
        TileRow(f"t{i}", s, colour=np.zeros(1, np.float32), target=None if t is None else np.asarray(t))
        for i, (s, t) in enumerate(zip(splits, targets, strict=True))
    ]
    open_or_create(path, attributes, overwrite=False).write_shard(0, rows, [groups], {})
    return FeatureStore(path)


def make_network(fuser: str, task: str) -> Network:
    """A network as the released code computes it after warm-up, no weight at its initial value."""
    torch.manual_seed(0)
    fusion: torch.nn.Module
    if fuser == "gw":
        fusion = GlobalFusion(CHANNELS, 3, PROJECTION, 32)
    elif fuser == "lw":
        fusion = LocalizedFusion(CHANNELS, 3, PROJECTION, 32, reference_slicing=True)
    else:
        fusion = MoEFusion(CHANNELS, 3, PROJECTION, 32, experts=EXPERTS, top_k=2, warmup_steps=0)
    segments = task == "segmentation"
    head = UPerNetHead(PROJECTION, 2, 3, DECODER) if segments else LinearHead(PROJECTION, 3)
    network = Network(fusion, head).eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value) if "running" in name else 0.1 * torch.randn_like(value)
    return network


def make_checkpoint(fuser: str = "gw", task: str = "classification", **changes: Any) -> dict[str, Any]:
    """What the script saves; changes are of its settings."""
    state = make_network(fuser, task).state_dict()
    return {
        "epoch": 7,
        "global_step": 700,
        "config": CONFIG | {"fuser": fuser, "task": task} | changes,
        "decoder_net": {k.split(".", 1)[1]: v for k, v in state.items() if not k.endswith("forwards")},
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(700.0)}}, "param_groups": [{"lr": 0.01}]},
        "lr_scheduler": {"last_epoch": 7, "_last_lr": [0.01]},
    }


def save(checkpoint: Any, path: Path) -> Path:
    torch.save(checkpoint, path)
    return path


def all_maps(store: FeatureStore) -> FeatureMaps:
    maps = store.maps(np.arange(store.attributes.tiles))
    layers, inputs = store.attributes.layers, named_inputs(store, None, ["*"])
    return as_feature_maps(layers, {g: torch.from_numpy(v) for g, v in maps.items()}, None, inputs)


def logits(network: Network, maps: FeatureMaps, size: tuple[int, int] | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = network(maps, size)[0]
    return result


def call(*words: object) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {task: make_store(folder / f"{task}.zarr", task) for task in ("classification", "segmentation")}


@pytest.fixture
def store(stores: dict[str, FeatureStore]) -> FeatureStore:
    return stores["classification"]


@pytest.mark.parametrize(("fuser", "task"), CASES)
def test_a_checkpoint_becomes_a_run_that_evaluate_measures(
    fuser: str, task: str, stores: dict[str, FeatureStore], tmp_path: Path
) -> None:
    store, out = stores[task], tmp_path / "runs/theirs"
    file = save(make_checkpoint(fuser, task), tmp_path / "best_ckpt_step_700.pth")
    done = call("import-reference", file, store.path, "--out", out)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{out}\n", "")
    done = call("evaluate", out, store.path, "--json", "--set", "evaluate.bootstrap=5")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)
    assert set(metrics) >= {"val", "test"}
    size = (32, 32) if task == "segmentation" else None
    expected = logits(make_network(fuser, task), all_maps(store), size)
    network, statistics, _ = load_network(open_run(out))
    assert statistics is None
    assert torch.equal(logits(network, all_maps(store), size), expected)
    if task == "classification":
        table = pd.read_parquet(out / "predictions.parquet")
        np.testing.assert_allclose(np.stack(table["probabilities"]), expected[4:].softmax(1), rtol=1e-5)
        targets = torch.from_numpy(np.asarray(store.targets(np.arange(2, 4))))
        right = (expected[2:4].argmax(1) == targets).float().mean().item()
        assert metrics["val"]["accuracy"] == pytest.approx(right)
    else:
        with np.load(out / "masks.npz") as saved:
            np.testing.assert_array_equal(saved["predicted"], expected[4:].argmax(1))


def test_a_checkpoint_without_a_store_waits_for_its_first_one(
    store: FeatureStore, stores: dict[str, FeatureStore], tmp_path: Path
) -> None:
    file, out, at_once = save(make_checkpoint("moe"), tmp_path / "c.pth"), tmp_path / "run", tmp_path / "once"
    assert call("import-reference", file, "--out", out).exit_code == 0
    done = call("evaluate", out)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{out}: was imported without a store; name one: `satdifuser evaluate {out} STORE`" in done.stderr
    done = call("evaluate", out, stores["segmentation"].path)
    assert (done.exit_code, "was trained for classification, but" in done.stderr) == (1, True)
    assert call("evaluate", out, store.path, "--set", "evaluate.bootstrap=5").exit_code == 0
    import_reference(file, at_once, store)
    found, expected = open_run(out).info, open_run(at_once).info
    assert found | {"name": "", "seconds": 0} == expected | {"name": "", "seconds": 0}
    assert load_weights(open_run(out))[0].keys() == load_weights(open_run(at_once))[0].keys()
    assert call("evaluate", out, "--set", "evaluate.bootstrap=6").exit_code == 0  # now it knows its store


def test_class_list_is_another_name_of_class_names(store: FeatureStore, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(class_names=None)
    checkpoint["config"] |= {"class_list": ["x", "y", "z"]}
    with pytest.raises(RunError, match=r"its classes are x, y, z, but those of"):
        import_reference(save(checkpoint, tmp_path / "c.pth"), tmp_path / "run", store)


@pytest.mark.parametrize("case", ["B_cls_gw", "B_seg_gw"])
def test_recorded_logits_of_the_released_code(case: str, shared: Path, tmp_path: Path) -> None:
    arguments = json.loads((shared / f"golden/B/{case}.json").read_text())["kwargs"]
    with np.load(shared / f"golden/B/{case}.npz") as held:
        arrays = {name: held[name] for name in held.files}
    layers, maps = [], []
    for scale, (side, widths) in enumerate(sorted(arguments["feature_dims"].items(), reverse=False)):
        steps = np.stack([arrays[f"in/{step}/{scale}"] for step in (47, 45, 40)], axis=1)
        for i, part in enumerate(np.split(steps, np.cumsum(widths)[:-1], axis=2)):
            name = f"up_blocks.{1 - scale}.resnets.{i}.conv2"
            place = {"stride": 128 // int(side), "height": side, "width": side}
            layers.append(LayerInfo(name=name, channels=part.shape[2], **place))
            maps.append(np.ascontiguousarray(part))
    segments = "channels" in arguments
    task, tile_size = ("segmentation", (40, 40)) if segments else ("classification", (32, 32))
    classes = [f"class {i}" for i in range(arguments["num_classes"])]
    store = make_store(
        tmp_path / "s.zarr", task, maps, ["test"] * 2, tile_size, layers=layers, classes=classes
    )
    state = {name[6:]: torch.from_numpy(a) for name, a in arrays.items() if name.startswith("state/")}
    config = {"task": task, "fuser": "gw"} | {k: v for k, v in arguments.items() if k != "feature_dims"}
    file = save({"config": config, "decoder_net": state}, tmp_path / "c.pth")
    run = import_reference(file, tmp_path / "run", store)
    found = logits(load_network(run)[0], all_maps(store), tile_size if segments else None)
    golden = arrays["out/logits"]
    assert np.abs(found.numpy() - golden).max() <= 1e-4 * np.abs(golden).max()


def test_a_run_tells_where_it_came_from(store: FeatureStore, tmp_path: Path) -> None:
    file = save(make_checkpoint("moe", class_names=None), tmp_path / "best.pth")
    run = import_reference(file, tmp_path / "run", store)
    info = open_run(run.path).info
    assert set(RUN_FIELDS) <= set(info)
    assert (info["kind"], info["fusion"], info["head"], info["seed"]) == ("fusion", "moe", "linear", 42)
    assert info["fit"]["normalise"] is False
    assert [info["fit"][name] for name in ("projection", "norm_groups", "warmup_steps")] == [128, 32, 300]
    origin = info["reference"]
    assert (origin["file"], origin["epoch"], origin["global_step"]) == ("best.pth", 7, 700)
    assert origin["config"] == CONFIG | {"fuser": "moe", "class_names": None}
    assert len(origin["sha256"]) == 64
    assert origin["notes"] == ["it names no classes: they are taken to be in the store's order"]
    with torch.no_grad():
        network = load_network(run)[0]
    assert not network.fusion.warming_up().any()


def test_features_that_were_made_in_another_way_are_noted(tmp_path: Path) -> None:
    made = {
        "extract": {"noising": "forward", "steps": 50, "latent": "mode", "prediction": "scheduler"},
        "backbone": {"prompt": "A field"},
    }
    identity = {"scheduler": {"prediction_type": "v_prediction"}}
    store = make_store(tmp_path / "s.zarr", settings=made, feature_identity=identity)
    done = call(
        "import-reference", save(make_checkpoint(), tmp_path / "c.pth"), store.path, "-o", tmp_path / "r"
    )
    pairs = [
        ("extract.noising", "inversion", "forward"),
        ("extract.latent", "sample", "mode"),
        ("extract.prediction", "epsilon", "v_prediction"),
        ("backbone.prompt", "A satellite image", "A field"),
    ]
    assert done.stderr.splitlines() == [
        f"note: {name}: the script made its features with {theirs!r}, the store's were made with {ours!r}"
        for name, theirs, ours in pairs
    ]


def test_an_imported_run_stands_beside_a_fitted_one(store: FeatureStore, tmp_path: Path) -> None:
    theirs = import_reference(save(make_checkpoint(), tmp_path / "c.pth"), tmp_path / "theirs", store)
    settings = FitSettings(projection=PROJECTION, norm_groups=32, epochs=1, device="cpu")
    ours = fit(store, settings, "global", 0, tmp_path / "ours", new_outcome)
    for run in (theirs, ours):
        evaluate_run(run.path, None, EvaluateSettings(bootstrap=5))
    table = results_table([theirs.path, ours.path])
    assert sorted(table["run"]) == ["ours", "theirs"]


@pytest.mark.parametrize(("fuser", "task"), CASES)
def test_weights_go_back_under_the_released_names(
    fuser: str, task: str, stores: dict[str, FeatureStore], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(fuser, task)
    run = import_reference(save(checkpoint, tmp_path / "c.pth"), tmp_path / "run", stores[task])
    given_back = export_reference(run)
    assert given_back.keys() == checkpoint["decoder_net"].keys()
    assert all(torch.equal(given_back[name], value) for name, value in checkpoint["decoder_net"].items())


@pytest.mark.parametrize("fusion", ["global", "localized", "moe"])
def test_weights_of_our_own_run_load_under_the_released_names(
    fusion: Any, store: FeatureStore, tmp_path: Path
) -> None:
    quick = FitSettings(projection=16, norm_groups=4, epochs=1, warmup_steps=0, device="cpu")
    with pytest.raises(RunError, match=r"the released code has no head shortcut; fit with"):
        export_reference(fit(store, quick, fusion, 0, tmp_path / "shortcut", new_outcome))
    settings = quick.model_copy(update={"head": "reference"})
    run = fit(store, settings, fusion, 0, tmp_path / "run", new_outcome)
    network, _, _ = load_network(run)
    parts = {"global": GlobalFusion, "localized": LocalizedFusion, "moe": MoEFusion}
    options = {"warmup_steps": 0} if fusion == "moe" else {}
    other = Network(parts[fusion](CHANNELS, 3, 16, 4, **options), LinearHead(16, 3)).eval()
    other.load_reference(export_reference(run))
    assert torch.equal(logits(other, all_maps(store)), logits(network, all_maps(store)))


def test_settings_as_omegaconf_saves_them_are_read_without_it(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    omegaconf = pytest.importorskip("omegaconf").OmegaConf
    checkpoint = make_checkpoint("lw")
    base = omegaconf.create({"fuser": "gw", "seed": 1})
    checkpoint["config"] = omegaconf.merge(checkpoint["config"], base, {"fuser": "lw", "seed": 42})
    file = save(checkpoint, tmp_path / "c.pth")
    for name in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        monkeypatch.setitem(sys.modules, name, None)
    run = import_reference(file, tmp_path / "run", store)
    assert run.info["reference"]["config"] == CONFIG | {"fuser": "lw"}
    assert run.info["fusion"] == "localized"


class Command:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo x > {self.path}",)


class Opener(Command):
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(("kind", "asked"), [(Command, f"{os.name}.system"), (Opener, "io.open")])
@pytest.mark.parametrize("bare", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    kind: type[Command], asked: str, bare: bool, store: FeatureStore, tmp_path: Path
) -> None:
    mark, file = tmp_path / "was_here", tmp_path / "c.pth"
    if bare:
        file.write_bytes(pickle.dumps(kind(mark), protocol=2))
    else:
        save(make_checkpoint() | {"lr_scheduler": kind(mark)}, file)
    done = call("import-reference", file, store.path, "-o", tmp_path / "run")
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {file}: asks for {asked}, which is not among the types that a checkpoint may hold (tensors, "
        "plain values, omegaconf's containers); nothing in it was run. If you trust the file, save it anew "
        "with its config as a plain dict\n"
    )
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    file = save(make_checkpoint(), tmp_path / "c.pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(RunError, match=r"c\.pth: is not a whole file of torch.save \(\w+\); copy the"):
        read_checkpoint(file)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_another_kind_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    mark, file = tmp_path / "was_here", tmp_path / "c.pth"
    for content in (Command(mark), make_checkpoint() | {"config": Command(mark)}):
        file.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(RunError, match=r"is not a whole file of torch\.save"):
            read_checkpoint(file)
        torch.save(content, file, pickle_protocol=protocol)
        with pytest.raises(RunError, match=r"is not a whole file of torch\.save"):
            read_checkpoint(file)
    assert not mark.exists()


def test_a_file_without_weights_or_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere\.pth: no such checkpoint file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    whole, file = make_checkpoint(), tmp_path / "c.pth"
    for held, what in (
        ({"config": CONFIG}, "decoder_net"),
        ({"decoder_net": whole["decoder_net"]}, "config"),
        (torch.zeros(2), "decoder_net and config"),
    ):
        with pytest.raises(RunError, match=rf"c\.pth: lacks {what}; expected the dict that the authors'"):
            read_checkpoint(save(held, file))
    with pytest.raises(RunError, match="decoder_net is no state dict; expected tensors by name"):
        read_checkpoint(save(whole | {"decoder_net": {"a": 1}}, file))
    with pytest.raises(RunError, match="config is list, expected settings by name"):
        read_checkpoint(save(whole | {"config": [1]}, file))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "regression"}, "task: Input should be 'classification', 'multi_label_classification' or"),
        ({"fuser": "mean"}, "fuser: Input should be 'gw', 'lw' or 'moe'"),
        ({"num_classes": None}, "num_classes: Field required"),
        ({"num_norm_groups": 24}, "norm_groups is 24, but must divide the projection 128 and its quarter 32"),
        ({"top_k": 9}, "top_k is 9, but must be 1 to 3"),
        ({"save_timesteps": [50]}, r"save_timesteps \[50\] are not steps of 50"),
        ({"resize_outputs": 16}, "resize_outputs: .*only -1 can be rebuilt"),
        ({"pool_scales": [1, 2, 4]}, r"pool_scales: .*only \[1, 2, 3, 6\] can be rebuilt"),
        ({"rescales": [4, 2, 1, 0.5]}, r"rescales: .*only \[1, 1, 1, 1\] can be rebuilt"),
        ({"align_corners": True}, "align_corners: Input should be False"),
    ],
)
def test_settings_that_cannot_be_rebuilt(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"(?s)c\.pth: its config does not describe a network that .*{said}"):
        read_checkpoint(save(make_checkpoint(**changes), tmp_path / "c.pth"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "segmentation"}, "was trained for segmentation, but .* holds targets for classification"),
        (
            {"num_classes": 4},
            "tells 4 classes apart, but .* holds 3: Annual Crop, Forest, River; name a store",
        ),
        (
            {"class_names": ["Forest", "Annual crop", "River"]},
            "its classes are Forest, Annual crop, River, but those of .* are Annual Crop, Forest, River; "
            "name a store with the same classes in the same order",
        ),
        (
            {"save_timesteps": [49, 48, 30]},
            r"was trained on timesteps \[-1, 1, 361\] \(saved steps \[49, 48, 30\] of 50\), but .* holds "
            r"\[21, 61, 161\]; extract with extract.timesteps: \[-1, 1, 361\]",
        ),
        (
            {"save_timesteps": [40], "diffusion_mode": "generation"},
            r"was trained on timesteps \[181\] \(saved steps \[40\] of 50\)",
        ),
        (
            {"layer_idxs": {"up_blocks": {"conv2": "all"}}},
            r"reads the layers up_blocks\.\*\.conv2, but .* also holds up_blocks\.1\.attentions\.0\.attn1; "
            r"extract with extract\.layers: \[up_blocks\.\*\.conv2\]",
        ),
        (
            {"layer_idxs": {"up_blocks": {"conv2": "all", "attn1": "all"}}},
            r"reads the layers up_blocks\.\*\.conv2, up_blocks\.\*\.attn1 of a block in this order, but "
            "stores hold attn1 before conv2; such a checkpoint cannot be imported",
        ),
        (
            {"projection_dim": 256},
            r"decoder_net is not what its config describes: bottleneck_layers\.0\.0\.shortcut\.weight is "
            r"\[128, 8, 1, 1\], expected \[256, 8, 1, 1\], .* and \d+ more; expected weights and settings of",
        ),
    ],
)
def test_a_store_that_does_not_fit(
    changes: dict[str, Any], said: str, store: FeatureStore, tmp_path: Path
) -> None:
    file = save(make_checkpoint(**changes), tmp_path / "c.pth")
    with pytest.raises(RunError, match=rf"c\.pth: {said}"):
        import_reference(file, tmp_path / "run", store)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fuser", "said"),
    [
        (
            "gw",
            r"reads 3 layers of \[8, 6, 12\] channels, fine to coarse, but .* holds 2 of \[8, 12\]; extract",
        ),
        (
            "moe",
            r"reads 2 scales of \[14, 12\] channels, fine to coarse, but .* holds 2 of \[8, 12\]; extract",
        ),
    ],
)
def test_a_store_of_other_layers(fuser: str, said: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", layers=LAYERS[:2])
    with pytest.raises(RunError, match=said):
        import_reference(save(make_checkpoint(fuser), tmp_path / "c.pth"), tmp_path / "run", store)


def test_a_store_without_targets_or_unfinished(store: FeatureStore, tmp_path: Path) -> None:
    file, bare = save(make_checkpoint(), tmp_path / "c.pth"), make_store(tmp_path / "s.zarr", task=None)
    with pytest.raises(RunError, match=r"was trained for classification, but .* holds no targets"):
        import_reference(file, tmp_path / "run", bare)
    (bare.path / "commits/c/0").unlink()
    with pytest.raises(StoreError):
        import_reference(file, tmp_path / "run", FeatureStore(bare.path))


@pytest.mark.parametrize(
    "name", ["mixing_weights", "bottleneck_layers.2.0.conv1.weight", "decoder_head.2.bias"]
)
def test_tensors_that_do_not_fit_are_named(name: str, store: FeatureStore, tmp_path: Path) -> None:
    whole, file = make_checkpoint(), tmp_path / "c.pth"
    tensor = whole["decoder_net"].pop(name)
    lacking = rf"c\.pth: decoder_net is not what its config describes: lacks {name}"
    with pytest.raises(RunError, match=rf"{lacking}; expected weights and settings of one training"):
        import_reference(save(whole, file), tmp_path / "run", store)
    whole["decoder_net"] |= {f"{name}_ema": tensor}
    with pytest.raises(RunError, match=rf"{lacking}, holds unknown {name}_ema; expected"):
        import_reference(save(whole, file), tmp_path / "run", store)
    whole["decoder_net"] = make_checkpoint()["decoder_net"] | {name: tensor[..., None]}
    with pytest.raises(RunError, match=rf"describes: {name} is \[.*, 1\], expected \["):
        import_reference(save(whole, file), tmp_path / "run", store)


def test_a_run_in_the_way_is_kept_unless_told(store: FeatureStore, tmp_path: Path) -> None:
    file, out = save(make_checkpoint(), tmp_path / "c.pth"), tmp_path / "run"
    import_reference(file, out, store)
    evaluate_run(out, None, EvaluateSettings(bootstrap=5))
    done = call("import-reference", file, store.path, "-o", out)
    assert (done.exit_code, done.stderr) == (
        1,
        f"error: {out}: holds a run; write to another folder, or replace it with --overwrite\n",
    )
    assert (out / "metrics.json").exists()
    assert call("import-reference", file, store.path, "-o", out, "--overwrite").exit_code == 0
    assert not (out / "metrics.json").exists()


@given(st.integers(2, 100), st.integers(0, 3), st.data())
def test_saved_steps_are_those_of_the_inversion(steps: int, offset: int, data: st.DataObject) -> None:
    saved = data.draw(st.lists(st.integers(0, steps - 1), min_size=1, unique=True))
    config = ReferenceConfig(
        task="classification", fuser="gw", num_classes=2, save_timesteps=saved, num_timesteps=steps
    )
    grid = inversion_grid(1000, steps, offset)
    assert config.timesteps(1000, offset) == sorted(grid[steps - 1 - k] for k in saved)


def test_saved_steps_of_the_released_settings() -> None:
    config = ReferenceConfig(task="classification", fuser="gw", num_classes=2)
    assert config.timesteps(1000, 1) == [21, 61, 161]

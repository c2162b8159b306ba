"""Pipeline files: the packaged one says what the models default to; wrong ones are explained at once."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from satdifuser.errors import SettingsError
from satdifuser.extract.geobench_datasets import SCALES
from satdifuser.extract.settings import (
    FolderSettings,
    GeobenchSettings,
    ImageSettings,
    PairsSettings,
    PythonSettings,
    ScenesSettings,
    SyntheticSettings,
)
from satdifuser.fuse.settings import FusionName
from satdifuser.pipeline import Pipeline, load_pipeline, packaged_presets
from satdifuser.store.settings import Settings

KINDS: dict[str, type[ImageSettings]] = {
    "folder": FolderSettings,
    "geobench": GeobenchSettings,
    "pairs": PairsSettings,
    "python": PythonSettings,
    "scenes": ScenesSettings,
}


def packaged() -> str:
    return (files("satdifuser") / "pipeline.yaml").read_text()


def commented_blocks() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The shared image settings, and each commented source block by kind, read as YAML."""
    lines = packaged().split("# --- ")[1].splitlines()[1:]
    shared, *blocks = "\n".join(line[2:] for line in lines).split("source:\n")
    parsed = [yaml.safe_load(block) for block in blocks]
    return yaml.safe_load(shared), {block["kind"]: block for block in parsed}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_pipeline(file, overrides)
    return str(caught.value)


def test_packaged_file_equals_the_defaults() -> None:
    assert yaml.safe_load(packaged()) == Pipeline().model_dump(mode="json")
    assert load_pipeline() == Pipeline()


def test_commented_blocks_equal_the_defaults_of_every_source_kind() -> None:
    shared, blocks = commented_blocks()
    assert shared.pop("scale") is None
    assert {"scale", *shared} == set(ImageSettings.model_fields)
    assert blocks.keys() == KINDS.keys()
    for kind, model in KINDS.items():
        needed = {
            name: blocks[kind][name] for name, field in model.model_fields.items() if field.is_required()
        }
        defaults = model(**needed).model_dump(mode="json")
        assert blocks[kind] | shared | {"scale": None} == defaults


def test_every_settings_model_is_written_out() -> None:
    shown = {SyntheticSettings, *KINDS.values()}
    shown |= {type(value) for _, value in Pipeline() if isinstance(value, Settings)}
    sections = {model.__name__ for model in shown} | {"SplitShares", "JsonValue"}  # parts of the blocks
    sections |= {"RandomSplit", "SpatialBlocks", "SpatialFolds", "VectorSettings"}
    assert set(Pipeline.model_json_schema()["$defs"]) == sections


def test_a_file_holds_only_what_differs(tmp_path: Path) -> None:
    assert load_pipeline(write(tmp_path, "fit: {epochs: 3}")).fit.epochs == 3
    assert load_pipeline(write(tmp_path, "source: {tiles: 3}")).source == SyntheticSettings(tiles=3)
    assert load_pipeline(write(tmp_path, "# nothing\n")) == Pipeline()


def test_all_errors_at_once_with_file_field_value_and_rule(tmp_path: Path) -> None:
    file = write(tmp_path, "fit: {lr: -1, epochs: 0, top_k: 9}\nsource: {tiles: many}\n")
    file.write_text(file.read_text() + "extract: {noising: backward, timesteps: []}\n")
    lines = refusal(file=file).splitlines()
    assert lines[0] == f"{file}: 6 settings are wrong"
    assert sorted(lines[1:]) == [
        "  extract.noising = 'backward': expected 'forward' or 'inversion'",
        "  extract.timesteps = []: expected one or more timesteps of at least -1, each named once",
        "  fit.epochs = 0: expected greater than 0",
        "  fit.lr = -1: expected greater than 0",
        "  fit.top_k = 9: top_k is 9, but must be 1 to 8, the number of experts",
        "  source.tiles = 'many': expected a valid integer, unable to parse string as an integer",
    ]


def test_a_wrong_override_is_named_not_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "fit: {lr: -1, epochs: 0, patience: 0}\nsource: {split: {train: 0.8}}\n")
    text = refusal("fit.lr=-2", "fit.lr=-3", "source.split.val=0.3", "evaluate={level: 2}", file=file)
    blocks = [
        "--set source.split.val=0.3: 1 setting is wrong\n"
        "  source.split: train 0.8 + val 0.3 + test 0.2 must be 1, got 1.3",
        "--set fit.lr=-3: 1 setting is wrong\n  fit.lr = -3: expected greater than 0",
        f"{file}: 2 settings are wrong\n"
        "  fit.epochs = 0: expected greater than 0\n"
        "  fit.patience = 0: expected greater than 0",
        "--set evaluate={level: 2}: 1 setting is wrong\n  evaluate.level = 2: expected less than 1",
    ]
    for block in blocks:
        assert block in text
    assert len(text) == sum(map(len, blocks)) + len(blocks) - 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.top_k=9", "fit.top_k = 9: top_k is 9, but must be 1 to 8, the number of experts"),
        ("fit.projection=90", "fit.projection = 90: projection is 90, but must be a multiple of 4, such as"),
        (
            "extract.timesteps=[1,1]",
            "extract.timesteps = [1, 1]: expected one or more timesteps of at",
        ),
        ("extract.timesteps=[-1]", "extract.timesteps = [-1]: expected one or more timesteps of at least 0"),
        (
            "label.split={kind: blocks}",
            "label.split.kind = 'blocks': expected one of 'random', 'spatial_blocks', 'spatial_folds', 'keep",
        ),
        ("label.split={kind: spatial_folds, size_m: 9, folds: 2}", "label.split.folds = 2: expected "),
        ("label.split={kind: spatial_blocks}", "label.split.size_m: is missing, and has no default"),
        ("source={kind: scenes, root: a, date: someday}", "source.date = 'someday': "),
        ("source={kind: scenes, root: a, cloud_cover: 30}", "source.cloud_cover = 30: expected "),
        ("source.split=5", "source.split = 5: expected a valid dictionary or instance of SplitShares"),
        ("source.kind=foldr", "source.kind = 'foldr': expected one of 'folder', 'geobench', 'pairs'"),
        ("source.kind=folder", "source.root: is missing, and has no default"),
        (
            "extract.timesteps=61",
            "extract.timesteps = 61: expected a list in brackets, such as [1, 2, 3] or ",
        ),
        ("source={kind: folder, root: a, bands: [3, 2]}", "source.bands = [3, 2]: expected at least 3 items"),
    ],
)
def test_a_wrong_setting_is_shown_alone(override: str, message: str) -> None:
    assert refusal(override).startswith(f"--set {override}: 1 setting is wrong\n  {message}")


def test_norm_groups_are_checked_against_the_projection() -> None:
    text = refusal("fit.projection=96", "fit.norm_groups=7")
    assert text.startswith(
        "--set fit.norm_groups=7: 1 setting is wrong\n"
        "  fit.norm_groups = 7: norm_groups is 7, but must divide the projection 96 and its quarter 24: "
    )


def test_inversion_may_start_at_the_clean_latent() -> None:
    chosen = load_pipeline(None, ["extract.noising=inversion", "extract.timesteps=[-1, 21]"]).extract
    assert chosen.timesteps == [-1, 21]
    text = refusal("extract.noising=inversion", "extract.timesteps=[-2]")
    assert "timesteps = [-2]: expected one or more timesteps of at least -1, each named once" in text


def test_unknown_key_names_the_nearest() -> None:
    text = refusal("fit.epoch=3")
    assert text.startswith("--set fit.epoch=3: 1 setting is wrong\n  fit.epoch = 3: unknown setting; did")
    assert "did you mean epochs" in text
    assert refusal("fit.qqqqq=3").endswith("fit.qqqqq = 3: unknown setting")


def test_a_setting_of_another_kind_is_not_suggested_to_itself() -> None:
    text = refusal("source.kind=folder", "source.root=x", "source.tiles=3")
    assert "source.tiles = 3: unknown setting" in text
    assert "mean tiles" not in text


def test_missing_field_and_broken_rules() -> None:
    assert refusal("source.kind=folder").endswith("source.root: is missing, and has no default")
    assert refusal("source.split.train=0.8").endswith(
        "source.split: train 0.8 + val 0.2 + test 0.2 must be 1, got 1.2"
    )
    assert "name each value once, got 0 twice or more" in refusal("fit.seeds=[0, 0]")
    assert "'folder', 'geobench', 'pairs', 'python', 'scenes', 'synthetic'" in refusal("source.kind=foldr")


@pytest.mark.parametrize(
    ("text", "value"),
    [("extract.timesteps=[1, 5]", [1, 5]), ("extract.timesteps=paper", "paper")],
)
def test_set_reads_yaml_values(text: str, value: object) -> None:
    assert load_pipeline(None, [text]).extract.timesteps == value


def test_set_wins_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "fit: {epochs: 3, lr: 0.5}")
    fit = load_pipeline(file, ["fit.epochs=4", "fit.epochs=5"]).fit
    assert (fit.epochs, fit.lr) == (5, 0.5)


@pytest.mark.parametrize("text", ["fit.epochs", "=3", ""])
def test_bad_set_is_explained(text: str) -> None:
    assert refusal(text) == f"--set {text}: expected section.key=value, e.g. --set extract.seed=1"


def test_set_with_bad_yaml() -> None:
    assert refusal("fit.seeds=[1").startswith("--set fit.seeds=[1: the value is not readable YAML: ")


def test_kind_switch_drops_the_other_kinds_keys() -> None:
    source = load_pipeline(None, ["source.root=tiles", "source.kind=folder"]).source
    assert source == FolderSettings(kind="folder", root=Path("tiles"))


def test_naming_the_same_kind_keeps_its_keys(tmp_path: Path) -> None:
    file = write(tmp_path, "source: {kind: folder, root: tiles, pad: true}")
    source = load_pipeline(file, ["source.kind=folder"]).source
    assert source == FolderSettings(kind="folder", root=Path("tiles"), pad=True)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.yaml"
    assert refusal(file=nowhere).startswith(
        f"{nowhere}: no such pipeline file, and no such preset; presets are"
    )
    assert ": not a readable YAML file: " in refusal(file=write(tmp_path, "fit: [1"))
    assert refusal(file=tmp_path) == (
        f"{tmp_path}: is a folder, expected a pipeline file (YAML); to extract the images in a folder use "
        f"`--set source.kind=folder --set source.root={tmp_path}`"
    )
    assert refusal(file=write(tmp_path, "- fit")).endswith("got a list, expected sections such as 'source:'")


def test_scale_may_be_a_fraction() -> None:
    base = ["source.kind=folder", "source.root=x"]
    source = load_pipeline(None, [*base, "source.scale=1/4095"]).source
    assert isinstance(source, FolderSettings)
    assert source.scale == 1 / 4095
    for wrong in ("1/0", "a/b"):
        text = refusal(*base, f"source.scale={wrong}")
        assert f"source.scale = '{wrong}': expected a number or a fraction such as 1/4095" in text


# --- presets


@pytest.mark.parametrize("name", sorted(packaged_presets().keys() - {"ablation"}))
def test_every_preset_is_valid_and_opens_with_its_command(name: str) -> None:
    pipeline = load_pipeline(Path(name))
    lines = packaged_presets()[name].read_text().splitlines()
    assert lines[1].startswith(f"# satdifuser run {name} --set source.")
    fit, extract = pipeline.fit, pipeline.extract
    assert (extract.noising, extract.latent, extract.prediction) == ("inversion", "sample", "epsilon")
    assert (fit.epochs, fit.lr, fit.warmup_epochs, fit.final_lr, fit.patience) == (40, 0.01, 5, 1e-5, 10)
    assert (fit.projection, fit.experts, fit.top_k, fit.normalise) == (384, 8, 2, False)


def test_the_preset_of_the_ablation_names_its_five_rows() -> None:
    pipeline = load_pipeline(Path("ablation"))
    assert pipeline.fit.fusion == list(get_args(FusionName))
    assert pipeline.model_copy(update={"fit": Pipeline().fit}) == Pipeline()
    assert "# satdifuser fit eurosat.zarr -c ablation " in packaged_presets()["ablation"].read_text()


def test_presets_of_the_benchmark_are_those_of_its_data_sets() -> None:
    presets = {name: load_pipeline(Path(name)) for name in packaged_presets() if "/" in name}
    assert {f"geobench/{name}" for name in SCALES} == presets.keys()
    segments = (
        "m-pv4ger-seg",
        "m-nz-cattle",
        "m-NeonTree",
        "m-cashew-plant",
        "m-SA-crop-type",
        "m-chesapeake",
    )
    for name, pipeline in presets.items():
        assert isinstance(pipeline.source, GeobenchSettings)
        assert pipeline.source.dataset == name.split("/")[1]
        assert pipeline.fit.batch_size == (16 if pipeline.source.dataset in segments else 32)


def test_a_file_in_the_working_folder_wins_over_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").write_text("fit: {epochs: 3}")
    assert load_pipeline(Path("reference")).fit.epochs == 3


def test_no_such_preset() -> None:
    message = (
        r"geobench/m-eurosta: no such pipeline file, and no such preset; did you mean geobench/m-eurosat"
    )
    with pytest.raises(SettingsError, match=message):
        load_pipeline(Path("geobench/m-eurosta"))


@pytest.mark.parametrize("order", [1, -1])
def test_a_wrong_kind_is_told_of_the_override_that_names_it(order: int) -> None:
    overrides = ("source.kind=foldr", "source.root=tiles")[::order]
    assert refusal(*overrides).startswith(
        "--set source.kind=foldr: 1 setting is wrong\n  source.kind = 'foldr'"
    )

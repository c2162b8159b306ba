"""Pipeline files: the packaged one says what the models default to; wrong ones are explained at once."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from satdifuser.errors import SettingsError
from satdifuser.extract.settings import (
    FolderSettings,
    GeobenchSettings,
    ImageSettings,
    PairsSettings,
    ScenesSettings,
    SyntheticSettings,
)
from satdifuser.pipeline import Pipeline, load_pipeline
from satdifuser.store.settings import Settings

KINDS: dict[str, type[ImageSettings]] = {
    "folder": FolderSettings,
    "geobench": GeobenchSettings,
    "pairs": PairsSettings,
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
    sections = {model.__name__ for model in shown} | {"SplitShares"}  # `split: {…}` stands in the blocks
    assert set(Pipeline.model_json_schema()["$defs"]) == sections


def test_a_file_holds_only_what_differs(tmp_path: Path) -> None:
    assert load_pipeline(write(tmp_path, "fit: {epochs: 3}")).fit.epochs == 3
    assert load_pipeline(write(tmp_path, "source: {tiles: 3}")).source == SyntheticSettings(tiles=3)
    assert load_pipeline(write(tmp_path, "# nothing\n")) == Pipeline()


def test_all_errors_at_once_with_file_field_value_and_rule(tmp_path: Path) -> None:
    file = write(tmp_path, "fit: {lr: -1, epochs: 0}\nsource: {tiles: many}\nextract: {noising: backward}\n")
    text = refusal("evaluate.level=2", file=file)
    assert text.splitlines()[0] == f"{file}: 5 settings are wrong"
    for line in (
        "  fit.lr = -1: expected greater than 0",
        "  fit.epochs = 0: expected greater than 0",
        "  source.tiles = 'many': expected a valid integer, unable to parse string as an integer",
        "  extract.noising = 'backward': expected 'forward' or 'inversion'",
        "  evaluate.level = 2: expected less than 1",
    ):
        assert line in text.splitlines()


def test_unknown_key_names_the_nearest() -> None:
    text = refusal("fit.epoch=3")
    assert text.startswith(
        "packaged pipeline.yaml: 1 setting is wrong\n  fit.epoch = 3: unknown setting; did"
    )
    assert "did you mean epochs" in text
    assert refusal("fit.qqqqq=3").endswith("fit.qqqqq = 3: unknown setting")


def test_a_setting_of_another_kind_is_not_suggested_to_itself() -> None:
    text = refusal("source.kind=folder", "source.root=x", "source.tiles=3")
    assert "source.tiles = 3: unknown setting" in text
    assert "mean tiles" not in text


def test_missing_field_and_broken_rules() -> None:
    assert refusal("source.kind=folder").endswith("source.root: is missing, and has no default")
    assert "train + val + test must be 1, got 1.2" in refusal("source.split.train=0.8")
    assert "name each value once, got 0 twice or more" in refusal("fit.seeds=[0, 0]")
    assert "'folder', 'geobench', 'pairs', 'scenes', 'synthetic'" in refusal("source.kind=foldr")


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
    assert refusal(file=nowhere) == f"{nowhere}: no such pipeline file"
    assert ": not a readable YAML file: " in refusal(file=write(tmp_path, "fit: [1"))
    assert ": not a readable YAML file: " in refusal(file=tmp_path)
    assert refusal(file=write(tmp_path, "- fit")).endswith("got a list, expected sections such as 'source:'")


def test_scale_may_be_a_fraction() -> None:
    base = ["source.kind=folder", "source.root=x"]
    source = load_pipeline(None, [*base, "source.scale=1/4095"]).source
    assert isinstance(source, FolderSettings)
    assert source.scale == 1 / 4095
    for wrong in ("1/0", "a/b"):
        text = refusal(*base, f"source.scale={wrong}")
        assert f"source.scale = '{wrong}': expected a number or a fraction such as 1/4095" in text

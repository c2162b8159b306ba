"""The commands of docs/tutorial.md, word for word."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import make_scene
import pytest
import rasterio
from command_line import succeed

from satdifuser.evaluate.maps.map_file import CLASSES_TAG

TUTORIAL = Path(__file__).parents[1] / "docs/tutorial.md"
SCENE_MAKER = ["python", "tools/make_scene.py"]


def commands() -> list[list[str]]:
    """The words of each command in the tutorial's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str]) -> str:
    """Run a command of the tutorial; what it prints."""
    if words[:2] == SCENE_MAKER:
        make_scene.main(words[2:])
        return ""
    assert words[0] == "satdifuser"
    return succeed(*words[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_the_tutorial_works_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["satdifuser"])  # pages tell the command that made them
    told = {words[1]: run(words) for words in commands()}
    assert len(commands()) < 10
    accuracy = re.search(r"overall accuracy ([\d.]+)", told["evaluate"])
    assert accuracy
    assert float(accuracy[1]) > 0.4  # guessing gives 0.25
    with rasterio.open("county/scene.tif") as scene, rasterio.open("map.tif") as found:
        assert (found.crs, found.transform, found.shape) == (scene.crs, scene.transform, scene.shape)
        assert sorted(json.loads(found.tags()[CLASSES_TAG])) == sorted(make_scene.CLASSES)
    page = Path("view.html").read_text()
    for name in make_scene.CLASSES:
        assert f"</span>{name}</li>" in page
    assert json.loads(told["store"])["stac_version"] == "1.1.0"

"""The report page in a browser: it draws, fits a phone, follows dark mode, sorts, and logs nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import ask
from made_up_report import fake_probe, fake_run, record_of, tile_store

from satdifuser.evaluate.evaluation import ensure_evaluated, new_outcome
from satdifuser.evaluate.report.page import write_report
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.fit import fit
from satdifuser.fuse.settings import FitSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_waiting_for_the_disk")]

# Asks the loaded page how it is.
QUESTIONS = """
<script>
const refused = [];
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.violatedDirective));
addEventListener("load", () => {
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const all = (query) => [...document.querySelectorAll(query)];
  const drawn = (element) => Math.min(element.clientWidth, element.clientHeight) > 10;
  const table = document.querySelector('[aria-label^="All runs as a table"] table');
  const heading = table.tHead.rows[0].cells[1];
  const column = () => [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[1].textContent));
  const sorted = [];
  for (let click = 0; click < 2; click++) {
    heading.querySelector("button").click();
    sorted.push([heading.getAttribute("aria-sort"), column()]);
  }
  const stops = all("a[href], button, summary, .scroll");
  const unreachable = (stop) => { stop.focus(); return document.activeElement !== stop; };
  const answers = {
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    images: all("img").length,
    blank: all("img").filter((image) => !image.naturalWidth || !drawn(image)).length,
    charts: all("svg").length,
    undrawn: all("svg, table.heat, table.grid").filter((chart) => !drawn(chart)).length,
    shades: new Set(all(".heat td").map((cell) => getComputedStyle(cell).backgroundColor)).size,
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    stops: stops.length,
    unreachable: stops.filter(unreachable).length,
    sorted,
    refused,
  };
  parent.postMessage(answers, "*");
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of figure, of two data sets."""
    folder = tmp_path_factory.mktemp("page")
    store = tile_store(folder / "scenes.zarr")
    settings = FitSettings(projection=8, norm_groups=1, experts=3, warmup_steps=0, epochs=2, device="cpu")
    for fusion in ("global", "localized", "moe"):
        run = fit(store, settings, fusion, 0, folder / fusion, new_outcome)
        ensure_evaluated(run, store, EvaluateSettings(bootstrap=5))
    fake_probe(folder / "sweep", store=record_of(store))
    masks = tile_store(folder / "masks.zarr", "segmentation")
    fake_run(folder / "masks", task="segmentation", head="upernet", store=record_of(masks))
    return write_report([folder], folder / "report.html", "satdifuser report runs")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 400])
def test_page_in_a_browser(chromium: str, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    answers = ask(chromium, page, QUESTIONS, tmp_path, width, dark)
    assert answers["refused"] == []
    assert answers["width"] == width
    assert answers["content"] <= width  # nothing sticks out; wide tables scroll within themselves
    assert answers["images"] > 40
    assert answers["charts"] >= 6
    assert answers["blank"] == answers["undrawn"] == 0
    assert answers["shades"] > 20
    lightness = {name: sum(map(int, re.findall(r"\d+", answers[name])[:3])) for name in ("page", "ink")}
    assert (lightness["page"] < lightness["ink"]) == dark
    assert answers["stops"] > 50
    assert answers["unreachable"] == 0
    (first, falling), (second, rising) = answers["sorted"]
    assert (first, second) == ("descending", "ascending")
    assert falling == sorted(falling, reverse=True)
    assert rising == falling[::-1]
    assert len(set(rising)) > 1

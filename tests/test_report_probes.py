"""What the report tells of probe sweeps, from made-up ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from made_up_report import AMOUNTS, LAYERS, TILES, Page, fake_probe

from satdifuser.errors import RunError
from satdifuser.evaluate.report.figure import Charts, Figure, Table
from satdifuser.evaluate.report.heat_map import HeatMap
from satdifuser.evaluate.report.page import write_report
from satdifuser.evaluate.report.probes import (
    Probe,
    best_strengths,
    chosen_on_val,
    open_probe,
    probe_figures,
    probe_scores,
)


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return open_probe(fake_probe(tmp_path / "sweep"))


def changed(probe: Probe, table: pd.DataFrame) -> Probe:
    return Probe(probe.path, table.reset_index(drop=True), probe.info)


def test_maps_show_val_with_concatenations_at_the_edges(probe: Probe) -> None:
    figures = probe_figures(probe)
    assert [figure.title for figure in figures] == [
        "Which layer, which noise level: logistic probe",
        "Which layer, which noise level: knn probe",
        "What was chosen",
        "How few labels suffice",
    ]
    body = figures[0].body
    assert isinstance(body, HeatMap)
    assert body.columns == ["21", "61", "161", "all"]
    assert [full for _, full, _ in body.rows] == [*LAYERS[2:], *LAYERS[:2], "all layers"]  # fine to coarse
    table = probe.table
    rows = table[(table["labels"] == "100%") & (table["probe"] == "logistic") & (table["split"] == "val")]
    for _, layer, cells in body.rows:
        for cell, column in zip(cells, body.columns, strict=True):
            at_layer = rows["layer"].isna() if layer == "all layers" else rows["layer"] == layer
            at_step = rows["timestep"].isna() if column == "all" else rows["timestep"] == float(column)
            assert cell.text == f"{rows[at_layer & at_step]['value'].item():.3f}"
    chosen = [(layer, i) for _, layer, cells in body.rows for i, cell in enumerate(cells) if cell.chosen]
    assert chosen == [(LAYERS[3], 1)]
    assert "fitted on 600 tiles (100% of the labels)" in figures[0].caption


def test_of_equal_cells_the_map_frames_the_one_that_was_chosen(probe: Probe) -> None:
    table = probe.table[probe.table["labels"] == "100%"].copy()
    table.loc[table["split"] == "val", "value"] = 0.5
    figures = probe_figures(changed(probe, table))
    body, choices = figures[0].body, figures[2].body
    assert isinstance(body, HeatMap)
    assert isinstance(choices, Table)
    framed = [(layer, i) for _, layer, cells in body.rows for i, cell in enumerate(cells) if cell.chosen]
    assert framed == [(LAYERS[0], 0)]
    assert choices.rows[0]["chosen on val"] == "t 21, up 1 attn 0 attn1"


def test_maps_of_several_draws_are_means(probe: Probe) -> None:
    few = changed(probe, probe.table[probe.table["labels"] == "10%"])
    figure = probe_figures(few)[0]
    assert "(10% of the labels, mean over 2 draws of them)" in figure.caption
    body = figure.body
    assert isinstance(body, HeatMap)
    rows = few.table[(few.table["probe"] == "logistic") & (few.table["split"] == "val")]
    expected = rows[(rows["layer"] == LAYERS[0]) & (rows["timestep"] == 21)]["value"].mean()
    (cells,) = [cells for _, layer, cells in body.rows if layer == LAYERS[0]]
    assert cells[0].text == f"{expected:.3f}"


def test_the_strength_is_the_one_that_is_best_on_val(probe: Probe) -> None:
    weaker = probe.table.assign(strength=0.1)
    weaker["value"] += np.where(weaker["split"] == "val", -0.01, 0.2)  # but better on test
    both = pd.concat([weaker, probe.table])
    best = best_strengths(both.reset_index(drop=True))
    assert set(best["strength"]) == {1.0}
    assert set(best["split"]) == {"val"}
    assert len(best) == (probe.table["split"] == "val").sum()


def test_what_is_best_on_test_is_never_chosen(probe: Probe) -> None:
    tempting = probe.table[(probe.table["split"] == "val") & (probe.table["layer"] == LAYERS[0])]
    tempting = tempting.assign(split="test", value=0.9999)
    figures = probe_figures(changed(probe, pd.concat([probe.table, tempting])))
    plain = probe_figures(probe)
    for figure, other in zip(figures, plain, strict=True):
        assert figure.body == other.body
    drawn = "".join(
        chart for figure in figures if isinstance(figure.body, Charts) for chart in figure.body.charts
    )
    assert "0.9999" not in drawn


def test_choices_of_several_draws_have_a_spread(probe: Probe) -> None:
    figure = next(figure for figure in probe_figures(probe) if figure.title == "What was chosen")
    assert isinstance(figure.body, Table)
    rows = {(row["labels"], row["probe"]): row for row in figure.body.rows}
    assert len(rows) == len(AMOUNTS) * 2
    table = probe.table[(probe.table["split"] == "test") & (probe.table["probe"] == "knn")]
    few = table[table["labels"] == "1%"]["value"]
    assert rows["1%", "knn"]["test accuracy"] == f"{few.mean():.3f} ± {few.std():.3f}"
    all_labels = table[table["labels"] == "100%"].iloc[0]
    assert rows["100%", "knn"]["test accuracy"] == f"{all_labels['value']:.3f}"
    assert rows["100%", "knn"]["interval"] == f"{all_labels['low']:.3f} to {all_labels['high']:.3f}"
    assert {row["chosen on val"] for row in rows.values()} == {"t 61, up 2 resnet 0 conv2"}


def test_draws_that_choose_differently_are_told(probe: Probe) -> None:
    table = probe.table.copy()
    other = (table["draw"] == 1) & (table["layer"] == LAYERS[0]) & (table["timestep"] == 21)
    table.loc[other & (table["split"] == "val"), "value"] = 0.99
    figure = next(f for f in probe_figures(changed(probe, table)) if f.title == "What was chosen")
    assert isinstance(figure.body, Table)
    assert figure.body.rows[0]["chosen on val"] == "t 61, up 2 resnet 0 conv2 (in 1 of 2 draws)"


def points(figure: Figure) -> list[str]:
    assert isinstance(figure.body, Charts)
    chart = ElementTree.fromstring(figure.body.charts[0])
    return [str(circle.findtext("{*}title")) for circle in chart.findall("{*}circle")]


def test_label_curve_is_of_the_reported_split(probe: Probe) -> None:
    figure = probe_figures(probe)[-1]
    table = probe.table[(probe.table["split"] == "test") & (probe.table["probe"] == "logistic")]
    means = table.groupby("n_train")["value"].mean()
    shown = [words for words in points(figure) if words.startswith("logistic, best inputs")]
    assert shown == [f"logistic, best inputs: {value:.4g} at {n:g}" for n, value in means.items()]
    assert "test" in figure.caption


def test_sweep_without_other_splits_reports_val(probe: Probe) -> None:
    unread = changed(probe, probe.table[probe.table["split"] == "val"])
    figure = probe_figures(unread)[-1]
    assert "accuracy on val over the number of labelled tiles" in figure.caption
    assert len(points(figure)) == 2 * 2 * 3  # probes, best and best single, amounts


def test_sweep_with_one_amount_of_labels_has_no_curve(probe: Probe) -> None:
    once = changed(probe, probe.table[probe.table["labels"] == "100%"])
    assert probe_figures(once)[-1].title == "What was chosen"


def test_choice_among_single_layers_leaves_out_concatenations(probe: Probe) -> None:
    table = probe.table.copy()
    table.loc[(table["inputs"] == "all") & (table["split"] == "val"), "value"] = 1.0
    choices = chosen_on_val(best_strengths(table), table)
    assert set(choices[choices["among"] == "all"]["inputs"]) == {"all"}
    assert set(choices[choices["among"] == "single"]["inputs"]) == {"single"}


def test_scores_of_single_layers_are_those_of_val(probe: Probe) -> None:
    scores = probe_scores(probe)
    assert set(scores) == {(t, layer) for t in (21, 61, 161) for layer in LAYERS}
    assert max(scores, key=lambda key: scores[key]) == (61, LAYERS[3])


def test_page_about_probes_alone(probe: Probe, tmp_path: Path) -> None:
    page = Page(write_report([probe.path], tmp_path / "r.html", "satdifuser report sweep"))
    assert "Probe: sweep" in page.words
    assert "Chosen:" not in page.words
    assert "satdifuser probe features.zarr -o probe" in page.words
    assert re.search(r"Not shown: features\.zarr: no such store", page.words)
    assert page.source.count('<table class="heat') == 2
    assert f"{TILES}" not in re.findall(r"fitted on (\d+) tiles", page.words)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.drop(columns=["layer", "value"]), "has no layer, value; run `satdifuser probe` again"),
        (lambda t: t.iloc[:0], "has no rows; run `satdifuser probe` again"),
    ],
)
def test_a_table_that_lacks_something_is_refused(probe: Probe, damage: Any, message: str) -> None:
    damage(probe.table).to_parquet(probe.path / "probe.parquet")
    with pytest.raises(RunError, match=f"sweep: {message}"):
        open_probe(probe.path)


def test_damaged_probe_files_are_told(probe: Probe) -> None:
    (probe.path / "probe.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"sweep: no readable probe: .*; run `satdifuser probe` again"):
        open_probe(probe.path)
    (probe.path / "probe.json").write_text("[1]")
    with pytest.raises(RunError, match="sweep: no readable probe: "):
        open_probe(probe.path)

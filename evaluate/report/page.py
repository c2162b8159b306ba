"""Writes the report: one HTML page about some runs and probes that needs no network.

Texts that come from files, such as class names, paths and tile ids, are escaped by the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from satdifuser.evaluate.chosen import choose_runs
from satdifuser.evaluate.html import render_page
from satdifuser.evaluate.probe_folder import PROBE_FILE
from satdifuser.evaluate.report.chapter import Request, make_chapters
from satdifuser.evaluate.report.probes import open_probe
from satdifuser.evaluate.report.stores import Stores
from satdifuser.evaluate.results import open_measured
from satdifuser.fuse.run_folder import RUN_FILE
from satdifuser.store.files import write_durably
from satdifuser.store.location import Location

FOLDER = Path(__file__).parent
TITLE = "Diffusion features: what they can tell apart"


def write_report(
    paths: Sequence[Path],
    out: Path,
    command: str,
    stores: Sequence[Location] = (),
    layers: Sequence[str] = (),
    title: str = TITLE,
) -> Path:
    """Write the page of some runs and probes.

    Args:
        paths: Run and probe folders, and folders that hold such.
        out: Path of the HTML file; its folders are made.
        command: The command line that makes the page.
        stores: Where feature stores are now, if not where they were at the fit.
        layers: Names or patterns of the layers to paint; none for one of each stride.
        title: Heading of the page.

    Returns:
        `out`.

    Raises:
        RunError: there is nothing to report, a folder is incomplete, or runs cannot stand in one table.
        StoreError: one of the stores cannot be opened.
        SettingsError: a pattern matches no layer.
    """
    runs, probes = find_reported(paths)
    request = Request(Stores(stores), layers, command)
    chapters = make_chapters(open_measured(runs), [open_probe(path) for path in probes], request)
    write_durably(out, render_page(FOLDER, "page", title=title, command=command, chapters=chapters))
    return out


def find_reported(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Run folders and probe folders among these folders and directly in them, each once.

    Of the runs in a folder those that are best on val; see `satdifuser.evaluate.chosen`.

    Raises:
        RunError: a folder is neither, and holds none.
    """
    runs: list[Path] = []
    probes: list[Path] = []
    for path in paths:
        swept = [folder for folder in (path, *sorted(path.glob("*"))) if (folder / PROBE_FILE).is_file()]
        if not swept or any(path.glob(f"*/{RUN_FILE}")):
            runs += choose_runs([path])
        probes += swept
    return list(dict.fromkeys(runs)), list(dict.fromkeys(probes))

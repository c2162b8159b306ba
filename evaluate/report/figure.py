"""What the page is made of: sections of figures, each with its words, its data and the command behind it.

A figure's body is one of the kinds below; page.html.jinja knows how to draw each, and escapes all texts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd
from markupsafe import Markup

from satdifuser.evaluate.report.colours import Picture
from satdifuser.evaluate.report.heat_map import HeatMap

SHOWN_ROWS = 300


@dataclass(frozen=True)
class Table:
    """Rows of texts under the same headings, for people to sort."""

    kind: ClassVar[str] = "table"
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class Charts:
    """Drawn charts, side by side where there is room."""

    kind: ClassVar[str] = "charts"
    charts: list[Markup]


@dataclass(frozen=True)
class Grid:
    """Pictures in rows and columns; the heading of a row stands below its first picture."""

    kind: ClassVar[str] = "grid"
    columns: list[str]
    rows: list[tuple[str, list[Picture]]]


@dataclass(frozen=True)
class Card:
    """A tile: its pictures and what is said of it, by name; the last is its id."""

    pictures: list[Picture]
    facts: dict[str, str]

    @property
    def lines(self) -> list[str]:
        """The facts as lines of text."""
        return [value if name == "tile" else f"{name}: {value}" for name, value in self.facts.items()]


@dataclass(frozen=True)
class Cards:
    """Tiles to look at; `wide` ones hold several pictures. The legend maps names to CSS colours."""

    kind: ClassVar[str] = "cards"
    cards: list[Card]
    wide: bool = False
    legend: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        title: Its heading.
        body: What is drawn.
        caption: How to read it, in words for someone who did not run the experiment.
        command: The command line that made what it shows.
        data: The numbers behind it, a tidy table that can be saved as CSV.
        source: Files or stores that hold what it shows.
    """

    kind: ClassVar[str] = "figure"
    title: str
    body: Table | HeatMap | Charts | Grid | Cards
    caption: str
    command: str = ""
    data: pd.DataFrame | None = None
    source: str = ""

    @property
    def shown_data(self) -> list[dict[str, str]]:
        """The first rows of the data as texts, where the drawing is no table of them itself."""
        if self.data is None or self.body.kind in ("table", "heat"):
            return []
        rows = self.data.head(SHOWN_ROWS).to_dict("records")
        return [{str(name): as_text(value) for name, value in row.items()} for row in rows]

    @property
    def csv_uri(self) -> str:
        """All the data as CSV."""
        text = "" if self.data is None else self.data.to_csv(index=False)
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode("ascii")


@dataclass(frozen=True)
class Missing:
    """A figure that could not be made, and why."""

    kind: ClassVar[str] = "missing"
    title: str
    reason: str


@dataclass(frozen=True)
class Section:
    """Some figures under one heading, with paragraphs of introduction."""

    title: str
    figures: Sequence[Figure | Missing]
    words: list[str] = field(default_factory=list)


def as_text(value: object) -> str:
    """A cell of a table of data."""
    if isinstance(value, float):
        return "–" if value != value else f"{value:.6g}"
    return "–" if value is None else str(value)

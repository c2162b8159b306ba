"""Fills a template of a page that needs no network: its style and script stand inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render_page(folder: Path, name: str, **values: Any) -> bytes:
    """Fill ``NAME.html.jinja`` of a folder; NAME.css is `style` and NAME.js `script`; texts are escaped."""
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, script = (Markup((folder / f"{name}.{kind}").read_text()) for kind in ("css", "js"))
    page: str = environment.get_template(f"{name}.html.jinja").render(style=style, script=script, **values)
    return page.encode()

"""Options that several commands share, and what they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

override_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Override one setting; repeatable."
)
space_option = click.option(
    "--ignore-free-space", is_flag=True, help="Extract even if the disk looks too small for the result."
)


def pipeline_options(command: Command) -> Command:
    """Add the options of every command that reads a pipeline file."""
    config = click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        help="Pipeline file, or the name of a preset.  [default: the packaged pipeline.yaml]",
    )
    return config(override_option(command))


def page_option(name: str) -> Callable[[Command], Command]:
    """Say where an HTML page goes."""
    return click.option(
        "-o",
        "--out",
        type=click.Path(path_type=Path),
        default=Path(name),
        show_default=True,
        help="The page; replaced if it is there.",
    )


def few_labels_options(command: Command) -> Command:
    """Add --labels, --shots and --draws."""
    labels = click.option(
        "--labels", metavar="1%,10%", help="Learn from few labels: shares of the training tiles."
    )
    shots = click.option("--shots", metavar="1,5", help="… or so many training tiles of each class.")
    draws = click.option("--draws", type=click.IntRange(min=1), metavar="N", help="Draw few labels so often.")
    return labels(shots(draws(command)))


def spread_options(command: Command) -> Command:
    """Add --workers and --scheduler."""
    workers = click.option("--workers", type=click.IntRange(min=1), help="Dask processes on this machine.")
    scheduler = click.option(
        "--scheduler", metavar="ADDRESS", help="Use the workers of a Dask scheduler: tcp://HOST:8786."
    )
    return workers(scheduler(command))


def as_overrides(section: str, **asked: Any) -> list[str]:
    """Options of a command as overrides of settings of their names; those not given are left out."""
    return [f"{section}.{name}={json.dumps(value)}" for name, value in asked.items() if value is not None]

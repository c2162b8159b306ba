"""The commands of `satdifuser store`: look at, check and mend feature stores; none loads torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
store_argument = click.argument("store", type=click.Path(path_type=Path))


@click.group()
def store() -> None:
    """Look after feature stores."""


@store.command()
@store_argument
@json_option
def info(store: Path, as_json: bool) -> None:
    """Say what a store holds and how it was made."""
    from satdifuser.store.reader import open_store
    from satdifuser.store.summary import describe_store, format_store

    opened = open_store(store)
    click.echo(json.dumps(describe_store(opened)) if as_json else format_store(opened))


@store.command()
@store_argument
@click.option("--deep", is_flag=True, help="Also read every byte: hash all files, recompute all digests.")
@json_option
@click.pass_context
def verify(ctx: click.Context, store: Path, deep: bool, as_json: bool) -> None:
    """Check a store against its own records; exit 1 where anything is wrong."""
    from satdifuser.store.reader import open_store
    from satdifuser.store.verify import verify as check

    opened = open_store(store)
    problems = check(opened, deep)
    if as_json:
        click.echo(json.dumps({"ok": not problems, "deep": deep, "problems": problems}))
    else:
        cheap = "all files are there in their sizes; --deep also reads every byte"
        click.echo("\n".join(problems) or f"{store}: {'whole (every byte checked)' if deep else cheap}")
    if opened.missing_shards():
        click.echo(f"{opened.missing_text()}: run the same `satdifuser extract` command again", err=True)
    elif problems:
        click.echo(
            f"to mend: delete {store}/commits/c/N of each damaged shard N, then run the same "
            "`satdifuser extract` command again; or copy the store anew",
            err=True,
        )
    ctx.exit(1 if problems else 0)

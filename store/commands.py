"""The commands of `satdifuser store`: look at, check and mend feature stores; none loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store.location import (
    Location,
    check_absent,
    check_output,
    is_remote,
    is_tiff,
    location,
)
from satdifuser.store.settings import Encoding, StoreSettings

if TYPE_CHECKING:
    from satdifuser.store.verify import Findings

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is at the output path.")


class StorePlace(click.ParamType):  # type: ignore[type-arg]
    """A local folder or .zip file, or an address such as s3://bucket/x.zarr."""

    name = "store"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Location:
        """A path, or an address as it is."""
        return location(str(value))


store_argument = click.argument("store", type=StorePlace())


@click.group()
def store() -> None:
    """Look after feature stores."""


@store.command()
@store_argument
@click.option("--card", is_flag=True, help="Print the store's card: licence, citation, how to open it.")
@click.option("--stac", is_flag=True, help="Print a STAC Item of the store, as JSON.")
@json_option
def info(store: Location, card: bool, stac: bool, as_json: bool) -> None:
    """Say what a store holds and how it was made."""
    from satdifuser.store.card import store_card
    from satdifuser.store.reader import open_store
    from satdifuser.store.summary import describe_store, format_store

    opened = open_store(store)
    if card:
        click.echo(opened.card() or store_card(opened), nl=False)
        return
    if stac:
        from satdifuser.store.stac import store_item

        click.echo(json.dumps(store_item(opened), indent=1))
        return
    click.echo(json.dumps(describe_store(opened)) if as_json else format_store(opened))


@store.command()
@store_argument
@click.option("--deep", is_flag=True, help="Also read every byte: hash all files, recompute all digests.")
@json_option
@click.pass_context
def verify(ctx: click.Context, store: Location, deep: bool, as_json: bool) -> None:
    """Check a store against its own records; exit 1 where anything is wrong."""
    from satdifuser.store.reader import open_store
    from satdifuser.store.verify import Findings, inspect_store

    try:
        opened = open_store(store)
    except StoreError as error:
        if as_json:
            click.echo(_report(deep, Findings([], {}, []), [str(error)]))
        raise
    found = inspect_store(opened, deep)
    problems = found.problems()
    if as_json:
        click.echo(_report(deep, found, problems))
    else:
        cheap = "all files are there in their sizes; --deep also reads every byte"
        click.echo("\n".join(problems) or f"{store}: {'whole (every byte checked)' if deep else cheap}")
    if found.damaged:
        click.echo(f"to mend: {opened.redo(deep)}", err=True)
    elif problems:
        click.echo(f"{opened.missing_text() if found.missing else 'to mend'}: {opened.again()}", err=True)
    ctx.exit(1 if problems else 0)


@store.command()
@store_argument
@click.option("--deep", is_flag=True, help="Read every byte to find damage, as `verify --deep` does.")
@json_option
def repair(store: Location, deep: bool, as_json: bool) -> None:
    """Drop a store's damaged shards, so that its `satdifuser extract` command redoes just those."""
    from satdifuser.store.reader import open_store
    from satdifuser.store.repair import repair as drop_damaged

    if not isinstance(store, Path) or is_remote(store):
        raise SettingsError(f"{store}: only a store in a local folder can be repaired; put it there anew")
    found = drop_damaged(store, deep)
    missing = sorted([*found.missing, *found.damaged])
    if as_json:
        click.echo(json.dumps({"dropped": sorted(found.damaged), "missing": missing}))
    else:
        lines = [f"dropped shard {shard}: {problems[0]}" for shard, problems in sorted(found.damaged.items())]
        click.echo("\n".join(lines) or f"{store}: no damaged shard")
    if missing:
        click.echo(f"to redo what is missing: {open_store(store).again()}", err=True)
    elif not deep:
        click.echo("--deep also finds damage that left the files' sizes as they were", err=True)


def _report(deep: bool, found: Findings, problems: list[str]) -> str:
    """What `verify --json` prints."""
    facts = {"missing": found.missing, "damaged": sorted(found.damaged), "problems": problems}
    return json.dumps({"ok": not problems, "deep": deep} | facts)


@store.command()
@store_argument
@click.option("-o", "--out", type=StorePlace(), required=True, help="The copy's folder or address.")
@click.option("--splits", help="Only tiles of these splits, e.g. train,val.")
@click.option("--tiles", default="*", show_default=True, help="Only tiles whose id matches this pattern.")
@click.option("--timesteps", help="Only these timesteps, e.g. 21,61.")
@click.option("--layers", default="*", show_default=True, help="Only layers that match one of these.")
@click.option("--encoding", type=click.Choice(get_args(Encoding)), help="Another encoding.")
@overwrite_option
def copy(
    store: Location,
    out: Location,
    splits: str | None,
    tiles: str,
    timesteps: str | None,
    layers: str,
    encoding: Encoding | None,
    overwrite: bool,
) -> None:
    """Copy a store or a part of it, or go on with a copy that was interrupted."""
    from satdifuser.store.copy import copy_store
    from satdifuser.store.reader import open_store
    from satdifuser.store.remote import upload

    opened = open_store(store)
    if isinstance(out, str):
        whole = (splits, timesteps, encoding, tiles, layers) == (None, None, None, "*", "*")
        if not whole or opened.folder != opened.path:
            raise SettingsError(
                f"-o {out}: only a whole local store goes to an address; copy to a folder first"
            )
        upload(opened, out, overwrite)
        click.echo(open_store(out))
        return
    check_output(out.parent, "-o")
    steps = None if timesteps is None else whole_numbers("--timesteps", timesteps)
    settings = StoreSettings(encoding=encoding or opened.attributes.encoding)
    chosen = [] if splits is None else splits.split(",")
    click.echo(copy_store(opened, out, chosen, tiles, steps, layers.split(","), settings, overwrite))


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers in a text such as ``21,61``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"{option}: got {text!r}, expected whole numbers, e.g. 21,61") from error


@store.command()
@store_argument
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="NAME.parquet or NAME.tif.")
@click.option("--timesteps", help="Only these timesteps, e.g. 21,61; for a .tif one.")
@click.option(
    "--layers", default="*", show_default=True, help="Only layers that match one of these; for a .tif one."
)
@click.option("--splits", help="Only tiles of these splits, e.g. train,val; for a .parquet.")
@overwrite_option
def export(
    store: Location, out: Path, timesteps: str | None, layers: str, splits: str | None, overwrite: bool
) -> None:
    """Write pooled features as GeoParquet, a row per tile, or one layer as a GeoTIFF."""
    from satdifuser.store.export import export_layer, export_pooled
    from satdifuser.store.reader import open_store

    check_absent(out, overwrite)
    check_output(out.parent, "-o")
    opened = open_store(store)
    held = opened.attributes.timesteps
    steps = held if timesteps is None else whole_numbers("--timesteps", timesteps)
    if out.suffix.lower() == ".parquet":
        chosen = [] if splits is None else splits.split(",")
        export_pooled(opened, out, steps, layers.split(","), chosen)
    elif is_tiff(out):
        if len(steps) > 1 or splits is not None:
            raise SettingsError(
                f"-o {out}: a GeoTIFF takes one of --timesteps, one of --layers, and all tiles"
            )
        export_layer(opened, out, steps[0], layers)
    else:
        raise SettingsError(f"-o {out}: got the ending {out.suffix!r}, expected .parquet or .tif")
    click.echo(out)


@store.command()
@click.argument("first", type=StorePlace())
@click.argument("second", type=StorePlace())
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new store's folder.")
@overwrite_option
def merge(first: Location, second: Location, out: Path, overwrite: bool) -> None:
    """Join two stores of the same features; tiles that both hold must be identical."""
    from satdifuser.store.copy import merge_stores
    from satdifuser.store.reader import open_store

    check_output(out.parent, "-o")
    click.echo(merge_stores(open_store(first), open_store(second), out, overwrite))

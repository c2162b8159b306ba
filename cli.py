"""The command line: one command per stage, thin; each imports what it needs when it runs.

stdout is data, everything else goes to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or settings,
130 interrupted (and resumable).
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import click

from satdifuser.errors import SatDiFuserError, SettingsError
from satdifuser.options import (
    as_overrides,
    few_labels_options,
    override_option,
    page_option,
    pipeline_options,
    space_option,
    spread_options,
)
from satdifuser.store.commands import (
    StorePlace,
    json_option,
    overwrite_option,
    store,
    store_argument,
    whole_numbers,
)
from satdifuser.store.location import Location, check_absent, check_output

if TYPE_CHECKING:
    from satdifuser.pipeline import Pipeline


INTERRUPTED = "interrupted; the same command (without --overwrite) goes on where this one stopped"


class _Failure(click.ClickException):
    """An error already explained to the user, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Take note of Ctrl-C, and raise KeyboardInterrupt as ever."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or current_thread() is not main_thread():
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class _Commands(click.Group):
    """Turns the package's errors into a message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with _noting_interrupts() as noted:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as error:
                raise _Failure(INTERRUPTED, 130) from error
            except Exception as error:
                # a library that was being imported may have made an error of its own of it
                if noted and not isinstance(error, click.ClickException):
                    raise _Failure(INTERRUPTED, 130) from error
                if isinstance(error, SatDiFuserError):
                    raise _Failure(str(error), error.exit_code) from error
                if isinstance(error, PermissionError):
                    raise _Failure(f"{error}; change its permissions, or name another path", 1) from error
                if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                    raise _Failure(str(error), 1) from error
                raise  # a mistake of ours; or the reader of a pipe has gone, where click ends quietly


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="satdifuser")
def cli() -> None:
    """Diffusion features of satellite images: extract once, then fit and evaluate from the store."""


cli.add_command(store)


def _load(config: Path | None, overrides: tuple[str, ...]) -> Pipeline:
    from satdifuser.pipeline import load_pipeline

    return load_pipeline(config, overrides)


@contextmanager
def _telling_what_is_kept(store: Path) -> Iterator[None]:
    """Let an interruption say how far the store is."""
    try:
        yield
    except KeyboardInterrupt as error:
        from satdifuser.store.reader import is_store, open_store

        if not is_store(store):
            raise
        opened = open_store(store)
        kept = opened.attributes.shards - len(opened.missing_shards())
        raise _Failure(f"{INTERRUPTED}; {kept} of {opened.attributes.shards} shards are kept", 130) from error


@cli.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@override_option
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Output folder, in place of `output`.")
@overwrite_option
@space_option
def run(
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    ignore_free_space: bool,
) -> None:
    """Run all stages of a pipeline file: extract, fit, evaluate, report."""
    from satdifuser.stages import run_pipeline

    pipeline = _load(config, overrides)
    if out is not None:
        pipeline = pipeline.model_copy(update={"output": out})
    check_output(pipeline.output, "output (-o)")
    with _telling_what_is_kept(pipeline.store_path):
        summary = run_pipeline(pipeline, overwrite, ignore_free_space)
    click.echo(summary)


@cli.command()
@pipeline_options
@json_option
def tiles(config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """List the tiles a source yields; the first thing to run on your own images."""
    from satdifuser.extract.listing import describe_tiles, format_counts, format_tile
    from satdifuser.extract.settings import image_settings
    from satdifuser.extract.sources import open_source

    settings = _load(config, overrides).source
    source = open_source(settings)
    kinds: Counter[str] = Counter()
    for line in describe_tiles(source, image_settings(settings)):
        kinds["skipped" if "error" in line else line["split"]] += 1
        click.echo(json.dumps(line) if as_json else format_tile(line))
    click.echo(format_counts(kinds, source.left_out), err=True)


@cli.command()
@pipeline_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The store's folder, e.g. eurosat.zarr.")
@click.option("--no-trial", is_flag=True, help="Leave out the timing of a few batches.")
@json_option
def plan(
    config: Path | None, overrides: tuple[str, ...], out: Path | None, no_trial: bool, as_json: bool
) -> None:
    """Say what `extract` would hold, cost and take, before anything is written."""
    from satdifuser.extract.plan import make_plan
    from satdifuser.extract.plan_text import describe_plan, format_plan
    from satdifuser.extract.trial import time_batches

    pipeline = _load(config, overrides)
    job = pipeline.job()
    planned = make_plan(job, out or pipeline.store_path)
    trial = None if no_trial or not planned.left else time_batches(planned)
    click.echo(json.dumps(describe_plan(planned, trial)) if as_json else format_plan(planned, trial))


@cli.command()
@pipeline_options
@click.option("--all", "show_all", is_flag=True, help="Also the layers that extract.layers leaves out.")
@json_option
def layers(config: Path | None, overrides: tuple[str, ...], show_all: bool, as_json: bool) -> None:
    """List the backbone's tapped layers: name, channels, stride, map size."""
    from satdifuser.extract.listing import describe_layers
    from satdifuser.extract.plan_text import format_layers

    pipeline = _load(config, overrides)
    table = describe_layers(pipeline.source, pipeline.backbone, pipeline.extract, show_all)
    if as_json:
        click.echo(json.dumps([layer.model_dump() for layer in table]))
        return
    click.echo("\n".join(format_layers(table)))


@cli.command()
@pipeline_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The store's folder, e.g. eurosat.zarr.")
@click.option("--add-timesteps", metavar="T,T", help="Let the complete store at -o grow by these timesteps.")
@click.option("--add-layers", metavar="NAMES", help="… by these layers: names or patterns, commas between.")
@click.option("--add-tiles", is_flag=True, help="… by the tiles that its source has by now.")
@click.option("--relabel", is_flag=True, help="Give it its source's labels, classes and partitions of now.")
@spread_options
@click.option("--shard", "part", metavar="I/N", help="Only part I of N, from 1: for job arrays.")
@overwrite_option
@space_option
def extract(
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    add_timesteps: str | None,
    add_layers: str | None,
    add_tiles: bool,
    relabel: bool,
    workers: int | None,
    scheduler: str | None,
    part: str | None,
    overwrite: bool,
    ignore_free_space: bool,
) -> None:
    """Write the features of a source's tiles to a store, or go on where an earlier run stopped.

    With --add-… and --relabel the settings are those that the store holds, unless -c names a file.
    --workers (which share GPUs or cores), --scheduler and --shard spread the work, with the same result: see
    docs/scale.md.
    """
    from satdifuser.extract.run import parse_part

    grows = bool(add_timesteps or add_layers or add_tiles or relabel)
    _check_spread(workers, scheduler, part, grows, overwrite)
    if grows:
        from satdifuser.extract.grow import Additions, grow
        from satdifuser.pipeline import load_stored

        if out is None:
            raise SettingsError("-o: missing; name the store that is to grow, e.g. -o eurosat.zarr")
        pipeline = _load(config, overrides) if config else load_stored(out, overrides)
        job = pipeline.job()
        steps = whole_numbers("--add-timesteps", add_timesteps) if add_timesteps else []
        additions = Additions(steps, add_layers.split(",") if add_layers else [], add_tiles, relabel)
        click.echo(grow(job, out, additions, overwrite, ignore_free_space))
        return
    pipeline = _load(config, overrides)
    job = pipeline.job()
    path = out or pipeline.store_path
    check_output(path.parent, "store.path (-o)")
    with _telling_what_is_kept(path):
        if workers or scheduler:
            from satdifuser.extract.cluster import extract_on_cluster
            from satdifuser.store.cluster import Cluster

            cluster = Cluster(workers or 0, scheduler or "")
            click.echo(extract_on_cluster(job, path, cluster, overwrite, ignore_free_space))
        else:
            from satdifuser.extract.run import extract as run_extraction

            chosen = parse_part(part) if part else None
            click.echo(run_extraction(job, path, overwrite, ignore_free_space, chosen))


def _check_spread(
    workers: int | None, scheduler: str | None, part: str | None, grows: bool, overwrite: bool
) -> None:
    """Refuse ways of spreading an extraction that exclude each other."""
    named = {"--workers": workers, "--scheduler": scheduler, "--shard": part}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)}: each is a way by itself; name one of them")
    if given and grows:
        raise SettingsError(f"{given[0]}: a store grows in one process; leave it out")
    if part and overwrite:
        raise SettingsError(
            "--shard: with --overwrite each part would delete what the others write; delete the store first"
        )


@cli.command()
@store_argument
@click.argument("labels", type=click.Path(path_type=Path))
@pipeline_options
def label(store: Location, labels: Path, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Give a store's tiles the labels of a file of polygons, points or pixels; features stay as they are."""
    from satdifuser.labels.relabel import label_store

    labelled, notes = label_store(store, labels, _load(config, overrides).label)
    for note in notes:
        click.echo(note, err=True)
    click.echo(labelled)


@cli.command()
@store_argument
@pipeline_options
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Train with the seeds 0 … N-1.")
@few_labels_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the runs.")
@overwrite_option
def fit(
    store: Location,
    config: Path | None,
    overrides: tuple[str, ...],
    seeds: int | None,
    labels: str | None,
    shots: str | None,
    draws: int | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Train networks on a store: every combination of the lists in the section `fit`, best on val first.

    `-c ablation` trains the paper's five rows. The test split stays unread until `evaluate` or `report`.
    Several GPUs: `torchrun --nproc-per-node 2 -m satdifuser fit …`.
    """
    from satdifuser.evaluate.results import format_table, results_table
    from satdifuser.fuse.processes import is_first, joined
    from satdifuser.stages import fit_all
    from satdifuser.store.reader import open_store

    numbered = list(range(seeds)) if seeds else None
    named = as_overrides("fit", seeds=numbered, labels=labels, shots=shots, draws=draws)
    pipeline = _load(config, (*overrides, *named))
    folder = out or pipeline.output / "runs"
    check_output(folder, "output (-o)")
    with joined():
        runs = fit_all(open_store(store), pipeline, folder, overwrite)
        if is_first():
            click.echo(format_table(results_table(runs, "val")))


@cli.command()
@store_argument
@pipeline_options
@few_labels_options
@click.option("--partition", metavar="NAME", help="Which partition of the store gives train, val and test.")
@click.option("--no-test", is_flag=True, help="Leave the test split unread; a later call can measure on it.")
@spread_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the probe.")
@overwrite_option
@json_option
def probe(
    store: Location,
    config: Path | None,
    overrides: tuple[str, ...],
    labels: str | None,
    shots: str | None,
    draws: int | None,
    partition: str | None,
    no_test: bool,
    workers: int | None,
    scheduler: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Sweep linear probes over timesteps and layers: which features tell most, and how few labels suffice.

    Everything is chosen on val; the test split is read for what was chosen only. The same command goes on
    where it was interrupted.
    """
    from satdifuser.evaluate.probe_folder import open_probe
    from satdifuser.evaluate.probe_sweep import probe_store
    from satdifuser.evaluate.probe_text import format_probe, summarise_probe
    from satdifuser.stages import command_line
    from satdifuser.store.cluster import Cluster
    from satdifuser.store.reader import open_store

    if workers and scheduler:
        raise SettingsError("--workers and --scheduler: each is a way by itself; name one of them")
    named = as_overrides("probe", labels=labels, shots=shots, draws=draws, partition=partition)
    pipeline = _load(config, (*overrides, *named))
    folder = out or pipeline.output / "probe"
    check_output(folder, "output (-o)")
    cluster = Cluster(workers or 0, scheduler or "", threads=1) if workers or scheduler else None
    settings = (pipeline.probe, pipeline.evaluate)
    table = probe_store(open_store(store), *settings, folder, command_line(), overwrite, not no_test, cluster)
    info = open_probe(folder)[1]
    click.echo(json.dumps(summarise_probe(table, info)) if as_json else format_probe(table, info))
    click.echo(f"written to {folder}", err=True)


@cli.command()
@click.argument("folders", metavar="RUN|PROBE…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A CSV file.  [default: stdout]")
@overwrite_option
def interchange(folders: tuple[Path, ...], out: Path | None, overwrite: bool) -> None:
    """Write test figures of runs and probes with the columns of torchgeo-bench's result files.

    Of a folder that holds several runs those that are best on val.
    """
    from satdifuser.evaluate.interchange import interchange_rows
    from satdifuser.store.files import write_durably

    if out is not None:
        check_absent(out, overwrite)
        check_output(out.parent, "-o")
    text = interchange_rows(folders).to_csv(index=False)
    if out is None:
        click.echo(text, nl=False)
        return
    write_durably(out, text.encode())
    click.echo(out)


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN... [STORE]", type=StorePlace())
@click.option("--compare", is_flag=True, help="Say how sure the difference between two runs is.")
@click.option("--across", is_flag=True, help="Sum models up over several data sets, as GEO-Bench does.")
@click.option("--reference", type=click.Path(path_type=Path), help="Labels to assess a map of the run by.")
@click.option("--map", "map_path", type=click.Path(path_type=Path), help="A map of `satdifuser predict`.")
@pipeline_options
@json_option
def evaluate(
    runs: tuple[Location, ...],
    compare: bool,
    across: bool,
    reference: Path | None,
    map_path: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure runs on the test split of their store, or of another one with the same features.

    Of a folder that holds several runs only those that are best on val are measured: of each fusion one set
    of settings with all its seeds, and the baselines.

    With --reference: the accuracy of a map of the run and the areas of its classes, from labels of a part of
    it. The map is the one at --map, or is made of the tiles of the store.
    """
    if reference or map_path:
        if compare or across:
            raise SettingsError("--reference: assesses one map; leave out --compare and --across")
        _assess(runs, reference, map_path, _load(config, overrides), as_json)
        return
    from satdifuser.evaluate.chosen import choose_runs, ensure_all_evaluated, split_store
    from satdifuser.evaluate.chosen import evaluate as measure
    from satdifuser.evaluate.evaluation import format_metrics
    from satdifuser.evaluate.results import format_table, results_table

    settings = _load(config, overrides).evaluate
    folders, store = split_store(runs)
    if compare:
        from satdifuser.evaluate.comparison import compare_runs, format_comparison

        found = compare_runs(folders, store, settings)
        click.echo(json.dumps(found) if as_json else format_comparison(found))
        return
    chosen = choose_runs(folders)
    if across:
        from satdifuser.evaluate.across import across_datasets, format_across

        ensure_all_evaluated(chosen, store, settings)
        table = across_datasets(chosen, settings)
        click.echo(table.to_json(orient="records") if as_json else format_across(table, settings.level))
        return
    measured = {str(folder): measure(folder, store, settings) for folder in chosen}
    if len(chosen) == 1:
        (metrics,) = measured.values()
        click.echo(json.dumps(metrics) if as_json else format_metrics(chosen[0], metrics))
    else:
        click.echo(json.dumps(measured) if as_json else format_table(results_table(chosen)))


def _assess(
    places: Sequence[Location],
    reference: Path | None,
    map_path: Path | None,
    pipeline: Pipeline,
    as_json: bool,
) -> None:
    """Print how good a map is."""
    from satdifuser.evaluate.maps.assess import assess_map, assess_store, format_assessment

    run_folder, store = Path(places[0]), places[1] if len(places) == 2 else None
    if reference is None:
        raise SettingsError("--reference: missing; name the labels to assess the map by")
    if len(places) > 2 or (map_path and store):
        raise SettingsError("--reference: takes one run, and either a store or a map (--map) of it")
    label, level = pipeline.label, pipeline.evaluate.level
    if map_path:
        found = assess_map(run_folder, map_path, reference, label, level)
    else:
        found = assess_store(run_folder, store, reference, label, level)
    for note in found["notes"]:
        click.echo(note, err=True)
    click.echo(json.dumps(found) if as_json else format_assessment(found))


@cli.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("place", metavar="SCENE|STORE", type=StorePlace())
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="NAME.tif; see below.")
@click.option("--probabilities", is_flag=True, help="Also the probability of each class.")
@click.option("--confidence", is_flag=True, help="Also how far the class is ahead of the next one.")
@click.option("--window", metavar="ROW,COL,HEIGHT,WIDTH", help="Only this part of the raster, in px.")
@click.option("--aoi", type=click.Path(path_type=Path), help="Only inside the polygons of this vector file.")
@click.option("--overlap", type=int, help="Pixels that neighbouring tiles share.  [default: 1/4 of a tile]")
@click.option(
    "--resample", metavar="METRES", help="Pixel size at which the scene is seen; auto: that of the fit."
)
@click.option(
    "--store", "keep", type=click.Path(path_type=Path), help="Keep the scene's features in this store."
)
@click.option("--tiles", default="*", show_default=True, help="Of a store: only tiles whose id matches this.")
@override_option
@overwrite_option
def predict(
    run_folder: Path,
    place: Location,
    out: Path,
    probabilities: bool,
    confidence: bool,
    window: str | None,
    aoi: Path | None,
    overlap: int | None,
    resample: str | None,
    keep: Path | None,
    tiles: str,
    overrides: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Map a scene, or the tiles of a store, with a fitted run.

    A run for segmentation writes a Cloud-Optimised GeoTIFF. One for classes of tiles writes a GeoTIFF with a
    pixel per tile, a GeoPackage (.gpkg) or a table (.csv, .parquet). A scene is seen with the settings of the
    run: --set source.bands=…, source.scale=…, source.nodata=… say what is different about it.
    """
    from satdifuser.evaluate.maps.pixel_maps import MapOptions
    from satdifuser.evaluate.maps.predict import Request, parse_window
    from satdifuser.stages import SceneRequest, run_prediction

    check_output(out.parent, "-o")
    part = parse_window(window) if window else None
    request = Request(out, MapOptions(confidence, probabilities), part, aoi, tiles, overwrite)
    how = SceneRequest(overlap, resample, keep, overrides)
    click.echo(run_prediction(run_folder, place, request, how))


@cli.command()
@click.argument("folders", metavar="RUN|PROBE…", nargs=-1, required=True, type=click.Path(path_type=Path))
@page_option("report.html")
@click.option("--split", type=click.Choice(["test", "val"]), default="test", show_default=True)
@click.option(
    "--store", "stores", multiple=True, type=StorePlace(), help="Where a moved store is; repeatable."
)
@click.option("--layers", metavar="NAMES", help="Layers to paint: names or patterns, commas between.")
def report(
    folders: tuple[Path, ...], out: Path, split: str, stores: tuple[Location, ...], layers: str | None
) -> None:
    """Write one self-contained HTML page about runs and probes: their folders, or folders that hold them.

    Of a folder that holds several runs those that are best on val are shown; what is not yet measured on
    the split is.
    """
    from satdifuser.evaluate.chosen import ensure_reported
    from satdifuser.evaluate.report.page import write_report
    from satdifuser.stages import command_line

    check_output(out.parent, "-o")
    ensure_reported(folders, split, stores)
    patterns = layers.split(",") if layers else []
    click.echo(write_report(folders, out, command_line(), stores, patterns))


@cli.command()
@click.argument("places", metavar="STORE|MAP|SCENE…", nargs=-1, required=True, type=StorePlace())
@page_option("view.html")
@click.option(
    "--run", "run_folder", type=click.Path(path_type=Path), help="Also what this run predicts of stores."
)
@click.option("--timestep", type=int, help="Of the features that are shown.  [default: the middle one]")
@click.option("--layers", metavar="NAMES", help="Layers to show: names or patterns, commas between.")
@click.option("--bands", metavar="R,G,B", help="Of a scene: band numbers from 1, or descriptions.")
@click.option(
    "--size", type=click.IntRange(64, 8192), default=1200, show_default=True, help="Largest side, px."
)
def view(
    places: tuple[Location, ...],
    out: Path,
    run_folder: Path | None,
    timestep: int | None,
    layers: str | None,
    bands: str | None,
    size: int,
) -> None:
    """Write one self-contained HTML page: scene, features, labels and predictions as layers with a slider.

    Several stores, maps and scenes are laid on the ground of the first.
    """
    from satdifuser.evaluate.view.layers import Choice
    from satdifuser.evaluate.view.page import ViewRequest, write_view
    from satdifuser.evaluate.view.rasters import parse_bands
    from satdifuser.fuse.predictor import Predictor
    from satdifuser.fuse.run_folder import open_run
    from satdifuser.stages import command_line

    check_output(out.parent, "-o")
    choice = Choice(timestep, layers.split(",") if layers else [])
    request = ViewRequest(choice, parse_bands(bands) if bands else None, size, command_line())
    predictor = Predictor(open_run(run_folder)) if run_folder else None
    click.echo(write_view(places, out, request, predictor))


@cli.command("import-reference")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("store", required=False, type=StorePlace())
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The run's folder.")
@overwrite_option
def import_reference(checkpoint: Path, store: Location | None, out: Path, overwrite: bool) -> None:
    """Turn a checkpoint of the authors' training script into a run.

    With a STORE all is checked at once; without, at the first `evaluate` of the run on one.
    """
    from satdifuser.fuse.reference import import_reference as import_run
    from satdifuser.store.reader import open_store

    run = import_run(checkpoint, out, open_store(store) if store else None, overwrite)
    for note in run.info["reference"]["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(run.path)


def main() -> None:
    """Entry point of the console script."""
    cli.main(prog_name="satdifuser")

"""The extraction run: every tile of a source through the backbone once, into a feature store.

Shards are the unit of work and of restart. Four things run side by side, each in its own order: the reading
of the next tiles, the backbone on a batch (on a CPU on two), the fetching of the batch before, the writing of
the shard before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from satdifuser.errors import SettingsError, SourceError
from satdifuser.extract.backbone import LoadedModel
from satdifuser.extract.background import Background
from satdifuser.extract.changes import refuse_changed
from satdifuser.extract.compute import Shard, Work, background_of, compute_shard, write_shard
from satdifuser.extract.cost import ShardCost
from satdifuser.extract.job import Job, new_attributes
from satdifuser.extract.loading import load_work
from satdifuser.extract.plan import Plan, make_plan, require_space
from satdifuser.extract.read_tile import read_row
from satdifuser.extract.readers import Readers, started_readers
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.files import discard
from satdifuser.store.opening import create_unless_there, open_or_create, open_part
from satdifuser.store.reader import FeatureStore, is_store
from satdifuser.store.schema import Attributes
from satdifuser.store.writer import StoreWriter

SHOWN_SKIPPED = 10


@dataclass(frozen=True)
class Part:
    """The shards that one of several processes extracts, each without knowing of the others."""

    number: int  # from 1
    of: int

    def shards(self, missing: Sequence[int]) -> list[int]:
        """Those of some shards that are this part's."""
        return [shard for shard in missing if shard % self.of == self.number - 1]

    def tell(self, missing: Sequence[int]) -> None:
        """Say on stderr which parts the store still lacks."""
        lacking = sorted({shard % self.of + 1 for shard in missing})
        parts = f"part{'s' if len(lacking) > 1 else ''} {', '.join(map(str, lacking))}"
        rest = f"the store lacks shards of {parts}" if lacking else "and all others"
        print(f"part {self.number} of {self.of} is done; {rest}", file=sys.stderr)


def parse_part(text: str) -> Part:
    """Read ``3/8``.

    Raises:
        SettingsError: it is of another form.
    """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise SettingsError(f"--shard: got {text!r}, expected part I of N from 1/N to N/N, e.g. 1/8")
    return Part(int(number), int(of))


def extract(
    job: Job, out: Path, overwrite: bool = False, ignore_free_space: bool = False, part: Part | None = None
) -> FeatureStore:
    """Write the features of all of a source's tiles to a store, or go on where an earlier run stopped.

    What people should know besides goes to stderr: a scale that looks wrong, and the tiles that were skipped.

    Args:
        job: The settings of source, backbone, extraction and store.
        out: The store's folder.
        overwrite: Replace a store that is there.
        ignore_free_space: Start even if the disk looks too small.
        part: Extract these shards only, while other processes extract the others.

    Returns:
        The store: complete, or with a part at least with its shards.

    Raises:
        StoreError: the store at `out` was made with other settings, or of images that are others now; or the
            disk cannot hold it; or another process is writing to it.
        SourceError: every tile was skipped; no store is left.
        SatDiFuserError: bad settings or input; whatever was committed stays.
    """
    plan = make_plan(job, out, overwrite)
    if not ignore_free_space:
        require_space(plan)
    with started_readers(plan) as readers:  # which start while the backbone is loaded
        work = load_work(plan)
        attributes = planned_attributes(plan, work.job, work.extractor.backbone.loaded, overwrite)
        if part:
            create_unless_there(out, attributes)
            if FeatureStore(out).attributes.planned != attributes.planned:  # begun with another `auto`
                plan = make_plan(job, out)
                work = load_work(plan)
                attributes = planned_attributes(plan, work.job, work.extractor.backbone.loaded)
        with open_part(out, attributes) if part else open_or_create(out, attributes, overwrite) as writer:
            refuse_changed(
                FeatureStore(out),
                plan.records,
                lambda record: read_row(plan.preparation, plan.source, record)[0],
            )
            missing = writer.missing_shards()
            wanted = part.shards(missing) if part else missing
            _fill(work, plan.source, plan.records, writer, wanted, readers)
            store = FeatureStore(out)
            if part:
                part.tell(store.missing_shards())
            if not store.missing_shards():
                report_skipped(store)
    return store


def planned_attributes(plan: Plan, job: Job, loaded: LoadedModel, overwrite: bool = False) -> Attributes:
    """What the store of a plan declares about itself; `job` is its job with the batch size known."""
    attributes = new_attributes(
        job, plan.source, plan.records, plan.info, loaded, plan.image_size, plan.layers
    )
    if overwrite or not is_store(plan.out):
        return attributes
    return keep_labels(attributes, FeatureStore(plan.out).attributes)


def _fill(
    work: Work,
    source: Source,
    records: Sequence[TileRecord],
    writer: StoreWriter,
    missing: Sequence[int],
    readers: Readers | None,
) -> None:
    """Compute some shards; each is written while the next ones are computed."""
    tell_what_is_there(writer)
    ranges = {shard: writer.attributes.shard_range(shard) for shard in missing}
    todo = [record for start, stop in ranges.values() for record in records[start:stop]]
    values, warning = ValueRange(work.job.images), ""
    with (
        tqdm(
            total=len(records), initial=len(records) - len(todo), unit="tile", desc="extract", disable=None
        ) as bar,
        Background("write", waiting=1) as writing,  # a shard may be one batch: the device needs its next one
        background_of(work) as background,  # is stopped before that: what is computed is still committed
        closing(read_ahead(work.job, source, work.image_size, todo, readers)) as tiles,
    ):
        cost = ShardCost(work)
        for shard, (start, stop) in ranges.items():
            computed = compute_shard(work, tiles, stop - start, values, background, writing.check)
            if not warning and (warning := values.warning()):
                tqdm.write(warning, file=sys.stderr)
            writing.hand(partial(_write, writer, bar, shard, computed, cost.note))
    if missing:
        ask_for_labels(writer.attributes, len(todo))


def tell_what_is_there(writer: StoreWriter) -> None:
    """Say on stderr that a store is gone on with."""
    shards = writer.attributes.shards
    if there := shards - len(writer.missing_shards()):
        print(f"going on: {there} of {shards} shards are there", file=sys.stderr)


def ask_for_labels(attributes: Attributes, tiles: int) -> None:
    """Say on stderr that new tiles of a store with labels of its own have none."""
    if labelled := attributes.labelled:
        print(
            f"{tiles} tiles that were extracted now have no label; give the store its labels again: "
            f"`satdifuser label STORE {labelled['file']}`",
            file=sys.stderr,
        )


def keep_labels(asked: Attributes, held: Attributes) -> Attributes:
    """What an extraction asks of a store that was labelled since: the same, but for the labels."""
    if not held.labelled:
        return asked
    names = ("task", "classes", "ignore_value", "partition", "partitions", "labelled")
    planned = asked.planned.model_copy(update={"labels": held.planned.labels})
    return asked.model_copy(update={name: getattr(held, name) for name in names} | {"planned": planned})


def _write(
    writer: StoreWriter,
    bar: tqdm[NoReturn],
    shard: int,
    computed: Shard,
    note: Callable[[], Mapping[str, Any]],
) -> None:
    written = write_shard(writer, shard, computed, note)
    bar.set_postfix_str(f"{written / 1e6:.1f} MB a shard")
    bar.update(len(computed.rows))


def report_skipped(store: FeatureStore) -> None:
    """List the skipped tiles on stderr; a store that holds no others is deleted and refused."""
    tiles = store.tiles
    skipped = tiles[tiles.skip_reason != ""]
    if not len(skipped):
        return
    lines = [f"  {name}: {why}" for name, why in zip(skipped.tile_id, skipped.skip_reason, strict=True)]
    if len(skipped) == len(tiles):
        discard(store.folder)
        raise SourceError(
            f"all {len(tiles)} tiles were skipped, so there is nothing to extract and no store was kept; the "
            f"first:\n{lines[0]}\nmend the images or the source's settings, seen by `satdifuser tiles`"
        )
    shown = "\n".join(lines[:SHOWN_SKIPPED] + ["  …"] * (len(lines) > SHOWN_SKIPPED))
    print(
        f"{len(skipped)} of {len(tiles)} tiles were skipped:\n{shown}\n"
        f"`satdifuser store info {store.path}` lists all",
        file=sys.stderr,
    )

"""How long a planned extraction will take, from a few batches of its own tiles on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from satdifuser.extract.compute import Work, background_of, compute_shard
from satdifuser.extract.loading import load_work
from satdifuser.extract.plan import Plan
from satdifuser.extract.readers import Readers, started_readers
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange

TIMED_BATCHES = 4
LONGEST_SECONDS = 20.0  # of the timed batches together, but for those that are computed at once first


@dataclass(frozen=True)
class Trial:
    """Some tiles read, sent through the backbone and encoded; writing runs beside that, and is left out."""

    tiles: int
    seconds: float

    @property
    def tiles_per_second(self) -> float:
        """The rate."""
        return self.tiles / self.seconds

    def seconds_for(self, tiles: int) -> float:
        """Time that so many tiles will take."""
        return tiles / self.tiles_per_second


def time_batches(plan: Plan) -> Trial:
    """Time batches from all over the tiles that are still to be extracted, after one that warms up.

    A scale that looks wrong is warned of on stderr.

    Args:
        plan: A plan with tiles left to extract.

    Raises:
        SatDiFuserError: what would have ended the extraction too.
    """
    values = ValueRange(plan.job.images)
    with started_readers(plan) as readers:
        work = load_work(plan)
        batch = work.batch_size
        batches = [plan.left[start : start + batch] for start in range(0, len(plan.left), batch)]
        chosen = batches[:: max(1, len(batches) // (TIMED_BATCHES + 1))][: TIMED_BATCHES + 1]
        warming = _seconds(work, plan.source, chosen[0], values, readers)
        timed = [record for records in _timed(chosen, warming, work.job.lanes) for record in records]
        trial = Trial(len(timed), _seconds(work, plan.source, timed, values, readers))
    if warning := values.warning():
        print(warning, file=sys.stderr)
    return trial


def _timed(
    chosen: Sequence[Sequence[TileRecord]], warming: float, at_once: int
) -> Sequence[Sequence[TileRecord]]:
    """Those of some batches that are worth their time: a multiple of how many are computed at once."""
    cold = chosen[1:] if len(chosen) > at_once else chosen  # the first one warmed up
    affordable = at_once * max(1, int(LONGEST_SECONDS / warming))
    count = min(len(cold), affordable)
    return cold[: count - count % at_once or count]


def _seconds(
    work: Work,
    source: Source,
    records: Sequence[TileRecord],
    values: ValueRange,
    readers: Readers | None,
) -> float:
    began = time.perf_counter()
    with (
        background_of(work) as background,
        closing(read_ahead(work.job, source, work.image_size, records, readers)) as tiles,
    ):
        compute_shard(work, tiles, len(records), values, background, background.check)
    return time.perf_counter() - began

"""How the networks of a sweep stand on val, while they train and after. Test has no part in it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from satdifuser.errors import RunError
from satdifuser.fuse.grid import Candidate
from satdifuser.fuse.run_folder import RUN_FILE, Run, open_run
from satdifuser.fuse.run_network import settings_of
from satdifuser.fuse.train import MAIN_METRIC, Training
from satdifuser.store.files import write_durably
from satdifuser.store.reader import FeatureStore

Row = dict[str, Any]
BOARD_FILE = "leaderboard.csv"


def standings(
    candidates: Sequence[Candidate], done: Mapping[str, Run], at_work: Sequence[Training]
) -> list[Row]:
    """One row for each candidate that was trained an epoch or more, best on val first.

    Args:
        candidates: All of the sweep.
        done: Finished runs by name.
        at_work: Trainings that are not finished, or just.

    Returns:
        Columns run, fusion, head, lr, timesteps, layers, labels, draw, seed, metric, val, best_epoch,
        epochs, seconds, done.
    """
    tasks = {run.info["task"] for run in done.values()} | {str(t.store.attributes.task) for t in at_work}
    progress = {name: (run.info, True) for name, run in done.items()}
    progress |= {t.candidate.name: (t.progress(), t.is_over) for t in at_work if t.history}
    rows = [
        standing(one, *progress[one.name], metric=MAIN_METRIC[next(iter(tasks))])
        for one in candidates
        if one.name in progress
    ]
    return sorted(rows, key=lambda row: -row["val"])


def finished_before(
    folder: Path, store: FeatureStore, candidates: Sequence[Candidate]
) -> list[tuple[Candidate, Run]]:
    """Networks in a folder that were fitted to the same store and partition by earlier commands.

    What cannot be read, or is of a newer software, is left out: it is no matter of this sweep.

    Args:
        folder: Holds the runs' folders.
        store: The store.
        candidates: Those of this command, which are left out.
    """
    names, wanted = {one.name for one in candidates}, store.hashes().model_dump()
    partition = store.choose_partition(candidates[0].settings.partition)
    found = []
    for file in sorted(folder.glob(f"*/{RUN_FILE}")):
        if file.parent.name in names:
            continue
        with suppress(RunError, LookupError, TypeError, ValueError):
            run = open_run(file.parent)
            info = run.info
            if info["kind"] == "fusion" and info["store"]["hashes"] == wanted and run.partition == partition:
                candidate = Candidate(file.parent.name, info["fusion"], info["seed"], settings_of(run))
                standing(candidate, info, True, MAIN_METRIC[info["task"]])
                found.append((candidate, run))
    return found


def standing(candidate: Candidate, progress: Mapping[str, Any], done: bool, metric: str) -> Row:
    """The row of one candidate."""
    settings, best, history = candidate.settings, progress["best_epoch"], progress["history"]
    timesteps = settings.timesteps
    return {
        "run": candidate.name,
        "fusion": candidate.fusion,
        "head": settings.head,
        "lr": settings.lr,
        "timesteps": timesteps if timesteps == "all" else " ".join(map(str, timesteps)),
        "layers": " ".join(settings.layers),
        "labels": str(settings.budget),
        "draw": settings.draw,
        "seed": candidate.seed,
        "metric": metric,
        "val": history[best - 1]["val"][metric],
        "best_epoch": best,
        "epochs": len(history),
        "seconds": progress["seconds"],
        "done": done,
    }


def describe_first(rows: Sequence[Row]) -> str:
    """The leader in a few words."""
    first = rows[0]
    return f"best on val: {first['run']} {first['metric']} {first['val']:.3f}"


def write_board(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.getvalue().encode())

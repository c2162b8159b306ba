"""A probe on disk: the folder that `satdifuser probe` writes, and goes on with after an interruption.

probe.parquet, probe.csv   the table, one row for each metric of each probe; see `COLUMNS`
probe.json                 settings, hashes of the store, command, test reads, fits that did not converge
cells.jsonl                what was done so far, a line for each cell; read by the same command again
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from satdifuser.errors import RunError
from satdifuser.store.files import write_durably
from satdifuser.store.schema import differing_fields

PROBE_FILE, TABLE_FILE, CSV_FILE, JOURNAL_FILE = "probe.json", "probe.parquet", "probe.csv", "cells.jsonl"
COLUMNS = ["dataset", "partition", "labels", "draw", "n_train", "n_val", "n_test", "inputs", "timestep"]
COLUMNS += ["layer", "stride", "probe", "strength", "metric", "split", "value", "low", "high", "seed"]
COLUMNS += ["seconds", "gradient_norm", "converged", "chosen"]
WHOLE = ["draw", "n_train", "n_val", "n_test", "seed"]
SOMETIMES = ["timestep", "stride"]  # NaN where all are joined
Record = dict[str, Any]


class Journal:
    """What a sweep has done, in a file that grows by whole lines and survives a kill.

    Args:
        folder: Of the probe.
        identity: What all lines have in common: settings and hashes of the store.
        overwrite: Begin anew; only the count of test reads is kept.

    Raises:
        RunError: the folder holds another probe, or the file is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
        self.path = folder / JOURNAL_FILE
        self.cells: dict[str, list[Record]] = {}
        self.choices: dict[str, Record] = {}
        self.test_reads = 0
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._lines(overwrite)
        if overwrite:
            self.test_reads = sum("test_read" in line or line.get("test_reads", 0) for line in lines)
            self.path.unlink(missing_ok=True)
        if overwrite or not lines:
            self._append({"identity": identity, "test_reads": self.test_reads})
            return
        self._check(folder, lines[0].get("identity", {}), identity)
        self._take_in(lines)

    def _lines(self, overwrite: bool) -> list[Record]:
        """All whole lines; what a kill left of the last one is cut off."""
        if not self.path.is_file():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        try:
            return [dict(json.loads(line)) for line in whole.splitlines()]
        except (TypeError, ValueError) as error:
            if overwrite:
                return []
            raise RunError(
                f"{self.path}: is damaged: {error}; write to another folder, or probe anew with --overwrite"
            ) from error

    def _check(self, folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        fields = differing_fields(json.loads(json.dumps(ours)), theirs, "it has")
        if fields:
            raise RunError(
                f"{folder}: holds a probe with other settings or of another store:\n  "
                + "\n  ".join(fields)
                + "\nwrite to another folder, or replace it with --overwrite"
            )

    def _take_in(self, lines: list[Record]) -> None:
        for line in lines:
            if "cell" in line:
                self.cells[line["cell"]] = line["rows"]
            elif "choice" in line:
                self.choices[line["choice"]] = line["measured"]
        self.test_reads = sum("test_read" in line or line.get("test_reads", 0) for line in lines)

    def add_cell(self, cell: str, rows: list[Record]) -> None:
        """Keep the rows of a cell."""
        self._append({"cell": cell, "rows": rows})
        self.cells[cell] = rows

    def count_test_read(self, choice: str) -> None:
        """Note that the test split is about to be read."""
        self._append({"test_read": choice})
        self.test_reads += 1

    def add_choice(self, choice: str, measured: Record) -> None:
        """Keep what was measured of a choice on test."""
        self._append({"choice": choice, "measured": measured})
        self.choices[choice] = measured

    def _append(self, record: Record) -> None:
        with self.path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def write_probe(folder: Path, table: pd.DataFrame, info: Mapping[str, Any]) -> None:
    """Write a probe's table and what it was made of, probe.json last."""
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    write_durably(folder / TABLE_FILE, buffer.getvalue())
    text = table.astype(dict.fromkeys(SOMETIMES, "Int64")).to_csv(index=False)  # 21, not 21.0
    write_durably(folder / CSV_FILE, text.encode())
    write_durably(folder / PROBE_FILE, (json.dumps(info, indent=1) + "\n").encode())


def open_probe(folder: Path) -> tuple[pd.DataFrame, Record]:
    """A probe's table, and what probe.json holds.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        return pd.read_parquet(folder / TABLE_FILE), dict(json.loads((folder / PROBE_FILE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise RunError(f"{folder}: no readable probe: {error}; run `satdifuser probe` again") from error


def as_table(rows: list[Record]) -> pd.DataFrame:
    """Rows as a table with the columns of a probe."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    kinds = dict.fromkeys(WHOLE, "int64") | dict.fromkeys(SOMETIMES, "float64") | {"layer": "object"}
    return table.astype(kinds)

"""What a sweep chose, in a few lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from satdifuser.evaluate.results import lay_out, score, span

GROUP = ["labels", "inputs", "probe"]


def summarise_probe(table: pd.DataFrame, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each amount of labels, kind of inputs and probe: what was chosen on val, and means over the draws.

    Args:
        table: A probe's table.
        info: Its probe.json.
    """
    chosen = table[(table["chosen"]) & (table["metric"] == info["metric"])]
    found = []
    for (labels, inputs, probe), rows in chosen.groupby(GROUP, sort=False):
        val, test = rows[rows["split"] == "val"], rows[rows["split"] == "test"]
        found.append({
            "labels": labels,
            "inputs": inputs,
            "probe": probe,
            "chosen": most_frequent([inputs_of(row) for row in val.to_dict("records")]),
            "strength": most_frequent([f"{strength:g}" for strength in val["strength"]]),
            "draws": len(val),
            "val": float(val["value"].mean()),
            "test": float(test["value"].mean()),
            "spread": float(test["value"].std()) if len(test) > 1 else math.nan,
            "low": float(test["low"].mean()),
            "high": float(test["high"].mean()),
        })  # fmt: skip
    return found


def most_frequent(words: list[str]) -> str:
    """The word of all draws, or of most."""
    first = max(words, key=words.count)
    return first if words.count(first) == len(words) else f"{first} (in {words.count(first)} of {len(words)})"


def inputs_of(row: Mapping[str, Any]) -> str:
    """The timestep and layer of a row in short words."""
    timestep = "all" if pd.isna(row["timestep"]) else f"{row['timestep']:g}"
    return f"t = {timestep}, {'all layers' if pd.isna(row['layer']) else row['layer']}"


def format_probe(table: pd.DataFrame, info: Mapping[str, Any]) -> str:
    """The summary as text, with a word on what the figures are."""
    metric = info["metric"]
    rows = [
        {
            "labels": row["labels"],
            "inputs": row["inputs"],
            "probe": row["probe"],
            f"val {metric}": score(row["val"]),
            f"test {metric}": score(row["test"])
            + ("" if math.isnan(row["spread"]) else f" ± {row['spread']:.3f}"),
            "interval": span(row["low"], row["high"]),
            "chosen on val": f"{row['chosen']}, strength {row['strength']}",
        }
        for row in summarise_probe(table, info)
    ]
    heading, *lines = lay_out(rows)
    told = [f"Test was read {info['test_reads']} times, each time for one row that val had chosen."]
    told += [f"{info['convergence_failures']} fits did not converge; probe.json names them."] * bool(
        info["convergence_failures"]
    )
    return "\n".join([heading, "-" * len(heading), *lines, *told])

"""The networks of a sweep: every combination of the settings' lists, each with the name of its folder."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from satdifuser.fuse.inputs import Inputs, choose_inputs
from satdifuser.fuse.settings import (
    FitSettings,
    FusionName,
    SweepSettings,
    TrainingSettings,
    are_lists,
    are_values,
)
from satdifuser.store.few_labels import ALL_LABELS, Budget, parse_budgets
from satdifuser.store.reader import FeatureStore

LONGEST = 40  # characters of a list in a folder's name


@dataclass(frozen=True)
class Candidate:
    """One network that is to be trained; `name` becomes its folder."""

    name: str
    fusion: FusionName
    seed: int
    settings: FitSettings


def expand(settings: SweepSettings, store: FeatureStore) -> list[Candidate]:
    """The candidates of a sweep, in the order of its lists; what differs in nothing counts once.

    A name tells the fusion, every setting of which the sweep has several values, the draw where there are
    several, and the seed. `single` becomes a candidate for each timestep and kind of layer, as in the paper.

    Raises:
        SettingsError: the store does not hold a timestep, or no layer matches a pattern.
    """
    lists: dict[str, Sequence[Any]] = {
        "head": _several(settings.head, are_values),
        "lr": _several(settings.lr, are_values),
        "layers": _several(settings.layers, are_lists),
        "timesteps": _several(settings.timesteps, are_lists),
        "budget": parse_budgets(settings.labels, settings.shots),
    }
    varied = [name for name, values in lists.items() if len(values) > 1]
    shared = {name: getattr(settings, name) for name in TrainingSettings.model_fields}
    found: dict[str, Candidate] = {}
    for fusion, *values, budget in itertools.product(settings.fusion, *lists.values()):
        asked = dict(zip(lists, values, strict=False)) | few_labels(budget)
        for one, told in variants(fusion, FitSettings(**shared, **asked), varied, store):
            for draw, seed in itertools.product(draws_of(budget, settings), settings.seeds):
                drawn = [f"draw{draw}"] if len(draws_of(budget, settings)) > 1 else []
                name = "-".join([fusion, *told, *drawn, f"seed{seed}"])
                found.setdefault(name, Candidate(name, fusion, seed, one.model_copy(update={"draw": draw})))
    return list(found.values())


def _several(value: Any, are_several: Callable[[Any], bool]) -> list[Any]:
    """Several values as they are, one in a list."""
    return list(value) if are_several(value) else [value]


def few_labels(budget: Budget) -> dict[str, str]:
    """The settings of one budget."""
    if budget == ALL_LABELS:
        return {}
    return {"shots": str(budget.shots)} if budget.shots else {"labels": str(budget)}


def draws_of(budget: Budget, settings: SweepSettings) -> range:
    """The draws of a budget: one where they are all the same."""
    return range(settings.draws if budget.is_drawn else 1)


def variants(
    fusion: FusionName, settings: FitSettings, varied: Sequence[str], store: FeatureStore
) -> Iterator[tuple[FitSettings, list[str]]]:
    """The settings that a fusion is trained with, and the parts of the name that tell them apart."""
    inputs = choose_inputs(store, settings)
    if fusion != "single":
        yield settings, [describe(name, getattr(settings, name)) for name in varied]
        return
    told = [describe(name, getattr(settings, name)) for name in varied if name not in ("layers", "timesteps")]
    for timestep, kind in itertools.product(inputs.timesteps, kinds(inputs)):
        layers = [layer.name for layer in inputs.layers if kind_of(layer.name) == kind]
        one = settings.model_copy(update={"timesteps": [timestep], "layers": layers})
        yield one, [f"t{timestep}", kind, *told]


def kinds(inputs: Inputs) -> list[str]:
    """The kinds of layer: attn1, conv2."""
    return list(dict.fromkeys(kind_of(layer.name) for layer in inputs.layers))


def kind_of(layer: str) -> str:
    """The last part of a module path."""
    return layer.rsplit(".", 1)[-1]


def describe(name: str, value: Any) -> str:
    """A setting as part of a folder's name."""
    if name == "budget":
        return str(value).replace("%", "pct").replace(" ", "")
    if name == "timesteps":
        return f"t{value}" if value == "all" else "t" + "_".join(map(str, value))
    if name != "layers":
        return f"{'' if name == 'head' else name}{value}"
    text = "+".join(value)
    plain = re.sub(r"[^A-Za-z0-9._+]", "_", text)[:LONGEST]
    return plain if plain == text else f"{plain}~{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def sweep_section(candidate: Candidate) -> dict[str, Any]:
    """The section `fit` of a pipeline file that trains this candidate alone."""
    own = candidate.settings.model_dump(mode="json", exclude={"draw"})
    return {
        "fusion": [candidate.fusion],
        "seeds": [candidate.seed],
        "draws": candidate.settings.draw + 1,
    } | own

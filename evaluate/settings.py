"""Settings of evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from satdifuser.store.settings import Settings


class EvaluateSettings(Settings):
    """What is measured, on which split, with which certainty."""

    split: Literal["train", "val", "test"] = "test"
    metrics: Literal["ours", "reference"] = "ours"
    bootstrap: PositiveInt = 1000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: NonNegativeInt = 0
    baselines: bool = True
    pictures: PositiveInt = 12

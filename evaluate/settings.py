"""Settings of evaluation and of probes. Every field is explained in pipeline.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from satdifuser.store.few_labels import parse_budgets
from satdifuser.store.settings import Settings

ProbeKind = Literal["logistic", "ridge", "neighbours"]
InputKind = Literal["single", "timestep", "layer", "all"]


class EvaluateSettings(Settings):
    """What is measured, on which split, with which certainty."""

    split: Literal["train", "val", "test"] = "test"
    metrics: Literal["ours", "reference"] = "ours"
    bootstrap: PositiveInt = 1000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: NonNegativeInt = 0
    baselines: bool = True
    pictures: PositiveInt = 12


class ProbeSettings(Settings):
    """Which probes learn from which features, and from how many labels."""

    partition: str = "auto"
    inputs: list[InputKind] = Field(default=["single", "timestep", "layer", "all"], min_length=1)
    probes: list[ProbeKind] | Literal["auto"] = "auto"
    logistic: list[PositiveFloat] = Field(
        default=[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0], min_length=1
    )
    ridge: list[PositiveFloat] = Field(
        default=[30000.0, 10000.0, 3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0, 1.0, 0.1], min_length=1
    )
    neighbours: list[PositiveInt] = Field(default=[1, 3, 5, 10, 20, 50], min_length=1)
    labels: str = ""
    shots: str = ""
    draws: PositiveInt = 5
    seed: NonNegativeInt = 0
    pixels: PositiveInt | Literal["auto"] = "auto"
    tolerance: PositiveFloat = 1e-6
    device: str = "auto"

    @field_validator("labels", "shots", mode="before")
    @classmethod
    def as_text(cls, value: Any) -> str:
        """One number alone is read as such by YAML."""
        return str(value)

    @field_validator("labels")
    @classmethod
    def check_labels(cls, labels: str) -> str:
        parse_budgets(labels)
        return labels

    @field_validator("shots")
    @classmethod
    def check_shots(cls, shots: str) -> str:
        parse_budgets(shots=shots)
        return shots

"""Rebuilds the recorded cases of C, DiffusionSat's U-Net and its metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from parity_case import Case, Pairs, UnknownCaseError
from torch import Tensor, nn

from satdifuser.extract.backbone import load_unet
from satdifuser.extract.metadata import FIELDS, ORIGINS, Metadata, normalise
from satdifuser.extract.unet import Conditions


def run_unet(case: Case) -> Pairs:
    """Forwards of the U-Net with and without metadata, and its embeddings."""
    for described in case.info["cases"]:
        tag, weights = described["tag"], described["weights"].split()[0]
        folder = next(f for f in (case.root / weights, case.path.parent / weights) if f.is_dir())
        given = {k.split("/in/")[1]: case.tensor(k) for k in case.arrays if k.startswith(f"{tag}/in/")}
        unet = load_unet(folder, metadata="metadata" in given)
        conditions = Conditions(given["encoder_hidden_states"], given.get("metadata"))
        with torch.no_grad(), outputs_watched(unet) as watched:
            yield (
                f"{tag}/out/sample",
                unet(given["sample"], given["timestep"], **conditions.keywords()).sample,
            )
        yield from ((key, x) for name, x in watched if (key := f"{tag}/mid/{name}") in case.arrays)


@contextmanager
def outputs_watched(unet: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect the outputs of the embeddings by the names under which the reference recorded them."""
    seen: list[tuple[str, Tensor]] = []

    def keep(name: str, second: str = "") -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            again = second and any(name == earlier for earlier, _ in seen)
            seen.append((second if again else name, output.flatten(0, -2)))

        return hook

    named = [(unet.time_proj, keep("time_proj", "time_proj_of_metadata"))]
    named += [(unet.time_embedding, keep("time_embedding"))]
    embeddings = getattr(unet, "metadata_embedding", [])
    named += [(module, keep(f"metadata_embedding/{i}")) for i, module in enumerate(embeddings)]
    hooks = [module.register_forward_hook(hook) for module, hook in named]
    yield seen
    for hook in hooks:
        hook.remove()


def run_metadata(case: Case) -> Pairs:
    """The scaling of the seven metadata fields; the recorded inputs already start at 0."""
    if tuple(case.info["fields_in_order"]) != FIELDS:
        raise UnknownCaseError(f"fields {case.info['fields_in_order']}")
    for name, recorded in case.info["cases"].items():
        absolute = [float(v) + origin for v, origin in zip(recorded["in"], ORIGINS, strict=True)]
        dropped = {i for i, v in enumerate(recorded["in"]) if v == 0}
        values = [None if i in dropped else value for i, value in enumerate(absolute)]
        case.arrays[name] = np.array(recorded["normalised_float32"], np.float32)
        if absolute[4] <= 2100:  # one recorded case passes a year that was not made relative first
            yield name, normalise(Metadata(*values))

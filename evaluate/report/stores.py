"""The feature stores behind runs and probes, where they can still be read.

A record of a run says where its store was. A store named by the user comes first, if its features are the
same. What cannot be opened is an error that tells why; the page then says so in the place of the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import SatDiFuserError, StoreError
from satdifuser.store.energy import cost_text, total_cost
from satdifuser.store.location import Location
from satdifuser.store.reader import FeatureStore, Indices, open_store


class Stores:
    """Opens stores once, and remembers why one could not be opened.

    Args:
        given: Where stores are now, if not where the records say.

    Raises:
        StoreError: one of the given stores cannot be opened.
    """

    def __init__(self, given: Sequence[Location] = ()) -> None:
        self._given = {store.attributes.planned.feature: store for store in map(open_store, given)}
        self._seen: dict[str, FeatureStore | SatDiFuserError] = {}

    def of(self, record: Mapping[str, Any]) -> FeatureStore:
        """The store of a record: its path and hashes, as run.json and probe.json hold them.

        Raises:
            SatDiFuserError: it cannot be read, or now holds other features.
        """
        feature, path = record["hashes"]["feature"], str(record["path"])
        if feature in self._given:
            return self._given[feature]
        if path not in self._seen:
            self._seen[path] = _opened(path)
        found = self._seen[path]
        if isinstance(found, SatDiFuserError):
            raise found
        if found.attributes.planned.feature != feature:
            raise StoreError(f"{path}: holds other features by now; name the right store with --store")
        return found


def _opened(path: str) -> FeatureStore | SatDiFuserError:
    try:
        store = open_store(path)
        store.require_complete()
    except SatDiFuserError as error:
        return StoreError(f"{error}; if it was moved, name where it is with --store")
    return store


def preview(store: FeatureStore, row: int) -> NDArray[np.uint8]:
    """The (H, W, 3) uint8 picture of a tile."""
    picture: NDArray[np.uint8] = store.previews(np.array([row]))[0]
    return picture


def sample_rows(store: FeatureStore, partition: str, count: int) -> Indices:
    """Rows of some tiles of val, of all classes in turn; the test split stays unread."""
    rows = store.select("val", partition)
    if store.attributes.task == "classification":
        rows = rows[np.argsort(np.asarray(store.targets(rows)), kind="stable")]
    chosen: Indices = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.intp)]
    return chosen


def facts(store: FeatureStore, partition: str) -> dict[str, str]:
    """What a store holds and how it was made, in words."""
    a = store.attributes
    extraction, source = a.settings.get("extract", {}), a.settings.get("source", {})
    strides = ", ".join(map(str, sorted({layer.stride for layer in a.layers})))
    return {
        "store": str(store.path),
        "source": " ".join(str(source[key]) for key in ("kind", "root", "target") if source.get(key)),
        "tiles": f"{a.tiles} of {a.tile_size[0]} x {a.tile_size[1]} px",
        "splits": f"{store.splits_text(partition)} (partition {partition})",
        "backbone": str(a.backbone.get("model")),
        "noising": f"{extraction.get('noising', 'not stated')}, timesteps {', '.join(map(str, a.timesteps))}",
        "layers": f"{len(a.layers)}, at {strides} px per cell",
        "encoding": f"{a.encoding}, {store.size_bytes() / 1e6:.1f} MB",
        "extraction cost": cost_text(total_cost(store.commits)),
        "feature hash": a.planned.feature,
    }

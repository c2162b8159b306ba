"""The on-disk contract: what a feature store declares about itself, and how its parts are named.

The attributes are written once, when the store is created, and never change while it is filled.
Legend: N tiles, T timesteps, L layers of one group, C channels, H and W feature pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from satdifuser.store.digest import DigestAlgorithm
from satdifuser.store.encoding import FORMS
from satdifuser.store.settings import PARTITION_NAME, Encoding, Settings, StoreSettings

FORMAT_VERSION = 1
ATTRIBUTE_KEY = "satdifuser"
DEFAULT_PARTITION = "default"
MAX_TILES_PER_SHARD = 64
MAX_SHARD_BYTES = 512 * 10**6
# No store comes near these; one that claims more is hostile, and is refused before it costs memory.
MAX_TILES, MAX_SHARDS, MAX_NAMES, MAX_SIDE, MAX_CHANNELS = 10**8, 10**6, 10**5, 2**16, 2**16
MAX_LAYERS = 10**4  # each takes a check of its own: more of them would take seconds to refuse
MAX_PARTITIONS = 100  # each is an array
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
PartitionName = Annotated[str, Field(pattern=f"^{PARTITION_NAME}$")]
Channels = Annotated[int, Field(gt=0, le=MAX_CHANNELS)]


class LayerInfo(Settings):
    """One tapped U-Net module: module path, channels, image pixels per feature pixel, map size.

    In a store whose encoding averages windows, `pool` is their side and the size that of the kept map.
    """

    name: str
    channels: Channels
    stride: Side
    height: Side
    width: Side
    pool: Side = 1

    @property
    def group_key(self) -> tuple[int, int]:
        """Stride and channels: layers alike in both share an array."""
        return self.stride, self.channels


class Hashes(Settings):
    """What shaped the values (`feature`), what is held (`contents`) and how it is labelled (`labels`)."""

    feature: str
    contents: str
    labels: str


class Attributes(Settings):
    """Everything a store declares about itself; `partition` is the one its source was asked for."""

    format_version: Literal[1] = 1
    store_id: str
    created: str
    software: dict[str, str]
    task: Literal["classification", "multilabel", "segmentation"] | None
    classes: list[str] = Field(max_length=MAX_NAMES)
    ignore_value: Annotated[int, Field(ge=0, le=255)]
    partition: str = DEFAULT_PARTITION
    partitions: list[PartitionName] = Field(
        default=[DEFAULT_PARTITION], min_length=1, max_length=MAX_PARTITIONS
    )
    tiles: Annotated[int, Field(gt=0, le=MAX_TILES)]
    left_out: NonNegativeInt
    tile_size: tuple[Side, Side]
    tiles_per_shard: PositiveInt
    timesteps: list[int] = Field(min_length=1, max_length=MAX_NAMES)
    layers: list[LayerInfo] = Field(min_length=1, max_length=MAX_LAYERS)
    encoding: Encoding
    decode: str
    digest_algorithm: DigestAlgorithm = "sha256"  # of files, tiles and images; stores from before do not say
    previews: bool
    latents: tuple[Channels, Side, Side] | None = None  # (C, h, w) where they are held
    valid: bool = False  # whether it says of each pixel of a tile if it holds data
    cloud_cover: bool = False  # whether it says of each tile's image how much of it is under clouds
    colour_statistics: list[str]
    backbone: dict[str, Any]
    feature_identity: dict[str, Any]
    planned: Hashes
    settings: dict[str, Any]
    labelled: dict[str, Any] = Field(default={})  # where labels came from that came after the extraction
    copied_from: list[str] = Field(default=[])  # by `copy` and `merge`: content_digest of what was taken

    @model_validator(mode="after")
    def check_shards(self) -> Attributes:
        """Limit what is kept in memory for each shard."""
        if self.shards > MAX_SHARDS:
            raise ValueError(f"{self.shards} shards, expected at most {MAX_SHARDS}")
        return self

    @model_validator(mode="after")
    def check_partition(self) -> Attributes:
        """The partition in use is one of those that are held."""
        if self.partition not in self.partitions:
            raise ValueError(f"partition {self.partition!r} is not among {', '.join(self.partitions)}")
        return self

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.tiles // self.tiles_per_shard)

    @property
    def made_by(self) -> str:
        """The command whose repetition fills in what is missing."""
        verbs = ("extract", "store copy", "store merge")
        return f"`satdifuser {verbs[min(len(self.copied_from), 2)]}`"

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First tile and one past the last tile of a shard."""
        first = shard * self.tiles_per_shard
        return first, min(first + self.tiles_per_shard, self.tiles)


def group_layers(layers: Sequence[LayerInfo]) -> dict[str, list[int]]:
    """Group layers whose maps share a shape, so that one array holds them.

    Args:
        layers: The layer table in its order.

    Returns:
        Group name (``stride_08``; ``stride_08_c320`` for a further width at that stride) to positions in
        the table, finest stride first.
    """
    widths: dict[int, list[int]] = {}
    groups: dict[str, list[int]] = {}
    for layer in layers:
        seen = widths.setdefault(layer.stride, [])
        if layer.channels not in seen:
            seen.append(layer.channels)
    for position, layer in enumerate(layers):
        name = f"stride_{layer.stride:02d}"
        if layer.channels != widths[layer.stride][0]:
            name += f"_c{layer.channels}"
        groups.setdefault(name, []).append(position)
    return dict(sorted(groups.items(), key=lambda item: (layers[item[1][0]].stride, item[1][0])))


def canonical_hash(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def contents_hash(tile_ids: Sequence[str], timesteps: Sequence[int], layers: Sequence[LayerInfo]) -> str:
    """The `contents` hash: tiles x timesteps x layers, in order."""
    names = [layer.name for layer in layers]
    return canonical_hash({"tiles": list(tile_ids), "timesteps": list(timesteps), "layers": names})


def labels_hash(
    classes: Sequence[str], target_digests: Sequence[str], partitions: Mapping[str, Sequence[int]]
) -> str:
    """The `labels` hash: class names, targets' digests and split codes, in tile_id order."""
    return canonical_hash([classes, target_digests, partitions])


def differing_fields(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], has: str = "store has", asked: str = "asked for"
) -> list[str]:
    """Name every leaf in which two nested mappings differ, as ``a.b: store has 1, asked for 2``.

    Args:
        ours: The one mapping …
        theirs: … and the other.
        has: What stands before a value of theirs …
        asked: … and before one of ours.
    """
    mine, other = _flatten(ours), _flatten(theirs)
    return [
        f"{key}: {has} {other.get(key, 'nothing')!r}, {asked} {mine.get(key, 'nothing')!r}"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            leaves |= _flatten(item, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = item
    return leaves


def bytes_per_tile(layers: Sequence[LayerInfo], timesteps: int, encoding: Encoding) -> int:
    """Uncompressed bytes that one tile's maps, scales and pooled features take."""
    form = FORMS[encoding]
    channels = sum(layer.channels for layer in layers)
    values = sum(layer.channels * layer.height * stored_width(layer, encoding) for layer in layers)
    per_channel = 4 * (1 + len(form.per_channel))  # pooled, scale, offset
    return timesteps * (values * np.dtype(form.dtype).itemsize + channels * per_channel)


def stored_width(layer: LayerInfo, encoding: Encoding) -> int:
    """Length of a row of a layer's stored map, in numbers of the stored dtype."""
    return -(-layer.width // 2) if FORMS[encoding].packed else layer.width


def kept_layers(layers: Sequence[LayerInfo], settings: StoreSettings) -> list[LayerInfo]:
    """The layers as a store with these settings keeps them: smaller where windows are averaged."""
    kept = []
    for layer in layers:
        pool = settings.pool_of(layer.stride)
        size = {"height": -(-layer.height // pool), "width": -(-layer.width // pool)}
        kept.append(layer.model_copy(update={"pool": pool, **size}))
    return kept


def auto_tiles_per_shard(layers: Sequence[LayerInfo], timesteps: int, encoding: Encoding, tiles: int) -> int:
    """At most 64 tiles and at most 512 MB over all arrays, never more than there are tiles."""
    fitting = MAX_SHARD_BYTES // bytes_per_tile(layers, timesteps, encoding)
    return max(1, min(MAX_TILES_PER_SHARD, fitting, tiles))

"""The README.md inside a store: what it is, of what, how made, how to open it, how to cite it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from satdifuser.store.encoding import FORMS
from satdifuser.store.files import CARD, write_durably
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import Attributes

NOT_STATED = "not stated"
PAPER = (
    "Can Generative Geospatial Diffusion Models Excel as Discriminative Geospatial Foundation Models? "
    "(SatDiFuser), ICCV 2025, arXiv 2503.07890"
)


def carry_card(old: FeatureStore, new: Path) -> None:
    """Give a store that will take another one's place that one's card if people edited it, else a new one.

    Args:
        old: The store in the place, a local one.
        new: The folder of the other store.
    """
    edited, text = old.card_file(), old.card()
    if edited is None or (text is not None and text == store_card(old, _name_in(text))):
        text = store_card(FeatureStore(new), Path(str(old.path)).name)
        write_durably(new / CARD, text.encode())
    else:  # byte by byte, whatever its encoding
        write_durably(new / CARD, edited.read_bytes())


def _name_in(card: str) -> str:
    """The store's name in the title of a card; another one where the store was renamed since."""
    return card.partition("\n")[0].removeprefix("# ").partition(": diffusion features of")[0]


def store_card(store: FeatureStore, name: str = "") -> str:
    """The text of a complete store's card, in Markdown.

    Args:
        store: The store.
        name: What it will be called; "" for the name it has.
    """
    a, name = store.attributes, name or Path(str(store.path)).name
    sections = {
        f"# {name}: diffusion features of {a.tiles} satellite image tiles": (
            "Self-attention and ResNet outputs of a frozen diffusion model's U-Net, which any Zarr v3 reader "
            f"opens (format {a.format_version}, store {a.store_id}). `satdifuser store verify --deep {name}` "
            "checks it."
        ),
        "## What it holds": _facts(_contents(store)),
        "## Licence and citation": _facts(_terms(store)),
        "## How it was made": _facts(_making(store)),
        "## How to open it": (
            f"With plain zarr-python:\n\n```python\n{zarr_snippet(store, name)}```\n\n"
            "With xarray (zarr warns that it does not know this README.md):\n\n"
            f"```python\n{xarray_snippet(store, name)}```\n\n"
            f"Decoding: {a.decode}. `pooled` holds the exact spatial means. `tiles/` has one row per tile: "
            "id, split, place, date."
        ),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items()) + "\n"


def _terms(store: FeatureStore) -> dict[str, Any]:
    stated = store.attributes.settings.get("store", {})
    named = {"licence": "license", "citation": "citation"}
    return {name: stated.get(key) or NOT_STATED for name, key in named.items()} | {"method": PAPER}


def _facts(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _contents(store: FeatureStore) -> dict[str, Any]:
    a = store.attributes
    source = a.settings.get("source", {})
    images = Path(str(source.get("root") or source.get("path") or "")).name
    facts = {
        "images": " ".join([str(source.get("kind", NOT_STATED)), images]).strip(),
        "tiles": f"{a.tiles} of {a.tile_size[0]} x {a.tile_size[1]} px: {store.splits_text()}",
        "targets": _targets(a),
        "timesteps": ", ".join(map(str, a.timesteps)),
        "encoding": f"{a.encoding}, {store.size_bytes() / 1e6:.1f} MB",
        "content_digest": store.content_digest(),
    }
    layers = [f"{x.name} ({x.channels} x {x.height} x {x.width}, stride {x.stride} px)" for x in a.layers]
    return facts | {"layers": "\n" + "\n".join(f"  - {layer}" for layer in layers)}


def _targets(a: Attributes) -> str:
    origin = f" (of {Path(a.labelled['file']).name})" if "file" in a.labelled else ""
    return f"{a.task}: {', '.join(a.classes)}{origin}" if a.task else "none"


def _making(store: FeatureStore) -> dict[str, Any]:
    a = store.attributes
    settings = a.settings.get("extract", {})
    names = ("noising", "steps", "draws", "latent", "guidance", "image_size", "seed")
    return {
        "created": a.created,
        "software": ", ".join(f"{name} {version}" for name, version in a.software.items()),
        "backbone": a.backbone.get("model"),
        "SHA-256 of its weights": a.backbone.get("weights_sha256", NOT_STATED),
        "settings": ", ".join(f"{name} {settings[name]}" for name in names if name in settings) or NOT_STATED,
        "feature hash": a.planned.feature,
    }


def zarr_snippet(store: FeatureStore, name: str) -> str:
    """Python that decodes the first tile with plain zarr into ``maps`` (timestep, layer, channel, y, x).

    Args:
        store: The store.
        name: Its folder.
    """
    a, group = store.attributes, next(iter(store.groups))
    form = FORMS[a.encoding]
    lines = [
        *(["import numpy as np"] if form.packed else []),
        "import zarr",
        "",
        f'group = zarr.open_group("{name}", mode="r")["features/{group}"]',
        'maps = group["values"][0].astype("float32")  # of the first tile: (timestep, layer, channel, y, x)',
    ]
    if form.packed:
        width = a.layers[store.groups[group][0]].width
        lines += [
            "maps = np.stack([maps % 16, maps // 16], axis=-1)  # two values in a byte",
            f"maps = maps.reshape(*maps.shape[:-2], -1)[..., :{width}]",
        ]
    if "scale" in form.per_channel:
        lines += ['maps = maps * group["scale"][0][..., None, None]']
    if "offset" in form.per_channel:
        lines += ['maps = maps + group["offset"][0][..., None, None]']
    return "\n".join(lines) + "\n"


def xarray_snippet(store: FeatureStore, name: str) -> str:
    """Python that opens the store with xarray and takes ``pooled`` (tile, timestep, layer, channel).

    Args:
        store: The store.
        name: Its folder.
    """
    group = next(iter(store.groups))
    return (
        "import xarray\n\n"
        f'tree = xarray.open_datatree("{name}", engine="zarr", consolidated=False)\n'
        f'pooled = tree["features/{group}/pooled"]  # (tile, timestep, layer, channel)\n'
        'tile_ids = tree["tiles/tile_id"].values\n'
    )

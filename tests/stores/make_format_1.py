"""Made format-1.zip and format-1.json, once; a store of that format must stay readable for ever.

PYTHONPATH=tests python tests/stores/make_format_1.py
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from made_up import random_store

from satdifuser.store.schema import LayerInfo

HERE = Path(__file__).parent
LAYERS = [
    LayerInfo(name="up_blocks.0.attentions.0.attn1", channels=3, stride=8, height=2, width=3),
    LayerInfo(name="up_blocks.1.attentions.0.attn1", channels=2, stride=4, height=4, width=6),
    LayerInfo(name="up_blocks.1.resnets.0.conv2", channels=2, stride=4, height=4, width=6),
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "format-1.zarr", LAYERS, 4, "int8")
        maps = store.decode(store.stored(np.arange(4)))
        expected = {
            "content_digest": store.content_digest(),
            "hashes": store.hashes().model_dump(),
            "tile_ids": store.tiles.tile_id.tolist(),
            "labels": store.tiles.label.tolist(),
            "last_tile": {group: values[3, 2].tolist() for group, values in maps.items()},
        }
        with zipfile.ZipFile(HERE / "format-1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for path in store.folder.rglob("*") if path.is_file()):
                archive.write(path, path.relative_to(store.folder).as_posix())
    (HERE / "format-1.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()

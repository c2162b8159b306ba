"""The embedded backbone: its card tells the truth about the weights that ship."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights/embedded"
CARD = ROOT / "docs/embedded_backbone.md"


def test_hashes_in_the_card_are_those_of_the_weights() -> None:
    written = {
        name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", CARD.read_text(), re.M)
    }
    found = {
        path.relative_to(WEIGHTS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in WEIGHTS.rglob("*.safetensors")
    }
    assert written == found


def test_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) < 16e6

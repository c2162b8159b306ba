"""What a map or a table of tiles was made with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from satdifuser.evaluate.maps.map_file import MODEL_TAG
from satdifuser.fuse.run_folder import Run


@dataclass(frozen=True)
class Origin:
    """A run, and the name of the scene or store that it was used on; ISO 8601 date, "" where unknown."""

    run: Run
    scene: str
    date: str = ""

    @property
    def tags(self) -> dict[str, str]:
        """The same as tags of a raster."""
        info = self.run.info
        tags = {
            "SATDIFUSER_VERSION": version("satdifuser"),
            "SATDIFUSER_MODEL": f"{info['fusion']} fusion, {info['head']} head, run {info['name']}",
            MODEL_TAG: str(info["model_sha256"]),
            "SATDIFUSER_STORE": str(info["store"]["hashes"]["feature"]),
            "SATDIFUSER_SCENE": self.scene,
        }
        return tags | ({"ACQUISITIONDATE": self.date} if self.date else {})

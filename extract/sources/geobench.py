"""Source `geobench`: a data set of GEO-Bench v1.0 as it lies on disk, read without the benchmark's package.

Every sample of any partition is a tile. `source.partition` decides its split; the splits of all partitions
travel along, so that one extraction serves every label fraction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import ImageError, SettingsError, suggest
from satdifuser.extract.geobench_datasets import SCALES
from satdifuser.extract.settings import GeobenchSettings
from satdifuser.extract.sources.geobench_files import (
    SPECS,
    SPLIT_NAMES,
    find_dataset,
    read_partitions,
    read_task,
)
from satdifuser.extract.sources.geobench_sample import (
    SampleHeader,
    open_sample,
    parse_label,
    read_header,
    read_pixels,
)
from satdifuser.extract.sources.tile import Label, Task, Tile, TileRecord
from satdifuser.labels.classes import IGNORE, ClassList
from satdifuser.labels.splits import Split


class GeobenchSource:
    """A data set of GEO-Bench.

    Raises:
        SettingsError: root, data set or partition is not there, or the data set's scale must be given.
        SourceError: task or partitions are damaged, contradict the samples, or ask for code to be run.
    """

    def __init__(self, settings: GeobenchSettings) -> None:
        self.settings = settings
        self.folder = find_dataset(settings.root, settings.dataset)
        task, names = read_task(self.folder / SPECS)
        self.task: Task | None = task
        self.class_list = ClassList(names, tuple(range(len(names))), origin=str(self.folder / SPECS))
        self.classes = names
        self.ignore_value = IGNORE
        self.left_out = 0
        self.thread_safe = True
        self.partitions = read_partitions(self.folder)
        self.names = list(dict.fromkeys(name for splits in self.partitions.values() for name in splits))
        self.chosen = self.choose_partition()
        self.splits = tuple(split for split in SPLIT_NAMES.values() if split in self.chosen.values())
        self.check_scale()

    def choose_partition(self) -> dict[str, Split]:
        """Return the splits of ``source.partition``."""
        name = self.settings.partition
        if name not in self.partitions:
            held = ", ".join(self.partitions) or "none"
            raise SettingsError(
                f"source.partition: {self.folder} has no partition {name!r}; "
                f"it has {held}{suggest(name, self.partitions)}"
            )
        return self.partitions[name]

    def check_scale(self) -> None:
        """Raise SettingsError where nobody has said what scale a data set has."""
        dataset = self.settings.dataset
        known = dataset not in SCALES or SCALES[dataset] is not None
        if known or self.settings.scale is not None or not self.names:
            return
        path = self.path(self.names[0])
        with open_sample(path) as file:
            image = read_pixels(file, read_header(file, path).bands)
        raise SettingsError(
            f"source.scale: the scale of {dataset} is not known to this package; set it so that value * "
            f"scale lies in [0, 1]; the values of {path.name} run from {image.min():g} to {image.max():g}"
        )

    def path(self, name: str) -> Path:
        """Return the file of a sample."""
        return self.folder / f"{name}.hdf5"

    def records(self) -> list[TileRecord]:
        """List one tile per sample, in an order that does not depend on the partition that is chosen.

        Raises:
            ImageError: a sample cannot be read or lacks its label (with ``on_error: skip`` it stays listed,
                so that it is counted and named when it is read).
            SourceError: a sample's pickle asks for a name outside the closed list.
        """
        if not self.names:
            return []
        found = {name: self.try_examine(self.path(name)) for name in self.names}
        sizes = (header.size for header, _ in found.values() if header)
        size = next(sizes, None)
        if size is None:
            size = self.examine(self.path(self.names[0]))[0].size  # says what is wrong with it
        return [self.record(name, header, label, size) for name, (header, label) in found.items()]

    def examine(self, path: Path) -> tuple[SampleHeader, Label]:
        """Read a sample's header and label."""
        with open_sample(path) as file:
            header = read_header(file, path)
        return header, parse_label(header, self.task, len(self.classes), path)

    def try_examine(self, path: Path) -> tuple[SampleHeader | None, Label]:
        """Read a sample's header and label; None where it cannot be used and such tiles are skipped."""
        try:
            return self.examine(path)
        except ImageError:
            if self.settings.on_error == "fail":
                raise
            return None, None

    def record(
        self, name: str, header: SampleHeader | None, label: Label, size: tuple[int, int]
    ) -> TileRecord:
        """Describe the tile of one sample; one that cannot be used takes the given size."""
        return TileRecord(
            tile_id=name,
            path=str(self.path(name)),
            split=self.chosen.get(name, "none"),
            partitions={key: splits.get(name, "none") for key, splits in self.partitions.items()},
            size=header.size if header else size,
            label=label,
            georeference=header.georeference if header else None,
            date=header.date if header else "",
        )

    def read(self, record: TileRecord) -> Tile:
        """Read one sample, with its mask of class indices if that is the task.

        Raises:
            ImageError: the sample is damaged, lacks its label, or its mask is of another size or holds
                unknown values.
        """
        path = Path(record.path)
        with open_sample(path) as file:
            header = read_header(file, path)
            parse_label(header, self.task, len(self.classes), path)
            image = read_pixels(file, header.bands)
            raw_mask = read_pixels(file, [header.mask])[0] if self.task == "segmentation" else None
        valid = np.isfinite(image).all(axis=0)
        mask = None if raw_mask is None else self.class_indices(raw_mask, valid, path)
        return Tile(record, image, valid, mask, header.names, header.aliases)

    def class_indices(
        self, mask: NDArray[np.generic], valid: NDArray[np.bool_], path: Path
    ) -> NDArray[np.uint8]:
        """Return the class indices (H, W) of a mask, those of pixels without data ignored."""
        if mask.shape != valid.shape:
            raise ImageError(
                f"{path}: its mask is of shape {mask.shape}, but its bands are of {valid.shape}; get the "
                "file anew, or leave such tiles out with source.on_error: skip"
            )
        indices = self.class_list.indices(mask, path)
        indices[~valid] = IGNORE
        return indices

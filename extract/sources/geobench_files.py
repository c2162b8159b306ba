"""What lies beside the samples of a GEO-Bench data set: its task and its partitions.

Layout (GEO-Bench v1.0, Lacoste et al., NeurIPS 2023, arXiv 2306.03831): BENCHMARK/DATASET/ holds
task_specs.pkl, NAME_partition.json and one SAMPLE.hdf5 per sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satdifuser.errors import SettingsError, SourceError, suggest
from satdifuser.extract.sources.closed_pickle import load_closed, to_array
from satdifuser.extract.sources.tile import Task
from satdifuser.labels.classes import MAX_CLASSES
from satdifuser.labels.splits import Split

SPECS = "task_specs.pkl"
PARTITION = "_partition.json"
TASKS: dict[str, Task] = {
    "Classification": "classification",
    "MultiLabelClassification": "multilabel",
    "SegmentationClasses": "segmentation",
    "SemanticSegmentation": "segmentation",
}
SPLIT_NAMES: dict[str, Split] = {"train": "train", "valid": "val", "test": "test"}


def find_dataset(root: Path, dataset: str) -> Path:
    """Return a data set's folder: in ``root`` itself, or in a benchmark's folder there.

    Raises:
        SettingsError: there is none, or several.
    """
    if not root.is_dir():
        raise SettingsError(
            f"source.root: {root} is not a folder; expected GEO-Bench's folder or one of its benchmarks "
            "(classification_v1.0, segmentation_v1.0), its path seen from the working folder"
        )
    folders = sorted(path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{SPECS}"))
    found = [folder for folder in folders if folder.name == dataset]
    if not found:
        names = sorted({folder.name for folder in folders})
        raise SettingsError(
            f"source.dataset: {root} holds no data set {dataset!r} with a {SPECS}; "
            f"it holds {', '.join(names) or 'none'}{suggest(dataset, names)}"
        )
    if len(found) > 1:
        raise SettingsError(
            f"source.dataset: {dataset} lies in {' and in '.join(str(folder.parent) for folder in found)}; "
            "set source.root to one of them"
        )
    return found[0]


def read_task(path: Path) -> tuple[Task, tuple[str, ...]]:
    """Read task and class names from a task's specifications; unnamed classes are called by their numbers.

    Raises:
        SourceError: the file is damaged, asks for a name outside the closed list, or is of a task that is
            not among those of this package.
    """
    try:
        label_type = load_closed(path.read_bytes(), path).state["label_type"]
        kind, state = type(label_type).__name__, label_type.state
        if kind not in TASKS:
            raise SourceError(f"{path}: labels are of type {kind}, expected one of {', '.join(TASKS)}")
        count = int(to_array(state["n_classes"]))
        if not 0 < count <= MAX_CLASSES:
            raise ValueError(f"{count} classes, expected 1 to {MAX_CLASSES}")
        return TASKS[kind], tuple(
            map(str, state.get("_class_names") or state.get("class_name") or range(count))
        )
    except SourceError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise SourceError(
            f"{path}: not readable as the specifications of a GEO-Bench task ({error}); get the file anew"
        ) from error


def read_partitions(folder: Path) -> dict[str, dict[str, Split]]:
    """Read all partitions of a data set, ``default`` first.

    Returns:
        By the partitions' names, the split of each sample that is in the partition.

    Raises:
        SourceError: a file is damaged, puts a sample into two splits, or names one that is not there.
    """
    samples = {path.stem for path in folder.glob("*.hdf5")}
    files = {path.name.removesuffix(PARTITION): path for path in sorted(folder.glob(f"*{PARTITION}"))}
    order = sorted(files, key=lambda name: (name != "default", name))
    partitions = {name: read_partition(files[name]) for name in order}
    for name, splits in partitions.items():
        absent = sorted(splits.keys() - samples)
        if absent:
            raise SourceError(
                f"{files[name]}: {len(absent)} of its {len(splits)} samples are not there, e.g. "
                f"{folder / absent[0]}.hdf5; get the data set anew, or take them out of the partition"
            )
    return partitions


def read_partition(path: Path) -> dict[str, Split]:
    """Read the split of each sample of one partition."""
    try:
        content = parse_partition(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path}: not a partition ({error}); expected "
            '{"train": [names of samples], "valid": [...], "test": [...]}'
        ) from error
    splits: dict[str, Split] = {}
    for split, names in content.items():
        for name in names:
            if name in splits:
                raise SourceError(
                    f"{path}: sample {name!r} is in {splits[name]} and again in {split}; "
                    "list each sample once: splits must not overlap"
                )
            splits[name] = split
    return splits


def parse_partition(content: Any) -> Mapping[Split, list[str]]:
    """Check the form of a partition and name its splits our way: ``valid`` is ``val``."""
    if not isinstance(content, dict) or not content.keys() <= SPLIT_NAMES.keys():
        raise ValueError(f"it holds {', '.join(content) if isinstance(content, dict) else 'no splits'}")
    for split, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{split} is not a list of names")
    return {SPLIT_NAMES[key]: names for key, names in content.items()}

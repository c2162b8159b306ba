"""What `source.target` names: imported, called, and checked to be a data set.

This runs the user's own code. Only settings that the user wrote lead here: nothing that is read from a store
or a run opens a source.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from satdifuser.errors import SettingsError, suggest
from satdifuser.extract.settings import PythonSettings
from satdifuser.labels.splits import Split


class Dataset(Protocol):
    """What a torch data set of the mapping style offers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def open_datasets(settings: PythonSettings) -> dict[Split | None, Dataset]:
    """Make the data sets that the settings describe.

    Returns:
        The data sets by split, in the order of the settings; one whose splits are yet to be drawn by None.

    Raises:
        SettingsError: the target cannot be imported or called, or returns something else.
    """
    common = settings.kwargs
    with importing_from_working_folder():
        factory = find_factory(settings.target)
        if settings.splits is None:
            return {None: make(factory, settings.target, common)}
        return {split: make(factory, settings.target, common | own) for split, own in settings.splits.items()}


@contextmanager
def importing_from_working_folder() -> Iterator[None]:
    """Let modules of the working folder be found, after all that is installed, so that they hide nothing."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def find_factory(target: str) -> Callable[..., Any]:
    """Import ``package.module:name``.

    Raises:
        SettingsError: there is no such module or name, its import fails, or it cannot be called.
    """
    module_name, name = target.split(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise SettingsError(
            f"source.target: {target}: cannot import {module_name}: {explain(error)}; expected a module "
            f"that is installed, lies in the working folder {Path.cwd()}, or on PYTHONPATH"
        ) from error
    try:
        factory = attrgetter(name)(module)
    except AttributeError as error:
        where = getattr(module, "__file__", None) or module_name
        raise SettingsError(
            f"source.target: {target}: {where} has no {name!r}{suggest(name, dir(module))}"
        ) from error
    if not callable(factory):
        raise SettingsError(
            f"source.target: {target} is of type {type(factory).__name__}; expected a class or a function "
            "that returns a data set"
        )
    return factory  # type: ignore[no-any-return]


def make(factory: Callable[..., Any], target: str, kwargs: Mapping[str, Any]) -> Dataset:
    """Call the factory and check what it returns.

    Raises:
        SettingsError: it raises, or returns something else than a data set that holds samples.
    """
    call = f"{target}({', '.join(f'{name}={value!r}' for name, value in kwargs.items())})"
    try:
        dataset = factory(**kwargs)
        count = len(dataset) if hasattr(type(dataset), "__len__") else None
    except (Exception, SystemExit) as error:
        raise SettingsError(
            f"source.target: {call} raised {explain(error)}; check source.kwargs and source.splits"
        ) from error
    if isinstance(dataset, Mapping) or count is None or not hasattr(type(dataset), "__getitem__"):
        raise SettingsError(
            f"source.target: {call} returned a {type(dataset).__name__}; expected one data set with a length "
            "and samples 0, 1, 2 …; name what selects each split in source.splits"
        )
    if not count:
        raise SettingsError(f"source.target: {call} returned a data set of 0 samples, expected at least one")
    return dataset  # type: ignore[no-any-return]


def explain(error: BaseException) -> str:
    """Say what foreign code raised, and where: its traceback is not shown."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)[1:]  # the first one is ours
        if not frame.filename.startswith("<frozen ") and frame.filename != importlib.__file__
    ]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"

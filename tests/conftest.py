"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from made_up_maps import Mapped

os.environ["HF_HUB_OFFLINE"] = "1"  # a test never reaches for a model hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads of several processes slow each other down


# One set of kernels on every processor: recorded gradients of some norms are only as exact as their rounding
# (2e-4 from those of float64), which other instructions round otherwise.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long variants too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="long variant, runs with --slow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real imagery and golden arrays beside the checkout, where there is one."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: real imagery and golden arrays are optional")
    return folder


@pytest.fixture(scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Syncing takes most of the time of tests that write many small stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    """A small scene with labels, features of it, and runs fitted on them."""
    from made_up_maps import make_mapped

    return make_mapped(tmp_path_factory.mktemp("mapped"))


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser to look at pages with."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    names = [name for name in found if name]
    if not names:
        pytest.skip("no chromium is installed: the page cannot be looked at")
    return names[0]

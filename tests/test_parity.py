"""The parity tool: on the recorded arrays where they are, and on altered ones that it must refuse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[1] / "tools/check_parity.py"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), str(folder)], capture_output=True, text=True)


@pytest.fixture
def one_case(shared: Path, tmp_path: Path) -> Path:
    """A folder with the recorded global fusion alone."""
    (tmp_path / "A").mkdir()
    for suffix in ("json", "npz"):
        shutil.copy(shared / f"golden/A/A_gw.{suffix}", tmp_path / "A")
    return tmp_path


def alter(folder: Path, name: str, value: np.ndarray) -> None:
    with np.load(folder / "A/A_gw.npz") as held:
        arrays = dict(held) | {name: value}
    np.savez(folder / "A/A_gw.npz", **arrays)


def test_all_recorded_cases_pass(shared: Path) -> None:
    done = check(shared / "golden")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"(\d+) of \1 cases passed", done.stdout.splitlines()[-1])


def test_every_kind_of_difference_fails(one_case: Path) -> None:
    assert check(one_case).returncode == 0
    with np.load(one_case / "A/A_gw.npz") as held:
        golden = held["out/mixing_softmax"]
    for value, said in (
        (golden + np.float32(3e-4) * golden.max(), "FAIL  A/A_gw .* 3.0e-04"),
        (golden * np.float32("nan"), "out/mixing_softmax: not finite"),
        (golden[:-1], r"out/mixing_softmax: float32 \(15,\), expected float32 \(14,\)"),
        (golden.astype(np.int32), "out/mixing_softmax: float32 .*, expected int32"),
    ):
        alter(one_case, "out/mixing_softmax", value)
        done = check(one_case)
        assert done.returncode == 1
        assert re.search(said, done.stdout), done.stdout
        assert done.stdout.splitlines()[-1].startswith("0 of 1 cases passed")


def test_unknown_case_fails(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A/A_new.json").write_text(json.dumps({"cls": "archs.other.Fuser", "kwargs": {}}))
    done = check(tmp_path)
    assert (done.returncode, "unknown case: its keys are cls, kwargs" in done.stdout) == (1, True)


def test_folder_without_cases(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no cases; expected JSON files in its folders A, B, C or D" in done.stderr

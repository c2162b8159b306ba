"""Compare this package with arrays recorded from the reference implementation.

    python tools/check_parity.py GOLDEN_DIR

GOLDEN_DIR holds the folders A (fusions), B (fusions with heads), C (DiffusionSat's U-Net) and D (extraction,
text, schedule, end to end). Each case is a JSON file that names class, arguments and mode, with its arrays in
an npz beside it. All computation is the package's own; this file and its parts (parity_fusions.py,
parity_unet.py, parity_extraction.py) only rebuild what a case describes.

One line per case; it passes where max|ours - golden| <= 1e-4 max|golden| for every array compared. An input
of a ReLU that is zero but for rounding may fall on either side (parity_corners.py). Exit code 0: all passed;
1: a case failed or is of a kind unknown here; 2: there is no case.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # Python leaves it out where PYTHONSAFEPATH is set
from parity_case import WITH_WEIGHT, Case, Pairs, UnknownCaseError, read_case
from parity_corners import on_each_side
from parity_extraction import (
    run_end_to_end,
    run_extraction,
    run_schedule,
    run_text,
    run_timesteps,
    run_vae,
)
from parity_fusions import run_decoder, run_fusion
from parity_unet import run_metadata, run_unet

TOLERANCE = 1e-4


@dataclass
class Result:
    """What came of comparing one case."""

    name: str
    compared: int = 0
    left: int = 0  # recorded results that we do not compute, such as the unused load-balance value
    worst: float = 0.0
    worst_array: str = ""
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.compared > 0 and self.worst <= TOLERANCE

    def line(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        if self.problem or not self.compared:
            return f"{verdict}  {self.name:32} {self.problem or 'nothing was compared'}"
        left = f" ({self.left} more not computed here)" if self.left else ""
        arrays = f"{self.compared} arrays{left}, worst {self.worst_array}"
        return f"{verdict}  {self.name:32} {self.worst:.1e}  {arrays}"


def main() -> int:
    """Run all cases of the folder that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="GOLDEN_DIR")
    folder = parser.parse_args().folder
    paths = find_cases(folder)
    if not paths:
        print(f"{folder}: no cases; expected JSON files in its folders A, B, C or D", file=sys.stderr)
        return 2
    results = []
    for path in paths:
        results.append(check_on_each_side(folder, path))
        print(results[-1].line(), flush=True)
    failed = [result.name for result in results if not result.passed]
    print(f"{len(results) - len(failed)} of {len(results)} cases passed, tolerance {TOLERANCE:g}")
    return 1 if failed else 0


def find_cases(folder: Path) -> list[Path]:
    """List JSON files, npz files without one, and model folders that are cases of their own."""
    found: list[Path] = []
    for kind in "ABCD":
        here = folder / kind
        found += here.glob("*.json")
        found += [path for path in here.glob("*.npz") if not path.with_suffix(".json").exists()]
        found += [path for path in here.glob("vae_*") if path.is_dir()]
    return sorted(found)


def check_on_each_side(root: Path, path: Path) -> Result:
    """Check a case until it passes, whole, with one choice of sides; the first result where none does."""
    first = None
    for result in on_each_side(lambda: check(root, path)):
        if result.passed:
            return result
        first = first or result
    assert first is not None
    return first


def check(root: Path, path: Path) -> Result:
    """Rebuild one case and compare all arrays that we compute too."""
    result = Result(path.relative_to(root).with_suffix("").as_posix())
    try:
        case = read_case(root, path)
        recorded = {name for name in case.arrays if "out" in name.split("/")[0] or "/out/" in name}
        for name, ours in choose_runner(case)(case):
            compare(result, name, ours, case.arrays[name])
            recorded.discard(name.removesuffix(WITH_WEIGHT))
        result.left = len(recorded)
    except UnknownCaseError as error:
        result.problem = f"unknown case: {error}"
    except Exception as error:  # whatever breaks, the other cases still run
        result.problem = f"{type(error).__name__}: {error}"
    return result


def compare(result: Result, name: str, ours: Any, golden: NDArray[Any]) -> None:
    """Add one array to a result; another shape or kind of dtype, or a NaN, is a failure."""
    mine = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours, golden.dtype)
    result.compared += 1
    if mine.shape != golden.shape or mine.dtype.kind != golden.dtype.kind:
        result.problem = f"{name}: {mine.dtype} {mine.shape}, expected {golden.dtype} {golden.shape}"
        return
    size = np.abs(golden).max(initial=0)
    error = float(np.abs(mine - golden).max(initial=0) / (size if size else 1))
    if not np.isfinite(error):
        result.problem = f"{name}: not finite"
    elif error >= result.worst:
        result.worst, result.worst_array = error, name


def choose_runner(case: Case) -> Callable[[Case], Pairs]:
    """Pick what rebuilds a case, by what its files hold."""
    info, arrays = case.info, case.arrays
    kinds: list[tuple[bool, Callable[[Case], Pairs]]] = [
        (str(info.get("cls", "")).startswith("archs.aggregation_networks."), run_fusion),
        (str(info.get("cls", "")).startswith(("archs.classifiers.", "archs.segmenters.")), run_decoder),
        ("cases" in info and "attn_processor" in info, run_unet),
        ("fields_in_order" in info, run_metadata),
        ("config" in info and "diffusion_mode" in info["config"], run_extraction),
        ("decoder" in info and "checkpoint" in info, run_end_to_end),
        ("prompts" in info and "embedding" in arrays, run_text),
        ("alphas_cumprod" in arrays, run_schedule),
        (bool(info) and all(key.isdecimal() for key in info), run_timesteps),
        (case.path.is_dir() and case.path.name.startswith("vae_"), run_vae),
    ]
    for matches, runner in kinds:
        if matches:
            return runner
    raise UnknownCaseError(f"its keys are {', '.join(list(info)[:8]) or ', '.join(list(arrays)[:8])}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())

"""The wheel holds the package and nothing else, and works away from the checkout."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.zarr")
ROOT_MODULES = {"__init__.py", "__main__.py", "cli.py", "errors.py", "options.py", "pipeline.py", "stages.py"}


def packages_on_disk() -> set[str]:
    found = {path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")}
    here = {p for p in found if not (p.parts and (p.parts[0].startswith(".") or p.parts[0] in LEFT_OUT))}
    return {".".join(["satdifuser", *path.parts]) for path in here}


def command(*words: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build output lands in the checkout or is taken from it."""
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        found = "0"
    if int(found.split(".")[0]) < 77:
        pytest.skip(f"setuptools>=77 is needed to build the wheel, here is {found}")
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    command(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--disable-pip-version-check", "-w", copy.parent, "."),
        cwd=copy,
    )
    (path,) = copy.parent.glob("satdifuser-*.whl")
    return path


def test_packages_are_listed_in_full() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk()


def test_only_the_allowed_modules_lie_at_the_root() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_MODULES


def test_wheel_holds_the_package_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "pipeline.yaml",
        "py.typed",
        "evaluate/report/page.html.jinja",
        "evaluate/view/view.html.jinja",
        "evaluate/report/page.css",
        "weights/embedded/unet/diffusion_pytorch_model.safetensors",
        "weights/embedded/vae/diffusion_pytorch_model.safetensors",
        "weights/embedded/scheduler/scheduler_config.json",
        "weights/embedded/prompt_embedding.safetensors",
    ):
        assert f"satdifuser/{name}" in names
    modules = {
        path.relative_to(ROOT) for package in packages_on_disk() for path in folder(package).glob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == {f"satdifuser/{path.as_posix()}" for path in modules}
    top = {Path(name).parts[0] for name in names}
    assert top == {"satdifuser", wheel.name.split("-py3")[0] + ".dist-info"}
    assert not any(part in name for name in names for part in ("tests/", "tools/", "benchmarks/"))


def folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


@pytest.mark.slow
def test_installed_wheel_runs_the_packaged_pipeline(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(home)}))
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    python = scripts / Path(sys.executable).name
    command(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are those of this interpreter; its own satdifuser comes second.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = command(python, "-c", "import satdifuser; print(satdifuser.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    settings = ("--set", "source.tiles=40", "--set", "fit.epochs=1")
    printed = command(scripts / "satdifuser", "run", *settings, "-o", "out", cwd=tmp_path)
    assert "report" in printed
    assert (tmp_path / "out/report.html").stat().st_size > 1000
    assert len(list((tmp_path / "out/runs").glob("*/metrics.json"))) >= 3

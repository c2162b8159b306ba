"""What a sweep of logistic probes costs, beside a plain loop of scikit-learn fits on the same store.

    python benchmarks/probe_sweep.py                           # 21 layers of the embedded backbone's widths
    python benchmarks/probe_sweep.py --widths sd               # of Stable Diffusion's; half an hour
    python benchmarks/probe_sweep.py --widths sd --inputs single layer
    python benchmarks/probe_sweep.py --full                    # no sampling

Makes a store of 2,000 training and 500 val tiles, 3 timesteps and 21 layers whose pooled features vary along
few directions, as real ones do: the n-th largest eigenvalue falls with n squared (measured on EuroSAT through
the embedded backbone: of 128 channels the 1st, 4th, 16th and 32nd hold 0.31, 0.08, 0.007, 0.001 of all
variance; here of 320 channels 0.45, 0.05, 0.004, 0.001). Ten classes, ten strengths; every single input, each
timestep's and each layer's concatenation, and all: 88 sets of inputs.

The loop standardises, fits `LogisticRegression` in double precision (in single it stops short) and scores on
val, with as many threads of its BLAS as serve it best. Since it takes hours, it is run for one set of inputs
of each kind and width, with all ten strengths of narrow ones, three of wider ones and one of the widest. In
turn with it our cell of the same inputs is fitted, all ten strengths, on one thread, until its gradient is as
small as the smallest of theirs; the ratio is ten times the loop's mean fit over that. The loop's total is
what these samples say of all inputs. Beside it the sweep is run in full, on all cores, stopped at the
smallest norm of the gradient that any fit of the loop reached.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from satdifuser.evaluate.probe_cells import Cell, SweepData, fit_cell, list_cells
from satdifuser.evaluate.probe_workers import fit_cells, one_thread
from satdifuser.evaluate.settings import ProbeSettings
from satdifuser.store.digest import CURRENT
from satdifuser.store.encoding import encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.schema import Attributes, Hashes, LayerInfo, group_layers
from satdifuser.store.writer import TileRow

SIDE, SHARD, CLASSES, DIRECTIONS, STEPS = 64, 100, 10, 512, [21, 61, 161]
WIDTHS = {"sd": (1280, 1280, 640, 320), "narrow": (128, 128, 96, 48)}
THEIR_TOLERANCE = 1e-5  # largest entry of the gradient; its Euclidean norm is some ten times as large
TRIED = {2_000: slice(None), 10_000: slice(1, None, 3)}  # strengths that are tried up to so many features …
WIDEST = slice(4, 5)  # … and above
FEW_STEPS = 30  # tell which number of threads is faster


def layer_table(widths: tuple[int, ...]) -> list[LayerInfo]:
    """21 layers as of a U-Net of four levels, whose maps are kept as one pixel."""
    names = [(f"up_blocks.{level}.attentions.{i}.attn1", level) for level in (1, 2, 3) for i in range(3)]
    names += [(f"up_blocks.{level}.resnets.{i}.conv2", level) for level in range(4) for i in range(3)]
    size = {"stride": SIDE, "height": 1, "width": 1}
    return [LayerInfo(name=name, channels=widths[level], **size) for name, level in sorted(names)]


def write_store(path: Path, widths: tuple[int, ...], train: int, val: int) -> FeatureStore:
    """A store of made-up features."""
    layers, tiles = layer_table(widths), train + val + SHARD
    attributes = Attributes(
        store_id="benchmark",
        created="now",
        software={},
        task="classification",
        classes=[f"class {c}" for c in range(CLASSES)],
        ignore_value=255,
        tiles=tiles,
        left_out=0,
        tile_size=(SIDE, SIDE),
        tiles_per_shard=SHARD,
        timesteps=STEPS,
        layers=layers,
        encoding="int8",
        decode="",
        digest_algorithm=CURRENT,
        previews=False,
        colour_statistics=[],
        backbone={"model": "none"},
        feature_identity={},
        planned=Hashes(feature="", contents="", labels=""),
        settings={},
    )
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, tiles)
    hidden = made_up_directions(labels, random)
    splits = ["train"] * train + ["val"] * val + ["test"] * SHARD
    writer = open_or_create(path, attributes, overwrite=False)
    for shard in range(attributes.shards):
        here = slice(*attributes.shard_range(shard))
        rows = [
            TileRow(f"{i}", splits[i], colour=np.zeros(0, np.float32), target=np.array(labels[i], np.int32))
            for i in range(here.start, here.stop)
        ]
        writer.write_shard(shard, rows, [made_up_features(layers, hidden[here], shard)], {})
    return open_store(path)


def made_up_directions(labels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.float64]:
    """(tiles, directions) of falling variance, a fifth of which tell the classes apart."""
    telling = random.random(DIRECTIONS) < 0.2
    centres = random.normal(size=(CLASSES, DIRECTIONS)) * telling
    hidden = random.normal(size=(len(labels), DIRECTIONS)) + centres[labels]
    falling: NDArray[np.float64] = hidden / np.arange(1, DIRECTIONS + 1)
    return falling


def made_up_features(layers: list[LayerInfo], hidden: NDArray[np.float64], shard: int) -> dict[str, object]:
    """Encoded features of a shard: every input mixes the directions in its own way, with a little noise."""
    noise, encoded = np.random.default_rng([1, shard]), {}
    for group, held in group_layers(layers).items():
        width = layers[held[0]].channels
        features = np.empty((len(hidden), len(STEPS), len(held), width, 1, 1), np.float32)
        for step in range(len(STEPS)):
            for place, position in enumerate(held):
                mixing = np.random.default_rng([2, step, position]).normal(size=(DIRECTIONS, width))
                found = hidden @ mixing
                found += 0.003 * found.std() * noise.normal(size=found.shape)
                features[:, step, place, :, 0, 0] = found
        encoded[group] = encode(features, "int8")
    return encoded


@dataclass(frozen=True)
class Fit:
    """One fit of the loop."""

    seconds: float
    norm: float
    accuracy: float
    steps: int


def fit_one(data: SweepData, cell: Cell, strength: float, steps: int = 10_000) -> Fit:
    """One turn of the loop, of so many steps at most."""
    began = time.perf_counter()
    inputs = data.inputs(cell)
    scaler = StandardScaler()
    features = scaler.fit_transform(data.train.joined(inputs).astype(np.float64))
    held_out = scaler.transform(data.val.joined(inputs).astype(np.float64))
    model = LogisticRegression(C=strength, tol=THEIR_TOLERANCE, max_iter=steps)
    model.fit(features, data.train.labels)
    accuracy = model.score(held_out, data.val.labels)
    seconds = time.perf_counter() - began
    hot = data.train.labels[:, None] == np.arange(CLASSES)
    slopes = model.predict_proba(features) - hot
    gradient = features.T @ slopes / len(hot) + model.coef_.T / (strength * len(hot))
    norm = float(np.hypot(np.linalg.norm(gradient), np.linalg.norm(slopes.mean(0))))
    return Fit(seconds, norm, accuracy, int(model.n_iter_.max()))


@dataclass(frozen=True)
class Sample:
    """A cell that stands for others of its kind and width, and the strengths that are tried of it."""

    cell: Cell
    width: int
    strengths: Sequence[float]
    stands_for: int


def samples(data: SweepData, cells: Sequence[Cell], full: bool) -> Iterator[Sample]:
    """What the loop is run for."""
    widths = {layer.name: layer.channels for layer in data.store.attributes.layers}
    alike: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        alike.setdefault((cell.inputs, sum(widths[name] for _, name in data.inputs(cell))), []).append(cell)
    for (_, width), members in alike.items():
        tried = next((part for limit, part in TRIED.items() if width <= limit), WIDEST)
        strengths = data.settings.logistic[slice(None) if full else tried]
        for cell in members if full else members[:1]:
            yield Sample(cell, width, strengths, 1 if full else len(members))


def best_threads(data: SweepData, cell: Cell) -> int:
    """How many threads of BLAS serve the loop best."""
    seconds = {}
    for threads in (1, len(os.sched_getaffinity(0))):
        with threadpool_limits(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopped short on purpose
            fit = fit_one(data, cell, 0.1, FEW_STEPS)
            seconds[threads] = fit.seconds / fit.steps
    print(", ".join(f"{1e3 * s:.1f} ms a step with {n} threads" for n, s in seconds.items()))
    return min(seconds, key=lambda threads: seconds[threads])


def run_in_turn(data: SweepData, cells: Sequence[Cell], full: bool) -> tuple[float, float]:
    """Seconds of the whole loop, and the smallest norm that it reached."""
    total, norms = 0.0, []
    threads = best_threads(data, cells[0])
    for sample in samples(data, cells, full):
        with threadpool_limits(threads):
            fits = [fit_one(data, sample.cell, strength) for strength in sample.strengths]
        mean, norm = float(np.mean([fit.seconds for fit in fits])), min(fit.norm for fit in fits)
        whole = mean * len(data.settings.logistic)
        ours, reached = time_cell(data, sample.cell, norm)
        total += whole * sample.stands_for
        norms.append(norm)
        print(
            f"  {sample.cell.inputs:8} {sample.width:6} features, loop of {len(fits):2} strengths: {mean:.2f}"
            f" s and {np.mean([fit.steps for fit in fits]):4.0f} steps a fit, norm {norm:.1e}, val "
            f"{max(fit.accuracy for fit in fits):.3f}; our cell of ten {ours:6.2f} s, norm {reached:.1e}: "
            f"{whole / ours:5.1f} times; {sample.stands_for} such cells",
            flush=True,
        )
    return total, min(norms)


def time_cell(data: SweepData, cell: Cell, tolerance: float) -> tuple[float, float]:
    """Seconds of our cell on one thread, and the largest norm of its gradients."""
    data.settings = data.settings.model_copy(update={"tolerance": tolerance})
    with one_thread():
        began = time.perf_counter()
        rows = fit_cell(data, cell)
        return time.perf_counter() - began, max(row["gradient_norm"] for row in rows)


def run_sweep(store: FeatureStore, settings: ProbeSettings) -> float:
    """Seconds of our sweep, reading and scoring included."""
    began = time.perf_counter()
    data, cells = SweepData(store, settings), list_cells(store, settings)
    cells.sort(key=lambda cell: -len(data.inputs(cell)))
    rows = [row for _, found in fit_cells(data, cells) for row in found]
    seconds = time.perf_counter() - began
    norms = [row["gradient_norm"] for row in rows]
    print(
        f"the sweep: {len(cells)} cells, {len(rows)} fits in {seconds:.0f} s; norms at most "
        f"{max(norms):.1e}, median {np.median(norms):.1e}; {sum(not row['converged'] for row in rows)} did "
        f"not converge; best val {max(row['value'] for row in rows):.3f}"
    )
    return seconds


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", choices=WIDTHS, default="narrow")
    parser.add_argument("--inputs", nargs="+", default=["single", "timestep", "layer", "all"])
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--full", action="store_true", help="Run the loop in full.")
    args = parser.parse_args()
    settings = ProbeSettings(probes=["logistic"], inputs=args.inputs)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "s.zarr", WIDTHS[args.widths], args.train, args.val)
        data = SweepData(store, settings)
        data.load()
        cells = list_cells(store, settings)
        print(f"{args.widths}: {args.train} training tiles, {len(cells)} cells")
        theirs, norm = run_in_turn(data, cells, args.full)
        ours = run_sweep(store, settings.model_copy(update={"tolerance": norm}))
    kind = "in full" if args.full else "from the samples above"
    print(f"loop {theirs:.0f} s ({kind}), sweep {ours:.0f} s: {theirs / ours:.1f} times")


if __name__ == "__main__":
    main()

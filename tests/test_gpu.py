"""Extraction and training on a GPU, where there is one: numbers, restarts, memory, the compiled U-Net."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import succeed

from satdifuser.errors import BackboneError
from satdifuser.extract.cluster import extract_on_cluster
from satdifuser.extract.job import Job
from satdifuser.extract.run import extract
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.store.cluster import Cluster
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.settings import StoreSettings
from satdifuser.store.verify import verify

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("no_waiting_for_the_disk"),
]


def make_job(device: str = "cuda", dtype: str = "float32", **settings: Any) -> Job:
    return Job(
        SyntheticSettings(tiles=22),
        BackboneSettings.model_validate({"device": device, "dtype": dtype}),
        ExtractSettings.model_validate({"batch_size": 4, "threads": 1} | settings),
        StoreSettings(tiles_per_shard=8, encoding="float32"),
    )


def values(store: FeatureStore) -> np.ndarray:
    """All features side by side, (tile, value)."""
    arrays = [store._root[f"features/{group}/values"][:] for group in sorted(store.groups)]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return extract(make_job("cpu"), tmp_path_factory.mktemp("cpu") / "s.zarr")


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("noising", ["forward", "inversion"])
def test_features_are_those_of_the_cpu(
    on_cpu: FeatureStore, tmp_path: Path, dtype: str, limit: float, noising: str
) -> None:
    store = extract(make_job(dtype=dtype, noising=noising), tmp_path / "gpu.zarr")
    assert verify(store, deep=True) == []
    reference = (
        on_cpu if noising == "forward" else extract(make_job("cpu", noising=noising), tmp_path / "cpu.zarr")
    )
    assert 0 < difference(values(store), values(reference)) < limit


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_bits_come_out_of_a_run_in_parts(tmp_path: Path, dtype: str) -> None:
    whole = extract(make_job(dtype=dtype), tmp_path / "whole.zarr")
    parts = tmp_path / "parts.zarr"
    extract(make_job(dtype=dtype), parts)
    commits = sorted((parts / "commits").rglob("1"))
    commits[0].unlink()
    assert FeatureStore(parts).missing_shards() == [1]
    assert extract(make_job(dtype=dtype), parts).content_digest() == whole.content_digest()


def test_the_largest_batch_is_found(tmp_path: Path) -> None:
    store = extract(make_job(batch_size="auto"), tmp_path / "s.zarr")
    assert store.attributes.feature_identity["batch_size"] == 8  # a whole shard fits


def peak_memory(job: Job, out: Path) -> int:
    """Bytes that an extraction takes of the GPU, with what torch keeps for the next allocation."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    extract(job, out)
    return torch.cuda.max_memory_reserved()


def test_memory_that_runs_out_splits_a_batch(tmp_path: Path) -> None:
    jobs = {batch: make_job(batch_size=batch, image_size=256) for batch in (1, 8)}
    little, much = (peak_memory(job, tmp_path / f"{batch}.zarr") for batch, job in jobs.items())
    if much < 1.2 * little:
        pytest.skip(f"a batch of 8 takes {much} bytes, one of 1 {little}: no limit tells them apart")
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((little + much) / 2 / total)
    try:
        store = extract(jobs[8], tmp_path / "limited.zarr")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert max(record.get("batches_split", 0) for record in store.commits) > 0
    assert difference(values(store), values(open_store(tmp_path / "8.zarr"))) < 1e-4


def test_the_compiled_network_has_the_same_features(tmp_path: Path, on_cpu: FeatureStore) -> None:
    try:
        store = extract(make_job(compile=True), tmp_path / "s.zarr")
    except BackboneError as error:
        if "cannot be compiled here" not in str(error):
            raise
        pytest.skip("needs a C compiler, for Triton")
    assert difference(values(store), values(on_cpu)) < 1e-3


def test_processes_that_share_the_gpu_write_the_same_store(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    alone = extract(make_job(), tmp_path / "alone.zarr")
    workers = torch.cuda.device_count() + 1
    shared = extract_on_cluster(make_job(), tmp_path / "shared.zarr", Cluster(workers))
    assert shared.content_digest() == alone.content_digest()
    assert not any("joules" in record for record in shared.commits)  # a GPU counts for all who use it


def test_commit_records_tell_device_and_time(tmp_path: Path) -> None:
    store = extract(make_job(), tmp_path / "s.zarr")
    assert all(record["device"] == torch.cuda.get_device_name() for record in store.commits)
    assert all(record["device_seconds"] > 0 for record in store.commits)


@pytest.mark.parametrize("words", [(), ("fit.precision=bfloat16",), ("fit.device_memory_gb=1",)])
def test_a_fit_on_the_gpu_learns_as_on_the_cpu(
    on_cpu: FeatureStore, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """In one epoch; the order of batches is the same, dropout is drawn by another generator."""
    losses = {}
    for device, more in (("cpu", ()), ("cuda", words)):
        changes = [f"--set={word}" for word in ("fit.epochs=1", f"fit.device={device}", *more)]
        succeed("fit", on_cpu.path, "-o", tmp_path / device, "--set=fit.fusion=[global,localized]", *changes)
        for fusion in ("global", "localized"):
            info = json.loads((tmp_path / device / f"{fusion}-seed0" / "run.json").read_text())
            losses[device, fusion] = info["history"][0]["train_loss"]
    for fusion in ("global", "localized"):
        assert losses["cuda", fusion] == pytest.approx(losses["cpu", fusion], rel=0.3)

"""What is particular to GPUs, as far as a CPU shows it: memory that runs out, half precision, batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import succeed
from diffusers import DDIMScheduler
from made_up import tiny_unet, tiny_vae
from safetensors.torch import save_file

import satdifuser.extract.batch_size as batch_size
import satdifuser.extract.compute as compute
import satdifuser.extract.job as job_module
import satdifuser.store.energy as energy
from satdifuser.errors import BackboneError, DeviceError, FeatureError, SettingsError
from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.batch_size import equal_parts, largest_fitting
from satdifuser.extract.compiled import CompiledTaps
from satdifuser.extract.compute import mend
from satdifuser.extract.cost import Reading, ShardCost
from satdifuser.extract.device import room_for
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.job import Job
from satdifuser.extract.layers import layer_table, select_layers, tapped
from satdifuser.extract.run import extract
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.extract.unet import Conditions
from satdifuser.store.device import check_dtype, device_name, is_out_of_memory
from satdifuser.store.energy import EnergyMeter, cost_text, cpu_counters, total_cost
from satdifuser.store.reader import FeatureStore
from satdifuser.store.settings import StoreSettings
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_unet().save_pretrained(root / "unet")
    tiny_vae().save_pretrained(root / "vae")
    DDIMScheduler(steps_offset=1).save_pretrained(root / "scheduler")
    save_file({"hidden_states": torch.randn(1, 1, 8)}, root / "prompt_embedding.safetensors")
    return root


def make_job(folder: Path, backbone: dict[str, Any] | None = None, **settings: Any) -> Job:
    chosen = ExtractSettings.model_validate({"batch_size": 4, "threads": 1} | settings)
    model = BackboneSettings.model_validate({"model": str(folder), "device": "cpu"} | (backbone or {}))
    source = SyntheticSettings(tiles=11, tile_size=(16, 24))
    return Job(source, model, chosen, StoreSettings(tiles_per_shard=6, encoding="float32"))


def notes(store: FeatureStore, name: str) -> list[Any]:
    return [record.get(name) for record in store.commits]


# --- batches


@pytest.mark.parametrize("most", [1, 2, 3, 6, 46, 64])
@pytest.mark.parametrize("memory", [0, 1, 2, 3, 5, 31, 32, 33, 1000])
def test_the_largest_batch_is_found_with_few_trials(memory: int, most: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= memory

    assert largest_fitting(fits, most) == min(memory, most)
    assert len(tried) <= 13
    assert len(set(tried)) == len(tried)
    assert max(tried) <= most


def test_equal_parts_cost_no_more_batches() -> None:
    for batch, shard in itertools.product(range(1, 40), range(1, 70)):
        found = equal_parts(batch, shard)
        assert found <= max(batch, found if batch > shard else batch)
        assert -(-shard // found) == -(-shard // batch)


def test_an_open_batch_is_found_by_trial_and_fixed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "default_batch", lambda *_: "auto")
    monkeypatch.setattr(batch_size, "fits_on_device", lambda work, tile_id, batch: batch <= 4)
    job = make_job(folder, batch_size="auto")
    store = extract(job, tmp_path / "s.zarr")
    assert store.attributes.feature_identity["batch_size"] == 3  # of shards of 6: two of 3, not 4 and 2
    assert notes(store, "batch_size") == [3, 3]
    monkeypatch.setattr(batch_size, "fits_on_device", lambda *_: pytest.fail("the batch is known"))
    assert extract(job, tmp_path / "s.zarr").content_digest() == store.content_digest()


def test_no_memory_for_a_single_tile_is_told_before_the_first_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "default_batch", lambda *_: "auto")
    monkeypatch.setattr(batch_size, "fits_on_device", lambda *_: False)
    message = (
        r"no memory for even one tile .* what takes less: backbone\.dtype float16 or bfloat16, a smaller"
    )
    with pytest.raises(DeviceError, match=message):
        extract(make_job(folder, batch_size="auto"), tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def limit_memory(monkeypatch: pytest.MonkeyPatch, tiles: int, fails: Callable[[int], bool]) -> None:
    """Let calls of more than some tiles run out of memory, if `fails` says so of the call's number."""
    latents, calls = FeatureExtractor.latents, itertools.count()

    def limited(self: FeatureExtractor, rgb: torch.Tensor, ids: Any) -> torch.Tensor:
        if fails(next(calls)) and len(rgb) > tiles:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return latents(self, rgb, ids)

    monkeypatch.setattr(FeatureExtractor, "latents", limited)


def test_a_batch_that_does_not_fit_is_split_and_no_tile_is_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract(make_job(folder), tmp_path / "a.zarr")
    limit_memory(monkeypatch, 1, lambda call: call == 0)
    split = extract(make_job(folder), tmp_path / "b.zarr")
    assert notes(split, "batches_split") == [1, None]
    assert verify(split, deep=True) == []
    for group, maps in whole.maps(np.arange(11)).items():
        np.testing.assert_allclose(split.maps(np.arange(11))[group], maps, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_libraries_of_a_gpu_say_in_their_own_words_that_it_has_no_memory(
    error: RuntimeError, expected: bool
) -> None:
    assert is_out_of_memory(error) is expected


def test_an_error_that_is_not_about_memory_is_not_split_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(FeatureExtractor, "latents", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        extract(make_job(folder), tmp_path / "s.zarr")


def test_room_for_tensors_is_one_piece_and_none_lies_on_another() -> None:
    tensors = {
        "a": torch.arange(5, dtype=torch.int8).view(1, 5),
        "b": torch.randn(3, 2, dtype=torch.float32),
        "c": torch.randn(7, 300, dtype=torch.float64).T,
        "d": torch.zeros(0, 4, dtype=torch.int16),
        "e": torch.tensor(3.0, dtype=torch.float16),
    }
    room = room_for(tensors, page_locked=False)
    assert len({copy.untyped_storage().data_ptr() for copy in room.values()}) == 1
    for name, tensor in tensors.items():
        room[name].copy_(tensor)
    for name, tensor in tensors.items():
        assert (room[name].dtype, room[name].shape) == (tensor.dtype, tensor.shape)
        assert room[name].is_contiguous()
        assert torch.equal(room[name], tensor)


def test_a_split_batch_keeps_the_prompt_of_each_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    conditions = compute.FeatureExtractor.features

    def watch(self: Any, latents: Any, ids: Any, metadata: Any, first: int) -> Any:
        seen.append(first)
        return conditions(self, latents, ids, metadata, first)

    monkeypatch.setattr(FeatureExtractor, "features", watch)
    limit_memory(monkeypatch, 1, lambda call: call < 3)
    extract(make_job(folder), tmp_path / "s.zarr")
    assert seen[:4] == [0, 1, 2, 0]  # 4 -> 2 + 2 -> 1 + 1 + 2, then the next batch


def test_no_memory_for_a_single_tile_later_keeps_what_is_committed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 0, lambda call: call >= 2)
    message = r"tile .* no memory for even one tile \(CUDA out of memory\): 16 x 24 px, .* end what else uses"
    with pytest.raises(DeviceError, match=message):
        extract(make_job(folder), tmp_path / "s.zarr")
    assert FeatureStore(tmp_path / "s.zarr").missing_shards() == [1]


# --- half precision


def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second tile's maps of the first layer overflow, as float16 would."""
    features = FeatureExtractor.features

    def spoil(self: FeatureExtractor, latents: Any, ids: Any, *rest: Any) -> Any:
        maps = features(self, latents, ids, *rest)
        if self.backbone.dtype != torch.float32 and len(ids) > 1:
            maps[0][1, 2] = torch.inf
        return maps

    monkeypatch.setattr(FeatureExtractor, "features", spoil)


def test_overflow_stops_and_names_layer_and_timestep(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing(monkeypatch)
    message = r"layer up_blocks\..*, timestep 161: feature of magnitude inf, .*backbone\.overflow: widen"
    with pytest.raises(FeatureError, match=message):
        extract(make_job(folder, {"dtype": "bfloat16"}), tmp_path / "s.zarr")


def test_overflow_is_computed_anew_in_float32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = extract(make_job(folder), tmp_path / "a.zarr")
    narrow = extract(make_job(folder, {"dtype": "bfloat16"}), tmp_path / "n.zarr")
    overflowing(monkeypatch)
    mended = extract(make_job(folder, {"dtype": "bfloat16", "overflow": "widen"}), tmp_path / "b.zarr")
    layer = mended.attributes.layers[0].name
    assert (
        f"layer {layer}, timestep 161: overflow in bfloat16; computed in float32" in capsys.readouterr().err
    )
    place = f"layer {layer}, timestep 161"
    assert notes(mended, "widened") == [{place: 2}, {place: 1}]  # the last batch, of one tile, is left alone
    group, position, _ = mended.layer_positions()[0]
    everything = np.arange(11)
    wide, ours, theirs = (s.maps(everything)[group][1, 2, position] for s in (exact, mended, narrow))
    np.testing.assert_allclose(ours, wide, atol=0.02)  # the weights stay those of bfloat16
    assert np.abs(theirs - ours).max() > 1e-4
    np.testing.assert_array_equal(mended.maps(everything)[group][0], narrow.maps(everything)[group][0])


def test_only_what_is_not_finite_is_taken_from_the_wide_pass() -> None:
    values, wide = torch.zeros(2, 3, 4, 5, 5), torch.ones(2, 3, 4, 5, 5)
    values[1, 2, 0, 0, 0] = torch.nan
    mended = mend(values, wide, 2)
    assert mended[1, 2].eq(1).all()
    assert mended.sum() == 4 * 5 * 5


def test_widening_leaves_the_weights_as_they_were(folder: Path) -> None:
    settings = BackboneSettings(model=str(folder), device="cpu", dtype="float16")
    backbone = load_backbone(find_backbone(settings), settings)
    before = {name: value.clone() for name, value in backbone.unet.state_dict().items()}
    run = FeatureExtractor(backbone, ExtractSettings(), backbone.info.layers((16, 24))[:1])
    with run.in_float32() as wide:
        assert next(wide.backbone.unet.parameters()).dtype == torch.float32
    for name, value in backbone.unet.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        SettingsError, match=r"^backbone\.dtype: bfloat16, but Tesla T4 does not compute it; use float16$"
    ):
        check_dtype(torch.device("cuda"), torch.bfloat16, "backbone.dtype", "use float16")
    check_dtype(torch.device("cuda"), torch.float16, "backbone.dtype", "")
    check_dtype(torch.device("cpu"), torch.bfloat16, "backbone.dtype", "")


# --- compiled


def compiled_and_plain(backend: str, images: int, rows: int) -> None:
    torch.manual_seed(0)
    unet = tiny_unet().eval().requires_grad_(False)
    table = layer_table(type(unet), unet.config, (4, 12), 2)
    layers = select_layers(table, ["up_blocks.*.attn1", "*.conv2", "mid_block.*"])
    x, t = torch.randn(rows, 4, 4, 12), torch.full((rows,), 21.0)
    conditions = Conditions(torch.randn(rows, 1, 8))
    taps = CompiledTaps(unet, layers, images, backend)
    with torch.no_grad(), tapped(unet, layers) as plain:
        expected, output = plain.features_only(x, t, conditions), plain.output(x, t, conditions)
    for found in (taps.features_only(x, t, conditions), *both(taps, x, t, conditions, output)):
        for layer, ours, theirs in zip(layers, found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=layer.name)
    taps.check(x, t, conditions)


def both(taps: CompiledTaps, x: Any, t: Any, conditions: Any, expected: torch.Tensor) -> list[Any]:
    with torch.no_grad():
        torch.testing.assert_close(taps.output(x, t, conditions), expected, atol=1e-5, rtol=1e-5)
    return [taps.features()]


def test_taps_filled_up_to_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for rows in (1, 2, 3, 8):
        compiled_and_plain("", 8, rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, within its compiler
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_tapped_layer_survives_compilation(backend: str) -> None:
    with torch.no_grad():
        compiled_and_plain(backend, 4, 3)


def test_a_compiled_layer_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(
        CompiledTaps, "_run_for_maps", lambda self, *words: [m * 2 for m in self._run_for_all(*words)[1]]
    )
    with pytest.raises(
        BackboneError, match=r"layer .* of the compiled U-Net differs by 1 of its largest value"
    ):
        compiled_and_check()


def compiled_and_check() -> None:
    torch.manual_seed(0)
    unet = tiny_unet().eval().requires_grad_(False)
    layers = layer_table(type(unet), unet.config, (4, 12), 2)[:2]
    conditions = Conditions(torch.randn(1, 1, 8))
    CompiledTaps(unet, layers, 1).check(torch.randn(1, 4, 4, 12), torch.full((1,), 21.0), conditions)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **_: refuse)
    with pytest.raises(
        BackboneError, match=r"cannot be compiled here: No working C\+\+ compiler found; install"
    ):
        compiled_and_check()


def test_no_memory_for_the_compiled_network_and_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "compile", lambda function, **_: refuse)
    with pytest.raises(
        DeviceError, match=r"in a batch of 1 \(CUDA out of memory\); set a smaller extract\.batch"
    ):
        compiled_and_check()


# --- energy


def test_the_counters_of_a_cpu(tmp_path: Path) -> None:
    for zone, range_ in (("intel-rapl:0", 1000_000), ("intel-rapl:1", 10**9), ("intel-rapl:0:0", 10**9)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text("900000")
        (tmp_path / zone / "max_energy_range_uj").write_text(str(range_))
    counters = cpu_counters(tmp_path)
    assert len(counters) == 2  # packages, not their parts
    (tmp_path / "intel-rapl:0/energy_uj").write_text("100000")  # began anew
    (tmp_path / "intel-rapl:1/energy_uj").write_text("2900000")
    assert [counter() for counter in counters] == pytest.approx([0.200001, 2.0])
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    assert cpu_counters(tmp_path) == []
    assert cpu_counters(tmp_path / "none") == []


def test_a_gpu_without_nvml_tells_nothing() -> None:
    assert EnergyMeter("no-such-gpu").joules() is None


def test_the_cost_of_a_store_is_in_its_commit_records(folder: Path, tmp_path: Path) -> None:
    store = extract(make_job(folder), tmp_path / "s.zarr")
    cost = total_cost(store.commits)
    assert cost["device_seconds"] == pytest.approx(sum(notes(store, "device_seconds")), abs=1e-3)
    assert cost["device_seconds"] > 0
    assert sum(cost["devices"].values()) == 2
    with_joules = [{"device": "x", "device_seconds": 1, "joules": 2.0}, {"device": "x", "joules": 3.0}]
    assert total_cost(with_joules)["joules"] == 5.0
    assert total_cost([*with_joules, {"device": "x"}, {}])["joules"] is None
    assert total_cost(with_joules)["device_seconds"] is None  # one shard does not tell
    assert total_cost([])["device_seconds"] is None


def test_shards_that_overlap_share_no_seconds_and_no_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([Reading(0, 0), Reading(5, 50), Reading(8, 60), Reading(12, 62)])
    monkeypatch.setattr(ShardCost, "read", lambda self: next(readings))
    backbone = SimpleNamespace(device=torch.device("cpu"))
    work: Any = SimpleNamespace(extractor=SimpleNamespace(backbone=backbone), batch_size=4)
    cost = ShardCost(work)
    cost._tells_energy = True
    begun = [Reading(1, 2), Reading(3, 40), Reading(10, 61)]  # the second before the first one ends
    found = [cost.note(each) for each in begun]
    assert [(note["seconds"], note["joules"]) for note in found] == [(4, 48), (3, 10), (2, 1)]


def test_store_info_shows_the_cost(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "cpu_counters", list)  # a machine without RAPL
    store = extract(make_job(folder), tmp_path / "s.zarr")
    cost = json.loads(succeed("store", "info", "--json", tmp_path / "s.zarr"))["cost"]
    assert cost == total_cost(store.commits)
    assert cost["device_seconds"] > 0
    assert cost["joules"] is None
    line = f"cost       {cost['device_seconds']:,.1f} device seconds on {device_name(torch.device('cpu'))}; "
    assert line + "energy not shown there" in succeed("store", "info", tmp_path / "s.zarr")
    assert cost_text(cost | {"joules": 1234.5}).endswith("; 1,234.5 J")
    assert cost_text(total_cost([{}])).startswith("not recorded of every shard")

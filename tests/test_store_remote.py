"""Stores in buckets, on web servers and in .zip files, against real servers on this machine."""

from __future__ import annotations

import json
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, refuse, succeed
from made_up import random_store
from made_up_store import flip

from satdifuser.errors import StoreError, UnreachableError
from satdifuser.store import remote
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.schema import LayerInfo
from satdifuser.store.verify import verify

moto_server = pytest.importorskip("moto.server", reason="needs moto, flask, flask-cors")
pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

LAYERS = [LayerInfo(name=f"up.{i}.attn1", channels=3, stride=4, height=4, width=4) for i in range(2)]
TILES = 7


class Proxy:
    """Passes requests on to a server, counts them, and lets the next ones fail as told."""

    def __init__(self, port: int) -> None:
        self.behind, self.keys = port, []  # type: tuple[int, list[str]]
        self.faults: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def handle_all(self) -> None:
                proxy.keys.append(f"{self.command} {self.path.split('?')[0]}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.faults.pop(0) if proxy.faults and self.command == "GET" else ""
                if fault == "500":
                    self.send_error(500)
                    return
                if fault == "late":
                    time.sleep(1)
                connection = HTTPConnection("127.0.0.1", proxy.behind)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if fault == "cut":
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_all  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def data_requests(self) -> list[str]:
        return [key for key in self.keys if "/features/" in key or "/tiles/" in key]


@pytest.fixture(scope="module")
def s3() -> Iterator[int]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxy(s3: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An empty bucket behind a proxy, and an empty cache."""
    found = Proxy(s3)
    for name, value in {
        "AWS_ENDPOINT_URL": found.url,
        "AWS_ACCESS_KEY_ID": "made",
        "AWS_SECRET_ACCESS_KEY": "up",
        "AWS_REGION": "us-east-1",
        "SATDIFUSER_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    connection = HTTPConnection("127.0.0.1", s3)
    connection.request("POST", "/moto-api/reset")
    assert connection.getresponse().read()
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def local(tmp_path: Path) -> FeatureStore:
    return random_store(tmp_path / "local.zarr", LAYERS, TILES, "int8")


def assert_same_batches(one: FeatureStore, other: FeatureStore) -> None:
    pairs = zip(one.batches(batch_size=3, seed=1), other.batches(batch_size=3, seed=1), strict=True)
    for ours, theirs in pairs:
        assert ours.tile_ids == theirs.tile_ids
        for group in theirs.features:
            np.testing.assert_array_equal(ours.features[group], theirs.features[group])
        np.testing.assert_array_equal(ours.targets, theirs.targets)


def test_up_and_down(proxy: Proxy, local: FeatureStore, tmp_path: Path) -> None:
    address = "s3://bucket/some/x.zarr"
    assert address in succeed("store", "copy", local.path, "-o", address)
    assert address in succeed("store", "info", address)
    assert "every byte checked" in succeed("store", "verify", "--deep", address + "/")
    assert_same_batches(open_store(address), local)
    succeed("store", "copy", address, "-o", tmp_path / "back.zarr", "--splits", "train,val")
    succeed("store", "copy", address, "-o", tmp_path / "all.zarr")
    assert open_store(tmp_path / "all.zarr").content_digest() == local.content_digest()
    assert not [key for key in remote.Bucket(address).all_sizes() if "upload" in key]
    assert open_store(address).to_xarray()["features/stride_04"].sizes["tile"] == TILES


def test_a_warm_cache_asks_for_no_data(proxy: Proxy, local: FeatureStore) -> None:
    remote.upload(local, "s3://bucket/x.zarr")
    list(open_store("s3://bucket/x.zarr").batches())
    assert proxy.data_requests()
    proxy.keys.clear()
    assert_same_batches(open_store("s3://bucket/x.zarr"), local)
    assert proxy.data_requests() == []
    assert [key for key in proxy.keys if key.endswith("x.zarr/zarr.json")]


def test_only_what_is_asked_for_is_fetched(proxy: Proxy, local: FeatureStore) -> None:
    remote.upload(local, "s3://bucket/x.zarr")
    proxy.keys.clear()
    store = open_store("s3://bucket/x.zarr")
    list(store.batches(timesteps=[21]))
    values = [key for key in proxy.data_requests() if "/values/c/" in key]
    assert len(values) == store.attributes.shards  # one timestep of three
    assert all("/1/0/0/0/0" in key for key in values)


def test_another_store_in_its_place_is_noticed(proxy: Proxy, local: FeatureStore, tmp_path: Path) -> None:
    other = random_store(tmp_path / "other.zarr", LAYERS, TILES, "int8", first=50)
    remote.upload(local, "s3://bucket/x.zarr")
    list(open_store("s3://bucket/x.zarr").batches())
    assert "holds something else" in refuse("store", "copy", other.path, "-o", "s3://bucket/x.zarr")
    succeed("store", "copy", other.path, "-o", "s3://bucket/x.zarr", "--overwrite")
    assert_same_batches(open_store("s3://bucket/x.zarr"), other)


def test_altered_and_missing_files_are_refused(proxy: Proxy, local: FeatureStore) -> None:
    remote.upload(local, "s3://bucket/x.zarr")
    bucket = remote.Bucket("s3://bucket/x.zarr")
    key = next(key for key in bucket.all_sizes() if "/values/c/1/" in key)
    whole = b"".join(bucket.read(key))
    bucket.write(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=rf"s3://bucket/x.zarr: {key} is not what the store recorded"):
        list(open_store("s3://bucket/x.zarr").batches())
    assert "shard 1: " in (found := call("store", "verify", "--deep", "s3://bucket/x.zarr")).stdout
    assert found.exit_code == 1
    bucket.write(key, whole + b"more")
    with pytest.raises(StoreError, match="more than"):
        list(open_store("s3://bucket/x.zarr").batches())
    assert f"{key} has " in call("store", "verify", "s3://bucket/x.zarr").stdout
    bucket.delete([key])
    with pytest.raises(StoreError, match=rf"x\.zarr: {key} is missing"):
        list(open_store("s3://bucket/x.zarr").batches())
    assert f"{key} is missing" in call("store", "verify", "s3://bucket/x.zarr").stdout
    assert "only a store in a local folder can be repaired" in refuse("store", "repair", "s3://bucket/x.zarr")


@pytest.mark.parametrize("fault", ["500", "cut", "late"])
def test_faults_on_the_way_are_tried_again(proxy: Proxy, local: FeatureStore, fault: str) -> None:
    remote.upload(local, "s3://bucket/x.zarr")
    proxy.faults = [fault, "", fault]
    store = open_store("s3://bucket/x.zarr")
    proxy.faults = [fault, fault, "", fault]
    assert_same_batches(store, local)
    assert not proxy.faults


def test_a_server_that_stays_away_is_a_clear_error(
    proxy: Proxy, local: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.upload(local, "s3://bucket/x.zarr")
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 1})
    proxy.faults = ["500"] * 100
    told = refuse("store", "info", "s3://bucket/x.zarr")
    assert told.startswith("error: s3://bucket/x.zarr: zarr.json cannot be reached (")
    assert "then run the same command again" in told
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in refuse("store", "info", "s3://bucket/x.zarr")


def test_a_record_that_cannot_be_fetched_is_no_damage(
    proxy: Proxy, local: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.upload(local, "s3://bucket/x.zarr")
    store = open_store("s3://bucket/x.zarr")
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})
    get = remote.Bucket.read

    def forbid(self: Any, key: str) -> Any:
        with self._explained(key):
            if key == "commits/c/1":
                raise PermissionError("403 Forbidden")
        return get(self, key)

    monkeypatch.setattr(remote.Bucket, "read", forbid)
    with pytest.raises(UnreachableError, match="commits/c/1 cannot be reached"):
        verify(store)


def test_no_store_there(proxy: Proxy, tmp_path: Path) -> None:
    assert "s3://bucket/none.zarr: zarr.json is missing; no store is there" in refuse(
        "store", "info", "s3://bucket/none.zarr"
    )
    remote.Bucket("s3://bucket/text").write("zarr.json", b"[1]")
    assert "not a feature store" in refuse("store", "info", "s3://bucket/text")
    assert "got '..' in an address" in refuse("store", "info", "s3://bucket/../../x.zarr")


def test_an_interrupted_upload_is_no_store_and_goes_on(
    proxy: Proxy, local: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, done = remote.Bucket.write, []

    def interrupt(self: remote.Bucket, key: str, source: Any) -> None:
        done.append(key)
        if len(done) > 20:
            raise KeyboardInterrupt
        write(self, key, source)

    with monkeypatch.context() as patch:
        patch.setattr(remote.Bucket, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remote.upload(local, "s3://bucket/x.zarr")
    assert "no store is there" in refuse("store", "info", "s3://bucket/x.zarr")
    other = random_store(tmp_path / "other.zarr", LAYERS, TILES, "int8", first=50)
    assert "holds something else" in refuse("store", "copy", other.path, "-o", "s3://bucket/x.zarr")
    proxy.keys.clear()
    succeed("store", "copy", local.path, "-o", "s3://bucket/x.zarr")
    again = {key.removeprefix("PUT /bucket/x.zarr/") for key in proxy.keys if key.startswith("PUT")}
    assert again.isdisjoint(set(done[1:20]))
    assert_same_batches(open_store("s3://bucket/x.zarr"), local)


def test_only_whole_sound_stores_go_up(proxy: Proxy, local: FeatureStore) -> None:
    told = refuse("store", "copy", local.path, "-o", "s3://bucket/x.zarr", "--splits", "train")
    assert "only a whole local store goes to an address; copy to a folder" in told
    assert "web servers are read only" in refuse(
        "store", "copy", local.path, "-o", "http://127.0.0.1:9/x.zarr"
    )
    path = next(path for path in local.folder.glob("features/*/values/c/0/0/**/0") if path.is_file())
    whole = bytearray(path.read_bytes())
    whole[3] ^= 1
    path.write_bytes(whole)
    assert "was altered (its digest differs)" in refuse(
        "store", "copy", local.path, "-o", "s3://bucket/x.zarr"
    )


def test_a_web_server(proxy: Proxy, local: FeatureStore, tmp_path: Path) -> None:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/local.zarr"
    assert "all files are there" in succeed("store", "verify", address)  # nothing is cached yet
    assert_same_batches(open_store(address), local)
    assert verify(open_store(address), deep=True) == []
    next((tmp_path / "cache").rglob("commits/c")).joinpath("0.1a.partial").touch()  # of a fetch cut off
    (local.folder / "README.md").write_text("edited")
    assert succeed("store", "info", "--card", address) == "edited"
    assert verify(open_store(address), deep=True) == []
    colour = local.folder / "tiles/colour/c/0/0"
    flip(colour, 5)
    told = call("store", "verify", "--deep", address)
    assert (told.exit_code, "tiles/colour/c/0/0 was altered" in told.stdout) == (1, True)
    assert "to mend: put the store there anew" in told.stderr
    colour.unlink()
    assert verify(open_store(address)) == ["shard 0: tiles/colour/c/0/0 is missing"]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(StoreError, match="tiles/colour/c/0/0 is missing"):
        open_store(address).colour(np.array([0]))
    server.shutdown()
    server.server_close()


def zip_folder(folder: Path, out: Path, top: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, top + path.relative_to(folder).as_posix())
    return out


@pytest.mark.parametrize("top", ["", "local.zarr/"])
def test_a_zip_file(proxy: Proxy, local: FeatureStore, tmp_path: Path, top: str) -> None:
    path = zip_folder(local.folder, tmp_path / "x.ZIP", top)
    assert "all files are there" in succeed("store", "verify", path)  # nothing is cached yet
    assert str(path) in succeed("store", "info", path)
    assert "every byte checked" in succeed("store", "verify", "--deep", path)
    assert_same_batches(open_store(path), local)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_zip_files(proxy: Proxy, local: FeatureStore, tmp_path: Path, method: int) -> None:
    path = zip_folder(local.folder, tmp_path / "x.zip", method=method)
    with zipfile.ZipFile(path) as archive:
        begins = archive.getinfo("tiles/tile_id/zarr.json").header_offset
    for byte in range(begins + 60, begins + 120):
        flip(path, byte)
    assert "tiles/tile_id/zarr.json cannot be read" in refuse("store", "info", path)


def test_hostile_zip_files(proxy: Proxy, local: FeatureStore, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zarr.json", b" " * (remote.MAX_METADATA_BYTES * 4))
    assert f"zarr.json is more than {remote.MAX_METADATA_BYTES} bytes" in refuse("store", "info", bomb)
    document = json.loads((local.folder / "zarr.json").read_text())
    document["attributes"]["sha256"]["../../out/zarr.json"] = "0" * 64
    (local.folder / "zarr.json").write_text(json.dumps(document))
    path = zip_folder(local.folder, tmp_path / "x.zip")
    assert "names a file outside of the store: '../../out/zarr.json'" in refuse("store", "info", path)
    (tmp_path / "text.zip").write_text("none")
    assert "not a readable .zip file" in refuse("store", "info", tmp_path / "text.zip")

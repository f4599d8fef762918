"""Stores and label sets at URLs: fsspec's memory file system, and a local server that speaks S3."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from embodied.contracts.errors import LabelError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets import location as place
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.labels import LabelWriter
from embodied.datasets.location import cache_folder, is_remote, local_copy, location
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

SPEC = DatasetSpec({"x": ArraySpec((2,))}, {"side": ArraySpec((8, 8, 3), "uint8")}, ActionSpec((1,)))
PROVENANCE = {"config": {"seed": 0}, "inputs": {}, "date": "fixed"}
EPISODES, ROWS = 4, 9
NAME = "observation/images/side"


def make_episode(index: int) -> Episode:
    rng = np.random.default_rng(index)
    step_valid, terminated, truncated = end_flags(ROWS - 1, ROWS, terminated=True)
    images: dict[str, Any] = {"side": rng.integers(0, 255, (ROWS, 8, 8, 3), dtype=np.uint8)} if index != 1 else {}
    action = padded_last(np.ones((ROWS - 1, 1), np.float32), ROWS)
    states = {"x": rng.normal(size=(ROWS, 2)).astype(np.float32)}
    return Episode(states, images, action, step_valid, terminated, truncated, np.arange(ROWS) * 0.1)


def write(url: str | Path) -> EpisodeStore:
    writer = StoreWriter(url, SPEC, PROVENANCE)
    for index in range(EPISODES):
        if not writer.has(index):
            writer.write_episode(index, make_episode(index))
    return writer.finish(EPISODES)


def tree(url: str) -> dict[str, str]:
    """Every file under a URL or folder with the hash of its bytes."""
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    names = filesystem.find(path)
    return {name[len(path) :]: hashlib.sha256(filesystem.cat_file(name)).hexdigest() for name in names}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBODIED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    name = f"s3://b{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return name


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/s"
    return f"{request.getfixturevalue('bucket')}/folder/s"


def provenance(store: EpisodeStore, **changes: Any) -> dict[str, Any]:
    known = {"labeller": "clip", "config": {"goal": "x"}, "code_version": "1"}
    return known | {"dataset_fingerprint": store.fingerprint} | changes


def label(store: EpisodeStore, name: str = "clip") -> np.ndarray:
    writer = LabelWriter(store, name, provenance(store), block=10)
    for index, start, stop in writer.blocks():
        writer.write_block(index, np.arange(start, stop) * 0.5)
    return writer.finish().score


def test_urls_and_paths_are_told_apart() -> None:
    assert location(Path("s3://bucket/x")) == "s3://bucket/x"
    assert location("file:///tmp/x") == location(Path("file:///tmp/x")) == "/tmp/x"
    assert is_remote("s3:/bucket/x")
    assert not is_remote("file:///tmp/x")
    assert not is_remote("a/b")


def test_a_remote_store_is_the_local_one_byte_for_byte(url: str, tmp_path: Path, cache: Path) -> None:
    local, remote = write(tmp_path / "s"), write(url)
    assert tree(url) == tree(str(tmp_path / "s"))
    assert remote.path == url
    assert list(cache.iterdir()) == []
    whole = local.frames("side")
    np.testing.assert_array_equal(remote.frames("side"), whole)
    np.testing.assert_array_equal(remote.frames("side", 5, 30), whole[5:30])
    rows = np.array([35, 0, 12, 12, 20, 3, 10])  # 10 and 12: the episode without pictures
    np.testing.assert_array_equal(remote.read_rows(NAME, rows), whole[rows])
    np.testing.assert_array_equal(remote.read_rows("observation/x", rows), local.read("observation/x")[rows])
    assert remote.has_camera("side").tolist() == [True, False, True, True]
    np.testing.assert_array_equal(np.asarray(remote.episode(2).images["side"]), make_episode(2).images["side"])
    assert remote.fingerprint == local.fingerprint


def test_an_existing_store_is_refused(url: str) -> None:
    write(url)
    before = tree(url)
    with pytest.raises(StoreError, match="exists already"):
        write(url)
    with pytest.raises(StoreError, match="exists already"):
        StoreWriter(url, SPEC, {"config": {"seed": 1}, "inputs": {}})
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{path}-other/notes.txt", b"mine")
    with pytest.raises(StoreError, match="exists already"):
        StoreWriter(f"{url}-other", SPEC, PROVENANCE)
    assert tree(url) == before


@pytest.mark.parametrize("sent", [0, 3, 100], ids=["before the first file", "between files", "before the claim goes"])
def test_a_killed_upload_goes_on_and_ends_identical(
    url: str, sent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    write(tmp_path / "s")
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    real_put, real_rm = filesystem.put, filesystem.rm_file  # one instance per process and thread, as in the code
    puts: list[list[str]] = []

    def put(names: list[str], targets: list[str]) -> None:
        if len(puts) == sent:
            raise KeyboardInterrupt
        puts.append(names)
        real_put(names, targets)

    def rm_file(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "BATCH", 2)
    monkeypatch.setattr(filesystem, "put", put)
    monkeypatch.setattr(filesystem, "rm_file", rm_file)
    with pytest.raises(KeyboardInterrupt):
        write(url)
    assert filesystem.exists(f"{path}/zarr.json") == (sent == 100)
    if sent < 100:
        with pytest.raises(StoreError):
            EpisodeStore(url)
    with pytest.raises(StoreError, match="unfinished store of another configuration"):
        StoreWriter(url, SPEC, {"config": {"seed": 1}, "inputs": {}})
    monkeypatch.setattr(filesystem, "rm_file", real_rm)
    again: list[list[str]] = []
    monkeypatch.setattr(filesystem, "put", lambda names, targets: (again.append(names), real_put(names, targets)))
    write(url)
    assert not {name for names in puts for name in names} & {name for names in again for name in names}
    assert tree(url) == tree(str(tmp_path / "s"))
    assert list(cache.iterdir()) == []


def test_what_another_content_left_is_removed(url: str, tmp_path: Path) -> None:
    """The same job by another version of the code: the claim's digest differs, so nothing of it is kept."""
    write(tmp_path / "s")
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    writer = StoreWriter(url, SPEC, PROVENANCE)
    upload: Any = writer._upload
    upload._write_claim(filesystem, path, "0" * 64)
    filesystem.pipe_file(f"{path}/action/c/0/0", b"old")
    filesystem.pipe_file(f"{path}/odd/zarr.json", b"{}")
    write(url)
    assert tree(url) == tree(str(tmp_path / "s"))


def test_abandoning_leaves_nothing(url: str, cache: Path) -> None:
    writer = StoreWriter(url, SPEC, PROVENANCE)
    writer.write_episode(0, make_episode(0))
    writer.abandon()
    assert tree(url) == {}
    assert list(cache.iterdir()) == []


CHILD = textwrap.dedent(
    """
    import sys, time
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("t", {test!r}); t = module_from_spec(spec); spec.loader.exec_module(t)
    import s3fs
    t.place.BATCH = 2
    real = s3fs.S3FileSystem.put
    count = 0
    def put(self, *args, **options):
        global count
        count += 1
        if count == 3:
            print("ready", flush=True)
            time.sleep(60)
        real(self, *args, **options)
    s3fs.S3FileSystem.put = put
    t.write({url!r})
    """
)


def test_kill_minus_nine_while_uploading(bucket: str, tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "s")
    url = f"{bucket}/s"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(test=__file__, url=url)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with pytest.raises(StoreError):
        EpisodeStore(url)
    write(url)
    assert tree(url) == tree(str(tmp_path / "s"))
    assert list(cache.iterdir()) == []


def test_labels(url: str, cache: Path) -> None:
    store = write(url)
    np.testing.assert_array_equal(label(store), np.arange(EPISODES * ROWS) * 0.5)
    assert EpisodeStore(url).label_names() == store.label_names() == ["clip"]
    assert list(cache.iterdir()) == []
    with pytest.raises(LabelError, match="has a label set 'clip' already"):
        LabelWriter(store, "clip", provenance(store))


def test_a_killed_label_upload_is_no_label_set_and_goes_on(
    url: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    store = write(url)
    label(store, "whole")
    filesystem, _ = fsspec.core.url_to_fs(url, use_listings_cache=False)
    real = filesystem.pipe_file

    def pipe_file(path: str, value: bytes) -> None:
        if path.endswith("clip/zarr.json"):
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(filesystem, "pipe_file", pipe_file)
    with pytest.raises(KeyboardInterrupt):
        label(store, "clip")
    assert store.label_names() == ["whole"]
    monkeypatch.setattr(filesystem, "pipe_file", real)
    label(store, "clip")
    assert tree(f"{url}/labels/clip") == tree(f"{url}/labels/whole")
    assert list(cache.iterdir()) == []


def test_a_shard_that_is_gone_or_cut_off_is_said(url: str) -> None:
    store = write(url)
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    (shard,) = filesystem.find(f"{path}/{NAME}/c")
    content = filesystem.cat_file(shard)
    store.frames("side", 0, 1)  # the index is known; what it points to is cut off
    filesystem.pipe_file(shard, content[:200])
    with pytest.raises(StoreError, match="damaged"):
        store.frames("side")
    with pytest.raises(StoreError, match="damaged"):
        EpisodeStore(url).frames("side")
    filesystem.rm_file(shard)
    with pytest.raises(StoreError, match="are gone"):
        EpisodeStore(url).frames("side")


def test_threads_and_a_forked_child_read_the_same(bucket: str) -> None:
    store = write(f"{bucket}/s")
    want = store.read_rows(NAME, np.arange(36))
    found: list[bool] = []

    def read() -> None:
        found.extend(bool((store.read_rows(NAME, np.arange(36)) == want).all()) for _ in range(5))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if (store.read_rows(NAME, np.arange(36)) == want).all() else 3)
    )
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_what_cannot_be_reached_is_said_in_a_line_or_two(
    endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/s"):
        EpisodeStore("s3://no-such-bucket/s")
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/s.*bucket"):
        StoreWriter("s3://no-such-bucket/s", SPEC, PROVENANCE)
    with pytest.raises(StoreError, match="nosuch"):
        StoreWriter("nosuch://bucket/s", SPEC, PROVENANCE)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StoreError, match=r"No permission for s3://.*\n.*AWS_ACCESS_KEY_ID") as caught:
        StoreWriter(f"{bucket}/t", SPEC, PROVENANCE)
    assert len(str(caught.value).splitlines()) <= 3
    fsspec.filesystem("s3").clear_instance_cache()


def test_local_copy(url: str, tmp_path: Path, cache: Path) -> None:
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{path}/a/one.bin", b"1")
    filesystem.pipe_file(f"{path}/two.bin", b"22")
    with local_copy(url) as folder:
        assert folder.name == "s"
        assert tree(str(folder)) == tree(url)
        assert cache_folder() in folder.parents
    with local_copy(f"{url}/two.bin") as file:
        assert (file.name, file.read_bytes()) == ("two.bin", b"22")
    assert list(cache.iterdir()) == []
    with pytest.raises(StoreError, match="absent"), local_copy(f"{url}/absent"):
        pass
    with local_copy(tmp_path) as same:
        assert same == tmp_path


def test_a_name_that_leads_outside_is_refused(bucket: str, cache: Path) -> None:
    filesystem = fsspec.filesystem("s3", use_listings_cache=False)
    filesystem.pipe_file(f"{bucket[5:]}/d/../../../escaped", b"x")
    with pytest.raises(StoreError, match="leads outside"), local_copy(f"{bucket}/d"):
        pass
    assert list(cache.iterdir()) == []

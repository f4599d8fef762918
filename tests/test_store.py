import multiprocessing
import operator
import os
import shutil
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from embodied.contracts.errors import InputError, LabelError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets import write_arrays
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

SPEC = DatasetSpec(
    observations={"joint_position": ArraySpec((3,))},
    images={"wrist": ArraySpec((8, 8, 3), "uint8"), "side": ArraySpec((8, 8, 3), "uint8")},
    action=ActionSpec((2,)),
)
SIDE = "observation/images/side"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EpisodeStore:
    writer = StoreWriter(tmp_path_factory.mktemp("store") / "s", SPEC, {"config": {}, "inputs": {}})
    rng = np.random.default_rng(0)
    for index in range(4):
        rows = 40
        step_valid, terminated, truncated = end_flags(39, rows, terminated=False)
        writer.write_episode(
            index,
            Episode(
                observations={"joint_position": rng.normal(size=(rows, 3)).astype(np.float32)},
                images={c: rng.integers(0, 255, (rows, 8, 8, 3), dtype=np.uint8) for c in ("wrist", "side")},
                action=padded_last(np.ones((39, 2), np.float32), rows),
                step_valid=step_valid,
                terminated=terminated,
                truncated=truncated,
                timestamp=np.arange(rows) * 0.05,
            ),
        )
    return writer.finish(4)


def test_frames_and_rows_agree_with_the_whole(store):
    whole = store.frames("wrist")
    assert whole.shape == (160, 8, 8, 3)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(store.frames("wrist", 37, 83), whole[37:83])
    rows = np.array([159, 0, 3, 3, 81, 80, 0])
    np.testing.assert_array_equal(store.read_rows("observation/images/wrist", rows), whole[rows])
    assert store.read_rows("action", np.array([], int)).shape == (0, 2)


def test_rows_out_of_range_are_refused(store):
    with pytest.raises(InputError, match="rows 0 to 159; asked for -1 to 5"):
        store.read_rows("action", np.array([-1, 5]))


def test_unknown_names_are_answered_with_the_list(store):
    with pytest.raises(InputError, match=r"no camera 'wrst'. Did you mean 'wrist'\? Valid: side, wrist"):
        store.frames("wrst")
    with pytest.raises(InputError, match="Did you mean 'observation/joint_position'"):
        store.array("observation/joint_positions")
    with pytest.raises(InputError, match="no array 'reward'"):
        store.read("reward")
    with pytest.raises(LabelError, match=r"no label set 'clip'. Valid: \(none\)"):
        store.label("clip")
    with pytest.raises(InputError, match="episodes 0 to 3; asked for 4"):
        store.episode(4)


def test_any_zarr_reader_opens_it(store):
    group: Any = zarr.open_group(store.path, mode="r")
    assert group["observation/images/side"].shape == (160, 8, 8, 3)
    assert group["episode/start"][:].tolist() == [0, 40, 80, 120]
    assert group.attrs["embodied_schema"] == 1


def test_missing_path_file_and_foreign_folder_are_refused(tmp_path):
    with pytest.raises(StoreError, match="absent does not exist"):
        EpisodeStore(tmp_path / "absent")
    (tmp_path / "file.hdf5").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"is a file.*\n.*embodied data import"):
        EpisodeStore(tmp_path / "file.hdf5")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="holds no Zarr v3 group"):
        EpisodeStore(tmp_path / "folder")
    zarr.open_group(tmp_path / "foreign", mode="w")
    with pytest.raises(StoreError, match="not an EpisodeStore"):
        EpisodeStore(tmp_path / "foreign")


def test_unknown_protocol_and_missing_file_system_are_said(monkeypatch):
    with pytest.raises(StoreError, match="nosuch://bucket/s"):
        EpisodeStore("nosuch://bucket/s")

    def missing(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(zarr, "open_group", missing)
    with pytest.raises(StoreError, match="Install s3fs"):
        EpisodeStore("s3://bucket/s")


def test_another_schema_version_is_refused(store, tmp_path):
    attributes = dict(zarr.open_group(store.path, mode="r").attrs)
    zarr.open_group(tmp_path / "new", mode="w").attrs.update(attributes | {"embodied_schema": 99})
    with pytest.raises(StoreError, match="schema version 99; this program reads version 1"):
        EpisodeStore(tmp_path / "new")


def test_fsspec_url_reads_the_same(store):
    remote = EpisodeStore(f"file://{store.path}")
    assert remote.fingerprint == store.fingerprint
    np.testing.assert_array_equal(remote.frames("side", 5, 9), store.frames("side", 5, 9))
    assert remote.label_names() == []


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EpisodeStore:
    """60 frames in chunks of 2 and shards of 8; episode 1, frames 20 to 39, has no pictures."""
    monkeypatch.setattr(write_arrays, "PICTURE_CHUNK_BYTES", 2 * 192)
    monkeypatch.setattr(write_arrays, "SHARD_BYTES", 8 * 192)
    writer = StoreWriter(tmp_path / "s", DatasetSpec({}, {"side": ArraySpec((8, 8, 3), "uint8")}, None), {})
    flags = np.zeros(20, bool)
    for index in range(3):
        pictures = np.random.default_rng(index).integers(1, 255, (20, 8, 8, 3), dtype=np.uint8)
        images: dict[str, Any] = {} if index == 1 else {"side": pictures}
        writer.write_episode(index, Episode({}, images, None, flags, flags, flags, np.arange(20) * 0.1))
    return writer.finish(3)


def pictures_of(store: EpisodeStore) -> np.ndarray:
    """All of them, read by Zarr itself."""
    group: Any = zarr.open_group(store.path, mode="r")
    return np.asarray(group[SIDE])


def test_rows_of_many_shards_are_those_that_zarr_reads(sharded):
    whole = pictures_of(sharded)
    assert not whole[20:40].any()
    assert whole[:20].any(axis=(1, 2, 3)).all()
    rng = np.random.default_rng(0)
    for count in (1, 7, 200):
        rows = rng.integers(0, 60, count)
        np.testing.assert_array_equal(sharded.read_rows(SIDE, rows), whole[rows])
        out = np.full((count, 8, 8, 3), 9, np.uint8)
        assert sharded.read_rows(SIDE, rows, out) is out
        np.testing.assert_array_equal(out, whole[rows])
    for start, stop in ((0, 60), (3, 4), (5, 47), (17, 17), (-3, None)):
        np.testing.assert_array_equal(sharded.frames("side", start, stop), whole[start:stop])
    assert sorted(p.name for p in (Path(sharded.path) / SIDE / "c").iterdir()) == list("012567"), (
        "3 and 4 are all missing"
    )
    with pytest.raises(InputError, match=r"out is float32 \(2, 8, 8, 3\); it must be uint8 \(1, 8, 8, 3\)"):
        sharded.read_rows(SIDE, np.array([0]), np.zeros((2, 8, 8, 3), np.float32))


def test_the_cache_of_indexes_is_bounded(sharded):
    sharded.array(SIDE)
    reader = sharded._arrays[SIDE][1]
    reader._most_indexes = 2
    for start in range(0, 60, 8):
        sharded.frames("side", start, start + 8)
        assert len(reader._indexes) <= 2
    np.testing.assert_array_equal(sharded.frames("side"), pictures_of(sharded))


def test_threads_forked_and_spawned_processes_read_the_same(sharded):
    whole, found = pictures_of(sharded), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            rows = rng.integers(0, 60, 16)
            found.append((sharded.read_rows(SIDE, rows) == whole[rows]).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if (sharded.frames("side") == whole).all() else 3)
    )
    child.start()  # while the threads read
    for thread in threads:
        thread.join()
    child.join(30)
    assert child.exitcode == 0
    assert len(found) == 200
    assert all(found)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # says so when its process dies
        spawned = pool.submit(operator.methodcaller("frames", "side"), sharded)
        np.testing.assert_array_equal(spawned.result(60), whole)


def index_with(change) -> Any:
    """Damage the first entry of a shard's index and make its checksum right again."""

    def damage(content: bytearray) -> bytearray:
        entries = np.frombuffer(bytes(content[-68:-4]), "<u8").reshape(4, 2).copy()
        change(entries)
        tail = entries.tobytes()
        return content[:-68] + tail + google_crc32c.value(tail).to_bytes(4, "little")

    return damage


def flip(content: bytearray, at: int) -> bytearray:
    content[at] ^= 0x55
    return content


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: flip(content, -30), "index of a shard is damaged"),
        (lambda content: flip(content, -2), "index of a shard is damaged"),
        (lambda content: content[:40], "cut off"),
        (lambda content: content[:0], "cut off"),
        (lambda content: content[: len(content) // 2], "damaged"),
        (index_with(lambda entries: entries.__setitem__((0, 1), 2**62)), "points outside it"),
        (index_with(lambda entries: entries.__setitem__((0, 0), 2**63)), "points outside it"),
        (index_with(lambda entries: entries.__setitem__((0, 1), 5)), "cut off"),
        (index_with(lambda entries: entries.__setitem__((0, 1), 40)), "a chunk says"),
        (lambda content: flip(content, 4), "a chunk says that it holds"),
        (lambda content: flip(content, 12), "a chunk says that it holds"),
        (lambda content: None, "No such file"),
    ],
)
def test_a_damaged_shard_is_said(sharded, damage, message):
    whole = pictures_of(sharded)
    file = Path(sharded.path) / SIDE / "c" / "1" / "0" / "0" / "0"
    if (content := damage(bytearray(file.read_bytes()))) is None:
        file.unlink()
    else:
        file.write_bytes(content)
    store = EpisodeStore(sharded.path)
    np.testing.assert_array_equal(store.frames("side", 0, 8), whole[:8])
    with pytest.raises(StoreError, match=rf"cannot read '{SIDE}' .*{message}.*\n.*make it again"):
        store.read_rows(SIDE, np.array([3, 9]))


def test_shards_that_are_gone_are_noticed_when_the_camera_is_first_read(sharded):
    shutil.rmtree(Path(sharded.path) / SIDE / "c" / "1")
    with pytest.raises(StoreError, match="chunks of 'observation/images/side' are gone"):
        EpisodeStore(sharded.path).frames("side", 0, 1)


def test_the_codec_follows_the_pictures():
    """The first that stays below 1.28 times gzip: noise needs its bits shuffled, repetition long matches."""
    rng = np.random.default_rng(0)
    noise = np.clip(rng.normal(120, 3, (2, 64, 64, 3)), 0, 255).astype(np.uint8)
    pattern = np.tile(rng.integers(0, 255, (2, 1, 64, 3), dtype=np.uint8), (1, 64, 1, 1))
    for pictures, name in ((noise, "lz4"), (pattern, "lz4hc")):
        codec = write_arrays.choose_codec(pictures)
        assert codec[0] == name
        gzip = sum(len(zlib.compress(p.tobytes(), 4)) for p in pictures)
        assert sum(len(write_arrays.compress(p, codec)) for p in pictures) <= 1.28 * gzip


@pytest.mark.parametrize("name", ["s", "h", "n", "episode", "labels"])
def test_a_relative_path_that_ends_the_name_of_an_array_is_a_path(store, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    writer = StoreWriter(name, SPEC, {})
    writer.write_episode(0, store.episode(0))
    copy = writer.finish(1)
    assert copy.success.shape == copy.episode_length.shape == (1,)
    np.testing.assert_array_equal(EpisodeStore(name).frames("wrist"), store.episode(0).images["wrist"])

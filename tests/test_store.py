from typing import Any

import numpy as np
import pytest
import zarr

from embodied.contracts.errors import InputError, LabelError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

SPEC = DatasetSpec(
    observations={"joint_position": ArraySpec((3,))},
    images={"wrist": ArraySpec((8, 8, 3), "uint8"), "side": ArraySpec((8, 8, 3), "uint8")},
    action=ActionSpec((2,)),
)


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

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embodied.datasets.exporter import export_dataset
from embodied.datasets.importer import import_dataset

sys.path.insert(0, str(Path(__file__).parent))
from export_stores import assert_same_episodes, make_spec, make_store, opened

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def left_out(result):
    return [left["what"] for left in result["left_out"]]


def test_the_layout_is_robomimics(tmp_path):
    store = make_store(tmp_path / "store")
    export_dataset(store.path, tmp_path / "out.hdf5", "robomimic", {"compress": "gzip"})
    with opened(tmp_path / "out.hdf5") as file:
        data = file["data"]
        assert data.attrs["total"] == 15
        env_args = json.loads(data.attrs["env_args"])
        assert env_args == {"env_name": "made/Up", "type": 2, "env_kwargs": {"control_freq": 10}}
        demo = file["data/demo_1"]
        assert dict(demo.attrs) == {"num_samples": 3, "success": False, "instruction": "open the drawer"}
        assert file["data/demo_0/dones"][:].tolist() == [0, 0, 0, 0, 1]
        assert demo["dones"][:].tolist() == [0, 0, 0]
        assert demo["obs/front"].shape == (3, 32, 32, 3)
        assert demo["obs/front"].chunks == (1, 32, 32, 3)
        assert demo["next_obs/front"].compression == "gzip"
        episode = store.episode(1)
        np.testing.assert_array_equal(demo["next_obs/front"], np.asarray(episode.images["front"])[1:])
        np.testing.assert_array_equal(demo["next_obs/gripper"], episode.observations["gripper"][1:])
        assert list(demo["obs"]) == ["joint_position", "gripper", "info_qpos", "front", "wrist"]


@pytest.mark.parametrize("final", [True, False])
def test_import_gives_every_array_back(tmp_path, final):
    episodes = ((5, final, True), (3, final, False), (4, final, True))
    store = make_store(tmp_path / "store", episodes=episodes)
    result = export_dataset(store.path, tmp_path / "1" / "r.hdf5", "robomimic")
    first = import_dataset(tmp_path / "1" / "r.hdf5", tmp_path / "first")
    assert_same_episodes(first, store)
    assert first.spec.control_dt == store.spec.control_dt
    assert first.spec.environment == store.spec.environment
    assert list(first.spec.observations) == list(store.spec.observations)
    assert "timestamps as recorded" not in left_out(result)
    export_dataset(first.path, tmp_path / "2" / "r.hdf5", "robomimic")
    second = import_dataset(tmp_path / "2" / "r.hdf5", tmp_path / "second")
    assert second.spec == first.spec
    assert second.fingerprint == first.fingerprint


def test_environment_arguments_and_filter_keys_of_the_source_are_written_back(tmp_path):
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": "Panda"}}
    attributes = {"env_args": env_args, "filter_keys": {"train": [0, 2], "valid": [1]}}
    store = make_store(tmp_path / "store", make_spec(()), attributes=attributes)
    export_dataset(store.path, tmp_path / "out.hdf5", "robomimic")
    with opened(tmp_path / "out.hdf5") as file:
        assert json.loads(file["data"].attrs["env_args"]) == env_args
        assert file["mask/train"][:].tolist() == [b"demo_0", b"demo_2"]
    found = import_dataset(tmp_path / "out.hdf5", tmp_path / "found")
    assert found.attributes["provenance"]["source_attributes"]["filter_keys"] == attributes["filter_keys"]


def test_filter_keys_follow_the_demos_when_some_were_left_out(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), attributes={"filter_keys": {"train": [0, 2]}})
    export_dataset(store.path, tmp_path / "out.hdf5", "robomimic")
    with opened(tmp_path / "out.hdf5", "a") as file:
        file["data/demo_0/actions"][0] = np.nan
    shorter = import_dataset(tmp_path / "out.hdf5", tmp_path / "shorter")
    assert shorter.num_episodes == 2
    export_dataset(shorter.path, tmp_path / "again.hdf5", "robomimic")
    with opened(tmp_path / "again.hdf5") as file:
        assert file["mask/train"][:].tolist() == [b"demo_1"]
        np.testing.assert_array_equal(file["data/demo_1/actions"], store.read("action")[10:17])


def test_next_obs_without_pictures_loses_the_last_picture_only(tmp_path):
    store = make_store(tmp_path / "store")
    result = export_dataset(store.path, tmp_path / "out.hdf5", "robomimic", {"next_obs": "vectors"})
    assert "final pictures of 3 episodes" in left_out(result)
    found = import_dataset(tmp_path / "out.hdf5", tmp_path / "found")
    for index in range(3):
        a, b = found.episode(index), store.episode(index)
        np.testing.assert_array_equal(np.asarray(a.images["front"])[:-1], np.asarray(b.images["front"])[:-1])
        np.testing.assert_array_equal(a.observations["gripper"], b.observations["gripper"])


def test_demos_without_final_observation_are_named(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((4, True, False), (3, False, False)))
    result = export_dataset(store.path, tmp_path / "out.hdf5", "robomimic")
    assert "next_obs of 1 demos" in left_out(result)
    with opened(tmp_path / "out.hdf5") as file:
        assert "next_obs" in file["data/demo_0"]
        assert "next_obs" not in file["data/demo_1"]
    assert_same_episodes(import_dataset(tmp_path / "out.hdf5", tmp_path / "found"), store)


def test_simulator_states_stand_where_playback_looks(tmp_path):
    spec = make_spec(())
    observations = {"states": spec.observations["info_qpos"], "gripper": spec.observations["gripper"]}
    store = make_store(tmp_path / "store", replace(spec, observations=observations))
    export_dataset(store.path, tmp_path / "out.hdf5", "robomimic")
    with opened(tmp_path / "out.hdf5") as file:
        np.testing.assert_array_equal(file["data/demo_0/states"], store.episode(0).observations["states"][:5])


@pytest.mark.skipif(not (DATA / "hdf5-robomimic-franka-stack").exists(), reason="needs ../shared/data")
def test_a_real_file_goes_through_unchanged(tmp_path):
    """Failed demos: some with a last done, which our reader takes for their end only."""
    (source,) = (path for path in (DATA / "hdf5-robomimic-franka-stack").rglob("*.hdf5") if "fail" in path.name)
    first = import_dataset(source, tmp_path / "first")
    export_dataset(first.path, tmp_path / source.name, "robomimic")
    second = import_dataset(tmp_path / source.name, tmp_path / "second")
    assert second.spec == first.spec
    assert second.fingerprint == first.fingerprint

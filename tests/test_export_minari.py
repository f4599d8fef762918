import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ArraySpec
from embodied.datasets.exporter import export_dataset
from embodied.datasets.importer import import_dataset

sys.path.insert(0, str(Path(__file__).parent))
from export_stores import add_label, assert_same_episodes, make_spec, make_store, opened


def left_out(result):
    return [left["what"] for left in result["left_out"]]


def metadata_of(folder):
    return json.loads((folder / "data" / "metadata.json").read_text())


def test_the_layout_is_minaris(tmp_path):
    store = make_store(tmp_path / "store")
    export_dataset(store.path, tmp_path / "arm-v2", "minari")
    metadata = metadata_of(tmp_path / "arm-v2")
    assert metadata["dataset_id"] == "arm-v2"
    assert (metadata["total_episodes"], metadata["total_steps"], metadata["data_format"]) == (3, 15, "hdf5")
    space = json.loads(metadata["observation_space"])
    assert (space["type"], sorted(space["subspaces"])) == (
        "Dict",
        ["front", "gripper", "instruction", "joint_position", "wrist"],
    )
    joints = space["subspaces"]["joint_position"]
    assert joints == {"type": "Box", "dtype": "float32", "shape": [3], "low": [-3.0] * 3, "high": [3.0] * 3}
    assert space["subspaces"]["gripper"]["low"] == [-np.inf]
    assert json.loads(metadata["action_space"])["high"] == [1.0, 1.0]
    with opened(tmp_path / "arm-v2" / "data" / "main_data.hdf5") as file:
        assert list(file) == ["episode_0", "episode_1", "episode_2"]
        for number in range(3):
            group, episode = file[f"episode_{number}"], store.episode(number)
            steps = len(episode) - 1
            assert episode.action is not None
            assert episode.reward is not None
            assert (group.attrs["id"], group.attrs["total_steps"]) == (number, steps)
            assert group["infos/success"][:].tolist() == [False] * steps + [episode.success]
            assert group["observations/instruction"].asstr()[:].tolist() == [episode.instruction] * (steps + 1)
            for key in ("joint_position", "gripper"):
                np.testing.assert_array_equal(group[f"observations/{key}"], episode.observations[key])
            np.testing.assert_array_equal(group["infos/qpos"], episode.observations["info_qpos"])
            np.testing.assert_array_equal(group["actions"], episode.action[:steps])
            np.testing.assert_array_equal(group["rewards"], episode.reward[:steps])
            np.testing.assert_array_equal(group["terminations"], episode.terminated[:steps])
            np.testing.assert_array_equal(group["truncations"], episode.truncated[:steps])
            for camera, pictures in episode.images.items():
                found = [np.array(Image.open(io.BytesIO(data))) for data in group[f"observations/{camera}"]]
                np.testing.assert_array_equal(found, np.asarray(pictures))


def test_small_pictures_are_plain_arrays(tmp_path):
    """Minari takes a box below 32 x 32 for something else than a picture and decodes nothing."""
    store = make_store(tmp_path / "store", make_spec(("front",), side=16))
    result = export_dataset(store.path, tmp_path / "out-v0", "minari")
    with opened(tmp_path / "out-v0" / "data" / "main_data.hdf5") as file:
        wanted = np.asarray(store.episode(0).images["front"])
        np.testing.assert_array_equal(file["episode_0/observations/front"], wanted)
    assert "that front are pictures" in left_out(result)


def test_an_episode_without_final_observation_gives_up_its_last_action(tmp_path):
    episodes = ((4, False, True), (3, True, True), (1, False, True))
    store = make_store(tmp_path / "store", make_spec(("front",)), episodes)
    result = export_dataset(store.path, tmp_path / "out-v0", "minari")
    assert {"last action of 2 episodes", "termination of 2 episodes", "1 episodes of a single row"} < set(
        left_out(result)
    )
    with opened(tmp_path / "out-v0" / "data" / "main_data.hdf5") as file:
        assert list(file) == ["episode_0", "episode_1"]
        first = file["episode_0"]
        assert len(first["observations/gripper"]) == len(first["observations/front"]) == 4
        assert len(first["actions"]) == first.attrs["total_steps"] == 3
        assert first["terminations"][:].tolist() == [False] * 3  # the step that ended the task is not here
        assert first["truncations"][:].tolist() == [False, False, True]
        assert file["episode_1/terminations"][:].tolist() == [False, False, True]
    assert metadata_of(tmp_path / "out-v0")["total_steps"] == 6


def test_or_its_last_observation_twice(tmp_path):
    store = make_store(tmp_path / "store", make_spec(("front",)), ((4, False, True), (1, False, True)))
    result = export_dataset(store.path, tmp_path / "out-v0", "minari", {"missing_final": "repeat"})
    assert "absence of final observations in 2 episodes" in left_out(result)
    with opened(tmp_path / "out-v0" / "data" / "main_data.hdf5") as file:
        first = file["episode_0"]
        assert len(first["actions"]) == 4
        assert first["terminations"][:].tolist() == [False, False, False, True]
        np.testing.assert_array_equal(first["observations/gripper"][4], store.episode(0).observations["gripper"][3])
        assert first["observations/front"][4].tobytes() == first["observations/front"][3].tobytes()
        assert len(file["episode_1/observations/front"]) == 2


def test_nothing_but_last_actions_is_refused(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((1, False, True),))
    with pytest.raises(InputError, match=r"no episode has a step with a final observation.*\n.*missing_final repeat"):
        export_dataset(store.path, tmp_path / "out-v0", "minari")


def test_a_dataset_id_is_made_or_checked(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()))
    export_dataset(store.path, tmp_path / "my set", "minari")
    assert metadata_of(tmp_path / "my set")["dataset_id"] == "my-set-v0"
    export_dataset(store.path, tmp_path / "b", "minari", {"id": "made/up-v3"})
    assert metadata_of(tmp_path / "b")["dataset_id"] == "made/up-v3"
    with pytest.raises(ConfigError, match="'made/up' is no dataset id"):
        export_dataset(store.path, tmp_path / "c", "minari", {"id": "made/up"})


def test_a_label_is_the_reward(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((3, True, False), (2, True, True)))
    label = add_label(store)
    export_dataset(store.path, tmp_path / "out-v0", "minari", label="progress")
    with opened(tmp_path / "out-v0" / "data" / "main_data.hdf5") as file:
        np.testing.assert_array_equal(file["episode_1/rewards"], label.score[[5, 6]])


def assert_identity(first, tmp_path, folder):
    """`first` came from the dataset `x-v0`; so does what comes of its export."""
    export_dataset(first.path, tmp_path / folder / "x-v0", "minari")
    second = import_dataset(tmp_path / folder / "x-v0", tmp_path / f"store-of-{folder}")
    assert second.spec == first.spec
    assert second.fingerprint == first.fingerprint  # every array, source ids, instructions and ends included
    return second


def test_import_gives_every_array_back(tmp_path):
    store = make_store(tmp_path / "store")
    export_dataset(store.path, tmp_path / "x-v0", "minari")
    first = import_dataset(tmp_path / "x-v0", tmp_path / "first")
    assert first.findings == []
    assert list(first.spec.observations["joint_position"].low) == [-3.0] * 3
    assert first.spec.observations["info_qpos"].privileged
    renamed = import_dataset(tmp_path / "x-v0", tmp_path / "renamed", drop_keys=["info_success"])
    assert_same_episodes(renamed, store, but=("timestamp",))
    assert_identity(first, tmp_path, "again")


def test_a_single_observation_has_no_dict(tmp_path):
    spec = replace(make_spec(()), observations={"observation": ArraySpec((3,))})
    store = make_store(tmp_path / "store", spec, instruct=False)
    export_dataset(store.path, tmp_path / "x-v0", "minari")
    assert json.loads(metadata_of(tmp_path / "x-v0")["observation_space"])["type"] == "Box"
    first = import_dataset(tmp_path / "x-v0", tmp_path / "first")
    assert list(first.spec.observations) == ["info_success", "observation"]
    assert_identity(first, tmp_path, "again")


def test_what_an_episode_without_final_observation_gives_up_stays_given_up(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((4, False, True), (3, True, True)))
    export_dataset(store.path, tmp_path / "x-v0", "minari")
    first = import_dataset(tmp_path / "x-v0", tmp_path / "first")
    assert first.episode_length.tolist() == [4, 4]
    assert_identity(first, tmp_path, "again")

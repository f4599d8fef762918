import sys
from pathlib import Path

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.datasets.exporter import export_dataset
from embodied.datasets.importer import import_dataset

sys.path.insert(0, str(Path(__file__).parent))
from export_stores import add_label, assert_same_episodes, make_spec, make_store, opened

DATA = Path(__file__).parents[1].parent / "shared" / "data"
LOST = ("timestamp", "instruction", "success")


def left_out(result):
    return [left["what"] for left in result["left_out"]]


def test_arrays_are_flat_and_ends_are_marked(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()))
    result = export_dataset(store.path, tmp_path / "out.hdf5", "d4rl", {"compress": "gzip"})
    valid = store.read("step_valid")
    with opened(tmp_path / "out.hdf5") as file:
        arrays = {name: np.asarray(file[name]) for name in file if name != "infos"}
        assert file.attrs["env_id"] == "made/Up"
        np.testing.assert_array_equal(file["infos/qpos"], store.read("observation/info_qpos")[valid])
        assert file["actions"].compression == "gzip"
    matrix = np.concatenate([store.read("observation/joint_position"), store.read("observation/gripper")], axis=1)
    np.testing.assert_array_equal(arrays["observations"], matrix[valid])
    np.testing.assert_array_equal(arrays["next_observations"], matrix[np.flatnonzero(valid) + 1])
    np.testing.assert_array_equal(arrays["actions"], store.read("action")[valid])
    np.testing.assert_array_equal(arrays["rewards"], store.read("reward")[valid])
    assert np.flatnonzero(arrays["terminals"]).tolist() == [4, 14]
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [7]
    assert "the division into joint_position, gripper" in left_out(result)
    assert "final rows of info_qpos" in left_out(result)


@pytest.mark.parametrize("final", [True, False])
def test_import_export_import_is_the_identity(tmp_path, final):
    """With next_observations, and without: then the last step of a cut episode has no successor."""
    episodes = ((5, final, True), (3, final, False), (4, final, True))
    made = make_store(tmp_path / "made", make_spec(()), episodes)
    export_dataset(made.path, tmp_path / "1" / "d.hdf5", "d4rl")
    first = import_dataset(tmp_path / "1" / "d.hdf5", tmp_path / "first")
    export_dataset(first.path, tmp_path / "2" / "d.hdf5", "d4rl")
    second = import_dataset(tmp_path / "2" / "d.hdf5", tmp_path / "second")
    assert second.spec == first.spec
    assert second.fingerprint == first.fingerprint  # every array, source ids and ends included
    assert first.episode_length.tolist() == [5 + final, 3 + final, 4 + final]
    np.testing.assert_array_equal(first.read("terminated"), made.read("terminated"))
    np.testing.assert_array_equal(first.read("truncated"), made.read("truncated"))
    np.testing.assert_array_equal(first.read("step_valid"), made.read("step_valid"))


def test_a_single_key_comes_back_under_d4rls_name(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()))
    options = {"keys": "joint_position"}
    result = export_dataset(store.path, tmp_path / "out.hdf5", "d4rl", options)
    assert "observations gripper" in left_out(result)
    found = import_dataset(tmp_path / "out.hdf5", tmp_path / "found")
    for index in range(3):
        a, b = found.episode(index), store.episode(index)
        np.testing.assert_array_equal(a.observations["observation"], b.observations["joint_position"])
        np.testing.assert_array_equal(a.reward, b.reward)


def test_pictures_alone_are_the_observations(tmp_path):
    spec = make_spec(("image",))
    store = make_store(tmp_path / "store", spec)
    export_dataset(store.path, tmp_path / "out.hdf5", "d4rl", {"keys": "image"})
    found = import_dataset(tmp_path / "out.hdf5", tmp_path / "found", drop_keys=["info_qpos"])
    assert_same_episodes(found, store, but=(*LOST, "joint_position", "gripper", "info_qpos"))


def test_a_mixed_store_has_no_next_observations(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((4, True, False), (3, False, False)))
    result = export_dataset(store.path, tmp_path / "out.hdf5", "d4rl")
    with opened(tmp_path / "out.hdf5") as file:
        assert "next_observations" not in file
    assert "final observations of 1 episodes" in left_out(result)


def test_a_label_is_the_reward(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((3, True, False), (2, True, True)))
    label = add_label(store)
    result = export_dataset(store.path, tmp_path / "out.hdf5", "d4rl", label="progress")
    with opened(tmp_path / "out.hdf5") as file:
        np.testing.assert_array_equal(file["rewards"], label.score[[1, 2, 3, 5, 6]])
    assert "the recorded reward" in left_out(result)


def test_a_store_without_a_vector_says_what_it_has(tmp_path):
    store = make_store(tmp_path / "store", make_spec())
    with pytest.raises(InputError, match=r"no observation 'fron'"):
        export_dataset(store.path, tmp_path / "out.hdf5", "d4rl", {"keys": "fron"})


@pytest.mark.skipif(not (DATA / "hdf5-d4rl-style").exists(), reason="needs ../shared/data")
def test_real_files_go_through_unchanged(tmp_path):
    for source in sorted((DATA / "hdf5-d4rl-style").rglob("*.hdf5")):
        first = import_dataset(source, tmp_path / f"first-{source.stem}")
        (tmp_path / "out").mkdir(exist_ok=True)
        export_dataset(first.path, tmp_path / "out" / source.name, "d4rl")
        second = import_dataset(tmp_path / "out" / source.name, tmp_path / f"second-{source.stem}")
        assert second.spec == first.spec
        assert second.fingerprint == first.fingerprint

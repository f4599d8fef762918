import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.datasets import read_robomimic
from embodied.datasets.importer import import_dataset
from embodied.datasets.transitions import transitions

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "hdf5-robomimic-franka-stack"
STEPS = {2: 4, 10: 3, 0: 5}  # demo number -> steps; demo_10 comes after demo_2


def make_file(path: Path, next_obs: bool = True, **attributes) -> Path:
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args)
        for number, steps in STEPS.items():
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = steps
            demo.attrs.update(attributes)
            rows = np.arange(steps + 1) + 100.0 * number
            demo["actions"] = np.full((steps, 7), number / 10)
            demo["rewards"] = np.arange(steps, dtype=float)
            demo["dones"] = (np.arange(steps) >= steps - 2).astype(int)
            for group, part in (("obs", rows[:-1]), ("next_obs", rows[1:])):
                if group == "obs" or next_obs:
                    demo[f"{group}/robot0_eef_pos"] = np.repeat(part[:, None], 3, 1)
                    demo[f"{group}/agentview_image"] = np.full(
                        (steps, 6, 6, 3), part[:, None, None, None] % 256, np.uint8
                    )
                    demo[f"{group}/depth"] = np.zeros((steps, 6, 6, 1), np.float32)
        file["mask/train"] = np.array([b"demo_10", b"demo_0"])
    return path


def test_order_final_observation_and_ends(tmp_path):
    store = import_dataset(make_file(tmp_path / "d.hdf5"), tmp_path / "s")
    assert store.source_ids == ["d.hdf5/demo_0", "d.hdf5/demo_2", "d.hdf5/demo_10"]
    assert store.episode_length.tolist() == [6, 5, 4]
    assert store.spec.control_dt == 0.05
    assert store.spec.environment == "Lift"
    episode = store.episode(1)
    assert episode.observations["robot0_eef_pos"][:, 0].tolist() == [200, 201, 202, 203, 204]
    assert np.asarray(episode.images["agentview_image"])[:, 0, 0, 0].tolist() == [200, 201, 202, 203, 204]
    assert episode.action is not None
    np.testing.assert_allclose(episode.action[:, 0], [0.2] * 4 + [0])
    assert episode.reward is not None
    assert episode.reward.tolist() == [0, 1, 2, 3, 0]
    # Two dones at the end of each demo: only the last one ends it.
    assert episode.terminated.tolist() == [False, False, False, True, False]
    assert episode.step_valid.tolist() == [True, True, True, True, False]
    assert episode.timestamp.tolist() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    remembered = store.attributes["provenance"]["source_attributes"]
    assert remembered["filter_keys"] == {"train": [2, 0]}
    assert remembered["early_dones"] == 3
    assert list(remembered["observations_left_out"]) == ["depth"]
    assert remembered["env_args"]["env_kwargs"] == {"control_freq": 20}


def test_without_next_obs_the_last_truncated_step_is_not_learned_from(tmp_path):
    store = import_dataset(make_file(tmp_path / "d.hdf5", next_obs=False, success=False), tmp_path / "s")
    assert store.episode_length.tolist() == [5, 4, 3]
    assert store.success.tolist() == [0, 0, 0]
    assert not store.read("terminated").any(), "a demo that failed was cut, whatever its dones say"
    index = transitions(store, "source")
    assert index.frame.tolist() == [0, 1, 2, 3, 5, 6, 7, 9, 10]
    assert index.masks.all()


def test_truncated_file_and_wrong_layouts(tmp_path):
    whole = make_file(tmp_path / "whole.hdf5").read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.hdf5 cannot be read: (?s:.*)truncated or damaged"):
        import_dataset(tmp_path / "cut.hdf5", tmp_path / "s")
    with h5py.File(tmp_path / "raw.hdf5", "w") as file:
        file["data/demo_0/states"] = np.zeros((3, 4))
        file["data/demo_0/actions"] = np.zeros((3, 7))
    with pytest.raises(InputError, match="dataset_states_to_obs"):
        import_dataset(tmp_path / "raw.hdf5", tmp_path / "s")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="not in robomimic's layout"):
        read_robomimic.read(tmp_path / "other.hdf5", {})
    assert not (tmp_path / "s").exists()


def test_demo_without_actions_and_nan_are_named(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_2/actions"]
    with pytest.raises(InputError, match=r"'d\.hdf5/demo_2': it has no actions"):
        import_dataset(path, tmp_path / "s", strict=True)
    path = make_file(tmp_path / "n.hdf5")
    with h5py.File(path, "a") as file:
        actions: Any = file["data/demo_10/actions"]
        actions[1, 3] = np.nan
    with pytest.raises(InputError, match=r"'n\.hdf5/demo_10': 'action' holds nan at index \(1, 3\)"):
        import_dataset(path, tmp_path / "t", strict=True)
    assert not (tmp_path / "t").exists()


@pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")
@pytest.mark.parametrize("name", ["generated_dataset_small", "generated_dataset_small_failed"])
def test_real_franka_demos_agree_with_independent_counts(tmp_path, name):
    expected = json.loads((DATA / "facts.json").read_text())[f"{name}.hdf5"]
    store = import_dataset(DATA / f"{name}.hdf5", tmp_path / "s")
    assert store.num_episodes == len(expected["demos"])
    assert store.num_frames == sum(demo["T"] for demo in expected["demos"].values())
    for index, source_id in enumerate(store.source_ids):
        demo = expected["demos"][source_id.split("/")[1]]
        assert store.episode_length[index] == demo["T"]
        actions = store.episode(index).action
        assert actions is not None
        assert actions.sum(dtype=np.float64) == pytest.approx(demo["action_sum"], abs=1e-3)
        assert store.success[index] == (demo["attrs"]["success"] == "True")
    assert store.spec.environment == "Isaac-Stack-Cube-Franka-IK-Rel-Mimic-v0"


def edit(path: Path, name: str, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value


def test_what_does_not_agree_is_found(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    with h5py.File(path, "r+") as file:
        file["data"].attrs.update({"total": 99, "env_args": "{not json"})
        file["data/demo_2"].attrs["num_samples"] = 7
        file["mask/valid"] = np.array([b"demo_2", b"demo_77"])
    store = import_dataset(path, tmp_path / "s")
    found = {(finding.check, finding.episode): finding.message for finding in store.findings}
    assert store.num_episodes == 3
    assert store.spec.control_dt == 0
    assert "no JSON" in found["environment-unreadable", None]
    assert "demo_2 says 7 and holds 4" in found["frame-count", 1]
    assert "'total' says 99 steps, the demos hold 12" in found["frame-count", None]
    assert "names 1 demos that the file does not hold: demo_77" in found["filter-key", None]
    assert "'obs/depth' is left out: float32 (6, 6, 1)" in found["observation-left-out", None]
    assert len(found) == 5
    remembered = store.attributes["provenance"]["source_attributes"]
    assert remembered["filter_keys"] == {"train": [2, 0], "valid": [1]}
    assert remembered["env_args"] == {"unreadable": "{not json"}


def test_a_whole_file_has_no_findings(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    with h5py.File(path, "r+") as file:
        for number in STEPS:
            del file[f"data/demo_{number}/obs/depth"]
    assert not read_robomimic.read(path, {}).findings


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("actions", np.zeros((4, 2, 2)), r"'actions' must be numbers \(N, A\)"),
        ("actions", np.zeros((4, 6)), "the spec says"),
        ("rewards", np.zeros(3), "arrays differ in length: actions 4, rewards 3"),
        ("rewards", np.zeros((4, 2)), "one number per step"),
        ("dones", np.zeros(2), "arrays differ in length"),
        ("obs/robot0_eef_pos", np.zeros((3, 3)), "obs/robot0_eef_pos 3"),
        ("obs/robot0_eef_pos", None, "lacks observations that the first demo has: robot0_eef_pos"),
        ("obs/robot0_eef_pos", h5py.ExternalLink("/etc/passwd", "/"), "is a link out of the file"),
        ("obs/agentview_image", np.zeros((4, 5, 6, 3), np.uint8), "'obs/agentview_image'"),
        ("next_obs/robot0_eef_pos", np.zeros((3, 3)), r"'next_obs/robot0_eef_pos' is \(3, 3\)"),
        ("obs", np.zeros(3), "lacks observations"),
    ],
)
def test_a_demo_that_disagrees_with_itself_is_refused(tmp_path, name, value, reason):
    path = make_file(tmp_path / "d.hdf5")
    edit(path, f"data/demo_2/{name}", value)
    source = read_robomimic.read(path, {})
    with pytest.raises(InputError, match=rf"^Episode 'd\.hdf5/demo_2': .*{reason}"):
        source.load(1).check(source.spec)
    for index in (0, 2):
        source.load(index).check(source.spec)


def test_the_first_usable_demo_says_what_there_is(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    edit(path, "data/demo_0", np.zeros(3))
    store = import_dataset(path, tmp_path / "s")
    assert store.source_ids == ["d.hdf5/demo_2", "d.hdf5/demo_10"]
    (left_out,) = [finding for finding in store.findings if finding.check == "episode-left-out"]
    assert (left_out.episode, left_out.message) == (0, "left out: Episode 'd.hdf5/demo_0': it is no group.")


def test_a_missing_camera_is_marked(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    edit(path, "data/demo_2/obs/agentview_image", None)
    store = import_dataset(path, tmp_path / "s")
    assert store.has_camera("agentview_image").tolist() == [True, False, True]


def test_groups_of_observations_and_n_plus_one_observations(tmp_path):
    """Isaac Lab's groups and states; obs with a row more than actions; success as text; rewards (N, 1)."""
    path = tmp_path / "d.hdf5"
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo.attrs["success"] = "True"
        demo["actions"] = np.ones((4, 2))
        demo["rewards"] = np.arange(4.0)[:, None]
        demo["obs/policy/eef_pos"] = np.arange(15.0).reshape(5, 3)
        demo["obs/camera/front/rgb"] = np.full((5, 3, 9, 8), np.arange(5)[:, None, None, None], np.uint8)
        demo["obs/force"] = np.arange(5.0)
        demo["obs/text"] = "words"
        demo["obs/none"] = np.zeros((5, 0))
        demo["states/articulation/robot/joint_position"] = np.zeros((4, 9))
        demo["initial_state/x"] = np.zeros((1, 2))
    store = import_dataset(path, tmp_path / "s")
    assert {key: spec.shape for key, spec in store.spec.observations.items()} == {"policy.eef_pos": (3,), "force": ()}
    assert store.episode_length.tolist() == [5]
    assert store.success.tolist() == [1]
    episode = store.episode(0)
    assert episode.step_valid.tolist() == [True] * 4 + [False]
    assert episode.observations["policy.eef_pos"].tolist() == np.arange(15).reshape(5, 3).tolist()
    assert episode.reward is not None
    assert episode.reward.tolist() == [0, 1, 2, 3, 0]
    pictures = np.asarray(episode.images["camera.front.rgb"])
    assert pictures.shape == (5, 9, 8, 3)
    assert pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    remembered = store.attributes["provenance"]["source_attributes"]
    assert remembered["groups_left_out"] == ["initial_state", "states"]
    assert set(remembered["observations_left_out"]) == {"text", "none"}


@pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")
def test_real_franka_values_are_the_files(tmp_path):
    source = read_robomimic.read(DATA / "generated_dataset_small.hdf5", {})
    assert not source.findings
    assert source.attributes["groups_left_out"] == ["initial_state", "states"]
    episode = source.load(3)
    with h5py.File(DATA / "generated_dataset_small.hdf5") as file:
        demo: Any = file["data/demo_3"]
        for key, rows in episode.observations.items():
            np.testing.assert_array_equal(rows, np.float32(demo[f"obs/{key}"][:]))
        assert episode.action is not None
        np.testing.assert_array_equal(episode.action[[0, -1]], demo["actions"][:][[0, -1]])

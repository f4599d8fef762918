import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.datasets import read_d4rl
from embodied.datasets.importer import import_dataset
from embodied.datasets.transitions import transitions

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def make_file(path: Path, terminals, timeouts, next_observations: bool, **attributes) -> Path:
    n = len(terminals)
    with h5py.File(path, "w") as file:
        file["observations"] = np.arange(n, dtype=np.float64)[:, None]
        file["actions"] = np.ones((n, 2))
        file["rewards"] = np.arange(n, dtype=np.float64) + 50
        file["terminals"] = np.array(terminals, bool)
        if timeouts is not None:
            file["timeouts"] = np.array(timeouts, bool)
        if next_observations:
            file["next_observations"] = np.arange(n, dtype=np.float64)[:, None] + 0.5
        file["infos/qpos"] = np.arange(n * 3, dtype=np.float64).reshape(n, 3)
        file["infos/action_log_probs"] = np.arange(n, dtype=np.float64)
        file["infos/text"] = "not an array of steps"
        file.attrs.update(attributes)
    return path


#                0  1  2  3  4  5  6  7  8  9
TERMINALS = [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
TIMEOUTS = [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]


def test_without_next_observations(tmp_path):
    store = import_dataset(make_file(tmp_path / "d.hdf5", TERMINALS, TIMEOUTS, False), tmp_path / "s", format="d4rl")
    assert store.episode_length.tolist() == [3, 3, 2, 2]
    assert np.flatnonzero(store.read("terminated")).tolist() == [2, 5]
    assert np.flatnonzero(store.read("truncated")).tolist() == [7, 9], "terminal beats timeout at 5"
    index = transitions(store, "source")
    assert index.frame.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    assert index.next_frame.tolist() == [1, 2, 2, 4, 5, 5, 7, 9]
    assert index.masks.tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert index.reward.tolist() == [50, 51, 52, 53, 54, 55, 56, 58]
    assert store.read("observation/info_qpos").tolist() == np.arange(30).reshape(10, 3).tolist()
    assert store.spec.observations["info_action_log_probs"].privileged
    assert store.attributes["provenance"]["source_attributes"]["steps_after_last_end"] == 2
    assert store.attributes["provenance"]["source_attributes"]["terminal_and_timeout"] == 1


def test_with_next_observations_every_step_has_its_successor(tmp_path):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, TIMEOUTS, True, env_id="Hopper-v5", array=np.arange(2))
    store = import_dataset(path, tmp_path / "s")
    assert store.episode_length.tolist() == [4, 4, 3, 3]
    assert store.read("observation/observation")[:4, 0].tolist() == [0, 1, 2, 2.5]
    assert store.read("step_valid").sum() == 10
    assert store.read("terminated").sum() == 2
    assert store.read("reward").sum() == sum(range(50, 60))
    assert store.spec.environment == "Hopper-v5"
    remembered = store.attributes["provenance"]["source_attributes"]
    assert remembered["final_observation_repeated"] == ["info_action_log_probs", "info_qpos"]
    assert remembered["attributes"] == {"env_id": "Hopper-v5", "array": [0, 1]}


def test_a_single_cut_step_without_successor_is_left_out(tmp_path):
    store = import_dataset(make_file(tmp_path / "d.hdf5", [1, 0, 1, 0], None, False), tmp_path / "s")
    assert store.episode_length.tolist() == [1, 2]
    assert store.read("step_valid").all()


def test_bad_files(tmp_path):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, None, False)
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file["rewards"] = np.zeros(3)
    with pytest.raises(InputError, match=r"differ in length: observations 10, .* rewards 3"):
        import_dataset(path, tmp_path / "s")
    path = make_file(tmp_path / "n.hdf5", TERMINALS, None, False)
    with h5py.File(path, "a") as file:
        actions: Any = file["actions"]
        actions[4, 1] = np.nan
    with pytest.raises(InputError, match=r"n\.hdf5/episode 1': 'action' holds nan at index \(1, 1\)"):
        import_dataset(path, tmp_path / "s", strict=True)
    with h5py.File(path, "a") as file:
        del file["actions"]
    with pytest.raises(InputError, match="lacks actions"):
        import_dataset(path, tmp_path / "s", format="d4rl")
    path.write_bytes(make_file(tmp_path / "c.hdf5", TERMINALS, None, False).read_bytes()[:-700])
    with pytest.raises(InputError, match="truncated or damaged"):
        import_dataset(path, tmp_path / "s")


needs_data = pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")


@needs_data
@pytest.mark.parametrize("name", ["maze2d-umaze-v1", "dataset_expert_1000", "dataset_random_1000"])
def test_real_files_agree_with_independent_sums(tmp_path, name):
    expected = json.loads((DATA / "hdf5-d4rl-style" / "facts.json").read_text())[f"{name}.hdf5"]
    store = import_dataset(DATA / "hdf5-d4rl-style" / f"{name}.hdf5", tmp_path / "s")
    assert store.read("terminated").sum() == expected["n_terminals"]
    assert store.read("action").sum(dtype=np.float64) == pytest.approx(expected["actions"]["sum"], abs=0.01)
    assert store.read("reward").sum(dtype=np.float64) == pytest.approx(expected["rewards"]["sum"], abs=0.01)
    final_rows = store.num_episodes if "next_observations" in expected else 0
    assert store.num_frames == expected["actions"]["shape"][0] + final_rows
    if not final_rows:
        observed = store.read("observation/observation").sum(dtype=np.float64)
        assert observed == pytest.approx(expected["observations"]["sum"], rel=1e-6)


@needs_data
def test_real_hopper_replay(tmp_path):
    expected = json.loads((DATA / "hdf5-d4rl-hopper-sac-replay" / "facts.json").read_text())
    store = import_dataset(DATA / "hdf5-d4rl-hopper-sac-replay" / "hopper-replay.hdf5", tmp_path / "s")
    assert store.num_episodes == expected["complete_episodes"] + 1
    assert store.episode_length[-1] == expected["steps_after_last_end"] + 1
    assert store.num_frames == expected["steps"] + store.num_episodes
    assert store.read("terminated").sum() == expected["terminals"]
    assert store.read("reward").sum(dtype=np.float64) == pytest.approx(expected["reward_sum"])
    np.testing.assert_array_equal(store.read("observation/observation", 0, 1)[0], np.float32(expected["obs_first"]))
    # facts give the last recorded observation; the store has its successor behind it.
    np.testing.assert_array_equal(store.read("observation/observation")[-2], np.float32(expected["obs_last"]))


def replace(path: Path, name: str, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value


def test_what_a_user_must_know_is_found(tmp_path):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, TIMEOUTS, True)
    replace(path, "infos/short", np.zeros(4))
    replace(path, "rewards", np.zeros((10, 1)))
    store = import_dataset(path, tmp_path / "s")
    found = {finding.check: finding.message for finding in store.findings if finding.check != "info-left-out"}
    assert found == {
        "terminal-and-timeout": "1 steps are both terminal and timeout; the terminal counts",
        "unfinished-episode": "the last 2 steps end in neither terminal nor timeout: imported as a truncated episode",
        "constant-reward": "all rewards are 0",
        # Ends at 2, 5 and 7, and the last row has no following one: 6 steps lie inside.
        "next-observation": "at 6 of 6 steps inside episodes 'next_observations' is not the following row "
        "(first at row 0); the store keeps the following row",
    }
    left_out = [finding.message for finding in store.findings if finding.check == "info-left-out"]
    assert left_out == [
        "'infos/short' is left out: it has 4 rows, the file has 10 steps",
        "'infos/text' is left out: 'text' is text (), not an array of numbers.",
    ]
    assert store.read("reward").tolist() == [0] * 14


def test_next_observations_that_follow_are_no_finding(tmp_path):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, TIMEOUTS, False)
    replace(path, "next_observations", np.arange(10.0)[:, None] + 1)
    store = import_dataset(path, tmp_path / "s")
    assert "next-observation" not in {finding.check for finding in store.findings}
    replace(path, "next_observations", None)
    replace(path, "timeouts", None)
    store = import_dataset(path, tmp_path / "t")
    assert {finding.check for finding in store.findings} >= {"no-timeouts", "unfinished-episode"}


def test_pictures_with_their_final_observation(tmp_path):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, TIMEOUTS, False)
    pictures = np.random.default_rng(0).integers(0, 255, (11, 8, 8, 3), np.uint8)
    replace(path, "observations", pictures[:10])
    replace(path, "next_observations", pictures[1:])
    replace(path, "infos", None)
    store = import_dataset(path, tmp_path / "s")
    assert not store.spec.observations
    assert store.episode_length.tolist() == [4, 4, 3, 3]
    np.testing.assert_array_equal(np.asarray(store.episode(1).images["image"]), pictures[3:7])
    np.testing.assert_array_equal(np.asarray(store.episode(3).images["image"]), pictures[8:11])


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("terminals", np.full(10, 0.5), "holds 0.5: flags are 0 or 1"),
        ("terminals", np.full((10, 2), 0), "one number per step"),
        ("rewards", np.zeros((10, 2)), "one number per step"),
        ("rewards", np.zeros(10, "S3"), "not an array of numbers"),
        ("actions", np.zeros(10), r"must be numbers \(N, A\)"),
        ("next_observations", np.zeros((10, 2)), "differ in shape"),
        ("observations", h5py.ExternalLink("/etc/passwd", "/"), "link out of the file"),
    ],
)
def test_arrays_that_cannot_be_steps_are_refused(tmp_path, name, value, reason):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, TIMEOUTS, False)
    replace(path, name, value)
    with pytest.raises(InputError, match=reason):
        read_d4rl.read(path, {})


@pytest.mark.parametrize("dtype", ["f2", "f8", "i4", "u1", "?", ">f4"])
def test_any_numbers_will_do(tmp_path, dtype):
    path = make_file(tmp_path / "d.hdf5", TERMINALS, None, False)
    for name in ("terminals", "actions", "rewards"):
        with h5py.File(path, "r+") as file:
            data: Any = file[name]
            rows = (data[:] > 0).astype(dtype)
        replace(path, name, rows)
    source = read_d4rl.read(path, {})
    episodes = [source.load(index) for index in range(source.num_episodes)]
    assert [len(episode) for episode in episodes] == [3, 3, 4]
    assert [bool(episode.terminated[-1]) for episode in episodes] == [True, True, False]
    for episode in episodes:
        episode.check(source.spec)
        assert (episode.action == 1).all()


@needs_data
def test_real_findings():
    folder = DATA / "hdf5-d4rl-style"
    found = {finding.check for finding in read_d4rl.read(folder / "maze2d-umaze-v1.hdf5", {}).findings}
    assert found == {"no-timeouts", "constant-reward", "unfinished-episode"}
    hopper = DATA / "hdf5-d4rl-hopper-sac-replay" / "hopper-replay.hdf5"
    findings = read_d4rl.read(hopper, {}).findings
    assert [finding.check for finding in findings] == ["unfinished-episode"]
    assert "the last 187 steps" in findings[0].message

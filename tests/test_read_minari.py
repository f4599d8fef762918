import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import read_minari
from embodied.datasets.importer import import_dataset
from embodied.datasets.source import Source

sys.path.insert(0, str(Path(__file__).parent))
from minari_files import (
    STORAGES,
    TEXT,
    arrow_table,
    box,
    discrete,
    episode,
    jpegs,
    nested,
    sequence,
    write_dataset,
    write_table,
)

storages = pytest.mark.parametrize("storage", STORAGES)
OBSERVATIONS, ACTIONS = box(3), box(2)


def simple(steps: int, rows: int | None = None, **more: Any) -> dict[str, Any]:
    rows = steps + 1 if rows is None else rows
    observations = np.arange(3.0 * rows, dtype=np.float32).reshape(rows, 3)
    return episode(steps, observations, np.ones((steps, 2), np.float32) * np.arange(steps)[:, None] + 5, **more)


def checks(source: Source) -> list[str]:
    return [finding.check for finding in source.findings]


def open_simple(tmp_path: Path, storage: str, *episodes: dict[str, Any], metadata: Any = None) -> Source:
    numbered = dict(enumerate(episodes))
    return read_minari.read(write_dataset(tmp_path / "d", storage, numbered, OBSERVATIONS, ACTIONS, metadata), {})


@storages
def test_every_step_has_its_successor(tmp_path, storage):
    episodes = {0: simple(3), 1: simple(2, end="truncations")}
    root = write_dataset(tmp_path / "d", storage, episodes, OBSERVATIONS, ACTIONS)
    store = import_dataset(root, tmp_path / "s")
    assert store.episode_length.tolist() == [4, 3]
    assert store.read("observation/observation").reshape(-1).tolist() == [*range(12), *range(9)]
    assert store.read("action")[:, 0].tolist() == [5, 6, 7, 0, 5, 6, 0]
    assert store.read("reward").tolist() == [1, 2, 3, 0, 1, 2, 0]
    assert store.read("step_valid").tolist() == [1, 1, 1, 0, 1, 1, 0]
    assert np.flatnonzero(store.read("terminated")).tolist() == [2]
    assert np.flatnonzero(store.read("truncated")).tolist() == [5]
    assert store.spec.environment == "Toy-v0"
    assert store.spec.action is not None
    assert store.spec.action.low == (-1, -1)
    assert store.spec.observations["observation"].high == (1, 1, 1)
    assert store.findings == []
    record = store.attributes["provenance"]["source_attributes"]
    assert record["seeds"] == [100, 101]
    assert store.episode(1).source_id == "toy/set-v0/episode_1"


@storages
def test_spaces_of_every_kind(tmp_path, storage):
    rng = np.random.default_rng(0)
    rows, steps = 4, 3
    colour = rng.integers(0, 256, (rows, 40, 32, 3), np.uint8)
    observations = {
        "arm": {"joints": rng.normal(size=(rows, 3)).astype("f4"), "pose": rng.normal(size=(rows, 2, 2))},
        "mode": (np.arange(rows), rng.integers(0, 2, (rows, 3)).astype(np.int8)),
        "colour": jpegs(colour, "PNG"),
        "raw": colour[:, :, :, 0],
        "grid": rng.integers(0, 9, (rows, 7, 7, 3), np.uint8),
        "mission": ["open", "close", "close", "close"],
        "note": ["a"] * rows,
    }
    actions = {"move": rng.normal(size=(steps, 2)).astype("f4"), "grip": np.array([0, 1, 1])}
    infos = {"qpos": rng.normal(size=(rows, 2)), "deep": {"x": np.arange(rows) * 0.5}, "success": np.arange(rows) > 2}
    whole = episode(steps, observations, actions, infos=infos)
    shorter = {key: value for key, value in infos.items() if key != "qpos"}
    observed = nested(
        arm=nested(joints=box(3), pose=box(2, 2, low=-np.inf, high=5)),
        mode=sequence(discrete(4, -1), {"type": "MultiBinary", "n": 3}),
        colour=box(40, 32, 3, low=0, high=255, dtype="uint8"),
        raw=box(40, 32, low=0, high=255, dtype="uint8"),
        grid=box(7, 7, 3, low=0, high=255, dtype="uint8"),
        mission=TEXT,
        note=TEXT,
    )
    taken = nested(move=box(2), grip=discrete(2))
    episodes = {0: whole, 1: episode(steps, observations, actions, infos=shorter)}
    source = read_minari.read(write_dataset(tmp_path / "d", storage, episodes, observed, taken), {})
    shapes = {key: spec.shape for key, spec in source.spec.observations.items() if not spec.privileged}
    assert shapes == {"arm.joints": (3,), "arm.pose": (2, 2), "mode.0": (), "mode.1": (3,), "grid": (147,)}
    assert [key for key, spec in source.spec.observations.items() if spec.privileged] == ["info_deep.x", "info_success"]
    assert source.spec.observations["arm.pose"].low == ()
    assert source.spec.observations["arm.pose"].high == (5, 5, 5, 5)
    assert source.spec.observations["mode.0"].low == (-1,)
    assert source.spec.action is not None
    assert source.spec.action.names == ("grip", "move.0", "move.1")
    assert source.spec.action.high == (1, 1, 1)
    left_out = source.attributes["observations_left_out"]
    assert left_out == {"infos/qpos": "not in every episode, or not of the same shape", "observations/note": "text"}
    assert checks(source) == ["discrete-action"]
    assert "actions/grip (Discrete)" in source.findings[0].message
    found = source.load(0)
    found.check(source.spec)
    assert np.array_equal(found.observations["arm.pose"], observations["arm"]["pose"].astype("f4"))
    assert np.array_equal(found.observations["mode.1"], observations["mode"][1])
    assert np.array_equal(found.observations["grid"], observations["grid"].reshape(rows, -1))
    assert np.array_equal(np.asarray(found.images["colour"]), colour)
    assert np.array_equal(np.asarray(found.images["raw"]), np.repeat(colour[..., :1], 3, -1))
    assert found.action is not None
    assert np.array_equal(found.action[:3], np.column_stack([actions["grip"], actions["move"]]).astype("f4"))
    assert found.instruction == "open"
    assert found.success is True


@storages
def test_pictures_of_one_length_of_bytes(tmp_path, storage):
    grey = jpegs(np.full((3, 32, 32), 77, np.uint8))
    assert len({len(data) for data in grey}) == 1
    whole = episode(2, grey, np.zeros((2, 2), np.float32))
    observed = box(32, 32, low=0, high=255, dtype="uint8")
    source = read_minari.read(write_dataset(tmp_path / "d", storage, {0: whole}, observed, ACTIONS), {})
    assert source.spec.images["image"].shape == (32, 32, 3)
    assert np.abs(np.asarray(source.load(0).images["image"]).astype(int) - 77).max() <= 1


@storages
def test_an_episode_without_final_observation(tmp_path, storage):
    source = open_simple(tmp_path, storage, simple(3, 3), simple(3, 3, end="truncations"), simple(2))
    assert checks(source) == ["no-final-observation"]
    assert source.findings[0].message.startswith("2 of 3 episodes have as many observations as steps")
    assert source.load(0).step_valid.tolist() == [True, True, True]
    assert source.load(1).step_valid.tolist() == [True, True, False]
    assert source.load(1).truncated.tolist() == [False, False, True]
    assert source.load(2).step_valid.tolist() == [True, True, False]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_episode_of_another_length_is_left_out(tmp_path, rows):
    source = open_simple(tmp_path, "hdf5", simple(3), simple(3, rows))
    with pytest.raises(InputError, match=r"episode_1': it has 3 steps; its observations have .* rows, not 4"):
        source.load(1)


@storages
@pytest.mark.parametrize("name", ["rewards", "terminations", "truncations"])
def test_more_than_one_number_a_step_is_refused(tmp_path, storage, name):
    source = open_simple(tmp_path, storage, simple(3), simple(3) | {name: np.zeros((3, 2))})
    with pytest.raises(InputError, match=rf"'{name}' has shape \(2,\) per step, not one number"):
        source.load(1)


@storages
def test_ends_that_contradict_themselves(tmp_path, storage):
    both = simple(3) | {"truncations": np.array([0, 0, 1], bool)}
    none = simple(3, end="neither")
    early = simple(3) | {"truncations": np.array([1, 0, 0], bool)}
    source = open_simple(tmp_path, storage, both, none, early)
    assert checks(source) == ["early-end", "terminal-and-timeout", "no-end"]
    flags = [(found.terminated.tolist(), found.truncated.tolist()) for found in map(source.load, range(3))]
    last, never = [False, False, True, False], [False] * 4
    assert flags == [(last, never), (never, last), (last, never)]


@storages
def test_counts_and_gaps_are_reported(tmp_path, storage):
    metadata = {"total_steps": 99, "total_episodes": 7}
    episodes = {10: simple(2), 2: simple(3), 0: simple(4)}
    root = write_dataset(tmp_path / "d", storage, episodes, OBSERVATIONS, ACTIONS, metadata)
    source = read_minari.read(root, {})
    assert [finding.message for finding in source.findings] == [
        "the metadata says total_episodes = 7; the files hold 3.",
        "the metadata says total_steps = 99; the files hold 9.",
        "8 of the numbers below episode 10 have no episode.",
    ]
    assert [len(source.load(i)) for i in range(3)] == [5, 4, 3]
    assert source.load(2).source_id == "toy/set-v0/episode_10"
    assert source.attributes["seeds"] == [100, 102, 110]


def test_every_path_to_a_dataset_is_accepted(tmp_path):
    root = write_dataset(tmp_path / "d", "hdf5", {0: simple(2)}, OBSERVATIONS, ACTIONS)
    for path in (root, root / "data", root / "data" / "main_data.hdf5"):
        assert read_minari.sniff(path)
        assert read_minari.read(path, {}).spec.environment == "Toy-v0"
    arrow = write_dataset(tmp_path / "a", "arrow", {0: simple(2)}, OBSERVATIONS, ACTIONS)
    assert read_minari.sniff(arrow)
    assert read_minari.read(arrow / "data", {}).num_episodes == 1
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", root / "data" / "metadata.json", tmp_path):
        assert not read_minari.sniff(path)
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.arange(3)
    assert not read_minari.sniff(tmp_path / "other.hdf5")
    with pytest.raises(InputError, match=r"no main_data\.hdf5, nor folders"):
        read_minari.read(tmp_path / "empty", {})
    with pytest.raises(InputError, match="holds no episode"):
        read_minari.read(tmp_path / "other.hdf5", {})
    with pytest.raises(ConfigError, match="no option 'split'"):
        read_minari.read(root, {"split": "x"})


def test_before_0_5_the_metadata_is_in_the_file(tmp_path):
    root = write_dataset(tmp_path / "d", "hdf5", {0: simple(2)}, OBSERVATIONS, ACTIONS)
    metadata = root / "data" / "metadata.json"
    with h5py.File(root / "data" / "main_data.hdf5", "a") as file:
        file.attrs.update({k: v for k, v in json.loads(metadata.read_text()).items() if k != "author"})
    metadata.unlink()
    source = read_minari.read(root, {})
    assert source.spec.environment == "Toy-v0"
    assert source.spec.observations["observation"].low == (-1, -1, -1)
    assert source.attributes["metadata"]["dataset_id"] == "toy/set-v0"


@storages
def test_metadata_that_is_no_such_thing_is_not_followed(tmp_path, storage):
    odd = {"observation_space": "[" * 50_000, "action_space": {"type": 3}, "env_spec": 7, "total_steps": "many"}
    source = open_simple(tmp_path, storage, simple(3), metadata=odd | {"total_episodes": None})
    assert source.spec.observations["observation"].low == ()
    assert source.spec.environment == ""
    source.load(0).check(source.spec)


def test_actions_that_are_no_numbers_are_refused(tmp_path):
    whole = episode(2, np.zeros((3, 3), "f4"), ["left", "right"])
    root = write_dataset(tmp_path / "d", "hdf5", {0: whole}, OBSERVATIONS, TEXT)
    with pytest.raises(InputError, match="no part of the actions is numbers"):
        read_minari.read(root, {})


def test_an_info_without_its_first_row_is_repeated_at_the_end(tmp_path):
    short = simple(3, infos={"x": np.arange(3.0)})
    assert open_simple(tmp_path, "hdf5", short).load(0).observations["info_x"].tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_arrow_is_refused(tmp_path, codec):
    root = write_dataset(tmp_path / "d", "arrow", {0: simple(2), 1: simple(2)}, OBSERVATIONS, ACTIONS)
    write_table(root / "data" / "1" / "part-0.arrow", arrow_table(simple(2)), compression=codec)
    source = read_minari.read(root, {})
    with pytest.raises(InputError, match="compressed record batch"):
        source.load(1)


def test_a_link_out_of_the_file_is_not_followed(tmp_path):
    root = write_dataset(tmp_path / "d", "hdf5", {0: simple(2), 1: simple(2)}, OBSERVATIONS, ACTIONS)
    other = write_dataset(tmp_path / "o", "hdf5", {0: simple(2)}, OBSERVATIONS, ACTIONS) / "data" / "main_data.hdf5"
    with h5py.File(root / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1/observations"]
        file["episode_1/observations"] = h5py.ExternalLink(str(other), "/episode_0/observations")
    with pytest.raises(InputError, match="link out of the file"):
        read_minari.read(root, {}).load(1)


def test_without_its_metadata_an_arrow_episode_has_a_row_of_padding(tmp_path):
    root = write_dataset(tmp_path / "d", "arrow", {0: simple(3)}, OBSERVATIONS, ACTIONS)
    (root / "data" / "0" / "metadata.json").write_text("{}")
    assert read_minari.read(root, {}).load(0).step_valid.tolist() == [True, True, True, False]
    (root / "data" / "0" / "metadata.json").unlink()
    (root / "data" / "metadata.json").unlink()
    source = read_minari.read(root, {})
    assert source.attributes["seeds"] == [None]
    assert source.load(0).step_valid.tolist() == [True, True, True, False]


@storages
def test_a_truncated_file_costs_its_episode(tmp_path, storage):
    root = write_dataset(tmp_path / "d", storage, {0: simple(20), 1: simple(20)}, OBSERVATIONS, ACTIONS)
    file = root / "data" / ("main_data.hdf5" if storage == "hdf5" else f"1/part-0.{storage}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if storage == "hdf5":
        with pytest.raises(InputError, match="truncated or damaged"):
            read_minari.read(root, {})
    else:
        store = import_dataset(root, tmp_path / "s")
        assert store.num_episodes == 1
        assert "cannot be read" in store.findings[-1].message

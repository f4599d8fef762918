import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import read_rlds
from embodied.datasets.importer import import_dataset
from embodied.datasets.source import Source

sys.path.insert(0, str(Path(__file__).parent))
from tfrecord_files import TEXT, encoded, example, framed, image, steps, tensor, tree, write_dataset

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "rlds-bridge-debug").exists(), reason="real data is not here")

FLAGS = {
    "is_first": tensor(dtype="bool"),
    "is_last": tensor(dtype="bool"),
    "is_terminal": tensor(dtype="bool"),
    "discount": tensor(),
    "reward": tensor(),
}
TREE = tree(
    steps=steps(**FLAGS, observation=tree(state=tensor((2,))), action=tensor((3,)), language_instruction=TEXT),
    episode_metadata=tree(success=tensor(dtype="bool"), file_path=TEXT),
)


def flags(n: int, last: bool = True, terminal: bool = False) -> dict[str, Any]:
    end = np.arange(n) == n - 1
    return {
        "steps/is_first": np.arange(n) == 0,
        "steps/is_last": end & last,
        "steps/is_terminal": end & terminal,
        "steps/discount": np.ones(n),
        "steps/reward": np.arange(n) + 10.0,
    }


def episode(n: int, last: bool = True, terminal: bool = False, **changes: Any) -> bytes:
    lists = {
        **flags(n, last, terminal),
        "steps/observation/state": np.arange(2.0 * n),
        "steps/action": np.arange(3.0 * n) + 100,
        "steps/language_instruction": [b"open it"] * n,
        "episode_metadata/success": np.array([terminal]),
        "episode_metadata/file_path": [b"/somewhere"],
    }
    return example({name: value for name, value in (lists | changes).items() if value is not None})


def checks(source: Source) -> list[str]:
    return [finding.check for finding in source.findings]


def open_toy(tmp_path: Path, *records: bytes, features: Any = TREE, **options: Any) -> Source:
    return read_rlds.read(write_dataset(tmp_path / "toy", features, {"train": [list(records)]}), options)


def test_the_last_step_is_the_final_observation(tmp_path):
    folder = write_dataset(tmp_path / "toy" / "1.0.0", TREE, {"train": [[episode(4), episode(3, terminal=True)]]})
    store = import_dataset(folder.parent, tmp_path / "s")
    assert store.episode_length.tolist() == [4, 3]
    assert store.read("step_valid").tolist() == [1, 1, 1, 0, 1, 1, 0]
    assert np.flatnonzero(store.read("truncated")).tolist() == [2]
    assert np.flatnonzero(store.read("terminated")).tolist() == [5]
    assert store.read("action")[:, 0].tolist() == [100, 103, 106, 0, 100, 103, 0]
    assert store.read("reward").tolist() == [10, 11, 12, 0, 10, 11, 0]
    assert (
        store.read("observation/state").tolist()
        == np.arange(8).reshape(4, 2).tolist() + np.arange(6).reshape(3, 2).tolist()
    )
    assert store.instructions == ["open it"] * 2
    assert store.success.tolist() == [0, 1]
    record = store.attributes["provenance"]["source_attributes"]
    assert record["splits"] == {"train": [0, 2]}
    assert record["observations_left_out"] == {"episode_metadata/file_path": "text"}
    assert store.episode(1).source_id == "toy-train.tfrecord-00000-of-00001/record 1"


def test_a_reward_on_the_last_step_is_reported_and_kept_on_request(tmp_path):
    source = open_toy(tmp_path, episode(4, terminal=True))
    assert checks(source) == ["paid-last-step", "terminal-discount"]
    assert "--options last_step step" in source.findings[0].advice
    kept = open_toy(tmp_path / "again", episode(4, terminal=True), last_step="step")
    assert checks(kept) == ["terminal-discount"]
    found = kept.load(0)
    assert found.reward is not None
    assert found.reward.tolist() == [10, 11, 12, 13]
    assert found.step_valid.tolist() == [True] * 4
    assert found.terminated.tolist() == [False, False, False, True]


def test_windows_without_last_step_keep_every_step(tmp_path):
    source = open_toy(tmp_path, episode(4, last=False), episode(4))
    assert source.findings[0].message.startswith("1 of 2 episodes have no step marked is_last")
    found = source.load(0)
    assert found.step_valid.tolist() == [True, True, True, False], "the last step's successor is unknown"
    assert found.truncated.tolist() == [False, False, False, True]
    assert found.action is not None
    assert found.action[3].tolist() == [109, 110, 111]


@pytest.mark.parametrize(
    ("discount", "terminal", "terminated", "check"),
    [
        ([1, 1, 0, 0], False, True, "discount-disagrees"),
        ([1, 1, 1, 0], False, True, "discount-disagrees"),
        ([0, 0, 0, 0], False, False, None),
        ([1, 1, 0, 0], True, True, None),
        ([1, 1, 1, 1], True, True, "terminal-discount"),
    ],
)
def test_discount_and_terminal_flag(tmp_path, discount, terminal, terminated, check):
    changes: dict[str, Any] = {"steps/discount": np.array(discount, float), "steps/reward": np.array([1.0, 0, 0, 0])}
    source = open_toy(tmp_path, episode(4, terminal=terminal, **changes))
    assert checks(source) == ([check] if check else [])
    assert source.load(0).terminated.any() == terminated


def test_early_terminals_changing_words_and_no_reward_are_reported(tmp_path):
    changes: dict[str, Any] = {
        "steps/is_terminal": np.array([0, 1, 0, 0]),
        "steps/language_instruction": [b"", b"open", b"close", b"close"],
        "steps/reward": np.zeros(4),
    }
    source = open_toy(tmp_path, episode(4, **changes))
    assert checks(source) == ["early-terminal", "instruction-changes", "reward-zero"]
    assert source.load(0).instruction == "open"
    assert not source.load(0).terminated.any()


def test_nested_keys_action_dictionaries_and_encodings(tmp_path):
    embedding = tensor((4,))
    features = tree(
        steps=steps(
            is_last=tensor(dtype="bool"),
            observation=tree(
                arm=tree(joints=tensor((2,)), gripper=tensor(dtype="int32")),
                natural_language_embedding=embedding,
                natural_language_instruction=TEXT,
                packed=tensor((2, 2), "uint16", "zlib"),
                raw=tensor((2,), "float64", "bytes"),
                depth=tensor((48, 64), "float32"),
                cloud=tensor((-1, 3), "float32"),
                points={"pythonClassName": "t.Sequence", "sequence": {"feature": tensor((3,)), "length": "-1"}},
                thermal=image((4, 4, 1), "png", "uint16"),
                sound={"pythonClassName": "a.b.Audio", "audio": {"shape": {"dimensions": ["-1"]}}},
            ),
            action=tree(world_vector=tensor((3,)), grip=tensor(), terminate=tensor((2,), "int32"), words=TEXT),
            action_dict=tree(joint_position=tensor((2,))),
        )
    )
    n = 3
    pairs = np.arange(4 * n, dtype="<u2").reshape(n, 2, 2)
    record = example(
        {
            "steps/is_last": np.arange(n) == n - 1,
            "steps/observation/arm/joints": np.arange(2.0 * n),
            "steps/observation/arm/gripper": -np.arange(n),
            "steps/observation/natural_language_embedding": np.zeros(4 * n),
            "steps/observation/natural_language_instruction": [b"push"] * n,
            "steps/observation/packed": [zlib.compress(step.tobytes()) for step in pairs],
            "steps/observation/raw": [np.array([i, 0.5]).tobytes() for i in range(n)],
            "steps/observation/depth": np.zeros(n * 48 * 64),
            "steps/action/world_vector": np.arange(3.0 * n),
            "steps/action/grip": np.full(n, 7.0),
            "steps/action/terminate": np.tile([0, 1], n),
            "steps/action_dict/joint_position": np.ones(2 * n),
        }
    )
    source = open_toy(tmp_path, record, features=features)
    assert source.spec.action is not None
    assert source.spec.action.names == (
        "grip",
        "terminate.0",
        "terminate.1",
        "world_vector.0",
        "world_vector.1",
        "world_vector.2",
    )
    assert {key: spec.shape for key, spec in source.spec.observations.items()} == {
        "arm.joints": (2,),
        "arm.gripper": (),
        "natural_language_embedding": (4,),
        "packed": (2, 2),
        "raw": (2,),
        "depth": (48, 64),
        "action_dict.joint_position": (2,),
    }
    privileged = [key for key, spec in source.spec.observations.items() if spec.privileged]
    assert privileged == ["natural_language_embedding", "action_dict.joint_position"]
    left_out = source.attributes["observations_left_out"]
    assert left_out["steps/observation/cloud"] == "of no fixed shape"
    assert left_out["steps/observation/points"] == "a sequence within each step"
    assert left_out["steps/observation/thermal"] == "uint16 (4, 4, 1) per step: no RGB picture of bytes"
    assert left_out["steps/observation/sound"] == "a feature of kind Audio"
    assert left_out["steps/action/words"] == "text"
    found = source.load(0)
    found.check(source.spec)
    assert found.action is not None
    assert found.action[1].tolist() == [7, 0, 1, 3, 4, 5]
    assert found.observations["arm.gripper"].tolist() == [0, -1, -2]
    assert found.observations["packed"].tolist() == pairs.tolist()
    assert found.observations["raw"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]
    assert found.instruction == "push"


def camera_tree(shape: tuple[int, ...] = (-1, -1, 3)) -> dict[str, Any]:
    return tree(
        steps=steps(**FLAGS, observation=tree(top=image(shape), wrist=image(shape)), action=tensor((1,))),
        episode_metadata=tree(has_top=tensor(dtype="bool"), has_wrist=tensor(dtype="bool")),
    )


def camera_episode(top: np.ndarray, wrist: np.ndarray, has: tuple[int, int], format: str = "PNG") -> bytes:
    lists = {
        **flags(len(top)),
        "steps/observation/top": encoded(top, format),
        "steps/observation/wrist": encoded(wrist, format),
        "steps/action": np.zeros(len(top)),
        "episode_metadata/has_top": np.array([has[0]]),
        "episode_metadata/has_wrist": np.array([has[1]]),
    }
    return example(lists)


def test_pictures_are_decoded_as_the_files_have_them(tmp_path):
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (5, 6, 8, 3), np.uint8)
    grey = rng.integers(0, 256, (5, 6, 8), np.uint8)
    source = open_toy(tmp_path, camera_episode(color, grey, (1, 1)), features=camera_tree((7, 8, 3)))
    assert [finding.check for finding in source.findings if "pictures" in finding.message] == ["picture-size"] * 2
    images = source.load(0).images
    assert np.array_equal(np.asarray(images["top"]), color)
    assert np.array_equal(np.asarray(images["wrist"]), np.repeat(grey[..., None], 3, -1))


def test_a_camera_called_absent_is_left_out_only_where_it_is_black(tmp_path):
    bright, black = np.full((3, 16, 16, 3), 90, np.uint8), np.zeros((3, 16, 16, 3), np.uint8)
    records = [
        camera_episode(bright, black, (1, 0), "JPEG"),
        camera_episode(bright, bright, (0, 1), "JPEG"),
        camera_episode(black, bright, (0, 1), "JPEG"),
    ]
    source = open_toy(tmp_path, *records, features=camera_tree())
    assert [sorted(source.load(i).images) for i in range(3)] == [["top"], ["top", "wrist"], ["wrist"]]
    message = next(finding.message for finding in source.findings if finding.check == "camera-flag")
    assert message == "1 of 3 episodes say has_top = False, but their 'top' shows pictures: they are kept."
    store = import_dataset(tmp_path / "toy", tmp_path / "s")
    assert store.has_camera("wrist").tolist() == [False, True, True]
    every = open_toy(tmp_path / "every", records[0], records[0], features=camera_tree())
    assert sorted(every.spec.images) == ["top"]
    assert "absent in every episode" in every.attributes["observations_left_out"]["steps/observation/wrist"]


def test_a_damaged_picture_leaves_out_its_episode_only(tmp_path):
    rows = np.full((3, 16, 16, 3), 90, np.uint8)
    damaged = camera_episode(rows, rows, (1, 1)).replace(b"IDAT", b"IDXT")
    other_size = camera_episode(rows[:, :8], rows, (1, 1))
    records = [camera_episode(rows, rows, (1, 1)), damaged, other_size]
    write_dataset(tmp_path / "toy", camera_tree(), {"train": [records]})
    store = import_dataset(tmp_path / "toy", tmp_path / "s")
    assert store.num_episodes == 1
    left_out = [finding for finding in store.findings if finding.check == "episode-left-out"]
    assert "'top' 0 is no JPEG or PNG picture" in left_out[0].message
    assert "'top' 0 is a picture of (8, 16); (16, 16) is expected" in left_out[1].message


def test_pictures_are_read_a_few_at_a_time(tmp_path):
    rows = np.zeros((20, 512, 512, 3), np.uint8)
    rows += np.arange(20, dtype=np.uint8)[:, None, None, None]
    source = open_toy(tmp_path, camera_episode(rows, rows[:, :4, :4], (1, 1)), features=camera_tree())
    frames = source.load(0).images["top"]
    blocks = [(len(block), int(block[0, 0, 0, 0])) for block in frames.blocks()]  # type: ignore[union-attr]
    assert blocks == [(5, 0), (5, 5), (5, 10), (5, 15)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps/is_last": np.array([0, 1, 0, 0])}, "goes on after its end: is_last at step 1 of 4"),
        ({"steps/is_first": np.array([1, 0, 1, 0])}, "second episode starts within it: is_first at step 2"),
        ({"steps/action": None}, "lacks 'steps/action'"),
        ({"steps/reward": None}, "lacks 'steps/reward'"),
        ({"steps/reward": np.zeros(3)}, "lists differ in length: .*reward 3"),
        ({"steps/observation/state": np.zeros(7)}, "7 values, which is no whole number of steps"),
        ({"steps/observation/state": np.zeros(6)}, "differ in length"),
        ({"steps/observation/state": [b"text"]}, "byte strings where numbers are expected"),
        ({"steps/language_instruction": np.zeros(4)}, "float values where byte strings"),
    ],
)
def test_an_episode_that_contradicts_itself_is_left_out(tmp_path, changes, message):
    source = open_toy(tmp_path, episode(4), episode(4, **changes))
    source.load(0).check(source.spec)
    with pytest.raises(InputError, match=message) as caught:
        source.load(1)
    assert "toy-train.tfrecord-00000-of-00001/record 1" in str(caught.value)


def test_an_episode_of_a_single_observation_is_left_out(tmp_path):
    source = open_toy(tmp_path, episode(1), episode(0))
    with pytest.raises(InputError, match="single step, marked is_last"):
        source.load(0)
    with pytest.raises(InputError, match="has no steps"):
        source.load(1)


def test_shards_and_splits(tmp_path):
    shards = [[episode(2), episode(3)], [episode(4)], [episode(5)]]
    folder = write_dataset(tmp_path / "toy", TREE, {"train": shards, "val": [[episode(6)]]})
    source = read_rlds.read(folder, {})
    assert [len(source.load(i)) for i in range(5)] == [2, 3, 4, 5, 6]
    assert source.attributes["splits"] == {"train": [0, 4], "val": [4, 5]}
    assert source.load(4).source_id == "toy-val.tfrecord-00000-of-00001/record 0"
    only = read_rlds.read(folder, {"split": "val"})
    assert only.num_episodes == 1
    (folder / "toy-train.tfrecord-00001-of-00003").unlink()
    source = read_rlds.read(folder, {"split": "train"})
    assert [len(source.load(i)) for i in range(3)] == [2, 3, 5]
    messages = [finding.message for finding in source.findings]
    assert messages[0] == "1 of the 3 shards of toy-train are missing: 00001."
    assert messages[1] == "dataset_info.json says 4 episodes in split 'train'; its files hold 3."
    with pytest.raises(InputError, match=r"no split 'vall'. Did you mean 'val'\?"):
        read_rlds.read(folder, {"split": "vall"})
    with pytest.raises(ConfigError, match="no option 'splitt'"):
        read_rlds.read(folder, {"splitt": "val"})
    with pytest.raises(ConfigError, match="neither 'observation' nor 'step'"):
        read_rlds.read(folder, {"last_step": "row"})


def test_a_flipped_bit_costs_one_episode_and_a_cut_file_its_rest(tmp_path):
    records = [episode(n) for n in (2, 3, 4)]
    folder = write_dataset(tmp_path / "toy", TREE, {"train": [records]})
    shard = next(folder.glob("*.tfrecord-*"))
    whole = shard.read_bytes()
    place = len(framed(records[0])) + 40
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    store = import_dataset(folder, tmp_path / "s")
    assert store.episode_length.tolist() == [2, 4]
    assert "checksum" in store.findings[-1].message
    shard.write_bytes(whole[:-1])
    source = read_rlds.read(folder, {})
    assert source.num_episodes == 2
    assert "ends within a record" in source.findings[0].message
    assert source.findings[0].severity == "error"


def test_stale_and_damaged_metadata_is_reported_and_the_files_are_read(tmp_path):
    folder = write_dataset(tmp_path / "toy", TREE, {"train": [[episode(3)]]})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["numBytes"] = "7"
    info["splits"].append({"name": "test", "shardLengths": ["3", "4"]})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert checks(read_rlds.read(folder, {}))[:2] == ["data-size", "missing-split"]
    (folder / "dataset_info.json").write_text("{")
    assert checks(read_rlds.read(folder, {}))[0] == "metadata-damaged"
    (folder / "dataset_info.json").unlink()
    assert checks(read_rlds.read(folder, {})) == ["paid-last-step"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"type": "tfds.FeaturesDict", "content": {}}, "TFDS 4.4 and newer"),
        ([1], "TFDS 4.4 and newer"),
        (tree(x=tensor()), "no observations below 'steps'"),
        (tree(steps=steps(observation=3)), "tree of features is damaged"),
        (tree(steps={"sequence": {"feature": None}}), "tree of features is damaged"),
    ],
)
def test_features_that_are_no_rlds_are_refused(tmp_path, features, message):
    with pytest.raises(InputError, match=message):
        open_toy(tmp_path, episode(3), features=features)


def test_a_tree_that_is_too_deep_is_refused(tmp_path):
    deep: Any = tensor()
    for _ in range(100):
        deep = tree(a=deep)
    with pytest.raises(InputError, match="deeper than 16"):
        open_toy(tmp_path / "a", episode(3), features=deep)
    folder = write_dataset(tmp_path / "toy", TREE, {"train": [[episode(3)]]})
    (folder / "features.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_rlds.read(folder, {})


def test_names_that_leave_the_store_are_left_out(tmp_path):
    odd = {"..": tensor((2,)), "a\\b": tensor((2,)), "images": tensor((2,)), "fine": tensor((2,))}
    features = tree(steps=steps(observation=tree(**odd), action=tensor((1,))))
    lists = {f"steps/observation/{name}": np.zeros(6) for name in odd}
    source = open_toy(tmp_path, example(lists | {"steps/action": np.zeros(3)}), features=features)
    assert list(source.spec.observations) == ["fine"]


def test_recognised_by_name_at_any_depth(tmp_path):
    write_dataset(tmp_path / "bridge" / "small" / "1.0.0", TREE, {"train": [[episode(3)]]})
    assert read_rlds.sniff(tmp_path / "bridge")
    assert read_rlds.sniff(tmp_path / "bridge" / "small" / "1.0.0")
    assert not read_rlds.sniff(tmp_path / "bridge" / "small" / "1.0.0" / "features.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "features.json").write_text("{}")
    assert not read_rlds.sniff(tmp_path / "other")
    write_dataset(tmp_path / "empty", TREE, {})
    with pytest.raises(InputError, match="has no files <name>-<split>"):
        read_rlds.read(tmp_path / "empty", {})
    with pytest.raises(InputError, match="holds 2 datasets: empty, other"):
        read_rlds.read(tmp_path, {})
    with pytest.raises(InputError, match=r"has no features\.json"):
        read_rlds.read(tmp_path / "bridge" / "small" / "1.0.0" / "features.json", {})


@real
@pytest.mark.parametrize("name", ["rlds-bridge-debug", "rlds-bridge-debug-val"])
def test_real_bridge_windows(tmp_path, name):
    facts = json.loads((DATA / name / "facts.json").read_text())
    store = import_dataset(DATA / name, tmp_path / "s")
    assert store.num_episodes == facts["records"]
    assert store.episode_length.tolist() == facts["steps"]
    assert store.instructions == facts["instructions"]
    assert np.abs(store.read("action")[::10] - facts["action_first"]).max() < 1e-5, "they are printed to 5 digits"
    assert store.read("reward").sum() == sum(facts["reward_sum"]) == 0
    assert store.read("terminated").sum() == sum(facts["is_terminal_sum"]) == 0
    assert store.read("step_valid").reshape(25, 10).sum(1).tolist() == [9] * 25
    assert store.spec.observations["language_embedding"].privileged
    assert sorted(store.spec.images) == ["image_0", "image_1", "image_2"], "image_3 is black throughout"
    found = [finding.check for finding in store.findings]
    # Their flags say that no camera is there; three are.
    assert found == ["missing-split", "no-last-step", "reward-zero", *["camera-flag"] * 3]


@real
def test_the_real_splits_hold_the_same_windows_in_another_order():
    train, val = (read_rlds.read(DATA / f"rlds-bridge-debug{suffix}", {}) for suffix in ("", "-val"))

    def contents(source: Source) -> list[tuple[bytes, bytes]]:
        episodes = [source.load(i) for i in range(source.num_episodes)]
        return [
            (found.observations["state"].tobytes(), np.asarray(found.images["image_0"]).tobytes()) for found in episodes
        ]

    first, second = contents(train), contents(val)
    assert first != second
    assert sorted(first) == sorted(second)

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import lerobot_data, parquet, read_lerobot
from embodied.datasets.importer import import_dataset, recognise

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_fixtures import (
    edit_info,
    features,
    grey_levels,
    make_v2,
    make_v3,
    read_levels,
    write_lines,
)

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "lerobot-v21-g1-real").exists(), reason="real data is not here")


def read(path, **options):
    return read_lerobot.read(path, options)


def findings(source):
    return {(finding.check, finding.message) for finding in source.findings}


MAKERS = {
    "v2.0": lambda root: make_v2(root, version="2.0"),
    "v2.1": lambda root: make_v2(root),
    "v2.1 embedded": lambda root: make_v2(root, embedded=True),
    "v3.0": lambda root: make_v3(root),
    "v3.0 embedded": lambda root: make_v3(root, embedded=True),
    "v3.0 out of order": lambda root: make_v3(root, order=[3, 0, 2, 1], per_file=3),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_version_gives_the_rows_and_pictures_that_were_written(tmp_path, kind):
    root = MAKERS[kind](tmp_path / "set")
    lengths = [4, 6, 3] if kind.startswith("v2") else [4, 6, 3, 5]
    assert recognise(root) == "lerobot"
    source = read(root)
    assert source.findings == ()
    assert source.num_episodes == len(lengths)
    spec = source.spec
    assert spec.observations["state"].shape == (3,)
    assert spec.observations["state"].names == ("a", "b", "grip")
    assert spec.action is not None
    assert spec.action.names == ("x", "y")
    assert spec.images["cam"].shape == (16, 24, 3)
    assert spec.control_dt == pytest.approx(0.1)
    assert source.attributes["original_names"] == {"state": "observation.state", "cam": "observation.images.cam"}
    for i in (2, 0, 1, *range(3, len(lengths))):  # any order
        episode = source.load(i)
        episode.check(spec)
        rows = np.arange(lengths[i])
        assert len(episode) == lengths[i]
        np.testing.assert_array_equal(episode.observations["state"][:, 0], i)
        np.testing.assert_array_equal(episode.observations["state"][:, 1], rows)
        assert episode.action is not None
        np.testing.assert_array_equal(episode.action[:, 0], 2 * rows)
        np.testing.assert_allclose(episode.timestamp, rows / 10, atol=1e-6)
        np.testing.assert_allclose(read_levels(episode.images["cam"]), grey_levels(lengths[i], 10 * i), atol=4)
        assert episode.instruction == f"task {i % 2}"
        assert episode.source_id == f"set/episode {i}"
        assert episode.truncated[-1]
        assert not episode.step_valid[-1]


def test_an_import_ends_in_a_store(tmp_path):
    store = import_dataset(make_v3(tmp_path / "set"), tmp_path / "store")
    assert store.num_episodes == 4
    assert store.num_frames == 18
    levels = [level for e, n in enumerate([4, 6, 3, 5]) for level in grey_levels(n, 10 * e)]
    np.testing.assert_allclose(read_levels(store.frames("cam")), levels, atol=4)


def test_outcome_of_an_episode(tmp_path):
    def extra(episode, length):
        last = np.arange(length) == length - 1
        return {
            "next.reward": pa.array(np.arange(length, dtype=np.float32)),
            "next.done": pa.array(last),
            "next.success": pa.array(last & (episode == 1)),
            "next.truncated": pa.array(last & (episode == 2)),
        }

    source = read(make_v2(tmp_path / "set", extra=extra, camera=False))
    assert source.spec.has_reward
    found = []
    for i in range(3):
        episode = source.load(i)
        episode.check(source.spec)
        assert episode.reward is not None
        np.testing.assert_array_equal(episode.reward, np.arange(len(episode)))
        found.append((bool(episode.terminated[-1]), bool(episode.truncated[-1]), episode.success))
    # "done" means over: a failure that is done was cut, and so was what says that it was.
    assert found == [(False, True, False), (True, False, True), (False, True, False)]
    assert source.load(1).step_valid.all()


@pytest.mark.parametrize(
    ("ends", "terminated"),
    [
        ({"done": True}, True),
        ({"done": False}, False),
        ({"done": True, "truncated": True}, False),
        ({"done": True, "terminated": False}, False),
        ({"done": True, "success": False, "terminated": True}, True),
        ({"success": True}, False),
    ],
)
def test_done_means_over_and_not_that_the_task_ended(tmp_path, ends, terminated):
    def extra(episode, length):
        last = np.arange(length) == length - 1
        return {f"next.{name}": pa.array(last & value) for name, value in ends.items()}

    episode = read(make_v2(tmp_path / "set", lengths=(3,), extra=extra, camera=False)).load(0)
    assert (bool(episode.terminated[-1]), bool(episode.truncated[-1])) == (terminated, not terminated)


def test_episodes_are_found_in_any_order_of_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_BATCH_ROWS", 2)  # batches end inside episodes
    source = read(make_v3(tmp_path / "set", lengths=(3, 5, 1, 4, 7), per_file=5))
    for i in (4, 0, 3, 1, 1, 2, 4):
        episode = source.load(i)
        rows = np.arange([3, 5, 1, 4, 7][i])
        np.testing.assert_array_equal(episode.observations["state"][:, 0], i)
        np.testing.assert_array_equal(episode.observations["state"][:, 1], rows)


def test_files_are_the_truth_and_metadata_a_claim(tmp_path):
    root = make_v2(tmp_path / "set", camera=False)
    edit_info(root, total_frames=999, total_episodes=7)
    rows = [{"episode_index": i, "tasks": ["x"], "length": 5} for i in (0, 1, 5)]
    write_lines(root / "meta" / "episodes.jsonl", rows)
    source = read(root)
    assert source.num_episodes == 3
    assert [len(source.load(i)) for i in range(3)] == [4, 6, 3]
    messages = " ".join(message for _, message in findings(source))
    assert "info.json says 999 frames, the data files hold 13" in messages
    assert "info.json says 7 episodes, the data files hold 3" in messages
    assert "1 episodes of the episode table have no rows: 5" in messages
    assert "1 episodes are not in the episode table: 2" in messages
    assert "2 episodes have another length than the table says: 0, 1 (episode 0: 4 rows, the table says 5)" in messages


@pytest.mark.parametrize("where", ["meta/episodes.jsonl", "meta/info.json", "data"])
def test_what_is_needed_and_absent_is_named(tmp_path, where):
    root = make_v2(tmp_path / "set", camera=False)
    (root / where).rename(tmp_path / "away")
    reason = {
        "meta/episodes.jsonl": "no episode table",
        "meta/info.json": "no meta/info.json",
        "data": "no file matches",
    }
    with pytest.raises(InputError, match=reason[where]):
        read(root)


def test_versions_that_are_not_read_are_named(tmp_path):
    root = make_v2(tmp_path / "set", camera=False)
    edit_info(root, codebase_version="v1.6")
    with pytest.raises(InputError, match=r"LeRobot's format '1\.6' is not read here, only v2\.0, v2\.1 and v3\.0"):
        read(root)
    (root / "meta" / "info.json").write_text('{"codebase_version": "v2.1", ')
    assert recognise(root) == "lerobot"
    with pytest.raises(InputError, match=r"info\.json is no valid JSON"):
        read(root)
    (root / "meta" / "info.json").write_text("{")
    assert not read_lerobot.sniff(root)


@pytest.mark.parametrize(
    "template", ["../{episode_index}.parquet", "/etc/{episode_index}.parquet", "a/../../b.parquet"]
)
@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_templates_may_not_lead_out_of_the_dataset(tmp_path, key, template):
    root = make_v2(tmp_path / "set")
    edit_info(root, **{key: template})
    with pytest.raises(InputError, match="leads out of the dataset"):
        read(root)


def test_templates_are_filled_without_format(tmp_path):
    root = make_v2(tmp_path / "set")
    for template in ("videos/{video_key.__class__}/a.mp4", "videos/{episode_index:099999999d}.mp4"):
        edit_info(root, video_path=template)
        assert read(root).spec.images == {}


def test_one_damaged_data_file_costs_its_episodes_only(tmp_path):
    root = make_v2(tmp_path / "set", camera=False)
    (root / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1 no more PAR1")
    (root / "data/chunk-000/copy of episode_000000.parquet").write_bytes(b"")
    source = read(root)
    assert [source.load(i).source_id for i in range(2)] == ["set/episode 0", "set/episode 2"]
    checks = [finding.check for finding in source.findings]
    assert checks.count("data-file") == 1
    assert checks.count("other-files") == 1


def test_an_episode_in_two_files_is_joined_by_frame_index(tmp_path):
    root = make_v2(tmp_path / "set", lengths=(6,))
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(4), path)
    pq.write_table(table.slice(0, 4), root / "data/chunk-000/episode_000001.parquet")
    source = read(root)
    episode = source.load(0)
    np.testing.assert_array_equal(episode.observations["state"][:, 1], np.arange(6))
    np.testing.assert_allclose(read_levels(episode.images["cam"]), grey_levels(6), atol=4)
    pq.write_table(table.slice(0, 5), root / "data/chunk-000/episode_000001.parquet")
    with pytest.raises(InputError, match="frame_index repeats or goes back"):
        read(root).load(0)


def test_columns_of_other_kinds(tmp_path):
    def extra(episode, length):
        return {
            "observation.matrix": pa.array(np.arange(length * 4).reshape(length, 2, 2).tolist()),
            "observation.contact": pa.array(np.arange(length) % 2 == 0),
            "observation.ragged": pa.array([[0.0] * (1 + i) for i in range(length)]),
            "note": pa.array(["x"] * length),
            "action.gripper": pa.array(np.zeros(length)),
            "actions": pa.array(np.zeros(length)),
            "observation.images": pa.array(np.zeros(length)),
            "observation.a/b": pa.array(np.zeros(length)),
        }

    root = make_v2(tmp_path / "set", lengths=(3,), extra=extra, camera=False)
    source = read(root)
    spec = source.spec.observations
    assert {key: array.shape for key, array in spec.items() if key != "state"} == {
        "matrix": (2, 2),
        "contact": (),
        "ragged": (1,),
        "a_b": (),
        "observation.images": (),
    }
    assert set(source.attributes["observations_left_out"]) == {"note", "action.gripper", "actions"}
    with pytest.raises(InputError, match=r"'.*observation\.ragged' holds lists of 1 to 3 numbers"):
        source.load(0)


def test_names_and_shapes_that_do_not_fit_the_files(tmp_path):
    root = make_v2(tmp_path / "set", camera=False)
    more = features(camera=False)
    more["observation.state"] |= {"shape": [7], "names": ["a"] * 7}
    more["action"]["names"] = {"axes": {"x": 0, "y": 1}}
    more["observation.gone"] = {"dtype": "float32", "shape": [1], "names": None}
    edit_info(root, features=more, fps=float("nan"))
    source = read(root)
    assert source.spec.observations["state"].shape == (3,)
    assert source.spec.observations["state"].names == ()
    assert source.spec.action is not None
    assert source.spec.action.names == ("x", "y")
    assert source.spec.control_dt == 0
    messages = " ".join(message for _, message in findings(source))
    assert "info.json says that 'observation.state' is [7], the files hold [3]" in messages
    assert "info.json lists observation.gone" in messages
    json.dumps(source.attributes, allow_nan=False)


def test_options(tmp_path):
    root = make_v3(tmp_path / "set")
    assert read(root, cameras="none").spec.images == {}
    assert list(read(root, cameras="cam").spec.images) == ["cam"]
    with pytest.raises(ConfigError, match=r"there is no 'cma'. Did you mean 'cam'\?"):
        read(root, cameras="cma")
    assert [read(root, episodes="1:3").load(i).source_id for i in range(2)] == ["set/episode 1", "set/episode 2"]
    assert read(root, episodes="0,3").load(1).source_id == "set/episode 3"
    assert read(root, episodes=2).num_episodes == 1
    with pytest.raises(ConfigError, match="it has 0 to 3"):
        read(root, episodes="9:")
    with pytest.raises(ConfigError, match="neither a range"):
        read(root, episodes="last")
    with pytest.raises(ConfigError, match="no option 'camera'"):
        read(root, camera="cam")


def test_an_episode_that_fits_no_memory_is_refused(tmp_path, monkeypatch):
    source = read(make_v2(tmp_path / "set", camera=False))
    monkeypatch.setattr(lerobot_data, "MAX_EPISODE_BYTES", 200)
    source.load(0)
    with pytest.raises(InputError, match="an episode has 6 rows of 44 bytes; the limit is"):
        source.load(1)


def facts(name):
    return json.loads((DATA / name / "facts.json").read_text())


@real
def test_real_g1(tmp_path):
    root = DATA / "lerobot-v21-g1-real"
    expected = facts("lerobot-v21-g1-real")
    store = import_dataset(root, tmp_path / "store")
    assert store.num_frames == expected["rows"]
    assert store.num_episodes == expected["episodes_in_data"]
    lengths = expected["episode_lengths_first10"]
    assert [int(n) for n in store.episode_length[:10]] == list(lengths.values())
    for key, name in (("observation/state", "observation.state"), ("action", "action")):
        assert store.read(key).astype(np.float64).sum() == pytest.approx(expected["column_sums"][name], abs=0.01)
    assert np.flatnonzero(store.has_camera("cam_high")).tolist() == [29, 30, 59]
    for path, video in expected["videos"].items():
        episode = int(path[-10:-4])
        assert store.episode_length[episode] == video["frames"]
        assert store.episode(episode).timestamp[-1] == pytest.approx(video["last_pts"], abs=1e-3)
    assert [finding.check for finding in store.findings] == ["missing-media"]
    assert "no video for 97 of 100 episodes" in store.findings[0].message
    assert store.spec.observations["state"].names[0] == "kLeftShoulderPitch"
    assert set(store.instructions) == {"Pick up the yellow bottle on the table."}


@real
def test_real_reachy2_claims_more_than_it_holds(tmp_path):
    root = DATA / "lerobot-v30-reachy2-novideo"
    expected = facts("lerobot-v30-reachy2-novideo")
    store = import_dataset(root, tmp_path / "store")
    assert store.num_frames == expected["rows"] == 899
    assert [int(n) for n in store.episode_length] == list(expected["episode_lengths_first10"].values())
    for key, name in (("observation/state", "observation.state"), ("action", "action")):
        assert store.read(key).astype(np.float64).sum() == pytest.approx(expected["column_sums"][name], abs=0.01)
    messages = [finding.message for finding in store.findings]
    assert "info.json says 14,983 frames, the data files hold 899" in messages
    assert any("no video for 3 of 3 episodes" in message for message in messages)
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    np.testing.assert_array_equal(store.read("action")[0], table["action"][0].as_py())
    np.testing.assert_array_equal(store.read("action")[-1], table["action"][-1].as_py())


@real
@pytest.mark.parametrize("name", ["lerobotv2", "lerobotv2-image", "lerobotv3"])
def test_real_tiny_fixtures(name):
    folder = DATA / "lerobot-tiny-fixtures"
    expected = facts("lerobot-tiny-fixtures")[name]
    source = read(folder / "datasets" / name)
    episodes = [source.load(i) for i in range(source.num_episodes)]
    for episode in episodes:
        episode.check(source.spec)
        assert np.asarray(episode.images["cam"]).shape == (3, 64, 64, 3)
        assert episode.instruction == "pick cube"
    assert source.findings == ()
    assert [len(e) for e in episodes] == list(expected["episode_lengths_first10"].values())
    state = sum(float(e.observations["state"].astype(np.float64).sum()) for e in episodes)
    assert state == pytest.approx(expected["column_sums"]["observation.state"], abs=1e-5)
    theirs = folder / "expected" / f"{name.removesuffix('-image')}.expected.json"
    claims = json.loads(theirs.read_text())
    assert source.num_episodes == claims["episodeCount"]
    assert sum(map(len, episodes)) == claims["totalEpisodeLength"]
    assert source.attributes["tasks"] == claims["taskValues"]


@real
@pytest.mark.parametrize("name", ["v2-missing-episodes", "v3-missing-episodes-parquet"])
def test_real_roots_without_episode_table_are_refused(name):
    with pytest.raises(InputError, match=r"has no episode table \(meta/episodes"):
        read(DATA / "lerobot-tiny-fixtures" / "invalid" / name)

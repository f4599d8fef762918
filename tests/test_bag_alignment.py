"""Bags of several rates and clocks with known offsets, as rows of an episode."""

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import bag_samples as bags

from embodied.contracts.errors import InputError
from embodied.datasets import read_rosbag
from embodied.datasets.episode import Episode, Frames
from embodied.datasets.importer import import_dataset
from embodied.datasets.source import Source

ARM = {"topic": "/joint_states", "field": "position", "joints": ["a", "b"]}
BASE: dict[str, Any] = {"clock": {"topic": "/camera"}, "observations": {"arm": ARM}, "images": {}}


def state(seconds: float, received: float = 0.0, names=("b", "wheel", "a"), values=None) -> bags.Row:
    """Joint a is at its time [s], b at minus its time; in another order than asked for, with a wheel among them."""
    values = (-seconds, 99.0, seconds) if values is None else values
    message = bags.joint_state(bags.ns(seconds), names, values)
    return (bags.ns(received or seconds), "/joint_states", bags.JOINT_STATE, message)


def shot(seconds: float, tone: int, received: float = 0.0, topic: str = "/camera") -> bags.Row:
    message = bags.image(bags.ns(seconds), np.full((4, 6, 3), tone, np.uint8))
    return (bags.ns(received or seconds), topic, bags.IMAGE, message)


def command(seconds: float, values=(0.0, 0.0), names=("a", "b")) -> bags.Row:
    message = bags.trajectory(bags.ns(seconds), names, [values])
    return (bags.ns(seconds), "/command", bags.TRAJECTORY, message)


def opened(tmp_path: Path, rows: list[bags.Row], mapping: dict[str, Any], write: Any = bags.write_mcap) -> Source:
    folder = tmp_path / "bag"
    write(folder / "bag_0.mcap", sorted(rows, key=lambda row: row[0]))
    (folder / "embodied_mapping.yaml").write_text(yaml.safe_dump(mapping))
    return read_rosbag.read(folder, {})


def only_episode(source: Source) -> Episode:
    assert source.num_episodes == 1
    episode = source.load(0)
    episode.check(source.spec)
    return episode


def checks(source: Source) -> list[str]:
    return [finding.check for finding in source.findings]


@pytest.mark.parametrize("write", [bags.write_mcap, bags.write_db3])
def test_each_row_has_the_last_sample_not_after_it(tmp_path, write):
    rows = [state(k * 0.01 + 0.003) for k in range(100)] + [shot(k * 0.1 + 0.05, k) for k in range(9)]
    source = opened(tmp_path, rows, BASE | {"images": {"wrist": {"topic": "/camera"}}}, write)
    episode = only_episode(source)
    at = np.arange(9) * 0.1 + 0.05
    expected = at - 0.007  # 0.05 -> the message of 0.043
    np.testing.assert_allclose(episode.observations["arm"], np.stack([expected, -expected], 1), atol=1e-6)
    np.testing.assert_allclose(episode.observations["age_arm"], 0.007, atol=1e-6)
    np.testing.assert_allclose(episode.observations["age_wrist"], 0.0)
    np.testing.assert_allclose(episode.timestamp, np.arange(9) * 0.1, atol=1e-9)
    assert np.asarray(episode.images["wrist"])[:, 3, 5, 1].tolist() == list(range(9))
    assert source.spec.observations["arm"].names == ("a", "b")
    assert source.spec.observations["age_arm"].privileged
    assert source.spec.control_dt == pytest.approx(0.1)
    assert source.spec.action is None
    assert checks(source) == []


def test_a_grid_as_the_clock_repeats_the_pictures_of_a_slow_camera(tmp_path):
    rows = [state(k * 0.01) for k in range(101)] + [shot(k * 0.25, k) for k in range(5)]
    mapping = {"clock": {"rate": 10}, "observations": {"arm": ARM}, "images": {"wrist": {"topic": "/camera"}}}
    episode = only_episode(opened(tmp_path, rows, mapping))
    tones = np.asarray(episode.images["wrist"])[:, 0, 0, 0].tolist()
    assert tones == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]
    np.testing.assert_allclose(episode.observations["arm"][:, 0], np.arange(11) * 0.1, atol=1e-6)
    assert episode.step_valid.tolist() == [True] * 10 + [False]


def test_rows_with_too_old_data_are_dropped_counted_and_not_stepped_over(tmp_path):
    silent = [k for k in range(100) if not 30 <= k < 60]  # nothing from 0.30 s to 0.59 s
    rows = [state(k * 0.01) for k in silent] + [shot(k * 0.1 + 0.005, k) for k in range(10)]
    source = opened(tmp_path, rows, BASE | {"max_age": 0.1, "action": {"next": "arm"}})
    episode = only_episode(source)
    np.testing.assert_allclose(episode.timestamp, np.array([0, 1, 2, 3, 6, 7, 8, 9]) * 0.1, atol=1e-9)
    assert episode.step_valid.tolist() == [True, True, True, False, True, True, True, False]
    assert source.attributes["rows_dropped"] == {"bag_0.mcap": {"arm older than 0.1 s": 2}}
    assert episode.action is not None
    np.testing.assert_allclose(episode.action[2], episode.observations["arm"][3])
    assert not episode.action[[3, 7]].any()
    (finding,) = source.findings
    assert (finding.check, finding.episode) == ("rows-dropped", 0)
    assert "2 rows arm older than 0.1 s" in finding.message


def test_a_dropped_row_between_close_ones_is_not_stepped_over(tmp_path):
    rows = [state(k * 0.1) for k in range(9)] + [shot(k * 0.1, k) for k in range(9)] + [shot(0.43, 99)]
    episode = only_episode(opened(tmp_path, rows, BASE | {"max_age": 0.02}))
    assert len(episode) == 9
    assert episode.step_valid.tolist() == [True] * 4 + [False] + [True] * 3 + [False]


def test_joints_that_come_in_different_messages_are_held_and_age(tmp_path):
    rows = [state(k * 0.01, names=("a", "wheel"), values=(k, 5)) for k in range(100)]
    rows += [state(k * 0.1 + 0.002, names=("b",), values=(10 * k,)) for k in range(10)]
    rows += [state(0.551, names=("a", "b"), values=(np.nan, 77))]  # no value is no value
    rows += [shot(k * 0.1 + 0.055, k) for k in range(9)]
    source = opened(tmp_path, rows, BASE)
    assert checks(source) == ["not-finite"]
    episode = only_episode(source)
    arm, age = episode.observations["arm"], episode.observations["age_arm"]
    assert arm[:, 0].tolist() == [5, 15, 25, 35, 45, 55, 65, 75, 85]
    assert arm[:, 1].tolist() == [0, 10, 20, 30, 40, 77, 60, 70, 80]
    np.testing.assert_allclose(age[[0, 4, 8]], 0.053, atol=1e-6)
    np.testing.assert_allclose(age[5], 0.005, atol=1e-6)


def test_the_action_is_the_first_command_after_the_row(tmp_path):
    rows = [state(k * 0.01) for k in range(120)] + [shot(k * 0.1, k) for k in range(12)]
    rows += [command(k * 0.1 + 0.02, (k, -k)) for k in (2, 3, 4, 6, 7)]
    rows += [command(k * 0.1 + 0.06, (100, 100)) for k in (2, 3, 4, 6, 7)]
    action = {"topic": "/command", "field": "points.-1.positions", "joints": ["b", "a"], "mode": "joint_position"}
    source = opened(tmp_path, rows, BASE | {"action": action | {"max_age": 0.05}})
    episode = only_episode(source)
    # Rows 2 to 7 have commands, but for 5: the one before it is 0.04 s old and still in force, as in row 8.
    assert len(episode) == 8
    assert episode.action is not None
    expected = [[-2, 2], [-3, 3], [-4, 4], [100, 100], [-6, 6], [-7, 7], [100, 100], [0, 0]]
    assert episode.action.tolist() == expected
    assert episode.step_valid.tolist() == [True] * 7 + [False]
    assert source.spec.action is not None
    assert (source.spec.action.names, source.spec.action.control_mode) == (("b", "a"), "joint_position")
    assert np.flatnonzero(episode.truncated).tolist() == [6]
    action["max_age"] = 0.03  # now that command is no longer in force
    episode = only_episode(opened(tmp_path, rows, BASE | {"action": action}))
    assert episode.step_valid.tolist() == [True, True, True, False, True, True, False]


def test_simulation_time_and_wall_time_are_told_apart(tmp_path):
    rows = [state(k * 0.01 + 5, received=1000 + k * 0.02) for k in range(100)]
    rows += [shot(k * 0.1 + 5.005, k, received=1000 + k * 0.2 + 0.01) for k in range(9)]
    source = opened(tmp_path, rows, BASE)
    assert checks(source) == ["two-clocks"]
    assert "1700000005.000 to 1700000005.990 s" in source.findings[0].message
    assert "1700001000.000 to 1700001001.980 s" in source.findings[0].message
    np.testing.assert_allclose(only_episode(source).timestamp, np.arange(9) * 0.1, atol=1e-9)
    source = opened(tmp_path, rows, BASE | {"stamps": "received"})
    np.testing.assert_allclose(only_episode(source).timestamp, np.arange(9) * 0.2, atol=1e-9)


def test_topics_on_clocks_of_their_own_are_not_aligned_by_their_headers(tmp_path):
    rows = [state(k * 0.01 + 5, received=1000 + k * 0.01) for k in range(100)]
    rows += [shot(1000 + k * 0.1 + 0.005, k) for k in range(9)]  # the camera's stamps are wall time
    with pytest.raises(InputError, match=r"/camera has stamps of another clock than /joint_states(.|\n)*received"):
        opened(tmp_path, rows, BASE)
    stampless = [(row[0], "/camera", bags.FLOATS, bags.floats([1])) for row in rows if row[1] == "/camera"]
    with pytest.raises(InputError, match="/camera has messages without a stamp"):
        opened(tmp_path, rows[:100] + stampless, BASE)
    source = opened(tmp_path, rows, BASE | {"stamps": "received"})
    np.testing.assert_allclose(only_episode(source).observations["age_arm"], 0.005, atol=1e-6)


@pytest.mark.parametrize("stamps", ["header", "received"])
def test_a_reset_of_the_simulation_begins_another_episode(tmp_path, stamps):
    rows = [state(k * 0.01 + 5, received=k * 0.01 + 5) for k in range(300)]
    rows += [shot(k * 0.1 + 5.005, k, received=k * 0.1 + 5.005) for k in range(30)]
    rows += [state(k * 0.01 + 5, received=k * 0.01 + 8.1) for k in range(100)]
    rows += [shot(k * 0.1 + 5.005, 100 + k, received=k * 0.1 + 8.105) for k in range(10)]
    mapping = BASE | {"images": {"wrist": {"topic": "/camera"}}, "action": {"next": "arm"}, "stamps": stamps}
    source = opened(tmp_path, rows, mapping)
    assert source.num_episodes == 2
    assert "clock-jump" in checks(source)
    first, second = source.load(0), source.load(1)
    assert (len(first), len(second)) == (30, 10)
    assert (first.source_id, second.source_id) == ("bag_0.mcap#0", "bag_0.mcap#1")
    assert np.asarray(second.images["wrist"])[:, 0, 0, 0].tolist() == list(range(100, 110))
    np.testing.assert_allclose(second.observations["arm"][:, 0], 5 + np.arange(10) * 0.1, atol=1e-6)


def test_messages_sent_before_a_simulation_had_a_clock_are_left_out(tmp_path):
    rows = [state(k * 0.01 + 5, received=1000 + k * 0.01) for k in range(100)]
    rows += [shot(k * 0.1 + 5.005, k, received=1000 + k * 0.1 + 0.005) for k in range(9)]
    early = [bags.joint_state(0, ("a", "b"), (70, 70)), bags.image(0, np.full((4, 6, 3), 70, np.uint8))]
    rows += [
        (bags.ns(999), "/joint_states", bags.JOINT_STATE, early[0]),
        (bags.ns(999), "/camera", bags.IMAGE, early[1]),
    ]
    source = opened(tmp_path, rows, BASE | {"images": {"wrist": {"topic": "/camera"}}})
    assert checks(source) == ["two-clocks"]
    episode = only_episode(source)
    assert np.asarray(episode.images["wrist"])[:, 0, 0, 0].tolist() == list(range(9))
    np.testing.assert_allclose(episode.observations["arm"][:, 0], 5 + np.arange(9) * 0.1, atol=1e-6)


def test_one_late_message_is_no_reset(tmp_path):
    rows = [state(k * 0.01 + 5) for k in range(100)] + [shot(k * 0.1 + 5.005, k) for k in range(9)]
    rows += [state(3.0, received=5.5001, values=(7, 7, 7))]
    source = opened(tmp_path, rows, BASE)
    assert checks(source) == []
    assert source.num_episodes == 1


def test_pictures_of_every_encoding_become_rgb(tmp_path):
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    alpha = np.full((4, 6, 1), 9, np.uint8)
    grey = rgb[..., :1]
    pictures = {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "rgba8": np.concatenate([rgb, alpha], 2),
        "bgra8": np.concatenate([rgb[..., ::-1], alpha], 2),
        "mono8": grey,
        "8UC3": rgb[..., ::-1],
    }
    rows = [state(k * 0.1) for k in range(3)]
    for k in range(3):
        for encoding, pixels in pictures.items():
            message = bags.image(bags.ns(k * 0.1), np.ascontiguousarray(pixels), encoding)
            rows.append((bags.ns(k * 0.1), f"/{encoding}", bags.IMAGE, message))
        message = bags.compressed(bags.ns(k * 0.1), rgb, "png")
        rows.append((bags.ns(k * 0.1), "/png", bags.COMPRESSED, message))
        depth = bags.image(bags.ns(k * 0.1), np.zeros((4, 6), np.uint16), "16UC1")
        rows.append((bags.ns(k * 0.1), "/depth", bags.IMAGE, depth))
    cameras = {name: {"topic": f"/{name}"} for name in [*pictures, "png", "depth"]}
    mapping = {"clock": {"topic": "/joint_states"}, "observations": {"arm": ARM}, "images": cameras}
    source = opened(tmp_path, rows, mapping)
    episode = only_episode(source)
    for name, frames in episode.images.items():
        expected = np.repeat(grey, 3, 2) if name == "mono8" else rgb
        np.testing.assert_array_equal(np.asarray(frames), np.stack([expected] * 3), err_msg=name)
    assert set(episode.images) == {*pictures, "png"}
    assert "16UC1" in source.attributes["observations_left_out"]["depth"]
    mapping["images"] = {"small": {"topic": "/rgb8", "size": [2, 3]}}
    small = np.asarray(only_episode(opened(tmp_path, rows, mapping)).images["small"])
    np.testing.assert_allclose(small[0], rgb.reshape(2, 2, 3, 2, 3).mean((1, 3)), atol=1)


def test_pictures_stay_in_the_file_until_they_are_asked_for(tmp_path):
    rows = [state(k * 0.1) for k in range(3)] + [shot(k * 0.1, k) for k in range(3)]
    source = opened(tmp_path, rows, BASE | {"images": {"wrist": {"topic": "/camera"}}})
    frames = source.load(0).images["wrist"]
    assert isinstance(frames, Frames)
    file = tmp_path / "bag" / "bag_0.mcap"
    bags.write_mcap(file, rows[:5])
    with pytest.raises(InputError, match="ends after 2 of 3 pictures"):
        np.asarray(frames)
    other = bags.image(bags.ns(0.1), np.zeros((2, 2, 3), np.uint8))
    bags.write_mcap(file, [*rows[:4], (bags.ns(0.1), "/camera", bags.IMAGE, other), rows[5]])
    with pytest.raises(InputError, match="pictures of 2x2 among those of 4x6"):
        np.asarray(frames)


def test_pictures_are_never_all_in_memory(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    rows = [state(k * 0.1) for k in range(80)]
    rows += [(bags.ns(k * 0.1), "/camera", bags.IMAGE, bags.image(bags.ns(k * 0.1), pixels)) for k in range(80)]
    source = opened(tmp_path, rows, BASE | {"images": {"wrist": {"topic": "/camera"}}})
    del rows
    tracemalloc.start()
    frames = only_episode(read_rosbag.read(tmp_path / "bag", {})).images["wrist"]
    assert isinstance(frames, Frames)
    count = sum(len(block) for block in frames.blocks())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 80 == len(only_episode(source))
    assert peak < 25e6  # of 74 MB of pictures: a block of 4 MB, a chunk, its records and copies


def test_a_split_bag_is_one_episode_and_its_metadata_a_claim(tmp_path):
    rows = sorted([state(k * 0.01) for k in range(100)] + [shot(k * 0.1, k) for k in range(10)], key=lambda r: r[0])
    for part in range(4):
        bags.write_mcap(tmp_path / "run" / f"run_{part}.mcap", rows[part * 28 : part * 28 + 28])
    (tmp_path / "embodied_mapping.yaml").write_text(yaml.safe_dump(BASE | {"images": {"wrist": {"topic": "/camera"}}}))
    counts = {"/camera": (bags.IMAGE, 12), "/joint_states": (bags.JOINT_STATE, 100)}
    bags.write_metadata(tmp_path / "run", [f"run_{k}.mcap" for k in range(4)], counts)
    store = import_dataset(tmp_path, tmp_path / "store")
    assert store.episode_length.tolist() == [10]
    assert store.source_ids == ["run"]
    assert [finding.check for finding in store.findings] == ["metadata-stale"] * 2
    assert "claims 112 messages; the files hold 110" in store.findings[0].message
    assert "/camera 12 (found 10)" in store.findings[1].message
    assert np.asarray(store.episode(0).images["wrist"])[:, 0, 0, 0].tolist() == list(range(10))


def test_what_events_say_of_the_task(tmp_path):
    rows = [state(k * 0.1) for k in range(5)]
    rows += [(bags.ns(0.01), "/task", bags.STRING, bags.text("stack the cubes"))]
    rows += [(bags.ns(0.4), "/done", bags.STRING, bags.text('{"success": false}'))]
    rows += [(bags.ns(0.45), "/ok", bags.BOOL, bags.ROS2.types[bags.BOOL](True))]
    mapping = {"clock": {"topic": "/joint_states"}, "observations": {"arm": ARM}}
    for success, expected in (({"topic": "/done"}, False), ({"topic": "/ok"}, True), (True, True), (None, None)):
        source = opened(tmp_path, rows, mapping | {"instruction": {"topic": "/task"}, "success": success})
        assert only_episode(source).success is expected
        assert only_episode(source).instruction == "stack the cubes"


def test_a_bag_that_lacks_a_topic_or_camera_does_not_spoil_the_others(tmp_path):
    whole = [state(k * 0.1) for k in range(5)] + [shot(k * 0.1, k) for k in range(5)]
    for name, rows in (("a", whole), ("b", whole[:5]), ("c", whole[5:])):
        bags.write_mcap(tmp_path / "bags" / name / f"{name}_0.mcap", rows)
    mapping = {"clock": {"rate": 10}, "observations": {"arm": ARM}, "images": {"wrist": {"topic": "/camera"}}}
    file = tmp_path / "mapping.yaml"
    file.write_text(yaml.safe_dump(mapping))
    store = import_dataset(tmp_path / "bags", tmp_path / "store", options={"mapping": str(file)})
    assert store.source_ids == ["a_0.mcap", "b_0.mcap"]
    assert store.has_camera("wrist").tolist() == [True, False]
    assert store.episode(1).observations["age_wrist"].tolist() == [-1] * 5
    assert {finding.check for finding in store.findings} == {"missing-media", "episode-left-out"}


def test_messages_of_odd_size_or_damaged_are_left_out_and_counted(tmp_path):
    rows = [state(k * 0.01) for k in range(100)] + [shot(k * 0.1 + 0.055, k) for k in range(9)]
    whole = bags.cdr(bags.JOINT_STATE, state(0.25)[3])
    rows[25] = (*rows[25][:3], whole[:60])
    rows += [(bags.ns(k * 0.1 + 0.01), "/wrench", bags.FLOATS, bags.floats([k] * (2 + (k == 3)))) for k in range(10)]
    mapping = BASE | {"observations": {"arm": ARM, "wrench": {"topic": "/wrench", "field": "data", "max_age": 1}}}
    source = opened(tmp_path, rows, mapping)
    assert sorted(checks(source)) == ["odd-messages", "undecodable-messages"]
    episode = only_episode(source)
    np.testing.assert_allclose(episode.observations["arm"][2, 0], 0.24, atol=1e-6)
    assert episode.observations["wrench"][:, 0].tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 8]

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets.exporter import export_dataset
from embodied.datasets.importer import import_dataset
from embodied.datasets.lerobot_statistics import PictureStatistics, feature_statistics, total
from embodied.datasets.write_store import StoreWriter

sys.path.insert(0, str(Path(__file__).parent))
from export_stores import add_label, assert_same_episodes, make_spec, make_store

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def left_out(result):
    return [left["what"] for left in result["left_out"]]


def rows_of(folder):
    tables = [pq.read_table(path) for path in sorted((folder / "data").rglob("*.parquet"))]
    names = tables[0].schema.names
    return {name: np.concatenate([np.array(table[name].to_pylist()) for table in tables]) for name in names}


def episodes_of(folder):
    paths = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def decoded(path):
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return np.array([time for time, _ in frames]), np.array([picture for _, picture in frames])


def test_rows_and_metadata_are_lerobots(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()))
    result = export_dataset(store.path, tmp_path / "out", "lerobot")
    info = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 10, "made/Up")
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    assert info["features"]["observation.joint_position"] == {
        "dtype": "float32",
        "shape": [3],
        "names": ["a", "b", "c"],
    }
    rows, valid = rows_of(tmp_path / "out"), store.read("step_valid")
    np.testing.assert_array_equal(rows["observation.joint_position"], store.read("observation/joint_position")[valid])
    np.testing.assert_array_equal(rows["action"], store.read("action")[valid])
    np.testing.assert_array_equal(rows["next.reward"].astype(np.float32), store.read("reward")[valid])
    assert rows["observation.gripper"].shape == (15,)
    assert np.flatnonzero(rows["next.done"]).tolist() == [4, 7, 14]
    assert np.flatnonzero(rows["next.truncated"]).tolist() == [7]
    assert np.flatnonzero(rows["next.terminated"]).tolist() == np.flatnonzero(rows["next.success"]).tolist() == [4, 14]
    assert rows["index"].tolist() == list(range(15))
    assert rows["frame_index"].tolist() == [*range(5), *range(3), *range(7)]
    assert rows["task_index"].tolist() == [0] * 5 + [1] * 3 + [0] * 7
    np.testing.assert_array_equal(rows["timestamp"].astype(np.float32), (rows["frame_index"] / 10).astype(np.float32))
    tasks = pq.read_table(tmp_path / "out" / "meta" / "tasks.parquet")
    assert tasks["__index_level_0__"].to_pylist() == ["lift the cube", "open the drawer"]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    episodes = episodes_of(tmp_path / "out")
    assert [row["length"] for row in episodes] == [5, 3, 7]
    assert [row["dataset_from_index"] for row in episodes] == [0, 5, 8]
    assert episodes[1]["tasks"] == ["open the drawer"]
    assert "final observations of 3 episodes" in left_out(result)
    assert "timestamps as recorded" not in left_out(result)


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_pictures_stand_in_the_video_at_their_times(tmp_path, codec):
    store = make_store(tmp_path / "store", make_spec(("front",), side=64))
    result = export_dataset(store.path, tmp_path / "out", "lerobot", {"codec": codec})
    times, pictures = decoded(tmp_path / "out" / "videos" / "observation.images.front" / "chunk-000" / "file-000.mp4")
    np.testing.assert_allclose(times, np.arange(15) / 10, atol=1e-4)
    for number, row in enumerate(episodes_of(tmp_path / "out")):
        start = round(row["videos/observation.images.front/from_timestamp"] * 10)
        assert round(row["videos/observation.images.front/to_timestamp"] * 10) == start + row["length"]
        wanted = np.asarray(store.episode(number).images["front"])[: row["length"]]
        difference = np.abs(pictures[start : start + row["length"]].astype(int) - wanted)
        assert difference.mean() < 3  # the next picture is 10/3 away, another episode's 1
        assert np.abs(pictures[start].astype(int) - wanted[0]).mean() < 3
    assert "exact pictures" in left_out(result)


def test_an_encoder_leaves_the_process_as_it_is_scheduled(tmp_path):
    """SVT-AV1 would leave a process of root's, and what it starts, at SCHED_FIFO 99."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    others = set(os.listdir("/proc/self/task"))  # what other tests left running may be scheduled otherwise
    store = make_store(tmp_path / "store", make_spec(("front",), side=64))
    export_dataset(store.path, tmp_path / "out", "lerobot", {"codec": "av1"})
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
    started = set(os.listdir("/proc/self/task")) - others
    assert all(os.sched_getscheduler(int(thread)) == before[0] for thread in started)


def test_files_are_ended_before_they_grow_too_large(tmp_path):
    store = make_store(tmp_path / "store", make_spec(("front",), side=64), ((20, True, True),) * 6)
    sizes = {"data_files_size_in_mb": 0.008, "video_files_size_in_mb": 0.004}
    result = export_dataset(store.path, tmp_path / "out", "lerobot", sizes)
    data = [name for name in result["files"] if name.startswith("data/")]
    videos = [name for name in result["files"] if name.startswith("videos/")]
    assert len(data) > 1
    assert len(videos) > 1
    assert max(result["files"][name] for name in data) < 0.016 * 2**20
    assert max(result["files"][name] for name in videos) < 0.016 * 2**20  # pictures are encoded with a delay
    assert rows_of(tmp_path / "out")["index"].tolist() == list(range(120))
    per_file = {}
    for row in episodes_of(tmp_path / "out"):
        file = row["videos/observation.images.front/file_index"]
        start = row["videos/observation.images.front/from_timestamp"]
        assert start == pytest.approx(per_file.get(file, 0.0))
        per_file[file] = row["videos/observation.images.front/to_timestamp"]
    assert len(per_file) == len(videos)
    found = import_dataset(tmp_path / "out", tmp_path / "found")
    assert_same_episodes(found, store, final=False, atol=40)
    for number in range(6):  # pictures of the right episode and row: the next row's differ by 10 in blue
        a, b = found.episode(number).images["front"], store.episode(number).images["front"]
        difference = np.asarray(a)[..., 2].astype(int) - np.asarray(b)[:20, ..., 2]
        assert np.abs(difference.reshape(20, -1).mean(axis=1)).max() < 3


def test_import_export_import_is_the_identity_with_embedded_pictures(tmp_path):
    store = make_store(tmp_path / "store")
    result = export_dataset(store.path, tmp_path / "1" / "set", "lerobot", {"images": "embedded"})
    assert "exact pictures" not in left_out(result)
    first = import_dataset(tmp_path / "1" / "set", tmp_path / "first")
    assert_same_episodes(first, store, final=False)
    assert first.findings == []
    assert first.spec.action is not None
    assert (first.spec.action.names, first.spec.control_dt) == (("left", "right"), 0.1)
    assert first.spec.observations["joint_position"].names == ("a", "b", "c")
    assert first.spec.environment == "made/Up"
    export_dataset(first.path, tmp_path / "2" / "set", "lerobot", {"images": "embedded"})
    second = import_dataset(tmp_path / "2" / "set", tmp_path / "second")
    assert second.spec == first.spec
    assert second.fingerprint == first.fingerprint


def test_names_of_the_source_are_written_back(tmp_path):
    names = {"joint_position": "observation.state", "front": "observation.image"}
    store = make_store(tmp_path / "store", make_spec(("front",)), attributes={"original_names": names})
    export_dataset(store.path, tmp_path / "out", "lerobot", {"images": "embedded"})
    features = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())["features"]
    assert {"observation.state", "observation.image", "observation.gripper"} < set(features)


def test_a_name_cannot_leave_the_folder(tmp_path):
    names = {"front": "../../../outside"}
    store = make_store(tmp_path / "store", make_spec(("front",)), attributes={"original_names": names})
    result = export_dataset(store.path, tmp_path / "out" / "set", "lerobot")
    assert "videos/.........outside/chunk-000/file-000.mp4" in result["files"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_a_label_is_the_reward(tmp_path):
    store = make_store(tmp_path / "store", make_spec(()), ((3, True, False), (2, True, True)))
    label = add_label(store)
    export_dataset(store.path, tmp_path / "out", "lerobot", label="progress")
    np.testing.assert_array_equal(rows_of(tmp_path / "out")["next.reward"].astype("f4"), label.score[[1, 2, 3, 5, 6]])


def test_unknown_success_is_left_out(tmp_path):
    spec = make_spec(())
    made = make_store(tmp_path / "made", spec)
    writer = StoreWriter(tmp_path / "store", spec, {"config": {}, "inputs": {}})
    for number in range(3):
        episode = made.episode(number)
        episode.success = None if number == 1 else episode.success
        writer.write_episode(number, episode)
    store = writer.finish(3)
    result = export_dataset(store.path, tmp_path / "out", "lerobot")
    assert "success of the episodes" in left_out(result)
    assert "next.success" not in rows_of(tmp_path / "out")


def test_action_free_video_keeps_all_its_frames(tmp_path):
    store = make_store(tmp_path / "store", make_spec(("front",), action=False, reward=False))
    export_dataset(store.path, tmp_path / "out", "lerobot")
    rows = rows_of(tmp_path / "out")
    assert len(rows["index"]) == store.num_frames
    assert "action" not in rows
    assert "next.done" not in rows


def test_a_frame_rate_is_taken_from_timestamps_or_asked_for(tmp_path):
    spec = replace(make_spec(()), control_dt=0.0)
    made = make_store(tmp_path / "made", spec)
    times = {"regular": np.arange(8) / 29.97, "irregular": np.cumsum(np.arange(8)) / 30, "none": np.zeros(8)}
    for name, stamps in times.items():
        writer = StoreWriter(tmp_path / name, spec, {"config": {}, "inputs": {}})
        episode = made.episode(2)
        episode.timestamp = stamps
        writer.write_episode(0, episode)
        writer.finish(1)
    export_dataset(tmp_path / "regular", tmp_path / "a", "lerobot")
    assert json.loads((tmp_path / "a" / "meta" / "info.json").read_text())["fps"] == 30
    result = export_dataset(tmp_path / "irregular", tmp_path / "b", "lerobot", {"fps": 12.5})
    assert json.loads((tmp_path / "b" / "meta" / "info.json").read_text())["fps"] == 12.5
    assert "timestamps as recorded" in left_out(result)
    with pytest.raises(InputError, match=r"neither a control period nor timestamps.*\nSay it: --options fps 30"):
        export_dataset(tmp_path / "none", tmp_path / "c", "lerobot")


def test_pictures_that_no_video_holds_are_refused(tmp_path):
    store = make_store(tmp_path / "store", make_spec(("front",), side=33))
    with pytest.raises(InputError, match=r"33x33; yuv420p video needs even sides.\n.*images embedded"):
        export_dataset(store.path, tmp_path / "out", "lerobot")
    with pytest.raises(ConfigError, match="'crf' is -1; it must be a number of at least 0"):
        export_dataset(store.path, tmp_path / "out", "lerobot", {"crf": -1})
    with pytest.raises(ConfigError, match=r"'codec' is 'h265'. Did you mean 'h264'\?"):
        export_dataset(store.path, tmp_path / "out", "lerobot", {"codec": "h265"})


def test_statistics_are_those_of_the_numbers(tmp_path):
    store = make_store(tmp_path / "store", make_spec(("front",)))
    export_dataset(store.path, tmp_path / "out", "lerobot", {"images": "embedded"})
    stats = json.loads((tmp_path / "out" / "meta" / "stats.json").read_text())
    valid = store.read("step_valid")
    action = store.read("action")[valid].astype(float)
    assert stats["action"]["count"] == [15]
    np.testing.assert_allclose(stats["action"]["mean"], action.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats["action"]["std"], action.std(0), atol=1e-12)
    np.testing.assert_allclose(stats["action"]["max"], action.max(0))
    pictures = store.frames("front")[valid] / 255
    of_picture = stats["observation.images.front"]
    np.testing.assert_allclose(np.array(of_picture["mean"]).reshape(3), pictures.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(np.array(of_picture["std"]).reshape(3), pictures.std((0, 1, 2)), atol=1e-9)
    assert np.array(of_picture["q50"]).shape == (3, 1, 1)
    episode = episodes_of(tmp_path / "out")[1]
    np.testing.assert_allclose(episode["stats/action/q50"], np.quantile(action[5:8], 0.5, axis=0))


def test_statistics_of_two_parts_are_those_of_the_whole():
    values = np.random.default_rng(0).normal(size=(50, 3))
    whole, parts = feature_statistics(values), total(feature_statistics(values[:20]), feature_statistics(values[20:]))
    for name in ("mean", "std", "min", "max", "count"):
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-12)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    statistics = PictureStatistics()
    for picture in pictures:
        statistics.add(picture)
    found = statistics.result()
    for q, name in ((0.01, "q01"), (0.5, "q50"), (0.99, "q99")):
        wanted = np.quantile(pictures.reshape(-1, 3) / 255, q, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(found[name].reshape(3), wanted)


@pytest.mark.skipif(not (DATA / "lerobot-v21-g1-real").exists(), reason="needs ../shared/data")
def test_a_real_set_goes_through_unchanged(tmp_path):
    source = DATA / "lerobot-v21-g1-real"
    first = import_dataset(source, tmp_path / "first", options={"cameras": "none", "episodes": "0:4"})
    result = export_dataset(first.path, tmp_path / "set", "lerobot")
    second = import_dataset(tmp_path / "set", tmp_path / "second")
    assert_same_episodes(second, first, but=("success",))
    assert second.spec == first.spec
    assert "final observations" not in " ".join(left_out(result))

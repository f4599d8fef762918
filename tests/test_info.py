import json
import sys
from pathlib import Path

import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.finding import Finding
from embodied.datasets.info import describe
from embodied.datasets.labels import LabelWriter
from embodied.datasets.write_store import StoreWriter

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import add_label, make_episode, write_store


def test_describe_gives_counts_ranges_and_labels(tmp_path):
    spec = DatasetSpec(
        observations={"joint_position": ArraySpec((2,), unit="rad", names=("a", "b"))},
        images={"wrist": ArraySpec((4, 4, 3), "uint8")},
        action=ActionSpec((1,), control_mode="joint_position_delta", scale=(0.1,)),
        control_dt=0.1,
        environment="robosuite/Lift",
    )
    writer = StoreWriter(tmp_path / "s", spec, {"config": {}, "inputs": {}, "made_by": "test"}, licence="MIT")
    for index, success in enumerate([True, False, None]):
        rows = 4 + index
        step_valid, terminated, truncated = end_flags(rows - 1, rows, terminated=index == 0)
        writer.write_episode(
            index,
            Episode(
                observations={"joint_position": np.full((rows, 2), [index, -2 * index], np.float32)},
                images={"wrist": np.zeros((rows, 4, 4, 3), np.uint8)},
                action=padded_last(np.full((rows - 1, 1), 0.5, np.float32), rows),
                step_valid=step_valid,
                terminated=terminated,
                truncated=truncated,
                timestamp=np.arange(rows) * 0.1,
                instruction="lift",
                success=success,
            ),
        )
    store = writer.finish(3)
    keys = {"labeller": "clip", "config": {}, "dataset_fingerprint": store.fingerprint, "code_version": "1"}
    labels = LabelWriter(store, "clip", keys)
    labels.write_block(0, np.arange(15))
    labels.finish()

    result = json.loads(json.dumps(describe(store)))
    assert (result["episodes"], result["frames"], result["steps"]) == (3, 15, 12)
    assert result["episode_length"] == {"min": 4, "median": 5, "max": 6}
    assert result["duration"] == pytest.approx(0.3 + 0.4 + 0.5)
    assert result["success"] == {"succeeded": 1, "failed": 1, "unknown": 1}
    assert (result["terminated"], result["truncated"]) == (1, 2)
    assert result["instructions"] == ["lift"]
    joints = result["observations"]["joint_position"]
    assert (joints["min"], joints["max"], joints["unit"], joints["names"]) == ([0, -4], [2, 0], "rad", ["a", "b"])
    # The zero action of a final observation's row is not an action.
    assert (result["action"]["min"], result["action"]["max"]) == ([0.5], [0.5])
    assert result["reward"] is None
    assert result["cameras"] == {"wrist": {"shape": [4, 4, 3], "dtype": "uint8", "episodes": 3}}
    assert result["labels"]["clip"]["median"] == 7
    assert result["licence"] == "MIT"
    assert result["bytes"] > 1000
    assert result["findings"] == {"error": 0, "warning": 0, "note": 0}
    # Rates and sizes.
    assert result["clock"] == {"q01": pytest.approx(0.1), "median": pytest.approx(0.1), "q99": pytest.approx(0.1)}
    assert result["sizes"]["observation/joint_position"]["raw"] == 15 * 2 * 4
    assert result["sizes"]["observation/images/wrist"]["raw"] == 15 * 48
    files = (tmp_path / "s" / "action").rglob("*")
    assert result["sizes"]["action"]["disk"] == sum(file.stat().st_size for file in files if file.is_file())
    assert sum(size["disk"] for size in result["sizes"].values()) < result["bytes"]


def test_a_person_reads_it_from_top_to_bottom(tmp_path, capsys):
    episodes = [make_episode(index) for index in range(4)]
    for episode in episodes:
        episode.timestamp = episode.timestamp * 1.25
    del episodes[2].images["wrist"]
    episodes[3].success = None
    found = [Finding("odd", "warning", "something"), Finding("odd", "warning", "else")]
    store = write_store(tmp_path / "s", episodes, findings=found)
    add_label(store, "clip", np.arange(124, dtype=np.float32))
    assert main(["data", "info", store.path]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == f"{store.path}  (made/Up)"
    for line in (
        "episodes     4 of 31 to 31 frames, median 31",
        "frames       124, of which 120 are steps to learn from",
        "duration     15.0 s",
        "rate         10 Hz declared, 8 Hz measured (98 % of the steps take 125 to 125 ms)",
        "ends         2 terminated, 2 truncated",
        "success      1 of 3 (33 %), 1 unknown",
        "task         lift the cube",
        "             push the cube",
        "camera       side, 8x8",
        "camera       wrist, 8x8, in 3 of 4 episodes",
        "observation joint_position (3)  rad",
        "observation object (2)  privileged",
        "source       made up",
        "licence      CC0-1.0",
    ):
        assert line in lines, line
    joints = store.read("observation/joint_position")[:, 1]
    assert f"  elbow    {joints.min():10.4g} to {joints.max():10.4g}" in lines
    assert "2 warnings at import" in text
    assert any(line.split()[:4] == ["clip", "1.23", "61.5", "121.8"] for line in lines)
    assert "1 : " in text
    assert max(map(len, lines)) <= 120 + len(store.path)


def test_a_store_without_clock_cameras_or_actions(tmp_path, capsys):
    spec = DatasetSpec({"wide": ArraySpec((100,)), "grid": ArraySpec((2, 3))}, {}, None)
    flags = np.zeros(5, bool)
    rows = {"wide": np.arange(500, dtype=np.float32).reshape(5, 100), "grid": np.ones((5, 2, 3), np.float32)}
    store = write_store(tmp_path / "s", [Episode(rows, {}, None, flags, flags, flags, np.zeros(5))], spec)
    assert describe(store)["clock"] is None
    assert main(["data", "info", store.path]) == 0
    text = capsys.readouterr().out
    assert "duration     no timestamps\nrate         not declared, nothing measured\n" in text
    assert "  100 elements within 0 to 499" in text
    assert text.count("never changes") == 6

import json

import numpy as np
import pytest

from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.info import describe
from embodied.datasets.labels import LabelWriter
from embodied.datasets.write_store import StoreWriter


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
    assert result["cameras"] == {"wrist": {"shape": [4, 4, 3], "dtype": "uint8"}}
    assert result["labels"]["clip"]["median"] == 7
    assert result["licence"] == "MIT"
    assert result["bytes"] > 1000

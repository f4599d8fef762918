"""Joint states are merged by name, each joint with its own age."""

import numpy as np

from embodied.robot_bridge.joint_merge import JointMerge
from embodied.robot_bridge.messages import JointSample

NAMES = ("a", "b", "finger")


def sample(names: str, position: list[float], velocity: list[float] | None = None, stamp: int = 1) -> JointSample:
    speed = np.zeros(len(position)) if velocity is None else np.array(velocity)
    return JointSample(stamp, tuple(names.split()), np.array(position), speed)


def test_arm_and_gripper_come_in_messages_of_their_own_in_any_order() -> None:
    merged = JointMerge(NAMES)
    assert merged.missing() == NAMES
    assert merged.update(sample("b other a", [2.0, 9.0, 1.0], [0.2, 0.9, 0.1], stamp=5), 10.0)
    assert merged.missing() == ("finger",)
    assert merged.update(sample("finger", [0.04], stamp=3), 10.5)
    assert merged.missing() == ()
    np.testing.assert_array_equal(merged.position, [1.0, 2.0, 0.04])
    np.testing.assert_array_equal(merged.velocity, [0.1, 0.2, 0.0])
    assert merged.oldest(2) == 10.0
    assert merged.oldest(3) == 10.0
    assert merged.heard_at[2] == 10.5
    assert merged.stamp_ns == 5
    merged.update(sample("finger", [0.05]), 11.0)
    assert merged.oldest(2) == 10.0
    assert not merged.update(sample("other", [1.0]), 12.0)


def test_a_joint_without_a_finite_position_grows_old() -> None:
    merged = JointMerge(NAMES)
    merged.update(sample("a b finger", [1.0, 2.0, 0.0]), 1.0)
    merged.update(sample("a b finger", [1.5, np.nan, np.inf]), 2.0)
    np.testing.assert_array_equal(merged.position, [1.5, 2.0, 0.0])
    np.testing.assert_array_equal(merged.heard_at, [2.0, 1.0, 1.0])
    assert not merged.update(sample("a b finger", [np.nan] * 3), 3.0)


def test_a_peer_that_names_joints_at_random_fills_no_memory() -> None:
    merged = JointMerge(NAMES)
    for k in range(1000):
        merged.update(sample(f"a j{k}", [1.0, 2.0]), float(k))
    assert len(merged._orders) <= 101
    merged.forget()
    assert merged.missing() == NAMES

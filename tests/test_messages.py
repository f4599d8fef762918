"""Bytes and hashes are those of rosidl and rclpy (Jazzy)."""

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m

GOLDEN_HASHES = {
    "sensor_msgs/msg/JointState": "a13ee3a330e346c9d87b5aa18d24e11690752bd33a0350f11c5882bc9179260e",
    "sensor_msgs/msg/Image": "d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47",
    "sensor_msgs/msg/CompressedImage": "15640771531571185e2efc8a100baf923961a4d15d5569652e6cb6691e8e371a",
    "trajectory_msgs/msg/JointTrajectory": "179b33eba59d676f6d967ac71fe35e7ca2f64b2f3928f4a018cec115e213796e",
    "std_msgs/msg/Bool": "feb91e995ff9ebd09c0cb3d2aed18b11077585839fb5db80193b62d74528f6c9",
    "std_msgs/msg/String": "df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18",
    "geometry_msgs/msg/PoseStamped": "10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8",
    "rosgraph_msgs/msg/Clock": "692f7a66e93a3c83e71765d033b60349ba68023a8c689a79e48078bcb5c58564",
    # Holds `char`, which rosbags alone hashes wrongly.
    "rmw_dds_common/msg/ParticipantEntitiesInfo": "91a0593bacdcc50ea9bdcf849a938b128412cc1ea821245c663bcd26f83c295e",
}
GOLDEN_JOINT_STATE = (
    "0001000001000000020000000200000062000000020000000200000061000000030000006263000002000000"
    "000000000000f03f00000000000000400000000000000000"
)


@pytest.mark.parametrize(("message_type", "digest"), GOLDEN_HASHES.items())
def test_type_hash_is_rosidls(message_type: str, digest: str) -> None:
    assert m.type_hash(message_type) == f"RIHS01_{digest}"


def test_joint_state_bytes_are_rclpys() -> None:
    empty = np.zeros(0)
    message = m.message_class(m.JOINT_STATE)(m.header(10**9 + 2, "b"), ["a", "bc"], np.array([1.0, 2.0]), empty, empty)
    assert m.encode(message).hex() == GOLDEN_JOINT_STATE
    sample = m.read_joint_state(bytes.fromhex(GOLDEN_JOINT_STATE))
    assert sample.stamp_ns == 10**9 + 2
    assert sample.names == ("a", "bc")
    np.testing.assert_array_equal(sample.position, [1.0, 2.0])
    np.testing.assert_array_equal(sample.velocity, [0.0, 0.0])  # an empty array is normal


def test_joint_state_maps_by_name_and_reads_nan_velocity_as_zero() -> None:
    sample = m.read_joint_state(m.joint_state(7, ["a", "b"], np.array([1.0, 2.0]), np.array([np.nan, 4.0])))
    position, velocity = sample.select(["b", "a"])
    np.testing.assert_array_equal(position, [2.0, 1.0])
    np.testing.assert_array_equal(velocity, [4.0, 0.0])
    with pytest.raises(InputError, match="no joint 'c'"):
        sample.select(["c"])


def test_trajectory_survives_the_round_trip() -> None:
    sent = m.Trajectory(
        5, "policy:r:1", ("a", "b"), np.array([0.1, 1.25]), np.arange(4.0).reshape(2, 2), np.ones((2, 2))
    )
    got = m.read_joint_trajectory(m.joint_trajectory(sent))
    assert (got.stamp_ns, got.frame_id, got.names) == (5, "policy:r:1", ("a", "b"))
    np.testing.assert_allclose(got.times, [0.1, 1.25], atol=1e-9)
    np.testing.assert_array_equal(got.positions, sent.positions)
    np.testing.assert_array_equal(got.velocities, sent.velocities)
    without = m.read_joint_trajectory(m.joint_trajectory(m.Trajectory(0, "", ("a",), np.ones(1), np.ones((1, 1)))))
    assert without.velocities is None


def test_trajectory_with_a_wrong_length_is_refused() -> None:
    bad = m.Trajectory(0, "", ("a", "b", "c"), np.ones(1), np.ones((1, 2)))
    with pytest.raises(InputError, match="3 joints"):
        m.read_joint_trajectory(m.joint_trajectory(bad))


def test_image_round_trip_and_bgr() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    stamp, got = m.read_image(m.image(9, "cam", pixels))
    assert stamp == 9
    np.testing.assert_array_equal(got, pixels)
    message = m.decode(m.image(9, "cam", pixels), m.IMAGE)
    message.encoding = "bgr8"
    np.testing.assert_array_equal(m.read_image(m.encode(message))[1], pixels[..., ::-1])
    message.encoding = "mono8"
    with pytest.raises(InputError, match="mono8"):
        m.read_image(m.encode(message))


def test_small_messages_round_trip() -> None:
    assert m.read_bool(m.boolean(True)) is True
    assert m.read_json(m.json_string({"a": [1, None]})) == {"a": [1, None]}
    stamp, pose = m.read_pose_stamped(m.pose_stamped(3, "world", np.arange(3.0), np.array([0, 0, 0, 1.0])))
    assert stamp == 3
    np.testing.assert_array_equal(pose, [0, 1, 2, 0, 0, 0, 1])
    assert m.read_diagnostics(m.diagnostics(1, "safety", 1, "why", {"state": "HOLD"})) == {
        "message": "why",
        "state": "HOLD",
    }


@pytest.mark.parametrize("data", [b"", b"\x00\x01\x00\x00", b"\x00\x01\x00\x00zzzzzzzz", bytes(7)])
def test_garbage_is_an_input_error(data: bytes) -> None:
    with pytest.raises(InputError):
        m.read_joint_state(data)
    with pytest.raises(InputError):
        m.read_json(data)

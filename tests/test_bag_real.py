"""Bags of other people, with figures measured by other tools in their facts.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import read_rosbag, read_rosbag1
from embodied.datasets.bag_files import ROSBAG1, ROSBAG2, find_recordings, stale_claims
from embodied.datasets.bag_items import Message
from embodied.datasets.bag_series import read_table
from embodied.datasets.bag_storage import read_items
from embodied.datasets.bag_types import message_type
from embodied.datasets.importer import import_dataset, recognise

DATA = Path(__file__).parents[1].parent / "shared" / "data"
SETS = (
    "rosbag-plotjuggler-samples",
    "rosbag1-compressed",
    "rosbag2-official",
    "rosbag2-official-edge",
    "rosbag2-sensor-zoo",
    "rosbag2-sim-jointstate-imu",
)
pytestmark = pytest.mark.skipif(
    not all((DATA / name).exists() for name in SETS), reason="real data in ../shared/data is absent"
)


def facts(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "facts.json").read_text())


def mapping(tmp_path: Path, **keys: Any) -> dict[str, str]:
    file = tmp_path / "mapping.yaml"
    file.write_text(yaml.safe_dump(keys))
    return {"mapping": str(file)}


@pytest.mark.parametrize("name", SETS)
def test_every_file_holds_the_messages_that_other_tools_count(name):
    checked = 0
    for file, fact in facts(name).items():
        found: dict[str, list[Any]] = {}
        for item in read_items(DATA / name / file):
            if isinstance(item, Message):
                row = found.setdefault(item.topic.name, [item.topic.kind, 0, item.log_ns, 0, 0])
                row[1:] = [row[1] + 1, row[2], item.log_ns, row[4] + len(item.data)]
        expected = {
            topic: [f["type"], f["count"], f["first_ns"], f["last_ns"], f["bytes"]]
            for topic, f in fact["topics"].items()
        }
        assert found == expected, file
        checked += sum(row[1] for row in found.values())
    assert checked == sum(fact["messages"] for fact in facts(name).values())


def test_joints_are_matched_by_name_in_the_mobile_manipulator(tmp_path):
    """Trap 7: arm, gripper and wheels share one JointState."""
    name = "rosbag2-sim-jointstate-imu"
    fact = facts(name)["rosbag2_2025_05_09-18_01_02_0.mcap"]["topics"]
    joints = ["gripper_left_link_joint", "arm_3_link_joint", "arm_1_link_joint"]
    options = mapping(
        tmp_path,
        clock={"topic": "/joint_states"},
        observations={
            "arm": {"topic": "/joint_states", "field": "position", "joints": joints, "unit": "rad"},
            "acceleration": {"topic": "/imu/data", "field": "linear_acceleration", "unit": "m/s^2"},
        },
        action={"next": "arm", "mode": "joint_position"},
    )
    store = import_dataset(DATA / name, tmp_path / "s", options=options)
    assert store.episode_length.tolist() == [fact["/joint_states"]["count"]]
    episode = store.episode(0)
    for row, key in ((0, "first_decoded"), (-1, "last_decoded")):
        decoded = fact["/joint_states"][key]
        expected = [decoded["position"][decoded["names"].index(joint)] for joint in joints]
        np.testing.assert_allclose(episode.observations["arm"][row], expected, atol=1e-6)
    assert store.spec.observations["arm"].names == tuple(joints)
    assert store.spec.observations["acceleration"].names == ("x", "y", "z")
    assert episode.action is not None
    np.testing.assert_array_equal(episode.action[:-1], episode.observations["arm"][1:])
    wrong = {"arm": {"topic": "/joint_states", "field": "position", "joints": ["arm_4_link_joint"]}}
    options = mapping(tmp_path, clock={"rate": 10}, observations=wrong)
    with pytest.raises(InputError, match=r"never names the joint 'arm_4_link_joint'. Did you mean 'arm_3_link_joint'"):
        read_rosbag.read(DATA / name, options)


@pytest.mark.parametrize(("stamps", "seconds"), [("header", 194.8 - 101.55), ("received", 94.217129)])
def test_the_two_clocks_of_a_simulation_are_found(tmp_path, stamps, seconds):
    """Trap 6: header stamps are simulation time, bag stamps wall time."""
    arm = {"topic": "/joint_states", "field": "position", "joints": ["arm_1_link_joint"]}
    options = mapping(tmp_path, clock={"topic": "/joint_states"}, stamps=stamps, observations={"arm": arm})
    source = read_rosbag.read(DATA / "rosbag2-sim-jointstate-imu", options)
    assert source.load(0).timestamp[-1] == pytest.approx(seconds, abs=1e-4)
    (finding,) = source.findings
    assert finding.check == "two-clocks"
    assert "101.550 to 194.800 s" in finding.message
    assert "1746806463.735 to 1746806557.952 s" in finding.message


def test_bz2_and_lz4_give_the_same_arrays(tmp_path):
    options = mapping(
        tmp_path,
        clock={"rate": 20},
        observations={"pose": {"topic": "/turtle2/pose"}, "color": {"topic": "/turtle1/color_sensor"}},
        action={"topic": "/turtle2/cmd_vel", "mode": "base_velocity"},
    )
    paths = [DATA / "rosbag1-compressed" / f"example-{compression}.bag" for compression in ("bz2", "lz4")]
    assert [recognise(path) for path in paths] == ["rosbag1", "rosbag1"]
    one, other = (read_rosbag1.read(path, options).load(0) for path in paths)
    one.check(read_rosbag1.read(paths[0], options).spec)
    assert len(one) > 400
    for key in one.observations:
        np.testing.assert_array_equal(one.observations[key], other.observations[key])
    assert one.action is not None
    assert other.action is not None
    np.testing.assert_array_equal(one.action, other.action)
    assert one.step_valid.sum() > 300
    assert read_rosbag1.read(paths[0], options).spec.observations["pose"].names[:3] == ("x", "y", "theta")


def test_a_ros1_bag_of_joint_states_at_a_kilohertz(tmp_path):
    fact = facts("rosbag-plotjuggler-samples")["fake_joint_state.bag"]["topics"]["/fake_joints_state"]
    path = DATA / "rosbag-plotjuggler-samples" / "fake_joint_state.bag"
    with pytest.raises(ConfigError, match="Wrote"):
        read_rosbag1.read(path, {"propose": str(tmp_path / "draft.yaml")})
    store = import_dataset(path, tmp_path / "s", options={"mapping": str(tmp_path / "draft.yaml")})
    arm = store.episode(0).observations["joint_position"]
    assert arm.shape == (fact["count"], 6)
    np.testing.assert_allclose(arm[0], fact["first_decoded"]["position"], atol=1e-6)
    np.testing.assert_allclose(arm[-1], fact["last_decoded"]["position"], atol=1e-6)
    assert store.spec.control_dt == pytest.approx(0.001, rel=0.01)


def test_a_sqlite3_bag_of_poses(tmp_path):
    folder = DATA / "rosbag-plotjuggler-samples" / "rosbag2_test"
    options = mapping(
        tmp_path,
        clock={"topic": "/pose"},
        observations={
            "pose": {"topic": "/pose", "field": "pose.position", "unit": "m"},
            "turning": {"topic": "/imu", "field": "angular_velocity"},
            "battery": {"topic": "/battery", "field": "voltage"},
        },
        action={"next": "pose"},
    )
    source = read_rosbag.read(folder, options)
    assert source.findings == ()  # its metadata of version 2 names the file from the folder above, and is right
    episode = source.load(0)
    episode.check(source.spec)
    assert (
        len(episode)
        == facts("rosbag-plotjuggler-samples")["rosbag2_test/rosbag2_test_0.db3"]["topics"]["/pose"]["count"]
    )
    first = next(item for item in read_items(folder / "rosbag2_test_0.db3", {"/pose"}) if isinstance(item, Message))
    point = message_type(first.topic).decode(first.data).pose.position
    np.testing.assert_allclose(episode.observations["pose"][0], [point.x, point.y, point.z], rtol=1e-6)


def test_the_sensor_zoo_gives_joints_and_both_pictures(tmp_path):
    name = "rosbag2-sensor-zoo"
    fact = facts(name)["rosbag2_2025_09_10-13_03_56_0.mcap"]["topics"]
    arm = {"topic": "/joint_state", "field": "position", "joints": ["gripper_joint", "shoulder_joint"]}
    keys: dict[str, Any] = {"clock": {"topic": "/joint_state"}, "observations": {"arm": arm}, "max_age": 3}
    images = {"raw": {"topic": "/image"}, "jpeg": {"topic": "/compressed_image"}}
    with pytest.raises(InputError, match="received"):  # the JPEG has stamps of another clock
        read_rosbag.read(DATA / name, mapping(tmp_path, **keys, images=images))
    options = mapping(tmp_path, **keys, images=images, stamps="received", action={"next": "arm"})
    store = import_dataset(DATA / name, tmp_path / "s", options=options)
    episode = store.episode(0)
    assert len(episode) == fact["/joint_state"]["count"] == 15
    np.testing.assert_allclose(episode.observations["arm"][0], [0.1, 0.0], atol=1e-6)
    np.testing.assert_allclose(episode.observations["arm"][-1], [0.0, 0.492725], atol=1e-6)
    assert store.spec.images["raw"].shape == (480, 640, 3)
    item = next(
        item for item in read_items(DATA / name / next(iter(facts(name))), {"/image"}) if isinstance(item, Message)
    )
    expected = message_type(item.topic).decode(item.data).data.reshape(480, 640, 3)
    np.testing.assert_array_equal(np.asarray(episode.images["raw"])[3], expected)
    assert np.asarray(episode.images["jpeg"])[0].std() > 5


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_split_bags_with_and_without_metadata_are_one_recording(storage):
    split = DATA / "rosbag2-official" / storage / "wbag"
    (recording,) = find_recordings(split, ROSBAG2)
    table = read_table(recording, None)
    assert len(recording.files) == 5
    assert {name: count.count for name, count in table.counts.items()} == {
        "AAA": 804,
        "BBB": 742,
        "CCC": 742,
        "DDD": 753,
        "EEE": 804,
        "FFF": 772,
        "GGG": 731,
        "HHH": 726,
    }
    bare = DATA / "rosbag2-official-edge" / storage / "reindex_test_bags"
    (recording,) = find_recordings(bare, ROSBAG2)
    assert recording.name == "multiple_files"
    assert read_table(recording, None).counts["/chatter"].count == 1324 + 1324 + 529
    with pytest.raises(InputError, match=r"/chatter  std_msgs/msg/String  3177 messages"):
        read_rosbag.read(bare, {})


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("mcap/wrong_rmw_test", "serialised as 'wrong_format'"),
        ("sqlite3/wrong_rmw_test", "no definition of its type, and test_msgs/msg/Arrays"),
        ("sqlite3/empty_bag", r"holds no messages.*Topics without messages: /rosout, /parameter_events"),
        ("services/only_services.mcap", "definition of a service, not of its events"),
        ("sqlite3/convert_a", "no definition of its type"),
        ("mcap/convert_a", "b_basictypes  test_msgs/msg/BasicTypes  50 messages, 500 Hz"),
        ("services/topics_and_services.db3", "/parameter_events  rcl_interfaces/msg/ParameterEvent  7 messages"),
    ],
)
def test_edge_cases_are_refused_for_what_they_are(path, reason):
    with pytest.raises(InputError, match=reason):
        read_rosbag.read(DATA / "rosbag2-official-edge" / path, {})


def test_types_that_nobody_has_are_read_by_the_definitions_in_the_bag(tmp_path):
    """test_msgs is in no ROS distribution's message store; MCAP and newer sqlite3 bags carry its text."""
    options = mapping(
        tmp_path, clock={"rate": 1000}, observations={"number": {"topic": "/test_topic", "field": "float64_value"}}
    )
    sources = [
        read_rosbag.read(DATA / "rosbag2-official-edge" / storage / "cdr_test", options)
        for storage in ("mcap", "sqlite3")
    ]
    rows = [source.load(0).observations["number"] for source in sources]
    assert len(rows[0]) > 50
    np.testing.assert_array_equal(rows[0], rows[1])


def test_metadata_of_another_serialisation_is_a_claim():
    (recording,) = find_recordings(DATA / "rosbag2-official-edge" / "sqlite3" / "wrong_rmw_test", ROSBAG2)
    counts = read_table(recording, None).counts
    encodings = {name: count.topic.encoding for name, count in counts.items()}
    (finding,) = stale_claims(recording, {name: count.count for name, count in counts.items()}, encodings)
    assert finding.check == "metadata-stale"
    assert "claims the serialisation 'wrong_format' where the files say 'cdr'" in finding.message


def test_a_bag_without_messages_and_one_of_ros_1_are_told_apart():
    folder = DATA / "rosbag1-compressed"
    with pytest.raises(InputError, match=r"no-messages\.bag holds no messages"):
        read_rosbag1.read(folder / "no-messages.bag", {})
    assert [recording.name for recording in find_recordings(folder, ROSBAG1)] == [
        "example-bz2.bag",
        "example-lz4.bag",
        "no-messages.bag",
    ]
    assert not read_rosbag.sniff(folder)
    assert read_rosbag1.sniff(folder)

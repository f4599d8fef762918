import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mcap", reason="rosbag2 needs the extra 'ros'")
pytest.importorskip("rosbags", reason="rosbag2 needs the extra 'ros'")

sys.path.insert(0, str(Path(__file__).parent))
from bag_samples import write_db3

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets import read_rosbag
from embodied.datasets.bag import scan
from embodied.datasets.bag_files import ROSBAG2, find_recordings
from embodied.datasets.importer import import_dataset, recognise
from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import transitions
from embodied.robot_bridge import messages
from embodied.robot_bridge.bag_writer import BagWriter
from embodied.robot_bridge.messages import Trajectory

DATA = Path(__file__).parents[1].parent / "shared" / "data"

JOINTS = ("a", "b", "finger")
SCALE = np.array([0.1, 0.1, 0.04])
DT, T0 = 0.1, 1_700_000_000_000_000_000
LATENCY = 15_000_000  # from a picture's stamp to its chunk [ns]
CONTRACT = {
    "observations": [
        {"key": "joint_position", "spec": ArraySpec((2,), names=JOINTS[:2]).to_json()},
        {"key": "gripper_position", "spec": ArraySpec((1,), names=JOINTS[2:], low=(0.0,), high=(0.08,)).to_json()},
        {"key": "joint_target", "spec": ArraySpec((3,), names=JOINTS).to_json()},
    ],
    "images": [{"camera": "wrist", "spec": ArraySpec((4, 6, 3), "uint8").to_json()}],
    "action": ActionSpec(
        (3,), names=JOINTS, control_mode="joint_position_delta", scale=tuple(SCALE.tolist())
    ).to_json(),
    "control_dt": DT,
    "joint_names": list(JOINTS),
    "environment": "robosuite/Lift",
    "normalizer": {},
}
#                  a     b   gripper
ACTIONS = np.array(
    [
        [0.5, -1.0, -1.0],  # opens: at the stop, so nothing moves
        [0.5, 0.0, 1.0],  # closes: 0.08 -> 0.04
        [-0.2, 0.3, 1.0],  # 0.04 -> 0
        [0.0, 1.0, 1.0],  # stays closed
        [1.0, 0.2, -1.0],  # opens: 0 -> 0.04
    ]
)
START = np.array([0.2, -0.3, 0.08])


def targets_of(actions: np.ndarray) -> np.ndarray:
    rows = [START]
    for action in actions:
        wanted = rows[-1] + SCALE * action
        wanted[2] = np.clip(rows[-1][2] - np.sign(action[2]) * SCALE[2], 0.0, 0.08)
        rows.append(wanted)
    return np.stack(rows)


def png(stamp: int, frame: str, picture: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    new = messages.message_class(messages.COMPRESSED_IMAGE)
    return messages.encode(new(messages.header(stamp, frame), "rgb8; png compressed", data))


def record(
    folder: Path,
    *,
    actions=ACTIONS,
    contract=CONTRACT,
    chunks=True,
    success=True,
    skip_chunk=None,
    seconds=None,
    own_gripper=False,
    about=None,
    prefix="",
    silent=(),
    compressed=False,
):
    """What the bridge's recorder writes: joints at 100 Hz in another order, pictures at 10 Hz, commands at 50 Hz."""
    metadata = {"embodied_contract": contract} if contract else {}
    writer = BagWriter(folder, metadata | ({"embodied_recording": about} if about else {}))
    targets = targets_of(actions)
    steps = len(actions)
    rows = []
    duration = seconds if seconds is not None else steps * DT + 0.15
    for k in range(-20, round(duration / 0.01)):
        stamp = T0 + k * 10_000_000
        now = np.clip(k * 0.01 / DT, 0, steps)
        value = np.array([np.interp(now, np.arange(steps + 1), targets[:, j]) for j in range(3)])
        names, order = ("finger", "b", "wheel", "a"), [2, 1, 2, 0]
        if own_gripper:  # a driver of its own, at 20 Hz; the arm's sends no velocities
            names, order = ("b", "a"), [1, 0]
            if k % 5 == 0:
                data = messages.joint_state(stamp, ("finger",), value[2:], np.array([0.0]))
                rows.append((stamp, "/gripper/joint_states", data))
        if k not in silent:
            velocity = np.zeros(0 if own_gripper else 4)
            rows.append((stamp, "/joint_states", messages.joint_state(stamp, names, value[order], velocity)))
        if k % 10 == 0:
            for camera, tone in (("wrist", 0), ("side", 100)):
                picture = np.full((4, 6, 3), max(0, tone + k // 10), np.uint8)
                topic = f"/camera/{camera}/image_raw"
                if compressed:
                    rows.append((stamp + 1, topic + "/compressed", png(stamp, camera, picture)))
                else:
                    rows.append((stamp + 1, topic, messages.image(stamp, camera, picture)))
            rows.append(
                (stamp + 2, "/sim/pose/cube", messages.pose_stamped(stamp, "world", value, np.array([0, 0, 0, 1.0])))
            )
    for k in range(steps):
        stamp = T0 + round(k * DT * 1e9)
        frame = f"policy:run:{k + 1}"
        if chunks and k != skip_chunk:
            goal = Trajectory(stamp, frame, JOINTS, np.array([DT]), targets[k + 1 : k + 2])
            rows.append((stamp + LATENCY, "/bridge/chunk", messages.joint_trajectory(goal)))
        for part in range(5):
            share = (part + 1) / 5
            point = targets[k] + share * (targets[k + 1] - targets[k])
            at = stamp + LATENCY + 2_000_000 + part * 20_000_000
            sent = Trajectory(at, prefix + frame, JOINTS, np.array([0.02]), point[None])
            rows.append((at, "/bridge/command", messages.joint_trajectory(sent)))
    rows.append(
        (T0 - 200_000_000, "/bridge/event", messages.json_string({"event": "episode_start", "instruction": "lift"}))
    )
    end = {"event": "episode_end", "success": success, "end": "horizon"}
    rows.append((T0 + round(duration * 1e9), "/bridge/event", messages.json_string(end)))
    kinds = {
        "/joint_states": messages.JOINT_STATE,
        "/gripper/joint_states": messages.JOINT_STATE,
        "/bridge/event": messages.STRING,
        "/sim/pose/cube": messages.POSE_STAMPED,
    }
    for received, topic, data in sorted(rows, key=lambda row: row[0]):
        kind = kinds.get(topic, messages.IMAGE if "camera" in topic else messages.JOINT_TRAJECTORY)
        kind = messages.COMPRESSED_IMAGE if topic.endswith("/compressed") else kind
        writer.write(topic, kind, data, received)
    writer.close()
    return writer.path


def check_first_episode(store: EpisodeStore) -> None:
    episode = store.episode(0)
    assert episode.action is not None
    np.testing.assert_allclose(episode.action[:5], ACTIONS, atol=1e-6)
    assert not episode.action[5].any()
    np.testing.assert_allclose(episode.observations["joint_target"], targets_of(ACTIONS), atol=1e-6)
    # The measured joints follow the targets; row k is what was measured at the stamp of picture k.
    np.testing.assert_allclose(episode.observations["joint_position"], targets_of(ACTIONS)[:, :2], atol=1e-6)
    np.testing.assert_allclose(episode.observations["gripper_position"], targets_of(ACTIONS)[:, 2:], atol=1e-6)
    assert np.asarray(episode.images["wrist"])[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.asarray(episode.images["side"])[:, 3, 5, 2].tolist() == [100, 101, 102, 103, 104, 105]
    assert episode.step_valid.tolist() == [True] * 5 + [False]


def test_a_recorded_episode_comes_back_as_it_was(tmp_path):
    record(tmp_path / "bags" / "episode_0000")
    record(tmp_path / "bags" / "episode_0001", actions=-ACTIONS[:3], success=False)
    assert recognise(tmp_path / "bags") == "rosbag2"
    store = import_dataset(tmp_path / "bags", tmp_path / "s")
    assert store.episode_length.tolist() == [6, 4]
    assert store.success.tolist() == [1, 0]
    assert store.instructions == ["lift", "lift"]
    assert store.source_ids == ["episode_0000_0.mcap", "episode_0001_0.mcap"]
    assert store.spec.environment == "robosuite/Lift"
    assert store.spec.control_dt == DT
    assert store.spec.observations["cube_position"].privileged
    np.testing.assert_allclose(store.read("observation/cube_position", 0, 6), targets_of(ACTIONS), atol=1e-6)
    check_first_episode(store)
    np.testing.assert_allclose(store.read("timestamp", 0, 6), [0, 0.1, 0.2, 0.3, 0.4, 0.5], atol=1e-9)
    assert not store.read("terminated").any()
    assert np.flatnonzero(store.read("truncated")).tolist() == [4, 8]
    assert len(transitions(store, None)) == 8


def test_contract_may_come_from_an_event_or_a_file(tmp_path):
    path = record(tmp_path / "e", contract=None)
    with pytest.raises(InputError, match="embodied_contract"):
        import_dataset(path, tmp_path / "s")
    (tmp_path / "contract.json").write_text(json.dumps(CONTRACT))
    check_first_episode(import_dataset(path, tmp_path / "s", options={"contract": tmp_path / "contract.json"}))
    with pytest.raises(ConfigError, match="Did you mean 'contract'"):
        import_dataset(path, tmp_path / "t", options={"contrakt": "x"})


def test_the_same_bag_in_sqlite3_split_in_two(tmp_path):
    from mcap.reader import make_reader

    with open(record(tmp_path / "e"), "rb") as file:
        read = make_reader(file).iter_messages()
        rows = [(m.log_time, channel.topic, schema.name if schema else "", m.data) for schema, channel, m in read]
    for part, half in enumerate((rows[:50], rows[50:])):
        write_db3(tmp_path / "run" / f"run_{part}.db3", half)
    (tmp_path / "contract.json").write_text(json.dumps(CONTRACT))
    options = {"contract": tmp_path / "contract.json"}
    store = import_dataset(tmp_path / "run", tmp_path / "s", options=options)
    assert store.source_ids == ["run"]
    check_first_episode(store)


def test_joint_names_left_out_of_a_contract_are_the_actions(tmp_path):
    bare = [
        {"key": o["key"], "spec": o["spec"] | {"names": [], "low": [], "high": []}} for o in CONTRACT["observations"]
    ]
    contract = CONTRACT | {"observations": bare, "joint_names": ["a", "b"]}
    episode = import_dataset(record(tmp_path / "e", contract=contract), tmp_path / "s").episode(0)
    np.testing.assert_allclose(episode.observations["gripper_position"], targets_of(ACTIONS)[:, 2:], atol=1e-6)
    np.testing.assert_allclose(episode.observations["joint_position"], targets_of(ACTIONS)[:, :2], atol=1e-6)
    assert episode.action is not None
    # Without the gripper's range a gripper that stands still says neither open nor closed.
    np.testing.assert_allclose(episode.action[:5, 2], [0, 1, 1, 0, -1], atol=1e-6)


def test_without_chunks_the_control_period_gives_the_rows(tmp_path):
    store = import_dataset(record(tmp_path / "e", chunks=False), tmp_path / "s")
    episode = store.episode(0)
    assert episode.action is not None
    # A fixed grid does not know which command answers which picture: sums over the episode agree, single steps less so.
    moved = (episode.action[:, :2] * SCALE[:2]).sum(0)
    np.testing.assert_allclose(moved, (targets_of(ACTIONS)[-1] - START)[:2], atol=1e-6)
    np.testing.assert_allclose(np.diff(episode.timestamp)[:-1], DT, atol=1e-9)


def test_a_silence_of_the_policy_is_not_a_step(tmp_path):
    store = import_dataset(record(tmp_path / "e", skip_chunk=2), tmp_path / "s")
    assert store.read("step_valid").tolist() == [True, False, True, True, False]
    np.testing.assert_allclose(np.diff(store.read("timestamp")), [0.1, 0.2, 0.1, 0.1], atol=1e-9)


def test_without_a_final_observation_the_last_step_is_not_learned_from(tmp_path):
    store = import_dataset(record(tmp_path / "e", seconds=0.43), tmp_path / "s")
    assert store.read("step_valid").tolist() == [True, True, True, True, False]
    assert np.flatnonzero(store.read("truncated")).tolist() == [4]


def test_file_of_a_killed_recorder_reads_up_to_the_break(tmp_path):
    path = record(tmp_path / "e")
    whole = path.read_bytes()
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / "cut_0.mcap"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    assert not scan(find_recordings(cut, ROSBAG2)[0]).complete
    assert scan(find_recordings(path, ROSBAG2)[0]).complete
    store = import_dataset(cut, tmp_path / "s")
    assert 2 <= store.num_frames < 6
    count = int(store.read("step_valid").sum())
    np.testing.assert_allclose(store.read("action")[: count - 1], ACTIONS[: count - 1], atol=1e-6)
    assert store.success.tolist() == [1] if count == 5 else [-1]


def test_a_bag_without_commands_or_camera_is_refused_by_name(tmp_path):
    path = record(tmp_path / "still", actions=ACTIONS[:0], seconds=0.3)
    with pytest.raises(InputError, match=r"'still_0\.mcap' has no actions"):
        import_dataset(path, tmp_path / "s")
    contract = CONTRACT | {"images": [{"camera": "wrst", "spec": ArraySpec((4, 6, 3), "uint8").to_json()}]}
    with pytest.raises(InputError, match=r"no images of camera 'wrst'. Did you mean 'wrist'\?"):
        import_dataset(record(tmp_path / "camera", contract=contract), tmp_path / "s")
    other = CONTRACT | {"action": CONTRACT["action"] | {"names": ["a", "b", "thumb"]}}
    with pytest.raises(InputError, match="thumb"):
        import_dataset(record(tmp_path / "joints", contract=other), tmp_path / "s")


def test_a_gripper_with_a_driver_of_its_own(tmp_path):
    store = import_dataset(record(tmp_path / "e", own_gripper=True), tmp_path / "s")
    check_first_episode(store)
    np.testing.assert_allclose(store.read("observation/age_joints", 0, 6), 0.0, atol=1e-6)  # 50 ms divide 100 ms
    spec = CONTRACT["observations"][0] | {"key": "joint_velocity"}
    contract = CONTRACT | {"observations": [*CONTRACT["observations"], spec]}
    episode = import_dataset(record(tmp_path / "v", own_gripper=True, contract=contract), tmp_path / "t").episode(0)
    assert not episode.observations["joint_velocity"].any()  # none were sent


@pytest.mark.parametrize("mode", ["joint_position", "joint_velocity", "joint_position_delta"])
@pytest.mark.parametrize("scaled", [True, False])
def test_actions_are_what_was_executed_in_every_control_mode(tmp_path, mode, scaled):
    """The bridge's own arithmetic gives the recorded targets back from the imported actions."""
    from embodied.robot_bridge.actions import Targets
    from embodied.robot_bridge.limits import Limits
    from embodied.robot_bridge.profile import Gripper, Profile

    scale = {"joint_position": [3.0] * 3, "joint_velocity": [2.0, 2.0, 0.04]}.get(mode, SCALE.tolist())
    if not scaled and mode != "joint_position":
        scale = [1.0, 1.0, 1.0]
    action = CONTRACT["action"] | {"control_mode": mode, "scale": scale if scaled else []}
    store = import_dataset(record(tmp_path / "e", contract=CONTRACT | {"action": action}), tmp_path / "s")
    assert store.spec.action is not None
    assert store.spec.action.control_mode == mode
    imported = store.read("action", 0, 5).astype(float)
    if not scaled and mode != "joint_position":
        imported[:, 2] = np.sign(imported[:, 2])

    class Given:
        action_spec, control_dt = store.spec.action, DT

    wide = np.full(3, 10.0)
    limits = Limits(JOINTS, np.array([-10, -10, 0.0]), np.array([10, 10, 0.08]), wide, wide, wide, wide)
    profile = Profile("p", JOINTS[:2], gripper=Gripper("finger", open=0.08, closed=0.0))
    bridge = Targets(Given(), profile, limits)  # type: ignore[arg-type]
    bridge.start(START)
    wanted = targets_of(ACTIONS)
    for k in range(5):
        after = bridge.apply(imported[k : k + 1], wanted[k])[0]
        columns = 3 if scaled or mode == "joint_position" else 2  # without a scale a gripper's step has no size
        np.testing.assert_allclose(after[:columns], wanted[k + 1, :columns], atol=1e-6)
        bridge.start(wanted[k + 1])


def test_end_effector_actions_are_refused_with_the_modes_that_are_read(tmp_path):
    contract = CONTRACT | {"action": CONTRACT["action"] | {"control_mode": "end_effector_delta"}}
    with pytest.raises(InputError, match="joint_position_delta, joint_position, joint_velocity"):
        import_dataset(record(tmp_path / "e", contract=contract), tmp_path / "s")


def test_steps_with_a_stale_source_are_none_and_ages_are_kept(tmp_path):
    silent = range(15, 35)  # nothing of the joints from 0.15 s to 0.34 s
    about = {"robot": "two", "max_age_s": {"joint_states": 0.12, "images": 0.15}, "limits_sha256": "f00"}
    store = import_dataset(record(tmp_path / "e", silent=silent, about=about), tmp_path / "s")
    np.testing.assert_allclose(store.read("observation/age_joints", 0, 6), [0, 0, 0.06, 0.16, 0, 0], atol=1e-6)
    assert store.read("step_valid").tolist() == [True, True, True, False, True, False]
    assert store.spec.observations["age_wrist"].privileged
    attributes = read_rosbag.read(tmp_path / "e", {}).attributes
    assert attributes["max_age_s"] == {"joints": 0.12, "side": 0.15, "wrist": 0.15}
    assert attributes["recording"] == about
    again = import_dataset(record(tmp_path / "f", silent=silent), tmp_path / "t")  # 0.3 s, where nothing is said
    assert again.read("step_valid").tolist() == [True] * 5 + [False]


def test_compressed_cameras_are_the_bundles_cameras(tmp_path):
    store = import_dataset(record(tmp_path / "e", compressed=True), tmp_path / "s")
    assert set(store.spec.images) == {"wrist", "side"}
    check_first_episode(store)


def test_a_shadow_run_is_refused_since_nothing_was_executed(tmp_path):
    with pytest.raises(InputError, match="shadow run"):
        import_dataset(record(tmp_path / "e", prefix="shadow:"), tmp_path / "s")


@pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")
def test_foreign_bags_are_scanned_with_independent_counts():
    folder = DATA / "rosbag2-sensor-zoo"
    bags = [scan(recording) for recording in find_recordings(folder, ROSBAG2)]
    assert len(bags) == 1
    assert sum(len(s.values) for bag in bags for s in bag.joint_states.values()) == 15
    assert sum(len(s.values) for bag in bags for s in bag.images.values()) == 2  # one Image, one CompressedImage

"""Every shipped profile has a simulated robot: names, ranges, controllers and what it says of itself."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import Clock

from embodied.contracts.errors import EmbodiedError, InputError
from embodied.progress import Progress
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.mujoco_robot import MujocoRobot, check_joints
from embodied.robot_bridge.profile import PROFILES, Profile, load_profile
from embodied.robot_bridge.qos import COMMAND, LATEST
from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport
from embodied.robot_sim import MODELS, RobotSim, robot_sim, write_robot_scene

pytest.importorskip("robosuite")
SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))

URDF = """<robot name="so101"><link name="base"/>{links}{joints}
<link name="gripperframe"><visual><geometry><mesh filename="package://nowhere/a.stl"/></geometry></visual></link>
<joint name="tip" type="fixed"><parent link="gripper"/><child link="gripperframe"/><origin xyz="0 0 0.05"/></joint>
<link name="jaw"/><joint name="gripper" type="revolute"><parent link="gripper"/><child link="jaw"/>
<origin xyz="0.02 0 0"/><axis xyz="0 1 0"/><limit lower="-0.2" upper="1.8" effort="3" velocity="5"/></joint>
<link name="wheel"/><joint name="other" type="continuous"><parent link="gripper"/><child link="wheel"/>
<axis xyz="0 1 0"/></joint></robot>"""
LENGTHS = (0.06, 0.05, 0.11, 0.13, 0.06)


def write_urdf(path: Path) -> Path:
    names = load_profile("so101").joints
    chain = ("base", "l1", "l2", "l3", "wrist", "gripper")
    links = "".join(f'<link name="{link}"/>' for link in chain[1:])
    joints = "".join(
        f'<joint name="{name}" type="revolute"><parent link="{chain[i]}"/><child link="{chain[i + 1]}"/>'
        f'<origin xyz="0 0 {LENGTHS[i]}"/><axis xyz="{"0 0 1" if i in (0, 4) else "0 1 0"}"/>'
        f'<limit lower="-1" upper="1" effort="3" velocity="5"/></joint>'
        for i, name in enumerate(names)
    )
    path.write_text(URDF.format(links=links, joints=joints))
    return path


def follow(arm: SimulatedArm, profile: Profile, target: np.ndarray, seconds: float) -> np.ndarray:
    """Drive a jtc profile's simulated arm by its topics alone; the last joint state in the profile's order."""
    clock = Clock()
    bus = MemoryBus(clock.monotonic_ns)
    robot = MujocoRobot(arm, profile, MemoryTransport(bus), clock.monotonic, clock.stamp)
    peer, states = MemoryTransport(bus), []
    peer.subscriber(profile.topics.joint_states, m.JOINT_STATE, LATEST, lambda data, _: states.append(data))
    command = peer.publisher(profile.topics.command, m.JOINT_TRAJECTORY, COMMAND)
    own = profile.gripper is not None and profile.gripper.adapter != "joint"
    names = profile.joints if own else profile.all_joints
    rows = np.array([target[: len(names)]])
    command.write(m.joint_trajectory(m.Trajectory(0, "", names, np.array([seconds]), rows, np.zeros_like(rows))))
    for _ in range(round(seconds * 100) + 50):
        clock.seconds += 0.01
        robot.tick()
    assert robot.counts["rejected"] == 0
    robot.close()
    samples = [m.read_joint_state(data) for data in states]  # a gripper may have messages of its own on the topic
    return [s for s in samples if profile.joints[0] in s.names][-1].select(profile.joints)[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_has_a_robot_that_moves_as_told(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    arm = SimulatedArm(load_scene(write_robot_scene(tmp_path, profile, RobotSim(name))))
    check_joints(profile, arm, name)
    assert arm.has_tool
    start = arm.joint_state()[0]
    limits = profile.read_limits()
    assert (start[: len(profile.joints)] >= limits.low[: len(profile.joints)] - profile.position_margin).all()
    assert ("invented" in arm.scene.about) == (name not in MODELS)
    target = start + 0.15
    target = np.clip(target, limits.low, limits.high)
    np.testing.assert_allclose(follow(arm, profile, target, 1.0), target[: len(profile.joints)], atol=2e-3)
    if profile.gripper:
        row = arm.names.index(profile.gripper.joint)
        for wanted in (profile.gripper.closed, profile.gripper.open):
            arm.target[row] = wanted
            for _ in range(400):
                arm.advance(arm.target)
            stroke = abs(profile.gripper.open - profile.gripper.closed)
            np.testing.assert_allclose(arm.joint_state()[0][row], wanted, atol=0.03 * stroke)


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_profile(name).description.chain])
def test_the_simulated_links_are_where_the_profile_says(name: str, tmp_path: Path) -> None:
    """robosuite's models and the makers' numbers in the profiles agree to millimetres; a chain is met exactly."""
    profile = load_profile(name)
    config = RobotSim(name, model="panda" if name.startswith("franka") else None)
    arm = SimulatedArm(load_scene(write_robot_scene(tmp_path, profile, config)))
    kinematics = profile.read_kinematics([profile.description.tool])
    limits, count = profile.read_limits(), len(profile.joints)
    generator = np.random.default_rng(1)
    workspace = profile.read_workspace()
    assert workspace is not None
    assert workspace.outside(arm.joint_state()[0]) == ""
    for _ in range(50):
        q = generator.uniform(limits.low[:count], limits.high[:count])
        arm.data.qpos[[arm.model.joint(arm.scene.joints[n].joint).qposadr[0] for n in profile.joints]] = q
        arm.place(arm.data)
        difference = np.linalg.norm(arm.tool_in_base()[0] - kinematics.positions(q)[0])
        assert difference < (0.005 if name in MODELS else 1e-6)


def test_a_urdf_gives_the_link_lengths_and_its_own_gripper_joint(tmp_path: Path) -> None:
    config = RobotSim("so101", urdf=write_urdf(tmp_path / "so101.urdf"))
    profile = load_profile("so101", config.urdf)
    scene = load_scene(write_robot_scene(tmp_path / "scene", profile, config))
    assert "so101.urdf" in scene.about
    arm = SimulatedArm(scene)
    assert arm.names == (*profile.joints, "gripper")
    assert (scene.xml.parent / scene.description).read_text() == (tmp_path / "so101.urdf").read_text()
    qpos = np.array(scene.initial.qpos)
    address = [arm.model.joint(scene.joints[name].joint).qposadr[0] for name in profile.joints]
    qpos[address] = 0.0
    arm.data.qpos[:] = qpos
    np.testing.assert_allclose(arm.joint_state()[0][:5], 0.0)
    arm.advance(np.zeros(6))
    np.testing.assert_allclose(arm.tool_in_base()[0], [0, 0, sum(LENGTHS) + 0.05], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<robot", "cannot be read"),
        ("<mujoco/>", "is no URDF"),
        ('<robot name="a"><link name="base"/></robot>', "no moving joint 'shoulder_pan'"),
    ],
)
def test_a_urdf_that_does_not_fit(text: str, reason: str, tmp_path: Path) -> None:
    from embodied.sim.arm_scene import ArmSpec, export_arm_scene

    profile = load_profile("so101")
    (tmp_path / "a.urdf").write_text(text)
    arm = ArmSpec(profile.joints, (-1.0,) * 5, (1.0,) * 5)
    with pytest.raises(InputError, match=reason):
        export_arm_scene(tmp_path / "scene", arm, urdf=tmp_path / "a.urdf")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transport": "dsd"}, r"--transport: there is no 'dsd'.*Did you mean 'dds'"),
        ({"discovery": "lan"}, "--discovery: there is no 'lan'"),
        ({"state_style": ("nan",)}, "--state-style: there is no 'nan'"),
        ({"profile": "ur6"}, "ur6"),
        ({"state_rate": 0.0}, r"--state-rate is 0; it must lie"),
        ({"image_size": 0}, "image size of 0"),
    ],
)
def test_the_verb_refuses_what_means_nothing(changes: dict[str, Any], reason: str) -> None:
    config = dataclasses.replace(RobotSim("so101"), **changes)
    with pytest.raises(EmbodiedError, match=reason):
        robot_sim(config, Progress())


def test_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no 'ur5'.*Did you mean 'ur5e'"):
        write_robot_scene(tmp_path, load_profile("ur5e"), RobotSim("ur5e", model="ur5"))
    with pytest.raises(InputError, match="xarm7 has 7 joints, the profile 6"):
        write_robot_scene(tmp_path, load_profile("ur5e"), RobotSim("ur5e", model="xarm7"))
    with pytest.raises(InputError, match="closed position is 0"):
        write_robot_scene(tmp_path, load_profile("xarm7"), RobotSim("xarm7", model="robosuite/Lift"))


def test_the_off_screen_backend_is_chosen_before_a_profile_loads_mujoco() -> None:
    program = (
        "from embodied.progress import Progress\n"
        "from embodied.robot_sim import RobotSim, robot_sim\n"
        "try:\n"
        "    robot_sim(RobotSim('so101', state_rate=0.0), Progress())\n"
        "except Exception as error:\n"
        "    import mujoco\n"
        "    print(type(error).__name__, mujoco.GLContext.__module__)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.stdout.split() == ["ConfigError", "mujoco.egl"], run.stderr

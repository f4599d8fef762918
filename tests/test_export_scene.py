import numpy as np
import pytest

from embodied.robot_bridge.scene import load_scene
from embodied.sim.captions import NUM_STAGES, stage, wordings
from embodied.sim.export_scene import export_scene, initial_states
from embodied.sim.robosuite_lift import JOINTS, LiftEnv

mujoco = pytest.importorskip("mujoco")
pytest.importorskip("robosuite")


def test_the_robot_process_loads_the_very_same_model_and_state(tmp_path):
    scene = load_scene(export_scene(tmp_path / "scene", cameras=("wrist",), seed=3))
    model = mujoco.MjModel.from_xml_path(str(scene.xml))
    env = LiftEnv(cameras=())
    env.reset(3)
    assert tuple(scene.joints) == JOINTS
    for name, entry in scene.joints.items():
        actuator = model.actuator(entry.actuator)
        assert model.joint(int(actuator.trnid[0])).name == entry.joint, name
    np.testing.assert_allclose(scene.initial.qpos, env.data.qpos)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:], data.ctrl[:] = scene.initial.qpos, scene.initial.qvel, scene.initial.ctrl
    assert scene.gripper is not None
    for entry in scene.gripper.actuators:
        assert model.actuator(entry).id >= 7
    action = np.array([0.2, -0.3, 0.1, 0.0, 0.0, 0.3, 0.0, 1.0])
    before = env.target.copy()
    env.step(action)
    for piece in range(1, 6):
        target = before + (env.target - before) * piece / 5
        data.ctrl[:7], data.ctrl[7:9] = target[:7], [target[7] / 2, -target[7] / 2]
        mujoco.mj_step(model, data, nstep=10)
    np.testing.assert_allclose(data.qpos[env.arm_qpos], env.data.qpos[env.arm_qpos], atol=1e-6)


def test_initial_states_are_those_of_the_evaluation():
    env = LiftEnv(cameras=())
    state = initial_states([11])[0]
    env.reset(11)
    np.testing.assert_array_equal(state["qpos"], env.data.qpos)


def test_stages_are_ordered_and_worded():
    table = 0.821
    hands = [[0.3, 0, table], [0.18, 0, table], [0.12, 0, table], [0.08, 0, table], [0.05, 0, table], [0.01, 0, table]]
    cube = np.array([[0, 0, table]] * 6 + [[0, 0, table + h] for h in (0.0, 0.02, 0.06, 0.12)])
    hand = np.array(hands + cube[6:].tolist())
    held = np.array([[0]] * 6 + [[1]] * 4)
    assert stage(cube, hand, held).tolist() == list(range(NUM_STAGES))
    sentences = [s for i in range(NUM_STAGES) for s in wordings(i)]
    assert len(set(sentences)) == len(sentences) == 2 * NUM_STAGES

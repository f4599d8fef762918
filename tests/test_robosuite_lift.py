import subprocess
import sys

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.sim import robosuite_lift as lift
from embodied.sim.experts import ScriptedPolicy
from embodied.sim.render import FastRenderer
from embodied.sim.rollout import rollout

pytest.importorskip("robosuite")


@pytest.fixture(scope="module")
def env():
    environment = lift.LiftEnv(cameras=("wrist", "side"), image_size=64)
    yield environment
    environment.close()


def test_equal_seeds_give_equal_episodes(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 8))

    def play(seed):
        first, _ = env.reset(seed)
        return [first] + [env.step(action)[0] for action in actions]

    once, again, other = play(3), play(3), play(4)
    for a, b in zip(once, again, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert not np.array_equal(once[0]["cube_position"], other[0]["cube_position"])


def test_observations_match_the_spec(env):
    observation, _ = env.reset(0)
    for key, spec in env.spec.observations.items():
        assert observation[key].shape == spec.shape, key
        assert observation[key].dtype == np.float32
    for camera, spec in env.spec.images.items():
        assert observation[f"images/{camera}"].shape == spec.shape
        assert observation[f"images/{camera}"].dtype == np.uint8


def test_initial_states_stay_in_robosuites_placement_range(env):
    cubes = np.array([env.initial_state(seed)[1] for seed in range(200)])
    assert np.abs(cubes[:, :2]).max() <= 0.03
    assert np.abs(cubes[:, :2]).max() > 0.028
    assert env.scene.placement == pytest.approx(0.03)


def test_action_moves_targets_by_scale_and_the_servo_follows(env):
    env.reset(0)
    before = env.target.copy()
    action = np.zeros(8)
    action[0], action[7] = 0.5, 1.0
    for _ in range(3):
        env.step(action)
    assert env.target[0] - before[0] == pytest.approx(0.15, abs=1e-9)
    assert env.target[7] == 0.0
    for _ in range(5):
        observation, *_ = env.step(np.array([0, 0, 0, 0, 0, 0, 0, 1.0]))
    np.testing.assert_allclose(observation["joint_position"], env.target[:7], atol=2e-3)
    assert observation["gripper_position"][0] < 0.003


def test_targets_never_leave_the_joint_limits_nor_run_ahead(env):
    env.reset(0)
    for _ in range(30):
        env.step(np.ones(8))
        assert (env.target[:7] <= env.joint_range[:, 1]).all()
        assert (np.abs(env.target[:7] - env.data.qpos[env.arm_qpos]) < lift.MAX_LEAD + 0.1).all()


def test_reward_and_success_are_robosuites_own():
    import robosuite

    theirs = robosuite.make(
        "Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False,
        reward_shaping=True, seed=0,
    )  # fmt: skip
    theirs.reset()
    ours = lift.LiftEnv(cameras=())
    ours.reset(5)
    expert = ScriptedPolicy(ours, "expert")
    expert.reset(5)
    compared = succeeded = 0
    for step in rollout(ours, expert, 5):
        theirs.sim.data.qpos[:] = ours.data.qpos
        theirs.sim.forward()
        grasped = theirs._check_grasp(gripper=theirs.robots[0].gripper, object_geoms=theirs.cube)
        if bool(step.next_observation["cube_grasped"][0]) == grasped:
            # mj_step leaves body positions one 2 ms substep behind qpos; `forward` does not.
            assert step.reward == pytest.approx(theirs.reward(), abs=3e-3)
            compared += 1
        assert step.success == theirs._check_success()
        succeeded += step.success
    theirs.close()
    assert compared >= 45  # the contact solver may differ for a step around the first touch
    assert succeeded >= 10


def test_culling_changes_no_pixel(env, monkeypatch):
    env.reset(1)
    expert = ScriptedPolicy(env, "expert")
    expert.reset(1)
    renderer = FastRenderer(env.model, 64, 64)
    for count, _ in enumerate(rollout(env, expert, 1)):
        if count % 10:
            continue
        for camera in lift.CAMERAS.values():
            culled = renderer.render(env.data, camera)
            assert renderer._outside(env.data, env.model.camera(camera).id).sum() > 5
            with monkeypatch.context() as patch:
                patch.setattr(renderer, "_outside", lambda data, camera_id: np.zeros(env.model.ngeom, bool))
                whole = renderer.render(env.data, camera)
            np.testing.assert_array_equal(culled, whole)
    renderer.close()


LEFT_OPEN = """
import weakref
class Anything: pass
kept = Anything()
weakref.finalize(kept, print, "")  # finalizers have a hook at exit from now on, older than MuJoCo's
from embodied.sim.render import FastRenderer, load_mujoco
model = load_mujoco().MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
renderer = FastRenderer(model, 16, 16)
"""


def test_a_renderer_left_open_at_exit_is_closed_before_its_display():
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_unknown_camera_is_named_with_the_list():
    with pytest.raises(InputError, match=r"no camera 'wrst'.*Did you mean 'wrist'"):
        lift.LiftEnv(cameras=("wrst",))


def test_progress_rises_from_reach_to_lift():
    table = lift.TABLE_HEIGHT + 0.021
    cube = np.array([[0, 0, table], [0, 0, table], [0, 0, table], [0, 0, table + 0.05], [0, 0, table + 0.15]])
    hand = np.array([[0.2, 0, 1.0], [0.05, 0, table], [0, 0, table], [0, 0, table + 0.05], [0, 0, table + 0.15]])
    grasped = np.array([[0], [0], [1], [1], [1]], np.float32)
    progress = lift.true_progress(cube, hand, grasped)
    assert (np.diff(progress) > 0.05).all()
    assert progress[-1] == pytest.approx(1.0)
    assert lift.is_success(cube).tolist() == [False, False, False, True, True]
    assert lift.shaped_reward(cube, hand, grasped)[2] == pytest.approx((1 + 0.25) / 2.25)


def test_play_touches_the_cube_and_lifts_it_only_by_accident(env):
    play = ScriptedPolicy(env, "play")
    grasped, lifted = 0, 0
    for seed in range(24):
        env.reset(seed)
        assert play.reset(seed) == "play"
        held, done, info = False, False, {}
        while not done:
            _, _, _, done, info = env.step(play.act({}))
            held |= env.grasped()
        grasped, lifted = grasped + held, lifted + info["success"]
    assert 6 <= grasped <= 18
    assert lifted <= 4

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import read_robomimic, read_robosuite, replay_robosuite
from embodied.datasets.importer import import_dataset, recognise

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "hdf5-robosuite-raw-demos"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")
has_robosuite = importlib.util.find_spec("robosuite") is not None
needs_robosuite = pytest.mark.skipif(not has_robosuite, reason="robosuite is not installed")

# A hinge about z carries a hand 0.5 m out, turned by 90 degrees about x; a slide closes the gripper; a free cube.
MODEL = """
<mujoco model="base">
  <compiler angle="radian"/>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="agentview" pos="0 -2 1" xyaxes="1 0 0 0 0.3 1"/>
    <geom name="floor" type="plane" size="3 3 .1" rgba=".2 .5 .2 1" group="1"/>
    <body name="robot0_base" pos="0 0 1">
      <body name="robot0_link1">
        <joint name="robot0_joint1" type="hinge" axis="0 0 1"/>
        <geom type="box" size=".1 .1 .1" group="1"/>
        <body name="robot0_right_hand" pos="0.5 0 0" quat="0.707106781 0.707106781 0 0">
          <geom type="box" size=".1 .1 .1" rgba="1 0 0 1" group="1"/>
          <site name="gripper0_grip_site" pos="0 0 0.1"/>
          <site name="marker" pos="[0, 0, 0]"/>
          <body name="gripper0_finger">
            <joint name="gripper0_finger_joint1" type="slide" axis="0 1 0"/>
            <geom type="box" size=".01 .01 .01" group="1"/>
          </body>
        </body>
      </body>
    </body>
    <body name="cube_main"><freejoint name="cube_joint0"/><geom type="box" size=".1 .1 .1" group="1"/></body>
  </worldbody>
  <actuator><motor joint="robot0_joint1"/></actuator>
</mujoco>
"""
ANGLES = np.linspace(0, 1, 6)


def make_states(rows: int = 6) -> np.ndarray:
    """time; hinge, finger, cube position and quaternion; velocities (2 + 6)."""
    states = np.zeros((rows, 1 + 9 + 8))
    states[:, 0] = 3 + 0.05 * np.arange(rows)
    states[:, 1] = ANGLES[:rows]
    states[:, 2] = 0.01
    states[:, 3:6] = [0.2, 0.3, 0.4]
    states[:, 6] = 1
    states[:, 10] = 0.7
    return states


def make_file(path: Path, model: str = MODEL, demos: int = 2) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"env": "Lift", "env_info": json.dumps({"env_name": "Lift"}), "repository_version": "1.4.0"})
        for number in range(1, demos + 1):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["model_file"] = model
            demo["states"] = make_states()
            demo["actions"] = np.full((6, 2), 0.5 * number)
    return path


def edit(path: Path, name: str, value: Any) -> Path:
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value
    return path


def test_observations_are_recovered_from_states(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    assert recognise(path) == "robosuite"
    store = import_dataset(path, tmp_path / "s")
    assert store.source_ids == ["d.hdf5/demo_1", "d.hdf5/demo_2"]
    assert store.episode_length.tolist() == [6, 6]
    assert store.success.tolist() == [-1, -1]
    assert store.spec.control_dt == 0.05
    assert store.spec.environment == "Lift"
    assert not store.spec.has_reward
    episode = store.episode(0)
    seen = episode.observations
    np.testing.assert_allclose(seen["robot0_joint_pos"][:, 0], ANGLES, atol=1e-6)
    np.testing.assert_allclose(seen["robot0_joint_vel"][:, 0], 0.7, atol=1e-6)
    np.testing.assert_allclose(seen["robot0_gripper_qpos"], 0.01, atol=1e-6)
    # The hand's z axis is the world's -y at angle 0: the site lies 0.1 m along it.
    hand = np.stack(
        [0.5 * np.cos(ANGLES) + 0.1 * np.sin(ANGLES), 0.5 * np.sin(ANGLES) - 0.1 * np.cos(ANGLES), 1 + 0 * ANGLES], 1
    )
    np.testing.assert_allclose(seen["robot0_eef_pos"], hand, atol=1e-6)
    half = np.sqrt(0.5)
    turned = np.stack([half * f(ANGLES / 2) for f in (np.cos, np.sin, np.sin, np.cos)], 1)  # x y z w
    np.testing.assert_allclose(seen["robot0_eef_quat"], turned, atol=1e-6)
    np.testing.assert_allclose(seen["cube_main_pos"], np.tile([0.2, 0.3, 0.4], (6, 1)), atol=1e-6)
    np.testing.assert_allclose(seen["cube_main_quat"], np.tile([0, 0, 0, 1], (6, 1)), atol=1e-6)
    np.testing.assert_allclose(seen["state"], make_states().astype(np.float32))
    np.testing.assert_allclose(episode.timestamp, 0.05 * np.arange(6), atol=1e-9)
    assert episode.truncated.tolist() == [False] * 5 + [True]
    assert episode.step_valid.tolist() == [True] * 5 + [False]
    specs = store.spec.observations
    assert {key for key, spec in specs.items() if spec.privileged} == {"state", "cube_main_pos", "cube_main_quat"}
    assert specs["robot0_joint_pos"].names == ("robot0_joint1",)
    assert (specs["robot0_joint_vel"].unit, specs["robot0_gripper_qvel"].unit) == ("rad/s", "m/s")


def test_cameras_are_rendered_when_asked_for(tmp_path):
    store = import_dataset(
        make_file(tmp_path / "d.hdf5"), tmp_path / "s", options={"cameras": "agentview", "size": "32x48"}
    )
    pictures = np.asarray(store.episode(0).images["agentview"])
    assert pictures.shape == (6, 32, 48, 3)
    red = (pictures[..., 0].astype(int) - pictures[..., 1] > 60).sum((1, 2))
    assert (red > 3).all(), "the red hand is seen"
    assert (pictures[0] != pictures[-1]).any(), "and it moves"
    with pytest.raises(ConfigError, match=r"no 'agent'\. Did you mean 'agentview'"):
        read_robosuite.read(tmp_path / "d.hdf5", {"cameras": "agent"})
    with pytest.raises(ConfigError, match="size is HEIGHTxWIDTH"):
        read_robosuite.read(tmp_path / "d.hdf5", {"size": "84x100000"})
    with pytest.raises(ConfigError, match="no option 'camera'"):
        read_robosuite.read(tmp_path / "d.hdf5", {"camera": "agentview"})


def test_a_demo_that_disagrees_is_left_out(tmp_path):
    path = make_file(tmp_path / "d.hdf5", demos=6)
    edit(path, "data/demo_2/actions", np.ones((4, 2)))
    edit(path, "data/demo_3/actions", None)
    edit(path, "data/demo_4/states", np.full((6, 18), np.nan))
    with h5py.File(path, "r+") as file:
        file["data/demo_5"].attrs["model_file"] = MODEL.replace("cube_main", "can_main")
    store = import_dataset(path, tmp_path / "s")
    assert store.source_ids == ["d.hdf5/demo_1", "d.hdf5/demo_6"]
    left_out = [finding.message for finding in store.findings]
    for message, text in zip(
        left_out, ("states 6, actions 4", "'actions' is absent", "NaN or infinity", "other joints"), strict=True
    ):
        assert text in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda xml: "no xml", "'no xml' is not in the folder"),
        (lambda xml: "../../etc/passwd.xml", "is not in the folder 'models'"),
        (lambda xml: "<mujoco><worldbody>", "is no XML"),
        (lambda xml: '<!DOCTYPE m [<!ENTITY a "b">]>' + xml, "declares XML entities"),
        (
            lambda xml: xml.replace('<body name="cube', '<replicate count="9"/><body name="cube'),
            "<replicate> in a body",
        ),
        (lambda xml: xml.replace("cube_joint0", "robot0_joint1"), "MuJoCo refuses its model: .*repeated name"),
        (lambda xml: xml.replace("<freejoint", "<joint type='ball'").replace('"cube_joint0"/', '"c"/'), "18 numbers"),
    ],
)
def test_without_a_model_states_and_actions_are_imported(tmp_path, change, reason):
    store = import_dataset(make_file(tmp_path / "d.hdf5", change(MODEL)), tmp_path / "s", format="robosuite")
    assert list(store.spec.observations) == ["state"]
    np.testing.assert_allclose(store.read("action")[[0, 6], 0], [0.5, 1])
    (finding,) = store.findings
    assert finding.check == "not-replayed"
    assert re.search(reason, finding.message), finding.message
    with pytest.raises(InputError, match="no camera can be rendered"):
        read_robosuite.read(tmp_path / "d.hdf5", {"cameras": "agentview"})


ASSETS = "/home/x/robosuite/models/assets/"


@needs_robosuite
@pytest.mark.parametrize(
    ("asset", "reason"),
    [
        ("/etc/passwd", "outside robosuite's assets"),
        (ASSETS + "../../../../etc/passwd", "outside robosuite's assets"),
        (ASSETS + "robots/../../x.png", "outside robosuite's assets"),
        (ASSETS + "robots/panda/robot.xml", "no mesh or picture"),
        (ASSETS + "textures/absent.png", "lacks"),
        ("C:\\x\\robosuite\\models\\assets\\..\\..\\y.png", "outside"),
    ],
)
def test_files_outside_the_assets_are_refused(asset, reason):
    xml = f'<mujoco><asset><texture name="t" file="{asset}"/></asset></mujoco>'
    with pytest.raises(InputError, match=reason):
        replay_robosuite.drawable(xml)
    xml = xml.replace("texture", "hfield")
    with pytest.raises(InputError, match="element <hfield>"):
        replay_robosuite.drawable(xml)


@needs_robosuite
def test_assets_are_found_where_they_are_now():
    assert replay_robosuite.asset(ASSETS + "arenas/../textures/ceramic.png").is_file()
    old = "/Users/x/robosuite/models/assets/mounts/meshes/rethink_mount/pedestal.stl"
    assert replay_robosuite.asset(old).parts[-4] == "bases"


def test_the_replaying_process_starts_again_after_a_crash():
    replay = replay_robosuite.replayer()
    bare = replay_robosuite.skeleton(MODEL)
    before = replay.poses(bare, make_states())
    assert replay._child is not None
    replay._child.kill()
    replay._child.wait()
    after = replay.poses(bare, make_states())
    np.testing.assert_array_equal(before["site_pos"], after["site_pos"])
    deep = "<mujoco><worldbody>" + "<body>" * 3000 + "</body>" * 3000 + "</worldbody></mujoco>"
    with pytest.raises(InputError, match=r"MuJoCo|nested"):
        replay.model(replay_robosuite.skeleton(deep))
    assert replay.model(bare)["nq"] == 9


@needs_robosuite
def test_equals_what_robosuite_observes(tmp_path):
    import robosuite

    env = robosuite.make(
        "Lift",
        robots="Panda",
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        seed=0,
    )
    observed, states, rng = [env.reset()], [env.sim.get_state().flatten()], np.random.default_rng(0)
    for _ in range(12):
        observed.append(env.step(rng.uniform(-1, 1, env.action_dim))[0])
        states.append(env.sim.get_state().flatten())
    path = make_file(tmp_path / "d.hdf5", env.sim.model.get_xml(), demos=1)
    edit(path, "data/demo_1/states", np.array(states))
    edit(path, "data/demo_1/actions", np.ones((13, env.action_dim)))
    source = read_robosuite.read(path, {"cameras": "agentview", "size": "32x32"})
    episode = source.load(0)
    episode.check(source.spec)
    same = {
        **{f"robot0_{key}": f"robot0_{key}" for key in ("joint_pos", "joint_vel", "gripper_qpos", "gripper_qvel")},
        "robot0_eef_pos": "robot0_eef_pos",
        "robot0_eef_quat": "robot0_eef_quat",
        "cube_main_pos": "cube_pos",
        "cube_main_quat": "cube_quat",
    }
    for ours, theirs in same.items():
        # robosuite's poses are those before the last of 25 substeps; after `forward` they are those of the state.
        expected = np.array([observation[theirs] for observation in observed])
        np.testing.assert_allclose(episode.observations[ours], expected, atol=5e-3, err_msg=ours)
    env.sim.forward()
    last = env._get_observations(force_update=True)
    for ours, theirs in same.items():
        np.testing.assert_allclose(episode.observations[ours][-1], last[theirs], atol=2e-6, err_msg=ours)
    assert len(np.unique(np.asarray(episode.images["agentview"]).reshape(-1, 3), axis=0)) > 50


@needs_data
def test_real_lift_demos_agree_with_independent_facts(tmp_path):
    expected = json.loads((DATA / "facts.json").read_text())["v1.4/lift/demo.hdf5"]
    store = import_dataset(DATA / "v1.4" / "lift" / "demo.hdf5", tmp_path / "s")
    assert store.episode_length.tolist() == [demo["T"] for demo in expected["demos"].values()] == [482, 510, 392]
    assert store.spec.observations["state"].shape == (expected["state_dim"],) == (32,)
    assert not store.findings
    for index, demo in enumerate(expected["demos"].values()):
        episode = store.episode(index)
        assert episode.action is not None
        assert episode.action.sum(dtype=np.float64) == pytest.approx(demo["action_sum"], abs=1e-3)
        height = episode.observations["cube_main_pos"][:, 2]
        assert height[0] == pytest.approx(0.831, abs=1e-3)
        assert 0.85 < height[-1] < 0.88
        hand = np.linalg.norm(episode.observations["robot0_eef_pos"] - episode.observations["cube_main_pos"], axis=1)
        assert hand[0] > 0.15
        assert hand[-1] < 0.03, "at the end the hand holds the cube"


@needs_data
@pytest.mark.parametrize("name", ["door", "lift", "nut-assembly", "pick-place", "stack", "wipe"])
def test_real_demos_of_robosuite_1_0_replay_without_their_meshes(name):
    expected = json.loads((DATA / "facts.json").read_text())[f"v1.0/{name}/demo.hdf5"]
    path = DATA / "v1.0" / name / "demo.hdf5"
    source = read_robosuite.read(path, {})
    assert not source.findings
    episode = source.load(0)
    episode.check(source.spec)
    assert len(episode) == expected["sum_T"]
    assert episode.action is not None
    assert episode.action.sum(dtype=np.float64) == pytest.approx(expected["demos"]["demo_1"]["action_sum"], abs=1e-3)
    assert episode.observations["state"].shape[1] == expected["state_dim"]
    if name == "lift":
        height = episode.observations["cube_pos"][:, 2]
        assert height[-1] - height[0] > 0.035
        assert np.linalg.norm(episode.observations["robot0_eef_pos"][-1] - episode.observations["cube_pos"][-1]) < 0.03
    if has_robosuite and name in ("lift", "stack"):
        with pytest.raises(InputError, match=r"link0_vis\.stl', which the installed version lacks"):
            read_robosuite.read(path, {"cameras": "agentview"}).load(0)


def test_robomimic_names_the_way_to_replay(tmp_path):
    path = make_file(tmp_path / "d.hdf5")
    with pytest.raises(InputError, match="--format robosuite"):
        read_robomimic.read(path, {})

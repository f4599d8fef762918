"""A ball in a small maze whose short way nobody showed: the point maze of MBRCSL (Zhou et al. 2023), in MuJoCo.

Gymnasium-Robotics' `PointMaze_UMazeDense-v3` on the paper's map: a ball of 4.2 kg pushed by two motors of 100 N, steps
of 0.01 s, speeds clipped to 5 m/s, start and goal 0.25 m around their cells' centres at most, reward exp(-distance to
the goal). The policy does not see where in its cell the goal lies, as in the paper. Episodes have HORIZON steps and
never terminate; success, within 0.45 m of the goal, is reported in `info`. Recorded behaviours go down from the start
and stay, or by the left to the goal; the short way, down and then right, is made of halves of both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.sim.render import Pictured, check_views, load_mujoco

NAME = "pointmaze/stitch"
MAP = ("######", "#..###", "#....#", "######")
START, JUNCTION, GOAL = (1, 2), (2, 2), (2, 4)  # row, column
DETOUR, SHORT = ((1, 1), (2, 1), GOAL), (JUNCTION, GOAL)
CONTROL_DT, HORIZON = 0.01, 200  # [s], steps of an episode
PLACE_NOISE = 0.25  # of start, goal and a behaviour's targets around the centre of their cell [m]
REACHED = 0.45  # [m]
MAX_SPEED = 5.0  # [m/s]
GAINS = (10.0, -1.0)  # of the behaviours' controller, on position [1/m] and velocity [s/m]
CAMERAS = {"top": "top"}
REWARD_KEYS = ("task_reward",)
_SCENE = """<mujoco model="point maze">
  <compiler inertiafromgeom="true" angle="radian"/>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <joint damping="1" limited="false"/>
    <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1"/>
  </default>
  <worldbody>
    <light pos="0 0 8" dir="0 0 -1" directional="true"/>
    <camera name="top" pos="0 0 7" fovy="50"/>
    <geom name="ground" size="40 40 0.25" pos="0 0 -0.1" type="plane" contype="1" conaffinity="0" rgba=".3 .4 .5 1"/>
    <body name="ball">
      <geom name="ball" type="sphere" size="0.1" contype="1" conaffinity="1" rgba=".2 .3 .9 1"/>
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
    </body>
    <site name="goal" size="0.15" rgba=".9 .2 .2 .7"/>
{walls}
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
    <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </actuator>
</mujoco>"""
_WALL = '<geom type="box" pos="{:g} {:g} 0.2" size="0.5 0.5 0.2" contype="1" conaffinity="1" rgba=".7 .5 .3 1"/>'


def centre(cell: tuple[int, int]) -> np.ndarray:
    """(2,) x and y of a cell's centre [m]; the maze is centred, rows go down."""
    return np.array([cell[1] + 0.5 - len(MAP[0]) / 2, len(MAP) / 2 - cell[0] - 0.5])


def dataset_spec(cameras: Sequence[str], image_size: int) -> DatasetSpec:
    """The arrays this environment gives per frame."""
    observations = {
        "state": ArraySpec((4,), unit="m, m/s", names=("x", "y", "velocity_x", "velocity_y")),
        "goal": ArraySpec((2,), unit="m", names=("x", "y"), privileged=True),
        "task_reward": ArraySpec((1,), low=(0.0,), high=(1.0,), privileged=True),
    }
    action = ActionSpec((2,), names=("x", "y"), low=(-1.0,) * 2, high=(1.0,) * 2, unit="N", scale=(100.0,) * 2)
    images = {camera: ArraySpec((image_size, image_size, 3), dtype="uint8") for camera in cameras}
    return DatasetSpec(observations, images, action, CONTROL_DT, NAME)


class PointMazeEnv(Pictured):
    """Gymnasium's reset and step.

    Args:
        cameras: which of CAMERAS to render at every step; none is fastest.
        image_size: height and width [px].
    """

    horizon = HORIZON
    camera_names = CAMERAS

    def __init__(self, cameras: Sequence[str] = (), image_size: int = 64) -> None:
        check_views(NAME, CAMERAS, cameras, image_size)
        self._mujoco = load_mujoco()
        blocks = [centre((r, c)) for r, row in enumerate(MAP) for c, mark in enumerate(row) if mark == "#"]
        walls = "\n".join("    " + _WALL.format(*block) for block in blocks)
        self.model = self._mujoco.MjModel.from_xml_string(_SCENE.format(walls=walls))
        self.data = self._mujoco.MjData(self.model)
        self.spec = dataset_spec(cameras, image_size)
        self.cameras, self._size = tuple(cameras), image_size
        self.goal = centre(GOAL)

    def reset(self, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; equal seeds give equal episodes."""
        rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
        start, self.goal = (centre(cell) + rng.uniform(-PLACE_NOISE, PLACE_NOISE, 2) for cell in (START, GOAL))
        self._mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = start
        self.model.site("goal").pos[:2] = self.goal
        self._mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self._observe(), {"success": self.distance() <= REACHED}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Push the ball by one action, (2,) in [-1, 1], for one step."""
        self.data.qvel[:] = np.clip(self.data.qvel, -MAX_SPEED, MAX_SPEED)
        self.data.ctrl[:] = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self._mujoco.mj_step(self.model, self.data)
        self.steps += 1
        distance = self.distance()
        success = bool(distance <= REACHED)
        return self._observe(), float(np.exp(-distance)), False, self.steps >= HORIZON, {"success": success}

    def distance(self) -> float:
        """From the goal [m]."""
        return float(np.linalg.norm(self.data.qpos - self.goal))

    def _observe(self) -> dict[str, np.ndarray]:
        observation = {
            "state": np.concatenate([self.data.qpos, self.data.qvel]).astype(np.float32),
            "goal": self.goal.astype(np.float32),
            "task_reward": np.array([np.exp(-self.distance())], np.float32),
        }
        for camera in self.cameras:
            observation[f"images/{camera}"] = self.render(camera)
        return observation


def shaped_reward(task_reward: np.ndarray) -> np.ndarray:
    """(F, 1) -> (F,): exp(-distance to the goal), also the progress in [0, 1]."""
    return task_reward[..., 0]


def no_robot(*_: Any, **__: Any) -> Any:
    """InputError: this task is no scene for the robot on the ROS 2 graph."""
    raise InputError(f"{NAME} has no robot on the ROS 2 graph: it is a ball.\nTry 'embodied eval BUNDLE --env {NAME}'.")


# name -> cells visited in order, does it move at random once there
BEHAVIOURS: dict[str, tuple[tuple[tuple[int, int], ...], bool]] = {
    "stay": ((JUNCTION,), False),
    "detour": (DETOUR, False),
    "wander": (DETOUR, True),
    "expert": (SHORT, False),
}
MIXTURE: dict[str, float] = {"stay": 0.5, "detour": 0.25, "wander": 0.25}


class Waypoints:
    """The paper's behaviour: a PD controller through cells, to a point in each near its centre, in order.

    A cell counts as visited within 0.5 m of that point at up to 0.5 m/s; the last, for who then wanders, at any speed.
    On the way, cells between are passed within 0.1 m of their centre.

    Args:
        env: read for the simulator's state.
        behaviour: a key of BEHAVIOURS, or `mixed`: one is drawn per episode from MIXTURE.
    """

    def __init__(self, env: PointMazeEnv, behaviour: str = "mixed") -> None:
        self._env, self._wanted = env, behaviour

    def reset(self, seed: int) -> str:
        """Draw this episode's behaviour and targets; returns the behaviour's name."""
        self._rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        name = self._wanted
        if name == "mixed":
            name = str(self._rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
        cells, self._wanders = BEHAVIOURS[name]
        self._points = [centre(cell) + self._rng.uniform(-PLACE_NOISE, PLACE_NOISE, 2) for cell in cells]
        self._passing: list[np.ndarray] | None = None  # centres of the cells before the next point
        self._arrived = False
        return name

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """(2,) action in [-1, 1] for the environment's present state."""
        del observation
        place, speed = self._env.data.qpos, self._env.data.qvel
        point, last = self._points[0], len(self._points) == 1
        near = bool(np.linalg.norm(place - point) <= 0.5)
        slow = bool(np.abs(speed).max() <= 0.5)
        if near and (slow or (last and self._wanders)):
            if last:
                self._arrived = True
            else:
                self._points.pop(0)
                point, self._passing = self._points[0], None
        if self._arrived and self._wanders:
            return self._rng.uniform(-1.0, 1.0, 2).astype(np.float32)
        if self._passing is None:
            self._passing = self._between(place, point)
        if self._passing and np.linalg.norm(place - self._passing[0]) <= 0.1:
            self._passing.pop(0)
        target = self._passing[0] if self._passing else point
        return np.clip(GAINS[0] * (target - place) + GAINS[1] * speed, -1.0, 1.0).astype(np.float32)

    def _between(self, place: np.ndarray, point: np.ndarray) -> list[np.ndarray]:
        """Centres of the cells of a straight corridor between where the ball is and a point, drawn a little aside."""
        half = np.array([len(MAP[0]), len(MAP)]) / 2.0
        here, there = (np.floor(x + half) + 0.5 - half for x in (place, point))
        axis = int(np.abs(there - here).argmax())
        cells = []
        for number in range(1, int(np.abs(there - here)[axis])):
            cell = here.copy()
            cell[axis] += number * np.sign(there - here)[axis]
            cells.append(cell - (self._rng.uniform(0.0, 0.2, 2) if number > 1 else 0.0))
        return cells

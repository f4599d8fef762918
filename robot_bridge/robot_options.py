"""How the simulated robot runs, and the topics that only it has."""

import dataclasses
from pathlib import Path

RESET_TOPIC, FAULT_TOPIC, STATUS_TOPIC, POSE_PREFIX = "/sim/reset", "/sim/fault", "/sim/status", "/sim/pose/"


@dataclasses.dataclass(frozen=True)
class StateStyle:
    """How a robot fills its joint states; every choice is legal in ROS 2 and in use.

    Attributes:
        separate_gripper: the gripper comes in a message of its own from another publisher, as Franka's does.
        nan_effort: efforts are there and NaN, as for an interface that a joint lacks.
        no_velocity: velocities are empty.
        shuffled: joints come in an order of their own.
    """

    separate_gripper: bool = False
    nan_effort: bool = False
    no_velocity: bool = False
    shuffled: bool = False


@dataclasses.dataclass(frozen=True)
class RobotOptions:
    """How the simulated robot runs.

    Attributes:
        use_sim_time: stamps are physics time, published on /clock; else the system's clock.
        real_time_factor: seconds of physics per second of wall clock.
        state_rate, camera_rate: of joint states and pictures [Hz]; None: the profile's `simulation`.
        seed: of what faults and shuffled joints draw.
        style: how joint states are filled.
        interpolate_from_desired_state: the trajectory controller's parameter of that name.
        camera_thread: draw pictures beside the physics; without, a picture delays it.
        log: file that gets every control step; None: none.
    """

    use_sim_time: bool = False
    real_time_factor: float = 1.0
    state_rate: float | None = None
    camera_rate: float | None = None
    seed: int = 0
    style: StateStyle = StateStyle()
    interpolate_from_desired_state: bool = True
    camera_thread: bool = False
    log: Path | None = None

"""The simulated MoveIt Servo: stale after 0.1 s by the stamp, halts smoothly, refuses what it does not know."""

import numpy as np
import pytest

from embodied.robot_bridge.command_messages import Jog, Twist, joint_jog, twist_stamped
from embodied.robot_bridge.controller import Moment
from embodied.robot_bridge.profile import Servo
from embodied.robot_bridge.servo_controller import ServoController

NAMES = ("a", "b", "c")
LIMITS = (np.full(3, -2.0), np.full(3, 2.0), np.array([1.0, 2.0, 2.0]))
TURNED = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # a quarter turn about z


def jacobian(position: np.ndarray) -> np.ndarray:
    """Three prismatic joints along x, y, z; the third loses its effect towards 1.0."""
    return np.vstack([np.diag([1.0, 1.0, max(1.0 - position[2], 1e-3)]), np.zeros((3, 3))])


class Rig:
    def __init__(self, kind: str, settings: Servo | None = None) -> None:
        rotations = {"base": lambda q: np.eye(3), "tool": lambda q: TURNED}
        self.controller = ServoController(NAMES, np.zeros(3), kind, settings or Servo(), LIMITS, jacobian, rotations)
        self.k, self.positions, self.speeds = 0, [np.zeros(3)], [np.zeros(3)]

    @property
    def moment(self) -> Moment:
        now = self.k * 0.002
        return Moment(now, 10**12 + round(now * 1e9), 0.002, self.positions[-1], np.zeros(3))

    def send(self, values, names=NAMES, frame="base", age: float = 0.0, kind: str = "jog") -> str:
        stamp, values = self.moment.stamp_ns - round(age * 1e9), np.array(values, float)
        if kind == "jog":
            return self.controller.receive(joint_jog(Jog(stamp, frame, names, values)), self.moment)
        return self.controller.receive(twist_stamped(Twist(stamp, frame, values[:3], values[3:])), self.moment)

    def run(self, seconds: float) -> np.ndarray:
        for _ in range(round(seconds / 0.002)):
            reference = self.controller.update(self.moment)
            self.k += 1
            self.positions.append(reference.position)
            self.speeds.append(reference.velocity)
        return self.positions[-1]


def test_a_jog_moves_the_named_joints_and_ends_by_itself_a_tenth_of_a_second_after_its_stamp() -> None:
    rig = Rig("jog")
    assert rig.send([0.5], names=("b",)) == ""
    rig.run(0.09)
    np.testing.assert_allclose(rig.speeds[-1], [0, 0.5, 0], atol=0.02)
    end = rig.run(1.0)
    assert rig.controller.status == "stale"
    np.testing.assert_array_equal(rig.speeds[-1], 0.0)
    assert 0.045 < end[1] < 0.06  # 0.1 s at 0.5 rad/s, give or take a period
    steps = np.abs(np.diff(np.array(rig.speeds), axis=0)).max()
    assert steps < 0.1 * 0.5 + 1e-9  # it halts smoothly: a tenth of the speed per 2 ms at most


def test_the_stamp_counts_not_the_arrival() -> None:
    rig = Rig("jog")
    assert "stale" in rig.send([0.5, 0, 0], age=0.1)
    np.testing.assert_array_equal(rig.run(0.2), 0.0)
    stamp_zero = joint_jog(Jog(0, "base", NAMES, np.full(3, 0.5)))
    assert "stale" in rig.controller.receive(stamp_zero, rig.moment)
    np.testing.assert_array_equal(rig.run(0.2), 0.0)
    assert rig.send([0.5, 0, 0], age=0.06) == ""
    assert 0.01 < rig.run(0.5)[0] < 0.03  # 0.04 s are left
    rig = Rig("jog")
    assert rig.send([0.5, 0, 0], age=-0.2) == ""  # of the future: it lasts longer
    assert rig.run(1.0)[0] > 0.13


def test_renewed_jogs_keep_the_speed() -> None:
    rig = Rig("jog")
    for _ in range(25):
        rig.send([0.4, 0, 0])
        rig.run(0.04)
    np.testing.assert_allclose(rig.speeds[-1], [0.4, 0, 0], atol=1e-6)
    np.testing.assert_allclose(rig.positions[-1][0], 0.4, atol=0.02)


@pytest.mark.parametrize(
    ("values", "names", "reason"),
    [([np.nan, 0, 0], NAMES, "not finite"), ([0.5], ("elsewhere",), "'elsewhere'")],
)
def test_an_invalid_jog_moves_nothing(values, names, reason: str) -> None:
    rig = Rig("jog")
    assert reason in rig.send(values, names)
    np.testing.assert_array_equal(rig.run(0.3), 0.0)


def test_speeds_are_scaled_down_together() -> None:
    rig = Rig("jog")
    rig.send([2.0, 1.0, 0.0])  # joint a may do 1.0
    rig.run(0.09)
    np.testing.assert_allclose(rig.speeds[-1], [1.0, 0.5, 0.0], atol=0.02)


def test_near_the_end_of_a_joint_all_joints_halt() -> None:
    rig = Rig("jog")
    rig.controller.hold(np.array([1.8, 0.0, 0.0]))
    for _ in range(30):
        rig.send([0.5, 0.5, 0.0])
        rig.run(0.04)
    assert rig.controller.status == "joint bound"
    assert 1.88 < rig.positions[-1][0] < 1.92
    np.testing.assert_array_equal(rig.speeds[-1], 0.0)
    for _ in range(5):
        rig.send([-0.5, 0.0, 0.0])  # away from the end is allowed
        rig.run(0.04)
    assert rig.positions[-1][0] < 1.86


def test_unitless_values_are_scaled_by_servos_own_parameters() -> None:
    rig = Rig("jog", Servo(unitless=True, joint_scale=0.2))
    rig.send([1.0, 0, 0])
    rig.run(0.09)
    np.testing.assert_allclose(rig.speeds[-1][0], 0.2, atol=0.01)
    rig = Rig("twist", Servo(unitless=True, linear_scale=0.3))
    rig.send([0, 0.5, 0, 0, 0, 0], kind="twist")
    rig.run(0.09)
    np.testing.assert_allclose(rig.speeds[-1][1], 0.15, atol=0.01)


def test_a_twist_moves_the_tool_in_its_frame() -> None:
    rig = Rig("twist")
    assert rig.send([0.1, 0, 0, 0, 0, 0], kind="twist") == ""
    rig.run(0.09)
    np.testing.assert_allclose(rig.speeds[-1], [0.1, 0, 0], atol=0.005)
    rig = Rig("twist")
    rig.send([0.1, 0, 0, 0, 0, 0], frame="tool", kind="twist")
    rig.run(0.09)
    np.testing.assert_allclose(rig.speeds[-1], [0, 0.1, 0], atol=0.005)
    rig = Rig("twist")
    assert "'camera' is none of base, tool" in rig.send([0.1, 0, 0, 0, 0, 0], frame="camera", kind="twist")
    np.testing.assert_array_equal(rig.run(0.3), 0.0)


def test_near_a_singularity_a_twist_slows_and_stops_but_may_lead_away() -> None:
    def speed(start: float, up: float) -> float:
        rig = Rig("twist")
        rig.controller.hold(np.array([0.0, 0.0, start]))
        rig.send([0, 0, up, 0, 0, 0], kind="twist")
        rig.run(0.08)
        return float(rig.speeds[-1][2])

    # condition number 1 / (1 - z): 10 at 0.9, 20 at 0.95, over 30 at 0.97
    assert speed(0.9, 0.001) == pytest.approx(0.01, rel=0.1)
    assert speed(0.95, 0.001) == pytest.approx(0.02 * (1 - 3 / 13), rel=0.1)
    assert speed(0.97, 0.001) == 0.0
    assert speed(0.97, -0.001) == pytest.approx(-0.001 / 0.03, rel=0.1)

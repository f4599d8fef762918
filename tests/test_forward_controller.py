"""The simulated forward_command_controller: no timeout, finite and full vectors only, silent before the first."""

import numpy as np
import pytest

from embodied.robot_bridge.command_messages import float_array
from embodied.robot_bridge.controller import Moment
from embodied.robot_bridge.forward_controller import MAX_LEAD, ForwardController

NAMES = ("a", "b")
START = np.array([0.1, 0.2])


def run(controller: ForwardController, seconds: float, stuck: bool = False) -> np.ndarray:
    position = START.copy()
    for k in range(round(seconds / 0.004)):
        target = controller.update(Moment(k * 0.004, 0, 0.004, position, np.zeros(2))).position
        position = position if stuck else target
    return target


def send(controller: ForwardController, *values: float) -> str:
    return controller.receive(float_array(np.array(values)), Moment(0.0, 0, 0.004, START, np.zeros(2)))


@pytest.mark.parametrize("interface", ["position", "velocity"])
def test_before_the_first_message_nothing_moves(interface: str) -> None:
    np.testing.assert_array_equal(run(ForwardController(NAMES, START, interface), 1.0), START)


def test_the_last_position_is_applied_for_ever() -> None:
    controller = ForwardController(NAMES, START, "position")
    assert send(controller, 1.0, -1.0) == ""
    np.testing.assert_array_equal(run(controller, 60.0), [1.0, -1.0])


def test_the_last_velocity_moves_the_arm_for_ever() -> None:
    controller = ForwardController(NAMES, START, "velocity")
    assert send(controller, 0.5, -0.25) == ""
    np.testing.assert_allclose(run(controller, 10.0), START + np.array([5.0, -2.5]))
    np.testing.assert_array_equal(controller.update(Moment(0, 0, 0.004, START, START)).velocity, [0.5, -0.25])
    assert send(controller, 0.0, 0.0) == ""
    controller.hold(START)
    np.testing.assert_array_equal(run(controller, 1.0), START)


def test_a_blocked_arm_does_not_wind_up() -> None:
    controller = ForwardController(NAMES, START, "velocity")
    send(controller, 1.0, -1.0)
    np.testing.assert_allclose(run(controller, 5.0, stuck=True), START + np.array([MAX_LEAD, -MAX_LEAD]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("interface", ["position", "velocity"])
def test_a_value_that_is_not_finite_drops_the_message_and_the_next_one_counts(interface: str, bad: float) -> None:
    controller = ForwardController(NAMES, START, interface)
    assert "not finite" in send(controller, 0.5, bad)
    np.testing.assert_array_equal(run(controller, 0.1), START)
    assert send(controller, 0.5, 0.5) == ""


def test_a_wrong_length_kills_the_controller_until_a_reset() -> None:
    controller = ForwardController(NAMES, START, "velocity")
    send(controller, 0.1, 0.1)
    assert "3 values for 2 joints" in send(controller, 0.0, 0.0, 0.0)
    assert "dead" in send(controller, 0.0, 0.0)  # too late: nobody listens, and the velocity stays
    np.testing.assert_allclose(run(controller, 1.0), START + 0.1)
    controller.hold(START)
    assert send(controller, 0.3, 0.3) == ""

"""Limits are complete or refused."""

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.limits import read_limits

GOOD = {"position": [-1.0, 2.0], "velocity": 2.0, "acceleration": 4, "jerk": 100.0, "max_step": 0.1}


def test_scale_applies_to_rates_only_and_order_is_that_of_the_names() -> None:
    limits = read_limits(["b", "a"], {"a": GOOD, "b": GOOD | {"velocity": 3.0}}, 0.5, "f")
    np.testing.assert_array_equal(limits.velocity, [1.5, 1.0])
    np.testing.assert_array_equal(limits.acceleration, [2.0, 2.0])
    np.testing.assert_array_equal(limits.jerk, [50.0, 50.0])
    np.testing.assert_array_equal(limits.max_step, [0.1, 0.1])
    np.testing.assert_array_equal(limits.clip_position(np.array([9.0, -9.0])), [2.0, -1.0])


@pytest.mark.parametrize(
    ("table", "scale", "message"),
    [
        ({}, 1.0, "'a' has no limits"),
        ({"a": {k: v for k, v in GOOD.items() if k != "acceleration"}}, 1.0, "no 'acceleration' limit"),
        ({"a": GOOD | {"acceleraton": 1}}, 1.0, "acceleraton.*Did you mean 'acceleration'"),
        ({"a": GOOD | {"position": [1.0, 1.0]}}, 1.0, "low < high"),
        ({"a": GOOD | {"velocity": 0.0}}, 1.0, "positive"),
        ({"a": GOOD | {"jerk": float("inf")}}, 1.0, "finite"),
        ({"a": GOOD | {"velocity": "fast"}}, 1.0, "numbers"),
        ({"a": GOOD, "b": GOOD}, 1.0, "'b', which is no joint"),
        ({"a": GOOD}, 1.5, "scale"),
    ],
)
def test_incomplete_limits_are_refused(table: dict, scale: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_limits(["a"], table, scale, "f")

"""Which offers satisfy which requests."""

import pytest

from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST, LOG, SENSOR_DATA, incompatibility


@pytest.mark.parametrize(
    ("offered", "requested", "word"),
    [
        (SENSOR_DATA, DEFAULT, "best effort"),
        (DEFAULT, LATCHED, "volatile"),
        (COMMAND, EVENTS, "volatile"),
        (DEFAULT, SENSOR_DATA, ""),
        (LATCHED, DEFAULT, ""),
        (SENSOR_DATA, LATEST, ""),
        (COMMAND, LOG, ""),
        (EVENTS, LATCHED, ""),
    ],
)
def test_matching_rules_of_dds(offered, requested, word: str) -> None:
    assert word in incompatibility(offered, requested)
    assert bool(word) == bool(incompatibility(offered, requested))

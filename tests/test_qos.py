"""Which offers satisfy which requests, and how a profile is said. On the wire: test_transport_dds.py."""

import pytest

from embodied.robot_bridge.qos import (
    COMMAND,
    DEFAULT,
    EVENTS,
    LATCHED,
    LATEST,
    LOG,
    SENSOR_DATA,
    QosProfile,
    incompatibility,
)


@pytest.mark.parametrize(
    ("offered", "requested", "word"),
    [
        (SENSOR_DATA, DEFAULT, "best effort"),
        (DEFAULT, LATCHED, "volatile"),
        (COMMAND, EVENTS, "volatile"),
        (DEFAULT, QosProfile(deadline_s=0.5), "no deadline"),
        (QosProfile(deadline_s=1.0), QosProfile(deadline_s=0.5), "a deadline of 1 s"),
        (DEFAULT, QosProfile(lease_s=0.5), "no lease"),
        (DEFAULT, QosProfile(manual_liveliness=True), "automatic liveliness"),
        (QosProfile(representations=("xcdr2",)), DEFAULT, "writes xcdr2, the subscription reads xcdr1 only"),
        (QosProfile(representations=("xcdr2", "xcdr1")), DEFAULT, "writes xcdr2"),  # a writer uses its first
        (DEFAULT, SENSOR_DATA, ""),
        (LATCHED, DEFAULT, ""),
        (SENSOR_DATA, LATEST, ""),
        (COMMAND, LOG, ""),
        (EVENTS, LATCHED, ""),
        (QosProfile(deadline_s=0.5), QosProfile(deadline_s=1.0), ""),
        (QosProfile(manual_liveliness=True), DEFAULT, ""),
        (DEFAULT, QosProfile(representations=("xcdr1", "xcdr2")), ""),
    ],
)
def test_matching_rules_of_dds(offered: QosProfile, requested: QosProfile, word: str) -> None:
    assert word in incompatibility(offered, requested)
    assert bool(word) == bool(incompatibility(offered, requested))


def test_our_own_profiles_match_whatever_a_robot_may_use() -> None:
    """Sensor subscriptions are best effort and commands reliable; nothing of ours asks for a deadline or a lease."""
    for qos in (SENSOR_DATA, LATEST, LOG):
        assert not [offer for offer in (DEFAULT, SENSOR_DATA, LATCHED, EVENTS) if incompatibility(offer, qos)]
    assert not [request for request in (DEFAULT, SENSOR_DATA, LATEST) if incompatibility(COMMAND, request)]
    assert COMMAND.depth == 1  # a hung subscriber then never blocks the writer


@pytest.mark.parametrize(
    ("qos", "said"),
    [
        (SENSOR_DATA, "best effort, volatile, keep last 5"),
        (LATCHED, "reliable, transient local, keep last 1"),
        (QosProfile(0), "reliable, volatile, keep all"),
        (
            QosProfile(1, deadline_s=0.5, manual_liveliness=True, lease_s=2.0, representations=("xcdr2",)),
            "reliable, volatile, keep last 1, deadline 0.5 s, manual liveliness, lease 2 s, xcdr2",
        ),
    ],
)
def test_a_profile_is_said_in_the_words_of_ros(qos: QosProfile, said: str) -> None:
    assert qos.describe() == said

"""Quality-of-service profiles by their ROS 2 names, and which pairs match.

In DDS a subscription whose request exceeds the offer simply receives nothing. `incompatibility` says beforehand what
would not match; a transport's `problems()` says afterwards what did not.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class QosProfile:
    """History is always KEEP_LAST.

    Attributes:
        depth: samples kept per writer or reader.
        reliable: reliable, or best effort.
        latched: transient local: a late subscriber gets the last `depth` samples. Otherwise volatile.
    """

    depth: int = 10
    reliable: bool = True
    latched: bool = False


DEFAULT = QosProfile()
SENSOR_DATA = QosProfile(depth=5, reliable=False)
LATEST = QosProfile(depth=1, reliable=False)  # a subscription that matches every publisher and never lags behind
COMMAND = QosProfile(depth=1)  # reliable matches either kind of subscriber; depth 1 never blocks on a hung one
LATCHED = QosProfile(depth=1, latched=True)
EVENTS = QosProfile(depth=100, latched=True)
LOG = QosProfile(depth=2000, reliable=False)  # a recorder's subscription: deep, and it matches every publisher


def incompatibility(offered: QosProfile, requested: QosProfile) -> str:
    """Why a subscription with `requested` receives nothing from a publisher with `offered`; empty if it does."""
    if requested.reliable and not offered.reliable:
        return "the publisher offers best effort, the subscription requests reliable"
    if requested.latched and not offered.latched:
        return "the publisher offers volatile, the subscription requests transient local"
    return ""

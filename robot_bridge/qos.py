"""Quality-of-service profiles by their ROS 2 names, and which pairs match.

In DDS a subscription whose request exceeds the offer simply receives nothing. `incompatibility` says beforehand what
would not match; a transport's `problems()` says afterwards what did not.
"""

import dataclasses
import math

KEEP_ALL = 0  # as a depth


@dataclasses.dataclass(frozen=True)
class QosProfile:
    """What a publisher offers or a subscription requests. The bridge's own set the first three only.

    Attributes:
        depth: samples kept per writer or reader; KEEP_ALL keeps what is not yet taken.
        reliable: reliable, or best effort.
        latched: transient local: a late subscriber gets the last `depth` samples. Otherwise volatile.
        deadline_s: longest time between two samples that is offered or requested [s].
        manual_liveliness: the publisher asserts by hand that it lives; otherwise the middleware does.
        lease_s: time after which a silent publisher counts as dead [s].
        representations: of a publisher the one it writes in, of a subscription those it reads: xcdr1, xcdr2. ROS 2
            nodes write and read xcdr1.
    """

    depth: int = 10
    reliable: bool = True
    latched: bool = False
    deadline_s: float = math.inf
    manual_liveliness: bool = False
    lease_s: float = math.inf
    representations: tuple[str, ...] = ("xcdr1",)

    def describe(self) -> str:
        """The profile in ROS 2's words, leaving out what is at its default."""
        words = [
            "reliable" if self.reliable else "best effort",
            "transient local" if self.latched else "volatile",
            f"keep last {self.depth}" if self.depth else "keep all",
        ]
        if self.deadline_s < math.inf:
            words.append(f"deadline {self.deadline_s:g} s")
        if self.manual_liveliness:
            words.append("manual liveliness")
        if self.lease_s < math.inf:
            words.append(f"lease {self.lease_s:g} s")
        if "xcdr1" not in self.representations:
            words.append("/".join(self.representations))
        return ", ".join(words)


DEFAULT = QosProfile()
SERVICES = DEFAULT
SENSOR_DATA = QosProfile(depth=5, reliable=False)
LATEST = QosProfile(depth=1, reliable=False)  # a subscription that matches every publisher and never lags behind
COMMAND = QosProfile(depth=1)  # reliable matches either kind of subscriber; depth 1 never blocks on a hung one
LATCHED = QosProfile(depth=1, latched=True)
EVENTS = QosProfile(depth=100, latched=True)
LOG = QosProfile(depth=2000, reliable=False)  # a recorder's subscription: deep, and it matches every publisher
CLOCK = LATEST  # a subscription of /clock, as rclcpp and rclpy make it


def incompatibility(offered: QosProfile, requested: QosProfile) -> str:
    """Why a subscription with `requested` receives nothing from a publisher with `offered`; empty if it does."""
    if requested.reliable and not offered.reliable:
        return "the publisher offers best effort, the subscription requests reliable"
    if requested.latched and not offered.latched:
        return "the publisher offers volatile, the subscription requests transient local"
    if offered.deadline_s > requested.deadline_s:
        return f"the publisher offers {_deadline(offered)}, the subscription requests {_deadline(requested)}"
    if requested.manual_liveliness and not offered.manual_liveliness:
        return "the publisher offers automatic liveliness, the subscription requests manual"
    if offered.lease_s > requested.lease_s:
        return f"the publisher offers {_lease(offered)}, the subscription requests {_lease(requested)}"
    if not set(offered.representations[:1]) & set(requested.representations):
        reads = " or ".join(requested.representations)
        return f"the publisher writes {offered.representations[0]}, the subscription reads {reads} only"
    return ""


def _deadline(profile: QosProfile) -> str:
    return "no deadline" if math.isinf(profile.deadline_s) else f"a deadline of {profile.deadline_s:g} s"


def _lease(profile: QosProfile) -> str:
    return "no lease" if math.isinf(profile.lease_s) else f"a lease of {profile.lease_s:g} s"

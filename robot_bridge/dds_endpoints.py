"""DDS writers and readers that carry CDR bytes, and how a ROS 2 profile is said in DDS and back."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from embodied.contracts.errors import TransportError
from embodied.robot_bridge.carriers import carry
from embodied.robot_bridge.qos import KEEP_ALL, QosProfile

log = logging.getLogger(__name__)
Callback = Callable[[bytes, int], None]

MAX_BLOCKING_NS = 10_000_000  # a hung reliable reader costs a writer at most this [ns]
HANDLE = 2**64 - 1  # instance handles are unsigned; the wheel gives some of them signed
POLICIES = {2: "durability", 4: "deadline", 8: "liveliness", 11: "reliability", 25: "data representation"}


def to_dds(qos: QosProfile, writer: bool, user_data: str) -> Any:
    """The wheel's Qos of a profile.

    Args:
        user_data: `key=value;` pairs that the endpoint announces.
    """
    from cyclonedds.core import Policy, Qos

    keep = Policy.History.KeepLast(qos.depth) if qos.depth != KEEP_ALL else Policy.History.KeepAll
    xcdr1, xcdr2 = "xcdr1" in qos.representations, "xcdr2" in qos.representations
    policies = [
        keep,
        Policy.Reliability.Reliable(MAX_BLOCKING_NS) if qos.reliable else Policy.Reliability.BestEffort,
        Policy.Durability.TransientLocal if qos.latched else Policy.Durability.Volatile,
        # ROS 2 nodes write and read plain CDR only; a reader that took XCDR2 too would be handed what nobody decodes.
        Policy.DataRepresentation(use_cdrv0_representation=xcdr1, use_xcdrv2_representation=xcdr2),
    ]
    if not math.isinf(qos.deadline_s):
        policies.append(Policy.Deadline(round(qos.deadline_s * 1e9)))
    if qos.manual_liveliness or not math.isinf(qos.lease_s):
        kind = Policy.Liveliness.ManualByTopic if qos.manual_liveliness else Policy.Liveliness.Automatic
        policies.append(kind(2**63 - 1 if math.isinf(qos.lease_s) else round(qos.lease_s * 1e9)))
    if qos.latched and writer:
        policies.append(Policy.DurabilityService(0, keep, -1, -1, -1))
    if user_data:
        policies.append(Policy.Userdata(user_data.encode()))
    if writer:
        policies.append(Policy.WriterDataLifecycle(autodispose=False))
    return Qos(*policies)


def from_dds(qos: Any) -> QosProfile:
    """The profile in a discovered endpoint's Qos."""
    from cyclonedds.core import Policy

    def seconds(policy: Any, field: str) -> float:
        value = getattr(policy, field, 2**63 - 1)
        return math.inf if value >= 2**63 - 1 else value * 1e-9

    represented, liveliness = qos[Policy.DataRepresentation], qos[Policy.Liveliness]
    fields = {"xcdr1": "use_cdrv0_representation", "xcdr2": "use_xcdrv2_representation"}
    return QosProfile(
        depth=getattr(qos[Policy.History], "depth", KEEP_ALL),
        reliable=qos[Policy.Reliability] != Policy.Reliability.BestEffort,
        latched=qos[Policy.Durability] not in (None, Policy.Durability.Volatile),
        deadline_s=seconds(qos[Policy.Deadline], "deadline"),
        manual_liveliness=isinstance(
            liveliness, (Policy.Liveliness.ManualByTopic, Policy.Liveliness.ManualByParticipant)
        ),
        lease_s=seconds(liveliness, "lease_duration"),
        representations=tuple(n for n, field in fields.items() if getattr(represented, field, False)) or ("xcdr1",),
    )


class CyclonePublisher:
    """One DDS writer; `matched` counts the subscriptions it reaches."""

    def __init__(self, topic: str, writer: Any, cls: Any) -> None:
        self.topic, self.entity, self._class = topic, writer, cls

    @property
    def matched(self) -> int:
        return len(self.entity.get_matched_subscriptions())

    @property
    def incompatible(self) -> str:
        """The policy over which a subscription was last refused; empty if none was."""
        return _policy(self.entity.get_offered_incompatible_qos_status())

    def matches(self) -> set[int]:
        return {handle & HANDLE for handle in self.entity.get_matched_subscriptions()}

    def write(self, data: bytes) -> None:
        """Send CDR bytes. Raises TransportError if they are no sample of the topic's type."""
        from cyclonedds.core import DDSException

        try:
            self.entity.write(carry(self._class, data))
        except DDSException as error:
            if error.code == DDSException.DDS_RETCODE_TIMEOUT:
                log.warning("%s: a reliable subscriber is not keeping up; a sample waits", self.topic)
                return
            raise TransportError(f"{self.topic}: Cyclone DDS refused a sample of {len(data)} bytes: {error}") from None


class CycloneSubscriber:
    """One DDS reader; `matched` counts the publishers that reach it."""

    def __init__(self, topic: str, reader: Any, callback: Callback) -> None:
        self.topic, self.entity, self.condition = topic, reader, read_condition(reader)
        self._callback = callback

    @property
    def matched(self) -> int:
        return len(self.entity.get_matched_publications())

    @property
    def incompatible(self) -> str:
        """The policy over which a publisher was last refused; empty if none was."""
        return _policy(self.entity.get_requested_incompatible_qos_status())

    def matches(self) -> set[int]:
        return {handle & HANDLE for handle in self.entity.get_matched_publications()}

    def drain(self) -> None:
        """Hand every waiting sample to the callback."""
        for sample, received in take(self.entity):
            try:
                self._callback(sample.data, received)
            except Exception:
                log.exception("callback of %s", self.topic)


def read_condition(reader: Any) -> Any:
    """What a WaitSet waits for: anything to take."""
    from cyclonedds.core import InstanceState, ReadCondition, SampleState, ViewState

    return ReadCondition(reader, SampleState.Any | ViewState.Any | InstanceState.Any)


def take(reader: Any) -> Any:
    """Yield every waiting sample of a reader with the time at which it was taken [ns, monotonic]."""
    from cyclonedds.internal import InvalidSample

    while samples := reader.take(N=64):
        received = time.monotonic_ns()
        for sample in samples:
            if not isinstance(sample, InvalidSample):  # those say that a writer went away
                yield sample, received


def _policy(status: Any) -> str:
    return POLICIES.get(status.last_policy_id, f"policy {status.last_policy_id}") if status.total_count else ""

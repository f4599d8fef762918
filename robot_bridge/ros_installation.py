"""What a sourced ROS 2 installation gives: rclpy, the classes of its interfaces, its profiles, its environment."""

# pyright: reportMissingImports=false

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.dds_domain import configuration
from embodied.robot_bridge.qos import KEEP_ALL, QosProfile

log = logging.getLogger(__name__)

# Configuration files by which Fast DDS could reach further than this host.
FAST_DDS_FILES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def import_rclpy() -> Any:
    try:
        return importlib.import_module("rclpy")
    except ImportError as error:
        raise ConfigError(
            f"transport 'rclpy' needs a sourced ROS 2 installation; this Python cannot import rclpy ({error}).\n"
            "Source it (source /opt/ros/<distro>/setup.bash) and use its Python, or pass --transport dds."
        ) from None


def interface(name: str) -> Any:
    """The class of a message or service type, also of the messages and services within an action."""
    package, kind, rest = name.split("/")
    try:
        module = importlib.import_module(f"{package}.{kind}")
    except ImportError:
        distro = os.environ.get("ROS_DISTRO", "<distro>")
        raise ConfigError(
            f"{name}: the sourced ROS 2 installation has no package '{package}'.\n"
            f"Install it: sudo apt-get install ros-{distro}-{package.replace('_', '-')}"
        ) from None
    if kind != "action":
        found = getattr(module, rest, None)
    else:
        action, _, part = rest.rpartition("_")
        inside = getattr(getattr(module, action, None), "Impl", None)
        found = getattr(inside, part if part == "FeedbackMessage" else f"{part}Service", None)
    if found is None:
        raise ConfigError(f"{name}: the sourced ROS 2 installation has no such type.")
    return found


def to_ros(qos: QosProfile) -> Any:
    """rclpy's profile of ours. Raises ConfigError for a representation that ROS 2 does not write."""
    from rclpy.duration import Duration
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy

    if "xcdr1" not in qos.representations:
        raise ConfigError("a ROS 2 node writes and reads xcdr1; for anything else use the transport 'dds'.")
    settings: dict[str, Any] = {}
    if not math.isinf(qos.deadline_s):
        settings["deadline"] = Duration(nanoseconds=round(qos.deadline_s * 1e9))
    if not math.isinf(qos.lease_s):
        settings["liveliness_lease_duration"] = Duration(nanoseconds=round(qos.lease_s * 1e9))
    if qos.manual_liveliness:
        settings["liveliness"] = LivelinessPolicy.MANUAL_BY_TOPIC
    return QoSProfile(
        history=HistoryPolicy.KEEP_ALL if qos.depth == KEEP_ALL else HistoryPolicy.KEEP_LAST,
        depth=qos.depth,
        reliability=ReliabilityPolicy.RELIABLE if qos.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if qos.latched else DurabilityPolicy.VOLATILE,
        **settings,
    )


def from_ros(profile: Any) -> QosProfile:
    """Our profile of a discovered endpoint's; the depth is not discovered by every middleware and then 1."""
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, LivelinessPolicy, ReliabilityPolicy

    def seconds(duration: Any) -> float:
        return duration.nanoseconds * 1e-9 if 0 < duration.nanoseconds < 2**63 - 1 else math.inf

    return QosProfile(
        depth=KEEP_ALL if profile.history == HistoryPolicy.KEEP_ALL else max(1, profile.depth),
        reliable=profile.reliability == ReliabilityPolicy.RELIABLE,
        latched=profile.durability == DurabilityPolicy.TRANSIENT_LOCAL,
        deadline_s=seconds(profile.deadline),
        manual_liveliness=profile.liveliness == LivelinessPolicy.MANUAL_BY_TOPIC,
        lease_s=seconds(profile.liveliness_lease_duration),
    )


def environment(discovery: str, humble: bool) -> dict[str, str | None]:
    """What ROS 2 must find in its environment to stay on this host; None: must not find. Nothing for `subnet`."""
    cyclone = configuration(discovery, os.environ)  # refuses what is no setting of ROS 2, and says what it leaves out
    if discovery == "subnet":
        return {}
    changes: dict[str, str | None] = {"CYCLONEDDS_URI": cyclone, "ROS_STATIC_PEERS": None}
    if humble:
        changes["ROS_LOCALHOST_ONLY"] = "1"
    else:
        wanted = "OFF" if os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "").upper() == "OFF" else "LOCALHOST"
        changes |= {"ROS_AUTOMATIC_DISCOVERY_RANGE": wanted, "ROS_LOCALHOST_ONLY": None}
    for name in FAST_DDS_FILES:
        if os.environ.get(name):
            log.warning("%s: not used, since this process stays on this host; --discovery subnet would use it.", name)
            changes[name] = None
    return changes


@contextlib.contextmanager
def environment_of(discovery: str, humble: bool) -> Iterator[None]:
    """ROS 2 reads its discovery settings from the environment, while the node is made."""
    changes = environment(discovery, humble)
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)

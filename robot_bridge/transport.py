"""Which transport a node talks through, and what every transport says about the graph.

    memory   one process, no wire: tests and fault injection (transport_memory.py)
    dds      the ROS 2 wire through Cyclone DDS from PyPI, no ROS installation (transport_cyclone.py)
    rclpy    a sourced ROS 2 installation, whatever its middleware (transport_rclpy.py)

By default nothing leaves this host, whatever the environment says: `discovery="subnet"` is the permission to.
"""

import dataclasses
import importlib.util
import logging
import os
import re
from typing import Any

from embodied.contracts.errors import ConfigError, suggest
from embodied.contracts.protocols import Transport
from embodied.robot_bridge.qos import QosProfile

log = logging.getLogger(__name__)

KINDS = ("auto", "dds", "rclpy")
DISCOVERY = ("localhost", "subnet")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A publisher or a subscription of the graph.

    Attributes:
        topic: absolute ROS name.
        message_type: `package/msg/Name`.
        node: the node's full name, `/a/node`; empty if the owner announces none (a bare DDS program).
        publishes: a publisher; otherwise a subscription.
        qos: what it offers or requests.
        type_hash: `RIHS01_...`; empty if it announces none (ROS 2 Humble and older).
    """

    topic: str
    message_type: str
    node: str
    publishes: bool
    qos: QosProfile
    type_hash: str = ""


@dataclasses.dataclass(frozen=True)
class Service:
    """A service that a node offers."""

    name: str
    service_type: str
    node: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """What a node knows of the others, itself included.

    Attributes:
        nodes: full names, sorted; a name that two nodes share stands here twice.
        endpoints: publishers and subscriptions of topics.
        services: those with a server.
    """

    nodes: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]
    services: tuple[Service, ...] = ()


def mismatch(publisher: Endpoint, subscription: Endpoint, reason: str) -> str:
    """One line of `problems()`: the topic, the reason, and both profiles with their owners."""
    ends = [f"{end.node or 'a bare DDS program'}: {end.qos.describe()}" for end in (publisher, subscription)]
    return f"{publisher.topic}: {reason} (publisher {ends[0]}; subscription {ends[1]})"


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def full_name(node: str, namespace: str) -> str:
    """`/namespace/node`. Raises ConfigError if either is no ROS name."""
    if not _NAME.fullmatch(node):
        raise ConfigError(f"'{node}' is no node name: letters, digits and underscores, not a digit first.")
    if namespace != "/":
        _check(namespace, "namespace")
        if not namespace.startswith("/"):
            raise ConfigError(f"namespace '{namespace}' must start with '/'.")
    return f"{namespace.rstrip('/')}/{node}"


def resolve(name: str, node: str, namespace: str) -> str:
    """The absolute name of a topic or service: `~/b` is private to the node, `b` lies in the namespace."""
    if name.startswith("~/"):
        name = f"{full_name(node, namespace)}/{name[2:]}"
    elif not name.startswith("/"):
        name = f"{namespace.rstrip('/')}/{name}"
    _check(name, "topic or service")
    return name


def unread(data: bytes, received_ns: int) -> None:
    """The callback of a subscription that only counts who publishes."""


def _check(name: str, what: str) -> None:
    tokens = name.removeprefix("/").split("/")
    if not all(_NAME.fullmatch(token) for token in tokens):
        raise ConfigError(
            f"'{name}' is no {what} name: parts of letters, digits and underscores, none with a digit first, "
            "divided by single slashes."
        )


def choose(kind: str) -> tuple[str, str]:
    """`dds` or `rclpy`, and why. Raises ConfigError if rclpy is asked for and cannot be imported."""
    if kind not in KINDS:
        raise ConfigError(f"transport '{kind}' is unknown.{suggest(kind, KINDS)}")
    importable = importlib.util.find_spec("rclpy") is not None
    distro = os.environ.get("ROS_DISTRO", "")
    if kind == "rclpy" and not importable:
        raise ConfigError(
            "transport 'rclpy' needs a sourced ROS 2 installation; this Python cannot import rclpy.\n"
            "Source it (source /opt/ros/<distro>/setup.bash) and use its Python, or pass --transport dds."
        )
    if kind != "auto":
        return kind, "asked for"
    if importable and distro:
        return "rclpy", f"ROS 2 {distro} is sourced"
    if importable:
        return "dds", "rclpy can be imported, but ROS_DISTRO is not set"
    return "dds", f"ROS_DISTRO is {distro}, but this Python cannot import rclpy" if distro else "no ROS 2 is sourced"


def open_transport(
    node: str,
    kind: str = "auto",
    domain: int | None = None,
    discovery: str = "localhost",
    namespace: str = "/",
) -> Transport:
    """A node on the ROS 2 graph.

    Args:
        kind: `dds`, `rclpy`, or `auto`: rclpy if it can be imported and ROS_DISTRO is set, else dds.
        domain: 0 to 232; None takes ROS_DOMAIN_ID.
        discovery: `localhost`: nothing leaves this host; `subnet`: it may, as the ROS environment says.
    """
    chosen, reason = choose(kind)
    if discovery not in DISCOVERY:
        raise ConfigError(f"discovery '{discovery}' is unknown.{suggest(discovery, DISCOVERY)}")
    log.info("%s: transport %s (%s), discovery %s", node, chosen, reason, discovery)
    implementation: Any
    if chosen == "rclpy":
        from embodied.robot_bridge.transport_rclpy import RclpyTransport as implementation
    else:
        from embodied.robot_bridge.transport_cyclone import CycloneTransport as implementation
    return implementation(node, domain, discovery, namespace)

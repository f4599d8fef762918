"""The rclpy transport: the conformance suite in a sourced ROS 2; elsewhere, what it says without one."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import Make, TransportConformance

from embodied.contracts.protocols import Transport
from embodied.robot_bridge.processes import free_domain

SOURCED = importlib.util.find_spec("rclpy") is not None
needs_ros = pytest.mark.skipif(
    not SOURCED, reason="no rclpy: source a ROS 2 installation (it is not on PyPI) and run this file with its Python"
)
DOMAIN, MIXED_DOMAIN = free_domain(), 1 + (free_domain() + 6) % 200


@pytest.fixture
def make() -> Iterator[Make]:
    from embodied.robot_bridge.transport_rclpy import RclpyTransport

    opened: list[Any] = []

    def factory(node: str, namespace: str = "/") -> Transport:
        opened.append(RclpyTransport(node, DOMAIN, namespace=namespace))
        return opened[-1]

    yield factory
    for node in opened:
        node.close()


@needs_ros
class TestRclpy(TransportConformance):
    pass


def on_cyclone() -> bool:
    if not SOURCED:
        return False
    import rclpy  # pyright: ignore[reportMissingImports]

    return rclpy.get_rmw_implementation_identifier() == "rmw_cyclonedds_cpp"


@needs_ros
@pytest.mark.skipif(
    not on_cyclone(), reason="services reach the dds transport on RMW_IMPLEMENTATION=rmw_cyclonedds_cpp"
)
@pytest.mark.parametrize("rclpy_first", [True, False], ids=["rclpy_to_dds", "dds_to_rclpy"])
class TestRclpyWithDds(TransportConformance):
    """The nodes of each test take turns: one of the ROS 2 installation, one of ours without."""

    @pytest.fixture
    def make(self, rclpy_first: bool) -> Iterator[Make]:
        from embodied.robot_bridge.transport_cyclone import CycloneTransport
        from embodied.robot_bridge.transport_rclpy import RclpyTransport

        opened: list[Any] = []

        def factory(node: str, namespace: str = "/") -> Transport:
            kind = RclpyTransport if rclpy_first == (len(opened) % 2 == 0) else CycloneTransport
            opened.append(kind(node, MIXED_DOMAIN, namespace=namespace))
            return opened[-1]

        yield factory
        for node in opened:
            node.close()

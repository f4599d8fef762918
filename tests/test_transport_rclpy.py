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
DOMAIN = free_domain()


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

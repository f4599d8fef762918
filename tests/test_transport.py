"""The conformance suite over the transports that need no ROS installation, and how a transport is chosen."""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import Make, TransportConformance, fresh_domain

from embodied.contracts.errors import ConfigError
from embodied.contracts.protocols import Transport
from embodied.robot_bridge import transport
from embodied.robot_bridge.transport import choose, full_name, open_transport, resolve
from embodied.robot_bridge.transport_cyclone import CycloneTransport
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

DOMAIN = fresh_domain()


class TestMemory(TransportConformance):
    @pytest.fixture
    def make(self) -> Iterator[Make]:
        bus, opened = MemoryBus(), []

        def factory(node: str, namespace: str = "/") -> Transport:
            opened.append(MemoryTransport(bus, node, namespace))
            return opened[-1]

        yield factory
        for node in opened:
            node.close()


class TestDds(TransportConformance):
    @pytest.fixture
    def make(self) -> Iterator[Make]:
        opened: list[Any] = []

        def factory(node: str, namespace: str = "/") -> Transport:
            opened.append(CycloneTransport(node, DOMAIN, namespace=namespace))
            return opened[-1]

        yield factory
        for node in opened:
            node.close()


# ---- which transport


@pytest.mark.parametrize(
    ("kind", "importable", "distro", "chosen", "reason"),
    [
        ("auto", True, "jazzy", "rclpy", "ROS 2 jazzy is sourced"),
        ("auto", True, "", "dds", "ROS_DISTRO is not set"),
        ("auto", False, "jazzy", "dds", "this Python cannot import rclpy"),
        ("auto", False, "", "dds", "no ROS 2 is sourced"),
        ("dds", True, "jazzy", "dds", "asked for"),
        ("rclpy", True, "", "rclpy", "asked for"),
    ],
)
def test_auto_takes_rclpy_only_where_ros_is_sourced_and_says_why(
    kind: str, importable: bool, distro: str, chosen: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        transport.importlib.util, "find_spec", lambda name: find("json" if importable else "no_such_module")
    )
    monkeypatch.setenv("ROS_DISTRO", distro)
    got = choose(kind)
    assert got[0] == chosen
    assert reason in got[1]


def test_rclpy_asked_for_but_absent_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cannot import rclpy\.\nSource it .* or pass --transport dds"):
        open_transport("node", "rclpy")


def test_unknown_choices_name_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"transport 'dsd' is unknown. Did you mean 'dds'\? Valid: auto, dds, rclpy"):
        open_transport("node", "dsd")
    with pytest.raises(ConfigError, match=r"discovery 'everywhere' is unknown\. Valid: localhost, subnet"):
        open_transport("node", "dds", discovery="everywhere")


def test_the_log_says_which_transport_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    monkeypatch.setattr(transport.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        node = open_transport("chosen", "auto", DOMAIN)
    node.close()
    assert "chosen: transport dds (no ROS 2 is sourced), discovery localhost" in caplog.text


def test_names_resolve_as_in_ros() -> None:
    assert full_name("arm", "/") == "/arm"
    assert full_name("arm", "/a/b") == "/a/b/arm"
    assert [resolve(name, "arm", "/ns") for name in ("/x/y", "x/y", "~/x")] == ["/x/y", "/ns/x/y", "/ns/arm/x"]
    assert resolve("x", "arm", "/") == "/x"

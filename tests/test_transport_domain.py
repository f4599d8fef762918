"""Domains, and what leaves the host: nothing, unless the caller allows it."""

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import fresh_domain

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge.dds_domain import configuration, default_domain
from embodied.robot_bridge.transport_cyclone import CycloneTransport

DOMAIN = fresh_domain()


def test_domains_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for domain in (-1, 233):
        with pytest.raises(ConfigError, match="out of range; it must be from 0 to 232"):
            CycloneTransport("x", domain)
    CycloneTransport("x", 232).close()
    with pytest.raises(ConfigError, match="discovery 'everywhere' is unknown"):
        CycloneTransport("x", fresh_domain(), discovery="everywhere")
    CycloneTransport("x", DOMAIN).close()
    with pytest.raises(ConfigError, match="already open in this process with discovery 'localhost'"):
        CycloneTransport("x", DOMAIN, discovery="subnet")
    for text in ("seven", "233", "-1"):
        monkeypatch.setenv("ROS_DOMAIN_ID", text)
        with pytest.raises(ConfigError, match="ROS_DOMAIN_ID"):
            default_domain()
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    assert default_domain() == 42


def test_the_environment_alone_does_not_open_the_host(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    plain = configuration("localhost", {})
    file = tmp_path / "cyclone.xml"
    file.write_text(
        '<?xml version="1.0"?><CycloneDDS xmlns="https://cdds.io/config"><Domain><General><AllowMulticast>true'
        "</AllowMulticast></General><Tracing><Verbosity>warning</Verbosity></Tracing></Domain></CycloneDDS>"
    )
    for environment, said in (
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}, ""),
        ({"ROS_STATIC_PEERS": "192.0.2.1;robot.local"}, "ROS_STATIC_PEERS names 192.0.2.1, robot.local"),
        ({"CYCLONEDDS_URI": "<General><Interfaces/></General>"}, "CYCLONEDDS_URI sets General"),
        ({"CYCLONEDDS_URI": '<Discovery><Peers><Peer Address="192.0.2.1"/></Peers></Discovery>'}, "sets Discovery"),
    ):
        caplog.clear()
        assert configuration("localhost", environment) == plain
        assert said in caplog.text
    assert "--discovery subnet" in caplog.text
    caplog.clear()
    mixed = configuration("localhost", {"CYCLONEDDS_URI": f"<Sizing/>,file://{file}"})
    assert mixed.startswith(plain)
    assert "Multicast>true" not in mixed
    assert "<Sizing" in mixed
    assert "<Verbosity>warning</Verbosity>" in mixed
    assert "CYCLONEDDS_URI sets General" in caplog.text


def test_with_permission_the_environment_is_read_as_ros_does() -> None:
    assert "127.0.0.1" not in configuration("subnet", {})
    assert "SocketReceiveBufferSize" in configuration("subnet", {})  # pictures come in many small packets there
    peers = configuration("subnet", {"ROS_STATIC_PEERS": "192.0.2.1; robot.local"})
    assert '<Peer Address="192.0.2.1"/><Peer Address="robot.local"/>' in peers
    uri = "<General><Interfaces/></General>"
    assert configuration("subnet", {"CYCLONEDDS_URI": uri}).endswith(f",{uri}")
    for narrow in ({"ROS_LOCALHOST_ONLY": "1"}, {"ROS_AUTOMATIC_DISCOVERY_RANGE": "localhost"}):
        assert configuration("subnet", narrow) == configuration("localhost", {})
    assert f"<Tag>ros_discovery_off_{os.getpid()}</Tag>" in configuration(
        "subnet", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}
    )
    assert "<Tag>" in configuration("localhost", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"})
    with pytest.raises(ConfigError, match=r"ROS_AUTOMATIC_DISCOVERY_RANGE is 'HOST'.*Valid: LOCALHOST, OFF, SUBNET"):
        configuration("localhost", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "host"})
    with pytest.raises(ConfigError, match="which is no address"):
        configuration("subnet", {"ROS_STATIC_PEERS": "<Peer/>"})
    for uri in ("<General>", "file:///no/such/file.xml"):
        with pytest.raises(ConfigError, match="CYCLONEDDS_URI cannot be read"):
            configuration("localhost", {"CYCLONEDDS_URI": uri})


def locators(packet: bytes) -> dict[int, list[tuple[int, str]]]:
    """Of an RTPS participant announcement: parameter id -> (kind, address) of its locators."""
    assert packet[:4] == b"RTPS"
    place, found = 20, dict[int, list[tuple[int, str]]]()
    while place + 4 <= len(packet):
        kind, flags = packet[place], packet[place + 1]
        order = "<" if flags & 1 else ">"
        (size,) = struct.unpack_from(f"{order}H", packet, place + 2)
        if kind == 0x15:  # DATA, its payload a list of parameters
            at = place + 4 + 20 + 4
            while at + 4 <= len(packet):
                parameter, length = struct.unpack_from(f"{order}HH", packet, at)
                if parameter == 1:
                    break
                if parameter in (0x2F, 0x30, 0x31, 0x32, 0x33, 0x48):
                    (locator,) = struct.unpack_from(f"{order}i", packet, at + 4)
                    found.setdefault(parameter, []).append((locator, socket.inet_ntoa(packet[at + 24 : at + 28])))
                at += 4 + length
        place += 4 + size if size else len(packet)
    return found


def test_every_advertised_locator_is_of_this_host() -> None:
    """Reads the announcement off the wire, with an environment that asks for more."""
    domain = fresh_domain()
    code = (
        "import time; from embodied.robot_bridge.transport_cyclone import CycloneTransport as T\n"
        f"t = T('x', {domain}); t.publisher('/t', 'std_msgs/msg/String', __import__('embodied.robot_bridge.qos', "
        "fromlist=['x']).DEFAULT); time.sleep(3); t.close()"
    )
    wider = {
        "CYCLONEDDS_URI": "<General><Interfaces><NetworkInterface autodetermine='true'/></Interfaces>"
        "<AllowMulticast>true</AllowMulticast></General>",
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",
        "ROS_STATIC_PEERS": "192.0.2.1",
    }
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 7400 + 250 * domain + 10 + 2 * 9))  # where the tenth participant would listen
        ear.settimeout(20)
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | wider)
        try:
            found: dict[int, list[tuple[int, str]]] = {}
            while not found:
                packet, (sender, _) = ear.recvfrom(65536)
                found = locators(packet)
        finally:
            child.kill()
            child.wait()
    assert sender == "127.0.0.1"
    everything = [locator for listed in found.values() for locator in listed]
    assert {address for _, address in everything} == {"127.0.0.1"}  # a multicast group would stand here too
    assert {0x31, 0x32} <= set(found)  # where data and where discovery is to be sent

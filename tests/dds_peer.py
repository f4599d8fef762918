"""A node in a process of its own, for the tests of the DDS transport: `python dds_peer.py DOMAIN` until /end comes."""

import sys
import threading

from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.qos import DEFAULT, LATCHED, LATEST, SENSOR_DATA
from embodied.robot_bridge.transport_cyclone import CycloneTransport


def main(domain: int) -> None:
    node, ended = CycloneTransport("peer", domain, namespace="/far"), threading.Event()
    images = node.publisher("/image/back", m.IMAGE, SENSOR_DATA)
    node.subscriber("/image/there", m.IMAGE, SENSOR_DATA, lambda data, at: images.write(data))
    states = node.publisher("/joint_states/back", m.JOINT_STATE, DEFAULT)
    node.subscriber("/joint_states/there", m.JOINT_STATE, LATEST, lambda data, at: states.write(data))
    node.publisher("/about", m.STRING, LATCHED).write(m.string("peer"))
    node.service("~/switch", m.SET_BOOL, lambda r: commands.outcome(not commands.read_set_bool_request(r), "far"))
    node.parameters({"rate": 10.0, "joints": ["a", "b"]}, lambda name, value: "")
    node.subscriber("/end", m.BOOL, DEFAULT, lambda data, at: ended.set())

    def ask_back(request: bytes) -> bytes:
        """The other way: this process is the client of the test's service."""
        return node.call("/near/trigger", m.TRIGGER, request, 5.0)

    node.service("~/ask_back", m.TRIGGER, ask_back)
    ended.wait(120)
    node.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))

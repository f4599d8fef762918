"""What the cyclonedds wheel does wrong and is mended: descriptions mixed up among threads, memory never freed."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import fresh_domain, ignore

from embodied.robot_bridge import dds_wheel
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.qos import DEFAULT
from embodied.robot_bridge.transport_cyclone import CycloneTransport


def test_threads_that_look_at_endpoints_do_not_get_each_others_policies() -> None:
    """Without the lock some hundred of 30,000 come back mixed up, or the process dies of it."""
    from cyclonedds.core import Policy, Qos
    from cyclonedds.qos import _CQos

    dds_wheel.mend()
    policies = [
        Qos(Policy.Userdata(f"typehash={k};".encode() * 20 * k), Policy.History.KeepLast(k), Policy.Deadline(k))
        for k in (1, 2, 3)
    ] + [Qos(Policy.History.KeepLast(4))]
    described = [_CQos.qos_to_cqos(qos) for qos in policies]
    expected = [_CQos.cqos_to_qos(description) for description in described]
    assert [qos[Policy.Userdata] for qos in expected] == [qos[Policy.Userdata] for qos in policies]
    wrong: list[object] = []
    end, interval = time.monotonic() + 2.0, sys.getswitchinterval()

    def look(k: int) -> None:
        while time.monotonic() < end:
            found = _CQos.cqos_to_qos(described[k])
            if found != expected[k]:
                wrong.append(found)

    threads = [threading.Thread(target=look, args=(k,)) for k in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        for description in described:
            _CQos.cqos_destroy(description)
    assert not wrong, (len(wrong), wrong[0])


_CROWDED = """
import sys, time
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.qos import DEFAULT
from embodied.robot_bridge.transport_cyclone import CycloneTransport
sys.setswitchinterval(1e-5)
watching = [CycloneTransport(f"node{k}", int(sys.argv[1])) for k in range(4)]
missing = 0
for _ in range(60):
    guest = CycloneTransport("guest", int(sys.argv[1]))
    for k in range(6):
        guest.publisher(f"/t{k}", m.JOINT_STATE, DEFAULT)
    time.sleep(0.02)
    missing += sum(not end.type_hash for node in watching for end in node.graph().endpoints)
    guest.close()
for node in watching:
    node.close()
print(missing)
"""


def test_several_nodes_of_one_process_see_every_type_hash() -> None:
    """As an operator's node does beside the preflight's. Unmended, hashes are missing or a node's thread dies."""
    command = [sys.executable, "-c", _CROWDED, str(fresh_domain())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_a_closed_node_deletes_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its objects are collected any time later, when their numbers may be those of another node's entities."""
    from cyclonedds.core import Entity

    deleted: list[int] = []
    delete: Any = Entity._delete
    monkeypatch.setattr(Entity, "_delete", lambda self, ref: (deleted.append(ref), delete(self, ref)))
    node = CycloneTransport("node", fresh_domain())
    participant = node._participant._ref
    node.publisher("/a", m.STRING, DEFAULT)
    node.subscriber("/b", m.STRING, DEFAULT, ignore)
    node.service("/c", m.TRIGGER, lambda request: request)
    node.close()
    del node
    gc.collect()
    assert deleted == [participant]


_LOOKING = """
import sys, time
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.qos import DEFAULT
from embodied.robot_bridge.transport_cyclone import CycloneTransport
one, two = CycloneTransport("one", int(sys.argv[1])), CycloneTransport("two", int(sys.argv[1]))
publisher = one.publisher("/t", m.STRING, DEFAULT)
subscriber = two.subscriber("/t", m.STRING, DEFAULT, lambda data, at: None)
while not publisher.matched * subscriber.matched or len(one.graph().nodes) < 2:
    time.sleep(0.01)
(handle,) = publisher.matches()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def look(times):
    for k in range(times):
        assert publisher.entity.get_matched_subscription_data(handle) is not None
        assert publisher.matches() == {handle}
        assert publisher.incompatible == ""
        if k % 10 == 0:
            assert len(one.graph().nodes) == 2
            assert one.problems() == []
look(20_000)
before = resident()
look(20_000)
print(resident() - before)
one.close(), two.close()
"""


def grown(script: str, *more: str) -> int:
    """What a script prints, run on a ROS domain of its own [bytes]."""
    command = [sys.executable, "-c", script, str(fresh_domain()), *more]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def test_looking_at_endpoints_and_asking_for_the_graph_takes_no_memory() -> None:
    """The wheel itself keeps 96 bytes a look: 1.9 MB here."""
    assert grown(_LOOKING) < 400_000


_CROWD = """
import sys, time
from embodied.robot_bridge import dds_domain
dds_domain._LOCALHOST = dds_domain._LOCALHOST.replace("<SPDPInterval>1s<", "<SPDPInterval>1ms<")
from embodied.robot_bridge.transport_cyclone import CycloneTransport
nodes = [CycloneTransport(f"node{k}", int(sys.argv[1])) for k in range(3)]
time.sleep(30)
"""
_WATCHED = """
import subprocess, sys, time
from embodied.robot_bridge.transport_cyclone import CycloneTransport
crowd = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
node = CycloneTransport("watched", int(sys.argv[1]))
while len(node.graph().nodes) < 4:
    time.sleep(0.01)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
time.sleep(1.5)
before = resident()
time.sleep(3.0)
print(resident() - before)
node.close()
crowd.kill()
"""


def test_what_others_announce_fills_no_buffer_for_long() -> None:
    """Half an hour's announcements in some seconds: with Cyclone's own 1 MiB per buffer it grows by 1 MB here."""
    assert grown(_WATCHED, _CROWD) < 300_000

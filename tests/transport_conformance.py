"""What every transport does. A test class that inherits `TransportConformance` and gives the fixture `make` runs it."""

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError, TransportError
from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import messages as m
from embodied.robot_bridge import parameters
from embodied.robot_bridge.action_client import CANCEL_GOAL, GRIPPER_COMMAND, ActionClient, gripper_goal
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST, SENSOR_DATA, QosProfile

SAMPLE = m.joint_state(5, ["a", "b"], np.array([1.0, 2.0]), np.array([0.5, np.nan]))
Make = Callable[..., Any]  # make(node, namespace="/") -> a transport; all of one test reach each other


def wait(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return true


_domains = itertools.count(os.getpid())


def fresh_domain() -> int:
    """A ROS domain of 1 to 200 on which nobody listens; another one at every call."""
    for number in itertools.islice(_domains, 200):
        domain = 1 + number % 200
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("0.0.0.0", 7400 + 250 * domain + 10))
            except OSError:
                continue
            return domain
    raise RuntimeError("no free ROS domain")


def ignore(data: bytes, received_ns: int) -> None:
    """A subscription's callback."""


class Gripper:
    """A GripperCommand server of services and a topic: closes at once, opens never, refuses negative positions."""

    def __init__(self, node: Any) -> None:
        self.goals: dict[bytes, int] = {}  # id -> status
        self.position: dict[bytes, float] = {}
        self._feedback = node.publisher("/grip/_action/feedback", f"{GRIPPER_COMMAND}_FeedbackMessage", DEFAULT)
        node.service("/grip/_action/send_goal", f"{GRIPPER_COMMAND}_SendGoal", self.send_goal)
        node.service("/grip/_action/get_result", f"{GRIPPER_COMMAND}_GetResult", self.get_result)
        node.service("/grip/_action/cancel_goal", CANCEL_GOAL, self.cancel_goal)

    def send_goal(self, data: bytes) -> bytes:
        request = m.decode(data, f"{GRIPPER_COMMAND}_SendGoal_Request")
        goal_id, position = request.goal_id.uuid.tobytes(), request.goal.command.position
        accepted = position >= 0
        if accepted:
            self.goals[goal_id], self.position[goal_id] = 4 if position == 0 else 2, position
            feedback = m.new(
                f"{GRIPPER_COMMAND}_Feedback", 0.5 * position, request.goal.command.max_effort, False, False
            )
            self._feedback.write(m.encode(m.new(f"{GRIPPER_COMMAND}_FeedbackMessage", request.goal_id, feedback)))
        return m.encode(m.new(f"{GRIPPER_COMMAND}_SendGoal_Response", accepted, m.time(0)))

    def get_result(self, data: bytes) -> bytes:
        goal_id = m.decode(data, f"{GRIPPER_COMMAND}_GetResult_Request").goal_id.uuid.tobytes()
        if self.goals[goal_id] == 2:
            raise TimeoutError("a goal that has not ended has no result")
        result = m.new(f"{GRIPPER_COMMAND}_Result", self.position[goal_id], 1.0, False, self.goals[goal_id] == 4)
        return m.encode(m.new(f"{GRIPPER_COMMAND}_GetResult_Response", self.goals[goal_id], result))

    def cancel_goal(self, data: bytes) -> bytes:
        info = m.decode(data, f"{CANCEL_GOAL}_Request").goal_info
        goal_id = info.goal_id.uuid.tobytes()
        running = self.goals.get(goal_id) == 2
        if running:
            self.goals[goal_id] = 5
        return m.encode(m.new(f"{CANCEL_GOAL}_Response", 0 if running else 3, [info] if running else []))


class TransportConformance:
    """Fixture `make`: a factory of transports that can reach each other; it closes them at the end."""

    # ---- topics

    def test_samples_arrive_once_in_order_and_unchanged(self, make: Make) -> None:
        got: list[bytes] = []
        qos = QosProfile(100)
        subscriber = make("listener").subscriber("/t", m.STRING, qos, lambda data, at: got.append(data))
        publisher = make("talker").publisher("/t", m.STRING, qos)
        assert wait(lambda: publisher.matched == 1 and subscriber.matched == 1)
        time.sleep(0.2)  # a volatile subscription takes part from the publisher's first heartbeat on
        for k in range(50):
            publisher.write(m.string(f"sample {k}"))
            time.sleep(0.002)
        assert wait(lambda: len(got) == 50)
        assert [m.read_string(data) for data in got] == [f"sample {k}" for k in range(50)]

    def test_the_receive_time_is_monotonic_now(self, make: Make) -> None:
        got: list[int] = []
        make("listener").subscriber("/t", m.JOINT_STATE, DEFAULT, lambda data, at: got.append(at))
        publisher = make("talker").publisher("/t", m.JOINT_STATE, DEFAULT)
        assert wait(lambda: publisher.matched == 1)
        before = time.monotonic_ns()
        publisher.write(SAMPLE)
        assert wait(lambda: bool(got))
        assert before <= got[0] <= time.monotonic_ns()

    def test_a_node_hears_itself(self, make: Make) -> None:
        node, got = make("alone"), []
        node.subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
        publisher = node.publisher("/t", m.STRING, DEFAULT)
        assert wait(lambda: publisher.matched == 1)
        publisher.write(m.string("x"))
        assert wait(lambda: len(got) == 1)

    def test_every_subscription_of_a_topic_gets_every_sample(self, make: Make) -> None:
        got: list[list[bytes]] = [[], [], []]
        one, two = make("one"), make("two")
        for node, inbox in ((one, got[0]), (one, got[1]), (two, got[2])):
            node.subscriber("/t", m.STRING, DEFAULT, lambda data, at, inbox=inbox: inbox.append(data))
        publisher = make("talker").publisher("/t", m.STRING, DEFAULT)
        assert wait(lambda: publisher.matched == 3)
        publisher.write(m.string("x"))
        assert wait(lambda: [len(inbox) for inbox in got] == [1, 1, 1])

    def test_a_late_subscription_gets_what_is_latched_to_its_depth(self, make: Make) -> None:
        sender = make("talker")
        profiles = {"/one": LATCHED, "/many": EVENTS, "/three": QosProfile(3, latched=True), "/volatile": DEFAULT}
        for topic, qos in profiles.items():
            publisher = sender.publisher(topic, m.STRING, qos)
            for k in range(5):
                publisher.write(m.string(str(k)))
        got: dict[str, list[str]] = {topic: [] for topic in profiles}
        receiver = make("listener")
        for topic, qos in profiles.items():
            receiver.subscriber(topic, m.STRING, qos, lambda d, _, topic=topic: got[topic].append(m.read_string(d)))
        late_volatile: list[bytes] = []
        # Of another process: beside one that gets them, DDS may hand it the old samples too.
        make("latecomer").subscriber("/many", m.STRING, DEFAULT, lambda data, at: late_volatile.append(data))
        assert wait(lambda: [len(got[t]) for t in ("/one", "/many", "/three")] == [1, 5, 3])
        assert got["/one"] == ["4"]
        assert got["/many"] == [str(k) for k in range(5)]
        assert got["/three"] == ["2", "3", "4"]
        assert got["/volatile"] == late_volatile == []

    def test_a_large_image_arrives_whole(self, make: Make) -> None:
        got: list[bytes] = []
        make("viewer").subscriber("/image", m.IMAGE, DEFAULT, lambda data, at: got.append(data))
        publisher = make("camera").publisher("/image", m.IMAGE, DEFAULT)
        assert wait(lambda: publisher.matched == 1)
        pixels = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
        publisher.write(m.image(7, "camera", pixels))
        assert wait(lambda: len(got) == 1)
        stamp, read = m.read_image(got[0])
        assert stamp == 7
        np.testing.assert_array_equal(read, pixels)

    def test_a_callback_that_raises_is_logged_and_the_next_sample_comes(
        self, make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        got: list[str] = []

        def callback(data: bytes, received_ns: int) -> None:
            got.append(m.read_string(data))
            if got[-1] == "bad":
                raise ValueError("a fault of the test")

        receiver = make("listener")
        receiver.subscriber("/t", m.STRING, DEFAULT, callback)
        other: list[bytes] = []
        receiver.subscriber("/other", m.STRING, DEFAULT, lambda data, at: other.append(data))
        sender = make("talker")
        publisher, second = (sender.publisher(topic, m.STRING, DEFAULT) for topic in ("/t", "/other"))
        assert wait(lambda: publisher.matched == 1 and second.matched == 1)
        with caplog.at_level(logging.ERROR):
            for text in ("bad", "good"):
                publisher.write(m.string(text))
                assert wait(lambda text=text: got[-1:] == [text])
            second.write(m.string("x"))
            assert wait(lambda: len(other) == 1)
        assert "callback of /t" in caplog.text
        assert "a fault of the test" in caplog.text

    def test_publishing_from_several_threads_loses_nothing(self, make: Make) -> None:
        got: list[str] = []
        make("listener").subscriber("/t", m.STRING, EVENTS, lambda data, at: got.append(m.read_string(data)))
        publisher = make("talker").publisher("/t", m.STRING, EVENTS)
        assert wait(lambda: publisher.matched == 1)

        def send(thread: int) -> None:
            for k in range(15):
                publisher.write(m.string(f"{thread} {k}"))
                time.sleep(0.002)

        threads = [threading.Thread(target=send, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wait(lambda: len(got) == 60)
        assert set(got) == {f"{t} {k}" for t in range(4) for k in range(15)}
        for t in range(4):
            assert [text for text in got if text.startswith(f"{t} ")] == [f"{t} {k}" for k in range(15)]

    def test_unknown_types_and_bad_names_are_refused(self, make: Make) -> None:
        node = make("node")
        with pytest.raises(InputError, match=r"no message type.*JointState"):
            node.publisher("/x", "sensor_msgs/msg/JointStates", DEFAULT)
        with pytest.raises(InputError, match="no message type"):
            node.call("/x", "std_srvs/srv/Nonsense", b"", 0.1)
        for name in ("/a//b", "/a/", "/1a", "/a b", "~/x/", ""):
            with pytest.raises(ConfigError, match="is no topic or service name"):
                node.publisher(name, m.STRING, DEFAULT)
        with pytest.raises(ConfigError, match="no node name"):
            make("1bad")
        with pytest.raises(ConfigError, match="namespace"):
            make("good", namespace="bad/../worse")

    def test_namespaces_and_private_names(self, make: Make) -> None:
        arm, got = make("arm", namespace="/left/robot"), []
        listener = make("listener")
        for name in ("/left/robot/joints", "/left/robot/arm/state", "/absolute"):
            listener.subscriber(name, m.STRING, DEFAULT, lambda data, at, name=name: got.append(name))
        publishers = [arm.publisher(name, m.STRING, DEFAULT) for name in ("joints", "~/state", "/absolute")]
        assert [p.topic for p in publishers] == ["/left/robot/joints", "/left/robot/arm/state", "/absolute"]
        assert wait(lambda: all(p.matched == 1 for p in publishers))
        for publisher in publishers:
            publisher.write(m.string("x"))
        assert wait(lambda: len(got) == 3)
        assert wait(lambda: "/left/robot/arm" in listener.graph().nodes)

    # ---- who matches whom

    def test_matched_counts_follow_what_comes_and_goes(self, make: Make) -> None:
        publisher = make("talker").publisher("/t", m.STRING, COMMAND)
        assert publisher.matched == 0
        one, two = make("one"), make("two")
        first = one.subscriber("/t", m.STRING, LATEST, ignore)
        two.subscriber("/t", m.STRING, LATEST, ignore)
        assert wait(lambda: publisher.matched == 2 and first.matched == 1)
        two.close()
        assert wait(lambda: publisher.matched == 1, 2.0)

    def test_a_subscription_that_only_counts_holds_nothing_up(self, make: Make) -> None:
        got: list[bytes] = []
        listener, talker = make("listener"), make("talker")
        counting = listener.subscriber("/t", m.STRING, LATEST, None)
        own = talker.subscriber("/t", m.STRING, LATEST, None)
        listener.subscriber("/t", m.STRING, QosProfile(100), lambda data, at: got.append(data))
        publisher = talker.publisher("/t", m.STRING, QosProfile(100))
        assert wait(lambda: publisher.matched == 3 and counting.matched == own.matched == 1)
        time.sleep(0.2)
        for k in range(50):
            publisher.write(m.string(str(k)))
            time.sleep(0.002)
        assert wait(lambda: len(got) == 50)
        make("rival").publisher("/t", m.STRING, DEFAULT)
        assert wait(lambda: counting.matched == own.matched == 2)

    def test_incompatible_endpoints_stay_silent_and_both_say_so(self, make: Make) -> None:
        got: list[bytes] = []
        receiver, sender = make("listener"), make("talker")
        receiver.subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
        publisher = sender.publisher("/t", m.STRING, SENSOR_DATA)

        def named() -> bool:
            lines = [line for node in (receiver, sender) for line in node.problems()]
            return len(lines) == 2 and all("/talker" in line and "/listener" in line for line in lines)

        assert wait(named)
        publisher.write(m.string("x"))
        time.sleep(0.05)
        assert (got, publisher.matched) == ([], 0)
        for node in (receiver, sender):
            (line,) = node.problems()
            assert line.startswith("/t: the publisher offers best effort, the subscription requests reliable (")
            assert "/talker: best effort, volatile, keep last 5" in line
            assert "/listener: reliable, volatile, keep last 10" in line

    def test_a_subscription_that_wants_what_is_latched_meets_a_volatile_publisher(self, make: Make) -> None:
        receiver, sender = make("listener"), make("talker")
        subscriber = receiver.subscriber("/t", m.STRING, LATCHED, ignore)
        sender.publisher("/t", m.STRING, COMMAND)
        assert wait(lambda: bool(receiver.problems()))
        assert "transient local" in receiver.problems()[0]
        assert subscriber.matched == 0

    def test_a_problem_ends_with_its_cause(self, make: Make) -> None:
        receiver, rival = make("listener"), make("rival")
        receiver.subscriber("/t", m.STRING, DEFAULT, ignore)
        rival.publisher("/t", m.STRING, SENSOR_DATA)
        assert wait(lambda: bool(receiver.problems()))
        rival.close()
        assert wait(lambda: not receiver.problems(), 3.0)
        publisher = make("talker").publisher("/t", m.STRING, DEFAULT)
        assert wait(lambda: publisher.matched == 1)
        assert receiver.problems() == []

    def test_two_types_under_one_name_are_a_problem(self, make: Make) -> None:
        receiver, sender = make("listener"), make("talker")
        receiver.subscriber("/t", m.STRING, DEFAULT, ignore)
        publisher = sender.publisher("/t", m.BOOL, DEFAULT)
        assert wait(lambda: bool(receiver.problems()))
        assert (
            "the publisher sends std_msgs/msg/Bool, the subscription expects std_msgs/msg/String"
            in (receiver.problems()[0])
        )
        assert publisher.matched == 0

    # ---- the graph

    def test_the_graph_names_nodes_endpoints_profiles_and_services(self, make: Make) -> None:
        arm, viewer = make("arm", namespace="/left"), make("viewer")
        arm.publisher("/joint_states", m.JOINT_STATE, QosProfile(7))
        arm.subscriber("/command", m.JOINT_TRAJECTORY, LATEST, ignore)
        arm.service("~/stop", m.TRIGGER, lambda request: commands.outcome(True, ""))

        def known() -> bool:
            graph = viewer.graph()
            mine = [end for end in graph.endpoints if end.node == "/left/arm"]
            served = "/left/arm/stop" in [service.name for service in graph.services]
            return {"/left/arm", "/viewer"} <= set(graph.nodes) and len(mine) >= 2 and served

        assert wait(known)
        graph = viewer.graph()
        (states,) = [end for end in graph.endpoints if end.topic == "/joint_states"]
        assert (states.message_type, states.node, states.publishes) == (m.JOINT_STATE, "/left/arm", True)
        assert (states.qos.reliable, states.qos.latched) == (True, False)
        assert states.type_hash in ("", m.type_hash(m.JOINT_STATE))
        (command,) = [end for end in graph.endpoints if end.topic == "/command"]
        assert (command.publishes, command.qos.reliable) == (False, False)
        assert ("/left/arm/stop", m.TRIGGER) in [(s.name, s.service_type) for s in graph.services]
        arm.close()
        assert wait(lambda: viewer.graph().nodes == ("/viewer",), 5.0)
        assert [end for end in viewer.graph().endpoints if end.topic == "/joint_states"] == []

    # ---- services

    def test_service_round_trips(self, make: Make) -> None:
        server, client = make("server"), make("client")
        asked: list[bool] = []

        def answer(request: bytes) -> bytes:
            asked.append(commands.read_set_bool_request(request))
            return commands.outcome(asked[-1], f"call {len(asked)}")

        server.service("/switch", m.SET_BOOL, answer)
        for k, value in enumerate((True, False, True)):
            response = client.call("/switch", m.SET_BOOL, commands.set_bool_request(value), 10.0)
            assert commands.read_outcome(response) == (value, f"call {k + 1}")
        assert asked == [True, False, True]

    def test_two_clients_at_once_get_their_own_answers(self, make: Make) -> None:
        def echo(request: bytes) -> bytes:
            time.sleep(0.02)  # so that both clients wait for the same sequence number
            return commands.outcome(commands.read_set_bool_request(request), "")

        make("server").service("/echo", m.SET_BOOL, echo)
        results: dict[bool, list[bool]] = {True: [], False: []}

        def ask(node: Any, value: bool) -> None:
            for _ in range(10):
                answer = node.call("/echo", m.SET_BOOL, commands.set_bool_request(value), 10.0)
                results[value].append(commands.read_outcome(answer)[0])

        threads = [threading.Thread(target=ask, args=(make(f"client_{v}"), v)) for v in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert results == {True: [True] * 10, False: [False] * 10}

    def test_a_call_without_a_server_ends_in_time(self, make: Make) -> None:
        client, started = make("client"), time.monotonic()
        with pytest.raises(TransportError, match="/nobody: no "):
            client.call("/nobody", m.TRIGGER, commands.trigger_request(), 0.3)
        assert time.monotonic() - started < 2.0

    def test_a_slow_or_failing_server_ends_in_time(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        server, client = make("server"), make("client")

        def slow(request: bytes) -> bytes:
            time.sleep(1.2)
            return commands.outcome(True, "")

        def failing(request: bytes) -> bytes:
            raise ValueError("a fault of the test")

        server.service("/slow", m.TRIGGER, slow)
        server.service("/failing", m.TRIGGER, failing)
        server.service("/well", m.TRIGGER, lambda request: commands.outcome(True, "well"))
        assert commands.read_outcome(client.call("/well", m.TRIGGER, commands.trigger_request(), 10.0)) == (
            True,
            "well",
        )
        for name in ("/slow", "/failing"):
            with pytest.raises(TransportError, match=f"{name}: no answer within 0.8 s"):
                client.call(name, m.TRIGGER, commands.trigger_request(), 0.8)
        assert "handler of /failing" in caplog.text
        # The server outlives both.
        assert commands.read_outcome(client.call("/well", m.TRIGGER, commands.trigger_request(), 10.0)) == (
            True,
            "well",
        )

    def test_a_service_of_another_type_does_not_answer(self, make: Make) -> None:
        make("server").service("/switch", m.SET_BOOL, lambda request: commands.outcome(True, ""))
        with pytest.raises(TransportError, match="/switch: no "):
            make("client").call("/switch", m.TRIGGER, commands.trigger_request(), 0.4)

    def test_an_action_is_sent_followed_and_cancelled(self, make: Make) -> None:
        gripper, told = Gripper(make("gripper")), []
        client = ActionClient(
            make("client"), "/grip", GRIPPER_COMMAND, lambda goal_id, feedback: told.append((goal_id, feedback.effort))
        )
        result = client.run(gripper_goal(0.0, 5.0), 10.0)
        assert (result.position, result.reached_goal) == (0.0, True)
        with pytest.raises(TransportError, match="/grip rejected the goal"):
            client.send_goal(gripper_goal(-1.0, 5.0), 5.0)
        goal_id = client.send_goal(gripper_goal(0.08, 6.0), 5.0)
        assert wait(lambda: (goal_id, 6.0) in told)
        with pytest.raises(TransportError, match="no answer"):
            client.get_result(goal_id, 0.2)
        assert client.cancel(goal_id, 5.0)
        assert client.get_result(goal_id, 5.0)[0] == "canceled"
        assert not client.cancel(goal_id, 5.0)
        with pytest.raises(TransportError, match="no answer"):
            client.run(gripper_goal(0.04, 7.0), 0.4)
        assert list(gripper.goals.values()) == [4, 5, 5]  # what runs out of time is cancelled

    # ---- parameters

    def test_parameters_are_listed_read_and_set(self, make: Make) -> None:
        values = {
            "rate": 10.0,
            "count": 3,
            "use_sim_time": False,
            "name": "arm",
            "joints": ["a", "b"],
            "limits.velocity": [1.0, 2.0],
        }
        refused = {"rate": "must be below 100"}
        node = make("server", namespace="/ns")
        live = node.parameters(values, lambda name, value: refused[name] if name in refused and value > 100 else "")
        assert dict(live) == values
        client, owner = make("client"), "/ns/server"
        assert parameters.get_remote(client, owner, [*values, "absent"], 10.0) == [*values.values(), None]
        answers = parameters.set_remote(
            client, owner, {"rate": 50.0, "count": 1.5, "absent": 1, "joints": ["c"], "use_sim_time": True}, 10.0
        )
        assert answers == {
            "rate": "",
            "count": "'count' is of type integer, not double",
            "absent": "the node has no parameter 'absent'",
            "joints": "",
            "use_sim_time": "",
        }
        assert (live["rate"], live["count"], live["joints"]) == (50.0, 3, ["c"])
        assert parameters.set_remote(client, owner, {"rate": 200.0}, 10.0) == {"rate": "must be below 100"}
        assert live["rate"] == 50.0

        def ask(name: str, *fields: Any) -> Any:
            kind = "rcl_interfaces/srv/" + "".join(word.capitalize() for word in name.split("_"))
            data = client.call(f"{owner}/{name}", kind, m.encode(m.new(f"{kind}_Request", *fields)), 10.0)
            return m.decode(data, f"{kind}_Response")

        listed = ask("list_parameters", [], 0).result
        assert (sorted(listed.names), listed.prefixes) == (sorted(values), ["limits"])
        assert ask("list_parameters", ["limits"], 0).result.names == ["limits.velocity"]
        assert "limits.velocity" not in ask("list_parameters", [], 1).result.names
        assert list(ask("get_parameter_types", ["rate", "joints", "absent"]).types) == [3, 9, 0]
        described = ask("describe_parameters", ["count"]).descriptors[0]
        assert (described.name, described.type, described.read_only) == ("count", 2, False)
        wanted = [
            m.new("rcl_interfaces/msg/Parameter", name, parameters.to_message(value))
            for name, value in (("count", 9), ("absent", 1))
        ]
        result = ask("set_parameters_atomically", wanted).result
        assert (result.successful, live["count"]) == (False, 3)  # all or none
        assert ask("set_parameters_atomically", wanted[:1]).result.successful
        assert live["count"] == 9

    def test_parameters_without_a_listener_are_read_only(self, make: Make) -> None:
        make("server").parameters({"rate": 10.0})
        answer = parameters.set_remote(make("client"), "/server", {"rate": 5.0}, 10.0)
        assert answer == {"rate": "'rate' cannot be changed while the node runs"}
        with pytest.raises(ConfigError, match="a parameter is bool"):
            make("other").parameters({"bad": {"a": 1}})

    # ---- leaving

    def test_closing_is_noticed_and_the_name_can_come_back(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        got: list[str] = []
        make("listener").subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(m.read_string(data)))
        for text in ("first", "second"):
            node = make("talker")
            publisher = node.publisher("/t", m.STRING, DEFAULT)
            assert wait(lambda publisher=publisher: publisher.matched == 1)
            publisher.write(m.string(text))
            assert wait(lambda text=text: got[-1:] == [text])
            node.close()
            node.close()
        assert got == ["first", "second"]
        assert "Traceback" not in caplog.text  # what a leaving publisher leaves behind is no sample

    def test_a_node_that_has_left_sends_nothing(self, make: Make) -> None:
        got: list[bytes] = []
        make("listener").subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
        node = make("talker")
        publisher = node.publisher("/t", m.STRING, DEFAULT)
        assert wait(lambda: publisher.matched == 1)
        node.close()
        with pytest.raises(TransportError):
            publisher.write(m.string("x"))
        time.sleep(0.05)
        assert got == []

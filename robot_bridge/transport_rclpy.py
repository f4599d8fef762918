"""A sourced ROS 2 installation as a transport: Humble to the newest, whatever its middleware.

rclpy is used as a carrier of bytes: publishers take serialized samples, subscriptions are raw, and requests pass
through its serializer. So messages, safety and recorder are the same as over Cyclone DDS, and services work with every
middleware, rmw_fastrtps included. rclpy is no package of PyPI; it comes with ROS 2 and is imported in here only.
"""

# pyright: reportMissingImports=false

import atexit
import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from embodied.contracts.errors import ConfigError, InputError, TransportError
from embodied.robot_bridge import messages, parameters
from embodied.robot_bridge.dds_domain import MAX_DOMAIN, default_domain
from embodied.robot_bridge.qos import SERVICES, QosProfile, incompatibility
from embodied.robot_bridge.ros_installation import environment_of, from_ros, import_rclpy, interface, to_ros
from embodied.robot_bridge.transport import Endpoint, Graph, Service, full_name, mismatch, resolve, unread

log = logging.getLogger(__name__)
Callback = Callable[[bytes, int], None]
Handler = Callable[[bytes], bytes]

BATCH = 100  # samples that one subscription takes in a turn, so that it holds no other up
NO_NODE = "_NODE_NAME_UNKNOWN_", "_CREATED_BY_BARE_DDS_APP_"  # what rclpy calls the owner of a bare endpoint


class _Unanswered(Exception):
    """Ends a request whose handler failed, so that its client gets no answer rather than a wrong one."""


class RclpyPublisher:
    """One publisher; `matched` counts the subscriptions it reaches."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.topic, self.endpoint, self.incompatible = endpoint.topic, endpoint, ""
        self.entity: Any = None  # None again when its node has left

    @property
    def matched(self) -> int:
        return self.entity.get_subscription_count() if self.entity else 0

    def write(self, data: bytes) -> None:
        """Send CDR bytes. Raises TransportError if they are no sample of the topic's type."""
        try:
            messages.decode(data, self.endpoint.message_type)  # the middleware would send anything
        except InputError as error:
            raise TransportError(f"{self.topic}: refused a sample of {error}") from None
        try:
            self.entity.publish(data)  # type: ignore[union-attr]
        except Exception as error:  # InvalidHandle, whose module differs between distributions: the node has left
            raise TransportError(f"{self.topic}: {error}") from None


class RclpySubscriber:
    """One subscription; `matched` counts the publishers that reach it."""

    def __init__(self, endpoint: Endpoint, callback: Callback, offers: Callable[[str], list[QosProfile]]) -> None:
        self.topic, self.endpoint, self.incompatible = endpoint.topic, endpoint, ""
        self.entity: Any = None  # None again when its node has left
        self._callback, self._offers = callback, offers

    @property
    def matched(self) -> int:
        if self.entity is None:
            return 0
        if hasattr(self.entity, "get_publisher_count"):
            return self.entity.get_publisher_count()
        return sum(not incompatibility(offer, self.endpoint.qos) for offer in self._offers(self.topic))  # Humble

    def receive(self, data: bytes) -> None:
        """rclpy's callback. rclpy hands out one sample per turn, and a turn costs more than a sample: take the rest."""
        self._hand_on(data)
        entity = self.entity
        if entity is None:
            return
        with entity.handle:
            for _ in range(BATCH):
                taken = entity.handle.take_message(entity.msg_type, True)
                if taken is None:
                    return
                self._hand_on(taken[0])

    def _hand_on(self, data: bytes) -> None:
        received = time.monotonic_ns()
        try:
            self._callback(data, received)
        except Exception:
            log.exception("callback of %s", self.topic)


class _Worker:
    """Answers the requests of one service on a thread of its own, while the node's thread goes on."""

    def __init__(self, name: str, service_type: str, handler: Handler, new_future: Callable[[], Any]) -> None:
        self._name, self._type, self._handler, self._new_future = name, service_type, handler, new_future
        self._waiting: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"service {name}", daemon=True)
        self._thread.start()

    async def answer(self, request: Any, _: Any) -> Any:
        """rclpy's callback of the service."""
        future = self._new_future()
        self._waiting.put((request, future))
        response = await future
        if response is None:
            raise _Unanswered
        return response

    def _work(self) -> None:
        from rclpy.serialization import deserialize_message, serialize_message

        response_class = interface(self._type).Response
        while (work := self._waiting.get()) is not None:
            request, future = work
            response = None
            try:
                data = self._handler(bytes(serialize_message(request)))
                messages.decode(data, f"{self._type}_Response")
                response = deserialize_message(data, response_class)
            except Exception:
                log.exception("handler of %s", self._name)
            future.set_result(response)
            future.wake()

    def end(self) -> None:
        self._waiting.put(None)


class RclpyTransport:
    """One node of a ROS 2 installation; the interface of `embodied.contracts.protocols.Transport`.

    The node spins on a thread of its own; callbacks run there: enqueue only.

    Args:
        node: node name as `ros2 node list` shows it.
        domain: ROS domain, 0 to 232; None takes ROS_DOMAIN_ID.
        discovery: `localhost` (nothing leaves the host) or `subnet` (as the ROS environment says).
    """

    services = True

    def __init__(
        self, node: str, domain: int | None = None, discovery: str = "localhost", namespace: str = "/"
    ) -> None:
        self.full_name = full_name(node, namespace)
        self.node, self.namespace = node, namespace
        self.domain = default_domain() if domain is None else domain
        if not 0 <= self.domain <= MAX_DOMAIN:
            raise ConfigError(f"ROS domain {self.domain} is out of range; it must be from 0 to {MAX_DOMAIN}.")
        rclpy = import_rclpy()
        from rclpy.callback_groups import ReentrantCallbackGroup
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.signals import SignalHandlerOptions

        self._context = rclpy.context.Context()
        humble = importlib.util.find_spec("rclpy.event_handler") is None
        with environment_of(discovery, humble):
            # Neither the command line nor SIGINT is rclpy's: the process parses its flags and ends in its own order.
            no_signals = SignalHandlerOptions.NO
            rclpy.init(args=[], context=self._context, domain_id=self.domain, signal_handler_options=no_signals)
            self._ros = rclpy.create_node(
                node,
                context=self._context,
                namespace=namespace,
                use_global_arguments=False,
                start_parameter_services=False,  # ours, `parameters`, are the same over every transport
            )
        self._publishers: list[RclpyPublisher] = []
        self._subscribers: list[RclpySubscriber] = []
        self._workers: list[_Worker] = []
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock, self._closing = threading.Lock(), False
        self._replies = ReentrantCallbackGroup()
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._ros)
        self._thread = threading.Thread(target=self._spin, name=f"rclpy-{node}", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a process that ends with a thread of the middleware running is aborted

    def _spin(self) -> None:
        while not self._closing:
            try:
                self._executor.spin_once()
            except _Unanswered:
                continue
            except Exception:
                if not self._closing:
                    log.exception("node %s", self.full_name)
                    time.sleep(0.01)

    def _check_open(self) -> None:
        if self._closing:
            raise TransportError(f"node {self.full_name} has left the graph.")

    def _endpoint(self, topic: str, message_type: str, publishes: bool, qos: QosProfile) -> Endpoint:
        self._check_open()
        name = resolve(topic, self.node, self.namespace)
        messages.message_class(message_type)  # says which name is wrong
        return Endpoint(name, message_type, self.full_name, publishes, qos, messages.type_hash(message_type))

    def publisher(self, topic: str, message_type: str, qos: QosProfile) -> RclpyPublisher:
        publisher = RclpyPublisher(self._endpoint(topic, message_type, True, qos))
        publisher.entity = self._ros.create_publisher(
            interface(message_type), publisher.topic, to_ros(qos), event_callbacks=_events(publisher)
        )
        self._publishers.append(publisher)
        return publisher

    def subscriber(self, topic: str, message_type: str, qos: QosProfile, callback: Callback | None) -> RclpySubscriber:
        endpoint = self._endpoint(topic, message_type, False, qos)
        subscriber = RclpySubscriber(endpoint, callback or unread, self._offers)
        subscriber.entity = self._ros.create_subscription(
            interface(message_type),
            subscriber.topic,
            subscriber.receive,
            to_ros(qos),
            raw=True,
            event_callbacks=_events(subscriber),
        )
        self._subscribers.append(subscriber)
        return subscriber

    def _offers(self, topic: str) -> list[QosProfile]:
        return [from_ros(info.qos_profile) for info in self._ros.get_publishers_info_by_topic(topic)]

    def service(self, name: str, service_type: str, handler: Handler) -> None:
        from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
        from rclpy.task import Future

        self._check_open()
        messages.message_class(f"{service_type}_Request")
        name = resolve(name, self.node, self.namespace)

        def new_future() -> Any:
            future = Future(executor=self._executor)
            future.wake = self._executor.wake
            return future

        worker = _Worker(name, service_type, handler, new_future)
        self._workers.append(worker)
        # A group of its own: one request at a time, and what waits for its answer holds nothing else up.
        group = MutuallyExclusiveCallbackGroup()
        kind = interface(service_type)
        self._ros.create_service(kind, name, worker.answer, qos_profile=to_ros(SERVICES), callback_group=group)

    def call(self, name: str, service_type: str, request: bytes, timeout_s: float) -> bytes:
        from rclpy.serialization import deserialize_message, serialize_message

        self._check_open()
        if threading.current_thread() is self._thread:
            raise TransportError(
                f"{name}: a service cannot be called from a topic's callback, which would wait on itself."
            )
        deadline = time.monotonic() + timeout_s
        name = resolve(name, self.node, self.namespace)
        messages.message_class(f"{service_type}_Request")  # says which name is wrong
        messages.decode(request, f"{service_type}_Request")
        kind = interface(service_type)
        with self._lock:
            if (name, service_type) not in self._clients:
                qos, group = to_ros(SERVICES), self._replies
                client = self._ros.create_client(kind, name, qos_profile=qos, callback_group=group)
                self._clients[name, service_type] = client
            client = self._clients[name, service_type]
        while not client.service_is_ready():
            if time.monotonic() > deadline:
                raise TransportError(f"{name}: no node serves {service_type}.")
            time.sleep(0.002)
        answered = threading.Event()
        future = client.call_async(deserialize_message(request, kind.Request))
        future.add_done_callback(lambda _: answered.set())
        if not answered.wait(max(0.0, deadline - time.monotonic())):
            client.remove_pending_request(future)
            raise TransportError(f"{name}: no answer within {timeout_s:g} s.")
        return bytes(serialize_message(future.result()))

    def parameters(self, values: Mapping[str, Any], on_set: parameters.OnSet | None = None) -> Mapping[str, Any]:
        return parameters.serve(self, values, on_set)

    def graph(self) -> Graph:
        if self._closing:
            return Graph((), ())
        named = [(name, space) for name, space in self._ros.get_node_names_and_namespaces() if name not in NO_NODE]
        ends: list[Endpoint] = []
        for topic, _ in self._ros.get_topic_names_and_types():
            ends += [_endpoint_of(topic, info, True) for info in self._ros.get_publishers_info_by_topic(topic)]
            ends += [_endpoint_of(topic, info, False) for info in self._ros.get_subscriptions_info_by_topic(topic)]
        offered = [s for name, space in sorted(set(named)) for s in self._services_of(name, space)]
        nodes = sorted(_join(name, space) for name, space in named)
        return Graph(tuple(nodes), tuple(ends), tuple(offered))

    def _services_of(self, name: str, namespace: str) -> list[Service]:
        from rclpy.node import NodeNameNonExistentError

        try:
            found = self._ros.get_service_names_and_types_by_node(name, namespace)
        except NodeNameNonExistentError:  # gone since it was listed
            return []
        return [Service(service, kind, _join(name, namespace)) for service, kinds in found for kind in kinds]

    def problems(self) -> list[str]:
        if self._closing:
            return []
        ends = self.graph().endpoints
        found: list[str] = []
        for mine in (*self._publishers, *self._subscribers):
            others = [e for e in ends if e.topic == mine.topic and e.publishes != mine.endpoint.publishes]
            pairs = [(mine.endpoint, other) if mine.endpoint.publishes else (other, mine.endpoint) for other in others]
            reasons = [_reason(*pair) for pair in pairs]
            found += [mismatch(*pair, reason) for pair, reason in zip(pairs, reasons, strict=True) if reason]
            if mine.incompatible and reasons.count("") > mine.matched:
                # The graph names no cause; the middleware counted one.
                found.append(f"{mine.topic}: another endpoint does not match in its {mine.incompatible}")
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Leave the graph; peers notice at once."""
        if self._closing:
            return
        self._closing = True
        for end in (*self._publishers, *self._subscribers):
            end.entity = None
        self._executor.shutdown(timeout_sec=3)
        self._thread.join(timeout=3)
        for worker in self._workers:
            worker.end()
        self._ros.destroy_node()
        self._context.try_shutdown()
        atexit.unregister(self.close)


def _events(end: RclpyPublisher | RclpySubscriber) -> Any:
    """Callbacks that note over which policy a peer of `end` was refused."""
    from rclpy.qos import qos_policy_name_from_kind

    def refused(event: Any) -> None:
        end.incompatible = qos_policy_name_from_kind(event.last_policy_kind).lower().removesuffix("_qos_policy")

    try:
        from rclpy import event_handler as events
    except ImportError:  # Humble
        from rclpy import qos_event as events
    publishes = isinstance(end, RclpyPublisher)
    kind = events.PublisherEventCallbacks if publishes else events.SubscriptionEventCallbacks
    return kind(incompatible_qos=refused, use_default_callbacks=False)


def _join(name: str, namespace: str) -> str:
    return f"{namespace.rstrip('/')}/{name}"


def _endpoint_of(topic: str, info: Any, publishes: bool) -> Endpoint:
    node = "" if info.node_name in NO_NODE else _join(info.node_name, info.node_namespace)
    type_hash = str(getattr(info, "topic_type_hash", ""))
    return Endpoint(
        topic,
        info.topic_type,
        node,
        publishes,
        from_ros(info.qos_profile),
        type_hash if type_hash.startswith("RIHS01_") else "",
    )


def _reason(publisher: Endpoint, subscription: Endpoint) -> str:
    if publisher.message_type != subscription.message_type:
        return f"the publisher sends {publisher.message_type}, the subscription expects {subscription.message_type}"
    return incompatibility(publisher.qos, subscription.qos)

"""The seams between rooms. A new labeller, learner, policy or transport is one new file that satisfies one of these."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embodied.contracts.batch import Batch, Metrics
from embodied.contracts.specs import ActionSpec, ArraySpec


class Labeller(Protocol):
    """Scores frames: CLIP, preference model, value, ..."""

    def score(self, frames: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B,) float32, one score per frame, independent of the batch they came in."""
        ...


class Policy(Protocol):
    """What `sim` evaluates and `robot_bridge` runs."""

    observation_spec: dict[str, ArraySpec]
    image_spec: dict[str, ArraySpec]
    action_spec: ActionSpec
    control_dt: float

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """One step's action chunk.

        Args:
            observation: keys of `observation_spec`, and `images/<camera>` uint8 (H, W, 3).

        Returns:
            (chunk, A) in [-1, 1]; the first row is for now.
        """
        ...


@runtime_checkable
class EpisodicPolicy(Policy, Protocol):
    """A policy that remembers what it saw in an episode, or wants more than one action of a chunk executed.

    Attributes:
        execute: actions of a chunk to execute before the next question.
    """

    execute: int

    def reset(self) -> None:
        """A new episode begins."""
        ...

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """A step at which `act` is not asked, because a former chunk covers it."""
        ...


@runtime_checkable
class GoalPolicy(Policy, Protocol):
    """A policy that may have to be told what to reach.

    Attributes:
        goal_spec: key -> spec of what a goal is made of; empty where it needs none.
        goals_given: how many goals it has been given to choose from.
    """

    goal_spec: dict[str, ArraySpec]

    @property
    def goals_given(self) -> int: ...

    def choose_goal(self, number: int) -> None:
        """Of the goals given, counted round and round, this one."""
        ...


class Learner(Protocol):
    """One algorithm, one file. All tensors carry a leading stack axis S (seeds)."""

    def update(self, batch: Batch) -> Metrics:
        """One gradient step. Metrics are tensors of shape (S,), left on the device."""
        ...

    def actor_state(self, index: int) -> dict[str, Any]:
        """The actor of one seed, by its position in the stack, as a policy bundle keeps it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs to go on exactly: parameters, optimiser moments, step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Publisher(Protocol):
    @property
    def matched(self) -> int:
        """How many subscriptions it reaches."""
        ...

    def write(self, data: bytes) -> None:
        """Send one sample, from any thread. Raises EmbodiedError if the bytes are no sample of the topic's type."""
        ...


class Subscriber(Protocol):
    @property
    def matched(self) -> int:
        """How many publishers reach it."""
        ...


class Transport(Protocol):
    """One node on a graph of nodes. Carries CDR bytes and knows no message class.

    Names are ROS names: absolute (`/a/b`), relative to the node's namespace (`b`) or private to the node (`~/b`).
    Quality of service and graph are `QosProfile` and `Graph` of `embodied.robot_bridge`.
    Callbacks run on the transport's own thread: enqueue only. One that raises is logged, and the next sample comes.

    Attributes:
        node: the node's name.
        namespace: its namespace, `/` or `/a/b`.
        services: False if `service`, `call` and `parameters` are refused.
    """

    node: str
    namespace: str
    services: bool

    def publisher(self, topic: str, message_type: str, qos: Any) -> Publisher: ...

    def subscriber(
        self, topic: str, message_type: str, qos: Any, callback: Callable[[bytes, int], None] | None
    ) -> Subscriber:
        """`callback(data, received_monotonic_ns)`; None: only who publishes counts, and what comes is not looked at."""
        ...

    def service(self, name: str, service_type: str, handler: Callable[[bytes], bytes]) -> None:
        """Answer requests: `handler(request) -> response`, one request at a time, on a thread of the service's own.

        A handler that raises is logged and leaves its client without an answer.
        """
        ...

    def call(self, name: str, service_type: str, request: bytes, timeout_s: float) -> bytes:
        """The response of a service. Not from a topic's callback.

        Raises:
            TransportError: no server, or no answer, within `timeout_s`.
        """
        ...

    def parameters(
        self, values: Mapping[str, Any], on_set: Callable[[str, Any], str] | None = None
    ) -> Mapping[str, Any]:
        """Serve the node's parameters: bool, int, float, str or a list of one of them.

        Args:
            on_set: asked before each change; "" accepts, text refuses with that reason. None: all read-only.

        Returns:
            A live view: what was set is seen here.
        """
        ...

    def graph(self) -> Any:
        """Nodes and endpoints that are known now."""
        ...

    def problems(self) -> list[str]:
        """`topic: reason` for every endpoint of this node that meets one it can never match, both profiles named."""
        ...

    def close(self) -> None:
        """Leave the graph. Twice is harmless."""
        ...

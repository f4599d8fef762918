"""Chunks on the robot: as many of their actions are executed as the bundle says, the same ones as in evaluation."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import tiny_profile
from test_policy_node import FakePolicy, Loop

from embodied.contracts.protocols import EpisodicPolicy
from embodied.robot_bridge.policy_node import PolicyNode
from embodied.robot_bridge.safety import State
from embodied.robot_bridge.transport_memory import MemoryTransport
from embodied.sim.rollout import PolicyBehaviour

LENGTH = 6


class Numbered(FakePolicy):
    """Its n-th chunk says n and the place within the chunk, in steps that the arm can follow."""

    def __init__(self, execute: int) -> None:
        super().__init__(np.zeros((1, 3)))
        self.execute, self.asked, self.observed = execute, 0, 0

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        self.asked += 1
        return np.array([[0.05 * (self.asked % 5), -0.05 * place, 1.0] for place in range(LENGTH)])

    def reset(self) -> None:
        self.asked = self.observed = 0

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        self.observed += 1


def loop_with(folder: Path, execute: int) -> tuple[Loop, Numbered]:
    """A running loop whose policy wants `execute` of 6 actions executed."""
    loop, policy = Loop(folder), Numbered(execute)
    assert isinstance(policy, EpisodicPolicy)
    loop.policy = PolicyNode(policy, tiny_profile(folder), MemoryTransport(loop.bus), loop.clock.stamp)
    return loop.start(), policy


def first_actions(loop: Loop) -> np.ndarray:
    """(T, 2) of the arm, as the first points of the chunks that went out say: targets are sums of 0.1 * action."""
    targets = np.array([chunk.positions[0][:2] for chunk in loop.chunks])
    return np.diff(np.concatenate([[[0.1, -0.2]], targets]), axis=0) / 0.1


@pytest.mark.parametrize("execute", [1, 3, LENGTH])
def test_the_robot_executes_the_actions_that_evaluation_executes(tmp_path: Path, execute: int) -> None:
    loop, policy = loop_with(tmp_path, execute)
    loop.run(2.0)
    evaluated = PolicyBehaviour(Numbered(execute))
    wanted = np.array([evaluated.act({})[:2] for _ in loop.chunks])
    assert len(wanted) >= 19
    np.testing.assert_allclose(first_actions(loop), wanted, atol=1e-6)
    assert policy.asked == -(-len(loop.chunks) // execute)
    assert policy.asked + policy.observed == len(loop.chunks)
    sizes = [len(chunk.positions) for chunk in loop.chunks]
    assert sizes == [LENGTH - i % execute for i in range(len(sizes))]
    assert loop.state is State.RUNNING
    assert loop.safety is not None
    assert loop.safety.filter.counts["rejected"] == loop.safety.filter.counts["holds"] == 0


def test_what_is_left_of_a_chunk_goes_on_from_where_the_time_is(tmp_path: Path) -> None:
    """A process that was busy for three periods leaves out the actions that passed, and asks when they were enough."""
    loop, policy = loop_with(tmp_path, 5)
    while policy.asked < 2:
        loop.run(0.01)
    node, loop.policy = loop.policy, None
    loop.run(0.3)
    loop.policy, sent = node, len(loop.chunks)
    while len(loop.chunks) == sent:
        loop.run(0.01)
    assert policy.asked == 2
    assert 2 <= len(loop.chunks[-1].positions) <= 3  # 3 or 4 of 6 passed
    while policy.asked < 3:
        loop.run(0.01)
    assert len(loop.chunks) - sent <= 3


def test_a_policy_killed_amid_a_chunk_stops_the_arm_within_300_ms(tmp_path: Path) -> None:
    loop, policy = loop_with(tmp_path, LENGTH)
    while policy.asked < 3:
        loop.run(0.01)
    loop.policy = None
    loop.run(0.3)
    assert loop.speed < 0.02


def test_a_chunk_does_not_outlast_a_hold(tmp_path: Path) -> None:
    loop, policy = loop_with(tmp_path, LENGTH)
    while policy.asked < 2:
        loop.run(0.01)
    loop.send("stop")
    loop.run(0.5)
    loop.send("reset")
    asked, sent = policy.asked, len(loop.chunks)
    loop.send("arm")
    loop.send("run")
    loop.run(0.15)
    assert asked == 2
    assert policy.asked == 1  # a new run, its first question
    assert len(loop.chunks[sent].positions) == LENGTH

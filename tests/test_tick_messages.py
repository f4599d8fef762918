"""The fast codec of the safety tick gives the general codec's bytes, and reads what that reads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.tick_messages import JointStateReader, TrajectoryWriter, diagnostics

NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
NAMES = st.lists(NAME, min_size=1, max_size=9, unique=True)
STAMP = st.integers(0, 2 * 10**18)


@settings(max_examples=150, deadline=None)
@given(NAMES, NAME, STAMP, st.integers(1, 12), st.integers(0, 2**32))
def test_trajectories_have_the_same_bytes(names: list, frame: str, stamp: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.001, 0.8, count))
    rows = rng.normal(size=(2, count, len(names)))
    writer = TrajectoryWriter(names)
    for text in ("", frame, ""):
        expected = m.joint_trajectory(m.Trajectory(stamp, text, tuple(names), times, *rows))
        assert writer.encode(stamp, text, times, *rows) == expected


@settings(max_examples=150, deadline=None)
@given(NAMES, STAMP, st.booleans(), st.integers(0, 2**32))
def test_joint_states_are_read_alike(names: list, stamp: int, with_effort: bool, seed: int) -> None:
    rng, reader = np.random.default_rng(seed), JointStateReader()
    for k in range(4):
        position, velocity = rng.normal(size=(2, len(names)))
        if k == 2:
            velocity[0] = np.nan
        if k == 3:
            velocity = np.zeros(0)
        effort = np.full(len(names), np.nan) if with_effort else np.zeros(0)
        head = m.header(stamp + k, "base" * (k % 2))
        data = m.encode(m.new(m.JOINT_STATE, head, list(names), position, velocity, effort))
        for _ in range(2):
            expected, found = m.read_joint_state(data), reader.read(data)
            assert (found.stamp_ns, found.names) == (expected.stamp_ns, expected.names)
            np.testing.assert_array_equal(found.position, expected.position)
            np.testing.assert_array_equal(found.velocity, expected.velocity)


def test_a_damaged_joint_state_is_read_or_refused_as_the_general_codec_does() -> None:
    reader, rng = JointStateReader(), np.random.default_rng(0)
    names = ("shoulder", "elbow", "finger")
    sound = m.joint_state(123, names, np.arange(3.0), np.ones(3))
    reader.read(sound)
    refused = 0
    for k in range(4000):
        data = bytearray(sound)
        for place in rng.integers(0, len(data), 1 + k % 3):
            data[place] = int(rng.integers(0, 256))
        if k % 5 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        try:
            expected = m.read_joint_state(bytes(data))
        except InputError:
            refused += 1
            with pytest.raises(InputError):
                reader.read(bytes(data))
            continue
        found = reader.read(bytes(data))
        assert (found.stamp_ns, found.names) == (expected.stamp_ns, expected.names)
        np.testing.assert_array_equal(found.position, expected.position)
        np.testing.assert_array_equal(found.velocity, expected.velocity)
    assert refused > 300


@settings(max_examples=100, deadline=None)
@given(STAMP, NAME, st.integers(0, 3), st.dictionaries(NAME, NAME, max_size=12))
def test_diagnostics_have_the_same_bytes(stamp: int, text: str, level: int, values: dict) -> None:
    assert diagnostics(stamp, "safety", level, text, values) == m.diagnostics(stamp, "safety", level, text, values)

"""The fast codec of the safety tick gives the general codec's bytes, and reads what that reads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.command_messages import float_array
from embodied.robot_bridge.tick_messages import ChunkReader, JointStateReader, TrajectoryWriter, diagnostics, read_flag

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


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**32))
def test_float_arrays_have_the_same_bytes(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(2, count))[1]
    layout = m.new("std_msgs/msg/MultiArrayLayout", [], 0)
    assert float_array(values) == m.encode(m.new(m.FLOAT_ARRAY, layout, values))


def same_trajectory(found: m.Trajectory, expected: m.Trajectory) -> None:
    assert (found.stamp_ns, found.frame_id, found.names) == (expected.stamp_ns, expected.frame_id, expected.names)
    for name in ("times", "positions", "velocities", "accelerations"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, name)


@settings(max_examples=150, deadline=None)
@given(
    NAMES, st.lists(NAME, min_size=3, max_size=3), STAMP, st.integers(0, 9), st.integers(0, 3), st.integers(0, 2**32)
)
def test_chunks_are_read_alike(names: list, frames: list, stamp: int, count: int, kinds: int, seed: int) -> None:
    rng, reader = np.random.default_rng(seed), ChunkReader()
    for frame in ("", *frames):
        times = np.cumsum(rng.uniform(0.001, 0.8, count))
        rows = rng.normal(size=(3, count, len(names)))
        rows[0, rng.uniform(size=rows.shape[1:]) < 0.1] = np.nan
        velocities, accelerations = rows[1] if kinds & 1 else None, rows[2] if kinds & 2 else None
        chunk = m.Trajectory(stamp, frame, tuple(names), times, rows[0], velocities, accelerations)
        data = m.joint_trajectory(chunk)
        same_trajectory(reader.read(data), m.read_joint_trajectory(data))
        names = names[::-1] if frame == frames[0] else names


def test_the_layout_of_a_chunk_is_read_without_the_general_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, names = ChunkReader(), ("shoulder", "elbow", "finger")
    chunks = [
        m.Trajectory(7, f"policy:run:{k}", names, np.array([0.1, 0.2]), np.full((2, 3), 0.1 * k)) for k in range(12)
    ]
    wire = [m.joint_trajectory(chunk) for chunk in chunks]
    reader.read(wire[0])
    monkeypatch.setattr(m, "read_joint_trajectory", lambda data: pytest.fail("the general codec was asked"))
    for data, chunk in zip(wire, chunks, strict=True):
        same_trajectory(reader.read(data), chunk)


def test_a_damaged_chunk_is_read_or_refused_as_the_general_codec_does() -> None:
    reader, rng = ChunkReader(), np.random.default_rng(1)
    names, frame = ("shoulder", "elbow", "finger"), "policy:run:17"
    sound = m.joint_trajectory(m.Trajectory(123, frame, names, np.array([0.1, 0.2]), np.ones((2, 3))))
    refused = 0
    for k in range(4000):
        reader.read(sound)
        data = bytearray(sound)
        for place in rng.integers(0, len(data), 1 + k % 3):
            data[place] = int(rng.integers(0, 256)) if k % 2 else int(rng.integers(0, 5))
        if k % 5 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        try:
            expected = m.read_joint_trajectory(bytes(data))
        except InputError:
            refused += 1
            with pytest.raises(InputError):
                reader.read(bytes(data))
            continue
        same_trajectory(reader.read(bytes(data)), expected)
    assert refused > 300


def test_flags_are_read_alike() -> None:
    for byte in range(256):
        for data in (bytes((0, 1, 0, 0, byte)), bytes((0, 1, 0, 0, byte, 0, 0, 0)), bytes((0, 0, 0, 0, byte))):
            assert read_flag(data) is m.read_bool(data)
    for data in (b"", bytes((0, 1, 0, 0)), bytes((0, 9, 0, 0, 1))):
        with pytest.raises(InputError):
            m.read_bool(data)
        with pytest.raises(InputError):
            read_flag(data)

"""Small stores to export: two cameras, vectors with names and units, a privileged key, several tasks and ends."""

from typing import Any

import h5py
import numpy as np

from embodied.contracts.provenance import provenance
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.labels import LabelWriter
from embodied.datasets.write_store import StoreWriter

SIDE = 32
TASKS = ("lift the cube", "open the drawer", "lift the cube")


def opened(path, mode="r") -> Any:  # h5py.File, whose items are typed as a union that no use satisfies
    return h5py.File(path, mode)


def smooth_pictures(rows, side, episode, camera):
    """Pictures that video keeps nearly as they are: slow gradients, different in every row, episode and camera."""
    x, y = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    pictures = [
        np.stack([200 * x, 200 * y, np.full_like(x, 20 + 10 * row + 3 * episode + 40 * camera)], -1)
        for row in range(rows)
    ]
    return np.array(pictures, np.uint8)


def make_spec(cameras=("front", "wrist"), reward=True, action=True, side=SIDE):
    return DatasetSpec(
        observations={
            "joint_position": ArraySpec((3,), unit="rad", names=("a", "b", "c"), low=(-3.0,) * 3, high=(3.0,) * 3),
            "gripper": ArraySpec((1,)),
            "info_qpos": ArraySpec((4,), privileged=True),
        },
        images={camera: ArraySpec((side, side, 3), "uint8") for camera in cameras},
        action=ActionSpec((2,), names=("left", "right"), low=(-1.0, -1.0), high=(1.0, 1.0)) if action else None,
        control_dt=0.1,
        environment="made/Up",
        has_reward=reward,
    )


def make_episode(spec, index, steps, final=True, terminated=False, missing=(), instruct=True):
    random = np.random.default_rng(index)
    rows = steps + final
    step_valid, ended, truncated = end_flags(steps, rows, terminated)
    side = next(iter(spec.images.values())).shape[0] if spec.images else SIDE
    return Episode(
        observations={
            key: random.uniform(-1, 1, (rows, *array.shape)).astype(np.float32)
            for key, array in spec.observations.items()
        },
        images={
            camera: smooth_pictures(rows, side, index, number)
            for number, camera in enumerate(spec.images)
            if camera not in missing
        },
        action=padded_last(random.uniform(-1, 1, (steps, 2)).astype(np.float32), rows) if spec.action else None,
        step_valid=step_valid if spec.action else np.zeros(rows, bool),
        terminated=ended if spec.action else np.zeros(rows, bool),
        truncated=truncated if spec.action else np.zeros(rows, bool),
        timestamp=np.arange(rows) * 0.1,
        reward=padded_last(random.uniform(0, 1, steps).astype(np.float32), rows) if spec.has_reward else None,
        instruction=TASKS[index % 3] if instruct else "",
        success=terminated,
        source_id=f"made/{index}",
    )


def make_store(path, spec=None, episodes=((5, True, True), (3, True, False), (7, True, True)), attributes=None, **more):
    """A store of episodes given as (steps, whether a final observation follows, whether it terminated)."""
    spec = spec or make_spec()
    record = provenance("data import", {}, {}, source_attributes=attributes or {})
    writer = StoreWriter(path, spec, record)
    for index, (steps, final, terminated) in enumerate(episodes):
        writer.write_episode(index, make_episode(spec, index, steps, final, terminated, **more))
    return writer.finish(len(episodes))


def add_label(store, name="progress", alignment="post", scores=None):
    """A label set; by default the score of a frame is its number / frames."""
    record = {"labeller": "made up", "config": {}, "dataset_fingerprint": store.fingerprint, "code_version": "0"}
    writer = LabelWriter(store, name, record, alignment=alignment)
    scores = np.arange(store.num_frames, dtype=np.float32) / store.num_frames if scores is None else scores
    for index, start, stop in writer.blocks():
        writer.write_block(index, scores[start:stop])
    return writer.finish()


def assert_same_episodes(found, wanted, final=True, but=(), atol=0.0, keys=None):
    """Every array of `found` equals that of `wanted`, final observations left aside unless `final`.

    Args:
        but: names of fields that the format does not hold.
        keys: key in `wanted` -> key in `found`, where the format renames.
    """
    assert found.num_episodes == wanted.num_episodes
    for index in range(wanted.num_episodes):
        a, b = found.episode(index), wanted.episode(index)
        rows = len(b) if final else int(np.flatnonzero(b.terminated | b.truncated)[0]) + 1
        assert len(a) == rows
        renamed = {(keys or {}).get(key, key): array for key, array in b.observations.items()}
        assert set(a.observations) == {key for key in renamed if key not in but}
        for key, array in a.observations.items():
            np.testing.assert_array_equal(array, renamed[key][:rows], err_msg=key)
        assert set(a.images) == {camera for camera in b.images if camera not in but}
        for camera, pictures in a.images.items():
            difference = np.abs(np.asarray(pictures).astype(int) - np.asarray(b.images[camera])[:rows])
            assert difference.max() <= atol, camera
        for name in ("action", "reward", "terminated", "truncated"):
            wanted_rows = getattr(b, name)
            if name in but or wanted_rows is None:
                continue
            np.testing.assert_array_equal(getattr(a, name), wanted_rows[:rows], err_msg=name)
        if "step_valid" not in but:
            expected = b.step_valid[:rows].copy()
            expected[-1] &= final or b.terminated[rows - 1]
            np.testing.assert_array_equal(a.step_valid, expected)
        if "timestamp" not in but:
            np.testing.assert_allclose(a.timestamp, b.timestamp[:rows], atol=1e-6)
        for name in ("instruction", "success"):
            if name not in but:
                assert getattr(a, name) == getattr(b, name), name

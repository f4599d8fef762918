"""Small stores for tests, made up so that exactly one thing is wrong with each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embodied.contracts.provenance import provenance
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.finding import Finding
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

SIZE = 8
SPEC = DatasetSpec(
    observations={
        "joint_position": ArraySpec((3,), unit="rad", names=("shoulder", "elbow", "wrist")),
        "object": ArraySpec((2,), privileged=True),
    },
    images={"side": ArraySpec((SIZE, SIZE, 3), "uint8"), "wrist": ArraySpec((SIZE, SIZE, 3), "uint8")},
    action=ActionSpec((2,), names=("left", "right"), scale=(0.1, 0.1), control_mode="joint_position_delta"),
    control_dt=0.1,
    environment="made/Up",
    has_reward=True,
)


def make_episode(index: int, steps: int = 30) -> Episode:
    """A smooth walk with noise in the pictures; odd episodes terminate with success, even ones are truncated."""
    rng = np.random.default_rng(index)
    rows = steps + 1
    succeeded = index % 2 == 1
    step_valid, terminated, truncated = end_flags(steps, rows, succeeded)
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = float(succeeded)
    return Episode(
        observations={
            "joint_position": rng.normal(0, 0.1, (rows, 3)).cumsum(0).astype(np.float32),
            "object": rng.normal(0, 0.1, (rows, 2)).cumsum(0).astype(np.float32),
        },
        images={c: rng.integers(0, 255, (rows, SIZE, SIZE, 3), dtype=np.uint8) for c in SPEC.images},
        action=padded_last(rng.uniform(-0.9, 0.9, (steps, 2)).astype(np.float32), rows),
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.arange(rows) * 0.1,
        reward=padded_last(rewards, rows),
        instruction=["lift the cube", "push the cube"][index // 2 % 2],
        success=succeeded,
        source_id=f"demo_{index}",
    )


def write_store(
    path: Path, episodes: Sequence[Episode], spec: DatasetSpec = SPEC, findings: Sequence[Finding] = ()
) -> EpisodeStore:
    record = provenance("test", {}, {"source": "made"}, source_attributes={"robot": "none"})
    writer = StoreWriter(path, spec, record, "made up", "CC0-1.0")
    for index, episode in enumerate(episodes):
        writer.write_episode(index, episode)
    return writer.finish(len(episodes), findings)


def add_label(store: EpisodeStore, name: str, score: np.ndarray, config: dict[str, Any] | None = None) -> None:
    record = provenance("label test", config or {}, {})
    record |= {"labeller": "test", "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, name, record, block=50)
    for block, start, stop in writer.blocks():
        writer.write_block(block, score[start:stop], confidence=np.stack([score[start:stop]] * 2, 1))
    writer.finish(abstentions=1)


def change_array(store: EpisodeStore, name: str, change: Callable[[np.ndarray], None]) -> EpisodeStore:
    """What our writer refuses to write, another program may: alter an array of a finished store in place."""
    array = zarr.open_group(store.path, mode="r+")[name]
    assert isinstance(array, zarr.Array)
    values = np.asarray(array[:])
    change(values)
    array[:] = values
    return EpisodeStore(store.path)

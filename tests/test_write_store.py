import dataclasses
import errno
import hashlib
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import InputError, StoreError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets import staging, write_arrays
from embodied.datasets.episode import Episode, Frames, end_flags, padded_last
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_arrays import ArrayStream
from embodied.datasets.write_store import StoreWriter

SPEC = DatasetSpec(
    observations={"joint_position": ArraySpec((2,), unit="rad", names=("a", "b"))},
    images={"wrist": ArraySpec((8, 8, 3), "uint8")},
    action=ActionSpec((2,), scale=(0.1, 0.1), control_mode="joint_position_delta"),
    control_dt=0.1,
    has_reward=True,
)
PROVENANCE = {"config": {"seed": 0}, "inputs": {}, "date": "fixed"}
EPISODES = 6


def make_episode(index: int) -> Episode:
    steps = 5 + index
    rows = steps + 1
    rng = np.random.default_rng(index)
    step_valid, terminated, truncated = end_flags(steps, rows, terminated=index % 2 == 0)
    return Episode(
        observations={"joint_position": rng.normal(size=(rows, 2)).astype(np.float32)},
        images={"wrist": rng.integers(0, 255, (rows, 8, 8, 3), dtype=np.uint8)},
        action=padded_last(rng.uniform(-1, 1, (steps, 2)).astype(np.float32), rows),
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.arange(rows) * 0.1,
        reward=padded_last(np.ones(steps, np.float32), rows),
        instruction="lift the cube",
        success=[None, True, False][index % 3],
        source_id=f"demo_{index}",
    )


def write(path: Path, order: Sequence[int] = range(EPISODES)) -> EpisodeStore:
    writer = StoreWriter(path, SPEC, PROVENANCE)
    for index in order:
        writer.write_episode(index, make_episode(index))
    return writer.finish(EPISODES)


def tree(folder: Path) -> dict[str, str]:
    """Every file under `folder` with the hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_round_trip_is_exact(tmp_path):
    store = write(tmp_path / "s")
    assert store.num_episodes == EPISODES
    assert store.num_frames == sum(6 + i for i in range(EPISODES))
    assert store.episode_length.tolist() == [6, 7, 8, 9, 10, 11]
    assert store.episode_start.tolist() == [0, 6, 13, 21, 30, 40]
    assert store.success.tolist() == [-1, 1, 0, -1, 1, 0]
    assert store.spec == SPEC
    for index in range(EPISODES):
        want, got = make_episode(index), store.episode(index)
        got.check(SPEC)
        for name in ("action", "step_valid", "terminated", "truncated", "timestamp", "reward"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        np.testing.assert_array_equal(got.images["wrist"], want.images["wrist"])
        np.testing.assert_array_equal(got.observations["joint_position"], want.observations["joint_position"])
        assert (got.instruction, got.success, got.source_id) == (want.instruction, want.success, want.source_id)
    assert not (tmp_path / "s.partial").exists()


def test_order_of_writing_does_not_change_a_byte(tmp_path):
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", order=[3, 0, 5, 4, 1, 2])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert first.fingerprint == second.fingerprint


def test_fingerprint_sees_one_changed_value_but_not_the_date(tmp_path):
    first = write(tmp_path / "a")
    writer = StoreWriter(tmp_path / "b", SPEC, PROVENANCE | {"date": "another"})
    other = StoreWriter(tmp_path / "c", SPEC, PROVENANCE)
    for index in range(EPISODES):
        episode = make_episode(index)
        writer.write_episode(index, episode)
        if index == 4:
            pictures = np.array(episode.images["wrist"])
            pictures[9, 7, 7, 2] ^= 1
            episode.images = {"wrist": pictures}
        other.write_episode(index, episode)
    assert writer.finish(EPISODES).fingerprint == first.fingerprint
    assert other.finish(EPISODES).fingerprint != first.fingerprint


def test_array_stream_crosses_shards_exactly(tmp_path, monkeypatch):
    import zarr

    monkeypatch.setattr(write_arrays, "PICTURE_CHUNK_BYTES", 2 * 192)
    monkeypatch.setattr(write_arrays, "SHARD_BYTES", 8 * 192)
    rows = np.random.default_rng(0).integers(0, 255, (37, 8, 8, 3), dtype=np.uint8)
    digests = []
    for sizes in ([37], [1, 20, 3, 13], [8, 8, 8, 8, 5]):
        folder = tmp_path / str(len(sizes))
        stream = ArrayStream(zarr.open_group(folder, mode="w-"), "x", rows.shape, "uint8")
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            stream.append(part)
            assert stream.num_waiting < 2, "rows wait for a whole chunk only"
        digests.append(stream.close())
        array: Any = zarr.open_group(folder, mode="r")["x"]
        assert (array.chunks[0], array.shards[0]) == (2, 8)
        np.testing.assert_array_equal(array[:], rows)
    assert len(set(digests)) == 1
    assert tree(tmp_path / "1") == tree(tmp_path / "4") == tree(tmp_path / "5")


def test_existing_path_and_foreign_staging_are_refused(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(StoreError, match="exists already"):
        StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    StoreWriter(tmp_path / "t", SPEC, PROVENANCE).write_episode(0, make_episode(0))
    with pytest.raises(StoreError, match=r"another configuration.*\n.*rm -r .*t\.partial"):
        StoreWriter(tmp_path / "t", SPEC, {"config": {"seed": 1}, "inputs": {}})
    assert StoreWriter(tmp_path / "t", SPEC, PROVENANCE).has(0)


def test_a_claim_without_episodes_gives_way(tmp_path):
    StoreWriter(tmp_path / "s", SPEC, {"config": {"seed": 1}, "inputs": {}})
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    writer.write_episode(0, make_episode(0))
    assert writer.finish(1).attributes["provenance"] == PROVENANCE


def test_bad_episode_and_missing_episode_are_refused(tmp_path):
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    episode = make_episode(0)
    assert episode.action is not None
    episode.action[0, 0] = np.nan
    with pytest.raises(InputError, match="demo_0"):
        writer.write_episode(0, episode)
    assert not writer.has(0)
    writer.write_episode(1, make_episode(1))
    with pytest.raises(StoreError, match="1 of 2 are missing, first 0"):
        writer.finish(2)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_killed_while_the_staging_folder_is_removed_only_tidies_up(tmp_path, monkeypatch, removed):
    """After the last rename, before the first part is removed or with some gone already."""
    reference = tree(Path(write(tmp_path / "a").path))
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    for index in range(EPISODES):
        writer.write_episode(index, make_episode(index))
    real, gone = staging.shutil.rmtree, []

    def interrupted(path, **options):
        if Path(path).parent == writer.staging and not options:
            if len(gone) == removed:
                raise KeyboardInterrupt
            gone.append(path)
        real(path, **options)

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.finish(EPISODES)
    monkeypatch.undo()
    again = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    assert all(again.has(i) for i in range(EPISODES))
    again.finish(EPISODES)
    assert tree(tmp_path / "s") == reference
    assert not again.staging.exists()


def test_missing_pictures_are_black_marked_and_cost_no_space(tmp_path):
    """A camera of some episodes only: written as `Frames`, and read back as they were."""
    reference = make_episode(0)
    pictures = np.asarray(reference.images["wrist"])
    lazy = Frames(reference.images["wrist"].shape, lambda: iter(np.array_split(pictures, 3)))
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    for index in range(3):
        episode = make_episode(index)
        episode.images = {}
        if index == 1:
            episode = dataclasses.replace(reference, images={"wrist": lazy})
        writer.write_episode(index, episode)
    store = writer.finish(3)
    assert store.has_camera("wrist").tolist() == [False, True, False]
    np.testing.assert_array_equal(store.episode(1).images["wrist"], pictures)
    assert store.episode(0).images == {}
    assert not store.frames("wrist", 0, int(store.episode_length[0])).any()
    assert write(tmp_path / "whole").has_camera("wrist").all()


def test_pictures_that_break_off_are_refused_and_leave_nothing(tmp_path):
    episode = make_episode(0)
    pictures = np.asarray(episode.images["wrist"])
    episode.images = {"wrist": Frames(pictures.shape, lambda: iter([pictures[:-1]]))}
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    with pytest.raises(InputError, match=f"gives {len(pictures) - 1} pictures for {len(pictures)} rows"):
        writer.write_episode(0, episode)
    assert [p.name for p in writer.staging.iterdir()] == ["config.json"]


CHILD = textwrap.dedent(
    """
    import sys, time
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path
    spec = spec_from_file_location("t", {test!r}); t = module_from_spec(spec); spec.loader.exec_module(t)
    episodes_before_hang, writes_before_hang = {episodes}, {writes}
    writer = t.StoreWriter(Path({path!r}), t.SPEC, t.PROVENANCE)
    real_write, count = t.ArrayStream._write, 0
    joining = False
    def hang():
        print("ready", flush=True)
        time.sleep(60)
    def slow_write(self, rows):
        global count
        count += joining
        if joining and count == writes_before_hang:
            hang()
        real_write(self, rows)
    t.ArrayStream._write = slow_write
    for i in range(t.EPISODES):
        if i == episodes_before_hang:
            (writer.staging / "episode_000005.tmp").write_bytes(b"half")
            hang()
        if not writer.has(i):
            writer.write_episode(i, t.make_episode(i))
    joining = True
    writer.finish(t.EPISODES)
    """
)


@pytest.mark.parametrize(("episodes", "writes"), [(3, -1), (-1, 4)], ids=["while staging", "while joining"])
def test_kill_minus_nine_then_the_same_command_gives_the_same_files(tmp_path, episodes, writes):
    reference = tree(Path(write(tmp_path / "a").path))
    code = CHILD.format(test=__file__, path=str(tmp_path / "s"), episodes=episodes, writes=writes)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "s").exists()
    with pytest.raises(StoreError, match="unfinished: run the command"):
        EpisodeStore(tmp_path / "s")
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    assert [writer.has(i) for i in range(EPISODES)] == [i < episodes or episodes < 0 for i in range(EPISODES)]
    for index in range(EPISODES):
        if not writer.has(index):
            writer.write_episode(index, make_episode(index))
    writer.finish(EPISODES)
    assert tree(tmp_path / "s") == reference
    assert not writer.staging.exists()


def test_disk_full_while_staging_leaves_no_half_file(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    writer.write_episode(0, make_episode(0))
    real = np.savez

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        writer.write_episode(1, make_episode(1))
    assert "resumes where it stopped" in str(caught.value)
    names = sorted(p.name for p in writer.staging.iterdir() if p.suffix != ".images")
    assert names == ["config.json", "episode_000000.npz"]
    monkeypatch.setattr(np, "savez", real)
    for index in range(1, EPISODES):
        writer.write_episode(index, make_episode(index))
    writer.finish(EPISODES)


def test_file_size_limit_while_joining_keeps_the_episodes(tmp_path):
    """A real refusal by the kernel (EFBIG), in the place where Zarr writes on its own threads."""
    writer = StoreWriter(tmp_path / "s", SPEC, PROVENANCE)
    for index in range(EPISODES):
        writer.write_episode(index, make_episode(index))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match="No space left"):
            writer.finish(EPISODES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "s").exists()
    assert not (writer.staging / "store").exists()
    assert writer.finish(EPISODES).num_episodes == EPISODES

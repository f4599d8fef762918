"""kill -9 at random moments of a labelling: resuming ends with the same bytes, and encodes nothing again but the block
that was in flight."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")

from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.vlm_rewards.train_clip import SmallClipConfig, build_model, write_folder

LENGTHS, BLOCK, STORES = (150, 10, 240, 112), 32, 5
FRAMES = sum(LENGTHS)
BLOCKS = -(-FRAMES // BLOCK)

# Forks a process per labelling, so that the moments to be killed at are those of the labelling, not of the imports.
# Each process notes every pass of the encoder in a file that outlives it.
NURSERY = """
import os, signal, sys, time
import torch
import open_clip  # used by a labelling, and slow to load
torch.set_num_threads(1)
from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards import embeddings
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.label_store import label_clip
embeddings.BLOCK = %d
real = ClipEncoder.encode
def noted(self, pixels):
    vectors = real(self, pixels)
    os.write(notes, b"%%d\\n" %% len(pixels))
    return vectors
ClipEncoder.encode = noted
model = sys.argv[1]
print("ready", flush=True)
for line in sys.stdin:
    blocks, seconds, store = line.strip().split(" ", 2)
    notes = os.open(store + ".notes", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    had = os.fstat(notes).st_size
    child = os.fork()
    if child == 0:
        label_clip(EpisodeStore(store), "clip", "side", ["up"], ["down"], 0.5, model=model)
        os._exit(0)
    if int(blocks) >= 0:
        while os.pread(notes, 1 << 20, had).count(b"\\n") < int(blocks):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.0005)
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)  # at worst a process that has ended and was not waited for
    os.close(notes)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts labellings, one at a time."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-c", NURSERY % BLOCK, model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def label(self, store: Path, blocks: int = -1, seconds: float = 0.0) -> int:
        """Exit code of a labelling that is killed so many seconds after it encoded so many blocks; -1: never."""
        assert self._process.stdin is not None
        print(blocks, seconds, store, file=self._process.stdin, flush=True)
        return int(self._read())

    def close(self) -> None:
        self._process.communicate(timeout=30)


def make_store(path: Path) -> EpisodeStore:
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((40, 40, 3), "uint8")}, None), {})
    rng = np.random.default_rng(0)
    for index, length in enumerate(LENGTHS):
        no = np.zeros(length, bool)
        frames = rng.integers(0, 256, (length, 40, 40, 3), dtype=np.uint8)
        writer.write_episode(index, Episode({}, {"side": frames}, None, no, no, no, np.arange(length) * 0.1))
    return writer.finish(len(LENGTHS))


def contents(store: Path) -> dict[str, bytes]:
    """Every file of labels and embeddings but zarr.json, which carries the date."""
    files = [file for kind in ("labels", "embeddings") for file in sorted((store / kind).rglob("*"))]
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file() and f.name != "zarr.json"}


def test_killed_at_random_moments_a_labelling_ends_identical_and_encodes_no_block_twice(tmp_path: Path) -> None:
    config = SmallClipConfig(embedding_dim=16, image_width=8, text_width=8, text_layers=1, text_heads=2)
    write_folder(build_model(config, 32, seed=0), config.open_clip_config(32), {}, tmp_path / "tiny")
    make_store(tmp_path / "whole")
    nursery = Nursery(str(tmp_path / "tiny"))
    begun = time.monotonic()
    assert nursery.label(tmp_path / "whole") == 0
    seconds = time.monotonic() - begun
    expected = contents(tmp_path / "whole")
    assert {name.split("/")[0] for name in expected} == {"labels", "embeddings"}
    rng = np.random.default_rng(1)
    midway = 0
    for number in range(STORES):
        path = tmp_path / f"store_{number}"
        make_store(path)
        kills = 0
        for _ in range(3):
            # By blocks, not by time alone: a labelling takes twice as long when the machine is busy.
            code = nursery.label(path, int(rng.integers(BLOCKS // 2)), rng.uniform(0, seconds / BLOCKS))
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
            midway += EpisodeStore(path).label_names() == []
        notes = Path(f"{path}.notes")
        if EpisodeStore(path).label_names() == []:
            assert nursery.label(path) == 0
        assert contents(path) == expected
        assert FRAMES <= sum(map(int, notes.read_text().split())) <= FRAMES + kills * BLOCK
    nursery.close()
    assert midway >= STORES  # else hardly anything was interrupted

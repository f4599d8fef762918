"""kill -9 at random moments of an import: the store is absent or whole, and resuming ends with the same bytes."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.contracts.errors import StoreError
from embodied.datasets.importer import import_dataset
from embodied.datasets.store import EpisodeStore

EPISODES, KILLS = 12, 20

# Imports before it says so: the moments to be killed at are those of the import, not of Python's start.
CHILD = """
import sys, time
from embodied.datasets import importer
import embodied.datasets.read_robomimic
print("ready", flush=True)
importer.import_dataset(sys.argv[1], sys.argv[2])
print("done", flush=True)
"""


def make_source(path: Path) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(EPISODES):
            demo = file.create_group(f"data/demo_{number}")
            steps = int(rng.integers(20, 40))
            demo["actions"] = rng.standard_normal((steps, 3))
            demo["obs/state"] = rng.standard_normal((steps, 4))
            demo["obs/image"] = rng.integers(0, 256, (steps, 96, 96, 3), np.uint8)
        file["data/demo_5/actions"][3, 1] = np.nan  # type: ignore[index]
    return path


def contents(store: Path) -> dict[str, str]:
    """Hash of every file; of the attributes, all but date and path."""
    found = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path == store / "zarr.json":
            attributes = json.loads(data)["attributes"]
            attributes["provenance"].pop("date")
            data = json.dumps(attributes, sort_keys=True).encode()
        found[path.relative_to(store).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def start(source: Path, store: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(store)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_killed_at_twenty_random_moments_an_import_ends_identical(tmp_path):
    source = make_source(tmp_path / "demos.hdf5")
    seconds = np.inf
    for name in ("first", "whole"):  # the first of all may take several times as long
        child, begun = start(source, tmp_path / name), time.monotonic()
        assert child.communicate()[0] == "done\n"
        seconds = min(seconds, time.monotonic() - begun)
    expected = contents(tmp_path / "whole")
    assert EpisodeStore(tmp_path / "whole").num_episodes == EPISODES - 1
    rng = np.random.default_rng(1)
    unfinished, staged = 0, set()
    for number in range(KILLS):
        store = tmp_path / f"store_{number}"
        child = start(source, store)
        time.sleep(rng.uniform(0, seconds))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if store.exists():
            assert contents(store) == expected
        else:
            unfinished += 1
            staged.add(len(list(Path(f"{store}.partial").glob("episode_*.npz"))))
            with pytest.raises(StoreError, match="does not exist"):
                EpisodeStore(store)
        if not store.exists() or Path(f"{store}.partial").exists():
            import_dataset(source, store)
        assert contents(store) == expected
        assert not Path(f"{store}.partial").exists()
    # The kills did fall into the import, at different places.
    assert unfinished >= KILLS // 4
    assert len(staged) >= 3

from pathlib import Path

import h5py
import numpy as np
from fuzzing import fuzz
from hdf5_attacks import attack

FORMAT = "d4rl"


def seeds(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for name in ("vectors", "pictures"):
        path = folder / f"{name}.hdf5"
        paths.append(path)
        pictures = name == "pictures"
        with h5py.File(path, "w", libver="latest" if pictures else "earliest") as file:
            rows = rng.integers(0, 255, (13, 8, 8, 3), np.uint8) if pictures else rng.normal(size=(13, 4))
            settings = {"compression": "gzip", "chunks": (4, *rows.shape[1:])}
            file.create_dataset("observations", data=rows[:12], **settings)
            file.create_dataset("next_observations", data=rows[1:], **settings)
            file.create_dataset("actions", data=rng.normal(size=(12, 2)), **(settings | {"chunks": (5, 2)}))
            file["rewards"] = rng.normal(size=12).astype(np.float32)
            file["terminals"] = np.arange(12) == 3
            file["timeouts"] = np.isin(np.arange(12), (7, 11))
            file["infos/qpos"] = rng.normal(size=(12, 3))
            file.attrs["env_id"] = "Hopper-v5"
    return paths


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str:
    return attack(target, rng)


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 300
    assert counts.get("partial", 0) + counts.get("whole", 0) > 300

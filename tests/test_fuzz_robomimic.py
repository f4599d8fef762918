import json
from pathlib import Path

import h5py
import numpy as np
from fuzzing import fuzz
from hdf5_attacks import attack

FORMAT = "robomimic"


def seeds(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for name, compression in (("plain", None), ("gzip", "gzip")):
        path = folder / f"{name}.hdf5"
        paths.append(path)
        with h5py.File(path, "w", libver="earliest" if name == "plain" else "latest") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
            data.attrs["total"] = 15
            for number in range(3):
                demo = data.create_group(f"demo_{number}")
                demo.attrs.update({"num_samples": 5, "success": number == 0})
                demo["actions"] = rng.normal(size=(5, 7))
                demo["rewards"] = np.arange(5.0)
                demo["dones"] = np.arange(5) == 4
                for group in ("obs", "next_obs"):
                    demo[f"{group}/eef_pos"] = rng.normal(size=(5, 3)).astype(np.float32)
                    demo.create_dataset(
                        f"{group}/camera/rgb",
                        data=rng.integers(0, 255, (5, 8, 8, 3), np.uint8),
                        compression=compression,
                        shuffle=compression is not None,
                        chunks=(2, 8, 8, 3),
                    )
            file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return paths


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str:
    return attack(target, rng)


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 100
    assert counts.get("partial", 0) > 300
    assert counts.get("whole", 0) > 100

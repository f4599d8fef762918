"""Datasets that Minari itself writes, in each of its storages, read by Minari and by us: are the values equal?

    python benchmarks/minari_reader.py --work DIR

DIR gets an environment with Minari (not installed beside embodied), the datasets and the values that Minari reads.
The environments: Pendulum (a box), CartPole (discrete actions), and one with every kind of space, a picture and infos.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

REQUIREMENTS = ["minari[hdf5,arrow,create]>=0.5,<0.6", "pillow"]
STORAGES = ("hdf5", "arrow", "parquet")
DATASETS = ("pendulum", "cartpole", "spaces", "raw")
EPISODES = 5


def make(work: Path) -> None:
    """In the environment with Minari: write the datasets, and what Minari reads of them as <name>-<storage>-<i>.npz."""
    import gymnasium as gym
    import minari
    from gymnasium import spaces

    class AllSpaces(gym.Env):
        observation_space = spaces.Dict(
            arm=spaces.Dict(joints=spaces.Box(-1, 1, (3,), np.float32), pose=spaces.Box(-1, 1, (4, 4), np.float64)),
            camera=spaces.Box(0, 255, (40, 48, 3), np.uint8),
            grey=spaces.Box(0, 255, (40, 48), np.uint8),
            grid=spaces.Box(0, 255, (7, 7, 3), np.uint8),
            mission=spaces.Text(20),
            mode=spaces.Tuple((spaces.Discrete(4, start=-1), spaces.MultiBinary(3))),
            level=spaces.Box(-np.inf, np.inf, (), np.float32),
        )
        action_space = spaces.Dict(
            move=spaces.Box(-1, 1, (2,), np.float32), grip=spaces.Discrete(2), keys=spaces.MultiDiscrete([3, 4])
        )

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            super().reset(seed=seed)
            self.observation_space.seed(seed)
            self.count, self.length = 0, 3 + (seed or 0) % 4
            return self.observation_space.sample(), self.info()

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            self.count += 1
            done = self.count >= self.length
            observation = self.observation_space.sample()
            return observation, float(self.count), done and self.length % 2 == 0, done, self.info()

        def info(self) -> dict:
            return {
                "qpos": np.arange(3.0) + self.count,
                "nested": {"distance": 0.5 * self.count},
                "success": self.count > 3,
            }

    # Seeds and data must be the same for each storage: everything is drawn anew from the same seeds.
    for name in DATASETS:
        for storage in STORAGES:
            environment = {"pendulum": "Pendulum-v1", "cartpole": "CartPole-v1"}.get(name)
            env = gym.make(environment, max_episode_steps=30) if environment else AllSpaces()
            env.action_space.seed(0)
            raw = {"jpeg_encoding": False} if name == "raw" else {}
            collector = minari.DataCollector(env, data_format=storage, record_infos=name in ("spaces", "raw"), **raw)
            for episode in range(EPISODES):
                collector.reset(seed=episode, options={"try": episode} if environment is None else None)
                done = False
                while not done:
                    _, _, terminated, truncated, _ = collector.step(env.action_space.sample())
                    done = terminated or truncated
            collector.create_dataset(
                f"toy/{name}-{storage}-v0", algorithm_name="random", code_permalink="-", author="-", author_email="-"
            )
            for episode in minari.load_dataset(f"toy/{name}-{storage}-v0"):
                found = {
                    **flat("observations", episode.observations),
                    **flat("actions", episode.actions),
                    **flat("infos", episode.infos or {}),
                    "rewards": episode.rewards,
                    "terminations": episode.terminations,
                    "truncations": episode.truncations,
                }
                np.savez(
                    work / f"{name}-{storage}-{episode.id}.npz", **{key: np.asarray(a) for key, a in found.items()}
                )
    (work / "versions.json").write_text(json.dumps({"minari": minari.__version__, "gymnasium": gym.__version__}))


def flat(path: str, value: Any) -> dict[str, Any]:
    """Nested dictionaries and tuples by path."""
    if isinstance(value, dict | tuple):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in named for key, leaf in flat(f"{path}/{name}", inner).items()}
    if isinstance(value, np.ndarray) and value.dtype == object:  # Minari gives nested infos of Arrow as a dict per row
        return flat(path, {key: np.stack([row[key] for row in value]) for key in value[0]})
    return {path: value}


def compare(work: Path, name: str, storage: str) -> dict[str, Any]:
    """Values read by us and by Minari. Raises AssertionError where they differ."""
    from embodied.datasets.importer import FORMATS, recognise

    path = work / "root" / "toy" / f"{name}-{storage}-v0"
    assert recognise(path) == "minari"
    source = FORMATS["minari"].read(path, {})
    num_values, num_pictures, compared = 0, 0, set()
    for index in range(source.num_episodes):
        episode = source.load(index)
        episode.check(source.spec)
        expected = dict(np.load(work / f"{name}-{storage}-{index}.npz"))
        steps = len(expected["rewards"])
        parts = [expected.pop(key) for key in sorted(expected) if key.startswith("actions")]
        ours: dict[str, np.ndarray] = {"rewards": np.asarray(episode.reward)[:steps]}
        assert np.array_equal(
            np.asarray(episode.action)[:steps],
            np.concatenate([p.reshape(steps, -1) for p in parts], 1).astype(np.float32),
        )
        ends = {"terminations": episode.terminated, "truncations": episode.truncated | episode.terminated}
        both = expected["terminations"] | expected["truncations"]
        assert np.array_equal(ends["terminations"][:steps], expected.pop("terminations"))
        assert np.array_equal(ends["truncations"][:steps], both)
        expected.pop("truncations")
        for key, array in {**episode.observations, **episode.images}.items():
            kind, _, rest = key.partition("info_")
            place = f"infos/{rest}" if not kind and rest else f"observations/{key}"
            place = "observations" if key in ("observation", "image") else place.replace(".", "/")
            ours[place] = np.asarray(array)
        words = expected.pop("observations/mission", np.array([""]))
        assert episode.instruction == str(words[0])
        assert set(ours) == set(expected), f"{path}: {set(ours) ^ set(expected)}"
        for key, array in ours.items():
            wanted = expected[key]
            if wanted.dtype == np.uint8 and min(wanted.shape[1:3]) >= 32:  # a picture
                wanted = np.repeat(wanted[..., None], 3, -1) if wanted.ndim == 3 else wanted
                num_pictures += len(wanted)
            wanted = wanted.reshape(array.shape).astype(array.dtype)
            assert np.array_equal(array, wanted), f"{path}, episode {index}: '{key}' differs"
            num_values += array.size
            compared.add(key)
    return {
        "episodes": source.num_episodes,
        "arrays": len(compared),
        "values_equal": num_values,
        "pictures_equal": num_pictures,
        "findings": [finding.check for finding in source.findings],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help="write the datasets; needs Minari, and is called by itself")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.make:
        make(work)
        return
    from record import write_result

    python = work / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "uv", "venv", work / "venv"], check=True)
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--python", python, *REQUIREMENTS], check=True)
    if not (work / "versions.json").exists():
        command = [python, "-W", "ignore", __file__, "--work", work, "--make"]
        subprocess.run(command, check=True, env=os.environ | {"MINARI_DATASETS_PATH": str(work / "root")})
    figures = {f"{name} in {storage}": compare(work, name, storage) for name in DATASETS for storage in STORAGES}
    write_result("minari_reader", {"versions": json.loads((work / "versions.json").read_text()), "datasets": figures})


if __name__ == "__main__":
    main()

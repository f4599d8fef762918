"""Effect: told where to go, IQL goes to places where nobody was told to go; not told, it cannot."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from goal_point import environment, point_store

from embodied.evaluate import bundle_loader
from embodied.progress import Progress
from embodied.sim import suites
from embodied.sim.evaluate import _evaluate_some
from embodied.sim.rollout import cached_environment, cached_policy
from embodied.statistics import over_seeds
from embodied.train import TrainReward, train_iql

SEEDS = 3
SETTINGS = {
    "hidden_sizes": "64,64",
    "batch_size": 128,
    "discount": 0.95,
    "learning_rate": 1e-3,
    "target_update_rate": 0.02,
    "inverse_temperature": 10.0,
}
WHERE = 1_000_000  # initial states and places that no episode of the data had


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("point")
    point_store(path / "store")
    return path


def success(out: Path, env_id: str, count: int = 40) -> np.ndarray:
    """(seeds, initial states) of 0 and 1."""
    cached_environment.cache_clear()
    cached_policy.cache_clear()
    states, rows = tuple(range(WHERE, WHERE + count)), []
    for seed in range(SEEDS):
        results = _evaluate_some(env_id, "policy", bundle_loader(str(out / f"seed_{seed:03d}")), states)
        rows.append([result.success for result in results])
    return np.array(rows, np.int64)


def trained(folder: Path, name: str, reward: str, **more: Any) -> Path:
    config = TrainReward(
        folder / "store", reward, folder / name, seeds=SEEDS, steps=600, settings=SETTINGS, workers=1, **more
    )
    train_iql(config, Progress())
    return folder / name


def test_a_policy_that_is_told_a_goal_reaches_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.ENVIRONMENTS, "tests/Point", environment())
    told = trained(folder, "told", "hindsight", goal=("position",), hindsight={"tolerance": 0.1})
    untold = trained(folder, "untold", "source")
    with_goal, without = (over_seeds(success(out, "tests/Point")) for out in (told, untold))
    assert with_goal.low > 0.8
    assert without.high < 0.6
    assert with_goal.low > without.high + 0.3

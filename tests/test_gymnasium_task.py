"""Gymnasium's environments by their id: the episodes are Gymnasium's own, judged by return from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from embodied.cli import main
from embodied.compare import measure
from embodied.contracts.errors import InputError
from embodied.datasets.store import EpisodeStore
from embodied.evaluate import _summary
from embodied.policies.bundle import load_policy
from embodied.sim import gymnasium_task
from embodied.sim.evaluate import EpisodeResult, _run
from embodied.sim.suites import environment, true_reward
from embodied.statistics import difference, mean_over_seeds

gymnasium = pytest.importorskip("gymnasium")
ENV = "Hopper-v5"


def test_episodes_are_gymnasiums_own() -> None:
    ours, theirs = environment(ENV).make(), gymnasium.make(ENV)
    rng = np.random.default_rng(0)
    for seed in (0, 5):
        (seen, info), (wanted, _) = ours.reset(seed), theirs.reset(seed=seed)
        assert info == {"success": None}
        over = False
        while not over:
            np.testing.assert_array_equal(seen["observation"], wanted.astype(np.float32))
            action = rng.uniform(-1, 1, 3).astype(np.float32)
            seen, reward, terminated, truncated, info = ours.step(action)
            wanted, paid, *ends, _ = theirs.step(action)
            assert (reward, terminated, truncated, info) == (paid, *ends, {"success": None})
            assert seen["task_reward"] == np.float32(paid)
            over = terminated or truncated
    assert ours.spec.control_dt == pytest.approx(0.008)
    assert ours.spec.observations["task_reward"].privileged


def test_pictures_are_of_the_models_camera() -> None:
    env = environment(ENV).make(cameras=("track",), image_size=32)
    picture = env.reset(0)[0]["images/track"]
    assert picture.shape == (32, 32, 3)
    assert picture.std() > 10
    env.close()


class Ball(gymnasium.Env):
    """A dictionary of numbers; it says whether it succeeded."""

    observation_space = gymnasium.spaces.Dict(
        {
            "place": gymnasium.spaces.Box(-9, 9, (2,), np.float64),
            "arm": gymnasium.spaces.Dict({"joints": gymnasium.spaces.Box(-9, 9, (3,), np.float32)}),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, observation=None, action=None) -> None:
        self.observation_space = observation or self.observation_space
        self.action_space = action or self.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place = self.np_random.uniform(-1, 1, 2)
        return self._seen(), {}

    def step(self, action):
        self._place = self._place + action
        return self._seen(), float(-np.abs(self._place).sum()), False, False, {"is_success": bool(self._place[0] > 3)}

    def _seen(self):
        return {"place": self._place, "arm": {"joints": np.ones(3, np.float32)}}


@pytest.fixture
def registered():
    names = []

    def register(steps: int | None = 5, **arguments: object) -> str:
        names.append(f"tests/Ball{len(names)}-v0")
        gymnasium.register(names[-1], entry_point=Ball, max_episode_steps=steps, kwargs=arguments)
        return names[-1]

    yield register
    for name in names:
        del gymnasium.registry[name]


def test_dictionaries_are_named_as_imports_name_them_and_success_is_read(registered) -> None:
    env = environment(registered()).make()
    seen, _ = env.reset(1)
    assert {key: value.shape for key, value in seen.items()} == {"place": (2,), "arm.joints": (3,), "task_reward": (1,)}
    found = [env.step(np.array([1.0, 0.0])) for _ in range(5)]
    assert [step[4]["success"] for step in found] == [step[0]["place"][0] > 3 for step in found]
    assert found[0][4] == {"success": False}
    assert found[4][4] == {"success": True}
    assert [step[3] for step in found] == [False] * 4 + [True]


class Push:
    """Out of success in the first steps, then back."""

    def reset(self, seed: int) -> str:
        self._count = 0
        return "push"

    def act(self, observation: object) -> np.ndarray:
        self._count += 1
        return np.array([1.0 if self._count <= 4 else -1.0, 0.0])


def test_an_episode_goes_on_after_success_and_counts_as_one(registered) -> None:
    env = environment(registered(steps=8)).make()
    won, total, count = _run(env, Push(), 3)
    assert (won, count) == (True, 8)
    env.reset(3)
    push = Push()
    push.reset(3)
    assert total == pytest.approx(sum(env.step(push.act(None))[1] for _ in range(8)))


def test_what_cannot_be_run_is_refused(registered) -> None:
    box = gymnasium.spaces.Box
    for wrong, arguments in (
        ("not supported", {"action": box(-2, 2, (1,), np.float32)}),
        ("not supported", {"action": gymnasium.spaces.Discrete(3)}),
        ("its observation is Discrete", {"observation": gymnasium.spaces.Discrete(3)}),
        ("no time limit", {"steps": None}),
    ):
        with pytest.raises(InputError, match=wrong):
            environment(registered(**arguments)).make()
    with pytest.raises(InputError, match="no environment 'Hoper-v5'"):
        environment("Hoper-v5")
    with pytest.raises(InputError, match="no camera 'side'"):
        environment(ENV).make(cameras=("side",))
    with pytest.raises(InputError, match="no robot"):
        environment(ENV).export_scene()
    assert gymnasium_task.find("no_such_package:Hopper-v5") is None


def test_returns_are_evaluated_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Collect, clone with two seeds, evaluate beside random actions, compare: all from the command line."""
    store, out, result = str(tmp_path / "store"), tmp_path / "bc", tmp_path / "result.json"
    few = ["--workers", "1"]
    assert main(["sim", "collect", ENV, store, "--policy", "random", "--episodes", "4", "--cameras", *few]) == 0
    recorded = EpisodeStore(store)
    assert (recorded.success == -1).all()
    assert not recorded.spec.has_reward
    assert true_reward(ENV, recorded)[0] == 0.0
    command = ["train", "bc", store, "--out", str(out), "--seeds", "2", "--steps", "20"]
    assert main([*command, "--settings", "hidden_sizes", "8"]) == 0
    capsys.readouterr()
    policies = [f"clone={out}", "random"]
    assert main(["eval", *policies, "--env", ENV, "--episodes", "3", "--out", str(result), *few]) == 0
    said = capsys.readouterr().out
    assert "3 initial states, return with 95 % intervals" in said
    found = json.loads(result.read_text())
    policy, env = load_policy(out / "seed_001"), gymnasium.make(ENV)
    expected = []
    for seed in found["initial_seeds"]:
        seen, over, total = env.reset(seed=seed)[0], False, 0.0
        while not over:
            seen, reward, terminated, truncated, _ = env.step(policy.act({"observation": seen.astype(np.float32)})[0])
            total, over = total + float(reward), terminated or truncated
        expected.append(total)
    clone = found["policies"]["clone"]
    assert clone["seeds"][1]["episode_return"] == pytest.approx(expected, rel=1e-6)
    assert "success" not in clone["seeds"][1]
    assert measure(found["policies"]) == "episode_return"
    table = np.array([seed["episode_return"] for seed in clone["seeds"]])
    assert clone["episode_return"] == mean_over_seeds(table).to_json()
    assert clone["episode_return"]["low"] < table.mean() < clone["episode_return"]["high"]

    page = tmp_path / "page"
    assert main(["compare", str(result), "--out", str(page), "--normalize", "d4rl"]) == 0
    said = capsys.readouterr().out
    gap = difference(table, np.array([found["policies"]["random"]["seeds"][0]["episode_return"]]), rates=False)
    assert f"clone - random: {gap.estimate:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]" in said
    assert "<h2>Return, 95 % intervals</h2>" in (page / "compare.html").read_text()
    assert main(["compare", str(result), "--metric", "success"]) == 2
    assert "no measure 'success'" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "report.html"), "--results", str(result)]) == 2
    assert "this page shows success" in capsys.readouterr().err


def test_success_that_is_told_of_some_episodes_only_is_not_what_policies_are_compared_by() -> None:
    runs = {name: [[EpisodeResult(name, 0, won, 2.0, 5)]] for name, won in (("lucky", True), ("unlucky", None))}
    policies = {name: _summary([(None, name)], run, judged=False) for name, run in runs.items()}
    assert measure(policies) == "episode_return"
    with pytest.raises(InputError, match="not in others"):
        measure({**policies, "lucky": _summary([(None, "lucky")], runs["lucky"])})


def test_an_interval_of_equal_returns_has_no_width() -> None:
    """A rate of 0 of 3 is uncertain; a return that was 0 three times says nothing that an interval could."""
    assert mean_over_seeds(np.zeros((2, 3))).to_json() == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    same = difference(np.full((2, 3), 5.0), np.full((1, 3), 2.0), rates=False)
    assert same.to_json() == {"estimate": 3.0, "low": 3.0, "high": 3.0}

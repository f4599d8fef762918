"""The edge of reach on a line whose reach is known, and the verb on a run of the real simulator."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from embodied.cli import main
from embodied.contracts.errors import BundleError, InputError
from embodied.datasets.store import EpisodeStore
from embodied.policies.bundle import load_policy
from embodied.policies.dynamics_bundle import load_dynamics
from embodied.policies.reach import (
    against_truth,
    examine,
    nearest,
    recorded_edge,
    true_values,
    verdict,
    walk,
)
from embodied.policies.trained import Trained, load_trained
from embodied.train_dynamics import dynamics_data

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import add_label, make_episode, write_store

MOVE = 0.1


class Line:
    """One number that moves by a tenth of the action; pays where it is; ends above `end`."""

    fingerprint = "line"

    def __init__(self, end: float = np.inf) -> None:
        self.end = end

    def step(self, observations: torch.Tensor, actions: torch.Tensor, rng: Any, penalty: str | None = None) -> Any:
        after = observations + MOVE * actions
        return after, after[:, 0], after[:, 0] > self.end, None


def goes_right(values: Any = None, temperature: float = 0.0, discount: float = 0.9, name: str = "ravl") -> Any:
    """A policy that always takes action 1, with critics written by hand: what `load_trained` gives, on a known case."""
    critics = values or (lambda s, a: torch.stack([s[:, 0], s[:, 0] + 1.0]))
    return SimpleNamespace(
        act=lambda s, rng: (torch.ones(len(s), 1), torch.full((len(s),), -2.0)),
        values=critics,
        paid=lambda reward: 2.0 * reward,
        temperature=temperature,
        config=SimpleNamespace(discount=discount),
        name=name,
    )


def look(
    trained: Any, steps: int = 4, model: Any = None, rollouts: int = 1600
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Recorded states fill [0, 1]: k steps to the right lead to 1 + k / 10 at most."""
    rng = np.random.default_rng(0)
    recorded = np.sort(rng.random(1500)).astype(np.float32)[:, None]
    return examine(trained, model or Line(), recorded, np.arange(len(recorded)), steps, rollouts, rng)


def test_a_target_is_at_the_edge_where_only_the_last_step_leads() -> None:
    found, arrays = look(goes_right())
    edge, states = arrays["edge"], arrays["states"][:, 0]
    beyond = states > 1.0 + 3 * MOVE  # the third step leads to 1.3; what lies farther, no state is passed through
    assert (arrays["step"][edge] == 4).all()
    assert edge[beyond].mean() > 0.9
    last = arrays["step"] == 4
    assert edge[last & ~beyond].mean() < 0.03  # as many as trained states show themselves: 1 %
    # Starts are uniform on [0, 1], so that a tenth of the last states is beyond, of four steps' targets a fortieth.
    assert found["steps"][4]["untrained"] == pytest.approx(0.1, abs=0.03)
    assert found["untrained"] == pytest.approx(0.025, abs=0.008)
    assert found["untrained"] == edge.sum() / found["targets"]
    assert found["targets"] == 4 * 800
    for row in found["steps"][1:]:  # cut earlier, it would be the same tenth
        assert row["untrained"] == pytest.approx(0.1, abs=0.03)


def test_distances_are_to_recorded_states_in_units_of_their_spread() -> None:
    found, arrays = look(goes_right())
    last = arrays["states"][:, 0] > 1.01  # recorded states are uniform on [0, 1], of spread 1 / sqrt(12)
    away = (arrays["states"][last, 0] - 1.0) * np.sqrt(12)
    np.testing.assert_allclose(arrays["distance"][last], away, rtol=0.04, atol=5e-3)
    assert (arrays["distance"][arrays["states"][:, 0] < 0.99] < 0.03).all()
    assert found["steps"][0]["distance"]["median"] > 0.0  # a start is not its own neighbour
    assert nearest(torch.tensor([[0.0]]), torch.tensor([[0.0], [3.0]])).item() == 3.0


def test_critics_are_asked_inside_and_at_the_edge() -> None:
    def opinions(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        away = (s[:, 0] - 1.3).clamp_min(0.0)
        return torch.stack([5.0 + 100.0 * away, 7.0 + 200.0 * away])

    found, arrays = look(goes_right(opinions))
    np.testing.assert_allclose(found["value"]["inside"], 5.0)  # the least of the two
    np.testing.assert_allclose(found["spread"]["inside"], np.sqrt(2.0))  # torch's std of two numbers 2 apart
    outer = arrays["states"][arrays["edge"], 0]
    np.testing.assert_allclose(found["value"]["edge"], np.median(5 + 100 * np.clip(outer - 1.3, 0, None)), rtol=1e-4)
    assert found["value"]["above"] > 0.75  # but for 1 % that are inside, and equals
    assert found["by_distance"][-1]["value"] > found["by_distance"][0]["value"]


def test_rollouts_stop_at_an_end_and_rewards_are_the_learners() -> None:
    path = walk(goes_right(), Line(end=0.25), torch.tensor([[0.0], [5.0]]), 4, np.random.default_rng(0))
    assert path.alive.T.tolist() == [[True, True, True, False, False], [True, False, False, False, False]]
    np.testing.assert_allclose(path.rewards[:, 0], [0.2, 0.4, 0.6, 0.0], atol=1e-6)
    found, _ = look(goes_right(), model=Line(end=0.5))
    alive = [row["alive"] for row in found["steps"]]
    assert alive[1] == pytest.approx(0.4, abs=0.04)
    assert alive[4] == pytest.approx(0.1, abs=0.03)
    assert found["steps"][4]["untrained"] < 0.06  # nothing gets beyond the data before it ends


def test_true_returns_are_discounted_and_count_the_entropy() -> None:
    start = np.array([[0.0], [0.3]], np.float32)
    said, true, horizon = true_values(goes_right(), Line(), start, np.random.default_rng(0))
    assert horizon == 44  # 0.9^44 < 0.01
    steps = np.arange(horizon)
    for value, s in zip(true, start[:, 0], strict=True):
        np.testing.assert_allclose(value, 2 * (0.9**steps * (s + MOVE * (steps + 1))).sum(), rtol=1e-5)
    np.testing.assert_allclose(said, start[:, 0])
    _, soft, _ = true_values(goes_right(temperature=0.5), Line(), start, np.random.default_rng(0))
    np.testing.assert_allclose(soft - true, 0.5 * 2.0 * (0.9 ** (steps + 1)).sum(), rtol=1e-5)
    _, ended, _ = true_values(goes_right(), Line(end=0.35), start, np.random.default_rng(0))
    np.testing.assert_allclose(ended, [2 * (0.1 + 0.9 * 0.2 + 0.81 * 0.3 + 0.729 * 0.4), 2 * 0.4], rtol=1e-5)


def test_the_verdict_follows_from_the_figures() -> None:
    def judged(values: Any, truth: dict[str, Any] | None = None) -> tuple[str, dict[str, str]]:
        found, _ = look(goes_right(values), rollouts=500)
        found["steps"][-1]["untrained"] *= 2  # a fifth: the share at which it matters
        found["rewards"]["largest_known"] = 2.0
        found |= {"truth": truth} if truth else {}
        result = verdict(found, 0.9, True)
        return result["word"], {check["name"]: check["word"] for check in result["checks"]}

    def climbs(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.stack([s[:, 0], s[:, 0] + 1.0])

    def careful(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        away = 50.0 * (s[:, 0] - 1.28).clamp_min(0.0)
        return torch.stack([1.0 - away, 1.1 + away])

    assert judged(climbs) == ("doubtful", {"reach": "doubtful", "pull": "doubtful", "doubt": "doubtful"})
    assert judged(careful) == ("ok", {"reach": "doubtful", "pull": "ok", "doubt": "ok"})
    assert judged(lambda s, a: climbs(s, a) + 30.0)[1]["bound"] == "bad"  # rewards of 2 allow 20
    honest = against_truth(np.array([1.0, 2.0, 3.0]), np.array([1.1, 2.1, 2.9]), np.random.default_rng(0))
    high = against_truth(np.array([9.0, 8.0, 9.5]), np.array([1.0, 2.0, 1.5]), np.random.default_rng(0))
    assert high["over"] == pytest.approx(22 / 3)
    assert 6.0 <= high["low"] < high["over"] < high["high"] <= 8.0
    assert judged(careful, {"inside": honest})[0] == "ok"
    assert judged(careful, {"inside": honest, "edge": high})[0] == "bad"
    found, _ = look(goes_right(climbs))
    found["rewards"]["largest_known"] = 2.0
    text = verdict(found, 0.9, False)["checks"][0]["text"]
    assert "recorded actions alone" in text


def test_recorded_targets_that_begin_no_step() -> None:
    frame = np.array([0, 1, 2, 4, 5])  # an episode cut after frame 3, one that terminates
    assert recorded_edge(frame, frame + 1, np.array([1, 1, 1, 1, 0.0])) == {"targets": 4, "untrained": 0.25}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dynamics, RAVL on them (two seeds, so two runs), IQL and BC on a made store."""
    folder = tmp_path_factory.mktemp("reach")
    store = write_store(folder / "s.zarr", [make_episode(index) for index in range(6)])
    add_label(store, "up", np.tanh(store.read("observation/joint_position")[:, 0]).astype(np.float32))
    small = ["hidden_sizes", "8", "batch_size", "16"]
    rolls = ["--settings", "rollouts", "20", "updates_per_epoch", "5", "members", "3", *small]
    tiny = ["max_epochs", "2", "members", "3", "elites", "2", "hidden_sizes", "8", "weight_decay", "0,0"]
    paths = {name: str(folder / name) for name in ("dynamics", "ravl", "iql", "bc")}
    own = f"{paths['dynamics']}/seed_000"
    for command in (
        ["dynamics", store.path, "--reward", "up", "--out", paths["dynamics"], "--settings", *tiny],
        ["ravl", store.path, "--reward", "up", "--dynamics", own, "--out", paths["ravl"], "--seeds", "2", *rolls],
        ["iql", store.path, "--reward", "up", "--out", paths["iql"], "--seeds", "1", "--settings", *small],
        ["bc", store.path, "--out", paths["bc"], "--seeds", "1", "--settings", *small],
    ):
        steps = [] if command[0] == "dynamics" else ["--steps", "20"]
        at = command.index("--settings")
        assert main(["train", *command[:at], *steps, *command[at:]]) == 0
    return {"store": store.path, "own": own, **paths}


def test_the_critics_found_are_those_of_the_bundle(runs: dict[str, Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        trained = load_trained(f"{runs['ravl']}/seed_00{seed}")
        assert isinstance(trained, Trained)
        assert trained.config.members == 3
        policy = load_policy(f"{runs['ravl']}/seed_00{seed}")
        states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        with torch.inference_mode():
            mean = trained.learner.actor(((torch.from_numpy(states) - trained.mean) / trained.std)[None])[0]
        expected = policy.act_batch({"joint_position": states})
        np.testing.assert_allclose(torch.tanh(mean[trained.index]).detach(), expected, atol=1e-6)
        q = trained.values(torch.from_numpy(states), torch.from_numpy(expected))
        assert q.shape == (3, 50)
    # The right folder, another run's checkpoint: refused, however alike.
    other = tmp_path / "moved" / "seed_000"
    other.parent.mkdir()
    Path(runs["ravl"], "seed_000").rename(other)
    try:
        with pytest.raises(BundleError, match="there is none"):
            load_trained(other)
        target = other.parent / "checkpoint.safetensors"
        target.write_bytes(Path(runs["ravl"], "runs", "seed_001", "checkpoint.safetensors").read_bytes())
        with pytest.raises(BundleError, match="critics are in the checkpoint"):
            load_trained(other)
        with safe_open(Path(runs["ravl"], "runs", "seed_000", "checkpoint.safetensors"), framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tensors, target, metadata=metadata)
        assert load_trained(other).index == 0
        tensors["actor.mlp.layers.0.bias"] += 1e-3  # as after another step
        save_file(tensors, target, metadata=metadata)
        with pytest.raises(BundleError, match="has another actor"):
            load_trained(other)
    finally:
        other.rename(Path(runs["ravl"], "seed_000"))


def test_the_verb_writes_a_page_and_says_why(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["diagnose", "reach", f"{runs['ravl']}/seed_000", runs["store"], "--rollouts", "200"]
    assert main([*command, "--out", str(tmp_path / "page")]) == 0
    assert "never trained if cut here" in capsys.readouterr().out
    page = (tmp_path / "page" / "reach.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert (tmp_path / "page" / "reach.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((tmp_path / "page" / "reach.json").read_text())
    assert result["verdict"] in page
    assert result["dynamics"] == runs["own"]  # the ones it was trained on, without being told
    assert result["reward"] == "up"
    assert len(result["steps"]) == result["rollout_steps"] + 1 == 6
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == result  # a function of the seed
    store = EpisodeStore(runs["store"])
    data, _ = dynamics_data(store, ("joint_position",), "up", lambda *_: None)  # type: ignore[arg-type]
    assert result["recorded"]["targets"] == int((~data.terminated).sum())


def test_a_learner_without_a_model_is_told_what_is_missing(
    runs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["diagnose", "reach", f"{runs['iql']}/seed_000", runs["store"], "--rollouts", "60", "--json"]
    assert main(command) != 0
    assert "--dynamics BUNDLE" in capsys.readouterr().err
    assert main([*command, "--dynamics", runs["own"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["learner"] == "iql"
    assert "recorded actions alone" in result["checks"][0]["text"]
    assert main(["diagnose", "reach", f"{runs['bc']}/seed_000", runs["store"], "--dynamics", runs["own"]]) != 0
    assert "learns no values" in capsys.readouterr().err


def test_changed_dynamics_are_not_taken_for_those_it_was_trained_on(runs: dict[str, Any], tmp_path: Path) -> None:
    moved = tmp_path / "gone"
    Path(runs["own"]).rename(moved)
    try:
        assert main(["diagnose", "reach", f"{runs['ravl']}/seed_000", runs["store"]]) != 0
    finally:
        moved.rename(runs["own"])
    assert load_dynamics(runs["own"]).observation_size == 3


def test_another_environment_is_refused(runs: dict[str, Any]) -> None:
    from embodied.progress import Progress
    from embodied.rollout_model import rollout_model

    with pytest.raises(InputError, match="has 17 observations"):
        rollout_model(EpisodeStore(runs["store"]), Path("env:Walker2d-v5"), "source", None, (), "cpu", Progress())

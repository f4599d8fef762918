"""Rollouts and what learns on them: truncation is no end, buffers are functions of seed and step, a resume is exact."""

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError
from embodied.policies.edac import EDAC, EDACConfig
from embodied.policies.mopo import MOPOConfig
from embodied.policies.networks import generators
from embodied.policies.ravl import RAVL, RAVLConfig
from embodied.policies.rollouts import Rollouts
from embodied.policies.squashed import SquashedActor
from embodied.policies.train import TransitionData, train

torch.set_num_threads(1)
D, A = 2, 1
NO_CHANGE = {"scale": 1.0, "shift": 0.0, "at_most_zero": False}


class Line:
    """A known model: s0 moves by the action, s1 counts steps; pays s0; ends above `end`; doubts in proportion to s1."""

    fingerprint = "line"

    def __init__(self, end: float = np.inf) -> None:
        self.end = end

    def step(
        self, observations: torch.Tensor, actions: torch.Tensor, rng: np.random.Generator, penalty: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        noise = torch.from_numpy(rng.standard_normal(len(observations), np.float32))
        after = torch.stack([observations[:, 0] + actions[:, 0] + 0.01 * noise, observations[:, 1] + 1.0], 1)
        return after, after[:, 0], after[:, 0] > self.end, observations[:, 1] if penalty else None


def fields(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return table.split([D, A, 1, 1, D], -1)


def make(config: Any, model: Any = None, seeds: tuple[int, ...] = (0,), **changes: Any) -> Rollouts:
    rng = np.random.default_rng(0)
    arguments: dict[str, Any] = {
        "observations": np.stack([rng.normal(size=50), np.zeros(50)], 1).astype(np.float32),
        "starts": np.arange(40),
        "mean": np.zeros(D, np.float32),
        "std": np.ones(D, np.float32),
        "reward": NO_CHANGE,
        "config": config,
        "seeds": seeds,
        "action_size": A,
    }
    actor = SquashedActor(generators(seeds), D, A, (8,))
    return Rollouts(model or Line(), actor, **(arguments | changes))


def weights(rollouts: Rollouts) -> dict[str, torch.Tensor]:
    return rollouts._actor.state_dict()


SHORT = RAVLConfig(rollouts=30, rollout_length=4, epochs_kept=2, hidden_sizes=(8,), batch_size=16)


def test_truncation_after_k_steps_is_never_an_end() -> None:
    rollouts = make(SHORT)
    rollouts.fill(0, weights(rollouts))
    assert rollouts.counts.tolist() == [[120, 0]]  # nothing ended: 30 rollouts of 4 steps
    now, _, _, mask, after = fields(rollouts.table[0, :120])
    assert (mask == 1.0).all()
    assert after[now[:, 1] == 3.0][:, 1].unique().tolist() == [
        4.0
    ]  # the last steps are there, and are bootstrapped from


def test_a_termination_is_an_end_and_stops_its_rollout_alone() -> None:
    rollouts = make(SHORT, Line(end=0.5))
    rollouts.fill(0, weights(rollouts))
    count = rollouts.counts[0, 0]
    now, _, _, mask, after = fields(rollouts.table[0, :count])
    ended = after[:, 0] > 0.5
    assert torch.equal(mask[:, 0] == 0, ended)
    assert 0 < int(ended.sum()) < count < 120
    # One row per rollout and step that was begun: as many at step t + 1 as were alive after step t.
    for step in range(3):
        alive = int((~ended & (now[:, 1] == step)).sum())
        assert int((now[:, 1] == step + 1).sum()) == alive


def test_each_row_is_a_step_of_the_model_in_its_own_units() -> None:
    mean, std = np.array([5.0, 2.0], np.float32), np.array([2.0, 4.0], np.float32)
    seen = np.zeros((50, D), np.float32)
    rollouts = make(
        SHORT, mean=mean, std=std, observations=seen, reward={"scale": 0.5, "shift": -4.0, "at_most_zero": True}
    )
    rollouts.fill(0, weights(rollouts))
    now, action, paid, _, after = fields(rollouts.table[0, :120])
    before, following = now * torch.from_numpy(std) + torch.from_numpy(mean), after * torch.from_numpy(std) + 0.0
    following = following + torch.from_numpy(mean)
    np.testing.assert_allclose(following[:, 0], (before + action)[:, 0], atol=0.06)  # the model's noise is 0.01
    np.testing.assert_allclose(following[:, 1], before[:, 1] + 1.0, rtol=1e-5)
    np.testing.assert_allclose(paid[:, 0], np.minimum(following[:, 0] * 0.5 - 4.0, 0.0), rtol=1e-4, atol=1e-5)


def test_the_penalty_is_lambda_times_the_doubt() -> None:
    config = MOPOConfig(rollouts=30, rollout_length=3, epochs_kept=1, penalty_coefficient=2.5)
    rollouts = make(config)
    rollouts.fill(0, weights(rollouts))
    now, _, paid, _, after = fields(rollouts.table[0, :90])
    np.testing.assert_allclose(paid[:, 0], after[:, 0] - 2.5 * now[:, 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="aleatoric, pairwise"):
        make(dataclasses.replace(config, penalty="doubt"))


def test_a_model_that_runs_away_is_left_out() -> None:
    class Explodes(Line):
        def step(self, observations: torch.Tensor, *args: Any) -> Any:
            after, paid, ended, doubt = super().step(observations, *args)
            after[observations[:, 1] == 2.0] = torch.inf
            return after, paid, ended, doubt

    rollouts = make(SHORT, Explodes())
    rollouts.fill(0, weights(rollouts))
    assert rollouts.counts[0, 0] == 60  # two of the four steps
    assert torch.isfinite(rollouts.table[0, :60]).all()


def test_batches_are_uniform_over_the_last_epochs_and_functions_of_seed_and_step() -> None:
    rollouts = make(SHORT, Line(end=0.5), seeds=(0, 5))
    for epoch in range(3):
        rollouts.fill(epoch, weights(rollouts))
    assert sorted(rollouts.epochs) == [1, 2]  # epoch 0 was replaced
    valid = [
        torch.cat([rollouts.table[s, p * 120 : p * 120 + rollouts.counts[s, p]] for p in range(2)]) for s in range(2)
    ]
    seen = np.concatenate([rollouts.batch(step, 200)["next_observations"].numpy() for step in range(40)], 1)
    for s in range(2):
        known = {tuple(row) for row in valid[s][:, -D:].tolist()}
        counts: dict[tuple[float, ...], int] = {}
        for row in seen[s].tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        assert set(counts) == known  # every row that is held, and none that is not
        expected = 8000 / len(known)
        assert max(abs(c - expected) for c in counts.values()) < 6 * np.sqrt(expected)
    again = make(SHORT, Line(end=0.5), seeds=(5,))
    for epoch in (1, 2):  # another order of steps, one seed alone
        again.fill(epoch, {name: value[1:] for name, value in weights(rollouts).items()})
    both: Any = rollouts.batch(37, 200)
    alone: Any = again.batch(37, 200)
    for key, value in alone.items():
        np.testing.assert_allclose(value[0], both[key][1], rtol=1e-5, atol=1e-6)


def test_fifty_thousand_rollouts_of_five_epochs_take_under_two_gigabytes() -> None:
    config = RAVLConfig(hidden_sizes=(8,))
    tracemalloc.start()
    rollouts = make(config)
    rollouts.fill(0, weights(rollouts))
    _, peak = tracemalloc.get_traced_memory()  # NumPy's; the table is torch's
    tracemalloc.stop()
    assert rollouts.table.shape == (1, 50_000 * 5 * 5, 2 * D + A + 2)
    hopper = 4 * 50_000 * 5 * 5 * (2 * 11 + 3 + 2)
    assert peak + hopper < 200e6


def transitions() -> TransitionData:
    rng = np.random.default_rng(1)
    frames = 120
    observations = np.stack([rng.normal(size=frames), rng.normal(size=frames)], 1).astype(np.float32)
    frame = np.arange(frames - 1)
    return TransitionData(
        observations=observations,
        actions=rng.uniform(-1, 1, (frames, A)).astype(np.float32),
        frame=frame,
        next_frame=frame + 1,
        reward=rng.normal(size=frames - 1).astype(np.float32),
        masks=np.ones(frames - 1, np.float32),
    )


LEARN = RAVLConfig(
    members=3, hidden_sizes=(8, 8), batch_size=20, real_share=0.25, rollouts=20, updates_per_epoch=10, epochs_kept=3
)


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "checkpoint.safetensors")


def run(out: Path, steps: int, seeds: tuple[int, ...] = (3,), config: Any = LEARN, learner: str = "ravl") -> Any:
    return train(
        learner, transitions(), config, seeds, steps, out, log_every=5, checkpoint_every=5, model=Line(end=2.0)
    )


def test_a_killed_run_makes_the_same_rollouts_again_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    run(tmp_path / "whole", 60)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, text: str) -> None:
        if done == 45:  # within the fifth epoch of ten updates: three epochs of rollouts are alive
            raise Killed

    with pytest.raises(Killed):
        train(
            "ravl", transitions(), LEARN, (3,), 60, tmp_path / "cut", log_every=5, checkpoint_every=5,
            model=Line(end=2.0), progress=kill,
        )  # fmt: skip
    held = {key.split(".")[1] for key in checkpoint(tmp_path / "cut") if key.startswith("rollouts.")}
    assert held == {"2", "3", "4"}
    run(tmp_path / "cut", 60)
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    assert set(whole) == set(cut)
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


@pytest.mark.parametrize("learner", ["ravl", "mopo", "edac"])
def test_a_stack_of_seeds_learns_as_each_would_alone(tmp_path: Path, learner: str) -> None:
    config: Any = LEARN
    if learner == "mopo":
        names = {f.name for f in dataclasses.fields(MOPOConfig)} - {"members", "diversity"}
        config = MOPOConfig(**{k: v for k, v in dataclasses.asdict(LEARN).items() if k in names})
    if learner == "edac":
        config = EDACConfig(members=3, hidden_sizes=(8, 8), batch_size=20)
    model = None if learner == "edac" else Line(end=2.0)
    for name, seeds in (("both", (3, 8)), ("alone", (8,))):
        train(learner, transitions(), config, seeds, 15, tmp_path / name, log_every=5, model=model)
    both, alone = checkpoint(tmp_path / "both"), checkpoint(tmp_path / "alone")
    for name, value in alone.items():
        if value.ndim and "optimizer" not in name:
            # Weights move by up to 7e-3; products of a stack round otherwise than those of one.
            np.testing.assert_allclose(both[name][len(value) :], value, rtol=1e-3, atol=2e-4, err_msg=name)


def test_a_batch_holds_the_declared_share_of_recorded_steps(tmp_path: Path) -> None:
    shares = []

    class Spy(Line):
        def step(self, observations: torch.Tensor, *args: Any) -> Any:
            after, paid, ended, doubt = super().step(observations, *args)
            return after, torch.full_like(paid, 77.0), ended, doubt

    original = RAVL.update

    def update(self: RAVL, batch: Any) -> dict[str, torch.Tensor]:
        shares.append((batch["rewards"] == 77.0).float().mean().item())
        return original(self, batch)

    patch = pytest.MonkeyPatch()
    patch.setattr(RAVL, "update", update)
    train("ravl", transitions(), LEARN, (0,), 12, tmp_path, model=Spy())
    patch.undo()
    assert shares == [0.75] * 12


def test_a_learner_on_a_model_refuses_to_run_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dynamics"):
        train("ravl", transitions(), LEARN, (0,), 10, tmp_path)


def update_by_autograd(learner: EDAC, batch: Any, noise: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """EDAC's losses written out as CORL has them, without this learner's shortcuts: gradients per network."""
    config = learner.config
    actions, log_prob = learner.actor.sample(batch["observations"], noise[:, 0])
    d_temperature = -(log_prob.detach().mean(-1) + learner.target_entropy)
    log_alpha = learner.temperature.log.detach() - config.temperature_learning_rate * torch.sign(d_temperature)
    q = networks(learner.critic, batch["observations"], actions)
    loss = (log_alpha.exp().unsqueeze(-1) * log_prob - q.amin(1)).mean(-1).sum()
    return {
        "temperature": [d_temperature],
        "actor": list(torch.autograd.grad(loss, list(learner.actor.parameters()))),
    }


def networks(critic: Any, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    h = torch.cat([observations, actions], -1).repeat_interleave(critic.members, 0)
    for number, layer in enumerate(critic.mlp.layers):
        h = h @ layer.weight + layer.bias
        h = torch.relu(h) if number < len(critic.mlp.layers) - 1 else h
    return h.view(len(observations), critic.members, -1)


def test_an_update_equals_the_losses_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        config = EDACConfig(members=4, hidden_sizes=(8, 8), batch_size=10, diversity=0.7)
        learner = EDAC(config, [0, 1], D, A, 10)
        rng = np.random.default_rng(0)
        batch: Any = {
            "observations": torch.from_numpy(rng.normal(size=(2, 10, D))),
            "actions": torch.from_numpy(rng.uniform(-0.9, 0.9, (2, 10, A))),
            "rewards": torch.from_numpy(rng.normal(size=(2, 10))),
            "masks": torch.from_numpy(rng.integers(0, 2, (2, 10)).astype(float)),
            "next_observations": torch.from_numpy(rng.normal(size=(2, 10, D))),
        }
        with torch.no_grad():
            for module in (learner.critic, learner.target_critic):  # critics that differ, and a target that differs
                for parameter in module.parameters():
                    parameter.add_(torch.from_numpy(rng.normal(size=parameter.shape, scale=0.3)))
        noise = learner._noise(0)
        wanted = update_by_autograd(learner, batch, noise)
        found: dict[str, list[torch.Tensor]] = {}
        for name in ("temperature", "actor", "critic"):
            optimizer = getattr(learner, f"{name}_optimizer")

            def step(gradients: list[torch.Tensor], name: str = name, original: Any = optimizer.step) -> None:
                found[name] = [g.clone() for g in gradients]
                original(gradients)

            monkeypatch.setattr(optimizer, "step", step)
        learner.update(batch)
        for name, gradients in wanted.items():
            for one, other in zip(found[name], gradients, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12, err_msg=name)
        assert len(found["critic"]) == 6
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_target_is_the_minimum_over_all_critics_less_the_entropy_term() -> None:
    torch.manual_seed(0)
    config = EDACConfig(members=5, hidden_sizes=(8,), batch_size=6, discount=0.9)
    learner = EDAC(config, [0], D, A, 10)
    with torch.no_grad():
        learner.target_critic.mlp.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
        learner.temperature.log.fill_(np.log(0.3))
    batch: Any = {
        "next_observations": torch.randn(1, 6, D),
        "rewards": torch.randn(1, 6),
        "masks": torch.tensor([[1.0, 1, 0, 1, 0, 1]]),
    }
    noise = torch.randn(1, 6, A)
    actions, log_prob = learner.actor.sample(batch["next_observations"], noise)
    q = networks(learner.target_critic, batch["next_observations"], actions).detach().numpy()[0]
    assert len(set(q.argmin(0))) > 1
    value = q.min(0) - 0.3 * log_prob.detach().numpy()[0]
    expected = batch["rewards"].numpy()[0] + 0.9 * batch["masks"].numpy()[0] * value
    np.testing.assert_allclose(learner.target(batch, noise)[0], expected, rtol=1e-5, atol=1e-6)

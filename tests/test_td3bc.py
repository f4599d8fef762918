"""TD3+BC: updates against a float64 NumPy reference in the authors' order, stacking, resuming, learning."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.batch import Batch
from embodied.datasets.draws import Stream, philox
from embodied.policies.bc import BC, BCConfig
from embodied.policies.td3bc import PRESETS, TD3BC, TD3BCConfig

sys.path.insert(0, str(Path(__file__).parent))
from learner_checks import (
    KEYS,
    A,
    B,
    D,
    check_actions_are_clipped,
    check_resume,
    check_run_resumes,
    check_stack_equals_separate,
    point_steps,
    random_batch,
)
from numpy_networks import Net, assert_equal

torch.set_num_threads(1)
SMALL = TD3BCConfig(hidden_sizes=(6, 5), batch_size=B, learning_rate=0.01, target_update_rate=0.2)


@pytest.fixture
def double():
    """Parity is asked for in double precision: single precision would hide a wrong term behind its rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise_of(seed: int, step: int) -> np.ndarray:
    """The numbers of a step, from the definition."""
    drawn = philox(seed, step // 16, Stream.SMOOTHING).standard_normal((16, B, A), dtype=np.float32)
    return drawn[step % 16].astype(float)


def test_four_updates_equal_a_numpy_reference_in_the_authors_order(double: None) -> None:
    learner = TD3BC(SMALL, [3], D, A, steps=10)
    actor, target_actor = Net(learner.actor.mlp), Net(learner.actor.mlp)
    critics = [Net(learner.critic.mlp, e) for e in range(2)]
    targets = [Net(learner.critic.mlp, e) for e in range(2)]
    for k in range(4):
        batch = random_batch(1, k)
        metrics = learner.update(batch)
        s, a, r, mask, n = (batch[key][0].numpy() for key in KEYS[:5])
        noise = np.clip(0.2 * noise_of(3, k), -0.5, 0.5)
        next_action = np.clip(np.tanh(target_actor(n)) + noise, -1, 1)
        na = np.concatenate([n, next_action], 1)
        y = r + 0.99 * mask * np.minimum(targets[0](na), targets[1](na))[:, 0]
        sa, loss = np.concatenate([s, a], 1), 0.0
        for critic in critics:
            q, kept = critic.forward(sa)
            loss += ((q[:, 0] - y) ** 2).mean()
            critic.adam(critic.backward(kept, 2 * (q - y[:, None]) / B)[0], 0.01)
        assert metrics["critic_loss"].item() == pytest.approx(loss, rel=1e-6)
        if k % 2 == 0:  # an odd number of updates: the actor waits
            assert metrics["actor_loss"].item() == 0
            continue
        u, kept = actor.forward(s)
        action = np.tanh(u)
        q, kept_q = critics[0].forward(np.concatenate([s, action], 1))  # the first critic, after its step
        scale = 2.5 / np.abs(q).mean()
        error = ((action - a) ** 2).mean()
        assert metrics["actor_loss"].item() == pytest.approx(2 * (error - scale * q.mean()), rel=1e-6)
        assert metrics["squared_error"].item() == pytest.approx(2 * error, rel=1e-6)
        d_action = critics[0].backward(kept_q, np.full_like(q, -scale / B))[1][:, D:] + 2 * (action - a) / (B * A)
        actor.adam(actor.backward(kept, d_action * (1 - action**2))[0], 0.01)
        target_actor.follow(actor, 0.2)
        for target, critic in zip(targets, critics, strict=True):
            target.follow(critic, 0.2)
    assert_equal(learner.actor, actor)
    assert_equal(learner.target_actor, target_actor)
    for e in range(2):
        assert_equal(learner.critic, critics[e], e)
        assert_equal(learner.target_critic, targets[e], e)


def test_losses_by_hand(double: None) -> None:
    """Critics that say 2 + sum of a and 3 + sum of a, an actor that says tanh(0.5)."""
    learner = TD3BC(TD3BCConfig(hidden_sizes=(1,), batch_size=2, smoothing_noise=0.0), [0], 1, 1, 10)
    with torch.no_grad():
        for module in (learner.actor, learner.critic, learner.target_actor, learner.target_critic):
            for p in module.parameters():
                p.zero_()
        for critic in (learner.critic, learner.target_critic):
            critic.mlp.layers[0].weight[:, 1] = 1.0  # h = relu(a + 2)
            critic.mlp.layers[0].bias.fill_(2.0)
            critic.mlp.layers[1].weight.fill_(1.0)
            critic.mlp.layers[1].bias[1] = 1.0
        for actor in (learner.actor, learner.target_actor):
            actor.mlp.layers[1].bias.fill_(0.5)
    one = torch.ones(1, 2, 1)
    batch = Batch(
        observations=one,
        actions=torch.tensor([[[0.5], [-0.5]]]),
        rewards=torch.tensor([[1.0, 0.0]]),
        masks=torch.tensor([[1.0, 0.0]]),
        next_observations=one,
    )
    pi = np.tanh(0.5)
    y = learner.target(batch, torch.zeros(1, 2, 1))
    assert y[0].tolist() == pytest.approx([1 + 0.99 * (2 + pi), 0.0])
    loss = learner.critic_loss(batch, y).item()
    first, second = 1 + 0.99 * (2 + pi), 0.0
    expected = sum(((b + 0.5 - first) ** 2 + (b - 0.5 - second) ** 2) / 2 for b in (2.0, 3.0))
    assert loss == pytest.approx(expected, rel=1e-9)
    actor_loss, error, q = learner.actor_loss(batch)
    squared = ((pi - 0.5) ** 2 + (pi + 0.5) ** 2) / 2
    assert error.item() == pytest.approx(squared)
    assert q.item() == pytest.approx(2 + pi)
    assert actor_loss.item() == pytest.approx(squared - 2.5)  # lambda |Q| is alpha


def test_the_weight_of_the_value_carries_no_gradient_and_knows_no_reward_scale(double: None) -> None:
    learner = TD3BC(SMALL, [1], D, A, 10)
    batch = random_batch(1)
    before = torch.autograd.grad(learner.actor_loss(batch)[0].sum(), list(learner.actor.parameters()))
    with torch.no_grad():
        learner.critic.mlp.layers[-1].weight.mul_(1000.0)
        learner.critic.mlp.layers[-1].bias.mul_(1000.0)
    after = torch.autograd.grad(learner.actor_loss(batch)[0].sum(), list(learner.actor.parameters()))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9)
    assert max(float(g.abs().max()) for g in before) > 1e-3  # it is not the squared error's alone, and not 0


def test_target_noise_is_clipped_and_the_action_stays_in_range(double: None) -> None:
    learner = TD3BC(SMALL, [1], D, A, 10)
    seen = []
    learner.target_critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    batch = random_batch(1)
    learner.target(batch, torch.full((1, B, A), 100.0))
    clean = learner.target_actor(batch["next_observations"])
    np.testing.assert_allclose(seen[0].numpy(), (clean + 0.5).clamp(-1, 1).detach().numpy())


def test_alpha_zero_clones(double: None) -> None:
    learner = TD3BC(TD3BCConfig(hidden_sizes=(16,), alpha=0.0, batch_size=B, learning_rate=0.01), [0, 1], D, A, 10)
    batch = random_batch(2)
    errors = [learner.update(batch)["squared_error"].mean().item() for _ in range(200)]
    assert errors[-1] < 0.3 * errors[1]


def test_stacked_training_equals_separate_training(double: None) -> None:
    check_stack_equals_separate(lambda seeds: TD3BC(SMALL, seeds, D, A, 10))


def test_state_dict_restores_the_run_exactly(double: None) -> None:
    check_resume(lambda seeds: TD3BC(SMALL, seeds, D, A, 10))


def test_actions_beyond_one_count_as_one(double: None) -> None:
    check_actions_are_clipped(lambda seeds: TD3BC(SMALL, seeds, D, A, 10))


def test_a_cut_run_ends_with_the_files_of_a_whole_one(tmp_path: Path) -> None:
    check_run_resumes("td3bc", tmp_path)


def test_it_finds_the_goal_in_random_data_and_cloning_does_not() -> None:
    """At x = -0.5, Q is about -5 and rises by 0.5 from a = 0 to 1: alpha 2.5 would hold a at 0.1, 25 does not."""
    common = {"hidden_sizes": (32, 32), "batch_size": 64, "learning_rate": 1e-3}
    learner = TD3BC(TD3BCConfig(alpha=25.0, discount=0.9, target_update_rate=0.03, **common), [0, 1, 2], 1, 1, 800)
    cloned = BC(BCConfig(**common), [0, 1, 2], 1, 1, 800)
    assert max(point_steps(learner, 3, 800, 64)) < 24  # with every seed
    assert min(point_steps(cloned, 3, 800, 64)) == 24  # random actions average 0


def test_presets_are_the_published_ones() -> None:
    published = PRESETS["locomotion"]
    assert (published.alpha, published.discount, published.target_update_rate) == (2.5, 0.99, 0.005)
    assert (published.smoothing_noise, published.noise_clip, published.actor_every) == (0.2, 0.5, 2)
    assert (published.observation_normalization, published.reward_normalization) == ("standard", "none")
    assert PRESETS["antmaze"].reward_normalization == "minus_one"

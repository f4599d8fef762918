"""ReBRAC: updates against a float64 NumPy reference in the authors' order, what differs from TD3+BC, learning."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.datasets.draws import Stream, philox
from embodied.datasets.resident import ResidentTransitions, transition_batches
from embodied.policies.bc import BC, BCConfig
from embodied.policies.rebrac import PRESETS, ReBRAC, ReBRACConfig
from embodied.policies.train import make_config

sys.path.insert(0, str(Path(__file__).parent))
from learner_checks import (
    A,
    B,
    D,
    check_actions_are_clipped,
    check_resume,
    check_run_resumes,
    check_stack_equals_separate,
    point_steps,
    random_batch,
    small_data,
)
from numpy_networks import Net, assert_equal

torch.set_num_threads(1)
SMALL = ReBRACConfig(
    hidden_sizes=(6, 5),
    batch_size=B,
    actor_learning_rate=0.01,
    critic_learning_rate=0.02,
    target_update_rate=0.2,
    actor_penalty=0.3,
    critic_penalty=0.7,
)


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
    learner = ReBRAC(SMALL, [3], D, A, steps=10)
    actor, target_actor = Net(learner.actor.mlp), Net(learner.actor.mlp)
    critics = [Net(learner.critic.mlp, e) for e in range(2)]
    targets = [Net(learner.critic.mlp, e) for e in range(2)]
    assert critics[0].normed
    assert not actor.normed
    for k in range(4):
        batch = random_batch(1, k)
        metrics = learner.update(batch)
        values = {key: value[0].numpy() for key, value in batch.items()}  # type: ignore[attr-defined]
        s, a, n = values["observations"], values["actions"], values["next_observations"]
        next_action = np.clip(np.tanh(target_actor(n)) + np.clip(0.2 * noise_of(3, k), -0.5, 0.5), -1, 1)
        na = np.concatenate([n, next_action], 1)
        distance = ((next_action - values["next_actions"]) ** 2).sum(1) * values["next_known"]
        next_q = np.minimum(targets[0](na), targets[1](na))[:, 0] - 0.7 * distance
        y = values["rewards"] + 0.99 * values["masks"] * next_q
        sa, loss = np.concatenate([s, a], 1), 0.0
        for critic in critics:
            q, kept = critic.forward(sa)
            loss += ((q[:, 0] - y) ** 2).mean()
            critic.adam(critic.backward(kept, 2 * (q - y[:, None]) / B)[0], 0.02)
        assert metrics["critic_loss"].item() == pytest.approx(loss, rel=1e-6)
        if k % 2:  # the actor moves at the first step and every second after it
            assert metrics["actor_loss"].item() == 0
            continue
        u, kept = actor.forward(s)
        action = np.tanh(u)
        pairs = [critic.forward(np.concatenate([s, action], 1)) for critic in critics]  # after their step
        first = pairs[0][0] <= pairs[1][0]
        q = np.minimum(pairs[0][0], pairs[1][0])
        scale = 1 / np.abs(q).mean()
        distance = ((action - a) ** 2).sum(1).mean()
        assert metrics["actor_loss"].item() == pytest.approx(2 * (0.3 * distance - scale * q.mean()), rel=1e-6)
        assert metrics["squared_error"].item() == pytest.approx(2 * distance / A, rel=1e-6)
        d_action = 0.3 * 2 * (action - a) / B
        for critic, (_, kept_q), chosen in zip(critics, pairs, (first, ~first), strict=True):
            d_action = d_action + critic.backward(kept_q, -scale / B * chosen)[1][:, D:]
        target_actor.follow(actor, 0.2)  # before the actor's step
        actor.adam(actor.backward(kept, d_action * (1 - action**2))[0], 0.01)
        for target, critic in zip(targets, critics, strict=True):
            target.follow(critic, 0.2)  # after the critics'
    assert_equal(learner.actor, actor)
    assert_equal(learner.target_actor, target_actor)
    for e in range(2):
        assert_equal(learner.critic, critics[e], e)
        assert_equal(learner.target_critic, targets[e], e)


def test_the_reference_itself_has_the_gradients_of_finite_differences(double: None) -> None:
    net = Net(ReBRAC(SMALL, [3], D, A, steps=10).critic.mlp)
    rng = np.random.default_rng(0)
    x, d = rng.normal(size=(4, D + A)), rng.normal(size=(4, 1))
    gradients, d_x = net.backward(net.forward(x)[1], d)
    for array, gradient in [*zip(net.p, gradients, strict=True), (x, d_x)]:
        index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        array[index] += 1e-6
        high = (net(x) * d).sum()
        array[index] -= 2e-6
        low = (net(x) * d).sum()
        array[index] += 1e-6
        assert gradient[index] == pytest.approx((high - low) / 2e-6, rel=1e-5)


def test_penalties_by_hand(double: None) -> None:
    """Critics and actor that say 0: what is left of the target and of the actor's loss are the penalties."""
    learner = ReBRAC(SMALL, [0], D, A, 10)
    with torch.no_grad():
        for module in (learner.actor, learner.critic, learner.target_actor, learner.target_critic):
            for p in module.mlp.layers[-1].parameters():
                p.zero_()
        learner.critic.mlp.layers[-1].bias.fill_(-4.0)
    batch = random_batch(1)
    batch["masks"] = torch.ones(1, B)
    batch["next_actions"] = torch.full((1, B, A), 0.5)  # at a distance of 2 * 0.25
    batch["next_known"] = (torch.arange(B) % 2).double()[None]
    batch["actions"] = torch.full((1, B, A), -1.0)
    y = learner.target(batch, torch.zeros(1, B, A)) - batch["rewards"]
    assert y[0, :4].tolist() == pytest.approx([0.0, -0.99 * 0.7 * 0.5] * 2)
    loss, distance, q = learner.actor_loss(batch)
    assert (distance.item(), q.item()) == (2.0, -4.0)
    assert loss.item() == pytest.approx(0.3 * 2.0 + 1.0)  # -Q / |Q| of a Q below 0


def test_next_actions_of_a_store_stop_at_the_end_of_an_episode() -> None:
    data = small_data()
    plain = ResidentTransitions(data, data.reward, [0], 64)
    assert set(plain(0)) == {"observations", "actions", "rewards", "masks", "next_observations"}
    with transition_batches(data, data.reward, [0, 1], 64, 5, next_actions=True) as batches:
        batch = batches(3)
        assert "next_actions" in batch
        assert "next_known" in batch
        now = {tuple(row): i for i, row in enumerate(data.observations)}
        last = 0
        for s in range(2):
            for b in range(64):
                i = now[tuple(batch["observations"][s, b].numpy())]
                if i % 31 == 29:  # its successor is the frame that nothing follows
                    assert batch["next_known"][s, b] == 0
                    last += 1
                else:
                    assert batch["next_known"][s, b] == 1
                    np.testing.assert_array_equal(batch["next_actions"][s, b].numpy(), data.actions[i + 1])
    assert last > 0


def test_initial_weights_are_the_authors() -> None:
    learner = ReBRAC(ReBRACConfig(hidden_sizes=(64, 64)), [0, 1], 7, 2, 10)
    for mlp, final, inputs in ((learner.actor.mlp, 1e-3, 7), (learner.critic.mlp, 3e-3, 9)):
        bounds = [1 / np.sqrt(inputs), 1 / 8, final]
        for layer, bound in zip(mlp.layers, bounds, strict=True):
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert abs(layer.weight.std() * np.sqrt(3) / bound - 1) < 0.15
        assert all((layer.bias == torch.tensor(0.1)).all() for layer in mlp.layers[:-1])
        assert 0 < mlp.layers[-1].bias.abs().max() <= final
    assert torch.equal(learner.actor.mlp.layers[0].weight, learner.target_actor.mlp.layers[0].weight)
    alone = ReBRAC(ReBRACConfig(hidden_sizes=(64, 64)), [1], 7, 2, 10)
    assert torch.equal(learner.critic.mlp.layers[1].weight[2:], alone.critic.mlp.layers[1].weight)


def test_stacked_training_equals_separate_training(double: None) -> None:
    check_stack_equals_separate(lambda seeds: ReBRAC(SMALL, seeds, D, A, 10))


def test_state_dict_restores_the_run_exactly(double: None) -> None:
    check_resume(lambda seeds: ReBRAC(SMALL, seeds, D, A, 10))


def test_actions_beyond_one_count_as_one(double: None) -> None:
    check_actions_are_clipped(lambda seeds: ReBRAC(SMALL, seeds, D, A, 10))


def test_a_cut_run_ends_with_the_files_of_a_whole_one(tmp_path: Path) -> None:
    check_run_resumes("rebrac", tmp_path)


def test_it_finds_the_goal_in_random_data_and_cloning_does_not() -> None:
    common = {"hidden_sizes": (32, 32), "batch_size": 64}
    config = ReBRACConfig(discount=0.9, target_update_rate=0.03, critic_penalty=0.0, **common)
    assert max(point_steps(ReBRAC(config, [0, 1, 2], 1, 1, 800), 3, 800, 64)) < 24  # with every seed
    cloned = BC(BCConfig(learning_rate=1e-3, **common), [0, 1, 2], 1, 1, 800)
    assert min(point_steps(cloned, 3, 800, 64)) == 24  # random actions average 0


def test_presets_are_the_published_ones() -> None:
    hopper = make_config("rebrac", "hopper-medium-replay")
    assert (hopper.actor_penalty, hopper.critic_penalty, hopper.batch_size, hopper.discount) == (0.05, 0.5, 1024, 0.99)
    assert (hopper.actor_learning_rate, hopper.critic_learning_rate, hopper.hidden_sizes) == (1e-3, 1e-3, (256,) * 3)
    maze = PRESETS["antmaze-large-diverse"]
    assert (maze.actor_penalty, maze.critic_penalty, maze.batch_size, maze.discount) == (0.002, 0.002, 256, 0.999)
    assert (maze.actor_learning_rate, maze.critic_learning_rate) == (3e-4, 5e-5)
    assert (maze.observation_normalization, maze.reward_normalization) == ("none", "hundred")
    assert len(PRESETS) == 5 + 18 + 6 + 12 + 1

"""CQL: updates against a float64 NumPy reference, the Lagrange multiplier, Cal-QL's floor, returns, learning."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.datasets.draws import Stream, philox
from embodied.datasets.resident import transition_batches
from embodied.policies.bc import BC, BCConfig
from embodied.policies.cql import CQL, PRESETS, CQLConfig
from embodied.policies.returns import returns_to_go

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
from numpy_networks import Net, Number, assert_equal

torch.set_num_threads(1)
N = 3
SMALL = CQLConfig(
    hidden_sizes=(6,),
    critic_hidden_sizes=(7, 5),
    batch_size=B,
    sampled_actions=N,
    actor_learning_rate=0.01,
    critic_learning_rate=0.02,
    target_update_rate=0.2,
    target_gap=-1.0,
)


@pytest.fixture
def double():
    """Parity is asked for in double precision: single precision would hide a wrong term behind its rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draws_of(seed: int, step: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """The normal and the uniform numbers of a step, from the definition."""
    size = (16, 1 + targets + 2 * N, B, A)
    normal = philox(seed, step // 16, Stream.ACTIONS).standard_normal(size, dtype=np.float32)[step % 16]
    uniform = philox(seed, step // 16, Stream.UNIFORM_ACTIONS).random((16, N, B, A), dtype=np.float32)[step % 16]
    return normal.astype(float), 2.0 * uniform.astype(float) - 1.0


def act(out: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """tanh(mean + std noise) and its log density, from the actor's output (B, 2 A)."""
    mean, log_std = out[:, :A], np.clip(out[:, A:], -20, 2)
    u = mean + np.exp(log_std) * noise
    density = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (density - np.log(1 - np.tanh(u) ** 2)).sum(-1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lagrange": True, "max_target": True},
        {"cal_ql": True, "backup_entropy": True},
        {"cal_ql": True, "lagrange": True, "max_target": True, "backup_entropy": True},
    ],
    ids=lambda changes: "+".join(changes) or "plain",
)
def test_three_updates_equal_a_numpy_reference(double: None, changes: dict[str, bool]) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    learner = CQL(config, [3], D, A, steps=10)
    with torch.no_grad():
        learner.critic.mlp.layers[-1].weight.mul_(100.0)  # values that matter from the first step on
        learner.actor.mlp.layers[-1].weight.mul_(30.0)
        learner.target_critic.load_state_dict(learner.critic.state_dict())
    actor = Net(learner.actor.mlp)
    critics = [Net(learner.critic.mlp, e) for e in range(2)]
    targets = [Net(learner.critic.mlp, e) for e in range(2)]
    log_temperature, log_multiplier = Number(0.0), Number(1.0)
    for k in range(3):
        batch = random_batch(1, k)
        metrics = learner.update(batch)
        values = {key: value[0].numpy() for key, value in batch.items()}  # type: ignore[attr-defined]
        s, n = values["observations"], values["next_observations"]
        a = np.clip(values["actions"], -1 + 1e-5, 1 - 1e-5)
        count = N if config.max_target else 1
        normal, uniform = draws_of(3, k, count)
        temperature, multiplier = np.exp(log_temperature.value), min(np.exp(log_multiplier.value), 1e6)

        out, kept = actor.forward(s)
        new, log_prob = act(out, normal[0])
        later = actor(n)
        best, best_log_prob = np.full(B, -np.inf), np.zeros(B)
        for j in range(count):
            action, density = act(later, normal[1 + j])
            q = np.minimum(*(t(np.concatenate([n, action], 1))[:, 0] for t in targets))
            best, best_log_prob = np.where(q > best, q, best), np.where(q > best, density, best_log_prob)
        bootstrap = best - temperature * best_log_prob if config.backup_entropy else best
        y = values["rewards"] + 0.99 * values["masks"] * bootstrap

        candidates = [(u, np.full(B, A * np.log(0.5)), False) for u in uniform]
        candidates += [(*act(out, normal[1 + count + j]), True) for j in range(N)]
        candidates += [(*act(later, normal[1 + count + N + j]), True) for j in range(N)]

        log_temperature_gradient = -(log_prob - A).mean()  # the target entropy is -A
        # Actor: temperature and critics of before this step.
        pairs = [critic.forward(np.concatenate([s, new], 1)) for critic in critics]
        first = pairs[0][0] <= pairs[1][0]
        q_new = np.minimum(pairs[0][0], pairs[1][0])
        actor_loss = (temperature * log_prob - q_new[:, 0]).mean()
        assert metrics["actor_loss"].item() == pytest.approx(actor_loss, rel=1e-6)
        d_new = np.zeros((B, A))
        for critic, (_, kept_q), chosen in zip(critics, pairs, (first, ~first), strict=True):
            d_new += critic.backward(kept_q, -1.0 / B * chosen)[1][:, D:]
        spread = np.exp(np.clip(out[:, A:], -20, 2))
        d_u = d_new * (1 - new**2) + temperature / B * 2 * new  # d(-log(1 - tanh^2 u)) = 2 tanh u
        d_out = np.concatenate([d_u, d_u * spread * normal[0] - temperature / B], 1)

        bellmans, gaps, floored = [], [], []
        for critic in critics:
            q_data, kept_data = critic.forward(np.concatenate([s, a], 1))
            rows = [(critic.forward(np.concatenate([s, c], 1)), density, own) for c, density, own in candidates]
            raw = np.stack([q[:, 0] for (q, _), _, _ in rows])  # (3 N, B)
            low = np.stack([own & (raw[i] < values["returns"]) for i, (_, _, own) in enumerate(rows)])
            floored.append(low[N:].mean())
            held = np.where(low & config.cal_ql, values["returns"], raw)
            logits = held - np.stack([density for _, density, _ in rows])
            top = logits.max(0)
            total = np.exp(logits - top).sum(0)
            gaps.append((top + np.log(total) - q_data[:, 0]).mean())
            bellmans.append(((q_data[:, 0] - y) ** 2).mean())
            weight = 5.0 * (multiplier if config.lagrange else 1.0)
            share = weight / B * np.exp(logits - top) / total * ~(low & config.cal_ql)
            d_data = 2 * (q_data - y[:, None]) / B - weight / B
            gradients = critic.backward(kept_data, d_data)[0]
            for ((_, kept_row), _, _), d in zip(rows, share, strict=True):
                more = critic.backward(kept_row, d[:, None])[0]
                gradients = [g + m for g, m in zip(gradients, more, strict=True)]
            critic.adam(gradients, 0.02)
        conservative = [5.0 * (gap + 1.0) * multiplier if config.lagrange else 5.0 * gap for gap in gaps]
        assert metrics["critic_loss"].item() == pytest.approx(sum(bellmans) + sum(conservative), rel=1e-6)
        assert metrics["gap"].item() == pytest.approx(np.mean(gaps), rel=1e-6)
        assert metrics["floored"].item() == pytest.approx(np.mean(floored) if config.cal_ql else 0.0)
        assert metrics["temperature"].item() == pytest.approx(temperature, rel=1e-9)
        assert metrics["multiplier"].item() == pytest.approx(multiplier, rel=1e-9)

        log_temperature.adam(log_temperature_gradient, 0.01)
        actor.adam(actor.backward(kept, d_out)[0], 0.01)
        if config.lagrange:
            log_multiplier.adam(-0.5 * sum(conservative), 0.02)
        for target, critic in zip(targets, critics, strict=True):
            target.follow(critic, 0.2)
    assert_equal(learner.actor, actor)
    for e in range(2):
        assert_equal(learner.critic, critics[e], e)
        assert_equal(learner.target_critic, targets[e], e)
    assert learner.log_temperature.value.item() == pytest.approx(log_temperature.value, rel=1e-9)
    assert learner.log_multiplier.value.item() == pytest.approx(log_multiplier.value, rel=1e-9)
    if config.cal_ql:
        assert 0 < metrics["floored"].item() < 1


def test_the_gap_by_hand(double: None) -> None:
    """Critics that say 0 everywhere: the gap is log of the sum of inverse densities; floored at 7, it is larger."""
    learner = CQL(dataclasses.replace(SMALL, cal_ql=True), [0], D, A, 10)
    with torch.no_grad():
        for p in learner.critic.parameters():
            p.zero_()
    batch = random_batch(1)
    actions, density = torch.zeros(1, 3 * N, B, A), torch.zeros(1, 3 * N, B)
    density[:, :N] = -2 * np.log(2.0)
    batch["returns"] = torch.full((1, B), -1.0)
    y = torch.full((1, B), 2.0)
    bellman, gap, _, floored = learner.critic_loss(batch, y, actions, density)
    assert bellman[0].tolist() == [4.0, 4.0]
    assert gap[0].tolist() == pytest.approx([np.log(4 * N + 2 * N)] * 2)
    assert floored.item() == 0
    batch["returns"] = torch.full((1, B), 7.0)
    _, gap, _, floored = learner.critic_loss(batch, y, actions, density)
    assert gap[0].tolist() == pytest.approx([np.log(4 * N + 2 * N * np.exp(7.0))] * 2)  # uniform actions stay at 0
    assert floored.item() == 1


def test_the_floor_stops_the_push_on_policy_actions_only(double: None) -> None:
    """Gradient of the gap by Q of each sampled action: the softmax; nothing where the floor holds."""
    learner = CQL(dataclasses.replace(SMALL, cal_ql=True), [0], D, A, 10)
    batch = random_batch(1)
    q = torch.zeros(1, 2, 1 + 3 * N, B, requires_grad=True)
    learner.critic.outputs = lambda s, a: q.flatten(2).unsqueeze(-1)  # type: ignore[method-assign]
    for returns, policy in ((-1.0, 1 / (3 * N)), (1.0, 0.0)):
        batch["returns"] = torch.full((1, B), returns)
        actions, density = torch.zeros(1, 3 * N, B, A), torch.zeros(1, 3 * N, B)
        gap = learner.critic_loss(batch, torch.zeros(1, B), actions, density)[1]
        (gradient,) = torch.autograd.grad(gap.sum(), q)
        uniform = 1 / (3 * N) if returns < 0 else 1 / (N + 2 * N * np.e)
        np.testing.assert_allclose(gradient[0, :, 1 : 1 + N].numpy(), uniform / B)
        np.testing.assert_allclose(gradient[0, :, 1 + N :].numpy(), policy / B)
        np.testing.assert_allclose(gradient[0, :, 0].numpy(), -1 / B)


def test_the_multiplier_rises_above_the_target_gap_and_falls_below(double: None) -> None:
    for target, sign in ((-50.0, 1), (50.0, -1)):
        learner = CQL(dataclasses.replace(SMALL, lagrange=True, target_gap=target), [0, 1], D, A, 10)
        for k in range(3):
            learner.update(random_batch(2, k))
        assert (sign * (learner.log_multiplier.value - 1.0) > 0.05).all()
    learner = CQL(SMALL, [0], D, A, 10)
    learner.update(random_batch(1))
    assert learner.log_multiplier.value.item() == 1.0  # a fixed penalty leaves it alone


@pytest.mark.parametrize("changes", [{}, {"cal_ql": True, "lagrange": True, "max_target": True}])
def test_stacked_training_equals_separate_training(double: None, changes: dict[str, bool]) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    check_stack_equals_separate(lambda seeds: CQL(config, seeds, D, A, 10), 6)


def test_state_dict_restores_the_run_exactly(double: None) -> None:
    check_resume(lambda seeds: CQL(dataclasses.replace(SMALL, lagrange=True, cal_ql=True), seeds, D, A, 10))


def test_actions_beyond_one_count_as_one(double: None) -> None:
    check_actions_are_clipped(lambda seeds: CQL(SMALL, seeds, D, A, 10))


def test_a_cut_run_ends_with_the_files_of_a_whole_one(tmp_path: Path) -> None:
    check_run_resumes("cql", tmp_path, cal_ql=True, critic_hidden_sizes="(8, 8)", sampled_actions=2)


def test_returns_by_hand_where_episodes_end_and_where_they_are_cut() -> None:
    """Three episodes in frames 0-2, 3-5, 6-7: the first terminates, the others are cut."""
    frame, next_frame = np.array([0, 1, 3, 4, 6]), np.array([1, 2, 4, 5, 7])
    masks = np.array([1.0, 0.0, 1.0, 1.0, 1.0])
    returns = returns_to_go(np.array([1.0, 2.0, 3.0, 4.0, 0.5]), masks, frame, next_frame, 0.5)
    assert returns.tolist() == [2.0, 2.0, 5.0, 4.0, 0.5]  # rewards above 0: nothing more is the least
    returns = returns_to_go(np.array([-1.0, 0.0, -1.0, -2.0, 0.0]), masks, frame, next_frame, 0.5)
    assert returns.tolist() == [-1.0, 0.0, -1.0 + 0.5 * -4.0, -4.0, -2.0]  # -2 for ever is -4
    shuffled = np.array([3, 0, 4, 2, 1])
    again = returns_to_go(
        np.array([-1.0, 0.0, -1.0, -2.0, 0.0])[shuffled],
        masks[shuffled],
        frame[shuffled],
        next_frame[shuffled],
        0.5,
    )
    assert again.tolist() == returns[shuffled].tolist()
    assert returns_to_go(np.full(5, -1.0), masks, frame, next_frame, 1.0).tolist()[:3] == [-2.0, -1.0, -np.inf]


def test_returns_never_exceed_what_the_behaviour_would_have_got() -> None:
    """Episodes of a process with random rewards, cut at random: the bound lies below the uncut return."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rewards = rng.uniform(-1, rng.uniform(-0.5, 1), 400)
        whole = np.zeros(401)
        for t in reversed(range(400)):
            whole[t] = rewards[t] + 0.9 * whole[t + 1]
        cut = int(rng.integers(5, 50))
        frame = np.arange(cut)
        bound = returns_to_go(rewards[:cut], np.ones(cut), frame, frame + 1, 0.9)
        floor = min(0.0, rewards[:cut].min())
        if (rewards >= floor).all():  # the least reward of the data is the least there is
            assert (bound <= whole[:cut] + 1e-6).all()


def test_batches_carry_the_returns_of_their_steps() -> None:
    data = small_data()
    returns = returns_to_go(data.reward, data.masks, data.frame, data.next_frame, 0.9)
    with transition_batches(data, data.reward, [0], 64, 5, returns=returns) as batches:
        batch = batches(2)
        now = {tuple(row): i for i, row in enumerate(data.observations[data.frame])}
        assert "returns" in batch
        for b in range(64):
            assert batch["returns"][0, b] == returns[now[tuple(batch["observations"][0, b].numpy())]]


@pytest.mark.parametrize("cal_ql", [False, True])
def test_it_finds_the_goal_in_random_data_and_cloning_does_not(cal_ql: bool) -> None:
    common = {"hidden_sizes": (32, 32), "batch_size": 64}
    config = CQLConfig(
        discount=0.9,
        target_update_rate=0.03,
        cal_ql=cal_ql,
        critic_hidden_sizes=(32, 32),
        sampled_actions=4,
        actor_learning_rate=3e-3,
        critic_learning_rate=3e-3,
        penalty=1.0,
        **common,
    )
    assert max(point_steps(CQL(config, [0, 1, 2], 1, 1, 800), 3, 800, 64)) < 24  # with every seed
    cloned = BC(BCConfig(learning_rate=1e-3, **common), [0, 1, 2], 1, 1, 800)
    assert min(point_steps(cloned, 3, 800, 64)) == 24  # random actions average 0


def test_presets_are_the_published_ones() -> None:
    locomotion, maze = PRESETS["locomotion"], PRESETS["antmaze"]
    assert (locomotion.penalty, locomotion.lagrange, locomotion.actor_learning_rate) == (10.0, False, 3e-5)
    assert (locomotion.observation_normalization, locomotion.reward_normalization) == ("standard", "none")
    assert (maze.penalty, maze.lagrange, maze.target_gap, maze.max_target) == (5.0, True, 0.8, True)
    assert (maze.reward_normalization, maze.observation_normalization) == ("ten_minus_five", "none")
    assert not maze.cal_ql
    assert dataclasses.replace(PRESETS["cal-ql-antmaze"], cal_ql=False) == maze

"""IQL: one update against an independent float64 NumPy reference, stacking, and its characteristic effects."""

import numpy as np
import pytest
import torch

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError
from embodied.policies.bc import BC, BCConfig
from embodied.policies.critics import ScalarCritic
from embodied.policies.iql import IQL, PRESETS, IQLConfig
from embodied.policies.networks import Actor, Value

torch.set_num_threads(1)
D, A, B = 3, 2, 16
KEYS = ("observations", "actions", "rewards", "masks", "next_observations")


def assert_close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Without torch.testing, which imports sympy for seconds."""
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=rtol, atol=atol)


def random_batch(seeds: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return {
        "observations": torch.from_numpy(rng.normal(size=(seeds, B, D))),
        "actions": torch.from_numpy(rng.uniform(-1, 1, (seeds, B, A))),
        "rewards": torch.from_numpy(rng.normal(size=(seeds, B))),
        "masks": torch.from_numpy(rng.integers(0, 2, (seeds, B)).astype(float)),
        "next_observations": torch.from_numpy(rng.normal(size=(seeds, B, D))),
    }


@pytest.fixture(autouse=True)
def _double():
    """Parity is asked for in double precision: single precision would hide a wrong term behind its rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net:
    """One hidden ReLU layer in NumPy, with its gradient and Adam: written without torch."""

    def __init__(self, module: Actor | ScalarCritic | Value, entry: int = 0) -> None:
        layers = module.mlp.layers
        self.p = [t[entry].detach().numpy().copy() for layer in layers for t in (layer.weight, layer.bias)]
        self.m = [np.zeros_like(p) for p in self.p]
        self.v = [np.zeros_like(p) for p in self.p]
        self.t = 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        w1, b1, w2, b2 = self.p
        return np.maximum(x @ w1 + b1, 0) @ w2 + b2

    def gradient(self, x: np.ndarray, d_out: np.ndarray) -> list[np.ndarray]:
        w1, b1, w2, _ = self.p
        h = np.maximum(x @ w1 + b1, 0)
        d_h = (d_out @ w2.T) * (h > 0)
        return [x.T @ d_h, d_h.sum(0, keepdims=True), h.T @ d_out, d_out.sum(0, keepdims=True)]

    def adam(self, gradient: list[np.ndarray], rate: float) -> None:
        self.t += 1
        for p, g, m, v in zip(self.p, gradient, self.m, self.v, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p -= rate * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


def test_two_updates_equal_a_numpy_reference_in_the_authors_order() -> None:
    config = IQLConfig(hidden_sizes=(5,), batch_size=B, learning_rate=0.01, target_update_rate=0.2, cosine_actor=False)
    learner = IQL(config, [3], D, A, steps=10)
    value, actor = Net(learner.value), Net(learner.actor)
    critics = [Net(learner.critic, e) for e in range(2)]
    targets = [Net(learner.critic, e) for e in range(2)]
    log_std, m_std, v_std = np.zeros(A), np.zeros(A), np.zeros(A)
    for k in range(2):
        batch = random_batch(1, k)
        metrics = learner.update(batch)
        s, a, r, mask, n = (batch[key][0].numpy() for key in KEYS)
        a = np.clip(a, -1 + 1e-5, 1 - 1e-5)
        sa = np.concatenate([s, a], 1)
        q = np.minimum(targets[0](sa), targets[1](sa))[:, 0]

        u = q - value(s)[:, 0]
        weight = np.where(u < 0, 0.3, 0.7)
        assert metrics["value_loss"].item() == pytest.approx((weight * u**2).mean(), rel=1e-6)
        value.adam(value.gradient(s, (-2 * weight * u / B)[:, None]), 0.01)

        advantage = q - value(s)[:, 0]  # the updated value
        w = np.minimum(np.exp(3 * advantage), 100)
        mean = np.tanh(actor(s))
        z = (a - mean) / np.exp(log_std)
        log_prob = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(1)
        assert metrics["actor_loss"].item() == pytest.approx(-(w * log_prob).mean(), rel=1e-6)
        d_mean = -(w[:, None] * z / np.exp(log_std)) / B
        g_std = -(w[:, None] * (z**2 - 1)).mean(0)
        actor.adam(actor.gradient(s, d_mean * (1 - mean**2)), 0.01)
        m_std += 0.1 * (g_std - m_std)
        v_std += 0.001 * (g_std**2 - v_std)
        log_std = log_std - 0.01 * (m_std / (1 - 0.9 ** (k + 1))) / (np.sqrt(v_std / (1 - 0.999 ** (k + 1))) + 1e-8)

        y = r + 0.99 * mask * value(n)[:, 0]  # the updated value, no target
        errors = [critic(sa)[:, 0] - y for critic in critics]
        assert metrics["critic_loss"].item() == pytest.approx(sum((e**2).mean() for e in errors), rel=1e-6)
        for critic, target, e in zip(critics, targets, errors, strict=True):
            critic.adam(critic.gradient(sa, (2 * e / B)[:, None]), 0.01)
            target.p = [0.8 * t + 0.2 * c for t, c in zip(target.p, critic.p, strict=True)]

    pairs = [(learner.value, value, 0), (learner.actor, actor, 0)]
    pairs += [(learner.critic, critics[e], e) for e in range(2)] + [
        (learner.target_critic, targets[e], e) for e in range(2)
    ]
    for module, net, entry in pairs:
        for ours, reference in zip(Net(module, entry).p, net.p, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(learner.actor.log_std[0, 0].detach().numpy(), log_std, rtol=1e-6)


def test_stacked_training_equals_separate_training() -> None:
    seeds = [4, 0, 7]
    config = IQLConfig(hidden_sizes=(8, 8), batch_size=B)
    stack = IQL(config, seeds, D, A, steps=30)
    singles = [IQL(config, [seed], D, A, steps=30) for seed in seeds]
    for k in range(30):
        batch = random_batch(3, k)
        metrics = stack.update(batch)
        for i, single in enumerate(singles):
            alone = single.update(Batch(**{key: batch[key][i : i + 1] for key in KEYS}))
            for name in metrics:
                assert metrics[name].shape == (3,)
                assert metrics[name][i].item() == pytest.approx(alone[name].item(), rel=1e-9), name
    for i, single in enumerate(singles):
        for key, value in stack.actor_state(i).items():
            assert_close(value, single.actor_state(0)[key], rtol=1e-9, atol=1e-12)


def test_actor_learning_rate_falls_to_zero_along_a_cosine() -> None:
    learner = IQL(IQLConfig(hidden_sizes=(4,)), [0], D, A, steps=4)
    rates = []
    for k in range(4):
        learner.update(random_batch(1, k))
        rates.append(learner.actor_optimizer.learning_rate / 3e-4)
    assert rates == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert learner.critic_optimizer.learning_rate == 3e-4


def test_state_dict_restores_the_run_exactly() -> None:
    config = IQLConfig(hidden_sizes=(8,), batch_size=B)
    first = IQL(config, [1, 2], D, A, steps=10)
    for k in range(4):
        first.update(random_batch(2, k))
    second = IQL(config, [8, 9], D, A, steps=10)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for k in range(4, 8):
        first.update(random_batch(2, k))
        second.update(random_batch(2, k))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_presets_are_the_published_ones() -> None:
    assert (PRESETS["locomotion"].expectile, PRESETS["locomotion"].inverse_temperature) == (0.7, 3.0)
    assert (PRESETS["antmaze"].expectile, PRESETS["antmaze"].inverse_temperature) == (0.9, 10.0)
    assert PRESETS["antmaze"].reward_normalization == "minus_one"
    assert PRESETS["learned-reward"].reward_normalization == "quantile"


# A point on a line: x' = x + 0.2 a, random actions, reward -1 until x > 0.7, which ends the episode.


def point_batches(seed: int, size: int = 5000):
    rng = np.random.default_rng(seed)
    x, a = rng.uniform(-1, 1, (size, 1)), rng.uniform(-1, 1, (size, 1))
    n = np.clip(x + 0.2 * a, -1, 1)
    reached = n[:, 0] > 0.7
    arrays = {"observations": x, "actions": a, "rewards": reached - 1.0, "masks": 1.0 - reached, "next_observations": n}
    tensors = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in arrays.items()}
    while True:
        i = rng.integers(size, size=(2, 128))
        yield Batch(**{k: tensors[k][i] for k in KEYS})


def train_point(learner: IQL | BC, steps: int = 300) -> np.ndarray:
    """Mean action at x = -0.5, 0, 0.5, per seed: (2, 3)."""
    batches = point_batches(0)
    for _ in range(steps):
        learner.update(next(batches))
    with torch.no_grad():
        x = torch.tensor([-0.5, 0.0, 0.5]).view(1, 3, 1).expand(2, 3, 1)
        return learner.actor(x)[0][..., 0].numpy()


def test_iql_finds_the_goal_in_random_data_and_cloning_does_not() -> None:
    common = {"hidden_sizes": (32, 32), "batch_size": 128, "learning_rate": 3e-3, "target_update_rate": 0.03}
    greedy = IQL(IQLConfig(expectile=0.9, inverse_temperature=20.0, discount=0.9, **common), [0, 1], 1, 1, 300)
    timid = IQL(IQLConfig(expectile=0.9, inverse_temperature=0.01, discount=0.9, **common), [0, 1], 1, 1, 300)
    cloned = BC(BCConfig(hidden_sizes=(32, 32), batch_size=128, learning_rate=3e-3), [0, 1], 1, 1, 300)
    assert train_point(greedy).min() > 0.35  # towards the goal, everywhere, with every seed
    assert np.abs(train_point(timid)).max() < 0.2  # a low inverse temperature is cloning: random actions average 0
    assert np.abs(train_point(cloned)).max() < 0.2


def test_value_rises_with_the_expectile() -> None:
    means = []
    for expectile in (0.5, 0.9):
        config = IQLConfig(
            expectile=expectile, discount=0.9, hidden_sizes=(32,), learning_rate=3e-3, target_update_rate=0.05
        )
        learner = IQL(config, [0, 1], 1, 1, 300)
        batches = point_batches(1)
        values = [learner.update(next(batches))["value"] for _ in range(300)]
        means.append(float(torch.stack(values[-50:]).mean()))
    assert means[1] > means[0] + 0.5
    assert means[1] < 0  # rewards are at most 0, so no value is above it


def test_weights_start_orthogonal_or_as_torch_starts_them() -> None:
    shape = ([3, 4], D, A, 10)
    for name in ("actor", "critic", "value"):
        authors, plain = (getattr(IQL(IQLConfig(hidden_sizes=(64, 32), initialization=kind), *shape), name).mlp
                          for kind in ("orthogonal", "uniform"))  # fmt: skip
        first = authors.layers[0].weight[0].detach()  # (in, out), rows of length root 2
        np.testing.assert_allclose(first @ first.T, 2 * torch.eye(len(first)), atol=1e-5)
        assert not any(layer.bias.any() for layer in authors.layers)
        for layer in plain.layers:
            bound = layer.weight.shape[1] ** -0.5
            for values in (layer.weight, layer.bias):
                assert 0 < values.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert not torch.equal(plain.layers[0].weight[0], plain.layers[0].weight[-1])
    alone = IQL(IQLConfig(hidden_sizes=(64, 32), initialization="uniform"), [4], D, A, 10)
    together = IQL(IQLConfig(hidden_sizes=(64, 32), initialization="uniform"), *shape)
    assert torch.equal(alone.value.mlp.layers[1].weight[0], together.value.mlp.layers[1].weight[1])
    with pytest.raises(ConfigError, match=r"initialization 'unifrom'.*uniform"):
        IQL(IQLConfig(initialization="unifrom"), *shape)

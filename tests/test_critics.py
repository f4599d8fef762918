"""Critics behind one seam: both kinds by hand, stacked as separate, and a learner whose head is a setting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import norm

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError
from embodied.policies.critics import HistogramCritic, ScalarCritic, ValueHead, make_critic, value_head, with_support
from embodied.policies.hl_gauss import Support
from embodied.policies.iql import IQL, IQLConfig
from embodied.policies.networks import generators
from embodied.policies.train import TransitionData, make_config, train

torch.set_num_threads(1)
KEYS = ("observations", "actions", "rewards", "masks", "next_observations")
HISTOGRAM = ValueHead("hl_gauss", Support(-10.0, 10.0, 21))


def inputs(seeds: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((seeds, size, 3), (seeds, size, 2), (seeds, size))
    s, a, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return s, a, 6 * y  # some outside of the support


def double(critic: ScalarCritic) -> ScalarCritic:
    """In double precision, centres made anew: parity would not see beyond their rounding."""
    critic = critic.double()
    if isinstance(critic, HistogramCritic):
        critic.centres = critic.support.low + critic.support.width * (torch.arange(21, dtype=torch.float64) + 0.5)
    return critic


def numpy_outputs(critic: ScalarCritic, s: torch.Tensor, a: torch.Tensor) -> np.ndarray:
    """One hidden layer, written out: (S, E, B, size)."""
    first, last = critic.mlp.layers
    x = torch.cat([s, a], -1).numpy().repeat(critic.members, 0)
    w1, b1, w2, b2 = (t.detach().numpy() for t in (first.weight, first.bias, last.weight, last.bias))
    out = np.maximum(x @ w1 + b1, 0) @ w2 + b2
    return out.reshape(len(s), critic.members, *out.shape[1:])


@pytest.mark.parametrize("head", [ValueHead(), HISTOGRAM], ids=["mse", "hl_gauss"])
def test_values_and_loss_equal_numpy(head: ValueHead) -> None:
    critic = double(make_critic(head, generators([0, 1]), 3, 2, (8,)))
    s, a, y = inputs(2)
    out = numpy_outputs(critic, s, a)
    targets = y.numpy()[:, None]  # (S, 1, B)
    if head.support is None:
        values, loss = out[..., 0], ((out[..., 0] - targets) ** 2).mean(-1)
    else:
        edges = np.linspace(-10, 10, 22)
        cdf = norm.cdf((edges - np.clip(targets, -10, 10)[..., None]) / (0.75 * 20 / 21))
        p = np.diff(cdf, axis=-1) / (cdf[..., -1:] - cdf[..., :1])
        values = (softmax(out, -1) * (edges[1:] + edges[:-1]) / 2).sum(-1)
        loss = -(p * log_softmax(out, -1)).sum(-1).mean(-1)
        assert critic.report(y)["outside_support"].tolist() == (np.abs(y.numpy()) > 10).mean(-1).tolist()
    np.testing.assert_allclose(critic.values(s, a).detach(), values, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(critic(s, a).detach(), values, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(critic.loss(s, a, y).detach(), loss, rtol=1e-6)
    outputs = critic.outputs(s, a)
    (by_outputs,) = torch.autograd.grad(critic.errors(outputs, y).sum(), outputs)
    np.testing.assert_allclose(critic.error_gradient(outputs, y).detach(), by_outputs, rtol=1e-9, atol=1e-12)
    each = y.unsqueeze(1).expand(-1, 2, -1)  # the same targets, given per member
    np.testing.assert_allclose(critic.loss(s, a, each).detach(), loss, rtol=1e-6)


def test_no_gradient_reaches_the_targets() -> None:
    s, a, y = inputs(1)
    for head in (ValueHead(), HISTOGRAM):
        y.requires_grad_(True)
        critic = make_critic(head, generators([0]), 3, 2, (8,)).double()
        assert torch.autograd.grad(critic.loss(s, a, y).sum(), y, allow_unused=True)[0] is None


def test_a_stack_draws_what_single_critics_draw() -> None:
    s, a, _ = inputs(2)
    stack = make_critic(HISTOGRAM, generators([5, 3]), 3, 2, (8,), layer_norm=True).double()
    single = make_critic(HISTOGRAM, generators([3]), 3, 2, (8,), layer_norm=True).double()
    np.testing.assert_allclose(stack(s, a)[1].detach(), single(s[1:], a[1:])[0].detach(), rtol=1e-12)
    assert "centres" not in stack.state_dict()  # the configuration says where they are


def test_a_regression_learns_the_same_function_with_either_head() -> None:
    draw = torch.Generator().manual_seed(1)
    s, a = torch.rand(1, 256, 3, generator=draw), torch.rand(1, 256, 2, generator=draw)
    y = 4 * torch.sin(3 * s[..., 0]) + 2 * a[..., 1]
    for head in (ValueHead(), HISTOGRAM):
        critic = make_critic(head, generators([0]), 3, 2, (32, 32))
        adam = torch.optim.Adam(critic.parameters(), 3e-3)
        for _ in range(300):
            adam.zero_grad()
            critic.loss(s, a, y).sum().backward()
            adam.step()
        assert (critic(s, a) - y).square().mean() < 0.1 * y.var()


def batch(seeds: int, step: int, size: int = 16) -> Batch:
    rng = np.random.default_rng(step)
    shapes = {"observations": (3,), "actions": (2,), "rewards": (), "masks": (), "next_observations": (3,)}
    arrays = {key: rng.uniform(-1, 1, (seeds, size, *shape)).astype(np.float32) for key, shape in shapes.items()}
    arrays["masks"] = np.abs(arrays["masks"])
    return Batch(**{key: torch.tensor(value, dtype=torch.get_default_dtype()) for key, value in arrays.items()})


IQL_SETTINGS = IQLConfig(hidden_sizes=(8, 8), value_head="hl_gauss", value_bins=21, value_support=(-5.0, 5.0))


def test_iql_with_histograms_stacked_equals_separate_and_resumes_exactly() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        stack, single = IQL(IQL_SETTINGS, [4, 7], 3, 2, 30), IQL(IQL_SETTINGS, [7], 3, 2, 30)
        resumed = IQL(IQL_SETTINGS, [0, 1], 3, 2, 30)
        for k in range(20):
            b = batch(2, k)
            if k == 10:
                resumed.load_state_dict({name: v.clone() for name, v in stack.state_dict().items()})
            together = stack.update(b)
            alone = single.update(Batch(**{key: b[key][1:] for key in KEYS}))
            if k >= 10:
                resumed.update(b)
            for name, value in together.items():
                assert value[1].item() == pytest.approx(alone[name].item(), rel=1e-9), name
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in stack.state_dict().items())
    assert isinstance(stack.target_critic, HistogramCritic)


def test_iql_with_histograms_reaches_the_value_of_a_process_with_one_state() -> None:
    """0.75 per step for ever at discount 0.5 is worth 1.5, whatever the action."""
    config = IQLConfig(
        hidden_sizes=(16,),
        discount=0.5,
        learning_rate=1e-2,
        target_update_rate=0.2,
        value_head="hl_gauss",
        value_support=(0.0, 5.0),
    )
    learner = IQL(config, [0, 1], 1, 1, 400)
    start = learner.value(torch.ones(2, 1, 1)) - learner.critic(torch.ones(2, 1, 1), torch.zeros(2, 1, 1)).mean(1)
    assert start.abs().max() < 2.0  # both begin in the middle, at 2.5
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        still = torch.ones(2, 8, 1)
        actions = torch.rand(2, 8, 1, generator=draw) * 2 - 1
        pay = torch.full((2, 8), 0.75)
        metrics = learner.update(
            {
                "observations": still,
                "actions": actions,
                "rewards": pay,
                "masks": torch.ones(2, 8),
                "next_observations": still,
            }
        )
    np.testing.assert_allclose(metrics["value"], 1.5, atol=0.02)
    assert metrics["outside_support"].tolist() == [0.0, 0.0]


def episodes(count: int = 8, length: int = 25) -> TransitionData:
    """Every second episode ends in a termination that pays 1; the others are cut. Rewards else 0.1."""
    rng = np.random.default_rng(0)
    rows = np.arange(count * length).reshape(count, length)
    frame, following = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    reward, masks = np.full((count, length - 1), 0.1, np.float32), np.ones((count, length - 1), np.float32)
    reward[::2, -1], masks[::2, -1] = 1.0, 0.0
    return TransitionData(
        rng.normal(size=(count * length, 3)).astype(np.float32),
        rng.uniform(-1, 1, (count * length, 2)).astype(np.float32),
        frame,
        following,
        reward.ravel(),
        masks.ravel(),
        np.repeat(np.arange(count), length - 1),
    )


def test_training_takes_the_support_from_the_returns_and_writes_it_down(tmp_path: Path) -> None:
    data = episodes()
    config = make_config("iql", "learned-reward", {"value_head": "hl_gauss", "reward_normalization": "none"})
    fitted = with_support(config, data.reward, data)
    low, high = fitted.value_support
    # Cut episodes are worth 0.1 / (1 - 0.98) = 5 at every step; terminated ones at least the last 1.
    width = (high - low) / 101
    assert low == pytest.approx(1.0 - 0.1 * 4.0 - 3 * 0.75 * width, rel=1e-6)
    assert high == pytest.approx(5.0 + 0.1 * 4.0 + 3 * 0.75 * width, rel=1e-6)
    small = {"value_head": "hl_gauss", "hidden_sizes": (8,), "batch_size": 8, "reward_normalization": "none"}
    summary = train("iql", data, make_config("iql", "learned-reward", small), [0, 1], 20, tmp_path)
    assert json.loads(summary.read_text())["config"]["value_support"] == [low, high]
    assert with_support(fitted, data.reward, data) is fitted  # a support that is named stays
    plain = make_config("iql")
    assert with_support(plain, data.reward, data) is plain


def test_bad_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown value_head 'hlgauss'.*hl_gauss"):
        value_head(make_config("iql", overrides={"value_head": "hlgauss"}))
    for support in ((), (1.0,), (0.0, 1.0, 2.0)):
        with pytest.raises(ConfigError, match="two numbers, low and high"):
            value_head(IQLConfig(value_head="hl_gauss", value_support=support))
    with pytest.raises(ConfigError, match="from a low to a high"):
        value_head(make_config("iql", overrides={"value_head": "hl_gauss", "value_support": "3, -3"}))

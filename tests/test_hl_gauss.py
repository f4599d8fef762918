"""Histogram values: the projection against scipy, each rule of the support with what breaks without it, and shifts."""

import numpy as np
import pytest
import torch
from scipy.special import erf
from scipy.stats import norm

from embodied.contracts.errors import ConfigError, InputError
from embodied.policies.hl_gauss import Support, cross_entropy, expectation, monte_carlo_returns, return_support
from embodied.policies.loop import Adam
from embodied.policies.networks import StackedMLP, generators

torch.set_num_threads(1)


def reference(y: np.ndarray, support: Support) -> np.ndarray:
    """The paper's formula in float64 with scipy's normal distribution, on bins + 1 edges."""
    edges = np.linspace(support.low, support.high, support.bins + 1)
    cdf = norm.cdf((edges - np.clip(y, support.low, support.high)[:, None]) / support.sigma)
    return np.diff(cdf) / (cdf[:, -1:] - cdf[:, :1])


@pytest.mark.parametrize("bins", [2, 21, 51, 101])
@pytest.mark.parametrize("ratio", [0.25, 0.75, 2.0])
def test_projection_equals_scipy(bins: int, ratio: float) -> None:
    support = Support(-10.0, 7.0, bins, ratio)
    y = np.linspace(-25, 25, 301)  # up to many bins outside on both sides
    exact, single = (support.project(torch.tensor(y, dtype=t)) for t in (torch.float64, torch.float32))
    np.testing.assert_allclose(exact, reference(y, support), rtol=0, atol=1e-13)
    # float32 knows a value to 1e-7 of the support: times the steepest slope of the Gaussian, and rounding of its own
    np.testing.assert_allclose(single, reference(y, support), rtol=0, atol=1e-7 * (2 + bins / ratio))
    np.testing.assert_allclose(exact.sum(-1), 1.0, atol=1e-12)


def round_trip(y: torch.Tensor, support: Support) -> torch.Tensor:
    """Error in bins of a target projected and decoded."""
    centres = support.low + support.width * (torch.arange(support.bins, dtype=torch.float64) + 0.5)
    return ((support.project(y) * centres).sum(-1) - y) / support.width


def test_round_trip_errors_are_those_of_the_ratio() -> None:
    y = torch.linspace(20, 80, 977, dtype=torch.float64)
    error = {ratio: float(round_trip(y, Support(0, 100, 101, ratio)).abs().max()) for ratio in (0.25, 0.5, 0.75)}
    for ratio, found in error.items():  # the first harmonic of sampling a Gaussian at whole bins
        assert found == pytest.approx(np.exp(-2 * np.pi**2 * ratio**2) / np.pi, rel=0.01)
    assert error[0.75] < 1e-5


def test_a_target_on_the_outermost_edge_is_off_and_three_sigma_inside_it_is_not() -> None:
    support = Support(0, 100, 101)
    edge, inside = round_trip(torch.tensor([0.0, 3 * support.sigma], dtype=torch.float64), support).tolist()
    assert edge == pytest.approx(0.69, abs=0.01)
    assert abs(inside) < 0.01


def test_targets_far_outside_are_finite_clamped_and_counted() -> None:
    support = Support(0, 100, 101, 0.25)
    y = torch.tensor([-1e6, -3 * support.width, 0.0, 50.0, 100.0, 104.0, 1e9], dtype=torch.float64)
    unclamped = norm.cdf((np.linspace(0, 100, 102) - float(y[1])) / support.sigma)
    assert unclamped[-1] - unclamped[0] < 1e-15  # what the reference divides by, three bins outside
    p = support.project(y)
    assert torch.isfinite(p).all()
    assert torch.equal(p[0], p[2])
    assert torch.equal(p[-1], p[4])
    assert support.outside(y).tolist() == [True, True, False, False, False, True, True]


def fixed_point(project, centres: np.ndarray) -> float:
    """Of the one-state process that pays 0.3 for ever, discount 0.99: its value is 30."""
    value = 0.0
    for _ in range(20_000):
        value, last = float((project(0.3 + 0.99 * value) * centres).sum()), value
        if abs(value - last) < 1e-12:
            break
    return value


@pytest.mark.parametrize(("bins", "one_sided"), [(21, 97.6), (51, 99.0), (101, 85.1), (401, 43.9)])
def test_the_one_state_fixed_point_is_true_and_a_gaussian_without_its_left_side_is_far_off(bins, one_sided) -> None:
    support = Support(0, 100, bins)
    centres = support.centres().double().numpy()
    edges = np.linspace(0, 100, bins + 1)

    def wrong(y: float) -> np.ndarray:  # a public implementation clamps edge - y at 1e-6
        cdf = erf(np.maximum(edges - y, 1e-6) / (np.sqrt(2) * support.sigma))
        return np.diff(cdf) / (cdf[-1] - cdf[0])

    def right(y: float) -> np.ndarray:
        return support.project(torch.tensor(y, dtype=torch.float64)).numpy()

    assert fixed_point(right, centres) == pytest.approx(30.0, abs=0.005)
    assert fixed_point(wrong, centres) == pytest.approx(one_sided, abs=0.1)


def test_cross_entropy_by_hand_and_its_gradient() -> None:
    logits = torch.tensor([[0.0, np.log(3.0)]], dtype=torch.float64, requires_grad=True)  # softmax 1/4, 3/4
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    loss = cross_entropy(logits, p)
    assert loss.item() == pytest.approx(-0.5 * np.log(0.25) - 0.5 * np.log(0.75), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.25 - 0.5, 0.75 - 0.5])
    assert expectation(logits, torch.tensor([2.0, 6.0])).item() == pytest.approx(5.0)


def test_centres_are_midpoints_of_bins_plus_one_edges() -> None:
    support = Support(-2, 2, 4)
    assert support.centres().tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert (support.width, support.sigma) == (1.0, 0.75)


def test_returns_by_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    ends = np.array([0, 7, 8, 24, 57, 58, 121])  # runs of 1, 7, 1, 16, 33, 1 and 63 steps
    rewards, masks, continues = rng.normal(size=122), np.ones(122, np.float32), np.ones(122, bool)
    continues[ends] = False
    masks[[7, 24, 58]] = 0.0
    wanted = np.zeros(122)
    for first, last in zip(np.concatenate([[0], ends[:-1] + 1]), ends, strict=True):
        total = 0.0 if masks[last] == 0 else rewards[first : last + 1].mean() / (1 - 0.9)
        for i in range(last, first - 1, -1):
            total = wanted[i] = rewards[i] + 0.9 * total
    np.testing.assert_allclose(monte_carlo_returns(rewards, masks, continues, 0.9), wanted, rtol=1e-12, atol=1e-12)


def test_a_time_limit_does_not_cut_the_support() -> None:
    """-1 per step for ever is worth -100; the 50 steps that were recorded pay no more than -39.5."""
    continues = np.arange(50) < 49
    returns = monte_carlo_returns(np.full(50, -1.0), np.ones(50), continues, 0.99)
    np.testing.assert_allclose(returns, -100.0)


def test_support_holds_the_returns_with_room_for_the_gaussian() -> None:
    support = return_support(np.array([-40.0, -3.0, 10.0]), 101, 0.75)
    assert support.low == pytest.approx(-45 - 3 * support.sigma)  # a tenth of the range, and three sigma
    assert support.high == pytest.approx(15 + 3 * support.sigma)
    ends = round_trip(torch.tensor([-45.0, 15.0], dtype=torch.float64), support)
    assert ends.abs().max() < 0.01


def test_bad_supports_are_refused() -> None:
    for low, high in ((1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match="from a low to a high"):
            Support(low, high)
    with pytest.raises(ConfigError, match="2 bins"):
        Support(0, 1, 1)
    with pytest.raises(ConfigError, match="sigma above 0"):
        Support(0, 1, 5, 0.0)
    with pytest.raises(InputError, match=r"All returns are 2.*value_support"):
        return_support(np.full(9, 2.0), 101, 0.75)
    with pytest.raises(ConfigError, match="too few"):
        return_support(np.array([0.0, 1.0]), 5, 0.75)


def test_shifted_targets_are_followed_where_a_squared_error_is_not() -> None:
    """The plasticity experiment at a fifth of its length; benchmarks/hl_gauss.py has all of it, with other sizes."""
    errors = {}
    for kind in ("mse", "hl_gauss"):
        draws = generators([0, 1])
        support = Support(-40, 40, 101)
        x = torch.stack([torch.randn(1024, 32, generator=g) for g in draws])
        with torch.no_grad():
            y = torch.sin(10 * StackedMLP(draws, (32, 128, 128, 1))(x))[..., 0]
        network = StackedMLP(draws, (32, 128, 128, 1 if kind == "mse" else 101))
        adam, centres = Adam(network, 1e-3), support.centres()
        for shift in (0.0, 8.0):
            for _ in range(600):
                rows = torch.randint(1024, (128,), generator=draws[0])
                out, target = network(x[:, rows]), y[:, rows] + shift
                if kind == "mse":
                    loss = (out[..., 0] - target).square().mean(-1)
                else:
                    loss = cross_entropy(out, support.project(target)).mean(-1)
                adam.descend(loss.sum())
        with torch.no_grad():
            out = network(x)
            value = out[..., 0] if kind == "mse" else expectation(out, centres)
            errors[kind] = (value - y - 8.0).square().mean(-1)
    assert (errors["hl_gauss"] < errors["mse"] / 5).all()  # with either seed

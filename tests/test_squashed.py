"""The tanh-Gaussian actor: density against float64 NumPy and by integration, stacking, and what is deployed."""

import numpy as np
import pytest
import torch

from embodied.policies.networks import Actor, clip_actions, generators
from embodied.policies.squashed import SquashedActor, squash, tanh_log_slope

torch.set_num_threads(1)


def numpy_forward(actor: SquashedActor, x: np.ndarray, s: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and clamped log_std of seed s, in float64."""
    layers = actor.mlp.layers
    for n, layer in enumerate(layers):
        x = x @ layer.weight[s].detach().double().numpy() + layer.bias[s].detach().double().numpy()
        x = np.maximum(x, 0) if n < len(layers) - 1 else x
    mean, log_std = np.split(x, 2, axis=-1)
    return mean, np.clip(log_std, *actor.log_std_range)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_and_log_density_equal_numpy_in_float64(dtype: torch.dtype) -> None:
    actor = SquashedActor(generators([3, 8]), 4, 2, (8, 8), log_std_start=-0.5, final_gain=1.0).to(dtype)
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 5, 6, 2))  # five actions at each observation
    actions, log_prob = actor.sample(torch.from_numpy(x).to(dtype), torch.from_numpy(noise).to(dtype))
    assert actions.shape == (2, 5, 6, 2)
    assert log_prob.shape == (2, 5, 6)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    for s in range(2):
        mean, log_std = numpy_forward(actor, x[s], s)
        u = mean + np.exp(log_std) * noise[s]
        density = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        expected = (density - np.log(1 - np.tanh(u) ** 2)).sum(-1)
        np.testing.assert_allclose(actions[s].detach().numpy(), np.tanh(u), atol=tolerance)
        np.testing.assert_allclose(log_prob[s].detach().numpy(), expected, rtol=tolerance, atol=tolerance)
    one, first = actor.sample(torch.from_numpy(x).to(dtype), torch.from_numpy(noise[:, 0]).to(dtype))
    np.testing.assert_allclose(one.detach().numpy(), actions[:, 0].detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(first.detach().numpy(), log_prob[:, 0].detach().numpy(), rtol=1e-5, atol=1e-5)


def test_log_density_of_given_actions_is_that_of_the_sample() -> None:
    actor = SquashedActor(generators([1]), 3, 2, (8,)).double()
    x, noise = torch.randn(1, 20, 3, dtype=torch.float64), torch.randn(1, 20, 2, dtype=torch.float64)
    actions, log_prob = actor.sample(x, noise)
    np.testing.assert_allclose(actor.log_prob(x, actions).detach().numpy(), log_prob.detach().numpy(), rtol=1e-8)
    assert torch.isfinite(actor.log_prob(x, clip_actions(torch.ones(1, 20, 2, dtype=torch.float64)))).all()


def test_the_density_integrates_to_one() -> None:
    a = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    for mean, log_std in ((0.3, -1.0), (-1.2, 0.2)):
        u = torch.atanh(a)
        _, log_prob = squash(
            torch.tensor([mean], dtype=torch.float64),
            torch.tensor([log_std], dtype=torch.float64),
            ((u - mean) / np.exp(log_std))[:, None],
        )
        assert torch.trapezoid(log_prob.exp(), a).item() == pytest.approx(1.0, abs=1e-3)


def test_far_out_the_density_stays_finite_and_so_does_its_gradient() -> None:
    """log(1 - tanh^2) taken as written is -inf from |u| = 9 on in single precision."""
    u = torch.tensor([-60.0, -12.0, 0.0, 12.0, 60.0], requires_grad=True)
    slope = tanh_log_slope(u)
    expected = 2 * np.log(2) - 2 * np.abs([60, 12, np.log(2), 12, 60])
    np.testing.assert_allclose(slope.detach().numpy(), expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(slope.sum(), u)
    np.testing.assert_allclose(gradient.numpy(), -2 * np.tanh(u.detach().double().numpy()), rtol=1e-5)


def test_the_gradient_of_a_sample_equals_finite_differences() -> None:
    mean, log_std = torch.tensor([0.4, -0.2]).double().requires_grad_(), torch.tensor([-0.3, 0.1]).double()
    log_std.requires_grad_()
    noise = torch.tensor([0.7, -1.1]).double()

    def value(m: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        action, log_prob = squash(m, s, noise)
        return log_prob + (action * torch.tensor([1.0, 2.0]).double()).sum()

    gradients = torch.autograd.grad(value(mean, log_std), (mean, log_std))
    for which, gradient in enumerate(gradients):
        for i in range(2):
            step = torch.zeros(2).double()
            step[i] = 1e-6
            shift = [(step, torch.zeros(2)), (torch.zeros(2), step)][which]
            high, low = (value(mean + k * shift[0], log_std + k * shift[1]).item() for k in (1, -1))
            assert gradient[i].item() == pytest.approx((high - low) / 2e-6, rel=1e-6)


def test_log_std_is_clamped_and_a_stack_draws_what_single_actors_draw() -> None:
    actor = SquashedActor(generators([5, 2]), 3, 2, (8,), (-5.0, 2.0), final_gain=1.0)
    x = 1e3 * torch.randn(2, 50, 3)
    log_std = actor(x)[1]
    assert log_std.min() == -5.0
    assert log_std.max() == 2.0
    for s, seed in enumerate((5, 2)):
        single = SquashedActor(generators([seed]), 3, 2, (8,), (-5.0, 2.0), final_gain=1.0)
        for a, b in zip(actor.parameters(), single.parameters(), strict=True):
            assert torch.equal(a[s : s + 1], b)


def test_what_is_deployed_is_tanh_of_the_mean() -> None:
    squashed = SquashedActor(generators([5, 2]), 3, 2, (8, 8), final_gain=1.0)
    actor = Actor(generators([0]), 3, 2, (8, 8))
    actor.load_state_dict(squashed.deployed(1))
    x = torch.randn(2, 9, 3)
    mean, log_std = actor(x[1:])
    np.testing.assert_allclose(mean.detach().numpy(), torch.tanh(squashed(x)[0][1:]).detach().numpy(), atol=1e-6)
    assert log_std.abs().max() == 0

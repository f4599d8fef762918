"""Stacked networks equal separate ones; the encoder keeps position and divides by 255 only."""

import numpy as np
import torch
from torch.nn import functional as F

from embodied.policies.networks import (
    Actor,
    Critic,
    EncoderConfig,
    ImageEncoder,
    MultilinearValue,
    StackedMLP,
    Value,
    clip_actions,
    generators,
)

torch.set_num_threads(1)


def assert_close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Without torch.testing, which imports sympy for seconds."""
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=rtol, atol=atol)


def test_stack_of_three_seeds_draws_and_computes_what_three_single_networks_do() -> None:
    seeds = [5, 0, 9]
    stack = StackedMLP(generators(seeds), (4, 8, 8, 3), members=2, layer_norm=True)
    x = torch.randn(6, 7, 4)
    for s, seed in enumerate(seeds):
        single = StackedMLP(generators([seed]), (4, 8, 8, 3), members=2, layer_norm=True)
        for a, b in zip(stack.parameters(), single.parameters(), strict=True):
            assert torch.equal(a[2 * s : 2 * s + 2], b)
        assert_close(stack(x)[2 * s : 2 * s + 2], single(x[2 * s : 2 * s + 2]), atol=1e-6, rtol=1e-6)
    assert not torch.equal(stack.layers[0].weight[0], stack.layers[0].weight[1])  # members of one seed differ


def test_mlp_equals_numpy_in_float64() -> None:
    mlp = StackedMLP(generators([1, 2]), (3, 5, 2), activate_final=True).double()
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    for s in range(2):
        h = x[s]
        for layer in mlp.layers:
            h = np.maximum(h @ layer.weight[s].detach().numpy() + layer.bias[s].detach().numpy(), 0)
        np.testing.assert_allclose(mlp(torch.from_numpy(x))[s].detach().numpy(), h, atol=1e-12)


def test_orthogonal_initialisation_has_gain_root_two() -> None:
    weight = StackedMLP(generators([3]), (16, 16, 1)).layers[0].weight[0].detach()
    assert_close(weight @ weight.T, 2 * torch.eye(16), atol=1e-5, rtol=0)


def test_shapes_of_actor_critic_value() -> None:
    draws = generators([0, 1, 2])
    observations, actions = torch.randn(3, 10, 4), torch.rand(3, 10, 2)
    assert Value(draws, 4, (8,))(observations).shape == (3, 10)
    critic = Critic(draws, 4, 2, (8,))
    q = critic(observations, actions)
    assert q.shape == (3, 2, 10)
    # Entry (s, e) of the critic reads the observations of seed s.
    observations[1] += 1
    changed = critic(observations, actions) != q
    assert changed[1].any(-1).all()
    assert not changed[[0, 2]].any()
    actor = Actor(draws, 4, 2, (8,))
    mean, log_std = actor(100 * observations)
    assert mean.shape == (3, 10, 2)
    assert mean.abs().max() <= 1
    assert log_std.shape == (3, 1, 2)
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([-9.0, 9.0]).expand(3, 1, 2))
    assert actor(observations)[1][0, 0].tolist() == [-5.0, 2.0]


def test_multilinear_value_equals_its_formula_in_numpy() -> None:
    net = MultilinearValue(generators([4])[0], 6, (8, 8)).double()
    rng = np.random.default_rng(1)
    s, g, z = rng.normal(size=(3, 5, 6))

    def mlp(module: StackedMLP, x: np.ndarray, j: int) -> np.ndarray:
        for layer in module.layers:
            x = np.maximum(x @ layer.weight[j].detach().numpy() + layer.bias[j].detach().numpy(), 0)
        return x

    with torch.no_grad():  # biases of A and B are part of the formula, and start at zero
        net.matrix_a.bias.add_(0.3)
        net.matrix_b.bias.sub_(0.2)
    value = net(*(torch.from_numpy(v) for v in (s, g, z))).detach().numpy()
    for j in range(2):
        t = mlp(net.transition, mlp(net.psi, z, j), j)
        a = (t * mlp(net.phi, s, j)) @ net.matrix_a.weight[j].detach().numpy() + 0.3
        b = (t * mlp(net.psi, g, j)) @ net.matrix_b.weight[j].detach().numpy() - 0.2
        np.testing.assert_allclose(value[j], (a * b).sum(-1), atol=1e-10)


def test_encoder_divides_by_255_and_nothing_else() -> None:
    encoder = ImageEncoder(EncoderConfig((32, 32), (4, 8, 8), 10), generators([0])[0]).double()
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2).double() / 255
    x = F.relu(F.conv2d(x, encoder.patch.weight, encoder.patch.bias, stride=4))
    for conv in encoder.convs:
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))
    expected = F.layer_norm(encoder.project(x.flatten(1)), (10,))
    assert_close(encoder(images), expected, atol=1e-10, rtol=1e-10)


def test_encoder_keeps_spatial_position() -> None:
    encoder = ImageEncoder(EncoderConfig(), generators([0])[0])
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    images[0, 16:24, 16:24] = 255
    images[1, 32:40, 32:40] = 255  # the same square elsewhere: a pooled encoder could not tell
    a, b = encoder(images)
    assert F.cosine_similarity(a, b, dim=0) < 0.9


def test_clip_actions() -> None:
    assert clip_actions(torch.tensor([-3.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [-1 + 1e-5, 0.5, 1 - 1e-5]

"""SiLU networks by hand: outputs and gradients against autograd in float64, and alone as in a stack."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from embodied.policies import silu_network
from embodied.policies.dynamics import DynamicsConfig, bound_log_variance, gaussian_loss, gaussian_loss_gradient
from embodied.policies.dynamics_training import DynamicsData, DynamicsTraining, split_rows
from embodied.policies.silu_network import StackedNetworks

torch.set_num_threads(1)
S, D, A = 3, 3, 2


def layers(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 9), (9, 7), (7, 6)]
    return [
        (
            torch.randn(S, i, o, generator=generator, dtype=dtype).requires_grad_(True),
            torch.randn(S, 1, o, generator=generator, dtype=dtype).requires_grad_(True),
        )
        for i, o in sizes
    ]


def plain(x: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    for number, (weight, bias) in enumerate(parts):
        x = x @ weight + bias
        x = F.silu(x) if number < len(parts) - 1 else x
    return x


@pytest.mark.parametrize("rows", [1, 5, 11])
def test_outputs_equal_the_plain_network_whatever_goes_together(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silu_network, "ROWS", 5)
    parts = layers()
    networks = StackedNetworks(parts)
    x = torch.randn(S, rows, 4, dtype=torch.float64)
    np.testing.assert_allclose(networks.forward(x), plain(x, parts).detach(), rtol=1e-12, atol=1e-14)
    one = x[:1].expand(S, -1, -1)  # the same rows through all
    np.testing.assert_allclose(networks.forward(one), plain(one, parts).detach(), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        parts[1][0].mul_(2.0)  # an optimiser's step is seen
    np.testing.assert_allclose(networks.forward(x), plain(x, parts).detach(), rtol=1e-12, atol=1e-14)


def test_gradients_equal_autograd() -> None:
    torch.manual_seed(0)
    parts = layers()
    x, slopes = torch.randn(S, 8, 4, dtype=torch.float64), torch.randn(S, 8, 6, dtype=torch.float64)
    out = plain(x, parts)
    seen = {}

    def slope(i: int, found: torch.Tensor) -> torch.Tensor:
        seen[i] = found.clone()
        return slopes[i]

    wanted = torch.autograd.grad((out * slopes).sum(), [t for part in parts for t in part])
    for _ in range(2):  # buffers are used again
        found = StackedNetworks(parts).gradients(x, slope)
        assert [f.shape for f in found] == [w.shape for w in wanted]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(torch.stack([seen[i] for i in range(S)]), out.detach(), rtol=1e-12)


def test_a_network_in_a_stack_computes_what_it_would_alone_bit_for_bit() -> None:
    torch.manual_seed(1)
    parts = layers(torch.float32)
    x, slopes = torch.randn(S, 300, 4), torch.randn(S, 300, 6)
    alone = StackedNetworks([(w[2:], b[2:]) for w, b in parts])
    stack = StackedNetworks(parts)
    assert torch.equal(stack.forward(x)[2:], alone.forward(x[2:]))
    for one, other in zip(
        stack.gradients(x, lambda i, _: slopes[i]), alone.gradients(x[2:], lambda i, _: slopes[2]), strict=True
    ):
        assert torch.equal(one[2:], other)


def test_the_losss_gradient_equals_autograd() -> None:
    rng = np.random.default_rng(0)
    out, target = (torch.from_numpy(rng.normal(size=(7, n)) * 3) for n in (8, 4))
    low, high = (torch.from_numpy(rng.normal(size=4) + at) for at in (-4.0, 1.0))
    leaves = [t.requires_grad_(True) for t in (out, low, high)]
    wanted = gaussian_loss(out[:, :4], bound_log_variance(out[:, 4:], low, high), target)
    found = gaussian_loss_gradient(*(t.detach() for t in (out, target, low, high)))
    np.testing.assert_allclose(found[0], wanted.detach(), rtol=1e-12)
    for one, other in zip(found[1:], torch.autograd.grad(wanted, leaves), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


def training(ends: bool, **changes: object) -> DynamicsTraining:
    rng = np.random.default_rng(0)
    s, after = (rng.normal(size=(90, D)).astype(np.float32) for _ in range(2))
    actions, paid = rng.uniform(-1, 1, (90, A)).astype(np.float32), rng.normal(size=90).astype(np.float32)
    data = DynamicsData(s, actions, paid, after, s[:, 0] > 0.5, np.repeat(np.arange(9), 10), np.arange(90))
    config = DynamicsConfig(hidden_sizes=(16, 12), weight_decay=(0.0, 0.0, 0.0), members=3, elites=2, **changes)  # type: ignore[arg-type]
    return DynamicsTraining(config, [0, 1], data, split_rows(data, config), ends)


@pytest.mark.parametrize("ends", [False, True])
def test_an_ensembles_gradient_equals_autograd_for_every_seed(ends: bool) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = training(ends, bound_penalty=0.3)
        network, members = found.network, 3
        with torch.no_grad():
            network.max_log_variance[1] += 0.7  # the seeds' bounds differ
            network.min_log_variance[0] += 8.0  # and are near enough to matter
        table = found._train[torch.from_numpy(np.random.default_rng(1).integers(len(found._train), size=(6, 20)))]
        mean, log_variance, logit = network(table[..., : D + A])
        losses = gaussian_loss(mean, log_variance, table[..., D + A : -1])
        if logit is not None:
            losses = losses + F.binary_cross_entropy_with_logits(logit, table[..., -1], reduction="none").mean(-1)
        width = (network.max_log_variance - network.min_log_variance).sum((1, 2))
        wanted = losses.view(2, members).sum(1) + 0.3 * width
        loss, gradients = found.loss_gradients(table)
        np.testing.assert_allclose(loss, wanted.detach(), rtol=1e-10)
        others = torch.autograd.grad(wanted.sum(), list(network.parameters()))
        for (name, _), one, other in zip(network.named_parameters(), gradients, others, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12, err_msg=name)
    finally:
        torch.set_default_dtype(torch.float32)

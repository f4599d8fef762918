"""SiLU networks by hand: outputs and gradients against autograd in float64, and alone as in a stack."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from embodied.contracts.errors import ConfigError
from embodied.policies import relu_network, silu_network
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
    seen = []

    def slope(found: torch.Tensor) -> torch.Tensor:
        seen.append(found.transpose(1, 2).clone())
        return slopes.transpose(1, 2)

    wanted = torch.autograd.grad((out * slopes).sum(), [t for part in parts for t in part])
    for _ in range(2):  # buffers are used again
        found = StackedNetworks(parts).gradients(x, slope)
        assert [f.shape for f in found] == [w.shape for w in wanted]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(seen[0], out.detach(), rtol=1e-12)


def test_a_network_in_a_stack_computes_what_it_would_alone() -> None:
    torch.manual_seed(1)
    parts = layers(torch.float32)
    x, slopes = torch.randn(S, 300, 4), torch.randn(S, 300, 6)
    alone = StackedNetworks([(w[2:], b[2:]) for w, b in parts])
    stack = StackedNetworks(parts)
    assert torch.equal(stack.forward(x)[2:], alone.forward(x[2:]))
    both = stack.gradients(x, lambda _: slopes.transpose(1, 2))
    for one, other in zip(both, alone.gradients(x[2:], lambda _: slopes[2:].transpose(1, 2)), strict=True):
        np.testing.assert_allclose(one[2:], other, rtol=1e-5, atol=1e-5)


def test_the_losss_gradient_equals_autograd() -> None:
    rng = np.random.default_rng(0)
    out, target = (torch.from_numpy(rng.normal(size=(2, 7, n)) * 3) for n in (8, 4))
    low, high = (torch.from_numpy(rng.normal(size=(2, 1, 4)) + at) for at in (-4.0, 1.0))
    leaves = [t.requires_grad_(True) for t in (out, low, high)]
    wanted = gaussian_loss(out[..., :4], bound_log_variance(out[..., 4:], low, high), target)
    given = [t.detach().transpose(1, 2).clone() for t in (out, target, low, high)]
    found = gaussian_loss_gradient(*given)
    np.testing.assert_allclose(found[0], wanted.detach(), rtol=1e-12)
    derivatives = [t.transpose(1, 2) for t in found[1:]]
    for one, other in zip(derivatives, torch.autograd.grad(wanted.sum(), leaves), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


def training(ends: bool, rows: int = 90, **changes: Any) -> DynamicsTraining:
    rng = np.random.default_rng(0)
    s = rng.normal(size=(rows, D)).astype(np.float32)
    actions = rng.uniform(-1, 1, (rows, A)).astype(np.float32)
    after = np.tanh(s + actions[:, :1]) + 0.1 * rng.normal(size=(rows, D)).astype(np.float32)
    data = DynamicsData(
        s, actions, s[:, 0] * actions[:, 1], after, s[:, 0] > 0.5, np.arange(rows) // 10, np.arange(rows)
    )
    shape: dict[str, Any] = {"hidden_sizes": (16, 12), "weight_decay": (0.0, 0.0, 0.0), "members": 3, "elites": 2}
    shape.update(batch_size=64, **changes)
    config = DynamicsConfig(**shape)
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


def test_gradients_in_bfloat16_are_near_and_only_where_it_pays() -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = [(10, 80), (80, 96), (96, 64), (64, 6)]
    parts = [(torch.randn(2, i, o, generator=rng) / i**0.5, torch.randn(2, 1, o, generator=rng)) for i, o in sizes]
    x, slopes = torch.randn(2, 64, 10, generator=rng), torch.randn(2, 64, 6, generator=rng)
    double = StackedNetworks([(w.double(), b.double()) for w, b in parts])
    exact = double.gradients(x.double(), lambda _: slopes.transpose(1, 2).double())
    rough = StackedNetworks(parts, torch.bfloat16)
    found = rough.gradients(x, lambda _: slopes.transpose(1, 2))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.02
    assert float((found[2] - exact[2]).norm() / exact[2].norm()) > 1e-4  # it was in bfloat16
    wanted = plain(x, parts)
    np.testing.assert_allclose(rough.forward(x), wanted, rtol=1e-4, atol=1e-4)  # a pass is only where it is asked for
    asked = StackedNetworks(parts).forward(x, torch.bfloat16)
    assert asked.dtype == torch.float32
    assert 1e-4 < float((asked - wanted).norm() / wanted.norm()) < 0.02
    np.testing.assert_allclose(found[-1], slopes.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)  # nor the last layer


def test_a_precision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bf16'"):
        training(False, precision="bf1")
    with pytest.raises(ConfigError, match="GPU"):
        relu_network.product_type("bf16", "cuda")


def test_an_ensemble_learns_in_bfloat16_what_it_learns_in_float32() -> None:
    try:
        relu_network.product_type("bf16")
    except ConfigError:
        pytest.skip("this CPU only emulates bfloat16")
    errors = []
    for precision in ("fp32", "bf16"):
        found = training(False, precision=precision, rows=900, hidden_sizes=(64, 64))
        for epoch in range(40):
            found.update(epoch)
        errors.append(found.best_error.mean().item())
    assert errors[0] < 0.2  # of a spread of 1
    assert errors[1] == pytest.approx(errors[0], rel=0.15)

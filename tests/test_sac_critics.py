"""The critics of EDAC, RAVL and MOPO: every gradient written by hand against autograd in float64, and by numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from embodied.policies.networks import generators
from embodied.policies.sac_critics import CriticEnsemble, diversity_gradient

torch.set_num_threads(1)
S, B, D, A, N = 2, 12, 3, 2, 4


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ensemble(members: int = N) -> CriticEnsemble:
    critics = CriticEnsemble(generators([0, 1]), D, A, (16, 16, 16), members)
    with torch.no_grad():
        critics.mlp.layers[-1].weight.mul_(300)  # the start's last layer is tiny: give the slopes some size
    return critics


def plain(critics: CriticEnsemble, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The same networks by autograd's means: (S, N, B)."""
    h = torch.cat([observations, actions], -1).repeat_interleave(critics.members, 0)
    for number, layer in enumerate(critics.mlp.layers):
        h = h @ layer.weight + layer.bias
        h = F.relu(h) if number < len(critics.mlp.layers) - 1 else h
    return h.view(S, critics.members, -1)


def pairwise_term(slopes: torch.Tensor) -> torch.Tensor:
    """The published form, with its N x N products: (S, N, B, A) -> (S,)."""
    u = slopes / (slopes.norm(dim=-1, keepdim=True) + 1e-10)
    gram = torch.einsum("sibk,sjbk->sbij", u, u)
    off = gram * (1 - torch.eye(slopes.shape[1]))
    return off.sum((2, 3)).mean(1) / (slopes.shape[1] - 1)


def test_diversity_of_three_known_directions() -> None:
    slopes = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.5]], [[-3.0, 0.0]]]])  # pairs: 0, -1, 0, each twice, over N - 1 = 2
    term, _ = diversity_gradient(slopes)
    assert float(term) == pytest.approx(-1.0)
    same, gradient = diversity_gradient(torch.ones(1, 5, 7, 2))
    assert float(same) == pytest.approx(5.0)  # N (N - 1) ones over N - 1
    assert float(gradient.abs().max()) < 1e-9  # all alike is stationary, but for the floor


def test_diversity_gradient_equals_autograd_of_the_pairwise_form() -> None:
    torch.manual_seed(0)
    slopes = torch.randn(S, N, B, A, requires_grad=True)
    wanted = pairwise_term(slopes)
    term, gradient = diversity_gradient(slopes.detach())
    np.testing.assert_allclose(term, wanted.detach(), rtol=1e-12)
    np.testing.assert_allclose(gradient, torch.autograd.grad(wanted.sum(), slopes)[0], rtol=1e-9, atol=1e-14)


def test_a_slope_of_zero_gives_finite_gradients() -> None:
    slopes = torch.randn(1, 3, 4, A)
    slopes[0, 1, 2] = 0.0
    _, gradient = diversity_gradient(slopes)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("members", "diversity"), [(N, 0.0), (N, 1.7), (1, 1.7), (2, 0.3)])
@pytest.mark.parametrize("whole", [False, True])
def test_loss_and_gradient_equal_autograd(
    members: int, diversity: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    critics = ensemble(members)
    if whole:  # as on a GPU: all of the stack at once
        monkeypatch.setattr(critics, "_parts", lambda: [slice(0, S * members)])
    s, a, y = torch.randn(S, B, D), torch.rand(S, B, A), torch.randn(S, B)
    actions = a.clone().requires_grad_(True)
    q = plain(critics, s, actions)
    squared = (q - y.unsqueeze(1)).square().mean(-1)  # (S, N)
    loss, term = squared.sum(), torch.zeros(S)
    if members > 1:
        copies = [a.clone().requires_grad_(True) for _ in range(members)]
        slopes = [torch.autograd.grad(plain(critics, s, c)[:, i].sum(), c, create_graph=True)[0]
                  for i, c in enumerate(copies)]  # fmt: skip
        term = pairwise_term(torch.stack(slopes, 1))
        loss = loss + diversity * term.sum()
    wanted = torch.autograd.grad(loss, list(critics.parameters()), allow_unused=True)
    error, found_term, mean, found = critics.loss_gradients(s, a, y, diversity)
    np.testing.assert_allclose(error, squared.mean(1).detach(), rtol=1e-10)
    np.testing.assert_allclose(mean, q.detach().mean((1, 2)), rtol=1e-10)
    if diversity:
        np.testing.assert_allclose(found_term, term.detach(), rtol=1e-10, atol=1e-15)
    names = [name for name, _ in critics.named_parameters()]
    assert len(found) == len(wanted) == len(names)
    for name, one, other in zip(names, found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12, err_msg=name)


def test_the_minimum_is_over_all_members_and_so_is_its_slope() -> None:
    torch.manual_seed(2)
    critics = ensemble()
    s, a = torch.randn(S, B, D), torch.rand(S, B, A)
    actions = a.clone().requires_grad_(True)
    q = plain(critics, s, actions)
    value, slope, spread = critics.least(s, a)
    assert len(torch.unique(q.argmin(1))) > 1  # no single member is the minimum everywhere
    np.testing.assert_allclose(value, q.detach().numpy().min(1), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope, torch.autograd.grad(q.amin(1).sum(), actions)[0], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(spread, q.detach().numpy().std(1, ddof=1), rtol=1e-9)
    with torch.no_grad():
        masked = critics._slopes(torch.cat([s, a], -1), q.argmin(1))  # as on a GPU
    np.testing.assert_allclose(masked, slope, rtol=1e-9, atol=1e-14)


def test_a_stack_starts_as_its_seeds_alone_would() -> None:
    both = CriticEnsemble(generators([4, 9]), D, A, (8,), 3)
    alone = CriticEnsemble(generators([9]), D, A, (8,), 3)
    for one, other in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one[3:], other)
    assert both.mlp.layers[0].bias.unique().tolist() == [0.1]
    assert both.mlp.layers[-1].weight.detach().abs().max() <= 3e-3

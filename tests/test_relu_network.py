"""ReLU networks by hand: autograd's gradients, stacks that equal single networks bit for bit, and bfloat16's error."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied.contracts.errors import ConfigError
from embodied.policies import relu_network
from embodied.policies.losses import gaussian_log_prob, gaussian_log_prob_gradient

torch.set_num_threads(1)


def network(stack: int, sizes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [s for i, o in itertools.pairwise(sizes) for s in ((stack, i, o), (stack, 1, o))]
    return [(torch.randn(s, generator=generator) / s[1] ** 0.5).requires_grad_() for s in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    return list(torch.autograd.grad((weight * out).sum(), inputs))


@pytest.mark.parametrize("sizes", [(5, 8, 7, 1), (5, 8, 3), (4, 6), (3, 16, 16, 16, 4)])
@pytest.mark.parametrize("activate_final", [False, True])
def test_output_and_gradients_equal_autograds(sizes: tuple[int, ...], activate_final: bool) -> None:
    parameters = [p.detach().double().requires_grad_() for p in network(3, sizes)]
    x = torch.randn(3, 12, sizes[0], dtype=torch.float64, requires_grad=True)
    active = len(sizes) - 1 - (not activate_final)
    ours, reference = (f(x, parameters, active) for f in (relu_network.apply, relu_network.plain))
    np.testing.assert_allclose(ours.detach(), reference.detach(), rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(ours, [x, *parameters]), gradients(reference, [x, *parameters]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # the path without activations kept
        assert torch.equal(relu_network.apply(x, parameters, active), ours)


def test_a_stack_equals_single_networks_bit_for_bit() -> None:
    parameters, x = network(4, (11, 64, 64, 1)), torch.randn(4, 32, 11)
    found = gradients(relu_network.apply(x, parameters, 2), parameters)
    weight = torch.linspace(-1, 2, 4 * 32).view(4, 32, 1)
    for i in range(4):
        alone = [p[i : i + 1].detach().requires_grad_() for p in parameters]
        out = relu_network.apply(x[i : i + 1], alone, 2)
        for a, b in zip(found, torch.autograd.grad((weight[i : i + 1] * out).sum(), alone), strict=True):
            assert torch.equal(a[i : i + 1], b)


def test_passes_under_way_at_once_do_not_share_buffers() -> None:
    """Two forward passes before either backward: each keeps the activations it will need."""
    parameters = network(2, (5, 8, 8, 1))
    torch.autograd.grad(relu_network.apply(torch.randn(2, 6, 5), parameters, 2).sum(), parameters)  # leaves buffers
    xs = [torch.randn(2, 6, 5) for _ in range(2)]
    both = [relu_network.apply(x, parameters, 2) for x in xs]
    found = torch.autograd.grad(both[0].sum() + both[1].square().sum(), parameters)
    plain = [relu_network.plain(x, parameters, 2) for x in xs]
    expected = torch.autograd.grad(plain[0].sum() + plain[1].square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weights_that_need_no_gradient_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = relu_network._gradients
    monkeypatch.setattr(relu_network, "_gradients", lambda *a: asked.append(a[-2:]) or backward(*a))
    parameters, x = network(1, (5, 8, 1)), torch.randn(1, 6, 5, requires_grad=True)
    frozen = [p.detach() for p in parameters]
    (found,) = torch.autograd.grad(relu_network.apply(x, frozen, 1).sum(), [x])
    (expected,) = torch.autograd.grad(relu_network.plain(x, parameters, 1).sum(), [x])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    torch.autograd.grad(relu_network.apply(x.detach(), parameters, 1).sum(), parameters)
    assert asked == [(True, False), (False, True)]


def test_second_derivatives_are_autograds_and_a_second_backward_is_refused() -> None:
    parameters = [p.detach().double().requires_grad_() for p in network(2, (5, 8, 8, 1))]
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for apply in (relu_network.apply, relu_network.plain):
        (slope,) = torch.autograd.grad(apply(x, parameters, 2).sum(), [x], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), parameters[:4:2]))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-10)
    out = relu_network.apply(x, parameters, 2).sum()
    torch.autograd.grad(out, parameters, retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph is not possible"):
        torch.autograd.grad(out, parameters)


def test_bfloat16_products_are_near_and_outputs_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are near float32's: over 40 inputs the worst parameter's was 2 to 6 % off. The last layer is exact:
    values near 100 are not rounded to halves."""
    monkeypatch.setattr(relu_network, "BF16_FLAGS", {"flags"})  # a CPU without bfloat16 computes the same, slowly
    parameters = network(2, (11, 64, 64, 1))
    x = torch.randn(2, 128, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parameters[-1] += 100.0
    exact = relu_network.apply(x, parameters, 2)
    expected = gradients(exact, parameters)
    relu_network.set_precision("bf16")
    try:
        out = relu_network.apply(x, parameters, 2)
        found = gradients(out, parameters)
    finally:
        relu_network.set_precision("fp32")
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 0.02
    assert len(out.unique()) > 200
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.1
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.998
    assert not torch.equal(found[2], expected[2])  # it did round
    assert torch.equal(relu_network.apply(x, parameters, 2), exact)


def test_precisions_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no 'fp16'. .*Valid: bf16, fp32"):
        relu_network.set_precision("fp16")
    with pytest.raises(ConfigError, match="training on a CPU"):
        relu_network.set_precision("bf16", "cuda")
    monkeypatch.setattr(relu_network, "BF16_FLAGS", {"of_no_cpu"})
    with pytest.raises(ConfigError, match="does not compute in bfloat16"):
        relu_network.set_precision("bf16")


def test_gradients_of_the_likelihood_are_autograds() -> None:
    mean, log_std = torch.randn(2, 7, 3).double().requires_grad_(), torch.randn(2, 1, 3).double().requires_grad_()
    actions = torch.rand(2, 7, 3).double()
    expected = torch.autograd.grad(gaussian_log_prob(mean, log_std, actions).sum(), [mean, log_std])
    by_mean, by_log_std = gaussian_log_prob_gradient(mean.detach(), log_std.detach(), actions)
    np.testing.assert_allclose(by_mean, expected[0], rtol=1e-12)
    np.testing.assert_allclose(by_log_std.sum(1, keepdim=True), expected[1], rtol=1e-12)


def test_only_layers_with_many_inputs_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow first layer and the last are exact; inputs from 64 numbers on are worth rounding."""
    monkeypatch.setattr(relu_network, "BF16_FLAGS", {"flags"})
    for inputs, rounded in ((11, False), (63, False), (64, True)):
        parameters, x = network(2, (inputs, 32, 1)), torch.randn(2, 20, inputs)
        exact = relu_network.apply(x, parameters, 1)
        expected = gradients(exact, parameters)
        relu_network.set_precision("bf16")
        try:
            out = relu_network.apply(x, parameters, 1)
            found = gradients(out, parameters)
        finally:
            relu_network.set_precision("fp32")
        assert torch.equal(out, exact) is not rounded
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True)) is not rounded


def test_networks_without_autograd_give_each_member_its_seeds_input() -> None:
    parameters, x = network(6, (5, 8, 7, 2)), torch.randn(3, 12, 5)
    into = [torch.empty_like(p, requires_grad=False) for p in parameters]
    ours = relu_network.Networks(parameters, 2, into, members=2)
    repeated = x.repeat_interleave(2, 0)
    reference = relu_network.plain(repeated, parameters, 2)
    np.testing.assert_allclose(ours.forward(x), reference.detach(), rtol=1e-5, atol=1e-6)
    ours.forward(x + 1.0, keep=True)  # a pass never gone backwards, for which nothing is kept any more
    out = ours.forward(x, keep=True)
    ours.forward(x - 1.0)  # and one beside it, without a trace
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    ours.backward(weight)
    for a, b in zip(into, gradients(reference, parameters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        parameters[0] += 0.5  # in place: seen without being told
    np.testing.assert_allclose(ours.forward(x), relu_network.plain(repeated, parameters, 2).detach(), rtol=1e-4)


def test_passes_in_inference_mode_leave_nothing_that_others_cannot_use() -> None:
    """A policy acts and goes on learning in one process, and the other way round."""
    x, parameters = torch.rand(1, 7, 5), [parameter.detach() for parameter in network(1, (5, 6, 3))]
    relu_network._free.clear()
    with torch.inference_mode():
        first = relu_network.apply(x, parameters, 1)
    second = relu_network.apply(x, parameters, 1)
    with torch.inference_mode():
        third = relu_network.apply(x, parameters, 1)
    assert torch.equal(first, second)
    assert torch.equal(second, third)

"""Updates by hand equal autograd's, vectors hold what checkpoints name, and dropout is what its seed and step say."""

import dataclasses
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError
from embodied.policies import descent
from embodied.policies.configure import configure
from embodied.policies.iql import IQL, PRESETS, IQLConfig
from embodied.policies.losses import gaussian_log_prob
from embodied.policies.networks import Actor, generators
from embodied.policies.noise import Dropout

torch.set_num_threads(1)
D, A, B = 3, 2, 16


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
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(config: IQLConfig, seeds: list[int], steps: int = 4, start: float = 0.0) -> tuple[IQL, dict]:
    learner, metrics = IQL(config, seeds, D, A, steps=10), {}
    with torch.no_grad():
        learner.actor.log_std.fill_(start)
    for k in range(steps):
        metrics = learner.update(random_batch(len(seeds), k))
    return learner, metrics


HEADS = {"mse": {}, "hl_gauss": {"value_head": "hl_gauss", "value_support": (-20.0, 20.0), "value_bins": 11}}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sizes", [(8, 7), (6,)])
def test_by_hand_is_the_update_of_autograd(monkeypatch: pytest.MonkeyPatch, head: str, sizes: tuple[int, ...]) -> None:
    config = IQLConfig(hidden_sizes=sizes, batch_size=B, learning_rate=0.01, **HEADS[head])
    by_hand, metrics = trained(config, [3, 5])
    assert by_hand._critic.vector is not None
    monkeypatch.setattr(descent, "possible", lambda mlp: False)
    by_autograd, expected = trained(config, [3, 5])
    assert by_autograd._critic.vector is None
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-9, err_msg=name)
    found, wanted = by_hand.state_dict(), by_autograd.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name].detach(), value.detach(), rtol=1e-8, atol=1e-11, err_msg=name)
    by_autograd.load_state_dict({name: value.clone() for name, value in found.items()})  # and checkpoints are the same
    again = [learner.update(random_batch(2, 9)) for learner in (by_hand, by_autograd)]
    np.testing.assert_allclose(again[0]["critic_loss"], again[1]["critic_loss"], rtol=1e-9)


def test_a_standard_deviation_at_the_edge_of_its_range_is_not_moved_beyond() -> None:
    config = IQLConfig(hidden_sizes=(4,), batch_size=B, learning_rate=0.1)
    learner, _ = trained(config, [0], 1, start=2.5)
    assert torch.equal(learner.actor.log_std, torch.full((1, 1, A), 2.5))
    learner, _ = trained(config, [0], 1, start=1.5)
    assert (learner.actor.log_std - 1.5).abs().min() > 0.01


def test_parts_of_a_vector_start_at_cache_lines_and_stay_the_parameters() -> None:
    actor = Actor(generators([0, 1]), D, A, (5,))
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    vector = descent.one_vector(list(actor.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())
    assert all(p.storage_offset() % descent.ALIGN == 0 for p in actor.parameters())
    used = sum(p.numel() for p in actor.parameters())
    assert vector.abs().sum().item() == pytest.approx(sum(p.abs().sum().item() for p in actor.parameters()))
    vector += 1.0
    assert all(torch.equal(value, before[name] + 1.0) for name, value in actor.state_dict().items())
    assert used < len(vector) < used + descent.ALIGN * 5
    assert all(p.requires_grad and p.is_leaf for p in actor.parameters())


def test_dropout_is_a_function_of_seed_and_step() -> None:
    draws = Dropout([4, 9], 0.1, 512, (256, 128))
    masks = draws(3)
    assert [tuple(mask.shape) for mask in masks] == [(2, 512, 256), (2, 512, 128)]
    for mask in masks:
        zeros, others = mask == 0, mask[mask != 0]
        assert zeros.double().mean().item() == pytest.approx(0.1, abs=0.003)
        assert torch.equal(others, torch.full_like(others, 1.0 / 0.9))
    assert torch.equal(Dropout([9], 0.1, 512, (256, 128))(3)[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(draws(4)[0], masks[0])
    assert torch.equal(draws(40)[0], Dropout([4, 9], 0.1, 512, (256, 128))(40)[0])  # another block of steps
    assert Dropout([4], 0.0, 8, (4,))(0) == []


def test_an_update_with_dropout_is_that_of_the_thinned_actor() -> None:
    """Against autograd through the formula: masks behind each ReLU of the actor, none in value or critic."""
    config = IQLConfig(hidden_sizes=(8, 6), batch_size=B, learning_rate=0.01, actor_dropout=0.4, cosine_actor=False)
    learner, plain = (IQL(c, [2], D, A, 10) for c in (config, dataclasses.replace(config, actor_dropout=0.0)))
    batch = random_batch(1)
    start = [p.detach().clone().requires_grad_() for p in learner.actor.parameters()]
    log_std, w1, b1, w2, b2, w3, b3 = start
    masks = Dropout([2], 0.4, B, (8, 6))(0)
    with torch.no_grad():
        q = plain.q_values(batch["observations"], batch["actions"])
    metrics, other = learner.update(batch), plain.update(batch)
    for name in ("value_loss", "critic_loss"):
        assert metrics[name].item() == pytest.approx(other[name].item(), rel=1e-12)
    hidden = torch.relu(batch["observations"] @ w1 + b1) * masks[0]
    mean = torch.tanh((torch.relu(hidden @ w2 + b2) * masks[1]) @ w3 + b3)
    actions = batch["actions"].clamp(-1 + 1e-5, 1 - 1e-5)
    with torch.no_grad():
        value = learner.value(batch["observations"])
    weight = torch.exp(3.0 * (q - value)).clamp(max=100.0)
    loss = -(weight * gaussian_log_prob(mean, log_std, actions)).mean()
    assert metrics["actor_loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, start)
    for new, old, gradient in zip(learner.actor.parameters(), start, gradients, strict=True):
        expected = old - 0.01 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
        np.testing.assert_allclose(new.detach(), expected.detach(), rtol=1e-6, atol=1e-9)


def test_seeds_with_dropout_are_alone_in_a_stack_and_resume() -> None:
    config = IQLConfig(hidden_sizes=(8, 8), batch_size=B, actor_dropout=0.1)
    stack, _ = trained(config, [4, 7], 6)
    single = IQL(config, [7], D, A, steps=10)
    for k in range(6):
        batch = random_batch(2, k)
        single.update(cast("Batch", {key: tensor[1:] for key, tensor in cast("dict[str, Tensor]", batch).items()}))
    for name, value in stack.actor_state(1).items():
        np.testing.assert_allclose(value, single.actor_state(0)[name], rtol=1e-9, atol=1e-12)
    first, _ = trained(config, [4, 7], 3)
    second = IQL(config, [4, 7], D, A, steps=10)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for k in range(3, 6):
        second.update(random_batch(2, k))
    assert all(torch.equal(value, stack.state_dict()[name]) for name, value in second.state_dict().items())


def test_presets_with_dropout_and_rates_that_are_none() -> None:
    assert {name: preset.actor_dropout for name, preset in PRESETS.items() if preset.actor_dropout} == {
        "kitchen": 0.1,
        "adroit": 0.1,
    }
    with pytest.raises(ConfigError, match="actor_dropout"):
        configure(PRESETS, "kitchen", {"actor_dropout": 1.0}, "train iql")

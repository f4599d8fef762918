"""Behaviour cloning: the loss by hand, IQL's actor without weights, and that it clones."""

import math

import numpy as np
import pytest
import torch

from embodied.contracts.batch import Batch
from embodied.policies.bc import BC, BCConfig
from embodied.policies.iql import IQL, IQLConfig
from embodied.policies.networks import clip_actions

torch.set_num_threads(1)


def assert_close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Without torch.testing, which imports sympy for seconds."""
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=rtol, atol=atol)


def batch_of(observations: torch.Tensor, actions: torch.Tensor) -> Batch:
    ones = torch.ones(observations.shape[:2])
    return {
        "observations": observations,
        "actions": actions,
        "rewards": ones,
        "masks": ones,
        "next_observations": observations,
    }


def test_loss_by_hand() -> None:
    learner = BC(BCConfig(hidden_sizes=(4,)), [0], 2, 1, 10)
    with torch.no_grad():
        for p in learner.actor.parameters():
            p.zero_()
    loss, error = learner.loss(batch_of(torch.ones(1, 2, 2), torch.tensor([[[0.6], [-0.8]]])))
    # mean 0, std 1: 0.5 * mean(0.36, 0.64) + 0.5 log 2 pi
    assert loss.item() == pytest.approx(0.25 + 0.5 * math.log(2 * math.pi), rel=1e-6)
    assert error.item() == pytest.approx(0.5)


def test_it_is_iqls_actor_with_all_weights_one() -> None:
    cloned = BC(BCConfig(hidden_sizes=(8,)), [5, 6], 3, 2, 10)
    weighted = IQL(IQLConfig(hidden_sizes=(8,), inverse_temperature=0.0), [5, 6], 3, 2, 10)
    weighted.actor.load_state_dict(cloned.actor.state_dict())
    batch = batch_of(torch.randn(2, 16, 3), torch.rand(2, 16, 2) * 2 - 1)
    with torch.no_grad():
        mean, log_std = weighted.actor(batch["observations"])
        loss, *_, weight = weighted.actor_loss(clip_actions(batch["actions"]), mean, log_std, torch.randn(2, 16))
    assert weight.unique().tolist() == [1.0]
    assert_close(loss, cloned.loss(batch)[0])


def test_stacked_cloning_learns_a_function_per_seed_and_equals_separate() -> None:
    generator = torch.Generator().manual_seed(0)
    config = BCConfig(hidden_sizes=(32, 32), learning_rate=3e-3)
    stack, single = BC(config, [1, 2], 2, 1, 300), BC(config, [2], 2, 1, 300)
    for _ in range(300):
        x = torch.rand(2, 64, 2, generator=generator) * 2 - 1
        batch = batch_of(x, 0.8 * torch.sin(2 * x[..., :1] + x[..., 1:]))
        metrics = stack.update(batch)
        alone = single.update(batch_of(x[1:], batch["actions"][1:]))
    assert metrics["squared_error"].max() < 0.02  # actions have a variance of about 0.25
    assert metrics["actor_loss"][1].item() == pytest.approx(alone["actor_loss"].item(), abs=0.02)
    assert stack.actor.log_std.max() < -0.3  # the spread is learned too


def test_state_dict_restores_the_run_exactly() -> None:
    first, second = (BC(BCConfig(hidden_sizes=(8,)), [seed], 3, 2, 10) for seed in (0, 1))
    batches = [batch_of(torch.randn(1, 8, 3), torch.rand(1, 8, 2)) for _ in range(6)]
    for batch in batches[:3]:
        first.update(batch)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for batch in batches[3:]:
        first.update(batch)
        second.update(batch)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())

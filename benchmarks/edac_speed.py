"""What an EDAC update costs, beside the same update by autograd in one batched product, taken in turns.

    python benchmarks/edac_speed.py

Observation 17, action 6, three layers of 256, batch 256, one thread, CPU time; N = 10 and 50. The batched form is what
a plain implementation does: critics of the actor's loss are differentiated in all weights, all N at every row, and the
diversity term by differentiating a gradient. Also dynamics: training, and rollouts of 10,000 rows with one
member per row and with all.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import write_result
from torch import Tensor
from torch.nn import functional as F

from embodied.policies.dynamics import Dynamics, DynamicsNetwork, Scales
from embodied.policies.dynamics_training import DynamicsConfig, DynamicsData, DynamicsTraining, split_rows
from embodied.policies.edac import EDAC, EDACConfig
from embodied.policies.networks import generators

D, A, B = 17, 6, 256


def in_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of each, rounds interleaved."""
    least = dict.fromkeys(works, np.inf)
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.thread_time()
            work()
            least[name] = min(least[name], time.thread_time() - start)
    return least


def batched(critic: Any, s: Tensor, a: Tensor) -> Tensor:
    h = torch.cat([s, a], -1)
    h = h.repeat_interleave(critic.members, 0) if len(h) == 1 else h
    layers = critic.mlp.layers
    for number, layer in enumerate(layers):
        h = torch.baddbmm(layer.bias, h, layer.weight)
        h = F.relu(h) if number < len(layers) - 1 else h
    return h.squeeze(-1)  # (N, B)


def plain_update(learner: EDAC, batch: Any) -> None:
    """The same losses by autograd alone, with this learner's optimisers."""
    config, critic, n = learner.config, learner.critic, learner.config.members
    s, following, noise = batch["observations"], batch["next_observations"], learner._noise(0)
    with torch.no_grad():
        _, log_prob = learner.actor.sample(s, noise[:, 0])
    learner.temperature_optimizer.step([-(log_prob.mean(-1) + learner.target_entropy)])
    alpha = learner.temperature.log.detach().exp()
    actions, log_prob = learner.actor.sample(s, noise[:, 0])
    loss = (alpha * log_prob - batched(critic, s, actions).amin(0)).mean()
    loss.backward()
    learner.actor_optimizer.step([p.grad for p in learner.actor.parameters() if p.grad is not None])
    for p in [*learner.actor.parameters(), *critic.parameters()]:
        p.grad = None
    with torch.no_grad():
        actions, log_prob = learner.actor.sample(following, noise[:, 1])
        value = batched(learner.target_critic, following, actions).amin(0) - alpha * log_prob
        y = batch["rewards"] + config.discount * batch["masks"] * value
    loss = (batched(critic, s, batch["actions"]) - y).square().mean(1).sum()
    a = batch["actions"].expand(n, -1, -1).clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(batched(critic, s.expand(n, -1, -1), a).sum(), a, create_graph=True)
    u = (slope / (slope.norm(dim=2, keepdim=True) + 1e-10)).transpose(0, 1)
    gram = (1 - torch.eye(n)) * (u @ u.transpose(1, 2))
    loss = loss + config.diversity * gram.sum((1, 2)).mean() / (n - 1)
    loss.backward()
    learner.critic_optimizer.step([p.grad for p in critic.parameters() if p.grad is not None])
    with torch.no_grad():
        for old, new in zip(learner.target_critic.parameters(), critic.parameters(), strict=True):
            old.lerp_(new, config.target_update_rate)
    for p in critic.parameters():
        p.grad = None


def critics(members: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    batch: Any = {
        "observations": torch.from_numpy(rng.normal(size=(1, B, D)).astype(np.float32)),
        "actions": torch.from_numpy(rng.uniform(-1, 1, (1, B, A)).astype(np.float32)),
        "rewards": torch.from_numpy(rng.normal(size=(1, B)).astype(np.float32)),
        "masks": torch.ones(1, B),
        "next_observations": torch.from_numpy(rng.normal(size=(1, B, D)).astype(np.float32)),
    }
    ours, plain = (EDAC(EDACConfig(members=members), [0], D, A, 1000) for _ in range(2))
    found = in_turns({"ours": lambda: ours.update(batch), "plain": lambda: plain_update(plain, batch)}, rounds)
    rates = {name: round(1 / seconds, 2) for name, seconds in found.items()}
    return {"updates_per_second": rates, "ratio": round(found["plain"] / found["ours"], 2)}


def dynamics(rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    n, d, a = 5000, 11, 3
    s, after = (rng.normal(size=(n, d)).astype(np.float32) for _ in range(2))
    actions, pay = rng.uniform(-1, 1, (n, a)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    data = DynamicsData(s, actions, pay, after, np.zeros(n, bool), np.repeat(np.arange(10), n // 10), np.arange(n))
    config = DynamicsConfig()
    training = DynamicsTraining(config, [0], data, split_rows(data, config))
    rows = torch.from_numpy(training._order(0, 0))[:, :B]

    def epoch_step() -> None:
        _, gradients = training.loss_gradients(training._train[rows])
        training.optimizer.step(gradients, training.rates, [True])

    trained = in_turns({"training": epoch_step}, rounds)
    network = DynamicsNetwork(generators([0]), d, a, config.hidden_sizes, config.members)
    scales = Scales(torch.zeros(d + a), torch.ones(d + a), torch.zeros(d + 1), torch.ones(d + 1))
    model = Dynamics(network, scales, range(5), "hopper")
    state, action = torch.randn(10_000, d), torch.rand(10_000, a)
    stepped = in_turns(
        {
            "one_member_per_row": lambda: model.step(state, action, rng),
            "all_members": lambda: model.step(state, action, rng, "aleatoric"),
        },
        rounds,
    )
    return {
        "member_transitions_per_second": round(config.members * B / trained["training"]),
        "rollout_transitions_per_second": {k: round(10_000 / v) for k, v in stepped.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    figures = {f"edac_{n}": critics(n, rounds) for n in (10, 50)} | {"dynamics": dynamics(2 * rounds)}
    write_result("edac_speed", figures)


if __name__ == "__main__":
    main()

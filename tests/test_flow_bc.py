"""Flow matching: the loss by hand, two modes kept where a Gaussian averages them, and bundles that act as trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.batch import Batch
from embodied.contracts.errors import BundleError, ConfigError, InputError
from embodied.contracts.provenance import hash_file
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies.actors import FlowActor
from embodied.policies.bc import BC, BCConfig
from embodied.policies.bundle import PolicyContract, load_policy
from embodied.policies.flow_bc import FlowBC, FlowBCConfig
from embodied.policies.networks import generators
from embodied.policies.train import TransitionData, make_config, train
from embodied.sim.rollout import PolicyBehaviour

torch.set_num_threads(1)
SMALL = FlowBCConfig(hidden_sizes=(16, 16), batch_size=8, chunk=2, execute=2)


def batch_of(actions: torch.Tensor, observations: torch.Tensor | None = None) -> Batch:
    seen = torch.zeros(*actions.shape[:2], 1) if observations is None else observations
    ones = torch.ones(actions.shape[:2])
    return {"observations": seen, "actions": actions, "rewards": ones, "masks": ones, "next_observations": seen}


def random_batch(seeds: int, step: int) -> Batch:
    draw = torch.Generator().manual_seed(step)
    return batch_of(torch.rand(seeds, 8, 4, generator=draw) * 2 - 1, torch.randn(seeds, 8, 3, generator=draw))


def test_loss_by_hand() -> None:
    learner = FlowBC(dataclasses.replace(SMALL, batch_size=2), [0], 1, 1, 10)
    with torch.no_grad():
        for parameter in learner.actor.parameters():
            parameter.zero_()
        learner.actor.mlp.layers[-1].bias.fill_(0.25)  # v = 0.25 everywhere
    actions, noise = torch.tensor([[[0.5], [-3.0]]]), torch.tensor([[[1.0], [0.5]]])
    loss = learner.loss(batch_of(actions), noise, torch.full((1, 2, 1), 0.3))
    # a - noise: -0.5, and -1.5 of the action clipped to -1
    assert loss.item() == pytest.approx((0.75**2 + 1.75**2) / 2)


def test_the_network_sees_the_point_and_the_time_on_the_straight_line() -> None:
    learner = FlowBC(SMALL, [0], 3, 4, 10)
    seen: dict[str, torch.Tensor] = {}
    learner.actor.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[1], t=inputs[2]))
    batch, noise, time = random_batch(1, 0), torch.randn(1, 8, 4), torch.rand(1, 8, 1)
    learner.loss(batch, noise, time)
    np.testing.assert_allclose(seen["x"], (1 - time) * noise + time * batch["actions"], rtol=1e-6, atol=1e-6)
    assert torch.equal(seen["t"], time)


def test_euler_steps_follow_a_constant_field_exactly() -> None:
    learner = FlowBC(SMALL, [0], 3, 4, 10)
    with torch.no_grad():
        for parameter in learner.actor.parameters():
            parameter.zero_()
        learner.actor.mlp.layers[-1].bias.fill_(0.5)
        noise = torch.randn(1, 6, 4)
        np.testing.assert_allclose(learner.actor.generate(torch.randn(1, 6, 3), noise), noise + 0.5, atol=1e-6)


def test_stacked_equals_separate_and_a_resumed_run_is_the_same() -> None:
    stack, single = FlowBC(SMALL, [4, 7], 3, 4, 12), FlowBC(SMALL, [7], 3, 4, 12)
    resumed = FlowBC(SMALL, [4, 7], 3, 4, 12)
    for k in range(12):
        batch = random_batch(2, k)
        if k == 5:
            resumed.load_state_dict({name: value.clone() for name, value in stack.state_dict().items()})
        together = stack.update(batch)["actor_loss"]
        alone = single.update(batch_of(batch["actions"][1:], batch["observations"][1:]))["actor_loss"]
        assert together[1].item() == pytest.approx(alone.item(), rel=1e-5)
        if k >= 5:
            resumed.update(batch)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in stack.state_dict().items())


def test_a_flow_keeps_two_modes_where_a_gaussian_answers_with_their_mean() -> None:
    """Half of the demonstrations pass left (-0.8, twice), half right; in between is a wall, and nobody mixes sides.

    Some noise lies where the sides part, and Euler's method ends in between from there: less often with more steps.
    """
    seeds, draw = [0, 1, 2], torch.Generator().manual_seed(0)
    config = FlowBCConfig(hidden_sizes=(64, 64), batch_size=64, learning_rate=3e-3, chunk=2, execute=2)
    flow = FlowBC(config, seeds, 1, 2, 500)
    gaussian = BC(BCConfig(hidden_sizes=(64, 64), learning_rate=3e-3), seeds, 1, 2, 500)
    for _ in range(500):
        side = torch.randint(2, (3, 64, 1), generator=draw) * 1.6 - 0.8
        batch = batch_of(side.expand(3, 64, 2) + 0.02 * torch.randn(3, 64, 2, generator=draw))
        flow.update(batch)
        gaussian.update(batch)
    noise, shares = torch.randn(3, 2000, 2, generator=draw), {}
    with torch.no_grad():
        mean, _ = gaussian.actor(torch.zeros(3, 1, 1))
        for steps in (5, 40):
            flow.actor.steps = steps
            chunks = flow.actor.generate(torch.zeros(3, 2000, 1), noise)
            whole = ((chunks.abs() - 0.8).abs() < 0.25).all(-1) & (chunks[..., 0] * chunks[..., 1] > 0)
            shares[steps] = whole.float().mean(-1)
            left = (chunks[..., 0] < 0).float().mean(-1)
    assert mean.abs().max() < 0.2  # into the wall, with every seed
    lower = shares[40] - 1.96 * (shares[40] * (1 - shares[40]) / 2000).sqrt()  # of a 95 % interval over draws
    assert (lower > 0.85).all(), shares  # on one side with both actions, with every seed
    assert (shares[40] > shares[5]).all(), shares
    assert ((left > 0.4) & (left < 0.6)).all(), left


def data_and_contract(stack: int, chunk: int, execute: int) -> tuple[TransitionData, PolicyContract]:
    rng = np.random.default_rng(0)
    n = 60
    contract = PolicyContract(
        {"joint_position": ArraySpec((3,), unit="rad")},
        {},
        ActionSpec((2,), names=("a", "b")),
        0.1,
        {"joint_position": {"mean": np.full(3, 0.5, np.float32), "std": np.full(3, 2.0, np.float32)}},
        stack=stack,
        chunk=chunk,
        execute=execute,
    )
    data = TransitionData(
        rng.normal(size=(n, 3 * stack)).astype(np.float32),
        rng.uniform(-1, 1, (n, 2 * chunk)).astype(np.float32),
        np.arange(n - 1),
        np.arange(1, n),
        np.zeros(n - 1, np.float32),
        np.ones(n - 1, np.float32),
    )
    return data, contract


def trained(folder: Path, learner: str, stack: int = 1, **settings: object) -> Path:
    config = make_config(learner, overrides={"hidden_sizes": (16,), "batch_size": 8, **settings})
    data, contract = data_and_contract(stack, config.chunk, config.execute)
    train(learner, data, config, [0, 5], 20, folder, contract)
    return folder / "seed_005"


def observations(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"joint_position": rng.normal(size=3).astype(np.float32)} for _ in range(count)]


def test_a_bundle_of_chunks_and_stacks_gives_what_the_network_gives(tmp_path: Path) -> None:
    policy = load_policy(trained(tmp_path, "bc", stack=3, chunk=4, execute=2))
    assert (policy.contract.stack, policy.contract.chunk, policy.execute) == (3, 4, 2)
    seen = observations(5)
    rows = [(o["joint_position"] - 0.5) / 2.0 for o in seen]
    for t, observation in enumerate(seen):
        x = np.concatenate([rows[max(t - k, 0)] for k in (2, 1, 0)])
        with torch.no_grad():
            wanted = policy._actor(torch.from_numpy(x).view(1, 1, -1))[0].view(4, 2)
        np.testing.assert_allclose(policy.act(observation), wanted, atol=1e-6)
    first = load_policy(tmp_path / "seed_005").act(seen[0])
    assert not np.allclose(policy.act(seen[0]), first)  # it remembers
    policy.reset()
    np.testing.assert_array_equal(policy.act(seen[0]), first)
    with pytest.raises(InputError, match="last 3 observations"):
        policy.act_batch({"joint_position": np.zeros((2, 3), np.float32)})


def test_evaluation_executes_part_of_a_chunk_and_observes_meanwhile(tmp_path: Path) -> None:
    folder = trained(tmp_path, "bc", stack=2, chunk=4, execute=3)
    behaviour, twin = PolicyBehaviour(load_policy(folder)), load_policy(folder)
    for episode in range(2):  # the second as the first: nothing is carried over
        behaviour.reset(episode)
        twin.reset()
        for t, observation in enumerate(observations(8)):
            if t % 3 == 0:
                chunk = twin.act(observation)
            else:
                twin.observe(observation)
            np.testing.assert_array_equal(behaviour.act(observation), chunk[t % 3])


def test_a_flow_bundle_repeats_its_draws_after_a_reset(tmp_path: Path) -> None:
    folder = trained(tmp_path, "flow", chunk=3, execute=1)
    policy, other = load_policy(folder), load_policy(folder)
    seen = observations(1)[0]
    first, second = policy.act(seen), policy.act(seen)
    assert first.shape == (3, 2)
    assert not np.allclose(first, second)  # each question has noise of its own
    policy.reset()
    np.testing.assert_array_equal(policy.act(seen), first)
    np.testing.assert_array_equal(other.act(seen), first)
    settings = json.loads((folder / "config.json").read_text())["architecture"]["actor"]
    assert settings == {"kind": "flow", "steps": 10, "noise": "seeded", "noise_seed": 0}


def test_a_flow_without_noise_has_one_answer(tmp_path: Path) -> None:
    policy = load_policy(trained(tmp_path, "flow", noise="zero"))
    seen = observations(1)[0]
    np.testing.assert_array_equal(policy.act(seen), policy.act(seen))


def test_unknown_kinds_of_actors_are_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path, "flow")
    for field, value, message in (
        ("kind", "diffusion", "unknown kind of actor 'diffusion'"),
        ("noise", "pink", "unknown noise 'pink'"),
        ("steps", 0, "1 step or more"),
    ):
        config = json.loads((folder / "config.json").read_text())
        kept = (folder / "config.json").read_text(), (folder / "hashes.json").read_text()
        config["architecture"]["actor"][field] = value
        (folder / "config.json").write_text(json.dumps(config))
        hashes = json.loads(kept[1]) | {"config.json": hash_file(folder / "config.json")}
        (folder / "hashes.json").write_text(json.dumps(hashes))
        with pytest.raises(BundleError, match=message):
            load_policy(folder)
        (folder / "config.json").write_text(kept[0])
        (folder / "hashes.json").write_text(kept[1])
    assert load_policy(folder).act(observations(1)[0]).shape == (8, 2)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown noise 'pink'"):
        FlowBC(dataclasses.replace(SMALL, noise="pink"), [0], 3, 4, 10)
    with pytest.raises(ConfigError, match="flow_steps"):
        make_config("flow", overrides={"flow_steps": 0})
    with pytest.raises(BundleError, match="1 <= execute <= chunk; found stack 1, execute 3, chunk 2"):
        data_and_contract(1, 2, 3)
    data, contract = data_and_contract(1, 2, 1)
    with pytest.raises(ConfigError, match="cannot be varied"):
        train("bc", data, make_config("bc", overrides={"chunk": 4}), [0], 5, tmp_path, contract)


def test_every_step_draws_noise_and_times_of_its_own() -> None:
    learner, seen = FlowBC(SMALL, [0, 1], 3, 4, 40), []
    learner.actor.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[1].clone(), inputs[2].clone())))
    for _ in range(40):
        learner.update(random_batch(2, 0))
    points, times = (torch.stack(parts) for parts in zip(*seen, strict=True))  # (40, 2, 8, ...)
    assert len(times.unique()) > 600  # of 640
    assert len(points[:, 0, 0, 0].unique()) == 40
    assert times.min() >= 0
    assert times.max() <= 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.05)  # of 640 uniform draws, whose mean spreads by 0.011


@pytest.mark.parametrize("sizes", [(16, 12), (16,)])
@pytest.mark.parametrize("noise", ["seeded", "zero"])
def test_generating_is_eulers_method_over_the_field(sizes: tuple[int, ...], noise: str) -> None:
    actor = FlowActor(generators([0, 3]), 5, 6, sizes, steps=7, noise=noise).double()
    draws = torch.Generator().manual_seed(0)
    observations, start = (torch.randn(2, 4, size, generator=draws, dtype=torch.float64) for size in (5, 6))
    with torch.no_grad():
        x = start if noise == "seeded" else torch.zeros_like(start)
        for step in range(7):
            x = x + actor(observations, x, torch.full((2, 4, 1), step / 7, dtype=torch.float64)) / 7
        np.testing.assert_allclose(actor.generate(observations, start), x, rtol=1e-12, atol=1e-13)

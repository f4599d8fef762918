"""Dynamics: bounds, loss, scales, one step and the training's gradient, each against float64 NumPy or autograd."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import BundleError, ConfigError, InputError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies import relu_network
from embodied.policies.bundle import PolicyContract
from embodied.policies.dynamics import (
    Dynamics,
    DynamicsConfig,
    DynamicsNetwork,
    Scales,
    bound_log_variance,
    disagreement,
    fit_scales,
    gaussian_loss,
)
from embodied.policies.dynamics_bundle import input_contract, load_dynamics, save_dynamics
from embodied.policies.dynamics_evaluation import chains, evaluate_dynamics
from embodied.policies.dynamics_training import DynamicsData, DynamicsTraining, run_training, split_rows
from embodied.policies.networks import generators

torch.set_num_threads(1)
D, A = 3, 2
SMALL = DynamicsConfig(
    members=4, elites=2, hidden_sizes=(16, 16), weight_decay=(1e-5, 2e-5, 3e-5), batch_size=32, max_epochs=6
)


def linear_data(episodes: int = 12, length: int = 30, noise: float = 0.05, ends: bool = False) -> DynamicsData:
    """s' = s + 0.3 tanh(a1) - 0.1 s + noise, r = s0 - a0, in episodes of equal length."""
    rng = np.random.default_rng(5)
    rows = episodes * length
    episode = np.repeat(np.arange(episodes), length)
    s = np.empty((rows, D))
    following = np.empty((rows, D))
    actions = rng.uniform(-1, 1, (rows, A))
    state = rng.normal(size=D)
    for i in range(rows):
        if i % length == 0:
            state = rng.normal(size=D)
        s[i] = state
        state = state + 0.3 * np.tanh(actions[i, 1]) - 0.1 * state + noise * rng.normal(size=D)
        following[i] = state
    terminated = (following[:, 0] > 0.3) if ends else np.zeros(rows, bool)
    frame = np.arange(rows) + episode  # one final observation per episode
    s, actions, following = (x.astype(np.float32) for x in (s, actions, following))
    return DynamicsData(s, actions, s[:, 0] - actions[:, 0], following, terminated, episode, frame)


def contract() -> PolicyContract:
    normalizer = {"state": {"mean": np.zeros(D, np.float32), "std": np.ones(D, np.float32)}}
    return PolicyContract({"state": ArraySpec((D,))}, {}, ActionSpec((A,)), 0.1, normalizer, environment="test")


def make_dynamics(termination: str = "none", elites: tuple[int, ...] = (2, 0, 3)) -> Dynamics:
    network = DynamicsNetwork(generators([1]), D, A, (8, 8), 4, terminates=termination == "learned")
    scales = Scales(torch.linspace(-1, 1, D + A), torch.linspace(0.5, 2, D + A), torch.rand(D + 1), torch.rand(D + 1))
    return Dynamics(network, scales, elites, termination)


def numpy_member(dynamics: Dynamics, member: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log variance of one member in float64, without torch."""
    network = dynamics.network
    for n, layer in enumerate(network.layers):
        x = x @ layer.weight[member].double().numpy() + layer.bias[member].double().numpy()
        if n < len(network.layers) - 1:
            x = x / (1.0 + np.exp(-x))
    mean, raw = x[:, : D + 1], x[:, D + 1 : 2 * (D + 1)]
    raw = 0.5 - np.log1p(np.exp(0.5 - raw))
    return mean, -10.0 + np.log1p(np.exp(raw + 10.0))


def test_log_variance_bounds_are_soft_and_hold_anywhere() -> None:
    raw = torch.tensor([-1e4, -10.0, 0.0, 0.5, 1e4], dtype=torch.float64, requires_grad=True)
    bounded = bound_log_variance(raw, torch.tensor(-10.0), torch.tensor(0.5))
    upper = 0.5 - np.logaddexp(0, 0.5 - raw.detach().numpy())
    np.testing.assert_allclose(bounded.detach(), -10.0 + np.logaddexp(0, upper + 10.0), rtol=1e-12)
    # softplus(min) > 0 lets the value pass the upper bound by log(1 + exp(-10.5)) at most.
    assert bounded.detach().min() >= -10.0
    assert bounded.detach().max() <= 0.5 + 3e-5
    bounded.sum().backward()
    assert raw.grad is not None
    assert float(raw.grad[1]) == pytest.approx(0.5, abs=1e-3)


def test_gaussian_loss_equals_the_likelihood() -> None:
    rng = np.random.default_rng(0)
    mean, log_variance, target = (torch.from_numpy(rng.normal(size=(2, 5, 3))) for _ in range(3))
    std = np.exp(0.5 * log_variance.numpy())
    log_density = -0.5 * ((target - mean).numpy() / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    expected = (-2 * log_density - np.log(2 * np.pi)).mean((1, 2))
    np.testing.assert_allclose(gaussian_loss(mean, log_variance, target), expected, rtol=1e-12)


def test_scales_are_those_of_the_training_inputs_and_survive_a_constant() -> None:
    data = linear_data()
    data.observations[:, 2] = 7.0
    scales = fit_scales(data.inputs(), data.targets(), True)
    np.testing.assert_allclose(scales.input_mean, data.inputs().astype(float).mean(0), rtol=1e-5)
    np.testing.assert_allclose(scales.input_std[:2], data.inputs().astype(float).std(0)[:2], rtol=1e-5)
    assert scales.input_std[2] == 1.0
    x = scales.inputs(torch.full((1, D), 1e6), torch.zeros(1, A))
    assert float(x.max()) == 10.0  # clipped
    raw = fit_scales(data.inputs(), data.targets(), False)
    assert raw.target_mean.abs().max() == 0.0
    assert (raw.target_std == 1.0).all()


def test_statistics_are_fitted_on_training_rows_alone() -> None:
    data = linear_data()
    split = split_rows(data, SMALL)
    spoiled = dataclasses.replace(data, observations=data.observations.copy())
    spoiled.observations[np.concatenate([split.holdout, split.test])] += 100.0
    training = DynamicsTraining(SMALL, [0], spoiled, split)
    np.testing.assert_allclose(training.scales.input_mean[:D], data.observations[split.train].mean(0), rtol=1e-4)
    assert len(set(split.train) | set(split.holdout) | set(split.test)) == len(data)
    assert not set(data.episode[split.train]) & set(data.episode[np.concatenate([split.holdout, split.test])])


def test_predict_equals_numpy_in_the_datas_units() -> None:
    dynamics = make_dynamics()
    rng = np.random.default_rng(0)
    s, a = rng.normal(size=(5, D)), rng.uniform(-1, 1, (5, A))
    mean, std = dynamics.predict(torch.from_numpy(s).float(), torch.from_numpy(a).float())
    scales = {name: getattr(dynamics.scales, name).double().numpy() for name in vars(dynamics.scales)}
    x = np.clip((np.concatenate([s, a], 1) - scales["input_mean"]) / scales["input_std"], -10, 10)
    for member in range(4):
        out, log_variance = numpy_member(dynamics, member, x)
        out = out * scales["target_std"] + scales["target_mean"]
        out[:, :D] += s
        np.testing.assert_allclose(mean[member], out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(std[member], np.exp(0.5 * log_variance) * scales["target_std"], rtol=1e-4)


@pytest.mark.parametrize("penalty", [None, "aleatoric"])
def test_a_step_sends_each_row_through_one_elite_and_no_other_member(penalty: str | None) -> None:
    dynamics = make_dynamics()
    dynamics.network.min_log_variance.fill_(-40.0)  # no noise: a row is the mean of the member that made it
    dynamics.network.max_log_variance.fill_(-39.9)
    s, a = torch.randn(100, D), torch.rand(100, A)
    following, rewards, terminated, uncertain = dynamics.step(s, a, np.random.default_rng(0), penalty)
    mean, _ = dynamics.predict(s, a)
    distance = (mean - torch.cat([following, rewards[:, None]], 1)).abs().amax(-1)  # (M, n)
    assert float(distance.amin(0).max()) < 1e-5
    counts = np.bincount(distance.argmin(0).numpy(), minlength=4)
    assert counts[1] == 0
    assert sorted(counts[[0, 2, 3]]) == [32, 34, 34]
    assert not terminated.any()
    assert (uncertain is None) == (penalty is None)


@pytest.mark.parametrize("penalty", [None, "aleatoric"])
def test_a_step_in_bfloat16_is_near_and_outputs_are_not_rounded(
    penalty: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relu_network, "BF16_FLAGS", {"flags"})  # a CPU without bfloat16 computes the same, slowly
    network = DynamicsNetwork(generators([1]), D, A, (64, 64, 64), 4)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.mul_(3.0)  # first weights are so small that all rows look alike
    scales = Scales(torch.zeros(D + A), torch.ones(D + A), torch.full((D + 1,), 100.0), torch.ones(D + 1))
    dynamics = Dynamics(network, scales, (2, 0, 3), "none")
    s, a = torch.randn(600, D), torch.rand(600, A)
    exact = dynamics.step(s, a, np.random.default_rng(0), penalty)
    relu_network.set_precision("bf16")
    try:
        found = dynamics.step(s, a, np.random.default_rng(0), penalty)
    finally:
        relu_network.set_precision("fp32")
    for one, other in zip(found[:2], exact[:2], strict=True):
        assert one.dtype == torch.float32
        assert 1e-4 < float((one - other).std() / other.std()) < 0.02
        assert len(one.unique()) > 0.9 * one.numel()  # values near 100 are not rounded to halves
    if penalty:
        assert found[3] is not None
        assert exact[3] is not None
        assert 1e-4 < float((found[3] / exact[3] - 1.0).abs().mean()) < 0.02


def test_the_noise_of_a_step_has_the_members_own_spread() -> None:
    dynamics = make_dynamics(elites=(1,))
    s, a = torch.ones(20_000, D), torch.ones(20_000, A)
    following, rewards, _, _ = dynamics.step(s, a, np.random.default_rng(0))
    mean, std = dynamics.predict(s[:1], a[:1])
    sample = torch.cat([following, rewards[:, None]], 1)
    np.testing.assert_allclose(sample.mean(0), mean[1, 0], atol=0.03)
    np.testing.assert_allclose(sample.std(0), std[1, 0], rtol=0.03)


def test_disagreement_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(size=(4, 6, D + 1)), rng.normal(size=(4, 6, D + 1))
    tensors = torch.from_numpy(mean), torch.from_numpy(log_variance)
    aleatoric = np.linalg.norm(np.exp(0.5 * log_variance), axis=-1).max(0)
    np.testing.assert_allclose(disagreement(*tensors, "aleatoric"), aleatoric, rtol=1e-12)
    difference = mean[..., :D] - mean[..., :D].mean(0)
    np.testing.assert_allclose(disagreement(*tensors, "pairwise"), np.linalg.norm(difference, axis=-1).max(0))


@pytest.mark.parametrize("ends", [False, True])
def test_the_loss_of_a_seed_equals_numpy(ends: bool) -> None:
    data = linear_data(ends=True)
    training = DynamicsTraining(SMALL, [0, 1], data, split_rows(data, SMALL), ends)
    with torch.no_grad():
        training.network.max_log_variance[1] += 0.7  # the seeds' bounds differ
    rows = torch.from_numpy(np.random.default_rng(0).integers(len(training._train), size=(8, 32)))
    table = training._train[rows]
    loss, gradients = training.loss_gradients(table)
    mean, log_variance, logit = (
        None if x is None else x.detach().double().numpy() for x in training.network(table[..., : D + A])
    )
    assert mean is not None
    assert log_variance is not None
    y, ended = table[..., D + A : -1].double().numpy(), table[..., -1].double().numpy()
    each = ((mean - y) ** 2 * np.exp(-log_variance) + log_variance).mean((1, 2))
    if logit is not None:
        each = each + (np.logaddexp(0, logit) - ended * logit).mean(1)
    expected = each.reshape(2, 4).sum(1) + 0.01 * np.array([10.5, 11.2]) * (D + 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert [g.shape for g in gradients] == [p.shape for p in training.network.parameters()]


def test_weight_decay_is_each_layers_own_and_spares_biases() -> None:
    data = linear_data()
    config = dataclasses.replace(SMALL, weight_decay=(0.0, 0.5, 0.0))
    training = DynamicsTraining(config, [0], data, split_rows(data, config))
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    zero = [torch.zeros_like(p) for p in training.network.parameters()]
    training.optimizer.step(zero, [0.01], [True])
    for name, p in training.network.named_parameters():
        moved = p.detach() - before[name]
        if name == "layers.1.weight":  # Adam's first step is the rate against the gradient's sign
            np.testing.assert_allclose(moved, -0.01 * torch.sign(before[name]), atol=1e-5)
        else:
            assert float(moved.abs().max()) == 0.0, name


def train(tmp_path: Path, seeds: list[int], config: DynamicsConfig = SMALL, ends: bool = False) -> DynamicsTraining:
    data = linear_data(ends=ends)
    training = DynamicsTraining(config, seeds, data, split_rows(data, config), ends)
    run_training(training, tmp_path, {"seeds": seeds})
    return training


def test_a_stack_of_seeds_trains_as_each_would_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, patience=1, min_gain=0.2, min_epochs=3, stall_factor=0.3)
    stacked = train(tmp_path / "both", [3, 4], config)
    for index, seed in enumerate([3, 4]):
        alone = train(tmp_path / str(seed), [seed], config)
        np.testing.assert_allclose(stacked.best_error[index], alone.best_error[0], rtol=1e-4)
        assert stacked.elites(index) == alone.elites(0)
        assert stacked.rates[index] == alone.rates[0]
        for name, value in alone.best.items():
            np.testing.assert_allclose(
                stacked.best[name].detach()[index * 4 :][:4], value.detach(), rtol=1e-3, atol=1e-5
            )


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", [0])
    data = linear_data()
    for epochs in (2, 6):
        config = dataclasses.replace(SMALL, max_epochs=epochs)
        training = DynamicsTraining(config, [0], data, split_rows(data, config))
        run_training(training, tmp_path / "cut", {"seeds": [0]})
    for name, value in whole.state_dict().items():
        assert torch.equal(training.state_dict()[name], value), name


def test_training_stops_by_the_holdout_and_keeps_each_members_best(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, max_epochs=400, patience=3, min_gain=0.05, batch_size=16)
    training = train(tmp_path, [0], config)
    assert training.epoch < 400
    assert training.finished()
    ensemble = training.dynamics(0, "none")
    assert ensemble.elites == tuple(np.argsort(training.best_error[0].numpy(), kind="stable")[:2])
    data = linear_data()
    held = data.rows(split_rows(data, config).holdout)
    mean, _ = ensemble.predict(torch.from_numpy(held.observations), torch.from_numpy(held.actions))
    truth = held.targets()
    truth[:, :D] += held.observations
    errors = (((mean.numpy() - truth) / training.scales.target_std.numpy()) ** 2).mean((1, 2))
    np.testing.assert_allclose(errors, training.best_error[0], rtol=1e-3)


def test_the_rate_falls_once_before_the_least_number_of_epochs(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, patience=1, min_gain=0.9, min_epochs=5, max_epochs=20, stall_factor=0.3)
    training = train(tmp_path, [0], config)
    assert training.rates == [pytest.approx(3e-4)]
    assert 5 <= training.epoch < 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DynamicsTraining, DynamicsData]:
    config = dataclasses.replace(SMALL, max_epochs=200, hidden_sizes=(32, 32), test_share=0.3, patience=20)
    data = linear_data(episodes=40, ends=True)
    training = DynamicsTraining(config, [0], data, split_rows(data, config), True)
    run_training(training, tmp_path_factory.mktemp("trained"), {})
    return training, data.rows(split_rows(data, config).test)


def test_evaluation_finds_the_noise_and_a_calibrated_doubt(trained: tuple[DynamicsTraining, DynamicsData]) -> None:
    training, test = trained
    found = evaluate_dynamics(training.dynamics(0, "learned"), test, horizon=4)
    for name in ("obs0", "obs1", "obs2"):
        assert found["outputs"][name]["rmse"] == pytest.approx(0.05, rel=0.25)  # the noise of the data, no less
    assert found["coverage"]["0.95"] == pytest.approx(0.95, abs=0.04)
    assert found["coverage"]["0.5"] == pytest.approx(0.5, abs=0.12)
    loop = found["open_loop"]
    assert all(low <= e <= high for low, e, high in zip(loop["low"], loop["error"], loop["high"], strict=True))
    assert loop["error"][0] < loop["error"][3] < 0.5 * loop["no_change"][3]
    ends = found["termination"]
    expected = 0.9 * test.observations[:, 0] + 0.3 * np.tanh(test.actions[:, 1])  # the best a rule can know
    least = int(((expected > 0.3) != test.terminated).sum())
    assert least > 5
    assert ends["only_rule"] + ends["only_recorded"] < 2 * least
    assert ends["both"] + ends["only_recorded"] == int(test.terminated.sum())


def test_chains_never_cross_an_episode_or_an_end() -> None:
    data = linear_data(episodes=3, length=5)
    assert chains(data, 5)[:, 0].tolist() == [0, 5, 10]
    data.terminated[2] = True
    assert chains(data, 3)[:, 0].tolist() == [0, 5, 6, 7, 10, 11, 12]
    assert len(chains(data, 6)) == 0


def test_a_bundle_gives_back_the_same_dynamics(tmp_path: Path, trained: tuple[DynamicsTraining, DynamicsData]) -> None:
    training, test = trained
    ensemble = training.dynamics(0, "learned")
    described = input_contract(contract(), training.scales)
    save_dynamics(tmp_path / "b", ensemble, training.config, described, "source", {"x": 1}, {"made_by": "test"})
    loaded = load_dynamics(tmp_path / "b")
    assert loaded.elites == ensemble.elites
    assert loaded.termination == "learned"
    assert loaded.facts["reward"] == "source"
    s, a = torch.from_numpy(test.observations), torch.from_numpy(test.actions)
    for one, other in zip(
        loaded.step(s, a, np.random.default_rng(3)), ensemble.step(s, a, np.random.default_rng(3)), strict=True
    ):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    np.testing.assert_array_equal(
        loaded.facts["contract"].normalizer["state"]["mean"], training.scales.input_mean[:D].numpy()
    )
    with open(tmp_path / "b" / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="altered"):
        load_dynamics(tmp_path / "b")


def test_what_cannot_be_trained_is_refused() -> None:
    data = linear_data(episodes=1)
    with pytest.raises(InputError, match="two episodes"):
        split_rows(data, SMALL)
    data = linear_data()
    with pytest.raises(ConfigError, match="elites"):
        DynamicsTraining(dataclasses.replace(SMALL, elites=5), [0], data, split_rows(data, SMALL))

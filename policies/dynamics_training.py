"""Training of a dynamics ensemble: bootstrapped members, a stop by held-out error, elites; several seeds in a stack."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets.draws import Stream, philox
from embodied.policies.dynamics import (
    Dynamics,
    DynamicsConfig,
    DynamicsNetwork,
    fit_scales,
    gaussian_loss,
    gaussian_loss_gradient,
)
from embodied.policies.loop import Progress, load_module, module_tensors, run_loop
from embodied.policies.networks import generators
from embodied.policies.relu_network import product_type
from embodied.policies.silu_network import StackedNetworks

HOLDOUT_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class DynamicsData:
    """N transitions in their own units.

    Attributes:
        observations, next_observations: (N, D) float32.
        actions: (N, A) float32 in [-1, 1].
        rewards: (N,) float32 as labelled.
        terminated: (N,) bool; a time-out is none.
        episode: (N,) int64; episodes are held out whole, since frames of one resemble each other.
        frame: (N,) int64: a transition whose frame follows that of the last one in the same episode continues it.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminated: np.ndarray
    episode: np.ndarray
    frame: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)

    def rows(self, keep: np.ndarray) -> "DynamicsData":
        return DynamicsData(**{f.name: getattr(self, f.name)[keep] for f in dataclasses.fields(self)})

    def inputs(self) -> np.ndarray:
        """(N, D + A)."""
        return np.concatenate([self.observations, self.actions], 1)

    def targets(self) -> np.ndarray:
        """(N, D + 1): change of the observation, then reward."""
        return np.concatenate([self.next_observations - self.observations, self.rewards[:, None]], 1)


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of a `DynamicsData`: trained on; for stopping and elites; for figures (the holdout unless `tested`)."""

    train: np.ndarray
    holdout: np.ndarray
    test: np.ndarray
    tested: bool


def split_rows(data: DynamicsData, config: DynamicsConfig) -> Split:
    """Whole episodes into three; the same for every seed. InputError with fewer than two episodes."""
    episodes = np.unique(data.episode)
    if len(episodes) < 2:
        raise InputError("Dynamics need at least two episodes: one is held out to know when to stop.")
    order = philox(0, 0, Stream.SPLIT).permutation(episodes)
    held = max(1, round(config.holdout_share * len(order)))
    tested = round(config.test_share * len(order))
    tested = min(tested, max(0, len(order) - held - 1))
    if held + tested >= len(order):
        raise ConfigError(f"Nothing is left to train on: {held} of {len(order)} episodes are held out.")
    holdout = np.flatnonzero(np.isin(data.episode, order[:held]))
    if config.max_holdout and len(holdout) > config.max_holdout:
        holdout = np.sort(philox(0, 1, Stream.SPLIT).choice(holdout, config.max_holdout, replace=False))
    test = np.flatnonzero(np.isin(data.episode, order[held : held + tested])) if tested else holdout
    train = np.flatnonzero(np.isin(data.episode, order[held + tested :]))
    return Split(train, holdout, test, tested > 0)


class DynamicsTraining:
    """What the loop drives: a step is an epoch. S seeds of M members each train as they would alone.

    Args:
        data, split: what is learned from; standardisation is fitted on `split.train`.
        terminates: learn the termination too.
    """

    def __init__(
        self,
        config: DynamicsConfig,
        seeds: Sequence[int],
        data: DynamicsData,
        split: Split,
        terminates: bool = False,
        device: str = "cpu",
    ) -> None:
        if config.elites > config.members or len(config.weight_decay) != len(config.hidden_sizes) + 1:
            raise ConfigError(
                f"{config.elites} elites of {config.members} members, {len(config.weight_decay)} weight decays for "
                f"{len(config.hidden_sizes) + 1} layers: elites are members, and each layer has a decay."
            )
        self.config, self.seeds, self.device = config, [int(s) for s in seeds], device
        d, a = data.observations.shape[1], data.actions.shape[1]
        self.network = DynamicsNetwork(
            generators(self.seeds), d, a, config.hidden_sizes, config.members, config.log_variance_bounds, terminates
        ).to(device)
        train = data.rows(split.train)
        self.scales = fit_scales(train.inputs(), train.targets(), config.standardize_targets).to(device)
        self._train, self._holdout = (self._table(data.rows(rows)) for rows in (split.train, split.holdout))
        self.width = d + a
        layers = [(layer.weight, layer.bias) for layer in self.network.layers]
        self._stack = StackedNetworks(layers, product_type(config.precision, device))
        self.optimizer = StackAdam(self.network, config.weight_decay)
        self.rates = [config.learning_rate] * len(self.seeds)
        self.best = {name: value.clone() for name, value in self._members()}
        s, m = len(self.seeds), config.members
        self.best_error = torch.full((s, m), torch.inf, dtype=torch.float64)
        self.epoch = 0
        self.stalled = [0] * s  # epochs since a member gained
        self.cut = [False] * s  # the learning rate was lowered
        self.done = [False] * s

    def _table(self, data: DynamicsData) -> Tensor:
        """(N, D + A + D + 1 + 1): standardised inputs, targets, terminated."""
        x = torch.from_numpy(np.concatenate([data.inputs(), data.targets(), data.terminated[:, None]], 1))
        x = x.to(self.device, torch.get_default_dtype())
        split = data.observations.shape[1] + data.actions.shape[1]
        x[:, :split] = self.scales.inputs(x[:, : data.observations.shape[1]], x[:, data.observations.shape[1] : split])
        x[:, split:-1] = (x[:, split:-1] - self.scales.target_mean) / self.scales.target_std
        return x

    def _members(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.network.named_parameters() if name.startswith("layers")]

    def update(self, batch: int) -> dict[str, Tensor]:
        """One epoch over a bootstrap of each member's own, in an order of its own, then the holdout."""
        epoch = batch
        numbers = np.stack([self._order(seed, epoch) for seed in self.seeds])  # (S, M, n)
        rows = torch.from_numpy(numbers).to(self.device).flatten(0, 1)
        size = min(self.config.batch_size, rows.shape[1])
        active = [not done for done in self.done]
        loss, batches = torch.zeros(len(self.seeds), device=self.device), rows.shape[1] // size
        for i in range(batches):
            drawn = rows[:, i * size : (i + 1) * size]
            table = self._train.index_select(0, drawn.reshape(-1)).unflatten(0, drawn.shape)  # (S * M, B, ...)
            value, gradients = self.loss_gradients(table)
            loss += value
            self.optimizer.step(gradients, self.rates, active)
        errors = self.holdout_errors()
        self.epoch = epoch + 1
        self._keep(errors)
        best = self.best_error.sort(1).values[:, : self.config.elites].mean(1)
        return {"train_loss": loss / batches, "holdout_error": errors.mean(1), "elite_error": best}

    def loss_gradients(self, table: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(S,) loss of rows (S * M, B, ...), and the gradient of its sum without weight decay, in parameter order.

        The loss of a seed is the sum over its members of `gaussian_loss`, plus bound_penalty * sum(high - low) of the
        log variance, plus the mean cross-entropy of the termination.
        """
        network, width = self.network, self.width
        low, high, penalty = network.min_log_variance, network.max_log_variance, self.config.bound_penalty
        if table.device.type != "cpu":
            mean, log_variance, logit = network(table[..., :width])
            losses = gaussian_loss(mean, log_variance, table[..., width:-1])
            if logit is not None:
                losses = losses + F.binary_cross_entropy_with_logits(logit, table[..., -1], reduction="none").mean(-1)
            loss = losses.view(network.seeds, -1).sum(1) + penalty * (high - low).sum((1, 2))
            return loss.detach(), list(torch.autograd.grad(loss.sum(), list(network.parameters())))
        low, high = (b.detach().transpose(1, 2).repeat_interleave(network.members, 0) for b in (low, high))
        targets = table[..., width:].transpose(1, 2)  # (S * M, D + 1 + 1, B)
        size, pieces = network.targets, []

        def slope(out: Tensor) -> Tensor:
            loss, _, *by_bounds = gaussian_loss_gradient(out[:, : 2 * size], targets[:, :size], low, high)
            if network.terminates:
                logit, ends = out[:, 2 * size], targets[:, size]
                loss += F.binary_cross_entropy_with_logits(logit, ends, reduction="none").mean(1)
                logit.sigmoid_().sub_(ends).div_(ends.shape[1])
            pieces.extend([loss, *by_bounds])
            return out

        found = self._stack.gradients(table[..., :width], slope)
        gradients = dict(zip([name for name, _ in self._members()], found, strict=True))
        loss, d_low, d_high = (piece.unflatten(0, (network.seeds, -1)).sum(1) for piece in pieces)
        gradients["min_log_variance"] = d_low.transpose(1, 2) - penalty
        gradients["max_log_variance"] = d_high.transpose(1, 2) + penalty
        loss = loss + penalty * (high - low).unflatten(0, (network.seeds, -1))[:, 0].sum((1, 2))
        return loss, [gradients[name] for name, _ in network.named_parameters()]

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """(M, n) rows: the member's bootstrap, the same in all epochs, in the epoch's order."""
        n, m = len(self._train), self.config.members
        bootstrap = philox(seed, 0, Stream.DYNAMICS).integers(n, size=(m, n), dtype=np.int64)
        return philox(seed, epoch + 1, Stream.DYNAMICS).permuted(bootstrap, axis=1)

    @torch.no_grad()
    def holdout_errors(self) -> Tensor:
        """(S, M) mean squared error of the mean on the holdout, in target units; plus a learned end's cross-entropy."""
        total = torch.zeros(len(self.network.layers[0].weight), dtype=torch.float64)
        for block in self._holdout.split(HOLDOUT_ROWS):
            x = block[:, : self.width].expand(len(total), -1, -1)
            mean, _, logit = self.network.heads(self._stack.forward(x))
            total += (mean - block[:, self.width : -1]).square().mean(2).sum(1).double().cpu()
            if logit is not None:
                ended = block[:, -1].expand_as(logit)
                total += F.binary_cross_entropy_with_logits(logit, ended, reduction="none").sum(1).double().cpu()
        errors = total / len(self._holdout)
        return errors.view(len(self.seeds), -1)

    @torch.no_grad()
    def _keep(self, errors: Tensor) -> None:
        """Keep the weights of members that gained, count epochs without a gain, lower the rate or stop."""
        config, members = self.config, self.config.members
        for s in range(len(self.seeds)):
            if self.done[s]:
                continue
            gained = (errors[s] < self.best_error[s] * (1.0 - config.min_gain)) | (
                torch.isinf(self.best_error[s]) & torch.isfinite(errors[s])
            )
            for member in torch.nonzero(gained).flatten().tolist():
                self.best_error[s, member] = errors[s, member]
                for name, value in self._members():
                    self.best[name][s * members + member] = value[s * members + member]
            self.stalled[s] = 0 if bool(gained.any()) else self.stalled[s] + 1
            if self.stalled[s] < config.patience:
                continue
            if self.epoch >= config.min_epochs:
                self.done[s] = True
            elif not self.cut[s]:
                self.cut[s], self.stalled[s] = True, 0
                self.rates[s] *= config.stall_factor

    def finished(self) -> bool:
        return all(self.done)

    def elites(self, index: int) -> list[int]:
        """Members of one seed by held-out error, best first."""
        return self.best_error[index].argsort(stable=True)[: self.config.elites].tolist()

    def dynamics(self, index: int, termination: str, facts: Mapping[str, Any] | None = None) -> Dynamics:
        """The ensemble of one seed, each member at its best epoch; bounds of the log variance as they are now."""
        network, m = self.network, self.config.members
        d = network.targets - 1
        alone = DynamicsNetwork(
            generators([0]), d, self.width - d, self.config.hidden_sizes, m, terminates=network.terminates
        )
        state = {name: value[index * m : (index + 1) * m] for name, value in self.best.items()}
        state |= {n: getattr(network, n)[index : index + 1] for n in ("min_log_variance", "max_log_variance")}
        alone.load_state_dict(state)
        return Dynamics(alone, self.scales, self.elites(index), termination, facts, device=self.device)

    def state_dict(self) -> dict[str, Tensor]:
        state = module_tensors("network", self.network) | self.optimizer.tensors("optimizer")
        state |= {f"best.{name}": value for name, value in self.best.items()}
        counts = torch.tensor([self.stalled, self.cut, self.done], dtype=torch.int64)
        return state | {
            "best_error": self.best_error,
            "counts": counts,
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "epoch": torch.tensor(self.epoch),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_module("network", self.network, state)
        self.optimizer.load("optimizer", state)
        for name, value in self.best.items():
            value.copy_(state[f"best.{name}"])
        self.best_error.copy_(state["best_error"])
        self.stalled, cut, done = state["counts"].tolist()
        self.cut, self.done = [bool(x) for x in cut], [bool(x) for x in done]
        self.rates = state["rates"].tolist()
        self.epoch = int(state["epoch"])


class StackAdam:
    """Fused Adam on a stack of S seeds, each with a learning rate of its own; decay on weights, none on biases."""

    def __init__(self, network: DynamicsNetwork, weight_decay: Sequence[float]) -> None:
        self._names = [name for name, _ in network.named_parameters()]
        self._parameters = list(network.parameters())
        decays = [d for decay in weight_decay for d in (decay, 0.0)]
        by_name = dict(zip([n for n in self._names if n.startswith("layers")], decays, strict=True))
        self._decay = [by_name.get(name, 0.0) for name in self._names]
        self._moments = [[torch.zeros_like(p) for p in self._parameters] for _ in range(2)]
        device = self._parameters[0].device
        self._steps = [torch.zeros((), device=device) for _ in range(network.seeds)]
        self._seeds = network.seeds

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rates: Sequence[float], active: Sequence[bool]) -> None:
        """`gradients` in the order of `parameters()`; seeds not active stay as they are."""
        for seed in (s for s in range(self._seeds) if active[s]):
            step = self._steps[seed] + 1
            for decay in sorted(set(self._decay)):
                chosen = [i for i, value in enumerate(self._decay) if value == decay]
                adam(
                    [_part(self._parameters[i], seed, self._seeds) for i in chosen],
                    [_part(gradients[i], seed, self._seeds) for i in chosen],
                    [_part(self._moments[0][i], seed, self._seeds) for i in chosen],
                    [_part(self._moments[1][i], seed, self._seeds) for i in chosen],
                    [],
                    [self._steps[seed].clone() for _ in chosen],
                    fused=True,
                    foreach=False,
                    capturable=False,
                    differentiable=False,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=rates[seed],
                    weight_decay=decay,
                    eps=1e-8,
                    maximize=False,
                )
            self._steps[seed] = step

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        pairs = [(f"{prefix}.{k}.{n}", v) for k in range(2) for n, v in zip(self._names, self._moments[k], strict=True)]
        return dict(pairs) | {f"{prefix}.steps": torch.stack(self._steps)}

    @torch.no_grad()
    def load(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        for k in range(2):
            for name, moment in zip(self._names, self._moments[k], strict=True):
                moment.copy_(state[f"{prefix}.{k}.{name}"])
        self._steps = list(state[f"{prefix}.steps"].to(self._steps[0].device).unbind())


def _part(stacked: Tensor, seed: int, seeds: int) -> Tensor:
    """The entries of one seed, a view."""
    each = len(stacked) // seeds
    return stacked[seed * each : (seed + 1) * each]


def run_training(
    training: DynamicsTraining, out: Path, identity: Mapping[str, Any], progress: Progress | None = None
) -> None:
    """Run to the stop, or go on from the checkpoint in `out`; one line of metrics and one checkpoint per epoch."""
    run_loop(training, int, training.config.max_epochs, out, identity, 1, 1, progress, finished=training.finished)

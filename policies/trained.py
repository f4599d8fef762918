"""A trained learner with its critics, found again from a bundle: bundles hold only the actor, checkpoints hold all.

The checkpoint of the bundle's run is taken if, and only if, its actor is the bundle's to the last bit; critics of
another step or run would say nothing about this policy.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embodied.contracts.errors import BundleError, InputError
from embodied.policies.bundle import BundlePolicy, load_policy, read_bundle
from embodied.policies.configure import configure
from embodied.policies.networks import clip_actions
from embodied.policies.probe import watches
from embodied.policies.sac_ensemble import SACEnsemble
from embodied.policies.train import LEARNERS

ROWS = 10_000


@dataclasses.dataclass(frozen=True)
class Trained:
    """One seed of a learner, in the dataset's units.

    Attributes:
        name, config: of the learner.
        policy: the bundle.
        learner: a stack of seeds, of which `index` is meant.
        reward: what `normalize_rewards` did: scale, shift, at_most_zero.
    """

    name: str
    config: Any
    policy: BundlePolicy
    learner: Any
    index: int
    mean: Tensor
    std: Tensor
    reward: Mapping[str, Any]

    @property
    def needs_dynamics(self) -> bool:
        return bool(getattr(LEARNERS[self.name][0], "needs_dynamics", False))

    @property
    def bootstraps_from_policy(self) -> bool:
        """Whether targets ask what the policy would do in the next state; IQL's ask what was done."""
        return self.name != "iql"

    @property
    def temperature(self) -> float:
        """Weight of the entropy that this learner's values count; 0 where they count none."""
        if not isinstance(self.learner, SACEnsemble):
            return 0.0
        return float(self.learner.temperature.log[self.index].detach().exp())

    @torch.no_grad()
    def act(self, states: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(n, D) -> actions as the learner draws them for its targets (n, A), and their log density (n,), 0 of an actor
        that draws nothing."""
        actions, densities = [], []
        for part in states.split(ROWS):
            seen = ((part - self.mean) / self.std)[None].expand(self._stack, -1, -1)
            actor = self.learner.actor
            if hasattr(actor, "sample"):
                shape = (self._stack, len(part), self.learner_actions)
                noise = torch.from_numpy(rng.standard_normal(shape[1:], np.float32)).expand(shape)
                action, density = actor.sample(seen, noise)
            else:
                out = actor(seen)
                action = out[0] if isinstance(out, tuple) else out
                density = torch.zeros(action.shape[:-1])
            actions.append(action[self.index].clamp(-1.0, 1.0))
            densities.append(density[self.index])
        return torch.cat(actions), torch.cat(densities)

    @torch.no_grad()
    def values(self, states: Tensor, actions: Tensor) -> Tensor:
        """(E, n) of the target critics: what next states are said to be worth."""
        found = []
        for s, a in zip(states.split(ROWS), actions.split(ROWS), strict=True):
            seen = ((s - self.mean) / self.std)[None].expand(self._stack, -1, -1)
            given = clip_actions(a)[None].expand(self._stack, -1, -1)
            found.append(self.learner.target_critic(seen, given)[self.index])
        return torch.cat(found, -1)

    def paid(self, reward: Tensor) -> Tensor:
        """A reward as the learner sees it."""
        scaled = reward * float(self.reward.get("scale", 1.0)) + float(self.reward.get("shift", 0.0))
        return scaled.clamp_max(0.0) if self.reward.get("at_most_zero", False) else scaled

    @property
    def learner_actions(self) -> int:
        return int(np.prod(self.policy.action_spec.shape))

    @property
    def _stack(self) -> int:
        return len(next(iter(self.learner.actor.parameters())))


def load_trained(bundle: str | Path) -> Trained:
    """The learner behind a bundle, from the checkpoint of its run beside it.

    Raises:
        InputError: the policy sees pictures or windows, or its learner has no critics. BundleError: no checkpoint
            there has this bundle's actor.
    """
    bundle = Path(bundle)
    policy = load_policy(bundle)
    contract, name = policy.contract, policy.config["learner"].get("algorithm", "")
    if contract.images or contract.stack > 1 or contract.chunk > 1:
        raise InputError(f"{bundle} sees pictures or several steps at once; rollouts here are of single states.")
    if name not in LEARNERS:
        raise InputError(f"{bundle} was trained by '{name}', which is not among {', '.join(LEARNERS)}.")
    mean, std = (torch.from_numpy(x) for x in contract.statistics(0, str(bundle)))
    tensors = read_bundle(bundle, "policy")[2]
    actor = {key.removeprefix("actor."): value for key, value in tensors.items() if key.startswith("actor.")}
    tried = []
    for path in _checkpoints(bundle):
        learner, config, seeds = _restore(path, name, len(mean), int(np.prod(contract.action.shape)))
        if learner is None or policy.provenance.get("seed") not in seeds:
            continue
        tried.append(str(path))
        index = seeds.index(policy.provenance["seed"])
        own = learner.actor_state(index)
        if own.keys() == actor.keys() and all(torch.equal(own[key], actor[key]) for key in own):
            reward = policy.provenance.get("reward_normalization", {})
            return Trained(name, config, policy, learner, index, mean, std, reward)
    found = f"{', '.join(tried)} has another actor" if tried else "there is none"
    raise BundleError(
        f"{bundle}: its critics are in the checkpoint of its run, and {found}.\n"
        "Give the bundle in the folder it was trained in (--out of 'embodied train'), or train again."
    )


def _checkpoints(bundle: Path) -> list[Path]:
    folder = bundle.resolve().parent
    near = [folder, folder / "runs" / bundle.name, *sorted((folder / "runs").glob("*"))]
    return [path for path in dict.fromkeys(f / "checkpoint.safetensors" for f in near) if path.is_file()]


def _restore(path: Path, name: str, observations: int, actions: int) -> tuple[Any, Any, list[int]]:
    """The learner of a checkpoint, its configuration, its seeds; None where the checkpoint is of another learner."""
    learner_class, _, presets, default = LEARNERS[name]
    try:
        with safe_open(path, framework="pt") as file:
            identity = json.loads((file.metadata() or {})["embodied"])["identity"]
            if identity.get("learner") != name:
                return None, None, []
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error
    config = configure(presets, default, identity["config"], str(path))
    learner = learner_class(config, identity["seeds"], observations, actions, identity["steps"], "cpu")
    if not watches(learner) or not hasattr(learner, "target_critic"):
        raise InputError(f"{name} learns no values: there is nothing to bootstrap from, and no edge of reach.")
    try:
        learner.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("rollouts.")})
    except (RuntimeError, KeyError) as error:
        raise BundleError(f"{path}: its networks are not those of the bundle: {error}.") from error
    return learner, config, list(identity["seeds"])

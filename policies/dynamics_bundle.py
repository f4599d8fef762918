"""Bundles of dynamics: kind `dynamics`, the five files of every bundle.

config.json: architecture, elites, termination, reward, figures of the evaluation. contract.json: the observation keys
in order, the action and the input statistics, as a policy's.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from embodied.contracts.errors import BundleError
from embodied.contracts.provenance import hash_file
from embodied.policies.bundle import SCHEMA, PolicyContract, load_tensors, read_bundle, readable, write_bundle
from embodied.policies.dynamics import Dynamics, DynamicsConfig, DynamicsNetwork, Scales
from embodied.policies.networks import generators


def input_contract(contract: PolicyContract, scales: Scales) -> PolicyContract:
    """The contract with the statistics that the dynamics were trained with in place of a policy's."""
    normalizer, start = {}, 0
    for key in contract.observations:
        size = contract.normalizer[key]["mean"].size
        part = slice(start, start + size)
        normalizer[key] = {"mean": scales.input_mean[part].numpy(), "std": scales.input_std[part].numpy()}
        start += size
    return dataclasses.replace(contract, images={}, normalizer=normalizer)


def save_dynamics(
    folder: str | Path,
    dynamics: Dynamics,
    config: DynamicsConfig,
    contract: PolicyContract,
    reward: str,
    evaluation: Mapping[str, Any],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write one dynamics bundle.

    Args:
        contract: of the observations and actions, see `input_contract`.
        reward: the label set that its reward was learned from, or `source`.
        evaluation: what `evaluate_dynamics` found.
    """
    head = {
        "kind": "dynamics",
        "schema": SCHEMA,
        "architecture": {
            "observation_size": dynamics.observation_size,
            "action_size": dynamics.scales.input_mean.numel() - dynamics.observation_size,
            "hidden_sizes": list(config.hidden_sizes),
            "members": dynamics.network.members,
            "terminates": dynamics.network.terminates,
        },
        "elites": list(dynamics.elites),
        "termination": dynamics.termination,
        "reward": reward,
        "learner": {"algorithm": "dynamics", **dataclasses.asdict(config)},
        "evaluation": dict(evaluation),
    }
    tensors = {f"network.{k}": v for k, v in dynamics.network.state_dict().items()}
    tensors |= {f"scales.{k}": v for k, v in vars(dynamics.scales).items()}
    return write_bundle(Path(folder), head, contract.to_json(), tensors, provenance, overwrite)


def load_dynamics(folder: str | Path, device: str = "cpu") -> Dynamics:
    """Read a dynamics bundle; `facts` holds `contract` (PolicyContract), `reward`, `evaluation`, `provenance`.

    Raises:
        BundleError: missing or altered file, another kind of bundle, networks that do not fit the contract.
    """
    folder = Path(folder)
    with readable(folder):
        config, contract_json, tensors, provenance = read_bundle(folder, "dynamics")
        contract, shape = PolicyContract.from_json(contract_json), config["architecture"]
        d, a, members = shape["observation_size"], shape["action_size"], shape["members"]
        mean, _ = contract.statistics(0, str(folder))
        if len(mean) != d or contract.action.shape != (a,):
            raise BundleError(
                f"{folder}: the dynamics map {d} numbers and {a} actions; the contract says {len(mean)} and "
                f"{contract.action.shape}."
            )
        elites = [int(e) for e in config["elites"]]
        if not elites or min(elites) < 0 or max(elites) >= members:
            raise BundleError(f"{folder}: elites {elites} are not among its {members} members.")
        network = DynamicsNetwork(generators([0]), d, a, shape["hidden_sizes"], members, terminates=shape["terminates"])
        load_tensors(network, tensors, "network.", folder)
        scales = Scales(**{field.name: tensors[f"scales.{field.name}"] for field in dataclasses.fields(Scales)})
        sizes = {"input_mean": d + a, "input_std": d + a, "target_mean": d + 1, "target_std": d + 1}
        for name, size in sizes.items():
            value = getattr(scales, name)
            if value.shape != (size,) or not bool(torch.isfinite(value).all()):
                raise BundleError(f"{folder}: {name} must be {size} finite numbers.")
        facts = {
            "contract": contract,
            "reward": config["reward"],
            "evaluation": config["evaluation"],
            "provenance": provenance,
        }
        fingerprint = hash_file(folder / "model.safetensors")
        return Dynamics(network, scales, elites, config["termination"], facts, fingerprint, device)

"""`embodied diagnose reach`: where rollouts of a policy end, what is bootstrapped from there, can it be believed?"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import check_result_path, write_result
from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.rollout_model import TRUE, is_true, reads, rollout_model
from embodied.verbs import Touches

STEPS = 5  # of a rollout, where the learner's configuration has none


@dataclasses.dataclass(frozen=True)
class DiagnoseReach:
    """Roll a trained policy out in dynamics and ask its critics: the edge of reach, with a verdict and plots.

    Attributes:
        bundle: of 'embodied train', in the folder it was trained in, where its critics are.
        store: EpisodeStore that it learned from.
        dynamics: bundle of 'embodied train dynamics', or env:Hopper-v5; by default those it was trained on.
        env: Gymnasium id of the true environment: compares values with what true rollouts return.
        reward: label set, or `source`; by default the one it was trained on.
        reward_model: of 'embodied label prefer --model'; by default the one it was trained on.
        steps: k, of a rollout; 0: as it was trained.
        rollouts: how many.
        states: how many true rollouts from each side of the edge.
        out: folder for reach.json, reach.png and reach.html; or a JSON file.
        seed: of everything drawn.
    """

    bundle: Positional[Path]
    store: Positional[Path]
    dynamics: Path | None = None
    env: str | None = None
    reward: str | None = None
    reward_model: Path | None = None
    steps: int = 0
    rollouts: int = 2000
    states: int = 100
    out: Path | None = None
    seed: int = 0


def touches(config: DiagnoseReach) -> Touches:
    labels = [] if config.reward in (None, "source") else [config.store / "labels" / config.reward]
    writes = (config.out,) if config.out else ()
    return Touches((config.bundle, config.store, *reads(config.dynamics, config.reward_model), *labels), writes)


def diagnose_reach(config: DiagnoseReach, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.draws import Stream, philox
    from embodied.datasets.store import EpisodeStore
    from embodied.policies.reach import against_truth, examine, recorded_edge, true_values, verdict
    from embodied.policies.trained import load_trained
    from embodied.train_dynamics import dynamics_data

    if config.rollouts < 20 or config.states < 2 or config.steps < 0:
        raise InputError("--rollouts must be at least 20, --states at least 2, and --steps at least 0.")
    to_json = config.out is not None and config.out.suffix == ".json"
    check_result_path(config.out if to_json else config.out / "reach.json" if config.out else None)
    trained = load_trained(config.bundle)
    store = EpisodeStore(config.store)
    was = trained.policy.provenance.get("config", {})
    reward = config.reward or was.get("reward") or "source"
    head = config.reward_model or (Path(was["reward_model"]) if was.get("reward_model") else None)
    keys = tuple(trained.policy.contract.observations)
    dynamics = config.dynamics or _own_dynamics(trained, was)
    model, known = rollout_model(store, dynamics, reward, head, keys, "cpu", progress)
    own = getattr(model, "facts", {}).get("contract")
    if known != keys or (own is not None and list(own.observations) != list(keys)):
        raise InputError(
            f"{dynamics} know {', '.join(own.observations if own else known)}; the policy sees {', '.join(keys)}."
        )
    data, _ = dynamics_data(store, keys, reward, progress)
    steps = config.steps or getattr(trained.config, "rollout_length", STEPS)
    rng = philox(config.seed, 0, Stream.ROLLOUTS)
    progress(0, 2, "rolling out")
    found, arrays = examine(trained, model, *_states(data), steps, config.rollouts, rng)
    import torch

    paid = trained.paid(torch.from_numpy(data.rewards))
    found["rewards"]["largest_known"] = max(float(paid.max()), found["rewards"]["largest"])
    found["recorded"] = recorded_edge(data.frame, data.frame + 1, (~data.terminated).astype(np.float32))
    if config.env:
        progress(1, 2, "true rollouts")
        true, _ = rollout_model(store, Path(f"{TRUE}{config.env}"), reward, head, keys, "cpu", progress)
        found["truth"], pairs = {}, {}
        places = {"inside": arrays["step"] < steps, "edge": arrays["edge"]}
        for place, chosen in places.items():
            rows = np.flatnonzero(chosen)
            if len(rows) < 2:
                continue
            rows = rows[rng.permutation(len(rows))[: config.states]]
            said, returned, horizon = true_values(trained, true, arrays["states"][rows], rng)
            found["truth"][place] = against_truth(said, returned, rng)
            found["true_steps"] = horizon
            pairs[place] = (said, returned)
        arrays["truth"] = pairs  # type: ignore[assignment]
    judged = verdict(found, float(trained.config.discount), trained.bootstraps_from_policy)
    result = {
        "bundle": str(config.bundle),
        "store": str(config.store),
        "learner": trained.name,
        "dynamics": str(dynamics),
        "true_dynamics": is_true(dynamics),
        "reward": reward,
        "reward_model": str(head) if head else None,
        "rollouts": config.rollouts,
        "rollout_steps": steps,
        "temperature": trained.temperature,
        "penalty": getattr(trained.config, "penalty_coefficient", 0.0),
        "verdict": judged["word"],
        "summary": judged["text"],
        "checks": judged["checks"],
        **found,
    }
    if config.out and to_json:
        write_result(config.out, result)
    elif config.out:
        from embodied.reach_page import write_page

        write_page(config.out, result, arrays, data.observations)
    progress(2, 2, "done")
    return result


def _own_dynamics(trained: Any, was: dict[str, Any]) -> Path:
    """What the policy was trained on, by its provenance; an InputError says what is missing."""
    if not was.get("dynamics"):
        raise InputError(
            f"{trained.name} was trained without a model of the dynamics, and where its policy leads must be rolled "
            "out in one:\n--dynamics BUNDLE (embodied train dynamics), or --dynamics env:Hopper-v5 for the true ones."
        )
    path = Path(was["dynamics"])
    if is_true(path):
        return path
    from embodied.contracts.provenance import hash_file

    weights = path / "model.safetensors"
    recorded = trained.policy.provenance.get("inputs", {}).get("dynamics")
    # With a reward model the recorded hash covers both, so that only the path can be compared.
    if not weights.is_file() or (not was.get("reward_model") and hash_file(weights) != recorded):
        raise InputError(f"The dynamics that it was trained on, {path}, are gone or were changed. Give --dynamics.")
    return path


def _states(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """All recorded states, the last ones of episodes included, and the rows among them that rollouts begin at."""
    ends = ~_followed(data)
    return np.concatenate([data.observations, data.next_observations[ends]]), np.arange(len(data.observations))


def _followed(data: Any) -> np.ndarray:
    """(N,) whether the step after this one is there too."""
    follows = np.zeros(len(data.frame), bool)
    follows[:-1] = (np.diff(data.frame) == 1) & (np.diff(data.episode) == 0)
    return follows


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{result['verdict']}: {result['summary']}", ""]
    lines += [f"  {check['word']:8s} {check['name']}: {check['text']}" for check in result["checks"]]
    lines += ["", "  step   still going   distance to the data   never trained if cut here   value   spread"]
    for row in result["steps"]:
        distance = "-" if row["distance"] is None else f"{row['distance']['median']:.3f}"
        value, spread = ("-" if row[name] is None else f"{row[name]:.4g}" for name in ("value", "spread"))
        lines.append(
            f"  {row['step']:4d} {100 * row['alive']:11.0f} % {distance:>22s} {100 * row['untrained']:25.0f} % "
            f"{value:>7s} {spread:>8s}"
        )
    return "\n".join(lines)

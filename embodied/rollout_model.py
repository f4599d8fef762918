"""What imagined steps are made in and paid by: learned dynamics or the simulator, a reward of theirs or a label's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.progress import Progress

TRUE = "env:"  # --dynamics env:Hopper-v5
CHECKED = 2000  # recorded steps that a simulator must repeat
DOUBTFUL, FOREIGN = 1e-3, 0.1  # of a number's spread: error of a simulator's step that is said aloud, and refused
SAME_SCORE = 1e-4  # of the scores' spread: how far a label set may be from its own model


def is_true(dynamics: Path) -> bool:
    """Whether --dynamics names a simulator."""
    return str(dynamics).startswith(TRUE)


def reads(dynamics: Path | None, reward_model: Path | None) -> tuple[Path, ...]:
    """The paths among what a verb was given."""
    return tuple(path for path in (dynamics, reward_model) if path is not None and not is_true(path))


def rollout_model(
    store: Any,
    dynamics: Path,
    reward: str,
    reward_model: Path | None,
    keys: tuple[str, ...],
    device: str,
    progress: Progress,
) -> tuple[Any, tuple[str, ...]]:
    """A `rollouts.Model` and the observation keys that it knows, in order.

    Args:
        dynamics: a bundle of 'embodied train dynamics', or `env:` and a Gymnasium id.
        reward: label set or `source`, by which recorded steps are paid.
        reward_model: folder of 'embodied label prefer --model', which then pays imagined steps.

    Raises:
        InputError: imagined steps would be paid otherwise than recorded ones, or happen in another environment.
    """
    if is_true(dynamics):
        model, keys = _simulator(store, str(dynamics)[len(TRUE) :], reward, keys, progress)
    else:
        from embodied.policies.dynamics_bundle import load_dynamics

        model = load_dynamics(dynamics, device)
        keys = keys or tuple(model.facts["contract"].observations)
    if reward_model is not None:
        from embodied.policies.rollouts import WithReward

        return WithReward(model, *label_reward(store, reward_model, reward, keys)), keys
    if model.facts["reward"] != reward:
        raise InputError(
            f"--reward {reward}: {dynamics} pays the reward '{model.facts['reward']}'.\n"
            f"Recorded and imagined steps must be paid alike. {_way_out(store, reward, is_true(dynamics))}"
        )
    return model, keys


def label_reward(
    store: Any, folder: Path, reward: str, keys: tuple[str, ...]
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """The reward model of a label set as a function of states (n, D) -> (n,), and its fingerprint.

    Raises:
        InputError: it scores something else than states, other keys, or is not the model of this label set.
    """
    from embodied.contracts.provenance import hash_file
    from embodied.vlm_rewards.prefer import state_rows
    from embodied.vlm_rewards.reward_model import load_reward_model

    if reward == "source":
        raise InputError(
            "--reward source is the environment's reward; --reward-model pays imagined steps by a label's.\n"
            "Name the label set that the model scored: --reward NAME."
        )
    model, record = load_reward_model(folder)
    kind = record["provenance"]["config"]["inputs"]["kind"]
    if kind != "state":
        raise InputError(
            f"{folder} scores {kind}, and dynamics imagine numbers: it cannot be asked about an imagined state.\n"
            "Fit one on states: embodied label prefer --inputs state --model FOLDER."
        )
    values = state_rows(store)
    order = tuple(key for key, spec in store.spec.observations.items() if not spec.privileged)
    if tuple(keys) != order or values.shape[1] != len(model.mean):
        raise InputError(
            f"{folder} scores {', '.join(order)}; this policy is to see {', '.join(keys)}. Leave --keys out."
        )
    label = store.label(reward)
    rows = np.unique(np.linspace(0, store.num_frames - 1, min(512, store.num_frames)).astype(np.int64))
    off = np.abs(model.score(values, rows)[0] - label.score[rows]).max()
    if not off <= SAME_SCORE * max(float(label.score.std()), 1e-6):
        raise InputError(
            f"--reward {reward}: {folder} scores its frames otherwise, by up to {off:.3g}.\n"
            "Name the label set that this model made, or the model of this label set."
        )

    def score(states: np.ndarray) -> np.ndarray:
        return model.score(states.astype(np.float32, copy=False), np.arange(len(states)))[0]

    return score, hash_file(folder / "model.safetensors")


def _way_out(store: Any, reward: str, true: bool) -> str:
    if reward == "source":
        return "Name that label set, or train dynamics with --reward source."
    made_by = store.label(reward).provenance.get("labeller", "")
    other = "" if true else f"\nTrain dynamics on it: embodied train dynamics {store.path} --reward {reward}."
    if made_by == "preference":
        return f"Pay by the label's own model: --reward-model FOLDER (of 'label prefer --model').{other}"
    return f"Label set '{reward}' was made by '{made_by}' from frames and has no model that scores a state.{other}" + (
        "\nA simulator's states are paid by --reward source, or by a reward model on states." if true else ""
    )


def _simulator(
    store: Any, env_id: str, reward: str, keys: tuple[str, ...], progress: Progress
) -> tuple[Any, tuple[str, ...]]:
    """The true dynamics of a store's environment, held against its recorded steps."""
    from embodied.sim.oracle import Oracle, reproduces
    from embodied.train_dynamics import dynamics_data

    model = Oracle(env_id)
    keys = keys or tuple(key for key, spec in store.spec.observations.items() if not spec.privileged)
    data, _ = dynamics_data(store, keys, reward, progress)
    data = data.rows(np.unique(np.linspace(0, len(data) - 1, min(CHECKED, len(data))).astype(np.int64)))
    found = reproduces(model, data.observations, data.actions, data.next_observations, data.rewards, data.terminated)
    if "relative" not in found:
        raise InputError(f"{store.path}: every recorded velocity stands at its bound; {env_id} cannot be set from it.")
    if found["relative"] > FOREIGN:
        raise InputError(
            f"{env_id} does not repeat the recorded steps of {store.path}: the median error of a step is "
            f"{found['relative']:.2g} of an observation's spread.\n"
            "Is it this environment, its own observation under --keys, and its actions scaled to [-1, 1]?"
        )
    paid = f", of its reward {found['reward']['median']:.1g}" if reward == "source" else ""
    progress.say(
        f"{env_id} repeats {found['transitions']} recorded steps: median error of an observation "
        f"{found['observation']['median']:.1g}{paid}, {found['ends']} ends differ, "
        f"{100 * found['clipped']:.1f} % of the states are not known exactly"
    )
    if found["relative"] > DOUBTFUL or found["ends"] > len(data) // 100:
        progress.say("that is more than rounding: another version of the environment recorded this store")
    return model, keys

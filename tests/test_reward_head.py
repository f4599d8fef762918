"""Imagined steps paid by a label's model: by the state that they lead to, and never unlike recorded ones."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.cli import main
from embodied.contracts.errors import InputError
from embodied.datasets.store import EpisodeStore
from embodied.policies.networks import generators
from embodied.policies.ravl import RAVLConfig
from embodied.policies.rollouts import Rollouts, WithReward
from embodied.policies.squashed import SquashedActor
from embodied.progress import Progress
from embodied.rollout_model import label_reward, rollout_model
from embodied.vlm_rewards.reward_model import load_reward_model

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import add_label, make_episode, write_store

D, A = 2, 1


class Line:
    """s0 moves by the action and ends above 2; pays 99, which nobody is to see."""

    fingerprint = "line"

    def step(self, observations: torch.Tensor, actions: torch.Tensor, rng: Any, penalty: str | None = None) -> Any:
        s, a = observations, actions
        after = torch.stack([s[:, 0] + a[:, 0], s[:, 1]], 1)
        after[s[:, 1] > 1e8] = torch.inf
        return after, torch.full((len(s),), 99.0), after[:, 0] > 2.0, s[:, 1] if penalty else None


def parabola(states: np.ndarray) -> np.ndarray:
    return (-(states[:, 0] ** 2)).astype(np.float32)


def test_a_step_is_paid_by_the_state_it_leads_to() -> None:
    model = WithReward(Line(), parabola, "parabola")
    s, a = torch.tensor([[0.5, 7.0], [1.9, 8.0], [0.0, 1e9]]), torch.tensor([[0.25], [0.5], [0.0]])
    following, paid, ended, doubt = model.step(s, a, np.random.default_rng(0), "aleatoric")
    np.testing.assert_allclose(paid[:2], [-(0.75**2), -(2.4**2)], rtol=1e-6)
    assert torch.isnan(paid[2])  # and the function saw no infinity
    assert ended.tolist() == [False, True, True]
    assert doubt is not None
    assert doubt.tolist() == [7.0, 8.0, 1e9]  # ends and doubts stay the model's
    assert following[0].tolist() == [0.75, 7.0]


def test_rollouts_hold_the_labels_reward_normalised_like_recorded_ones() -> None:
    config = RAVLConfig(rollouts=20, rollout_length=2, epochs_kept=1, hidden_sizes=(8,))
    actor, rows = SquashedActor(generators([0]), D, A, (8,)), np.arange(20)
    seen = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
    mean, std = np.array([1.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)
    reward = {"scale": 0.5, "shift": -3.0}
    rollouts = Rollouts(WithReward(Line(), parabola, ""), actor, seen, rows, mean, std, reward, config, [0], A)
    rollouts.fill(0, actor.state_dict())
    held = rollouts.table[0, : rollouts.counts[0, 0]]
    paid, after = held[:, D + A], held[:, -D:] * torch.from_numpy(std) + torch.from_numpy(mean)
    np.testing.assert_allclose(paid, -0.5 * after[:, 0] ** 2 - 3.0, rtol=1e-4, atol=1e-5)


def test_the_fingerprint_tells_model_and_reward_apart() -> None:
    names = [WithReward(Line(), parabola, name).fingerprint for name in ("a", "b", "a")]
    assert names[0] == names[2] != names[1]
    other = Line()
    other.fingerprint = "other"
    assert WithReward(other, parabola, "a").fingerprint != names[0]


def test_a_reward_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(3, 1\) for 3 states"):
        WithReward(Line(), lambda s: s[:, :1], "").step(torch.zeros(3, D), torch.zeros(3, A), np.random.default_rng(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store with a preference label on states and its model, one said to be of pixels, labels without a model, and
    dynamics that learned the store's own reward."""
    folder = tmp_path_factory.mktemp("reward_head")
    patch = pytest.MonkeyPatch()
    patch.setenv("EMBODIED_CACHE", str(folder / "cache"))
    store = write_store(folder / "s.zarr", [make_episode(index) for index in range(6)])
    joint = store.read("observation/joint_position")[:, 0]
    for name in ("truth", "clip_label"):
        add_label(store, name, np.tanh(joint).astype(np.float32))
    command = ["label", "prefer", store.path, "--name", "states", "--annotator", "scripted:truth", "--pairs", "40"]
    fit = ["--fit", "members", "2", "epochs", "10", "hidden_sizes", "16"]
    assert main([*command, "--inputs", "state", "--model", str(folder / "states_model"), *fit]) == 0
    shutil.copytree(folder / "states_model", folder / "pictures_model")
    config = json.loads((folder / "pictures_model" / "config.json").read_text())
    config["provenance"]["config"]["inputs"] = {"kind": "pixels", "camera": "side"}
    (folder / "pictures_model" / "config.json").write_text(json.dumps(config))
    dynamics = ["train", "dynamics", store.path, "--reward", "source", "--out", str(folder / "dynamics")]
    small = [
        "--settings",
        "max_epochs",
        "2",
        "members",
        "3",
        "elites",
        "2",
        "hidden_sizes",
        "16",
        "weight_decay",
        "0,0",
    ]
    assert main([*dynamics, *small]) == 0
    patch.undo()
    return {"store": folder / "s.zarr", "dynamics": folder / "dynamics" / "seed_000", "folder": folder}


def imagined(made: dict[str, Path], reward: str, model: str | None, keys: tuple[str, ...] = ()) -> Any:
    store, head = EpisodeStore(made["store"]), made["folder"] / model if model else None
    return rollout_model(store, made["dynamics"], reward, head, keys, "cpu", Progress())


def test_the_labels_own_model_pays_imagined_steps(made: dict[str, Path]) -> None:
    model, keys = imagined(made, "states", "states_model")
    assert keys == ("joint_position",)
    rng = np.random.default_rng(0)
    s = torch.from_numpy(rng.normal(0, 0.3, (300, 3)).astype(np.float32))
    following, paid, *_ = model.step(s, torch.zeros(300, 2), np.random.default_rng(1))
    own, _ = load_reward_model(made["folder"] / "states_model")
    states = following.numpy()
    by_hand = own.ensemble.rewards(own.prepare(states).expand(2, -1, -1)).mean(0).detach().numpy()
    np.testing.assert_allclose(paid, by_hand, atol=1e-5)
    assert paid.std() > 0
    plain, _ = imagined(made, "source", None)
    assert not torch.allclose(plain.step(s, torch.zeros(300, 2), np.random.default_rng(1))[1], paid)


@pytest.mark.parametrize(
    ("learner", "settings"),
    [
        ("ravl", "rollouts 20 updates_per_epoch 3"),
        ("mbrcsl", "behaviour_hidden_sizes 8 rollouts_at_once 10 selection top_share top_share 0.5 keep 10"),
    ],
)
def test_policies_train_on_it_from_the_command_line(
    made: dict[str, Path], tmp_path: Path, learner: str, settings: str
) -> None:
    command = ["train", learner, str(made["store"]), "--reward", "states", "--dynamics", str(made["dynamics"])]
    command += ["--out", str(tmp_path / "out"), "--seeds", "1", "--steps", "6"]
    small = ["--settings", *settings.split(), "hidden_sizes", "8", "batch_size", "16"]
    assert main([*command, "--reward-model", str(made["folder"] / "states_model"), *small]) == 0
    assert (tmp_path / "out" / "seed_000" / "hashes.json").exists()


@pytest.mark.parametrize(
    ("reward", "model", "words"),
    [
        ("clip_label", None, "made by 'test' from frames and has no model"),
        ("states", None, "--reward-model FOLDER"),
        ("source", "states_model", "--reward NAME"),
        ("truth", "states_model", "scores its frames otherwise"),
        ("states", "pictures_model", "scores pixels"),
        ("states", "dynamics", "is no reward model"),
    ],
)
def test_what_cannot_pay_alike_is_refused(made: dict[str, Path], reward: str, model: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        imagined(made, reward, model)


def test_other_keys_than_the_reward_model_saw_are_refused(made: dict[str, Path]) -> None:
    head = made["folder"] / "states_model"
    with pytest.raises(InputError, match="Leave --keys out"):
        label_reward(EpisodeStore(made["store"]), head, "states", ("object", "joint_position"))

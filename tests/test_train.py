"""Training runs: kill and resume to identical files, refusal of NaN, bundles per seed, errors before any work."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError, InputError, TrainingError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.resident import transition_batches
from embodied.policies.bc import BCConfig
from embodied.policies.bundle import PolicyContract, load_policy, save_policy
from embodied.policies.iql import IQLConfig
from embodied.policies.loop import read_metrics
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, generators
from embodied.policies.train import TransitionData, make_config, policy_inputs, train

torch.set_num_threads(1)
SMALL = {"hidden_sizes": (16, 16), "batch_size": 16}


def small_data(seed: int = 0) -> TransitionData:
    rng = np.random.default_rng(seed)
    n = 200
    return TransitionData(
        rng.normal(size=(n, 5)).astype(np.float32),
        rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        np.arange(n - 1),
        np.arange(1, n),
        rng.normal(size=n - 1).astype(np.float32),
        np.ones(n - 1, np.float32),
    )


def small_contract() -> PolicyContract:
    return PolicyContract(
        {"joint_position": ArraySpec((5,), unit="rad")},
        {},
        ActionSpec((2,), names=("a", "b")),
        0.1,
        {"joint_position": {"mean": np.full(5, 0.5, np.float32), "std": np.full(5, 2.0, np.float32)}},
    )


def test_bundles_metrics_and_summary(tmp_path: Path) -> None:
    data, seen = small_data(), []
    summary = train(
        "iql",
        data,
        make_config("iql", overrides=SMALL),
        [3, 11],
        40,
        tmp_path,
        small_contract(),
        provenance={"dataset": "abc"},
        log_every=10,
        progress=lambda done, total, text: seen.append((done, total)),
    )
    record = json.loads(summary.read_text())
    assert record["bundles"] == ["seed_003", "seed_011"]
    assert seen == [(0, 40), (10, 40), (20, 40), (30, 40), (40, 40)]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert all(len(row["value_loss"]) == 2 for row in rows)
    policies = [load_policy(tmp_path / name) for name in record["bundles"]]
    observation = {"joint_position": np.zeros(5, np.float32)}
    actions = [policy.act(observation) for policy in policies]
    assert not np.allclose(actions[0], actions[1])
    assert policies[1].provenance["seed"] == 11
    assert policies[1].provenance["dataset"] == "abc"
    assert policies[1].provenance["reward_normalization"]["method"] == "quantile"
    assert policies[1].config["learner"]["expectile"] == make_config("iql").expectile


def test_a_seed_does_not_depend_on_the_seeds_beside_it(tmp_path: Path) -> None:
    data, config = small_data(), make_config("iql", overrides=SMALL)
    train("iql", data, config, [3, 11], 30, tmp_path / "both", small_contract())
    train("iql", data, config, [11], 30, tmp_path / "alone", small_contract())
    both, alone = (load_policy(tmp_path / run / "seed_011") for run in ("both", "alone"))
    observation = {"joint_position": np.ones(5, np.float32)}
    np.testing.assert_allclose(both.act(observation), alone.act(observation), atol=1e-5)


def test_policy_inputs_and_contract_give_the_policy_what_it_was_trained_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spec = DatasetSpec(
        {"joint_position": ArraySpec((3,), unit="rad", names=("a", "b", "c")), "opening": ArraySpec((), unit="m")},
        {"wrist": ArraySpec((16, 16, 3), "uint8")},
        ActionSpec((2,)),
        0.1,
        "lift",
    )
    frames = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    encoder = ImageEncoder(EncoderConfig((16, 16), (4, 8), 8), generators([0])[0])
    with torch.no_grad():
        embeddings = encoder(torch.from_numpy(frames)).numpy()
    values = {"opening": rng.uniform(0, 0.08, 20), "joint_position": 5 + rng.normal(size=(20, 3))}
    observations, contract = policy_inputs(spec, values, {"wrist": embeddings}, rows=np.arange(15))
    assert observations.shape == (20, 1 + 3 + 8)
    np.testing.assert_allclose(observations[:15].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(observations[:15, :4].std(0), 1, atol=1e-5)
    assert contract.joint_names == ("a", "b", "c")
    actor = Actor(generators([0]), 12, 2, (16,))
    policy = load_policy(save_policy(tmp_path / "b", actor.state_dict(), contract, {}, {}, encoder))
    with torch.no_grad():
        trained = actor(torch.from_numpy(observations)[None])[0][0].numpy()
    acted = [
        policy.act({k: np.asarray(v[i]) for k, v in values.items()} | {"images/wrist": frames[i]})[0] for i in range(20)
    ]
    np.testing.assert_allclose(acted, trained, atol=1e-4)
    with pytest.raises(InputError, match="Did you mean 'opening'"):
        policy_inputs(spec, {"openning": values["opening"]}, {})
    with pytest.raises(InputError, match="no actions"):
        policy_inputs(dataclasses.replace(spec, action=None), values, {})


def test_the_share_of_steps_whose_action_is_clipped(tmp_path: Path) -> None:
    """Some sources hold actions in radians or of a wider joystick; learning from them clipped must not pass unseen."""
    data = small_data()
    assert data.clipped_share() == 0
    data.actions[:4] = [[1.0, -1.0], [1.5, 0.0], [0.0, -3.75], [2.0, 2.0]]
    data.actions[-1] = 9.0  # the row of a final observation: no transition starts there
    assert data.clipped_share() == pytest.approx(3 / 199)
    summary = train("bc", data, make_config("bc", overrides=SMALL), [0], 1, tmp_path)
    assert json.loads(summary.read_text())["clipped_share"] == pytest.approx(3 / 199)


def run_to_kill(out: Path, progress=None) -> None:
    config = make_config("iql", overrides=SMALL)
    train(
        "iql", small_data(), config, [0, 1], 400, out, small_contract(), None, None, 10, 50, progress
    )  # a log every 10 steps, a checkpoint every 50


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_train import run_to_kill
run_to_kill(Path(sys.argv[1]), lambda done, total, text: print(done, flush=True))
"""


def test_killed_run_resumes_to_identical_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cut"), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    run_to_kill(tmp_path / "whole")  # while the other process starts
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 130:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert not (tmp_path / "cut" / "train.json").exists()
    seen: list[int] = []
    run_to_kill(tmp_path / "cut", lambda done, total, text: seen.append(done))
    assert seen[0] >= 100  # it did resume
    for name in ("seed_000/model.safetensors", "seed_001/model.safetensors", "checkpoint.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_nan_is_an_error_with_step_seed_and_checkpoint(tmp_path: Path) -> None:
    data, config = small_data(), make_config("bc", overrides={**SMALL, "learning_rate": 1e-3})
    with transition_batches(data, np.arange(199.0), [0, 1], 16, 60) as batch:  # a reward that numbers the transitions
        drawn = np.stack([batch(step)["rewards"].numpy() for step in range(60)])  # (60, S, B)
    first = {row: int((drawn == row).any((1, 2)).argmax()) for row in range(199)}
    row, step = max(first.items(), key=lambda item: item[1])
    assert 20 < step < 59
    data.observations[row] = 3e38  # finite, and overflows in the network
    with pytest.raises(
        TrainingError, match=rf"not finite at step {step + 1}; the last good checkpoint is .*checkpoint"
    ) as error:
        train("bc", data, config, [0, 1], 60, tmp_path, log_every=10, checkpoint_every=10)
    assert len(str(error.value).splitlines()) <= 3
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(10, step + 1, 10))


def test_nan_without_checkpoint_names_the_seed(tmp_path: Path) -> None:
    data = small_data()
    data.reward[:] *= 1e30  # the squared error overflows
    config = make_config("iql", overrides={**SMALL, "reward_normalization": "none"})
    with pytest.raises(TrainingError, match=r"seed number 0 is not finite at step 1; there is no checkpoint yet"):
        train("iql", data, config, [0, 1], 30, tmp_path)


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = make_config("bc", overrides=SMALL)
    train("bc", small_data(), config, [0], 10, tmp_path)
    for data, other, seeds in (
        (small_data(), dataclasses.replace(config, learning_rate=1e-2), [0]),
        (small_data(), config, [1]),
        (small_data(1), config, [0]),
    ):
        with pytest.raises(ConfigError, match="holds a run with another configuration"):
            train("bc", data, other, seeds, 10, tmp_path)
    train("bc", small_data(), config, [0], 10, tmp_path)  # the same again is done at once


def test_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    config = make_config("bc", overrides=SMALL)
    train("bc", small_data(), config, [0], 10, tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(TrainingError, match=r"checkpoint.safetensors cannot be read"):
        train("bc", small_data(), config, [0], 10, tmp_path)


def test_names_and_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'iql'"):
        make_config("iqll")
    with pytest.raises(ConfigError, match="Did you mean 'expectile'"):
        make_config("iql", overrides={"expectil": 0.9})
    with pytest.raises(ConfigError, match="Did you mean 'antmaze'"):
        make_config("iql", "ant-maze")
    assert make_config("iql", "antmaze", {"hidden_sizes": [8]}).hidden_sizes == (8,)
    assert make_config("iql", overrides={"hidden_sizes": "(64, 32)"}).hidden_sizes == (64, 32)
    for wrong in ({"hidden_sizes": "wide"}, {"discount": "high"}, {"batch_size": 1.5}):
        with pytest.raises(ConfigError, match=f"setting '{next(iter(wrong))}'"):
            make_config("iql", overrides=wrong)
    with pytest.raises(ConfigError, match="takes a IQLConfig"):
        train("iql", small_data(), BCConfig(), [0], 1, tmp_path)
    for seeds in ([], [1, 1], [-1]):
        with pytest.raises(ConfigError, match="distinct"):
            train("iql", small_data(), IQLConfig(), seeds, 1, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("actions", np.full((200, 2), np.nan, np.float32), "'actions' holds NaN"),
        ("reward", np.zeros(3, np.float32), "'reward' has shape"),
        ("next_frame", np.full(199, 200), "points outside the 200 frames"),
        ("frame", np.empty(0, np.int64), "no transition"),
        ("actions", np.zeros((7, 2), np.float32), "must be"),
    ],
)
def test_bad_data_is_refused_before_training(tmp_path: Path, field: str, value: np.ndarray, message: str) -> None:
    data = dataclasses.replace(small_data(), **{field: value})
    with pytest.raises(InputError, match=message):
        train("bc", data, BCConfig(), [0], 10, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_is_quick_when_done(tmp_path: Path) -> None:
    config = make_config("bc", overrides=SMALL)
    train("bc", small_data(), config, [0], 50, tmp_path, small_contract())
    start = time.perf_counter()
    train("bc", small_data(), config, [0], 50, tmp_path, small_contract())
    assert time.perf_counter() - start < 5
    assert [row["step"] for row in read_metrics(tmp_path)] == [50]

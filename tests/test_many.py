"""Many policies at once: the same whatever the number of workers, resumed exactly, and clear about a worker's end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError, InputError, TrainingError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.evaluate import bundles
from embodied.policies.bundle import PolicyContract, load_policy
from embodied.policies.iql import IQLConfig
from embodied.policies.loop import read_metrics
from embodied.policies.many import train_many, units
from embodied.policies.train import TransitionData, make_config, train

torch.set_num_threads(1)
CONFIG = make_config("iql", overrides={"hidden_sizes": (16, 16), "batch_size": 16})


def data() -> TransitionData:
    rng = np.random.default_rng(0)
    n = 200
    return TransitionData(
        rng.normal(size=(n, 5)).astype(np.float32),
        rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        np.arange(n - 1),
        np.arange(1, n),
        rng.normal(size=n - 1).astype(np.float32),
        (np.arange(n - 1) % 20 < 19).astype(np.float32),
    )


CONTRACT = PolicyContract(
    {"joint_position": ArraySpec((5,), unit="rad")},
    {},
    ActionSpec((2,), names=("a", "b")),
    0.1,
    {"joint_position": {"mean": np.zeros(5, np.float32), "std": np.ones(5, np.float32)}},
)


def run(out: Path, seeds: list[int], steps: int = 40, workers: int = 2, **options: Any) -> Path:
    return train_many(
        "iql", data(), CONFIG, seeds, steps, out, workers=workers, contract=CONTRACT, log_every=10, **options
    )


def test_what_a_policy_becomes_depends_on_neither_workers_nor_company(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = run(tmp_path / "two", [3, 11, 12], progress=lambda done, total, text: seen.append((done, total)))
    run(tmp_path / "one", [3, 11, 12], workers=1)
    train("iql", data(), CONFIG, [11], 40, tmp_path / "alone", CONTRACT, log_every=10)
    record = json.loads(summary.read_text())
    assert record["bundles"] == record["runs"] == ["seed_003", "seed_011", "seed_012"]
    assert record["seeds"] == [3, 11, 12]
    for name in record["bundles"]:
        files = [tmp_path / run / name / "model.safetensors" for run in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
    alone = (tmp_path / "alone" / "seed_011" / "model.safetensors").read_bytes()
    assert alone == (tmp_path / "two" / "seed_011" / "model.safetensors").read_bytes()
    rows = read_metrics(tmp_path / "two")
    assert rows == read_metrics(tmp_path / "one")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert [len(row["value_loss"]) for row in rows] == [3] * 4
    assert [row["value_loss"][1] for row in rows] == [row["value_loss"][0] for row in read_metrics(tmp_path / "alone")]
    assert seen[-1] == (120, 120)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert load_policy(tmp_path / "two" / "seed_012").provenance["seed"] == 12


def test_variations_are_policies_of_their_own_with_names_logs_and_checkpoints(tmp_path: Path) -> None:
    summary = run(tmp_path, [0, 1], vary={"expectile": [0.7, 0.9]})
    names = ["seed_000-expectile_0.7", "seed_001-expectile_0.7", "seed_000-expectile_0.9", "seed_001-expectile_0.9"]
    record = json.loads(summary.read_text())
    assert record["bundles"] == names
    assert record["vary"] == {"expectile": [0.7, 0.9]}
    for name in names:
        assert load_policy(tmp_path / name).config["learner"]["expectile"] == float(name[-3:])
        assert len(read_metrics(tmp_path / "runs" / name)) == 4
        assert (tmp_path / "runs" / name / "checkpoint.safetensors").exists()
    with pytest.raises(InputError, match=r"variations of settings: seed_000-expectile_0.7, .*Name one"):
        bundles(tmp_path)
    assert bundles(tmp_path / names[0]) == [(None, str(tmp_path / names[0]))]
    value = read_metrics(tmp_path)[-1]["value"]
    assert value[2] > value[0]  # the higher expectile
    assert value[3] > value[1]


def test_settings_that_can_and_cannot_vary() -> None:
    found = units(IQLConfig(), [4], {"expectile": [0.7, 0.8], "batch_size": [64]}, stacked=False)
    assert [unit.name for unit in found] == [
        "seed_004-expectile_0.7-batch_size_64",
        "seed_004-expectile_0.8-batch_size_64",
    ]
    assert [(unit.config.expectile, unit.config.batch_size) for unit in found] == [(0.7, 64), (0.8, 64)]
    (one, other) = units(IQLConfig(), [4, 5], {"discount": [0.9, 0.99]}, stacked=True)
    assert (one.name, one.bundles) == ("discount_0.9", ["seed_004-discount_0.9", "seed_005-discount_0.9"])
    assert other.seeds == (4, 5)
    for vary, message in (
        ({"expectil": [0.7]}, "Did you mean 'expectile'"),
        ({"expectile": [0.7, 1.5]}, "'expectile'"),
        ({"expectile": [0.7, 0.7]}, "different values"),
        ({"hidden_sizes": [64]}, "only a setting that is one number"),
        ({"cosine_actor": [0, 1]}, "only a setting that is one number"),
    ):
        with pytest.raises(ConfigError, match=message):
            units(IQLConfig(), [0], vary, stacked=False)
    with pytest.raises(ConfigError, match="distinct"):
        units(IQLConfig(), [0, 0], {}, stacked=False)


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_many
def tell(done, total, text):
    print(done, text.split(":")[0], *test_many.children(), flush=True)
if __name__ == "__main__":
    test_many.run(Path(sys.argv[1]), [0, 1, 2], 600, checkpoint_every=50, progress=tell)
"""


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def started(out: Path, after: int) -> tuple[subprocess.Popen, list[int]]:
    """A run that has done so many steps, and its workers."""
    command = [sys.executable, "-c", SCRIPT, str(out), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        done, _, *workers = line.split()
        if int(done) >= after and len(workers) == 2:
            return process, [int(pid) for pid in workers]
    raise AssertionError(process.communicate()[1])


def test_a_killed_worker_is_named_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process, workers = started(tmp_path / "cut", 200)
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "The worker that trained seed_00" in said
    assert "signal 9 (SIGKILL" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)  # the other one ended too
    assert not (tmp_path / "cut" / "train.json").exists()
    starts: list[int] = []
    run(tmp_path / "cut", [0, 1, 2], 600, checkpoint_every=50, progress=lambda done, total, text: starts.append(done))
    assert starts[0] >= 50  # went on
    run(tmp_path / "whole", [0, 1, 2], 600, checkpoint_every=50)
    for name in ("seed_000/model.safetensors", "seed_001/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    process, workers = started(tmp_path, 100)
    process.kill()
    process.communicate()
    for _ in range(100):
        left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        if not left:
            break
        signal.sigtimedwait([], 0.1)
    assert not left


def test_an_error_in_a_worker_is_the_error_of_the_command(tmp_path: Path) -> None:
    bad = data()
    bad.reward[:] *= 1e30
    config = make_config("iql", overrides={"hidden_sizes": (16, 16), "batch_size": 16, "reward_normalization": "none"})
    with pytest.raises(TrainingError, match=r"seed_00[01]: The loss of seed number 0 is not finite at step 1"):
        train_many("iql", bad, config, [0, 1], 40, tmp_path, workers=2)
    with pytest.raises(ConfigError, match="workers"):
        train_many("iql", data(), CONFIG, [0, 1], 40, tmp_path, workers=-1)
    bad.reward[3] = np.nan
    with pytest.raises(InputError, match="holds NaN"):
        train_many("iql", bad, config, [0, 1], 40, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_one_seed_is_a_plain_run(tmp_path: Path) -> None:
    run(tmp_path, [5])
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert not (tmp_path / "runs").exists()

"""The verb `select`: constant pushes, judged on random ones, rank as in a simulator; what it says and refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import write_store
from tiny_bundle import make_tiny_bundle

from embodied.cli import main
from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.policies.bundle import PolicyContract, save_policy
from embodied.policies.networks import Actor, generators
from embodied.progress import Progress
from embodied.select import Select, as_text, select, touches

STEPS = 20
SPEC = DatasetSpec(
    observations={"position": ArraySpec((1,), unit="m")},
    images={},
    action=ActionSpec((1,), names=("push",), scale=(0.1,), control_mode="joint_position_delta"),
    control_dt=0.1,
    environment="made/Line",
    has_reward=True,
)
QUICK = {
    "steps": 1500,
    "members": 4,
    "batch_size": 64,
    "hidden_sizes": "32,32",
    "learning_rate": 2e-3,
    "discount": 0.9,
    "target_update_rate": 0.05,
}


def episode(index: int) -> Episode:
    """Position moves by a tenth of the push, kept in [-1, 1]; the reward is where a step ends."""
    rng = np.random.default_rng(index)
    push = rng.uniform(-1, 1, STEPS).astype(np.float32)
    where = np.zeros(STEPS + 1, np.float32)
    where[0] = rng.uniform(-0.5, 0.5)
    for t in range(STEPS):
        where[t + 1] = np.clip(where[t] + 0.1 * push[t], -1, 1)
    valid, terminated, truncated = end_flags(STEPS, STEPS + 1, False)
    return Episode(
        observations={"position": where[:, None]},
        images={},
        action=padded_last(push[:, None], STEPS + 1),
        step_valid=valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.arange(STEPS + 1) * 0.1,
        reward=padded_last(where[1:], STEPS + 1),
        instruction="go right",
        success=None,
        source_id=str(index),
    )


def bundle(folder: Path, push: float, steps: int) -> Path:
    statistics = {"position": {"mean": np.zeros(1, np.float32), "std": np.ones(1, np.float32)}}
    contract = PolicyContract(SPEC.observations, {}, SPEC.action, 0.1, statistics)  # type: ignore[arg-type]
    actor = Actor(generators([0]), 1, 1, (8,))
    with torch.no_grad():
        actor.mlp.layers[-1].weight.zero_()
        actor.mlp.layers[-1].bias.fill_(np.arctanh(push))
    return save_policy(folder, actor.state_dict(), contract, {"algorithm": "test"}, {"steps": steps})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("select")
    write_store(root / "store", [episode(i) for i in range(60)], SPEC)
    for seed, push in enumerate((-0.6, 0.6, 0.0)):
        bundle(root / "run" / f"seed_{seed:03d}", push, 100)
    bundle(root / "later", 0.3, 200)
    return root


@pytest.fixture(scope="module")
def found(world: Path) -> dict:
    paths = (world / "run", world / "later", world / "store")
    return select(Select(paths, "source", world / "s.json", settings=QUICK), Progress())


def test_the_order_is_that_of_a_simulator(world: Path, found: dict) -> None:
    names = [Path(name).name for name in found["ranking"]]
    assert names == ["seed_001", "later", "seed_002", "seed_000"]
    # Pushing right by 0.6 from 0: positions 0.06, 0.12, ... and 1 at most, for ever after; -0.6 is its mirror image.
    truth = sum(0.9**t * min(1.0, 0.06 * (t + 1)) for t in range(400))
    by_name = {Path(item["policy"]).name: item for item in found["policies"]}
    assert by_name["seed_001"]["estimate"] == pytest.approx(truth, abs=0.25 * truth)
    assert by_name["seed_000"]["estimate"] == pytest.approx(-truth, abs=0.25 * truth)
    assert abs(by_name["seed_002"]["estimate"]) < 0.15 * truth
    assert json.loads((world / "s.json").read_text()) == json.loads(json.dumps(found))


def test_last_best_and_interval_are_said_together(found: dict) -> None:
    assert Path(found["last"]["policy"]).name == "later"  # most training steps, wherever it was named
    assert Path(found["best"]["policy"]).name == "seed_001"
    gap = found["best_minus_last"]
    assert gap["low"] < gap["estimate"] == pytest.approx(found["best"]["estimate"] - found["last"]["estimate"])
    text = as_text(found)
    for part in ("last  ", "best  ", "best - last", "mean of all 4", "Report last, best and interval together"):
        assert part in text


def test_actions_unlike_any_recorded_are_said(found: dict) -> None:
    item = {**found["best"], "outside": 0.8, "trusted": False, "settled": True}
    said = as_text({**found, "policies": [item, *found["policies"][:1], *found["policies"][2:]], "best": item})
    assert "not to be trusted: 80 % of its actions" in said
    assert all(policy["trusted"] for policy in found["policies"])


def test_the_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", str(world / "store"), str(world / "run"), "--reward", "source", "--preset", "quick", "--json"]
    assert main([*words, "--settings", "steps", "20", "members", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranking"]) == 3
    assert touches(Select((world / "run", world / "store"), "mine")).reads[-1] == world / "store" / "labels" / "mine"


def test_what_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bundles and one store"):
        select(Select((world / "run",), "source"), Progress())
    with pytest.raises(InputError, match="bundles and one store"):
        select(Select((world / "store",), "source"), Progress())
    other = make_tiny_bundle(tmp_path / "arm", cameras=())
    with pytest.raises(InputError, match="gives 8 numbers"):
        select(Select((other, world / "store"), "source"), Progress())
    with pytest.raises(InputError, match="There is no bundle"):
        select(Select((tmp_path / "none", world / "store"), "source"), Progress())

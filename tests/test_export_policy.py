"""Exported policies: the bundle's answers on a store's own observations, in both runtimes; damaged ones are refused."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import write_store
from tiny_bundle import make_tiny_bundle, tiny_contract

from embodied.cli import main
from embodied.contracts.errors import BundleError, ConfigError, InputError
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.export import Export, as_text, export, sample
from embodied.policies import export_policy as module
from embodied.policies.actors import FlowActor, ReturnActor
from embodied.policies.bundle import load_policy, save_policy
from embodied.policies.export_policy import TOLERANCE, export_policy, load_exported
from embodied.policies.fqe import store_actions
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, generators
from embodied.progress import Progress

CONTRACT = tiny_contract()
SPEC = DatasetSpec(CONTRACT.observations, CONTRACT.images, CONTRACT.action, 0.1, "made/Arm")


def episode(index: int, steps: int = 12) -> Episode:
    rng = np.random.default_rng(index)
    valid, terminated, truncated = end_flags(steps, steps + 1, False)
    return Episode(
        observations={
            key: rng.normal(0.3, 1.5, (steps + 1, *spec.shape)).astype(np.float32)
            for key, spec in SPEC.observations.items()
        },
        images={"wrist": rng.integers(0, 255, (steps + 1, 64, 64, 3), dtype=np.uint8)},
        action=padded_last(rng.uniform(-1, 1, (steps, 8)).astype(np.float32), steps + 1),
        step_valid=valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.arange(steps + 1) * 0.1,
        instruction="move",
        success=None,
        source_id=str(index),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, two bundles (with and without a camera), and their exports as `<bundle>-<format>`."""
    root = tmp_path_factory.mktemp("export")
    write_store(root / "store", [episode(i) for i in range(4)], SPEC)
    make_tiny_bundle(root / "seeing")
    make_tiny_bundle(root / "blind", cameras=())
    for name, kind in (("seeing", "onnx"), ("seeing", "torch"), ("blind", "onnx")):
        config = Export(root / name, root / f"{name}-{kind}", root / "store", kind, frames=20)  # type: ignore[arg-type]
        result = export(config, Progress())
        assert result["parity"]["count"] == 20
        assert "parity with the bundle over 20 real observations" in as_text(result)
    return root


def observations(count: int, seed: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {key: rng.normal(0, 3, (count, *spec.shape)) for key, spec in SPEC.observations.items()}
    return {**values, "images/wrist": rng.integers(0, 255, (count, 64, 64, 3), dtype=np.uint8), "more": np.zeros(count)}


@pytest.mark.parametrize("name", ["seeing-onnx", "seeing-torch", "blind-onnx"])
def test_answers_are_the_bundles_for_any_batch(world: Path, name: str) -> None:
    bundle = load_policy(world / name.split("-")[0])
    exported = load_exported(world / name)
    for count in (1, 2, 17):
        seen = observations(count)
        wanted = bundle.act_batch(seen)
        assert np.abs(exported.act_batch(seen) - wanted).max() < TOLERANCE
    one = {key: value[0] for key, value in seen.items()}
    np.testing.assert_allclose(exported.act(one), bundle.act(one), atol=TOLERANCE)
    assert np.abs(wanted).std() > 0.1  # a policy that always gave 0 would agree too
    assert exported.control_dt == bundle.control_dt


@pytest.mark.parametrize(("name", "runtime", "file"), [
    ("seeing-onnx", "onnxruntime", "policy.onnx"), ("seeing-torch", "torch", "policy.pt2"),
])  # fmt: skip
def test_the_manifest_names_runtime_inputs_and_parity(world: Path, name: str, runtime: str, file: str) -> None:
    manifest = json.loads((world / name / "manifest.json").read_text())
    assert manifest["runtime"]["name"] == runtime
    assert manifest["file"] == file
    assert manifest["parity"]["max_abs_difference"] < 1e-5
    assert "20 frames" in manifest["parity"]["observations"]
    assert [item["name"] for item in manifest["inputs"]] == [
        "joint_position",
        "joint_velocity",
        "gripper_position",
        "images/wrist",
    ]
    assert manifest["inputs"][0]["unit"] == "rad"
    assert sorted(path.name for path in (world / name).iterdir()) == ["manifest.json", file]


def test_the_onnx_file_runs_without_us(world: Path) -> None:
    """Any ONNX runtime takes raw observations by name: nothing of ours has to normalise them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(world / "seeing-onnx" / "policy.onnx"), providers=["CPUExecutionProvider"]
    )
    seen = observations(3)
    given = {item.name: seen[item.name].astype(np.uint8 if "images" in item.name else np.float32)
             for item in session.get_inputs()}  # fmt: skip
    found = np.asarray(session.run(None, given)[0])
    np.testing.assert_allclose(found, load_policy(world / "seeing").act_batch(seen), atol=TOLERANCE)


def make_windowed(folder: Path, stack: int, chunk: int, kind: dict | None, cameras: tuple[str, ...] = ()) -> Path:
    """A bundle with random weights that sees `stack` observations and gives `chunk` actions."""
    contract = dataclasses.replace(tiny_contract(cameras=cameras), stack=stack, chunk=chunk, execute=chunk)
    size, given = 8 * chunk, stack * (15 + 16 * len(cameras))
    encoder = (
        ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=16), generators([1])[0]) if cameras else None
    )
    if kind is None:
        actor = Actor(generators([0]), given, size, (32,))
    else:
        actor = FlowActor(generators([0]), given, size, (32,), kind["steps"], kind["noise"], kind["noise_seed"])
    state = actor.state_dict()
    return save_policy(folder, state, contract, {"algorithm": "test"}, {"made_by": "test"}, encoder, kind=kind)


SEEDED = {"kind": "flow", "steps": 4, "noise": "seeded", "noise_seed": 5}


@pytest.mark.parametrize(
    ("stack", "chunk", "kind", "cameras", "fmt"),
    [
        (3, 1, None, ("wrist",), "torch"),
        (2, 4, None, (), "onnx"),
        (2, 3, SEEDED, (), "onnx"),
        (1, 2, {**SEEDED, "noise": "zero"}, (), "torch"),
    ],
)
def test_stacks_chunks_and_flows(
    world: Path, tmp_path: Path, stack: int, chunk: int, kind: dict | None, cameras: tuple[str, ...], fmt: Any
) -> None:
    """An episode acted through, step by step: the export remembers and draws as the bundle does."""
    folder = make_windowed(tmp_path / "b", stack, chunk, kind, cameras)
    manifest = export(Export(folder, tmp_path / "x", world / "store", fmt, frames=6), Progress())
    assert manifest["parity"]["max_abs_difference"] < TOLERANCE
    assert manifest["output"]["shape"] == ([chunk, 8] if chunk > 1 else [8])
    assert manifest["inputs"][0]["shape"] == ([stack, 7] if stack > 1 else [7])
    assert ("noise" in [item["name"] for item in manifest["inputs"]]) == (kind is SEEDED)
    bundle, exported = load_policy(folder), load_exported(tmp_path / "x")
    seen = observations(5)
    answers = []
    for _ in range(2):
        bundle.reset()
        exported.reset()
        for step in range(5):
            one = {key: value[step] for key, value in seen.items()}
            if step == 2:
                bundle.observe(one)
                exported.observe(one)
                continue
            wanted = bundle.act(one)
            assert wanted.shape == (chunk, 8)
            np.testing.assert_allclose(exported.act(one), wanted, atol=TOLERANCE)
            answers.append(wanted)
    assert np.array_equal(answers[0], answers[4])  # a reset repeats the draws
    if stack == 1:
        bundle.reset()
        exported.reset()
        np.testing.assert_allclose(exported.act_batch(seen), bundle.act_batch(seen), atol=TOLERANCE)
    else:
        with pytest.raises(InputError, match="step by step"):
            exported.act_batch(seen)


def make_pursuing(folder: Path, cameras: tuple[str, ...], stack: int = 1) -> Path:
    """A bundle told joint positions and, with a camera, a picture to reach."""
    contract = tiny_contract(cameras=cameras)
    goal = {"joint_position": contract.observations["joint_position"]}
    goal |= {f"images/{camera}": contract.images[camera] for camera in cameras}
    contract = dataclasses.replace(contract, goal=goal, stack=stack)
    encoder = (
        ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=16), generators([1])[0]) if cameras else None
    )
    size = (15 + 16 * len(cameras)) * stack + 7 + 16 * len(cameras)
    actor = Actor(generators([0]), size, 8, (32,)).state_dict()
    return save_policy(folder, actor, contract, {"algorithm": "test"}, {"made_by": "test"}, encoder)


@pytest.mark.parametrize(
    ("cameras", "stack", "fmt"), [(("wrist",), 1, "onnx"), (("wrist",), 2, "torch"), ((), 1, "torch")]
)
def test_a_policy_that_pursues_a_goal(
    world: Path, tmp_path: Path, cameras: tuple[str, ...], stack: int, fmt: Any
) -> None:
    folder = make_pursuing(tmp_path / "b", cameras, stack)
    manifest = export(Export(folder, tmp_path / "x", world / "store", fmt, frames=6), Progress())
    assert manifest["parity"]["max_abs_difference"] < TOLERANCE
    last = {item["name"]: item for item in manifest["inputs"]}["goal/joint_position"]
    assert last == {"name": "goal/joint_position", "shape": [7], "dtype": "float32", "unit": "rad"}
    assert [item["name"] for item in manifest["inputs"]][-1].startswith("goal/")
    bundle, exported = load_policy(folder), load_exported(tmp_path / "x")
    seen, there = observations(4), observations(2, seed=3)
    with pytest.raises(InputError, match="was given none"):
        exported.act({key: value[0] for key, value in seen.items()})
    goals = [{key: there[key][k] for key in bundle.goal_spec} for k in range(2)]
    answers = []
    for policy in (bundle, exported):
        policy.give_goals(*goals)
        assert policy.goals_given == 2
        with pytest.raises(InputError, match="'place' is no goal of this policy"):
            policy.give_goals({"place": np.zeros(2)})
        found = []
        for number in (0, 1, 2):
            policy.choose_goal(number)
            policy.reset()
            found += [policy.act({key: value[k] for key, value in seen.items()}) for k in range(2)]
            found += [] if stack > 1 else [policy.act_batch(seen)]
        stated = {f"goal/{key}": value for key, value in goals[1].items()}
        policy.reset()
        found.append(policy.act({key: value[0] for key, value in seen.items()} | stated))
        answers.append(np.concatenate(found))
    np.testing.assert_allclose(answers[1], answers[0], atol=TOLERANCE)
    steps = 2 if stack > 1 else 6
    np.testing.assert_array_equal(answers[0][:steps], answers[0][2 * steps : 3 * steps])  # round and round
    assert np.abs(answers[0][:steps] - answers[0][steps : 2 * steps]).max() > 0.01
    np.testing.assert_array_equal(answers[0][-1], answers[0][steps])  # the goal stated is the second


def make_wanting(folder: Path) -> Path:
    """A bundle that wants a return of 3 and believes that a step pays about 1."""
    actor = ReturnActor(generators([0]), 15, 8, (32,), 3.0)
    with torch.no_grad():
        actor.wanted_mean += 1.5
        actor.wanted_std *= 0.3
        actor.reward_mean += 1.0
    kind = {"kind": "return_conditioned", "target_return": 3.0}
    return save_policy(folder, actor.state_dict(), tiny_contract(cameras=()), {}, {}, None, kind=kind)


@pytest.mark.parametrize("fmt", ["onnx", "torch"])
def test_a_policy_that_follows_the_return_still_wanted(world: Path, tmp_path: Path, fmt: Any) -> None:
    folder = make_wanting(tmp_path / "b")
    manifest = export(Export(folder, tmp_path / "x", world / "store", fmt, frames=6), Progress())
    assert manifest["returns"] == {"target": 3.0}
    assert manifest["inputs"][-1]["name"] == "return_still_wanted"
    bundle, exported = load_policy(folder), load_exported(tmp_path / "x")
    one = {key: value[0] for key, value in observations(1).items()}
    for _ in range(2):
        bundle.reset()
        exported.reset()
        answers = [bundle.act(one) for _ in range(5)]
        np.testing.assert_allclose([exported.act(one) for _ in range(5)], answers, atol=TOLERANCE)
        assert np.abs(np.diff(answers, axis=0)).max(axis=(1, 2)).min() > 1e-3  # what was paid is no longer wanted
    with pytest.raises(InputError, match="step by step"):
        exported.act_batch(observations(2))


def test_parity_is_about_what_is_remembered_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_wanting(tmp_path / "b")
    monkeypatch.setattr(
        module.ExportedNetwork, "forward", lambda network, *x, was=module.ExportedNetwork.forward: (
            was(network, *x)[0], was(network, *x)[1] + 0.5
        ),
    )  # fmt: skip
    with pytest.raises(BundleError, match="differs from the bundle"):
        export_policy(folder, tmp_path / "x", "torch", observations(3))


def test_what_a_stack_sees_of_a_store_begins_with_the_episode(world: Path, tmp_path: Path) -> None:
    from embodied.datasets.store import EpisodeStore

    store = EpisodeStore(world / "store")
    policy = load_policy(make_windowed(tmp_path / "b", 3, 1, None))
    rows, seen = sample(policy, store, store.num_frames, 0)
    assert rows.tolist() == list(range(store.num_frames))
    values = store.read("observation/joint_position")
    first = int(store.episode_start[1])
    np.testing.assert_array_equal(seen["joint_position"][first], values[[first, first, first]])
    np.testing.assert_array_equal(seen["joint_position"][first + 1], values[[first, first, first + 1]])
    np.testing.assert_array_equal(seen["joint_position"][first + 5], values[first + 3 : first + 6])
    acted = store_actions([policy], store)[0]
    policy.reset()
    for row in range(first, first + 4):
        answer = policy.act({key: store.read(f"observation/{key}")[row] for key in policy.observation_spec})
        np.testing.assert_allclose(answer[0], acted[row], atol=1e-6)


@pytest.mark.parametrize("name", ["seeing-onnx", "seeing-torch"])
def test_a_damaged_file_is_refused(world: Path, tmp_path: Path, name: str) -> None:
    import shutil

    copy = tmp_path / name
    shutil.copytree(world / name, copy)
    path = next(path for path in copy.iterdir() if path.name != "manifest.json")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        load_exported(copy)
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        load_exported(copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be read"):
        load_exported(copy)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        load_exported(tmp_path)


def test_an_observation_that_does_not_fit_is_refused(world: Path) -> None:
    exported = load_exported(world / "seeing-onnx")
    seen = observations(2)
    with pytest.raises(InputError, match="lacks 'joint_velocity'"):
        exported.act_batch({key: value for key, value in seen.items() if key != "joint_velocity"})
    with pytest.raises(InputError, match="takes uint8"):
        exported.act_batch({**seen, "images/wrist": seen["images/wrist"].astype(np.float32)})
    with pytest.raises(InputError, match="'joint_position' is"):
        exported.act_batch({**seen, "joint_position": np.zeros((2, 6))})


def test_what_differs_is_not_written(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observations(2)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(BundleError, match="differs from the bundle"):
        export_policy(world / "blind", tmp_path / "out", "onnx", seen)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no format 'onx'"):
        export_policy(world / "blind", tmp_path / "out", "onx", seen)
    with pytest.raises(BundleError, match="exists"):
        export_policy(world / "blind", world / "store", "onnx", seen)


def test_the_command_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(world / "blind"), str(tmp_path / "x"), "--store", str(world / "store"), "--format", "torch"]
    assert main([*words, "--frames", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runtime"]["name"] == "torch"
    other = make_tiny_bundle(tmp_path / "other", cameras=("front",))
    assert main(["export", str(other), str(tmp_path / "y"), "--store", str(world / "store")]) == 2
    assert "has no 'front'" in capsys.readouterr().err

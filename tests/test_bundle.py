"""Bundles: exact round trip, and a refusal, with the name of what is wrong, for everything that does not match."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import BundleError, InputError
from embodied.policies.bundle import load_policy, load_value, save_policy, save_value, unstack
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, MultilinearValue, generators

sys.path.insert(0, str(Path(__file__).parent))
from tiny_bundle import make_tiny_bundle, tiny_contract

torch.set_num_threads(1)


def observation(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "joint_position": rng.normal(size=7),
        "joint_velocity": rng.normal(size=7).astype(np.float32),
        "gripper_position": rng.normal(size=1),
        "images/wrist": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "cube_position": np.zeros(3),  # more than the policy asks for is ignored
    }


def rehash(folder: Path) -> None:
    from embodied.contracts.provenance import hash_file
    from embodied.policies.bundle import FILES

    (folder / "hashes.json").write_text(json.dumps({name: hash_file(folder / name) for name in FILES}))


def test_policy_round_trip_equals_the_network_computed_by_hand(tmp_path: Path) -> None:
    contract = tiny_contract()
    stack = Actor(generators([3, 4]), 7 + 7 + 1 + 16, 8, (32, 32))
    encoder = ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=16), generators([1])[0])
    save_policy(tmp_path / "b", unstack(stack.state_dict(), 1), contract, {}, {"seed": 4}, encoder)
    policy = load_policy(tmp_path / "b")
    obs = observation()

    parts = [(obs[k] - 0.1) / 0.5 for k in ("joint_position", "joint_velocity", "gripper_position")]
    with torch.no_grad():
        parts.append(encoder(torch.from_numpy(obs["images/wrist"])[None])[0].double().numpy())
    x = np.concatenate(parts)
    for n, layer in enumerate(stack.mlp.layers):
        x = x @ layer.weight[1].detach().double().numpy() + layer.bias[1, 0].detach().double().numpy()
        x = np.maximum(x, 0) if n < 2 else np.tanh(x)

    action = policy.act(obs)
    assert action.shape == (1, 8)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action[0], x, atol=2e-6)
    assert policy.control_dt == 0.1
    assert policy.action_spec == contract.action
    assert list(policy.observation_spec) == list(contract.observations)
    assert policy.provenance["seed"] == 4


def test_batch_equals_single_steps(tmp_path: Path) -> None:
    policy = load_policy(make_tiny_bundle(tmp_path / "b"))
    many = [observation(seed) for seed in range(5)]
    batch = {key: np.stack([np.asarray(o[key]) for o in many]) for key in many[0]}
    np.testing.assert_allclose(policy.act_batch(batch), np.concatenate([policy.act(o) for o in many]), atol=1e-6)


def test_constant_action_bundle(tmp_path: Path) -> None:
    wanted = np.linspace(-0.8, 0.8, 8).astype(np.float32)
    policy = load_policy(make_tiny_bundle(tmp_path / "b", constant_action=wanted))
    np.testing.assert_allclose(policy.act(observation())[0], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["config.json", "contract.json", "model.safetensors", "provenance.json"])
def test_altered_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = make_tiny_bundle(tmp_path / "b")
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(original[:-2] + b" \n")
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load_policy(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_policy(folder)


@pytest.mark.parametrize("key", ["joint_velocity", "images/wrist"])
def test_missing_normaliser_key_is_named_at_load_and_at_save(tmp_path: Path, key: str) -> None:
    folder = make_tiny_bundle(tmp_path / "b")
    contract = json.loads((folder / "contract.json").read_text())
    del contract["normalizer"][key]
    (folder / "contract.json").write_text(json.dumps(contract))
    rehash(folder)  # a consistent bundle that lacks statistics is refused all the same
    with pytest.raises(BundleError, match=key):
        load_policy(folder)

    lacking = tiny_contract()
    del lacking.normalizer[key]
    actor = Actor(generators([0]), 31, 8, (8,))
    encoder = ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=16))
    with pytest.raises(BundleError, match=key):
        save_policy(tmp_path / "c", actor.state_dict(), lacking, {}, {}, encoder)
    assert not (tmp_path / "c").exists()


def test_zero_std_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    contract = tiny_contract(cameras=())
    contract.normalizer["joint_position"]["std"][2] = 0
    actor = Actor(generators([0]), 15, 8, (8,)).state_dict()
    with pytest.raises(BundleError, match=r"std of 'joint_position'"):
        save_policy(tmp_path / "b", actor, contract, {}, {})
    with pytest.raises(BundleError, match="the actor maps 14 numbers to 8"):
        save_policy(tmp_path / "b", Actor(generators([0]), 14, 8, (8,)).state_dict(), tiny_contract(cameras=()), {}, {})
    with pytest.raises(BundleError, match="no encoder"):
        save_policy(tmp_path / "b", actor, tiny_contract(), {}, {})


def test_networks_that_do_not_fit_the_contract_are_refused_at_load(tmp_path: Path) -> None:
    """Not at the first step of a robot that is moving."""
    folder = make_tiny_bundle(tmp_path / "b")
    contract = json.loads((folder / "contract.json").read_text())
    for change, message in (
        (lambda c: c["observations"].pop(1), "the actor maps 31 numbers to 8; the contract says 24 to 8"),
        (lambda c: c["action"].update(shape=[7]), "the contract says 31 to 7"),
        (lambda c: c["images"][0]["spec"].update(shape=[32, 32, 3]), r"camera 'wrist' is \(32, 32, 3\)"),
    ):
        altered = json.loads(json.dumps(contract))
        change(altered)
        (folder / "contract.json").write_text(json.dumps(altered))
        rehash(folder)
        with pytest.raises(BundleError, match=message):
            load_policy(folder)


def test_full_disk_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    from embodied.policies import bundle

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(bundle, "save_file", full)
    with pytest.raises(BundleError, match="No space left on device"):
        make_tiny_bundle(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_say_what_to_do(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "run" / "seed_000")
    with pytest.raises(BundleError, match="no such bundle"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="seed_000"):
        load_policy(tmp_path / "run")
    with pytest.raises(BundleError, match="is a policy bundle; a value bundle"):
        load_value(tmp_path / "run" / "seed_000")
    with pytest.raises(BundleError, match="exists"):
        make_tiny_bundle(tmp_path / "run" / "seed_000")
    (tmp_path / "photos").mkdir()
    with pytest.raises(BundleError, match="exists"):
        save_value(tmp_path / "photos", MultilinearValue(generators([0])[0], 4, (8,)), None, {}, {}, {}, overwrite=True)
    assert (tmp_path / "photos").is_dir()


def test_observation_errors_name_the_key(tmp_path: Path) -> None:
    policy = load_policy(make_tiny_bundle(tmp_path / "b"))
    lacking = observation()
    del lacking["joint_velocity"]
    with pytest.raises(InputError, match="lacks 'joint_velocity'"):
        policy.act(lacking)
    with pytest.raises(InputError, match="joint_position"):
        policy.act(observation() | {"joint_position": np.full(7, np.nan)})
    with pytest.raises(InputError, match="images/wrist"):
        policy.act(observation() | {"images/wrist": np.zeros((32, 32, 3), np.uint8)})
    with pytest.raises(InputError, match="uint8"):
        policy.act(observation() | {"images/wrist": np.zeros((64, 64, 3), np.float32)})


def test_value_bundle_round_trip(tmp_path: Path) -> None:
    encoder = ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=16), generators([1])[0])
    heads = MultilinearValue(generators([2])[0], 16, (32, 32), layer_norm=True)
    save_value(tmp_path / "pre" / "bundle", heads, encoder, {"camera": "wrist"}, {"discount": 0.98}, {"seed": 2})
    bundle = load_value(tmp_path / "pre")  # the training folder is enough
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    embedding = bundle.encode(frames)
    assert embedding.shape == (6, 16)
    assert bundle.contract == {"camera": "wrist"}
    with torch.no_grad():
        e = encoder(torch.from_numpy(frames))
        expected = heads(e[:3], e[3:], e[3:]).mean(0)
    np.testing.assert_allclose(embedding, e.numpy(), atol=1e-6)
    np.testing.assert_allclose(bundle.value(embedding[:3], embedding[3:]), expected.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="64x64"):
        bundle.encode(np.zeros((2, 32, 32, 3), np.uint8))


def test_act_is_fast(tmp_path: Path) -> None:
    policy = load_policy(make_tiny_bundle(tmp_path / "b"))
    obs = observation()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        policy.act(obs)
        times.append(time.perf_counter() - start)
    assert np.quantile(times, 0.1) < 0.01  # about 0.4 ms alone; ten times the margin for a busy machine

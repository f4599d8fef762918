"""ICVF: parity with an independent float64 reference, its traps one by one, exact resume, and that it learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError, InputError
from embodied.policies.bundle import load_value
from embodied.policies.configure import configure
from embodied.policies.icvf import ICVF, PRESETS, ICVFConfig, gather, pretrain
from embodied.policies.losses import icvf_advantage, icvf_loss, success_reward, td_target
from embodied.policies.networks import EncoderConfig, MultilinearValue

torch.set_num_threads(1)
TINY = EncoderConfig((16, 16), (4, 8), 8)


def assert_close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Without torch.testing, which imports sympy for seconds."""
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=rtol, atol=atol)


class ChainSampler:
    """Episodes of `length` frames one after another; goals as the reference samples them. Counter-based."""

    def __init__(self, episodes: int, length: int, seed: int = 0, p_random: float = 0.3) -> None:
        self.episodes, self.length, self.seed, self.p_random = episodes, length, seed, p_random

    def sample(self, step: int, batch: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        frame = rng.integers(self.episodes, size=batch) * self.length + rng.integers(self.length - 1, size=batch)
        last = (frame // self.length + 1) * self.length - 1

        def goals() -> np.ndarray:
            kind = rng.random(batch)
            future = np.rint(frame + rng.random(batch) * (last - frame)).astype(np.int64)
            other = rng.integers(self.episodes * self.length, size=batch)
            return np.where(kind < 0.2, frame, np.where(kind < 1 - self.p_random, future, other))

        intent = goals()
        goal = np.where(rng.random(batch) < 0.5, intent, goals())
        return {"frame": frame, "next_frame": frame + 1, "goal": goal, "intent": intent}


def state_batch(states: np.ndarray, size: int = 64, seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
    indices = ChainSampler(5, len(states) // 5, seed).sample(0, size)
    return indices, gather(states, indices)


def reference_value(net: MultilinearValue, s: np.ndarray, g: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(J, B) in numpy."""

    def dense(layer, x, j):
        return x @ layer.weight[j].detach().numpy() + layer.bias[j].detach().numpy()

    def mlp(module, x, j):
        for layer in module.layers:
            x = np.maximum(dense(layer, x, j), 0)
        return x

    out = []
    for j in range(net.heads):
        t = mlp(net.transition, mlp(net.psi, z, j), j)
        out.append(
            (dense(net.matrix_a, t * mlp(net.phi, s, j), j) * dense(net.matrix_b, t * mlp(net.psi, g, j), j)).sum(-1)
        )
    return np.stack(out)


def test_loss_equals_an_independent_float64_reference_and_not_the_sign_trap() -> None:
    states = np.random.default_rng(0).normal(size=(50, 6))
    learner = ICVF(ICVFConfig(discount=0.9, hidden_sizes=(16, 16)), seed=1, state_size=6)
    learner.online.double()
    learner.target.double()
    with torch.no_grad():  # the target differs from the online network, or the test could not tell them apart
        for p in learner.target.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    indices, batch = state_batch(states, 256)
    i, i_next, i_g, i_z = (indices[k] for k in ("frame", "next_frame", "goal", "intent"))
    s, s_next, g, z = states[i], states[i_next], states[i_g], states[i_z]

    target, online = learner.target.heads, learner.online.heads
    reward_g, reward_z = (i == i_g) - 1.0, (i == i_z) - 1.0
    y = reward_g + 0.9 * -reward_g * reference_value(target, s_next, g, z)
    next_z = reference_value(target, s_next, z, z)
    advantage = reward_z + 0.9 * -reward_z * np.minimum(next_z[0], next_z[1])
    advantage -= reference_value(target, s, z, z).mean(0)
    residual = y - reference_value(online, s, g, z)
    weight = np.where(advantage < 0, 0.1, 0.9)
    expected = sum((weight * residual[j] ** 2).mean() for j in range(2))

    loss, metrics = learner.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert float(metrics["advantage"]) == pytest.approx(advantage.mean(), rel=1e-9)

    differ = (i_g != i_z) & ((residual[0] < 0) != (advantage < 0))
    assert differ.sum() > 10  # the batch can tell the weights apart
    trap = sum((np.where(residual[j] < 0, 0.1, 0.9) * residual[j] ** 2).mean() for j in range(2))
    assert abs(loss.item() - trap) / trap > 0.01


def test_target_moves_towards_the_online_weights_before_the_step() -> None:
    states = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    learner = ICVF(ICVFConfig(target_update_rate=0.25, hidden_sizes=(8,)), 0, 6)
    _, batch = state_batch(states)
    learner.update(batch)
    before = [p.clone() for p in learner.online.parameters()]
    old_target = [p.clone() for p in learner.target.parameters()]
    learner.update(batch)
    for target, old, online in zip(learner.target.parameters(), old_target, before, strict=True):
        assert_close(target, 0.75 * old + 0.25 * online, atol=1e-6, rtol=1e-6)
    assert not any(p.requires_grad for p in learner.target.parameters())


def test_gather_takes_each_frame_once_and_equals_taking_all() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    indices = ChainSampler(5, 10).sample(3, 64)
    batch = gather(frames, indices)
    for name, row in zip(("frame", "next_frame", "goal", "intent"), batch["rows"], strict=True):
        np.testing.assert_array_equal(batch["observations"].numpy()[row], frames[indices[name]])
    online = int(batch["online"])
    assert batch["rows"][[0, 2, 3]].max() < online <= len(batch["observations"]) <= 50
    assert len(np.unique(batch["observations"].numpy().reshape(len(batch["observations"]), -1), axis=0)) == len(
        batch["observations"]
    )
    every = dict(batch)
    every["observations"] = torch.from_numpy(
        np.concatenate([frames[indices[k]] for k in ("frame", "goal", "intent", "next_frame")])
    )
    every["rows"] = torch.arange(256).view(4, 64)[[0, 3, 1, 2]]
    every["online"] = torch.tensor(192)
    learner = ICVF(ICVFConfig(hidden_sizes=(8,), encoder=TINY), 0)
    assert learner.loss(batch)[0].item() == pytest.approx(learner.loss(every)[0].item(), rel=1e-5)


def test_crops_are_independent_and_success_stays_on_indices() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    same = np.full(64, 7)
    indices = {"frame": same, "next_frame": same + 1, "goal": same, "intent": same}
    batch = gather(frames, indices, crop_pad=3, rng=np.random.default_rng(1))
    images = batch["observations"].numpy()[batch["rows"].numpy()]  # (4, B, H, W, 3)
    assert (images[0] != images[2]).any((1, 2, 3)).mean() > 0.9
    assert (images[2] != images[3]).any((1, 2, 3)).mean() > 0.9
    padded = np.pad(frames[7], ((3, 3), (3, 3), (0, 0)), mode="edge")
    crops = {padded[y : y + 16, x : x + 16].tobytes() for y in range(7) for x in range(7)}
    assert all(image.tobytes() in crops for image in images[0])
    # V(s, s, .) is regressed on exactly 0, whatever the pictures look like and wherever s' leads.
    reward, mask = success_reward(batch["frame"], batch["goal"])
    assert td_target(reward, mask, torch.full((2, 64), -40.0), 0.98).abs().max() == 0


def test_tabular_error_falls_with_the_expectile_on_noisy_passive_data() -> None:
    """The characteristic effect (facts: 6.7 / 7.5 / 8.3 in four rooms), on a ring with noisy walkers."""
    cells, discount = 14, 0.9
    rng = np.random.default_rng(0)
    position, wanted = rng.integers(cells, size=(2, 400))
    walks = [position]
    for _ in range(30):
        towards = np.sign((wanted - position + cells // 2) % cells - cells // 2)
        move = np.where(rng.random(400) < 0.5, towards, rng.integers(-1, 2, size=400))
        position = (position + move) % cells
        walks.append(position)
    walk = torch.from_numpy(np.stack(walks, 1).reshape(-1))
    sampler = ChainSampler(400, 31)
    distance = (torch.arange(cells)[:, None] - torch.arange(cells)).abs()
    distance = torch.minimum(distance, cells - distance)
    optimum = -(1 - discount**distance) / (1 - discount)
    errors = []
    for expectile in (0.5, 0.7, 0.9):
        # Pessimistic start: V <= 0, so zeros would be optimistic about what is never visited.
        table = torch.full((2, cells, cells, cells), -1 / (1 - discount))
        for step in range(250):
            batch = {k: walk[v] for k, v in sampler.sample(step, 1024).items()}  # cells
            s, n, g, z = batch["frame"], batch["next_frame"], batch["goal"], batch["intent"]
            (reward_g, mask_g), (reward_z, mask_z) = success_reward(s, g), success_reward(s, z)
            y = td_target(reward_g, mask_g, table[:, n, g, z], discount)
            advantage = icvf_advantage(reward_z, mask_z, table[:, n, z, z], table[:, s, z, z], discount)
            online = table[:, s, g, z].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(icvf_loss(online, y, advantage, expectile), online)
            entry = (s * cells + g) * cells + z
            count = torch.bincount(entry, minlength=cells**3)[entry]
            table.view(2, -1).index_add_(1, entry, -0.5 * gradient * len(s) / count)
        diagonal = torch.arange(cells)
        errors.append(float((table.mean(0)[:, diagonal, diagonal] - optimum).abs().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.75 * errors[0]


def moving_square(episodes: int = 30, length: int = 13) -> np.ndarray:
    """Videos of a square that crosses a 16 x 16 picture, at a height of its own: (F, 16, 16, 3)."""
    frames = np.zeros((episodes, length, 16, 16, 3), np.uint8)
    for e in range(episodes):
        for t in range(length):
            y = e % 12
            frames[e, t, y : y + 4, t : t + 4] = 200
    return frames.reshape(-1, 16, 16, 3)


def test_pretraining_on_video_orders_frames_by_distance_to_the_goal(tmp_path: Path) -> None:
    frames = moving_square()
    config = ICVFConfig(discount=0.9, hidden_sizes=(64, 64), encoder=TINY, batch_size=64, target_update_rate=0.02)
    folder = pretrain(frames, ChainSampler(30, 13), config, 0, 400, tmp_path, {"camera": "side"}, {"made_by": "test"})
    bundle = load_value(folder)
    assert bundle.contract["camera"] == "side"
    embedding = bundle.encode(frames).reshape(30, 13, -1)
    correlations = []
    for episode in range(12):
        goal = np.repeat(embedding[episode, -1:], 13, 0)
        value = bundle.value(embedding[episode], goal)
        correlations.append(np.corrcoef(np.argsort(np.argsort(value)), np.arange(13))[0, 1])
    assert np.mean(correlations) > 0.8  # before training: about 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(50, 401, 50))


class Killed(Exception):
    pass


@pytest.mark.parametrize("crop_pad", [0, 2])
def test_interrupted_run_ends_with_identical_files(tmp_path: Path, crop_pad: int) -> None:
    frames = moving_square(6)
    config = ICVFConfig(hidden_sizes=(16,), encoder=TINY, batch_size=16, crop_pad=crop_pad)

    def run(out: Path, stop_at: int | None = None) -> None:
        def progress(done: int, total: int, text: str) -> None:
            if done == stop_at:
                raise Killed

        pretrain(frames, ChainSampler(6, 13), config, 3, 20, out, log_every=2, checkpoint_every=4, progress=progress)

    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", stop_at=10)  # after the checkpoint of step 8 and the log of step 10
    run(tmp_path / "cut")
    for name in ("bundle/model.safetensors", "checkpoint.safetensors", "metrics.jsonl", "bundle/config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_other_data_or_seed_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    frames, sampler = moving_square(6), ChainSampler(6, 13)
    config = ICVFConfig(hidden_sizes=(8,), encoder=TINY, batch_size=8)
    pretrain(frames, sampler, config, 0, 2, tmp_path)
    for other, seed in ((frames[::-1], 0), (frames, 1)):
        with pytest.raises(ConfigError, match="another configuration"):
            pretrain(np.ascontiguousarray(other), sampler, config, seed, 2, tmp_path)
    # The signature reads 256 frames only; what else differs shows in the store's fingerprint.
    pretrain(frames, sampler, config, 0, 2, tmp_path / "c", provenance={"inputs": {"0": "one"}})
    with pytest.raises(ConfigError, match="another configuration"):
        pretrain(frames, sampler, config, 0, 2, tmp_path / "c", provenance={"inputs": {"0": "other"}})
    with pytest.raises(InputError, match="uint8 frames"):
        pretrain(frames.astype(np.float32), sampler, config, 0, 2, tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("heads", 0), ("crop_pad", -1), ("expectile", 2.0), ("hidden_sizes", "")]
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"setting '{name}'"):
        configure(PRESETS, "short", {name: value}, "pretrain")
    assert configure(PRESETS, "short", {"crop_pad": 0, "hidden_sizes": "32"}, "pretrain").hidden_sizes == (32,)


def test_states_without_an_encoder(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    config = ICVFConfig(hidden_sizes=(8,), batch_size=16)
    bundle = load_value(pretrain(states, ChainSampler(5, 10), config, 0, 3, tmp_path))
    assert bundle.encoder is None
    assert bundle.embedding_size == 6
    assert bundle.value(states[:4], states[4:8]).shape == (4,)

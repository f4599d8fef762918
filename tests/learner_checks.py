"""What every TD learner is asked: batches, a small problem with a known answer, stacking, resuming."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from embodied.contracts.batch import Batch
from embodied.policies.networks import Actor, generators
from embodied.policies.train import TransitionData, make_config, train

D, A, B = 3, 2, 16
KEYS = ("observations", "actions", "rewards", "masks", "next_observations", "returns", "next_actions", "next_known")


def random_batch(seeds: int, seed: int = 0, size: int = B) -> Batch:
    """Every key, float64; some steps terminate, some next actions are not known."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(seeds, size, D)),
        "actions": rng.uniform(-1, 1, (seeds, size, A)),
        "rewards": rng.normal(size=(seeds, size)),
        "masks": rng.integers(0, 2, (seeds, size)).astype(float),
        "next_observations": rng.normal(size=(seeds, size, D)),
        "returns": rng.normal(size=(seeds, size)),
        "next_actions": rng.uniform(-1, 1, (seeds, size, A)),
        "next_known": rng.integers(0, 2, (seeds, size)).astype(float),
    }
    return Batch(**{key: torch.from_numpy(value) for key, value in arrays.items()})


def part(batch: Batch, i: int) -> Batch:
    """The batch of one seed."""
    values: dict[str, torch.Tensor] = dict(batch)  # type: ignore[arg-type]
    return Batch(**{key: value[i : i + 1] for key, value in values.items()})  # type: ignore[typeddict-item]


def check_stack_equals_separate(make: Callable[[list[int]], Any], updates: int = 12) -> None:
    """Metrics of every step and the final weights of three seeds at once are those of three runs."""
    seeds = [4, 0, 7]
    stack, singles = make(seeds), [make([seed]) for seed in seeds]
    for k in range(updates):
        batch = random_batch(3, k)
        metrics = stack.update(batch)
        for i, single in enumerate(singles):
            for name, value in single.update(part(batch, i)).items():
                assert metrics[name].shape == (3,)
                np.testing.assert_allclose(metrics[name][i].item(), value.item(), rtol=1e-8, atol=1e-11, err_msg=name)
    for i, single in enumerate(singles):
        for key, value in single.actor_state(0).items():
            np.testing.assert_allclose(stack.actor_state(i)[key].numpy(), value.numpy(), rtol=1e-7, atol=1e-10)


def check_actions_are_clipped(make: Callable[[list[int]], Any]) -> None:
    """Actions beyond 1, as some sources hold them, count as 1."""
    wide: dict[str, torch.Tensor] = dict(random_batch(1))  # type: ignore[arg-type]
    wide |= {key: 3.0 * wide[key] for key in ("actions", "next_actions")}
    within = wide | {key: wide[key].clamp(-1.0, 1.0) for key in ("actions", "next_actions")}
    assert (wide["actions"].abs() > 1).any()
    ours, again = make([0]).update(wide), make([0]).update(within)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def check_resume(make: Callable[[list[int]], Any], cut: int = 5, more: int = 6) -> None:
    """A learner made anew, of other seeds' weights, goes on from a state dict bit for bit, noise included."""
    first, second = make([1, 2]), make([1, 2])
    for k in range(cut):
        first.update(random_batch(2, k))
    second.update(random_batch(2, 99))
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for k in range(cut, cut + more):
        ours, again = first.update(random_batch(2, k)), second.update(random_batch(2, k))
        assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


# A point on a line: x' = x + 0.2 a, random actions, reward -1 until x > 0.7, which ends the episode.


def point_batches(seed: int, seeds: int, size: int, data: int = 5000, discount: float = 0.9) -> Iterator[Batch]:
    """Steps of a random policy. `returns` are those of standing still for ever, the least there is."""
    rng = np.random.default_rng(seed)
    x, a = rng.uniform(-1, 1, (data, 1)), rng.uniform(-1, 1, (data, 1))
    n = np.clip(x + 0.2 * a, -1, 1)
    reached = n[:, 0] > 0.7
    arrays = {
        "observations": x,
        "actions": a,
        "rewards": reached - 1.0,
        "masks": 1.0 - reached,
        "next_observations": n,
        "returns": np.where(reached, 0.0, -1.0 / (1 - discount)),
        "next_actions": rng.uniform(-1, 1, (data, 1)),
        "next_known": np.ones(data),
    }
    tensors = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in arrays.items()}
    while True:
        i = rng.integers(data, size=(seeds, size))
        yield Batch(**{k: tensors[k][i] for k in KEYS})


def point_steps(learner: Any, seeds: int, steps: int, size: int, limit: int = 24) -> list[int]:
    """Steps from x = -0.9 to the goal after training, per seed, `limit` where it is not reached; 8 are the fewest.

    A value comes back through 8 backups, each through a target network that moves by 0.03 a step: some 800 updates.
    """
    batches = point_batches(0, seeds, size)
    for _ in range(steps):
        learner.update(next(batches))
    taken = []
    for i in range(seeds):
        state = learner.actor_state(i)
        hidden = [v.shape[2] for k, v in state.items() if k.endswith("weight")][:-1]
        actor = Actor(generators([0]), 1, 1, hidden)
        actor.load_state_dict(state)
        x, count = -0.9, 0
        while x <= 0.7 and count < limit:
            with torch.no_grad():
                x = float(np.clip(x + 0.2 * actor(torch.tensor([[[x]]]))[0].item(), -1, 1))
            count += 1
        taken.append(count)
    return taken


def small_data() -> TransitionData:
    """Four episodes of 30 steps: two terminate, two are cut."""
    rng = np.random.default_rng(0)
    frames = 4 * 31
    frame = np.flatnonzero(np.arange(frames) % 31 < 30)
    masks = np.ones(len(frame), np.float32)
    masks[[29, 89]] = 0.0
    return TransitionData(
        rng.normal(size=(frames, 3)).astype(np.float32),
        rng.uniform(-1, 1, (frames, 2)).astype(np.float32),
        frame,
        frame + 1,
        rng.normal(size=len(frame)).astype(np.float32),
        masks,
        frame // 31,
    )


def check_run_resumes(learner: str, tmp_path: Any, **changes: Any) -> None:
    """A run cut by an error after its first checkpoint ends with the files of one that was not."""
    config = make_config(learner, overrides={"hidden_sizes": "(8, 8)", "batch_size": 16, **changes})

    class Cut(Exception):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done == 25:
            raise Cut

    arguments = (learner, small_data(), config, [3, 1], 40)
    train(*arguments, tmp_path / "whole", log_every=5, checkpoint_every=10)
    try:
        train(*arguments, tmp_path / "cut", log_every=5, checkpoint_every=10, progress=stop)
    except Cut:
        pass
    else:
        raise AssertionError("the run was not cut")
    train(*arguments, tmp_path / "cut", log_every=5, checkpoint_every=10)
    for name in ("checkpoint.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name

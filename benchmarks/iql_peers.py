"""Other IQL implementations as `update(count)`, for benchmarks/iql_speed.py and iql_returns.py. Nothing of ours is
imported, so that another Python can run it. Their code is fetched by whoever measures and is no part of this
repository:

    corl PATH        algorithms/offline/iql.py of corl-team/CORL (torch)
    unifloral PATH   algorithms/iql.py of EmptyJackson/unifloral (jax, flax, optax, distrax)
    d3rlpy           the installed package (torch)
"""

import dataclasses
import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

N, D, A, B = 1_000_000, 11, 3, 256
Update = Callable[[int], None]


def transitions(size: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((size, D), np.float32),
        "actions": rng.uniform(-1, 1, (size, A)).astype(np.float32),
        "rewards": rng.standard_normal(size, np.float32),
        "next_observations": rng.standard_normal((size, D), np.float32),
        "terminals": np.zeros(size, np.float32),
    }


def _module(path: str, absent: tuple[str, ...]) -> Any:
    """A peer's script as a module; simulators and loggers that measuring does not need are empty modules."""
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    if "pyrallis" in absent:
        sys.modules["pyrallis"].wrap = lambda *_, **__: lambda function: function  # type: ignore[attr-defined]
    if "gym" in absent:
        sys.modules["gym"].Env = object  # type: ignore[attr-defined]
    module = types.ModuleType("peer")
    sys.modules["peer"] = module  # dataclasses look their module up
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), module.__dict__)
    return module


def corl(path: str) -> Update:
    return corl_trainer(path, transitions(), 0, 1_000_000)[0]


def corl_trainer(path: str, data: dict[str, np.ndarray], seed: int, steps: int) -> tuple[Update, Any]:
    """`update(count)` on these transitions, and the actor. `steps`: the length of its cosine."""
    import torch

    torch.set_num_threads(1)
    peer = _module(path, ("d4rl", "gym", "pyrallis", "wandb"))
    peer.set_seed(seed)
    count, d, a = *data["observations"].shape, data["actions"].shape[1]
    buffer = peer.ReplayBuffer(d, a, count, "cpu")
    buffer.load_d4rl_dataset(data)
    networks = {"q": peer.TwinQ(d, a), "v": peer.ValueFunction(d), "actor": peer.GaussianPolicy(d, a, 1.0)}
    optimizers = {f"{k}_optimizer": torch.optim.Adam(n.parameters(), lr=3e-4) for k, n in networks.items()}
    trainer = peer.ImplicitQLearning(
        max_action=1.0,
        actor=networks["actor"],
        q_network=networks["q"],
        v_network=networks["v"],
        max_steps=steps,
        device="cpu",
        **optimizers,
    )

    def update(count: int) -> None:
        for _ in range(count):
            trainer.train(buffer.sample(B))

    return update, networks["actor"]


def unifloral(path: str) -> Update:
    import jax
    import jax.numpy as jnp

    peer = _module(path, ("d4rl", "gym", "wandb"))
    data = transitions()
    keys = ("observations", "actions", "rewards", "next_observations", "terminals")
    dataset = peer.Transition(*(jnp.asarray(data[key]) for key in keys))
    args = peer.Args()
    mean, std = dataset.obs.mean(0), dataset.obs.std(0)
    actor, q = peer.TanhGaussianActor(A, mean, std), peer.DualQNetwork(mean, std)
    value = peer.StateValueFunction(mean, std)
    s, a = jnp.zeros(D), jnp.zeros(A)
    rng = jax.random.PRNGKey(0)
    state = peer.AgentTrainState(
        actor=peer.create_train_state(args, rng, actor, [s]),
        dual_q=peer.create_train_state(args, rng, q, [s, a]),
        dual_q_target=peer.create_train_state(args, rng, q, [s, a]),
        value=peer.create_train_state(args, rng, value, [s]),
    )
    step = peer.make_train_step(args, actor.apply, q.apply, value.apply, dataset)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, CHUNK)[0])
    held = [(rng, state)]

    def update(count: int) -> None:
        for _ in range(count // CHUNK):
            held[0] = run(held[0])
        jax.block_until_ready(held[0])

    return update


def d3rlpy(_: str = "") -> Update:
    import torch

    torch.set_num_threads(1)
    import d3rlpy as peer

    data = transitions(100_000)
    ends = np.arange(len(data["rewards"])) % 1000 == 999
    arrays = (data[key] for key in ("observations", "actions", "rewards", "terminals"))
    dataset = peer.dataset.MDPDataset(*arrays, ends)
    algo = peer.algos.IQLConfig(batch_size=B).create(device="cpu:0")
    algo.build_with_dataset(dataset)

    def update(count: int) -> None:
        for _ in range(count):
            algo.update(dataset.sample_transition_batch(B))

    return update


PEERS = {"corl": corl, "unifloral": unifloral, "d3rlpy": d3rlpy}
CHUNK = 10  # updates at once


def serve(update: Update) -> None:
    """Answer each line `seconds` on standard input with one of JSON: updates, wall and CPU seconds."""
    update(3 * CHUNK)
    print("ready", flush=True)
    for line in sys.stdin:
        count, limit = 0, float(line)
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < limit:
            update(CHUNK)
            count += CHUNK
        figures = Window(count, time.perf_counter() - wall, time.process_time() - cpu)
        print(json.dumps(dataclasses.asdict(figures)), flush=True)


@dataclasses.dataclass(frozen=True)
class Window:
    updates: int
    wall: float
    cpu: float


if __name__ == "__main__":
    serve(PEERS[sys.argv[1]](*sys.argv[2:]))

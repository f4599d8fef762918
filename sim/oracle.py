"""True dynamics: the simulator set from an observation and stepped, many rows at once, in the place of a learned model.

For Gymnasium's MuJoCo tasks whose observation tells the state. The root's position along the track, which observations
leave out, is set to 0: neither forces nor rewards depend on where along it a body is, the forward reward being a
difference of two positions. What observations do lose is said in `Oracle.limits`: hopper and walker2d see joint
velocities clipped to +-10, so that a faster joint is set to 10.

MuJoCo steps the rows on native threads (`mujoco.rollout`). No row depends on its neighbours or on how many threads
there are. The constraint solver starts cold, where a running simulator starts from the last step's solution: both end
within the solver's tolerance of the same acceleration.
"""

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import InputError, MissingExtraError, suggest
from embodied.sim.render import load_mujoco

Outcome = tuple[np.ndarray, np.ndarray, np.ndarray]  # next observations, rewards, ended
ROWS_AT_ONCE = 16_384  # of one call: what MuJoCo gives back is every inner step's state
_of_parents: list[Any] = []  # pools that came with a fork: to free one would wait for threads that are not there


@dataclasses.dataclass(frozen=True)
class States:
    """n simulator states: qpos (n, nq), qvel (n, nv), float64."""

    qpos: np.ndarray
    qvel: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """What the simulator does not say of a task.

    Attributes:
        hidden: leading numbers of qpos that the observation leaves out.
        clip: bound on the velocities of an observation; 0 where there is none.
        outcome: (environment, states before, states after, controls) -> reward (n,), ended (n,).
    """

    hidden: int
    clip: float
    outcome: Callable[[Any, States, States, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _run(env: Any, before: States, after: States, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HalfCheetah, Swimmer: speed less effort, for ever."""
    speed = (after.qpos[:, 0] - before.qpos[:, 0]) / env.dt
    reward = env._forward_reward_weight * speed - env._ctrl_cost_weight * np.square(control).sum(1)
    return reward, np.zeros(len(reward), bool)


def _stay_up(env: Any, before: States, after: States, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hopper, Walker2d: speed less effort, and a reward for not having fallen."""
    reward, _ = _run(env, before, after, control)
    height, angle = after.qpos[:, 1], after.qpos[:, 2]
    healthy = (env._healthy_z_range[0] < height) & (height < env._healthy_z_range[1])
    healthy &= (env._healthy_angle_range[0] < angle) & (angle < env._healthy_angle_range[1])
    if hasattr(env, "_healthy_state_range"):  # hopper
        state = np.concatenate([after.qpos[:, 2:], after.qvel], 1)
        healthy &= ((env._healthy_state_range[0] < state) & (state < env._healthy_state_range[1])).all(1)
    ends = bool(env._terminate_when_unhealthy)
    paid = np.ones_like(healthy) if _before_v5(env) and ends else healthy  # until v5 the last step was paid too
    return reward + env._healthy_reward * paid, ~healthy & ends


def _balance(env: Any, before: States, after: States, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """InvertedPendulum: 1 for every step that the pole stands."""
    del before, control
    finite = np.isfinite(after.qpos).all(1) & np.isfinite(after.qvel).all(1)
    ended = ~finite | (np.abs(after.qpos[:, 1]) > 0.2)
    return np.ones(len(ended)) if _before_v5(env) else 1.0 - ended, ended


def _before_v5(env: Any) -> bool:
    return env.spec.version is not None and env.spec.version < 5


TASKS: dict[str, Task] = {
    "InvertedPendulum": Task(0, 0.0, _balance),
    "Hopper": Task(1, 10.0, _stay_up),
    "Walker2d": Task(1, 10.0, _stay_up),
    "HalfCheetah": Task(1, 0.0, _run),
    "Swimmer": Task(2, 0.0, _run),
}
REFUSED = {
    "InvertedDoublePendulum": "its observation holds a force of the constraint solver, which a state set anew lacks",
    "Ant": "its observation holds contact forces, and its root's heading is a quaternion that float32 does not keep",
    "Humanoid": "its observation holds forces and velocities of centres of mass",
    "HumanoidStandup": "its observation holds forces and velocities of centres of mass",
    "Reacher": "its observation holds sines and differences, from which the arm's turns are not known",
    "Pusher": "its observation holds positions of bodies instead of the joints that carry them",
}


class Oracle:
    """A `rollouts.Model` that is never wrong. Observations in the environment's units, actions in [-1, 1].

    Args:
        env_id: of Gymnasium, `Hopper-v5`.
        threads: 0: one per core; 1 in a forked process, whose siblings have the other cores.

    Attributes:
        fingerprint: of the environment's id, its compiled model and the versions that step it.
        limits: what an observation does not tell, in words.

    Raises:
        InputError: no such task, or one whose observations do not tell the state. MissingExtraError.
    """

    def __init__(self, env_id: str, threads: int = 0) -> None:
        mujoco = load_mujoco()
        try:
            import gymnasium
        except ImportError as error:
            raise MissingExtraError("gymnasium", "sim", "true dynamics") from error
        name = env_id.rpartition("-v")[0].rpartition("/")[2] or env_id
        if name in REFUSED:
            raise InputError(f"{env_id} cannot be set from an observation: {REFUSED[name]}.")
        if name not in TASKS or "-v" not in env_id:
            known = [f"{task}-v5" for task in TASKS]
            raise InputError(f"True dynamics know no environment '{env_id}'.{suggest(env_id, known)}")
        try:
            env: Any = gymnasium.make(env_id).unwrapped
        except gymnasium.error.Error as error:
            raise InputError(f"{env_id}: {error}") from None
        self.env_id, self.task, self.env = env_id, TASKS[name], env
        self.observation_size = int(env.observation_space.shape[0])
        self.action_size = int(env.model.nu)
        self._low, self._high = np.array(env.action_space.low, float), np.array(env.action_space.high, float)
        self._asked, self._threads = threads, 0
        self._pool: Any = None
        self._owner, self._pid = 0, os.getpid()
        buffer = np.zeros(mujoco.mj_sizeModel(env.model), np.uint8)
        mujoco.mj_saveModel(env.model, None, buffer)
        versions = f"{env_id} mujoco {mujoco.__version__} gymnasium {gymnasium.__version__}"
        self.fingerprint = hashlib.sha256(versions.encode() + buffer.tobytes()).hexdigest()
        clip = self.task.clip
        self.limits = [f"velocities beyond +-{clip:g} are seen, and set, as {clip:g}"] if clip else []
        self.facts = {"reward": "source", "environment": env_id}

    @torch.no_grad()
    def step(
        self,
        observations: Tensor,
        actions: Tensor,
        rng: np.random.Generator | None = None,
        penalty: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(n, D), (n, A) -> next (n, D), reward (n,), ended (n,) bool, and zeros (n,) where a doubt is asked for.

        A row whose physics break down comes back as NaN. Nothing is drawn from `rng`.
        """
        parts = self.step_arrays(observations.cpu().double().numpy(), actions.cpu().double().numpy())
        following, reward, ended = (torch.from_numpy(x).to(observations.device) for x in parts)
        following, reward = following.to(observations.dtype), reward.to(observations.dtype)
        return following, reward, ended, torch.zeros_like(reward) if penalty else None

    def step_arrays(self, observations: np.ndarray, actions: np.ndarray) -> Outcome:
        """The same in float64. InputError on another number of columns."""
        self.check_sizes(observations, actions)
        before = self.states(observations)
        control = self._low + (np.clip(actions, -1.0, 1.0) + 1.0) * 0.5 * (self._high - self._low)
        after = self._advance(before, control)
        with np.errstate(invalid="ignore"):
            reward, ended = self.task.outcome(self.env, before, after, control)
        return self.observe(after), reward.astype(float), ended

    def check_sizes(self, observations: np.ndarray, actions: np.ndarray) -> None:
        """InputError unless there are as many columns as this environment has observations and actions."""
        wanted = (self.observation_size, self.action_size)
        if (observations.shape[-1], actions.shape[-1]) != wanted:
            raise InputError(
                f"{self.env_id} has {wanted[0]} observations and {wanted[1]} actions; found "
                f"{observations.shape[-1]} and {actions.shape[-1]}.\nKeep the environment's own observation."
            )

    def states(self, observations: np.ndarray) -> States:
        """(n, D) -> simulator states, the root at 0 where the observation leaves its place out."""
        hidden, nq = self.task.hidden, self.env.model.nq
        qpos = np.zeros((len(observations), nq))
        qpos[:, hidden:] = observations[:, : nq - hidden]
        return States(qpos, np.array(observations[:, nq - hidden :], float))

    def observe(self, states: States) -> np.ndarray:
        """(n, D) what the environment shows of states."""
        clip = self.task.clip or np.inf
        return np.concatenate([states.qpos[:, self.task.hidden :], np.clip(states.qvel, -clip, clip)], 1)

    def _advance(self, states: States, control: np.ndarray) -> States:
        mujoco = load_mujoco()
        model, skip = self.env.model, self.env.frame_skip
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        nq, nv, count = model.nq, model.nv, len(control)
        initial = np.zeros((count, size))  # time, qpos, qvel; these tasks have no activations
        initial[:, 1 : 1 + nq], initial[:, 1 + nq : 1 + nq + nv] = states.qpos, states.qvel
        usable = np.asarray(np.isfinite(np.concatenate([initial, control], 1)).all(1))
        initial[~usable] = 0.0
        control = np.where(usable[:, None], control, 0.0)
        pool, datas = self._workers()
        last = np.empty((count, size))
        for start in range(0, count, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            held = np.repeat(control[rows, None], skip, 1)
            last[rows] = pool.rollout(model, datas, initial[rows], held)[0][:, -1]
        # MuJoCo starts over at time 0 where an acceleration is not finite; the clock tells.
        on_time = np.abs(last[:, 0] - skip * model.opt.timestep) < 0.5 * model.opt.timestep
        last[~(usable & on_time)] = np.nan
        return States(last[:, 1 : 1 + nq], last[:, 1 + nq : 1 + nq + nv])

    def _workers(self) -> tuple[Any, Sequence[Any]]:
        """This process's threads: a pool does not survive a fork."""
        if self._owner != os.getpid():
            rollout = importlib.import_module("mujoco.rollout")
            forked = os.getpid() != self._pid
            if self._pool is not None:
                _of_parents.append(self._pool)
            self._threads = self._asked or (1 if forked else len(os.sched_getaffinity(0)))
            self._pool = rollout.Rollout(nthread=self._threads if self._threads > 1 else 0)
            self._datas = [load_mujoco().MjData(self.env.model) for _ in range(self._threads)]
            self._owner = os.getpid()
        assert self._pool is not None
        return self._pool, self._datas


def reproduces(
    oracle: Oracle,
    observations: np.ndarray,
    actions: np.ndarray,
    next_observations: np.ndarray,
    rewards: np.ndarray,
    ended: np.ndarray,
) -> dict[str, Any]:
    """Recorded transitions (N, ...) against the oracle's: is this the environment, in its own units and order?

    Returns:
        `observation`, `reward`: median and largest |difference|; `relative`: median of the observation's, in units of
        each number's spread; `ends`: rows whose end differs; `clipped`: share of the rows with a velocity at the bound,
        whose state is not known and which are left out of the figures.
    """
    oracle.check_sizes(observations, actions)
    clip = oracle.task.clip
    known: np.ndarray = np.ones(len(observations), bool)
    if clip:
        known &= np.abs(observations[:, oracle.env.model.nq - oracle.task.hidden :]).max(1) < clip
    following, paid, over = oracle.step_arrays(observations[known].astype(float), actions[known].astype(float))
    found: dict[str, Any] = {"transitions": len(known), "clipped": float((~known).mean())}
    off = np.abs(following - next_observations[known]).max(1)
    for name, error in (("observation", off), ("reward", np.abs(paid - rewards[known]))):
        error = np.nan_to_num(np.asarray(error), nan=np.inf)
        found[name] = {"median": float(np.median(error)), "largest": float(error.max())} if known.any() else None
    if known.any():
        spread = np.maximum(observations[known].std(0, dtype=float), 1e-9)
        relative = (np.abs(following - next_observations[known]) / spread).max(1)
        found["relative"] = float(np.median(np.nan_to_num(relative, nan=np.inf)))
    return found | {"ends": int((over != ended[known]).sum())}

"""Fitted Q evaluation against exact values of a small known chain, and the case in which it must fail and say so."""

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.policies.fqe import (
    MOST_OUTSIDE,
    Estimates,
    FQEConfig,
    discounted_returns,
    fitted_q_evaluation,
    select,
    share_outside,
)
from embodied.policies.train import TransitionData

STATES, SLIP, DISCOUNT, LENGTH = 6, 0.2, 0.9, 25
CONFIG = FQEConfig(discount=DISCOUNT, members=5, steps=1500, batch_size=128, learning_rate=1e-3, hidden_sizes=(64, 64),
                   target_update_rate=0.02)  # fmt: skip


def step(state: int, right: bool, rng: np.random.Generator) -> int:
    move = 1 if right != (rng.random() < SLIP) else -1
    return int(np.clip(state + move, 0, STATES - 1))


def recorded(episodes: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> TransitionData:
    """Random walks on a chain: action above 0 goes right, but for slips; reward 1 where a step ends at the right."""
    rng = np.random.default_rng(seed)
    states, actions, rewards = [], [], []
    for _ in range(episodes):
        state = int(rng.integers(STATES))
        for t in range(LENGTH + 1):
            action = rng.uniform(low, high)
            states.append(state)
            actions.append(action if t < LENGTH else 0.0)
            state = step(state, action > 0, rng)
            rewards.append(float(state == STATES - 1))
    frame = np.flatnonzero(np.arange(len(states)) % (LENGTH + 1) < LENGTH)
    return TransitionData(
        observations=np.eye(STATES, dtype=np.float32)[states],
        actions=np.array(actions, np.float32)[:, None],
        frame=frame,
        next_frame=frame + 1,
        reward=np.array(rewards, np.float32)[frame],
        masks=np.ones(len(frame), np.float32),
        episode=frame // (LENGTH + 1),
    )


def exact(right: np.ndarray, discount: float = DISCOUNT) -> float:
    """Mean over the states of the value of the policy that goes right where `right`: (I - discount P) V = r."""
    matrix = np.zeros((STATES, STATES))
    for s in range(STATES):
        for move, share in ((1, 1 - SLIP), (-1, SLIP)):
            matrix[s, np.clip(s + (move if right[s] else -move), 0, STATES - 1)] += share
    reward = matrix[:, -1]
    return float(np.linalg.solve(np.eye(STATES) - discount * matrix, reward).mean())


POLICIES = np.array([[s >= k for s in range(STATES)] for k in (0, 3, 6)])  # k = 0: always right, 6: always left


def acted(data: TransitionData, policies: np.ndarray = POLICIES) -> np.ndarray:
    states = data.observations.argmax(1)
    return np.where(policies[:, states], 0.5, -0.5)[..., None].astype(np.float32)  # (P, F, 1)


@pytest.fixture(scope="module")
def estimates() -> Estimates:
    data = recorded(120)
    return fitted_q_evaluation(data, acted(data), CONFIG)


def test_values_and_ranking_agree_with_the_truth(estimates: Estimates) -> None:
    truth = [exact(policy) for policy in POLICIES]
    assert truth == sorted(truth, reverse=True)
    assert estimates.ranking() == [0, 1, 2]
    for policy, value in enumerate(truth):
        interval = estimates.interval(policy)
        assert interval["estimate"] == pytest.approx(value, abs=0.08 * truth[0])
        assert interval["low"] - 0.3 < value < interval["high"] + 0.3
    assert (estimates.outside < 0.1).all()
    assert all(estimates.settled(policy) for policy in range(3))


def test_the_rule_gives_last_and_best_with_their_difference(estimates: Estimates) -> None:
    found = select(estimates, {0: 100, 1: 300, 2: 300})
    assert (found["best"], found["last"]) == (0, 2)
    assert found["resolved"]
    gap = found["best_minus_last"]
    assert gap["low"] < exact(POLICIES[0]) - exact(POLICIES[2]) < gap["high"] + 0.5
    same = select(estimates, {0: 5, 1: 1, 2: 1})
    assert same["best_minus_last"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    assert same["members_that_agree"] == 1.0


def test_a_tie_is_not_resolved(estimates: Estimates) -> None:
    noise = np.random.default_rng(0).normal(size=(3, 5))
    found = select(Estimates(noise, np.zeros(3), np.zeros(3), 0.0, 0.0), {0: 1, 1: 1, 2: 1})
    assert found["best"] != found["last"]
    assert not found["resolved"]


def test_common_numbers_make_differences_sharper_than_values(estimates: Estimates) -> None:
    gap = estimates.difference(0, 1)
    alone = estimates.interval(0)
    other = estimates.interval(1)
    assert gap["high"] - gap["low"] < np.hypot(alone["high"] - alone["low"], other["high"] - other["low"])


def test_where_it_fails_actions_nobody_took() -> None:
    """The stated failure: the data only ever goes left, so it is the same whether actions above 0 go right or left too.

    The truth of "always right" is that of the chain in one world and that of "always left" in the other. One estimate
    cannot be near both; `outside` is what tells.
    """
    data = recorded(60, -1.0, -0.3)
    found = fitted_q_evaluation(data, acted(data, POLICIES[[0, 2]]), CONFIG)
    right, left = exact(POLICIES[0]), exact(POLICIES[2])
    interval = found.interval(0)
    assert max(abs(interval["estimate"] - right), abs(interval["estimate"] - left)) >= (right - left) / 2
    assert found.outside[0] > MOST_OUTSIDE
    assert found.outside[1] < 0.1  # "always left" is what was recorded, and is judged well
    assert found.interval(1)["estimate"] == pytest.approx(left, abs=0.4)


def test_a_seed_repeats_and_a_policy_does_not_depend_on_its_neighbours() -> None:
    data = recorded(20)
    quick = FQEConfig(discount=DISCOUNT, members=2, steps=20, batch_size=32, hidden_sizes=(16,))
    both = fitted_q_evaluation(data, acted(data), quick, seed=3)
    np.testing.assert_array_equal(both.values, fitted_q_evaluation(data, acted(data), quick, seed=3).values)
    alone = fitted_q_evaluation(data, acted(data)[1:2], quick, seed=3)
    np.testing.assert_allclose(alone.values[0], both.values[1], rtol=1e-5)
    assert not np.allclose(both.values, fitted_q_evaluation(data, acted(data), quick, seed=4).values)


def test_discounted_returns_by_hand() -> None:
    data = recorded(2)
    reward = np.zeros(len(data.frame), np.float32)
    reward[[1, LENGTH]] = 1.0  # the second step of the first episode, the first of the second
    data = TransitionData(**{**vars(data), "reward": reward})
    found = discounted_returns(data, 0.5)
    np.testing.assert_allclose(found[[0, 1, 2, LENGTH - 1, LENGTH]], [0.5, 1, 0, 0, 1])


def test_terminations_end_the_value() -> None:
    """One state, reward 1, every step terminal: the value is 1, not 1 / (1 - discount)."""
    frame = np.arange(0, 40, 2)
    data = TransitionData(
        np.ones((40, 1), np.float32), np.zeros((40, 1), np.float32), frame, frame + 1, np.ones(20, np.float32),
        np.zeros(20, np.float32), np.arange(20),
    )  # fmt: skip
    quick = FQEConfig(members=2, steps=400, batch_size=16, hidden_sizes=(16,), learning_rate=3e-3)
    found = fitted_q_evaluation(data, np.zeros((1, 40, 1), np.float32), quick)
    assert found.values[0] == pytest.approx(1.0, abs=0.05)
    assert found.recorded == 1.0


def test_values_that_have_not_settled_are_known() -> None:
    """Four time constants of the target network see four steps ahead; the value lies a hundred ahead."""
    data = recorded(30)
    hasty = FQEConfig(discount=0.99, members=2, steps=200, batch_size=64, hidden_sizes=(32,), target_update_rate=0.02)
    found = fitted_q_evaluation(data, acted(data), hasty)
    assert found.left == pytest.approx(0.99**4)
    assert not found.settled(0)
    assert found.interval(0)["estimate"] < 0.5 * exact(POLICIES[0], 0.99)
    still = Estimates(np.ones((1, 2)), np.zeros(1), np.array([0.06]), 0.0, 0.0)
    assert not still.settled(0)


def test_outside_counts_single_steps() -> None:
    data = recorded(40, -1.0, 0.0)
    half = np.where(np.arange(len(data.actions)) % 2 == 0, 1.0, -0.5)[None, :, None].astype(np.float32)
    assert share_outside(data, half)[0] == pytest.approx(0.5, abs=0.1)
    assert share_outside(data, data.actions[None])[0] < 0.03


def test_what_cannot_be_evaluated_is_refused() -> None:
    data = recorded(3)
    with pytest.raises(InputError, match="ask for"):
        fitted_q_evaluation(data, np.zeros((2, 5, 1)), CONFIG)
    with pytest.raises(InputError, match="two members"):
        fitted_q_evaluation(data, acted(data), FQEConfig(members=1))
    with pytest.raises(InputError, match="one episode is not enough"):
        fitted_q_evaluation(recorded(1), acted(recorded(1)), CONFIG)

"""An annotator that knows the true reward, with the faults of people: mistakes, ties, myopia, skipping.

B-Pref (Lee et al. 2021, "B-Pref: Benchmarking Preference-Based Reinforcement Learning"), section 3.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.contracts.preferences import Answer, Segment, Verdict


@dataclasses.dataclass(frozen=True)
class ScriptedConfig:
    """How it errs.

    Attributes:
        mistakes: probability that a side is given the wrong way round.
        rationality: beta of P(second) = sigmoid(beta * (R2 - R1)); infinity always says the better one.
        myopia: each reward counts gamma^(T - 1 - t) as much, for gamma in (0, 1]; 1 sees all alike.
        tie_threshold: no preference where the returns differ by less.
        skip_threshold: abstains where both returns are below.
    """

    mistakes: float = 0.0
    rationality: float = float("inf")
    myopia: float = 1.0
    tie_threshold: float = 0.0
    skip_threshold: float = -float("inf")
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mistakes <= 1 or not 0 < self.myopia <= 1 or self.rationality <= 0:
            raise ConfigError("mistakes must lie in [0, 1], myopia in (0, 1], rationality above 0.")


class ScriptedAnnotator:
    """Compares true returns. Its draws depend on seed, pair and sample alone, not on the order of asking.

    Args:
        reward: (F,) true reward or progress of every frame of the store.
        source: names it in the provenance, for example a label set.
    """

    sees, workers = False, 1

    def __init__(self, reward: np.ndarray, config: ScriptedConfig, source: str) -> None:
        self._reward, self._config = np.asarray(reward, np.float64), config
        self.name = f"scripted:{source}"
        settings = {key: repr(value) for key, value in dataclasses.asdict(config).items()}
        truth = hashlib.sha256(np.ascontiguousarray(self._reward).tobytes()).hexdigest()  # rows mean others elsewhere
        self.identity: Mapping[str, Any] = {"annotator": "scripted", "source": source, "truth": truth, **settings}

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        del task
        c = self._config
        returns = [self._return(first), self._return(second)]
        rows = [int(first.rows[0]), int(second.rows[0])]
        # The same draws in both orders: a mistake is about the pair, a liking for one side would be another fault.
        rng = np.random.default_rng([c.seed, sample, min(rows), max(rows)])
        luck, slip = rng.random(2)
        record = {"returns": returns}
        if max(returns) < c.skip_threshold:
            return Verdict(Answer.ABSTAINED, "both segments show too little", True, record)
        difference = returns[1] - returns[0]
        if abs(difference) < c.tie_threshold or difference == 0:
            return Verdict(Answer.NO_PREFERENCE, "", True, record)
        better = Answer.SECOND if difference > 0 else Answer.FIRST
        right = 1.0 if np.isinf(c.rationality) else 1 / (1 + np.exp(-c.rationality * abs(difference)))
        wrong = (luck >= right) != (slip < c.mistakes)
        return Verdict(better.swapped if wrong else better, "", True, record)

    def _return(self, segment: Segment) -> float:
        weights = self._config.myopia ** np.arange(len(segment.rows) - 1, -1, -1.0)
        return float((weights * self._reward[segment.rows]).sum())

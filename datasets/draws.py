"""Random draws that a resumed run repeats: functions of (seed, step) and of what is drawn, of nothing else."""

import enum

import numpy as np


class Stream(enum.IntEnum):
    """What is drawn. Each kind has numbers of its own under one seed, so that no draw repeats another's."""

    BATCHES = 0
    GOALS = 1
    SPLIT = 2
    SEGMENTS = 3
    QUANTILES = 4
    CROPS = 7
    SMOOTHING = 8
    ACTIONS = 9
    UNIFORM_ACTIONS = 10
    FLOW_NOISE = 11
    FLOW_TIME = 12
    FLOW_ACTING = 13
    DROPOUT = 14
    DYNAMICS = 21
    ROLLOUTS = 22
    ROLLOUT_ROWS = 23
    HINDSIGHT = 31


def philox(seed: int, step: int, stream: Stream) -> np.random.Generator:
    """The generator of one step: the same after a resume, whatever was drawn before. Streams do not overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, stream]))

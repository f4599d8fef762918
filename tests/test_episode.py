import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last

SPEC = DatasetSpec(
    observations={"joint_position": ArraySpec((2,), unit="rad")},
    images={"wrist": ArraySpec((4, 4, 3), "uint8")},
    action=ActionSpec((1,)),
    control_dt=0.1,
)


def make_episode(steps: int = 3, terminated: bool = False) -> Episode:
    rows = steps + 1
    step_valid, ended, cut = end_flags(steps, rows, terminated)
    return Episode(
        observations={"joint_position": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)},
        images={"wrist": np.zeros((rows, 4, 4, 3), np.uint8)},
        action=padded_last(np.ones((steps, 1), np.float32), rows),
        step_valid=step_valid,
        terminated=ended,
        truncated=cut,
        timestamp=np.arange(rows) * 0.1,
        source_id="demo_7",
    )


def test_good_episode_passes():
    make_episode().check(SPEC)
    make_episode(terminated=True).check(SPEC)


def test_end_flags_with_and_without_final_observation():
    valid, ended, cut = end_flags(3, 4, terminated=False)
    assert valid.tolist() == [True, True, True, False]
    assert cut.tolist() == [False, False, True, False]
    assert not ended.any()
    valid, ended, cut = end_flags(3, 3, terminated=False)
    assert valid.tolist() == [True, True, False]
    assert cut.tolist() == [False, False, True]
    valid, ended, cut = end_flags(3, 3, terminated=True)
    assert valid.all()
    assert ended.tolist() == [False, False, True]
    assert not cut.any()


def test_padded_last_adds_one_zero_row():
    padded = padded_last(np.ones((2, 3), np.float32), 3)
    assert padded.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


def nan_action(e):
    e.action[1, 0] = np.nan


def nan_observation(e):
    e.observations["joint_position"][2, 1] = np.inf


def no_actions(e):
    e.action = None


def unknown_camera(e):
    e.images = {"other": e.images["wrist"]}


def wrong_width(e):
    e.action = np.ones((4, 2), np.float32)


def float_images(e):
    e.images["wrist"] = e.images["wrist"].astype(np.float32)


def short_timestamps(e):
    e.timestamp = e.timestamp[:-1]


def time_backwards(e):
    e.timestamp[2] = 0.0


def both_ends(e):
    e.terminated[2] = True


def ends_early(e):
    e.truncated[:] = [True, False, False, False]


def valid_without_successor(e):
    e.step_valid[-1] = True


def unexpected_reward(e):
    e.reward = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_action, r"'action' holds nan at index \(1, 0\)"),
        (nan_observation, r"'observation joint_position' holds inf at index \(2, 1\)"),
        (no_actions, "no actions"),
        (unknown_camera, "cameras"),
        (wrong_width, r"shape \(2,\) per step; the spec says \(1,\)"),
        (float_images, "float32; images are uint8"),
        (short_timestamps, "'timestamp' has 3 rows"),
        (time_backwards, "timestamps go back at frame 2"),
        (both_ends, "Terminal beats timeout"),
        (ends_early, "ends at frame 0 but has 4"),
        (valid_without_successor, "no successor"),
        (unexpected_reward, "reward is present"),
    ],
)
def test_bad_episode_is_refused_by_name(spoil, message):
    episode = make_episode()
    spoil(episode)
    with pytest.raises(InputError, match=message) as caught:
        episode.check(SPEC)
    assert "demo_7" in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_single_row_without_terminal_has_no_actions():
    episode = make_episode(steps=1)
    for name in ("action", "step_valid", "terminated", "truncated", "timestamp"):
        setattr(episode, name, getattr(episode, name)[1:])
    episode.observations = {k: v[1:] for k, v in episode.observations.items()}
    episode.images = {k: np.asarray(v)[1:] for k, v in episode.images.items()}
    with pytest.raises(InputError, match="no actions"):
        episode.check(SPEC)

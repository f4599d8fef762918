"""Every set of real data is imported by some test, or refused with the right reason; a new set is noticed."""

from pathlib import Path

import pytest

from embodied.contracts.errors import InputError
from embodied.datasets.importer import import_dataset

TESTS = Path(__file__).parent
DATA = TESTS.parents[1] / "shared" / "data"
# set -> the tests that import it and hold it against its facts.json
IMPORTED = {
    "hdf5-d4rl-hopper-sac-replay": ["test_read_d4rl.py"],
    "hdf5-d4rl-style": ["test_read_d4rl.py"],
    "hdf5-robomimic-franka-stack": ["test_read_robomimic.py"],
    "hdf5-robosuite-raw-demos": ["test_read_robosuite.py"],
    "lerobot-tiny-fixtures": ["test_read_lerobot.py"],
    "lerobot-v21-g1-real": ["test_read_lerobot.py"],
    "lerobot-v30-reachy2-novideo": ["test_read_lerobot.py"],
    "rlds-bridge-debug": ["test_read_rlds.py"],
    "rlds-bridge-debug-val": ["test_read_rlds.py"],
    "rosbag-plotjuggler-samples": ["test_bag_real.py"],
    "rosbag1-compressed": ["test_bag_real.py"],
    "rosbag2-official": ["test_bag_real.py"],
    "rosbag2-official-edge": ["test_bag_real.py"],
    "rosbag2-sensor-zoo": ["test_bag_real.py"],
    "rosbag2-sim-jointstate-imu": ["test_bag_real.py"],
    "video-human": ["test_read_video.py"],
    "video-metaworld-rollouts": ["test_read_video.py"],
    "video-robot-tasks": ["test_read_video.py"],
}
# No recordings of episodes in a format there is a reader for.
REFUSED = {
    "arm-descriptions": "of no format known here",
    "eval-d3rlpy-iql": "of no format known here",
    "eval-d3rlpy-td3bc": "of no format known here",
    "eval-rebrac-scores": "of no format known here",
    "eval-td3-curves": "of no format known here",
    "eval-tdmpc2-metaworld": "of no format known here",
    "eval-tdmpc2-other": "of no format known here",
    "npz-adroit-door-human": "of no format known here",
    "pref-ipl-segments": "of no format known here",
    "pref-pt-human": "of no format known here",
    "pref-unirlhf-human-script": "of no format known here",
    "vlm-judgements-libero": "of no format known here",
}
# Folders of several recordings: the message says which to import one at a time.
SEVERAL = {
    "hdf5-d4rl-hopper-sac-replay": "hopper-replay.hdf5 (d4rl)",
    "hdf5-d4rl-style": "dataset_expert_1000.hdf5 (d4rl)",
    "hdf5-robomimic-franka-stack": "generated_dataset_small.hdf5 (robomimic)",
    "hdf5-robosuite-raw-demos": "v1.0/door/demo.hdf5 (robosuite)",
    "lerobot-tiny-fixtures": "datasets/lerobotv2 (lerobot)",
}

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="real data in ../shared/data is absent")


def test_every_set_is_accounted_for() -> None:
    assert {path.name for path in DATA.iterdir() if path.is_dir()} == {*IMPORTED, *REFUSED}
    for name, files in IMPORTED.items():
        for file in files:
            assert name in (TESTS / file).read_text(), f"{file} does not read {name}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_recording_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        import_dataset(DATA / name, tmp_path / "s")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", SEVERAL)
def test_a_folder_of_recordings_says_what_it_holds(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is a folder of recordings") as caught:
        import_dataset(DATA / name, tmp_path / "s")
    assert SEVERAL[name] in str(caught.value)

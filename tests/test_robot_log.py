"""The log of the simulated robot tells what the arm did, also after a crash."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import JOINTS, RobotRig

from embodied.contracts.errors import InputError
from embodied.robot_bridge.robot_log import read_robot_log
from embodied.robot_bridge.robot_options import RobotOptions

# ---- the log


def test_the_log_tells_what_the_arm_did(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, RobotOptions(log=tmp_path / "robot.log"))
    rig.run(10)
    rig.move([0.5, -0.2, 0.08], 0.5)
    begin = rig.clock.seconds
    rig.run(60)
    rig.inject("freeze_state")
    rig.run(20)
    rig.robot.close()
    log = read_robot_log(tmp_path / "robot.log")
    assert log.joints == JOINTS
    assert len(log.time) == pytest.approx(0.9 / 0.004, abs=2)
    np.testing.assert_allclose(np.diff(log.time), 0.004, atol=1e-9)
    np.testing.assert_allclose(np.diff(log.wall), 0.004, atol=1e-9)
    assert (log.late + 1e-6 >= 0).all()
    assert (log.late < 0.0145).all()  # a tick is 10 ms, a step 4
    assert log.wall[-1] == pytest.approx(rig.clock.seconds, abs=0.005)
    assert log.stamp_ns[-1] == pytest.approx(rig.clock.stamp(), abs=5e6)
    # a cubic of 0.4 rad in 0.5 s: 1.2 rad/s at most, commanded within 1e-9 and followed by the servo
    commanded = np.diff(log.command[:, 0]) / 0.004
    assert commanded.max() == pytest.approx(1.2, rel=0.01)
    assert log.velocity[:, 0].max() == pytest.approx(1.2, rel=0.05)
    np.testing.assert_allclose(log.position[-1], [0.5, -0.2, 0.08], atol=2e-3)
    np.testing.assert_allclose(log.ctrl[-1], [0.5, -0.2, 0.04, -0.04], atol=1e-6)
    assert set(log.fault[:150]) == {"none"}
    assert log.fault[-1] == "freeze_state"
    assert log.accepted[-1] == 1
    assert 0.45 < log.time_to_rest(begin) < 0.6
    assert log.between(begin - 0.05, begin).wall.size == pytest.approx(12, abs=1)
    assert log.time_to_rest(begin + 0.2, speed=0.01) == pytest.approx(log.time_to_rest(begin) - 0.2, abs=1e-6)


def test_a_log_that_was_cut_off_reads_up_to_there_and_others_are_refused(tmp_path: Path) -> None:
    rig = RobotRig(tmp_path, RobotOptions(log=tmp_path / "robot.log"))
    rig.run(20)
    rig.robot.close()
    whole = (tmp_path / "robot.log").read_bytes()
    (tmp_path / "cut.log").write_bytes(whole[:-7])
    assert len(read_robot_log(tmp_path / "cut.log").time) == len(read_robot_log(tmp_path / "robot.log").time) - 1
    (tmp_path / "other").write_text("hello\n")
    for name, reason in (("other", "is no log"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=reason):
            read_robot_log(tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        RobotRig(tmp_path, RobotOptions(log=tmp_path / "no" / "robot.log"))


def test_a_killed_process_loses_a_tenth_of_a_second(tmp_path: Path) -> None:
    path = tmp_path / "robot.log"
    write = (
        "import sys, time, pathlib\n"
        "from embodied.robot_bridge.robot_log import RobotLog\n"
        "log = RobotLog(pathlib.Path(sys.argv[1]), ['a'], 1, ['none'])\n"
        "while True:\n"
        "    log.write('none', wall=time.monotonic(), position=[1.5])\n"
        "    time.sleep(0.002)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", write, str(path)])
    try:
        end = time.monotonic() + 30
        while not path.exists() or path.stat().st_size < 5000:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        process.wait(10)
    log = read_robot_log(path)
    assert len(log.wall) > 50
    assert killed - log.wall[-1] < 0.5  # 0.1 s, and what a busy machine adds
    np.testing.assert_array_equal(log.position, 1.5)

"""Pictures are drawn beside the physics: same pixels, no waiting, and what goes wrong is said."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import write_scene

from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.simulated_cameras import SimulatedCameras, camera_matrix


def arrive(pictures: list, count: int) -> None:
    end = time.monotonic() + 20
    while len(pictures) < count and time.monotonic() < end:
        time.sleep(0.002)
    assert len(pictures) == count


@pytest.fixture
def arm(tmp_path: Path) -> SimulatedArm:
    return SimulatedArm(load_scene(write_scene(tmp_path)))


def test_both_ways_of_drawing_give_the_same_pixels(arm: SimulatedArm) -> None:
    pictures: list = []

    def keep(name: str, stamp_ns: int, pixels: np.ndarray) -> None:
        pictures.append((name, stamp_ns, pixels.copy()))

    for threaded in (True, False):
        arm.reset(arm.scene.initial)
        cameras = SimulatedCameras(arm, keep, threaded)
        for _ in range(50):
            arm.advance(np.array([0.6, 0.3, 0.08]))
        cameras.draw(["eye"], 7)
        for _ in range(50):  # what happens later is not in the picture
            arm.advance(np.array([-0.6, 0.3, 0.0]))
        arrive(pictures, len(pictures) if not threaded else 1)
        cameras.close()
    (name, stamp, first), (_, _, second) = pictures
    assert (name, stamp, first.shape) == ("eye", 7, (64, 64, 3))
    np.testing.assert_array_equal(first, second)


def test_a_picture_shows_the_moment_it_was_asked_for(arm: SimulatedArm) -> None:
    gate, pictures = threading.Event(), []

    def slow(name: str, stamp_ns: int, pixels: np.ndarray) -> None:
        pictures.append(pixels.copy())
        gate.wait(20)

    cameras = SimulatedCameras(arm, slow, threaded=True)
    cameras.draw(["eye", "eye"], 1)
    for _ in range(100):  # between the first picture and the second
        arm.advance(np.array([0.6, 0.3, 0.08]))
    gate.set()
    arrive(pictures, 2)
    np.testing.assert_array_equal(*pictures)
    cameras.close()


def test_physics_does_not_wait_and_a_late_picture_is_counted(arm: SimulatedArm) -> None:
    gate, pictures = threading.Event(), []

    def slow(name: str, stamp_ns: int, pixels: np.ndarray) -> None:
        gate.wait(20)
        pictures.append(stamp_ns)

    cameras = SimulatedCameras(arm, slow, threaded=True)
    for stamp in (1, 2, 3):
        cameras.draw(["eye"], stamp)  # returns though the first is not done
    assert cameras.skipped == 2
    assert pictures == []
    gate.set()
    arrive(pictures, 1)
    assert pictures == [1]
    cameras.close()


def test_what_went_wrong_on_the_drawing_thread_is_raised_where_pictures_are_asked_for(arm: SimulatedArm) -> None:
    def broken(name: str, stamp_ns: int, pixels: np.ndarray) -> None:
        raise RuntimeError("no more pictures")

    cameras = SimulatedCameras(arm, broken, threaded=True)

    def keep_asking() -> None:
        for _ in range(1000):
            cameras.draw(["eye"], 1)
            time.sleep(0.01)

    with pytest.raises(RuntimeError, match="no more pictures"):
        keep_asking()
    cameras.close()


def test_a_camera_matrix_is_that_of_a_pinhole() -> None:
    matrix = camera_matrix(90.0, 640, 480)
    np.testing.assert_allclose(matrix, [[240, 0, 319.5], [0, 240, 239.5], [0, 0, 1]])

"""Pictures of the simulated cameras, drawn in a thread of their own so that joint states never wait for them."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError
from embodied.robot_bridge.scene import RenderSettings
from embodied.robot_bridge.simulated_arm import SimulatedArm, load_mujoco

DRAWING_NICENESS = 10
Deliver = Callable[[str, int, np.ndarray], None]


def camera_matrix(fovy_deg: float, width: int, height: int) -> np.ndarray:
    """K (3, 3) of a MuJoCo camera [px]; pixel centres lie at whole numbers, as in OpenCV and ROS."""
    focal = height / 2 / np.tan(np.radians(fovy_deg) / 2)
    return np.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])


class SceneRenderer:
    """Pictures of one size, with the pixels that the scene's settings say. Belongs to the thread that makes it."""

    def __init__(self, model: Any, height: int, width: int, settings: RenderSettings) -> None:
        mujoco = load_mujoco()
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        model.vis.quality.offsamples = settings.offsamples
        if not settings.flags.get("shadow", True):
            model.vis.quality.shadowsize = 0
        try:
            self._renderer = mujoco.Renderer(model, height, width, max_geom=settings.max_geom)
        except Exception as error:
            raise EmbodiedError(
                f"MuJoCo cannot open an off-screen {os.environ['MUJOCO_GL']} context: {error}\n"
                "Install Mesa (apt-get install libegl1 libgl1-mesa-dri) or set MUJOCO_GL=osmesa."
            ) from error
        for flag, on in settings.flags.items():
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag.upper()}")] = on
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = settings.geomgroup
        self._option.sitegroup[:] = settings.sitegroup

    def render(self, data: Any, camera: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        self._renderer.update_scene(data, camera, self._option)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()


class SimulatedCameras:
    """Draws an arm's cameras.

    Args:
        deliver: gets name, stamp [ns] and (H, W, 3) uint8 of every picture, on the drawing thread.
        threaded: draw beside the physics. A picture that falls due while the last ones are still being drawn is left
            out and counted. Otherwise `draw` draws at once, for tests under virtual time.

    Attributes:
        skipped: how many times the cameras were not ready.
    """

    def __init__(self, arm: SimulatedArm, deliver: Deliver, threaded: bool) -> None:
        self._arm, self._deliver = arm, deliver
        self._renderers: dict[tuple[int, int], SceneRenderer] = {}
        self.skipped = 0
        self._thread: threading.Thread | None = None
        if threaded and arm.scene.cameras:
            self._data = arm.new_data()
            self._wishes: queue.Queue[tuple[Sequence[str], int] | None] = queue.Queue(1)
            self._idle = threading.Event()
            self._failure: Exception | None = None
            self._thread = threading.Thread(target=self._work, name="cameras", daemon=True)
            self._thread.start()
            self._idle.wait()  # the contexts open now, not in the first camera period
            self._check()

    def draw(self, names: Sequence[str], stamp_ns: int) -> None:
        """Pictures of this moment. Raises what went wrong with the last ones."""
        if self._thread is None:
            for name in names:
                self._deliver(name, stamp_ns, self._render(self._arm.data, name))
            return
        self._check()
        if not self._idle.is_set():
            self.skipped += 1
            return
        self._idle.clear()
        self._arm.copy_positions(self._data)
        self._wishes.put((tuple(names), stamp_ns))

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _render(self, data: Any, name: str) -> np.ndarray:
        camera = self._arm.scene.cameras[name]
        size = (camera.height, camera.width)
        if size not in self._renderers:
            self._renderers[size] = SceneRenderer(self._arm.model, *size, self._arm.scene.render)
        return self._renderers[size].render(data, camera.camera)

    def _work(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # Linux: where cores are scarce, physics goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), DRAWING_NICENESS)
        try:
            for name in self._arm.scene.cameras:
                self._render(self._data, name)
            self._idle.set()
            while (wish := self._wishes.get()) is not None:
                self._arm.place(self._data)
                for name in wish[0]:
                    self._deliver(name, wish[1], self._render(self._data, name))
                self._idle.set()
        except Exception as error:  # raised where the pictures are asked for
            self._failure = error
        finally:
            self._close_contexts()
            self._idle.set()

    def _close_contexts(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    def close(self) -> None:
        if self._thread is None:
            self._close_contexts()
        elif self._thread.is_alive():
            self._wishes.put(None)
            self._thread.join()

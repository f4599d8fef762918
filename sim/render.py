"""Off-screen pictures of a MuJoCo scene, fast in software: only what a small training image needs is drawn."""

import atexit
import importlib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError, InputError, MissingExtraError, suggest

# Stored with every dataset: other flags give other pixels. `scene.json` carries them to the MuJoCo robot.
RENDER_FLAGS: dict[str, bool] = {"shadow": False, "reflection": False, "haze": False, "skybox": False}
HIDDEN_GROUPS = (0,)  # of geoms, if there are others: robosuite's collision shapes. Sites are never drawn
_CULLED_GROUP = 5


def use_software_gl() -> None:
    """Choose EGL before MuJoCo is imported, and one thread for Mesa's rasteriser, unless the user chose already."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    os.environ.setdefault("LP_NUM_THREADS", "1")


def load_mujoco() -> Any:
    """The mujoco module, imported once the GL backend is chosen."""
    use_software_gl()
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise MissingExtraError("mujoco", "sim", "simulation") from error


class FastRenderer:
    """Renders named cameras of one model at one size.

    Geoms outside the camera's view are skipped before the draw call (software GL pays for every triangle sent to it);
    the pixels are those of an unculled draw with the same flags.

    Args:
        model: `mujoco.MjModel`; its off-screen buffer and sample count are set to the image's size and 0.
        height, width: image size [px].
    """

    def __init__(self, model, height: int, width: int) -> None:
        mujoco = load_mujoco()
        self._model, self._size = model, (height, width)
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 0
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:
            raise EmbodiedError(
                f"MuJoCo cannot open an off-screen {os.environ['MUJOCO_GL']} context: {error}\n"
                "Install Mesa (apt-get install libegl1 libgl1-mesa-dri) or set MUJOCO_GL=osmesa."
            ) from error
        # At interpreter exit, before MuJoCo's own hook ends the display that freeing the context needs: hooks run in
        # reverse, and its was set when the renderer was made. A finalizer's own hook may be older than that.
        self._close = weakref.finalize(self, self._renderer.close)
        self._close.atexit = False
        atexit.register(self._close)
        for flag, on in RENDER_FLAGS.items():
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag.upper()}")] = on
        self._option = mujoco.MjvOption()
        hidden = () if np.isin(model.geom_group, HIDDEN_GROUPS).all() else HIDDEN_GROUPS
        for group in (*hidden, _CULLED_GROUP):
            self._option.geomgroup[group] = 0
        self._option.sitegroup[:] = 0
        self._groups = model.geom_group.copy()
        # Planes and infinite geoms report a bounding radius of 0: never culled.
        self._radius = np.where(model.geom_rbound > 0, model.geom_rbound, np.inf)

    def _outside(self, data, camera_id: int) -> np.ndarray:
        """(ngeom,) bool: bounding sphere wholly outside the camera's frustum."""
        height, width = self._size
        relative = (data.geom_xpos - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)
        depth = -relative[:, 2]
        tangent_y = np.tan(np.deg2rad(self._model.cam_fovy[camera_id]) / 2)
        outside = depth < -self._radius
        for axis, tangent in ((0, tangent_y * width / height), (1, tangent_y)):
            distance = (np.abs(relative[:, axis]) - depth * tangent) / np.sqrt(1 + tangent**2)
            outside |= distance > self._radius
        return outside

    def render(self, data, camera: str) -> np.ndarray:
        """(H, W, 3) uint8 picture of `data` from `camera`."""
        camera_id = self._model.camera(camera).id
        try:
            self._model.geom_group[:] = np.where(self._outside(data, camera_id), _CULLED_GROUP, self._groups)
            self._renderer.update_scene(data, camera_id, self._option)
        finally:
            self._model.geom_group[:] = self._groups
        return self._renderer.render().copy()

    def close(self) -> None:
        """Free the GL context; called twice or at interpreter exit, it does no harm."""
        self._close()


def check_views(env_id: str, known: Mapping[str, str], cameras: Sequence[str], image_size: int) -> None:
    """Raise InputError for a camera that is not there or a size that is none."""
    for camera in cameras:
        if camera not in known:
            raise InputError(f"{env_id} has no camera '{camera}'.{suggest(camera, known)}")
    if image_size < 1:
        raise InputError(f"An image size of {image_size} is not possible; give at least 1 pixel.")


class Pictured:
    """An environment's pictures, `_size` pixels square; the renderer is opened for the first.

    Attributes:
        model, data: MuJoCo's.
        camera_names: our name of each camera -> the model's.
    """

    model: Any
    data: Any
    camera_names: Mapping[str, str]
    _size: int
    _renderer: FastRenderer | None = None

    def render(self, camera: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        if self._renderer is None:
            self._renderer = FastRenderer(self.model, self._size, self._size)
        return self._renderer.render(self.data, self.camera_names[camera])

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

"""The physics behind the simulated robot: a scene's model, its joints by ROS name, what touches it. No I/O."""

import os
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError, suggest
from embodied.robot_bridge.scene import Scene, SceneState

CONTROL_DT = 0.004  # controllers write to the actuators this often, or faster for a higher state rate [s]
_IMMOVABLE = 1e9  # inertia of a joint that an obstacle holds [kg·m²]


def use_software_gl() -> None:
    """Draw without a display, on one core, unless the user chose otherwise; counts before mujoco is first imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's rasteriser would otherwise take every core


def load_mujoco() -> Any:
    """The mujoco package, set up to draw without a display."""
    use_software_gl()
    try:
        import mujoco
    except ImportError as error:
        raise MissingExtraError("mujoco", "ros", "the MuJoCo robot") from error
    return mujoco


class SimulatedArm:
    """Model and data of a scene.

    Args:
        control_dt: longest control step [s]; it becomes a whole number of the scene's time steps.

    Attributes:
        names: ROS joints, the arm's and then the gripper's.
        control_dt: length of a control step [s].
        target: (J,) what holds the state of the last reset.
    """

    def __init__(self, scene: Scene, control_dt: float = CONTROL_DT) -> None:
        mujoco = load_mujoco()
        self._mujoco, self.scene = mujoco, scene
        try:
            self.model = mujoco.MjModel.from_xml_path(str(scene.xml))
            joints = [self.model.joint(j.joint) for j in scene.joints.values()]
            actuators = [self.model.actuator(j.actuator).id for j in scene.joints.values()]
            fingers = [(self.model.joint(n), g) for n, g in (scene.gripper.joints if scene.gripper else {}).items()]
            grips = [
                (self.model.actuator(n).id, g) for n, g in (scene.gripper.actuators if scene.gripper else {}).items()
            ]
            self.places = {n: ("body", self.model.body(b).id) for n, b in scene.bodies.items()}
            self.places |= {n: ("site", self.model.site(s).id) for n, s in scene.sites.items()}
            self._base = self.model.body(scene.base).id if scene.base else 0
            self._tool = self.model.site(scene.tool).id if scene.tool else None
            for camera in scene.cameras.values():
                self.model.camera(camera.camera)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{scene.xml.parent}: scene.json and scene.xml do not fit: {error}") from None
        self.data, self._probe = mujoco.MjData(self.model), mujoco.MjData(self.model)
        self.names = tuple(scene.joints) + ((scene.gripper.name,) if scene.gripper else ())
        self._map_joints(joints, actuators, fingers, grips)
        self._substeps = max(1, int(control_dt / self.model.opt.timestep + 1e-9))
        self.control_dt = self._substeps * self.model.opt.timestep
        self._locked: dict[str, float] = {}
        self._armature = self.model.dof_armature.copy()
        self.reset(scene.initial)

    def _map_joints(self, joints: list, actuators: list[int], fingers: list, grips: list) -> None:
        """Linear maps make a gripper of any number of fingers one joint: read @ qpos, ctrl = drive @ target."""
        count, total = len(joints), len(self.names)
        self._read_position = np.zeros((total, self.model.nq))
        self._read_velocity = np.zeros((total, self.model.nv))
        self._drive = np.zeros((self.model.nu, total))
        self._driven = np.zeros(self.model.nu, bool)
        entries = [(row, joint, 1.0) for row, joint in enumerate(joints)] + [(count, j, g) for j, g in fingers]
        for row, joint, gain in entries:
            self._read_position[row, joint.qposadr[0]] = gain
            self._read_velocity[row, joint.dofadr[0]] = gain
        pairs = [(c, a, 1.0) for c, a in enumerate(actuators)] + [(count, a, g) for a, g in grips]
        for column, actuator, gain in pairs:
            self._drive[actuator, column] = gain
            self._driven[actuator] = True
        self._qpos_of = {name: int(j.qposadr[0]) for name, j in zip(self.names, joints, strict=False)}
        self._dof_of = {name: int(j.dofadr[0]) for name, j in zip(self.names, joints, strict=False)}
        self._arm_dofs = list(self._dof_of.values())
        self._arm_qpos = list(self._qpos_of.values())
        ids = [int(joint.id) for joint in joints]
        span = np.where(self.model.jnt_limited[ids, None], self.model.jnt_range[ids], [-np.inf, np.inf])
        self.low, self.high = span[:, 0], span[:, 1]

    def reset(self, state: SceneState) -> None:
        """Start from `state`, touched by nothing. InputError if a length is wrong."""
        for name, values in (("qpos", state.qpos), ("qvel", state.qvel), ("ctrl", state.ctrl)):
            if len(values) not in (0, len(getattr(self.data, name))):
                raise InputError(
                    f"a reset with {len(values)} numbers in '{name}'; the scene has {len(getattr(self.data, name))}."
                )
        self._mujoco.mj_resetData(self.model, self.data)
        self.release()
        for name, values in (("qpos", state.qpos), ("qvel", state.qvel), ("ctrl", state.ctrl)):
            if len(values):
                getattr(self.data, name)[:] = values
        self._mujoco.mj_forward(self.model, self.data)
        self.target = self.joint_state()[0]
        if state.ctrl:  # the targets that give this ctrl, so that holding does not change it
            self.target = np.linalg.lstsq(self._drive, self.data.ctrl * self._driven, rcond=None)[0]

    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured position and velocity (J,) in the order of `names`."""
        return self._read_position @ self.data.qpos, self._read_velocity @ self.data.qvel

    def advance(self, target: np.ndarray) -> None:
        """Simulate one control step with the servos at `target` (J,)."""
        ctrl = self._drive @ target
        self.data.ctrl[self._driven] = ctrl[self._driven]
        if not self._locked:
            self._mujoco.mj_step(self.model, self.data, nstep=self._substeps)
            return
        for _ in range(self._substeps):
            self._mujoco.mj_step(self.model, self.data)
            for name, position in self._locked.items():
                self.data.qpos[self._qpos_of[name]], self.data.qvel[self._dof_of[name]] = position, 0.0

    # ---- what touches the arm

    def push(self, joint: str, torque: float) -> None:
        """An external torque on an arm joint from now on [N·m]."""
        self.data.qfrc_applied[self._dof(joint)] = torque

    def lock(self, joint: str = "") -> None:
        """An obstacle that no motor moves: the joint, or every arm joint, stays where it is."""
        names = [joint] if joint else list(self._dof_of)
        for name in names:
            self._dof(name)
        self._locked = {name: float(self.data.qpos[self._qpos_of[name]]) for name in names}
        # So heavy that its motor's pull does not shake the other joints either.
        self.model.dof_armature[[self._dof_of[name] for name in names]] = _IMMOVABLE

    def release(self) -> None:
        """Nothing touches the arm any more."""
        self.data.qfrc_applied[:] = 0.0
        self._locked = {}
        self.model.dof_armature[:] = self._armature

    def _dof(self, joint: str) -> int:
        if joint not in self._dof_of:
            raise InputError(f"'{joint}' is no joint of the arm.{suggest(joint, self._dof_of)}")
        return self._dof_of[joint]

    # ---- where things are

    def pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position [m] and quat_xyzw of a tracked body or site in the world."""
        kind, index = self.places[name]
        if kind == "body":
            return self.data.xpos[index], np.roll(self.data.xquat[index], -1)
        return self.data.site_xpos[index], self._quat_xyzw(self.data.site_xmat[index])

    def _quat_xyzw(self, matrix: np.ndarray) -> np.ndarray:
        quat_wxyz = np.zeros(4)
        self._mujoco.mju_mat2Quat(quat_wxyz, np.ascontiguousarray(matrix).reshape(-1))
        return np.roll(quat_wxyz, -1)

    def base_in_world(self) -> tuple[np.ndarray, np.ndarray]:
        """Position [m] and quat_xyzw."""
        return self.data.xpos[self._base], self._quat_xyzw(self.data.xmat[self._base])

    @property
    def has_tool(self) -> bool:
        return self._tool is not None

    def tool_in_base(self) -> tuple[np.ndarray, np.ndarray]:
        """Position [m] and quat_xyzw."""
        assert self._tool is not None
        return self._in_base(self.data.site_xpos[self._tool], self.data.site_xmat[self._tool].reshape(3, 3))

    def camera_in_base(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position [m] and quat_xyzw of a camera's optical frame: z forward, x right, y down."""
        index = self.model.camera(self.scene.cameras[name].camera).id
        optical = self.data.cam_xmat[index].reshape(3, 3) * [1.0, -1.0, -1.0]  # MuJoCo looks along -z, y up
        return self._in_base(self.data.cam_xpos[index], optical)

    def camera_moves(self, name: str) -> bool:
        """Whether it sits on the arm, not in the world."""
        index = self.model.camera(self.scene.cameras[name].camera).id
        return bool(self.model.body_weldid[self.model.cam_bodyid[index]] != 0)

    def fovy(self, name: str) -> float:
        """Vertical field of view of a camera [degrees]."""
        return float(self.model.cam_fovy[self.model.camera(self.scene.cameras[name].camera).id])

    def _in_base(self, position: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        base = self.data.xmat[self._base].reshape(3, 3)
        return base.T @ (position - self.data.xpos[self._base]), self._quat_xyzw(base.T @ matrix)

    def jacobian(self, position: np.ndarray) -> np.ndarray:
        """(6, J) of the tool at arm joint positions (J,): linear over angular, in the base frame."""
        if self._tool is None:
            raise ConfigError(f"{self.scene.xml.parent}: scene.json names no 'tool' site, which a twist command needs.")
        self._place_probe(position)
        jacobian = np.zeros((6, self.model.nv))
        self._mujoco.mj_jacSite(self.model, self._probe, jacobian[:3], jacobian[3:], self._tool)
        base = self._probe.xmat[self._base].reshape(3, 3)
        return np.vstack([base.T @ jacobian[:3, self._arm_dofs], base.T @ jacobian[3:, self._arm_dofs]])

    def tool_rotation(self, position: np.ndarray) -> np.ndarray:
        """(3, 3) from the tool's frame to the base's at arm joint positions (J,)."""
        self._place_probe(position)
        base, tool = self._probe.xmat[self._base], self._probe.site_xmat[self._tool]
        return base.reshape(3, 3).T @ tool.reshape(3, 3)

    def _place_probe(self, position: np.ndarray) -> None:
        self._probe.qpos[:] = self.data.qpos
        self._probe.qpos[self._arm_qpos] = position
        self._mujoco.mj_kinematics(self.model, self._probe)
        self._mujoco.mj_comPos(self.model, self._probe)

    def copy_positions(self, into: Any) -> None:
        """The configuration into another MjData, for drawing while the physics goes on; `place` works out the rest."""
        into.qpos[:], into.time = self.data.qpos, self.data.time
        into.mocap_pos[:], into.mocap_quat[:] = self.data.mocap_pos, self.data.mocap_quat

    def place(self, data: Any) -> None:
        """Where bodies, cameras and lights of a configuration are."""
        self._mujoco.mj_kinematics(self.model, data)
        self._mujoco.mj_comPos(self.model, data)
        self._mujoco.mj_camlight(self.model, data)

    def new_data(self) -> Any:
        return self._mujoco.MjData(self.model)

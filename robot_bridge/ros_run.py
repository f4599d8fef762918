"""`ros2 run embodied safety_node ...` of the ROS 2 package is `python -m embodied.robot_bridge.safety_node ...`."""

import runpy
import sys


def _run(module: str) -> None:
    if "--ros-args" in sys.argv:
        at = sys.argv.index("--ros-args")
        if sys.argv[at + 1 :]:
            print(
                f"ignored: {' '.join(sys.argv[at:])}; names and topics stand in the robot's profile.", file=sys.stderr
            )
        del sys.argv[at:]
    runpy.run_module(f"embodied.robot_bridge.{module}", run_name="__main__", alter_sys=True)


def mujoco_robot() -> None:
    _run("mujoco_robot")


def policy_node() -> None:
    _run("policy_node")


def recorder() -> None:
    _run("recorder")


def safety_node() -> None:
    _run("safety_node")

"""`ros2 launch embodied bridge.launch.py bundle:=DIR profile:=ur5e`: safety, policy, recorder and a simulated robot.

Nothing is armed: `embodied robot watch PROFILE --operate` in another terminal does that, and starts recordings. Where
no robot is on the graph `scene` or `env` starts a simulated one. When one of the processes ends, all do; the safety
process brakes the arm before it leaves. This is no rated safety function.
"""

import shutil
import subprocess
import tempfile

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration

ARGUMENTS = {
    "profile": ("panda-mujoco", "robot profile: a shipped name or a YAML file"),
    "bundle": ("", "policy bundle; empty starts no policy"),
    "domain": ("", "ROS domain; empty takes ROS_DOMAIN_ID"),
    "discovery": ("localhost", "localhost, or subnet to reach other hosts"),
    "transport": ("auto", "auto, dds or rclpy"),
    "speed": ("", "scales velocity, acceleration and jerk limits, in (0, 1]; empty takes the profile's limit_scale"),
    "shadow": ("false", "true: everything runs, nothing is sent to the robot"),
    "record": ("", "folder that gets a bag per episode; empty records nothing"),
    "use_sim_time": ("false", "true: follow /clock"),
    "scene": ("", "folder with scene.xml and scene.json: starts a MuJoCo robot"),
    "env": ("", "environment to simulate, such as robosuite/Lift, instead of a scene"),
}


def processes(context):
    """The processes that the arguments ask for."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    python = shutil.which("python3") or "python3"  # of the active environment: it has the Python packages
    profile = _at_speed(python, given["profile"], given["speed"]) if given["speed"] else given["profile"]
    common = ["--domain", given["domain"]] if given["domain"] else []
    common += ["--discovery", given["discovery"], "--transport", given["transport"]]

    def node(module, *flags):
        sim_time = ["--use-sim-time"] if given["use_sim_time"] == "true" and module != "mujoco_robot" else []
        command = [python, "-m", f"embodied.robot_bridge.{module}", "--profile", profile, *common, *sim_time, *flags]
        return ExecuteProcess(cmd=command, name=module, output="screen", sigterm_timeout="5")

    found = [node("safety_node", *(["--shadow"] if given["shadow"] == "true" else []))]
    if given["bundle"]:
        found.append(node("policy_node", "--bundle", given["bundle"]))
    if given["record"]:
        found.append(node("recorder", "--out", given["record"]))
    if given["scene"]:
        found.append(node("mujoco_robot", "--scene", given["scene"]))
    elif given["env"]:
        flags = ["--env", given["env"], *(["--domain", given["domain"]] if given["domain"] else [])]
        command = [python, "-m", "embodied.cli", "robot", "sim", profile, *flags, "--discovery", given["discovery"]]
        found.append(ExecuteProcess(cmd=command, name="mujoco_robot", output="screen", sigterm_timeout="5"))
    ends = [
        RegisterEventHandler(
            OnProcessExit(target_action=process, on_exit=[EmitEvent(event=Shutdown(reason=process.name))])
        )
        for process in found
    ]
    return [*ends, *found]


def _at_speed(python, profile, speed):
    """The path of a copy of the profile with another limit_scale."""
    script = (
        "import sys, pathlib; from embodied.robot_bridge.processes import profile_at_speed;"
        "print(profile_at_speed(sys.argv[1], float(sys.argv[2]), pathlib.Path(sys.argv[3])))"
    )
    folder = tempfile.mkdtemp(prefix="embodied-launch-")
    run = subprocess.run([python, "-c", script, profile, speed, folder], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["speed cannot be set"])[-1])
    return run.stdout.strip()


def generate_launch_description():
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=processes)])

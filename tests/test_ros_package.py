"""The repository is a ROS 2 package: what colcon installs of it is whole, and what the launch file starts exists."""

import re
import shutil
import subprocess
import sys
import tomllib
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("datasets", "vlm_rewards", "policies", "sim", "robot_bridge")
LAUNCH = ROOT / "ros" / "bridge.launch.py"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A colcon workspace with a copy of the tree in src/."""
    folder = tmp_path_factory.mktemp("workspace")
    source = folder / "src" / "embodied-rl"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "package.xml", "setup.py", "ros", "embodied", *ROOMS):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source / name)], check=True)
    return folder


def check_installed(base: Path, source: Path) -> None:
    (site,) = base.glob("lib/python3*/site-packages")
    for folder in ("embodied", "embodied/contracts", *(f"embodied/{room}" for room in ROOMS)):
        tree = {p.name for p in (source / folder).iterdir() if p.suffix in (".py", ".yaml", ".xml", ".json", ".html")}
        assert {p.name for p in (site / folder).iterdir() if p.is_file()} >= tree, folder
    assert (site / "embodied/vlm_rewards/clip-lift").is_dir()
    assert (base / "share/embodied/package.xml").read_text() == (ROOT / "package.xml").read_text()
    assert (base / "share/ament_index/resource_index/packages/embodied").is_file()
    assert (base / "share/embodied/launch/bridge.launch.py").read_text() == LAUNCH.read_text()
    scripts = {p.name: p.read_text() for p in (base / "lib/embodied").iterdir()}
    assert set(scripts) == {"embodied", "mujoco_robot", "policy_node", "recorder", "safety_node"}
    # Not the Python that built it: the one that is active has the packages.
    assert all(text.startswith("#!/usr/bin/env python3\n") for text in scripts.values())


def test_what_colcon_runs_installs_everything(workspace: Path, tmp_path: Path) -> None:
    """The command of colcon's Python build task, with this environment's setuptools."""
    command = [
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build",
        "--build-base",
        str(tmp_path / "build"),
    ]
    command += ["install", "--record", str(tmp_path / "log"), "--single-version-externally-managed"]
    command += ["--prefix", str(tmp_path / "install"), "install_data", "--force"]
    source = workspace / "src" / "embodied-rl"
    run = subprocess.run([sys.executable, *command], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_installed(tmp_path / "install", source)


@pytest.mark.skipif(shutil.which("colcon") is None, reason="colcon is not installed")
def test_colcon_finds_and_builds_the_package(workspace: Path) -> None:
    listed = subprocess.run(["colcon", "list"], cwd=workspace, capture_output=True, text=True).stdout
    assert listed.split("\t") == ["embodied", "src/embodied-rl", "(ros.ament_python)\n"]
    run = subprocess.run(["colcon", "build"], cwd=workspace, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_installed(workspace / "install" / "embodied", workspace / "src" / "embodied-rl")


def test_pip_does_not_see_the_ros_package(workspace: Path, tmp_path: Path) -> None:
    """A wheel built beside setup.py is the one that pyproject.toml describes."""
    source = workspace / "src" / "embodied-rl"
    run = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    import zipfile

    (wheel,) = tmp_path.glob("embodied_rl-*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "share/" in name or "package.xml" in name]


def test_the_manifest_agrees_with_pyproject() -> None:
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert package.findtext("name") == "embodied"
    assert package.findtext("version") == project["version"]
    assert package.findtext("license") == project["license"]
    assert package.findtext("export/build_type") == "ament_python"
    depends = {element.text for element in package.findall("exec_depend")}
    sources = "".join(path.read_text() for path in (ROOT / "robot_bridge").glob("*.py"))
    used = set(re.findall(r'"(\w+_msgs)/(?:msg|srv|action)/', sources))
    internal = {"action_msgs", "service_msgs", "unique_identifier_msgs"}  # parts of others; rclpy brings them
    assert used - internal <= depends


class Recorded(types.SimpleNamespace):
    """Stands in for ROS's `launch`, which is on no package index: keeps what it was made with."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(positional=positional, **named)

    def perform(self, context: dict[str, str]) -> str:
        return context[self.positional[0]]


@pytest.fixture
def launch_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    names = ["LaunchDescription", "DeclareLaunchArgument", "EmitEvent", "ExecuteProcess", "OpaqueFunction"]
    names += ["RegisterEventHandler", "OnProcessExit", "Shutdown", "LaunchConfiguration"]
    for module in ("launch", "launch.actions", "launch.event_handlers", "launch.events", "launch.substitutions"):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**dict.fromkeys(names, Recorded)))
    scope: dict[str, Any] = {}
    exec(compile(LAUNCH.read_text(), str(LAUNCH), "exec"), scope)
    return scope


def commands(scope: dict[str, Any], **given: str) -> dict[str, list[str]]:
    values = {name: default for name, (default, _) in scope["ARGUMENTS"].items()} | given
    return {p.name: p.cmd for p in scope["processes"](values) if hasattr(p, "cmd")}


def test_the_launch_file_starts_what_is_asked_for(launch_file: dict[str, Any], tmp_path: Path) -> None:
    declared = launch_file["generate_launch_description"]().positional[0]
    assert [argument.positional[0] for argument in declared[:-1]] == list(launch_file["ARGUMENTS"])
    assert set(commands(launch_file)) == {"safety_node"}
    found = commands(launch_file, bundle="B", record="R", scene="S", shadow="true", domain="7", use_sim_time="true")
    assert set(found) == {"safety_node", "policy_node", "recorder", "mujoco_robot"}
    assert "--shadow" in found["safety_node"]
    for name, command in found.items():
        assert command[1:3] == ["-m", f"embodied.robot_bridge.{name}"]
        assert (ROOT / "robot_bridge" / f"{name}.py").is_file()
        assert command[command.index("--domain") + 1] == "7"
        assert ("--use-sim-time" in command) == (name != "mujoco_robot")
    assert commands(launch_file, env="robosuite/Lift")["mujoco_robot"][2:5] == ["embodied.cli", "robot", "sim"]


def test_speed_is_a_copy_of_the_profile(launch_file: dict[str, Any]) -> None:
    from embodied.robot_bridge.profile import load_profile

    safety = commands(launch_file, profile="ur5e", speed="0.1")["safety_node"]
    assert load_profile(safety[safety.index("--profile") + 1]).limit_scale == 0.1
    with pytest.raises(RuntimeError, match=r"in \(0, 1\]"):
        commands(launch_file, speed="3")


@pytest.mark.parametrize("name", ["safety_node", "policy_node", "recorder", "mujoco_robot"])
def test_every_process_takes_the_flags_of_the_launch_file(launch_file: dict[str, Any], name: str) -> None:
    given = {"bundle": "B", "record": "R", "scene": "S", "shadow": "true", "domain": "7", "use_sim_time": "true"}
    command = commands(launch_file, **given)[name]
    flags = {word for word in command if word.startswith("--")}
    help_text = subprocess.run([sys.executable, *command[1:3], "--help"], capture_output=True, text=True).stdout
    assert flags <= set(re.findall(r"--[\w-]+", help_text))

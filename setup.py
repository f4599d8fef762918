"""Lets colcon build this repository as the ROS 2 package `embodied`. pip needs nothing but pyproject.toml.

colcon runs this file with the system's setuptools, and that of Ubuntu 24.04 refuses our pyproject.toml for its licence
(PEP 639). So what colcon needs of it is read here, and setuptools is kept from reading it.
"""

import sys
import tomllib
from pathlib import Path
from typing import Any

import setuptools

NODES = ("mujoco_robot", "policy_node", "recorder", "safety_node")
COLCON_COMMANDS = {"install", "develop", "--dry-run", "--help-commands", "--help"}  # that no pip ever gives


class Distribution(setuptools.Distribution):
    def parse_config_files(self, filenames: Any = None, ignore_option_errors: bool = False) -> None:
        found = self.find_config_files() if filenames is None else filenames  # pyproject.toml is none of them
        super().parse_config_files(found, ignore_option_errors)


def for_colcon() -> dict[str, Any]:
    """Arguments of `setup` for a package of a colcon workspace."""
    settings = tomllib.loads((Path(__file__).resolve().parent / "pyproject.toml").read_text())
    packaging = settings["tool"]["setuptools"]
    scripts = [f"{name} = {target}" for name, target in settings["project"]["scripts"].items()]
    return {
        "distclass": Distribution,
        "name": "embodied",
        "version": settings["project"]["version"],
        "packages": packaging["packages"],  # found through the links in embodied/, which --symlink-install keeps
        "package_data": {key.replace("*", ""): names for key, names in packaging["package-data"].items()},
        "zip_safe": False,
        "data_files": [
            ("share/ament_index/resource_index/packages", ["ros/embodied"]),
            ("share/embodied", ["package.xml"]),
            ("share/embodied/launch", ["ros/bridge.launch.py"]),
        ],
        "entry_points": {
            "console_scripts": [*scripts, *(f"{node} = embodied.robot_bridge.ros_run:{node}" for node in NODES)]
        },
        "options": {
            # The Python of the environment that is active when it runs, which has torch; not the one that built it.
            "build_scripts": {"executable": "/usr/bin/env python3"},
            "install": {"install_scripts": "$base/lib/embodied"},
            "develop": {"script_dir": "$base/lib/embodied"},
        },
    }


setuptools.setup(**(for_colcon() if COLCON_COMMANDS & set(sys.argv) else {}))

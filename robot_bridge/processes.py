"""Starting and ending the bridge's processes, each by its own id; a child whose parent is gone ends by itself."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from embodied.contracts.errors import ConfigError, EmbodiedError
from embodied.robot_bridge.profile import profile_path
from embodied.robot_bridge.read_joint_limits import load_yaml

END_TIMEOUT = 5.0  # [s]
_QUOTED = 5  # lines of a log


def free_domain() -> int:
    """A ROS domain of 1 to 200 on which no participant of this host listens."""
    start = os.getpid() % 200
    for offset in range(200):
        domain = 1 + (start + offset) % 200
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("0.0.0.0", 7400 + 250 * domain + 10))
            except OSError:
                continue
            return domain
    raise EmbodiedError("No free ROS domain between 1 and 200 on this host.")


class Child:
    """One process of the bridge, `python -m embodied.robot_bridge.<module>`, with its log file."""

    def __init__(self, module: str, flags: Sequence[str], log_folder: Path) -> None:
        self.name, self.log_path = module, log_folder / f"{module}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"embodied.robot_bridge.{module}", *flags, "--parent", str(os.getpid())],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent only, which then ends everything in order
            )

    def check(self) -> None:
        """Raise EmbodiedError with the end of its log if the process has ended."""
        code = self.process.poll()
        if code is not None:
            tail = self.log_path.read_text(errors="replace").strip().splitlines()[-_QUOTED:]
            raise EmbodiedError(f"The {self.name} process ended (exit code {code}):\n" + "\n".join(tail))

    def end(self) -> None:
        """SIGTERM, then SIGKILL; a stopped process (SIGSTOP) is continued first, so that it can end in order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(END_TIMEOUT)


def profile_at_speed(profile: str | Path, speed: float, folder: Path) -> Path:
    """A copy of a profile with `limit_scale` replaced, for every process to read; returns its path.

    Raises:
        ConfigError: the speed is not in (0, 1].
    """
    import yaml

    if not 0 < speed <= 1:
        raise ConfigError(f"--speed {speed:g} must lie in (0, 1]: it scales velocity, acceleration and jerk limits.")
    path = profile_path(profile)
    data = load_yaml(path)  # which knows !degrees
    data["limit_scale"] = float(speed)
    for key in ("urdf", "joint_limits"):  # relative to the profile
        if data.get("description", {}).get(key):
            data["description"][key] = str((path.parent / Path(data["description"][key]).expanduser()).resolve())
    copy = folder / "profile.yaml"
    copy.write_text(f"# {path} with --speed {speed:g}\n" + yaml.safe_dump(data, sort_keys=False))
    return copy

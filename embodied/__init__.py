"""From robot recordings without rewards to a policy that runs on the robot."""

__version__ = "0.1.0"

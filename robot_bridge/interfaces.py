"""The interface types of ROS 2 that the bridge speaks: messages, services and actions, with no ROS installation.

rosbags brings the message types of a distribution. Services, actions and control_msgs are in none of its stores; their
fields are written here, without comments and constants, which change neither the bytes nor the type hash.
A service `package/srv/Name` has the types `Name_Request` and `Name_Response`; an action `package/action/Name` has
`Name_Goal`, `Name_Result`, `Name_Feedback`, `Name_FeedbackMessage` and the services `Name_SendGoal`, `Name_GetResult`.
"""

import functools
from typing import Any

from embodied.contracts.errors import MissingExtraError

DISTRO = "jazzy"

# An empty structure has one byte on the wire.
_EMPTY = "uint8 structure_needs_at_least_one_member"

MESSAGES = {
    # `char` in a .msg file is uint8 on the wire and in the type hash; rosbags hashes it as a type of its own.
    "rmw_dds_common/msg/Gid": "uint8[16] data",
    "service_msgs/msg/ServiceEventInfo": (
        "uint8 event_type\nbuiltin_interfaces/msg/Time stamp\nuint8[16] client_gid\nint64 sequence_number"
    ),
    "std_msgs/msg/Char": "uint8 data",
    "control_msgs/msg/JointJog": (
        "std_msgs/msg/Header header\nstring[] joint_names\nfloat64[] displacements\nfloat64[] velocities\n"
        "float64 duration"
    ),
    "control_msgs/msg/GripperCommand": "float64 position\nfloat64 max_effort",
    "control_msgs/msg/JointTolerance": "string name\nfloat64 position\nfloat64 velocity\nfloat64 acceleration",
    "control_msgs/msg/JointComponentTolerance": (
        "string joint_name\nuint16 component\nfloat64 position\nfloat64 velocity\nfloat64 acceleration"
    ),
    "control_msgs/msg/JointTrajectoryControllerState": (
        "std_msgs/msg/Header header\nstring[] joint_names\n"
        "trajectory_msgs/msg/JointTrajectoryPoint reference\ntrajectory_msgs/msg/JointTrajectoryPoint feedback\n"
        "trajectory_msgs/msg/JointTrajectoryPoint error\ntrajectory_msgs/msg/JointTrajectoryPoint output\n"
        "string[] multi_dof_joint_names\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_reference\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_feedback\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_error\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_output\n"
        "float64 speed_scaling_factor"
    ),
}

SERVICES = {
    "std_srvs/srv/SetBool": ("bool data", "bool success\nstring message"),
    "std_srvs/srv/Trigger": ("", "bool success\nstring message"),
    "std_srvs/srv/Empty": ("", ""),
    "action_msgs/srv/CancelGoal": (
        "action_msgs/msg/GoalInfo goal_info",
        "int8 return_code\naction_msgs/msg/GoalInfo[] goals_canceling",
    ),
    "rcl_interfaces/srv/DescribeParameters": (
        "string[] names",
        "rcl_interfaces/msg/ParameterDescriptor[] descriptors",
    ),
    "rcl_interfaces/srv/GetParameters": ("string[] names", "rcl_interfaces/msg/ParameterValue[] values"),
    "rcl_interfaces/srv/GetParameterTypes": ("string[] names", "uint8[] types"),
    "rcl_interfaces/srv/ListParameters": (
        "string[] prefixes\nuint64 depth",
        "rcl_interfaces/msg/ListParametersResult result",
    ),
    "rcl_interfaces/srv/SetParameters": (
        "rcl_interfaces/msg/Parameter[] parameters",
        "rcl_interfaces/msg/SetParametersResult[] results",
    ),
    "rcl_interfaces/srv/SetParametersAtomically": (
        "rcl_interfaces/msg/Parameter[] parameters",
        "rcl_interfaces/msg/SetParametersResult result",
    ),
}

_GRIPPER_STATE = "float64 position\nfloat64 effort\nbool stalled\nbool reached_goal"

ACTIONS = {  # goal, result, feedback
    "control_msgs/action/FollowJointTrajectory": (
        "trajectory_msgs/msg/JointTrajectory trajectory\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectory multi_dof_trajectory\n"
        "control_msgs/msg/JointTolerance[] path_tolerance\n"
        "control_msgs/msg/JointComponentTolerance[] component_path_tolerance\n"
        "control_msgs/msg/JointTolerance[] goal_tolerance\n"
        "control_msgs/msg/JointComponentTolerance[] component_goal_tolerance\n"
        "builtin_interfaces/msg/Duration goal_time_tolerance",
        "int32 error_code\nstring error_string",
        "std_msgs/msg/Header header\nstring[] joint_names\n"
        "trajectory_msgs/msg/JointTrajectoryPoint desired\ntrajectory_msgs/msg/JointTrajectoryPoint actual\n"
        "trajectory_msgs/msg/JointTrajectoryPoint error\nstring[] multi_dof_joint_names\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_desired\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_actual\n"
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint multi_dof_error",
    ),
    "control_msgs/action/GripperCommand": (
        "control_msgs/msg/GripperCommand command",
        _GRIPPER_STATE,
        _GRIPPER_STATE,
    ),
    "control_msgs/action/ParallelGripperCommand": (
        "sensor_msgs/msg/JointState command",
        "sensor_msgs/msg/JointState state\nbool stalled\nbool reached_goal",
        "sensor_msgs/msg/JointState state",
    ),
}


def _action_types(name: str) -> dict[str, str]:
    """The types that rosidl derives from an action, and their fields."""
    goal, result, feedback = ACTIONS[name]
    goal_id = "unique_identifier_msgs/msg/UUID goal_id"
    return {
        f"{name}_Goal": goal,
        f"{name}_Result": result,
        f"{name}_Feedback": feedback,
        f"{name}_SendGoal_Request": f"{goal_id}\n{name}_Goal goal",
        f"{name}_SendGoal_Response": "bool accepted\nbuiltin_interfaces/msg/Time stamp",
        f"{name}_GetResult_Request": goal_id,
        f"{name}_GetResult_Response": f"int8 status\n{name}_Result result",
        f"{name}_FeedbackMessage": f"{goal_id}\n{name}_Feedback feedback",
    }


def _definitions() -> dict[str, str]:
    definitions = dict(MESSAGES)
    for name, (request, response) in SERVICES.items():
        definitions |= {f"{name}_Request": request, f"{name}_Response": response}
    for name in ACTIONS:
        definitions |= _action_types(name)
    return definitions


@functools.cache
def typestore() -> Any:
    """rosbags' types of ROS 2 Jazzy, with `char` mended and the services, actions and control_msgs above."""
    try:
        from rosbags.typesys import Stores, get_types_from_msg, get_typestore
    except ImportError as error:
        raise MissingExtraError("rosbags", "ros", "the ROS 2 bridge") from error
    store = get_typestore(Stores.ROS2_JAZZY)
    parsed = {}
    for name, text in _definitions().items():
        # rosbags takes only names with `msg` in the middle, for what is declared and for what it is made of.
        # A type is parsed under such a name, and its fields are kept under the true one.
        types = get_types_from_msg(text or _EMPTY, "embodied/msg/Parsed")
        store.fielddefs.pop(name, None)
        parsed[name] = next(iter(types.values()))
    store.register(parsed)
    return store

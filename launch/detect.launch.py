# SPDX-License-Identifier: Apache-2.0
"""The detector, with a bag player, a recorder and RViz where asked for. What runs is described in qdbev_ros.bringup.

Example: ros2 launch qdbev_ros detect.launch.py model:=demo/nano.qdbev bag:=demo/town.mcap rviz:=true
"""

from ament_index_python.packages import PackageNotFoundError
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration, SubstitutionFailure
from launch_ros.actions import Node
from launch_ros.substitutions import ExecutableInPackage

from launch import LaunchContext, LaunchDescription
from qdbev_ros.bringup import ARGUMENTS, PACKAGE, Process, describe
from qdbev_ros.core.errors import ConfigError, QdbevError


def start(context: LaunchContext):
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    try:
        bringup = describe(given)
        for process in bringup.processes:
            require(process, context)
    except QdbevError as error:
        raise RuntimeError(str(error)) from None  # ros2 launch prints the text and exits with 1
    actions = [LogInfo(msg=f"warning: {warning}") for warning in bringup.warnings]
    actions += [SetEnvironmentVariable(name, value) for name, value in bringup.environment.items()]
    for process in bringup.processes:
        node = make_node(process)
        actions += [RegisterEventHandler(OnProcessExit(target_action=node, on_exit=end_all)), node]
    return actions


def require(process: Process, context: LaunchContext) -> None:
    """Raises ConfigError where a program is missing: launch would fail halfway and leave running what it started."""
    try:
        ExecutableInPackage(process.executable, process.package).perform(context)
    except (PackageNotFoundError, SubstitutionFailure) as error:
        ours = process.package == PACKAGE
        advice = "build the package and source its workspace" if ours else "leave rviz:=true out"
        raise ConfigError(f"{process.executable} is not installed: {advice}") from error


def make_node(process: Process) -> Node:
    return Node(
        package=process.package,
        executable=process.executable,
        name=process.name,
        namespace="",  # or the parameters are for `/**`, and a section of the node's name in a file beats those
        parameters=[*process.parameter_files, process.parameters],
        arguments=list(process.arguments),
        remappings=list(process.remappings),
        output="screen",
        sigterm_timeout="12",  # the nodes finish what is under way
    )


def end_all(event: ProcessExited, context: LaunchContext):
    """Where one process ends, all end; where one fails, launch fails, for scripts to see it.

    A second Shutdown while one is under way would make launch exit with 1.
    """
    if context.is_shutdown:
        return []
    if event.returncode:
        raise RuntimeError(
            f"{event.process_name} ended with exit code {event.returncode}, see its line above"
        )
    return [EmitEvent(event=Shutdown(reason=f"{event.process_name} is done"))]


def generate_launch_description() -> LaunchDescription:
    declared = []
    for argument in ARGUMENTS:
        # Without `choices`: launch would take "true" and refuse "True".
        legal = f" ({' or '.join(argument.choices)})" if argument.choices else ""
        declared.append(
            DeclareLaunchArgument(
                argument.name, default_value=argument.default, description=argument.text + legal
            )
        )
    return LaunchDescription([*declared, OpaqueFunction(function=start)])

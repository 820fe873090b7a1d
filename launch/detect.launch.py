# SPDX-License-Identifier: Apache-2.0
"""The detector, with a bag player, a recorder and RViz where asked for. What runs is described in qdbev_ros.bringup.

Example: ros2 launch qdbev_ros detect.launch.py model:=demo/nano.qdbev bag:=demo/town.mcap rviz:=true
"""

import signal
from functools import partial

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
from qdbev_ros.bringup import ARGUMENTS, PACKAGE, Process, describe, loss
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
    failures: list[str] = []
    for process in bringup.processes:
        node = make_node(process)
        on_exit = partial(ended, process, failures)
        actions += [RegisterEventHandler(OnProcessExit(target_action=node, on_exit=on_exit)), node]
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
        # Without one the parameters are for `/**`, and a section of the node's name in a file beats those. The root,
        # also where a namespace was pushed: presets, recorder and player name topics in full.
        namespace="/",
        parameters=[*process.parameter_files, process.parameters],
        arguments=list(process.arguments),
        remappings=list(process.remappings),
        output="screen",
        sigterm_timeout="12",  # the nodes finish what is under way
    )


def ended(process: Process, failures: list[str], event: ProcessExited, context: LaunchContext):
    """Ends the others where the process ends all. Launch fails where any process failed, for scripts to see it.

    Only an exception makes launch fail, and it ends everything: a failure that does not is kept until the end. While a
    shutdown is under way an exception disturbs nothing; a second Shutdown, too, would make launch fail.
    """
    code = event.returncode
    if code and not (context.is_shutdown and code in (-signal.SIGINT, -signal.SIGTERM)):
        failures.append(f"{event.process_name} ended with exit code {code}, see its line above")
    if not (process.ends_all or context.is_shutdown):
        return [LogInfo(msg=f"warning: {loss(process, code)}")]
    if failures:
        raise RuntimeError(failures.pop(0))
    return [] if context.is_shutdown else [EmitEvent(event=Shutdown(reason=f"{event.process_name} is done"))]


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

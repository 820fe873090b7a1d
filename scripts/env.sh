# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# source scripts/env.sh (bash or zsh): the environment that scripts/setup.sh made.
# Where you have sourced a ROS 2 it adds this project to it; elsewhere it stands in for ROS's own setup.bash.
_qdbev_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd -P)
_qdbev_venv=$_qdbev_root/.venv
_qdbev_ros=$(cat "$_qdbev_venv/.qdbev-ros" 2>/dev/null || true)

if [ -z "$_qdbev_ros" ]; then
  echo "env.sh: $_qdbev_venv is not set up: run 'make setup'" >&2
  return 1
elif [ "$_qdbev_ros" = rig ]; then
  # What another ROS or virtual environment left behind would be loaded instead of the wheels' libraries.
  unset PYTHONPATH PYTHONHOME LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE
  export ROS_DISTRO=jazzy ROS_VERSION=2 ROS_PYTHON_VERSION=3 AMENT_PREFIX_PATH="$_qdbev_venv"
  export RMW_IMPLEMENTATION=rmw_fastrtps_cpp
  export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"
elif [ "$_qdbev_ros" != "${ROS_DISTRO:-}" ]; then
  echo "env.sh: $_qdbev_venv was set up for ROS 2 $_qdbev_ros: source that first, or run 'make setup' again" >&2
  return 1
else
  case ":${AMENT_PREFIX_PATH:-}:" in
    *":$_qdbev_venv:"*) ;;
    *)
      export AMENT_PREFIX_PATH="$_qdbev_venv:${AMENT_PREFIX_PATH:-}"
      export LD_LIBRARY_PATH="$_qdbev_venv/lib:${LD_LIBRARY_PATH:-}"
      ;;
  esac
fi

export VIRTUAL_ENV="$_qdbev_venv"
case ":$PATH:" in
  *":$_qdbev_venv/bin:"*) ;;
  *) export PATH="$_qdbev_venv/bin:$PATH" ;;
esac
# Shared memory large enough for camera images, unless you have a profile of your own. Fast DDS 2 (Humble, Jazzy)
# reads the first name, Fast DDS 3 (Kilted) the second.
if [ -z "${FASTRTPS_DEFAULT_PROFILES_FILE:-}${FASTDDS_DEFAULT_PROFILES_FILE:-}" ]; then
  export FASTRTPS_DEFAULT_PROFILES_FILE="$_qdbev_root/config/fastdds_shm.xml"
  export FASTDDS_DEFAULT_PROFILES_FILE="$FASTRTPS_DEFAULT_PROFILES_FILE"
fi
unset _qdbev_root _qdbev_venv _qdbev_ros

# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by setup.sh: what the machine has, and one clear line for each thing that is missing.
# Uses ROS, LANE, VENV and say(); sets PYTHON_FOUND.

MISSING=() # one line each
APT=()     # Debian and Ubuntu packages that help

sourced_ros() { # prints the distribution of a ROS 2 that the user has sourced, or "rig"
  local others
  others=$(tr ':' '\n' <<<"${AMENT_PREFIX_PATH:-}" | grep -vxF -e "$VENV" -e "" || true)
  if [ -n "${ROS_DISTRO:-}" ] && [ "${ROS_VERSION:-2}" = 2 ] && [ -n "$others" ]; then
    echo "$ROS_DISTRO"
  else
    echo rig
  fi
}

find_python() { # the first interpreter that fits: the sourced ROS's own, or 3.10 to 3.12 for the wheels
  local candidate probe wanted before
  before=$(readlink -f "$VENV/bin/python" || true) # what .venv was made with stays, unless PYTHON says otherwise
  if [ "$ROS" = rig ]; then
    probe='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
    wanted="Python 3.10, 3.11 or 3.12"
  else
    probe='import sys, rclpy; sys.exit(sys.version_info < (3, 10))'
    wanted="the Python of ROS 2 $ROS (the one that can import rclpy)"
  fi
  for candidate in "${PYTHON:-$before}" python3 /usr/bin/python3 python3.12 python3.11 python3.10; do
    if "$candidate" -c "$probe" >/dev/null 2>&1; then
      PYTHON_FOUND=$(command -v "$candidate")
      return
    fi
    [ -z "${PYTHON:-}" ] || break
  done
  PYTHON_FOUND=
  MISSING+=("$wanted is needed${PYTHON:+, and PYTHON=$PYTHON is not it}: set PYTHON to its path")
  APT+=(python3 python3-venv)
}

check_platform() {
  local system machine libc
  system=$(uname -s) machine=$(uname -m)
  if [ "$system" != Linux ]; then
    MISSING+=("this is $system; ROS 2 is supported on Linux here (a container will do)")
  elif [ "$ROS" = rig ] && [ "$machine" != x86_64 ]; then
    MISSING+=("there are no ROS 2 wheels for $machine: install ROS 2 from its own packages (Ubuntu has them for aarch64), source it, run this again")
  elif [ "$ROS" = rig ]; then
    libc=$({ getconf GNU_LIBC_VERSION 2>/dev/null || true; } | cut -d' ' -f2)
    [ "$(printf '2.28\n%s\n' "${libc:-0}" | sort -V | head -n 1)" = 2.28 ] ||
      MISSING+=("the ROS 2 wheels need glibc 2.28 or later, this machine has ${libc:-another C library}: use a later distribution, or source a ROS 2")
  fi
}

check_venv_module() {
  local version
  [ -n "$PYTHON_FOUND" ] || return 0
  version=$("$PYTHON_FOUND" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$PYTHON_FOUND" -c 'import ensurepip, venv' 2>/dev/null; then
    MISSING+=("$PYTHON_FOUND has no venv module")
    APT+=("python$version-venv")
  fi
}

check_compiler() { # only needed when message packages have to be built
  local include version
  if ! command -v c++ >/dev/null; then
    MISSING+=("no C++ compiler (c++): the message packages are built once")
    APT+=(g++)
  fi
  [ -n "$PYTHON_FOUND" ] || return 0
  include=$("$PYTHON_FOUND" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  if [ ! -f "$include/Python.h" ]; then
    version=$("$PYTHON_FOUND" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    MISSING+=("no Python headers ($include/Python.h): the message packages are built once")
    APT+=("python$version-dev")
  fi
}

check_disk() { # MEGABYTES that a fresh environment takes; what is there already counts
  local free there
  free=$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')
  there=$({ du -sm "$VENV" 2>/dev/null || true; } | cut -f1)
  [ $((free + ${there:-0})) -ge "$1" ] ||
    MISSING+=("$free MB free at $ROOT, about $1 MB are needed: free some space")
}

warn_shared_memory() {
  local size
  size=$({ df -Pm /dev/shm 2>/dev/null || true; } | awk 'NR == 2 { print $2 }')
  [ "${size:-0}" -ge 256 ] ||
    say "warning: /dev/shm is ${size:-0} MB, raw images need 256: they will go over UDP and sets get lost (docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm)"
}

report_missing() { # ends the set-up unless nothing is missing; in CI as root it installs what apt has, once
  local line apt_line
  [ ${#MISSING[@]} -gt 0 ] || return 0
  for line in "${MISSING[@]}"; do say "missing: $line" >&2; done
  if [ ${#APT[@]} -gt 0 ] && command -v apt-get >/dev/null; then
    apt_line="apt-get install -y --no-install-recommends ${APT[*]}"
    if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && [ -z "${QDBEV_APT_DONE:-}" ]; then
      say "CI: $apt_line"
      apt-get update -qq && DEBIAN_FRONTEND=noninteractive $apt_line -qq >/dev/null
      QDBEV_APT_DONE=1 exec "$0" "$LANE"
    fi
    say "to do: sudo apt-get update && sudo $apt_line" >&2
  fi
  exit 2
}

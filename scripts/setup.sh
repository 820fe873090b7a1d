#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# setup.sh [node|test]: makes .venv. `node` is what the detector needs (no torch), `test` adds training, tests and lint.
#
# With a ROS 2 sourced, .venv sits on top of it. Without one, ROS 2 Jazzy comes as Python wheels ("the rig"), and the
# message packages that have no wheel are built once and kept in the cache folder.
# Nothing is done when nothing changed. An interrupted run is repaired by the next one.
#
#   PYTHON=python3.11      the interpreter for .venv
#   XDG_CACHE_HOME=DIR     built message packages go to DIR/qdbev (default ~/.cache/qdbev)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
LANE=${1:-node}
say() { printf 'set-up: %s\n' "$*"; }
# shellcheck source=scripts/preflight.sh
. "$ROOT/scripts/preflight.sh"

case $LANE in
  node) NEEDED_MB=2000 ;;
  test) NEEDED_MB=5500 ;;
  *) echo "usage: scripts/setup.sh [node|test]" >&2; exit 2 ;;
esac
ROS=$(sourced_ros)
STAMP=$("$ROOT/scripts/stamp.sh" "$LANE" "$ROS")

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

up_to_date() {
  [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.qdbev-$LANE" 2>/dev/null)" = "$STAMP" ] &&
    { [ -z "${PYTHON:-}" ] || [ "$(python_version "$PYTHON")" = "$(python_version "$VENV/bin/python")" ]; }
}

fail() { say "error: $*" >&2; exit 2; }

install() { # pip install, quiet but for errors
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input --prefer-binary "$@" ||
    fail "installing Python packages failed (above: why). Check the network and pip's settings, then run this again: it goes on from here"
}

make_venv() { # keeps a .venv that still fits, else makes it anew
  local why=
  if [ -d "$VENV/bin" ]; then
    local made_for
    made_for=$(cat "$VENV/.qdbev-ros" 2>/dev/null || echo "$ROS")
    if [ "$made_for" != "$ROS" ]; then
      why="it was made for ROS 2 '$made_for', this is '$ROS'"
    elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
      why="it is damaged"
    elif ! head -n 2 "$VENV/bin/pip" 2>/dev/null | grep -qF "$VENV/bin/"; then
      why="the folder was moved, or an earlier set-up was cut off"
    elif [ "$(python_version "$VENV/bin/python")" != "$(python_version "$PYTHON_FOUND")" ]; then
      why="it was made with another version of Python"
    fi
    if [ -n "$why" ]; then
      say "making .venv anew: $why"
      rm -rf "${VENV:?}"
    fi
  fi
  if [ ! -d "$VENV/bin" ]; then
    local options=()
    [ "$ROS" = rig ] || options=(--system-site-packages)
    "$PYTHON_FOUND" -m venv "${options[@]}" "$VENV"
  fi
  # A package whose installation was cut off has no RECORD; pip would take it for installed.
  find "$VENV"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' ! -exec test -e '{}/RECORD' \; -exec rm -rf '{}' +
  rm -f "$VENV/.qdbev-node" "$VENV/.qdbev-test"
  echo "$ROS" >"$VENV/.qdbev-ros"
}

not_in_ros() { # the lines of node.txt that the sourced ROS or apt doesn't provide
  "$VENV/bin/python" - "$ROOT/requirements/node.txt" <<'PY'
import importlib.util, re, sys
provided = {"opencv-python-headless": "cv2", "pyyaml": "yaml", "numpy": "numpy", "psutil": "psutil"}
for line in open(sys.argv[1]):
    requirement = line.partition("#")[0].strip()
    module = provided.get(re.split(r"[<>=]", requirement)[0])
    if requirement and not (module and importlib.util.find_spec(module)):
        print(requirement)
PY
}

install_requirements() {
  local constraints=(-c "$ROOT/requirements/constraints.txt") files=() wanted
  if [ "$ROS" = rig ]; then
    files=(-r "$ROOT/requirements/rig.txt" -r "$ROOT/requirements/node.txt")
    [ -n "$MESSAGES_CACHED" ] || files+=(-r "$ROOT/requirements/rig-build.txt")
  else
    # The ROS packages' numpy and OpenCV stay; what pip adds must not replace them by numpy 2.
    constraints=(-c "$ROOT/requirements/node.txt")
    mapfile -t wanted < <(not_in_ros)
    files=("${wanted[@]}")
  fi
  if [ "$LANE" = test ]; then files+=(-r "$ROOT/requirements/test.txt"); fi
  install "${constraints[@]}" "${files[@]}"
  if [ "$LANE" = test ]; then install --no-deps -r "$ROOT/requirements/weights.txt" -r "$ROOT/requirements/rerun.txt"; fi
}

install_messages() {
  # One that the user built in a workspace of their own wins.
  local theirs='import sys, qdbev_msgs.msg; sys.exit(qdbev_msgs.__file__.startswith(sys.prefix))'
  if [ "$ROS" != rig ] && "$VENV/bin/python" -c "$theirs" 2>/dev/null; then return; fi
  if [ -z "$MESSAGES_CACHED" ]; then
    say "building message packages (once; kept in $MESSAGES)"
    if ! "$ROOT/scripts/rig/build_messages.sh" "$VENV" "$ROS" "$MESSAGES"; then
      [ "$ROS" != rig ] || fail "building the message packages failed (above: why)"
      say "qdbev_msgs could not be built (above: why): the node runs, its topic ~/objects is off"
      return
    fi
  fi
  "$VENV/bin/python" -m pip install -qq --no-deps --no-index --force-reinstall "$MESSAGES"/*.whl
}

verify() { # imports what was installed, with the environment that a user gets
  local modules="cv2, numpy, onnx, onnxruntime, rosbags.highlevel, rclpy, sensor_msgs.msg, vision_msgs.msg, tf2_msgs.msg"
  [ "$ROS" != rig ] || modules+=", qdbev_msgs.msg"
  [ "$LANE" = node ] || modules+=", torch, nuscenes, vtk, pyvista, lightning_fabric, pytest"
  # shellcheck source=scripts/env.sh
  (. "$ROOT/scripts/env.sh" && python -c "import $modules") >"$VENV/.qdbev-verify.log" 2>&1 && return
  tail -n 4 "$VENV/.qdbev-verify.log" >&2
  [ "$ROS" = rig ] || fail "something is missing (above). ROS packages: sudo apt-get install ros-$ROS-vision-msgs ros-$ROS-diagnostic-msgs"
  fail "the environment does not work (above: why). Remove .venv and run this again"
}

if up_to_date; then
  say "ready, nothing changed ($LANE)"
  exit 0
fi
started=$SECONDS
exec 9>"$VENV.lock"
flock 9 # a second set-up of this checkout waits for the first
up_to_date && exit 0

find_python
check_platform
check_venv_module
check_disk "$NEEDED_MB"
MESSAGES=
if [ -n "$PYTHON_FOUND" ]; then
  key=$(cd "$ROOT" && find msg scripts/rig requirements/constraints.txt -type f ! -path '*/__pycache__/*' | LC_ALL=C sort |
    xargs -d '\n' sha256sum | sha256sum | cut -c1-12)
  MESSAGES=${XDG_CACHE_HOME:-$HOME/.cache}/qdbev/messages-$key-$ROS-$(python_version "$PYTHON_FOUND")
fi
MESSAGES_CACHED=$(ls "${MESSAGES:-/nowhere}"/*.whl 2>/dev/null || true)
if [ "$ROS" = rig ] && [ -z "$MESSAGES_CACHED" ]; then check_compiler; fi
report_missing
warn_shared_memory

if [ "$ROS" = rig ]; then
  say "no ROS 2 is sourced: setting up ROS 2 Jazzy from Python wheels in .venv ($LANE; the first time takes minutes)"
else
  say "on top of ROS 2 $ROS ($LANE)"
fi
make_venv
install_requirements
install_messages
"$VENV/bin/python" "$ROOT/scripts/link_project.py" "$VENV"
verify
echo "$STAMP" >"$VENV/.qdbev-$LANE"
if [ "$LANE" = test ]; then "$ROOT/scripts/stamp.sh" node "$ROS" >"$VENV/.qdbev-node"; fi
say "done in $((SECONDS - started)) s, $(du -sm "$VENV" | cut -f1) MB ($LANE). For a shell of your own: source scripts/env.sh"

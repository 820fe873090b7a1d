#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# build_messages.sh VENV ROS OUT: builds the message packages and packs them into one wheel in folder OUT.
# ROS "rig": qdbev_msgs and the parts of tf2_msgs and vision_msgs that have no wheel, against the wheels in VENV.
# ROS a distribution that is sourced: qdbev_msgs alone, against it.
set -euo pipefail
venv=$1 ros=$2 out=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$here/../.." && pwd -P)
python=$venv/bin/python
packages=("$root/msg")
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [ "$ros" = rig ]; then
  packages+=("$here/compat_msgs/tf2_msgs" "$here/compat_msgs/vision_msgs")
  export AMENT_PREFIX_PATH=$venv CMAKE_PREFIX_PATH=$venv ROS_DISTRO=jazzy ROS_VERSION=2
  # The wheels' CMake files name the folders of the machine that built them.
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  numpy=$("$python" -c 'import numpy; print(numpy.get_include())')
  { grep -rlE '/opt/python/cp3' "$venv/share" --include='*.cmake' || true; } | xargs -r -d '\n' sed -i -E \
    -e "s#/opt/python/cp[0-9]+-cp[0-9]+/include/python[0-9.]+#$include#g" \
    -e "s#/opt/python/cp[0-9]+-cp[0-9]+/lib/python[0-9.]+/site-packages/numpy/(_core|core)/include#$numpy#g"
else
  export CMAKE_PREFIX_PATH="$AMENT_PREFIX_PATH:${CMAKE_PREFIX_PATH:-}" # colcon does the same
fi
export PATH="$venv/bin:$PATH"
generator="Unix Makefiles"
if command -v ninja >/dev/null; then generator=Ninja; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # FOLDER: configures, builds and installs one package; its log is shown only if it fails
  local folder=$1 name
  name=$(sed -n 's:.*<name>\(.*\)</name>.*:\1:p' "$folder/package.xml")
  {
    # -O1: nothing in generated message code is worth the minutes that -O3 takes
    cmake -G "$generator" -S "$folder" -B "$work/$name" -DCMAKE_INSTALL_PREFIX="$work/prefix" \
      -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE="-O1" -DCMAKE_CXX_FLAGS_RELEASE="-O1" -DBUILD_TESTING=OFF \
      -DPython3_EXECUTABLE="$python" -DPYTHON_EXECUTABLE="$python" \
      -DPYTHON_INSTALL_DIR="lib/python$version/site-packages" -Wno-dev -Wno-deprecated &&
      cmake --build "$work/$name" -j "$(nproc)" && cmake --install "$work/$name"
  } >"$work/$name.log" 2>&1 || {
    tail -n 25 "$work/$name.log" >&2
    echo "build_messages.sh: building $name failed" >&2
    return 1
  }
}

jobs=()
for folder in "${packages[@]}"; do # they don't depend on each other
  build "$folder" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
"$python" "$here/pack_wheel.py" "$work/prefix" "$out" >/dev/null

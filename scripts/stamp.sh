#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# stamp.sh LANE ROS: prints a hash of everything that scripts/setup.sh makes the environment from.
# LANE is node or test; ROS is "rig" or the distribution that is sourced.
set -euo pipefail
lane=$1 ros=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
{
  echo "$root $lane $ros"
  find launch config -type f ! -path '*/__pycache__/*' | LC_ALL=C sort # their names: each is linked on its own
  find requirements msg scripts setup.cfg -type f ! -name 'run_tests.py' ! -name 'env.sh' ! -path '*/__pycache__/*' |
    if [ "$lane" = node ]; then grep -vE '^requirements/(test|weights|rerun)\.txt$'; else cat; fi |
    LC_ALL=C sort | xargs -d '\n' sha256sum
} | sha256sum | cut -c1-16

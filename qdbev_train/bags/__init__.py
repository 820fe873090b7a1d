# SPDX-License-Identifier: Apache-2.0
"""nuScenes scenes as ROS 2 bags, written without ROS, devkit or torch."""

# SPDX-License-Identifier: Apache-2.0
"""What training and the node share: geometry, ego motion, preprocessing, decoding, memory. No ROS, no engine."""

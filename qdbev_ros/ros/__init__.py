# SPDX-License-Identifier: Apache-2.0
"""What joins the core to ROS 2: parameters, topics, messages, bags, diagnostics."""

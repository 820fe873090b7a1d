# SPDX-License-Identifier: Apache-2.0
"""Detections into the nuScenes result format and through the official devkit's score."""

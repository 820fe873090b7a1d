# SPDX-License-Identifier: Apache-2.0
"""Data sets in nuScenes format: tables into typed frames (no torch), frames into training batches (torch)."""

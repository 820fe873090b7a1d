# SPDX-License-Identifier: Apache-2.0
"""The synthetic town: rendered driving scenes in nuScenes format (see docs/synthetic_town.md)."""

# SPDX-License-Identifier: Apache-2.0
"""Training of the float teacher and of quantised students: targets, losses, training-only helps and the loop."""

# SPDX-License-Identifier: Apache-2.0
"""Released BEVFormer checkpoints in and out: mmcv's files to ours and back."""

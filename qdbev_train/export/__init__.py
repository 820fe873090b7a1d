# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a `.qdbev` package, and a look into one."""

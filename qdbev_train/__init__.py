# SPDX-License-Identifier: Apache-2.0
"""Offline work: data, training, compression, evaluation, export and the `qdbev` command."""

__version__ = "0.1.0"

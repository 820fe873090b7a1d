# SPDX-License-Identifier: Apache-2.0
"""The accuracy study: what each step of the compression is worth, row by row, with the official score."""

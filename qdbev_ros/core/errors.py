# SPDX-License-Identifier: Apache-2.0
"""Errors that are the user's to mend: each message is one line that names the culprit and what to do."""

from __future__ import annotations

import sys


class QdbevError(Exception):
    """Base of every error that a command reports in one line, with exit code 2."""


class ConfigError(QdbevError):
    """A variant, training or parameter file holds something that cannot be used."""


class CalibrationError(QdbevError):
    """A camera calibration cannot project anything (zero or NaN focal length, wrong shape)."""


class DataError(QdbevError):
    """A data set, bag or image is missing, incomplete or damaged."""


class PackageError(QdbevError):
    """A .qdbev file is damaged, incomplete or of another version."""


class EngineError(QdbevError):
    """An inference engine is not available or does not compute what it should."""


class EngineMissing(EngineError):
    """What an inference engine needs is not installed, or there is no GPU for it."""


def install_hint(error: ImportError) -> str:
    """What cannot be imported, and what brings it: colcon and rosdep don't bring all Python packages."""
    return f"{error}: {sys.executable} -m pip install -r requirements/node.txt"


def one_line(error: Exception) -> str:
    """What an error of somebody else's says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

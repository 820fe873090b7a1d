# SPDX-License-Identifier: Apache-2.0
"""Programs beside `qdbev` explain themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["demo", "soak"])
def test_help_names_the_options_and_their_defaults(module: str) -> None:
    command = [sys.executable, "-m", f"qdbev_ros.{module}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m qdbev_ros.{module}" in done.stdout
    assert "default: demo/town.mcap" in " ".join(done.stdout.split())

# SPDX-License-Identifier: Apache-2.0
"""Whoever follows the documentation with a released checkpoint has the files that the configurations read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def imported(document: str) -> dict[str, str]:
    """What a document's `qdbev import-bevformer` commands write, by variant."""
    text = (ROOT / document).read_text()
    commands = re.findall(r"^qdbev import-bevformer bevformer_(\w+?)_\S+ (\S+)", text, re.MULTILINE)
    return {{"r101": "base"}.get(name, name): path for name, path in commands}


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_the_teachers_on_nuscenes_are_what_the_documented_import_writes(variant: str) -> None:
    settings = yaml.safe_load((ROOT / "config" / "compress" / f"{variant}_nuscenes.yaml").read_text())
    assert settings["teacher"] == imported("docs/bevformer.md")[variant]


def test_fine_tuning_starts_from_what_the_documented_import_writes() -> None:
    settings = yaml.safe_load((ROOT / "config" / "train" / "tiny_finetune.yaml").read_text())
    assert settings["init"] == imported("docs/bevformer.md")["tiny"]


def test_the_readme_imports_to_the_same_file() -> None:
    assert imported("README.md").items() <= imported("docs/bevformer.md").items()
    assert imported("README.md")

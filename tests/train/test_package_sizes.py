# SPDX-License-Identifier: Apache-2.0
"""benchmarks/package_sizes.py: the promise of eight-fold compression, kept by the file as it lies on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.package_sizes import measure
from qdbev_ros.engine import read_package

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # the exporter warns about shapes that are constants on purpose


def test_tiny_is_at_most_an_eighth_of_its_float32_checkpoint_embeddings_included(tmp_path: Path) -> None:
    size = measure("tiny", tmp_path)
    assert 8 * size.package <= size.float32
    grid = read_package(tmp_path / "tiny.qdbev").quantisation
    assert size.float32 == pytest.approx(grid["float32_bytes"], rel=0.002)  # the file has a header
    embeddings = [layer["name"] for layer in grid["layers"] if layer["kind"] == "embedding"]
    assert len(embeddings) == 6

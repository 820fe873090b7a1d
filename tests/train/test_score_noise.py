# SPDX-License-Identifier: Apache-2.0
"""benchmarks/score_noise.py: seeded roundings, and differences of pairs of runs with their errors."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from benchmarks.score_noise import PLAIN, PYTORCH, main, signs, table

ROOT = Path(__file__).resolve().parents[2]


def test_signs_are_those_of_their_seed_and_point_both_ways() -> None:
    drawn = [list(islice(signs(seed), 100)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {1, -1}
    assert abs(sum(drawn[0])) < 40


def test_differences_are_of_pairs() -> None:
    """Scores that go up and down together differ by a certain amount, however far they spread."""
    found = {
        PLAIN: {"nds": [50.0, 52.0, 54.0, 56.0]},
        "OpenVINO engine": {"nds": [50.2, 52.0, 54.2, 56.0]},
        PYTORCH: {"nds": [51.0, 53.0, 55.0, 57.0]},
    }
    rows = [row.strip("| ").split(" | ") for row in table(found, "nds").splitlines()]
    assert rows[2] == [PLAIN, "4", "53.00", "2.58", "1.29", "", "-1.00 ± 0.00"]
    assert rows[3] == ["OpenVINO engine", "4", "53.10", "2.53", "1.27", "+0.10 ± 0.06", "-0.90 ± 0.06"]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture) -> None:
    data = [str(ROOT / "demo" / "town"), "--version", "v1.0-mini", "--split", "mini_val"]
    for words in (["no.qdbev", *data], [str(ROOT / "demo" / "nano.qdbev"), *data, "--runs", "1"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("score_noise: error: ")
        assert said.count("\n") == 1

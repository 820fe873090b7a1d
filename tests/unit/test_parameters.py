# SPDX-License-Identifier: Apache-2.0
"""Parameters of the node: what may change while it runs, and that the reference tells the same as the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.ros.parameters import DetectorParameters, changed
from qdbev_ros.ros.reference import table, with_table

DOCS = Path(__file__).resolve().parents[2] / "docs"
GIVEN = DetectorParameters(model="nano.qdbev")


def test_the_reference_is_up_to_date() -> None:
    text = (DOCS / "node.md").read_text()
    assert text == with_table(text), "run python -m qdbev_ros.ros.reference docs/node.md"


def test_the_reference_lists_every_parameter() -> None:
    for item in dataclasses.fields(DetectorParameters):
        assert f"| `{item.name}` |" in table()
        assert item.metadata["text"] in table()


def test_a_live_parameter_changes_at_any_time() -> None:
    assert changed(GIVEN, {"min_cameras": 6, "max_gap": 1.0}, configured=True).min_cameras == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other.qdbev"),
        ("preset", "raw"),
        ("engine", "openvino"),
        ("calibration", "rig.yaml"),
        ("ego_motion", "tf"),
        ("engine_threads", 4),
        ("decode_threads", 4),
    ],
)
def test_others_are_refused_while_configured_and_taken_before(name: str, value: str | int) -> None:
    with pytest.raises(ConfigError, match=f"parameter {name} cannot change while the node is configured"):
        changed(GIVEN, {name: value}, configured=True)
    assert getattr(changed(GIVEN, {name: value}, configured=False), name) == value


def test_setting_what_is_set_already_is_no_change() -> None:
    assert changed(GIVEN, {"model": "nano.qdbev"}, configured=True) == GIVEN


def test_a_value_that_is_no_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="missing_cameras is 'guess'; use one of mask, skip"):
        changed(GIVEN, {"missing_cameras": "guess"}, configured=True)

# SPDX-License-Identifier: Apache-2.0
"""Player and recorder have no parameter that may change while they run, and say so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import rclpy
from rclpy.context import Context
from rclpy.parameter import Parameter

from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.parameters import PlayerParameters, RecorderParameters, declare


@pytest.mark.parametrize("kind", [PlayerParameters, RecorderParameters])
def test_none_of_their_parameters_is_live(kind: Any) -> None:
    context = Context()
    rclpy.init(context=context, domain_id=free_domain())
    try:
        node = rclpy.create_node("managed", context=context)
        values = dataclasses.asdict(declare(node, kind))
        for name, value in values.items():
            (result,) = node.set_parameters([Parameter(name, value=value)])
            assert not result.successful, name
            assert "read-only" in result.reason
        node.destroy_node()
    finally:
        context.try_shutdown()

# SPDX-License-Identifier: Apache-2.0
"""The player and messages that were cut off in the bag: too short to hold a stamp, they are no pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdbev_ros.ros.bags import BagReader, BagWriter
from tests.ros.graph import Graph

CUT = {
    "/CAM_FRONT/image_rect_compressed": 1,
    "/CAM_BACK/image_rect_compressed": 2,
}  # topic -> the first so many


def cut_bag(source: Path, out: Path) -> Path:
    """A copy in which the first pictures of two cameras, of which one is the first in the bag, hold eight bytes."""
    left = dict(CUT)
    with BagReader(source) as bag:
        writer = BagWriter(out)
        for topic, kind in bag.types.items():
            writer.add_topic(topic, kind, latched=topic == "/tf_static")
        for topic, stamp, data in bag.raw():
            cut = left.get(topic, 0) > 0
            left[topic] = left.get(topic, 0) - 1
            writer.write(topic, stamp, data[:8] if cut else data)
        writer.close()
    return out


@pytest.mark.parametrize("more", [{}, {"loop": "true", "endless": "true"}])
def test_a_picture_too_short_for_a_stamp_is_left_out_with_one_warning_a_topic(
    graph: Graph, short_bag: Path, tmp_path: Path, more: dict[str, str]
) -> None:
    bag = cut_bag(short_bag, tmp_path / "cut.mcap")
    player = graph.node("bag_player_node", bag=bag, wait=0.0, linger=0.1, **more)
    if more:
        player.wait_for("pass 3")
        assert player.stop() == 0
    else:
        assert player.wait() == 0, player.output
        assert "end of the bag" in player.output
    warnings = [line for line in player.output.splitlines() if "too short" in line]
    assert len(warnings) == len(CUT)
    assert all(any(topic in line for line in warnings) for topic in CUT)
    assert "Traceback" not in player.output

# SPDX-License-Identifier: Apache-2.0
"""Finding a ROS domain of one's own."""

from __future__ import annotations

import socket

from qdbev_ros.ros.domain import DOMAINS, _is_free, free_domain


def test_a_domain_with_a_participant_is_not_free() -> None:
    domain = free_domain()
    assert domain in DOMAINS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * domain + 10))
        assert not _is_free(domain)
    assert _is_free(domain)

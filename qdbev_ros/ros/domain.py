# SPDX-License-Identifier: Apache-2.0
"""A ROS domain that nobody on this machine uses, for graphs that must not meet any other."""

from __future__ import annotations

import random
import socket

from qdbev_ros.core.errors import QdbevError

DOMAINS = range(1, 101)  # higher ones reach into the ports that Linux hands out


def free_domain() -> int:
    """A domain whose first participant's ports are free. Raises QdbevError where none is."""
    for domain in random.sample(DOMAINS, len(DOMAINS)):
        if _is_free(domain):
            return domain
    raise QdbevError("all ROS domains from 1 to 100 are in use on this machine; set ROS_DOMAIN_ID")


def _is_free(domain: int) -> bool:
    """Whether DDS's unicast ports of the domain's first two participants can be bound (RTPS 9.6.1.1)."""
    try:
        for offset in (10, 11, 12, 13):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.bind(("", 7400 + 250 * domain + offset))
    except OSError:
        return False
    return True

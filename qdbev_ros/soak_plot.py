# SPDX-License-Identifier: Apache-2.0
"""The picture of a soak run: memory, latency and losses over time. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from qdbev_ros.core.soak_figures import Sample


def draw(result: dict[str, Any], samples: Sequence[Sample], path: Path) -> None:
    """Three panels over minutes, written to `path` as PNG."""
    minutes = [sample.seconds / 60 for sample in samples]
    figure, (memory, latency, losses) = plt.subplots(3, 1, figsize=(9, 7), sharex=True, layout="constrained")
    memory.plot(minutes, [sample.rss_mb for sample in samples], label="resident")
    memory.plot(minutes, [sample.anonymous_mb for sample in samples], label="without shared memory and files")
    memory.axvline(result["warm_up_s"] / 60, color="0.7", linestyle=":", label="end of the warm-up")
    where = f"{result['cores_used']} of {result['machine_cores']} cores, {result['cpu']}"
    memory.set(ylabel="memory, MB", title=f"{result['model']}, {result['rate_hz']:.2f} sets/s on {where}")
    memory.set_ylim(bottom=0)
    latency.plot(minutes, [sample.p50_ms for sample in samples], label="p50")
    latency.plot(minutes, [sample.p99_ms for sample in samples], label="p99")
    latency.set(ylabel="last image to boxes, ms")
    latency.set_ylim(bottom=0)
    losses.step(
        minutes, [sample.lost for sample in samples], where="post", color="tab:red", label="lost sets"
    )
    losses.set(ylabel=f"lost of {result['sets_sent']} sets", xlabel="minutes")
    losses.set_ylim(0, max(2, 1.1 * samples[-1].lost))
    for axes in (memory, latency, losses):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)

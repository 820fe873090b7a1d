# SPDX-License-Identifier: Apache-2.0
"""`qdbev plot`: the loss curves of training runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  qdbev plot out/train/tiny_one_scene --mean 41 --out out/tiny_loss.png
  qdbev plot out/train/nano_town out/train/nano_town_2 --scalar loss/box --out out/compared.png"""
WINDOW = 0.05  # of a curve's length, over which the bold line averages


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plot",
        help="draw the loss of training runs",
        description="Draws a scalar of one or several runs against their steps: every step pale, the mean bold.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_folder", nargs="+", type=Path, metavar="RUN", help="`out` folder of a training run"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="F.png", help="picture to write")
    parser.add_argument(
        "--scalar",
        default="loss/total",
        help="what to draw, e.g. loss/class or score/NDS (default: loss/total)",
    )
    parser.add_argument(
        "--mean",
        type=int,
        metavar="N",
        help="steps that the bold line averages (default: a twentieth of the run)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from qdbev_ros.core.errors import ConfigError

    if args.mean is not None and args.mean < 1:
        raise ConfigError(f"--mean {args.mean}: give a number of steps")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from qdbev_ros.core.files import whole_file

    curves = {folder: read_scalar(folder, args.scalar) for folder in args.run_folder}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (folder, (steps, values)) in enumerate(curves.items()):
        colour = f"C{number}"
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        window = min(len(values), args.mean or max(1, round(len(values) * WINDOW)))
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        middle = (window - 1) // 2
        axes.plot(steps[middle : middle + len(mean)], mean, color=colour, linewidth=2, label=folder.name)
    axes.set(xlabel="step", ylabel=args.scalar)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(args.out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    print(f"wrote {args.out}")


def read_scalar(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a scalar that a run logged. Steps that a resumed run did again count once, as done last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from qdbev_ros.core.errors import DataError

    if not list(folder.glob("events.out.tfevents.*")):
        raise DataError(f"{folder}: no run has logged here; give the `out` folder of its configuration")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    known = events.Tags()["scalars"]
    if name not in known:
        raise DataError(f"{folder}: no scalar {name!r}; there are: {', '.join(known)}")
    points = {event.step: event.value for event in events.Scalars(name)}
    steps = sorted(points)
    return steps, [points[step] for step in steps]

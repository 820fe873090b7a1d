# SPDX-License-Identifier: Apache-2.0
"""`qdbev doctor`: what is wrong with a bag or with live topics, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.files import write_json

if TYPE_CHECKING:
    from qdbev_ros.core.doctor import Drive, Report

EXAMPLE = """example:
  qdbev doctor demo/town.mcap
  qdbev doctor drive.mcap --preset my_rig.yaml --json doctor.json
  qdbev doctor --live --seconds 20"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="find faults in a bag or in live topics before the detector trips over them",
        description="Checks calibration, transforms, stamps, rates and pictures, and says what to do about each fault."
        " Exit code: 0 nothing found, 1 something found, 2 bad input.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", nargs="?", type=Path, help=".mcap or .db3 file, or bag folder")
    parser.add_argument(
        "--live", action="store_true", help="look at the topics of the running graph instead of a bag"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="how long --live listens (default: %(default)s)"
    )
    parser.add_argument(
        "--preset", help="preset of config/presets or remapping file (default: the one that fits)"
    )
    parser.add_argument("--calibration", type=Path, help="calibration file that the detector will be given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_ros.core.doctor import diagnose
    from qdbev_ros.ros.calibration_file import load_calibration
    from qdbev_ros.ros.presets import load_preset

    if bool(args.bag) == args.live:
        raise ConfigError("give either a bag or --live")
    if args.seconds <= 0:
        raise ConfigError(f"--seconds is {args.seconds:g}; it must be positive")
    preset = load_preset(args.preset) if args.preset else None
    calibration = load_calibration(args.calibration) if args.calibration else None
    if args.live:
        from qdbev_ros.ros.listen import observe_live

        name, drive = observe_live(args.seconds, preset, calibration)
    else:
        from qdbev_ros.ros.observe import observe_bag

        name, drive = observe_bag(args.bag, preset, calibration)
    report = diagnose(drive)
    source = "live topics" if args.live else str(args.bag)
    if args.json:
        write_json(args.json, as_json(source, name, drive, report))
    print(as_text(source, name, drive, report))
    return 1 if report.findings else 0


def as_text(source: str, preset: str, drive: Drive, report: Report) -> str:
    """What the terminal shows."""
    pictures = [len(camera.pictures) for camera in drive.cameras.values()]
    lines = [f"{source}: preset {preset}, {sum(n > 0 for n in pictures)} cameras, {sum(pictures)} pictures"]
    for finding in report.findings:
        lines.append(f"\n{finding.where}: {finding.text}")
        lines.append(f"  do: {finding.advice}")
        if finding.confidence:
            lines.append(f"  sure: {finding.confidence}")
        lines.append(f"  [{finding.code}]")
    lines += [f"\nnote: {note}" for note in report.notes]
    lines.append(f"\n{len(report.findings)} findings" if report.findings else "\nnothing found")
    return "\n".join(lines)


def as_json(source: str, preset: str, drive: Drive, report: Report) -> dict[str, Any]:
    """What --json writes."""
    return {
        "source": source,
        "preset": preset,
        "healthy": not report.findings,
        "pictures": {name: len(camera.pictures) for name, camera in drive.cameras.items()},
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "notes": list(report.notes),
    }

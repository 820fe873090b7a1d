# SPDX-License-Identifier: Apache-2.0
"""`qdbev synth`: writes the synthetic town as a nuScenes data set."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from qdbev_ros.core.errors import ConfigError, QdbevError
from qdbev_ros.core.variant import CAMERAS

if TYPE_CHECKING:
    from qdbev_train.synthetic.writer import Job

SPLITS = {
    "train": "v1.0-trainval",
    "val": "v1.0-trainval",
    "mini_train": "v1.0-mini",
    "mini_val": "v1.0-mini",
}
EXAMPLE = "example: qdbev synth data/town --split train --scenes 300 --seed 1"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `synth` to the command line."""
    parser = subparsers.add_parser(
        "synth", help="write the synthetic data set in nuScenes format", epilog=EXAMPLE
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="data set folder; scenes that are there already are kept")
    parser.add_argument(
        "--split", choices=SPLITS, required=True, help="which official split the scenes take their names from"
    )
    parser.add_argument("--scenes", type=int, required=True, help="how many scenes of the split to have")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same scenes (default 1)")
    parser.add_argument(
        "--frames", type=int, default=20, help="keyframes per scene, two per second (default 20)"
    )
    parser.add_argument(
        "--size", default="400x225", metavar="WxH", help="size of the images (default 400x225)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw (default 2)")


def run(args: argparse.Namespace) -> int:
    """Makes the missing scenes, then the tables. Raises ConfigError or DataError on bad input."""
    from qdbev_train.synthetic.tables import LIDAR, assemble

    jobs = plan_jobs(args)
    make_all(jobs, args.jobs)
    folder = args.out / SPLITS[args.split]
    scenes = assemble(folder, [LIDAR, *CAMERAS])
    print(f"{folder}: {scenes} scenes")
    return 0


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """The scenes still to be made."""
    from qdbev_train.synthetic.writer import Job, Settings, finished

    width, height = parse_size(args.size)
    if args.frames < 2 or args.frames > 60:
        raise ConfigError(f"--frames {args.frames}: a scene has 2 to 60 keyframes")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: at least one process has to draw")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: give a number that is not negative")
    settings = Settings(args.seed, args.frames, width, height)
    names = scene_names(args.split, args.scenes)
    jobs = [Job(str(args.out), SPLITS[args.split], name, settings) for name in names]
    return [job for job in jobs if not finished(job)]


def scene_names(split: str, count: int) -> list[str]:
    """The first names of nuScenes' official split, so that its evaluation finds the scenes."""
    from nuscenes.utils import splits

    names: list[str] = list(getattr(splits, split))
    if not 1 <= count <= len(names):
        raise ConfigError(f"--scenes {count}: nuScenes' split {split} has names for 1 to {len(names)} scenes")
    return names[:count]


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a text like 400x225."""
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or min(map(int, numbers)) < 32:
        raise ConfigError(
            f"--size {text}: write it as WIDTHxHEIGHT, such as 400x225, at least 32 pixels each"
        )
    return int(numbers[0]), int(numbers[1])


def make_all(jobs: list[Job], processes: int) -> None:
    """Makes scenes, in this process where one is enough, with a progress bar."""
    from tqdm import tqdm

    from qdbev_train.synthetic.writer import make_scene

    os.environ.setdefault(
        "LP_NUM_THREADS", "0"
    )  # Mesa's software renderer: parallel scenes beat threads within one
    with tqdm(total=len(jobs), unit="scene", disable=not jobs) as bar:
        if processes == 1 or len(jobs) <= 1:
            for job in jobs:
                make_scene(job)
                bar.update()
            return
        processes = min(processes, len(jobs))
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            # The pool finishes whatever it was given, also after a failure or Ctrl-C: no more than it can begin.
            waiting = iter(jobs)
            running = {pool.submit(make_scene, job) for job in islice(waiting, processes)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bar.update()
                running |= {pool.submit(make_scene, job) for job in islice(waiting, len(done))}


def main() -> int:
    """Runs the command on its own, without the rest of `qdbev`."""
    import sys

    parser = argparse.ArgumentParser(prog="qdbev synth", epilog=EXAMPLE)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except QdbevError as error:
        print(f"qdbev: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

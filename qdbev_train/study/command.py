# SPDX-License-Identifier: Apache-2.0
"""`qdbev study`: what each step of the compression is worth."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  qdbev train config/train/nano_town.yaml            # the float teacher
  qdbev study config/study/nano_town.yaml            # every row: compress, score, weigh; then tables and plots
  qdbev study config/study/nano_town.yaml --report   # tables and plots of the rows that are finished
A study that was stopped goes on with the same command. On a machine with several cores or GPUs start it several times:
each takes the next row that no other works on."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "study",
        help="run the accuracy study: float, PTQ, QAT, progressive, distillation; resumable",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the study's rows, e.g. config/study/nano_town.yaml")
    parser.add_argument("--report", action="store_true", help="run nothing; write what is finished")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from qdbev_train.evaluation.metrics import require_devkit, require_tables
    from qdbev_train.study.config import read_study
    from qdbev_train.study.report import write_report
    from qdbev_train.study.run import run_study

    config = read_study(args.config)
    data = config.base["data"]
    require_devkit(data["version"], config.split)
    require_tables(Path(data["root"]) / data["version"])
    if not args.report:
        run_study(config)
    for path in write_report(config):
        print(f"wrote {path}")

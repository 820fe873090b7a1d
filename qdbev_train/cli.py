# SPDX-License-Identifier: Apache-2.0
"""The `qdbev` command. Each subcommand lives in its own module and imports what is heavy only when it runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from qdbev_ros.core.errors import QdbevError, install_hint

# Modules with add_parser(commands), in the order of the help text.
COMMANDS = (
    "qdbev_train.synthetic.command",
    "qdbev_train.data.index_command",
    "qdbev_train.init_command",
    "qdbev_train.training.command",
    "qdbev_train.training.plot_command",
    "qdbev_train.training.compress_command",
    "qdbev_train.study.command",
    "qdbev_train.released.command",
    "qdbev_train.export.command",
    "qdbev_train.export.parity_command",
    "qdbev_train.evaluation.command",
    "qdbev_train.evaluation.score_command",
    "qdbev_train.bags.command",
    "qdbev_ros.bench_command",
    "qdbev_ros.doctor_command",
    "qdbev_ros.foxglove_command",
    "qdbev_ros.rerun_command",
)

# The machine's and not ours: full, over quota, not to be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qdbev",
        description="Trains, compresses, packs and scores BEVFormer-style camera detectors.",
        epilog="example: qdbev bag --help",
    )
    parser.add_argument("--version", action="version", version=f"qdbev {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(name).add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Exit status: 0 done, 2 bad input (one line on stderr says which), 130 interrupted."""
    args = build_parser().parse_args(argv)
    log = logging.getLogger("qdbev_ros")
    log.setLevel(logging.INFO)
    log.handlers = [_Log()]
    try:
        status: int = args.run(args) or 0
        sys.stdout.flush()
        return status
    except QdbevError as error:
        print(f"qdbev: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("qdbev_ros", "qdbev_train")):
            raise
        print(
            f"qdbev: error: {install_hint(error)} (for training and scores requirements/test.txt)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as interruption:
        print(f"qdbev: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) went away, which is no error; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"qdbev: error: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return 2


class _Log(logging.Handler):
    """What takes long, and what is not kept, on standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with suppress(OSError):  # a log on a full disk
            tqdm.write(f"qdbev: {record.getMessage()}", file=sys.stderr)


def _version() -> str:
    from qdbev_train import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())

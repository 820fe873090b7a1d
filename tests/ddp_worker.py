# SPDX-License-Identifier: Apache-2.0
"""One process of a run under torchrun, for tests: `ddp_worker.py CONFIG`.

Trains until the last process gets a SIGTERM, which it sends to itself behind the first checkpoint, and then trains on.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from qdbev_train.cli import main
from qdbev_train.training import loop


def terminate_behind_the_first_checkpoint() -> None:
    """A thread that watches for the file would now and then be too late for so short a training."""
    save = loop._Run.save

    def save_and_terminate(run: loop._Run) -> None:
        save(run)
        loop._Run.save = save  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGTERM)

    loop._Run.save = save_and_terminate  # type: ignore[method-assign]


if __name__ == "__main__":
    config = Path(sys.argv[1])
    if os.environ["RANK"] == "1":
        terminate_behind_the_first_checkpoint()
    try:
        status = main(["train", str(config)])
    except SystemExit as leaving:
        status = leaving.code  # type: ignore[assignment]
    assert status == 130, status
    print(f"process {os.environ['RANK']} was stopped", flush=True)
    sys.exit(main(["train", str(config)]))

# SPDX-License-Identifier: Apache-2.0
"""One process of a run under torchrun, for tests: `ddp_worker.py CONFIG`.

Trains until the last process gets a SIGTERM, which it sends to itself when there is a checkpoint, and then trains on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from qdbev_train.cli import main


def terminate_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    config = Path(sys.argv[1])
    if os.environ["RANK"] == "1":
        last = config.with_suffix("") / "last.safetensors"
        threading.Thread(target=terminate_when, args=(last,), daemon=True).start()
    try:
        status = main(["train", str(config)])
    except SystemExit as leaving:
        status = leaving.code  # type: ignore[assignment]
    assert status == 130, status
    print(f"process {os.environ['RANK']} was stopped", flush=True)
    sys.exit(main(["train", str(config)]))

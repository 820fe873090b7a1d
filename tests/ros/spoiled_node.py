# SPDX-License-Identifier: Apache-2.0
"""The detector with errors that CAM_FRONT's picture asks for by its `format`: python -m tests.ros.spoiled_node

bug: taking the picture raises · nan: the engine's map holds NaN · slow: the engine takes SLOW_S ·
after: what comes after the answer raises. With $QDBEV_SPOILT=deactivate the first deactivation raises.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

from qdbev_ros.core.synchroniser import Synchroniser
from qdbev_ros.detector_node import main
from qdbev_ros.engine.engine import Engine
from qdbev_ros.ros.detector import Detector
from qdbev_ros.ros.overlay import Overlay

SLOW_S = 3.0
add, process, infer, show = Synchroniser.add, Detector._process, Engine.infer, Overlay.show
deactivate = Detector.deactivate
asked = ""  # of the set that is worked on


def spoiled_add(self: Any, camera: str, stamp_ns: int, payload: Any, now_s: float) -> Any:
    if payload.format == "bug":
        raise ValueError("max() arg is an empty sequence")
    return add(self, camera, stamp_ns, payload, now_s)


def spoiled_process(self: Any, job: Any) -> None:
    global asked
    front = job.cameras.get("CAM_FRONT")
    asked = "" if front is None else front.message.format
    process(self, job)


def spoiled_infer(self: Any, *inputs: Any) -> Any:
    if asked == "slow":
        print("slow set begun", flush=True)
        time.sleep(SLOW_S)
    answer = infer(self, *inputs)
    if asked == "nan":
        answer.bev[5, 3] = np.nan
    return answer


def spoiled_show(self: Any, job: Any, answer: Any) -> None:
    if asked == "after":
        raise ZeroDivisionError("division by zero")
    show(self, job, answer)


def spoiled_deactivate(self: Any) -> None:
    if os.environ.pop("QDBEV_SPOILT", "") == "deactivate":
        raise ZeroDivisionError("division by zero")
    deactivate(self)


if __name__ == "__main__":
    Synchroniser.add, Detector._process = spoiled_add, spoiled_process  # type: ignore[method-assign]
    Detector.deactivate = spoiled_deactivate  # type: ignore[method-assign]
    Engine.infer, Overlay.show = spoiled_infer, spoiled_show  # type: ignore[method-assign]
    sys.exit(main())

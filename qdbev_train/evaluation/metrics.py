# SPDX-License-Identifier: Apache-2.0
"""The official score: nuscenes-devkit's DetectionEval with the configuration detection_cvpr_2019."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.errors import DataError
from qdbev_train.evaluation.results import Entry, write_results

_ERRORS = {
    "mATE": "trans_err",
    "mASE": "scale_err",
    "mAOE": "orient_err",
    "mAVE": "vel_err",
    "mAAE": "attr_err",
}


@dataclass(frozen=True)
class Score:
    """NDS and mAP in 0..1; mean errors of true positives at 2 m: metres, 1 - IoU, radians, m/s, 1 - accuracy."""

    nds: float
    mAP: float
    errors: dict[str, float]
    class_ap: dict[str, float]
    frames: int
    boxes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; errors beside NDS, undefined ones as None."""
        data = asdict(self)
        errors = {k: None if np.isnan(v) else v for k, v in data.pop("errors").items()}
        return {"nds": data.pop("nds"), "mAP": data.pop("mAP")} | errors | data

    def text(self) -> str:
        """A few lines for the terminal."""
        head = f"NDS {self.nds:.4f}   mAP {self.mAP:.4f}   ({self.frames} frames, {self.boxes} boxes)"
        errors = "   ".join(f"{name} {value:.3f}" for name, value in self.errors.items())
        classes = "\n".join(f"  {name:<22}{ap:.3f}" for name, ap in self.class_ap.items())
        return f"{head}\n{errors}\nAP by class\n{classes}"


def official_score(root: Path, version: str, split: str, results: Mapping[str, list[Entry]]) -> Score:
    """Scores the samples that `results` names (empty lists count as nothing seen); all must be of `split`.

    Raises DataError where the devkit is missing or refuses the tables or the results.
    """
    try:
        from nuscenes import NuScenes
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.detection.evaluate import DetectionEval
    except ImportError as error:
        raise DataError(f"scoring needs nuscenes-devkit, which cannot be imported: {error}") from error
    config = config_factory("detection_cvpr_2019")
    boxes = sum(len(entries) for entries in results.values())
    if not boxes:
        return _nothing_seen(config.class_names, len(results))
    with tempfile.TemporaryDirectory(prefix="qdbev-eval-") as folder, _quiet():
        path = Path(folder) / "results.json"
        write_results(path, results)
        try:
            tables = _SomeSamples(NuScenes(version=version, dataroot=str(root), verbose=False), set(results))
            evaluation = DetectionEval(tables, config, str(path), split, folder, verbose=False)
            metrics, _ = evaluation.evaluate()
        except (AssertionError, KeyError, ValueError, OSError) as error:
            raise DataError(f"{root / version}, split {split}: the devkit refuses: {error}") from error
    summary = metrics.serialize()
    return Score(
        nds=float(summary["nd_score"]),
        mAP=float(summary["mean_ap"]),
        errors={name: float(summary["tp_errors"][key]) for name, key in _ERRORS.items()},
        class_ap={name: float(summary["mean_dist_aps"][name]) for name in config.class_names},
        frames=len(results),
        boxes=boxes,
    )


class _SomeSamples:
    """The devkit's tables with fewer samples: the devkit scores all samples of a split or none."""

    def __init__(self, tables: Any, tokens: set[str]) -> None:
        self._tables = tables
        self.sample = [s for s in tables.sample if s["token"] in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)


def _nothing_seen(classes: list[str], frames: int) -> Score:
    """The score of no box at all, which the devkit cannot work out: every error is 1 by its definition."""
    return Score(0.0, 0.0, dict.fromkeys(_ERRORS, 1.0), dict.fromkeys(classes, 0.0), frames, 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallows the devkit's progress bars and prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield

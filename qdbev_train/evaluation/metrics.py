# SPDX-License-Identifier: Apache-2.0
"""The official score: nuscenes-devkit's DetectionEval with the configuration detection_cvpr_2019."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.errors import DataError
from qdbev_train.evaluation.results import Entry, write_results

_ERRORS = {
    "ATE": "trans_err",
    "ASE": "scale_err",
    "AOE": "orient_err",
    "AVE": "vel_err",
    "AAE": "attr_err",
}
_VERSION_OF = {  # official split -> end of the version that holds it; splits of one's own go with any
    "train": "trainval",
    "val": "trainval",
    "train_detect": "trainval",
    "train_track": "trainval",
    "mini_train": "mini",
    "mini_val": "mini",
    "test": "test",
}
DISTANCES = ("0.5", "1.0", "2.0", "4.0")  # metres between centres within which a detection is a true one


@dataclass(frozen=True)
class ClassScore:
    """One class: `ap_at` distance in metres -> average precision, ap their mean, errors as in Score, or NaN."""

    ap: float
    ap_at: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Score:
    """NDS and mAP in 0..1; mean errors of true positives at 2 m: metres, 1 - IoU, radians, m/s, 1 - accuracy."""

    nds: float
    mAP: float
    errors: dict[str, float]
    classes: dict[str, ClassScore]
    frames: int
    boxes: int

    @property
    def class_ap(self) -> dict[str, float]:
        """Average precision of each class, over all distances."""
        return {name: of.ap for name, of in self.classes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; errors beside NDS, undefined ones as None."""
        classes = {
            name: {"ap": of.ap, "ap_at": of.ap_at, "errors": _defined(of.errors)}
            for name, of in self.classes.items()
        }
        numbers = {"nds": self.nds, "mAP": self.mAP, **_defined(self.errors)}
        counts = {"frames": self.frames, "boxes": self.boxes}
        return numbers | {"class_ap": self.class_ap} | counts | {"classes": classes}

    def text(self) -> str:
        """The numbers for the terminal: one line of scores, one of errors, a table of classes as the devkit's."""
        head = f"NDS {self.nds:.4f}   mAP {self.mAP:.4f}   ({self.frames} frames, {self.boxes} boxes)"
        errors = "   ".join(f"{name} {value:.3f}" for name, value in self.errors.items())
        columns = ["AP", *(f"@{distance}m" for distance in DISTANCES), *_ERRORS]
        rows = [f"{'class':<22}" + "".join(f"{column:>8}" for column in columns)]
        for name, of in self.classes.items():
            values = [of.ap, *of.ap_at.values(), *of.errors.values()]
            rows.append(f"{name:<22}" + "".join(f"{value:>8.3f}" for value in values))
        return "\n".join([head, errors, *rows])


def _defined(errors: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if np.isnan(value) else value for name, value in errors.items()}


def require_devkit(version: str, split: str) -> None:
    """Refuses at once what the devkit would refuse once the detections are there, which may take hours."""
    try:
        import nuscenes.eval.detection.evaluate  # noqa: F401 - whether it can be
    except ImportError as error:
        raise DataError(f"scoring needs nuscenes-devkit, which cannot be imported: {error}") from error
    suffix = _VERSION_OF.get(split)
    if suffix is not None and not version.endswith(suffix):
        raise DataError(
            f"split {split} belongs to tables whose version ends in {suffix!r}, not to {version}; choose --split"
        )


def official_score(root: Path, version: str, split: str, results: Mapping[str, list[Entry]]) -> Score:
    """Scores the samples that `results` names (empty lists count as nothing seen); all must be of `split`.

    Raises DataError where the devkit is missing or refuses the tables or the results.
    """
    require_devkit(version, split)
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

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
        errors={f"m{name}": float(summary["tp_errors"][key]) for name, key in _ERRORS.items()},
        classes={name: _class_score(summary, name) for name in config.class_names},
        frames=len(results),
        boxes=boxes,
    )


def _class_score(summary: Mapping[str, Any], name: str) -> ClassScore:
    """One class out of the devkit's summary."""
    return ClassScore(
        ap=float(summary["mean_dist_aps"][name]),
        ap_at={distance: float(summary["label_aps"][name][float(distance)]) for distance in DISTANCES},
        errors={short: float(summary["label_tp_errors"][name][key]) for short, key in _ERRORS.items()},
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
    nothing = ClassScore(0.0, dict.fromkeys(DISTANCES, 0.0), dict.fromkeys(_ERRORS, 1.0))
    return Score(0.0, 0.0, {f"m{e}": 1.0 for e in _ERRORS}, dict.fromkeys(classes, nothing), frames, 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallows the devkit's progress bars and prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield

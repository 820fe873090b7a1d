# SPDX-License-Identifier: Apache-2.0
"""The official score: nuscenes-devkit's DetectionEval with the configuration detection_cvpr_2019."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose
from qdbev_train.evaluation.results import Entry, result_entries, write_results

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
_TABLES = (  # all that the devkit reads
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
    "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip
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


def require_tables(folder: Path) -> None:
    """Refuses at once tables that the devkit would refuse later: it reads some that nothing else here needs."""
    lacking = [f"{name}.json" for name in _TABLES if not (folder / f"{name}.json").is_file()]
    if lacking:
        raise DataError(f"{folder}: lacks {', '.join(lacking)}, without which nuscenes-devkit does not score")


def devkit_tables(root: Path, version: str, split: str, tokens: Sequence[str]) -> Any:
    """The samples `tokens` as the devkit reads them, for `official_score`.

    A made-up box is scored on them (3 ms a sample), so that what the devkit refuses in them is known before the first
    frame. On all of nuScenes the reading takes long, but the score has to do it anyway. Raises DataError.
    """
    with _devkit(root / version, split):
        tables = _SomeSamples(root, version, set(tokens))
    ones = np.ones((1, 3))
    box = Boxes(ones, ones, ones[0, :1], ones[:, :2], ones[0, :1], np.zeros(1, np.int64))
    entries = result_entries(tokens[0], box, Pose.identity(), Pose.identity())
    official_score(root, version, split, {token: [] for token in tokens} | {tokens[0]: entries}, tables)
    return tables


def official_score(
    root: Path, version: str, split: str, results: Mapping[str, list[Entry]], tables: Any = None
) -> Score:
    """Scores the samples that `results` names (empty lists count as nothing seen); all must be of `split`.

    `tables` are what `devkit_tables` gave for these samples; without, they are read here. Raises DataError where the
    devkit is missing or refuses the tables or the results.
    """
    require_devkit(version, split)
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    config = config_factory("detection_cvpr_2019")
    boxes = sum(len(entries) for entries in results.values())
    if not boxes:
        return _nothing_seen(config.class_names, len(results))
    with tempfile.TemporaryDirectory(prefix="qdbev-eval-") as folder:
        path = Path(folder) / "results.json"
        write_results(path, results)
        with _devkit(root / version, split):
            if tables is None:
                tables = _SomeSamples(root, version, set(results))
            evaluation = DetectionEval(tables, config, str(path), split, folder, verbose=False)
            metrics, _ = evaluation.evaluate()
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

    def __init__(self, root: Path, version: str, tokens: set[str]) -> None:
        from nuscenes import NuScenes

        self._tables = NuScenes(version=version, dataroot=str(root), verbose=False)
        self.sample = [s for s in self._tables.sample if s["token"] in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)


def _nothing_seen(classes: list[str], frames: int) -> Score:
    """The score of no box at all, which the devkit cannot work out: every error is 1 by its definition."""
    nothing = ClassScore(0.0, dict.fromkeys(DISTANCES, 0.0), dict.fromkeys(_ERRORS, 1.0))
    return Score(0.0, 0.0, {f"m{e}": 1.0 for e in _ERRORS}, dict.fromkeys(classes, nothing), frames, 0)


@contextlib.contextmanager
def _devkit(folder: Path, split: str) -> Iterator[None]:
    """Swallows the devkit's bars and prints; what it raises, of whatever type, becomes a DataError of one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{folder}, split {split}: the devkit refuses: {words}") from error
